"""The lines of train/validation/test.jsonl as the model gets them: one reader for training and for scoring."""

from pathlib import Path

from PIL import Image

from data_processing.errors import InputError
from data_processing.images import ImageError, open_image
from data_processing.pairs import with_preference
from Inference.chat import fit


class TooLong(Exception):
    """A question that does not fit; the message says which and what to do."""


class PairReader:
    """Prompts and pictures of the lines of one pairs file.

    folder: where the file lies (image paths are relative to it); max_text_tokens: how long the text of a prompt may be,
    its picture counted as one token (0: no limit). Longer texts lose the tail of the preference. grey: every picture is
    a grey one of the same size, to see what the pictures are worth.
    """

    def __init__(self, chat, folder, max_text_tokens=0, grey=False):
        self.chat, self.folder, self.max_text_tokens, self.grey = chat, Path(folder), max_text_tokens, grey
        self.shortened = 0

    def image(self, row):
        """The picture of the candidate. Raises InputError if it is gone or broken."""
        path = self.folder / row["images"][0]
        try:
            image = open_image(path)
            return Image.new("RGB", image.size, (128, 128, 128)) if self.grey else image
        except ImageError as error:
            raise InputError(
                f"{path}, item {row['item_id']!r}: {error}; restore it, or make the pairs again with scripts/04_datasets.sh"
            ) from None

    def prompt(self, row):
        """(rendered question without the answer, its token ids with the picture as one token).

        Raises TooLong if the question is too long without any preference.
        """
        prompt, ids, was_cut = self._fitted(row)
        self.shortened += was_cut
        return prompt, ids

    def look_through(self, rows):
        """(dict user_id -> reason, for the users with a pair whose question cannot be made to fit; users of the pairs that are cut)."""
        too_long, cut = {}, []
        for row in rows:
            if self._may_be_long(row):
                try:
                    cut += [row["user_id"]] * self._fitted(row)[2]
                except TooLong as reason:
                    too_long.setdefault(row["user_id"], str(reason))
        return too_long, cut

    def lengths(self, rows, sizes):
        """Each pair's length in tokens, its picture's among them. sizes: dict picture's path -> (width, height)."""
        return [len(self._fitted(row)[1]) - 1 + self.chat.tokens_of_size(*sizes[self.folder / row["images"][0]]) for row in rows]

    def _may_be_long(self, row):
        """False only for texts that fit for sure: no token is shorter than a byte, and 128 are enough for the template's own."""
        text = row["messages"][0]["content"][-1]["text"]
        return self.max_text_tokens > 0 and len(text.encode()) + 128 > self.max_text_tokens

    def _fitted(self, row):
        """(rendered question, its token ids, was the preference cut)."""
        prompt = self.chat.render(row["messages"][:1])
        ids = self.chat.ids(prompt)
        if not self.max_text_tokens or len(ids) <= self.max_text_tokens:
            return prompt, ids, False
        row = {"preference_span": (0, 0), **row}  # another's rows may lack it: then there is nothing to cut
        start, end = row["preference_span"]
        preference = row["messages"][0]["content"][-1]["text"][start:end]

        def rendered(texts):
            return self.chat.render(with_preference(row, texts[0])["messages"])

        prompt, _ = fit(rendered, [preference], lambda text: self.chat.count(text) <= self.max_text_tokens)
        ids = self.chat.ids(prompt)
        if len(ids) > self.max_text_tokens:
            raise TooLong(
                f"item {row['item_id']!r}: the question is longer than {self.max_text_tokens} tokens even without a preference; raise "
                "--max_text_tokens, or lower --max_title_characters in stage 4"
            )
        return prompt, ids, True
