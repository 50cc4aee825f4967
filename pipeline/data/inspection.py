"""Inspection of image files: format, header, colors, and whether training can decode them."""

import hashlib
import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntFlag
from itertools import chain
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

from pipeline.console import ProgressFn
from pipeline.data.preprocessing import decode_jpeg, decode_plain, decode_webp
from pipeline.data.scan_cache import FACTS, ScanCache
from pipeline.data.sources.base import CorruptImageError, DataSource, LabeledImage
from pipeline.data.splits import signature

MAX_PIXELS = 89_478_485  # 256 MiB as RGB; PIL warns from here on, for a few kilobytes of PNG can hold more
MAX_BYTES = 2**30  # of a file; an image of the most pixels takes half of it uncompressed, with 16 bits a channel
# PIL's names of what tf.io decodes; never change the order without scan_cache.SCAN_VERSION
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP")
ORIENTATION = 0x0112  # EXIF tag
# Pixels of the shorter side that a signature is taken from; four times the square that it is shrunk to.
SIGNATURE_MIN_SIDE = 128
CHUNK = 16  # files that a thread takes at a time


class ImageFlag(IntFlag):
    """A property of a file that training does not see as it is stored."""

    GRAY = 1
    """One channel, which is repeated."""
    CMYK = 2
    """Converted to RGB, without a color profile."""
    HIGH_BIT_DEPTH = 4
    """16 bits a channel, of which the upper 8 are used."""
    PALETTE = 8
    """Converted to RGB by the palette."""
    TRANSPARENT = 16
    """An alpha channel or a transparent color, which is dropped: the colors beneath it are visible."""
    ANIMATED = 32
    """Only the first frame is used."""


class ImageHeader(NamedTuple):
    """The properties that an image file's header states."""

    kind: str
    """PIL's name of its format."""
    height: int
    width: int
    orientation: int
    """EXIF, 1 to 8: how to turn the stored image."""
    flags: ImageFlag


def read_header(data: bytes) -> ImageHeader | str:
    """Read an image file's header without decoding, or return the reason why the file cannot be used.

    Args:
        data: The encoded file.
    """
    if not data:
        return "is empty"
    try:
        with Image.open(io.BytesIO(data)) as header:
            kind, mode, (width, height) = header.format or "", header.mode, header.size
            # Without the test, a PNG would be decoded.
            orientation = header.getexif().get(ORIENTATION, 1) if "exif" in header.info else 1
            transparent = mode in ("LA", "PA", "RGBA") or "transparency" in header.info
            animated = kind in ("GIF", "PNG") and bool(getattr(header, "is_animated", False))
    except UnidentifiedImageError:
        return "is not an image, or its format is not supported"
    except Image.DecompressionBombError as error:
        return f"would decode to too many pixels: {error}"
    except Exception as error:  # PIL's parsers raise all sorts on damaged headers
        return f"has a damaged header: {error}"
    if kind not in FORMATS:
        return f"is {kind}, which TensorFlow does not decode"
    if kind == "WEBP" and data[12:16] == b"VP8X" and data[20] & 2:
        # TensorFlow 2.21 ends the process: "malloc(): invalid size"
        return "is an animated WebP, on which TensorFlow's decoder overruns its memory"
    if kind == "BMP" and mode == "P":
        return "is a BMP with a palette, which TensorFlow does not look up"
    if width * height > MAX_PIXELS:
        return f"has {width} x {height} pixels; at most {MAX_PIXELS / 1e6:.0f} million are read, shrink it"
    depth, color = data[24:26] if kind == "PNG" else (8, None)  # of its IHDR, which PIL does not tell apart
    traits = (
        ImageFlag.GRAY * (mode in ("1", "L", "LA") or color in (0, 4))
        | ImageFlag.CMYK * (mode == "CMYK")
        | ImageFlag.HIGH_BIT_DEPTH * (depth == 16)
        | ImageFlag.PALETTE * (mode in ("P", "PA"))
        | ImageFlag.TRANSPARENT * transparent
        | ImageFlag.ANIMATED * animated
    )
    return ImageHeader(kind, height, width, orientation if orientation in range(1, 9) else 1, ImageFlag(traits))


def size_problem(size: int) -> str | None:
    """Return why a file of this size in bytes is too large to read, or None."""
    return f"has {size / 2**30:.1f} GiB; at most {MAX_BYTES / 2**30:.0f} are read" if size > MAX_BYTES else None


def inspect(data: bytes) -> np.ndarray | str:
    """Decode an image and return its properties, or the reason why it cannot be used.

    Args:
        data: The encoded file.

    Returns:
        FACTS (), with name, size and modified left 0; or the reason, a clause that continues the file's name.
    """
    header = read_header(data)
    if isinstance(header, str):
        return header
    ratio = next(
        ratio for ratio in (8, 4, 2, 1) if ratio == 1 or min(header.height, header.width) >= ratio * SIGNATURE_MIN_SIDE
    )
    try:
        image = _decode(data, header.kind, ratio)
        result = signature(image, header.orientation)
        if not result.perceptual and image.shape[:2] != (header.height, header.width):
            result = signature(_decode(data, header.kind, 1), header.orientation)  # compared by all of its pixels
    except (tf.errors.OpError, ValueError) as error:
        return f"is a damaged {header.kind}: {short_message(error)}"
    facts = np.zeros((), FACTS)
    facts["sha256"] = np.void(hashlib.sha256(data).digest())
    facts["kind"], facts["orientation"], facts["traits"] = FORMATS.index(header.kind), header.orientation, header.flags
    # Of a GIF whose first image does not fill its canvas, that image counts: it is what crops are taken from.
    facts["height"], facts["width"] = image.shape[:2] if header.kind == "GIF" else (header.height, header.width)
    facts["maximum"] = image.max()
    for name in ("phash", "thumbnail", "pixels", "perceptual"):
        facts[name] = getattr(result, name)
    return facts


def _decode(data: bytes, kind: str, ratio: int) -> np.ndarray:
    """Decode with the decoders of training to uint8 (H, W, 3), as stored.

    A JPEG is decoded at 1 / `ratio` of its size, any other format in full.
    """
    with tf.device("CPU:0"):
        if kind in ("JPEG", "MPO"):
            return decode_jpeg(data, ratio).numpy()
        return (decode_webp if kind == "WEBP" else decode_plain)(data).numpy()


def short_message(error: Exception) -> str:
    """Return the message of an error, of TensorFlow's without the names of its operations."""
    message = getattr(error, "message", str(error))
    return message.rpartition("}} ")[2].partition(" [Op:")[0].strip()


def inspect_all(
    source: DataSource,
    images: Sequence[LabeledImage],
    cache: ScanCache,
    progress: ProgressFn | None = None,
    *,
    full_dataset: bool = True,
) -> tuple[np.ndarray, dict[int, str]]:
    """Inspect every image in threads, with a bounded number of files in memory. Cached files are not read again.

    Args:
        source: Source of the images.
        images: N images.
        cache: Looked up for every file before it is read; the results are saved to it, also when the scan is
            interrupted.
        progress: Called with the number of images done and of all, from the calling thread.
        full_dataset: Whether these are all images of the data set; the cache then drops the results of other files.

    Returns:
        FACTS (N,), and for each image that cannot be used its position and the reason; its facts are zeros.
    """
    facts, problems, done = np.zeros(len(images), FACTS), {}, 0
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about unusual files; what cannot be used is reported
            for start in range(0, len(images), 8 * workers * CHUNK):
                batch = images[start : start + 8 * workers * CHUNK]
                chunks = [batch[i : i + CHUNK] for i in range(0, len(batch), CHUNK)]
                for result in chain.from_iterable(
                    pool.map(lambda chunk: [_inspect_key(source, image.key, cache) for image in chunk], chunks)
                ):
                    if isinstance(result, str):
                        problems[done] = result
                    else:
                        facts[done] = result
                    done += 1
                    if progress is not None:
                        progress(done, len(images))
    finally:
        pool.shutdown(cancel_futures=True)
        cache.save(facts, full_dataset=full_dataset and done == len(images))
    return facts, problems


def _inspect_key(source: DataSource, key: str, cache: ScanCache) -> np.ndarray | str:
    try:
        status = source.stat(key)
        if status is not None and (reason := size_problem(status.size)):
            return reason
        if status is not None and (known := cache.find(key, status)) is not None:
            return known
        result = inspect(source.read(key))
    except OSError as error:
        return f"cannot be opened: {error.strerror or error}"
    except CorruptImageError as error:
        return error.problem
    if status is not None and not isinstance(result, str):
        cache.stamp(result, key, status)
    return result
