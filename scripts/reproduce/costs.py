"""What it takes to rank one user's candidates: requests, tokens, seconds."""

from dataclasses import asdict, fields
from functools import partial

from mllmrec.generation.preferences import read_histories
from mllmrec.generation.prompt_writer import PromptWriter
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_processor, read_config
from mllmrec.ranking.options import RankerOptions
from mllmrec.ranking.reader import RowReader, chat_processor
from mllmrec.ranking.token_counts import TokenCounts, dialogue_tokens, scoring_tokens
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script


def costs_per_user(row, folder):
    """{name of TokenCounts or "seconds": mean over the users} of a row that ran in `folder`.

    The tokens are those of its scores and, where it needs them, of the users' preferences.
    """
    scores = folder / row.scores / "scores.jsonl"
    record = read_record(scores)
    users = len({line["user_id"] for line in read_rows(scores)})
    # A sequential baseline trains and scores in one stage.
    costs = {"seconds": record.get("scoring_seconds", record["seconds"]) / users}
    counts = TokenCounts()
    if "model" in record["arguments"]:
        counts = scored_tokens(scores.parent.parent / "test.jsonl", record["arguments"])
    for name, value in asdict(counts).items():
        costs[name] = value / users
    if row.preferences:
        path = folder / row.preferences
        record = read_record(path)
        users, counts = preference_tokens(path, record["arguments"])
        costs["seconds"] += record["seconds"] / users
        for name, value in asdict(counts).items():
            costs[name] += value / users
    return costs


def options_of(options_class, arguments):
    """The options of a run, from the arguments of its record."""
    names = {field.name for field in fields(options_class)}
    return options_class(**{name: arguments[name] for name in names & set(arguments)})


def scored_tokens(path, arguments):
    """TokenCounts of scoring the rows of test.jsonl."""
    options = options_of(RankerOptions, arguments)
    chat = chat_processor(load_processor(options.model, options), options)
    reader = RowReader(chat, path.parent, options.max_text_tokens)
    return scoring_tokens(read_rows(path), reader, arguments["reuse_prefix"])


def preference_tokens(path, arguments):
    """(users, TokenCounts) of the recurrence that wrote user_preferences.jsonl."""
    stage = load_script("Inference/preference_recurrent.py")
    options = options_of(stage.Options, arguments)
    processor = load_processor(options.model, options)
    chat = ChatProcessor(processor, prompt_format=options.prompt_format)
    rows, histories = read_rows(path), read_histories(options)
    longest = read_config(options.model).max_position_embeddings
    limit = options.max_prompt_tokens or longest - options.max_new_tokens
    new_writer = partial(PromptWriter, chat, limit, options.domain, block_line=options.block_line)
    dialogues = (
        (
            stage.recurrent_preference(histories[row["user_id"]], new_writer(None), options),
            [block["preference"] for block in row["blocks"]],
        )
        for row in rows
    )
    return len(rows), dialogue_tokens(dialogues, chat, options.max_new_tokens)
