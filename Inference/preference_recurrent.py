"""Stage 3: a frozen LLM reads a history block by block and keeps rewriting the user's preference.

(Paper, "Recurrent User Preference Inference".)

In:  {data_dir}/users.jsonl, {data_dir}/items.jsonl, {output_dir}/{system}/image_summaries.jsonl
Out: {output_dir}/{system}/user_preferences.jsonl   user_id, preference,
                                                    blocks: [{items, preference}, ...]

    python Inference/preference_recurrent.py --config configs/microlens.yaml

Only the history is read, never the target. `blocks` holds the whole recurrence. An interrupted run
resumes. Sample: 1,100 users in about 20 seconds on 2 CPU cores. Llama-3-8B: a GPU; its weights take
16 GB in bfloat16; 60 users in 73 s on an H200 (docs/benchmarks.md).
"""

from mllmrec.stage.main import run_main

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass

from mllmrec.generation.preferences import (
    PreferenceOptions,
    UserHistory,
    open_preferences,
    read_histories,
)
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import check_template
from mllmrec.stage.options import option, parse_options, print_next, print_options

if TYPE_CHECKING:
    from mllmrec.generation.dialogues import Dialogue
    from mllmrec.generation.prompt_writer import PromptWriter

SECTION = "preference"


@dataclass
class Options(PreferenceOptions):
    block_size: int = option(3, "items per block (paper: 3 is best)", ge=1)
    next_prompt: str = option(prompts.PREFERENCE_NEXT, "template of a history's later blocks")


def recurrent_preference(user: UserHistory, writer: "PromptWriter", options: Options) -> "Dialogue":
    """The recurrence of one user: P_k = LLM(P_{k-1}, block k); the last P is the preference.

    user: oldest item first. The first block is read without a preference, each later one together
    with the preference that the model wrote before. Each `yield` hands a prompt to the engine and
    receives the text that the model generated.
    """
    preference, blocks = None, []
    for start in range(0, len(user.items), options.block_size):
        block = user.items[start : start + options.block_size]
        if preference is None:
            preference = yield writer.history_prompt(options.first_prompt, block)
        else:
            preference = yield writer.history_prompt(
                options.next_prompt, block, preference=preference
            )
        blocks.append({"items": [item.item_id for item in block], "preference": preference})
    return {**user.ids, "preference": preference, "blocks": blocks, **writer.nonzero_counts()}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 3, user preferences, recurrent")
    check_template(options.next_prompt, options.domain, ["user_id"], "block", "preference")
    histories = read_histories(options)  # of each user: titles and image summaries, oldest first
    output = open_preferences(histories, "preference_recurrent", options)
    if not output.is_up_to_date():
        # Imported here, so that --help and a missing input are answered at once.
        from mllmrec.generation.preference_run import run_preferences

        def n_blocks(user: UserHistory) -> int:
            return math.ceil(len(user.items) / options.block_size)

        run_preferences(histories, output, recurrent_preference, n_blocks, options)
    print_next("scripts/04_datasets.sh", options.config, options.words)


if __name__ == "__main__":
    run_main(main)
