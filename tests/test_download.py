"""The downloader against a server on the loopback address that shows every failure."""

import functools
import gzip
import io
import json
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import tenacity
from conftest import write_unchecked
from PIL import Image

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id
from mllmrec.stage.scripts import load_script as script

PRIVATE = ("--allow_private", "true")
DRIPS = 100  # of 0.1 s each: a test without a deadline still ends


@functools.cache
def image_bytes(width=20, height=10, form="JPEG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, form)
    return buffer.getvalue()


class Server(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - emptied for each test
    in_flight = most_in_flight = 0

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if body:
            self.wfile.write(body)

    def repeat(self, data, times=DRIPS, pause=0.1):
        try:
            for _ in range(times):
                self.wfile.write(data)
                time.sleep(pause)
        except OSError:  # the client has closed the connection
            pass

    def do_GET(self):
        name = urlsplit(self.path).path.strip("/")
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        self.asked.append(name)
        if name in ("good", "other", "gr%C3%BC%C3%9Fe"):
            self.answer(200, image_bytes())
        elif name == "png":
            self.answer(200, image_bytes(form="PNG"))
        elif name == "html":
            self.answer(200, b"<html>not found</html>")
        elif name == "silent":
            time.sleep(3)
        elif name == "counted":
            Server.in_flight += 1
            Server.most_in_flight = max(Server.most_in_flight, Server.in_flight)
            time.sleep(0.1)
            Server.in_flight -= 1
            self.answer(200, image_bytes())
        elif name == "cut":
            self.answer(200, image_bytes()[:200], length=len(image_bytes()))
            self.close_connection = True
        elif name == "wide":
            self.answer(200, image_bytes(10_000, 30))
        elif name == "bomb":
            self.answer(200, image_bytes(20_000, 10_000, "PNG", "1"))
        elif name == "compressed":
            self.answer(200, gzip.compress(bytes(5_000_000)), Content_Encoding="gzip")
        elif name == "endless":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            self.repeat(b"x" * 65536, times=10**6, pause=0)
        elif name == "drip_body":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            self.repeat(b"x")
        elif name == "drip_redirects":
            time.sleep(0.35)
            self.answer(302, Location="/drip_redirects")
        elif name == "redirect":
            self.answer(302, Location=query["to"])
        elif name == "redirect_latin1":
            self.answer(302, Location="/gr\xfc\xdfe")
        elif name == "redirect_utf8":
            self.answer(302, Location="/grüße".encode().decode("latin-1"))
        elif name.startswith("redirects_left_"):
            left = int(name.removeprefix("redirects_left_"))
            self.answer(302, Location=f"/redirects_left_{left - 1}" if left > 1 else "/good")
        elif name == "busy_once":
            first = self.asked.count(name) == 1
            self.answer(503, Retry_After="0") if first else self.answer(200, image_bytes())
        elif name == "empty":
            self.answer(200)
        else:
            self.answer(404)


@pytest.fixture
def server():
    Server.asked = []
    Server.in_flight = Server.most_in_flight = 0
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.socket.listen(64)  # the default of 5 drops connections, which costs a second each
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/"
    running.shutdown()
    running.server_close()


@pytest.fixture
def stage():
    return script("data_processing/download_images.py")


@pytest.fixture
def download(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "BACKOFF", tenacity.wait_none())
    monkeypatch.setattr(stage.random, "uniform", lambda *_: 0.01)
    config = tmp_path / "config.yaml"
    config.write_text("download: {retries: 2, timeout: 1.5, max_megabytes: 2}\n")

    def call(urls, *options):
        """Run the stage on dict item_id -> url; returns dicts item_id -> row and -> reason."""
        rows = [{"item_id": name, "url": url} for name, url in urls.items()]
        write_unchecked(tmp_path / "image_urls.jsonl", rows)
        stage.main(["--config", str(config), "--data_dir", str(tmp_path), *options])
        rejected, reasons = tmp_path / "images.rejected.jsonl", {}
        if rejected.exists():
            reasons = {i: row["reason"] for i, row in read_by_id(rejected, "item_id").items()}
        lines = (tmp_path / "images.jsonl").read_text().splitlines()
        return {row["item_id"]: row for row in map(json.loads, lines)}, reasons

    return call


FAILURES = {
    "gone": "answered 404",
    "html": "not a usable image: not a readable image",
    "silent": "2 times",
    "cut": "2 times",
    "bomb": "not a usable image: it would unpack to more than 100000000 pixels",
    "compressed": "it has more than 2,000,000 bytes",
    "endless": "it has more than 2,000,000 bytes",
    "redirects_left_6": "more than 5 redirects",
    "empty": "not a usable image: not a readable image",
}
SUCCESSES = ("good", "png", "wide", "redirects_left_5", "busy_once")


def test_each_failure_is_reported_and_the_other_images_are_downloaded(server, download, tmp_path):
    image_bytes(20_000, 10_000, "PNG", "1")  # made before the time limits count
    rows, reasons = download({name: server + name for name in (*SUCCESSES, *FAILURES)}, *PRIVATE)
    assert set(rows) == set(SUCCESSES)
    files = {path.name for path in (tmp_path / "images").iterdir()}
    assert files == {f"{name}.jpg" for name in rows}, "complete or absent, and nothing else"
    assert (tmp_path / "images" / "good.jpg").read_bytes() == image_bytes()
    assert rows["good"] == {
        "item_id": "good",
        "url": server + "good",
        "bytes": len(image_bytes()),
        "width": 20,
        "height": 10,
    }
    assert (rows["wide"]["width"], rows["wide"]["height"]) == (10_000, 30)
    assert set(reasons) == set(FAILURES)
    for name, words in FAILURES.items():
        assert words in reasons[name], name
    assert Server.asked.count("gone") == 1, "a permanent failure is not tried again"
    assert Server.asked.count("silent") == Server.asked.count("cut") == 2
    assert Server.asked.count("busy_once") == 2


def test_non_public_addresses_are_not_contacted(server, download):
    port = server.rsplit(":", 1)[1]
    hosts = ("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "0x7f000001",
             "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1", "240.0.0.1")  # fmt: skip
    urls = {f"{n}": f"http://{host}:{port}good" for n, host in enumerate(hosts)}
    rows, reasons = download(urls | {"metadata": "http://169.254.169.254/latest"})
    assert rows == {}
    assert Server.asked == []
    assert set(reasons) == {*urls, "metadata"}
    for name, reason in reasons.items():
        assert "is not contacted: the address" in reason, (name, reason)
        assert "is not public; --allow_private true would contact it" in reason


def test_a_redirect_to_a_non_public_address_is_not_followed(server, stage, download, monkeypatch):
    """The first server counts as public; the target of its redirect does not."""
    check = stage.is_public
    monkeypatch.setattr(stage, "is_public", lambda ip: ip == "127.0.0.1" or check(ip))
    port = server.rsplit(":", 1)[1]
    targets = {"x": "http://10.0.0.1/x.jpg", "z": f"http://127.0.0.2:{port}good"}
    urls = {name: f"{server}redirect?to={quote(target)}" for name, target in targets.items()}
    rows, reasons = download(urls | {"y": server + "good"})
    assert set(rows) == {"y"}
    assert Server.asked.count("good") == 1, "for y only"
    assert "10.0.0.1 is not contacted: the address 10.0.0.1 is not public" in reasons["x"]
    assert "127.0.0.2 is not contacted: the address 127.0.0.2 is not public" in reasons["z"]


NOT_PUBLIC = (
    "10.0.0.1", "172.16.0.1", "192.168.1.1", "127.0.0.1", "0.0.0.0", "169.254.169.254",
    "100.64.0.1", "192.0.2.1", "255.255.255.255", "224.0.0.1", "240.0.0.1", "::", "::1",
    "fe80::1%2", "fc00::1", "ff0e::1", "2001:db8::1", "::127.0.0.1", "::ffff:10.0.0.1",
    "::ffff:224.0.0.1", "64:ff9b::10.0.0.1", "2002:7f00:1::1", "2002:e000:1::",
)  # fmt: skip
PUBLIC = ("8.8.8.8", "2a00:1450::1", "::ffff:8.8.8.8", "2002:808:808::1")


@pytest.mark.parametrize("address", [*NOT_PUBLIC, *PUBLIC])
def test_public_addresses_are_recognized(stage, address):
    assert stage.is_public(address) == (address in PUBLIC)


def test_a_redirect_to_another_scheme_is_refused(server, download):
    host = server.removeprefix("http://")
    targets = ("file:///etc/passwd", f"ftp://{host}good", f"ws://{host}good", f"wss://{host}good",
               f"tcp://{host}good", f"gopher://{host}good", "data:image/png;base64,AAAA",
               "javascript:alert(1)", "mailto:a@example.org", "about:blank")  # fmt: skip
    urls = {target.split(":")[0]: f"{server}redirect?to={quote(target)}" for target in targets}
    rows, reasons = download(urls | {"good": server + "good"}, *PRIVATE)
    assert set(rows) == {"good"}
    assert Server.asked.count("good") == 1
    assert Server.asked.count("redirect") == len(targets), "a permanent failure is not tried again"
    assert all("not a valid http or https address: " in reason for reason in reasons.values())


def test_a_bad_url_rejects_that_image_only(server, download, capsys):
    host = server.removeprefix("http://")
    not_http = (None, 5, 1.5, float("nan"), True, [server], {"url": server}, "", "good",
                f"//{host}good", f"ftp://{host}good", f"ws://{host}good", f"tcp://{host}good",
                "http:/good", "file:///etc/passwd")  # fmt: skip
    invalid = ("http://", "http:///x", "http://[::1", "http://h:99999/", "http://h:x/", "http://1/",
               f"http://{'a' * 70}.com/", "http://a..b/")  # fmt: skip
    urls = {f"n{n}": url for n, url in enumerate(not_http)}
    urls |= {f"i{n}": url for n, url in enumerate(invalid)}
    urls = {"first": server + "good"} | urls | {"last": server + "good"}
    rows, reasons = download(urls, *PRIVATE)
    assert set(rows) == {"first", "last"}
    assert Server.asked == ["good", "good"]
    assert set(reasons) == set(urls) - set(rows)
    for name, reason in reasons.items():
        words = "is not an http or https address" if name[0] == "n" else "not a valid http or https"
        assert words in reason, (name, reason)
    download(urls, *PRIVATE)
    assert "up to date" in capsys.readouterr().err


def test_a_redirect_that_is_not_ascii_does_not_stop_the_run(server, download):
    names = ("redirect_latin1", "redirect_utf8", "grüße")
    rows, reasons = download({name: server + name for name in names}, *PRIVATE)
    assert set(rows) == {"redirect_utf8", "grüße"}
    assert rows["grüße"]["url"] == server + "grüße"
    assert set(reasons) == {"redirect_latin1"}
    assert "gr%C3%BC%C3%9Fe" in Server.asked


def test_a_server_that_sends_slowly_is_ended_by_the_total_time(server, download):
    names = ("drip_body", "drip_redirects")
    started = time.monotonic()
    rows, reasons = download(
        {name: server + name for name in (*names, "good")}, *PRIVATE, "--timeout", "0.4"
    )
    assert time.monotonic() - started < 5, "two tries of 1.2 s each"
    assert set(rows) == {"good"}
    assert reasons == dict.fromkeys(names, "not complete in time (--timeout), 2 times")


@pytest.mark.parametrize(
    ("header", "attempt", "least"),
    [("", 1, 1), ("", 3, 4), ("", 50, 60), ("soon", 1, 1), ("0", 1, 0), ("7", 3, 7),
     ("999", 1, 60), ("9" * 5000, 1, 60)],
)  # fmt: skip
def test_waits_between_tries(server, stage, tmp_path, monkeypatch, header, attempt, least):
    """Exponential back-off, or Retry-After up to 60 s; both with up to a second of jitter."""
    monkeypatch.setattr(Server, "do_GET", lambda self: self.answer(503, Retry_After=header))
    options = stage.Options(allow_private=True, retries=2)
    waits = []

    def no_wait(state):
        later = SimpleNamespace(outcome=state.outcome, attempt_number=attempt)
        waits.append([compute(later) for _ in range(20)])
        return 0

    compute = stage.seconds_until_retry
    monkeypatch.setattr(stage, "seconds_until_retry", no_wait)
    [(_, row, reason)] = list(stage.download_all([("x", server + "x")], tmp_path, options))
    assert (row, reason) == (None, "the server answered 503, 2 times")
    assert least <= min(waits[0]) <= max(waits[0]) <= least + 1
    assert len(set(waits[0])) > 1 or (header, least) == ("", 60)


def test_a_resumed_run_downloads_only_what_is_missing(server, download, capsys):
    old = {"good": server + "good", "gone": server + "gone"}
    download(old, *PRIVATE)
    Server.asked.clear()
    download(old, *PRIVATE)
    assert Server.asked == []
    assert "up to date" in capsys.readouterr().err
    rows, _ = download(old | {"other": server + "other"}, *PRIVATE)
    assert Server.asked == ["other"]
    assert set(rows) == {"good", "other"}
    Server.asked.clear()
    download(old, *PRIVATE, "--retry_rejected", "true")
    assert Server.asked == ["gone"]


@pytest.mark.parametrize("item_id", ["../x", "/x", "..", ".x", ""])
def test_an_item_id_that_cannot_name_a_file_is_refused(download, tmp_path, item_id):
    with pytest.raises(InputError, match=f"the item id '{item_id}' cannot name a file"):
        download({item_id: "http://example.org/x.jpg"})
    assert not (tmp_path.parent / "x.jpg").exists()


def test_at_most_workers_downloads_are_in_flight(server, stage, tmp_path):
    options = stage.Options(allow_private=True, workers=3)
    started = []
    row_ids = ((f"x{n}", server + "counted") for n in range(12) if not started.append(n))
    with closing(stage.download_all(row_ids, tmp_path, options)) as results:
        next(results)
        assert len(started) == 3, "not all URLs become tasks at once"
        assert sum(row is not None for _, row, _ in results) == 11
    assert Server.most_in_flight == 3


def test_closing_the_results_cancels_what_is_in_flight(server, stage, tmp_path, caplog):
    options = stage.Options(allow_private=True, workers=4, retries=1)
    row_ids = [("good", server + "good"), *((f"s{n}", server + "silent") for n in range(8))]
    with closing(stage.download_all(row_ids, tmp_path, options)) as results:
        assert next(results)[0] == ("good", server + "good")
        started = time.monotonic()
    assert time.monotonic() - started < 1, "the server sleeps for 3 s"
    assert Server.asked.count("silent") <= 4
    assert caplog.records == [], "asyncio logs tasks that are left over"
