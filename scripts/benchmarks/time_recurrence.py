"""A training epoch of LRURec with the recurrence of this repository and with a loop over time.

    bash scripts/benchmark.sh recurrence

Baseline: h_t = decay * h_(t-1) + inputs_t, one position after the other. Ours:
`linear_recurrence` of `mllmrec/sequential/lrurec.py`. The same model, random sequences and steps,
alternately in one process; medians. `recurrence`: the states and their gradients alone.

Out: outputs/benchmark/recurrence.json.
"""

from mllmrec.stage.main import run_main

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import torch
from tools import print_row, read_options, timed_interleaved, write_report

from mllmrec.models.loading import pick_device
from mllmrec.sequential import lrurec
from mllmrec.sequential.sequences import SequenceData
from mllmrec.sequential.training import next_item_loss

WIDTH, CHANNELS = 64, 128  # of the published model
Recurrence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def step_by_step(inputs: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """The states, one position after the other."""
    decay, state, states = torch.exp(log_decay), torch.zeros_like(inputs[:, 0]), []
    for position in range(inputs.shape[1]):
        state = decay * state + inputs[:, position]
        states.append(state)
    return torch.stack(states, dim=1)


RECURRENCES = {"baseline": step_by_step, "ours": lrurec.linear_recurrence}


@dataclass
class Options:
    """Of the command line."""

    lengths: Annotated[tuple[int, ...], "of the sequences"] = (50, 200, 1000)
    users: Annotated[int, "sequences in an epoch"] = 128
    items: Annotated[int, "of the catalogue"] = 3650
    batch: Annotated[int, "sequences in a batch"] = 16
    repeats: Annotated[int, "of which the median is taken"] = 3


def states_and_gradients(
    recurrence: Recurrence, length: int, args: Options, device: torch.device
) -> Callable[[], None]:
    """A function that computes one batch of states and their gradients."""
    inputs = torch.randn(args.batch, length, CHANNELS, dtype=torch.complex64, device=device)
    log_decay = torch.complex(-torch.rand(CHANNELS) / 5 - 0.01, 6 * torch.rand(CHANNELS))
    inputs.requires_grad_()
    log_decay = log_decay.to(device).requires_grad_()
    return lambda: recurrence(inputs, log_decay).abs().sum().backward()


def epoch(
    recurrence: Recurrence, length: int, args: Options, device: torch.device
) -> Callable[[], None]:
    """A function that trains one epoch."""
    generator = torch.Generator().manual_seed(length)
    sequences = torch.randint(1, args.items + 1, (args.users, length + 1), generator=generator)
    numbers = {str(n): n for n in range(1, args.items + 1)}
    data = SequenceData(numbers, sequences.tolist())
    options = SimpleNamespace(
        width=WIDTH, layers=2, dropout=0.2, item_ids=True, max_length=length, batch_size=args.batch
    )
    torch.manual_seed(0)
    model = lrurec.LRURec(args.items, None, options).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def train() -> None:
        with mock.patch.object(lrurec, "linear_recurrence", recurrence):
            for inputs, targets in data.training_batches(options, generator):
                loss = next_item_loss(
                    model, inputs.to(device), targets.to(device), options, generator
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return train


def compare(length: int, args: Options, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the report for one length of sequences."""
    rows = []
    for case, work in (("recurrence", states_and_gradients), ("epoch", epoch)):
        works = {name: work(own, length, args, device) for name, own in RECURRENCES.items()}
        seconds, _ = timed_interleaved(works, args.repeats)
        row: dict[str, Any] = {"case": f"{case}, length {length}"}
        row |= {f"{name}_s": round(value, 4) for name, value in seconds.items()}
        rows.append(row | {"ratio": round(seconds["baseline"] / seconds["ours"], 2)})
        print_row(rows[-1])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure all lengths and write the report."""
    args, device = read_options(Options, __doc__, argv), pick_device()
    rows = [row for length in args.lengths for row in compare(length, args, device)]
    write_report("recurrence", rows, users=args.users, items=args.items, batch=args.batch)


if __name__ == "__main__":
    run_main(main)
