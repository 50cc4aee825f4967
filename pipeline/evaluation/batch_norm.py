"""What the moving statistics of batch normalisation cost: the network measured by them, and by each batch's own."""

from typing import NamedTuple

import keras
import tensorflow as tf


class BatchNormGap(NamedTuple):
    """Accuracy on the same images, in [0, 1]. Far apart, the moving statistics lag behind the weights: see train.freeze_batch_norm."""

    moving: float
    """By the moving statistics, as a finished network is used."""
    batch: float
    """By the statistics of each batch, as in training, dropout off."""


class BatchStatsNormalization(keras.layers.BatchNormalization):
    """Batch normalisation by the batch's statistics that leaves the moving ones alone."""

    def call(self, inputs: tf.Tensor, training: bool = False, mask: None = None) -> tf.Tensor:
        """Normalises (B, H, W, C) over all but the channels."""
        del training, mask
        mean, variance = tf.nn.moments(inputs, [0, 1, 2])
        return tf.nn.batch_normalization(inputs, mean, variance, self.beta.value, self.gamma.value, self.epsilon)


def by_batch_statistics(model: keras.Model) -> keras.Model:
    """A copy of a network of plain Keras layers that normalises by each batch's own statistics, in inference, too."""

    def exchanged(layer: keras.layers.Layer) -> keras.layers.Layer:
        kind = BatchStatsNormalization if isinstance(layer, keras.layers.BatchNormalization) else type(layer)
        return kind.from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=exchanged)
    copy.set_weights(model.get_weights())
    return copy


def batch_norm_gap(model: keras.Model, dataset: tf.data.Dataset) -> BatchNormGap:
    """Measures it.

    Args:
        model: Of plain Keras layers, float32 (B, R, R, 3) in [0, 255] to logits (B, K).
        dataset: Batches as of `evaluation_stream`, without padding and in a random order, for the batches' statistics to be the data's.
    """
    other = by_batch_statistics(model)
    right, seen = [0, 0], 0

    @tf.function(reduce_retracing=True)
    def both(images: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        true = tf.argmax(labels, axis=-1)
        hits = [
            tf.equal(tf.argmax(each(tf.cast(images, tf.float32), training=False), axis=-1), true)
            for each in (model, other)
        ]
        return [tf.math.count_nonzero(hit) for hit in hits]

    for images, labels, _, _ in dataset:
        right = [so_far + int(more) for so_far, more in zip(right, both(images, labels), strict=True)]
        seen += len(images)
    return BatchNormGap(*(count / seen for count in right))
