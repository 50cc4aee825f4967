"""Decoding and resizing of images to the network's input, for evaluation, prediction, export and augmentation.

`resize_to_square` after `decode` is the only evaluation preprocessing, so that training's validation, `evaluate.py`,
predictions and exports agree; `preprocess` is both. Normalization is in the model, not here.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import tensorflow as tf

from pipeline.config.data import Background

Resize = Literal["crop", "squash", "letterbox"]
# From an upright image, uint8 (H, W, 3), and its index to the network's uint8 (R, R, 3).
PreprocessFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

# pixels of the resized image around the center crop (tensorflow/tpu, models/official/efficientnet/preprocessing.py)
CROP_PADDING = 32
PADDING_GRAY = 128  # close to ImageNet's mean color, so nearly zero after normalization
ALIASING = 2.0  # in augmentation, shrinking by more than this takes an antialiasing filter
ORIENTATIONS = np.array([[o >= 5, o in (2, 3, 6, 7), o in (3, 4, 7, 8)] for o in range(9)])  # see orientation_steps
RGB = 3  # channels that every file is decoded to
# the inverse transform of Pillow's default, to the bit; measured no slower than TensorFlow's own default
JPEG_METHOD = "INTEGER_ACCURATE"


def decode(encoded: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Decode an image and turn it upright.

    Gray images get three equal channels, transparency is dropped (`inspection.make_decodable` has put such an image on
    its background before), CMYK becomes RGB, 16 bits become 8, an animated GIF
    gives its first frame.

    Args:
        encoded: Scalar string: a JPEG, PNG, GIF, BMP or unanimated WebP file that `inspection.read_header` accepts.
        orientation: Scalar integer, EXIF orientation 1 to 8.

    Returns:
        uint8 (H, W, 3) in [0, 255], upright.

    Raises:
        tf.errors.InvalidArgumentError: The file is not such an image, or is truncated.
    """
    stored = tf.cond(tf.io.is_jpeg(encoded), lambda: decode_jpeg(encoded), lambda: _decode_other(encoded))
    return apply_exif_orientation(stored, orientation)


def decode_on_background(encoded: tf.Tensor, orientation: tf.Tensor, background: Background) -> tf.Tensor:
    """Decode an image as `decode` does, and put a transparent PNG on a background, to the bit as Pillow does.

    Args:
        encoded: See `decode`.
        orientation: Scalar integer, EXIF orientation 1 to 8.
        background: Color behind transparent pixels.

    Returns:
        uint8 (H, W, 3) in [0, 255], upright.
    """
    behind = {"white": 255, "black": 0}[background]

    def decode_png() -> tf.Tensor:
        pixels = tf.cast(tf.io.decode_png(encoded, channels=RGB + 1), tf.int32)
        alpha = pixels[..., RGB:]
        scaled = pixels[..., :RGB] * alpha + behind * (255 - alpha) + 128
        # Divided by 255 and rounded, in whole numbers.
        shown = tf.bitwise.right_shift(tf.bitwise.right_shift(scaled, 8) + scaled, 8)
        return apply_exif_orientation(tf.cast(shown, tf.uint8), orientation)

    return tf.cond(tf.strings.substr(encoded, 0, 4) == b"\x89PNG", decode_png, lambda: decode(encoded, orientation))


def _decode_other(encoded: tf.Tensor) -> tf.Tensor:
    return tf.cond(
        tf.strings.substr(encoded, 8, 4) == b"WEBP", lambda: decode_webp(encoded), lambda: decode_plain(encoded)
    )


def decode_jpeg(encoded: tf.Tensor, ratio: int = 1) -> tf.Tensor:
    """Decode a JPEG as stored, at 1 / `ratio` of its size.

    The result is uint8 (ceil(H / ratio), ceil(W / ratio), 3); `ratio` is 1, 2, 4 or 8.

    Whatever the ratio, all of the file's data are read, by the same code: a file that fails at one ratio fails at every
    other.
    """
    return tf.io.decode_jpeg(encoded, channels=RGB, ratio=ratio, dct_method=JPEG_METHOD)


def decode_webp(encoded: tf.Tensor) -> tf.Tensor:
    """Decode a WebP as stored to uint8 (H, W, 3).

    An animated WebP makes the decoder overrun its memory (TensorFlow 2.21): never pass one.
    """
    # `channels` may only be what the file has.
    return tf.io.decode_webp(encoded, channels=0)[0, :, :, :RGB]


def decode_plain(encoded: tf.Tensor) -> tf.Tensor:
    """Decode a PNG, GIF or BMP as stored to uint8 (H, W, 3)."""
    return tf.io.decode_image(encoded, channels=RGB, expand_animations=False)


def apply_exif_orientation(stored: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Undo the camera's rotation and mirroring.

    Args:
        stored: (H, W, 3) as in the file.
        orientation: Scalar integer, EXIF orientation 1 to 8.

    Returns:
        The upright image: (H, W, 3), or (W, H, 3) for orientations 5 to 8.
    """
    transpose, mirror, flip = orientation_steps(orientation)

    def turned() -> tf.Tensor:
        image = tf.cond(transpose, lambda: tf.transpose(stored, (1, 0, 2)), lambda: stored)
        image = tf.cond(mirror, lambda: tf.reverse(image, [1]), lambda: image)
        return tf.cond(flip, lambda: tf.reverse(image, [0]), lambda: image)

    upright = tf.cond(tf.equal(orientation, 1), lambda: stored, turned)
    return tf.ensure_shape(upright, (None, None, RGB))


def orientation_steps(orientation: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the steps that turn a stored image upright: transpose, then mirror left to right, then flip top to bottom.

    Args:
        orientation: Scalar integer, EXIF orientation 1 to 8 (CIPA DC-008, tag 0x0112).

    Returns:
        Three scalar booleans: transpose, mirror, flip.
    """
    transpose, mirror, flip = tf.unstack(tf.gather(ORIENTATIONS, tf.cast(orientation, tf.int32)))
    return transpose, mirror, flip


def resample(image: tf.Tensor, height: tf.Tensor | int, width: tf.Tensor | int) -> tf.Tensor:
    """Resize for evaluation: bicubic (Keys, a = -0.5), antialiased where a side shrinks, as in Pillow.

    Args:
        image: uint8 (H, W, 3).
        height: Of the result, in pixels.
        width: Of the result, in pixels.

    Returns:
        uint8 (height, width, 3), rounded and clipped to [0, 255].
    """
    return to_uint8(tf.image.resize(image, (height, width), "bicubic", antialias=True))


def resize_bilinear(image: tf.Tensor, resolution: int) -> tf.Tensor:
    """Resize for augmentation: bilinearly, with an antialiasing filter only where a side shrinks more than twofold.

    Below a factor of two the filter takes more than twice the time (330 to 224 pixels: 1.3 instead of 0.5 ms on one x86
    thread), and training sees a window of another size each time.

    Args:
        image: uint8 (H, W, 3).
        resolution: Side R of the square, in pixels.

    Returns:
        uint8 (R, R, 3), rounded and clipped to [0, 255].
    """
    size = (resolution, resolution)
    resized = tf.cond(
        tf.reduce_any(tf.shape(image)[:2] > int(ALIASING * resolution)),
        lambda: tf.image.resize(image, size, "bilinear", antialias=True),
        lambda: tf.image.resize(image, size, "bilinear"),
    )
    return to_uint8(resized)


def to_uint8(values: tf.Tensor) -> tf.Tensor:
    """Round and clip floats to uint8 in [0, 255]; the shape stays."""
    return tf.cast(tf.clip_by_value(tf.round(values), 0, 255), tf.uint8)


def resize_to_square(image: tf.Tensor, resolution: int, resize: Resize) -> tf.Tensor:
    """Resize an image to a square.

    The crop is that of the official code, with two differences. The code rounds the crop's side down and samples
    bicubically without a filter: a photo of twelve megapixels then shows a hundredth of its pixels. Here the side is
    rounded to the nearest pixel and the filter is on. With lite0 on 100 of ImageNet's photos that gives 90 right in
    place of 88 (89, once its pixels are rounded to uint8); the mean log-likelihood differs by 0.011 +- 0.015 nats, so
    the difference is not significant on 100 images.

    Args:
        image: uint8 (H, W, 3).
        resolution: Side R of the square, in pixels.
        resize: crop takes the center, of side min(H, W) * R / (R + 32); squash takes the whole image and distorts it;
            letterbox takes the whole image, keeps its aspect and pads with gray.

    Returns:
        uint8 (R, R, 3), resampled bicubically.
    """
    height, width = tf.unstack(tf.shape(image)[:2])
    if resize == "squash":
        square = resample(image, resolution, resolution)
    elif resize == "crop":
        padded = resolution + CROP_PADDING
        side = tf.maximum((tf.minimum(height, width) * resolution + padded // 2) // padded, 1)
        image = tf.image.crop_to_bounding_box(image, (height - side + 1) // 2, (width - side + 1) // 2, side, side)
        square = resample(image, resolution, resolution)
    else:
        longer = tf.maximum(height, width)
        inner_height = tf.maximum(tf.cast(tf.round(resolution * height / longer), tf.int32), 1)
        inner_width = tf.maximum(tf.cast(tf.round(resolution * width / longer), tf.int32), 1)
        inner = resample(image, inner_height, inner_width)
        top, left = (resolution - inner_height) // 2, (resolution - inner_width) // 2
        margins = [[top, resolution - inner_height - top], [left, resolution - inner_width - left], [0, 0]]
        square = tf.pad(inner, margins, constant_values=PADDING_GRAY)
    return tf.ensure_shape(square, (resolution, resolution, image.shape[-1]))


def crop_view(image: tf.Tensor, resolution: int, resize: Resize, position: tuple[float, float]) -> tf.Tensor:
    """Crop one of several overlapping views of an image.

    Each has R / (R + 32) of its sides, or of the shorter one under `resize` crop.

    Args:
        image: uint8 (H, W, 3).
        resolution: Side R of the square, in pixels.
        resize: crop or squash; under letterbox there is nothing that a crop could leave out.
        position: How far down and to the right, from 0 (the edge) over 0.5 (the center) to 1.

    Returns:
        uint8 (R, R, 3), resampled bicubically.
    """
    sides = tf.unstack(tf.shape(image)[:2])
    wholes = [tf.minimum(*sides)] * 2 if resize == "crop" else sides
    padded = resolution + CROP_PADDING
    height, width = (tf.maximum((whole * resolution + padded // 2) // padded, 1) for whole in wholes)
    top, left = (
        tf.cast(tf.math.ceil(tf.cast(side - part, tf.float32) * share), tf.int32)
        for side, part, share in zip(sides, (height, width), position, strict=True)
    )
    square = resample(tf.image.crop_to_bounding_box(image, top, left, height, width), resolution, resolution)
    return tf.ensure_shape(square, (resolution, resolution, image.shape[-1]))


def preprocess(encoded: tf.Tensor, orientation: tf.Tensor, *, resolution: int, resize: Resize) -> tf.Tensor:
    """Apply the evaluation preprocessing: decode, turn upright, resize to a square.

    Args:
        encoded: Scalar string with an image file.
        orientation: Scalar integer, EXIF orientation 1 to 8.
        resolution: Side R of the square, in pixels.
        resize: How to resize to a square, see `resize_to_square`.

    Returns:
        uint8 (R, R, 3) in [0, 255], RGB.

    Raises:
        tf.errors.InvalidArgumentError: `decode` cannot read the file.
    """
    return resize_to_square(decode(encoded, orientation), resolution, resize)


def describe(resolution: int, resize: Resize, background: Background = "white") -> list[str]:
    """Describe the preprocessing in sentences, from which it can be implemented without TensorFlow."""
    r, padded = resolution, resolution + CROP_PADDING
    bicubically = (
        "bicubically (Keys, a = -0.5), with an antialiasing filter where a side shrinks, as Pillow's BICUBIC does"
    )
    square = {
        "squash": [f"resize the whole image to {r} x {r} pixels, whatever its shape, {bicubically}"],
        "crop": [
            f"cut out a square of side = max(1, floor((min(H, W) * {r} + {padded // 2}) / {padded})) pixels, "
            "its top at floor((H - side + 1) / 2), its left at floor((W - side + 1) / 2)",
            f"resize it to {r} x {r} pixels, {bicubically}",
        ],
        "letterbox": [
            f"resize the image to height h = max(1, round({r} * H / max(H, W))) and "
            f"width w = max(1, round({r} * W / max(H, W))), {bicubically}",
            f"put it into a square of {r} x {r} pixels of the value {PADDING_GRAY} in every channel, "
            f"its top at floor(({r} - h) / 2), its left at floor(({r} - w) / 2)",
        ],
    }[resize]
    return [
        "decode to 8 bits a channel, RGB: gray becomes three equal channels, transparent pixels are put on "
        f"{background}, an animation gives its first frame",
        "turn the image upright by its EXIF orientation; H and W are its height and width from here on",
        *square,
        "the pixels are whole numbers in [0, 255], rounded and clipped; give them as float32; "
        "nothing is divided or subtracted, normalization is inside the network",
    ]
