"""Generating texts for many items or users at once.

A stage describes ONE item or user as a dialogue: a Python generator that yields a `Prompt` and is sent the text that
the model wrote, as often as it likes, and returns its result. `run_dialogues` plays many of them together: whatever
waits for an answer is sorted by length and generated in batches, and as soon as a dialogue has its answer, its next
prompt joins those that wait. Nobody waits for the slowest user, and a stage reads like the paper's recurrence.
"""

from dataclasses import dataclass

import torch
from PIL import Image

from Inference.chat import on_device


@dataclass
class Prompt:
    """What the model is asked; prompts of like length share a batch."""

    text: str  # rendered by the chat template
    image: Image.Image | None  # the picture it shows
    length: int  # tokens, the picture's among them


class Refused(Exception):
    """Raised inside a dialogue that cannot go on; the message is the reason that the row is set aside with."""


class Engine:
    """A frozen model that answers prompts in batches.

    batch_tokens: how many tokens, padding and answers counted, may be in one batch.
    """

    def __init__(self, model, chat, max_new_tokens, batch_tokens=4096, temperature=0.0, top_p=1.0, seed=0):
        self.model, self.chat = model, chat
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self.sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            self.sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
            torch.manual_seed(seed)

    def batch_size(self, longest):
        """How many prompts of at most `longest` tokens fit into one batch."""
        return max(1, self.batch_tokens // (longest + self.max_new_tokens))

    @torch.inference_mode()
    def answer(self, prompts):
        """The model's texts for one batch of prompts, either all with a picture or all without."""
        images = [p.image for p in prompts] if prompts[0].image is not None else None
        batch = on_device(self.chat.encode([p.text for p in prompts], images, side="left"), self.model)
        written = self.model.generate(
            **batch, max_new_tokens=self.max_new_tokens, pad_token_id=self.chat.tokenizer.pad_token_id, **self.sampling
        )
        return [self.chat.decode(ids) for ids in written[:, batch["input_ids"].shape[1] :]]


def run_dialogues(engine, dialogues):
    """Plays dialogues to their ends.

    dialogues: iterable of (id, generator that yields Prompts and returns a result). Yields (id, result, None), or
    (id, None, reason) for a refused one, in the order in which they end.
    """
    coming, waiting = iter(dialogues), []

    def advance(name, dialogue, answer):
        """Sends an answer; returns the ending of the dialogue, or None if it asks again."""
        try:
            waiting.append((dialogue.send(answer), name, dialogue))
        except StopIteration as end:
            return (name, end.value, None)
        except Refused as reason:
            return (name, None, str(reason))
        return None

    exhausted = False
    while True:
        # Four batches are enough to sort by length; a big data set's pictures would not fit into memory.
        while not exhausted and sum(prompt.length + engine.max_new_tokens for prompt, _, _ in waiting) < 4 * engine.batch_tokens:
            name, dialogue = next(coming, (None, None))
            exhausted = dialogue is None
            if not exhausted and (ended := advance(name, dialogue, None)):
                yield ended
        if not waiting:
            return
        waiting.sort(key=lambda entry: (entry[0].image is None, entry[0].length))
        batch = _next_batch(engine, waiting)
        answers = engine.answer([prompt for prompt, _, _ in batch])
        for (_, name, dialogue), text in zip(batch, answers, strict=True):
            if ended := advance(name, dialogue, text):
                yield ended


def _next_batch(engine, waiting):
    """Takes the longest prompts that fit together off the end of `waiting`; with and without pictures never mix."""
    longest, has_image = waiting[-1][0].length, waiting[-1][0].image is not None
    batch = []
    while waiting and len(batch) < engine.batch_size(longest) and (waiting[-1][0].image is not None) == has_image:
        batch.append(waiting.pop())
    return batch
