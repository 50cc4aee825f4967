"""Layers that take the place of Keras's in training compute what Keras's do."""

from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
from short_network import short_network

from pipeline.models.efficientnet import KERAS_LAYERS, LayerTypes, to_inference_model
from pipeline.models.layers import (
    FusedActivation,
    FusedBatchNormalization,
    SplitDepthwiseConv2D,
    disable_fused_layers,
    layer_types,
)


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
def test_fused_batch_normalisation_is_kerass_in_outputs_gradients_and_statistics(
    dtype: str, training: bool, trainable: bool
) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 5, 7, 6)) * rng.uniform(0.1, 4, 6) + rng.normal(size=6)).astype(np.float32)
    found = []
    for kind in (keras.layers.BatchNormalization, FusedBatchNormalization):
        layer = kind(momentum=0.9, epsilon=1e-3, dtype=dtype, name="norm")
        layer.build(x.shape)
        layer.set_weights(
            [np.linspace(0.5, 2, 6), np.linspace(-1, 1, 6), np.linspace(-0.5, 0.5, 6), np.linspace(0.5, 3, 6)]
        )
        layer.trainable = trainable
        found.append(gradients(layer, x, training=training))
    tolerance = {"float32": 1e-5, "mixed_bfloat16": 0.03}[dtype]
    for name, expected in found[0].items():
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(found[1][name], expected, atol=tolerance * scale, rtol=tolerance, err_msg=name)
    moved = not np.allclose(found[1]["variance"], np.linspace(0.5, 3, 6))
    assert moved == (training and trainable)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_swish_is_kerass_in_outputs_and_its_gradient_as_near_to_the_true_one(dtype: str) -> None:
    x = np.concatenate([np.linspace(-30, 30, 20001), [-1e4, -100, 100, 1e4]]).astype(np.float32)
    outputs, errors = [], []
    for kind in (keras.layers.Activation, FusedActivation):
        inputs = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs.append(kind("swish", dtype=dtype)(inputs))
        rounded = tf.cast(tf.cast(x, outputs[0].dtype), tf.float64)
        s = tf.sigmoid(rounded)
        errors.append(np.abs(tape.gradient(outputs[-1], inputs) - tf.cast(s * (1 + rounded * (1 - s)), tf.float32)))
    np.testing.assert_array_equal(*outputs)
    assert errors[1].max() <= 1.5 * errors[0].max()
    assert errors[1].mean() <= 1.5 * errors[0].mean()


def test_another_activation_is_left_alone() -> None:
    x = tf.constant([-1.0, 3.0, 9.0])
    np.testing.assert_array_equal(FusedActivation("relu6")(x), [0, 3, 6])


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(("size", "stride"), [(5, 1), (5, 2), (3, 1)])
@pytest.mark.parametrize(("height", "width"), [(9, 12), (7, 7), (4, 3), (1, 2)])
def test_the_depthwise_convolution_is_kerass_in_outputs_and_gradients(
    size: int, stride: int, height: int, width: int, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, height, width, 6)).astype(np.float32), rng.normal(size=(size, size, 6, 1))
    results = []
    for kind in (keras.layers.DepthwiseConv2D, SplitDepthwiseConv2D):
        layer = kind(size, stride, padding="same", use_bias=False, dtype=dtype)
        layer.build(x.shape)
        layer.set_weights([kernel])
        inputs = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = tf.cast(layer(inputs), tf.float32)
            total = tf.reduce_sum(tf.sin(outputs * 3))
        results.append([outputs, *tape.gradient(total, [inputs, layer.kernel.value])])
    rounding = {"float32": 1e-4, "mixed_bfloat16": 0.1}[dtype]
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=rounding, atol=rounding * float(np.abs(expected).max()))


ALL = LayerTypes(norm=FusedBatchNormalization, activation=FusedActivation, dwconv=SplitDepthwiseConv2D)


def test_a_step_of_a_network_is_the_same_with_them_and_what_is_saved_holds_kerass_layers() -> None:
    x = tf.constant(np.random.default_rng(1).integers(0, 256, (16, 32, 32, 3)).astype(np.float32))
    labels = tf.one_hot(np.arange(16) % 4, 4)
    results = []
    for types in (KERAS_LAYERS, ALL):
        model = short_network(num_classes=4, dropout=0.0, drop_path_rate=0.0, layer_types=types)
        model.get_layer("predictions").kernel.assign(model.get_layer("predictions").kernel * 100)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels, model(x, training=True)))
        gradient = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        results.append((loss.numpy(), [tensor.numpy() for tensor in gradient], model))
    (loss, expected, plain), (fused_loss, found, fused) = results
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    whole = np.sqrt(
        sum(np.sum(one**2) for one in expected)
    )  # some are zero but for rounding: of what the next normalisation takes out
    for one, other in zip(expected, found, strict=True):
        assert np.linalg.norm(one - other) <= 1e-3 * np.linalg.norm(one) + 1e-5 * whole
    copy = to_inference_model(fused)
    assert {type(layer).__module__.split(".")[0] for layer in copy.layers} == {"keras"}
    for one, other in zip(plain.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(copy(x), fused(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("synchronised", "compiled", "norm"),
    [(False, False, True), (False, True, False), (True, False, False), (True, True, False)],
)
def test_fused_operations_are_for_steps_without_xla_and_statistics_of_each_replicas_own(
    synchronised: bool, compiled: bool, norm: bool
) -> None:
    types = layer_types(jit_compile=compiled, sync_batch_norm=synchronised)
    assert (types.norm is FusedBatchNormalization) == norm
    assert (types.activation is FusedActivation) == (not compiled)


@pytest.mark.parametrize(
    ("machine", "onednn", "gpus", "split"),
    [("x86_64", "1", [], True), ("x86_64", "0", [], False), ("arm", "1", [], False), ("x86_64", "1", ["GPU"], False)],
)
def test_depthwise_gradients_are_split_where_onednn_computes_them(
    machine: str, onednn: str, gpus: list[str], split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", onednn)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: gpus if kind == "GPU" else ["CPU"])
    assert (layer_types(jit_compile=False, sync_batch_norm=False).dwconv is SplitDepthwiseConv2D) == split


def test_a_network_that_is_left_to_xla_computes_by_kerass_operations() -> None:
    model = short_network(num_classes=4, layer_types=ALL)
    special = {"FusedBatchNormV3", "SoftplusGrad"}

    def operations() -> Counter[str]:
        def step(x: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x, training=True))
            return tape.gradient(loss, [variable.value for variable in model.trainable_variables])

        graph = tf.function(step).get_concrete_function(tf.TensorSpec((2, 32, 32, 3))).graph
        return Counter(operation.type for operation in graph.get_operations())

    before = operations()
    assert special <= before.keys()
    disable_fused_layers(model)
    after = operations()
    assert not special & after.keys()
    kernels = [layer for layer in model.layers if isinstance(layer, SplitDepthwiseConv2D)]
    split = [layer for layer in kernels if (layer.kernel_size, layer.strides) == ((5, 5), (1, 1))]
    assert len(split) > 0
    assert after["DepthwiseConv2dNativeBackpropFilter"] == len(kernels)
    assert before["DepthwiseConv2dNativeBackpropFilter"] == len(kernels) + len(split)
