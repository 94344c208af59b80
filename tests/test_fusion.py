"""Rows made from scores (fusion, other libraries), and the data set in their forms."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import TINY
from PIL import Image

from mllmrec.data.candidates import candidates, users_of_split
from mllmrec.evaluation.metrics import evaluate
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_rows
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script

FUSION, EXTERNAL = "MLLM-MSR/baselines/fusion.py", "MLLM-MSR/baselines/external.py"
SPLITS = {"test": "scores.jsonl", "validation": "validation_scores.jsonl"}


def world(folder, n_users=60, seed=0):
    """users.jsonl of half validation, half test users with 1 + 4 candidates."""
    users = [
        {
            "user_id": f"u{n}",
            "history": ["h"],
            "target": f"t{n}",
            "negatives": [f"n{n}_{k}" for k in range(4)],
            "split": "validation" if n % 2 else "test",
            "fold": None,
        }
        for n in range(n_users)
    ]
    write_rows(folder / "users.jsonl", users)
    return users


def write_row(folder, name, users, strength, rng):
    """Scores of a row: noise, and `strength` more for the target."""
    for split, file in SPLITS.items():
        rows = [
            {
                "user_id": user["user_id"],
                "item_id": item,
                "label": label,
                "score": float(100 * rng.normal() + 100 * strength * label),
                "logits": None,
            }
            for user in users_of_split(users, split)
            for item, label in candidates(user)
        ]
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, rows)


def fuse(folder, *words):
    where = ["--data_dir", str(folder), "--output_dir", str(folder), "--rows", "a/one", "a/two"]
    load_script(FUSION).main(["--config", "configs/sample.yaml", *where, *words])
    path = folder / "baselines/fusion/scores.jsonl"
    return read_rows(path), read_record(path)["weights"]


@pytest.fixture
def two_rows(tmp_path):
    rng, users = np.random.default_rng(1), world(tmp_path, 400)
    write_row(tmp_path, "a/one", users, 1.0, rng)
    write_row(tmp_path, "a/two", users, 1.0, rng)
    return tmp_path, users


def test_two_rows_that_know_different_things_are_better_together(two_rows):
    folder, _ = two_rows
    fused, weights = fuse(folder)
    alone = [
        evaluate(read_rows(folder / f"a/{n}/scores.jsonl"), resamples=1) for n in ("one", "two")
    ]
    together = evaluate(fused, resamples=1)["auc_per_user"]
    assert together > max(row["auc_per_user"] for row in alone) + 0.02
    assert min(weights.values()) > 0.3, "both count"


def test_nothing_is_learned_from_test_labels_and_noise_weighs_nothing(two_rows):
    folder, users = two_rows
    before, weights = fuse(folder)
    flipped = {user["user_id"]: user for user in users}
    for user in users_of_split(users, "test"):
        first, *rest = user["negatives"]
        flipped[user["user_id"]] = user | {"target": first, "negatives": [user["target"], *rest]}
    write_rows(folder / "users.jsonl", list(flipped.values()))
    after, again = fuse(folder, "--overwrite", "true")
    assert again == weights
    scores = [{(r["user_id"], r["item_id"]): r["score"] for r in rows} for rows in (before, after)]
    assert scores[0] == scores[1] and before != after
    write_row(folder, "a/two", users, 0.0, np.random.default_rng(2))
    write_rows(folder / "users.jsonl", users)
    _, weights = fuse(folder, "--overwrite", "true")
    assert abs(weights["a/two"]) < 0.2 < weights["a/one"]


def test_a_row_with_other_candidates_is_not_fused(two_rows):
    folder, _ = two_rows
    path = folder / "a/two/validation_scores.jsonl"
    rows = read_rows(path)
    write_rows(path, rows[1:])
    with pytest.raises(InputError, match="lacks 1 of the 1,000 candidates"):
        fuse(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"validation_scores.jsonl is missing"):
        fuse(folder)


def import_scores(folder, text, suffix=".csv"):
    path = folder / f"other{suffix}"
    path.write_text(text)
    words = ["--data_dir", str(folder), "--output_dir", str(folder), "--scores", str(path)]
    load_script(EXTERNAL).main(["--config", "configs/sample.yaml", *words, "--overwrite", "true"])
    return read_rows(folder / "external/external/scores.jsonl")


def test_another_librarys_scores_become_a_row_in_each_form(tmp_path):
    users = users_of_split(world(tmp_path, 6), "test")
    pairs = [(user["user_id"], *own) for user in users for own in candidates(user)]
    lines = [f"{user},{item},{n / 7}" for n, (user, item, _) in enumerate(pairs)]
    found = import_scores(tmp_path, "user_id,item_id,score\n" + "\n".join(reversed(lines)) + "\n")
    assert [(row["user_id"], row["item_id"], row["label"]) for row in found] == pairs
    assert [row["score"] for row in found] == [n / 7 for n in range(len(pairs))]
    tabs = "user_id\titem_id\tscore\n" + "\n".join(line.replace(",", "\t") for line in lines)
    assert import_scores(tmp_path, tabs + "\n", ".tsv") == found
    rows = (line.split(",") for line in lines)
    texts = [json.dumps({"user_id": u, "item_id": i, "score": float(s)}) for u, i, s in rows]
    assert import_scores(tmp_path, "\n".join(texts) + "\n", ".jsonl") == found


WRONG = {
    "a hole": (lambda lines: lines[:-1], "has 14 of 15 candidates, item 'n4_3' of user 'u4' is m"),
    "foreign": (lambda lines: [*lines, "u0,t2,1"], "line 17: item 't2' is no candidate of test"),
    "validation": (lambda lines: [*lines, "u1,t1,1"], "no candidate of test user 'u1'"),
    "twice": (lambda lines: [*lines, lines[0]], "line 17: user 'u0' and item 't0' are there twice"),
    "no number": (lambda lines: [*lines[:-1], "u4,n4_3,nan"], "line 16: the score 'nan' is no nu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_scores_that_are_not_those_of_the_candidates_are_refused(tmp_path, name):
    change, message = WRONG[name]
    users = users_of_split(world(tmp_path, 6), "test")
    pairs = [(user["user_id"], item) for user in users for item, _ in candidates(user)]
    lines = change([f"{user},{item},1.5" for user, item in pairs])
    with pytest.raises(InputError, match=message):
        import_scores(tmp_path, "user_id,item_id,score\n" + "\n".join(lines) + "\n")


def test_scores_of_validation_users_come_from_the_same_stages(small_run, tmp_path):
    words = ["--split", "validation", "--hide", "nothing"]
    small_run.run("MLLM-MSR/test/test_with_llava_sft.py", *words, "--variant", "own")
    rows = read_rows(small_run.system / "own/validation_scores.jsonl")
    users = users_of_split(read_rows(small_run.folder / "users.jsonl"), "validation")
    wanted = [(user["user_id"], *own) for user in users for own in candidates(user)]
    assert [(row["user_id"], row["item_id"], row["label"]) for row in rows] == wanted
    assert not (small_run.system / "own/scores.jsonl").exists()
    small = ["--output_dir", str(tmp_path), "--epochs", "2"]
    small_run.run("MLLM-MSR/baselines/sasrec.py", *small)
    small_run.run("MLLM-MSR/baselines/popularity.py", *small[:2])
    for name in ("sasrec", "popularity"):
        rows = read_rows(tmp_path / f"baselines/{name}/validation_scores.jsonl")
        assert [(row["user_id"], row["item_id"], row["label"]) for row in rows] == wanted


EXPORT = "MLLM-MSR/baselines/export_interactions.py"


def test_recbole_gets_each_learned_item_with_those_before_it(small_run, tmp_path):
    shutil.copytree(small_run.folder, tmp_path / "d", ignore=shutil.ignore_patterns("mllm_msr"))
    words = ["--data_dir", str(tmp_path / "d"), "--output_dir", str(tmp_path)]
    load_script(EXPORT).main(["--config", str(small_run.config), *words])
    folder = tmp_path / "d/export/recbole/mllmrec"
    tables = {
        path.name.removeprefix("mllmrec."): pd.read_csv(path, sep="\t", dtype=str)
        for path in folder.iterdir()
    }
    users = read_rows(tmp_path / "d/users.jsonl")
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        own = users_of_split(users, split)
        table = tables[f"{name}.inter"]
        lines = dict(tuple(table.groupby("user_id:token", sort=False)))
        assert list(lines) == [user["user_id"] for user in own]
        for user in own:
            found = lines[user["user_id"]]
            items = [*user["history"], user["target"]]
            first = 1 if split == "train" else len(items) - 1
            assert found["item_id:token"].tolist() == items[first:]
            before = [" ".join(items[:n]) for n in range(first, len(items))]
            assert found["item_id_list:token_seq"].tolist() == before
    listed = tables["candidates.tsv"]
    wanted = [
        (user["split"], user["user_id"], item, str(label))
        for user in users
        if user["split"] != "train"
        for item, label in candidates(user)
    ]
    assert list(listed.itertuples(index=False, name=None)) == wanted
    items = read_rows(tmp_path / "d/items.jsonl")
    assert tables["item"]["title:token_seq"].tolist() == [item["title"] for item in items]


def test_mmrec_gets_numbers_features_and_the_split(small_run, tmp_path):
    shutil.copytree(small_run.folder, tmp_path / "d", ignore=shutil.ignore_patterns("mllm_msr"))
    words = ["--data_dir", str(tmp_path / "d"), "--output_dir", str(tmp_path), "--format", "mmrec"]
    words += ["--image_roots", str(tmp_path), "--image_encoder", str(TINY / "llava")]
    load_script(EXPORT).main(["--config", str(small_run.config), *words])
    folder = tmp_path / "d/export/mmrec/mllmrec"
    table = pd.read_csv(folder / "mllmrec.inter", sep="\t")
    users, items = (read_rows(tmp_path / f"d/{name}.jsonl") for name in ("users", "items"))
    ids = [item["item_id"] for item in items]
    for number, user in enumerate(users):
        own = table[table["userID"] == number]
        assert [ids[n] for n in own["itemID"]] == [*user["history"], user["target"]]
        label = {"train": 0, "validation": 1, "test": 2}[user["split"]]
        assert own["x_label"].tolist() == [0] * len(user["history"]) + [label]
    for name, width in (("text", 384), ("image", 96)):
        assert np.load(folder / f"{name}_feat.npy").shape == (len(items), width)
    before = np.load(folder / "image_feat.npy")
    Image.new("RGB", (48, 64), "red").save(tmp_path / "d" / items[0]["image"])
    load_script(EXPORT).main(["--config", str(small_run.config), *words])
    changed = (np.load(folder / "image_feat.npy") != before).any(1)
    assert changed.tolist() == [True] + [False] * (len(items) - 1), "made again"
    mapping = pd.read_csv(folder / "i_id_mapping.csv", sep="\t", dtype=str)
    assert mapping["item_id"].tolist() == ids


def test_a_leave_one_out_split_is_exported_as_whole_lists(tmp_path):
    lines = []
    for user, items in (("a", "pqrs"), ("b", "qpsrt")):
        for split, end in (("train", -3), ("validation", -2), ("test", -1)):
            whole = items[: len(items) + end + 1]
            row = {"user_id": user, "history": list(whole[:-1]), "target": whole[-1]}
            row |= {"negatives": [], "split": split, "fold": None}
            times = [100 + ord(item) for item in whole]
            lines.append(row | {"times": times[:-1], "target_time": times[-1]})
    write_rows(tmp_path / "users.jsonl", lines)
    items = [{"item_id": i, "title": f"clip\t{i}", "image": None} for i in "pqrst"]
    write_rows(tmp_path / "items.jsonl", items)
    words = ["--config", "configs/sample.yaml", "--data_dir", str(tmp_path)]
    for name in ("recbole", "mmrec"):
        load_script(EXPORT).main([*words, "--format", name])
    table = pd.read_csv(tmp_path / "export/recbole/mllmrec/mllmrec.inter", sep="\t")
    assert table["item_id:token"].tolist() == list("pqrsqpsrt")
    assert table["timestamp:float"].tolist()[:4] == [212, 213, 214, 215]
    titles = pd.read_csv(tmp_path / "export/recbole/mllmrec/mllmrec.item", sep="\t")
    assert titles["title:token_seq"].tolist()[0] == "clip p"
    table = pd.read_csv(tmp_path / "export/mmrec/mllmrec/mllmrec.inter", sep="\t")
    assert table["x_label"].tolist() == [0, 0, 1, 2, 0, 0, 0, 1, 2]
    assert not (tmp_path / "export/mmrec/mllmrec/image_feat.npy").exists()
