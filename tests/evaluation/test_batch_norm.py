"""The gap between batch normalization's moving statistics and those of the batches."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.evaluation.batch_norm import batch_norm_gap, with_batch_statistics
from pipeline.tasks import SINGLE_LABEL


def network() -> keras.Model:
    """Right with batch statistics: it predicts the first class where an image is brighter than the batch's mean."""
    inputs = keras.Input((2, 2, 3))
    x = keras.layers.BatchNormalization(name="norm")(inputs)
    x = keras.layers.Dropout(0.5)(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, keras.layers.Dense(2, use_bias=False, name="classes")(x))
    model.get_layer("classes").kernel.assign([[1.0, -1.0]] * 3)
    model.get_layer("norm").moving_mean.assign([200.0] * 3)  # far from the images: everything is dark
    return model


def image_batches() -> tf.data.Dataset:
    bright = np.tile([1, 0], 32)
    images = np.where(bright[:, None, None, None], 120, 60) * np.ones((64, 2, 2, 3))
    labels = np.eye(2, dtype=np.float32)[1 - bright]
    index = np.arange(64, dtype=np.int64)
    return tf.data.Dataset.from_tensor_slices((images.astype(np.uint8), labels, np.ones(64, np.float32), index)).batch(
        16
    )


def test_statistics_that_lag_show_as_a_gap():
    model = network()
    before = model.get_weights()
    gap = batch_norm_gap(model, image_batches(), SINGLE_LABEL)
    assert gap == (0.5, 1.0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_it_is_batch_normalization_in_training():
    model = network()
    images = np.random.default_rng(0).normal(100, 30, (8, 2, 2, 3)).astype(np.float32)
    norm = model.get_layer("norm")
    expected = keras.Model(model.inputs, norm.output)(images, training=True)
    other = with_batch_statistics(model)
    found = keras.Model(other.inputs, other.get_layer("norm").output)(images, training=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_without_a_lag_there_is_no_gap():
    model = network()
    model.get_layer("norm").moving_mean.assign([90.0] * 3)
    model.get_layer("norm").moving_variance.assign([900.0] * 3)
    assert batch_norm_gap(model, image_batches(), SINGLE_LABEL) == pytest.approx((1.0, 1.0))
