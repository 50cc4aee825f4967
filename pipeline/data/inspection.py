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
from PIL import Image, ImageFile, UnidentifiedImageError

from pipeline.config.data import Background
from pipeline.console import ProgressFn
from pipeline.data.preprocessing import decode_jpeg, decode_plain, decode_webp
from pipeline.data.scan_cache import FACTS, ScanCache
from pipeline.data.sources.base import CorruptImageError, DataSource, LabeledImage
from pipeline.data.splits import signature
from pipeline.data.transcoding import (
    DEEP_GRAY,
    JPEG_KINDS,
    UnsupportedImageError,
    bmp_on_background,
    decode_upright,
    lacks_end_marker,
    lossless_copy,
    unsupported_mode,
    with_end_marker,
)

MAX_PIXELS = 89_478_485  # 256 MiB as RGB; PIL warns from here on, for a few kilobytes of PNG can hold more
MAX_BYTES = 2**30  # of a file; an image of the most pixels takes half of it uncompressed, with 16 bits a channel
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP")  # Pillow's names of what tf.io decodes
ORIENTATION = 0x0112  # EXIF tag
# Pixels of the shorter side that a signature is taken from; four times the square that it is shrunk to.
SIGNATURE_MIN_SIDE = 128
CHUNK = 16  # files that a thread takes at a time


# Bytes that a PNG with an orientation holds. To look for it behind the pixels, Pillow decodes them.
PNG_ORIENTATION_MARKERS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Put behind a JPEG's data, these would become pixels if any were missing, also after a restart marker.
MORE_DATA = tuple(
    bits * 40 + b"".join(bytes([0xFF, 0xD0 + number]) + bits * 40 for number in range(8))
    for bits in (b"\x5a\x33\xc6", b"\xa5\xcc\x39", b"\xff\x00")
)


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
    """Pixels that are not opaque, which are put on `data.background`."""
    ANIMATED = 32
    """Only the first frame or page is used."""
    PILLOW = 64
    """Decoded by Pillow, because TensorFlow cannot decode it, or decodes it differently."""
    UNTERMINATED = 128
    """A JPEG without an end marker, which receives one."""


# The properties of the files that pass through `transcoding.transcode`.
TRANSCODED = ImageFlag.TRANSPARENT | ImageFlag.PILLOW | ImageFlag.UNTERMINATED


class ImageHeader(NamedTuple):
    """The properties that an image file's header states."""

    kind: str
    """Pillow's name of its format."""
    height: int
    width: int
    orientation: int
    """1 to 8, as in EXIF: how to turn the stored image."""
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
            if kind == "EPS":
                return "is EPS, a program that would have to be run; convert it to PNG"
            if isinstance(header, ImageFile.StubImageFile) or kind == "MPEG":
                return f"is {kind}, which Pillow does not decode"
            if mode == "F" or (mode == "I" and kind != "PPM"):
                return unsupported_mode(mode)
            flags = _flags(header, data)
            turned_by_pillow = ImageFlag.PILLOW in flags  # together with its decoding
            orientation = 1 if turned_by_pillow else _orientation(header, data)
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
            return "is HEIF (HEIC); to read it, run: pip install --constraint constraints.txt '.[heif]'"
        return "is not an image, or its format is not supported"
    except Image.DecompressionBombError as error:
        return f"would decode to too many pixels: {error}"
    except Exception as error:  # PIL's parsers raise all sorts on damaged headers
        if "nsupported" in str(error):
            return f"is of a kind that Pillow does not decode: {error}"
        return f"has a damaged header: {error}"
    if width * height > MAX_PIXELS:
        return f"has {width} x {height} pixels; at most {MAX_PIXELS / 1e6:.0f} million are read, shrink it"
    return ImageHeader(kind, height, width, orientation if orientation in range(1, 9) else 1, flags)


def _orientation(header: Image.Image, data: bytes) -> int:
    """Return the orientation that EXIF, XMP or ImageMagick's profile states, as Pillow finds it."""
    if header.format == "PNG" and not any(marker in data for marker in PNG_ORIENTATION_MARKERS):
        return 1
    return header.getexif().get(ORIENTATION, 1)


def _flags(header: Image.Image, data: bytes) -> ImageFlag:
    kind, mode = header.format, header.mode
    # Pillow does not tell the depths of a PNG apart. They are in its IHDR.
    color: int | None
    depth, color = 16 if mode.startswith(DEEP_GRAY) or mode == "I" else 8, None
    if kind == "PNG":
        depth, color = data[24], data[25]
    animated = kind not in JPEG_KINDS and bool(getattr(header, "is_animated", False))
    if kind == "WEBP" and data[12:16] == b"VP8X" and data[20] & 2:
        animated = True  # whatever Pillow finds: TensorFlow 2.21 would end the process with "malloc(): invalid size"
    unterminated = kind in JPEG_KINDS and lacks_end_marker(data)
    pillow = kind not in FORMATS or {
        # Without Adobe's marker TensorFlow takes the inks for their complements.
        "JPEG": mode == "CMYK" and ("adobe" not in header.info or unterminated),
        "PNG": animated,
        "GIF": kind == "GIF" and not _fills_canvas(header),
        "BMP": kind == "BMP" and not _is_plain_bmp(data, header),
        "WEBP": animated,
    }.get("JPEG" if kind in JPEG_KINDS else kind)
    return ImageFlag(
        ImageFlag.GRAY * (mode in ("1", "L", "LA", "I") or mode.startswith(DEEP_GRAY) or color in (0, 4))
        | ImageFlag.CMYK * (mode == "CMYK")
        | ImageFlag.HIGH_BIT_DEPTH * (depth == 16)
        | ImageFlag.PALETTE * (mode in ("P", "PA"))
        | ImageFlag.TRANSPARENT * header.has_transparency_data
        | ImageFlag.ANIMATED * animated
        | ImageFlag.PILLOW * bool(pillow)
        | ImageFlag.UNTERMINATED * (unterminated and mode != "CMYK")
    )


def _fills_canvas(header: Image.Image) -> bool:
    """Return whether the first image of a GIF covers its canvas; TensorFlow's decoder returns that image alone."""
    [tile, *_] = getattr(header, "tile", None) or [None]
    return tile is not None and tile.extents == (0, 0, *header.size)


def _is_plain_bmp(data: bytes, header: Image.Image) -> bool:
    """Return whether a BMP is of the kinds that TensorFlow decodes.

    These are RGB of 24 bits and gray of 8, not compressed, with nothing behind the pixels.
    """
    start, size = (int.from_bytes(data[at : at + 4], "little") for at in (10, 14))
    bits, compression = int.from_bytes(data[28:30], "little"), int.from_bytes(data[30:34], "little")
    row = -(-header.width * bits // 32) * 4
    return (
        size >= 40
        and compression == 0
        and (bits == 24 or (bits == 8 and header.mode == "L"))
        and len(data) == start + row * header.height
    )


def make_decodable(data: bytes, background: Background) -> tuple[bytes, ImageHeader] | str:
    """Return a file in the form in which training sees it, with its header, or the reason why it cannot be used.

    Args:
        data: The encoded file.
        background: Color behind transparent pixels.

    Returns:
        A file that TensorFlow decodes, and its properties: those of the flags TRANSCODED say whether it was transcoded.
    """
    header = read_header(data)
    if isinstance(header, str):
        return header
    if header.kind == "GIF" and not _tensorflow_decodes(data):
        header = header._replace(flags=header.flags | ImageFlag.PILLOW)
    if not header.flags & TRANSCODED:
        return data, header
    if ImageFlag.UNTERMINATED in header.flags:
        return _terminated(data, header)
    try:
        image = decode_upright(data)
        if image.mode == "RGB":
            header = header._replace(flags=header.flags & ~ImageFlag.TRANSPARENT)  # all of its pixels are opaque
            if ImageFlag.PILLOW not in header.flags:
                return data, header
        header = header._replace(height=image.height, width=image.width, orientation=1)
        return bmp_on_background(image, background), header
    except UnsupportedImageError as error:
        return str(error)
    except Exception as error:  # Pillow's decoders raise all sorts on damaged files
        return f"is a damaged {header.kind}: {error}"


def _tensorflow_decodes(gif: bytes) -> bool:
    """Return whether TensorFlow decodes a GIF: for its first image it reads all, and is stricter than Pillow."""
    try:
        with tf.device("CPU:0"):
            decode_plain(gif)
    except tf.errors.OpError:
        return False
    return True


def _terminated(data: bytes, header: ImageHeader) -> tuple[bytes, ImageHeader] | str:
    """Give a JPEG its end marker, if nothing else is missing.

    If its data are complete, the decoder ignores what follows them. Otherwise it takes that for pixels.
    """
    terminated = with_end_marker(data)
    try:
        with tf.device("CPU:0"):
            image, *others = (
                decode_jpeg(with_end_marker(data.rstrip(b"\xff") + more)).numpy() for more in (b"", *MORE_DATA)
            )
    except tf.errors.OpError as error:
        return f"is a damaged {header.kind}: {tensorflow_reason(error)}"
    if all(np.array_equal(image, other) for other in others):
        return terminated, header
    return f"is a damaged {header.kind}: it is truncated"


def size_problem(size: int) -> str | None:
    """Return why a file of this size in bytes is too large to read, or None."""
    return f"has {size / 2**30:.1f} GiB; at most {MAX_BYTES / 2**30:.0f} are read" if size > MAX_BYTES else None


def packable(data: bytes) -> bytes:
    """Return what a pack holds of a file: the same bytes, or a lossless copy where training would transcode them.

    A damaged file is returned as it is. So is a transparent one of a format that TensorFlow decodes: it needs a
    background, which a pack does not choose.
    """
    header = read_header(data)
    if isinstance(header, str) or not header.flags & (ImageFlag.PILLOW | ImageFlag.UNTERMINATED):
        return data
    try:
        return lossless_copy(data)
    except Exception:  # Pillow's decoders raise all sorts on damaged files
        return data


def inspect(data: bytes, background: Background = "white") -> np.ndarray | str:
    """Decode an image and return its properties, or the reason why it cannot be used.

    Args:
        data: The encoded file.
        background: Color behind transparent pixels.

    Returns:
        FACTS (), with name, size and modified left 0; or the reason, a clause that continues the file's name.
    """
    decodable = make_decodable(data, background)
    if isinstance(decodable, str):
        return decodable
    file, header = decodable
    ratio = next(
        ratio for ratio in (8, 4, 2, 1) if ratio == 1 or min(header.height, header.width) >= ratio * SIGNATURE_MIN_SIDE
    )
    try:
        image = _decode(file, header, ratio)
        result = signature(image, header.orientation)
        if not result.perceptual and image.shape[:2] != (header.height, header.width):
            result = signature(_decode(file, header, 1), header.orientation)  # compared by all of its pixels
    except (tf.errors.OpError, ValueError) as error:
        return f"is a damaged {header.kind}: {tensorflow_reason(error)}"
    facts = np.zeros((), FACTS)
    facts["sha256"] = np.void(hashlib.sha256(data).digest())
    facts["kind"] = header.kind.encode()
    facts["orientation"], facts["traits"] = header.orientation, header.flags
    facts["height"], facts["width"] = header.height, header.width
    facts["maximum"] = image.max()
    for name in ("phash", "thumbnail", "pixels", "perceptual"):
        facts[name] = getattr(result, name)
    return facts


def _decode(file: bytes, header: ImageHeader, ratio: int) -> np.ndarray:
    """Decode with the decoders of training to uint8 (H, W, 3), as stored.

    A JPEG is decoded at 1 / `ratio` of its size, any other format in full.
    """
    with tf.device("CPU:0"):
        if header.flags & (ImageFlag.PILLOW | ImageFlag.TRANSPARENT):
            return decode_plain(file).numpy()
        if header.kind in JPEG_KINDS:
            return decode_jpeg(file, ratio).numpy()
        return (decode_webp if header.kind == "WEBP" else decode_plain)(file).numpy()


def tensorflow_reason(error: Exception) -> str:
    """Return the message of an error, of TensorFlow's without the names of its operations."""
    message = getattr(error, "message", str(error))
    return message.rpartition("}} ")[2].partition(" [Op:")[0].strip()


def inspect_all(
    source: DataSource,
    images: Sequence[LabeledImage],
    cache: ScanCache,
    progress: ProgressFn | None = None,
    *,
    background: Background = "white",
    full_dataset: bool = True,
) -> tuple[np.ndarray, dict[int, str]]:
    """Inspect every image in threads, with a bounded number of files in memory. Cached files are not read again.

    Args:
        source: Source of the images.
        images: N images.
        cache: Looked up for every file before it is read; the results are saved to it, also when the scan is
            interrupted.
        progress: Called with the number of images done and of all, from the calling thread.
        background: Color behind transparent pixels; the cache must be of the same.
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
                    pool.map(
                        lambda chunk: [_inspect_key(source, image.key, cache, background) for image in chunk], chunks
                    )
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


def _inspect_key(source: DataSource, key: str, cache: ScanCache, background: Background) -> np.ndarray | str:
    try:
        status = source.stat(key)
        if status is not None and (reason := size_problem(status.size)):
            return reason
        if status is not None and (known := cache.find(key, status)) is not None:
            return known
        result = inspect(source.read(key), background)
    except OSError as error:
        return f"cannot be opened: {error.strerror or error}"
    except CorruptImageError as error:
        return error.problem
    if status is not None and not isinstance(result, str):
        cache.stamp(result, key, status)
    return result
