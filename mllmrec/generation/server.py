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

import httpx2
import openai
from openai.types.chat import ChatCompletion
from pydantic import ValidationError

from mllmrec.generation.dialogues import (
    Dialogue,
    GeneratedText,
    Prompt,
    RejectedError,
    Result,
    stream_id,
    usable_text,
)
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.model_options import KEY, GenerationStageOptions
from mllmrec.prompts.templates import turn_text
from mllmrec.stage.errors import InputError
from mllmrec.stage.progress import Progress

logger = logging.getLogger(__name__)

REFUSED = (400, 413, 422)  # status where the prompt is at fault, e.g. too long
MAX_ANSWER_BYTES = 1 << 22
MAX_LENGTH = 4  # tokens of an answer for each one asked for; another tokenizer may count more


class NoAnswerError(openai.OpenAIError):
    """The server sent something that is no chat completion. Not asked again."""


def read_answer(body: bytes) -> ChatCompletion:
    """Raises NoAnswerError for anything but a chat completion; the openai client checks no type."""
    try:
        answer = ChatCompletion.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise NoAnswerError(f"no chat completion: {where} {first['msg']}") from None
    if not answer.choices:
        raise NoAnswerError("no chat completion: choices is empty")
    return answer


class LimitedClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client whose answers are limited as a whole; httpx limits the seconds of each read.

    A server that sends a byte now and then, or never stops sending, would not be noticed.
    """

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """The whole answer, in the seconds that the request has as timeout.

        Raises ReadTimeout, and NoAnswerError for more than MAX_ANSWER_BYTES.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(request.extensions["timeout"]["read"]):
                response = await super().send(request, **options | {"stream": True})
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > MAX_ANSWER_BYTES:
                        await response.aclose()
                        raise NoAnswerError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
        except TimeoutError:
            raise httpx2.ReadTimeout("the whole answer took too long", request=request) from None
        response.headers.pop("Content-Encoding", None)  # `body` is decoded
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            content=bytes(body),
            request=response.request,
        )


class ServerEngine:
    """A frozen model on a server that generates a text for each prompt."""

    def __init__(self, name: str, chat: ChatProcessor, options: GenerationStageOptions) -> None:
        self.chat, self.options = chat, options
        self.described: dict[str, Any] = {}  # for the run record: texts depend on the server
        self.warned: set[str] = set()
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
        """Run dialogues to their ends, see `GenerationEngine.run`."""
        coming, tasks = iter(dialogues), set[asyncio.Task[Result]]()
        self.client = openai.AsyncOpenAI(
            base_url=self.options.base_url,
            api_key=os.environ.get(KEY) or "none",
            timeout=self.options.timeout,
            max_retries=self.options.retries,
            http_client=LimitedClient(),
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
            remedy = "start a server (docs/servers.md), or name its address with --base_url"
            if status in (401, 403):
                remedy = f"export as {KEY} the key that it was started with"
            elif status in (*REFUSED, 404):
                listed = (await self._page("/models")).get("data")
                listed = listed if isinstance(listed, list) else []
                names = [str(model.get("id")) for model in listed[:5] if isinstance(model, dict)]
                remedy = f"name one of its models ({', '.join(names)}) with --served_model"
            elif isinstance(error, NoAnswerError):
                raise InputError(
                    f"{url} does not answer as OpenAI's chat protocol says ({error}); correct "
                    "--base_url, or start another server"
                ) from None
            model = self.request["model"]
            raise InputError(f"no {model!r} answers at {url} ({_line(error)}); {remedy}") from None
        page = await self._page(url.rstrip("/").removesuffix("/v1") + "/version")  # as vLLM has it
        self.described = {"model": answer.model, "version": page.get("version")}

    async def _probe(self) -> ChatCompletion:
        """Ask once for one token, sampled as the texts: a server may keep to its first request."""
        turns = [{"role": "user", "content": "One word."}]
        client = self.client.with_options(max_retries=0)
        return await self._ask(client, messages=turns, max_tokens=1)

    async def _ask(self, client: openai.AsyncOpenAI, **request: Any) -> ChatCompletion:
        """Warns if another model answers: some servers take any name for the one they have."""
        completions = client.chat.completions.with_raw_response
        answer = read_answer((await completions.create(**self.request | request)).content)
        wanted = self.request["model"]
        # `transformers serve` adds the revision.
        if answer.model and answer.model.partition("@")[0] != wanted:
            self._warn(
                "model",
                f"the server answers as model {answer.model!r}, not {wanted!r}; check that it runs "
                "the model that --model names, then pass its name there as --served_model",
            )
        return answer

    def _warn(self, kind: str, text: str) -> None:
        """Once of each kind."""
        if kind not in self.warned:
            self.warned.add(kind)
            logger.warning(text)

    async def _text(self, prompt: Prompt, seed: int) -> GeneratedText:
        """Raises RejectedError for a prompt without a proper answer, InputError without server."""
        try:
            answer = await self._ask(self.client, messages=messages(prompt), seed=seed)
        except openai.OpenAIError as error:
            if await self._fails_alone(error):
                raise RejectedError(f"server: {_line(error)}") from None
            gone = f"{self.options.base_url} does not answer any more ({_line(error)})"
            remedy = "see what the server says, or start it again; the same command resumes"
            raise InputError(f"{gone}; finished rows are kept: {remedy}") from None
        choice = answer.choices[0]
        if choice.finish_reason not in ("stop", "length"):
            raise RejectedError(f"server: an answer that ends with {choice.finish_reason!r}")
        text = GeneratedText(" ".join((choice.message.content or "").split()))
        asked, length = self.options.max_new_tokens, self.chat.count(text)
        if length > MAX_LENGTH * asked:
            raise RejectedError(
                f"server: an answer of {length:,} tokens, {asked:,} were asked for (max_tokens)"
            )
        counted = answer.usage.prompt_tokens if answer.usage else 0
        if counted not in (None, 0, prompt.length):
            self._warn(
                "tokens",
                f"a prompt of {prompt.length} tokens has {counted} on the server: it uses another "
                "chat template or tokenizer, or sees images in another size",
            )
        text.cut = choice.finish_reason == "length"
        return usable_text(text)

    async def _fails_alone(self, error: openai.OpenAIError) -> bool:
        """True if the prompt is refused, or if the server fails at it and answers another one."""
        status = getattr(error, "status_code", None)
        if status == 500 or isinstance(error, openai.APITimeoutError | NoAnswerError):
            with contextlib.suppress(openai.OpenAIError):
                return bool(await self._probe())
        return status in REFUSED

    async def _page(self, url: str) -> dict[str, Any]:
        """What the server has at `url`; empty if that is no JSON object."""
        page: Any = None
        with contextlib.suppress(openai.OpenAIError, ValueError):
            client = self.client.with_options(max_retries=0, timeout=10.0)
            page = await client.get(url, cast_to=dict[str, Any])
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
