"""What a picture file is, whatever its name says.

Its header, its colours, and whether it decodes as training will decode it.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntFlag
from itertools import chain
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

from pipeline.data.preprocessing import decode_jpeg, decode_plain, decode_webp
from pipeline.data.scan_cache import FACTS, ScanCache
from pipeline.data.sources.base import CorruptImageError, DataSource, Sample
from pipeline.data.splits import signature

MAX_PIXELS = 89_478_485  # 256 MiB as RGB; PIL warns from here on, for a few kilobytes of PNG can hold more
MAX_BYTES = 2**30  # of a file; a picture of the most pixels takes half of it uncompressed, with 16 bits a channel
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "GIF",
    "BMP",
    "WEBP",
)  # PIL's names of what tf.io decodes; never change the order without SCAN
ORIENTATION = 0x0112  # EXIF tag
ENOUGH = 128  # pixels of the shorter side that a signature is taken from; four times the square that it is shrunk to
CHUNK = 16  # files that a thread takes at a time


class ImageFlag(IntFlag):
    """What training does not see as it is stored."""

    GREY = 1
    """One channel, which is repeated."""
    CMYK = 2
    """Converted to RGB, without a colour profile."""
    DEEP = 4
    """16 bits a channel, of which the upper 8 are kept."""
    PALETTE = 8
    """Looked up."""
    TRANSPARENT = 16
    """An alpha channel or a transparent colour, which is dropped: what lies under it is seen."""
    ANIMATED = 32
    """The first picture is taken."""


class ImageHeader(NamedTuple):
    """What an image file says of itself."""

    kind: str
    """PIL's name of its format."""
    height: int
    width: int
    orientation: int
    """EXIF, 1 to 8: how to turn what is stored."""
    traits: ImageFlag


def read_header(data: bytes) -> ImageHeader | str:
    """Read an image file's header, or says why the file cannot be used; decodes nothing.

    Args:
        data: The encoded file.
    """
    if not data:
        return "is empty"
    try:
        with Image.open(io.BytesIO(data)) as header:
            kind, mode, (width, height) = header.format or "", header.mode, header.size
            orientation = (
                header.getexif().get(ORIENTATION, 1) if "exif" in header.info else 1
            )  # without the test, a PNG would be decoded
            transparent = mode in ("LA", "PA", "RGBA") or "transparency" in header.info
            animated = kind in ("GIF", "PNG") and bool(getattr(header, "is_animated", False))
    except UnidentifiedImageError:
        return "is not a picture, or of a format that is not read here"
    except Image.DecompressionBombError as error:
        return f"would decode to too many pixels: {error}"
    except Exception as error:  # PIL's parsers raise all sorts on damaged headers
        return f"has a damaged header: {error}"
    if kind not in FORMATS:
        return f"is {kind}, which TensorFlow does not decode"
    if kind == "WEBP" and data[12:16] == b"VP8X" and data[20] & 2:
        return "is an animated WebP, on which TensorFlow's decoder overruns its memory"  # 2.21 ends the process: "malloc(): invalid size"
    if kind == "BMP" and mode == "P":
        return "is a BMP with a palette, which TensorFlow does not look up"
    if width * height > MAX_PIXELS:
        return f"has {width} x {height} pixels; at most {MAX_PIXELS / 1e6:.0f} million are read, shrink it"
    depth, colour = data[24:26] if kind == "PNG" else (8, None)  # of its IHDR, which PIL does not tell apart
    traits = (
        ImageFlag.GREY * (mode in ("1", "L", "LA") or colour in (0, 4))
        | ImageFlag.CMYK * (mode == "CMYK")
        | ImageFlag.DEEP * (depth == 16)
        | ImageFlag.PALETTE * (mode in ("P", "PA"))
        | ImageFlag.TRANSPARENT * transparent
        | ImageFlag.ANIMATED * animated
    )
    return ImageHeader(kind, height, width, orientation if orientation in range(1, 9) else 1, ImageFlag(traits))


def too_large(size: int) -> str | None:
    """Why a file of this size in bytes is not read at all, or None."""
    return f"has {size / 2**30:.1f} GiB; at most {MAX_BYTES / 2**30:.0f} are read" if size > MAX_BYTES else None


def inspect(data: bytes) -> np.ndarray | str:
    """Decode a picture, and says what it is or why it cannot be used.

    Args:
        data: The encoded file.

    Returns:
        FACTS (), with name, size and modified left 0; or the reason, to be read behind the file's name.
    """
    header = read_header(data)
    if isinstance(header, str):
        return header
    ratio = next(ratio for ratio in (8, 4, 2, 1) if ratio == 1 or min(header.height, header.width) >= ratio * ENOUGH)
    try:
        picture = _decode(data, header.kind, ratio)
        found = signature(picture, header.orientation)
        if not found.perceptual and picture.shape[:2] != (header.height, header.width):
            found = signature(_decode(data, header.kind, 1), header.orientation)  # compared by all of its pixels
    except (tf.errors.OpError, ValueError) as error:
        return f"is a damaged {header.kind}: {_reason(error)}"
    facts = np.zeros((), FACTS)
    facts["sha256"] = np.void(hashlib.sha256(data).digest())
    facts["kind"], facts["orientation"], facts["traits"] = FORMATS.index(header.kind), header.orientation, header.traits
    # Of a GIF whose first picture does not fill its canvas, that picture counts: it is what crops are taken from.
    facts["height"], facts["width"] = picture.shape[:2] if header.kind == "GIF" else (header.height, header.width)
    for name in ("phash", "thumbnail", "pixels", "perceptual"):
        facts[name] = getattr(found, name)
    return facts


def _decode(data: bytes, kind: str, ratio: int) -> np.ndarray:
    """uint8 (H, W, 3) by the decoders of training, as stored.

    A JPEG at 1 / `ratio` of its size, anything else whole.
    """
    with tf.device("CPU:0"):
        if kind in ("JPEG", "MPO"):
            return decode_jpeg(data, ratio).numpy()
        return (decode_webp if kind == "WEBP" else decode_plain)(data).numpy()


def _reason(error: Exception) -> str:
    message = getattr(error, "message", str(error))
    return message.rpartition("}} ")[2].partition(" [Op:")[0].strip()


def inspect_all(
    source: DataSource,
    samples: Sequence[Sample],
    cache: ScanCache,
    progress: Callable[[int, int], None] | None = None,
    *,
    whole: bool = True,
) -> tuple[np.ndarray, dict[int, str]]:
    """Inspects every sample, in threads, with a bounded number of files in memory. What the cache knows is not read again.

    Args:
        source: Where the samples come from.
        samples: N of them.
        cache: Asked for every file before it is read, and given what was found; also what was found when the scan is
            interrupted.
        progress: Called with the number of pictures done and of all, from the calling thread.
        whole: Whether these are all samples of the data set; the cache then forgets what it knows of others.

    Returns:
        FACTS (N,), and for each sample that cannot be used its position and the reason; its facts are zeros.
    """
    facts, problems, done = np.zeros(len(samples), FACTS), {}, 0
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd files; what cannot be used is reported
            for start in range(0, len(samples), 8 * workers * CHUNK):
                some = samples[start : start + 8 * workers * CHUNK]
                chunks = [some[i : i + CHUNK] for i in range(0, len(some), CHUNK)]
                for found in chain.from_iterable(
                    pool.map(lambda chunk: [_look(source, sample.key, cache) for sample in chunk], chunks)
                ):
                    if isinstance(found, str):
                        problems[done] = found
                    else:
                        facts[done] = found
                    done += 1
                    if progress is not None:
                        progress(done, len(samples))
    finally:
        pool.shutdown(cancel_futures=True)
        cache.save(facts, whole=whole and done == len(samples))
    return facts, problems


def _look(source: DataSource, key: str, cache: ScanCache) -> np.ndarray | str:
    try:
        status = source.stat(key)
        if status is not None and (reason := too_large(status.size)):
            return reason
        if status is not None and (known := cache.find(key, status)) is not None:
            return known
        found = inspect(source.read(key))
    except OSError as error:
        return f"cannot be opened: {error.strerror or error}"
    except CorruptImageError as error:
        return error.problem
    if status is not None and not isinstance(found, str):
        cache.stamp(found, key, status)
    return found
