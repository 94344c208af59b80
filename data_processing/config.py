"""Options of every stage: a flat dataclass, a YAML file with one section per stage, the command line.

Order: default in the dataclass < `common:` section < the stage's own section < command line. A key that no stage
knows is an error that names the nearest known one.

    args = parse_args(Args, section="split", description=__doc__, argv=argv)
"""

import difflib
import os
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from data_processing.errors import InputError

DEFAULT_CONFIG = "configs/microlens.yaml"
CONFIG_VARIABLE = "MLLM_MSR_CONFIG"  # environment variable: another default for --config
# One section per stage; `dataset` names the loader that scripts/01_prepare_data.sh calls.
SECTIONS = (
    "common", "data", "download", "image_summary", "preference", "datasets", "train", "merge", "score", "popularity", "metrics", "report",
)  # fmt: skip


def option(default, text):
    """A field of an `Args` dataclass: its default, and the sentence that --help shows for it."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class CommonArgs:
    """What every stage can be told. A stage's own `Args` adds its options to these."""

    data_dir: str = option("data/microlens", "folder of items.jsonl and users.jsonl")
    output_dir: str = option("outputs/microlens", "folder of everything the models make")
    domain: str = option("video", "wording of the prompts: video or product")
    seed: int = option(42, "seed of everything random (released code: 42)")
    limit: int = option(0, "only the first N rows, 0 = all; a later run without it goes on")
    overwrite: bool = option(False, "throw away what an earlier run with other settings made")


@dataclass
class ModelArgs(CommonArgs):
    """What every stage that loads a model can be told besides."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    attention: str = option("auto", "auto: FlashAttention 2 if installed, else SDPA")
    quantization: Literal["none", "int8", "nf4"] = option("none", "of the language model, by bitsandbytes: int8 or nf4 (4 bit)")


def parse_args(args_class, section, argv=None, description=None):
    """An instance of `args_class` (dataclass), its attribute `config` set to the path of the YAML file.

    argv: list of strings, default sys.argv[1:]. Raises InputError for an unreadable config, an unknown key or option,
    or a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(args_class, description=(description or "").replace("%", "%%"), allow_abbrev=False)
    parser.add_argument("--config", default=None, help=f"YAML file (${CONFIG_VARIABLE}, else {DEFAULT_CONFIG})")
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        sys.exit(0)
    path = _config_path(argv)
    from_yaml = _yaml_options(path, section, args_class)
    args, _, unknown = parser.parse_args_into_dataclasses([*from_yaml, *argv], return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        known = [f.name for f in fields(args_class)] + ["config"]
        raise InputError(f"unknown option {unknown[0]!r}{_nearest(unknown[0].lstrip('-').split('=')[0], known, '--')}")
    args.config = str(path)
    return args


def show(args, title):
    """Prints what was resolved, one option per line."""
    print(f"{title}\n  config: {args.config}")
    for name, value in asdict(args).items():
        print(f"  {name}: {value}")


def load_yaml(path):
    """The config as a dict of sections. Raises InputError if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            loaded = yaml.safe_load(file) or {}
    except FileNotFoundError:
        raise InputError(f"there is no config {path}; the shipped ones are in configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path} must hold one section per stage, each with 'option: value' lines")
    for name, value in loaded.items():
        if name not in ("dataset", *SECTIONS):
            raise InputError(f"{path}: unknown section {name!r}{_nearest(name, SECTIONS)}")
        if name != "dataset" and not isinstance(value, dict | None):
            raise InputError(f"{path}: section {name!r} must hold 'option: value' lines, one per option")
    return loaded


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are InputErrors: one sentence, exit code 1."""

    def error(self, message):
        raise InputError(f"{message}; --help lists all options")


def _config_path(argv):
    path = os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG
    for place, word in enumerate(argv):
        if word == "--config":
            if place + 1 == len(argv):
                raise InputError("--config wants a path behind it")
            path = argv[place + 1]
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
    return Path(path)


def _yaml_options(path, section, args_class):
    """The YAML values as command-line words, so that the parser checks types and choices in one place."""
    loaded = load_yaml(path)
    known = {f.name: f for f in fields(args_class)}
    shared = {f.name for f in fields(CommonArgs)}
    words = []
    for name, of_stage in (("common", False), (section, True)):
        for key, value in (loaded.get(name) or {}).items():
            if key not in (known if of_stage else shared):
                raise InputError(f"{path}: unknown option {key!r} in section {name!r}{_nearest(key, known if of_stage else shared)}")
            if key not in known or value is None or value == []:
                continue
            if isinstance(value, dict):
                raise InputError(f"{path}: option {key!r} in section {name!r} must be one value or a list")
            words += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return words


def _nearest(word, known, prefix=""):
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known are: {', '.join(sorted(known))}"
