"""The model card of an adapter or a merged model: README.md in its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from mllmrec.models.loading import read_config, takes_images
from mllmrec.prompts import mllm4rec
from mllmrec.stage.jsonl import PathLike, atomic_file
from mllmrec.stage.options import load_config
from mllmrec.stage.record import read_record

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
LOSSES = {"answer": "cross-entropy of the answer's tokens", "sequence": "of all tokens"}
TRAINING = ("epochs", "learning_rate", "batch_size", "accumulation", "schedule", "seed")
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_init", "lora_vision", "quantization")


def base_name(model: str) -> str:
    """A hub id as it is, a folder by its absolute path: other programs run elsewhere."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def model_card(
    record: Mapping[str, Any], metrics: Mapping[str, str] | None = None, merged: bool = False
) -> str:
    """The text of a card. record: of the adapter; metrics: name -> value, of the test users."""
    arguments, letters = record["arguments"], "lists" in record["arguments"]
    model = arguments["model"]
    multimodal = takes_images(read_config(model))
    validation = next(name for name in record if name.startswith("best_validation_"))
    packages = record["packages"]
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    return template.render(
        base=base_name(model),
        is_hub_id=not Path(model).is_dir(),
        merged=merged,
        pipeline_tag="image-text-to-text" if multimodal else "text-generation",
        auto_class="AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM",
        title=f"{arguments['system']} on {Path(record['config']).stem}",
        system="MLLM4Rec" if letters else "MLLM-MSR",
        answers="with a candidate's letter" if letters else "with yes or no",
        command=record["command"],
        data_set=load_config(Path(record["config"])).get("dataset", record["config"]),
        rows=record["rows"]["in"],
        question=question(arguments).replace("\n", "<br>"),
        loss=LOSSES[arguments["loss"]],
        training=_listed(arguments, TRAINING),
        lora=_listed(arguments, LORA),
        validation=(
            f"best validation {validation.removeprefix('best_validation_')}",
            _rounded(record[validation]),
        ),
        metrics=metrics or {},
        date=record["date"],
        commit=record["git_commit"],
        device=record["device"],
        versions=", ".join(
            f"{name} {packages[name]}" for name in ("torch", "transformers", "peft")
        ),
        dtype=record["dtype"],
    )


def question(arguments: Mapping[str, Any]) -> str:
    """The template of the questions that the adapter was trained on."""
    if "lists" in arguments:
        role = mllm4rec.ROLE if arguments["role"] else ""
        return role + (mllm4rec.INSTRUCTION if arguments["hybrid"] else mllm4rec.BARE)
    rows = Path(arguments["output_dir"], arguments["system"], "train.jsonl")
    record = read_record(rows) or {"arguments": {}}
    return str(record["arguments"].get("recommend_prompt", "as in train.jsonl"))


def write_model_card(folder: PathLike, text: str) -> None:
    """Write README.md of a model folder."""
    with atomic_file(Path(folder) / "README.md") as file:
        file.write(text.encode())


def _listed(arguments: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {arguments[name]}" for name in names)


def _rounded(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
