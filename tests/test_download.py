"""The downloader against a server on loopback that does everything wrong."""

import functools
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import script
from PIL import Image

from data_processing.errors import InputError
from data_processing.jsonl import read_by_id, write_rows


@functools.cache
def picture(width=20, height=10, form="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, form)
    return buffer.getvalue()


class Server(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - emptied for each test

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = self.path.strip("/")
        self.asked.append(name)
        if name in ("good", "other"):
            self.answer(200, picture())
        elif name == "png":
            self.answer(200, picture(form="PNG"))
        elif name == "gone":
            self.answer(404)
        elif name == "html":
            self.answer(200, b"<html>not found</html>")
        elif name == "silent":
            time.sleep(3)
        elif name == "cut":
            self.answer(200, picture()[:200], length=len(picture()))
            self.close_connection = True
        elif name == "half":
            self.answer(200, picture()[:-150])
        elif name == "wide":
            self.answer(200, picture(10_000, 30))
        elif name == "bomb":
            self.answer(200, picture(20_000, 10_000, "PNG"))
        elif name == "announced":
            self.answer(200, b"", length=10**9)
        elif name == "endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass
        elif name == "moved":
            self.answer(302, Location="/good")
        elif name == "circle":
            self.answer(302, Location="/circle")
        elif name == "to_file":
            self.answer(302, Location="file:///etc/passwd")
        elif name == "to_private":
            self.answer(302, Location="http://10.0.0.1/x.jpg")
        elif name == "busy_once":
            first = self.asked.count(name) == 1
            self.answer(503 if first else 200, b"" if first else picture(), **({"Retry-After": "0"} if first else {}))
        elif name == "empty":
            self.answer(200)


@pytest.fixture
def server():
    Server.asked = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/"
    running.shutdown()


@pytest.fixture
def download(tmp_path, monkeypatch):
    stage = script("data_processing/download_images.py")
    monkeypatch.setattr(stage.random, "uniform", lambda *_: 0.01)  # no one waits for the back-off here

    def call(urls, *options):
        write_rows(tmp_path / "image_urls.jsonl", [{"item_id": name, "url": url} for name, url in urls.items()])
        stage.main(
            [
                "--config",
                "configs/amazon_baby.yaml",
                "--data_dir",
                str(tmp_path),
                "--retries",
                "2",
                "--timeout",
                "1.5",
                "--max_megabytes",
                "2",
                *options,
            ]
        )
        rejected = tmp_path / "images.rejected.jsonl"
        reasons = {name: row["reason"] for name, row in read_by_id(rejected, "item_id").items()} if rejected.exists() else {}
        return {row["item_id"]: row for row in map(json.loads, (tmp_path / "images.jsonl").read_text().splitlines())}, reasons

    return call


def test_each_kind_of_trouble_is_told_and_the_others_come(server, download, tmp_path):
    picture(20_000, 10_000, "PNG")  # drawn before the clock runs
    names = [
        "good",
        "png",
        "gone",
        "html",
        "silent",
        "cut",
        "half",
        "wide",
        "bomb",
        "announced",
        "endless",
        "moved",
        "circle",
        "to_file",
        "busy_once",
        "empty",
    ]
    rows, reasons = download({name: server + name for name in names}, "--allow_private", "true")
    assert set(rows) == {"good", "png", "wide", "moved", "busy_once"}
    assert {path.stem for path in (tmp_path / "images").iterdir()} == set(rows), "whole or not there, and nothing else"
    assert (tmp_path / "images" / "good.jpg").read_bytes() == picture()
    assert (rows["wide"]["width"], rows["wide"]["height"]) == (10_000, 30)
    for name, words in {
        "gone": "answered 404",
        "html": "no usable image: not a readable image",
        "silent": "no answer within 1.5 s, 2 times",
        "cut": "2 times",
        "half": "no usable image: not a readable image",
        "bomb": "no usable image: it would unpack to more than 100000000 pixels",
        "announced": "1,000,000,000 bytes are more",
        "endless": "did not end after 2,000,000 bytes",
        "circle": "more than 5 redirects",
        "to_file": "file:///etc/passwd is no http or https address",
        "empty": "the file is empty",
    }.items():
        assert words in reasons[name], name
    assert Server.asked.count("gone") == 1, "what cannot get better is not tried again"
    assert Server.asked.count("silent") == Server.asked.count("cut") == 2


def test_private_addresses_are_not_contacted(server, download):
    port = server.rsplit(":", 1)[1]
    urls = {"a": server + "good", "b": f"http://localhost:{port}good", "c": f"http://[::1]:{port}good", "d": "http://169.254.169.254/latest",
            "e": f"http://0.0.0.0:{port}good", "f": f"http://[::ffff:127.0.0.1]:{port}good"}  # fmt: skip
    rows, reasons = download(urls)
    assert rows == {}
    assert Server.asked == []
    assert all("has the private address" in reason for reason in reasons.values())
    assert set(reasons) == set(urls)


def test_a_redirect_to_a_private_address_is_not_followed(server, download, monkeypatch):
    """The first host passes for a public one; where it points to does not."""
    stage_check = script("data_processing/download_images.py").ipaddress.ip_address
    monkeypatch.setattr(
        "ipaddress.ip_address", lambda text: type("Public", (), {"is_global": True}) if text == "127.0.0.1" else stage_check(text)
    )
    rows, reasons = download({"x": server + "to_private", "y": server + "good"})
    assert set(rows) == {"y"}
    assert "10.0.0.1 has the private address 10.0.0.1" in reasons["x"]


def test_started_again_it_fetches_only_what_is_missing(server, download, tmp_path, capsys):
    download({"good": server + "good", "gone": server + "gone"}, "--allow_private", "true")
    Server.asked.clear()
    download({"good": server + "good", "gone": server + "gone"}, "--allow_private", "true")
    assert Server.asked == []
    assert "up to date" in capsys.readouterr().out
    rows, _ = download({"good": server + "good", "other": server + "other", "gone": server + "gone"}, "--allow_private", "true")
    assert Server.asked == ["other"]
    assert set(rows) == {"good", "other"}
    Server.asked.clear()
    download({"good": server + "good", "gone": server + "gone"}, "--allow_private", "true", "--retry_rejected", "true")
    assert Server.asked == ["gone"]


def test_an_item_id_cannot_leave_the_folder(download, tmp_path):
    with pytest.raises(InputError, match=r"the item id '../x' cannot name a file"):
        download({"../x": "http://example.org/x.jpg"})
    assert not (tmp_path.parent / "x.jpg").exists()


def test_downloads_run_at_the_same_time(server, download):
    started = time.monotonic()
    download({f"s{n}": server + "silent" for n in range(12)}, "--allow_private", "true", "--retries", "1", "--workers", "12")
    assert time.monotonic() - started < 9, "twelve time-outs of one second"
