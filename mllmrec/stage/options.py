"""Options of a stage: a flat dataclass, a YAML file with one section per stage, the command line.

Order: default in the dataclass < section `common` < the stage's own section < command line.
pydantic checks types, choices and ranges, whichever source a value comes from.

    SECTION = "train"

    @dataclass                      # pydantic.dataclasses.dataclass
    class Options(CommonOptions):
        epochs: int = option(10, "epochs over train.jsonl (paper: 10)", ge=1)

    options = parse_options(Options, SECTION, argv, __doc__)

A config may build on others: `base: systems/mllm_msr.yaml` (or a list), relative to the file; its
own values win.
"""

import argparse
import difflib
import importlib.metadata
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mllmrec.stage.errors import InputError, UsageError

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = "configs/microlens.yaml"
CONFIG_VARIABLE = "MLLM_MSR_CONFIG"  # environment variable: another default for --config
ROOT = Path(__file__).parents[2]
# Sections of a config: `common`, and the SECTION of each stage script.
SECTIONS = (
    *("common", "data", "download", "image_summary", "preference", "datasets", "train", "merge"),
    *("score", "popularity", "title_history", "gru4rec", "sasrec", "metrics", "report"),
    *("retriever", "ranker", "fusion", "external", "export"),
)
NOT_SECTIONS = ("dataset", "base")  # top-level keys that are no sections
MOST_BASES = 10  # configs that build on each other
# Options that the next script must get, too, besides --config.
REPEATED = ("data_dir", "output_dir", "system")
PART = "MLLM_MSR_PART"  # environment variable: this script is not the last of its stage

NAME = r"^[\w-]+$"  # of a folder below output_dir: no path can leave it

LARGEST = 2**31 - 1  # of a whole number; libraries take it as 32 bit

T = TypeVar("T", bound="CommonOptions")


def option(default: Any, text: str, **limits: Any) -> Any:
    """A field of an options class: its default, its help text, pydantic limits such as `ge=1`.

    Every whole number has an upper limit and no number is infinite or NaN, whatever the field says.
    """
    if isinstance(default, int) and not isinstance(default, bool) and "lt" not in limits:
        limits.setdefault("le", LARGEST)
    if isinstance(default, float):
        limits["allow_inf_nan"] = False
    if isinstance(default, list):
        return Field(default_factory=lambda: list(default), description=text, **limits)
    return Field(default=default, description=text, **limits)


@dataclass
class CommonOptions:
    """Options of every stage. The options class of a stage adds its own."""

    config: str = option("", f"YAML file (default: ${CONFIG_VARIABLE}, else {DEFAULT_CONFIG})")
    data_dir: str = option("data/microlens", "folder of items.jsonl and users.jsonl", min_length=1)
    output_dir: str = option(
        "outputs/microlens", "folder of outputs, one subfolder per system", min_length=1
    )
    system: str = option(
        "mllm_msr", "subfolder of output_dir for the outputs of this system", pattern=NAME
    )
    image_roots: list[str] = option(
        ["data/raw"], "folders that images may lie in, besides data_dir; links are resolved"
    )
    domain: Literal["video", "movie", "product"] = option("video", "wording of the prompts")
    with_images: bool = option(
        True, "false: no stage uses an image; stage 2 has nothing to do, prompts speak of none"
    )
    seed: int = option(42, "seed of every random generator (released code: 42)", ge=0)
    limit: int = option(
        0,
        "only the first N items (stage 2) or users of each split (all others; stage 1: N users of "
        "all splits), 0 = all; a later run without it resumes, but for training, which needs "
        "--overwrite then",
        ge=0,
    )
    overwrite: bool = option(False, "delete what an earlier run with other settings wrote")

    words: ClassVar[Sequence[str]] = ()  # of the command line that the options are from

    @property
    def system_dir(self) -> Path:
        """Folder of this system's outputs: {output_dir}/{system}."""
        return Path(self.output_dir) / self.system


DATASETS = Literal["beauty", "toys", "games", "ml-100k", "sample"]
DATASET_HELP = (
    "data set, which chooses the role; without --config its config is "
    "configs/mllm4rec/{dataset_code}.yaml; default: what the config is called"
)


@dataclass
class DatasetCode:
    """Option of the MLLM4Rec scripts, as in their published commands."""

    dataset_code: Literal[DATASETS, ""] = option("", DATASET_HELP)


def parse_options(
    options_class: type[T],
    section: str,
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> T:
    """Options of one stage, checked.

    argv: command-line words, default sys.argv[1:]; description: the docstring that --help prints.
    Raises InputError for an unreadable config, an unknown key in it, or a value of the wrong type
    or outside its range; UsageError where the command line is at fault.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    check_processes()
    parser = _parser(options_class, description)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        sys.exit(0)
    if "--version" in argv:
        print(f"mllmrec {importlib.metadata.version('mllmrec')}")
        sys.exit(0)
    try:
        parsed, unknown = parser.parse_known_args(argv)
    except (argparse.ArgumentError, SystemExit) as error:
        raise UsageError(f"{error}; --help lists all options") from None
    known = [field.name for field in fields(options_class)]
    if unknown:
        word = unknown[0].lstrip("-").split("=")[0]
        raise UsageError(f"unknown option {unknown[0]!r}{nearest(word, known, '--')}")
    given = vars(parsed)
    given["config"] = given.get("config") or _default_config(given, known)
    from_config = _section_values(Path(given["config"]), section, known)
    if "dataset_code" in known and "dataset_code" not in from_config | given:
        name = Path(given["config"]).stem
        given["dataset_code"] = name if name in get_args(DATASETS) else ""
    try:
        options: T = TypeAdapter(options_class).validate_python(from_config | given)
    except ValidationError as error:
        message = _message(error, given, section)
        raise (UsageError if message.startswith("--") else InputError)(message) from None
    vars(options)["words"] = argv
    return options


def config_of_dataset(argv: Sequence[str], description: str | None) -> tuple[str, list[str]]:
    """(config, the other words) of a command line with --dataset_code or --config.

    For scripts that run another one. Raises InputError for an unknown data set.
    """
    parser = _empty_parser(description)
    parser.add_argument("--dataset_code", choices=get_args(DATASETS), help=DATASET_HELP)
    parser.add_argument("--config", help="YAML file, instead of the data set's")
    try:
        given, others = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; --help lists all options") from None
    values = {name: value for name, value in vars(given).items() if value}
    return values.get("config") or _default_config(values, ["dataset_code"]), others


def _default_config(given: dict[str, Any], known: list[str]) -> str:
    """Where the options of the command line name no config."""
    if "dataset_code" in known:
        code = given.get("dataset_code") or "ml-100k"
        return f"configs/mllm4rec/{code}.yaml"
    return os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG


def check_processes() -> None:
    """Raise InputError if a shell script asked for another number of processes than were started.

    `accelerate launch --cpu --num_processes 2` starts one, without a word. Nor may WORLD_SIZE and
    RANK be anything but numbers.
    """
    asked, started = os.environ.get("MLLM_MSR_PROCESSES", ""), os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0")
    if not (started.isdecimal() and rank.isdecimal() and int(rank) < int(started)):
        raise InputError(
            f"the environment variables WORLD_SIZE={started} and RANK={rank} are no number of "
            "processes and the number of one of them; unset both, or start with accelerate launch"
        )
    if asked and asked != started:
        raise InputError(
            f"ACCELERATE asks for {asked} processes and accelerate started {started}; add "
            "--multi_gpu, or a --config_file of configs/accelerate/"
        )


def print_options(options: CommonOptions, title: str) -> None:
    """Say on stderr the stage's title, the options given, and the config's that are no defaults."""
    given = {word[2:].split("=")[0] for word in options.words if word.startswith("--")}
    default = asdict(type(options)())
    listed = " ".join(
        f"{name}={_shortened(value)}"
        for name, value in asdict(options).items()
        if (name in given or value != default[name]) and name != "config"
    )
    logger.info(f"{title} (config {options.config}{'; ' if listed else ''}{listed})")


def print_next(script: str, config: str, words: Sequence[str], more: Sequence[str] = ()) -> None:
    """Say on stderr which script follows, once for a stage.

    words: of this script's command line; the next one needs some of them, too; more: further words
    for it. In a part of a stage (scripts/common.sh) and in all processes but the first nothing is
    said.
    """
    if os.environ.get(PART) or os.environ.get("RANK", "0") != "0":
        return
    parser = _empty_parser(None)
    for name in REPEATED:
        parser.add_argument(f"--{name}")
    given = vars(parser.parse_known_args(words)[0])
    if script.endswith(".sh"):
        command = ["bash", script, config]
    else:
        own = Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()
        command = [".venv/bin/python" if own else "python", script, "--config", config]
    command += [w for name, value in given.items() if value for w in (f"--{name}", value)]
    command += more
    logger.info(f"next: {shlex.join(command)}")


def load_config(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config and what it builds on, as one dict of sections.

    Raises InputError if a file cannot be read, or has a section that no stage has.
    """
    if len(_seen) == MOST_BASES:
        raise InputError(
            f"{_seen[0]}: `base:` leads through more than {MOST_BASES} configs; let it name the "
            "last ones itself"
        )
    own = _read_yaml(path)
    given = own.pop("base", None) or []
    bases = [given] if isinstance(given, str) else given
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"{path}: `base:` must be a path or a list of paths, not {given!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        base_path = path.parent / base
        if base_path.resolve() in [seen.resolve() for seen in (*_seen, path)]:
            raise InputError(f"{path}: `base: {base}` leads back to the file itself; remove it")
        _merge(merged, load_config(base_path, (*_seen, path)))
    _merge(merged, own)
    return merged


def nearest(word: str, known: list[str] | tuple[str, ...], prefix: str = "") -> str:
    """The end of an error message: the known name nearest to `word`, else all of them."""
    close = difflib.get_close_matches(str(word), [k for k in known if k != "overwrite"], 1, 0.5)
    return (
        f"; did you mean {prefix}{close[0]}?"
        if close
        else f"; known are: {', '.join(sorted(known))}"
    )


def _empty_parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )


def _parser(options_class: type[CommonOptions], description: str | None) -> argparse.ArgumentParser:
    parser = _empty_parser(description)
    for name, info in options_class.__pydantic_fields__.items():  # type: ignore[attr-defined]
        kind, default = info.annotation, info.get_default(call_default_factory=True)
        choices = f" {{{', '.join(get_args(kind))}}}" if get_origin(kind) is Literal else ""
        text = f"{info.description}{choices} (default: {_shortened(default) or 'none'})"
        words: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if get_origin(kind) is list:
            words["nargs"] = "*"
        elif kind is bool:
            words |= {"nargs": "?", "const": "true"}
        parser.add_argument(f"--{name}", metavar=_metavar(kind), **words)
    return parser


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", bool: "true|false"}.get(kind, "TEXT")


def _section_values(path: Path, section: str, known: list[str]) -> dict[str, Any]:
    """The config's values for one stage, as they are written: one place converts them."""
    config = load_config(path)
    shared = [field.name for field in fields(CommonOptions)]
    values: dict[str, Any] = {}
    for name, allowed in (("common", shared), (section, known)):
        for key, value in (config.get(name) or {}).items():
            if key not in allowed or key == "config":
                where = f"{path}: unknown option {key!r} in section {name!r}"
                raise InputError(where + nearest(key, [k for k in allowed if k != "config"]))
            if isinstance(value, dict):
                raise InputError(
                    f"{path}: option {key!r} in section {name!r} must be one value or a list"
                )
            if value is None:
                raise InputError(
                    f"{path}: option {key!r} in section {name!r} has no value; write one, or "
                    "remove the line"
                )
            if key in known:
                values[key] = value
    return values


class _TextLoader(yaml.BaseLoader):
    """Every value as it is written, so that `no` is no False and 1:30 no 90; a key only once."""

    def construct_scalar(self, node: Any) -> Any:
        """The text of a value; None where there is none."""
        is_empty = node.style is None and node.value.lower() in ("", "~", "null")
        return None if is_empty else super().construct_scalar(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Raises yaml.YAMLError for a key that is there twice."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is there twice,{node.start_mark}")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise InputError(f"{path} is no file; name a config, the shipped ones are in configs/")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _TextLoader) or {}
    except FileNotFoundError:
        raise InputError(f"there is no config {path}; the shipped ones are in configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}; correct the file"
        ) from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path} must hold one section per stage, each with 'option: value' lines")
    for name, value in loaded.items():
        if name in NOT_SECTIONS:
            continue
        if name not in SECTIONS:
            raise InputError(f"{path}: unknown section {name!r}{nearest(name, SECTIONS)}")
        if not isinstance(value, dict | None):
            raise InputError(
                f"{path}: section {name!r} must hold 'option: value' lines, one per option"
            )
    return loaded


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    for name, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            target[name] = target[name] | value
        elif value is not None or name not in target:  # an empty section changes nothing
            target[name] = value


def _message(error: ValidationError, given: dict[str, Any], section: str) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    where = f"--{name}" if name in given else f"{given['config']}: {name} (section {section!r})"
    value = _shortened(repr(first["input"]))
    return f"{where}: {first['msg']}, not {value}; --help lists all options"


def _shortened(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


if __name__ == "__main__":  # for shell scripts: the data set that a config names
    from mllmrec.stage.main import run_main

    run_main(lambda: print(load_config(Path(sys.argv[1])).get("dataset", "")))
