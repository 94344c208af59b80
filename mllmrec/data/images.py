"""Opening images of unknown origin: one RGB image, or one reason why not."""

import base64
import io
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id
from mllmrec.stage.provenance import file_digest, short_digest
from mllmrec.stage.schema import Row

# Pillow knows more, and starts other programs for some of them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # in this order, in lower and upper case
MAX_PIXELS = 100_000_000  # more is no cover but an attack on memory, or a mistake


class ImageError(Exception):
    """An image that cannot be used; the message is the reason, without the path."""


def open_image(path: str | Path | io.BytesIO) -> Image.Image:
    """The image at `path` (or in a file object) as RGB.

    First frame, rotated as its EXIF data says, transparency on white. Raises ImageError with the
    reason for a missing, empty, broken, truncated or oversized file, or one of another kind.
    """
    try:
        with warnings.catch_warnings():  # large images are judged by MAX_PIXELS instead
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on broken bytes
        raise ImageError(_reason(error, path)) from None


def _reason(error: Exception, path: str | Path | io.BytesIO) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, Image.DecompressionBombError):
        return f"it would unpack to more than {MAX_PIXELS} pixels"
    text = " ".join(str(error).replace(str(path), "the file").split())
    return f"not a readable image ({type(error).__name__}: {text})"


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels that `open_image` would give, from the file's header alone.

    Raises ImageError for what the header reveals.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            rotated = image.getexif().get(0x0112) in (5, 6, 7, 8)  # by a quarter
            return (height, width) if rotated else (width, height)
    except Exception as error:  # as above
        raise ImageError(_reason(error, path)) from None


def padded_sizes(paths: Sequence[Path | None], n: int) -> list[tuple[int, int] | None]:
    """For each image, the largest (width, height) of its batch: `n` consecutive ones, as listed.

    None: no image, or one whose header cannot be read. The released code pads the images of a batch
    to this size (`pad_black`), so that a score depends on the batch.
    """
    known = [size_or_none(path) for path in paths]
    sizes: list[tuple[int, int] | None] = []
    for start in range(0, len(known), n):
        batch = known[start : start + n]
        sizes += [largest(batch) if size else None for size in batch]
    return sizes


def largest(sizes: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    """(largest width, largest height) of some sizes; None if there are none."""
    given = [size for size in sizes if size]
    return (max(w for w, _ in given), max(h for _, h in given)) if given else None


def size_or_none(path: Path | None) -> tuple[int, int] | None:
    """(width, height) of an image; None if there is none that can be opened."""
    try:
        return image_size(path) if path is not None else None
    except ImageError:
        return None


def pad_black(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """The image in the middle of a black one of (width, height); None: as it is."""
    if size is None or image.size == size:
        return image
    left, top = (size[0] - image.width) // 2, (size[1] - image.height) // 2
    right, bottom = size[0] - image.width - left, size[1] - image.height - top
    return ImageOps.expand(image, border=(left, top, right, bottom), fill="black")


def pad_to_largest(images: Sequence[Image.Image | None]) -> list[Image.Image | None]:
    """The images padded with black to the largest width and height among them; None stays None."""
    size = largest([image.size if image else None for image in images])
    return [pad_black(image, size) if image else None for image in images]


def item_images(
    items: Mapping[str, Row], items_path: str | os.PathLike[str]
) -> dict[str, Path | None]:
    """Item id -> path of its image, None without one. items: lines of the file `items_path`."""
    folder = Path(items_path).parent
    return {i: folder / item["image"] if item["image"] else None for i, item in items.items()}


def image_digests(paths: Iterable[Path | None]) -> dict[Path | None, str | None]:
    """path -> digest of the file's bytes; None without a file that can be read."""
    different = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        return dict(zip(different, pool.map(_digest_or_none, different), strict=True))


def _digest_or_none(path: Path | None) -> str | None:
    try:
        return file_digest(path) if path is not None else None
    except OSError:
        return None


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """An image as a data: URL. kind: of the encoding; options: of Pillow's encoder.

    PNG loses nothing, so a server sees what a model in this process would see.
    """
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return encoded_url(f"image/{kind.lower()}", buffer.getvalue())


def encoded_url(kind: str, content: bytes) -> str:
    """A file's content as a data: URL. kind: its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def check_image_paths(
    names: Iterable[str], of_file: str | Path, data_dir: str | Path, roots: Sequence[str]
) -> None:
    """Raise InputError if an image of the file `of_file` lies outside `data_dir` and `roots`.

    names: paths relative to the file. Links are resolved: a data set of others must not make a
    stage open, or a report show, any file of this machine.
    """
    parent = os.path.dirname(of_file) or "."
    allowed = tuple(os.path.join(os.path.realpath(root), "") for root in (data_dir, *roots))
    resolved, links = cache(os.path.realpath), cache(_links)  # thousands lie in one folder
    for name in dict.fromkeys(names):
        path = name if name.startswith("/") else f"{parent}/{name}"
        folder, _, file = path.rpartition("/")
        place = os.path.realpath(path) if file in links(folder) else resolved(folder) + "/"
        if not place.startswith(allowed):
            raise InputError(
                f"{of_file}: the image {name} lies in {place.rstrip('/')}, outside {data_dir} and "
                f"--image_roots ({' '.join(roots) or 'none'}); if that is right, name its folder "
                "with --image_roots, also in the later stages"
            )


def _links(folder: str) -> set[str]:
    """Names of the links in a folder, which may be missing."""
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except OSError:
        return set()


def check_item_images(
    items: Mapping[str, Row], of_file: str | Path, data_dir: str | Path, roots: Sequence[str]
) -> None:
    """`check_image_paths` of the lines of items.jsonl that have an image."""
    names = [item["image"] for item in items.values() if item["image"] is not None]
    check_image_paths(names, of_file, data_dir, roots)


def image_inputs(
    items_path: str | Path, data_dir: str | Path, roots: Sequence[str]
) -> dict[str, str]:
    """{"images": digest of all images of items.jsonl}, after a check of where they are."""
    items = read_by_id(items_path, "item_id")
    check_item_images(items, items_path, data_dir, roots)
    digests = image_digests(item_images(items, items_path).values())
    return {"images": short_digest(list(digests.values()))}


def image_index(folder: str | Path | None) -> dict[str, str]:
    """dict file name without suffix -> path, of the images in `folder` (None: no images).

    If one name has several images the order of SUFFIXES decides, then the alphabet.
    """
    paths = sorted(Path(folder).iterdir(), reverse=True) if folder else []
    return {
        path.stem: str(path)
        for suffix in reversed(SUFFIXES)  # of equal names the last one stays
        for path in paths
        if path.suffix.lower() == suffix
    }


def _as_rgb(image: Image.Image) -> Image.Image:
    # 16 bit and more: Pillow would clip, not scale.
    if image.mode.startswith("I") or image.mode == "F":
        values = image.convert("F")
        extrema: Any = values.getextrema()
        top = 65535.0 if image.mode.startswith("I") else max(extrema[1], 1.0)
        image = values.point(lambda v: v * (255.0 / top) + 0.0).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")
