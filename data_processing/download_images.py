"""Stage 1, images: fetches the items' pictures from their URLs.

In:  {data_dir}/image_urls.jsonl       item_id, url (made by `amazon.py`)
Out: {data_dir}/images/<item_id>.jpg   as fetched, whatever the format; whole or not there
     {data_dir}/images.jsonl           item_id, url, bytes, width, height
     {data_dir}/images.rejected.jsonl  item_id, reason: what could not be had

    python data_processing/download_images.py --config configs/amazon_baby.yaml

Started again, it goes on where it stopped; `--retry_rejected true` tries again what failed. Only http and https; a server
on a private, loopback or link-local address is not contacted, not by a redirect either, unless `--allow_private true`.
CPU; the time is the network's.
"""

import io
import ipaddress
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpcore2

from data_processing.config import CommonArgs, option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.images import ImageError, open_image
from data_processing.jsonl import read_lines, require, whole_file
from data_processing.run_record import settings_of
from data_processing.stage_output import StageOutput

SPEED_OPTIONS = ("workers", "retries", "timeout", "retry_rejected", "allow_private")
REDIRECTS = 5
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
AGENT = "Mozilla/5.0 (compatible; MLLM-MSR reproduction; image download for research)"


@dataclass
class Args(CommonArgs):
    workers: int = option(16, "downloads at a time")
    retries: int = option(4, "tries per image in all; waits 1, 2, 4 … seconds between them, or what the server asks for")
    timeout: float = option(20.0, "seconds until a silent server is given up; a whole image may take three times as long")
    max_megabytes: float = option(20.0, "a larger body is given up")
    retry_rejected: bool = option(False, "try images again that were set aside earlier")
    allow_private: bool = option(False, "also contact servers on private and loopback addresses")


class Failed(Exception):
    """A download that will not succeed; the message is the reason."""


class Later(Exception):
    """A download that may succeed later. wait: seconds the server asked for, or None."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class PublicOnly(httpcore2.NetworkBackend):
    """Opens connections to public addresses only. The address that was checked is the one that is connected to."""

    def __init__(self, allow_private):
        self.allow_private, self.inner = allow_private, httpcore2.SyncBackend()

    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f"the host {host} is not known ({error})") from None
        address = found[0][4][0]
        if not self.allow_private and not ipaddress.ip_address(address.split("%")[0]).is_global:
            raise Failed(f"{host} has the private address {address}; --allow_private true would contact it")
        return self.inner.connect_tcp(address, port, timeout, local_address, socket_options)

    def sleep(self, seconds):
        self.inner.sleep(seconds)


def fetch(pool, url, args):
    """The body behind `url` as bytes, at most `max_megabytes`. Raises Failed or Later."""
    deadline, limit = time.monotonic() + 3 * args.timeout, int(args.max_megabytes * 1e6)
    timeouts = dict.fromkeys(("connect", "read", "write", "pool"), args.timeout)
    for _ in range(REDIRECTS + 1):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise Failed(f"{url[:200]} is no http or https address")
        try:
            with pool.stream("GET", url, headers={"User-Agent": AGENT, "Accept": "image/*"}, extensions={"timeout": timeouts}) as response:
                headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
                if 300 <= response.status < 400 and "location" in headers:
                    url = urljoin(url, headers["location"])
                    continue
                if response.status in RETRY_STATUS:
                    wait = headers.get("retry-after", "")
                    raise Later(f"the server answered {response.status}", float(wait) if wait.isdigit() else None)
                if response.status != 200:
                    raise Failed(f"the server answered {response.status}")
                return read_body(response, headers, limit, deadline)
        except httpcore2.TimeoutException:
            raise Later(f"no answer within {args.timeout:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise Later(f"the connection failed ({error or type(error).__name__})") from None
        except (httpcore2.UnsupportedProtocol, UnicodeError, ValueError) as error:
            raise Failed(f"{url[:200]} is no usable address ({error})") from None
    raise Failed(f"more than {REDIRECTS} redirects")


def read_body(response, headers, limit, deadline):
    """The whole body, or Failed for one that is too large, or Later for one that breaks off or drips."""
    announced = int(headers["content-length"]) if headers.get("content-length", "").isdigit() else None
    if announced is not None and announced > limit:
        raise Failed(f"{announced:,} bytes are more than --max_megabytes allows")
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > limit:
            raise Failed(f"the body did not end after {limit:,} bytes, which is all --max_megabytes allows")
        if time.monotonic() > deadline:
            raise Later("the body took longer than three times --timeout")
    if announced is not None and len(body) < announced:
        raise Later(f"the body broke off after {len(body):,} of {announced:,} bytes")
    return bytes(body)


def fetch_patiently(pool, url, args):
    """`fetch` with up to `args.retries` tries. Raises Failed."""
    for attempt in range(args.retries):
        try:
            return fetch(pool, url, args)
        except Later as problem:
            if attempt + 1 == args.retries:
                raise Failed(f"{problem}, {args.retries} times") from None
            wait = min(problem.wait, 60) if problem.wait is not None else 2**attempt
            time.sleep(wait * random.uniform(0.8, 1.2))  # so that many workers do not come back at once


def save(pool, item_id, url, folder, args):
    """(row, None) after writing the image file, or (None, reason)."""
    path = folder / f"{item_id}.jpg"
    try:
        body = fetch_patiently(pool, url, args)
        image = open_image(io.BytesIO(body))
    except Failed as reason:
        return None, str(reason)
    except ImageError as reason:
        return None, f"what came is no usable image: {reason}"
    with whole_file(path) as file:
        file.write(body)
    return {"item_id": item_id, "url": url, "bytes": len(body), "width": image.width, "height": image.height}, None


def main(argv=None):
    args = parse_args(Args, "download", argv, __doc__)
    show(args, "stage 1, images: download")
    folder = Path(args.data_dir) / "images"
    urls_path = require(Path(args.data_dir) / "image_urls.jsonl", maker="data_processing/amazon.py")
    urls = {row["item_id"]: row["url"] for _, row in read_lines(urls_path, keys=("item_id", "url"))}
    for item_id in urls:
        if Path(item_id).name != item_id or item_id.startswith("."):
            raise InputError(
                f"{urls_path}: the item id {item_id!r} cannot name a file; make the file again with scripts/01_prepare_data.sh"
            )
    # The URLs are no part of the record's inputs: when items leave, what was fetched for the others stays good.
    output = StageOutput(
        Path(args.data_dir) / "images.jsonl",
        ("item_id", "url"),
        urls.items(),
        args,
        settings_of(args, SPEED_OPTIONS),
        {},
        args.retry_rejected,
    )
    if output.finished:
        print(f"{folder} is up to date, nothing to do")
        return
    folder.mkdir(parents=True, exist_ok=True)
    pool = httpcore2.ConnectionPool(
        max_connections=2 * args.workers, max_keepalive_connections=args.workers, network_backend=PublicOnly(args.allow_private),
    )  # fmt: skip
    with pool, ThreadPoolExecutor(args.workers) as workers:
        done = in_order(workers, lambda pair: save(pool, *pair, folder, args), output.todo, 4 * args.workers)
        output.fill(((pair, *row_and_reason) for pair, row_and_reason in done), "images", "image")


def in_order(workers, work, names, ahead):
    """Yields (name, work(name)) in the order of `names`, with at most `ahead` of them under way."""
    waiting, coming = [], iter(names)
    while True:
        while len(waiting) < ahead and (name := next(coming, None)) is not None:
            waiting.append((name, workers.submit(work, name)))
        if not waiting:
            return
        name, future = waiting.pop(0)
        yield name, future.result()


if __name__ == "__main__":
    run(main)
