"""The report: data is shown and never run, everything is inside the one file, published rows have their sources."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, script

from data_processing.jsonl import read_rows, write_rows


@pytest.fixture
def copy_of_run(small_run, tmp_path):
    """A run's folder of its own, with a title and a preference that hold markup."""
    for path in small_run.folder.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts and "cache" not in path.parts:
            target = tmp_path / path.relative_to(small_run.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    evil = "<script>alert('title')</script>"
    write_rows(
        tmp_path / "items.jsonl",
        [{**row, "title": evil} for row in read_rows(tmp_path / "items.jsonl")],
    )
    rows = read_rows(tmp_path / "user_preferences.jsonl")
    for row in rows:
        row["blocks"][0]["preference"] = "<img src=x onerror=alert(1)>"
    write_rows(tmp_path / "user_preferences.jsonl", rows)
    return tmp_path


def test_a_title_with_a_script_is_shown_not_run(small_run, copy_of_run):
    small_run.run(
        "MLLM-MSR/test/report.py",
        "--data_dir",
        str(copy_of_run),
        "--output_dir",
        str(copy_of_run),
        "--overwrite",
        "true",
    )
    page = (copy_of_run / "report.html").read_text()
    assert "&lt;script&gt;alert(" in page
    assert "<script>alert" not in page
    assert "&lt;img src=x" in page
    assert "<img src=x" not in page


def test_the_page_fetches_nothing_and_shows_every_variant(small_run):
    page = (small_run.folder / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "http" not in re.sub(r"data:[^\"']+", "", page)
    metrics = json.loads((small_run.folder / "metrics.json").read_text())
    markdown = (small_run.folder / "report.md").read_text()
    for variant, found in metrics.items():
        for text in (page, markdown):
            assert variant in text
            assert f"{100 * found['auc']:.2f}" in text


def test_published_rows_stand_beside_ours_with_their_source():
    report = script("MLLM-MSR/test/report.py")
    found = {
        "auc": 0.8,
        "hr@5": 0.7,
        "mrr@5": 0.6,
        "ndcg@5": 0.5,
        "users": 480,
        "auc_ci95": [0.78, 0.82],
    }
    rows = report.metric_rows({"sft": found}, report.read_published("microlens"))
    assert ("zero_shot", "this run", ["not run"] * 4) in rows
    assert rows[0] == ("sft", "this run, 480 users", ["80.00 ± 2.00", "70.00", "60.00", "50.00"])
    assert ("MLLM-MSR", "paper, Table 3", ["83.17", "78.23", "60.38", "-"]) in rows
    assert {source for _, source, _ in rows[2:]} == {
        "paper, Table 3",
        "re-run by MGRASRec's authors",
    }


def test_an_unknown_comparison_names_the_known_ones(small_run):
    from data_processing.errors import InputError

    with pytest.raises(
        InputError,
        match="no published results for 'netflix'; choose one of: microlens, amazon_games, amazon_baby",
    ):
        small_run.run("MLLM-MSR/test/report.py", "--published", "netflix")


def test_a_stage_that_was_not_run_says_so(tmp_path):
    report = script("MLLM-MSR/test/report.py")
    rows = report.stage_rows(report.Args(data_dir=str(tmp_path), output_dir=str(tmp_path)))
    assert len(rows) == 6
    assert {seconds for _, seconds, _, _ in rows} == {"not run"}


def test_the_published_file_holds_the_papers_main_row():
    published = script("MLLM-MSR/test/report.py").read_published("amazon_baby")
    assert ["MLLM-MSR", "paper, Table 3", 85.69, 79.58, 63.77] in published


BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
PROBE = """
<script>{
const visible = story => story.offsetParent !== null;
const shown = () => [...document.querySelectorAll(".story")].filter(visible).map(s => s.dataset.user).join(",");
const told = {
  rows: document.querySelectorAll("#metrics tr").length, first: shown(), wide: document.documentElement.scrollWidth - innerWidth };
const buttons = [...document.querySelectorAll("#users button")];
buttons[2].click();
const filter = document.getElementById("filter");
setTimeout(() => {
  told.picked = shown();
  filter.value = buttons[1].textContent;
  filter.oninput();
  told.filtered = shown();
  told.fetched = performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"));
  document.body.innerHTML = "<pre>" + JSON.stringify(told) + "</pre>";
}, 200);
}</script>
"""


def in_browser(page, tmp_path, width):
    """(what the probe saw, what the browser said on stderr) for a page in a window of `width` pixels."""
    path = tmp_path / "probe.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"))
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--window-size={width},900",
        "--virtual-time-budget=2000",
    ]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [BROWSER, *words, profile, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return json.loads(re.search(r"<pre>(.*)</pre>", done.stdout)[1]), done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1100, 500])
def test_in_a_browser_users_can_be_picked_and_filtered(small_run, tmp_path, width):
    page = (small_run.folder / "report.html").read_text()
    users = re.findall(r'data-user="([^"]+)"', page)
    seen, said = in_browser(page, tmp_path, width)
    assert "CONSOLE" not in said, "no error in the console"
    assert seen["rows"] == 1 + len(json.loads((small_run.folder / "metrics.json").read_text()))
    assert (seen["first"], seen["picked"], seen["filtered"]) == (users[0], users[2], users[1])
    assert seen["fetched"] == []
    assert seen["wide"] <= 0, "nothing sticks out to the side"


def test_the_readme_says_where_published_rows_come_from():
    assert "published.yaml" in (ROOT / "README.md").read_text()
