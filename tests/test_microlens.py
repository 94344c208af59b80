"""The MicroLens files as they come, and as they should not."""

import os

import pytest
from PIL import Image

from mllmrec.data.raw_log import NO_TIME
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.scripts import load_script

PAIRS_TSV = "1\ta b c\n2\tb c d\n3\tc d a\n"
PAIRS_CSV = (
    "user,item,timestamp\n3,c,30\n1,a,10\n1,b,20\n1,c,30\n2,b,10\n2,c,20\n2,d,30\n3,d,40\n3,a,50\n"
)
TITLES = 'item,title\na,"One, with a comma"\nb,two\nc,"three ""quoted"""\nd,四\n'


def raw_folder(
    tmp_path,
    pairs=PAIRS_TSV,
    titles=TITLES,
    pairs_name="MicroLens-50k_pairs.tsv",
    titles_name="MicroLens-50k_titles.csv",
):
    folder = tmp_path / "raw"
    covers = folder / "MicroLens-50k_covers"
    covers.mkdir(parents=True)
    for name in ("a.jpg", "b.PNG", "c.webp", "d.jpeg"):
        Image.new("RGB", (4, 6), "red").save(covers / name)
    (folder / pairs_name).write_bytes(pairs if isinstance(pairs, bytes) else pairs.encode())
    (folder / titles_name).write_bytes(titles if isinstance(titles, bytes) else titles.encode())
    return folder


def prepare(tmp_path, folder, *options):
    data = tmp_path / "data"
    config = tmp_path / "c.yaml"
    config.write_text(
        "data: {user_core: 2, item_core: 1, negatives: 1, train_fraction: 0.34, "
        "validation_fraction: 0.33}"
    )
    load_script("data_processing/microlens.py").main(
        ["--config", str(config), "--raw_dir", str(folder), "--data_dir", str(data), *options]
    )
    return {row["user_id"]: row for row in read_rows(data / "users.jsonl")}, {
        row["item_id"]: row for row in read_rows(data / "items.jsonl")
    }


@pytest.mark.parametrize(
    ("pairs", "name"),
    [(PAIRS_TSV, "MicroLens-50k_pairs.tsv"), (PAIRS_CSV, "MicroLens-50k_pairs.csv")],
)
def test_both_forms_of_pairs_give_the_same_data(tmp_path, pairs, name):
    users, items = prepare(tmp_path, raw_folder(tmp_path, pairs, pairs_name=name))
    assert {u: (row["history"], row["target"]) for u, row in users.items()} == {
        "1": (["a", "b"], "c"), "2": (["b", "c"], "d"), "3": (["c", "d"], "a"),
    }  # fmt: skip
    assert [row["negatives"] for row in users.values()] == [["d"], ["a"], ["b"]]
    assert items["a"]["title"] == "One, with a comma"
    assert items["c"]["title"] == 'three "quoted"'
    assert items["d"]["title"] == "四"
    for row in items.values():
        Image.open(tmp_path / "data" / row["image"]).verify()


def test_items_without_a_cover_are_counted_whether_they_stay_or_not(tmp_path, capsys):
    pairs = "1\ta b c\n2\tb c d\n3\tc d a e\n"
    folder = raw_folder(tmp_path, pairs, TITLES + "e,five\n")
    Image.new("RGB", (4, 6)).save(folder / "MicroLens-50k_covers/e.jpg")
    (folder / "MicroLens-50k_covers/a.jpg").unlink()
    for require, says in (("true", "removed before the k-core"), ("false", "kept")):
        prepare(tmp_path, folder, "--require_image", require)
        assert f"1 items of the raw log have no image: {says}" in capsys.readouterr().out
    prepare(tmp_path, folder, "--require_image", "false", "--with_images", "false")
    assert "have no image" not in capsys.readouterr().out


@pytest.mark.parametrize("titles_name", ["MicroLens-50k_titles.csv", "MicroLens-50k_title_en.csv"])
@pytest.mark.parametrize("header", [True, False])
def test_titles_with_and_without_header(tmp_path, titles_name, header):
    titles = TITLES if header else TITLES.split("\n", 1)[1]
    _, items = prepare(tmp_path, raw_folder(tmp_path, titles=titles, titles_name=titles_name))
    assert items["b"]["title"] == "two"
    assert set(items) == set("abcd")


@pytest.mark.parametrize("header", ["item,category,title", "item_id,views,Title"])
def test_the_title_is_the_column_of_this_name(tmp_path, header):
    titles = header + "\n" + "".join(f"{item},x,title {item}\n" for item in "abcd")
    _, items = prepare(tmp_path, raw_folder(tmp_path, titles=titles))
    assert items["b"]["title"] == "title b"


def test_rejected_rows_are_kept_with_file_line_and_reason(tmp_path):
    pairs = PAIRS_CSV + "4,a,yesterday\n4,unknown,7\n ,a,8\n4,,9\n"
    titles = TITLES.replace("b,two", '"b","two\nlines"') + "e,  \n a ,again\n,no item\n"
    folder = raw_folder(tmp_path, pairs, titles=titles, pairs_name="MicroLens-50k_pairs.csv")
    users, _ = prepare(tmp_path, folder)
    assert set(users) == {"1", "2", "3"}
    rejected = {
        (row["file"][14:], row["line"]): row["reason"]
        for row in read_rows(tmp_path / "data" / "interactions.rejected.jsonl")
    }
    assert rejected == {
        ("titles.csv", 7): "the title is empty",
        ("titles.csv", 8): "the item has a title already",
        ("titles.csv", 9): "the item is empty",
        ("pairs.csv", 11): NO_TIME,
        ("pairs.csv", 12): "the item unknown has no title in MicroLens-50k_titles.csv",
        ("pairs.csv", 13): "the user is empty",
        ("pairs.csv", 14): "the item is empty",
    }


def test_rejected_rows_of_sequences_are_kept_too(tmp_path):
    folder = raw_folder(tmp_path, PAIRS_TSV + "\n\ta b\n4\t\n6\ta x  y\n")
    users, _ = prepare(tmp_path, folder)
    assert set(users) == {"1", "2", "3"}
    rejected = read_rows(tmp_path / "data" / "interactions.rejected.jsonl")
    unknown = "has no title in MicroLens-50k_titles.csv"
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (5, "the user is empty"),
        (5, "the user is empty"),
        (6, "the item is empty"),
        (7, f"the item x {unknown}"),
        (7, f"the item y {unknown}"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pairs": "user,video,timestamp\n1,a,2\n", "pairs_name": "MicroLens-50k_pairs.csv"},
            r"pairs.csv, line 1: column 'item' is missing; the header is 'user,video,timestamp'",
        ),
        ({"pairs": b"1\ta b\n2\ta \xff\n"}, r"pairs.tsv, line 2: bytes that are not UTF-8"),
        ({"pairs": "1\ta b\n2\n"}, r"pairs.tsv, line 2: too few fields"),
        ({"pairs": ""}, r"pairs.tsv is empty"),
        ({"titles": TITLES + 'e,"x\nf,y\n'}, r"titles.csv, line 6: a double quote opens a field"),
        ({"titles": "a\nb\n"}, r"titles.csv, line 1: too few fields"),
        ({"pairs": "1\tx y\n2\tz\n"}, r"line 1: the item x has no title .*; none of the 3 rows"),
        ({"pairs": "1\ta\n2\tb\n"}, r"no interaction is left after the filters"),
        ({"pairs_name": "pairs.tsv"}, r"has no \*_pairs.csv or .tsv"),
        ({"titles_name": "titles.csv"}, r"MicroLens-50k_titles.csv is missing"),
        ({"titles": "item,category\na,x\n"}, r"titles.csv, line 1: column 'title' is missing"),
        ({"pairs": PAIRS_TSV + "\n 1 \td\n"}, r"tsv, line 5: user '1' is already in line 1; keep"),
    ],
)
def test_bad_raw_files_are_one_sentence(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        prepare(tmp_path, raw_folder(tmp_path, **change))
    assert "\n" not in str(caught.value)


def test_a_folder_where_a_file_belongs_is_one_sentence(tmp_path):
    folder = raw_folder(tmp_path)
    (folder / "MicroLens-50k_titles.csv").unlink()
    (folder / "MicroLens-50k_titles.csv").mkdir()
    with pytest.raises(InputError, match=r"titles.csv is a folder; put the file"):
        prepare(tmp_path, folder)


def test_without_covers_the_message_names_the_remedy(tmp_path):
    folder = raw_folder(tmp_path)
    (folder / "MicroLens-50k_covers").rename(folder / "covers")
    with pytest.raises(InputError, match=r"no folder MicroLens-50k_covers.*--require_image false"):
        prepare(tmp_path, folder)
    users, items = prepare(tmp_path, folder, "--require_image", "false")
    assert items["a"]["image"] is None
    assert len(users) == 3


def test_covers_that_no_item_is_called_after_are_named(tmp_path):
    folder = raw_folder(tmp_path)
    covers = folder / "MicroLens-50k_covers"
    (covers / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(b"any")  # a name that is no text
    assert len(prepare(tmp_path, folder)[0]) == 3
    for number, path in enumerate(sorted(covers.glob("[a-d].*"))):
        path.rename(covers / f"00{number}.jpg")
    (tmp_path / "data" / "users.jsonl").unlink()
    with pytest.raises(InputError, match=r"none of the 4 items of the log has an image, as 'a';"):
        prepare(tmp_path, folder)


def test_both_kinds_of_pairs_in_one_folder_are_refused(tmp_path):
    folder = raw_folder(tmp_path)
    (folder / "MicroLens-50k_pairs.csv").write_text(PAIRS_CSV)
    with pytest.raises(InputError, match=r"\(MicroLens-50k_pairs.csv, .*_pairs.tsv\); keep one"):
        prepare(tmp_path, folder, "--name", "MicroLens-50k")


def test_of_two_releases_in_one_folder_one_must_be_named(tmp_path):
    folder = raw_folder(tmp_path)
    for name in ("pairs.tsv", "titles.csv"):
        (folder / f"MicroLens-100k_{name}").write_bytes(
            (folder / f"MicroLens-50k_{name}").read_bytes()
        )
    with pytest.raises(InputError, match="choose one with --name"):
        prepare(tmp_path, folder)
    assert len(prepare(tmp_path, folder, "--name", "MicroLens-50k")[0]) == 3


def test_limit_writes_some_users_and_only_what_they_need(tmp_path):
    folder = raw_folder(tmp_path)
    users, items = prepare(tmp_path, folder, "--limit", "1")
    (row,) = users.values()
    assert set(items) == {*row["history"], row["target"], *row["negatives"]}
