"""Opening raw files: recognised by their content, read in blocks of whole lines.

A file may be plain or gzipped, with or without a UTF-8 byte order mark, whatever its name says.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike

BLOCK = 16 << 20  # bytes that are parsed at a time
HEAD = 4096  # bytes that show what kind of file it is
BOM = b"\xef\xbb\xbf"
PACKED = {
    rb"BZh[1-9](1AY&SY|\x17rE8P)": "bzip2",
    rb"PK\x03\x04": "zip",
    rb"\xfd7zXZ\x00": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"7z\xbc\xaf\x27\x1c": "7z",
    rb"(?s).{257}ustar": "tar",
    rb"\x1f\x8b": "gzip, twice",
}
WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
LFS_POINTER = b"version https://git-lfs"


def check_raw_file(path: PathLike) -> Path:
    """`path` as a Path. Raises InputError if it is no file whose text can be read."""
    with open_raw(Path(path)):
        return Path(path)


def only_file(folder: Path, names: Sequence[str], missing: str) -> Path:
    """The one of the files `names` that is in the folder.

    missing: message of the InputError if none is. Raises InputError if there are two, too.
    """
    paths = [folder / name for name in names if (folder / name).exists()]
    if not paths:
        raise InputError(missing)
    if len(paths) > 1:
        raise InputError(
            f"{folder} has both {paths[0].name} and {paths[1].name}; keep one of them there"
        )
    return paths[0]


def open_raw(path: Path) -> IO[bytes]:
    """The unpacked bytes of a raw file, after a byte order mark.

    Raises InputError if it is missing, empty, packed in another way, or no UTF-8 text at all.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; put the file of this name there")
    if not path.exists():
        raise InputError(
            f"{path} is missing; the README (Real data) says where to get it and where to put it"
        )
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        opener: Any = gzip.open if packed else open
        file = opener(path, "rb")
        head = file.read(HEAD)
        file.seek(len(BOM) if head.startswith(BOM) else 0)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None
    fault = _fault_of(head)
    if fault:
        file.close()
        raise InputError(f"{path} {fault}")
    return file


def _fault_of(head: bytes) -> str | None:
    """What is wrong with a file that starts like this, with the remedy."""
    if not head.removeprefix(BOM):
        return "is empty; fetch it again"
    for magic, name in PACKED.items():
        if re.match(magic, head):
            return f"is packed ({name}); unpack it and give the unpacked file this name"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16 text; save it as UTF-8"
    if WEB_PAGE.match(head.removeprefix(BOM)):
        return "is a web page and not the data; fetch the file again"
    if head.startswith(LFS_POINTER):
        return "is a git-lfs pointer and not the data; fetch the file with `git lfs pull`"
    if b"\0" in head:
        return "holds NUL bytes, as UTF-16 text and binary files do; save it as UTF-8 text"
    return None


def _damaged(path: Path, error: Exception) -> InputError:
    """The error for a file that cannot be read to its end."""
    if isinstance(error, PermissionError):
        return InputError(f"{path} cannot be opened ({error.strerror}); make it readable")
    line = 0
    try:
        with gzip.open(path) as file:
            for _ in file:
                line += 1
    except (OSError, EOFError, zlib.error):
        pass
    return InputError(f"{path} is truncated or damaged after line {line} ({error}); fetch it again")


def blocks_of(path: Path) -> Iterator[bytes]:
    """The content of a raw file in blocks of whole lines (that end with \\n).

    The next block is read and unpacked in a thread while the caller works on the last one.
    """
    blocks = _read_blocks(path)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, blocks, b"")
        while block := ahead.result():
            ahead = pool.submit(next, blocks, b"")
            yield block


def _read_blocks(path: Path) -> Iterator[bytes]:
    rest: list[bytes] = []
    with open_raw(path) as file:
        while True:
            try:
                piece = file.read(BLOCK)
            except (OSError, EOFError, zlib.error) as error:
                raise _damaged(path, error) from None
            if not piece:
                break
            end = piece.rfind(b"\n") + 1
            if end:
                yield b"".join([*rest, memoryview(piece)[:end]])
                rest = []
            if end < len(piece):
                rest.append(piece[end:])
    if rest:
        yield b"".join(rest)


def check_utf8(path: Path, block: bytes, first: int) -> None:
    """Raise InputError naming line and byte. first: line number of the block's start."""
    if block.isascii():
        return
    try:
        block.decode()
    except UnicodeDecodeError as error:
        before = (block[: error.start] + b"x").splitlines()
        raise InputError(
            f"{path}, line {first + len(before) - 1}: byte {len(before[-1])} is not UTF-8; save "
            "the file as UTF-8"
        ) from None
