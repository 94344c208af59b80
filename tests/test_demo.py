"""The demo asks what stage 4 asks, and its p(yes) are those of stage 6."""

import importlib.util
from types import SimpleNamespace

import pytest
from conftest import ROOT
from PIL import Image
from selenium.webdriver.support.ui import WebDriverWait as wait

from mllmrec.ranking.datasets import DatasetOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows
from mllmrec.stage.options import parse_options
from mllmrec.stage.scripts import load_script


@pytest.fixture(scope="module")
def demo():
    """The script as a module."""
    return load_script("scripts/demo/demo.py")


@pytest.fixture(scope="module")
def recommender(demo, small_run):
    words = ["--config", str(small_run.config), "--data_dir", str(small_run.folder)]
    options = parse_options(demo.Options, "score", [*words, "--output_dir", str(small_run.folder)])
    return demo.Recommender(options, parse_options(DatasetOptions, "datasets", words))


def rows_of(small_run, user):
    """variant -> item -> line of scores.jsonl."""
    return {
        variant: {
            row["item_id"]: row
            for row in read_rows(small_run.system / variant / "scores.jsonl")
            if row["user_id"] == user
        }
        for variant in ("zero_shot", "sft")
    }


def test_a_question_by_hand_has_the_scores_of_stage_6(recommender, small_run, tmp_path):
    user = next(iter(recommender.lists))
    scores = rows_of(small_run, user)
    titles = read_by_id(small_run.folder / "items.jsonl", "item_id")
    preference = recommender.preferences[user]
    for item in list(scores["sft"])[:3]:
        image = recommender.image(item)
        question, before, after = recommender.ask(preference, titles[item]["title"], image)
        assert preference in question and titles[item]["title"] in question
        assert before == pytest.approx(scores["zero_shot"][item]["score"], abs=1e-6)
        assert after == pytest.approx(scores["sft"][item]["score"], abs=1e-6)
    Image.new("RGB", (48, 64), "blue").save(tmp_path / "upload.png")
    uploaded = recommender.ask(preference, titles[item]["title"], str(tmp_path / "upload.png"))
    assert uploaded[2] != pytest.approx(after, abs=1e-6)
    assert recommender.ask("cooking", titles[item]["title"], image)[2] != pytest.approx(after)


def test_the_ranked_list_is_that_of_stage_6(recommender, small_run):
    user = list(recommender.lists)[1]
    scores = rows_of(small_run, user)
    lines = recommender.rank(user, recommender.preferences[user])
    assert [line[4] for line in lines] == pytest.approx(
        sorted((row["score"] for row in scores["sft"].values()), reverse=True), abs=6e-4
    )
    assert [line[1] for line in lines] == list(range(1, 22))
    assert sorted(line[0] for line in lines) == list(range(1, 22))
    assert [line[5] for line in lines].count("target") == 1


def test_the_demo_of_the_sample_starts_and_refuses_what_it_would_ignore(demo, monkeypatch):
    """configs/sample.yaml has `hide`, for stage 6."""
    launched = []
    page = SimpleNamespace(launch=lambda **options: launched.append(options))
    monkeypatch.setattr(demo, "Recommender", lambda options, questions: questions.domain)
    monkeypatch.setattr(demo, "page", lambda domain: launched.append(domain) or page)
    words = ["--config", str(ROOT / "configs/sample.yaml"), "--domain", "product"]
    demo.main(words)
    assert launched[0] == "product" and launched[1]["server_name"] == "127.0.0.1"
    with pytest.raises(InputError, match="the demo has no --hide; leave it out"):
        demo.main([*words, "--hide", "preference"])


@pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="scripts/demo.sh installs it"
)
def test_in_a_browser_one_question_is_asked(demo, recommender, small_run, browser):
    page = demo.page(recommender)
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        browser.get(address)

        def value(name):
            found = browser.find_elements("css selector", f"#{name} textarea, #{name} input")
            return found and found[0].get_attribute("value")

        wait(browser, 60).until(lambda _: browser.find_elements("id", "ask"))
        browser.find_element("id", "ask").click()
        wait(browser, 60).until(lambda _: value("after"))
        user, rows = next(iter(recommender.lists.items()))
        scores = rows_of(small_run, user)
        item = rows[0]["item_id"]
        assert float(value("before")) == pytest.approx(scores["zero_shot"][item]["score"], abs=1e-6)
        assert float(value("after")) == pytest.approx(scores["sft"][item]["score"], abs=1e-6)
    finally:
        page.close()
