"""Layers that take the place of Keras's in training compute what Keras's do."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.model.efficientnet import KERAS_LAYERS, LayerTypes, efficientnet, plain_copy
from pipeline.scaling import from_multipliers
from pipeline.training.layers import FusedBatchNormalization, layer_types
from pipeline.training.runtime import Runtime


def gradients(layer: keras.layers.Layer, x: np.ndarray, *, training: bool) -> dict[str, np.ndarray]:
    """What a layer gives, and the gradients of a sum of it that depends on every place."""
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs, training=training)
        total = tf.reduce_sum(tf.sin(tf.cast(outputs, tf.float32) * 3))
    weights = [layer.gamma.value, layer.beta.value]
    found = dict(zip(("input", "gamma", "beta"), tape.gradient(total, [inputs, *weights]), strict=True))
    found |= {"output": outputs, "mean": layer.moving_mean.value, "variance": layer.moving_variance.value}
    return {name: tf.cast(value, tf.float32).numpy() for name, value in found.items()}


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(("training", "trainable"), [(True, True), (True, False), (False, True)])
def test_fused_batch_normalisation_is_kerass_in_outputs_gradients_and_statistics(dtype: str, training: bool, trainable: bool) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 5, 7, 6)) * rng.uniform(0.1, 4, 6) + rng.normal(size=6)).astype(np.float32)
    found = []
    for kind in (keras.layers.BatchNormalization, FusedBatchNormalization):
        layer = kind(momentum=0.9, epsilon=1e-3, dtype=dtype, name="norm")
        layer.build(x.shape)
        layer.set_weights([np.linspace(0.5, 2, 6), np.linspace(-1, 1, 6), np.linspace(-0.5, 0.5, 6), np.linspace(0.5, 3, 6)])
        layer.trainable = trainable
        found.append(gradients(layer, x, training=training))
    tolerance = {"float32": 1e-5, "mixed_bfloat16": 0.03}[dtype]
    for name, expected in found[0].items():
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(found[1][name], expected, atol=tolerance * scale, rtol=tolerance, err_msg=name)
    moved = not np.allclose(found[1]["variance"], np.linspace(0.5, 3, 6))
    assert moved == (training and trainable)


def test_a_step_of_a_whole_network_is_the_same_with_it_and_what_is_saved_holds_kerass_layers() -> None:
    variant = from_multipliers(0.25, 0.3, 32)
    x = tf.constant(np.random.default_rng(1).integers(0, 256, (16, 32, 32, 3)).astype(np.float32))
    labels = tf.one_hot(np.arange(16) % 4, 4)
    results = []
    for types in (KERAS_LAYERS, LayerTypes(norm=FusedBatchNormalization)):
        model = efficientnet(variant, num_classes=4, dropout=0.0, survival=1.0, layer_types=types)
        model.get_layer("predictions").kernel.assign(model.get_layer("predictions").kernel * 100)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels, model(x, training=True)))
        gradient = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        results.append((loss.numpy(), [tensor.numpy() for tensor in gradient], model))
    (loss, expected, plain), (fused_loss, found, fused) = results
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    whole = np.sqrt(sum(np.sum(one**2) for one in expected))  # some are zero but for rounding: of what the next normalisation takes out
    for one, other in zip(expected, found, strict=True):
        assert np.linalg.norm(one - other) <= 1e-3 * np.linalg.norm(one) + 1e-5 * whole
    copy = plain_copy(fused)
    assert {type(layer).__module__.split(".")[0] for layer in copy.layers} == {"keras"}
    for one, other in zip(plain.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(copy(x), fused(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("synchronised", "compiled", "fused"), [(False, False, True), (False, True, False), (True, False, False), (True, True, False)]
)
def test_the_fused_operation_is_for_each_replica_s_own_statistics_without_xla(synchronised: bool, compiled: bool, fused: bool) -> None:
    runtime = Runtime(tf.distribute.get_strategy(), "float32", compiled, sync_batch_norm=synchronised)
    assert (layer_types(runtime).norm is FusedBatchNormalization) == fused
