"""--engine server: requests, faults of servers, equal texts from a real `transformers serve`."""

import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from conftest import ROOT, TINY, call, free_port
from transformers import AutoProcessor, AutoTokenizer, LlavaNextImageProcessorPil

from mllmrec.generation import server as server_module
from mllmrec.generation.dialogues import Prompt
from mllmrec.generation.engine import load_engine, run_dialogues
from mllmrec.generation.preferences import PreferenceOptions
from mllmrec.generation.sampling import stream_id
from mllmrec.generation.serve_command import IMAGE_PROMPT_TOKENS, serve_command
from mllmrec.generation.server import ServerEngine
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.model_options import GenerationStageOptions
from mllmrec.prompts.mllm_msr import IMAGE
from mllmrec.prompts.templates import user_turn
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.options import load_config
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script

FIRST = "One word."  # what the engine asks a server for before all rows


class Server:
    """A server on loopback whose answers a test decides.

    respond: function (body of a request, how often this prompt was asked) -> (status, JSON) or
    (status, JSON, headers), or None, which never answers. bodies: of the requests so far; most: in
    flight at a time.
    """

    def __init__(self, respond, port=0):
        self.respond, self.port, self.bodies, self.most, self.now = respond, port, [], 0, 0
        self.keys = set()

    async def _handle(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers["Authorization"])
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0.01)
            asked = sum(other["messages"] == body["messages"] for other in self.bodies)
            answer = self.respond(body, asked)
            if answer is None:
                await asyncio.sleep(60)
            status, content, *headers = answer
            return web.json_response(content, status=status, headers=dict(*headers))
        finally:
            self.now -= 1

    async def _models(self, request):
        return web.json_response({"object": "list", "data": [{"id": "other", "object": "model"}]})

    async def _version(self, request):
        return web.json_response({"version": "1.2.3"})

    def __enter__(self):
        started = threading.Event()
        self.loop = asyncio.new_event_loop()

        async def start():
            app = web.Application()
            app.router.add_post("/v1/chat/completions", self._handle)
            app.router.add_get("/v1/models", self._models)
            app.router.add_get("/version", self._version)
            self.runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True)
            await site.start()
            self.port = self.runner.addresses[0][1]
            started.set()

        def serve():
            self.loop.run_until_complete(start())
            self.loop.run_forever()

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        assert started.wait(10)
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *exception):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)


def answer(text, finish="stop", tokens=0):
    """A chat completion. tokens: of the prompt, as the server counts them."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny"}
    return 200, head | {"choices": [choice], "usage": usage, "system_fingerprint": "fp_1"}


def fault(status, message, **headers):
    return status, {"error": {"message": message}}, headers


def echo(body, asked=1):
    """Answers a prompt with its text."""
    return answer(f"of  {body['messages'][0]['content']}\n")


@pytest.fixture(scope="module")
def chat():
    return ChatProcessor(AutoTokenizer.from_pretrained(TINY / "llama"))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(server_module, "LONGEST_PAUSE", 0.1)
    monkeypatch.setenv("OPENAI_API_KEY", "a key")


def ask(chat, urls, users=6, texts=2, **options):
    """{user: (texts or None, reason)}: each user's dialogue asks for some texts, one by one."""
    options = GenerationStageOptions(
        base_url=list(urls), engine="server", **{"max_new_tokens": 7, "patience": 5.0} | options
    )
    engine = ServerEngine("tiny", chat, options)

    def dialogue(user):
        heard = []
        for n in range(texts):
            turns = [user_turn(f"{user} asks {n}")]
            text = chat.render(turns)
            heard.append((yield Prompt(text, chat.count(text), turns=turns)))
        return {"heard": heard}

    dialogues = ((f"u{n}", dialogue(f"u{n}")) for n in range(users))
    found = {user: (row, reason) for user, row, reason in run_dialogues(engine, dialogues)}
    return found, engine


def heard(user, texts=2):
    return {"heard": [f"of {user} asks {n}" for n in range(texts)]}, None


def test_dialogues_get_their_texts_and_requests_say_what_is_asked(chat, caplog):
    with Server(echo) as server:
        found, engine = ask(chat, [server.url], users=12, temperature=0.6, top_p=0.9, seed=3)
    assert found == {f"u{n}": heard(f"u{n}") for n in range(12)}
    assert server.most > 4, "many requests are in flight at once"
    first, *bodies = server.bodies
    assert first["messages"][0]["content"] == FIRST and len(bodies) == 24
    assert (first["temperature"], first["top_p"]) == (0.6, 0.9), "a server may keep to its first"
    body = next(b for b in bodies if b["messages"][0]["content"] == "u3 asks 1")
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "u3 asks 1"}],
        "max_tokens": 7,
        "temperature": 0.6,
        "top_p": 0.9,
        "seed": stream_id(3, "u3", 1),
    }
    assert server.keys == {"Bearer a key"}
    assert engine.described == {
        "model": "tiny",
        "servers": {server.url: {"answers_as": "tiny", "fingerprint": "fp_1", "version": "1.2.3"}},
    }
    assert caplog.text == ""


def test_at_most_so_many_requests_are_in_flight(chat):
    with Server(echo) as server:
        found, _ = ask(chat, [server.url], users=12, concurrency=3)
    assert len(found) == 12 and server.most == 3


@pytest.mark.parametrize(
    "first_answer",
    [
        fault(429, "slow down", **{"retry-after": "0.05"}),
        fault(500, "out of luck"),
        fault(503, "starting"),
        (200, {"object": "chat.completion", "choices": []}),
        None,  # hangs
    ],
)
def test_a_request_that_fails_once_is_asked_again(chat, first_answer):
    def respond(body, asked):
        again = asked > 1 or "asks" not in body["messages"][0]["content"]
        return echo(body) if again else first_answer

    with Server(respond) as server:
        found, _ = ask(chat, [server.url], timeout=0.5)
    assert found == {f"u{n}": heard(f"u{n}") for n in range(6)}
    assert len(server.bodies) == 1 + 2 * 12


def test_texts_cut_at_the_limit_are_counted(chat):
    def respond(body, asked):
        return answer("so long", "length" if "asks 1" in body["messages"][0]["content"] else "stop")

    with Server(respond) as server:
        found, _ = ask(chat, [server.url], users=1, texts=3)
    assert found["u0"][0]["cut"] == 1


@pytest.mark.parametrize(
    ("first_answer", "message"),
    [
        (
            fault(404, "The model `tiny` does not exist."),
            "refuses a first request for the model 'tiny' .*does not exist.*it has other; name the "
            "model as the server does, with --served_model",
        ),
        (
            (400, {"detail": "Server is pinned to 'other'"}),
            "refuses a first request for the model 'tiny' .*Server is pinned to 'other'",
        ),
        (fault(401, "no such key"), "does not accept the key in OPENAI_API_KEY .*no such key"),
        (fault(500, "no memory"), "no server answers: http.*500: no memory; start one"),
    ],
)
def test_a_wrong_model_or_key_ends_the_stage_before_a_row_is_rejected(chat, first_answer, message):
    server = Server(lambda body, asked: first_answer)
    with server, pytest.raises(InputError, match=message):
        ask(chat, [server.url])
    assert len(server.bodies) == 1


def test_a_prompt_that_the_server_refuses_is_rejected_alone(chat):
    def respond(body, asked):
        if body["messages"][0]["content"] == "u2 asks 1":
            return fault(400, "This model's maximum context length is 10 tokens")
        return echo(body)

    with Server(respond) as server:
        found, _ = ask(chat, [server.url])
    reason = "server: 400: This model's maximum context length is 10 tokens"
    assert found.pop("u2") == (None, reason)
    assert found == {f"u{n}": heard(f"u{n}") for n in (0, 1, 3, 4, 5)}


def test_a_prompt_that_always_fails_is_rejected_while_others_are_answered(chat):
    def respond(body, asked):
        bad = body["messages"][0]["content"].startswith("u2")
        return fault(500, "out of luck") if bad else echo(body)

    with Server(respond) as server:
        found, _ = ask(chat, [server.url], concurrency=3, users=20)
    assert found.pop("u2") == (None, "server, asked 5 times: 500: out of luck")
    assert len(found) == 19 and all(reason is None for _, reason in found.values())


def test_a_dead_server_is_left_out_with_a_warning(chat, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with Server(echo) as server:
            found, _ = ask(chat, [dead, server.url])
    assert found == {f"u{n}": heard(f"u{n}") for n in range(6)}
    assert f"{dead} does not answer" in caplog.text


@pytest.mark.parametrize(
    "answer_of_the_sick", [fault(500, "its worker has ended"), fault(404, "no such model"), None]
)
def test_a_server_that_only_fails_takes_no_rows_with_it(chat, caplog, answer_of_the_sick):
    """It answers the first request, and then has the fewest requests in flight all the time."""

    def respond(body, asked):
        is_first = body["messages"][0]["content"] == FIRST and len(sick.bodies) == 1
        return echo(body) if is_first else answer_of_the_sick

    with Server(respond) as sick, Server(echo) as well:
        urls = [sick.url, well.url]
        found, _ = ask(chat, urls, users=40, texts=3, concurrency=8, timeout=0.3)
    assert found == {f"u{n}": heard(f"u{n}", 3) for n in range(40)}
    assert len(sick.bodies) < 40 < len(well.bodies)
    assert f"{sick.url} does not answer" in caplog.text


def test_pauses_grow_until_the_server_answers(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(server_module.time, "monotonic", lambda: now[0])
    server, pauses = server_module._Server("http://a/v1", None), []
    for _ in range(5):
        server.fault("500")
        server.fault("500, of a request that was in flight already")
        pauses.append(round(server.until - now[0], 3))
        now[0] = server.until
    assert pauses == [0.02, 0.04, 0.08, 0.1, 0.1] and server.failed
    server.succeed()
    assert server.until <= now[0] and not server.failed
    server.fault("500")
    assert round(server.until - now[0], 3) == 0.02


def test_a_prompt_is_rejected_when_every_server_refuses_it(chat):
    def refuse(body, asked):
        text = body["messages"][0]["content"]
        long = text.startswith("u1") or (text.startswith("u2") and server_is_small)
        return fault(400, "too long") if long else echo(body)

    server_is_small = True
    large = Server(lambda body, asked: fault(400, "too long") if "u1" in str(body) else echo(body))
    with Server(refuse) as small, large:
        found, _ = ask(chat, [small.url, large.url], users=8)
    assert found.pop("u1") == (None, "server: 400: too long")
    assert found == {f"u{n}": heard(f"u{n}") for n in (0, *range(2, 8))}


def test_the_last_prompt_is_rejected_if_the_server_answers_others(chat):
    def respond(body, asked):
        bad = body["messages"][0]["content"].startswith("u0")
        return fault(500, "out of luck") if bad else echo(body)

    with Server(respond) as server:
        found, _ = ask(chat, [server.url], users=1)
    assert found == {"u0": (None, "server, asked 5 times: 500: out of luck")}


def test_a_page_at_version_that_is_no_version_is_passed_over(chat, monkeypatch):
    async def page(self, request):
        return web.Response(text="<html>hello</html>", content_type="text/html")

    monkeypatch.setattr(Server, "_version", page)
    with Server(echo) as server:
        found, engine = ask(chat, [server.url], users=1)
    assert found == {"u0": heard("u0")}
    assert engine.described["servers"][server.url]["version"] is None


def test_answers_without_a_text_do_not_pass_for_texts(chat):
    """As from a server that keeps what a model thinks apart, and got no further."""
    with Server(lambda body, asked: answer(None, "length")) as server:
        found, _ = ask(chat, [server.url], users=1)
    assert found == {"u0": (None, "server, asked 5 times: an answer without a text")}
    server = Server(lambda body, asked: (200, {"error": "not a chat completion"}))
    message = "no server answers: http.*an answer without a text"
    with server, pytest.raises(InputError, match=message):
        ask(chat, [server.url])


def test_a_model_that_can_think_first_is_asked_not_to(chat):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "llama")
    tokenizer.chat_template += "{% if enable_thinking is false %}{% endif %}"
    with Server(echo) as server:
        ask(ChatProcessor(tokenizer), [server.url], users=1)
        assert {str(body["chat_template_kwargs"]) for body in server.bodies} == {
            "{'enable_thinking': False}"
        }
    with Server(echo) as server:
        ask(chat, [server.url], users=1)
        assert not any("chat_template_kwargs" in body for body in server.bodies)


def test_requests_are_spread_over_the_servers(chat):
    with Server(echo) as one, Server(echo) as two:
        ask(chat, [one.url, two.url], users=20)
    assert min(len(one.bodies), len(two.bodies)) > 15


def test_a_restart_of_the_only_server_is_a_pause(chat, caplog):
    caplog.set_level("INFO", logger="mllmrec")
    started = Server(echo).__enter__()
    port, restarted = started.port, []

    def restart():
        while len(started.bodies) < 10:
            time.sleep(0.005)
        started.__exit__()
        time.sleep(1.5)  # far longer than TRIES tries of a request take here
        restarted.append(Server(echo, port).__enter__())

    thread = threading.Thread(target=restart)
    thread.start()
    found, _ = ask(chat, [started.url], users=40, texts=3, concurrency=4)
    thread.join()
    restarted[0].__exit__()
    assert found == {f"u{n}": heard(f"u{n}", 3) for n in range(40)}, "no row is rejected"
    assert restarted[0].bodies, "the second server was asked"
    assert "does not answer" in caplog.text and "answers again" in caplog.text


def test_the_stage_ends_when_no_server_answers_for_too_long(chat):
    def respond(body, asked):
        return echo(body) if len(server.bodies) < 8 else fault(503, "going down")

    server = Server(respond)
    message = r"no server has answered for 1 s \(http.*503: going down"
    with server, pytest.raises(InputError, match=message):
        ask(chat, [server.url], patience=1.0)


def test_what_only_a_model_here_can_do_is_refused_or_a_warning(caplog):
    options = PreferenceOptions(engine="server", quantization="nf4", dtype="bfloat16")
    engine, limit = load_engine(str(TINY / "llama"), options, multimodal=False)
    assert isinstance(engine, ServerEngine) and limit == 2048 - 1024
    for words in ("--quantization nf4 has no effect", "--dtype bfloat16 has no effect"):
        assert words in caplog.text
    with pytest.raises(InputError, match="--prompt_format: a server renders prompts"):
        load_engine(str(TINY / "llama"), replace(options, prompt_format="{text}"), False)
    with pytest.raises(InputError, match="takes no images; name a multimodal"):
        load_engine(str(TINY / "llama"), options, multimodal=True)


def test_another_number_of_tokens_on_the_server_is_a_warning(chat, caplog):
    counted = len(chat.ids(chat.render([user_turn("u0 asks 0")])))
    with Server(lambda body, asked: answer("yes", tokens=counted)) as server:
        ask(chat, [server.url])
        assert caplog.text == ""
    with Server(lambda body, asked: answer("yes", tokens=99)) as server:
        ask(chat, [server.url])
    assert (
        f"12 prompts have another number of tokens on the server (e.g. 99) than here ({counted})"
        in (caplog.text)
    )


# ------------------------------------------------------------------------ a real server


@contextmanager
def transformers_serve(model, port):
    """`transformers serve` with this model, once it answers."""
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--port", str(port)]
    process = subprocess.Popen(
        [*map(str, command), "--device", "cpu", "--dtype", "float32"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def server_options(port):
    return ["--engine", "server", "--base_url", f"http://localhost:{port}/v1"]


@pytest.mark.slow
def test_summaries_of_a_real_server_are_those_of_the_model_here(small_run, tmp_path):
    port, model = free_port(), "Inference/tiny_models/llava"
    with transformers_serve(model, port):
        small_run.run(
            "Inference/image_summary.py", "--output_dir", str(tmp_path), *server_options(port)
        )
    found = tmp_path / "mllm_msr/image_summaries.jsonl"
    assert found.read_bytes() == (small_run.system / "image_summaries.jsonl").read_bytes()


def test_a_pilot_on_a_server_prints_how_long_all_rows_would_take(small_run, tmp_path, caplog):
    summaries = str(small_run.system / "image_summaries.jsonl")
    with Server(echo) as server:
        load_script("Inference/preference_recurrent.py").main(
            [
                *("--config", str(small_run.config), "--output_dir", str(tmp_path)),
                *("--summaries", summaries, "--limit", "5"),
                *("--engine", "server", "--base_url", server.url),
            ]
        )
    assert "users a second all 30 would take" in caplog.text


@pytest.mark.slow
def test_preferences_survive_the_death_of_a_real_server(small_run, tmp_path):
    system = tmp_path / "mllm_msr"
    system.mkdir()
    for name in ("image_summaries.jsonl", "image_summaries.run.json"):
        (system / name).write_bytes((small_run.system / name).read_bytes())
    port, model = free_port(), "Inference/tiny_models/llama"
    stage = [
        *("Inference/preference_recurrent.py", "--config", str(small_run.config)),
        *("--output_dir", str(tmp_path), *server_options(port), "--concurrency", "4"),
    ]
    part = system / "user_preferences.jsonl.parts/rank-0.jsonl"
    with transformers_serve(model, port) as process:
        killed = subprocess.Popen([sys.executable, *stage, "--patience", "2"], cwd=ROOT, stderr=-1)
        while not (part.exists() and part.read_bytes().count(b"\n") >= 5):
            assert killed.poll() is None, killed.communicate()[1]
            time.sleep(0.02)
        process.kill()
        message = killed.communicate(timeout=120)[1].decode()
    assert killed.returncode == 1 and "Traceback" not in message
    assert "no server has answered" in message and "the same command resumes" in message
    before = part.read_bytes().count(b"\n")
    assert 5 <= before < 30
    with transformers_serve(model, port):
        done = call(*stage, "--patience", "2")
    assert f"30 rows, {30 - before} of them now" in done.stderr
    found = system / "user_preferences.jsonl"
    assert read_rows(found) == read_rows(small_run.system / "user_preferences.jsonl")
    assert found.read_bytes() == (small_run.system / "user_preferences.jsonl").read_bytes()
    server = read_record(found)["server"]
    assert server["model"] == model and json.dumps(server)


# ------------------------------------------------------------------------ the command of a server


@pytest.mark.parametrize(
    ("program", "section", "more", "command"),
    [
        (
            "vllm",
            "preference",
            {"data_parallel": 4, "port": 9},
            "vllm serve meta-llama/Meta-Llama-3-8B-Instruct --port 9 --dtype bfloat16 "
            "--generation-config vllm --enable-prefix-caching --data-parallel-size 4",
        ),
        (
            "vllm",
            "image_summary",
            {},
            "vllm serve llava-hf/llava-v1.6-mistral-7b-hf --port 8000 --dtype bfloat16 "
            "--generation-config vllm --enable-prefix-caching --max-model-len 3272 "
            "--limit-mm-per-prompt '{\"image\": 1}'",
        ),
        (
            "sglang",
            "image_summary",
            {"data_parallel": 2},
            "python -m sglang.launch_server --model-path llava-hf/llava-v1.6-mistral-7b-hf --port "
            "8000 --dtype bfloat16 --sampling-defaults openai --context-length 3272 --dp-size 2",
        ),
        (
            "transformers",
            "image_summary",
            {},
            "transformers serve llava-hf/llava-v1.6-mistral-7b-hf --port 8000 --dtype bfloat16",
        ),
    ],
)
def test_the_command_has_the_model_and_lengths_of_the_config(program, section, more, command):
    config = load_config(ROOT / "configs/microlens.yaml")
    assert shlex.join(serve_command(program, section, config, **more)) == command


def test_copies_need_a_server_that_has_them_and_a_config_needs_a_model():
    config = load_config(ROOT / "configs/microlens.yaml")
    with pytest.raises(InputError, match="start one on each GPU with another --port"):
        serve_command("transformers", "preference", config, data_parallel=2)
    with pytest.raises(InputError, match="names no model in its section preference"):
        serve_command("vllm", "preference", {})


def test_the_longest_image_prompt_has_room():
    """An image of LLaVA-NeXT takes most tokens when it fills four tiles beside the whole one."""
    processor = AutoProcessor.from_pretrained(TINY / "llava")
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processor.image_processor, processor.patch_size = LlavaNextImageProcessorPil(**size), 14
    chat = ChatProcessor(processor)
    shapes = [(336, 336), (672, 672), (1000, 1000), (3000, 1000), (1000, 3000), (700, 500)]
    assert max(chat.image_tokens_of_size(*shape) for shape in shapes) == 2928
    assert 2928 + 2 * chat.count(IMAGE) < IMAGE_PROMPT_TOKENS
