"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) with every draw made from the image's seed.

The sixteen operations are those of the EfficientNet code (tensorflow/tpu, models/official/efficientnet/autoaugment.py),
drawn with replacement. keras-cv does the pixels where it has the operation; its layers' own draws come from a stateful
generator, so they are given their parameters here.

Strength at magnitude M, from 0 to 30 with 10 as the official full level (sign or side drawn evenly where it says +-):

| operation | strength | source |
|-|-|-|
| Rotate | +- 3 M degrees | official |
| ShearX, ShearY | +- 0.03 M | official |
| TranslateX, TranslateY | +- M/10 x 100/456 of the side | official 100 pixels, taken at B5's 456, where the paper has M = 17 |
| Cutout | square of side M/10 x 80/456 of the side, anywhere | official 2 x 40 pixels, likewise |
| SolarizeAdd | 11 M, at most 110, to pixels below 128 | official; keras-cv's cap |
| Color, Contrast, Brightness, Sharpness | factor 1 +- 0.09 M, at least 0.1 | official range 0.1 to 1.9 at M = 10, but 1 at M = 0 |
| Solarize | inverts pixels from 256 - 8.5 M up | nothing at 0, everything at 30 |
| Posterize | keeps 8 - M/7.5 bits, rounded | 8 at 0, 4 at 30 (torchvision's RandAugment) |
| AutoContrast, Equalize, Invert | no strength | official |

The official formulas of the last three strengths grow weaker or switch sides as M grows (factor 0.1 at M = 0;
solarizing and posterizing nothing above M = 10 and 20), so they are not used here. Pixels that are
uncovered are gray 128, as in the official code.
"""

import math
from collections.abc import Callable

import tensorflow as tf

from pipeline.data.preprocessing import to_uint8

REPLACE = 128.0
TRANSLATE = 100 / 456
CUTOUT = 40 / 456

Operation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def randaugment(num_ops: int, magnitude: float) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Return a function that applies RandAugment to one image.

    Args:
        num_ops: Number of operations applied one after the other.
        magnitude: From 0 to 30, see the module's table.

    Returns:
        A function for a tf.data map: (image: uint8 (H, W, 3), seed: int64 (2,)) -> uint8 (H, W, 3).
    """
    chosen = tuple(operations(magnitude).values())

    @tf.autograph.experimental.do_not_convert  # converting keras-cv's code takes seconds
    def augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        # the seed itself serves the crop and the flip
        which = tf.random.stateless_uniform((num_ops,), tf.random.fold_in(seed, 1), maxval=len(chosen), dtype=tf.int32)
        draws = tf.random.stateless_uniform((num_ops, 2), tf.random.fold_in(seed, 2))

        def step(current: tf.Tensor, drawn: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            pixels = tf.cast(current, tf.float32)[tf.newaxis]
            result = tf.switch_case(
                drawn[0], [lambda operation=operation: operation(pixels, drawn[1]) for operation in chosen]
            )
            return tf.ensure_shape(to_uint8(result[0]), image.shape)

        return tf.foldl(step, (which, draws), image)

    return augment


def operations(magnitude: float) -> dict[str, Operation]:
    """Return the sixteen operations at a magnitude.

    Args:
        magnitude: From 0 to 30.

    Returns:
        By name, functions of (float32 (1, H, W, 3) in [0, 255], float32 (2,) uniform in [0, 1)) that return float32 (1,
        H, W, 3).
    """
    import keras_cv

    layers = keras_cv.layers
    level = magnitude / 10
    filled = {"fill_mode": "constant", "fill_value": REPLACE}
    shear = layers.RandomShear(x_factor=0.5, y_factor=0.5, **filled)
    rotate = layers.RandomRotation(factor=0.5, **filled)
    translate = layers.RandomTranslation(height_factor=0.5, width_factor=0.5, **filled)
    solarize = layers.Solarization(value_range=(0, 255))
    color = layers.RandomColorDegeneration(factor=0.5)
    contrast = layers.RandomContrast(value_range=(0, 255), factor=0.5)
    sharpness = layers.RandomSharpness(factor=0.5, value_range=(0, 255))
    posterize = layers.Posterization(value_range=(0, 255), bits=max(1, 8 - round(magnitude / 7.5)))
    autocontrast = layers.AutoContrast(value_range=(0, 255))
    equalize = tf.function(layers.Equalization(value_range=(0, 255)).augment_images)  # written for autograph

    def signed(strength: float, draws: tf.Tensor) -> tf.Tensor:
        return tf.where(draws[0] < 0.5, -strength, strength)

    def factor(draws: tf.Tensor) -> tf.Tensor:
        return tf.maximum(1 + signed(0.9 * level, draws), 0.1)

    def solarized(image: tf.Tensor, threshold: float) -> tf.Tensor:
        return solarize.augment_images(image, {"thresholds": threshold, "additions": 0.0})

    def translated(image: tf.Tensor, down: tf.Tensor | float, right: tf.Tensor | float) -> tf.Tensor:
        shifts = {"height_translations": tf.reshape(down, (1, 1)), "width_translations": tf.reshape(right, (1, 1))}
        return translate.augment_images(image, shifts)

    def sheared(image: tf.Tensor, axis: str, draws: tf.Tensor) -> tf.Tensor:
        shears = {"shear_x": None, "shear_y": None, axis: tf.reshape(signed(0.3 * level, draws), (1, 1))}
        return shear.augment_images(image, shears)

    return {
        "AutoContrast": lambda image, draws: autocontrast.augment_images(image),
        "Equalize": lambda image, draws: equalize(image),
        "Invert": lambda image, draws: solarized(image, 0.0),
        "Rotate": lambda image, draws: rotate.augment_images(
            image, {"angles": tf.reshape(signed(math.radians(30 * level), draws), (1,))}
        ),
        "Posterize": lambda image, draws: posterize.augment_image(image),
        "Solarize": lambda image, draws: solarized(image, 256 - 8.5 * magnitude if magnitude < 30 else 0.0),
        # keras-cv's factor goes from the image (0) to gray or blurred (1), the official one the other way round
        "Color": lambda image, draws: color.augment_images(image, 1 - factor(draws)),
        "Contrast": lambda image, draws: contrast.augment_images(image, factor(draws)),
        "Brightness": lambda image, draws: tf.clip_by_value(image * factor(draws), 0, 255),  # keras-cv's adds instead
        "Sharpness": lambda image, draws: sharpness.augment_images(image, 1 - factor(draws)),
        "ShearX": lambda image, draws: sheared(image, "shear_x", draws),
        "ShearY": lambda image, draws: sheared(image, "shear_y", draws),
        "TranslateX": lambda image, draws: translated(image, 0.0, signed(TRANSLATE * level, draws)),
        "TranslateY": lambda image, draws: translated(image, signed(TRANSLATE * level, draws), 0.0),
        "Cutout": lambda image, draws: _cutout(image, CUTOUT * level, draws),
        "SolarizeAdd": lambda image, draws: tf.where(
            image < 128, tf.minimum(image + min(110.0, 110 * level), 255), image
        ),
    }


def _cutout(image: tf.Tensor, half: float, draws: tf.Tensor) -> tf.Tensor:
    """Fill a square with gray of side 2 * half, as a share of the image, around a point anywhere in it."""
    height, width = tf.unstack(tf.shape(image)[1:3])
    down = (tf.range(height, dtype=tf.float32) + 0.5) / tf.cast(height, tf.float32)
    right = (tf.range(width, dtype=tf.float32) + 0.5) / tf.cast(width, tf.float32)
    inside = (tf.abs(down - draws[0]) < half)[:, tf.newaxis] & (tf.abs(right - draws[1]) < half)
    return tf.where(inside[tf.newaxis, :, :, tf.newaxis], REPLACE, image)
