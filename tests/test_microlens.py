"""The MicroLens files as they come, and as they should not."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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


@pytest.mark.parametrize("titles_name", ["MicroLens-50k_titles.csv", "MicroLens-50k_title_en.csv"])
@pytest.mark.parametrize("header", [True, False])
def test_titles_with_and_without_header(tmp_path, titles_name, header):
    titles = TITLES if header else TITLES.split("\n", 1)[1]
    _, items = prepare(tmp_path, raw_folder(tmp_path, titles=titles, titles_name=titles_name))
    assert items["b"]["title"] == "two"
    assert set(items) == set("abcd")


def test_rejected_rows_are_kept_with_file_line_and_reason(tmp_path):
    pairs = PAIRS_CSV + "4,a,yesterday\n4,unknown,7\n4,b\n ,a,8\n4,,9\n4\x07,a,9\n4,a,-1\n"
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
        ("pairs.csv", 11): "the timestamp is not a number",
        ("pairs.csv", 12): "the item has no title in MicroLens-50k_titles.csv",
        ("pairs.csv", 13): "2 fields instead of 3",
        ("pairs.csv", 14): "the user is empty",
        ("pairs.csv", 15): "the item is empty",
        ("pairs.csv", 16): "the user has a control character or half a surrogate pair",
        ("pairs.csv", 17): "the timestamp is negative",
    }


def test_rejected_rows_of_sequences_are_kept_too(tmp_path):
    folder = raw_folder(tmp_path, PAIRS_TSV + "\n\ta b\n4\t\n5\n6\ta \x07 x\n")
    prepare(tmp_path, folder)
    rejected = [
        (row["line"], row["reason"])
        for row in read_rows(tmp_path / "data" / "interactions.rejected.jsonl")
    ]
    assert sorted(rejected) == [
        (5, "the user is empty"),
        (5, "the user is empty"),
        (6, "the user has no items"),
        (7, "1 fields instead of 2"),
        (8, "the item has a control character or half a surrogate pair"),
        (8, "the item has no title in MicroLens-50k_titles.csv"),
    ]


def test_blanks_around_ids_are_not_part_of_them(tmp_path):
    pairs = PAIRS_CSV.replace(",", " ,\u00a0").replace("1", "\u30001")
    titles = "item, title\n" + "".join(f" {i} ,title of {i}\n" for i in "abcd")
    folder = raw_folder(tmp_path, pairs, titles, pairs_name="MicroLens-50k_pairs.csv")
    users, items = prepare(tmp_path, folder)
    assert set(users) == set("123")
    assert set(items) == set("abcd")


def test_fractions_of_a_second_are_in_order(tmp_path):
    """As floats or as integers, the items of each user would be in the order of the file."""
    pairs = "user,item,timestamp\n" + "".join(
        f"{user},{item},1589233210.12345678{place}\n"
        for user, items in (("1", "cba"), ("2", "dcb"), ("3", "adc"))
        for place, item in zip("987", items, strict=True)
    )
    users, _ = prepare(tmp_path, raw_folder(tmp_path, pairs, pairs_name="MicroLens-50k_pairs.csv"))
    assert {u: (row["history"], row["target"]) for u, row in users.items()} == {
        "1": (["a", "b"], "c"), "2": (["b", "c"], "d"), "3": (["c", "d"], "a"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pairs": "user,video,timestamp\n1,a,2\n", "pairs_name": "MicroLens-50k_pairs.csv"},
            r"pairs.csv, line 1: column 'item' is missing; the file has user, video, timestamp",
        ),
        ({"pairs": b"1\ta b\n2\ta \xff\n"}, r"pairs.tsv, line 2: byte 5 is not UTF-8"),
        ({"titles": b"item,title\na,\xe9t\xe9\n"}, r"titles.csv, line 2: byte 3 is not UTF-8"),
        ({"pairs": ""}, r"pairs.tsv is empty"),
        ({"pairs": b"\x1f\x8b\x08"}, r"pairs.tsv is truncated or damaged .*; fetch it again"),
        ({"titles": TITLES.encode("utf-16")}, r"titles.csv is UTF-16 text; save it as UTF-8"),
        ({"titles": TITLES + 'e,"x\nf,y\n'}, r"titles.csv, line 6: a double quote opens a field"),
        ({"titles": "item\na\n"}, r"titles.csv, line 1: the header has one column, 'item'"),
        ({"titles": "item,item\na,b\n"}, r"titles.csv, line 1: column 'item' is there 2 times"),
        ({"titles": "a\nb\n"}, r"titles.csv, line 1: 1 fields instead of 2; none of the 2 rows"),
        (
            {"pairs": PAIRS_CSV + '4,"a,60\n', "pairs_name": "MicroLens-50k_pairs.csv"},
            r"pairs.csv, line 11: a double quote opens a field",
        ),
        (
            {
                "pairs": "user,item,timestamp\n1,a,2020-05-11\n",
                "pairs_name": "MicroLens-50k_pairs.csv",
            },
            r"pairs.csv, line 2: the timestamp is not a number \('2020-05-11'\).*since 1970",
        ),
        (
            {
                "pairs": "user,item,timestamp\n1,a,1589233210\n1,b,1589233210123\n",
                "pairs_name": "MicroLens-50k_pairs.csv",
            },
            r"pairs.csv mixes units of time: line 2 has seconds, line 3 has milliseconds",
        ),
        ({"pairs": "1\tx y\n2\tz\n"}, r"line 1: the item has no title .*; none of the 3 rows"),
        ({"pairs": "1\ta\n2\tb\n"}, r"no interaction is left after the filters"),
        ({"pairs_name": "pairs.tsv"}, r"has no \*_pairs.csv or .tsv"),
        ({"titles_name": "titles.csv"}, r"MicroLens-50k_titles.csv is missing"),
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


CELL = st.sampled_from(
    ["1", "2", " 1", "a", "b ", "x", "", "10", "1.5", "-1", '"', '"a"', "\ufeff"]
)
CELL |= st.text(max_size=3).filter(lambda text: not re.search("[\n\r\ud800-\udfff]", text))


@pytest.fixture(scope="module")
def loader_and_folder(tmp_path_factory):
    return load_script("data_processing/microlens.py"), tmp_path_factory.mktemp("raw")


@given(
    st.lists(st.lists(CELL, min_size=2, max_size=4).map(",".join), max_size=6),
    st.lists(st.lists(CELL, min_size=2, max_size=3).map("\t".join), max_size=6),
    st.booleans(),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_every_pair_is_kept_or_rejected(loader_and_folder, table, sequences, is_table):
    loader, folder = loader_and_folder
    pairs, titles = folder / ("x_pairs.csv" if is_table else "x_pairs.tsv"), folder / "x_titles.csv"
    lines = ["user,item,timestamp", *table] if is_table else sequences
    pairs.write_text("\n".join(lines), newline="\n")
    titles.write_text(TITLES + "1,one\n")
    try:
        log, _, rejected = loader.load(pairs, titles, None)
    except InputError as error:
        assert "\n" not in str(error)
        return
    if is_table:
        assert len(log.user) + len(rejected) == len([line for line in table if line])
    else:
        assert len(log.user) + len(rejected) >= len([line for line in sequences if line])
