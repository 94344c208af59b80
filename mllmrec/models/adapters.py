"""Adapters on disk: how others find the base model, loading one, and checks that it fits."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from mllmrec.models.loading import check_finite, listed
from mllmrec.models.model_options import ModelOptions
from mllmrec.models.processors import cannot, read_config
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, read_json, write_json
from mllmrec.stage.record import check_described, file_digests, first_difference, read_record

WEIGHTS = "adapter_model.safetensors"
REMEDY = "restore it, or train again with scripts/05_train.sh --overwrite true"
# Options of a training that its adapter needs again: with other values the scores are others.
USES = ["quantization", "prompt_format", "image_tiles", "pad_images"]
USES += ["answer_token", "end_token", "max_text_tokens"]


def make_portable(folder: PathLike, base: str) -> None:
    """Rewrite adapter_config.json so that other programs find the base model, wherever they run.

    base: hub id or path, which becomes absolute. The names of the layers are sorted: PEFT keeps
    them as a set, whose order differs from run to run.
    """
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = str(Path(base).resolve()) if Path(base).is_dir() else base
    write_json(path, config)


def model_identity(name: str) -> dict[str, Any]:
    """Kind and size of a model, from its configuration; these stay when a folder is renamed."""
    config = read_config(name)
    text = config.get_text_config()
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads")
    return {"model_type": config.model_type, "text_model_type": text.model_type} | {
        key: getattr(text, key, None) for key in sizes
    }


def adapter_base(folder: PathLike) -> str:
    """Name of the model that the LoRA weights of `folder` were trained on.

    Raises InputError if there are none.
    """
    for name in ("adapter_config.json", WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise InputError(
                f"{folder} is missing or has no {name}; scripts/05_train.sh makes it, or "
                "pass --adapter none"
            )
    config = f"{folder}/adapter_config.json cannot be read"
    try:
        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path or ""
    except Exception as error:  # each kind of adapter has checks of its own
        raise cannot(config, error, REMEDY) from None
    if not isinstance(base, str):
        raise InputError(f"{config}: base_model_name_or_path is {base!r}, no text; {REMEDY}")
    return base


def check_adapter(folder: PathLike, name: str) -> None:
    """Raise InputError if the LoRA weights of `folder` belong to another base model than `name`.

    If this repository trained the adapter, what is compared is the base's kind and size, and the
    digests of its files if both are folders, or the names if both are hub ids; else the bare names.
    """
    base, record = adapter_base(folder), read_record(folder) or {}
    if record:  # the weights, r, alpha and the layers are those of the training
        check_described(folder, record)
    remedy = "pass the matching --model or --adapter"
    if "base" not in record:
        if base and Path(base).name != Path(name).name:
            raise InputError(f"the adapter {folder} was trained on {base}, not on {name}; {remedy}")
        return
    difference = first_difference(record["base"], model_identity(name)) or _other_files(
        record["inputs"], base, name
    )
    if difference:
        raise InputError(
            f"the adapter {folder} was trained on {base}, which is another model than "
            f"{name} ({difference}); {remedy}"
        )


def trained_with(folder: PathLike) -> dict[str, Any]:
    """Option -> value in the training of an adapter, or of the one that was merged into a model.

    Those of `USES`; empty if it has no run record.
    """
    record = read_record(folder) or {}
    settings = record.get("trained_with", record.get("settings", {}))
    return {name: settings[name] for name in USES if name in settings}


def check_use(folder: PathLike, options: ModelOptions, allowed: Sequence[str]) -> None:
    """Raise InputError if an adapter or merged model is to be used in another way than trained.

    allowed: names of options that may differ.
    """
    for name, value in trained_with(folder).items():
        now = getattr(options, name, value)
        if now != value and name not in allowed:
            raise InputError(
                f"{folder} was trained with --{name} {value!r}, not {now!r}; pass the same, or "
                f"--allow_other {name}"
            )


def _other_files(recorded: Mapping[str, str], base: str, name: str) -> str | None:
    """A difference between the base's files at training and now, or None."""
    now = {file.rpartition("/")[2]: digest for file, digest in file_digests(name).items()}
    then = {file.rpartition("/")[2]: d for file, d in recorded.items() if "/" in file}
    shared = now.keys() & then.keys() - {"generation_config.json"}
    difference = first_difference({f: then[f] for f in shared}, {f: now[f] for f in shared})
    if not difference and not then and not now and base != name:
        return f"the name was {base}, is {name}"
    return difference


def load_adapter(model: Any, folder: PathLike, name: str) -> Any:
    """`model` (of the name `name`) with the LoRA weights of `folder`, in evaluation mode.

    Raises InputError if they do not fit: PEFT would only warn, and go on without them.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", category=FutureWarning)  # renamings inside peft
            # In the model's dtype, as training computes them: in float32 each input is converted.
            adapted = PeftModel.from_pretrained(
                model, str(folder), autocast_adapter_dtype=False
            ).eval()
        with safe_open(Path(folder) / WEIGHTS, "pt") as file:
            in_file = set(file.keys())
    except SafetensorError as error:
        raise cannot(f"{Path(folder) / WEIGHTS} cannot be read", error, REMEDY) from None
    except Exception as error:  # a wrong value in its config can fail in any line of PEFT
        remedy = "pass the matching --model or --adapter"
        what = f"the adapter {folder} does not fit the model {name}"
        raise cannot(what, error, remedy) from None
    in_model = get_peft_model_state_dict(adapted).keys()
    found = {
        "of the file are not in the model": sorted(in_file - in_model),
        "of the model are not in the file": sorted(in_model - in_file),
    }
    if any(found.values()) or not in_model:
        raise InputError(
            f"the adapter {folder} does not fit the model {name}: of its LoRA weights "
            f"{listed(found) or 'there are none'}; pass the matching --model or --adapter"
        )
    check_finite(str(folder), adapted, only="lora_")
    return adapted
