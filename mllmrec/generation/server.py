"""Generating texts on servers with OpenAI's chat protocol: vLLM, SGLang, `transformers serve`.

The servers batch; here many dialogues are in flight at once, each with one request. A server that
fails is left alone for a while and its requests go to the others, so a run survives a restart of
its servers. What a request asks for depends on its row alone; whether the same request gives the
same text again is up to the server.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import openai

from mllmrec.generation.dialogues import (
    Dialogue,
    GeneratedText,
    RejectedError,
    Request,
    Result,
    advance,
    first_request,
)
from mllmrec.generation.sampling import stream_id
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.options import GenerationStageOptions
from mllmrec.prompts.templates import turn_text
from mllmrec.stage.errors import InputError
from mllmrec.stage.progress import Progress

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"  # environment variable
TRIES = 5  # of a request that a server fails to answer while it answers others
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries
NOT_ALLOWED = (openai.AuthenticationError, openai.PermissionDeniedError)
WRONG = (openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError)


class _NotAnsweredError(Exception):
    """A request that may be asked again: its server cannot be reached, or is busy."""


class _FaultError(_NotAnsweredError):
    """The same, but the prompt itself may be the reason."""


@dataclass
class _Server:
    """One of the servers. until: when it may be asked again, in time.monotonic()'s seconds."""

    url: str
    client: Any
    in_flight: int = 0
    until: float = 0.0
    failed: bool = False

    def fail(self, reason: str, pause: float) -> None:
        """Leave the server alone for `pause` seconds."""
        if not self.failed:
            logger.warning(
                "%s does not answer (%s); asked again every %.0f s", self.url, reason, pause
            )
        self.failed, self.until = True, time.monotonic() + pause

    def succeed(self) -> None:
        if self.failed:
            logger.info("%s answers again", self.url)
        self.failed, self.until = False, 0.0


class ServerEngine:
    """A frozen model on one or more servers that generates a text for each prompt."""

    def __init__(self, name: str, chat: ChatProcessor, options: GenerationStageOptions) -> None:
        self.chat, self.options = chat, options
        self.model = options.served_model or name
        # For the run record: texts depend on the server.
        self.described: dict[str, Any] = {"model": self.model}
        # Of prompts that the server counts in another way: (tokens here, tokens there).
        self.different_lengths: list[tuple[int, int]] = []
        self.last_answer = time.monotonic()
        self.servers: list[_Server] = []

    def run(
        self, dialogues: Iterable[tuple[Any, Dialogue]], progress: Progress | None = None
    ) -> Generator[Result, None, None]:
        """Run dialogues to their ends, see `mllmrec.generation.engine.run_dialogues`."""
        coming, exhausted = iter(dialogues), False
        waiting: list[Request] = []
        asked: dict[asyncio.Task[GeneratedText], Request] = {}
        with asyncio.Runner() as runner:
            try:
                runner.run(self._connect())
                while True:
                    while not exhausted and len(asked) + len(waiting) < self.options.concurrency:
                        row_id, dialogue = next(coming, (None, None))
                        exhausted = dialogue is None
                        if dialogue is not None:
                            yield from advance(waiting, first_request(row_id, dialogue), None)
                    for request in waiting:
                        asked[runner.get_loop().create_task(self._ask(request))] = request
                    waiting.clear()
                    if not asked:
                        return
                    done = runner.run(_first_done(asked))
                    for task in done:
                        yield from self._answered(task, asked.pop(task), waiting)
                    if progress is not None:
                        progress.update(len(done))
            finally:
                for task in asked:
                    task.cancel()
                runner.run(self._close(asked))
                self._warn_of_lengths()

    def _answered(
        self, task: "asyncio.Task[GeneratedText]", request: Request, waiting: list[Request]
    ) -> Generator[Result, None, None]:
        try:
            text = task.result()
        except RejectedError as reason:
            request.dialogue.close()
            yield request.row_id, None, str(reason)
            return
        yield from advance(waiting, request, text)

    async def _connect(self) -> None:
        """Open the clients and ask each server for one token. Raises InputError if none answers.

        A wrong model or key is reported here, before a row is rejected for it.
        """
        for url in self.options.base_url:
            client = openai.AsyncOpenAI(
                base_url=url,
                api_key=os.environ.get(KEY) or "none",
                timeout=self.options.timeout,
                max_retries=0,  # `_ask` tries again, maybe at another server
            )
            self.servers.append(_Server(url, client))
        faults = await asyncio.gather(*(self._try(server) for server in self.servers))
        if all(faults):
            shown = "; ".join(f"{s.url}: {f}" for s, f in zip(self.servers, faults, strict=True))
            raise InputError(
                f"no server answers: {shown}; start one (scripts/serve.sh prints how), or name it "
                "with --base_url"
            )
        self.last_answer = time.monotonic()

    async def _try(self, server: _Server) -> str | None:
        """The reason why a server does not answer; None if it does."""
        turn = {"role": "user", "content": "One word."}
        try:
            answer = await server.client.chat.completions.create(
                model=self.model, messages=[turn], max_tokens=1, temperature=0.0
            )
        except NOT_ALLOWED as error:
            raise InputError(
                f"{server.url} does not accept the key in {KEY} ({_detail(error)}); export the one "
                "that the server was started with"
            ) from None
        except WRONG as error:
            known = await _model_names(server.client)
            raise InputError(
                f"{server.url} refuses a first request for the model {self.model!r} "
                f"({_detail(error)}){known}; name the model as the server does, with --served_model"
            ) from None
        except openai.OpenAIError as error:
            server.fail(_detail(error), LONGEST_PAUSE)
            return _detail(error)
        self.described |= {
            "answers_as": answer.model,
            "fingerprint": answer.system_fingerprint,
            "version": await _version(server.client),
        }
        return None

    async def _close(self, asked: Iterable["asyncio.Task[GeneratedText]"]) -> None:
        await asyncio.gather(*asked, return_exceptions=True)
        await asyncio.gather(*(server.client.close() for server in self.servers))
        self.servers = []

    async def _ask(self, request: Request) -> GeneratedText:
        """The text for a request; asks again until there is one.

        Raises RejectedError for a prompt that a server refuses, or fails to answer while it
        answers others; InputError if no server has answered for too long.
        """
        faults, first_fault, pause = 0, 0.0, FIRST_PAUSE
        while True:
            server = await self._next_server()
            server.in_flight += 1
            try:
                text = await self._answer(server, request)
                server.succeed()
                self.last_answer = time.monotonic()
                return text
            except _NotAnsweredError as error:
                self._check_patience(str(error))
                if isinstance(error, _FaultError):
                    first_fault = first_fault or time.monotonic()
                    faults += 1
                    if faults >= TRIES and self.last_answer > first_fault:
                        raise RejectedError(f"server, asked {faults} times: {error}") from None
            finally:
                server.in_flight -= 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _next_server(self) -> _Server:
        """The server with the fewest requests; waits until there is one."""
        while True:
            now = time.monotonic()
            ready = [server for server in self.servers if server.until <= now]
            if ready:
                return min(ready, key=lambda server: server.in_flight)
            self._check_patience("none can be reached")
            await asyncio.sleep(0.2)

    def _check_patience(self, reason: str) -> None:
        silent = time.monotonic() - self.last_answer
        if silent > self.options.patience:
            raise InputError(
                f"no server has answered for {silent:.0f} s ({', '.join(self.options.base_url)}: "
                f"{reason}); finished rows are kept: see what the servers say, or start them "
                "again; the same command resumes"
            )

    async def _answer(self, server: _Server, request: Request) -> GeneratedText:
        options = self.options
        try:
            answer = await server.client.chat.completions.create(
                model=self.model,
                messages=messages(request),
                max_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=stream_id(options.seed, request.row_id, request.number),
            )
        except WRONG as error:
            raise RejectedError(f"server: {_detail(error)}") from None
        except NOT_ALLOWED as error:
            raise InputError(f"{server.url}: {_detail(error)}; check {KEY}") from None
        except openai.RateLimitError as error:  # alive, but busy
            server.until = time.monotonic() + _retry_after(error)
            raise _NotAnsweredError(_detail(error)) from None
        except openai.APITimeoutError:
            raise _FaultError(f"no answer within {options.timeout:.0f} s") from None
        except openai.APIConnectionError as error:
            server.fail(_detail(error), min(LONGEST_PAUSE, options.patience / 10))
            raise _NotAnsweredError(_detail(error)) from None
        except openai.APIError as error:  # 5xx, or an answer that is no JSON
            raise _FaultError(_detail(error)) from None
        return self._text(answer, request)

    def _text(self, answer: Any, request: Request) -> GeneratedText:
        if not getattr(answer, "choices", None) or answer.choices[0].message is None:
            raise _FaultError("an answer without a text")
        choice = answer.choices[0]
        text = GeneratedText(" ".join((choice.message.content or "").split()))
        text.cut = choice.finish_reason == "length"
        usage = answer.usage
        if usage is not None and usage.prompt_tokens not in (0, request.prompt.length):
            self.different_lengths.append((request.prompt.length, usage.prompt_tokens))
        return text

    def _warn_of_lengths(self) -> None:
        if self.different_lengths:
            ours, theirs = self.different_lengths[0]
            logger.warning(
                "%d prompts have another number of tokens on the server (e.g. %d) than here (%d): "
                "it uses another chat template or tokenizer, or sees images in another size",
                len(self.different_lengths),
                theirs,
                ours,
            )


async def _first_done(tasks: Iterable["asyncio.Task[Any]"]) -> set["asyncio.Task[Any]"]:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return done


def messages(request: Request) -> list[dict[str, Any]]:
    """The turns of a request's prompt in OpenAI's form; a text alone is a string."""
    prompt = request.prompt
    if not prompt.image_url:
        return [{"role": turn["role"], "content": turn_text(turn)} for turn in prompt.turns]
    image = {"type": "image_url", "image_url": {"url": prompt.image_url}}
    return [
        {
            "role": turn["role"],
            "content": [image if part["type"] == "image" else part for part in turn["content"]],
        }
        for turn in prompt.turns
    ]


def _detail(error: openai.OpenAIError) -> str:
    """What a server said, in one short line."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else None
    code = getattr(error, "status_code", None)
    text = " ".join(str(body or cause or error).split())
    return (f"{code}: " if code else "") + text[:200]


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds that a busy server asks to wait, at most LONGEST_PAUSE."""
    try:
        return min(float(error.response.headers.get("retry-after", "0")), LONGEST_PAUSE)
    except ValueError:
        return 0.0


async def _model_names(client: Any) -> str:
    """The models that a server lists, as the end of a sentence; empty if it lists none."""
    with contextlib.suppress(openai.OpenAIError):
        names = [model.id async for model in client.models.list()]
        return f", it has {', '.join(names[:5])}" if names else ""
    return ""


async def _version(client: Any) -> str | None:
    """The version that a server tells at /version, as vLLM does; None if it does not."""
    root = str(client.base_url).removesuffix("/").removesuffix("/v1")
    with contextlib.suppress(openai.OpenAIError, ValueError):
        found = await client.get(f"{root}/version", cast_to=dict[str, Any])
        return str(found.get("version", found))
    return None
