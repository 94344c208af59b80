"""A training epoch of LRURec with the recurrence of this repository and with a loop over time.

    bash scripts/benchmark.sh recurrence

Baseline: h_t = decay * h_(t-1) + inputs_t, one position after the other. Ours:
`linear_recurrence` of `mllmrec/sequential/lrurec.py`. The same model, random sequences and steps,
alternately in one process; medians. `recurrence`: the states and their gradients alone.

Out: outputs/benchmark/recurrence.json.
"""

from mllmrec.stage.main import run_main

from types import SimpleNamespace
from unittest import mock

import torch
from tools import new_parser, parse, print_row, timed_interleaved, write_report

from mllmrec.models.loading import pick_device
from mllmrec.sequential import lrurec
from mllmrec.sequential.data import SequenceData
from mllmrec.sequential.training import next_item_loss

WIDTH, CHANNELS = 64, 128  # of the published model


def step_by_step(inputs, log_decay):
    """The states, one position after the other."""
    decay, state, states = torch.exp(log_decay), torch.zeros_like(inputs[:, 0]), []
    for position in range(inputs.shape[1]):
        state = decay * state + inputs[:, position]
        states.append(state)
    return torch.stack(states, dim=1)


RECURRENCES = {"baseline": step_by_step, "ours": lrurec.linear_recurrence}


def states_and_gradients(recurrence, length, batch, device):
    """A function that computes one batch of states and their gradients."""
    inputs = torch.randn(batch, length, CHANNELS, dtype=torch.complex64, device=device)
    log_decay = torch.complex(-torch.rand(CHANNELS) / 5 - 0.01, 6 * torch.rand(CHANNELS))
    inputs.requires_grad_()
    log_decay = log_decay.to(device).requires_grad_()
    return lambda: recurrence(inputs, log_decay).abs().sum().backward()


def epoch(recurrence, data, n_items, options, device):
    """A function that trains one epoch."""
    torch.manual_seed(0)
    model = lrurec.LRURec(n_items, None, options).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def train():
        with mock.patch.object(lrurec, "linear_recurrence", recurrence):
            for inputs, targets in data.training_batches(options, generator):
                loss = next_item_loss(
                    model, inputs.to(device), targets.to(device), "cross_entropy", generator
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return train


def compare(length, args, device):
    """Rows of the report for one length of sequences."""
    generator = torch.Generator().manual_seed(length)
    sequences = torch.randint(1, args.items + 1, (args.users, length + 1), generator=generator)
    numbers = {str(n): n for n in range(1, args.items + 1)}
    data = SequenceData(numbers, sequences.tolist())
    options = SimpleNamespace(
        width=WIDTH, layers=2, dropout=0.2, item_ids=True, max_length=length, batch_size=args.batch
    )
    cases = {
        "recurrence": {
            name: states_and_gradients(recurrence, length, args.batch, device)
            for name, recurrence in RECURRENCES.items()
        },
        "epoch": {
            name: epoch(recurrence, data, args.items, options, device)
            for name, recurrence in RECURRENCES.items()
        },
    }
    rows = []
    for case, works in cases.items():
        seconds, _ = timed_interleaved(works, args.repeats)
        row = {"case": f"{case}, length {length}"}
        row |= {f"{name}_s": round(value, 4) for name, value in seconds.items()}
        rows.append(row | {"ratio": round(seconds["baseline"] / seconds["ours"], 2)})
        print_row(rows[-1])
    return rows


def parse_arguments(argv):
    parser = new_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--users", type=int, default=128, help="sequences in an epoch")
    parser.add_argument("--items", type=int, default=3650, help="of the catalogue")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--repeats", type=int, default=3)
    return parse(parser, argv)


def main(argv=None):
    args, device = parse_arguments(argv), pick_device()
    rows = [row for length in args.lengths for row in compare(length, args, device)]
    write_report("recurrence", rows, users=args.users, items=args.items, batch=args.batch)


if __name__ == "__main__":
    run_main(main)
