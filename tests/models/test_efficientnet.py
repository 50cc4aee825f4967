"""The network against keras.applications' and the official code's figures."""

import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest

from pipeline.models.efficientnet import (
    LayerTypes,
    block_name,
    block_of,
    efficientnet,
    stage_repeats,
    to_inference_model,
)
from pipeline.models.variants import VARIANTS, Variant, from_multipliers

TINY = replace(VARIANTS["b0"], width=0.25, depth=0.3, resolution=32)
SHORT = replace(VARIANTS["b0"], width=0.25, resolution=32, family_name="short")


def images(size: int, count: int = 3) -> np.ndarray:
    """Images that differ in pattern, color and contrast: float32 (count, size, size, 3) in [0, 255]."""
    random = np.random.default_rng(0)
    coarse = random.uniform(0, 255, (count, size // 8 + 1, size // 8 + 1, 3)) * random.uniform(0, 1, (count, 1, 1, 3))
    return coarse.repeat(8, 1).repeat(8, 2)[:, :size, :size].astype("float32")


def make_lively(model: keras.Model) -> None:
    """He kernels and random batch normalisation.

    Scaled so that activations neither fade nor explode and logits tell images apart.
    """
    random = np.random.default_rng(1)
    for layer in model.layers:
        values = []
        for weight in layer.weights:
            shape, name = tuple(weight.shape), weight.name
            if "kernel" in name:
                fan_in = np.prod(shape[:2]) if isinstance(layer, keras.layers.DepthwiseConv2D) else np.prod(shape[:-1])
                values.append(random.normal(0, np.sqrt((100 if layer.name == "predictions" else 2) / fan_in), shape))
            else:
                values.append(random.uniform(0.8, 1.2, shape) if name == "gamma" else random.normal(0, 0.1, shape))
        layer.set_weights(values)

    def call(
        layer: keras.layers.BatchNormalization, inputs: Any, training: bool | None = None, mask: Any = None
    ) -> Any:
        deviation, shape = np.std(inputs), tuple(layer.gamma.shape)
        layer.moving_mean.assign(np.mean(inputs) + deviation * random.normal(0, 0.2, shape))
        layer.moving_variance.assign(deviation**2 * random.uniform(0.5, 1.5, shape))
        return infer(layer, inputs, training=False)

    infer = keras.layers.BatchNormalization.call
    with mock.patch.object(keras.layers.BatchNormalization, "call", call):
        model(images(model.input.shape[1]))


def lively(variant: Variant, num_classes: int = 1000) -> keras.Model:
    model = efficientnet(variant, num_classes=num_classes)
    make_lively(model)
    return model


def keras_application(name: str, size: int) -> keras.Model:
    return getattr(keras.applications, f"EfficientNet{name.upper()}")(
        weights=None, input_shape=(size, size, 3), classifier_activation=None
    )


@pytest.fixture(scope="module")
def b0() -> keras.Model:
    """B0 with its initial weights, for 75 pixels: so its strides meet odd sides (75, 19, 5) and even ones (38, 10)."""
    return efficientnet(replace(VARIANTS["b0"], resolution=75))


@pytest.fixture(scope="module")
def reference() -> keras.Model:
    """Keras's B0 for 75 pixels."""
    return keras_application("b0", 75)


def assert_equal_outputs(ours: keras.Model, reference: keras.Model) -> None:
    """Check that a lively network equals one of keras.applications that is given its weights."""
    size = ours.input.shape[1]
    normalisation = next(layer for layer in reference.layers if isinstance(layer, keras.layers.Normalization))
    normalisation.set_weights([np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]) ** 2, np.array(0)])
    normalisation.finalize_state()
    weighted = [layer for layer in ours.layers if layer.weights]
    assert [layer.name for layer in weighted] == [
        layer.name for layer in reference.layers if layer.weights and layer is not normalisation
    ]
    for layer in weighted:
        reference.get_layer(layer.name).set_weights(layer.get_weights())

    expected, logits = reference(images(size)).numpy(), ours(images(size)).numpy()
    largest = np.abs(expected).max()
    assert expected.std() >= 1
    assert min(np.abs(expected[0] - expected[1]).max(), np.abs(expected[1] - expected[2]).max()) / largest > 1e-2
    assert np.abs(logits - expected).max() / largest <= 1e-4


def test_b0_equals_keras_applications(b0: keras.Model, reference: keras.Model) -> None:
    initial = b0.get_weights()
    make_lively(b0)
    assert_equal_outputs(b0, reference)
    b0.set_weights(initial)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
def test_b0_to_b7_equal_keras_applications(number: int) -> None:
    name = f"b{number}"
    assert_equal_outputs(lively(replace(VARIANTS[name], resolution=64)), keras_application(name, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b8", "l2"])
def test_the_largest_have_the_weights_of_kerass_builder_at_their_scale(name: str) -> None:
    from keras.src.applications.efficientnet import EfficientNet

    variant = VARIANTS[name]
    with keras.StatelessScope(initialize_variables=False):  # shapes only: L2's values take 2 GB
        ours = efficientnet(variant)
        reference = EfficientNet(variant.width, variant.depth, variant.resolution, weights=None, name=name)
    keras.utils.clear_session()
    shapes, expected = (
        {layer.name: [tuple(weight.shape) for weight in layer.weights] for layer in model.layers if layer.weights}
        for model in (ours, reference)
    )
    expected = {layer: of for layer, of in expected.items() if "normalization" not in layer}
    assert list(shapes.items()) == list(expected.items())
    assert ours.output.shape == (None, 1000)
    final = ours.get_layer("top_activation").output.shape
    assert final == reference.get_layer("top_activation").output.shape


def test_every_layer_but_padding_and_normalisation_is_called_as_in_keras_applications(
    b0: keras.Model, reference: keras.Model
) -> None:
    names = {layer.name for layer in reference.layers if not isinstance(layer, keras.layers.ZeroPadding2D)}
    ours = {layer.name for layer in b0.layers}
    assert {name for name in names - ours if not re.match("input|normalization|rescaling", name)} == set()
    assert ours - names == {"images", "rescaling"} - names


@pytest.mark.parametrize(
    ("name", "drop_path_rate"),
    [
        ("b0", 0.5),
        ("lite2", 0.2),
        *(pytest.param(name, 0.2, marks=pytest.mark.slow) for name in ("b0", "b3")),
    ],
)
def test_the_drop_rate_rises_linearly_over_the_blocks(name: str, drop_path_rate: float) -> None:
    with keras.StatelessScope(initialize_variables=False):
        model = efficientnet(VARIANTS[name], drop_path_rate=drop_path_rate)
    blocks = list(
        dict.fromkeys(re.findall(r"block\d[a-z]+(?=_dwconv)", " ".join(layer.name for layer in model.layers)))
    )
    assert len(blocks) == sum(stage_repeats(VARIANTS[name]))
    layers = {layer.name: layer for layer in model.layers}
    for i, block in enumerate(blocks):
        assert (f"{block}_drop" in layers) == (f"{block}_add" in layers) == (not block.endswith("a"))
        if f"{block}_drop" in layers:
            assert 1 - layers[f"{block}_drop"].rate == pytest.approx(1 - drop_path_rate * i / len(blocks), abs=1e-12)
    keras.utils.clear_session()


def test_without_stochastic_depth_there_is_no_drop_layer() -> None:
    model = efficientnet(replace(TINY, depth=1.0), drop_path_rate=0.0, dropout=0.0)
    assert not [layer for layer in model.layers if isinstance(layer, keras.layers.Dropout)]


def test_stochastic_depth_drops_whole_samples_and_rescales_the_others() -> None:
    model = efficientnet(replace(TINY, depth=1.0), drop_path_rate=0.7)
    drop = model.get_layer("block6d_drop")
    kept = drop(np.ones((4000, 2, 2, 3), "float32"), training=True).numpy()
    assert (kept == kept[:, :1, :1, :1]).all()
    per_sample = kept[:, 0, 0, 0]
    scale = 1 / (1 - drop.rate)
    assert np.isclose(per_sample, 0).sum() + np.isclose(per_sample, scale).sum() == 4000
    assert np.isclose(per_sample, 0).mean() == pytest.approx(drop.rate, abs=0.04)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("b0", (np.array([10, 128, 255]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
        ("lite0", (np.array([10, 128, 255]) - 127) / 128),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_normalisation_is_decided_by_the_family_and_done_in_float32(
    name: str, expected: np.ndarray, dtype: str
) -> None:
    model = efficientnet(replace(VARIANTS[name], width=0.25, depth=0.3, resolution=32), dtype=dtype)
    normalised = model.get_layer("rescaling")(np.full((1, 1, 1, 3), [10, 128, 255], "float32"))
    assert normalised.dtype == "float32"
    np.testing.assert_allclose(normalised[0, 0, 0], expected, rtol=1e-5)


def test_bfloat16_keeps_weights_and_logits_in_float32() -> None:
    model = efficientnet(SHORT, num_classes=7, dtype="mixed_bfloat16")
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert model.get_layer("block2a_expand_conv").compute_dtype == "bfloat16"
    logits = model(images(32))
    assert (logits.shape, logits.dtype) == ((3, 7), "float32")


def test_features_come_without_the_top() -> None:
    variant = replace(TINY, resolution=75)
    features, whole = efficientnet(variant, include_top=False, seed=4), efficientnet(variant, num_classes=3, seed=4)
    assert features.output.shape == (None, 3, 3, 320)
    assert features.layers[-1].name == "top_activation"
    inner = keras.Model(whole.input, whole.get_layer("top_activation").output)
    np.testing.assert_array_equal(features(images(75)), inner(images(75)))


def test_lite_has_no_squeeze_and_excitation_relu6_and_unscaled_ends() -> None:
    variant = VARIANTS["lite4"]
    with keras.StatelessScope(initialize_variables=False):
        model = efficientnet(variant)
    assert not [layer.name for layer in model.layers if "_se_" in layer.name]
    assert {layer.activation for layer in model.layers if isinstance(layer, keras.layers.Activation)} == {
        keras.activations.relu6
    }
    assert model.get_layer("stem_conv").filters == 32
    assert model.get_layer("top_conv").filters == 1280
    assert stage_repeats(variant) == [1, 4, 4, 6, 6, 8, 1]
    keras.utils.clear_session()


def test_squeeze_and_excitation_squeezes_to_a_quarter_of_what_enters_the_block(b0: keras.Model) -> None:
    assert [b0.get_layer(f"block{b}_se_reduce").filters for b in ("1a", "2a", "2b", "6a", "7a")] == [8, 4, 6, 28, 48]
    assert b0.get_layer("block2a_se_reduce").use_bias
    assert b0.get_layer("block2a_se_expand").activation is keras.activations.sigmoid


def test_initial_weights_have_the_published_spread(b0: keras.Model) -> None:
    top, dw, head = (b0.get_layer(name).kernel.numpy() for name in ("top_conv", "block6b_dwconv", "predictions"))
    assert top.std() == pytest.approx(np.sqrt(2 / 1280), rel=0.01)
    assert np.abs(top).max() > 3.5 * top.std()  # untruncated
    assert dw.std() == pytest.approx(np.sqrt(2 / 25), rel=0.02)
    assert np.abs(head).max() <= 1000**-0.5
    assert head.std() == pytest.approx((3 * 1000) ** -0.5, rel=0.01)
    assert {
        (layer.epsilon, layer.momentum) for layer in b0.layers if isinstance(layer, keras.layers.BatchNormalization)
    } == {(1e-3, 0.99)}


@pytest.mark.parametrize(("num_classes", "bound"), [(2, 1000**-0.5), (4000, 4000**-0.5)])
def test_the_classifier_of_few_classes_starts_no_wider_than_imagenets(num_classes: int, bound: float) -> None:
    kernel = efficientnet(SHORT, num_classes=num_classes).get_layer("predictions").kernel.numpy()
    assert 0.99 * bound < np.abs(kernel).max() <= bound


def test_one_seed_gives_equal_weights_and_another_gives_others() -> None:
    first, again, other = (efficientnet(SHORT, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first.get_weights(), again.get_weights(), strict=True))
    kernels = [(a, b) for a, b in zip(first.get_weights(), other.get_weights(), strict=True) if a.ndim > 1]
    assert not any(np.array_equal(a, b) for a, b in kernels)
    seeds = [layer.seed for layer in first.layers if isinstance(layer, keras.layers.Dropout)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("images", 0),
        ("rescaling", 0),
        ("stem_bn", 0),
        ("block1a_dwconv", 1),
        ("block7a_project_bn", 7),
        ("avg_pool", 8),
        ("top_dropout", 9),
        ("predictions", 9),
    ],
)
def test_a_layer_knows_its_block(layer: str, block: int) -> None:
    assert block_of(layer) == block


def test_blocks_never_fall_from_input_to_output() -> None:
    blocks = [block_of(layer.name) for layer in efficientnet(TINY).layers]
    assert blocks == sorted(blocks)
    assert set(blocks) == set(range(10))


def test_more_blocks_than_letters_still_have_names_of_letters() -> None:
    assert [block_name(6, repeat) for repeat in (0, 25, 26, 39)] == ["block6a", "block6z", "block6aa", "block6an"]


@pytest.mark.slow
def test_a_network_deeper_than_pythons_recursion_can_be_built_and_copied() -> None:
    model = efficientnet(from_multipliers(0.1, 6.0, 32), num_classes=2)
    assert model.get_layer("block6x_add").output.shape == (None, 1, 1, 24)
    np.testing.assert_array_equal(to_inference_model(model)(images(32)), model(images(32)))


def test_a_free_variant_is_named_so_that_it_can_be_traced() -> None:
    import tensorflow as tf

    model = efficientnet(Variant("phi=-2.5", 0.25, 0.5, 32, 0.2, "short"), num_classes=2)
    assert tf.function(model)(images(32)).shape == (3, 2)


def test_a_plain_copy_has_kerass_own_layers_again() -> None:
    class TrainingDropout(keras.layers.Dropout):
        pass

    model = efficientnet(replace(TINY, depth=0.5), num_classes=4, layer_types=LayerTypes(TrainingDropout))
    assert [type(layer) for layer in model.layers if isinstance(layer, keras.layers.Dropout)] == [TrainingDropout] * 4
    copy = to_inference_model(model)
    assert {type(layer).__module__.split(".")[0] for layer in copy.layers} == {"keras"}
    for layer in copy.layers:
        if isinstance(layer, keras.layers.Dropout):
            assert (
                layer.get_config().items()
                >= {key: getattr(model.get_layer(layer.name), key) for key in ("rate", "seed", "noise_shape")}.items()
            )


def test_a_plain_copy_computes_in_float32() -> None:
    same = lively(SHORT, num_classes=4)
    model = efficientnet(SHORT, num_classes=4, dtype="mixed_bfloat16", synchronized=True)
    model.set_weights(same.get_weights())
    model.get_layer("stem_conv").trainable = False
    copy = to_inference_model(model)
    assert {layer.compute_dtype for layer in copy.layers} == {"float32"}
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]
    assert all(layer.trainable for layer in copy.layers)
    assert not any(layer.synchronized for layer in copy.layers if isinstance(layer, keras.layers.BatchNormalization))
    assert not model.get_layer("stem_conv").trainable
    np.testing.assert_array_equal(copy(images(32)), same(images(32)))


@pytest.mark.slow
def test_a_plain_copy_loads_without_this_package(tmp_path: Path) -> None:
    copy = to_inference_model(lively(TINY, num_classes=4))
    copy.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images(32))
    script = """
        import sys
        sys.modules["pipeline"] = None  # importing it raises
        import keras, numpy as np
        model = keras.saving.load_model("model.keras", safe_mode=True)
        np.save("logits.npy", model(np.load("images.npy")))
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=True, capture_output=True, timeout=120
    )
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), copy(images(32)))
