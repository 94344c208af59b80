"""README.md of an adapter or a merged model, from the run record; replaces PEFT's blank card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mllmrec.models.processors import read_config, takes_images
from mllmrec.prompts.mllm4rec import INSTRUCTION
from mllmrec.stage.jsonl import PathLike
from mllmrec.stage.record import read_record

LICENCE = "the base model's terms apply to the weights, the data set's to what was learned from it"


def write_model_card(folder: PathLike, record: Mapping[str, Any], merged: bool = False) -> None:
    """Write the card of a model's folder. record: of the adapter."""
    arguments, packages = record["arguments"], record["packages"]
    model = arguments["model"]
    multimodal = takes_images(read_config(model))
    data = ModelCardData(
        base_model=None if Path(model).is_dir() else model,
        library_name="transformers" if merged else "peft",
        pipeline_tag="image-text-to-text" if multimodal else "text-generation",
        license="other",
        license_name="as-the-base-model",
        tags=["recommendation", "sequential-recommendation", "lora"],
    )
    rows = read_record(Path(arguments["output_dir"], arguments["system"], "train.jsonl")) or {}
    yes_no = rows.get("arguments", {}).get("recommend_prompt")
    best = next(name for name in record if name.startswith("best_validation_"))
    facts = {
        "base model": f"{model}; {LICENCE}",
        "data": f"{record['config']}, {record['rows']['in']:,} training rows",
        "question": " ".join((yes_no or INSTRUCTION).split()),
        "training": ", ".join(f"{name} {value}" for name, value in record["settings"].items()),
        best.replace("_", " "): record[best],
        "command": record["command"],
        "made": f"{record['date']}, commit {record['git_commit']}, {record['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    lines = "".join(f"- **{name}**: {value}\n" for name, value in facts.items())
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {arguments['system']}\n\n{lines}")
    card.save(Path(folder) / "README.md")
