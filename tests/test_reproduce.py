"""The tables of configs/tables/ say what stages take; a small table from beginning to end."""

import functools
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from test_readme import options_class

from mllmrec.evaluation.metrics import evaluate
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.options import load_config, parse_options
from mllmrec.stage.scripts import load_script

definitions = load_script("scripts/reproduce/definitions.py")
reproduction = load_script("scripts/reproduce/run_table.py")
TABLES = {name: definitions.read_table(name) for name in definitions.table_names()}
ROWS = {f"{name}-{key}": row for name, own in TABLES.items() for key, row in own.rows.items()}
SCORE = "MLLM-MSR/test/test_with_llava_sft.py"
# numbered script -> the Python stage that gets its options
STAGE_OF = {
    "01_prepare_data": "data_processing/sample.py",
    "02_image_summary": "Inference/image_summary.py",
    "03_preference": "Inference/preference_recurrent.py",
    "04_datasets": "MLLM-MSR/train/dataset_create.py",
    "05_train": "MLLM-MSR/train/train_llava_sft.py",
    "MLLM4Rec/process_item_blip2.py": "Inference/image_summary.py",
}
stage_of = functools.cache(load_script)


@functools.cache
def step_options(step):
    """The options object of a step, as its stage would parse them."""
    script, *words = shlex.split(re.sub(r"\{(mllm_msr|mllm4rec|text_model)\}", r"x/\1", step))
    stage = stage_of(STAGE_OF.get(script, script))
    words += ["--config", str(ROOT / "configs/sample.yaml")]
    return parse_options(options_class(stage), getattr(stage, "SECTION", "datasets"), words)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_step_of_a_row_is_a_stage_that_takes_its_options(row):
    for step in (f"01_prepare_data {row.stage_1}", *row.steps):
        name = shlex.split(step)[0]
        assert (ROOT / f"scripts/{name}.sh").exists() or (ROOT / name).exists()
        step_options(step)
    if not row.steps:  # stage 1 writes its scores
        assert row.scores.startswith("bounds/")
        return
    if row.steps[-1].startswith("scripts/reproduce/list_rules.py"):
        rules = stage_of("scripts/reproduce/list_rules.py").RULES
        assert row.scores in {f"list_rules/retrieved_{rule}" for rule in rules}
        return
    last = step_options(row.steps[-1])
    if row.steps[-1].startswith("MLLM4Rec/train_ranker.py"):
        folders = {last.ranked, last.variant, "retriever_order", "random_order", "retriever"}
        folders |= {"zero_shot_ranked"} if last.adapter == "none" else set()
        assert row.scores in {f"{last.system}/{name}" for name in folders}
        return
    written = getattr(last, "variant", "") or row.scores.rpartition("/")[2]
    hidden = {"sft_no_image": ["image"], "sft_no_preference": ["preference"]}
    assert getattr(last, "hide", ["nothing"]) == hidden.get(written, ["nothing"])
    assert row.scores == f"{last.system}/{written}", "it writes the scores that are read"


def test_each_deviation_is_the_released_codes_value():
    """What the rows of the deviations change are values of the released config, and all of them."""
    released = load_config(ROOT / "configs/systems/mllm_msr_released.yaml")
    sections = {"05_train": "train", SCORE: "score", "04_datasets": "datasets"}
    rows, seen = TABLES["deviations"].rows, {}
    for key in ("sequence", "vision", "optimiser", "question", "raw", "bare", "released"):
        for step in rows[key].steps:
            script, *words = shlex.split(step)
            known = released.get(sections.get(script), {})
            for option, value in itertools.pairwise(words):
                name = option.removeprefix("--")
                if name not in (option, "allow_other") and name in known:
                    assert str(known[name]).lower() == value.lower(), name
                    seen.setdefault(key, set()).add((sections[script], name))
    sizes = {"dtype", "limit", "epochs", "accumulation", "lora_r", "max_text_tokens"}
    sizes |= {"reuse_prefix", "allow_other"}  # what depends on the size of models and data
    wanted = {(s, n) for s in sections.values() for n in released[s] if n not in sizes}
    assert seen.pop("released") == wanted
    assert wanted - {("score", "pad_images")} <= set().union(*seen.values()), "row `padded`"


MISTAKES = {
    "{label: a, scores: a/a, steps: [], wrld: main}": "rows.a.wrld",
    "{label: a, scores: a/a}": "'rows.a.steps' is missing",
    "{label: a, scores: a/a, steps: [], world: moon}": "rows.yaml has no 'moon'",
    "{like: popularty}": "rows.yaml has no 'popularty'",
    "popularity": "input should be a valid dictionary",
    "{like: sasrec, world: popular, against: b}": "'b' is no row of the same table and data",
}


@pytest.mark.parametrize("row", MISTAKES)
def test_a_table_with_a_mistake_is_refused(tmp_path, row):
    (tmp_path / "rows.yaml").write_text((definitions.FOLDER / "rows.yaml").read_text())
    (tmp_path / "t.yaml").write_text(f"about: t\nrows:\n  b: {{like: sasrec}}\n  a: {row}\n")
    with pytest.raises(InputError, match=f"t.yaml.*{re.escape(MISTAKES[row])}"):
        definitions.read_table("t", tmp_path)


def reproduce(folder, table, *words, configs=()):
    """Run a table, on a small world unless configs are named."""
    small = {"n_users": 40, "n_items": 60, "train_fraction": 0.5}
    config = {"base": str(ROOT / "configs/sample.yaml"), "dataset": "sample", "data": small}
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    command = ["bash", "scripts/reproduce.sh", table, *(configs or [str(folder / "c.yaml")])]
    command += [*words, "--output", str(folder / "out"), "--resamples", "20"]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_table_of_two_seeds_resumes_and_has_an_interval_for_each_cell(tmp_path):
    words = ("sample", "--rows", "popularity", "title_only", "--seeds", "1", "2", "--jobs", "2")
    done, out = reproduce(tmp_path, *words), tmp_path / "out"
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "sample.json").read_text())
    for row in report["rows"].values():
        assert row["per_seed"].keys() == {"1", "2"}
        mean = sum(run["auc"] for run in row["per_seed"].values()) / 2
        assert row["metrics"]["auc"] == pytest.approx(mean)
        assert row["metrics"]["auc_ci95"][0] < mean < row["metrics"]["auc_ci95"][1]
    text = (out / "sample.md").read_text()
    scores = out / "main-1/baselines/popularity/scores.jsonl"
    before = scores.stat().st_mtime_ns
    assert reproduce(tmp_path, *words).returncode == 0
    assert scores.stat().st_mtime_ns == before
    assert (out / "sample.md").read_text() == text


@pytest.mark.slow
def test_each_fold_is_tested_once_by_one_command(tmp_path):
    words = ("sample", "--rows", "popularity", "--seeds", "1", "--folds", "2")
    done, out = reproduce(tmp_path, *words), tmp_path / "out"
    assert done.returncode == 0, done.stdout + done.stderr
    files = [out / f"main-1-fold{n}/baselines/popularity/scores.jsonl" for n in (0, 1)]
    files.append(out / "main-1-fold0/data/users.jsonl")
    first, second, everyone = (
        {json.loads(line)["user_id"] for line in path.read_text().splitlines()} for path in files
    )
    assert not first & second and first | second == everyone
    assert "mean of the 2 folds, seed 1" in (out / "sample.md").read_text()
    assert (out / "sample.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_row_that_fails_is_not_run_and_the_others_are(tmp_path):
    (tmp_path / "out/main-1/baselines/popularity/scores.jsonl").mkdir(parents=True)
    done = reproduce(tmp_path, "sample", "--rows", "popularity", "title_only", "--seeds", "1")
    assert done.returncode == 1
    assert "not run: popularity: MLLM-MSR/baselines/popularity.py: error" in done.stderr
    assert "1 of 2 rows were not run" in done.stderr
    text = (tmp_path / "out" / "sample.md").read_text()
    assert "| popularity | not run | not run |" in text
    assert re.search(r"\| `title_only` \| \d", text)


@pytest.mark.slow
def test_statistics_of_data_that_are_there_and_not_run_where_they_are_not(tmp_path):
    absent = tmp_path / "absent.yaml"
    section = {"raw_dir": str(tmp_path / "none"), "paper_users": 25411}
    absent.write_text(yaml.safe_dump({"dataset": "microlens", "data": section}))
    done = reproduce(tmp_path, "table2", configs=(str(tmp_path / "c.yaml"), str(absent)))
    assert done.returncode == 1
    assert "not run: absent: error: " in done.stderr and "none has no *_pairs.csv" in done.stderr
    text = (tmp_path / "out/table2.md").read_text()
    assert re.search(r"\| c \| here \| 40 \| 60 \| [\d,]+ \|", text)
    assert (tmp_path / "out/c/bounds").is_dir(), "not in the folder of the config"
    assert "| absent | here | not run |" in text and "| absent | paper | 25,411 |" in text


def wait_until(holds):
    """At most a minute."""
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it does not come about")


def test_a_signal_ends_all_runs_and_no_other_step_is_started(tmp_path, monkeypatch):
    """Also what a step has started itself, as a numbered script starts its stage."""

    def command(run, step):
        if run.repeat.seed == 1:
            wait_until(lambda: number.exists() and number.read_text())
            raise KeyboardInterrupt
        return ["bash", "-c", f"sleep 600 & echo $! > {number}; wait"]

    number = tmp_path / "pid"
    monkeypatch.setattr(reproduction.Run, "command", command)
    repeats = [reproduction.SeedAndFold(seed, None) for seed in (1, 2)]
    args = SimpleNamespace(repeats=repeats, jobs=2, folds=0, output=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        reproduction.run_rows({"popularity": TABLES["table3"].rows["popularity"]}, args)
    assert (tmp_path / "logs/main-2.log").read_text().count("$ bash") == 1
    running = tmp_path.joinpath("/proc", number.read_text().strip(), "cmdline")
    wait_until(lambda: not running.exists() or "sleep" not in running.read_text())


def test_a_wrong_command_is_refused(capsys):
    for words, says in (
        (("table3", "--rows", "sasrek"), "there is no row 'sasrek'; choose from popularity"),
        (("tabel3",), "there is no table 'tabel3'; choose one of: cold, controls"),
    ):
        with pytest.raises(InputError, match=says):
            reproduction.main([words[0], "configs/sample.yaml", *words[1:]])
        assert capsys.readouterr().out == ""


def test_a_table_of_new_items_has_both_groups_and_compares_the_new_ones(tmp_path):
    where = ["--config", str(ROOT / "configs/sample.yaml"), "--output_dir", str(tmp_path)]
    where += ["--data_dir", str(tmp_path / "data")]
    small = ["--n_users", "120", "--n_items", "160", "--cold_items", "0.25"]
    load_script("data_processing/sample.py").main([*where, *small])
    load_script("MLLM-MSR/baselines/popularity.py").main(where)
    table, run = TABLES["cold"], SimpleNamespace(folder=tmp_path, failed={})
    rows = {key: replace(table.rows["popularity"], against="a") for key in "ab"}
    repeat = reproduction.SeedAndFold(1, None)
    args = SimpleNamespace(repeats=[repeat], resamples=20)
    found = reproduction.measure(table, rows, {(repeat, "cold"): run}, args)
    metrics = found["b"]["metrics"]
    assert metrics["users_known"] + metrics["users_new"] == metrics["users"]
    assert min(metrics["users_known"], metrics["users_new"]) > 0
    assert found["b"]["differences"]["auc"]["value"] == 0
    users = read_rows(tmp_path / "data/users.jsonl")
    new = {user["user_id"] for user in users if user["split"] == "test" and user["cold"]}
    lines = read_rows(run.folder / rows["a"].scores / "scores.jsonl")
    own = evaluate([row for row in lines if row["user_id"] in new], resamples=1)
    assert metrics["auc_new"] == own["auc"]
    assert "weights" not in found["b"]["last_stage"][0]
    record = {"seconds": 2, "inputs": {"m/model.safetensors": "ab", "m/config.json": "c"}}
    kept = {"seconds": 2, "weights": {"m/model.safetensors": "ab"}}
    assert reproduction.last_stage(record) == kept


def test_costs_are_drawn_over_the_seconds_of_a_user():
    writer = load_script("scripts/reproduce/table_writer.py")
    report = json.loads((ROOT / "results/sample/systems.json").read_text())
    assert writer.cost_chart(report).startswith(b"\x89PNG")
    del report["rows"]["full"]["costs"]
    with pytest.raises(KeyError):
        writer.cost_chart(report)


def test_the_page_of_results_is_what_the_files_of_results_say():
    page = load_script("scripts/reproduce/results_page.py")
    assert (ROOT / "docs/results.md").read_text() == page.render()
    assert page.CHARTS and all(path.exists() for path in page.CHARTS)
    with pytest.raises(KeyError, match="no_such_row"):
        page.row("sample/deviations", "no_such_row")


def test_the_tour_is_what_its_files_say_and_names_functions_that_are_there():
    tour = load_script("scripts/reproduce/tour.py")
    page = tour.PAGE.read_text()
    assert page == tour.render(tour.read_json(tour.FACTS))
    named = re.findall(r"`(\w+)` in `([\w/.-]+\.py)`", page)
    assert len(named) >= 8
    for function, path in named:
        assert f"\ndef {function}(" in (ROOT / path).read_text(), (function, path)


def test_the_tour_shows_what_the_stages_used(small_run):
    """Prompts, tokens and order of a run of the tests, beside its files."""
    tour = load_script("scripts/reproduce/tour.py")
    users = [row for row in read_rows(small_run.folder / "users.jsonl") if row["split"] == "test"]
    user = max(users, key=lambda row: len(row["history"]))
    facts = tour.collect(small_run.folder, user["user_id"])
    assert len(facts["prompts"]) == len(facts["blocks"]) > 1
    for prompt, before, block in zip(
        facts["prompts"][1:], facts["blocks"], facts["blocks"][1:], strict=False
    ):
        assert before["preference"] in prompt
        assert all(facts["titles"][item] in prompt for item in block["items"])
    question = facts["question"]
    assert question["tokens"][-2:] == question["predicted"] == ["ĠYes", "</s>"]
    assert question["tokens"].count("<image>") == 1 < question["n_image_tokens"]
    best, *_, worst = facts["sft"]
    assert len(facts["sft"]) == 21 and best["score"] > worst["score"]
    target = facts["sft"][tour.rank_of(facts["sft"]) - 1]
    yes, no = (math.exp(target["logits"][name]) for name in ("Yes", "No"))
    assert target["score"] == pytest.approx(yes / (yes + no), abs=1e-6)
    assert tour.metrics(4, 5) == {"HR": 1, "MRR": 0.25, "NDCG": 1 / math.log2(5)}
    assert tour.metrics(6, 5) == {"HR": 0, "MRR": 0, "NDCG": 0}


def test_no_result_is_typed_into_the_page():
    """Every figure comes from a file of results/ or published.yaml; settings may be named."""
    template = (ROOT / "docs/results.md.j2").read_text()
    prose = re.sub(r"\{\{.*?\}\}|`[^`]*`", "", template, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+(?![\de])", prose) == []
    used = set(re.findall(r"\"([a-z_0-9]+/[a-z_0-9]+)\"", template))
    made = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "results").rglob("*.json")}
    assert {name for name in made if not name.startswith("benchmarks/")} == used, "all are shown"
