"""Layers that compute what Keras's do and are put in their place for training only.

A saved model holds Keras's (`to_inference_model`).
"""

import os
import platform
from collections.abc import Callable

import keras
import tensorflow as tf

from pipeline.models.efficientnet import LayerTypes

_REPLICA_STRIDE = 1 << 32  # beyond the layers' own seeds, which are below it: no two replicas share a seed


class PerReplicaDropout(keras.layers.Dropout):
    """Dropout whose mask differs between replicas, and that a frozen layer does not apply.

    Keras's own draws the same mask on every replica, and goes on drawing where `trainable` is False: a frozen block
    would be noisy. Only for training: saved models hold Keras's layer, which computes the same at inference.
    """

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Mask `inputs` of any shape and floating dtype while training; pass them on otherwise."""
        if not training or not self.trainable or self.rate == 0:
            return inputs
        seed, counter = tf.unstack(tf.cast(self.seed_generator.next(), tf.int64))
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        seed = tf.stack([seed + tf.cast(replica, tf.int64) * _REPLICA_STRIDE, counter])
        noise_shape = None
        if self.noise_shape is not None:
            noise_shape = [
                tf.shape(inputs)[axis] if size is None else size for axis, size in enumerate(self.noise_shape)
            ]
        return tf.nn.experimental.stateless_dropout(inputs, self.rate, seed=seed, noise_shape=noise_shape)


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization in one TensorFlow operation, and one for its gradient, by each replica's own statistics.

    Keras's own takes moments, normalizes and scales in operations of their own, each of which reads or writes the whole
    activation: a B0 trains 1.3 times as fast with this (two CPU cores, 224 pixels, 16 images). XLA fuses Keras's.
    Results are Keras's but for rounding; weights have the same names.
    """

    fused = True

    def call(self, inputs: tf.Tensor, training: bool = False, mask: None = None) -> tf.Tensor:
        """Normalize (B, H, W, C) in the dtype of the computation, over all but the channels.

        A frozen layer by its moving statistics.
        """
        if not self.fused:
            return super().call(inputs, training=training, mask=mask)
        learns = bool(training) and self.trainable
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs,
            self.gamma.value,
            self.beta.value,
            None if learns else self.moving_mean.value,
            None if learns else self.moving_variance.value,
            epsilon=self.epsilon,
            is_training=learns,
        )
        if learns:
            count = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
            variance *= (count - 1) / count  # the operation gives the unbiased one
            for moving, present in ((self.moving_mean, mean), (self.moving_variance, variance)):
                moving.assign(moving.value * self.momentum + present * (1 - self.momentum))
        return outputs


class FusedActivation(keras.layers.Activation):
    """Keras's layer, with a gradient of swish that goes over the activation four times in place of six, without XLA.

    With s the sigmoid, swish y = x s(x) has the gradient s(x) (1 + (x - y)), whose factor s TensorFlow has in one
    operation with the multiplication: the gradient of softplus. It and its forward pass take 0.83 of the time; a step
    of a B0, 0.95 (two CPU cores, 224 pixels, 16 images).
    """

    fused = True

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Compute the activation of a tensor of any shape and floating dtype."""
        return _swish(inputs) if self.fused and self.activation is keras.activations.silu else super().call(inputs)


@tf.custom_gradient
def _swish(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    y = x * tf.sigmoid(x)  # one operation of oneDNN's on CPUs

    def gradient(dy: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.SoftplusGrad(gradients=dy * (1 + (x - y)), features=x)

    return y, gradient


class SplitDepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """Keras's layer with the gradient of a 5 x 5 kernel computed in two parts, on CPUs: three columns and two columns.

    For kernels wider than three, oneDNN computes that gradient by its routine for any convolution, for fewer columns by
    one for depthwise ones: together they take 0.5 to 0.7 of its time (strides 1; with strides of 2 nothing is gained);
    a step of a B0 takes 0.95 (two CPU cores with AVX-512, 224 pixels, 16 images).
    """

    fused = True

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Convolve (B, H, W, C) in the dtype of the computation."""
        splits = self.fused and self.kernel_size == (5, 5) and self.strides == (1, 1)
        return _depthwise_5x5(inputs, tf.convert_to_tensor(self.kernel)) if splits else super().call(inputs)


@tf.custom_gradient
def _depthwise_5x5(
    x: tf.Tensor, kernel: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
    strides = [1, 1, 1, 1]

    def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        width, channels = dy.shape[2], dy.shape[3]
        padded = tf.pad(x, [[0, 0], [2, 2], [2, 2], [0, 0]])
        columns = [
            tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
                input=padded[:, :, first : first + width + number - 1],
                filter_sizes=(5, number, channels, 1),
                out_backprop=dy,
                strides=strides,
                padding="VALID",
            )
            for first, number in ((0, 3), (3, 2))
        ]
        dx = tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
            input_sizes=tf.shape(x), filter=kernel, out_backprop=dy, strides=strides, padding="SAME"
        )
        return dx, tf.concat(columns, 1)

    return tf.nn.depthwise_conv2d(x, kernel, strides, "SAME"), gradient


def layer_types(*, jit_compile: bool, sync_batch_norm: bool) -> LayerTypes:
    """Choose the layers that a network is built of to be trained on the devices of this process.

    Args:
        jit_compile: Whether XLA compiles the steps; it fuses Keras's own operations.
        sync_batch_norm: Whether batch normalization takes its statistics over all replicas.

    Returns:
        The layer types.
    """
    if jit_compile:
        return LayerTypes(dropout=PerReplicaDropout)
    types = LayerTypes(dropout=PerReplicaDropout, activation=FusedActivation)
    if not sync_batch_norm:
        types = types._replace(norm=FusedBatchNormalization)
    by_onednn = platform.machine() == "x86_64" and os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"
    by_onednn &= not tf.config.list_logical_devices("GPU")
    return types._replace(dwconv=SplitDepthwiseConv2D) if by_onednn else types


def disable_fused_layers(model: keras.Model) -> None:
    """Let Keras's own operations compute all layers in what is traced from here on.

    Used for a network that was built before XLA was chosen to compile its steps.
    """
    for layer in model.layers:
        if isinstance(layer, (FusedBatchNormalization, FusedActivation, SplitDepthwiseConv2D)):
            layer.fused = False
