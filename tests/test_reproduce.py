"""The tables' commands exist and take their options; a small table from beginning to end."""

import functools
import itertools
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from mllmrec.evaluation.result_tables import difference_cell
from mllmrec.stage.options import load_config, parse_options
from mllmrec.stage.scripts import load_script

rows = load_script("scripts/reproduce/rows.py")
ALL_ROWS = {row: f"{table}-{key}" for table, own in rows.TABLES.items() for key, row in own.items()}
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
    for place in ("full", "second", "text_model"):
        step = step.replace(f"{{{place}}}", f"x/{place}")
    words = shlex.split(step)
    stage = stage_of(STAGE_OF.get(words[0], words[0]))
    options_class = getattr(stage, "Options", None) or stage.DatasetOptions
    section = getattr(stage, "SECTION", "datasets")
    return options_class, parse_options(
        options_class, section, ["--config", str(ROOT / "configs/sample.yaml"), *words[1:]]
    )


@pytest.mark.parametrize("row", ALL_ROWS, ids=ALL_ROWS.values())
def test_every_step_of_a_row_is_a_stage_that_takes_its_options(row):
    for step in (f"01_prepare_data {rows.WORLDS[row.world]}", *row.steps):
        name = shlex.split(step)[0]
        assert (ROOT / f"scripts/{name}.sh").exists() or (ROOT / name).exists()
        step_options(step)
    if not row.steps:  # stage 1 writes its scores
        assert row.scores.startswith("bounds/")
        return
    last = step_options(row.steps[-1])[1]
    if row.steps[-1].startswith("MLLM4Rec/train_ranker.py"):
        folders = {last.ranked, last.variant, "retriever_order", "random_order", "retriever"}
        assert row.scores in {f"{last.system}/{name}" for name in folders}
        return
    written = getattr(last, "variant", "") or row.scores.rpartition("/")[2]
    hidden = {"sft_no_image": ["image"], "sft_no_preference": ["preference"]}
    assert getattr(last, "hide", ["nothing"]) == hidden.get(written, ["nothing"])
    assert row.scores == f"{last.system}/{written}", "it writes the scores that are read"


@pytest.mark.parametrize("table", rows.TABLES)
def test_rows_are_compared_with_rows_of_the_same_table_and_candidates(table):
    own = rows.TABLES[table]
    for row in own.values():
        if row.against in own:
            assert own[row.against].world == row.world
    script = rows.SCRIPTS.get(table, f"reproduce_{table}")
    assert f"run.py {table} " in (ROOT / f"scripts/{script}.sh").read_text()


def test_each_deviation_is_the_released_codes_value():
    """What the rows of the single deviations change are values of the released config."""
    released = load_config(ROOT / "configs/systems/mllm_msr_released.yaml")
    sections = {"05_train": "train", rows.SCORE.split()[0]: "score", "04_datasets": "datasets"}
    seen = set()
    for key in ("sequence", "vision", "optimiser", "question", "raw", "bare", "released"):
        for step in rows.DEVIATIONS[key].steps:
            words = shlex.split(step)
            for option, value in itertools.pairwise(words):
                name, section = option.removeprefix("--"), sections.get(words[0])
                if option.startswith("--") and section and name in released.get(section, {}):
                    assert str(released[section][name]).lower() == value.lower(), name
                    seen.add((section, name))
    left_out = {("train", name) for name in (*rows.SIZES, "warmup_ratio")}
    left_out |= {("score", name) for name in rows.SIZES}
    wanted = {(s, name) for s in ("train", "score", "datasets") for name in released[s]}
    assert wanted - left_out <= seen


def reproduce(tmp_path, *words):
    config = tmp_path / "c.yaml"
    small = {"n_users": 40, "n_items": 60, "train_fraction": 0.5}
    base = str(ROOT / "configs/sample.yaml")
    config.write_text(yaml.safe_dump({"base": base, "dataset": "sample", "data": small}))
    command = [sys.executable, "scripts/reproduce/run.py", *words, "--config", str(config)]
    command += ["--output", str(tmp_path / "out"), "--resamples", "20"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_table_of_two_seeds_resumes_and_has_an_interval_for_each_cell(tmp_path):
    words = ("sample", "--rows", "popularity", "title_only", "--seeds", "1", "2", "--jobs", "2")
    done = reproduce(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert list(report["rows"]) == ["popularity", "title_only"]
    for row in report["rows"].values():
        assert row["per_seed"].keys() == {"1", "2"}
        mean = sum(run["auc"] for run in row["per_seed"].values()) / 2
        assert row["metrics"]["auc"] == pytest.approx(mean)
        assert row["metrics"]["auc_ci95"][0] < mean < row["metrics"]["auc_ci95"][1]
    text = (tmp_path / "out" / "sample.md").read_text()
    assert "| popularity |" in text and "±" in text
    scores = tmp_path / "out" / "main-1" / "baselines" / "popularity" / "scores.jsonl"
    before = scores.stat().st_mtime_ns
    assert reproduce(tmp_path, *words).returncode == 0
    assert scores.stat().st_mtime_ns == before
    assert (tmp_path / "out" / "sample.md").read_text() == text


@pytest.mark.slow
def test_each_fold_is_tested_once_by_one_command(tmp_path):
    words = ("sample", "--rows", "popularity", "--seeds", "1", "--folds", "2")
    done = reproduce(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert report["rows"]["popularity"]["per_seed"].keys() == {"1-fold0", "1-fold1"}
    tested = []
    for fold in (0, 1):
        path = tmp_path / "out" / f"main-1-fold{fold}" / "baselines/popularity/scores.jsonl"
        tested.append({json.loads(line)["user_id"] for line in path.read_text().splitlines()})
    assert not tested[0] & tested[1]
    users = tmp_path / "out" / "main-1-fold0" / "data" / "users.jsonl"
    everyone = {json.loads(line)["user_id"] for line in users.read_text().splitlines()}
    assert tested[0] | tested[1] == everyone
    assert "mean of the 2 folds, seed 1" in (tmp_path / "out" / "sample.md").read_text()
    assert (tmp_path / "out" / "sample.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_that_fails_is_not_run_and_the_others_are(tmp_path):
    (tmp_path / "out" / "main-1" / "baselines" / "popularity" / "scores.jsonl").mkdir(parents=True)
    done = reproduce(tmp_path, "sample", "--rows", "popularity", "title_only", "--seeds", "1")
    assert done.returncode == 1
    assert "not run: popularity: MLLM-MSR/baselines/popularity.py" in done.stderr
    assert "1 of 2 rows were not run" in done.stderr
    text = (tmp_path / "out" / "sample.md").read_text()
    assert "| popularity | not run | not run |" in text
    assert re.search(r"\| `title_only` \| \d", text)


def test_statistics_of_data_that_are_there_and_not_run_where_they_are_not(tmp_path):
    absent = tmp_path / "absent.yaml"
    section = {"raw_dir": str(tmp_path / "none"), "paper_users": 25411}
    absent.write_text(yaml.safe_dump({"dataset": "microlens", "data": section}))
    command = ["bash", "scripts/reproduce_table2.sh", "configs/sample.yaml", str(absent)]
    command += ["--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "not run: absent: error: the folder" in done.stderr
    text = (tmp_path / "out" / "table2.md").read_text()
    assert re.search(r"\| sample \| here \| 1,100 \| 200 \| [\d,]+ \|", text)
    assert "| absent | here | not run |" in text
    assert "| absent | paper | 25,411 |" in text


def test_an_unknown_row_is_refused(tmp_path):
    done = reproduce(tmp_path, "table3", "--rows", "sasrek")
    assert done.returncode == 1
    assert "there is no row 'sasrek'; choose from popularity, gru4rec" in done.stderr


def test_the_page_of_results_is_what_the_files_of_results_say():
    page = load_script("scripts/reproduce/results_page.py")
    assert (ROOT / "docs/results.md").read_text() == page.render()
    with pytest.raises(KeyError, match="no_such_row"):
        page.value("sample/deviations", "no_such_row", "auc")


def test_a_difference_is_marked_only_where_it_is_real():
    found = {"value": 0.021, "low": 0.01, "high": 0.034, "is_real": True}
    assert difference_cell(found) == "+2.1 [+1.0, +3.4]*"
    assert difference_cell({**found, "is_real": False}) == "+2.1 [+1.0, +3.4]"


def test_no_result_is_typed_into_the_page():
    """Every figure comes from a file of results/ or published.yaml; settings may be named."""
    template = (ROOT / "docs/results.md.j2").read_text()
    prose = re.sub(r"\{\{.*?\}\}|`[^`]*`", "", template, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+(?![\de])", prose) == []
    used = set(re.findall(r"\"([a-z_0-9]+/[a-z_0-9]+)\"", template))
    made = {
        str(path.relative_to(ROOT / "results").with_suffix(""))
        for path in (ROOT / "results").rglob("*.json")
    }
    assert used <= made
    assert {name for name in made if not name.startswith("benchmarks/")} <= used, "all are shown"
