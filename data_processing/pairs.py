"""The lines of train.jsonl, validation.jsonl and test.jsonl: one (user, candidate) pair each, as chat turns.

One builder serves training and scoring, so what the model is trained on is what it is asked later, plus the answer.
"""

import functools
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_processing import prompts
from data_processing.candidates import candidates
from data_processing.config import CommonArgs, option
from data_processing.errors import InputError
from data_processing.images import ImageError, image_size, open_image
from data_processing.jsonl import read_by_id, relative_path, require, write_rejected, write_rows
from data_processing.prompts import ANSWERS, answer_turn, cut, fill, plain_text, user_turn
from data_processing.run_record import digests, is_up_to_date, settings_of, write_record

_PREFERENCE = "\0"  # stands where the preference will be; no title can hold it, `plain_text` leaves no such character


@dataclass
class PairArgs(CommonArgs):
    preferences: str = option("", "default: {output_dir}/user_preferences.jsonl")
    recommend_prompt: str = option(prompts.RECOMMEND, "template of the yes/no question")
    max_title_characters: int = option(300, "longer titles lose their tail, 0 = no limit; a few real ones are whole pages")


def question(title, preference, domain, template=prompts.RECOMMEND):
    """(text, [start, end]): the yes/no question, and where in it the preference stands - all that may be shortened."""
    text = fill(template, domain, title=plain_text(title), preference=_PREFERENCE)
    start, preference = text.index(_PREFERENCE), plain_text(preference)
    return text.replace(_PREFERENCE, preference), [start, start + len(preference)]


def pair_row(user_id, item, label, image, preference, args, with_answer):
    """One line. image: path relative to the file that the line goes to; messages: Hugging Face multimodal chat turns."""
    title = cut(item["title"], args.max_title_characters) if args.max_title_characters else item["title"]
    text, span = question(title, preference, args.domain, args.recommend_prompt)
    messages = [user_turn(text, images=1), *([answer_turn(ANSWERS[label])] if with_answer else [])]
    return {
        "user_id": user_id,
        "item_id": item["item_id"],
        "label": label,
        "images": [image],
        "messages": messages,
        "preference_span": span,
    }


def with_preference(row, preference):
    """A line with another preference in its question; answers are left out."""
    turn, (start, end) = row["messages"][0], row["preference_span"]
    *pictures, question = turn["content"]
    text = question["text"][:start] + preference + question["text"][end:]
    return {
        **row,
        "messages": [{**turn, "content": [*pictures, {"type": "text", "text": text}]}],
        "preference_span": [start, start + len(preference)],
    }


def first_users(rows, n):
    """The lines of the first `n` users, each with the whole candidate list; 0 = all."""
    users = set(list(dict.fromkeys(row["user_id"] for row in rows))[: n or None])
    return [row for row in rows if row["user_id"] in users]


def check_pairs(rows, path):
    """Checks lines that have answers, before a model is loaded for them. Returns dict picture's path -> (width, height).

    Raises InputError that names the line for a label that is not 0 or 1, an answer that is not the label's, a line without
    exactly one picture, and a picture that is gone or has no readable header.
    """
    sizes = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, line {number}"
        again = "make the file again with scripts/04_datasets.sh"
        if row["label"] not in ANSWERS:
            raise InputError(f"{where}: the label is {row['label']!r}, it must be 0 or 1; {again}")
        answer = "".join(part.get("text", "") for turn in row["messages"][1:] for part in turn["content"])
        if answer != ANSWERS[row["label"]]:
            wanted = ANSWERS[row["label"]]
            raise InputError(f"{where}: the answer is {answer[:40]!r}, for the label {row['label']} it must be {wanted!r}; {again}")
        if len(row["images"]) != 1:
            raise InputError(f"{where}: there are {len(row['images'])} pictures, there must be one; {again}")
        image = Path(path).parent / row["images"][0]
        if image not in sizes:
            try:
                sizes[image] = image_size(image)
            except ImageError as reason:
                raise InputError(f"{where}: image {row['images'][0]}: {reason}; restore it, or {again}") from None
    return sizes


def input_paths(args):
    """users.jsonl, items.jsonl and user_preferences.jsonl as `args` names them."""
    preferences = Path(args.preferences or Path(args.output_dir) / "user_preferences.jsonl")
    return Path(args.data_dir) / "users.jsonl", Path(args.data_dir) / "items.jsonl", preferences


def make_splits(splits, args, with_answer):
    """Writes {output_dir}/{split}.jsonl for each of `splits`, unless nothing has changed since they were written."""
    started = time.monotonic()
    inputs, settings = digests(*map(require, input_paths(args))), settings_of(args, ("preferences",), limit=args.limit)
    outputs = [Path(args.output_dir) / f"{split}.jsonl" for split in splits]
    if all(is_up_to_date([path], settings, inputs, args.overwrite) for path in outputs):
        print(f"{outputs[0]} is up to date, nothing to do")
        return
    maker = _PairMaker(args, with_answer)
    for split, path in zip(splits, outputs, strict=True):
        rows = maker.write(split, path)
        write_record(path, args, settings, inputs, time.monotonic() - started, rows)


class _PairMaker:
    """Users become pairs, whole or not at all, so that every list that is scored has all its candidates."""

    def __init__(self, args, with_answer):
        self.args, self.with_answer = args, with_answer
        self.users_path, self.items_path, self.preferences_path = input_paths(args)
        self.users, self.items = read_by_id(self.users_path, "user_id"), read_by_id(self.items_path, "item_id")
        self.preferences = read_by_id(self.preferences_path, "user_id")
        rejected = self.preferences_path.with_suffix(".rejected.jsonl")
        self.without_preference = read_by_id(rejected, "user_id") if rejected.exists() else {}

    def write(self, split, path):
        """Writes the pairs of one split; users set aside go to {split}.rejected.jsonl. Returns the counts."""
        users = [user for user in self.users.values() if user["split"] == split]
        users = users[: self.args.limit] if self.args.limit > 0 else users
        counts, refused, limit = Counter(rows=0, users=0, rejected=0), [], self.args.max_title_characters

        def lines():
            for user in tqdm(users, desc=f"{split} pairs", unit="user"):
                rows, reason = self.rows_of(user, path)
                if reason:
                    refused.append({"user_id": user["user_id"], "reason": reason})
                    counts["rejected"] += 1
                    continue
                counts["rows"] += len(rows)
                counts["users"] += 1
                counts["titles_shortened"] += sum(0 < limit < len(self.items[row["item_id"]]["title"]) for row in rows)
                yield from rows

        write_rows(path, lines())
        rejected_path = path.with_suffix(".rejected.jsonl")
        write_rejected(rejected_path, refused)
        note = f"; {len(refused):,} users were set aside, each with its reason in {rejected_path}" if refused else ""
        note += f"; {counts['titles_shortened']:,} times a title was shortened" if counts["titles_shortened"] else ""
        print(f"wrote {path}: {counts['rows']:,} pairs of {counts['users']:,} users{note}")
        return counts

    @functools.cache  # noqa: B019 - lives as long as the stage; an item is offered to many users
    def image_problem(self, image):
        """Why the picture cannot be used, or None: better told here than by the GPU stages."""
        if image is None:
            return "it has no image"
        try:
            open_image(image)
        except ImageError as reason:
            return f"image {image.name}: {reason}"
        return None

    def rows_of(self, user, path):
        """(lines of one user, None), or (None, reason) if the preference or a candidate's image is missing."""
        user_id, rows = user["user_id"], []
        if user_id in self.without_preference:
            return None, f"no preference: {self.without_preference[user_id]['reason']}"
        if user_id not in self.preferences:
            raise InputError(f"user {user_id!r} has no line in {self.preferences_path}; finish stage 3 with scripts/03_preference.sh")
        preference = self.preferences[user_id]["preference"]
        for item_id, label in candidates(user):
            if item_id not in self.items:
                raise InputError(
                    f"{self.users_path}: item {item_id!r} is not in {self.items_path}; scripts/01_prepare_data.sh makes both again"
                )
            item = self.items[item_id]
            image = self.items_path.parent / item["image"] if item["image"] else None
            problem = self.image_problem(image)
            if problem:
                return None, f"candidate {item_id}: {problem}"
            rows.append(pair_row(user_id, item, label, relative_path(image, path), preference, self.args, self.with_answer))
        return rows, None
