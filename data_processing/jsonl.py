"""Reading and writing the JSONL files that the stages hand each other, and the list of these files.

A line is complete or absent; a file that a stage has finished is replaced as a whole. Ids are strings everywhere.
"""

import json
import os
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from data_processing.errors import InputError

# file -> (keys that every line has, which script makes it)
CONTRACT = {
    "items.jsonl": (("item_id", "title", "image"), "scripts/01_prepare_data.sh"),
    "users.jsonl": (("user_id", "history", "target", "negatives", "split", "fold"), "scripts/01_prepare_data.sh"),
    "image_summaries.jsonl": (("item_id", "summary"), "scripts/02_image_summary.sh"),
    "user_preferences.jsonl": (("user_id", "preference", "blocks"), "scripts/03_preference.sh"),
    "train.jsonl": (("user_id", "item_id", "label", "images", "messages"), "scripts/04_datasets.sh"),
    "validation.jsonl": (("user_id", "item_id", "label", "images", "messages"), "scripts/04_datasets.sh"),
    "test.jsonl": (("user_id", "item_id", "label", "images", "messages"), "scripts/04_datasets.sh"),
    "scores.jsonl": (("user_id", "item_id", "label", "yes_logit", "no_logit", "score"), "scripts/06_score.sh"),
}
_ENCODER = json.JSONEncoder(ensure_ascii=False)
ID_KEYS = ("item_id", "user_id", "target")


def require(path, maker=None):
    """`path` as a Path. Raises InputError naming the script that makes it if it is not there."""
    path = Path(path)
    if not path.exists():
        maker = maker or CONTRACT.get(path.name, (None, None))[1]
        raise InputError(f"{path} is missing" + (f"; {maker} makes it" if maker else ""))
    return path


def read_lines(path, keys=None):
    """Yields (line number, dict) for each line of a JSONL file.

    keys: those that every line must have; default: as `CONTRACT` says for a file of this name. Raises InputError with
    file, line and remedy for a missing file, broken JSON, an undecodable byte, a missing key or an id that is no string.
    """
    path = require(path)
    maker = CONTRACT.get(path.name, (None, "the script that wrote it"))[1]
    keys = CONTRACT.get(path.name, ((), None))[0] if keys is None else keys
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8 or make it again with {maker}"
                ) from None
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not valid JSON ({error.msg}); delete the file and make it again with {maker}") from None
            if not isinstance(row, dict):
                raise InputError(f'{where}: a line must hold one object like {{"{(list(keys) or ["id"])[0]}": …}}')
            for key in keys:
                if key not in row:
                    raise InputError(f"{where}: key {key!r} is missing; make the file again with {maker}")
                if key in ID_KEYS and not isinstance(row[key], str):
                    raise InputError(f"{where}: {key} must be a string, not {row[key]!r}; write it in quotes")
            yield number, row


def read_rows(path, keys=None):
    """All lines of a JSONL file as dicts, checked as in `read_lines`."""
    return [row for _, row in read_lines(path, keys)]


def read_by_id(path, key, keys=None):
    """A JSONL file as dict id -> row, checked as in `read_lines`. Raises InputError if an id stands there twice."""
    rows, lines = {}, {}
    for number, row in read_lines(path, keys):
        if row[key] in rows:
            raise InputError(f"{path}, line {number}: {key} {row[key]!r} stood already in line {lines[row[key]]}; remove one of the two")
        rows[row[key]], lines[row[key]] = row, number
    return rows


def dump(row):
    """One row as one line of bytes, with its line break. Text stays readable in any language."""
    try:
        return _ENCODER.encode(row).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, as broken scrapers leave them: kept as an escape
        return json.dumps(row).encode() + b"\n"


def write_rows(path, rows):
    """Writes a JSONL file whole or not at all."""
    with whole_file(path) as file:
        for row in rows:
            file.write(dump(row))


def write_rejected(path, rows):
    """Writes the rows that were refused, if any; else removes those of an earlier run."""
    if rows:
        write_rows(path, rows)
    else:
        Path(path).unlink(missing_ok=True)


def write_json(path, value):
    """Writes one indented JSON document whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


@contextmanager
def whole_file(path):
    """A binary file to write to, which takes the place of `path` only when everything has been written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def relative_path(target, of_file):
    """`target` as it is written into the JSONL file `of_file`: relative to that file's folder, with forward slashes."""
    folder, name = os.path.split(target)
    return _relative_folder(os.path.abspath(folder), os.path.dirname(os.path.abspath(of_file))) + name


@cache  # thousands of images lie in one folder
def _relative_folder(folder, start):
    relative = Path(os.path.relpath(folder, start)).as_posix()
    return "" if relative == "." else relative + "/"


def _umask():
    current = os.umask(0)
    os.umask(current)
    return current
