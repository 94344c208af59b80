"""The Amazon lists that the authors ship become users.jsonl with nothing of them changed."""

import json

import pytest
from conftest import ROOT

from mllmrec.data.amazon_pages import NO_PAGE
from mllmrec.data.candidates import read_users
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows
from mllmrec.stage.options import load_config, parse_options
from mllmrec.stage.scripts import load_script

SCRIPT = "data_processing/released_lists.py"
CODES = [str(n) for n in range(12)]
TRAIN = [("0", "0,1,2", "5,6,7"), ("1", "3, 4, 1, 0", "8, 9")]
TEST = [("2", "2,0,2,5", "1,3,4")]  # an item twice in the history, as shipped


def table(path, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows))


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    table(folder / "Cups_user_items_negs_train.csv", TRAIN)
    table(folder / "Cups_user_items_negs_test.csv", TEST)
    ids = [("original", "item_id"), *((f"B{code}", code) for code in CODES)]
    table(folder / "Cups_i_map.tsv", ids)
    pages = [
        {
            "parent_asin": f"B{code}",
            "title": f"Cup &amp; {code}",
            "images": [{"large": f"http://x/{code}.jpg"}] if code != "3" else [],
        }
        for code in CODES
    ]
    (folder / "meta_Cups.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    return folder


def imported(tmp_path, raw, *words):
    (tmp_path / "c.yaml").write_text("data: {category: Cups}\n")
    where = ["--config", str(tmp_path / "c.yaml"), "--raw_dir", str(raw)]
    load_script(SCRIPT).main([*where, "--data_dir", str(tmp_path / "data"), *words])
    return read_users(tmp_path / "data" / "users.jsonl")


def named(codes):
    return [f"B{code.strip()}" for code in codes.split(",")]


def test_lists_are_used_as_they_are(tmp_path, raw):
    users = imported(tmp_path, raw)
    assert [user["user_id"] for user in users] == ["0", "1", "2"]
    for user, (_, items, negatives) in zip(users, TRAIN + TEST, strict=True):
        assert [*user["history"], user["target"]] == named(items)
        assert user["negatives"] == named(negatives)
    assert [user["split"] for user in users] == ["train", "train", "test"]
    items = read_by_id(tmp_path / "data" / "items.jsonl", "item_id")
    assert set(items) == {f"B{code}" for code in CODES[:10]}
    assert items["B1"] == {"item_id": "B1", "title": "Cup & 1", "image": "images/B1.jpg"}
    assert items["B3"]["image"] is None
    urls = read_by_id(tmp_path / "data" / "image_urls.jsonl", "item_id")
    assert urls["B1"]["url"] == "http://x/1.jpg"
    assert "B3" not in urls
    stats = json.loads((tmp_path / "data" / "stats.json").read_text())
    assert (stats["users"], stats["items"], stats["interactions"]) == (3, 6, 11)


def test_users_that_cannot_be_ranked_are_rejected_with_the_reason(tmp_path, raw):
    bad = [("7", "0,1", "1,2"), ("8", "0,1", "2,2"), ("9", "0,99", "2"), ("10", "0", "2")]
    table(
        raw / "Cups_user_items_negs_train.csv",
        [*TRAIN, *bad, ("11", "0,11", "1"), (" ", "0,1", "2")],
    )
    pages = (raw / "meta_Cups.jsonl").read_text().splitlines()
    (raw / "meta_Cups.jsonl").write_text("\n".join(pages[:11]) + "\n")  # item 11 has no page
    assert [user["user_id"] for user in imported(tmp_path, raw)] == ["0", "1", "2"]
    rows = read_rows(tmp_path / "data" / "interactions.rejected.jsonl")
    reasons = {
        row.get("line", row.get("user_id", row.get("item_id"))): row["reason"] for row in rows
    }
    assert reasons == {
        3: "the target is among the negatives",
        4: "a negative is listed twice",
        5: "item '99' is not in the item map",
        6: "a list needs a history and a target",
        8: "the user is empty",
        "11": "item B11 has no page or no title",
        "B11": NO_PAGE,
    }


def test_a_user_with_two_lists_is_an_error(tmp_path, raw):
    table(raw / "Cups_user_items_negs_test.csv", [*TEST, TRAIN[0]])
    with pytest.raises(InputError, match="user '0' has two lists in"):
        imported(tmp_path, raw)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("B99\t5", "i_map.tsv, line 14: item_id '5' is already in line 7; keep one of the two"),
        ("B5\t5", "i_map.tsv, line 14: item_id '5' is already in line 7"),
        ("B5\t99", "i_map.tsv, line 14: original 'B5' is already in line 7"),
        ("B12\t12\tx", "i_map.tsv, line 14: too many fields"),
        (None, "i_map.tsv, line 1: column 'item_id' .* with tabs between columns"),
    ],
)
def test_an_item_map_with_two_meanings_is_an_error(tmp_path, raw, row, message):
    path = raw / "Cups_i_map.tsv"
    text = path.read_text()
    path.write_text(f"{text}{row}\n" if row else text.replace("\t", ","))
    with pytest.raises(InputError, match=message):
        imported(tmp_path, raw)


def test_items_that_are_target_or_negative_and_history_are_marked_and_counted(
    tmp_path, raw, caplog
):
    table(raw / "Cups_user_items_negs_test.csv", [*TEST, ("3", "2,2", "4"), ("4", "2,3", "2")])
    caplog.set_level("INFO")
    assert [user.get("overlap") for user in imported(tmp_path, raw)[2:]] == [None, True, True]
    assert "2 users have the target or a negative in their history, as shipped" in caplog.text


def test_lists_of_which_no_user_is_left_are_an_error(tmp_path, raw):
    pages = (raw / "meta_Cups.jsonl").read_text().splitlines()
    (raw / "meta_Cups.jsonl").write_text(f"{pages[0]}\n{pages[10]}\n")
    with pytest.raises(InputError, match=r"none of the 3 users can be used: the item 'B1' of user"):
        imported(tmp_path, raw)
    assert not (tmp_path / "data" / "users.jsonl").exists()


def test_a_validation_list_is_read_if_it_is_there_and_a_missing_list_is_named(tmp_path, raw):
    table(raw / "Cups_user_items_negs_val.csv", [("5", "1,2", "3")])
    assert [user["split"] for user in imported(tmp_path, raw)].count("validation") == 1
    (raw / "Cups_user_items_negs_test.csv").unlink()
    with pytest.raises(InputError, match=r"Cups_user_items_negs_test.csv is missing"):
        imported(tmp_path, raw)


def test_a_pilot_takes_the_first_users_of_each_file(tmp_path, raw):
    assert [user["user_id"] for user in imported(tmp_path, raw, "--limit", "1")] == ["0", "2"]
    assert len(imported(tmp_path, raw)) == 3


@pytest.mark.parametrize("name", ["amazon_games_released", "amazon_baby_released"])
def test_the_released_configs_of_amazon_share_the_released_settings(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / f"{name}.yaml"
    ours, released = load_config(path), load_config(ROOT / "configs/microlens_released.yaml")
    assert ours["dataset"] == "released_lists"
    released["datasets"]["train_negatives"] = "1"
    for section in ("image_summary", "preference", "datasets", "train", "score"):
        assert ours[section] == released[section]
    options = parse_options(load_script(SCRIPT).Options, "data", ["--config", str(path)])
    assert (options.seed, options.domain, options.image_size) == (42, "product", "large")
    assert options.category == {"g": "Video_Games", "b": "Baby_Products"}[name[7]]
