"""Rows as the model gets them: one reader for training and for scoring."""

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mllmrec.data.images import ImageError, open_image, pad_black, padded_sizes, size_or_none
from mllmrec.models.chat import ChatProcessor, shorten_to_fit
from mllmrec.models.loading import load_multimodal, load_text
from mllmrec.models.processors import one_line, read_config, takes_images
from mllmrec.models.trial import check_trial
from mllmrec.prompts.templates import valid_text
from mllmrec.ranking.answers import YES_NO, AnswerSet, AnswerTokens, answer_tokens
from mllmrec.ranking.rows import (
    MAKE_AGAIN,
    group_rows,
    item_ids,
    question_text,
    replace_preference,
    row_name,
)
from mllmrec.ranking.training_options import RankerOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike
from mllmrec.stage.schema import Row

TEMPLATE_TOKENS = 128  # more than a chat template adds to a question


def load_ranker(options: RankerOptions) -> tuple[Any, ChatProcessor]:
    """(model, ChatProcessor): a multimodal model, or a text model for rows without images."""
    config = read_config(options.model)
    single = options.image_tiles == "single"
    if single and config.model_type != "llava_next":
        raise InputError(
            f"--image_tiles single is for LLaVA-NeXT; the model {options.model} "
            f"({config.model_type}) has no tiles"
        )
    load = load_multimodal if takes_images(config) else load_text
    model, processor = load(options.model, options)
    if single:
        model.config.image_grid_pinpoints = [[0, 0]]  # no tile at all: only the whole image is left
    chat = chat_processor(processor, options)
    check_trial(options.model, model, chat)
    return model, chat


def chat_processor(processor: Any, options: RankerOptions) -> ChatProcessor:
    """The processor as a ranker uses it."""
    return ChatProcessor(processor, options.image_tiles == "single", options.prompt_format)


def _key(row: Row) -> tuple[str, ...]:
    return (row["user_id"], *item_ids(row))


class PromptTooLongError(InputError):
    """A question that does not fit; the message says which one and gives the remedy."""


class _Fitted(NamedTuple):
    """A row whose question fits, its rendered question, and that question's token ids."""

    row: Row
    prompt: str
    ids: list[int]
    was_shortened: bool


class RowReader:
    """Prompts and images of the rows of one file.

    folder: of the file (image paths are relative to it); max_text_tokens: how long the text of a
    prompt may be, its image counted as one token (0: no limit); longer texts lose the tail of the
    preference. gray_images: every image is replaced by a gray one of the same size, to measure what
    images contribute. shortened: number of prompts that were shortened.

    Markers in questions are broken again, for this model's tokenizer, and token ids are checked:
    rows may have been edited by hand.
    """

    def __init__(
        self,
        chat: ChatProcessor,
        folder: PathLike,
        max_text_tokens: int = 0,
        gray_images: bool = False,
        answers: AnswerSet = YES_NO,
    ) -> None:
        self.chat, self.folder, self.max_text_tokens = chat, Path(folder), max_text_tokens
        self.gray_images, self.answers = gray_images, answers
        self.shortened = 0
        self._padded: dict[tuple[str, ...], tuple[int, int] | None] = {}

    @property
    def pads_images(self) -> bool:
        """True if a row's image depends on the rows beside it, see `pad_images`."""
        return bool(self._padded)

    def pad_images(self, rows: Sequence[Row], n: int) -> None:
        """From now on pad the images of each `n` consecutive rows of `rows` with black, to the
        largest (released code: 6 rows in scoring, 12 without adapter); 0: as they are.
        """
        if n:
            paths = [self.folder / row["images"][0] if row["images"] else None for row in rows]
            sizes = padded_sizes(paths, n)
            self._padded = {_key(row): size for row, size in zip(rows, sizes, strict=True)}

    def groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """Indices of `rows`, those together whose prompts start alike, with the same image."""
        return [[n] for n in range(len(rows))] if self.pads_images else group_rows(rows)

    @cached_property
    def answer_tokens(self) -> AnswerTokens:
        """The tokens of the answers for this model."""
        return answer_tokens(self.chat, self.answers)

    def image(self, row: Row) -> Image.Image | None:
        """The row's image, or None. Raises InputError if it is missing or broken."""
        if not row["images"]:
            return None
        if not self.chat.takes_images:
            raise InputError(
                f"the rows of {self.folder} have images, but the model takes none; name a "
                "multimodal --model, or use rows without images"
            )
        path = self.folder / row["images"][0]
        try:
            image = open_image(path)
        except ImageError as error:
            raise InputError(
                f"{path}, item {row['item_id']!r}: {error}; restore it, or make the rows "
                "again with scripts/04_datasets.sh"
            ) from None
        if self.gray_images:
            image = Image.new("RGB", image.size, (128, 128, 128))
        return pad_black(image, self._padded.get(_key(row)))

    def prompt(self, row: Row) -> tuple[str, list[int]]:
        """(rendered question without the answer, its token ids with the image as one token).

        Raises PromptTooLongError if the question is too long without any preference, InputError if
        its text adds or removes a control token.
        """
        fitted = self._fitted(row)
        self.shortened += fitted.was_shortened
        return fitted.prompt, fitted.ids

    def question(self, row: Row) -> str:
        """The question as the model gets it: markers broken, a too long preference cut.

        Raises as `prompt` does.
        """
        return question_text(self._fitted(row).row)

    def check_image_sizes(self, rows: Sequence[Row], path: PathLike) -> None:
        """Raise InputError for a row of the file `path` whose image the model's processor refuses.

        Of each image only the header is read; what is wrong with it otherwise, `image` says.
        """
        size_of, accepted = cache(size_or_none), set[tuple[int, int]]()
        for number, row in enumerate(rows, start=1):
            for name in row["images"] if self.chat.takes_images else ():
                size = self._padded.get(_key(row)) or size_of(self.folder / name)
                if size is None or size in accepted:
                    continue
                try:
                    self.chat.image_tokens_of_size(*size)
                except ValueError as error:
                    raise InputError(
                        f"{path}, line {number}, {row_name(row)}: the model's processor refuses "
                        f"the image {name} of {size[0]} x {size[1]} pixels ({one_line(error)}); "
                        "replace it and run stages 2 to 4 again"
                    ) from None
                accepted.add(size)

    def find_too_long(
        self, rows: Sequence[Row], path: PathLike | None = None
    ) -> tuple[dict[str, str], list[str]]:
        """(user_id -> reason, where a question cannot fit; user of each shortened prompt).

        path: of the rows, default test.jsonl. Raises InputError if none of their questions fits, or
        the model's processor refuses an image.
        """
        path = path or self.folder / "test.jsonl"
        self.check_image_sizes(rows, path)
        too_long: dict[str, str] = {}
        shortened: list[str] = []
        for row in map(self._cleaned, rows):
            if self._may_be_long(row):
                try:
                    shortened += [row["user_id"]] * self._fitted(row).was_shortened
                except PromptTooLongError as reason:
                    too_long.setdefault(row["user_id"], str(reason))
        if rows and all(row["user_id"] in too_long for row in rows):
            first = too_long[rows[0]["user_id"]]
            raise InputError(f"{path}: no question fits, the first: {first}")
        return too_long, shortened

    def fitting_rows(
        self, rows: Sequence[Row], path: PathLike
    ) -> tuple[list[Row], dict[str, str], int]:
        """(rows of the users whose questions fit, user_id -> reason of the others, shortened rows).

        Raises as `find_too_long` does.
        """
        too_long, shortened = self.find_too_long(rows, path)
        kept = [row for row in rows if row["user_id"] not in too_long]
        return kept, too_long, sum(user_id not in too_long for user_id in shortened)

    def lengths(self, rows: Sequence[Row], sizes: Mapping[Path, tuple[int, int]]) -> list[int]:
        """Each row's length in tokens, its image's included.

        sizes: image path -> (width, height).
        """
        lengths = []
        for row in rows:
            length = len(self._fitted(row).ids)
            if row["images"]:
                size = sizes[self.folder / row["images"][0]]
                length += self.chat.image_tokens_of_size(*size) - 1
            lengths.append(length)
        return lengths

    def _may_be_long(self, row: Row) -> bool:
        """False only for texts that fit for certain: no token is shorter than a byte."""
        if self.max_text_tokens == 0:
            return False
        return len(question_text(row).encode()) + TEMPLATE_TOKENS > self.max_text_tokens

    def _cleaned(self, row: Row) -> Row:
        """The row with the markers in its question broken; `preference_span` is moved accordingly.

        Unlike `plain_text`, this keeps line breaks: the question is a filled template.
        """
        text, turn = question_text(row), row["messages"][0]
        if self.chat.break_markers(text) == text:
            return row
        content = [
            {**part, "text": self.chat.break_markers(part["text"])} if "text" in part else part
            for part in turn["content"]
        ]
        # A marker of one character is replaced, so nothing behind it moves.
        found = self.chat.marker_pattern.finditer(valid_text(text))
        blanks = [match.end() for match in found if match.lastgroup != "single"]
        start, end = row.get("preference_span", (0, 0))
        span = [start + sum(n <= start for n in blanks), end + sum(n < end for n in blanks)]
        return {**row, "messages": [{**turn, "content": content}], "preference_span": span}

    def _checked(self, row: Row, ids: list[int]) -> list[int]:
        """`ids`, if they are those of a question and nothing more."""
        difference = self.chat.control_token_difference(ids, row["messages"][:1])
        if difference is not None:
            raise InputError(
                f"{row_name(row)}: the question is no plain text: {difference} of the "
                "model's tokenizer; remove it from the item's title or the user's "
                f"preference and {MAKE_AGAIN}"
            )
        return ids

    def _fitted(self, row: Row) -> _Fitted:
        row = self._cleaned(row)
        prompt = self.chat.render(row["messages"][:1])
        ids = self.chat.ids(prompt)
        if not self.max_text_tokens or len(ids) <= self.max_text_tokens:
            return _Fitted(row, prompt, self._checked(row, ids), False)
        # Rows from elsewhere may lack the span: nothing to shorten.
        row = {"preference_span": (0, 0), **row}
        start, end = row["preference_span"]
        tried = [row]

        def render(texts: list[str]) -> str:
            tried[0] = replace_preference(row, texts[0])
            return self.chat.render(tried[0]["messages"])

        def fits(text: str) -> bool:
            return self.chat.count(text) <= self.max_text_tokens

        prompt, _ = shorten_to_fit(render, [question_text(row)[start:end]], fits)
        ids = self.chat.ids(prompt)
        if len(ids) > self.max_text_tokens:
            raise PromptTooLongError(
                f"item {', '.join(map(repr, item_ids(row)))}: the question is longer than "
                f"{self.max_text_tokens} tokens even without a preference; raise "
                "--max_text_tokens, or lower --max_title_characters in stage 4"
            )
        return _Fitted(tried[0], prompt, self._checked(row, ids), True)
