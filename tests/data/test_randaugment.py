"""RandAugment's operations against known pixels and keras-cv's own layers, and its draws."""

import keras_cv
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance

from pipeline.data.preprocessing import to_uint8
from pipeline.data.randaugment import operations, randaugment

SIDE = 40
LOW, HIGH = tf.constant([0.2, 0.3]), tf.constant([0.8, 0.7])  # the first draw below a half is the minus sign
NAMES = [
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
]
NAMES += ["ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"]


@pytest.fixture(scope="module")
def original() -> np.ndarray:
    smooth = np.random.default_rng(0).integers(20, 230, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(smooth).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def apply(name: str, magnitude: float, original: np.ndarray, draws: tf.Tensor = HIGH) -> np.ndarray:
    return to_uint8(operations(magnitude)[name](tf.cast(original, tf.float32)[None], draws))[0].numpy()


def test_the_list_is_the_official_one() -> None:
    assert list(operations(9)) == NAMES


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("AutoContrast", "Equalize", "Invert")])
def test_magnitude_0_changes_nothing(original: np.ndarray, name: str) -> None:
    for draws in (LOW, HIGH):
        assert np.abs(apply(name, 0, original, draws).astype(int) - original).max() <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [9, 17, 30])
def test_higher_magnitudes_change_the_image_and_keep_its_shape(
    original: np.ndarray, name: str, magnitude: float
) -> None:
    result = apply(name, magnitude, original)
    assert result.shape == original.shape
    assert not np.array_equal(result, original)


def test_invert_solarize_and_posterize_are_exact(original: np.ndarray) -> None:
    np.testing.assert_array_equal(apply("Invert", 9, original), 255 - original)
    np.testing.assert_array_equal(apply("Solarize", 12, original), np.where(original < 154, original, 255 - original))
    np.testing.assert_array_equal(apply("Solarize", 30, original), 255 - original)
    np.testing.assert_array_equal(apply("Posterize", 15, original), original & 0b11111100)
    np.testing.assert_array_equal(apply("Posterize", 30, original), original & 0b11110000)
    np.testing.assert_array_equal(apply("SolarizeAdd", 3, original), np.where(original < 128, original + 33, original))


@pytest.mark.parametrize(("draws", "factor"), [(HIGH, 1.45), (LOW, 0.55)])
def test_enhancements_equal_pillow_s(original: np.ndarray, draws: tf.Tensor, factor: float) -> None:
    image = Image.fromarray(original)
    for name, enhance in (
        ("Color", ImageEnhance.Color),
        ("Brightness", ImageEnhance.Brightness),
        ("Sharpness", ImageEnhance.Sharpness),
    ):
        expected = np.asarray(enhance(image).enhance(factor)).astype(int)
        assert np.abs(apply(name, 5, original, draws) - expected).max() <= 2, name


def test_layers_without_strength_equal_keras_cv_called_directly(original: np.ndarray) -> None:
    batch = original[None].astype(np.float32)
    for name, layer in (
        ("AutoContrast", keras_cv.layers.AutoContrast(value_range=(0, 255))),
        ("Equalize", keras_cv.layers.Equalization(value_range=(0, 255))),
    ):
        np.testing.assert_array_equal(apply(name, 9, original), to_uint8(layer(batch))[0])
    contrast = keras_cv.layers.RandomContrast(value_range=(0, 255), factor=0.5)
    np.testing.assert_array_equal(
        apply("Contrast", 5, original),
        to_uint8(contrast.augment_images(tf.constant(batch), tf.fill((1, 1, 1, 1), 1.45)))[0],
    )


def test_translation_moves_by_its_share_of_the_side_and_fills_with_gray() -> None:
    original = np.full((456, 456, 3), 200, np.uint8)
    right = apply("TranslateX", 17, original)
    assert (right[:, :170] == 128).all()
    assert (right[:, 170:] == 200).all()
    up = apply("TranslateY", 17, original, LOW)
    assert (up[-170:] == 128).all()
    assert (up[:-170] == 200).all()


def test_rotation_by_30_magnitudes_is_a_quarter_turn(original: np.ndarray) -> None:
    turned = [apply("Rotate", 30, original, draws).astype(int) for draws in (LOW, HIGH)]
    quarter = [np.rot90(original, 1), np.rot90(original, -1)]
    differences = [[np.abs(t - q).max() for q in quarter] for t in turned]
    assert sorted(np.argmin(differences, axis=1)) == [0, 1]
    assert np.min(differences, axis=1).max() <= 1


def test_shear_shifts_rows_in_proportion() -> None:
    original = np.zeros((SIDE, SIDE, 3), np.uint8)
    original[:, 20] = 255
    sheared = apply("ShearX", 10, original)  # 0.3
    peaks = sheared[..., 0].astype(int)
    peaks[sheared[..., 0] == 128] = 0
    centers = peaks[:30].argmax(1)
    assert np.polyfit(np.arange(30), centers, 1)[0] == pytest.approx(-0.3, abs=0.03)


def test_cutout_grays_a_square_of_its_share() -> None:
    original = np.zeros((456, 456, 3), np.uint8)
    middle = apply("Cutout", 10, original, tf.constant([0.5, 0.5]))
    assert (middle == 128).all(-1).sum() == 80 * 80
    assert (apply("Cutout", 10, original, tf.constant([0.0, 0.0])) == 128).all(-1).sum() == 40 * 40


def test_every_operation_is_drawn_and_both_signs_are(original: np.ndarray) -> None:
    augment = tf.function(randaugment(1, 9))
    results = {augment(original, tf.constant([1, number], tf.int64)).numpy().tobytes() for number in range(300)}
    # 16 operations, of which 9 have two signs and Cutout as many outcomes as draws
    assert len(results) >= 15 + 9


def test_draws_come_from_the_seed_alone(original: np.ndarray) -> None:
    augment = randaugment(2, 9)
    seeds = tf.data.Dataset.range(24).map(lambda number: tf.stack([tf.constant(7, tf.int64), number]))
    runs = [
        list(seeds.map(lambda seed: augment(original, seed), num_parallel_calls=n).as_numpy_iterator()) for n in (1, 4)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert len({image.tobytes() for image in runs[0]}) > 12
    assert runs[0][0].dtype == np.uint8
