"""Generating texts for many items or users at once.

A stage describes ONE item or user as a dialogue: a Python generator that yields a `Prompt` and is sent the text that
the model wrote, as often as it likes, and returns its result. `run_dialogues` plays many of them together: as soon as a
dialogue has its answer, its next prompt joins those that wait. Nobody waits for the slowest user, and a stage reads like
the paper's recurrence.

Two ways of playing, with the same texts: in batches of like length (`generate`), or by transformers' continuous batching,
where a finished text's place is taken at once by the next prompt. The second is for prompts without pictures, on a GPU
with FlashAttention.
"""

import itertools
import os
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.utils.data import DataLoader
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList

from data_processing.errors import InputError
from Inference import prefill, sampling
from Inference.chat import on_device

MOST_AT_ONCE = 2048  # dialogues under way in continuous batching; more than a GPU's memory holds

BATCHING = {"auto": None, "continuous": True, "batches": False}  # --batching -> `continuous` of `Engine`


@dataclass
class Prompt:
    """What the model is asked; prompts of like length share a batch."""

    text: str  # rendered by the chat template
    length: int  # tokens, a picture's among them
    inputs: dict | None = None  # with a picture: text and picture as `Chat.encode_one` gives them

    def __post_init__(self):
        self.nbytes = sum(array.nbytes for array in (self.inputs or {}).values())


class Refused(Exception):
    """Raised inside a dialogue that cannot go on; the message is the reason that the row is set aside with."""


@dataclass
class _Turn:
    """A dialogue that waits for its answer number `number` (0 = the first)."""

    name: str
    number: int
    dialogue: object
    prompt: Prompt


class Engine:
    """A frozen model that answers prompts.

    batch_tokens: how many tokens, padding and answers counted, may be in one batch; 0: as many as a GPU's free memory
    holds, 32,768 on a CPU; where memory does not suffice it is lowered. temperature 0 is greedy; else see `sampling`.
    continuous: True, False or None = on a GPU with FlashAttention; without it every text would look over all others' tokens.
    """

    def __init__(self, model, chat, max_new_tokens, batch_tokens=0, temperature=0.0, top_p=1.0, seed=0, continuous=False):
        self.model, self.chat = model, chat
        self.in_portions = prefill.can_read_in_portions(model)
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens or self._tokens_that_fit()
        # Read in one pass, see `prefill`; on a CPU what a layer computes should stay near its caches.
        self.portion_tokens = 16384 if model.device.type == "cuda" else max(1024, (1 << 20) // model.config.get_text_config().hidden_size)
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.continuous = "flash" in model.config._attn_implementation if continuous is None else continuous
        # A published model's own settings (temperature, repetition penalty, …) must not mix with the config's.
        ends = model.generation_config.eos_token_id
        ends = chat.tokenizer.eos_token_id if ends is None else ends
        model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=chat.tokenizer.pad_token_id, do_sample=False
        )

    def _tokens_that_fit(self):
        """Tokens whose keys and values take two thirds of a GPU's free memory; the rest is for what a pass computes."""
        if self.model.device.type != "cuda" or not self.in_portions:
            return 32768
        clear_device_cache()
        free, _ = torch.cuda.mem_get_info(self.model.device)
        return max(2048, int(free * 2 / 3 / prefill.bytes_per_token(self.model)))

    def stream(self, turn):
        return sampling.stream(self.seed, turn.name, turn.number)

    def batch_size(self, longest):
        """How many prompts of at most `longest` tokens fit into one batch."""
        return max(1, self.batch_tokens // (longest + self.max_new_tokens))

    def answer(self, turns):
        """The model's texts for one batch; where memory does not suffice, for its halves, and later batches are smaller."""
        try:
            return self._generate(turns)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        longest = max(turn.prompt.length for turn in turns) + self.max_new_tokens
        if len(turns) == 1:
            raise InputError(
                f"a single prompt with its answer ({longest:,} tokens) does not fit into the memory of {self.model.device}; free some, "
                "load the model with --quantization nf4, or lower --max_new_tokens; what is done is kept"
            )
        clear_device_cache(garbage_collection=True)
        self.batch_tokens = min(self.batch_tokens, len(turns) // 2 * longest)
        print(f"out of memory with {len(turns)} prompts at once; going on with --batch_tokens {self.batch_tokens}", flush=True)
        middle = (len(turns) + 1) // 2
        return self.answer(turns[:middle]) + self.answer(turns[middle:])

    @torch.inference_mode()
    def _generate(self, turns):
        """Texts for prompts that all have a picture or all have none."""
        size = max(1, self.portion_tokens // turns[0].prompt.length) if self.in_portions else len(turns)
        portions = [on_device(self._encoded(turns[n : n + size]), self.model) for n in range(0, len(turns), size)]
        batch = portions[0]
        if self.in_portions:
            batch = prefill.read(self.model, portions, self.chat.tokenizer.pad_token_id, self.max_new_tokens)
        prompt_length, processors = batch["input_ids"].shape[1], []
        if self.temperature > 0:
            draws = sampling.GumbelMax([self.stream(turn) for turn in turns], prompt_length)
            processors = [*sampling.warpers(self.temperature, self.top_p), draws]
        written = self.model.generate(**batch, logits_processor=LogitsProcessorList(processors))
        return [self.chat.decode(ids) for ids in written[:, prompt_length:]]

    def _encoded(self, turns):
        if turns[0].prompt.inputs is not None:
            return self.chat.join([turn.prompt.inputs for turn in turns])
        return self.chat.encode([turn.prompt.text for turn in turns])

    def start_manager(self):
        """A running ContinuousBatchingManager of transformers. It takes token ids only and drops pictures in silence."""
        on_gpu = self.model.device.type == "cuda"  # there it sizes itself by the free memory
        sizes = {"max_memory_percent": 0.8 if self.temperature > 0 else 0.9} if on_gpu else {"num_blocks": 64, "max_batch_tokens": 512}
        to_flash = on_gpu and self.model.dtype != torch.float32
        config = ContinuousBatchingConfig(auto_switch_to_flash=to_flash, **sizes)
        manager = self.model.init_continuous_batching(continuous_batching_config=config)
        if self.temperature > 0:
            manager.logit_processor = sampling.for_continuous_batching(self.temperature, self.top_p)
        manager.start()
        return manager

    def ask(self, manager, turn, request_id):
        extra = {"stream": self.stream(turn)} if self.temperature > 0 else {}
        manager.add_request(self.chat.ids(turn.prompt.text), request_id=request_id, **extra)


def run_dialogues(engine, dialogues):
    """Plays dialogues to their ends.

    dialogues: iterable of (id, generator that yields Prompts and returns a result). Yields (id, result, None), or
    (id, None, reason) for a refused one, in the order in which they end.
    """
    coming, waiting = iter(dialogues), []
    if engine.continuous:
        yield from _continuously(engine, coming, waiting)
    yield from _in_batches(engine, coming, waiting)  # all of them, or what a failed manager has left


def _in_batches(engine, coming, waiting):
    """Longest prompts first."""
    exhausted = False
    while True:
        while not exhausted and not _enough(engine, waiting):
            name, dialogue = next(coming, (None, None))
            exhausted = dialogue is None
            if not exhausted:
                yield from _advance(waiting, name, 0, dialogue, None)
        if not waiting:
            return
        waiting.sort(key=lambda turn: (turn.prompt.inputs is None, turn.prompt.length))
        batch = _next_batch(engine, waiting)
        for turn, text in zip(batch, engine.answer(batch), strict=True):
            yield from _advance(waiting, turn.name, turn.number + 1, turn.dialogue, text)


def _enough(engine, waiting):
    """True if two batches wait, enough to sort by length, or pictures of 4 GB."""
    tokens = sum(turn.prompt.length + engine.max_new_tokens for turn in waiting)
    return tokens >= 2 * engine.batch_tokens or sum(turn.prompt.nbytes for turn in waiting) >= 4e9


def _advance(waiting, name, number, dialogue, answer):
    """Sends an answer to a dialogue; yields its ending, or adds its next turn to `waiting`."""
    try:
        waiting.append(_Turn(name, number, dialogue, dialogue.send(answer)))
    except StopIteration as end:
        yield name, end.value, None
    except Refused as reason:
        yield name, None, str(reason)


def _next_batch(engine, waiting):
    """Takes the longest prompts that fit together off the end of `waiting`; with and without pictures never mix."""
    longest, has_picture = waiting[-1].prompt.length, waiting[-1].prompt.inputs is not None
    batch = []
    while waiting and len(batch) < engine.batch_size(longest) and (waiting[-1].prompt.inputs is not None) == has_picture:
        batch.append(waiting.pop())
    return batch


def _continuously(engine, coming, waiting):
    """Plays by continuous batching; if that fails on this machine, says so and leaves in `waiting` what has no answer yet."""
    try:
        manager = engine.start_manager()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"continuous batching cannot be used here ({error}); going on in batches", flush=True)
        return
    asked, fresh, numbers = {}, [], itertools.count()  # asked: request id -> turn; fresh: turns that are to be asked
    try:
        while True:
            for name, dialogue in itertools.islice(coming, max(0, MOST_AT_ONCE - len(asked) - len(fresh))):
                yield from _advance(fresh, name, 0, dialogue, None)
            while fresh:
                request_id = str(next(numbers))
                asked[request_id] = fresh.pop()
                engine.ask(manager, asked[request_id], request_id)
            if not asked:
                return
            output = manager.get_result(timeout=1)
            if (output is None and not manager.is_running()) or (output is not None and output.error):
                print(f"continuous batching failed ({output.error if output else 'no reason given'}); going on in batches", flush=True)
                waiting.extend(asked.values())
                return
            if output is not None:
                turn = asked.pop(output.request_id)
                yield from _advance(fresh, turn.name, turn.number + 1, turn.dialogue, engine.chat.decode(output.generated_tokens))
    finally:
        manager.stop(hard_stop=True)
        manager.destroy()


def read_ahead(dataset, workers):
    """Iterates over a dataset (a class with __len__ and __getitem__) that `workers` processes read ahead of the model.

    workers: -1 = up to 8 of this process's cores beside a GPU, none beside a model that computes on the CPU itself.
    """
    if workers < 0:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = min(8, cores) if torch.cuda.is_available() else 0
    return DataLoader(dataset, batch_size=None, collate_fn=_as_it_is, num_workers=workers, worker_init_fn=_quiet)


def _as_it_is(row):
    return row


def _quiet(_):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else every worker warns that it was forked
