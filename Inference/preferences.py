"""What stage 3 shares between its recurrent and its direct form: options, texts of a history, the loop over users."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_processing import prompts
from data_processing.config import ModelArgs, option
from data_processing.errors import InputError
from data_processing.jsonl import read_by_id
from data_processing.prompts import block_text, fill, plain_text
from data_processing.run_record import digests, settings_of
from data_processing.stage_output import SHORTENED, StageOutput

# Another value of these gives the same preferences (in float32).
SPEED_OPTIONS = ("batch_tokens", "batching", "summaries", "retry_rejected")
COUNTED = SHORTENED | {"items_left_out": "items were left out of a prompt"}


@dataclass
class PreferenceArgs(ModelArgs):
    model: str = option("meta-llama/Meta-Llama-3-8B-Instruct", "chat model, hub id or folder (paper: Llama-3-8B-Instruct)")
    summaries: str = option("", "default: {output_dir}/image_summaries.jsonl")
    max_new_tokens: int = option(1024, "length of a preference (released code: 1024)")
    max_prompt_tokens: int = option(0, "0: as many as the model can take beside the answer")
    temperature: float = option(0.6, "0 = greedy (released code: 0.6)")
    top_p: float = option(0.9, "nucleus sampling, used if temperature > 0 (released code: 0.9)")
    batch_tokens: int = option(0, "tokens in a batch, answers counted; 0: what a GPU's free memory holds, 32,768 on a CPU")
    batching: Literal["auto", "continuous", "batches"] = option(
        "auto", "continuous: a finished text's place is taken at once; batches: of like length; auto: continuous with FlashAttention"
    )
    retry_rejected: bool = option(False, "try users again that were set aside earlier")
    first_prompt: str = option(prompts.PREFERENCE_FIRST, "template of a history's first block")


def read_histories(args):
    """(users by id, items by id, summaries by id): checked so that every item of every history is known.

    An item that stage 2 has set aside has an empty summary: its title speaks alone. Raises InputError for an item that
    is unknown or that stage 2 has not reached, and for an empty history.
    """
    users_path, items_path, summaries_path = input_paths(args)
    users, items = read_by_id(users_path, "user_id"), read_by_id(items_path, "item_id")
    summaries = {item_id: row["summary"] for item_id, row in read_by_id(summaries_path, "item_id").items()}
    rejected = summaries_path.with_suffix(".rejected.jsonl")
    if rejected.exists():
        summaries |= dict.fromkeys(read_by_id(rejected, "item_id"), "")
    for number, user in enumerate(list(users.values())[: args.limit or None], start=1):
        where = f"{users_path}, line {number}"
        if not user["history"]:
            raise InputError(f"{where}: user {user['user_id']!r} has an empty history; scripts/01_prepare_data.sh makes the file again")
        for item_id in user["history"]:
            if item_id not in items:
                raise InputError(f"{where}: item {item_id!r} is not in {items_path}; scripts/01_prepare_data.sh makes both again")
            if item_id not in summaries:
                raise InputError(f"{where}: item {item_id!r} has no line in {summaries_path}; finish scripts/02_image_summary.sh")
    return users, items, summaries


def input_paths(args):
    summaries = Path(args.summaries or Path(args.output_dir) / "image_summaries.jsonl")
    return Path(args.data_dir) / "users.jsonl", Path(args.data_dir) / "items.jsonl", summaries


def infer_preferences(args, dialogue_of):
    """Runs stage 3 for all users: checks, loads the model, plays one dialogue per user, writes user_preferences.jsonl.

    dialogue_of: (history, ask, args) -> dialogue that returns {preference, blocks}; history: list of (item_id, title,
    summary), oldest first; ask: see `Asker.ask`.
    """
    users, items, summaries = read_histories(args)
    path = Path(args.output_dir) / "user_preferences.jsonl"
    settings, inputs = settings_of(args, SPEED_OPTIONS), digests(*input_paths(args), args.model)
    output = StageOutput(path, "user_id", users, args, settings, inputs, args.retry_rejected, counted=COUNTED)
    if output.finished:
        print(f"{path} is up to date, nothing to do")
        return
    # Imported here, so that --help and a missing input answer at once.
    from Inference.chat import Chat
    from Inference.engine import BATCHING, Engine, run_dialogues
    from Inference.models import load_text, room_for_prompts

    model, tokenizer = load_text(args.model, args.dtype, args.attention, args.quantization)
    chat = Chat(tokenizer)
    engine = Engine(model, chat, args.max_new_tokens, args.batch_tokens, args.temperature, args.top_p, args.seed, BATCHING[args.batching])
    room = room_for_prompts(model, args.max_new_tokens)
    limit = min(args.max_prompt_tokens or room, room)

    def dialogue(user_id):
        history = [(i, items[i]["title"], summaries[i]) for i in users[user_id]["history"]]
        asker = Asker(chat, limit, args.domain)
        result = yield from dialogue_of(history, asker.ask, args)
        return {"user_id": user_id, **result, **asker.cut}

    output.fill(run_dialogues(engine, ((u, dialogue(u)) for u in output.todo)), "preferences", "user")


class Asker:
    """Makes the prompts of one user and remembers how many had to be shortened."""

    def __init__(self, chat, limit, domain):
        self.chat, self.limit, self.domain = chat, limit, domain
        self.cut = Counter()

    def ask(self, template, part, may_cut=True, **texts):
        """The Prompt for one part of a history, at most `limit` tokens long: summaries give way first, then titles.

        Without `may_cut`, None where the prompt would be too long. Raises Refused if it is too long even without titles.
        """
        from Inference.chat import fit, user_turn
        from Inference.engine import Prompt, Refused

        def rendered(titles, summaries):
            lines = block_text(list(zip(titles, summaries, strict=True)), self.domain)
            filled = fill(template, self.domain, block=lines, **{name: plain_text(text) for name, text in texts.items()})
            return self.chat.render([user_turn(filled)])

        def fits(prompt):
            return self.chat.count(prompt) <= self.limit

        titles, summaries = [title for _, title, _ in part], [summary for _, _, summary in part]
        if not may_cut and not fits(rendered(titles, summaries)):
            return None
        prompt, was_cut = fit(lambda texts: rendered(titles, texts), summaries, fits)
        if was_cut:
            self.cut["shortened"] += 1
            if not fits(prompt):
                prompt, _ = fit(lambda texts: rendered(texts, [""] * len(texts)), titles, fits)
            if not fits(prompt):
                raise Refused(f"a prompt for {len(part)} items is longer than {self.limit} tokens even without titles")
        return Prompt(prompt, self.chat.count(prompt))
