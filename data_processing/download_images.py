"""Stage 1, images: download the images of the items from their URLs.

In:  {data_dir}/image_urls.jsonl       item_id, url (written by `amazon.py`)
Out: {data_dir}/images/<item_id>.jpg   as received, whatever the format; complete or absent
     {data_dir}/images.jsonl           item_id, url, bytes, width, height
     {data_dir}/images.rejected.jsonl  item_id, url, reason

    python data_processing/download_images.py --config configs/amazon_baby.yaml

A run that was stopped resumes; `--retry_rejected true` tries rejected images again. Only http and
https; servers at non-public addresses are not contacted, also not after a redirect, unless
`--allow_private true`. Runs on a CPU; the time depends on the network.
"""

from mllmrec.stage.main import run_main

import asyncio
import errno
import io
import random
import socket
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from itertools import islice
from pathlib import Path
from typing import Any, cast

import aiohttp
import tenacity
from pydantic.dataclasses import dataclass

from mllmrec.data.images import ImageError, open_image
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import TEMPORARY, atomic_file, read_by_id, require
from mllmrec.stage.options import CommonOptions, option, parse_options, print_options
from mllmrec.stage.output import RowOutput
from mllmrec.stage.record import Job, world_size
from mllmrec.stage.schema import Row

SECTION = "download"
SPEED_OPTIONS = ("workers", "retries", "timeout", "retry_rejected", "allow_private")
HEADERS = {
    "User-Agent": "Mozilla/5.0 (compatible; MLLM-MSR reproduction; image download for research)",
    "Accept": "image/*",
}
MAX_REDIRECTS = 5
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
MAX_WAIT = 60  # seconds between two tries, even if the server asks for more
BACKOFF = tenacity.wait_exponential_jitter(max=MAX_WAIT)  # 1, 2, 4 ... seconds, plus up to 1
RowId = tuple[str, str]  # item_id, url
Result = tuple[RowId, Row | None, str | None]  # row or reason


@dataclass
class Options(CommonOptions):
    workers: int = option(16, "downloads in flight", ge=1, le=1000)
    retries: int = option(4, "tries per image; waits 1, 2, 4 ... s or Retry-After", ge=1, le=100)
    timeout: float = option(
        20.0,
        "seconds without data that end a try; a try may take three times as long in total",
        gt=0,
        le=3600,
    )
    max_megabytes: float = option(20.0, "limit of one image", gt=0, le=1000)
    retry_rejected: bool = option(False, "try images again that an earlier run rejected")
    allow_private: bool = option(False, "also contact servers at non-public addresses")


class Failed(Exception):
    """A download that failed. again: it may succeed later; after: seconds, if the server says."""

    def __init__(self, reason: str, again: bool = False, after: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.after = again, after


def is_public(address: str) -> bool:
    """Whether an IP address, and an IPv4 address embedded in it, is one of the public internet."""
    ip = ip_address(address)
    embedded = (ip.ipv4_mapped or ip.sixtofour) if ip.version == 6 else None
    if embedded:
        return is_public(str(embedded))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def public_socket(address_info: Any) -> socket.socket:
    """A socket for the address that aiohttp is about to connect to, refused if it is not public."""
    family, kind, protocol, _, (address, *_) = address_info
    if not is_public(address):
        # With an errno, which is kept when the errors of several addresses are combined.
        raise PermissionError(errno.EACCES, f"the address {address} is not public")
    return socket.socket(family, kind, protocol)


async def open_session(options: Options) -> aiohttp.ClientSession:
    """The HTTP client: time limits, and a check of each address, redirects included."""
    # Name lookups use these threads; one per download, so that a slow lookup delays no other one.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(options.workers))
    seconds, check = options.timeout, None if options.allow_private else public_socket
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=options.workers, socket_factory=check),
        # `total` starts with the first request; redirects and slow data do not extend it.
        timeout=aiohttp.ClientTimeout(total=3 * seconds, connect=seconds, sock_read=seconds),
        headers=HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def fetch(session: aiohttp.ClientSession, url: str, limit: int) -> bytes:
    """The body behind `url`, at most `limit` bytes. Raises Failed."""
    if not url.lower().startswith(("http://", "https://")):  # aiohttp would also accept ws and tcp
        raise Failed(f"{url[:200]} is not an http or https address")
    try:
        # + 1, because aiohttp counts the first request too
        async with session.get(url, max_redirects=MAX_REDIRECTS + 1) as response:
            if response.status in RETRY_STATUS:
                wait = response.headers.get("Retry-After", "")
                after = float(wait) if wait.isdecimal() else None
                raise Failed(f"the server answered {response.status}", again=True, after=after)
            if response.status != 200:
                raise Failed(f"the server answered {response.status}")
            body = bytearray()
            async for chunk in response.content.iter_any():  # decompressed, in small chunks
                body += chunk
                if len(body) > limit:
                    raise Failed(f"it has more than {limit:,} bytes (--max_megabytes)")
            return bytes(body)  # whole: aiohttp raises ClientPayloadError if it is cut
    except aiohttp.TooManyRedirects:
        raise Failed(f"more than {MAX_REDIRECTS} redirects") from None
    except (ValueError, aiohttp.NonHttpUrlRedirectClientError) as error:
        raise Failed(f"not a valid http or https address: {str(error)[:200]}") from None
    except TimeoutError as error:
        raise Failed(str(error) or "not complete in time (--timeout)", again=True) from None
    except aiohttp.ClientError as error:
        if isinstance(error, aiohttp.ClientConnectorError) and error.errno == errno.EACCES:
            reason = f"{error.host} is not contacted: {error.strerror}"
            raise Failed(f"{reason}; --allow_private true would contact it") from None
        reason = str(error) or type(error).__name__
        raise Failed(f"the connection failed ({reason})", again=True) from None


def seconds_until_retry(state: tenacity.RetryCallState) -> float:
    """What the server asks for, up to MAX_WAIT, else BACKOFF; both with jitter."""
    error = state.outcome.exception() if state.outcome else None
    asked = getattr(error, "after", None)
    return BACKOFF(state) if asked is None else min(asked, MAX_WAIT) + random.uniform(0, 1)


async def download(
    session: aiohttp.ClientSession, row_id: RowId, folder: Path, options: Options
) -> Result:
    """(row_id, row, None) after writing the image file, or (row_id, None, reason)."""
    item_id, url = row_id
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(lambda error: getattr(error, "again", False)),
        stop=tenacity.stop_after_attempt(options.retries),
        wait=seconds_until_retry,
        reraise=True,
    )
    try:
        body: bytes = await retrying(fetch, session, url, int(options.max_megabytes * 1e6))
        width, height = await asyncio.to_thread(save, body, folder / f"{item_id}.jpg")
    except Failed as error:
        return row_id, None, f"{error}, {options.retries} times" if error.again else str(error)
    except ImageError as reason:
        return row_id, None, f"not a usable image: {reason}"
    row = {"item_id": item_id, "url": url, "bytes": len(body), "width": width, "height": height}
    return row_id, row, None


def save(body: bytes, path: Path) -> tuple[int, int]:
    """Write `body` to `path` and return (width, height) of the image. Raises ImageError."""
    image = open_image(io.BytesIO(body))
    with atomic_file(path) as file:
        file.write(body)
    return image.size


async def ended(tasks: Iterable[asyncio.Task[Result]]) -> None:
    """Wait until all tasks have ended; their errors are dropped."""
    await asyncio.gather(*tasks, return_exceptions=True)


def download_all(
    row_ids: Iterable[RowId], folder: Path, options: Options
) -> Generator[Result, None, None]:
    """Yield (row_id, row, reason) as downloads end, at most `options.workers` in flight.

    Closing the generator cancels those in flight.
    """
    waiting = iter(row_ids)
    in_flight: set[asyncio.Task[Result]] = set()
    done: set[asyncio.Task[Result]] = set()
    with asyncio.Runner() as runner:
        session = runner.run(open_session(options))
        try:
            while True:
                for row_id in islice(waiting, options.workers - len(in_flight)):
                    coroutine = download(session, row_id, folder, options)
                    in_flight.add(runner.get_loop().create_task(coroutine))
                if not in_flight:
                    return
                first = asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
                done, in_flight = runner.run(first)
                for task in done:
                    yield task.result()
        finally:
            for task in in_flight:
                task.cancel()
            # Else asyncio prints the error of each that failed, e.g. as the disk is full.
            runner.run(ended({*in_flight, *done}))
            runner.run(session.close())


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, images: download")
    data_dir = Path(options.data_dir)
    urls_path = require(data_dir / "image_urls.jsonl", maker="data_processing/amazon.py")
    rows = read_by_id(urls_path, "item_id", keys=("item_id", "url"))
    for item_id in rows:
        if Path(item_id).name != item_id or item_id[:1] in ("", "."):
            raise InputError(
                f"{urls_path}: the item id {item_id!r} cannot name a file; make the file again "
                "with scripts/01_prepare_data.sh"
            )
    # str: null, a number or a list is then rejected as not an http or https address
    row_ids = [(item_id, str(row["url"])) for item_id, row in rows.items()]
    # No inputs: if items leave image_urls.jsonl, the images of the others stay valid.
    job = Job.of(options, {}, SPEED_OPTIONS, stage=SECTION)
    output = RowOutput(
        data_dir / "images.jsonl", ("item_id", "url"), row_ids, job, options.retry_rejected
    )
    if output.is_up_to_date():
        return
    folder = data_dir / "images"
    folder.mkdir(exist_ok=True)
    if world_size() == 1:  # else another process may be writing one of them
        for path in folder.glob(f".*{TEMPORARY}*"):  # of a run that was killed
            path.unlink()
    todo = cast(list[RowId], output.todo)
    output.write_results(download_all(todo, folder, options), "images", "image")


if __name__ == "__main__":
    run_main(main)
