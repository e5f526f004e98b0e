"""Kinds of image files, and their pixels as a person sees them in a viewer of images.

TensorFlow decodes most photographs fast and right. It ignores which way up a camera was held (EXIF) and what shines
through (transparency), takes the indices of a BMP with a palette for grey levels, and cannot read TIFF. Pillow decodes
such files. The header decides which of the two decodes a file, so that no file is decoded twice:

- `is_plain` looks at the first bytes inside TensorFlow's graph. What it lets pass is decoded there.
- `decode_by_hand` has Pillow read the header of every other file, and decodes it with one or the other.

Where something is transparent, the background is white. An animation is its first picture.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps
from tensorflow.python.ops import script_ops

from errors import UserError, reason
from sources.base import decode_image

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
# Suffixes of images that are not read. A folder that holds such files is told how many.
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd", ".ico", ".tga", ".ppm", ".pgm", ".exr",
                  ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".pdf", ".eps")  # fmt: skip
MAX_PIXELS = 100_000_000
BY_HAND = "decode_by_hand"  # the name of a Python function in graphs that are sent to another process
HEAD = 16384  # So many bytes of a file are looked at inside the graph.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # how these files begin
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of a TIFF
# Pillow raises whatever its readers run into. MemoryError: a file says that it holds more than there is memory.
_PILLOW_FAILS = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, ArithmeticError, TypeError, AttributeError,
    AssertionError, RuntimeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
_ORIENTATION = 0x0112  # the EXIF tag that says which way up a picture is; 1: as it is stored
_UPRIGHT = (0, 1)
_WHITE = (255, 255, 255, 255)
# TensorFlow decodes JPEG XL, but no header says before how many pixels that will be: such files are not read.
_JPEG_XL_BEGINS = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")

# The limit on pixels is the user's. Pillow's own would warn or raise at another number.
Image.MAX_IMAGE_PIXELS = None
# What Pillow warns of is said with the name of the image, where the image cannot be read.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unreadable(ValueError):
    """The content of a file is not an image, or not one that can be read. The message says why, in one line."""


class TooLarge(Unreadable):
    """An image has more pixels than the user allows."""


def is_plain(encoded: tf.Tensor, max_pixels: int = MAX_PIXELS) -> tf.Tensor:
    """Whether the first bytes of a file say that TensorFlow decodes it as a person sees it. False where in doubt.

    Such files are JPEGs without EXIF and PNGs without transparency, both with sides so short that they cannot have
    more than `max_pixels`. RE2 takes patterns as UTF-8, in which no byte above 127 can be named: \\C is any byte.

    What looks like the frame header of a JPEG may stand in a comment, so TensorFlow says how many pixels a JPEG has.

    Args:
      encoded: the content of a file, a string.
      max_pixels: the limit.

    Returns:
      A bool. An error where the header of a JPEG is damaged.
    """
    longest = min(math.isqrt(max_pixels) // 256, 128)  # sides are shorter than 256 times this
    if not longest:
        return tf.constant(False)
    side = rf"[\x00-\x{longest - 1:02x}]\C"
    # A frame header: its length, 8 bits, height, width, and the number of components, on which the length depends.
    frames = "|".join(rf"\x{8 + 3 * parts:02x}\x08{side}{side}\x{parts:02x}" for parts in (1, 3, 4))
    jpeg = rf"\C*\x00(?:{frames})\C*"
    # Width, height, bit depth, and a colour type without alpha.
    png = rf"\CPNG\C{{12}}\x00\x00{side}\x00\x00{side}\C[\x00\x02\x03]\C*"
    other = r"[\x00-\x7f]\C*|\C*(?:Exif\x00|eXIf|tRNS)\C*"  # neither kind begins with a byte of ASCII
    head = tf.strings.substr(encoded, 0, HEAD)
    is_usual = ~tf.strings.regex_full_match(head, other)
    is_jpeg = tf.strings.regex_full_match(head, jpeg) & (tf.strings.substr(head, 0, len(_JPEG)) == _JPEG)
    return tf.cond(
        is_jpeg & is_usual,
        lambda: _jpeg_pixels(encoded) <= max_pixels,
        lambda: tf.strings.regex_full_match(head, png) & is_usual,
    )


def _by_hand_elsewhere(content: bytes, max_pixels: np.int64, name: bytes) -> np.ndarray:
    try:
        return decode_by_hand(content, int(max_pixels))
    except Unreadable as error:
        raise UserError(
            f"{name.decode(errors='backslashreplace')} cannot be read ({error}), and a data service puts no other "
            f"image in its place: repair or remove it, or leave out --data_service"
        ) from error


# A graph that was made in another process finds the function by this name.
script_ops._py_funcs._funcs[BY_HAND] = _by_hand_elsewhere


def decode_elsewhere(encoded: tf.Tensor, max_pixels: int, name: tf.Tensor) -> tf.Tensor:
    """The image in the content of a file, uint8 [H, W, 3], in a graph that another process of this program runs.

    Args:
      encoded: the content, a string.
      max_pixels: an image with more of them is not read.
      name: of the file, for the message where it cannot be read.
    """
    image = tf.cond(
        is_plain(encoded, max_pixels),
        lambda: decode_image(encoded),
        lambda: tf.raw_ops.PyFuncStateless(
            input=[encoded, tf.constant(max_pixels, tf.int64), name], token=BY_HAND, Tout=[tf.uint8]
        )[0],
    )
    image.set_shape([None, None, 3])
    return image


def _jpeg_pixels(encoded: tf.Tensor) -> tf.Tensor:
    """How many pixels a JPEG has, int64, by its header. An error where that is damaged."""
    shape = tf.io.extract_jpeg_shape(encoded)  # height, width, channels
    return tf.reduce_prod(tf.cast(shape[:2], tf.int64))


def decode_by_hand(encoded: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of any image file, uint8 [H, W, 3].

    Args:
      encoded: the content of a file.
      max_pixels: an image with more is not decoded.

    Raises:
      Unreadable: where the content is not an image that can be read.
    """
    if encoded.startswith(_JPEG_XL_BEGINS):
        raise Unreadable("JPEG XL is not read: convert it to JPEG or PNG")
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            _check_pixels(*image.size, max_pixels)
            _check_pixels(*_tile(image), max_pixels)
            if _needs_pillow(image):
                return _shown(image)
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        _check_pixels(*_size_by_header(encoded), max_pixels)
    except _PILLOW_FAILS as error:
        raise Unreadable(reason(error)) from error
    try:
        with tf.device("CPU:0"):
            return decode_image(tf.constant(encoded)).numpy()
    except tf.errors.OpError as error:
        raise Unreadable(reason(error)) from error


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises TooLarge where these are too many pixels."""
    if width * height > max_pixels:
        raise TooLarge(f"{width} x {height} pixels are more than --max_image_pixels={max_pixels}")


def _tile(image: Image.Image) -> tuple[int, int]:
    """The width and height of the tiles of a TIFF, each of which is decoded whole; zeros where there is none."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    return int(tags.get(_TILE_WIDTH, 0)), int(tags.get(_TILE_HEIGHT, 0))


def _size_by_header(encoded: bytes) -> tuple[int, int]:
    """The width and height of a file that Pillow does not know, and TensorFlow may decode or say what is wrong with it.

    Raises:
      Unreadable: where it is neither JPEG nor PNG. TensorFlow decodes the other kinds without a limit on their pixels.
    """
    if encoded.startswith(_PNG) and len(encoded) >= 24:
        width, height = struct.unpack(">II", encoded[16:24])
        return width, height
    if encoded.startswith(_JPEG):
        try:
            height, width, _ = tf.io.extract_jpeg_shape(encoded).numpy().tolist()
        except tf.errors.OpError as error:
            raise Unreadable(reason(error)) from error
        return width, height
    raise Unreadable("Unknown image file format" if encoded else "Input is empty")


def _needs_pillow(image: Image.Image) -> bool:
    """Whether TensorFlow would show another picture than a person sees, or none."""
    if image.format in ("BMP", "GIF", "TIFF"):
        return True
    if image.format == "WEBP" and getattr(image, "is_animated", False):
        return True
    see_through = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if see_through:
        return True
    # Without EXIF in the header, Pillow would decode a PNG to look for it behind the pixels.
    return "exif" in image.info and image.getexif().get(_ORIENTATION, 1) not in _UPRIGHT


def _shown(image: Image.Image) -> np.ndarray:
    """The pixels that a person sees, uint8 [H, W, 3].

    Raises:
      Unreadable: where the file does not say what its numbers look like.
    """
    kind = image.format
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16) >> 8  # [H, W]
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise Unreadable(f"numbers of 32 bits in a {kind} file: which of them are black and white is not said")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return np.array(image.convert("RGB"))
