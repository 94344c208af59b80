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
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, ip_address, ip_network
from itertools import islice
from pathlib import Path

import aiohttp
import tenacity
from pydantic.dataclasses import dataclass

from mllmrec.data.images import ImageError, open_image
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import TEMPORARY, atomic_file, read_by_id, require
from mllmrec.stage.options import CommonOptions, option, parse_options, print_options
from mllmrec.stage.output import RowOutput
from mllmrec.stage.record import Job, world_size

SECTION = "download"
SPEED_OPTIONS = ("workers", "retries", "timeout", "retry_rejected", "allow_private")
USER_AGENT = "Mozilla/5.0 (compatible; MLLM-MSR reproduction; image download for research)"
MAX_REDIRECTS = 5
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
MAX_WAIT = 60  # seconds between two tries, even if the server asks for more
BACKOFF = tenacity.wait_exponential_jitter(max=MAX_WAIT)  # 1, 2, 4 ... seconds, plus up to 1
NAT64 = ip_network("64:ff9b::/96")
# Networks of special purpose that `is_global` of some Python versions counts as public:
SPECIAL = [ip_network(n) for n in ("192.0.0.0/24", "192.88.99.0/24", "fec0::/10", "3fff::/20")]


@dataclass
class Options(CommonOptions):
    workers: int = option(16, "downloads in flight", ge=1, le=1000)
    retries: int = option(4, "tries per image; waits 1, 2, 4 ... s or Retry-After", ge=1, le=100)
    timeout: float = option(
        20.0,
        "seconds without data that end a try; a try may take three times as long in total",
        gt=0,
        le=3600,
        allow_inf_nan=False,
    )
    max_megabytes: float = option(20.0, "limit of one image", gt=0, le=1000, allow_inf_nan=False)
    retry_rejected: bool = option(False, "try images again that an earlier run rejected")
    allow_private: bool = option(False, "also contact servers at non-public addresses")


class Rejected(Exception):
    """A download that cannot succeed; the message is the reason."""


class Temporary(Exception):
    """A download that may succeed later. retry_after: seconds that the server asks for, or None."""

    def __init__(self, reason, retry_after=None):
        super().__init__(reason)
        self.retry_after = retry_after


def is_public(address):
    """Whether an IP address, and an IPv4 address embedded in it, is one of the public internet."""
    ip = ip_address(address)
    if ip.version == 6:
        in_nat64 = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
        if embedded := ip.ipv4_mapped or ip.sixtofour or in_nat64:
            return is_public(embedded)
    special = ip.is_multicast or ip.is_reserved or any(ip in network for network in SPECIAL)
    return ip.is_global and not special


def public_socket(address_info):
    """A socket for the address that aiohttp is about to connect to, refused if it is not public."""
    family, kind, protocol, _, (address, *_) = address_info
    if not is_public(address):
        # With an errno, which is kept when the errors of several addresses are combined.
        raise PermissionError(errno.EACCES, f"the address {address} is not public")
    return socket.socket(family, kind, protocol)


async def open_session(options):
    """The HTTP client: time limits, and a check of each address, redirects included."""
    # Name lookups use these threads; one per download, so that a slow lookup delays no other one.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(options.workers))
    check = None if options.allow_private else public_socket
    seconds = options.timeout
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=options.workers, socket_factory=check),
        # `total` starts with the first request; redirects and slow data do not extend it.
        timeout=aiohttp.ClientTimeout(total=3 * seconds, connect=seconds, sock_read=seconds),
        headers={"User-Agent": USER_AGENT, "Accept": "image/*"},
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def fetch(session, url, limit):
    """The body behind `url`, at most `limit` bytes. Raises Rejected or Temporary."""
    if not url.lower().startswith(("http://", "https://")):  # aiohttp would also accept ws and tcp
        raise Rejected(f"{url[:200]} is not an http or https address")
    try:
        # + 1, because aiohttp counts the first request too
        async with session.get(url, max_redirects=MAX_REDIRECTS + 1) as response:
            if response.status in RETRY_STATUS:
                wait = response.headers.get("Retry-After", "")
                wait = float(wait) if wait.isdecimal() else None
                raise Temporary(f"the server answered {response.status}", wait)
            if response.status != 200:
                raise Rejected(f"the server answered {response.status}")
            return await read_body(response, limit)
    except aiohttp.NonHttpUrlRedirectClientError as error:
        raise Rejected(f"redirect: {str(error)[:200]} is not an http or https address") from None
    except aiohttp.TooManyRedirects:
        raise Rejected(f"more than {MAX_REDIRECTS} redirects") from None
    except aiohttp.ServerTimeoutError:
        raise Temporary(f"no answer within {session.timeout.sock_read:g} s") from None
    except TimeoutError:
        raise Temporary(f"not complete within {session.timeout.total:g} s") from None
    except aiohttp.ClientConnectorError as error:
        if error.errno == errno.EACCES:
            reason = f"{error.host} is not contacted: {error.strerror}"
            raise Rejected(f"{reason}; --allow_private true would contact it") from None
        raise Temporary(f"the connection failed ({error})") from None
    except ValueError as error:  # aiohttp.InvalidURL, or a host name that cannot be encoded
        raise Rejected(f"not a valid address: {str(error)[:200]}") from None
    except aiohttp.ClientError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Temporary(f"the connection failed ({reason})") from None


async def read_body(response, limit):
    """The whole body; aiohttp raises ClientPayloadError if it is cut."""
    announced = response.content_length or 0
    if announced > limit:
        raise Rejected(f"{announced:,} bytes are more than --max_megabytes allows")
    body = bytearray()
    async for chunk in response.content.iter_any():  # decompressed, in small chunks
        body += chunk
        if len(body) > limit:
            raise Rejected(f"the body did not end after {limit:,} bytes (--max_megabytes)")
    return bytes(body)


def seconds_until_retry(state):
    """What the server asks for, up to MAX_WAIT, else BACKOFF; both with jitter."""
    asked = state.outcome.exception().retry_after
    return BACKOFF(state) if asked is None else min(asked, MAX_WAIT) + random.uniform(0, 1)


async def download(session, row_id, folder, options):
    """(row_id, row, None) after writing the image file, or (row_id, None, reason)."""
    item_id, url = row_id
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(Temporary),
        stop=tenacity.stop_after_attempt(options.retries),
        wait=seconds_until_retry,
        reraise=True,
    )
    try:
        body = await retrying(fetch, session, url, int(options.max_megabytes * 1e6))
        width, height = await asyncio.to_thread(save, body, folder / f"{item_id}.jpg")
    except Rejected as reason:
        return row_id, None, str(reason)
    except Temporary as reason:
        return row_id, None, f"{reason}, {options.retries} times"
    except ImageError as reason:
        return row_id, None, f"not a usable image: {reason}"
    row = {"item_id": item_id, "url": url, "bytes": len(body), "width": width, "height": height}
    return row_id, row, None


def save(body, path):
    """Write `body` to `path` and return (width, height) of the image. Raises ImageError."""
    image = open_image(io.BytesIO(body))
    with atomic_file(path) as file:
        file.write(body)
    return image.size


async def ended(tasks):
    """Wait until all tasks have ended; their errors are dropped."""
    await asyncio.gather(*tasks, return_exceptions=True)


def download_all(row_ids, folder, options):
    """Yield (row_id, row, reason) as downloads end, at most `options.workers` in flight.

    Closing the generator cancels those in flight.
    """
    if world_size() == 1:  # else another process may be writing one of them
        for path in folder.glob(f".*{TEMPORARY}*"):  # of a run that was killed
            path.unlink()
    waiting, in_flight, done = iter(row_ids), set(), set()
    with asyncio.Runner() as runner:
        session = runner.run(open_session(options))
        try:
            while True:
                for row_id in islice(waiting, options.workers - len(in_flight)):
                    task = download(session, row_id, folder, options)
                    in_flight.add(runner.get_loop().create_task(task))
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


def main(argv=None):
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
    job = Job.of(options, {}, ignore=SPEED_OPTIONS)
    output = RowOutput(
        data_dir / "images.jsonl", ("item_id", "url"), row_ids, job, options.retry_rejected
    )
    if output.is_up_to_date():
        return
    folder = data_dir / "images"
    folder.mkdir(exist_ok=True)
    output.write_results(download_all(output.todo, folder, options), "images", "image")


if __name__ == "__main__":
    run_main(main)
