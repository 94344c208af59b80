"""Metrics and report: all systems are in them, data is shown and never run, one file is enough."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, report_data_of
from selenium.webdriver.support.select import Select

from mllmrec.evaluation.report_data import RunFiles, report_data
from mllmrec.evaluation.report_page import stage_rows
from mllmrec.evaluation.result_tables import difference_rows, metric_rows, score_files
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows, write_rows
from mllmrec.stage.provenance import file_digest
from mllmrec.stage.scripts import load_script


@pytest.fixture
def copy_of_run(small_run, tmp_path):
    """(a copy of what stage 7 reads and writes, run(stage, *options) to run a stage on it)."""
    left_out = shutil.ignore_patterns("checkpoints", "cache", "adapter", ".*.lock")
    folder = shutil.copytree(small_run.folder, tmp_path / "copy", ignore=left_out)
    where = ("--data_dir", str(folder), "--output_dir", str(folder))

    def run(stage, *options):
        small_run.run(f"MLLM-MSR/test/{stage}.py", *where, *options)

    return folder, run


@pytest.fixture
def pages(small_run):
    """The texts of report.html and report.md."""
    return [(small_run.folder / f"report.{kind}").read_text() for kind in ("html", "md")]


def test_a_title_with_a_script_is_shown_not_run(copy_of_run):
    """The copy gets titles and preferences with markup."""
    folder, run = copy_of_run
    items, preferences = folder / "items.jsonl", folder / "mllm_msr/user_preferences.jsonl"
    evil = "<script>alert('title')</script>"
    write_rows(items, [{**row, "title": evil} for row in read_rows(items)])
    rows = read_rows(preferences)
    for row in rows:
        row["blocks"][0]["preference"] = "<img src=x onerror=alert(1)>"
    write_rows(preferences, rows)
    for path in (folder / "users.run.json", preferences.with_suffix(".run.json")):
        path.unlink()  # they describe other files
    run("report", "--overwrite", "true")
    page = (folder / "report.html").read_text()
    assert "\\u003cscript>alert(" in page
    assert "<script>alert" not in page
    assert "\\u003cimg src=x" in page
    assert "<img src=x" not in page


def test_metrics_are_of_the_users_in_users_jsonl(copy_of_run):
    folder, run = copy_of_run
    users = read_rows(folder / "users.jsonl")
    tested = next(user for user in users if user["split"] == "test")
    tested["user_id"] = "another"
    write_rows(folder / "users.jsonl", users)
    (folder / "users.run.json").unlink()
    with pytest.raises(
        InputError, match=r"users.jsonl has user 'another', and .*scores.jsonl has no"
    ):
        run("compute_metrics", "--overwrite", "true")


def test_metrics_outside_of_0_and_1_are_refused(copy_of_run):
    folder, run = copy_of_run
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["sft"]["auc"] = 90.48
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "metrics.run.json").unlink()
    with pytest.raises(InputError, match=r"metrics.json: sft has no 'auc' from 0 to 1"):
        run("report")


def test_a_second_system_is_in_the_metrics_and_in_the_report(copy_of_run):
    """Scores of {output_dir}/other_system/other_variant, here the negated ones of `sft`."""
    folder, run = copy_of_run
    before = json.loads((folder / "metrics.json").read_text())
    rows = read_rows(folder / "mllm_msr/sft/scores.jsonl")
    negated = [{**row, "score": 1 - row["score"]} for row in rows]
    write_rows(folder / "other_system/other_variant/scores.jsonl", negated)
    run("compute_metrics")
    run("report")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics)[:2] == ["zero_shot", "sft"]
    other = metrics.pop("other_variant")
    assert metrics == before
    assert other["auc"] == pytest.approx(1 - before["sft"]["auc"])
    assert other["users"] == before["sft"]["users"]
    for name in ("report.html", "report.md"):
        lines = (folder / name).read_text().splitlines()
        line = next(line for line in lines if "other_variant" in line)
        assert all(f"{100 * other[metric]:.2f}" in line for metric in ("auc", "hr@5"))


def test_two_systems_with_a_variant_of_one_name_are_rejected(copy_of_run):
    folder, run = copy_of_run
    shutil.copytree(folder / "mllm_msr/sft", folder / "other_system/sft")
    files = "mllm_msr/sft/scores.jsonl and .*other_system/sft/scores.jsonl"
    remedy = "are two variants of one name; score one of them again with another --variant$"
    for stage in ("compute_metrics", "report"):
        with pytest.raises(InputError, match=f"{files} {remedy}"):
            run(stage, "--overwrite", "true")


def scores_of(folder, n_users=4, negatives=3, prefix="i", target=0, **seeds):
    """A run in `folder`: scores of each variant, drawn with its seed. prefix: of item ids."""
    for variant, seed in seeds.items():
        drawn = np.random.default_rng(seed).random((n_users, 1 + negatives)).tolist()
        rows = [
            {"user_id": f"u{u}", "item_id": f"{prefix}{i}", "label": int(i == target)}
            | {"score": score, "logits": None}
            for u, line in enumerate(drawn)
            for i, score in enumerate(line)
        ]
        write_rows(folder / "s" / variant / "scores.jsonl", rows)
    return folder


@pytest.fixture
def metrics(tmp_path, capsys):
    """Function(runs, options) -> (metrics.json of `tmp_path`, what is printed)."""

    def run(*runs, options=()):
        words = ["--config", str(ROOT / "configs/sample.yaml"), "--output_dir", str(tmp_path)]
        words += ["--data_dir", str(tmp_path)]  # not the quickstart's, which may be there
        words += [*options, *(["--runs", *map(str, runs)] if runs else [])]
        load_script("MLLM-MSR/test/compute_metrics.py").main(words)
        return json.loads((tmp_path / "metrics.json").read_text()), capsys.readouterr().out

    return run


def test_a_mean_over_runs_counts_equal_scores_once(tmp_path, metrics):
    """A variant that is in one run, or was scored alike in both, has no interval."""
    a = scores_of(tmp_path / "a", sft=1, same=7, alone=3)
    b = scores_of(tmp_path / "b", sft=2, same=7)
    found, printed = metrics(a, b)
    assert {name: row["runs"] for name, row in found.items()} == {"sft": 2, "alone": 1, "same": 1}
    assert [name for name, row in found.items() if "auc_ci95" in row] == ["sft"]
    lines = {line.split()[0]: line for line in printed.splitlines()}
    assert [name for name, line in lines.items() if "±" in line] == ["sft"]
    assert lines["AUC"].split()[-2:] == ["users", "runs"]
    assert lines["sft"].split()[-2:] == ["8", "2"] and lines["alone"].split()[-2:] == ["4", "1"]
    sources = {row[0]: row[1] for row in metric_rows(found, [])["systems"]}
    assert sources["alone"] == "mean, 4 users, 1 run"


def test_one_resample_has_no_interval_in_the_table(tmp_path, metrics):
    scores_of(tmp_path, sft=1)
    assert "±" in metrics()[1]
    assert "±" not in metrics(options=("--resamples", "1"))[1]


RUNS = {
    "link": "--runs names one folder twice",
    "copy": "have no variant with different scores, so there is nothing to average",
    "other": "have no item in common, so they are of two data sets; average folds or seeds",
    "numbered": "have 4 users in common, of whom 0 have the same target, so they are of two",
    "longer": "the lists of sft have 4 candidates in one of the runs and 6 in another",
}


@pytest.mark.parametrize("other", RUNS)
def test_runs_that_cannot_be_averaged_are_refused(tmp_path, metrics, other):
    a = scores_of(tmp_path / "a", sft=1)
    (tmp_path / "link").symlink_to(a)
    scores_of(tmp_path / "copy", sft=1)
    scores_of(tmp_path / "other", n_users=9, prefix="x", sft=2)
    scores_of(tmp_path / "numbered", target=1, sft=2)
    scores_of(tmp_path / "longer", negatives=5, sft=2)
    with pytest.raises(InputError, match=RUNS[other]):
        metrics(a, tmp_path / other)


def test_a_table_has_variants_with_the_same_candidates_only(tmp_path, metrics):
    """Fewer users are a pilot; redrawn and retrieved lists are their own."""
    folder = scores_of(tmp_path, n_users=5, sft=1, popularity=2)
    scores_of(folder, n_users=2, pilot=3)
    scores_of(folder, prefix="x", popularity_uniform_negatives=1, drawn=2)
    digest = file_digest(folder / "s/drawn/scores.jsonl")
    record = {"settings": {}, "inputs": {}, "rows": {}, "lists": "redrawn"}
    record |= {"outputs": {"scores.jsonl": digest}}
    (folder / "s/drawn/scores.run.json").write_text(json.dumps(record))
    scores_of(folder, negatives=1, random_order=4)
    (path,) = (scores_of(folder, prefix="y", retriever=1) / "s/retriever").iterdir()
    record |= {"settings": {"lists": "retrieved"}, "outputs": {path.name: file_digest(path)}}
    path.with_name("candidates.run.json").write_text(json.dumps(record | {"lists": None}))
    found, printed = metrics()
    assert len(found) == 7 and "candidates" in printed.split("\n")[0]
    assert [name for name, _ in difference_rows(score_files(folder))[1]] == ["popularity"]
    for more in ({"negatives": 2}, {"prefix": "x"}, {"n_users": 9, "prefix": "x"}):
        scores_of(folder, **more, other=5)
        with pytest.raises(InputError) as caught:
            metrics()
        message = str(caught.value)
        assert "s/other/scores.jsonl" in message and "s/sft/scores.jsonl" in message
        assert "user 'u0'" in message and "cannot stand in one table" in message
    (folder / "s/other/scores.jsonl").unlink()
    os.mkfifo(folder / "s/other/scores.jsonl")
    with pytest.raises(InputError, match=r"s/other/scores\.jsonl is no regular file"):
        metrics()


def test_the_report_takes_metrics_of_its_scores_only(copy_of_run):
    folder, run = copy_of_run
    path = folder / "metrics.json"
    path.write_text(path.read_text().replace('"auc": 0.', '"auc": 90.', 1))
    with pytest.raises(InputError, match=r"metrics\.json was changed after it was written"):
        run("report")
    run("compute_metrics", "--overwrite", "true")
    scores = folder / "mllm_msr/sft/scores.jsonl"
    write_rows(scores, [{**row, "score": 0.5} for row in read_rows(scores)])
    with pytest.raises(InputError, match="is not of the scores in"):
        run("report")


def test_the_page_fetches_nothing_and_shows_every_variant(small_run, pages):
    sources = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", pages[0])
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "http" not in re.sub(r"data:[^\"']+", "", pages[0])
    metrics = json.loads((small_run.folder / "metrics.json").read_text())
    for text in pages:
        for variant, found in metrics.items():
            assert variant in text
            assert f"{100 * found['auc']:.2f}" in text


def test_published_rows_are_beside_ours_with_their_source():
    report = load_script("MLLM-MSR/test/report.py")
    found = {"auc": 0.8, "hr@5": 0.7, "mrr@5": 0.6, "ndcg@5": 0.5, "users": 480}
    sft = {"sft": {**found, "auc_ci95": [0.78, 0.82]}}
    groups = metric_rows(sft, report.read_published("microlens"))
    assert list(groups) == ["systems", "published"]
    assert groups["systems"] == [
        ("sft", "this run, 480 users", ["80.00 ± 2.00", "70.00", "60.00", "50.00"]),
        ("zero_shot", "this run", ["not run"] * 4),
    ]
    rows = groups["published"]
    assert ("MLLM-MSR", "paper, Table 3", ["83.17", "78.23", "60.38", "-"]) in rows
    sources = {source for _, source, _ in rows}
    assert sources == {
        "paper, Table 3",
        "re-run by MGRASRec's authors",
        "its paper, Table 2",
    }
    assert ("MGRASRec", "its paper, Table 2", ["89.55", "83.07", "62.65", "-"]) in rows
    row = ["MLLM-MSR", "paper, Table 3", 85.69, 79.58, 63.77]
    assert row in report.read_published("amazon_baby")
    assert "published.yaml" in (ROOT / "docs/reading-results.md").read_text()


def test_rows_are_grouped_and_the_page_says_what_it_is_about(small_run, pages):
    found = re.findall(r'<tr class="group"><th scope="row">(\w+)</th>|<tr><td>(\w+)</td>', pages[0])
    order = list(dict.fromkeys(group or variant for group, variant in found))
    groups = ["systems", "ablations", "baselines", "bounds"]
    assert [name for name in order if name in groups] == groups
    where = {name: order.index(name) for name in order}
    assert where["systems"] < where["sft"] < where["ablations"] < where["sft_no_image"]
    assert where["baselines"] < where["popularity"] < where["bounds"] < where["ceiling"]
    record = json.loads((small_run.system / "sft" / "scores.run.json").read_text())
    for text in pages:
        for fact in (record["arguments"]["model"], record["git_commit"], record["date"]):
            assert fact in text
    assert "begin as asked" in pages[0], "the quality of the texts"


def test_an_unknown_comparison_names_the_known_ones(small_run):
    message = "no published results for 'netflix'; choose one of: microlens, amazon_games, amazon"
    with pytest.raises(InputError, match=message):
        small_run.run("MLLM-MSR/test/report.py", "--published", "netflix")


def test_a_stage_that_was_not_run_is_marked(tmp_path):
    report = load_script("MLLM-MSR/test/report.py")
    options = report.Options(data_dir=str(tmp_path), output_dir=str(tmp_path))
    rows = stage_rows(report.stage_outputs(options))
    assert len(rows) == 6
    assert {seconds for _, seconds, _, _ in rows} == {"not run"}


def test_the_page_has_every_user_with_what_led_to_the_ranks(small_run):
    data = report_data_of(small_run.folder / "report.html")
    users = {row["user_id"]: row for row in read_rows(small_run.folder / "users.jsonl")}
    preferences = read_by_id(small_run.system / "user_preferences.jsonl", "user_id")
    titles = read_by_id(small_run.folder / "items.jsonl", "item_id")
    assert data["variants"][:3] == ["sft", "zero_shot", "popularity"]
    assert "popularity_uniform_negatives" not in data["variants"], "other candidates"
    assert len(data["users"]) == 9
    scores = read_rows(small_run.system / "sft/scores.jsonl")
    for user in data["users"]:
        own, found = users[user["id"]], user["details"]
        items = [data["items"][n]["id"] for block in found["blocks"] for n in block["items"]]
        assert items == own["history"] and user["length"] == len(items)
        assert [b["text"] for b in found["blocks"]] == [
            block["preference"] for block in preferences[user["id"]]["blocks"]
        ]
        assert user["target"] == titles[own["target"]]["title"]
        candidates = [data["items"][n]["id"] for n in found["candidates"]]
        assert candidates == [own["target"], *sorted(own["negatives"])]
        rows = {row["item_id"]: row["score"] for row in scores if row["user_id"] == user["id"]}
        above = sum(score > rows[own["target"]] for score in rows.values())
        assert user["ranks"][0] == found["ranks"][0][0] == 1 + above
        assert found["scores"][0][0] == pytest.approx(rows[own["target"]], abs=6e-5)
    title, times, lists = data["above"]["sft"][0]
    had = [item for user in data["users"] for item in users[user["id"]]["negatives"]]
    negatives = [titles[item]["title"] for item in had]
    assert 0 < times <= lists <= negatives.count(title)


def test_users_that_would_make_the_page_too_large_have_no_details(small_run):
    scores = {"sft": small_run.system / "sft/scores.jsonl"}
    files = RunFiles(small_run.folder, small_run.system, scores, [str(small_run.folder)])
    whole = report_data(files)
    assert all("details" in user for user in whole["users"])
    part = report_data(files, limit=40_000)
    shown = ["details" in user for user in part["users"]]
    assert 0 < sum(shown) < 9 and shown == sorted(shown, reverse=True)
    assert len(part["items"]) < len(whole["items"])
    assert len(json.dumps(part)) < 60_000
    assert [{**user, "details": 0} for user in part["users"]] == [
        {**user, "details": 0} for user in whole["users"]
    ]


def test_users_of_all_variants_and_lists_without_target_are_shown(small_run, tmp_path):
    """A pilot leads, and a retriever has not found a target."""
    rows = read_rows(small_run.system / "sft/scores.jsonl")
    users = list(dict.fromkeys(row["user_id"] for row in rows))
    pilot = [row for row in rows if row["user_id"] in users[:2]]
    lost = [{**row, "label": row["label"] * (row["user_id"] != users[4])} for row in rows]
    others = [{**row, "item_id": row["item_id"][::-1]} for row in rows]
    scores = {}
    for name, kept in (("pilot", pilot), ("whole", lost), ("others", others)):
        scores[name] = tmp_path / name / "scores.jsonl"
        write_rows(scores[name], kept)
    files = RunFiles(small_run.folder, small_run.system, scores, [str(small_run.folder)])
    data = report_data(files)
    assert data["variants"] == ["pilot", "whole"], "other candidates"
    found = {user["id"]: user for user in data["users"]}
    assert found.keys() == set(users)
    assert all(
        (user["ranks"][0] is None) == (name not in users[:2]) for name, user in found.items()
    )
    without = found[users[4]]
    assert without["target"] is None and without["ranks"] == [None, None]
    assert not without["details"]["has_target"] and len(without["details"]["candidates"]) == 21


def test_another_run_stands_beside_and_must_have_the_same_lists(copy_of_run, tmp_path):
    def compute_metrics(data, output):
        words = ["--config", str(ROOT / "configs/sample.yaml"), "--data_dir", str(data)]
        words += ["--output_dir", str(output), "--overwrite", "true"]
        load_script("MLLM-MSR/test/compute_metrics.py").main(words)

    folder, run = copy_of_run
    other = shutil.copytree(folder, tmp_path / "other")
    rows = read_rows(other / "mllm_msr/sft/scores.jsonl")
    write_rows(other / "mllm_msr/sft/scores.jsonl", [{**r, "score": 1 - r["score"]} for r in rows])
    (other / "mllm_msr/sft/scores.run.json").unlink()
    compute_metrics(folder, other)
    run("report", "--compare", str(other), "--overwrite", "true")
    data = report_data_of(folder / "report.html")
    assert "other/sft" in data["variants"]
    assert "<td>other/sft</td>" in (folder / "report.html").read_text()
    first, beside = data["variants"].index("sft"), data["variants"].index("other/sft")
    assert all(user["ranks"][first] + user["ranks"][beside] == 22 for user in data["users"])
    empty = scores_of(tmp_path / "empty", sft=1)
    compute_metrics(empty, empty)
    with pytest.raises(InputError, match="no variant there has the lists of"):
        run("report", "--compare", str(empty))
    with pytest.raises(InputError, match="is this run's own folder; name that of another run"):
        run("report", "--compare", str(folder))


def test_in_a_browser_users_are_sorted_found_opened_and_compared(small_run, browser):
    def cells(table, column):
        """The texts of a column."""
        found = browser.find_elements("css selector", f"#{table} tbody td:nth-child({column})")
        return [cell.text for cell in found]

    def click(selector):
        browser.find_element("css selector", selector).click()

    page = small_run.folder / "report.html"
    browser.get(f"{page.as_uri()}#users")
    data = report_data_of(page)
    ids = [user["id"] for user in data["users"]]
    assert sorted(cells("users", 1)) == sorted(ids)
    ranks = sorted(user["ranks"][0] for user in data["users"])
    click("#users th:nth-child(5) button")
    assert [float(text) for text in cells("users", 5)] == ranks
    click("#users th:nth-child(5) button")
    assert [float(text) for text in cells("users", 5)] == ranks[::-1]
    browser.find_element("id", "users-find").send_keys(ids[3])
    assert cells("users", 1) == [ids[3]]
    Select(browser.find_element("id", "right")).select_by_visible_text("popularity")
    beside = data["variants"].index("popularity")
    assert float(cells("users", 6)[0]) == data["users"][3]["ranks"][beside]
    click("#users tbody a")
    assert browser.find_element("css selector", "#page h2").text == f"User {ids[3]}"
    left, right = browser.find_elements("css selector", ".candidates")
    for side, variant in ((left, 0), (right, beside)):
        items = side.find_elements("css selector", "li")
        assert len(items) == 21
        place = next(n for n, item in enumerate(items) if "(target)" in item.text)
        assert abs(place + 1 - data["users"][3]["ranks"][variant]) < 11, "ties share a rank"
    click(".block .cover")
    assert browser.find_element("id", "enlarged").is_displayed()
    for name in ("errors", "items", "rejected", "overview"):
        browser.get(f"{page.as_uri()}#{name}")
        current = browser.find_element("css selector", "nav [aria-current]")
        assert current.text == name
    variants = len(json.loads((small_run.folder / "metrics.json").read_text()))
    rows = browser.find_elements("css selector", "#metrics tr")
    assert len(rows) == 1 + variants + 4, "header, rows, a line for each group"
    fetched = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert [n for n in browser.execute_script(fetched) if not n.startswith("data:")] == []
    assert browser.get_log("browser") == [], "no error in the console"


@pytest.mark.parametrize("width", [1600, 420])
def test_in_a_browser_no_page_is_wider_than_the_window(small_run, browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page = small_run.folder / "report.html"
    user = report_data_of(page)["users"][0]["id"]
    for name in ("overview", "users", f"user-{user}", "errors", "items", "rejected"):
        browser.get("about:blank")
        browser.get(f"{page.as_uri()}#{name}")
        wide = "return document.documentElement.scrollWidth - innerWidth"
        assert browser.execute_script(wide) <= 0, name


def test_the_report_says_which_differences_to_the_main_system_are_real(small_run, pages, tmp_path):
    """The bounds know the rule of the sample; a copy of the scores differs by nothing."""
    scores = read_rows(small_run.system / "sft" / "scores.jsonl")
    right = [{**row, "score": float(row["label"])} for row in scores]
    other = [{**row, "item_id": f"x{row['item_id']}"} for row in scores]
    files = {}
    for name, rows in (("sft", scores), ("same", scores), ("right", right), ("other", other)):
        files[name] = tmp_path / name / "scores.jsonl"
        write_rows(files[name], rows)
    reference, rows = difference_rows(files, resamples=50)
    found = dict(rows)
    assert reference == "sft"
    assert list(found) == ["same", "right"], "other candidates cannot be compared"
    assert found["same"] == ["+0.0 [+0.0, +0.0]"] * 4
    assert found["right"][0].startswith("+") and found["right"][0].endswith("*")
    assert difference_rows({"sft": files["sft"]}) == ("", [])
    assert all("Difference to sft on the same candidates" in text for text in pages)
    line = r"\| zero_shot \| [+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]\*? \|"
    assert re.search(line, pages[1])
