"""Stage 3 without the recurrence: the whole history in one prompt (paper, ablation study).

In and out are those of `preference_recurrent.py`, with one block that holds the whole history. Give it an --output_dir of
its own, and --summaries to read the summaries that are there already:

    python Inference/preference_direct.py --config configs/microlens.yaml \\
        --output_dir outputs/microlens_direct --summaries outputs/microlens/image_summaries.jsonl

A history that is too long for the model loses its oldest items first; the line then counts them as `items_left_out`.
Llama-3-8B: a GPU; its weights take 16 GB in bfloat16; memory and time: not measured yet.
"""

from dataclasses import dataclass

from data_processing import prompts
from data_processing.config import option, parse_args, show
from data_processing.errors import run
from Inference.preferences import PreferenceArgs, infer_preferences


@dataclass
class Args(PreferenceArgs):
    block_size: int = option(3, "not used here; the recurrent form's option in the same section")
    next_prompt: str = option(prompts.PREFERENCE_NEXT, "not used here, likewise")


def direct_preference(history, ask, args):
    """One user's preference from one prompt over the whole history.

    history: list of (item_id, title, summary), oldest first. The oldest items give way until the prompt fits without
    cutting any text; only a single item's text is ever cut.
    """
    for start in range(len(history)):
        prompt = ask(args.first_prompt, history[start:], may_cut=start == len(history) - 1)
        if prompt is not None:
            break
    preference = yield prompt
    result = {"preference": preference, "blocks": [{"items": [i for i, _, _ in history[start:]], "preference": preference}]}
    return {**result, "items_left_out": start} if start else result


def main(argv=None):
    args = parse_args(Args, "preference", argv, __doc__)
    show(args, "stage 3, user preferences, direct (the ablation without recurrence)")
    infer_preferences(args, direct_preference)
    print(f"next: bash scripts/04_datasets.sh {args.config} --output_dir {args.output_dir}")


if __name__ == "__main__":
    run(main)
