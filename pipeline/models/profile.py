"""The cost of a network: parameters, multiply-adds, time for an image, and about how much memory training takes."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import keras
from keras import layers

FLOAT32_BYTES = 4
WARM_UP_RUNS, MIN_RUNS, MAX_RUNS, TIMING_SECONDS = 3, 5, 50, 1.0


@dataclass(frozen=True)
class ModelProfile:
    """The size of a network.

    Attributes:
        parameters: Numbers among its weights, the moving statistics of batch normalization included.
        trainable_parameters: Those that gradients reach; layers that are frozen at the moment do not count.
        flops: Multiply-adds that one image takes in inference. One multiplication with its addition counts once, as in
            the paper.
    """

    parameters: int
    trainable_parameters: int
    flops: int


def profile_model(model: keras.Model) -> ModelProfile:
    """Count a built functional model.

    The multiply-adds are those of convolutions, squeeze-and-excitation's among them, and dense layers. Not counted are
    normalization, activations, pooling, biases, additions and the gating product. That gives the paper's figures of B0
    to B8 to 2 %, but for B4 (+5 %) and B5 (+4 %), and 3 to 6 % less than the lite variants' published ones, which seem
    to count some of the rest.
    """
    return ModelProfile(
        parameters=_numbers(model.weights),
        trainable_parameters=_numbers(model.trainable_weights),
        flops=sum(
            math.prod(layer.output.shape[1:-1]) * math.prod(layer.kernel.shape)
            for layer in model.layers
            if isinstance(layer, layers.Conv2D | layers.DepthwiseConv2D | layers.Dense)
        ),
    )


def estimated_memory(
    model: keras.Model, batch_size: int, *, optimizer_slots: int = 2, ema: bool = True, accumulation: bool = False
) -> int:
    """Estimate the memory that a training step takes on one device.

    Weights, their moving average, gradients and optimizer slots are exact. Of the forward pass it counts every output
    that the backward pass reads again: each layer's once, but ReLU6's in place of its input, and a float32 copy of what
    batch normalization receives in bfloat16. Against the growth of the process in a training step on the CPU without
    XLA (B0, B2 and lite0 at 224 pixels, B0 in bfloat16 at 96) that is right to about 20 %. Not counted: TensorFlow
    itself, the input pipeline, and working space of the convolutions.

    Args:
        model: A built functional model, in the dtype it trains in.
        batch_size: Images per micro-batch and replica.
        optimizer_slots: Numbers that the optimizer keeps per trainable parameter: 2 for RMSProp with momentum and
            AdamW, 1 for SGD with momentum.
        ema: Whether a moving average of all weights is kept.
        accumulation: Whether gradients are summed over micro-batches, which takes one more set of them.

    Returns:
        Bytes.
    """
    size = profile_model(model)
    per_trainable = 1 + optimizer_slots + accumulation
    persistent = (1 + ema) * size.parameters + per_trainable * size.trainable_parameters
    return FLOAT32_BYTES * persistent + batch_size * sum(map(_activation_bytes, model.layers))


def latency(infer: Callable[[], object]) -> float:
    """Measure the seconds that an inference takes.

    Median of 5 to 50 runs after 3 warm-up runs.
    """
    for _ in range(WARM_UP_RUNS):
        infer()
    taken: list[float] = []
    while len(taken) < MIN_RUNS or (len(taken) < MAX_RUNS and sum(taken) < TIMING_SECONDS):
        start = time.perf_counter()
        infer()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _activation_bytes(layer: layers.Layer) -> int:
    if isinstance(layer, layers.Activation) and layer.activation is keras.activations.relu6:
        return 0
    narrow = layer.compute_dtype == "bfloat16"
    per_number = 2 if narrow else FLOAT32_BYTES
    if narrow and isinstance(layer, layers.BatchNormalization):
        per_number += FLOAT32_BYTES
    return per_number * math.prod(layer.output.shape[1:])


def _numbers(weights: Iterable[keras.Variable]) -> int:
    return sum(math.prod(weight.shape) for weight in weights)
