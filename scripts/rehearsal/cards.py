"""The README's table of cards: what each stage takes at full size, and how many rows fit.

    python scripts/rehearsal/cards.py

Arithmetic of mllmrec/models/size.py over the published shapes, which a dress rehearsal was held
against (docs/benchmarks.md). `tests/test_estimate.py` compares the README with it.
"""

from mllmrec.stage.main import run_main

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from checkpoints import CONFIGS

from mllmrec.estimate.command import CARDS, CHUNK_TOKENS, GB, RESERVED
from mllmrec.models.size import ModelSize, model_size

RANK = 8  # of LoRA
QUANTIZATIONS = ("none", "nf4")
HEAD = (
    "| stage, tokens of a row | bfloat16: GB | rows at once on 24 / 48 / 80 GB | nf4: GB | rows at "
    "once |",
    "|---|---|---:|---|---:|",
)


@dataclass(frozen=True)
class Need:
    """What a stage takes. fixed: GB by part, weights first; row: GB that each row adds."""

    fixed: tuple[float, ...]
    row: float

    def rows_at_once(self, memory: float) -> int:
        """memory: of the card, in bytes."""
        free = (memory - RESERVED) / GB - sum(self.fixed)
        return max(0, int(free / self.row))


@dataclass(frozen=True)
class CardRow:
    """A stage of the table. tokens: of a row, the generated ones included."""

    stage: str
    model: str
    tokens: int
    how: Literal["generates", "scores", "trains"] = "generates"

    def need(self, size: ModelSize, quantization: str) -> Need:
        """With the weights in bfloat16 or quantised."""
        trains = self.how == "trains"
        weights = size.weights(quantization, training=trains) / GB
        if trains:
            adapter = size.training(0, RANK, checkpointing=True)
            row = size.training(self.tokens, RANK, checkpointing=True) - adapter
            return Need((weights, adapter / GB), row / GB)
        held = size.kv(self.tokens) / GB
        if self.how == "scores":  # a batch is one pass, and what a prefix holds is copied
            return Need((weights,), size.pass_through(self.tokens) / GB + 2 * held)
        return Need((weights, size.pass_through(CHUNK_TOKENS) / GB), held)


CARD_ROWS = (
    CardRow("image summaries, 3,072", "llava", 3072),
    CardRow("preferences, 3,072", "llama3", 3072),
    CardRow("training, 3,072", "llava", 3072, "trains"),
    CardRow("training, one tile, 1,024", "llava", 1024, "trains"),
    CardRow("scoring, 3,072", "llava", 3072, "scores"),
    CardRow("MLLM4Rec's ranker, training, 1,536", "llama2", 1536, "trains"),
)


def full_sizes() -> dict[str, ModelSize]:
    """The numbers of the three models, from their published shapes; no weights are made."""
    return {name: model_size(config("full")) for name, config in CONFIGS.items()}


def table(sizes: dict[str, ModelSize]) -> Iterator[str]:
    """Lines of the table in Markdown."""
    yield from HEAD
    for row in CARD_ROWS:
        cells = [row.stage]
        for quantization in QUANTIZATIONS:
            need = row.need(sizes[row.model], quantization)
            parts = [f"{part:.1f}" for part in need.fixed]
            cells.append(" + ".join(parts) + f" + {need.row:.2f} a row")
            cells.append(" / ".join(str(need.rows_at_once(card.memory)) for card in CARDS))
        yield f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    print("\n".join(table(full_sizes())))


if __name__ == "__main__":
    run_main(main)
