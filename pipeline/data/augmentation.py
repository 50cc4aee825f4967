"""Augmentation of one image: crop, flip and albumentations' transforms, drawn from the image's own seed alone.

An augmentation is a function of (encoded file, its height and width as stored, EXIF orientation, seed). The same
arguments give the same pixels on any thread, in any order.
"""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.config.augment import AugmentConfig, TransformConfig, import_albumentations
from pipeline.data.preprocessing import (
    JPEG_METHOD,
    RGB,
    Resize,
    apply_exif_orientation,
    decode,
    orientation_steps,
    resize_bilinear,
    resize_to_square,
)
from pipeline.errors import ConfigError

INDEX_BITS = 40  # low bits of an image's seed that hold its index; the bits above hold the epoch, or the corruption
CROP_ATTEMPTS = 10  # as torchvision's and albumentations' RandomResizedCrop


@dataclass(frozen=True)
class Augmentation:
    """An augmentation from an encoded image to the network's input, in two parts that can be timed.

    Attributes:
        draw: int64 (2,), the image's seed -> all random draws of both parts.
        decode: (encoded: scalar string, height: scalar int32, width: scalar int32, orientation: scalar integer 1 to 8,
            the draws) -> uint8 (H, W, 3), upright: the image, or only the part of it that `transform` needs. The
            height and width given are those of the stored image, before it is turned upright.
        transform: (that image, the draws) -> uint8 (R, R, 3).
    """

    draw: Callable[[tf.Tensor], tf.Tensor]
    decode: Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
    transform: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

    def __call__(
        self, encoded: tf.Tensor, height: tf.Tensor, width: tf.Tensor, orientation: tf.Tensor, seed: tf.Tensor
    ) -> tf.Tensor:
        """Decode and transform one image."""
        drawn = self.draw(seed)
        return self.transform(self.decode(encoded, height, width, orientation, drawn), drawn)


def image_augmentation(augment: AugmentConfig, resolution: int, resize: Resize) -> Augmentation:
    """Return the configured augmentation of one image.

    Args:
        augment: Its `backend` and `transforms` are used.
        resolution: Side R of the network's input, in pixels.
        resize: How an image that no transform crops becomes a square, see `resize_to_square`.

    Returns:
        A function for a tf.data map.

    Raises:
        ConfigError: A transform has invalid values, does not end in an image of R x R, or does not belong in front
            of the network.
    """
    build = _native if augment.backend == "native" else _albumentations
    return build(augment.transforms, resolution, resize)


# --- native -----------------------------------------------------------------------------------------------------------


def decode_full_image(
    encoded: tf.Tensor, height: tf.Tensor, width: tf.Tensor, orientation: tf.Tensor, drawn: tf.Tensor
) -> tf.Tensor:
    """Decode the full image, for an augmentation that needs all of it."""
    del height, width, drawn
    return decode(encoded, orientation)


def _native(configs: Sequence[TransformConfig], resolution: int, resize: Resize) -> Augmentation:
    transforms = {transform.name: transform.args for transform in configs}
    if len(transforms) < len(configs):
        raise ConfigError(
            "augment.transforms: the native backend takes each transform once; for more, set augment.backend: "
            "albumentations"
        )
    crop, flip = transforms.get("RandomResizedCrop"), transforms.get("HorizontalFlip")

    def draw(seed: tf.Tensor) -> tf.Tensor:
        return tf.random.stateless_uniform((5, CROP_ATTEMPTS), seed)

    def decode_crop(
        encoded: tf.Tensor, height: tf.Tensor, width: tf.Tensor, orientation: tf.Tensor, drawn: tf.Tensor
    ) -> tf.Tensor:
        if crop is None:
            return decode_full_image(encoded, height, width, orientation, drawn)
        scale, ratio = crop.get("scale", (0.08, 1.0)), crop.get("ratio", (3 / 4, 4 / 3))
        transpose, _, _ = orientation_steps(orientation)
        upright = tf.where(transpose, tf.stack([width, height]), tf.stack([height, width]))
        window = random_window(upright, scale, ratio, drawn[:4])
        return decode_window(encoded, window, upright, orientation, resolution)

    def transform(image: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
        image = resize_to_square(image, resolution, resize) if crop is None else resize_bilinear(image, resolution)
        if flip is not None:
            image = tf.cond(drawn[4, 0] < flip.get("p", 0.5), lambda: tf.reverse(image, [1]), lambda: image)
        return tf.ensure_shape(image, (resolution, resolution, image.shape[-1]))

    return Augmentation(draw, decode_crop, transform)


def random_window(upright: tf.Tensor, scale: Sequence[float], ratio: Sequence[float], draws: tf.Tensor) -> tf.Tensor:
    """Return the window of a random resized crop (Szegedy et al. 2015, arXiv 1409.4842).

    The area is uniform in `scale`, the aspect log-uniform in `ratio`, the position uniform. The first attempt that fits
    into the image is taken; if none does, the largest centered window within `ratio`.

    Args:
        upright: int32 (2,): height and width of the image.
        scale: Least and greatest share of the image's area, in (0, 1].
        ratio: Least and greatest width / height.
        draws: float32 (4, attempts) uniform in [0, 1): area, aspect, top, left.

    Returns:
        int32 (4,): top, left, height, width.
    """
    sides = tf.cast(upright, tf.float32)
    area = tf.reduce_prod(sides) * (scale[0] + draws[0] * (scale[1] - scale[0]))
    aspect = tf.exp(np.log(ratio[0]) + draws[1] * np.log(ratio[1] / ratio[0]))
    sizes = tf.round(tf.sqrt(tf.stack([area / aspect, area * aspect], axis=1)))
    fits = tf.reduce_all((sizes >= 1) & (sizes <= sides), axis=1)

    def first_that_fits() -> tf.Tensor:
        attempt = tf.argmax(fits)
        size = sizes[attempt]
        return tf.concat([tf.floor(draws[2:, attempt] * (sides - size + 1)), size], 0)

    def centered() -> tf.Tensor:
        limits = tf.round(tf.stack([sides[1] / ratio[0], sides[0] * ratio[1]]))
        size = tf.maximum(tf.minimum(sides, limits), 1)
        return tf.concat([(sides - size) // 2, size], 0)

    return tf.cast(tf.cond(tf.reduce_any(fits), first_that_fits, centered), tf.int32)


def decode_window(
    encoded: tf.Tensor, window: tf.Tensor, upright: tf.Tensor, orientation: tf.Tensor, resolution: int
) -> tf.Tensor:
    """Decode a window of the upright image; a JPEG decodes only the window, no finer than needed.

    A JPEG decodes at a half, a quarter or an eighth of its size directly. Where that leaves at least the resolution it
    replaces the antialiasing filter: 1.8 instead of 3.9 ms for a window of 470 pixels, 12 instead of 44 ms for one of
    2,600 (one x86 thread).

    Args:
        encoded: Scalar string with an image file.
        window: int32 (4,): top, left, height, width in the upright image.
        upright: int32 (2,): height and width of the upright image.
        orientation: Scalar integer, EXIF orientation 1 to 8.
        resolution: Pixels that either side should have left, if it has them.

    Returns:
        uint8 (window height / n, window width / n, 3), upright, n = 1, 2, 4 or 8; 1 for anything but a JPEG.
    """
    transpose, mirror, flip = orientation_steps(orientation)
    top, left, height, width = tf.unstack(window)
    top = tf.where(flip, upright[0] - top - height, top)
    left = tf.where(mirror, upright[1] - left - width, left)
    stored = tf.where(transpose, tf.stack([left, top, width, height]), tf.stack([top, left, height, width]))

    def decode_stored(ratio: int) -> tf.Tensor:
        window = stored // ratio
        return tf.image.decode_and_crop_jpeg(encoded, window, channels=RGB, ratio=ratio, dct_method=JPEG_METHOD)

    def decode_jpeg() -> tf.Tensor:
        halvings = tf.reduce_sum(
            tf.cast(tf.minimum(height, width) >= [2 * resolution, 4 * resolution, 8 * resolution], tf.int32)
        )
        return apply_exif_orientation(
            tf.switch_case(halvings, [lambda ratio=ratio: decode_stored(ratio) for ratio in (1, 2, 4, 8)]), orientation
        )

    def crop_decoded() -> tf.Tensor:
        return tf.image.crop_to_bounding_box(decode(encoded, orientation), *tf.unstack(window))

    return tf.cond(tf.io.is_jpeg(encoded), decode_jpeg, crop_decoded)


# --- albumentations ---------------------------------------------------------------------------------------------------

# Arguments in pixels: a float is a fraction of the resolution, a whole number is pixels.
PIXEL_ARGUMENTS = frozenset(
    {"size", "height", "width", "min_height", "min_width", "min_max_height", "max_size", "max_size_hw", "target_size"}
    | {"padding", "px"}
    | {"x_min", "y_min", "x_max", "y_max", "unit_size_range", "shift_xy", "mask_x_length", "mask_y_length"}
    | {"src_radius", "drop_length", "drop_width"}
)
# Sizes that are the resolution when they are not given, each with the argument that can stand in for it.
SIZE_ARGUMENTS: Mapping[str, Mapping[str, str | None]] = {
    "RandomResizedCrop": {"size": None},
    "RandomSizedCrop": {"size": None},
    "RandomCrop": {"height": None, "width": None},
    "CenterCrop": {"height": None, "width": None},
    "Resize": {"height": None, "width": None},
    "PadIfNeeded": {"min_height": "pad_height_divisor", "min_width": "pad_width_divisor"},
    "SmallestMaxSize": {"max_size": "max_size_hw"},
    "LongestMaxSize": {"max_size": "max_size_hw"},
}
# As the first transform these take the full image; any other first transform takes a square of the resolution.
FULL_IMAGE_TRANSFORMS = ("RandomResizedCrop", "Resize", "SmallestMaxSize", "LongestMaxSize")
REJECTED_TRANSFORMS = {
    "Normalize": "normalization is inside the model, and doing it twice ruins the accuracy without a message",
    "ToFloat": "images stay uint8 up to the model, which casts them",
    "FromFloat": "images are uint8 throughout",
}
DUMMY_SHAPES = ((97, 151), (151, 97), (20, 30), (601, 799))  # landscape, portrait, tiny, large
DUMMY_RUNS = 6  # of each shape, since a transform may be drawn or not


def _albumentations(transforms: Sequence[TransformConfig], resolution: int, resize: Resize) -> Augmentation:
    takes_full_image = bool(transforms) and transforms[0].name in FULL_IMAGE_TRANSFORMS
    apply = AlbumentationsTransforms(transforms, resolution)
    apply.validate_on_dummy_images(takes_full_image)

    def draw(seed: tf.Tensor) -> tf.Tensor:
        return tf.random.stateless_uniform((), seed, minval=0, maxval=tf.int64.max, dtype=tf.int64)

    def transform(image: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
        if not takes_full_image:
            image = resize_to_square(image, resolution, resize)
        transformed = tf.numpy_function(apply, [image, drawn], tf.uint8, stateful=False)
        return tf.ensure_shape(transformed, (resolution, resolution, image.shape[-1]))

    return Augmentation(draw, decode_full_image, transform)


class AlbumentationsTransforms:
    """A sequence of albumentations transforms as a pure function of (image, seed), for any number of threads.

    Each thread has its own `Compose`, because one shared by several mixes up their draws. For each image all its
    transforms are handed one pair of generators. `Compose.set_random_seed` would give each its own with the same seed,
    so that two transforms of one p always coincide.

    Args:
        transforms: Names and arguments as in the config.
        resolution: Side of the network's input, in pixels, that fractions refer to.

    Raises:
        ConfigError: If a transform is refused or its values are impossible; the message names it.
    """

    def __init__(self, transforms: Sequence[TransformConfig], resolution: int) -> None:
        """Create the transforms."""
        import cv2

        cv2.setNumThreads(0)  # the threads are tf.data's
        self._transforms = transforms
        self._resolution = resolution
        self._composes: dict[int, Any] = {}

    def __call__(self, image: np.ndarray, seed: int) -> np.ndarray:
        """Transform an image.

        Args:
            image: uint8 (H, W, 3).
            seed: At least 0.

        Returns:
            uint8 of the shape that the transforms leave, contiguous.
        """
        # Keyed by the thread's number: threading.local would lose its value with each call from a TensorFlow thread.
        thread = threading.get_ident()
        compose = self._composes.get(thread)
        if compose is None:
            compose = self._composes[thread] = self._build()
        compose.set_random_state(np.random.default_rng(int(seed)), random.Random(int(seed)))
        return np.ascontiguousarray(compose(image=image)["image"])

    def _build(self) -> Any:
        albumentations = import_albumentations()
        built = []
        for transform in self._transforms:
            if transform.name in REJECTED_TRANSFORMS:
                raise ConfigError(
                    f"augment.transforms: {transform.name} is refused: {REJECTED_TRANSFORMS[transform.name]}; leave "
                    "it out"
                )
            args = sized_arguments(transform, self._resolution)
            try:
                built.append(getattr(albumentations, transform.name)(**args))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"augment.transforms: {transform.name} does not accept {args}: {_first_problem(error)}"
                ) from None
        return albumentations.Compose(built)

    def validate_on_dummy_images(self, takes_full_image: bool) -> None:
        """Run the transforms on dummy images, so that a mistake fails now instead of hours later.

        Args:
            takes_full_image: Whether the transforms see full images, or only squares of the resolution.

        Raises:
            ConfigError: Naming the transforms, if they fail or do not end in uint8 (resolution, resolution, 3).
        """
        side = self._resolution
        names = ", ".join(transform.name for transform in self._transforms)
        for height, width in DUMMY_SHAPES if takes_full_image else ((side, side),):
            image = np.random.default_rng(0).integers(0, 256, (height, width, RGB), np.uint8)
            for seed in range(DUMMY_RUNS):
                try:
                    result = self(image, seed)
                except ConfigError:
                    raise
                except Exception as error:
                    raise ConfigError(
                        f"augment.transforms: {names} fail on an image of {height} x {width}: {_first_problem(error)}"
                    ) from None
                if result.dtype != np.uint8 or result.shape != (side, side, RGB):
                    raise ConfigError(
                        f"augment.transforms: {names} turn a uint8 image of {height} x {width} x 3 into "
                        f"{result.dtype} of {' x '.join(map(str, result.shape))}; "
                        f"the network takes uint8 of {side} x {side} x 3. "
                        "Begin with RandomResizedCrop or end with Resize or a crop"
                    )


def sized_arguments(transform: TransformConfig, resolution: int) -> dict[str, Any]:
    """Return the arguments of a transform with fractions turned into pixels and missing sizes filled in.

    Args:
        transform: Name and arguments as in the config.
        resolution: Side of the network's input, in pixels.

    Returns:
        Arguments for albumentations' constructor: sizes in whole pixels, lists as tuples.
    """
    args = {
        key: _pixels(value, resolution) if key in PIXEL_ARGUMENTS else _tuples(value)
        for key, value in transform.args.items()
    }
    for key, stand_in in SIZE_ARGUMENTS.get(transform.name, {}).items():
        if key not in args and stand_in not in args:
            args[key] = (resolution, resolution) if key == "size" else resolution
    return args


def _pixels(value: Any, resolution: int) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_pixels(item, resolution) for item in value)
    if isinstance(value, float):
        return round(value * resolution) or (1 if value > 0 else 0)
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _first_problem(error: Exception) -> str:
    """Return the message without the addresses and headings that pydantic adds."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in errors())
    return str(error).splitlines()[0] if str(error) else type(error).__name__
