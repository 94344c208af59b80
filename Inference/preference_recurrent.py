"""Stage 3: a frozen LLM reads a user's history block by block and keeps rewriting the user's preference.

(Paper, "Recurrent User Preference Inference".)

In:  {data_dir}/users.jsonl, {data_dir}/items.jsonl, {output_dir}/image_summaries.jsonl
Out: {output_dir}/user_preferences.jsonl   user_id, preference, blocks: [{items, preference}, …]: the whole recurrence

    python Inference/preference_recurrent.py --config configs/microlens.yaml

Only the history is read, never the target. Started again, it goes on where it stopped.
Sample: 1,100 users in about 20 seconds on 2 CPU cores. Llama-3-8B: a GPU; its weights take 16 GB in bfloat16; memory and
time: not measured yet.
"""

from dataclasses import dataclass

from data_processing import prompts
from data_processing.config import option, parse_args, show
from data_processing.errors import run
from Inference.preferences import PreferenceArgs, infer_preferences


@dataclass
class Args(PreferenceArgs):
    block_size: int = option(3, "items per block (paper: 3 is best)")
    next_prompt: str = option(prompts.PREFERENCE_NEXT, "template of a history's later blocks")


def recurrent_preference(history, ask, args):
    """The recurrence of one user: P_k = LLM(P_{k-1}, block k); the last P is the preference.

    history: list of (item_id, title, summary), oldest first; ask: see `infer_preferences`. The first block is read
    without a preference, each later one together with the preference that the model wrote before.
    """
    preference, blocks = None, []
    for start in range(0, len(history), args.block_size):
        block = history[start : start + args.block_size]
        if preference is None:
            preference = yield ask(args.first_prompt, block)
        else:
            preference = yield ask(args.next_prompt, block, preference=preference)
        blocks.append({"items": [item_id for item_id, _, _ in block], "preference": preference})
    return {"preference": preference, "blocks": blocks}


def main(argv=None):
    args = parse_args(Args, "preference", argv, __doc__)
    show(args, "stage 3, user preferences, recurrent")
    infer_preferences(args, recurrent_preference)
    print(f"next: bash scripts/04_datasets.sh {args.config}")


if __name__ == "__main__":
    run(main)
