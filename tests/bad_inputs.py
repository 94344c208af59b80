"""Bad inputs, made from one small run: every stage refuses them in one sentence or reports them.

    .venv/bin/python tests/bad_inputs.py [--kind NAME] [--run FOLDER] [--all]

prints how many cases of each kind had which outcome, and what went wrong. A case (`bad_cases.py`)
damages a copy of the run's files or names a wrong option; the stage concerned is run on it:

    sentence   exit code above 0, and one line on stderr that begins with `error:`
    handled    exit code 0, and the damage is reported: a rejected row with its reason, or a note
    traceback  a traceback, or an end without a sentence
    silent     exit code 0 although the input is wrong
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from bad_cases import STAGES, Place, all_cases
from conftest import ROOT, small_config
from conftest import STAGES as ALL_STAGES
from fork_server import HEAVY, LIGHT, ForkServer

OUTCOMES = ("sentence", "handled", "traceback", "silent")
# Behind what is wrong stands what to do about it.
REMEDY = re.compile(
    r"; |must |choose |needs |cannot be used|change |README|lower |raise |give |--help"
)
TOGETHER = 4  # cases that run at the same time


class Servers:
    """Fork servers for stages with and without torch, started when they are needed."""

    def __init__(self, folder):
        self.folder, self.started = folder, {}

    def server(self, modules):
        name = "heavy" if modules is HEAVY else "light"
        if name not in self.started:
            (self.folder / name).mkdir()
            self.started[name] = ForkServer(
                self.folder / name, modules, ROOT, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"
            )
        return self.started[name]

    def run(self, jobs, modules):
        """What became of (words, environment) each, which run at the same time."""
        jobs = [
            {"words": ["tests/quick_exit.py", *words], "environment": more, "kill_after": 0}
            for words, more in jobs
        ]
        return self.server(modules).run_together(*jobs)

    def close(self):
        for server in self.started.values():
            server.close()


def make_run(folder, servers):
    """All stages once; returns the config."""
    config = str(small_config(folder))
    for stage in ALL_STAGES:
        more = [["--adapter", "none", "--hide", "nothing"], []] if "sft.py" in stage[-22:] else [[]]
        for words in more if "test_with" in stage else [[]]:
            done = servers.server(HEAVY).run(stage, "--config", config, *words)
            assert done.returncode == 0, done.stderr


def make_interrupted(run, folder, servers):
    """A copy of the run whose stage 2 was killed after 20 rows."""
    place = Place(folder, run)
    place.link_all(STAGES["summary"].outputs)
    words = [STAGES["summary"].script, *place.options()]
    done = servers.server(HEAVY).run(*words, kill_after=20)
    assert done.returncode == -9, done.stderr


def judge(case, done, reports):
    """(outcome, what is not as the case expects or None). reports: texts of rejected rows."""
    text = done.stderr
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    if done.returncode != 0:
        if "Traceback" in text or len(errors) != 1 or done.returncode < 0:
            last = (text.strip().splitlines() or ["nothing on stderr"])[-1]
            return "traceback", f"exit {done.returncode}: {last[:300]}"
        if case.handled:
            return "sentence", f"expected /{case.says}/, not {errors[0][:400]}"
        if not re.search(case.says, errors[0]):
            return "sentence", f"expected /{case.says}/, not {errors[0][:400]}"
        if not REMEDY.search(errors[0]):
            return "sentence", f"no remedy: {errors[0][:400]}"
        return "sentence", None
    shown = done.stdout + text + reports
    if not case.handled:
        return "silent", f"exit 0: {' '.join(done.stdout.split())[-200:]}"
    if "Traceback" in text:
        return "traceback", text[-300:]
    if not re.search(case.says, shown):
        return "silent", f"expected /{case.says}/, not {' '.join(shown.split())[-400:]}"
    return "handled", None


def run_cases(cases, run, folder, servers):
    """Yield (case, outcome, fault or None). run: folder of a finished small run."""
    bases = {"run": Path(run), "interrupted": folder / "interrupted"}
    if any(case.base == "interrupted" for case in cases):
        make_interrupted(Path(run), bases["interrupted"], servers)
    waiting = []
    for number, case in enumerate(cases):
        place = Place(folder / f"case{number}", bases[case.base])
        place.link_all(() if case.keep_outputs else STAGES[case.stage].outputs, case.bare)
        case.damage(place)
        waiting.append((case, place))
        following = cases[number + 1] if number + 1 < len(cases) else None
        if following and len(waiting) < TOGETHER and following.modules is case.modules:
            continue
        yield from _run_together(waiting, servers)
        waiting = []


def _run_together(waiting, servers):
    jobs = [(case.words(place), case.environment) for case, place in waiting]
    if waiting[0][0].modules is None:
        ended = [_shell(words, environment) for words, environment in jobs]
    else:
        ended = servers.run(jobs, waiting[0][0].modules)
    for (case, place), done in zip(waiting, ended, strict=True):
        yield case, *judge(case, done, place.reports())
        shutil.rmtree(place.folder)


def _shell(words, environment):
    environment = {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return SimpleNamespace(**vars(done))


def in_order(cases):
    """Cases sorted such that those of one server follow each other."""
    order = {id(LIGHT): 0, id(HEAVY): 1, id(None): 2}
    return sorted(cases, key=lambda case: order[id(case.modules)])


def table(results):
    """Lines with the counts by kind and outcome."""
    counts = Counter((case.kind, outcome) for case, outcome, _ in results)
    kinds = list(dict.fromkeys(kind for kind, _ in sorted(counts)))
    lines = [f"{'kind':12}" + "".join(f"{name:>11}" for name in (*OUTCOMES, "unexpected"))]
    for kind in (*kinds, "all"):
        of_kind = [r for r in results if kind in (r[0].kind, "all")]
        cells = [sum(outcome == name for _, outcome, _ in of_kind) for name in OUTCOMES]
        cells.append(sum(fault is not None for *_, fault in of_kind))
        lines.append(f"{kind:12}" + "".join(f"{n:>11}" for n in cells))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", help="only the cases of this kind")
    parser.add_argument("--name", default="", help="only cases whose name matches")
    parser.add_argument("--run", help="folder of a finished small run; default: make one")
    given = parser.parse_args()
    cases = [c for c in all_cases() if given.kind in (None, c.kind)]
    cases = in_order([c for c in cases if re.search(given.name, c.name)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        servers = Servers(folder)
        run = Path(given.run or folder / "run")
        if not given.run:
            run.mkdir()
            make_run(run, servers)
        results = []
        for result in run_cases(cases, run, folder, servers):
            results.append(result)
            case, outcome, fault = result
            if fault:
                print(f"{outcome:10}{case.kind}: {case.stage}: {case.name}: {fault}", flush=True)
        servers.close()
    print("\n".join(table(results)))
    return any(fault for *_, fault in results)


if __name__ == "__main__":
    sys.exit(main())
