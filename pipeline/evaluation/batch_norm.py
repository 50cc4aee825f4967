"""The accuracy gap between the moving statistics of batch normalization and the statistics of each batch."""

from typing import NamedTuple

import keras
import tensorflow as tf

from pipeline.tasks import Task


class BatchNormGap(NamedTuple):
    """The accuracy on the same images, in [0, 1]; a large gap means that the moving statistics lag behind the weights.

    See `train.freeze_batch_norm`.
    """

    moving: float
    """With the moving statistics, as in inference."""
    batch: float
    """With the statistics of each batch, as in training, but without dropout."""


class BatchStatsNormalization(keras.layers.BatchNormalization):
    """Batch normalization with the statistics of the batch, which leaves the moving statistics unchanged."""

    def call(self, inputs: tf.Tensor, training: bool = False, mask: None = None) -> tf.Tensor:
        """Normalize (B, H, W, C) over all axes except the channels."""
        del training, mask
        mean, variance = tf.nn.moments(inputs, [0, 1, 2])
        return tf.nn.batch_normalization(inputs, mean, variance, self.beta.value, self.gamma.value, self.epsilon)


def with_batch_statistics(model: keras.Model) -> keras.Model:
    """Return a copy of a network of plain Keras layers that uses the statistics of each batch in inference, too."""

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        layer_class = BatchStatsNormalization if isinstance(layer, keras.layers.BatchNormalization) else type(layer)
        return layer_class.from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=clone)
    copy.set_weights(model.get_weights())
    return copy


def batch_norm_gap(model: keras.Model, dataset: tf.data.Dataset, task: Task) -> BatchNormGap:
    """Measure the accuracy with moving statistics and with batch statistics.

    Args:
        model: Of plain Keras layers, float32 (B, R, R, 3) in [0, 255] to logits (B, K).
        dataset: Batches as from `evaluation_stream`, without padding and in a random order, so that the statistics of
            the batches are those of the data.
        task: What labels and logits mean.
    """
    batch_model = with_batch_statistics(model)
    correct, num_images = [0, 0], 0

    @tf.function(reduce_retracing=True)
    def count_correct(images: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        logits = [each(tf.cast(images, tf.float32), training=False) for each in (model, batch_model)]
        return [tf.math.count_nonzero(task.is_correct(labels, each)) for each in logits]

    for images, labels, _, _ in dataset:
        counts = count_correct(images, labels)
        correct = [total + int(count) for total, count in zip(correct, counts, strict=True)]
        num_images += len(images)
    return BatchNormGap(*(count / num_images for count in correct))
