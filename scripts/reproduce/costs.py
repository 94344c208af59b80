"""What it takes to rank one user's candidates: requests, tokens, seconds."""

from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from definitions import TableRow

from mllmrec.generation.dialogues import Dialogue
from mllmrec.generation.engine import load_chat
from mllmrec.generation.preferences import read_histories
from mllmrec.generation.prompt_writer import PromptWriter
from mllmrec.models.processors import load_processor
from mllmrec.ranking.reader import RowReader, chat_processor
from mllmrec.ranking.token_counts import TokenCounts, dialogue_tokens, scoring_tokens
from mllmrec.ranking.training_options import RankerOptions
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.record import read_record
from mllmrec.stage.schema import Row
from mllmrec.stage.scripts import load_script

# Stage script of a user_preferences.jsonl -> its function that makes a user's dialogue.
DIALOGUES = {
    "preference_recurrent": "recurrent_preference",
    "preference_direct": "direct_preference",
}


def costs_per_user(row: TableRow, folder: Path) -> dict[str, float]:
    """{name of TokenCounts or "seconds": mean over the users} of a row that ran in `folder`.

    The tokens are those of its scores and, where it needs them, of the users' preferences.
    """
    parts = [scoring_costs(folder / row.scores / "scores.jsonl")]
    if row.preferences:
        parts.append(preference_costs(folder / row.preferences))
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def per_user(counts: TokenCounts, seconds: float, users: int) -> dict[str, float]:
    """Tokens and seconds of one user, the mean."""
    return {name: value / users for name, value in (asdict(counts) | {"seconds": seconds}).items()}


def options_of(options_class: Any, arguments: dict[str, Any]) -> Any:
    """The options of a run, from the arguments of its record."""
    names = {field.name for field in fields(options_class)}
    return options_class(**{name: arguments[name] for name in names & set(arguments)})


def scoring_costs(scores: Path) -> dict[str, float]:
    """Costs of the run that wrote scores.jsonl from test.jsonl."""
    record, counts = read_record(scores) or {}, TokenCounts()
    arguments = record["arguments"]
    if "model" in arguments:
        options, rows = options_of(RankerOptions, arguments), scores.parent.parent / "test.jsonl"
        chat = chat_processor(load_processor(options.model, options), options)
        reader = RowReader(chat, rows.parent, options.max_text_tokens)
        counts = scoring_tokens(read_rows(rows), reader, arguments["reuse_prefix"])
    # A sequential baseline trains and scores in one stage.
    seconds = record.get("scoring_seconds", record["seconds"])
    return per_user(counts, seconds, len({line["user_id"] for line in read_rows(scores)}))


def preference_costs(path: Path) -> dict[str, float]:
    """Costs of the dialogues that wrote user_preferences.jsonl."""
    record = read_record(path) or {}
    stage = load_script(f"Inference/{record['stage']}.py")
    new_dialogue = getattr(stage, DIALOGUES[record["stage"]])
    options = options_of(stage.Options, record["arguments"])
    chat, limit = load_chat(options.model, options)
    limit = min(options.max_prompt_tokens or limit, limit)
    new_writer = partial(PromptWriter, chat, limit, options.domain, block_line=options.block_line)
    rows, histories = read_rows(path), read_histories(options)

    def dialogue(row: Row) -> tuple[Dialogue, list[str]]:
        user = histories[row["user_id"]]
        texts = [block["preference"] for block in row["blocks"]]
        return new_dialogue(user, new_writer(user.ids), options), texts

    counts = dialogue_tokens(map(dialogue, rows), chat, options.max_new_tokens)
    return per_user(counts, record["seconds"], len(rows))
