"""Running stage 3: the users' dialogues on an engine, their preferences as rows."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mllmrec.generation.dialogues import Dialogue
from mllmrec.generation.engine import load_engine
from mllmrec.generation.preferences import PreferenceOptions, UserHistory
from mllmrec.generation.prompt_writer import PromptWriter
from mllmrec.generation.text_quality import measure_texts, report_quality, warn_of_long_texts
from mllmrec.stage.errors import InputError
from mllmrec.stage.output import RowId, RowOutput
from mllmrec.stage.progress import progress_bar


def run_preferences(
    histories: Mapping[RowId, UserHistory],
    output: RowOutput,
    new_dialogue: Callable[[UserHistory, PromptWriter, Any], Dialogue],
    n_texts: Callable[[UserHistory], int],
    options: PreferenceOptions,
) -> None:
    """Write the preferences that `output` lacks.

    new_dialogue: (user, writer, options) -> the dialogue that makes the user's row; n_texts: how
    many texts it takes, for the progress, since most users are finished only at the end.
    """
    engine, max_prompt_tokens = load_engine(options.model, options, multimodal=False)
    longest = min(options.max_prompt_tokens or max_prompt_tokens, max_prompt_tokens)
    new_writer = partial(
        PromptWriter, engine.chat, longest, options.domain, block_line=options.block_line
    )
    dialogues = (
        (user, new_dialogue(histories[user], new_writer(histories[user].ids), options))
        for user in output.todo
    )
    measure_texts(output, "preference", options.first_prompt, engine)
    warn_of_long_texts(engine.chat, options)
    texts = sum(n_texts(histories[user]) for user in output.todo)
    progress = progress_bar(texts, "preferences", "block")
    results = engine.run(dialogues, progress)
    output.write_results(results, "preferences", "user", progress)
    if output.is_complete and not output.n_rows:
        raise InputError(f"no user has a preference; {output.rejected_path} says why")
    report_quality(output)
