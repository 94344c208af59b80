"""--engine server: requests, refusals, a clean end, the texts of a real `transformers serve`."""

import gc
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, TINY, call, free_port
from pydantic import ValidationError
from transformers import AutoTokenizer

from mllmrec.generation.dialogues import Prompt, stream_id
from mllmrec.generation.engine import load_engine
from mllmrec.generation.server import ServerEngine, messages
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.model_options import GenerationStageOptions
from mllmrec.prompts.templates import user_turn
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script

pytestmark = pytest.mark.filterwarnings("error")
FIRST = "One word."  # what the engine asks for before all rows
WAIT = 30  # seconds, far more than anything here takes


@contextmanager
def serving(respond):
    """A server on loopback; yields (its address, bodies of the requests so far).

    respond: text of a prompt -> (status, JSON, or parts of a body), or None: the connection is
    closed.
    """
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body | {"key": self.headers["Authorization"]})
            if answer := respond(body["messages"][0]["content"]):
                self.send(*answer)

        def do_GET(self):
            self.send(200, {"version": "1.2.3", "data": [{"id": "other"}]})

        def send(self, status, answer):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            whole = [json.dumps(answer).encode()] if isinstance(answer, dict) else answer
            for part in whole:
                self.wfile.write(part)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *request: None  # the client has closed the connection
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()


def answer(text, finish="stop", tokens=0):
    """A chat completion. tokens: of the prompt, as the server counts them."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny"}
    return 200, head | {"choices": [choice], "usage": usage}


WHOLE = json.dumps(answer("yes")[1]).encode()


def fault(status, message):
    return status, {"error": {"message": message}}


def echo(text):
    return answer(f"of  {text}\n")


@pytest.fixture(scope="module")
def chat():
    return ChatProcessor(AutoTokenizer.from_pretrained(TINY / "llama"))


def results(chat, url, users=6, texts=2, begun=None, **options):
    """Results of dialogues that ask for some texts for each user, one by one.

    begun: a list of the users whose dialogue was taken so far.
    """
    options = {"base_url": url, "engine": "server", "max_new_tokens": 7, "retries": 1} | options

    def dialogue(user):
        row = {"heard": []}
        for n in range(texts):
            turns = [user_turn(f"{user} asks {n}")]
            row["heard"].append((yield Prompt("", 9, turns=turns)))
        if not texts:
            raise InputError("no text is asked for")
        return row

    def dialogues():
        for n in range(users):
            if begun is not None:
                begun.append(n)
            yield f"u{n}", dialogue(f"u{n}")

    return ServerEngine("tiny", chat, GenerationStageOptions(**options)).run(dialogues())


def ask(chat, url, **options):
    """{user: (row or None, reason)}"""
    return {user: (row, reason) for user, row, reason in results(chat, url, **options)}


def heard(*users, texts=2):
    return {f"u{u}": ({"heard": [f"of u{u} asks {n}" for n in range(texts)]}, None) for u in users}


def test_dialogues_get_their_texts_and_requests_say_what_is_asked(chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    ends = {"u7 asks 0": "length"}
    with serving(lambda text: answer(f"of  {text}\n", ends.get(text, "stop"))) as (url, bodies):
        found = ask(chat, url, users=12, temperature=0.6, top_p=0.9, seed=3)
    assert found["u7"][0].pop("cut") == 1
    assert found == heard(*range(12)) and len(bodies) == 1 + 24
    sampling = {"model": "tiny", "temperature": 0.6, "top_p": 0.9, "key": "Bearer a key"}
    first, asked = bodies[0], {body["messages"][0]["content"]: body for body in bodies}
    assert sampling.items() < first.items(), "a server may keep to its first request"
    turns = [{"role": "user", "content": "u3 asks 1"}]
    more = {"messages": turns, "max_tokens": 7, "seed": stream_id(3, "u3", 1)}
    assert asked["u3 asks 1"] == sampling | more


def test_so_many_requests_are_in_flight_and_not_more(chat):
    together, begun = threading.Barrier(3), []

    def respond(text):
        if text != FIRST:
            together.wait(WAIT)  # broken, if fewer than three are in flight
        return echo(text)

    more = {"texts": 1, "begun": begun, "concurrency": 3, "retries": 0}
    with serving(respond) as (url, _), closing(results(chat, url, 12, **more)) as running:
        assert next(running)[2] is None and begun == [0, 1, 2]
        assert len(list(running)) == 11


@pytest.mark.parametrize("failure", [fault(429, "slow down"), fault(503, "starting"), None])
def test_a_request_that_fails_once_is_asked_again(chat, failure):
    asked = Counter()

    def respond(text):
        asked[text] += 1
        return failure if text == "u2 asks 0" and asked[text] == 1 else echo(text)

    with serving(respond) as (url, _):
        assert ask(chat, url) == heard(*range(6))
    assert asked["u2 asks 0"] == 2


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (fault(401, "wrong"), "401.*wrong.*; export as OPENAI_API_KEY the key"),
        (fault(404, "no such model"), r"no 'tiny' answers.*name one of its models \(other\)"),
        (None, "no 'tiny' answers at http.*; start a server"),
        ((200, {"object": "page"}), "does not answer as OpenAI.s .*; correct --base_url"),
        (answer(5), "does not answer as OpenAI.s .*valid string.*; correct --base_url"),
    ],
)
def test_a_wrong_server_key_or_model_ends_the_stage_at_once(chat, first, message):
    with serving(lambda text: first) as (url, bodies), pytest.raises(InputError, match=message):
        ask(chat, url)
    assert len(bodies) == 1


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (fault(400, "maximum context length is 10"), "server: .*400.*maximum context length is 10"),
        (fault(500, "out of luck"), "server: .*500.*out of luck"),  # other prompts are answered
        (answer(" \n", "length"), "the model generated an empty text"),
        (answer(None), "the model generated an empty text"),
        ((200, {"error": "?"}), "server: no chat completion: id Field required"),
        ((200, answer("")[1] | {"choices": []}), "server: .*choices is empty"),
        ((200, [b"[]"]), "server: no chat completion: .*an object"),
        ((200, [WHOLE[:70]]), "server: no chat completion: .*Invalid JSON: EOF"),
        ((200, [WHOLE.replace(b"yes", b"\xe9")]), "server: no chat completion: .*Invalid JSON"),
        ((204, []), "server: no chat completion: .*Invalid JSON: EOF"),
        (answer(5), "server: no chat completion: choices.0.message.content .*a valid string"),
        (answer([]), "server: no chat completion: choices.0.message.content .*a valid string"),
        (answer({}), "server: no chat completion: choices.0.message.content .*a valid string"),
        (answer("I must not", "content_filter"), "server: an answer .*'content_filter'"),
        (answer("yes", "later"), "server: no chat completion: choices.0.finish_reason"),
        (answer("<think>\nMusic"), "the model reasons before it answers .*turn that off"),
        (answer("A.</THINK> Music"), "the model reasons before it answers .*turn that off"),
        (answer("music " * 5000), r"server: an answer of 5,\d\d\d tokens, 7 were asked for"),
    ],
)
def test_a_prompt_without_a_proper_answer_is_rejected_alone(chat, response, reason):
    with serving(lambda text: response if text == "u2 asks 1" else echo(text)) as (url, _):
        found = ask(chat, url)
    assert re.match(reason, found.pop("u2")[1])
    assert found == heard(0, 1, 3, 4, 5)


def test_a_prompt_that_takes_too_long_is_rejected_alone(chat):
    over = threading.Event()
    with serving(lambda text: over.wait(WAIT) if "u1" in text else echo(text)) as (url, _):
        found = ask(chat, url, users=2, retries=0, timeout=1.0)
        over.set()
    assert found == heard(0) | {"u1": (None, "server: Request timed out.")}


def test_an_answer_that_drips_is_rejected_alone_after_the_time_for_the_whole(chat):
    over = threading.Event()

    def drip():
        for part in itertools.repeat(b" ", 100 * WAIT):
            yield part
            over.wait(0.01)

    with serving(lambda text: (200, drip()) if "u1" in text else echo(text)) as (url, _):
        found = ask(chat, url, users=2, retries=0, timeout=1.0)
        over.set()
    assert found == heard(0) | {"u1": (None, "server: Request timed out.")}


def test_an_answer_without_end_is_read_in_part_and_rejected_alone(chat):
    sent = []

    def flood():
        for part in itertools.repeat(b" " * (1 << 20), 400):
            sent.append(1)
            yield part

    with serving(lambda text: (200, flood()) if "u1" in text else echo(text)) as (url, _):
        found = ask(chat, url, users=2)
    assert found == heard(0) | {"u1": (None, "server: an answer of more than 4,194,304 bytes")}
    assert len(sent) < 200


@pytest.mark.parametrize("failure", [None, fault(500, "its worker has ended"), fault(429, "busy")])
@pytest.mark.parametrize("is_closed", [False, True])
def test_a_stage_that_ends_early_leaves_nothing_behind(chat, caplog, failure, is_closed):
    """Six requests are in flight: all fail, or one is answered and the consumer stops."""
    together, over = threading.Barrier(6), threading.Event()

    def respond(text):
        if text == FIRST and len(bodies) == 1:
            return echo(text)
        if text != FIRST:
            together.wait(WAIT)
        if is_closed and text != "u0 asks 0":
            over.wait(WAIT)
        return echo(text) if is_closed else failure

    with serving(respond) as (url, bodies):
        running = results(chat, url, texts=1, retries=0)
        if is_closed:
            assert next(running)[0] == "u0"
            running.close()  # as Ctrl-C and a full disk do
            over.set()
        else:
            with pytest.raises(InputError, match=r"any more .*same command resumes"):
                next(running)
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_dialogues_that_fail_in_the_same_moment_leave_nothing_behind(chat, caplog):
    with serving(echo) as (url, _), pytest.raises(InputError, match="no text is asked for"):
        ask(chat, url, texts=0)
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_a_model_that_can_think_first_is_asked_not_to(chat):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "llama")
    tokenizer.chat_template += "{% if enable_thinking is false %}{% endif %}"
    with serving(echo) as (url, bodies):
        ask(ChatProcessor(tokenizer), url, users=1)
        ask(chat, url, users=1)
    asked = [body.get("chat_template_kwargs") for body in bodies]
    assert asked == [{"enable_thinking": False}] * 3 + [None] * 3


@pytest.mark.parametrize(("tokens", "warnings"), [(0, 0), (9, 0), (99, 1)])
def test_another_number_of_tokens_on_the_server_is_a_warning(chat, caplog, tokens, warnings):
    with serving(lambda text: answer("yes", tokens=tokens)) as (url, _):
        ask(chat, url)
    assert caplog.text.count("a prompt of 9 tokens has 99 on the server") == warnings


@pytest.mark.parametrize(("model", "warnings"), [("tiny", 0), ("tiny@main", 0), ("other", 1)])
def test_another_model_in_the_answers_is_a_warning(chat, caplog, model, warnings):
    with serving(lambda text: (200, echo(text)[1] | {"model": model})) as (url, _):
        assert ask(chat, url) == heard(*range(6))
    assert caplog.text.count("the server answers as model") == warnings


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:secret@host/v1", "--base_url holds a user name .*export .*OPENAI_API_KEY"),
        ("http://host/v1?key=secret", "--base_url holds a user name or a key"),
        ("http://host:99999/v1", "Port out of range"),
        ("ftp://host/v1", "must look like http://HOST:PORT/v1"),
        ("http:///v1", "must look like http://HOST:PORT/v1"),
    ],
)
def test_an_address_with_a_secret_or_without_a_server_is_refused(url, message):
    with pytest.raises((InputError, ValidationError), match=message) as error:
        GenerationStageOptions(base_url=url)
    assert "secret" not in str(error.value)


def test_an_image_is_sent_where_it_stands_in_the_turn():
    turns, image = [user_turn("What?", images=1)], {"url": "data:image/png;base64,AAAA"}
    parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "What?"}]
    found = messages(Prompt("", 9, turns=turns, image_url=image["url"]))
    assert found == [{"role": "user", "content": parts}]


def test_what_only_a_model_here_can_do_is_refused_or_a_warning(caplog):
    options = GenerationStageOptions(engine="server", quantization="nf4")
    load_engine(str(TINY / "llama"), options, multimodal=False)
    assert "--quantization nf4 has no effect" in caplog.text
    options.prompt_format = "{text}"
    with pytest.raises(InputError, match="--prompt_format: a server renders prompts"):
        load_engine(str(TINY / "llama"), options, multimodal=False)


def stage_3(small_run, folder, url):
    """The words of stage 3 on a server, with the summaries of the small run."""
    return [
        *("--config", str(small_run.config), "--output_dir", str(folder), "--concurrency", "4"),
        *("--summaries", str(small_run.system / "image_summaries.jsonl")),
        *("--engine", "server", "--base_url", url, "--retries", "0"),
    ]


def test_a_stage_resumes_without_asking_for_finished_rows(small_run, tmp_path):
    stage = load_script("Inference/preference_recurrent.py")

    def responds(limit, asked):
        def respond(text):
            asked.append(text)
            return answer("music") if len(asked) < limit else None

        return respond

    found = tmp_path / "mllm_msr/user_preferences.jsonl"
    with (
        serving(responds(40, [])) as (url, _),
        pytest.raises(InputError, match="does not answer any more"),
    ):
        stage.main(stage_3(small_run, tmp_path, url))
    part = found.with_name(f"{found.name}.parts") / "rank-0.jsonl"
    done = [json.loads(line)["user_id"] for line in part.read_bytes().splitlines()]
    asked = []  # of another server: requests of the first run may still be on their way
    with serving(responds(10**6, asked)) as (url, _):
        stage.main(stage_3(small_run, tmp_path, url))
    left = [len(row["blocks"]) for row in read_rows(found) if row["user_id"] not in done]
    assert 5 <= len(done) < 30 == len(done) + len(left) and len(asked) == 1 + sum(left)
    assert read_record(found)["server"] == {"model": "tiny", "version": "1.2.3"}


def test_a_client_of_a_server_imports_no_torch(small_run, tmp_path):
    words = "import sys; from mllmrec.stage.scripts import load_script"
    words += "; load_script('Inference/preference_recurrent.py').main(sys.argv[1:])"
    words += "; assert sys.modules['torch'] is None"
    with serving(lambda text: answer("music")) as (url, _):
        command = [sys.executable, "-c", words, *stage_3(small_run, tmp_path, url)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr
    assert len(read_rows(tmp_path / "mllm_msr/user_preferences.jsonl")) == 30


@pytest.mark.slow
def test_preferences_of_a_real_server_are_those_of_the_model_here(small_run, tmp_path):
    port, model = free_port(), "Inference/tiny_models/llama"
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", model]
    words += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=-3, stderr=-1) as process:
        try:
            assert any(b"running on" in line for line in process.stderr), "it listens"
            threading.Thread(target=process.stderr.read).start()
            url = f"http://localhost:{port}/v1"
            done = call("Inference/preference_recurrent.py", *stage_3(small_run, tmp_path, url))
        finally:
            process.kill()
    assert done.returncode == 0, done.stderr
    found = read_rows(tmp_path / "mllm_msr/user_preferences.jsonl")
    expected = read_rows(small_run.system / "user_preferences.jsonl")
    assert all(row.pop("source") for row in found + expected)  # which names the engine
    assert found == expected
