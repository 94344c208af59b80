"""X.run.json beside an output X: what was asked, from which inputs, by which code, on what, how long, how many rows."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from data_processing.errors import InputError
from data_processing.jsonl import write_json

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "bitsandbytes", "pandas", "numpy",
            "scikit-learn", "pillow")  # fmt: skip
HASH_LIMIT = 1 << 30  # bytes; of a larger file only parts are read
# Options that say where and how much, not what: another value of these is no other result.
WHERE_OPTIONS = {"data_dir", "output_dir", "raw_dir", "limit", "overwrite"}


def record_path(output):
    """outputs/x/scores.jsonl -> outputs/x/scores.run.json; a folder adapter/ -> adapter/run.json."""
    output = Path(output)
    return output / "run.json" if output.suffix == "" else output.with_suffix(".run.json")


def settings_of(args, ignore=(), **more):
    """The options that decide what comes out, as a JSON-able dict: `args` less `ignore`, plus e.g. prompt texts."""
    left_out = WHERE_OPTIONS | set(ignore)
    return json.loads(json.dumps({k: v for k, v in asdict(args).items() if k not in left_out} | more))


def digests(*paths):
    """dict name -> digest of the files a stage reads; a model folder counts with its config and weights.

    A model that is named but not a local folder (a hub id) is left to the settings.
    """
    found = {}
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted([*path.glob("*.safetensors"), *path.glob("*.json")]):
                if file.name != "run.json":
                    found[f"{path.name}/{file.name}"] = _digest(file)
        elif path.exists():
            found[path.name] = _digest(path)
    return found


def named_digests(paths):
    """dict name -> digest, for files whose own names do not tell them apart. paths: dict name -> path."""
    return {name: _digest(Path(path)) for name, path in paths.items()}


def read_record(output):
    """The run record beside `output`, or None where there is none."""
    path = record_path(output)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path} is not valid JSON; delete it together with {output} and run the stage again") from None


def is_up_to_date(outputs, settings, inputs, overwrite=False):
    """True if all `outputs` are there, the first one's record tells of the same settings and inputs, and not `overwrite`.

    For stages that are cheap: they simply run again when this is False.
    """
    record = read_record(outputs[0])
    same = record is not None and record["settings"] == settings and record["inputs"] == inputs
    return not overwrite and same and all(Path(path).exists() for path in outputs)


def first_difference(old, new):
    """One readable difference between two flat dicts, or None: «temperature was 0.6, is 0.0»."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}"
    return None


def read_state(path):
    """Settings and inputs of a job under way, as they were written into `path`, or None."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def check_same_job(output, earlier, settings, inputs, was, old):
    """Raises InputError if one of the `earlier` records or states (None: there is none) tells of another job.

    was, old: for the message, how `output` came to be and what --overwrite would throw away.
    """
    for record in filter(None, earlier):
        for what, new in (("settings", settings), ("inputs", inputs)):
            difference = first_difference(record[what], new)
            if difference:
                raise InputError(
                    f"{output} was {was} with other {what} ({difference}); choose another --output_dir, or throw {old} away "
                    "with --overwrite true"
                )


def world_size():
    """Number of processes that share the work, as `accelerate launch` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def write_record(output, args, settings, inputs, seconds, rows, **more):
    """Writes the run record of `output`.

    seconds: wall time of the work, imports left out; rows: dict of counts, e.g. in / out / rejected.
    """
    record = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "arguments": asdict(args),
        "config": getattr(args, "config", None),
        "settings": settings,
        "inputs": inputs,
        "rows": rows,
        "seconds": round(seconds, 2),
        **more,
        **machine(),
        "processes": world_size(),
    }
    write_json(record_path(output), record)


def machine():
    """dict of what a figure depends on beside the code's options: commit, versions, platform, device; and the date."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "device": _device(),
    }


def _digest(path):
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= HASH_LIMIT:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for place in range(0, size, size // 64):  # a part of each 64th; all of 15 GB would take a minute at every start
            file.seek(place)
            digest.update(file.read(1 << 20))
        return digest.hexdigest()


def _short(value):
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def _git_commit():
    """Commit of this checkout, with + behind it where files were changed since; None outside a checkout."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _versions():
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _device():
    """Name of the accelerator in use, else the processor's; torch is asked only where a stage has imported it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU, {os.cpu_count()} cores"
