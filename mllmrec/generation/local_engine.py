"""Generating texts for many items or users at once with a model in this process.

`GenerationEngine.run` runs many dialogues together: as soon as one has its text, its next prompt
joins the waiting ones, which are processed in batches of similar length.
"""

import logging
from collections.abc import Generator, Iterable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mllmrec.generation import prefill, sampling
from mllmrec.generation.dialogues import (
    Dialogue,
    GeneratedText,
    Request,
    Result,
    advance,
    first_request,
    stream_id,
)
from mllmrec.models.chat import ChatProcessor, to_model
from mllmrec.models.compat import empty_device_cache, is_out_of_memory, packed_linears
from mllmrec.models.model_options import GenerationStageOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.progress import Progress

logger = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 32768
MAX_WAITING_BYTES = 4e9  # of images that wait for their batch


class FiniteLogits(LogitsProcessor):
    """Notes which rows had a logit that is not finite. broken: bool (rows,), on the device."""

    def __init__(self) -> None:
        self.broken: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """scores: (rows, vocabulary), returned as they are."""
        broken = ~torch.isfinite(scores).all(-1)
        self.broken = broken if self.broken is None else self.broken | broken
        return scores


class GenerationEngine:
    """A frozen model that generates a text for each prompt.

    options: `batch_tokens` is how many tokens, padding and answers included, may be in one batch;
    it is lowered if memory does not suffice. `temperature` above 0: see `sampling`.
    """

    def __init__(self, model: Any, chat: ChatProcessor, options: GenerationStageOptions) -> None:
        self.model, self.chat, self.options = model, chat, options
        self.chunked = prefill.supports_chunked_prefill(model)
        self.max_new_tokens = options.max_new_tokens
        self.batch_tokens = options.batch_tokens or self._tokens_that_fit()
        # Tokens of one prefill chunk; on a CPU what a layer computes should stay near its caches.
        on_gpu = model.device.type == "cuda"
        hidden_size = model.config.get_text_config().hidden_size
        self.chunk_tokens = 16384 if on_gpu else max(1024, (1 << 20) // hidden_size)
        # A checkpoint's own settings (temperature, repetition penalty, ...) must not mix with ours.
        eos = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            eos_token_id=chat.tokenizer.eos_token_id if eos is None else eos,
            pad_token_id=chat.tokenizer.pad_token_id,
            do_sample=False,
        )

    def _tokens_that_fit(self) -> int:
        """Tokens whose keys and values take two thirds of a GPU's free memory."""
        if self.model.device.type != "cuda" or not self.chunked:
            return CPU_BATCH_TOKENS
        empty_device_cache()
        free, _ = torch.cuda.mem_get_info(self.model.device)
        return max(2048, int(free * 2 / 3 / prefill.kv_bytes_per_token(self.model)))

    def run(
        self, dialogues: Iterable[tuple[Any, Dialogue]], progress: Progress | None = None
    ) -> Generator[Result, None, None]:
        """Run dialogues to their ends, the longest prompts first.

        dialogues: (id, dialogue) each; progress: counts the texts. Yields (id, result, None), or
        (id, None, reason) for a rejected one, in the order in which they end.
        """
        coming = iter(dialogues)
        waiting: list[Request] = []
        exhausted = False
        with packed_linears(self.model):
            while True:
                while not exhausted and not _enough(self, waiting):
                    row_id, dialogue = next(coming, (None, None))
                    exhausted = dialogue is None
                    if dialogue is not None:
                        yield from advance(waiting, first_request(row_id, dialogue), None)
                if not waiting:
                    return
                waiting.sort(
                    key=lambda request: (request.prompt.inputs is None, request.prompt.length)
                )
                batch = _next_batch(self, waiting)
                texts = self.generate(batch)
                if progress is not None:
                    progress.update(len(batch))
                for request, text in zip(batch, texts, strict=True):
                    yield from advance(waiting, request, text)

    def batch_size(self, longest: int) -> int:
        """How many prompts of at most `longest` tokens fit into one batch."""
        return max(1, self.batch_tokens // (longest + self.max_new_tokens))

    def generate(self, requests: list[Request]) -> list[GeneratedText]:
        """The texts of one batch; if memory does not suffice, of its halves, and of later ones."""
        try:
            return self._generate(requests)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        longest = max(request.prompt.length for request in requests) + self.max_new_tokens
        if len(requests) == 1:
            raise InputError(
                f"a single prompt with its answer ({longest:,} tokens) does not fit into the "
                f"memory of {self.model.device}; free some, load the model with --quantization "
                "nf4, or lower --max_new_tokens; finished rows are kept"
            )
        empty_device_cache(collect_garbage=True)
        self.batch_tokens = min(self.batch_tokens, len(requests) // 2 * longest)
        logger.info(
            f"out of memory with a batch of {len(requests)}; continuing "
            f"with --batch_tokens {self.batch_tokens}",
        )
        middle = (len(requests) + 1) // 2
        return self.generate(requests[:middle]) + self.generate(requests[middle:])

    @torch.inference_mode()
    def _generate(self, requests: list[Request]) -> list[GeneratedText]:
        """Texts for prompts that all have an image or all have none."""
        size = len(requests)
        if self.chunked:
            size = max(1, self.chunk_tokens // requests[0].prompt.length)
        chunks = [
            to_model(self._encode(requests[n : n + size]), self.model)
            for n in range(0, len(requests), size)
        ]
        batch = chunks[0]
        if self.chunked:
            batch = prefill.chunked_prefill(
                self.model, chunks, self.chat.tokenizer.pad_token_id, self.max_new_tokens
            )
        prompt_length = batch["input_ids"].shape[1]
        finite = FiniteLogits()
        processors: list[Any] = [finite]
        if self.options.temperature > 0:
            streams = [stream_id(self.options.seed, r.row_id, r.number) for r in requests]
            processors += [
                *sampling.warpers(self.options.temperature, self.options.top_p),
                sampling.GumbelMaxSampler(streams, prompt_length, self.max_new_tokens),
            ]
        ids = self.model.generate(**batch, logits_processor=LogitsProcessorList(processors))
        if finite.broken is not None and finite.broken.any():
            row_id = requests[int(finite.broken.nonzero()[0])].row_id
            raise InputError(
                f"the model's logits for {row_id!r} are not finite numbers: its weights are "
                "damaged, or --dtype float16 is too narrow for them; finished rows are kept"
            )
        return [self._text(row) for row in ids[:, prompt_length:]]

    def _text(self, ids: torch.Tensor) -> GeneratedText:
        """ids: (tokens,), padded behind the end token."""
        text = GeneratedText(self.chat.decode(ids))
        eos: Any = self.model.generation_config.eos_token_id
        ends = set(eos) if isinstance(eos, list) else {eos}
        text.cut = len(ids) == self.max_new_tokens and ends.isdisjoint(ids.tolist())
        return text

    def _encode(self, requests: list[Request]) -> Any:
        if requests[0].prompt.inputs is not None:
            return self.chat.collate_arrays([r.prompt.inputs for r in requests if r.prompt.inputs])
        return self.chat.encode([request.prompt.text for request in requests])


def _enough(engine: GenerationEngine, waiting: list[Request]) -> bool:
    """True if two batches wait, to sort them by length, or as many images as memory should hold."""
    tokens = sum(request.prompt.length + engine.max_new_tokens for request in waiting)
    nbytes = sum(request.prompt.nbytes for request in waiting)
    return tokens >= 2 * engine.batch_tokens or nbytes >= MAX_WAITING_BYTES


def _next_batch(engine: GenerationEngine, waiting: list[Request]) -> list[Request]:
    """Take the longest prompts that fit together off the end of `waiting`.

    Prompts with and without image are never in one batch.
    """
    longest, has_image = waiting[-1].prompt.length, waiting[-1].prompt.inputs is not None
    batch: list[Request] = []
    while (
        waiting
        and len(batch) < engine.batch_size(longest)
        and (waiting[-1].prompt.inputs is not None) == has_image
    ):
        batch.append(waiting.pop())
    return batch
