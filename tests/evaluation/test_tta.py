"""Test-time augmentation."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import softmax

from pipeline.data.preprocessing import resize_to_square
from pipeline.errors import RunError
from pipeline.evaluation.predictor import Predictions
from pipeline.evaluation.tta import VIEWS, average_predictions, tta_preprocess_fns

RESOLUTION = 64


def seen(name: str, resize: str, image: np.ndarray) -> list[np.ndarray]:
    return [
        square(tf.constant(image), tf.constant(0, tf.int64)).numpy()
        for square in tta_preprocess_fns(name, RESOLUTION, resize)
    ]


@pytest.mark.parametrize("resize", ["crop", "squash", "letterbox"])
def test_a_flip_is_the_square_of_evaluation_and_its_mirror_image(resize):
    image = np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)
    plain, mirrored = seen("flip", resize, image)
    np.testing.assert_array_equal(plain, resize_to_square(tf.constant(image), RESOLUTION, resize))
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])


def test_the_center_crop_is_that_of_evaluation_and_the_others_reach_the_corners():
    image = np.zeros((96, 192, 3), np.uint8)
    for number, (top, left) in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)], 1):
        rows, columns = slice(0, 12) if top == 0 else slice(-12, None), slice(0, 12) if left == 0 else slice(-12, None)
        image[rows, columns] = 60 * number
    center, *corners = seen("5-crop", "crop", image)
    np.testing.assert_array_equal(center, resize_to_square(tf.constant(image), RESOLUTION, "crop"))
    values = [int(view[y, x, 0]) for view, (y, x) in zip(corners, [(0, 0), (0, -1), (-1, 0), (-1, -1)], strict=True)]
    assert values == [60, 120, 180, 240]


def test_squashed_images_are_cropped_in_both_directions():
    image = np.tile(np.linspace(0, 255, 300)[None, :, None], (96, 1, 3)).astype(np.uint8)
    center, top_left, *_ = seen("5-crop", "squash", image)
    share = RESOLUTION / (RESOLUTION + 32)
    assert int(top_left[0, -1, 0]) == pytest.approx(255 * share, abs=3)
    assert int(center[0, 0, 0]) == pytest.approx(255 * (1 - share) / 2, abs=3)


def test_ten_crops_are_five_and_their_mirror_images():
    image = np.random.default_rng(1).integers(0, 256, (100, 90, 3), np.uint8)
    ten = seen("10-crop", "crop", image)
    for plain, mirrored in zip(ten[:5], ten[5:], strict=True):
        np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    assert len(VIEWS["10-crop"]) == len(ten) == 10


def test_a_letterbox_has_nothing_to_crop():
    with pytest.raises(RunError, match="use flip"):
        tta_preprocess_fns("5-crop", RESOLUTION, "letterbox")


def test_probabilities_are_averaged_not_logits():
    one, other = np.array([[4.0, 0.0, 0.0]], np.float32), np.array([[0.0, 1.0, 0.0]], np.float32)
    views = [Predictions(np.array([5]), np.array([1], np.int32), logits) for logits in (one, other)]
    mean = (softmax(one, axis=1) + softmax(other, axis=1)) / 2
    together = average_predictions(views)
    np.testing.assert_allclose(softmax(together.logits, axis=1), mean, rtol=1e-6)
    assert (together.index.tolist(), together.labels.tolist()) == ([5], [1])
