"""Generating texts on a server with OpenAI's chat protocol: vLLM, SGLang, `transformers serve`.

The server batches; here many dialogues are in flight, each with one request, and the openai client
asks again where one fails. Several GPUs or machines have ONE address: vLLM's data parallelism, or a
router. A request depends on its row alone; whether its text does is up to the server.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Generator, Iterable
from itertools import islice
from typing import Any

import openai

from mllmrec.generation.dialogues import Dialogue, GeneratedText, Prompt, RejectedError, Result
from mllmrec.generation.sampling import stream_id
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.model_options import GenerationStageOptions
from mllmrec.prompts.templates import turn_text
from mllmrec.stage.errors import InputError
from mllmrec.stage.progress import Progress

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"  # environment variable
REFUSED = (400, 413, 422)  # status where the prompt is at fault, e.g. too long


class ServerEngine:
    """A frozen model on a server that generates a text for each prompt."""

    def __init__(self, name: str, chat: ChatProcessor, options: GenerationStageOptions) -> None:
        self.chat, self.options = chat, options
        self.described: dict[str, Any] = {}  # for the run record: texts depend on the server
        self.counts_differ = False
        self.request: dict[str, Any] = {
            "model": options.served_model or name,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_new_tokens,
        }
        template = getattr(chat.processor, "chat_template", None) or chat.tokenizer.chat_template
        # As in ChatProcessor; a server may refuse a field that it does not know.
        if "enable_thinking" in str(template):
            self.request["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}

    def run(
        self, dialogues: Iterable[tuple[Any, Dialogue]], progress: Progress | None = None
    ) -> Generator[Result, None, None]:
        """Run dialogues to their ends, see `mllmrec.generation.engine.run_dialogues`."""
        coming, tasks = iter(dialogues), set[asyncio.Task[Result]]()
        self.client = openai.AsyncOpenAI(
            base_url=self.options.base_url,
            api_key=os.environ.get(KEY) or "none",
            timeout=self.options.timeout,
            max_retries=self.options.retries,
        )
        with asyncio.Runner() as runner:
            try:
                runner.run(self._connect())
                while True:
                    for row in islice(coming, self.options.concurrency - len(tasks)):
                        tasks.add(runner.get_loop().create_task(self._run(*row, progress)))
                    if not tasks:
                        return
                    done, _ = runner.run(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
                    for task in done:
                        tasks.remove(task)
                        yield task.result()
            finally:  # also if the consumer closes this generator; the runner awaits the tasks
                for task in tasks:
                    task.cancel()
                runner.run(self.client.close())

    async def _run(self, row_id: Any, dialogue: Dialogue, progress: Progress | None) -> Result:
        """Run one dialogue to its end; a row whose texts were cut has their number as `cut`."""
        number = cut = 0
        try:
            prompt = next(dialogue)
            while True:
                text = await self._text(prompt, stream_id(self.options.seed, row_id, number))
                number, cut = number + 1, cut + text.cut
                if progress is not None:
                    progress.update()
                prompt = dialogue.send(text)
        except StopIteration as end:
            return row_id, end.value | ({"cut": cut} if cut else {}), None
        except RejectedError as reason:
            dialogue.close()
            return row_id, None, str(reason)

    async def _connect(self) -> None:
        """Ask for one token. Raises InputError for a wrong address, key or model."""
        url = self.options.base_url
        try:
            answer = await self._probe()
        except openai.OpenAIError as error:
            status = getattr(error, "status_code", None)
            remedy = "start a server (README, Servers), or name its address with --base_url"
            if status in (401, 403):
                remedy = f"export as {KEY} the key that it was started with"
            elif status in (*REFUSED, 404):
                listed = (await self._page("/models")).get("data", [])
                names = ", ".join(model["id"] for model in listed[:5])
                remedy = f"name one of its models ({names}) with --served_model"
            model = self.request["model"]
            raise InputError(f"no {model!r} answers at {url} ({_line(error)}); {remedy}") from None
        if not getattr(answer, "choices", None):
            raise InputError(f"{url} is no chat server ({_line(answer)}); correct --base_url")
        page = await self._page(url.rstrip("/").removesuffix("/v1") + "/version")  # as vLLM has it
        self.described = {"model": answer.model, "version": page.get("version")}

    async def _probe(self) -> Any:
        """Ask once for one token, sampled as the texts: a server may keep to its first request."""
        client = self.client.with_options(max_retries=0)
        request = {"messages": [{"role": "user", "content": "One word."}], "max_tokens": 1}
        return await client.chat.completions.create(**self.request | request)

    async def _text(self, prompt: Prompt, seed: int) -> GeneratedText:
        """Raises RejectedError for a prompt without a proper answer, InputError without server."""
        request = {"messages": messages(prompt), "seed": seed}
        try:
            answer = await self.client.chat.completions.create(**self.request | request)
        except openai.OpenAIError as error:
            if await self._fails_alone(error):
                raise RejectedError(f"server: {_line(error)}") from None
            gone = f"{self.options.base_url} does not answer any more ({_line(error)})"
            remedy = "see what the server says, or start it again; the same command resumes"
            raise InputError(f"{gone}; finished rows are kept: {remedy}") from None
        choice: Any = answer.choices[0] if getattr(answer, "choices", None) else None
        words = choice.message.content.split() if choice and choice.message.content else []
        if not words:
            raise RejectedError("server: an answer without a text")
        if choice.finish_reason not in ("stop", "length"):
            raise RejectedError(f"server: an answer that ends with {choice.finish_reason!r}")
        counted = answer.usage.prompt_tokens if answer.usage else 0
        if counted not in (0, prompt.length) and not self.counts_differ:
            self.counts_differ = True
            logger.warning(
                f"a prompt of {prompt.length} tokens has {counted} on the server: it uses another "
                "chat template or tokenizer, or sees images in another size"
            )
        text = GeneratedText(" ".join(words))
        text.cut = choice.finish_reason == "length"
        return text

    async def _fails_alone(self, error: openai.OpenAIError) -> bool:
        """True if the prompt is refused, or if the server fails at it and answers another one."""
        status = getattr(error, "status_code", None)
        if status == 500 or isinstance(error, openai.APITimeoutError):
            with contextlib.suppress(openai.OpenAIError):
                return bool(await self._probe())
        return status in REFUSED

    async def _page(self, url: str) -> dict[str, Any]:
        """What the server has at `url`; empty if that is no JSON object."""
        page: Any = None
        with contextlib.suppress(openai.OpenAIError, ValueError):
            page = await self.client.get(url, cast_to=dict[str, Any])
        return page if isinstance(page, dict) else {}


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The turns of a prompt in OpenAI's form; a text alone is a string."""
    if not prompt.image_url:
        return [{"role": turn["role"], "content": turn_text(turn)} for turn in prompt.turns]
    image = {"type": "image_url", "image_url": {"url": prompt.image_url}}
    return [
        turn | {"content": [image if part["type"] == "image" else part for part in turn["content"]]}
        for turn in prompt.turns
    ]


def _line(error: object) -> str:
    """What a server or the client said, in one short line."""
    return " ".join(str(error).split())[:300]
