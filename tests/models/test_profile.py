"""Parameters, multiply-adds and memory against published figures and hand counts."""

from collections.abc import Iterator
from dataclasses import replace

import keras
import pytest

from pipeline.models.efficientnet import efficientnet
from pipeline.models.profile import ModelProfile, estimated_memory, profile_model
from pipeline.models.variants import VARIANTS

# variant: trainable parameters with 1000 classes; published GFLOPs; how near to them the count comes
PUBLISHED = {
    "b0": (5_288_548, 0.39, 0.02),
    "b1": (7_794_184, 0.70, 0.02),
    "b2": (9_109_994, 1.0, 0.02),
    "b3": (12_233_232, 1.8, 0.02),
    "b4": (19_341_616, 4.2, 0.05),
    "b5": (30_389_784, 9.9, 0.04),
    "b6": (43_040_704, 19, 0.02),
    "b7": (66_347_960, 37, 0.025),
    "b8": (87_413_142, 63, 0.02),
    "l2": (480_309_308, 476, 0.02),
    "lite0": (4_652_008, 0.41, 0.065),
    "lite1": (5_416_680, 0.63, 0.05),
    "lite2": (6_092_072, 0.90, 0.05),
    "lite3": (8_197_096, 1.44, 0.045),
    "lite4": (13_006_568, 2.64, 0.04),
}


@pytest.fixture
def without_values() -> Iterator[None]:
    """Models built inside have variables without values, so that L2 takes no 2 GB."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.utils.clear_session()  # forgets the variables that still wait for a value


QUICKLY_BUILT = ("b0", "b3", "lite0", "lite4")


@pytest.mark.parametrize(
    "name", [name if name in QUICKLY_BUILT else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_every_variant_has_the_published_size(name: str, without_values: None) -> None:
    parameters, gflops, tolerance = PUBLISHED[name]
    counted = profile_model(efficientnet(VARIANTS[name]))
    assert counted.trainable_parameters == parameters
    assert counted.flops / 1e9 == pytest.approx(gflops, rel=tolerance)


def test_a_small_network_counted_by_hand() -> None:
    images = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False)(images)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.DepthwiseConv2D(5, padding="same", use_bias=False)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(images, keras.layers.Dense(10)(x))
    trainable = 3 * 3 * 3 * 4 + 2 * 4 + 5 * 5 * 4 + 4 * 10 + 10
    assert profile_model(model) == ModelProfile(
        trainable + 2 * 4, trainable, 4 * 4 * 3 * 3 * 3 * 4 + 4 * 4 * 5 * 5 * 4 + 4 * 10
    )
    activations = 4 * (8 * 8 * 3 + 3 * 4 * 4 * 4 + 4 + 10)
    weights = 4 * (2 * (trainable + 8) + 3 * trainable)
    assert estimated_memory(model, 5) == weights + 5 * activations


def test_frozen_layers_need_no_gradients() -> None:
    model = efficientnet(replace(VARIANTS["b0"], width=0.25, depth=0.3, resolution=32))
    everything = estimated_memory(model, 1)
    for layer in model.layers[:-1]:
        layer.trainable = False
    head = model.get_layer("predictions").count_params()
    assert profile_model(model).trainable_parameters == head
    assert estimated_memory(model, 1) < everything


def test_memory_grows_with_batch_slots_average_and_accumulation() -> None:
    model = efficientnet(replace(VARIANTS["lite0"], width=0.25, depth=0.3, resolution=32))
    size = profile_model(model)
    base = estimated_memory(model, 4, optimizer_slots=1, ema=False)
    assert estimated_memory(model, 4, optimizer_slots=2, ema=False) - base == 4 * size.trainable_parameters
    assert estimated_memory(model, 4, optimizer_slots=1, ema=True) - base == 4 * size.parameters
    assert (
        estimated_memory(model, 4, optimizer_slots=1, ema=False, accumulation=True) - base
        == 4 * size.trainable_parameters
    )
    per_image = estimated_memory(model, 5, optimizer_slots=1, ema=False) - base
    assert estimated_memory(model, 12, optimizer_slots=1, ema=False) - base == 8 * per_image


def test_bfloat16_halves_the_activations_but_for_batch_normalisation() -> None:
    variant = replace(VARIANTS["b0"], width=0.5, depth=0.3, resolution=64)

    def per_image(dtype: str) -> int:
        model = efficientnet(variant, dtype=dtype)
        return estimated_memory(model, 2) - estimated_memory(model, 1)

    assert 0.6 < per_image("mixed_bfloat16") / per_image("float32") < 0.95
