"""Where in a picture the network saw a class (Grad-CAM, Selvaraju et al. 2017, arXiv 1610.02391)."""

import keras
import numpy as np
import tensorflow as tf
from matplotlib import colormaps

LAST_FEATURES = "top_activation"  # the layer in front of the pooling
OPACITY = 0.5


class GradCam:
    """Heat maps of a network, traced once."""

    def __init__(self, model: keras.Model) -> None:
        """Takes float32 (B, R, R, 3) in [0, 255] to logits (B, K), with a layer `top_activation` of (B, h, w, C)."""
        both = keras.Model(model.inputs, [model.get_layer(LAST_FEATURES).output, model.outputs[0]])
        side = model.input_shape[1]

        @tf.function(reduce_retracing=True)
        def heat(images: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
            images = tf.cast(images, tf.float32)
            with tf.GradientTape() as tape:
                tape.watch(images)  # so that the way to the features is recorded, whatever is trainable
                features, logits = both(images, training=False)
                score = tf.reduce_sum(tf.gather(logits, classes, batch_dims=1))
            slope = tf.cast(tape.gradient(score, features), tf.float32)
            weights = tf.reduce_mean(slope, axis=[1, 2], keepdims=True)
            maps = tf.nn.relu(tf.reduce_sum(weights * tf.cast(features, tf.float32), axis=-1, keepdims=True))
            return tf.image.resize(maps, (side, side), "bilinear")[..., 0]

        self._heat = heat

    def __call__(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Computes the maps.

        Args:
            images: uint8 (B, R, R, 3).
            classes: int (B,), the class of each that is asked for.

        Returns:
            float32 (B, R, R) in [0, 1], 1 at the strongest place of each; zero all over where nothing speaks for the class.
        """
        maps = self._heat(tf.constant(images), tf.constant(classes, tf.int32)).numpy()
        strongest = maps.max(axis=(1, 2), keepdims=True)
        return np.divide(maps, strongest, out=np.zeros_like(maps), where=strongest > 0)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lays a heat map over its picture.

    Args:
        image: uint8 (R, R, 3).
        heat: float32 (R, R) in [0, 1].

    Returns:
        uint8 (R, R, 3).
    """
    colours = 255 * colormaps["inferno"](heat)[..., :3]
    return np.round((1 - OPACITY) * image + OPACITY * colours).astype(np.uint8)
