"""The cases of `bad_inputs.py`: what is damaged, the stage that is run, and what it must say."""

import bz2
import gzip
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
import yaml
from conftest import ROOT, TINY
from fork_server import HEAVY, LIGHT
from PIL import Image
from safetensors.torch import load_file, save_file

from mllmrec.ranking.checkpoints import seal_checkpoint
from mllmrec.stage.scripts import load_script


class Stage(NamedTuple):
    """script; outputs: patterns of what it writes; options: of each run; modules: of its server."""

    script: str
    outputs: tuple
    options: tuple = ()
    modules: tuple | None = LIGHT


RAW = ("--raw_dir", "{folder}/raw", "--require_image", "false", "--user_core", "2")
RAW += ("--item_core", "1", "--negatives", "1", "--train_fraction", "0.5")
RAW += ("--validation_fraction", "0.2")
DATA = ("users.*", "items.*", "stats.json", "interactions.*")
STAGES = {
    "sample": Stage("data_processing/sample.py", (*DATA, "bounds/*", "covers")),
    "split": Stage("data_processing/split.py", DATA, RAW),
    "microlens": Stage("data_processing/microlens.py", DATA, RAW),
    "amazon": Stage("data_processing/amazon.py", DATA, (*RAW, "--category", "Baby")),
    "download": Stage("data_processing/download_images.py", (), ("--retries", "1")),
    "summary": Stage(
        "Inference/image_summary.py",
        ("mllm_msr/image_summaries.*",),
        ("--max_new_tokens", "10"),
        HEAVY,
    ),
    "preference": Stage(
        "Inference/preference_recurrent.py",
        ("mllm_msr/user_preferences.*",),
        ("--limit", "3", "--max_new_tokens", "10"),
        HEAVY,
    ),
    "direct": Stage(
        "Inference/preference_direct.py",
        ("mllm_msr/user_preferences.*",),
        ("--limit", "3", "--max_new_tokens", "10"),
        HEAVY,
    ),
    "rows": Stage("MLLM-MSR/train/dataset_create.py", ("mllm_msr/train.*", "mllm_msr/valid*")),
    "test_rows": Stage("MLLM-MSR/test/multi_col_dataset.py", ("mllm_msr/test.*",)),
    "train": Stage(
        "MLLM-MSR/train/train_llava_sft.py",
        ("mllm_msr/adapter/*", "mllm_msr/checkpoints/*", "mllm_msr/training*"),
        (),
        HEAVY,
    ),
    "score": Stage(
        "MLLM-MSR/test/test_with_llava_sft.py",
        ("mllm_msr/sft*", "mllm_msr/zero_shot*"),
        ("--limit", "2", "--hide", "nothing"),
        HEAVY,
    ),
    "popularity": Stage("MLLM-MSR/baselines/popularity.py", ("baselines/*",)),
    "sasrec": Stage(
        "MLLM-MSR/baselines/sasrec.py",
        ("baselines/*",),
        ("--epochs", "1", "--width", "8"),
        HEAVY,
    ),
    "gru4rec": Stage("MLLM-MSR/baselines/gru4rec.py", ("baselines/*",), ("--epochs", "1"), HEAVY),
    "metrics": Stage(
        "MLLM-MSR/test/compute_metrics.py",
        (
            "metrics.*",
            "mllm_msr/sft/scores.run.json",
        ),  # else only that the file was changed is said
    ),
    "report": Stage("MLLM-MSR/test/report.py", ("report.*",), ("--users", "3")),
    "merge": Stage("MLLM-MSR/train/merge_adapter.py", ("mllm_msr/merged/*",), (), HEAVY),
    "export": Stage("MLLM-MSR/train/export_dataset.py", ("mllm_msr/export/*",), (), HEAVY),
    "retriever": Stage("MLLM4Rec/train_retriever.py", ("mllm4rec/*",), ("--epochs", "1"), HEAVY),
    "ranker": Stage(
        "MLLM4Rec/train_ranker.py",
        ("mllm4rec/*",),
        ("--lists", "users", "--candidates", "2", "--dataset_code", "sample", "--epochs", "1"),
        HEAVY,
    ),
    "shell": Stage("bash", (), (), None),
}
PREPARE = r"scripts/01_prepare_data\.sh"
MAKERS = {
    "items.jsonl": PREPARE,
    "users.jsonl": PREPARE,
    "mllm_msr/image_summaries.jsonl": r"scripts/02_image_summary\.sh",
    "mllm_msr/user_preferences.jsonl": r"scripts/03_preference\.sh",
    "mllm_msr/train.jsonl": r"scripts/04_datasets\.sh",
    "mllm_msr/validation.jsonl": r"scripts/04_datasets\.sh",
    "mllm_msr/test.jsonl": r"scripts/04_datasets\.sh",
    "mllm_msr/sft/scores.jsonl": r"scripts/06_score\.sh",
}
READERS = {  # a stage that reads the file; every file has all damages once, other readers a few
    "items.jsonl": "summary",
    "users.jsonl": "popularity",
    "mllm_msr/image_summaries.jsonl": "preference",
    "mllm_msr/user_preferences.jsonl": "test_rows",
    "mllm_msr/train.jsonl": "train",
    "mllm_msr/validation.jsonl": "train",
    "mllm_msr/test.jsonl": "score",
    "mllm_msr/sft/scores.jsonl": "metrics",
}
MISSING = object()
NAN, INFINITY = float("nan"), float("inf")
HTML = b"<!DOCTYPE html><html><body>404</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@dataclass
class Place:
    """A copy of a run: links, of which each case replaces some by damaged copies."""

    folder: Path
    base: Path

    def link_all(self, left_out=(), bare=False):
        """Link all files of the base but those that match a pattern of `left_out`."""
        self.folder.mkdir()
        (self.folder / "plain.yaml").write_text("common:\n")
        hidden = (path for path in self.base.rglob(".*"))
        skip = {*hidden, *(p for pattern in left_out for p in self.base.glob(pattern))}
        if not bare:
            self._link(self.base, self.folder, skip)

    def _link(self, source, target, skip):
        for path in source.iterdir():
            if path in skip or path.name == "plain.yaml" or path.suffix == ".lock":
                continue
            if path.is_dir() and path.name != "covers":
                (target / path.name).mkdir()
                self._link(path, target / path.name, skip)
                if not any((target / path.name).iterdir()):
                    (target / path.name).rmdir()
            else:
                (target / path.name).symlink_to(path)

    def options(self, name=""):
        """The options for folders and config; name: of one in this folder."""
        config = ["--config", str(self.folder / name if name else self.base / "small.yaml")]
        return [*config, "--data_dir", str(self.folder), "--output_dir", str(self.folder)]

    def own(self, name):
        """Path of a file of this copy that may be changed."""
        path = self.folder / name
        if path.is_symlink():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def model(self, name):
        """Links to the files of a tiny model, in a folder of its name."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for path in (TINY / name).iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)

    def reports(self):
        """The texts of all files of rejected rows of this copy."""
        paths = (p for p in self.folder.rglob("*.rejected.jsonl") if not p.is_symlink())
        return "".join(path.read_text() for path in paths)


@dataclass
class Case:
    """says: regular expression of the sentence, or of what is reported if `handled`."""

    kind: str
    name: str
    stage: str
    says: str
    damage: Callable[[Place], Any] = lambda place: None
    options: tuple = ()
    handled: bool = False
    environment: dict | None = None
    keep_outputs: bool = False
    bare: bool = False
    base: str = "run"
    is_light: bool = False  # ends before torch is needed

    def __post_init__(self):
        self.modules = LIGHT if self.is_light else STAGES[self.stage].modules
        self.environment = self.environment or {}

    def words(self, place):
        """The command."""
        stage = STAGES[self.stage]
        words = [*stage.options, *self.options]
        if self.stage != "shell":
            words = [*place.options("plain.yaml" if RAW[0] in words else ""), *words]
        return [stage.script, *(word.replace("{folder}", str(place.folder)) for word in words)]


# --- damages -------------------------------------------------------------------------------------


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def set_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change(name, edit, place, line=3):
    """Let `edit` change the row in this line, in place or by what it returns."""
    path = place.own(name)
    rows = rows_of(path)
    changed = edit(rows[line - 1])
    rows[line - 1] = rows[line - 1] if changed is None else changed
    set_rows(path, rows)


def set_key(name, key, value, place):
    """key: with dots, numbers are indices."""

    def edit(row):
        *outer, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        for part in outer:
            row = row[part]
        if value is MISSING:
            del row[last]
        else:
            row[last] = value

    change(name, edit, place)


def set_all(name, edit, place):
    path = place.own(name)
    rows = rows_of(path)
    for row in rows:
        edit(row)
    set_rows(path, rows)


def set_bytes(name, place, edit):
    """edit: bytes, or a function of the file's bytes."""
    path = place.own(name)
    content = edit if isinstance(edit, bytes) else edit(path.read_bytes())
    path.write_bytes(content)


def set_line(name, place, text, line=3):
    """text: bytes, or a function of the line."""
    path = place.own(name)
    lines = path.read_bytes().split(b"\n")
    lines[line - 1] = text if isinstance(text, bytes) else text(lines[line - 1])
    path.write_bytes(b"\n".join(lines))


def remove(name, place):
    place.own(name).unlink()


def make_folder(name, place):
    place.own(name).unlink()
    (place.folder / name).mkdir()


def set_json(name, key, value, place):
    """As `set_key`, for a file of one JSON object."""
    path = place.own(name)
    whole = json.loads(path.read_text())
    inner = whole
    *outer, last = key.split(".")
    for part in outer:
        inner = inner[part]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(whole))


def set_tensors(name, edit, place):
    """edit: a function that changes a dict of tensors."""
    path = place.own(name)
    tensors = load_file(path)
    edit(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})


def half(content):
    return content[: len(content) // 2]


def shown(value):
    if value is MISSING:
        return "missing"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- A: rows -------------------------------------------------------------------------------------

NO_ID = (MISSING, None, 5, ["a"], "", True, NAN, {"a": 1})
NO_TEXT = (MISSING, None, 5, 0.5, ["a"], True, NAN, {"a": 1})
NO_IDS = (MISSING, None, 5, "i001", [5], [None], [""], [["i001"]], {"a": 1})
ANSWER = [{"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]
ROW_KEYS = {
    "user_id": NO_ID,
    "item_id": NO_ID,
    "label": (MISSING, 2, -1, None, "1", 0.5, [], NAN, True),
    "images": (MISSING, None, 5, "a.png", [5], [None], [""], ["a.png", "b.png"], []),
    "messages": (MISSING, None, 5, "text", [], [5], {"role": "user"}, ANSWER),
    "messages.0.role": (MISSING, None, 5, "boss", "", ["user"]),
    "messages.0.content": (
        MISSING,
        None,
        "text",
        [],
        [5],
        [{"type": "audio"}],
        [{"type": "image"}],
    ),
    "messages.0.content.1.text": (MISSING, None, 5, ["a"], True),
    "messages.0.content.1.type": (MISSING, None, "image", "video", 5),
    "preference_span": (None, 5, [], [5], [-1, 3], [50, 2], [0, 10**9], ["0", "5"], [0, 1.5]),
}
WRONG_KEYS = {
    "items.jsonl": {
        "item_id": NO_ID,
        "title": NO_TEXT,
        "image": (MISSING, 5, ["a"], True, NAN, {"a": 1}),
    },
    "users.jsonl": {
        "user_id": NO_ID,
        "history": (*NO_IDS, []),
        "target": NO_ID,
        "negatives": NO_IDS,
        "split": (MISSING, None, "valid", "", 5, ["train"], "Train"),
        "fold": (MISSING, -1, "0", 0.5, NAN, [0], True),
    },
    "mllm_msr/image_summaries.jsonl": {"item_id": NO_ID, "summary": NO_TEXT},
    "mllm_msr/user_preferences.jsonl": {
        "user_id": NO_ID,
        "preference": NO_TEXT,
        "blocks": (MISSING, None, 5, [], [5], "text", [{"items": ["i001"]}], [{"preference": "a"}]),
        "blocks.0.items": NO_IDS,
        "blocks.0.preference": NO_TEXT,
    },
    "mllm_msr/train.jsonl": ROW_KEYS,
    "mllm_msr/validation.jsonl": {"label": ROW_KEYS["label"], "messages": ROW_KEYS["messages"]},
    "mllm_msr/test.jsonl": ROW_KEYS,
    "mllm_msr/sft/scores.jsonl": {
        "user_id": NO_ID,
        "item_id": NO_ID,
        "label": ROW_KEYS["label"],
        "score": (MISSING, None, "0.5", NAN, INFINITY, -INFINITY, [], True),
        "logits": (MISSING, 5, [], {"Yes": "a"}, {"Yes": NAN}, {"Yes": None}, "text"),
    },
}
# A question that names another part than the key that was set.
ALSO = {
    "images": "|places for them",
    "messages": "|first message",
    "messages.0.content": "|question must have|places for them",
    "messages.0.content.1.text": "|question must have",
    "messages.0.content.1.type": "|question must have|places for them",
    "label": "|the label is",
    "item_id": "|it must have one of item_id and item_ids",
}


def key_cases():
    for name, keys in WRONG_KEYS.items():
        for key, values in keys.items():
            outer = key.split(".")[0]
            for value in values:
                says = rf"{Path(name).name}, line 3: .*({outer}{ALSO.get(key, '')}).*; "
                says += f"make the file again with {MAKERS[name]}"
                damage = partial(set_key, name, key, value)
                yield Case("keys", f"{name} {key} {shown(value)}", READERS[name], says, damage)
    more = [("users.jsonl", s, "split", "valid") for s in ("preference", "rows", "test_rows")]
    more += [("items.jsonl", s, "title", None) for s in ("preference", "rows", "test_rows")]
    more += [("mllm_msr/sft/scores.jsonl", "report", "score", "0.5")]
    more += [("items.jsonl", "report", "image", 5), ("users.jsonl", "report", "history", 5)]
    more += [("mllm_msr/user_preferences.jsonl", "report", "blocks", [])]
    for name, stage, key, value in more:
        says = rf"{Path(name).name}, line 3: .*{key}.*; make the file again with {MAKERS[name]}"
        yield Case(
            "keys", f"{name} {key} {shown(value)}", stage, says, partial(set_key, name, key, value)
        )


# --- A: whole files ------------------------------------------------------------------------------

SURROGATE = rb'{"item_id": "x\ud83d"'


def file_cases():
    digits, brackets = b"9" * 5000, b"[" * 100_000
    damages = {  # name -> (damage, what is said besides file and line)
        "broken JSON": (partial(set_line, text=b'{"user_id": '), "line 3: not valid JSON"),
        "truncated line": (partial(set_line, text=half), "line 3: not valid JSON"),
        "two rows in a line": (partial(set_line, text=lambda b: b + b), "line 3: not valid JSON"),
        "blank line": (partial(set_line, text=b""), "line 3: not valid JSON"),
        "null": (partial(set_line, text=b"null"), "line 3: a line must hold one object"),
        "list": (partial(set_line, text=b"[1, 2]"), "line 3: a line must hold one object"),
        "text": (partial(set_line, text=b'"text"'), "line 3: a line must hold one object"),
        "not UTF-8": (
            partial(set_line, text=lambda b: b.replace(b'_id": "', b'_id": "\xff', 1)),
            "line 3: byte [0-9]+ is not UTF-8",
        ),
        "5,000 digits": (
            partial(set_line, text=lambda b: b[:-1] + b', "more": ' + digits + b"}"),
            "line 3: ",
        ),
        "100,000 brackets": (
            partial(set_line, text=lambda b: b[:-1] + b', "more": ' + brackets + b"}"),
            "line 3: not valid JSON",
        ),
        "NUL bytes": (partial(set_line, text=bytes(80)), "line 3: not valid JSON"),
        "HTML": (partial(set_bytes, edit=HTML), "line 1: not valid JSON"),
        "git-lfs pointer": (partial(set_bytes, edit=POINTER), "line 1: not valid JSON"),
        "gzip": (partial(set_bytes, edit=gzip.compress), "line 1: byte 2 is not UTF-8"),
        "BOM": (partial(set_bytes, edit=lambda b: b"\xef\xbb\xbf" + b), "line 1: "),
        "UTF-16": (
            partial(set_bytes, edit=lambda b: b.decode().encode("utf-16")),
            "line 1: byte 1 is not UTF-8",
        ),
        "folder": (make_folder, "(is a folder, but|a folder is where a file).*; move it away"),
        "missing": (remove, "is missing; {maker} makes it"),
        "empty": (partial(set_bytes, edit=b""), "(is empty|holds no|has no).*; "),
        "truncated file": (
            partial(set_bytes, edit=lambda b: b[:-20]),
            "line [0-9]+: not valid JSON",
        ),
    }
    for file, stage in READERS.items():
        for name, (damage, says) in damages.items():
            text = rf"{Path(file).name}[^:]*" + says.format(maker=MAKERS[file])
            if name == "missing" and stage == "metrics":  # other variants are measured
                continue
            handled = (file, name) == ("mllm_msr/validation.jsonl", "empty")
            if handled:  # the last epoch is kept
                text = "best validation AUC nan"
            elif name == "empty" and stage in ("preference", "test_rows"):  # all may be rejected
                text = rf"has no line in .*{Path(file).name}; finish"
            elif name == "folder":
                text = rf"{Path(file).name}.*; move it away"
            yield Case("files", f"{file}: {name}", stage, text, partial(damage, file), (), handled)
        # U+FFFD takes its place; the user of a complete list is then another one.
        is_list = file in ("mllm_msr/validation.jsonl", "mllm_msr/sft/scores.jsonl")
        yield Case(
            "files",
            f"{file}: half a surrogate",
            stage,
            "instead of 1 and 20; " if is_list else "wrote",
            partial(set_line, file, text=lambda b: b.replace(b'": "', rb'": "\ud83d', 1)),
            handled=not is_list,
        )
    for stage in ("preference", "direct", "rows", "test_rows"):
        says = r"users\.jsonl.*(is empty|holds no|has no)"
        yield Case(
            "files", "users.jsonl: empty", stage, says, partial(set_bytes, "users.jsonl", edit=b"")
        )
    files = ("image_urls.jsonl", "mllm_msr/training_log.jsonl", "metrics.json")
    for file, stage in zip(files, ("download", "report", "report"), strict=True):
        for name, content in {
            "not JSON": b"{",
            "list": b"[]",
            "UTF-16": "{}".encode("utf-16"),
            "brackets": brackets,
            "HTML": HTML,
        }.items():
            says = rf"{Path(file).name}(, line 1)?: .*; "
            yield Case(
                "files", f"{file}: {name}", stage, says, partial(set_bytes, file, edit=content)
            )
        yield Case(
            "files",
            f"{file}: folder",
            stage,
            rf"{Path(file).name}.* folder.*; ",
            lambda place, file=file: (
                place.own(file).unlink(missing_ok=True),
                (place.folder / file).mkdir(),
            ),
        )
    log_values = {"step": (None, "a", NAN), "loss": (None, "a", []), "eval_auc": ("a", None)}
    for key, values in log_values.items():
        for value in values:
            line = json.dumps({"step": 1, "loss": 0.5, key: value}).encode() + b"\n"
            says = rf"training_log\.jsonl, line 1: {key}.*; "
            damage = partial(set_bytes, "mllm_msr/training_log.jsonl", edit=line)
            yield Case("files", f"training_log {key} {shown(value)}", "report", says, damage)
    for key, value in {"auc": "a", "users": None, "hr@5": MISSING, "auc_ci95": [1]}.items():
        damage = partial(set_json, "metrics.json", f"sft.{key}", value)
        says = r"metrics\.json: .*; "
        yield Case("files", f"metrics.json {key} {shown(value)}", "report", says, damage)
    damage = partial(set_json, "metrics.json", "sft", 5)
    yield Case("files", "metrics.json variant 5", "report", r"metrics\.json: .*; ", damage)
    rejected = "mllm_msr/image_summaries.rejected.jsonl"
    for name, content in {
        "not JSON": b"{\n",
        "no id": b'{"reason": "a"}\n',
        "id 5": b'{"item_id": 5, "reason": "a"}\n',
        "no reason": b'{"item_id": "i001"}\n',
        "reason 5": b'{"item_id": "i001", "reason": 5}\n',
        "twice": b'{"item_id": "i001", "reason": "a"}\n' * 2,
    }.items():
        says = r"image_summaries\.rejected\.jsonl, line [12]: .*; "
        yield Case(
            "files",
            f"{rejected}: {name}",
            "preference",
            says,
            partial(set_bytes, rejected, edit=content),
        )


# --- A: rows that are right alone ----------------------------------------------------------------


def repeat_line(name, place, changed=()):
    path = place.own(name)
    rows = rows_of(path)
    set_rows(path, [*rows, {**rows[0], **dict(changed)}])


def meaning_cases():
    users, items = "users.jsonl", "items.jsonl"
    summaries, preferences = "mllm_msr/image_summaries.jsonl", "mllm_msr/user_preferences.jsonl"
    train, valid, test = (f"mllm_msr/{n}.jsonl" for n in ("train", "validation", "test"))
    scores = "mllm_msr/sft/scores.jsonl"

    def case(name, stage, says, damage, **more):
        return Case("meaning", name, stage, says, damage, **more)

    def edit(file, key, value):
        return partial(set_key, file, key, value)

    def target_in_negatives(row):
        row["negatives"][0] = row["target"]

    def negative_twice(row):
        row["negatives"] = row["negatives"][:1] * 2

    for stage in ("preference", "rows", "test_rows", "popularity", "sasrec", "report"):
        says = r"users\.jsonl, line 3: the target 'i\d+' is among the negatives; make"
        yield case(
            "target among negatives", stage, says, partial(change, users, target_in_negatives)
        )
        says = r"users\.jsonl, line 3: the negative 'i\d+' is listed twice; make"
        yield case("negative twice", stage, says, partial(change, users, negative_twice))
        says = r"users\.jsonl, line 31: user 'u0000' is already in line 1.*; remove one"
        yield case("user twice", stage, says, partial(repeat_line, users))
    for stage in ("summary", "preference", "rows", "report"):
        says = r"items\.jsonl, line 61: item_id 'i000' is already in line 1; remove one"
        yield case("item twice", stage, says, partial(repeat_line, items))
    for stage in ("preference", "rows", "test_rows", "popularity", "sasrec"):
        says = r"users\.jsonl, line \d+: user '\w+' has no negatives.*; make"
        damage = partial(set_all, users, lambda row: row.update(negatives=[]))
        yield case("no negatives at all", stage, says, damage)
    says = r"users\.jsonl, line 3: item 'zz' is not in .*items\.jsonl; "
    yield case("unknown item in history", "preference", says, edit(users, "history", ["zz"]))
    for stage in ("rows", "test_rows", "sasrec"):
        for key, value in {"target": "zz", "negatives": ["zz", "i001"]}.items():
            damage = partial(set_all, users, lambda row, k=key, v=value: row.update({k: v}))
            says = r"(users\.jsonl, line \d+: .*'zz' is not in .*items\.jsonl; )"
            yield case(f"unknown item in {key}", stage, says, damage)
    says = r"'i\d+'.* not in .*items\.jsonl; "
    damage = partial(set_bytes, items, edit=lambda b: b.split(b"\n")[0] + b"\n")
    for stage in ("preference", "rows", "test_rows", "report", "sasrec"):
        yield case("one item left in items.jsonl", stage, says, damage)
    says = r"no line in .*image_summaries\.jsonl; finish scripts/02_image_summary\.sh"
    damage = partial(set_bytes, summaries, edit=lambda b: b.split(b"\n")[0] + b"\n")
    yield case("one summary left", "preference", says, damage)
    says = r"image_summaries\.jsonl, line 61: item_id 'i000' is already in line 1; remove one"
    yield case("summary twice", "preference", says, partial(repeat_line, summaries))
    says = r"user_preferences\.jsonl, line 31: .*already in line 1.*; remove one"
    yield case("preference twice", "test_rows", says, partial(repeat_line, preferences))
    damage = partial(set_bytes, preferences, edit=lambda b: b.split(b"\n")[0] + b"\n")
    says = r"user 'u\d+' has no line in .*user_preferences\.jsonl; finish stage 3"
    yield case("one preference left", "rows", says, damage)
    for label in (0, 1):
        for file, stage in ((valid, "train"), (test, "score"), (scores, "metrics")):
            damage = partial(set_all, file, lambda row, v=label: row.update(label=v))
            says = rf"{Path(file).name}.*(positives|for the label)"
            yield case(f"{Path(file).name}: all labels {label}", stage, says, damage)
    for file, stage in ((test, "score"), (scores, "metrics")):
        says = rf"{Path(file).name}: user '\w+' has 2 positives.*; "
        yield case(f"two positives, {stage}", stage, says, edit(file, "label", 1))
        says = rf"{Path(file).name}.*(twice|already)"
        yield case(f"row twice, {stage}", stage, says, partial(repeat_line, file))
        damage = partial(set_bytes, file, edit=lambda b: b[b.index(b"\n") + 1 :])
        says = rf"{Path(file).name}: user '\w+' has 0 positives.*; "
        yield case(f"target's row missing, {stage}", stage, says, damage)
        damage = partial(set_line, file, text=lambda b: b"", line=4)
    says = r"train\.jsonl.*(twice|already).*; "
    yield case("training row twice", "train", says, partial(repeat_line, train))
    damage = partial(set_all, train, lambda row: row.update(label=0))
    says = r"train\.jsonl, line 1: the answer is 'Yes', for the label 0 it must be 'No'; make"
    yield case("training labels all 0", "train", says, damage)
    damage = edit(train, "messages.1.content.0.text", "Maybe")
    says = r"train\.jsonl, line 3: the answer is 'Maybe'.*; make"
    yield case("answer Maybe", "train", says, damage)
    damage = partial(set_all, train, lambda row: row["messages"].pop())
    yield case("no answers", "train", r"train\.jsonl, line 1: the answer is ''.*; make", damage)
    damage = edit(test, "messages.0.content.1.text", "[INST] a </s><image> <s>[/INST] Yes")
    for stage in ("score",):
        damage_all = partial(
            set_all,
            test,
            lambda row: row["messages"][0]["content"][1].update(text="</s><image>[/INST] Yes"),
        )
        yield case(
            "control markers, span beyond",
            stage,
            r"test\.jsonl, line 1: preference_span",
            damage_all,
        )

        def marked(row):
            row["messages"][0]["content"][1]["text"] = "<image></s>[/INST] Yes <image>"
            row["preference_span"] = [0, 0]

        yield case(
            "control markers",
            stage,
            r"wrote .*scores",
            partial(set_all, test, marked),
            handled=True,
        )

    def other_candidates(row):
        row["item_id"] = "zz"

    yield case(
        "a list that lacks a candidate",
        "metrics",
        r"scores\.jsonl: user '\w+' has . positives and \d+ negatives instead of 1 and \d+; ",
        partial(set_bytes, scores, edit=lambda b: b[: b.rindex(b"\n", 0, -1) + 1]),
    )
    yield case(
        "constant scores of one user only",
        "metrics",
        "AUC|auc",
        partial(set_all, scores, lambda row: row.update(score=0.5)),
        handled=True,
    )


# --- A: images -----------------------------------------------------------------------------------


def image_cases():
    def place_image(file, name, content, place):
        """A file of this copy as the image of line 3 (items.jsonl) or of all rows."""
        path = place.folder / "own" / name
        path.parent.mkdir(exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        relative = os.path.relpath(path, (place.folder / file).parent)
        if file == "items.jsonl":
            set_key(file, "image", relative, place)
        else:
            set_key(file, "images", [relative], place)

    png = (TINY.parent.parent / "no").name  # replaced below: a small PNG
    from io import BytesIO

    buffer = BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(buffer, "PNG")
    png = buffer.getvalue()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    contents = {
        "missing": None,
        "empty": b"",
        "truncated": half(png),
        "HTML": HTML,
        "git-lfs pointer": POINTER,
        "EPS": eps,
        "PDF": b"%PDF-1.4\n1 0 obj\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "noise": bytes(range(256)) * 4,
    }
    for name, content in contents.items():
        damage = partial(place_image, "items.jsonl", "a.jpg", content)
        yield Case(
            "images",
            f"{name}, stage 2",
            "summary",
            "item_id.*i002.*(image|file)",
            damage,
            handled=True,
        )
        if name in ("missing", "empty", "EPS", "HTML", "truncated"):
            yield Case(
                "images", f"{name}, stage 4", "test_rows", "reason.*i002", damage, handled=True
            )
            says = r"(test\.jsonl|a\.jpg|images).*; (restore|make)"
            test = partial(place_image, "mllm_msr/test.jsonl", "a.jpg", content)
            yield Case("images", f"{name}, stage 6", "score", says, test)
            train = partial(place_image, "mllm_msr/train.jsonl", "a.jpg", content)
            says = r"(train\.jsonl, line 3|a\.jpg).*; (restore|make)"
            yield Case("images", f"{name}, stage 5", "train", says, train)
    outside = {
        "up": "../../../../../../etc/passwd",
        "absolute": "/etc/passwd",
        "up in the middle": "covers/../../../../../../etc/hostname",
    }
    outside_says = (
        r"{file}: the image .* lies in .*, outside .* and --image_roots .*; .*name its folder"
    )
    stages = {"items.jsonl": ("summary", "rows", "test_rows", "report")}
    stages |= {"mllm_msr/train.jsonl": ("train",), "mllm_msr/validation.jsonl": ("train",)}
    stages |= {"mllm_msr/test.jsonl": ("score",)}
    for file, readers in stages.items():
        says = outside_says.format(file=re.escape(Path(file).name))
        for stage in readers:
            for name, target in outside.items():
                key, value = ("image", target) if file == "items.jsonl" else ("images", [target])
                damage = partial(set_key, file, key, value)
                yield Case("images", f"{file}: {name}", stage, says, damage)

            def link(place, file=file):
                (place.folder / "own").mkdir()
                (place.folder / "own" / "a.jpg").symlink_to("/etc/passwd")
                place_image(file, "a.jpg", None, place)

            yield Case("images", f"{file}: link", stage, says, link)


# --- B: options ----------------------------------------------------------------------------------

OPTION_CLASSES = {
    "sample": ("data_processing/sample.py", "Options"),
    "microlens": ("data_processing/microlens.py", "Options"),
    "amazon": ("data_processing/amazon.py", "Options"),
    "download": ("data_processing/download_images.py", "Options"),
    "summary": ("Inference/image_summary.py", "Options"),
    "preference": ("Inference/preference_recurrent.py", "Options"),
    "direct": ("Inference/preference_direct.py", "Options"),
    "rows": ("MLLM-MSR/train/dataset_create.py", "DatasetOptions"),
    "train": ("MLLM-MSR/train/train_llava_sft.py", "Options"),
    "score": ("MLLM-MSR/test/test_with_llava_sft.py", "Options"),
    "metrics": ("MLLM-MSR/test/compute_metrics.py", "Options"),
    "report": ("MLLM-MSR/test/report.py", "Options"),
    "merge": ("MLLM-MSR/train/merge_adapter.py", "Options"),
    "popularity": ("MLLM-MSR/baselines/popularity.py", "Options"),
    "sasrec": ("MLLM-MSR/baselines/sasrec.py", "Options"),
    "gru4rec": ("MLLM-MSR/baselines/gru4rec.py", "Options"),
    "export": ("MLLM-MSR/train/export_dataset.py", "Options"),
    "retriever": ("MLLM4Rec/train_retriever.py", "Options"),
    "ranker": ("MLLM4Rec/train_ranker.py", "Options"),
}


def limits_of(info):
    """(smallest, largest) allowed values of a number, None: no limit; with an open end, beyond."""
    low = high = None
    for limit in info.metadata:
        low = getattr(limit, "ge", getattr(limit, "gt", low))
        high = getattr(limit, "le", getattr(limit, "lt", high))
    return low, high


def wrong_values(info):
    """Values of an option that are outside of its type or range, as texts."""
    kind, (low, high) = info.annotation, limits_of(info)
    open_low = any(hasattr(limit, "gt") for limit in info.metadata)
    open_high = any(hasattr(limit, "lt") for limit in info.metadata)
    if kind in (int, float):
        below = -1 if low is None else low if open_low else low - 1
        values = [str(below), "nan", "inf", "-inf", "text", "", "1 2", str(-(10**30))]
        if kind is int:
            values += ["1.5", "1e30", str(10**30)]
        if high is not None:
            values.append(str(high if open_high else high + 1))
        return values
    if kind is bool:
        return ["perhaps", "", "2"]
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        return [v for v in ("nonsense", "", str(allowed[0]).upper()) if v not in allowed]
    if get_origin(kind) is list and get_origin(get_args(kind)[0]) is Literal:
        return ["nonsense", ""]
    if kind is str and any(hasattr(limit, "pattern") for limit in info.metadata):
        return ["../../escape", "a/b", "a b", "a\nb"]
    if kind is str and low == 1:
        return [""]
    return []


def option_cases():
    seen = set()
    for stage, (script, name) in OPTION_CLASSES.items():
        options_class = getattr(load_script(script), name)
        for option, info in options_class.__pydantic_fields__.items():
            key = (option, repr(info.annotation), info.description)
            if key in seen and not (option == "limit" and stage in ("train", "score", "summary")):
                continue
            seen.add(key)
            for value in wrong_values(info):
                says = rf"--{option}: .*; --help lists all options"
                words = (f"--{option}={value}",)
                yield Case(
                    "options", f"{words[0]!r}", stage, says, options=words, bare=True, is_light=True
                )
            if info.annotation in (int, float):
                words = (f"--{option}",)
                says = rf"--{option}: expected one argument; --help lists all options"
                yield Case(
                    "options",
                    f"{words[0]} without value",
                    stage,
                    says,
                    options=words,
                    bare=True,
                    is_light=True,
                )
    yield from (combination_case(*entry) for entry in COMBINATIONS)


NO_SERVER = "--engine server --base_url http://127.0.0.1:9/v1"
COMBINATIONS = [
    ("sample", "--train_fraction 0.7 --validation_fraction 0.4", "--train_fraction and --valid"),
    (
        "sample",
        "--train_fraction 0.001 --validation_fraction 0",
        "none is in the train split; change",
    ),
    (
        "sample",
        "--train_fraction 0.99 --validation_fraction 0",
        "none is in the test split; change",
    ),
    ("sample", "--folds 1", "--folds must be 0 or at least 2"),
    ("sample", "--folds 5 --test_fold 5", "--test_fold one of them"),
    ("sample", "--test_fold 3", "--test_fold.*--folds"),
    ("sample", "--folds 1000", "none is in the|--folds"),
    ("sample", "--split_by leave_one_out --user_core 2", "needs --user_core 4"),
    ("sample", "--split_by leave_one_out --user_core 4 --history released", "chronological"),
    ("sample", "--split_by leave_one_out --user_core 4 --folds 3", "cannot be used with --folds"),
    ("sample", "--min_length 20 --max_length 10", "must rise in this order"),
    ("sample", "--max_length 300", "must rise in this order"),
    ("sample", "--n_items 1 --min_length 2", "must rise in this order"),
    ("sample", "--n_users 1", "lower --negatives"),
    ("sample", "--negatives 1000", "lower --negatives"),
    ("sample", "--user_core 1000", "no interaction is left.*lower --user_core"),
    ("sample", "--item_core 1000", "no interaction is left.*lower --user_core"),
    ("sample", "--n_userss 3", "unknown option '--n_userss'; did you mean --n_users"),
    ("sample", "--seed", "expected one argument"),
    ("sample", "extra", "unknown option 'extra'"),
    ("sample", "--", "unknown option|--help"),
    ("sasrec", "--item_ids false", "--item_ids false needs --features"),
    ("sasrec", "--heads 3 --width 8", "--heads"),
    ("sasrec", "--features summary --summaries none.jsonl", "none.jsonl is missing"),
    ("sasrec", "--features title --encoder ./none", "--encoder ./none cannot be loaded"),
    ("sasrec", "--device cuda", "torch finds no GPU; pass --device cpu"),
    ("popularity", "--system ../x", "--system: "),
    ("popularity", "--system=", "--system: "),
    ("popularity", "--system .", "--system: "),
    ("popularity", "--output_dir=", "--output_dir: "),
    ("popularity", "--data_dir=", "--data_dir: "),
    ("popularity", "--data_dir /nowhere", "users.jsonl is missing; "),
    ("popularity", "--output_dir /dev/null/a", "/dev/null"),
    ("popularity", "--output_dir {folder}/users.jsonl", "file is where a folder belongs"),
    ("popularity", "--output_dir " + "a" * 300, "name.*; "),
    ("score", "--variant ../../escape", "--variant: "),
    ("score", "--variant a/b", "--variant: "),
    ("score", "--hide", "--hide"),
    ("score", "--hide nothing nothing", "wrote"),
    ("score", "--hide everything", "--hide"),
    ("score", "--adapter /nowhere", "/nowhere is missing or has no adapter_config.json; "),
    ("score", "--adapter {folder}/users.jsonl", "is missing or has no adapter_config.json; "),
    ("score", "--adapter none --model /nowhere", "the model folder /nowhere is missing; "),
    ("score", "--adapter none --model=", "--model"),
    ("score", "--adapter none --model {folder}", "has no config.json.*; "),
    ("score", "--adapter none --model {folder}/users.jsonl", "is missing; |no model folder; "),
    ("score", "--adapter none --model no/where", "no/where cannot be read.*; "),
    ("score", "--adapter none --model nowhere", "the model folder nowhere is missing; "),
    (
        "score",
        "--adapter none --model Inference/tiny_models/llama",
        "takes none; name a multimodal",
    ),
    ("score", "--model Inference/tiny_models/llama", "trained on .*; pass the matching"),
    ("score", "--attention nonsense", "--attention"),
    ("score", "--attention flash_attention_2", "--attention flash_attention_2.*; "),
    ("score", "--attention=", "--attention"),
    ("score", "--prompt_format nonsense", "--prompt_format|prompt"),
    ("score", "--prompt_format {text", "--prompt_format|prompt"),
    ("score", "--prompt_format {text}{foo}", "cannot answer a question.*; "),
    ("score", "--max_text_tokens 1", "were rejected, each with its reason"),
    ("score", "--image_tiles none", "--image_tiles"),
    ("score", "--batch_tokens 1", "wrote"),
    ("summary", "--model Inference/tiny_models/llama", "takes no images; name a multimodal"),
    ("summary", "--image_prompt {nonsense}", "unknown place 'nonsense'"),
    ("summary", "--image_prompt {", "cannot be parsed"),
    ("summary", "--image_prompt={image.__class__}", "unknown place"),
    ("summary", "--image_prompt={0}", "unknown place"),
    ("summary", "--image_prompt={item!z}", "cannot be parsed|unknown"),
    ("summary", "--image_prompt={item:9999999999}", "unknown place 'item:9999999999'"),
    ("summary", "--summary fused --title_prompt nothing", "lacks the place {title}"),
    ("summary", "--summary fused --fusion_prompt nothing", "lacks the place"),
    ("summary", "--max_new_tokens 2048", "--max_new_tokens 2048 leaves no room"),
    ("summary", "--max_new_tokens 2047", "--max_new_tokens|reason"),
    ("summary", "--batch_tokens 1 --limit 2", "wrote"),
    ("preference", "--summaries /nowhere.jsonl", "nowhere.jsonl is missing; "),
    ("preference", "--summaries {folder}", "is a folder"),
    ("preference", "--summaries {folder}/users.jsonl", "item_id.*; "),
    ("preference", "--first_prompt nothing", "lacks the place"),
    ("preference", "--next_prompt nothing", "lacks the place"),
    ("preference", "--max_prompt_tokens 1", "--max_prompt_tokens|reason"),
    ("preference", "--temperature 1e30", "wrote"),
    ("preference", "--temperature 1e-30", "wrote"),
    ("preference", "--temperature 1e-300 --top_p 1e-300", "wrote"),
    ("preference", "--model Inference/tiny_models/llava", "llava cannot be loaded.*; "),
    ("preference", "--engine nonsense", "--engine: "),
    ("preference", "--engine server", "--base_url"),
    ("preference", "--engine server --base_url localhost:8000", "--base_url"),
    ("preference", "--engine server --base_url http://", "--base_url"),
    ("preference", "--engine server --base_url=", "--base_url"),
    ("preference", "--base_url http://localhost:9/v1", "pass --engine server"),
    ("preference", NO_SERVER, "no .* answers at http.*; start a server"),
    ("summary", NO_SERVER, "no .* answers at http.*; start a server"),
    ("preference", f"{NO_SERVER} --prompt_format {{text}}", "renders prompts.*or use --engine"),
    ("preference", f"{NO_SERVER} --model nowhere", "the model folder nowhere is missing; "),
    ("train", "--lora_layers nonsense", "no linear layers called 'nonsense'; "),
    ("train", "--lora_layers", "wrote"),
    ("train", "--lora_r 2147483647", "--lora_r|out of memory"),
    ("train", "--lora_alpha 1e30", "--lora_alpha: "),
    ("train", "--learning_rate 1e30", "(diverged|finite|loss).*"),
    ("train", "--learning_rate 0", "--learning_rate|wrote"),
    ("train", "--dtype float16", "float16.*--dtype float32"),
    ("train", "--quantization nf4", "wrote"),
    ("train", "--report_to wandb", "pip install wandb"),
    ("ranker", "--dataset_code=", "not called like a data set.*; pass --dataset_code"),
    ("ranker", "--candidates 5", "--train_negatives 4"),
    ("ranker", "--lists retrieved", "candidates.jsonl is missing.*MLLM4Rec/train_retriever"),
    ("ranker", "--summaries nowhere.jsonl", "nowhere.jsonl is missing"),
    ("ranker", "--max_text_tokens 1", "no question fits"),
    ("ranker", "--model Inference/tiny_models/llava", "the same token; use another"),
    ("retriever", "--retriever popularity", "split by user.*leave_one_out"),
    ("export", "--max_text_tokens 1", "no question fits.*; raise --max_text_tokens"),
    ("export", "--model nowhere", "model folder nowhere is missing"),
    ("train", "--max_text_tokens 1", "no question fits"),
    ("train", "--group_by item --loss sequence", "--group_by|--loss"),
    ("train", "--group_by item --batch_size 1", "--group_by|--batch_size"),
    ("train", "--model Inference/tiny_models/llama", "takes none; name a multimodal"),
    ("metrics", "--runs {folder} {folder}", "names one folder twice"),
    ("metrics", "--runs /nowhere", "'/nowhere' has no"),
    ("metrics", "--runs=", "the output folder '' has no"),
    ("metrics", "--runs {folder}/users.jsonl", "has no \\*/\\*/scores.jsonl; "),
    ("report", "--published nonsense", "no published results for 'nonsense'; choose"),
    ("merge", "--quantization nf4", "without --quantization"),
    ("merge", "--adapter /nowhere", "missing or has no"),
    ("merge", "--model Inference/tiny_models/llama", "trained on .*; pass the matching"),
    ("merge", "--merged {folder}/users.jsonl", "move it away"),
    ("merge", "--merged {folder}", "is no merged model.*; "),
    ("merge", "--merged {folder}/covers", "is no merged model.*; "),
    ("microlens", "--raw_dir /nowhere", "the folder /nowhere is missing; "),
    ("microlens", "--raw_dir=", "--raw_dir: "),
    ("microlens", "--raw_dir {folder}", "has no .*_pairs.csv or .tsv; "),
    ("microlens", "--name ../x", "--name: "),
    ("amazon", "--raw_dir /nowhere", "the folder /nowhere is missing; "),
    ("amazon", "--category ../Baby", "--category: "),
    ("split", "--raw_dir /nowhere", "interactions.csv is missing; "),
]


HANDLED = ("wrote", "--learning_rate|wrote", "--max_new_tokens|reason")
HANDLED += ("--max_prompt_tokens|reason", "were rejected, each with its reason")


def combination_case(stage, words, says):
    handled = says in HANDLED
    bare = stage in ("sample", "microlens", "amazon", "split")
    keep = "adapter" in words and stage == "score"
    split = tuple(words.split())
    return Case(
        "options", words, stage, says, options=split, handled=handled, bare=bare and not keep
    )


def config_cases():
    texts = {
        "not YAML": ("common: [", "is not valid YAML"),
        "tab": ("common:\n\tseed: 1", "is not valid YAML"),
        "list": ("- a\n- b", "must hold one section per stage"),
        "text": ("hello", "must hold one section per stage"),
        "number": ("5", "must hold one section per stage"),
        "unknown section": ("trian: {epochs: 1}", "unknown section 'trian'; did you mean train"),
        "unknown key": ("train: {epoch: 1}", "wrote"),
        "unknown own key": (
            "popularity: {sytem: a}",
            "unknown option 'sytem'.*did you mean system",
        ),
        "unknown common key": ("common: {sed: 1}", "unknown option 'sed'.*did you mean seed"),
        "section a list": ("common: [1]", "section 'common' must hold"),
        "section a number": ("popularity: 3", "section 'popularity' must hold"),
        "number of another stage": ("train: 3", "section 'train' must hold"),
        "value a dict": ("common: {seed: {a: 1}}", "option 'seed'.*must be one value"),
        "value a list": ("common: {seed: [1, 2]}", "seed.*; "),
        "value a date": ("common: {seed: 2020-01-01}", "seed.*; "),
        "value nan": ("common: {seed: .nan}", "seed.*; "),
        "value true": ("common: {seed: true}", "seed.*; "),
        "value negative": ("common: {limit: -1}", "limit.*; "),
        "value too large": (f"common: {{seed: {10**30}}}", "seed.*; "),
        "value empty": ("popularity: {system: ''}", "system.*; "),
        "value escapes": ("popularity: {system: ../x}", "system.*; "),
        "key twice": ("common: {seed: 1, seed: 2}", "'?seed'?.*(twice|already)"),
        "section twice": ("common: {seed: 1}\ncommon: {limit: 2}", "'?common'?.*(twice|already)"),
        "tag": ("common: !!python/object:os.system {a: 1}", "is not valid YAML"),
        "two documents": ("common: {seed: 1}\n---\ncommon: {seed: 2}", "is not valid YAML"),
        "base is itself": ("base: bad.yaml", "leads back to the file itself; remove it"),
        "base is missing": ("base: nowhere.yaml", "there is no config .*nowhere.yaml; "),
        "base is a folder": ("base: .", "(folder|YAML|config).*; "),
        "base a number": ("base: 5", "`base:` must be a path or a list of paths"),
        "base a list of numbers": ("base: [5]", "`base:` must be a path or a list of paths"),
        "base a dict": ("base: {a: 1}", "`base:` must be a path or a list of paths"),
        "brackets": ("[" * 5000, "is not valid YAML"),
        "aliases": (
            "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n"
            "c: &c [*b,*b,*b,*b,*b,*b,*b,*b]\ncommon: {seed: *c}",
            "unknown section 'a'",
        ),
        "key a number": ("5: {a: 1}", "unknown section 5"),
        "key null": ("~: {a: 1}", "unknown section None"),
        "key of a list": ("? [a, b]\n: 1", "is not valid YAML"),
        "option a number": ("common: {5: 1}", "unknown option 5"),
    }
    for name, (text, says) in texts.items():
        yield config_case(name, text.encode(), says, handled=says == "wrote")
    yield config_case("UTF-16", "common: {seed: 1}".encode("utf-16"), "is not valid YAML")
    yield config_case("not UTF-8", b"common: {data_dir: \xff}", "is not valid YAML")
    yield config_case("NUL", bytes(9), "is not valid YAML")
    yield config_case("HTML", HTML, "is not valid YAML|must hold one section")
    loop = config_case("base loop", b"base: a.yaml", "leads back to the file itself; remove it")
    loop.damage = lambda place: (
        (place.folder / "bad.yaml").write_text("base: a.yaml"),
        (place.folder / "a.yaml").write_text("base: bad.yaml"),
    )
    yield loop
    folder = config_case("folder", b"", "bad.yaml.*; ")
    folder.damage = lambda place: (place.folder / "bad.yaml").mkdir()
    yield folder
    missing = config_case("missing", b"", "there is no config .*bad.yaml; ")
    missing.damage = lambda place: None
    yield missing
    yield Case("config", "--config=", "popularity", "config", options=("--config=",), handled=True)


def config_case(name, content, says, handled=False):
    def damage(place):
        (place.folder / "bad.yaml").write_bytes(content)

    options = ("--config", "{folder}/bad.yaml")
    return Case("config", name, "popularity", says, damage, options, handled)


# --- C: models -----------------------------------------------------------------------------------


def model_case(model, name, damage, says, handled=False):
    stage = "summary" if model == "llava" else "preference"

    def whole(place):
        place.model(model)
        damage(place)

    options = ("--model", f"{{folder}}/{model}", "--limit", "2")
    return Case("models", f"{model}: {name}", stage, says, whole, options, handled)


def drop_first(tensors):
    del tensors[sorted(tensors)[0]]


def rename_all(tensors):
    for key in list(tensors):
        tensors[f"old.{key}"] = tensors.pop(key)


def add_one(tensors):
    tensors["more.weight"] = torch.zeros(3)


def reshape_one(tensors):
    key = sorted(tensors)[0]
    tensors[key] = torch.zeros(3, 3)


def poison(value, tensors):
    key = sorted(k for k in tensors if "layers" in k or "lora" in k)[0]
    tensors[key] = torch.full_like(tensors[key], value)


TENSOR_DAMAGES = {
    "a key missing": drop_first,
    "keys renamed": rename_all,
    "another shape": reshape_one,
    "NaN": partial(poison, NAN),
    "infinite": partial(poison, INFINITY),
    "no tensors": lambda tensors: tensors.clear(),
}
BYTE_DAMAGES = {
    "empty": b"",
    "truncated": half,
    "HTML": HTML,
    "git-lfs pointer": POINTER,
    "noise": bytes(range(256)) * 9,
    "one byte short": lambda b: b[:-1],
}


def model_cases():
    for model in ("llava", "llama"):
        cannot = rf"(/{model}|--max_new_tokens|out of memory).*; "
        for file in sorted(path.name for path in (TINY / model).iterdir()):
            path = f"{model}/{file}"
            if file == "chat_template.jinja":
                continue
            for name, content in BYTE_DAMAGES.items():
                if name == "one byte short" and not file.endswith("safetensors"):
                    continue
                damage = partial(set_bytes, path, edit=content)
                yield model_case(model, f"{file} {name}", damage, cannot)
            if file != "generation_config.json":  # may be missing
                yield model_case(model, f"{file} missing", partial(remove, path), cannot)
            yield model_case(model, f"{file} a folder", partial(make_folder, path), cannot)
            if file.endswith(".json"):
                for name, content in {"[]": b"[]", "{}": b"{}", "null": b"null", "5": b"5"}.items():
                    ok = name == "{}" and file == "generation_config.json"
                    damage = partial(set_bytes, path, edit=content)
                    says = "wrote" if ok else cannot
                    yield model_case(model, f"{file} {name}", damage, says, handled=ok)
        weights = f"{model}/model.safetensors"
        for name, edit in (TENSOR_DAMAGES | {"a key more": add_one}).items():
            yield model_case(model, f"weights {name}", partial(set_tensors, weights, edit), cannot)
        yield model_case(model, "weights as .bin only", partial(as_bin, model), cannot)
        yield model_case(model, "auto_map", partial(with_code, model), cannot)
        text = "text_config." if model == "llava" else ""
        values = {
            "model_type": (MISSING, None, "nonsense", 5, ["a"]),
            f"{text}hidden_size": (0, -1, "a", None, 64, 10**9),
            f"{text}num_hidden_layers": (0, -1, "a", None, 1, 99),
            f"{text}vocab_size": (0, -1, "a", 10),
            f"{text}num_attention_heads": (0, -1, "a", 3),
            f"{text}num_key_value_heads": (0, "a", 3),
            f"{text}head_dim": (0, "a", 7),
            f"{text}max_position_embeddings": (0, -1, "a", None),
            f"{text}rms_norm_eps": ("a",),
            f"{text}hidden_act": ("nonsense", 5),
            f"{text}rope_parameters": ("a", {"rope_type": "nonsense"}),
            f"{text}eos_token_id": ("a", [], {}),
            "dtype": ("float99", 5),
            "quantization_config": ({"quant_method": "nonsense"}, 5),
        }
        if model == "llava":
            values |= {
                "text_config": (MISSING, None, 5, {}),
                "vision_config": (MISSING, None, 5, {}),
                "vision_config.patch_size": (0, "a", 8),
                "vision_config.image_size": (0, "a", 32),
                "image_token_index": ("a", None, 9999, 5),
                "vision_feature_layer": ("a", 99),
                "vision_feature_select_strategy": ("nonsense",),
                "image_grid_pinpoints": (None, "a", [], [[0]], 5),
                "image_seq_length": ("a",),
            }
        for key, wrong in values.items():
            for value in wrong:
                damage = partial(set_json, f"{model}/config.json", key, value)
                name = f"config {key.removeprefix(text)} {shown(value)}"
                ok = name in CHANGES_NOTHING and (model, name) != ("llama", "config head_dim 0")
                yield model_case(model, name, damage, "wrote" if ok else cannot, handled=ok)
        yield from tokenizer_cases(model, cannot)
    yield from processor_cases()


# transformers replaces these by a default, or the stage has an option of its own for them.
CHANGES_NOTHING = ("config dtype 5", "config head_dim 0", "config eos_token_id []")
CHANGES_NOTHING += ('tokenizer_config tokenizer_class "nonsense"', "processor processor_class 5")
CHANGES_NOTHING += ('processor processor_class "nonsense"', "processor image_processor.size 5")
CHANGES_NOTHING += ('config quantization_config {"quant_method": "nonsense"}',)


def as_bin(model, place):
    path = place.own(f"{model}/model.safetensors")
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def with_code(model, place):
    set_json(f"{model}/config.json", "model_type", "own", place)
    set_json(f"{model}/config.json", "auto_map", {"AutoConfig": "own.Config"}, place)
    (place.folder / model / "own.py").write_text("raise SystemExit('run')\n")


def tokenizer_cases(model, cannot):
    values = {
        "model": (MISSING, None, 5, {}),
        "model.vocab": (MISSING, None, {}, {"a": "b"}, {"a": -1}),
        "model.type": ("nonsense", None),
        "added_tokens": (None, 5),
        "pre_tokenizer": ({"type": "nonsense"}, 5),
        "decoder": ({"type": "nonsense"},),
        "post_processor": ({"type": "nonsense"},),
    }
    for key, wrong in values.items():
        for value in wrong:
            damage = partial(set_json, f"{model}/tokenizer.json", key, value)
            yield model_case(model, f"tokenizer {key} {shown(value)}", damage, cannot)
    damage = partial(set_bytes, f"{model}/tokenizer.json", edit=larger_vocabulary)
    yield model_case(model, "tokenizer of another model", damage, cannot)
    values = {
        "tokenizer_class": ("nonsense", 5),
        "eos_token": (None, 5, "nonsense"),
        "pad_token": (5, "nonsense"),
    }
    for key, wrong in values.items():
        for value in wrong:
            damage = partial(set_json, f"{model}/tokenizer_config.json", key, value)
            name = f"tokenizer_config {key} {shown(value)}"
            ok = name in CHANGES_NOTHING
            yield model_case(model, name, damage, "wrote" if ok else cannot, handled=ok)
    templates = {
        "missing": None,
        "empty": "",
        "broken": "{% if",
        "unknown filter": "{{ messages | nonsense }}",
        "undefined": "{{ a.b.c }}",
        "raises": "{{ raise_exception('no') }}",
        "constant": "hello",
        "without content": "{% for m in messages %}[{{ m.role }}]{% endfor %}",
        "not UTF-8": b"\xff\xfe",
        "division by zero": "{{ 1 // 0 }}",
        "unsafe": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "HTML": HTML,
    }
    for name, text in templates.items():
        path = f"{model}/chat_template.jinja"
        content = text.encode() if isinstance(text, str) else text
        damage = partial(remove, path) if text is None else partial(set_bytes, path, edit=content)
        yield model_case(
            model, f"chat template {name}", damage, r"(chat.template|cannot answer).*; "
        )


def larger_vocabulary(content):
    whole = json.loads(content)
    vocabulary = whole["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get) if isinstance(vocabulary, dict) else []
    for number, word in enumerate(words[50:]):
        vocabulary[word] = 5000 + number
    return json.dumps(whole).encode()


def processor_cases():
    cannot = r"(/llava|processor).*; "
    values = {
        "image_processor": (MISSING, None, 5, {}),
        "image_processor.image_processor_type": ("nonsense", 5),
        "image_processor.size": (None, 5, {"shortest_edge": 0}, {"shortest_edge": "a"}, {}),
        "image_processor.image_mean": ("a", [0.5], None),
        "image_processor.image_std": ([0, 0, 0], "a"),
        "image_processor.crop_size": ({"height": 0, "width": 0}, "a"),
        "image_processor.image_grid_pinpoints": ("a", [], [[0]]),
        "image_processor.rescale_factor": ("a", NAN),
        "image_token": (None, 5, "nonsense"),
        "num_additional_image_tokens": ("a", 99, -99),
        "patch_size": (0, "a", None, 7),
        "processor_class": ("nonsense", 5),
    }
    for key, wrong in values.items():
        for value in wrong:
            damage = partial(set_json, "llava/processor_config.json", key, value)
            name = f"processor {key} {shown(value)}"
            ok = name in CHANGES_NOTHING
            yield model_case("llava", name, damage, "wrote" if ok else cannot, handled=ok)


# --- C: adapters ---------------------------------------------------------------------------------


def adapter_cases():
    weights, config = (
        "mllm_msr/adapter/adapter_model.safetensors",
        "mllm_msr/adapter/adapter_config.json",
    )
    record = "mllm_msr/adapter/run.json"

    def without_record(damage, place):
        remove(record, place)
        damage(place)

    damages = {}
    for name, content in BYTE_DAMAGES.items():
        damages[f"weights {name}"] = partial(set_bytes, weights, edit=content)
        if name != "one byte short":
            damages[f"config {name}"] = partial(set_bytes, config, edit=content)
    for name, edit in TENSOR_DAMAGES.items():
        damages[f"weights {name}"] = partial(set_tensors, weights, edit)
    damages["weights missing"], damages["config missing"] = (
        partial(remove, weights),
        partial(remove, config),
    )
    damages["weights a folder"] = partial(make_folder, weights)
    damages["config a folder"] = partial(make_folder, config)
    values = {
        "target_modules": (["q_proj"], "nothing", [], None, 5, ["nonsense"], "(", "all-linear"),
        "r": (4, 0, -1, "a", None, 10**9),
        "lora_alpha": ("a", None, NAN),
        "peft_type": ("nonsense", None, 5, "IA3"),
        "task_type": ("nonsense",),
        "base_model_name_or_path": (5, "other/model"),
        "bias": ("nonsense",),
        "modules_to_save": (["lm_head"], 5),
        "layers_to_transform": ([0], "a"),
        "use_dora": (True,),
        "rank_pattern": ({"q_proj": 4}, 5),
        "nonsense": (1,),
    }
    for key, wrong in values.items():
        for value in wrong:
            damages[f"config {key} {shown(value)}"] = partial(set_json, config, key, value)
    for name, content in {"[]": b"[]", "{}": b"{}", "null": b"null"}.items():
        damages[f"config {name}"] = partial(set_bytes, config, edit=content)
    ignored = ("config nonsense",)  # it changes nothing
    for name, damage in damages.items():
        says = "(was changed after it was written|is missing|cannot be read).*; "
        yield Case("adapters", f"{name}, with record", "score", says, damage)
        says = (
            r"(adapter.*(cannot be read|does not fit|is missing|trained on|not all finite)|"
            r"out of memory|logits).*; "
        )
        handled = name.startswith(ignored)
        foreign = partial(without_record, damage)
        yield Case(
            "adapters", name, "score", "wrote" if handled else says, foreign, handled=handled
        )
    for name in ("weights a key missing", "weights NaN", "config missing", "config r 4"):
        says = r"adapter.*(cannot be read|does not fit|is missing|not all finite).*; "
        foreign = partial(without_record, damages[name])
        yield Case("adapters", f"{name}, merged", "merge", says, foreign)
    for key in ("base", "settings", "inputs", "outputs"):
        for value in (None, 5, [], "a"):
            damage = partial(set_json, record, key, value)
            says = r"run\.json is no run record of this version.*; "
            yield Case("adapters", f"record {key} {shown(value)}", "score", says, damage)
    damage = partial(set_json, record, "base.hidden_size", 64)
    yield Case(
        "adapters", "record of another base", "score", "trained on .*hidden_size.*; pass", damage
    )
    damage = partial(set_json, record, "settings.image_tiles", "single")
    yield Case("adapters", "record of other tiles", "score", "--image_tiles single", damage)


# --- D: records ----------------------------------------------------------------------------------

RECORDS = {
    "sample": "users.run.json",
    "summary": "mllm_msr/image_summaries.run.json",
    "preference": "mllm_msr/user_preferences.run.json",
    "rows": "mllm_msr/train.run.json",
    "test_rows": "mllm_msr/test.run.json",
    "train": "mllm_msr/adapter/run.json",
    "score": "mllm_msr/sft/scores.run.json",
    "popularity": "baselines/popularity/scores.run.json",
    "metrics": "metrics.run.json",
    "report": "report.run.json",
}


def record_cases():
    for stage, record in RECORDS.items():
        options = {"summary": ("--max_new_tokens", "40")}
        options["preference"] = (*options["summary"], "--limit", "0")
        options["score"], options["report"] = ("--limit", "0"), ("--users", "12")
        words = options.get(stage, ())

        def case(name, damage, says, stage=stage, words=words, **more):
            return Case(
                "records", f"{stage}: {name}", stage, says, damage, words, keep_outputs=True, **more
            )

        broken = {
            "empty": b"",
            "truncated": half,
            "list": b"[]",
            "HTML": HTML,
            "noise": b"\xff\xfe",
        }
        no_record = (
            rf"{Path(record).name} is no run record of this version.*; delete it together with"
        )
        for name, content in broken.items():
            yield case(name, partial(set_bytes, record, edit=content), no_record)
        for key in ("settings", "inputs", "outputs", "rows", "seconds", "device"):
            for value in (MISSING, None, "a" if key != "device" else 5):
                yield case(
                    f"{key} {shown(value)}", partial(set_json, record, key, value), no_record
                )
        yield case("a folder", partial(make_folder, record), rf"{Path(record).name}.*folder.*; ")
        digest = partial(other_digest, record)
        is_named = stage == "metrics"  # its inputs have the folder's name: a copy is measured again
        says = (
            "AUC"
            if is_named
            else "was changed after it was written: .* describes another file; restore it"
        )
        yield case("another digest", digest, says, handled=is_named)
        says = "was made with other settings .*; choose another" if stage in LONG else "wrote|AUC"
        settings = partial(set_json, record, "settings.seed", 7)
        yield case("other settings", settings, says, handled=stage not in LONG)
        says = r"has no (run record|run\.json).*; move it away" if stage in LONG else "wrote|AUC"
        yield case("missing", partial(remove, record), says, handled=stage not in LONG)
    parts = "mllm_msr/image_summaries.jsonl.parts/"
    state_says = r"state\.json is damaged .*; start again with --overwrite true"
    options = ("--max_new_tokens", "40")
    for name, content in {
        "empty": b"",
        "truncated": half,
        "list": b"[]",
        "no settings": b'{"inputs": {}}',
        "settings 5": b'{"settings": 5, "inputs": {}}',
        "noise": b"\xff\xfe",
        "HTML": HTML,
    }.items():
        damage = partial(set_bytes, parts + "state.json", edit=content)
        yield Case(
            "records",
            f"state.json {name}",
            "summary",
            state_says,
            damage,
            options,
            base="interrupted",
            keep_outputs=True,
        )
    remedy = "(make the file again with|remove the line, or start with) .*--overwrite"
    in_part = rf"rank-0\.jsonl, line 3: .*(; | or ){remedy}"
    for name, text in {
        "broken": b'{"item_id": ',
        "not UTF-8": b'{"item_id": "\xff"}',
        "NUL": bytes(40),
        "no id": b'{"summary": "a"}',
        "list": b"[]",
        "id 5": b'{"item_id": 5, "summary": "a"}',
        "no summary": b'{"item_id": "i002"}',
        "summary 5": b'{"item_id": "i002", "summary": 5}',
        "unknown id": b'{"item_id": "zz", "summary": "a"}',
        "blank": b"",
    }.items():
        damage = partial(set_line, parts + "rank-0.jsonl", text=text)
        yield Case(
            "records",
            f"part {name}",
            "summary",
            in_part,
            damage,
            options,
            base="interrupted",
            keep_outputs=True,
        )
    damage = partial(make_folder, parts + "state.json")
    yield Case(
        "records",
        "state.json a folder",
        "summary",
        "state.json.*folder.*; ",
        damage,
        options,
        base="interrupted",
        keep_outputs=True,
    )
    damage = partial(remove, parts + "state.json")
    yield Case(
        "records",
        "state.json missing",
        "summary",
        "(state|parts|unknown).*; ",
        damage,
        options,
        base="interrupted",
        keep_outputs=True,
    )


LONG = (
    "summary",
    "preference",
    "train",
    "score",
)  # these do not write an output again by themselves


def other_digest(record, place):
    path = place.own(record)
    whole = json.loads(path.read_text())
    whole["outputs"] = dict.fromkeys(whole["outputs"], "0" * 64)
    path.write_text(json.dumps(whole))


TOLD = "checkpoint-4 cannot be resumed from .* and is removed"


def checkpoint_cases():
    folder = "mllm_msr/checkpoints/checkpoint-4/"

    def case(name, damage, says="wrote .*adapter", handled=True, **more):
        def whole(place):
            for path in (place.folder / "mllm_msr/adapter").iterdir():
                path.unlink()
            (place.folder / "mllm_msr/adapter").rmdir()
            best = str(place.folder / folder)  # else that of the run is loaded
            set_json(folder + "trainer_state.json", "best_model_checkpoint", best, place)
            seal_checkpoint(place.folder / folder)
            damage(place)

        return Case(
            "checkpoints", name, "train", says, whole, handled=handled, keep_outputs=True, **more
        )

    again = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors")
    for file in (*again, "trainer_state.json"):
        for name in ("empty", "truncated", "HTML"):
            yield case(f"{file} {name}", partial(set_bytes, folder + file, edit=BYTE_DAMAGES[name]))
        yield case(f"{file} missing", partial(remove, folder + file))
        yield case(f"{file} a folder", partial(make_folder, folder + file))
    for name, content in {"[]": b"[]", "{}": b"{}", "null": b"null"}.items():
        yield case(
            f"trainer_state.json {name}",
            partial(set_bytes, folder + "trainer_state.json", edit=content),
        )
    for file in again[:3]:
        damage = partial(
            set_bytes,
            folder + file,
            edit=lambda b: b[: len(b) // 2] + bytes(64) + b[len(b) // 2 + 64 :],
        )
        yield case(f"{file} damaged in the middle", damage, TOLD)
        yield case(
            f"{file} of another kind",
            partial(other_tensors, folder + file),
            TOLD,
        )
    for name, edit in TENSOR_DAMAGES.items():
        damage = partial(set_tensors, folder + "adapter_model.safetensors", edit)
        yield case(f"adapter {name}", damage, TOLD)
    damage = partial(remove, folder + "adapter_config.json")
    yield case("adapter_config.json missing", damage)
    yield case(
        "a folder of another name",
        lambda p: (p.folder / "mllm_msr/checkpoints/checkpoint-x").mkdir(),
    )
    yield case(
        "a file of this name",
        lambda p: (p.folder / "mllm_msr/checkpoints/checkpoint-9").write_text(""),
    )
    for key, value in {
        "global_step": "a",
        "epoch": None,
        "log_history": 5,
        "max_steps": -1,
    }.items():
        yield case(
            f"trainer_state {key}",
            partial(set_json, folder + "trainer_state.json", key, value),
            TOLD,
        )
    says = r"state\.json is damaged .*; start again with --overwrite true"
    state = "mllm_msr/checkpoints/state.json"
    for name, content in {"empty": b"", "list": b"[]", "noise": b"\xff"}.items():
        yield case(
            f"state.json {name}", partial(set_bytes, state, edit=content), says, handled=False
        )
    yield case(
        "state.json other settings",
        partial(set_json, state, "settings.seed", 7),
        "other settings.*; choose",
        handled=False,
    )


def other_tensors(name, place):
    torch.save({"a": torch.zeros(3)}, place.own(name))


# --- E: raw files --------------------------------------------------------------------------------


def raw_rows():
    """(user, item, timestamp) of 12 users with 6 of 9 items each."""
    return [
        (f"u{user}", f"v{(user + n) % 9}", 1600000000 + 100 * user + n)
        for user in range(12)
        for n in range(6)
    ]


def write_raw(stage, place):
    """The raw files of a loader, as they should be."""
    folder = place.folder / "raw"
    folder.mkdir()
    lines = [f"{u},{i},{t}\n" for u, i, t in raw_rows()]
    if stage == "split":
        (folder / "interactions.csv").write_text("user,item,timestamp\n" + "".join(lines))
        rows = [{"item_id": f"v{n}", "title": f"title {n}", "image": None} for n in range(9)]
        set_rows(folder / "catalogue.jsonl", rows)
    elif stage == "microlens":
        (folder / "M_pairs.csv").write_text("user,item,timestamp\n" + "".join(lines))
        titles = "".join(f"v{n},title {n}\n" for n in range(9))
        (folder / "M_titles.csv").write_text("item,title\n" + titles)
    else:
        rows = [{"user_id": u, "parent_asin": i, "timestamp": t} for u, i, t in raw_rows()]
        set_rows(folder / "Baby.jsonl", rows)
        images = [{"large": "http://127.0.0.1/a.jpg", "hi_res": None, "thumb": None}]
        pages = [{"parent_asin": f"v{n}", "title": f"t {n}", "images": images} for n in range(9)]
        set_rows(folder / "meta_Baby.jsonl", pages)


LOGS = {"split": "interactions.csv", "microlens": "M_pairs.csv", "amazon": "Baby.jsonl"}
TEXTS = {"split": "catalogue.jsonl", "microlens": "M_titles.csv", "amazon": "meta_Baby.jsonl"}


def raw_cases():
    def case(stage, name, file, damage, says, handled=False):
        def whole(place):
            write_raw(stage, place)
            damage(f"raw/{file}", place=place)

        return Case("raw", f"{file}: {name}", stage, says, whole, bare=True, handled=handled)

    for stage in LOGS:
        for file in (LOGS[stage], TEXTS[stage]):
            whole = {
                "empty": (b"", "is empty"),
                "HTML": (HTML, "is a web page"),
                "git-lfs pointer": (POINTER, "is a git-lfs pointer"),
                "bz2": (bz2.compress, r"is packed \(bzip2\)"),
                "xz": (b"\xfd7zXZ\x00" + bytes(20), r"is packed \(xz\)"),
                "zip": (b"PK\x03\x04" + bytes(20), r"is packed \(zip\)"),
                "UTF-16": (lambda b: b.decode().encode("utf-16"), "is UTF-16"),
                "NUL": (lambda b: b + bytes(9), "NUL|line"),
                "gzip truncated": (lambda b: half(gzip.compress(b)), "is truncated or damaged"),
                "gzip twice": (lambda b: gzip.compress(gzip.compress(b)), "twice"),
                "not UTF-8": (lambda b: b.replace(b"v3", b"v\xff3"), "line [0-9]+.*UTF-8"),
                "blank lines only": (b"\n\n\n", "no rows|empty|line|no product page"),
                "brackets": (b"[" * 100_000, "line 1|column|header"),
            }
            for name, (content, says) in whole.items():
                damage = partial(set_bytes, edit=content)
                yield case(stage, name, file, damage, rf"{re.escape(file)}.*({says}).*")
            says = rf"({re.escape(file)}.*missing|has no .*(_pairs|Baby)).*; "
            yield case(stage, "missing", file, remove, says)
            yield case(stage, "folder", file, make_folder, rf"{re.escape(file)}.*folder.*")
            good = {
                "gzip": gzip.compress,
                "BOM": lambda b: b"\xef\xbb\xbf" + b,
                "CRLF": lambda b: b.replace(b"\n", b"\r\n"),
                "no line break at the end": lambda b: b.rstrip(b"\n"),
                "blank line": lambda b: b.replace(b"\n", b"\n\n", 3),
            }
            for name, content in good.items():
                if name == "blank line" and file.endswith(".jsonl"):
                    continue
                yield case(
                    stage, name, file, partial(set_bytes, edit=content), "wrote", handled=True
                )
    for stage in ("split", "microlens"):
        file = LOGS[stage]
        rejected = {
            "no number": "u1,v1,abc",
            "empty time": "u1,v1,",
            "NaN": "u1,v1,nan",
            "infinite": "u1,v1,inf",
            "negative": "u1,v1,-5",
            "1e30": "u1,v1,1e30",
            "5,000 digits": f"u1,v1,{'9' * 5000}",
            "empty user": ",v1,1600000000",
            "blank user": "  ,v1,1600000000",
            "empty item": "u1,,1600000000",
            "unknown item": "u1,zz,1600000000",
            "too many fields": "u1,v1,1600000000,5",
            "too few fields": "u1,v1",
            "ISO date": "u1,v1,2020-01-01",
            "control character": "u\x01,v1,1600000000",
            "hexadecimal": "u1,v1,0x10",
            "underscores": "u1,v1,1_600_000_000",
        }
        for name, line in rejected.items():
            says = r"1 rows of the raw files were rejected.*"
            yield case(stage, name, file, partial(set_line, text=line.encode()), says, handled=True)
        errors = {
            "milliseconds in one line": (
                "u1,v1,1600000000000",
                "mixes units of time: line 2 has seconds, line 3",
            ),
            "open quote": ('u1,"v1,1600000000', "line 3: a double quote opens"),
            "quote inside": ('u1,v"1,1600000000', "wrote"),
        }
        for name, (line, says) in errors.items():
            handled = says == "wrote"
            yield case(
                stage,
                name,
                file,
                partial(set_line, text=line.encode()),
                says if handled else rf"{file}.*{says}",
                handled=handled,
            )
        headers = {
            "column twice": (b"user,user,timestamp", "user.*2 times"),
            "column missing": (b"user,item", "timestamp"),
            "no header": (b"u9,v1,1600000000", "user|header"),
            "semicolons": (b"user;item;timestamp", "user|column"),
            "empty header": (b",,", "column|header"),
            "open quote": (b'"user,item,timestamp', "quote|line 1"),
        }
        for name, (line, says) in headers.items():
            yield case(
                stage,
                f"header {name}",
                file,
                partial(set_line, text=line, line=1),
                rf"{file}.*({says}).*",
            )
        all_iso = partial(set_bytes, edit=lambda b: b.replace(b",1600", b",2020-01-01T"))
        yield case(
            stage,
            "all times ISO",
            file,
            all_iso,
            rf"{file}, line 2: .*give seconds or milliseconds",
        )
        header_only = partial(set_bytes, edit=b"user,item,timestamp\n")
        yield case(stage, "header only", file, header_only, rf"{file} has no rows; ")
        none_known = partial(set_bytes, edit=lambda b: b.replace(b",v", b",w"))
        yield case(
            stage,
            "no item known",
            file,
            none_known,
            rf"{file}, line 2: the item .*; none of the 72 rows",
        )
        again = partial(set_bytes, edit=lambda b: b + b)
        yield case(
            stage,
            "header twice",
            file,
            again,
            "1 rows of the raw files were rejected",
            handled=True,
        )
    titles = {
        "title twice": ("v1,again", "the item has a title already"),
        "title empty": ("v2,", "the title is empty"),
        "id empty": (",title", "item is empty"),
        "too many fields": ("v1,a,b", "3 fields instead of 2"),
    }
    for name, (line, says) in titles.items():
        yield case(
            "microlens",
            name,
            "M_titles.csv",
            partial(set_line, text=line.encode(), line=4),
            says,
            handled=True,
        )
    damage = partial(set_line, text=b'v2,"title', line=4)
    yield case(
        "microlens",
        "open quote",
        "M_titles.csv",
        damage,
        r"M_titles\.csv, line 4: a double quote opens",
    )
    damage = partial(set_bytes, edit=b"item,title\n")
    yield case("microlens", "header only", "M_titles.csv", damage, r"M_titles\.csv has no rows")
    catalogue = {
        "item_id": (MISSING, None, 5, [], "", True),
        "title": (MISSING, None, 5, [], True),
        "image": (5, [], True),
    }
    for key, values in catalogue.items():
        for value in values:
            handled = value == "" and key == "item_id"
            says = "item_id is empty" if handled else rf"catalogue\.jsonl, line 3: .*{key}.*"
            damage = partial(set_raw_key, key, value)
            yield case("split", f"{key} {shown(value)}", "catalogue.jsonl", damage, says, handled)
    damage = partial(set_line, text=lambda b: b.replace(b"v2", b"v1"))
    yield case(
        "split",
        "item twice",
        "catalogue.jsonl",
        damage,
        r"catalogue\.jsonl, line 3: .*already in line 2; remove",
    )
    reviews = {
        "timestamp": (MISSING, None, "a", 0.5, [], -5, 10**30, True),
        "user_id": (MISSING, None, 5, [], "", True),
        "parent_asin": (MISSING, None, 5, [], "", "zz"),
    }
    for key, values in reviews.items():
        for value in values:
            handled = value is MISSING or value is None or value in ("", "zz", -5)
            says = (
                "1 rows of the raw files were rejected"
                if handled
                else rf"Baby\.jsonl, line 3: .*{key}.*"
            )
            damage = partial(set_raw_key, key, value)
            yield case("amazon", f"{key} {shown(value)}", "Baby.jsonl", damage, says, handled)
    pages = {
        "parent_asin": (MISSING, None, 5, ""),
        "title": (MISSING, None, 5, [], "", "<br>"),
        "images": (5, "a", [5], {"large": "a"}, [{"large": 5}]),
    }
    for key, values in pages.items():
        for value in values:
            handled = value is MISSING or value is None or value in ("", "<br>")
            says = (
                "rows of the raw files were rejected"
                if handled
                else rf"meta_Baby\.jsonl, line 3: .*{key}.*"
            )
            damage = partial(set_raw_key, key, value)
            yield case("amazon", f"{key} {shown(value)}", "meta_Baby.jsonl", damage, says, handled)
    for file in ("Baby.jsonl", "meta_Baby.jsonl"):
        damage = partial(set_line, text=b'{"parent_asin": ')
        yield case("amazon", "broken JSON", file, damage, rf"{file}, line 3: .*JSON")
        for text in (b"null", b"[]", b"5"):
            yield case(
                "amazon",
                f"line {text.decode()}",
                file,
                partial(set_line, text=text),
                rf"{file}, line 3: ",
            )
        damage = partial(set_line, text=lambda b: b[:-1] + b', "more": "\\ud83d x"}')
        yield case("amazon", "half a surrogate", file, damage, "wrote", handled=True)
    yield from url_cases()


def set_raw_key(key, value, name, place):
    set_key(name, key, value, place)


def url_cases():
    urls = (
        None,
        5,
        [],
        {},
        "",
        "ftp://a/b.jpg",
        "http://[::1",
        "http://",
        "http://ü\ud83d/a",
        "file:///etc/passwd",
    )
    urls += (
        "http://127.0.0.1:1/a.jpg",
        "http://[::1]/a.jpg",
        "http://0x7f000001/a.jpg",
        "//a/b.jpg",
    )
    urls += (
        "http://a b/c",
        "http://" + "a" * 300 + ".com/",
        "http://127.0.0.1:99999/a",
        "javascript:1",
    )
    for url in urls:
        row = {"item_id": "v1", "url": url}
        damage = partial(set_bytes, "image_urls.jsonl", edit=json.dumps(row).encode() + b"\n")
        yield Case(
            "raw", f"url {shown(url)}", "download", '"reason": "', damage, bare=True, handled=True
        )
    for item_id in ("../../a", "/etc/a", ".", "..", ".a", "a/b", "", 5, None):
        row = {"item_id": item_id, "url": "http://127.0.0.1/a.jpg"}
        damage = partial(set_bytes, "image_urls.jsonl", edit=json.dumps(row).encode() + b"\n")
        says = r"image_urls\.jsonl.*item.?id.*; "
        yield Case("raw", f"item id {shown(item_id)}", "download", says, damage, bare=True)


# --- F: shell scripts ----------------------------------------------------------------------------


def shell_cases():
    def case(words, says, handled=False, damage=lambda place: None, **environment):
        return Case(
            "shell",
            words,
            "shell",
            says,
            damage,
            tuple(words.split()),
            handled,
            environment,
            bare=True,
        )

    scripts = ("01_prepare_data", "02_image_summary", "03_preference", "04_datasets", "05_train")
    scripts += ("06_score", "07_report", "merge_adapter")
    for script in scripts:
        path = f"scripts/{script}.sh configs/sample.yaml"
        yield case(f"{path} --config configs/sample.yaml", "two configs are named, .*; name one")
        yield case(f"scripts/{script}.sh --config", "--config needs a value")
        yield case(f"scripts/{script}.sh nowhere.yaml", "there is no config nowhere.yaml; ")
    for script in scripts[:1] + scripts[3:7]:
        for option in ("--output_dir", "--data_dir", "--seed"):
            says = f"{option} needs a value|{option}: expected one argument; "
            yield case(f"scripts/{script}.sh configs/sample.yaml {option}", says)
    yield case("scripts/06_score.sh --config a --config b", "two configs are named, .*; name one")
    yield case(
        "scripts/06_score.sh configs/sample.yaml --config=a", "two configs are named, .*; name one"
    )
    yield case(
        "scripts/07_report.sh configs/sample.yaml --output_dir --seed 1",
        "--output_dir needs a value",
    )
    yield case(
        "scripts/04_datasets.sh configs/sample.yaml --nonsense 1", "unknown option '--nonsense'"
    )
    yield case("scripts/estimate.sh nowhere.yaml", "there is no config nowhere.yaml; ")
    says = "a file is where a folder belongs"
    yield case("scripts/dress_rehearsal.sh --folder README.md", says)

    def elsewhere(place, **config):
        common = {"data_dir": f"{place.folder}", "output_dir": f"{place.folder}"} | config
        text = yaml.safe_dump({"base": str(ROOT / "configs/sample.yaml"), "common": common})
        (place.folder / "a.yaml").write_text(text)

    words = "scripts/estimate.sh {folder}/a.yaml"
    says = f"items.jsonl is missing; {PREPARE} makes it"
    yield case(words, says, damage=partial(elsewhere, data_dir="/nowhere"))
    for name in ("nonsense", "tools", "", "../common"):
        says = f"there is no benchmark '.*{name[3:]}.*'; choose one of"
        yield case(f"scripts/benchmark.sh {name}", says)
    says = "ACCELERATE asks for 2 processes and accelerate started 1; add --multi_gpu"
    words = (
        "scripts/02_image_summary.sh configs/sample.yaml --data_dir {folder} --output_dir {folder}"
    )
    yield case(words, says, ACCELERATE="--cpu --num_processes 2")
    texts = {
        "in quotes": ('dataset: "sample"', "wrote", True),
        "in single quotes": ("dataset: 'sample'  # quoted", "wrote", True),
        "missing": (
            "common: {seed: 1}",
            "the line 'dataset: NAME' of .* is missing.*sample",
            False,
        ),
        "unknown": ("dataset: nonsense", "names no loader", False),
        "a path": ("dataset: ../Inference/image_summary", "names no loader", False),
        "a list": ("dataset: [sample]", "names no loader; choose one of", False),
        "not a loader": ("dataset: download_images", "names no loader; choose one of", False),
        "null": ("dataset:", "is missing", False),
    }
    for name, (text, says, handled) in texts.items():

        def damage(place, text=text):
            (place.folder / "a.yaml").write_text(
                f"{text}\ncommon: {{data_dir: {place.folder}, output_dir: {place.folder}}}\n"
                if "common" not in text
                else text
            )

        words = "scripts/01_prepare_data.sh {folder}/a.yaml"
        new = case(words, says, handled, damage)
        new.name = f"dataset {name}"
        if handled:
            new.options += ("--n_users", "60", "--n_items", "60", "--user_core", "2")
        yield new


def all_cases():
    """Every case."""
    makers = (key_cases, file_cases, meaning_cases, image_cases, option_cases, config_cases)
    makers += (model_cases, adapter_cases, record_cases, checkpoint_cases, raw_cases, shell_cases)
    return [case for maker in makers for case in maker()]
