"""Heat maps of the image regions that speak for a class (Grad-CAM, Selvaraju et al. 2017, arXiv 1610.02391)."""

import keras
import numpy as np
import tensorflow as tf
from matplotlib import colormaps

from pipeline.models.efficientnet import TOP_ACTIVATION

OPACITY = 0.5


class GradCam:
    """The Grad-CAM heat maps of a network, traced once."""

    def __init__(self, model: keras.Model) -> None:
        """Prepare the maps of a network.

        Args:
            model: float32 (B, R, R, 3) in [0, 255] to logits (B, K), with a layer `top_activation` of (B, h, w, C).
        """
        features_and_logits = keras.Model(model.inputs, [model.get_layer(TOP_ACTIVATION).output, model.outputs[0]])
        side = model.input_shape[1]

        @tf.function(reduce_retracing=True)
        def heat(images: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
            images = tf.cast(images, tf.float32)
            with tf.GradientTape() as tape:
                tape.watch(images)  # records the path to the features even where no weight is trainable
                features, logits = features_and_logits(images, training=False)
                score = tf.reduce_sum(tf.gather(logits, classes, batch_dims=1))
            gradient = tf.cast(tape.gradient(score, features), tf.float32)
            weights = tf.reduce_mean(gradient, axis=[1, 2], keepdims=True)
            maps = tf.nn.relu(tf.reduce_sum(weights * tf.cast(features, tf.float32), axis=-1, keepdims=True))
            return tf.image.resize(maps, (side, side), "bilinear")[..., 0]

        self._heat = heat

    def __call__(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Compute the heat maps.

        Args:
            images: uint8 (B, R, R, 3).
            classes: int (B,), the class to explain for each image.

        Returns:
            float32 (B, R, R) in [0, 1], 1 at the maximum of each map; zero everywhere if nothing speaks for the class.
        """
        maps = self._heat(tf.constant(images), tf.constant(classes, tf.int32)).numpy()
        maximum = maps.max(axis=(1, 2), keepdims=True)
        return np.divide(maps, maximum, out=np.zeros_like(maps), where=maximum > 0)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Blend a heat map over its image.

    Args:
        image: uint8 (R, R, 3).
        heat: float32 (R, R) in [0, 1].

    Returns:
        uint8 (R, R, 3).
    """
    colors = 255 * colormaps["inferno"](heat)[..., :3]
    return np.round((1 - OPACITY) * image + OPACITY * colors).astype(np.uint8)
