"""Stage 3 without the recurrence: the whole history in one prompt (paper, ablation study).

In and out are those of `preference_recurrent.py`, with one block that holds the whole history. Give
it an --output_dir of its own, and --summaries to read the existing summaries:

    python Inference/preference_direct.py --config configs/microlens.yaml \\
        --output_dir outputs/microlens_direct \\
        --summaries outputs/microlens/mllm_msr/image_summaries.jsonl

A history that is too long for the model loses its oldest items first; the row then counts them as
`items_left_out`. Llama-3-8B: a GPU; its weights take 16 GB in bfloat16; memory and time: not
measured yet.
"""

from mllmrec.stage.main import run_main

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
from mllmrec.stage.options import option, parse_options, print_next, print_options

if TYPE_CHECKING:
    from mllmrec.generation.dialogues import Dialogue
    from mllmrec.generation.prompt_writer import PromptWriter

SECTION = "preference"


@dataclass
class Options(PreferenceOptions):
    block_size: int = option(3, "not used; option of the recurrent form in the same section", ge=1)
    next_prompt: str = option(prompts.PREFERENCE_NEXT, "not used, likewise")


def direct_preference(user: UserHistory, writer: "PromptWriter", options: Options) -> "Dialogue":
    """One user's preference from one prompt over the whole history, oldest item first.

    The oldest items are left out until the prompt fits without shortening a text; only the text of
    a single last item is ever shortened.
    """
    start = 0
    while start < len(user.items) - 1 and not writer.fits_whole(
        options.first_prompt, user.items[start:]
    ):
        start += 1
    items = user.items[start:]
    preference = yield writer.history_prompt(options.first_prompt, items)
    block = {"items": [item.item_id for item in items], "preference": preference}
    left_out = {"items_left_out": start} if start else {}
    counts = left_out | writer.nonzero_counts()
    return {**user.ids, "preference": preference, "blocks": [block], **counts}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 3, user preferences, direct (ablation)")
    histories = read_histories(options)
    output = open_preferences(histories, "preference_direct", options)
    if not output.is_up_to_date():
        # Imported here, so that --help and a missing input are answered at once.
        from mllmrec.generation.preference_run import run_preferences

        run_preferences(histories, output, direct_preference, lambda user: 1, options)
    print_next("scripts/04_datasets.sh", options.config, options.words)


if __name__ == "__main__":
    run_main(main)
