"""Stage 3: a frozen LLM reads a history block by block and keeps rewriting the user's preference.

(Paper, "Recurrent User Preference Inference".)

In:  {data_dir}/users.jsonl, {data_dir}/items.jsonl, {output_dir}/{system}/image_summaries.jsonl
Out: {output_dir}/{system}/user_preferences.jsonl   user_id, preference,
                                                    blocks: [{items, preference}, ...]

    python Inference/preference_recurrent.py --config configs/microlens.yaml

Only the history is read, never the target. `blocks` holds the whole recurrence. An interrupted run
resumes. Sample: 1,100 users in about 20 seconds on 2 CPU cores. Llama-3-8B: a GPU; its weights take
16 GB in bfloat16; 60 users in 73 s on an H200
(docs/benchmarks.md).
"""

from mllmrec.stage.main import run_main

import math
from functools import partial

from pydantic.dataclasses import dataclass

from mllmrec.generation.preferences import PreferenceOptions, open_preferences, read_histories
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.progress import progress_bar

SECTION = "preference"


@dataclass
class Options(PreferenceOptions):
    block_size: int = option(3, "items per block (paper: 3 is best)", ge=1)
    next_prompt: str = option(prompts.PREFERENCE_NEXT, "template of a history's later blocks")


def recurrent_preference(user, writer, options):
    """The recurrence of one user: P_k = LLM(P_{k-1}, block k); the last P is the preference.

    user: UserHistory, oldest item first; writer: PromptWriter. The first block is read without a
    preference, each later one together with the preference that the model wrote before. Each
    `yield` hands a prompt to the engine and receives the text that the model generated.
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


def n_blocks(user, options):
    """How many texts a user's recurrence takes."""
    return math.ceil(len(user.items) / options.block_size)


def main(argv=None):
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 3, user preferences, recurrent")
    histories = read_histories(options)
    output = open_preferences(histories, options)
    if not output.is_up_to_date():
        # Imported here, so that --help and a missing input are answered at once.
        from mllmrec.generation.engine import load_engine, run_dialogues
        from mllmrec.generation.prompt_writer import PromptWriter
        from mllmrec.generation.text_quality import (
            measure_texts,
            report_quality,
            warn_of_long_texts,
        )

        engine, limit = load_engine(options.model, options, multimodal=False)
        limit = min(options.max_prompt_tokens or limit, limit)
        new_writer = partial(
            PromptWriter, engine.chat, limit, options.domain, block_line=options.block_line
        )
        dialogues = (
            (user, recurrent_preference(histories[user], new_writer(histories[user].ids), options))
            for user in output.todo
        )
        measure_texts(output, "preference", options.first_prompt, engine)
        warn_of_long_texts(engine.chat, options)
        # Blocks are known in advance; users would be finished only at the end.
        blocks = sum(n_blocks(histories[user], options) for user in output.todo)
        progress = progress_bar(blocks, "preferences", "block")
        results = run_dialogues(engine, dialogues, progress)
        output.write_results(results, "preferences", "user", progress)
        report_quality(output)
    print(f"next: bash scripts/04_datasets.sh {options.config}")


if __name__ == "__main__":
    run_main(main)
