"""Trains the tiny Llama that MLLM4Rec's ranker starts from on the sample: to count in lists.

In: nothing but `mllmrec/data/sample_world.py`. Out: a model folder (fp16 safetensors, tokenizer,
chat template).

    python scripts/tiny_models/train_list_llama.py --output Inference/tiny_models/list_llama

A large model can compare lines of a list with what came before; a tiny one must learn that. The
documents have numbered lines, then lists of lettered lines. Each lettered line has a mark from 0 to
9: how often its colour, shape and topic occur above, newer lines more. The question is which line
has the highest mark. At first most marks are shown, as a digit behind the line, later none is. The
state of a line's last token after MARK_LAYER layers learns the mark, shown or not, so that the
layers above can compare marks that nobody wrote (deep supervision: Lee et al., 2015). Lists and
history become longer when the last ones are answered well. The ranker's question, its roles and its
words are not among the documents. Matrices are trained with Muon. Two threads, about 50 minutes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from build import new_llama
from numpy.random import Generator
from torch.nn.functional import cross_entropy
from train_llava import train_and_save

from mllmrec.data import sample_world as world
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_text
from mllmrec.prompts.templates import user_turn

Item = dict[str, str]
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "initializer_range": 0.065,
}
MARK_LAYER = 3  # its output holds the marks
DECAY = 0.8  # weight of a line against the next newer one
LETTERS = "ABCDEFGHIJKLMNOPQRSTU"
HEADS = (
    "Log:",
    "Seen before:",
    "Notes so far:",
    "Earlier lines:",
    "History:",
    "These came first, one after the other:",
    "What was taken down:",
)
ASKS = (
    "Lines:",
    "New ones:",
    "Which follow:",
    "Offered:",
    "Options:",
    "And these are rated:",
    "To compare:",
)
ENDS = (
    "Which letter?",
    "Letter of the best fit:",
    "Which line fits the counts? Letter only.",
    "Best line:",
    "Answer with one letter.",
)
BULLETS = ("{}.", "{})", "({})", "{}:", "{} -")
TITLES_ONLY = 0.1  # of the documents: without captions
DOCUMENTS = 16  # in a batch
MATRIX_RATE, RATE = 2e-3, 1e-3  # of Muon, and of AdamW for embeddings, LM head and norms
WINDOW = 50  # steps over which right answers are counted


@dataclass(frozen=True)
class Level:
    """What the documents of a part of the training are like.

    most_history: lines above the lists; most_lines: of a list; lists: of a document; shown: share
    of the lists with marks, half of these with some only; steps: without questions, just marks;
    else the level ends when `good` of the last WINDOW steps' letters are right.
    """

    most_history: int
    most_lines: int
    lists: int
    shown: float = 0.0
    steps: int = 0
    good: float = 0.6


@dataclass(frozen=True)
class Phase:
    """warm_up: first steps, in which the rates rise; decay: last steps, in which they fall."""

    levels: tuple[Level, ...]
    steps: int
    warm_up: int
    decay: int


PHASES = (
    Phase(
        (
            Level(4, 20, 1, shown=1.0, steps=150),
            Level(8, 20, 1, shown=1.0, steps=350),
            *(Level(6, 3, 5, shown / 10) for shown in (8, 6, 4, 2)),
            Level(6, 3, 5, good=1.0),
        ),
        steps=1000,
        warm_up=100,
        decay=0,
    ),
    Phase(
        (
            Level(8, 5, 4, good=0.7),
            Level(12, 5, 4, good=0.7),
            Level(15, 5, 4, good=0.7),
            Level(15, 10, 3, good=1.0),
        ),
        steps=1500,
        warm_up=50,
        decay=500,
    ),
)


def history(rng: Generator, length: int) -> list[Item]:
    """Items that have values of a favourite item, each of which may change in the middle."""
    favourite = world.random_item(rng)
    change = {
        name: (int(rng.integers(length // 3, 2 * length // 3 + 1)), str(rng.choice(values)))
        for name, values in world.VALUES.items()
        if rng.random() < world.DRIFT_PROBABILITY
    }
    agree, items = rng.uniform(0.3, 0.95), []
    for step in range(length):
        favourite |= {name: value for name, (when, value) in change.items() if step == when}
        item = world.random_item(rng)
        for name in world.ATTRIBUTES:
            if rng.random() < agree:
                item[name] = favourite[name]
        items.append(item | {"title": world.title_of(item["topic"], rng)})
    return items


def random_lines(rng: Generator, n: int, items: list[Item]) -> list[Item]:
    """`n` items of a list, with some values from the history."""
    lines, share = [], rng.choice([0.0, 0.3, 0.6])
    for _ in range(n):
        line = world.random_item(rng)
        for name in world.ATTRIBUTES:
            if rng.random() < share:
                line[name] = items[int(rng.integers(len(items)))][name]
        lines.append(line | {"title": world.title_of(line["topic"], rng)})
    return lines


class Document:
    """A document's token ids, and places whose next token is learned: (place, token id).

    marks: at the last token of each lettered line; letters: at the end of each question; ends:
    behind each letter.
    """

    def __init__(self, writer: "Writer", rng: Generator, level: Level) -> None:
        self.ids: list[int] = []
        self.marks: list[tuple[int, int]] = []
        self.letters: list[tuple[int, int]] = []
        self.ends: list[tuple[int, int]] = []
        self.writer, self.rng, self.level = writer, rng, level
        most = level.most_history
        self.with_caption = rng.random() >= TITLES_ONLY
        self.items = history(rng, int(rng.integers(max(2, most // 2), most + 1)))
        self.ids += [*writer.start, *writer.user, *writer.tokens(_choice(rng, HEADS) + "\n")]
        bullet = _choice(rng, BULLETS)
        for number, item in enumerate(self.items, start=1):
            self.ids += writer.tokens(bullet.format(number)) + writer.line(item, self.with_caption)
            self.ids += writer.tokens("\n")
        for number in range(level.lists):
            self.add_list(number)

    def add_list(self, number: int) -> None:
        """Lettered lines with their marks, and the question."""
        rng, level, writer = self.rng, self.level, self.writer
        self.ids += writer.user if number else []
        n = level.most_lines if level.steps else int(rng.integers(2, level.most_lines + 1))
        names = world.ATTRIBUTES if self.with_caption else ("topic",)
        while True:
            lines = random_lines(rng, n, self.items)
            counts = world.counted_scores(self.items, lines, names, DECAY) / len(names)
            second, first = np.sort(counts)[-2:]
            if level.steps or first > second + 0.02:
                break
        bullet, shown = _choice(rng, BULLETS), level.shown
        visible = 1.0
        if not level.steps:
            visible = rng.choice([0, 0.5, 1.0], p=[1 - shown, shown / 2, shown / 2])
        self.ids += writer.tokens(_choice(rng, ASKS) + "\n")
        for letter, line, count in zip(LETTERS, lines, counts, strict=False):
            self.ids += writer.tokens(bullet.format(letter)) + writer.line(line, self.with_caption)
            mark = writer.digits[min(int(count * 10), 9)]
            self.marks.append((len(self.ids) - 1, mark))
            self.ids += [mark] if rng.random() < visible else []
            self.ids += writer.tokens("\n")
        if not level.steps:
            self.ids += writer.tokens(_choice(rng, ENDS)) + writer.answer
            [letter] = writer.tokens(LETTERS[int(np.argmax(counts))])
            self.letters.append((len(self.ids) - 1, letter))
            self.ends.append((len(self.ids), writer.end))
            self.ids += [letter, writer.end]


class Writer:
    """Pieces of documents as token ids, by one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokens = lru_cache(None)(
            lambda text: tokenizer(text, add_special_tokens=False).input_ids
        )
        lead, self.answer = map(
            self.tokens, ChatProcessor(tokenizer).render([user_turn("@@")]).split("@@")
        )
        self.start, self.user, self.end = lead[:1], lead[1:], tokenizer.eos_token_id
        self.digits = [self.tokens(str(digit))[0] for digit in range(10)]

    def line(self, item: Item, with_caption: bool) -> list[int]:
        """An item as the ranker's lists show it on the sample (text_tokens 4)."""
        caption = self.tokens(f": A {item['colour']} {item['shape']} on") if with_caption else []
        return self.tokens(" " + item["title"]) + caption


def _choice(rng: Generator, texts: tuple[str, ...]) -> str:
    return texts[int(rng.integers(len(texts)))]


def new_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """[Muon for the matrices of the layers, AdamW for everything else]."""
    named = dict(sorted(model.named_parameters()))
    matrices = {name for name, p in named.items() if p.ndim == 2 and ".layers." in name}
    inner = [p for name, p in named.items() if name in matrices]
    outer = [p for name, p in named.items() if name not in matrices]
    return [
        torch.optim.Muon(inner, lr=MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=RATE, weight_decay=0.01),
    ]


class Learner:
    """A model with the losses of the documents."""

    def __init__(self, model: Any, writer: Writer) -> None:
        self.model, self.writer, self.state = model, writer, torch.empty(0)
        self.layers = model.model.layers

        def keep(module: Any, given: Any, output: Any) -> None:
            self.state = output[0] if isinstance(output, tuple) else output

        self.hook = self.layers[MARK_LAYER - 1].register_forward_hook(keep)

    def losses(self, documents: list[Document]) -> tuple[torch.Tensor, float, float]:
        """(loss, share of right marks, share of right letters)."""
        length, pad = max(len(d.ids) for d in documents), self.model.config.pad_token_id
        ids = torch.tensor([d.ids + [pad] * (length - len(d.ids)) for d in documents])
        inner = self.model.model
        only_marks = not documents[0].letters
        inner.layers = self.layers[:MARK_LAYER] if only_marks else self.layers
        inner.config.num_hidden_layers = len(inner.layers)
        state = inner(input_ids=ids, use_cache=False).last_hidden_state
        inner.layers, inner.config.num_hidden_layers = self.layers, len(self.layers)
        loss, right_marks = self.loss(inner.norm(self.state), [d.marks for d in documents])
        if only_marks:
            return loss, right_marks, 0.0
        letter_loss, right = self.loss(state, [d.letters for d in documents])
        end_loss, _ = self.loss(state, [d.ends for d in documents])
        return 0.5 * loss + letter_loss + 0.05 * end_loss, right_marks, right

    def loss(
        self, states: torch.Tensor, learned: list[list[tuple[int, int]]]
    ) -> tuple[torch.Tensor, float]:
        """(cross-entropy at the places, share that is right). learned: of each document."""
        flat = [(row, *pair) for row, pairs in enumerate(learned) for pair in pairs]
        rows, places, tokens = (torch.tensor(part) for part in zip(*flat, strict=True))
        logits = self.model.lm_head(states[rows, places])
        right = (logits.argmax(-1) == tokens).float().mean().item()
        return cross_entropy(logits, tokens), right


def train(model: Any, tokenizer: Any, rng: Generator, phase: Phase) -> None:
    """Train on the phase's levels, in place."""
    optimizers, writer = new_optimizers(model), Writer(tokenizer)
    learner = Learner(model.train(), writer)

    def rate(step: int) -> float:
        left = (phase.steps - step) / phase.decay if phase.decay else 1.0
        return min((step + 1) / phase.warm_up, 1.0, max(left, 0.03))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    levels, right = list(phase.levels), list[float]()
    for step in range(1, phase.steps + 1):
        documents = [Document(writer, rng, levels[0]) for _ in range(DOCUMENTS)]
        loss, marks, letters = learner.losses(documents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        right.append(letters)
        share = float(np.mean(right[-WINDOW:]))
        if step % WINDOW == 0:
            print(f"step {step}, {levels[0]}: marks {marks:.2f}, letters {share:.2f}", flush=True)
        ends = len(right) == levels[0].steps
        if not levels[0].steps:
            ends = step % WINDOW == 0 and len(right) >= WINDOW and share > levels[0].good
        if ends and len(levels) > 1:
            levels, right = levels[1:], []
    learner.hook.remove()
    model.eval()


def trained(seed: int = 0, first: str = "1", start: str = "") -> tuple[Any, Any]:
    """(model, tokenizer) after the training.

    first: number of the first phase, to go on from the folder `start` of the one before.
    """
    torch.set_num_threads(2)  # so that the result does not depend on the number of cores
    model, tokenizer = load_text(start) if start else new_llama(seed, **SIZES)
    for number in range(int(first), len(PHASES) + 1):
        rng = np.random.default_rng(seed * 1000 + number)
        train(model, tokenizer, rng, PHASES[number - 1])
        model.half().float()  # as it is saved: a phase can also go on from a folder
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    """Train the model and save it."""
    train_and_save(trained, __doc__, argv, first="1", start="")


if __name__ == "__main__":
    main()
