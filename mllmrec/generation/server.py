"""Generating texts on servers with OpenAI's chat protocol: vLLM, SGLang, `transformers serve`.

The servers batch; here many dialogues are in flight at once, each with one request. A server that
fails is left alone for a while, longer each time, and its requests go to the others, so a run
survives a restart of its servers, and a server that only fails takes no rows with it: a prompt is
rejected only by a server that answers other prompts. What a request asks for depends on its row
alone; whether the same request gives the same text again is up to the server.
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
from mllmrec.models.model_options import GenerationStageOptions
from mllmrec.prompts.templates import turn_text
from mllmrec.stage.errors import InputError
from mllmrec.stage.progress import Progress

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"  # environment variable
TRIES = 5  # of a request that a server fails to answer while it answers others
FAULTS = 3  # one after the other, until a warning says that a server does not answer
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries
NOT_ALLOWED = (openai.AuthenticationError, openai.PermissionDeniedError)
REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)
WRONG = (*REFUSED, openai.NotFoundError)


class _NotAnsweredError(Exception):
    """A request that may be asked again: its server cannot be reached, is busy, or has no such
    model.
    """


class _FaultError(_NotAnsweredError):
    """The same, but the prompt itself may be the reason."""


class _RefusedError(Exception):
    """A server takes the prompt for wrong, as one that is too long."""


@dataclass
class _Server:
    """One of the servers.

    until: when it may be asked again; answered: when it answered last, both in time.monotonic()'s
    seconds; faults: since then, those during a pause not counted; reason: of the last fault.
    """

    url: str
    client: Any
    in_flight: int = 0
    until: float = 0.0
    answered: float = 0.0
    faults: int = 0
    failed: bool = False
    reason: str = ""

    def fault(self, reason: str) -> None:
        """Leave the server alone for a while, twice as long as the time before."""
        now = time.monotonic()
        if now < self.until:
            return  # of a request that was in flight already
        self.faults, self.reason = self.faults + 1, reason
        pause = min(FIRST_PAUSE * 2**self.faults, LONGEST_PAUSE)
        if self.faults >= FAULTS:
            self.fail(reason, pause)
        self.until = now + pause

    def fail(self, reason: str, pause: float) -> None:
        """Leave the server alone for `pause` seconds."""
        if not self.failed:
            logger.warning(
                "%s does not answer (%s); asked again every %.0f s", self.url, reason, pause
            )
        self.failed, self.until, self.reason = True, time.monotonic() + pause, reason

    def succeed(self) -> None:
        if self.failed:
            logger.info("%s answers again", self.url)
        self.failed, self.until, self.faults = False, 0.0, 0
        self.answered = time.monotonic()


class ServerEngine:
    """A frozen model on one or more servers that generates a text for each prompt."""

    def __init__(self, name: str, chat: ChatProcessor, options: GenerationStageOptions) -> None:
        self.chat, self.options = chat, options
        self.model = options.served_model or name
        # For the run record, by URL: texts depend on the server.
        self.described: dict[str, Any] = {"model": self.model, "servers": {}}
        template = getattr(chat.processor, "chat_template", None) or chat.tokenizer.chat_template
        # As in ChatProcessor; other servers than ours may refuse a field that they do not know.
        thinks = "enable_thinking" in str(template)
        self.extra = {"chat_template_kwargs": {"enable_thinking": False}} if thinks else None
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
        try:
            await self._probe(server)
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
        except (openai.OpenAIError, _FaultError) as error:
            server.fail(_detail(error), LONGEST_PAUSE)
            return _detail(error)
        return None

    async def _probe(self, server: _Server) -> None:
        """Ask for one token. Sampled as the run's texts: a server may keep to its first request."""
        answer = await server.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": "One word."}],
            max_tokens=1,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            extra_body=self.extra,
        )
        if not getattr(answer, "choices", None):
            raise _FaultError("an answer without a text")
        await self._has_answered(server, answer)

    async def _has_answered(self, server: _Server, answer: Any) -> None:
        server.succeed()
        self.last_answer = time.monotonic()
        if server.url not in self.described["servers"]:
            self.described["servers"][server.url] = {
                "answers_as": answer.model,
                "fingerprint": answer.system_fingerprint,
                "version": await _version(server.client),
            }

    async def _answers_others(self, server: _Server, since: float) -> bool:
        """True if the server has answered since then, or answers now."""
        if server.answered > since:
            return True
        try:
            await self._probe(server)
        except (openai.OpenAIError, _FaultError):
            return False
        return True

    async def _close(self, asked: Iterable["asyncio.Task[GeneratedText]"]) -> None:
        await asyncio.gather(*asked, return_exceptions=True)
        await asyncio.gather(*(server.client.close() for server in self.servers))
        self.servers = []

    async def _ask(self, request: Request) -> GeneratedText:
        """The text for a request; asks again until there is one.

        Raises RejectedError for a prompt that all servers refuse, or that one fails to answer while
        it answers others; InputError if no server has answered for too long.
        """
        faults, pause = 0, FIRST_PAUSE
        first_faults: dict[str, float] = {}  # by URL
        refused: set[str] = set()
        tried = ""
        while True:
            server = await self._next_server(refused | {tried})
            server.in_flight += 1
            try:
                return await self._answer(server, request)
            except _RefusedError as error:
                refused.add(server.url)
                if all(s.url in refused or s.failed for s in self.servers):
                    raise RejectedError(f"server: {error}") from None
            except _NotAnsweredError as error:
                self._check_patience(str(error))
                tried = server.url
                if isinstance(error, _FaultError):
                    server.fault(str(error))
                    faults += 1
                    since = first_faults.setdefault(server.url, time.monotonic())
                    if faults >= TRIES and await self._answers_others(server, since):
                        raise RejectedError(f"server, asked {faults} times: {error}") from None
            finally:
                server.in_flight -= 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _next_server(self, avoided: set[str]) -> _Server:
        """The server with the fewest requests, another than these if there is one; waits until one
        is ready.
        """
        while True:
            now = time.monotonic()
            ready = [server for server in self.servers if server.until <= now]
            ready = [server for server in ready if server.url not in avoided] or ready
            if ready:
                return min(ready, key=lambda server: server.in_flight)
            self._check_patience("; ".join(server.reason for server in self.servers))
            await asyncio.sleep(min(FIRST_PAUSE, 0.2))

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
                extra_body=self.extra,
            )
        except REFUSED as error:
            raise _RefusedError(_detail(error)) from None
        except openai.NotFoundError as error:  # as a server that was started with another model
            server.fail(_detail(error), LONGEST_PAUSE)
            raise _NotAnsweredError(_detail(error)) from None
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
        text = self._text(answer, request)
        await self._has_answered(server, answer)
        return text

    def _text(self, answer: Any, request: Request) -> GeneratedText:
        choice = next(iter(getattr(answer, "choices", None) or ()), None)
        if choice is None or choice.message is None or choice.message.content is None:
            raise _FaultError("an answer without a text")
        text = GeneratedText(" ".join(choice.message.content.split()))
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


def _detail(error: Exception) -> str:
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
        if isinstance(found, dict):  # any other page has the status 200, too
            return str(found.get("version", found))[:200]
    return None
