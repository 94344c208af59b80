"""Stage 5: LoRA teaches the model to say yes or no to (preference, candidate).

(Paper, "Supervised Fine-Tuning".)

In:  {output_dir}/{system}/train.jsonl, validation.jsonl
Out, all in {output_dir}/{system}/:
     adapter/                  LoRA weights that plain PEFT loads, processor, run.json
     training_log.jsonl        step, epoch, loss, learning rate, validation AUC and HR@5
     training_curve.png        the same as a plot
     checkpoints/              what the same command resumes from
     training.rejected.jsonl   users with a question that is too long even without a preference

    python MLLM-MSR/train/train_llava_sft.py --config configs/microlens.yaml

A text model (`--model`) trains on rows without images. Sample: 552 steps in about 55 seconds on 2
CPU cores. LLaVA-v1.6-Mistral-7B: a GPU (README, "Which card for what"); 2 to 3 rows a second on an
H200 (docs/benchmarks.md).
"""

from mllmrec.stage.main import run_main

from pydantic.dataclasses import dataclass

from mllmrec.ranking.fine_tuning import fine_tune
from mllmrec.ranking.options import FineTuningOptions
from mllmrec.stage.options import parse_options, print_options

SECTION = "train"


@dataclass
class Options(FineTuningOptions):
    pass


def main(argv=None):
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 5, supervised fine-tuning")
    fine_tune(options)
    print(f"next: bash scripts/06_score.sh {options.config}")


if __name__ == "__main__":
    run_main(main)
