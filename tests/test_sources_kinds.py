"""Kinds of image files: each becomes the pixels that a person sees, or is named with the reason."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tiny
from PIL import Image
from test_run import command

import sources
from sources import base, files, kinds

PIXELS = np.kron(tiny.noise(5, 4, 5), np.ones([8, 8, 1], np.uint8))  # blocks that JPEG keeps
GREY = np.asarray(Image.fromarray(PIXELS).convert("L").convert("RGB"))


JPEG = b"\xff\xd8"  # how such a file begins


def encoded(kind, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def animated(kind, mode="RGB", **options):
    """An animation that begins with the pixels and goes on with their negative."""
    first, second = (Image.fromarray(pixels).convert(mode) for pixels in (PIXELS, 255 - PIXELS))
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=[second], **options)
    return buffer.getvalue()


def sixteen_bits(kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(GREY[..., 0].astype(np.uint16) * 257).save(buffer, kind)
    return buffer.getvalue()


def quantized():
    return np.asarray(Image.fromarray(PIXELS).convert("P").convert("RGB"))


GREYS = np.arange(0, 256, 8, dtype=np.uint8).reshape(4, 8)  # [4, 8]
ROTATED = 6  # in EXIF: turn it a quarter to the right to see it upright


def exif(orientation):
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def half_transparent(mode):
    """The pixels over transparency that grows from top to bottom."""
    alpha = np.linspace(0, 255, len(PIXELS)).astype(np.uint8)[:, None].repeat(PIXELS.shape[1], axis=1)
    image = Image.fromarray(PIXELS).convert(mode[:-1])
    image.putalpha(Image.fromarray(alpha))
    return image


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def on_white(mode):
    pixels = np.asarray(half_transparent(mode).convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


def transparent_palette():
    """A palette image whose first colour is transparent, and what a person sees."""
    indices = np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2), np.ones([8, 8], np.uint8))
    image = Image.fromarray(indices, "P")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 90, 90, 90])
    colours = np.array([[255, 255, 255], [0, 200, 0], [0, 0, 200], [90, 90, 90]], np.uint8)
    return image, colours[indices]


def palette_bmp():
    """A BMP whose palette runs from white to black."""
    image = Image.fromarray(GREYS, "P")
    image.putpalette([255 - i // 3 for i in range(768)])
    return saved(image, "BMP"), np.repeat(255 - GREYS[..., None], 3, axis=-1)


def shown(source):
    """Every (image, label) of a source as its streams see them."""
    stream = source.ordered().map(lambda example: source.with_image(example, replace=False))
    return [(example["image"].numpy(), int(example["label"])) for example in stream]


# A name, the content of the file, and the pixels that a person sees.
KINDS = [
    ("a.jpg", encoded("JPEG", quality=95, subsampling=0), PIXELS),
    ("progressive.jpeg", encoded("JPEG", quality=95, subsampling=0, progressive=True), PIXELS),
    ("grey.jpg", encoded("JPEG", "L", quality=95), GREY),
    ("cmyk.jpg", encoded("JPEG", "CMYK", quality=95), PIXELS),
    ("a.png", encoded("PNG"), PIXELS),
    ("grey.png", encoded("PNG", "L"), GREY),
    ("alpha.png", encoded("PNG", "RGBA"), PIXELS),
    ("grey_alpha.png", encoded("PNG", "LA"), GREY),
    ("palette.png", encoded("PNG", "P"), quantized()),
    ("sixteen_bits.png", sixteen_bits(), GREY),
    ("a.gif", encoded("GIF", "P"), quantized()),
    ("animated.gif", encoded("GIF", "P", save_all=True, append_images=[Image.new("P", (40, 32))]), quantized()),
    ("animated.png", animated("PNG"), PIXELS),
    ("animated_alpha.png", animated("PNG", "RGBA"), PIXELS),
    ("animated.webp", animated("WEBP", lossless=True), PIXELS),
    ("animated_alpha.webp", animated("WEBP", "RGBA", lossless=True), PIXELS),
    ("pages.tif", animated("TIFF"), PIXELS),
    ("a.bmp", encoded("BMP"), PIXELS),
    ("grey.bmp", encoded("BMP", "L"), GREY),
    ("a.webp", encoded("WEBP", lossless=True), PIXELS),
    ("alpha.webp", encoded("WEBP", "RGBA", lossless=True), PIXELS),
    ("turned.jpg", encoded("JPEG", quality=95, subsampling=0, exif=exif(ROTATED)), np.rot90(PIXELS, -1)),
    ("upright.jpg", encoded("JPEG", quality=95, subsampling=0, exif=exif(1)), PIXELS),
    ("turned_cmyk.jpg", encoded("JPEG", "CMYK", quality=95, exif=exif(ROTATED)), np.rot90(PIXELS, -1)),
    ("old.jfif", encoded("JPEG", quality=95, subsampling=0), PIXELS),
    ("turned.png", encoded("PNG", exif=exif(ROTATED)), np.rot90(PIXELS, -1)),
    ("through.png", saved(half_transparent("RGBA"), "PNG"), on_white("RGBA")),
    ("through_grey.png", saved(half_transparent("LA"), "PNG"), on_white("LA")),
    ("through_palette.png", saved(transparent_palette()[0], "PNG", transparency=0), transparent_palette()[1]),
    ("through.gif", saved(transparent_palette()[0], "GIF", transparency=0), transparent_palette()[1]),
    ("through.webp", saved(half_transparent("RGBA"), "WEBP", lossless=True), on_white("RGBA")),
    ("palette.bmp", *palette_bmp()),
    ("a.tif", encoded("TIFF"), PIXELS),
    ("cmyk.tiff", encoded("TIFF", "CMYK"), PIXELS),
    ("sixteen_bits.tif", sixteen_bits("TIFF"), GREY),
    ("turned.tif", encoded("TIFF", exif=exif(ROTATED)), np.rot90(PIXELS, -1)),
    ("wrong_suffix.png", encoded("JPEG", quality=95, subsampling=0), PIXELS),
]


@pytest.mark.parametrize(
    ("name", "content", "expected"), KINDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_kind_of_image_becomes_the_pixels_it_shows(tmp_path, name, content, expected):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_bytes(content)
    source = sources.load("image_folder", "train", str(tmp_path))
    ((image, _),) = tiny.in_order(source)
    for stream in (source, source.in_memory()):
        ((in_graph, _),) = shown(stream)
        np.testing.assert_array_equal(in_graph, image)
    assert image.dtype == np.uint8 and image.shape == expected.shape
    np.testing.assert_allclose(image.astype(int), expected, atol=1 if content[:2] != JPEG else 8)


@pytest.mark.parametrize(
    ("content", "plain"),
    [
        (encoded("JPEG"), True),
        (encoded("JPEG", progressive=True), True),
        (encoded("JPEG", "L"), True),
        (encoded("JPEG", "CMYK"), True),
        (encoded("PNG"), True),
        (encoded("PNG", "P"), True),
        (sixteen_bits(), True),
        (encoded("JPEG", exif=exif(1)), False),
        (encoded("PNG", "RGBA"), False),
        (saved(transparent_palette()[0], "PNG", transparency=0), False),
        (encoded("GIF", "P"), False),
        (encoded("BMP"), False),
        (encoded("WEBP"), False),
        (b"", False),
        (b"no image", False),
        (b"\xff\x0a" + encoded("JPEG"), False),  # JPEG XL, whose header TensorFlow alone can read
    ],
)
def test_what_tensorflow_shows_as_a_person_sees_it_is_known_by_the_first_bytes(content, plain):
    assert bool(kinds.is_plain(tf.constant(content))) == plain
    small = len(PIXELS) * PIXELS.shape[1]
    assert not bool(kinds.is_plain(tf.constant(content), max_pixels=small))  # it may have more: the header decides


def test_plain_files_are_decoded_by_tensorflow_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "decode_by_hand", lambda *_: pytest.fail("decoded by hand"))
    for name, content in (("a.jpg", encoded("JPEG")), ("b.png", encoded("PNG")), ("c.jpg", encoded("JPEG", "L"))):
        (tmp_path / name).write_bytes(content)
    source = files.file_source(str(tmp_path), ["a.jpg", "b.png", "c.jpg"], [-1] * 3, [])
    for number, (image, _) in enumerate(shown(source)):
        np.testing.assert_array_equal(image, base.decode_image(tf.io.read_file(source.path(number))))


def black_png(width, height):
    """A PNG that says it has this size, with next to no content."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "limit", "why"),
    [
        (
            black_png(20_000, 20_000),
            kinds.MAX_PIXELS,
            "20000 x 20000 pixels are more than --max_image_pixels=100000000",
        ),
        (encoded("PNG"), 1000, "40 x 32 pixels are more than --max_image_pixels=1000"),
        (encoded("JPEG"), 1000, "40 x 32 pixels are more than --max_image_pixels=1000"),
        (encoded("JPEG", exif=exif(ROTATED)), 1000, "40 x 32 pixels are more than"),
        (saved(Image.fromarray(np.ones([2, 2], np.float32)), "TIFF"), 1000, "numbers of 32 bits in a TIFF file"),
        (b"", 1000, "Input is empty"),
        (b"no image", 1000, "Unknown image file format"),
        (b"\xff\x0a" + bytes(30), 1000, "JPEG XL is not read: convert it to JPEG or PNG"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", 1000, "JPEG XL is not read"),
        (encoded("PNG")[:-40], kinds.MAX_PIXELS, "Invalid PNG data"),
        (encoded("TIFF")[:100], kinds.MAX_PIXELS, ""),
        (encoded("GIF", "P")[:100], kinds.MAX_PIXELS, ""),
    ],
)
def test_what_cannot_be_shown_is_told_with_the_reason(content, limit, why):
    with pytest.raises(kinds.Unreadable) as error:
        kinds.decode_by_hand(content, limit)
    assert why in str(error.value) and "\n" not in str(error.value) and str(error.value)
    with pytest.raises(tf.errors.OpError):
        files.decode_content(tf.constant(content), limit)


def test_an_animation_is_its_first_picture_and_a_second_frame_does_not_matter():
    frames = [Image.fromarray(GREYS), Image.fromarray(255 - GREYS)]
    animated = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(kinds.decode_by_hand(animated)[..., 0], GREYS)


def test_a_command_reads_every_kind_of_file(tmp_path, tmp_path_factory, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name, content, _ in KINDS:
        Path("photos", name).write_bytes(content)
    Path("photos", "float.tif").write_bytes(saved(Image.fromarray(np.zeros([8, 8], np.float32)), "TIFF"))
    network = f"--checkpoint={tiny.pretrained(tmp_path_factory)}"
    assert command("--mode=embed", network, "--data_dir=photos", "--output=h.npz") == 0, capfd.readouterr().err
    assert np.load("h.npz")["paths"].tolist() == sorted(name for name, _, _ in KINDS)
    assert list(json.loads(Path("h.npz.json").read_text())["unreadable"]) == ["float.tif"]


def test_files_of_other_kinds_are_counted(tmp_path, caplog):
    tiny.folder_of(tmp_path, "train/a/1.png", "train/b/2.png")
    for name in ("a/1.heic", "a/2.HEIC", "b/3.svg", "b/notes.txt"):
        (tmp_path / "train" / name).touch()
    assert sources.load("image_folder", "train", str(tmp_path)).examples == 2
    assert f"{tmp_path}/train: left out files of kinds that are not read: 2 .heic, 1 .svg" in caplog.text
