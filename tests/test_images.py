"""Images of unknown origin: one RGB image, or one reason why not."""

import io
import re
import shutil

import numpy as np
import pytest
from conftest import bomb
from PIL import Image

from mllmrec.data.images import (
    ImageError,
    check_image_paths,
    image_index,
    image_size,
    open_image,
    pad_black,
    padded_sizes,
)
from mllmrec.stage.errors import InputError

RED = (200, 30, 30)


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_modes_become_rgb(tmp_path):
    cases = {
        "cmyk.jpg": Image.new("RGB", (8, 8), RED).convert("CMYK"),
        "grey.png": Image.new("L", (8, 8), 120),
        "one_bit.png": Image.new("1", (8, 8), 1),
        "palette.gif": Image.new("RGB", (8, 8), RED).convert("P"),
        "tiny.png": Image.new("RGB", (1, 1), RED),
        "long.png": Image.new("RGB", (20000, 10), RED),
    }
    for name, image in cases.items():
        opened = open_image(saved(tmp_path, image, name))
        assert opened.mode == "RGB"
        assert opened.size == image.size
    assert (
        max(
            abs(a - b)
            for a, b in zip(open_image(tmp_path / "cmyk.jpg").getpixel((4, 4)), RED, strict=True)
        )
        < 12
    )


def test_16_bit_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 16384, 32768, 65535]], dtype=np.uint16)
    opened = open_image(saved(tmp_path, Image.fromarray(values), "deep.png"))
    assert [opened.getpixel((x, 0))[0] for x in range(4)] == pytest.approx([0, 64, 127, 255], abs=1)


def test_transparent_pixels_become_white(tmp_path):
    rgba = Image.new("RGBA", (8, 8), (*RED, 0))
    assert open_image(saved(tmp_path, rgba, "clear.png")).getpixel((4, 4)) == (255, 255, 255)
    palette = Image.new("RGB", (8, 8), RED).convert("P")
    assert open_image(
        saved(tmp_path, palette, "clear_palette.png", transparency=palette.getpixel((0, 0)))
    ).getpixel((4, 4)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(
        saved(tmp_path, Image.new("RGB", (20, 10), RED), "rotated.jpg", exif=exif)
    ).size == (10, 20)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, frames[0], "animated.gif", save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((4, 4)) == (255, 0, 0)


def jpeg_bytes():
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 60).convert("RGB").save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "not a readable image"),
        ("half.jpg", jpeg_bytes()[:2000], "not a readable image"),
        ("text.jpg", b"<html>not found</html>", "not a readable image"),
        ("bomb.png", bomb(), "pixels"),
    ],
)
def test_broken_images_have_a_reason(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(tmp_path / name)
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_have_a_reason(tmp_path):
    with pytest.raises(ImageError, match="missing"):
        open_image(tmp_path / "none.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(ImageError, match="folder"):
        open_image(tmp_path / "folder.jpg")


def test_images_are_found_under_any_suffix(tmp_path):
    for name in ("1.jpg", "2.PNG", "3.webp", "4.JPEG", "5.txt", "6.png", "6.jpg"):
        (tmp_path / name).write_bytes(b"x")
    found = image_index(tmp_path)
    assert {key: path.rsplit("/", 1)[1] for key, path in found.items()} == {
        "1": "1.jpg", "2": "2.PNG", "3": "3.webp", "4": "4.JPEG", "6": "6.jpg",
    }  # fmt: skip
    assert image_index(None) == {}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
def test_the_usual_formats_are_read(tmp_path, kind):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "x.jpg", format=kind)
    assert open_image(tmp_path / "x.jpg").size == image_size(tmp_path / "x.jpg") == (8, 8)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused_whatever_the_file_is_called(tmp_path, kind, monkeypatch):
    """Pillow would start Ghostscript for an EPS."""
    Image.new("RGB", (8, 8), RED).save(tmp_path / "x.jpg", format=kind)
    monkeypatch.setattr("subprocess.check_call", None)
    for opener in (open_image, image_size):
        with pytest.raises(ImageError, match="not a readable image"):
            opener(tmp_path / "x.jpg")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.png", "lies in .*, outside .*data and --image_roots"),
        ("/etc/passwd", "the image /etc/passwd lies in /etc"),
        ("linked.png", "the image linked.png lies in .*secret.png"),
        ("folder/secret.png", "the image folder/secret.png lies in"),
        ("../data_of_others/x.png", "lies in .*data_of_others"),
    ],
)
def test_images_outside_the_data_folder_are_refused(tmp_path, name, message):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (data / "linked.png").symlink_to(tmp_path / "secret.png")
    (data / "folder").symlink_to(tmp_path)
    inside = ["images/1.png", "images/../images/2.png", str(data / "images/3.png")]
    check_image_paths(inside, data / "items.jsonl", data, [])
    with pytest.raises(InputError, match=message):
        check_image_paths([*inside, name], data / "items.jsonl", data, [])
    check_image_paths([*inside, name], data / "items.jsonl", data, [str(tmp_path), "/etc"])


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("Inference/image_summary.py", "items.jsonl"),
        ("MLLM-MSR/test/multi_col_dataset.py", "items.jsonl"),
        ("MLLM-MSR/test/report.py", "items.jsonl"),
        ("MLLM-MSR/train/train_llava_sft.py", "mllm_msr/train.jsonl"),
        ("MLLM-MSR/test/test_with_llava_sft.py", "mllm_msr/test.jsonl"),
    ],
)
def test_every_stage_that_opens_images_refuses_those_outside(small_run, tmp_path, stage, name):
    copy = tmp_path / "copy"
    shutil.copytree(small_run.folder, copy)
    path = copy / name
    row, *rows = path.read_text().splitlines()
    other = re.sub(r'"[^"]*covers/[^"]*"', '"/etc/passwd.png"', row)
    assert other != row
    path.write_text("\n".join([other, *rows]) + "\n")
    for record in path.parent.glob("*.run.json"):
        record.unlink()
    words = ["--data_dir", str(copy), "--output_dir", str(copy), "--overwrite", "true"]
    words += ["--model", "nowhere"] if "llava_sft" in stage or "summary" in stage else []
    with pytest.raises(InputError, match=r"the image /etc/passwd.png lies in /etc, outside"):
        small_run.run(stage, *words)


def test_images_of_a_batch_are_padded_with_black_to_the_largest(tmp_path):
    """As the released code pads: in the middle, the odd pixel on the right and at the bottom."""
    paths = []
    for n, size in enumerate([(8, 4), (5, 9), (3, 3), (7, 7), (2, 6)]):
        Image.new("RGB", size, RED).save(tmp_path / f"{n}.png")
        paths.append(tmp_path / f"{n}.png")
    paths.insert(1, None)
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths.insert(3, tmp_path / "broken.png")
    sizes = padded_sizes(paths, 4)
    assert sizes == [(8, 9), None, (8, 9), None, (7, 7), (7, 7), (7, 7)]
    padded = np.asarray(pad_black(open_image(paths[2]), sizes[2]))
    assert padded.shape == (9, 8, 3)
    assert (padded[:, 1:6] == RED).all(), "5 of 8 columns, 1 left of them and 2 right"
    assert not padded[:, [0, 6, 7]].any()
    image = open_image(paths[0])
    assert pad_black(image, None) is image
    assert pad_black(image, image.size) is image
