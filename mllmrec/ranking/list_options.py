"""Options of MLLM4Rec's ranker. No torch, so that --help answers at once."""

from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from mllmrec.ranking.training_options import FineTuningOptions
from mllmrec.stage.jsonl import require
from mllmrec.stage.options import DatasetCode, option

# Options that change no adapter, and those that decide the questions.
SCORE_OPTIONS = ("adapter", "ranked", "variant", "reuse_prefix", "retrieved", "summaries")
ROW_OPTIONS = ["dataset_code", "seed", "model", "captions", "text_tokens", "max_history", "lists"]
ROW_OPTIONS += ["role", "hybrid", "prompt_format", "max_text_tokens", "candidate_order"]


@dataclass
class ListOptions(FineTuningOptions, DatasetCode):
    """How questions about lists are made, learned and scored."""

    system: str = option("mllm4rec", "subfolder of output_dir", pattern=r"^[\w-]+$")
    lists: Literal["retrieved", "users"] = option(
        "retrieved", "what is ranked; retrieved: the retriever's items; users: users.jsonl's"
    )
    retrieved: str = option("", "the retriever's folder, default: {output_dir}/{system}/retriever")
    summaries: str = option("", "default: {output_dir}/{system}/image_summaries.jsonl")
    adapter: str = option(
        "",
        "folder of the LoRA weights to score with, and nothing is trained; none: the model without "
        "any, then --ranked and --variant begin with zero_shot; default: what is trained",
    )
    ranked: str = option("ranked", "folder of the ranker's own scores", pattern=r"^[\w-]+$")
    variant: str = option("ranker", "folder of the scores", pattern=r"^[\w-]+$")
    model: str = option("meta-llama/Llama-2-7b-hf", "text model, hub id or folder")
    llm_base_model: str = option("", "another name of --model, as in the published command")
    captions: bool = option(True, "false: titles only (ablation: without images)")
    role: bool = option(True, "false: without the role (ablation)")
    hybrid: bool = option(True, "false: without the words of the instruction (ablation)")
    text_tokens: int = option(32, "of a title, and of a caption (published: 32)", ge=1)
    max_history: int = option(20, "last items in the prompt (published: 20)", ge=1)
    train_rows: Literal["prefixes", "last"] = option(
        "prefixes",
        "targets of training; prefixes: each item of a user from the second on (released code); "
        "last: the last one",
    )
    candidates: int = option(
        20, "of a training row: the target and random items (published: 20)", ge=2, le=26
    )
    candidate_order: Literal["retriever", "shuffled"] = option(
        "shuffled",
        "of validation and test lists; retriever: its best first (published), so that letters tell "
        "its ranks; lists of users.jsonl are always shuffled",
    )
    control: Literal["none", "shuffled_labels"] = option(
        "none", "shuffled_labels: a random letter is learned, which should rank by chance"
    )
    max_text_tokens: int = option(1536, "of a prompt (published: 1,536)", ge=0)
    epochs: int = option(1, "epochs (published: 1)", ge=1)
    learning_rate: float = option(1e-4, "of AdamW (published: 1e-4)", ge=0)
    lora_dropout: float = option(0.05, "dropout (published: 0.05)", ge=0, lt=1)
    lora_layers: list[str] = option(["q_proj", "v_proj"], "layers (published: q_proj, v_proj)")
    reuse_prefix: bool = option(True, "in scoring: compute what prompts share only once")

    @property
    def retrieved_dir(self) -> Path:
        """The retriever's folder."""
        return Path(self.retrieved or self.system_dir / "retriever")

    def input_paths(self) -> dict[str, Path]:
        """name -> path of users, items, captions and candidates, those that the options need.

        Raises InputError, naming the script that writes it, for one that is missing.
        """
        data_dir, code = Path(self.data_dir), f"--config {self.config}"
        maker = f"MLLM4Rec/process_item.py {code}"
        paths = {n: require(data_dir / f"{n}.jsonl", maker=maker) for n in ("users", "items")}
        captions = Path(self.summaries or self.system_dir / "image_summaries.jsonl")
        if self.captions and (self.summaries or captions.exists()):
            paths["captions"] = require(captions, maker=f"MLLM4Rec/process_item_blip2.py {code}")
        if self.lists == "retrieved":
            maker = f"MLLM4Rec/train_retriever.py {code}"
            paths["candidates"] = require(self.retrieved_dir / "candidates.jsonl", maker=maker)
        return paths
