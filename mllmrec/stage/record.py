"""X.run.json beside an output X: options, input digests, code, machine, seconds and counts.

A `Job` says what decides the content of an output; `mllmrec/stage/output.py` compares the job of
today with the record of the output that is there.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, write_json
from mllmrec.stage.options import CommonOptions
from mllmrec.stage.provenance import file_digest, short_digest

logger = logging.getLogger(__name__)

PACKAGES = ["torch", "transformers", "tokenizers", "peft", "accelerate", "datasets"]
PACKAGES += ["bitsandbytes", "pandas", "numpy", "scikit-learn", "pillow"]
# Options that say where and how much, not what: another value of these gives the same rows.
LOCATION_OPTIONS = {"config", "data_dir", "output_dir", "raw_dir", "image_roots", "system"}
LOCATION_OPTIONS |= {"limit", "overwrite"}
Digests = dict[str, str]


@dataclass(frozen=True)
class Job:
    """What a stage is asked to write.

    options: of the stage, for the record; settings: those that decide the content; inputs: digests
    of what is read, except where each line has a `source`; limit: number of rows that are wanted,
    0 = all; stage: its name, since an output of another stage is never replaced; wanted: ids of the
    rows that are wanted, None: the first `limit`.
    """

    options: CommonOptions
    settings: dict[str, Any]
    inputs: Digests
    limit: int = 0
    stage: str = ""
    wanted: Container[Any] | None = None

    @classmethod
    def of(
        cls,
        options: CommonOptions,
        inputs: Digests,
        ignore: Iterable[str] = (),
        stage: str = "",
        **more: Any,
    ) -> "Job":
        """ignore: options that change speed, not content; more: what else decides the content."""
        left_out = LOCATION_OPTIONS | set(ignore)
        chosen = {k: v for k, v in asdict(options).items() if k not in left_out}
        return cls(options, json.loads(json.dumps(chosen | more)), inputs, options.limit, stage)

    @cached_property
    def _settings_digest(self) -> str:
        return short_digest([self.stage, self.settings, self.inputs])

    def source(self, *inputs: Any, batch: Any = None) -> str:
        """The key `source` of a line that is made from these inputs.

        batch: of what else is computed with the line, where its content depends on that; it counts
        as a setting.
        """
        own = self._settings_digest
        return (own if batch is None else short_digest([own, batch])) + short_digest(inputs)

    def difference(self, earlier: Mapping[str, Any]) -> str | None:
        """How this job differs from that of a record or state, None: not at all.

        "settings (temperature was 0.6, is 0.0)".
        """
        inputs = earlier["inputs"]
        if not any(name.endswith(".jsonl") for name in self.inputs):
            # Older records name such files; now each line has a `source`.
            inputs = {k: v for k, v in inputs.items() if not k.endswith(".jsonl")}
        pairs = {"settings": (earlier["settings"], self.settings), "inputs": (inputs, self.inputs)}
        for what, (old, new) in pairs.items():
            difference = first_difference(old, new)
            if difference:
                return f"{what} ({difference})"
        return None


def record_path(output: PathLike) -> Path:
    """x/scores.jsonl -> x/scores.run.json; a folder adapter/ -> adapter/run.json."""
    output = Path(output)
    is_folder = output.is_dir() or output.suffix == ""
    return output / "run.json" if is_folder else output.with_suffix(".run.json")


def file_digests(*paths: PathLike) -> Digests:
    """dict name -> digest of the files that a stage reads.

    Of a model folder: its config and weights. A model that is no folder (a hub id) is left to the
    settings.
    """
    digests = {}
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted([*path.glob("*.safetensors"), *path.glob("*.json")]):
                if file.name != "run.json":
                    digests[f"{path.name}/{file.name}"] = file_digest(file)
        elif path.exists():
            digests[path.name] = file_digest(path)
    return digests


def named_digests(paths: Mapping[str, PathLike]) -> Digests:
    """dict name -> digest, for files whose own names do not distinguish them."""
    return {name: file_digest(Path(path)) for name, path in paths.items()}


def read_record(output: PathLike) -> dict[str, Any] | None:
    """The run record beside `output`, or None. Raises InputError if the file is no run record."""
    names = ("settings", "inputs", "outputs", "rows")
    remedy = f"delete it together with {output} and run the stage again"
    return _read(record_path(output), names, remedy)


def read_state(path: Path) -> dict[str, Any] | None:
    """The job of unfinished work, or None. Raises InputError if the file is damaged."""
    return _read(path, ("settings", "inputs"), "start again with --overwrite true")


def _read(path: Path, names: Sequence[str], remedy: str) -> dict[str, Any] | None:
    """A JSON object with these objects in it, None where there is no file."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        found = None
    for name in names:
        if not isinstance(found, dict) or not isinstance(found.get(name), dict):
            raise InputError(f"{path} is damaged, or of another version: no {name!r}; {remedy}")
    return found


def output_digests(output: PathLike, outputs: Iterable[PathLike]) -> Digests:
    """dict path relative to the record of `output` -> digest, of all files that it describes."""
    folder = record_path(output).parent
    digests = {}
    for path in map(Path, outputs):
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for file in files:
            is_text = file.suffix == ".md" and path.is_dir()  # a model card, which people edit
            if file.exists() and file != record_path(output) and not is_text:
                digests[Path(os.path.relpath(file, folder)).as_posix()] = file_digest(file)
    return digests


def check_described(output: PathLike, record: Mapping[str, Any]) -> None:
    """Raise InputError if a file that the record describes is missing or was changed."""
    folder = record_path(output).parent
    for name, digest in record["outputs"].items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            what = "was changed after it was written" if path.is_file() else "is missing"
            raise InputError(
                f"{path} {what}: {record_path(output)} describes another file; restore it, choose "
                "another --output_dir, or write it again with --overwrite true"
            )


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """One readable difference between two flat dicts, or None: "temperature was 0.6, is 0.0"."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} was {_shortened(old.get(key))}, is {_shortened(new.get(key))}"
    return None


def world_size() -> int:
    """Number of processes that share the work, as `accelerate launch` sets it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Number of this process among them."""
    return int(os.environ.get("RANK", "0"))


def write_record(
    output: PathLike,
    job: Job,
    seconds: float,
    rows: Mapping[str, int],
    outputs: Iterable[PathLike] = (),
    **more: Any,
) -> dict[str, Any]:
    """Write the run record of `output`, after all that it describes, and return it.

    seconds: wall time of the work, imports excluded; rows: counts, e.g. in / out / rejected;
    outputs: the files that it describes, those that exist; default: `output`.
    """
    record = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "arguments": asdict(job.options),
        "config": job.options.config,
        "stage": job.stage,
        "settings": job.settings,
        "inputs": job.inputs,
        "outputs": output_digests(output, outputs or [output]),
        "rows": dict(rows),
        "seconds": round(seconds, 2),
        **more,
        **machine(),
        "processes": world_size(),
    }
    write_json(record_path(output), record)
    return record


def machine() -> dict[str, Any]:
    """What a figure depends on besides the options: date, commit, versions, platform, device."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "device": _device(),
    }


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


@cache
def _git_commit() -> str | None:
    """Commit of this checkout when first asked for, + if files were changed; None outside one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _device() -> str:
    """The accelerator, else the processor; torch is asked only where a stage imported it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU, {os.cpu_count()} cores"
