"""Baseline GRU4Rec: a recurrent network over the items of a history.

(Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks", ICLR 2016;
MLLM-MSR's Table 3 and preliminary study.)

In:  {data_dir}/users.jsonl, items.jsonl
     {output_dir}/mllm_msr/image_summaries.jsonl    only with --features summary
Out: {output_dir}/baselines/gru4rec/scores.jsonl    score = log-probability of being the next item

    python MLLM-MSR/baselines/gru4rec.py --config configs/microlens.yaml
    python MLLM-MSR/baselines/gru4rec.py --config configs/microlens.yaml --features title

As published, but: cross-entropy over all items instead of a ranking loss over the batch's items,
and whole histories instead of session-parallel batches. With --features it is GRU4Rec-F; with
--features summary --item_ids false the preliminary study's, on image summaries alone. Learns from
training users only; the epoch is chosen on validation users. MicroLens-50k: see docs/results.md.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from mllmrec.sequential.sequential_options import SequentialOptions
from mllmrec.stage.options import option, parse_options, print_options

SECTION = "gru4rec"


@dataclass
class Options(SequentialOptions):
    layers: int = option(1, "recurrent layers (published: 1)", ge=1, le=64)
    hidden: int = option(
        128, "width of the recurrent state (published: 100 and more)", ge=1, le=4096
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "baseline: GRU4Rec")
    # Imported here, so that --help and a wrong option are answered at once.
    from mllmrec.sequential.baseline_run import run_baseline
    from mllmrec.sequential.gru4rec_model import GRU4Rec

    run_baseline("gru4rec", GRU4Rec, options)


if __name__ == "__main__":
    run_main(main)
