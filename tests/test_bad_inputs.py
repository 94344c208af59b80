"""Every bad input ends in one sentence or is reported; none ends in a traceback or in silence."""

import pytest
from bad_cases import all_cases
from bad_inputs import Servers, in_order, run_cases, table
from fork_server import LIGHT

# One case of each kind that needs no model: kind -> its name.
FAST = {
    "keys": "users.jsonl target missing",
    "files": "users.jsonl: UTF-16",
    "meaning": "target among negatives",
    "options": "'--seed=nan'",
    "config": "base loop",
    "records": "sample: empty",
    "raw": "M_pairs.csv: milliseconds in one line",
    "images": "EPS, stage 4",
}


def check(cases, small_run, folder):
    """Run the cases; every one must have the outcome that it names."""
    servers = Servers(folder)
    try:
        results = list(run_cases(in_order(cases), small_run.folder, folder, servers))
    finally:
        servers.close()
    print("\n".join(table(results)))
    assert [
        f"{o}: {c.kind}: {c.stage}: {c.name}: {fault}" for c, o, fault in results if fault
    ] == []
    assert {outcome for _, outcome, _ in results} <= {"sentence", "handled"}


@pytest.fixture(scope="module")
def cases():
    return all_cases()


def test_one_bad_input_of_each_kind(small_run, tmp_path, cases):
    chosen = {
        kind: next(c for c in cases if (c.kind, c.name) == (kind, name) and c.modules is LIGHT)
        for kind, name in FAST.items()
    }
    check(list(chosen.values()), small_run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({case.kind for case in all_cases()}))
def test_bad_inputs(small_run, tmp_path, cases, kind):
    check([case for case in cases if case.kind == kind], small_run, tmp_path)
