"""Files that TensorFlow does not decode as Pillow does, converted to files that it decodes exactly.

Pillow decodes the first frame, turns it upright, and puts it on the background where it is transparent. The result is
handed on as an uncompressed BMP, so that everything behind the reading of a file is the same for all formats. A JPEG
that lacks only its end marker receives the marker.
"""

import io
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from pipeline.config.data import Background
from pipeline.data.sources.base import DataSource, call_in_graph
from pipeline.errors import DataError

JPEG_KINDS = ("JPEG", "MPO")  # Pillow's names of a JPEG alone, and of several in one file
JPEG_END, JPEG_SCAN = b"\xff\xd9", b"\xff\xda"
DEEP_GRAY = "I;16"  # Pillow's modes of 16 bits begin so

# All at once and now: two threads that meet their first unusual file together would miss formats.
Image.init()
with suppress(ImportError):  # of the extra heif
    import pillow_heif

    pillow_heif.register_heif_opener()


class UnsupportedImageError(ValueError):
    """An error for an image whose values do not tell how it looks."""


def decode_upright(data: bytes) -> Image.Image:
    """Decode the first frame of any file that Pillow opens, and turn it upright.

    Args:
        data: The encoded file.

    Returns:
        Mode RGBA if any pixel is not opaque, else RGB.

    Raises:
        UnsupportedImageError: The colors of the pixels are not defined.
        Exception: Whatever Pillow's decoders raise on damaged files.
    """
    with Image.open(io.BytesIO(data)) as file:
        file.load()
        kind, image = file.format, ImageOps.exif_transpose(file)
    if image.mode.startswith(DEEP_GRAY) or (image.mode == "I" and kind == "PPM"):
        image = _upper_bits(image)
    if image.mode in ("I", "F", "LAB"):
        raise UnsupportedImageError(unsupported_mode(image.mode))
    if image.has_transparency_data:
        # Premultiplied modes have one neighbor only.
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGBA")).convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            return image
    return image.convert("RGB")


def unsupported_mode(mode: str) -> str:
    """Return why an image of a mode has no colors, a clause."""
    if mode == "LAB":
        return "has colors in CIELAB, which Pillow does not convert; save it as RGB"
    return "holds 32-bit numbers, whose range is not stated; save it with 8 or 16 bits a channel"


def _upper_bits(image: Image.Image) -> Image.Image:
    """Return a gray image of 16 bits in its upper 8, with transparency in mode LA."""
    values = np.asarray(image).astype(np.uint16)
    gray = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def bmp_on_background(image: Image.Image, background: Background) -> bytes:
    """Encode an image of mode RGB or RGBA as a BMP of 24 bits, on a background where it is transparent."""
    if image.mode == "RGBA":
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image.getchannel("A"))
        image = canvas
    return _encode(image, "BMP")


def lacks_end_marker(data: bytes) -> bool:
    """Return whether no end marker follows the data of a JPEG."""
    return not data.endswith(JPEG_END) and data.rfind(JPEG_END) < data.rfind(JPEG_SCAN)


def with_end_marker(data: bytes) -> bytes:
    """Return a JPEG with an end marker behind its data."""
    return data.rstrip(JPEG_END[:1]) + JPEG_END


def transcode(data: bytes, background: Background) -> bytes:
    """Convert a file that `inspection.read_header` marks as transcoded to one that TensorFlow decodes exactly.

    Args:
        data: The encoded file.
        background: Color behind transparent pixels.

    Returns:
        A BMP of 24 bits, upright; or the same JPEG with its end marker.

    Raises:
        Exception: See `decode_upright`.
    """
    if _is_intact_but_for_its_end(data):
        return with_end_marker(data)
    return bmp_on_background(decode_upright(data), background)


def lossless_copy(data: bytes) -> bytes:
    """Convert a file that only Pillow decodes to a PNG of the same pixels, upright, with its transparency.

    Returns:
        The PNG; or a JPEG with its end marker.

    Raises:
        Exception: See `decode_upright`.
    """
    return with_end_marker(data) if _is_intact_but_for_its_end(data) else _encode(decode_upright(data), "PNG")


def _is_intact_but_for_its_end(data: bytes) -> bool:
    if not data.startswith(b"\xff\xd8") or not lacks_end_marker(data):
        return False
    with Image.open(io.BytesIO(data)) as header:
        return header.mode != "CMYK"


def _encode(image: Image.Image, kind: Literal["BMP", "PNG"]) -> bytes:
    file = io.BytesIO()
    image.info.clear()  # profiles and the like
    image.save(file, kind)
    return file.getvalue()


def file_reader(
    source: DataSource, transcoded: np.ndarray, background: Background
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Return a function for a tf.data graph that reads image files in a form that TensorFlow decodes.

    Without a file that has to be transcoded, the graph holds no Python function.

    Args:
        source: Source of the files.
        transcoded: bool (N,): for each image of the manifest, whether it passes through `transcode`.
        background: Color behind transparent pixels.

    Returns:
        A function from an image's key, scalar string, and index in the manifest, scalar int64, to scalar string. It
        gives the same bytes on every thread.
    """
    if not transcoded.any():
        return lambda key, index: source.read_tf(key)
    with tf.device("cpu"):
        flags = tf.constant(transcoded)

    def through_pillow(data: bytes) -> bytes:
        try:
            return transcode(data, background)
        except Exception as error:
            raise DataError(f"Pillow cannot decode the image: {error}") from None

    def read(key: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        encoded = source.read_tf(key)
        return tf.cond(tf.gather(flags, index), lambda: call_in_graph(through_pillow, encoded), lambda: encoded)

    return read
