"""Baseline SASRec: self-attention over the items of a history.

(Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018; MLLM-MSR's Table 3.)

In:  {data_dir}/users.jsonl, items.jsonl
     {output_dir}/mllm_msr/image_summaries.jsonl    only with --features summary
Out: {output_dir}/baselines/sasrec/scores.jsonl     score = log-probability of being the next item

    python MLLM-MSR/baselines/sasrec.py --config configs/microlens.yaml
    python MLLM-MSR/baselines/sasrec.py --config configs/microlens.yaml --loss bce
    python MLLM-MSR/baselines/sasrec.py --config configs/microlens.yaml --features title

As published, but: cross-entropy over all items by default (`--loss bce` is the published loss, with
one negative), and layer norm before the blocks' parts. With --features it is SASRec-F: an item's
vector is a learned one plus a linear map of frozen text embeddings. Learns from training users;
the epoch is chosen on validation users. MicroLens-50k: see docs/results.md.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from mllmrec.sequential.sequential_options import SequentialOptions
from mllmrec.stage.options import option, parse_options, print_options

SECTION = "sasrec"


@dataclass
class Options(SequentialOptions):
    layers: int = option(2, "blocks of attention and feed-forward (published: 2)", ge=1, le=64)
    heads: int = option(2, "attention heads (published: 1)", ge=1)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "baseline: SASRec")
    # Imported here, so that --help and a wrong option are answered at once.
    from mllmrec.sequential.baseline_run import run_baseline
    from mllmrec.sequential.sasrec_model import SASRec

    run_baseline("sasrec", SASRec, options)


if __name__ == "__main__":
    run_main(main)
