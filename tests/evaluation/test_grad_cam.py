"""Where the network saw a class."""

import keras
import numpy as np
import tensorflow as tf
from short_network import short_network

from pipeline.evaluation.grad_cam import GradCam, overlay


def spotter() -> keras.Model:
    """Its first class is spoken for by red, its second by green, at the place where they are."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.AveragePooling2D(4)(inputs)
    x = keras.layers.Activation("relu", name="top_activation")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    kernel = tf.constant([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]])
    return keras.Model(inputs, keras.layers.Dense(2, kernel_initializer=lambda shape, dtype: kernel)(x))


def test_the_map_lights_up_where_the_class_is():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:8, :8, 0] = 255  # red at the top left
    image[24:, 24:, 1] = 255  # green at the bottom right
    red, green = GradCam(spotter())(np.stack([image, image]), np.array([0, 1]))
    assert np.unravel_index(red.argmax(), red.shape) < (8, 8)
    assert red[:8, :8].mean() > 0.7
    assert red[16:, 16:].max() == 0
    assert green[24:, 24:].mean() > 0.7
    assert green[:16, :16].max() == 0
    assert red.max() == green.max() == 1


def test_nothing_that_speaks_for_a_class_is_a_dark_map():
    maps = GradCam(spotter())(np.zeros((1, 32, 32, 3), np.uint8), np.array([0]))
    assert not maps.any()


def test_every_network_of_the_family_has_the_layer_frozen_or_not():
    model = short_network(64, num_classes=3)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    for model.trainable in (True, False):
        maps = GradCam(model)(images, np.array([0, 2]))
        assert maps.shape == (2, 64, 64)
        assert np.isfinite(maps).all()


def test_an_overlay_keeps_the_image_visible():
    image = np.full((4, 4, 3), 200, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    mixed = overlay(image, heat)
    assert mixed.dtype == np.uint8
    assert mixed[0, 0].astype(int).sum() > mixed[3, 3].astype(int).sum() > 0
