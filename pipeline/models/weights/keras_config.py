"""What the config of a saved Keras model says about its network, read without building anything.

The config is JSON: nested layers with class, name and arguments. Classes of the user's own, and Lambda layers with code
in them, are only names here.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.models.variants import IMAGENET_MEAN, IMAGENET_STD, Normalization

HEAD = ("GlobalAveragePooling2D", "Dropout", "Dense", "Activation", "Softmax", "Flatten")  # as this project's own
PASSING = (  # beginnings of classes that leave the pixels' values as they are, in inference
    *("Random", "CenterCrop", "Resizing", "Dropout", "GaussianNoise", "Input", "ZeroPadding2D"),
)
CONVOLUTIONS = ("Conv2D", "DepthwiseConv2D")
MAX_DEPTH = 20  # of models in models

Layer = Mapping[str, Any]


@dataclass(frozen=True)
class NetworkConfig:
    """What a model's config says.

    Attributes:
        padding: `same` or `symmetric`, that of the strided convolutions; None if the config does not tell.
        batch_norm_epsilon: None if there is no batch normalization, or not one epsilon everywhere.
        input_steps: What happens to pixels in [0, 255] before the first convolution, each a `Normalization`, or the
            name of a layer `Normalization` that has its numbers among the weights.
        notes: What cannot be taken over, a sentence each.
    """

    padding: str | None
    batch_norm_epsilon: float | None
    input_steps: tuple[Normalization | str, ...]
    notes: tuple[str, ...]


def read_network_config(config: Any) -> NetworkConfig:
    """Read the config of a model, as in `config.json`, or in the attribute `model_config` of an .h5 file."""
    layers = list(flatten_layers(config))
    epsilons = {_arguments(layer).get("epsilon", 1e-3) for layer in layers if _kind(layer) == "BatchNormalization"}
    first = next((i for i, layer in enumerate(layers) if _kind(layer) in CONVOLUTIONS), 0)
    steps, notes = _input_steps(layers[:first])
    return NetworkConfig(
        _padding(layers),
        epsilons.pop() if len(epsilons) == 1 else None,
        tuple(steps),
        tuple(notes + _size_notes(layers) + _head_notes(layers)),
    )


def compose(steps: tuple[Normalization | str, ...], layers: Mapping[str, Sequence[np.ndarray]]) -> Normalization | None:
    """Return all that happens to the input as one normalization.

    Args:
        steps: As `NetworkConfig.input_steps`.
        layers: The arrays of every layer; those of a `Normalization` are mean, variance and a count.

    Returns:
        A scale and an offset for each channel; None if a step has other shapes.
    """
    scale, offset = np.ones(3), np.zeros(3)
    for step in steps:
        if isinstance(step, str):
            numbers = [np.asarray(array, float).reshape(-1) for array in layers.get(step, [])[:2]]
            if len(numbers) < 2 or any(array.size not in (1, 3) for array in numbers):
                return None
            # keras.applications' downloads have deviations for variances, and its network divides by their root again.
            downloaded = np.allclose(numbers[0], IMAGENET_MEAN, 1e-3) and np.allclose(numbers[1], IMAGENET_STD, 1e-3)
            std = numbers[1] if downloaded else np.sqrt(numbers[1])
            factor, shift = 1 / std, -numbers[0] / std
        else:
            factor, shift = (np.asarray(part, float).reshape(-1) for part in step)
            if factor.size not in (1, 3) or shift.size not in (1, 3):
                return None
        scale, offset = scale * factor, offset * factor + shift
    if not (np.isfinite(scale).all() and np.isfinite(offset).all() and scale.all()):
        return None
    return Normalization(tuple(scale.tolist()), tuple(offset.tolist()))


def flatten_layers(config: Any, depth: int = 0) -> Iterator[Layer]:
    """Yield the configs of all layers in order; a model within the model is replaced by its layers."""
    arguments = _arguments(config)
    children = arguments.get("layers")
    if isinstance(children, list) and depth < MAX_DEPTH:
        for child in children:
            yield from flatten_layers(child, depth + 1)
    elif isinstance(config, Mapping) and _kind(config):
        yield config


def _arguments(layer: Any) -> Mapping[str, Any]:
    arguments = layer.get("config") if isinstance(layer, Mapping) else None
    return arguments if isinstance(arguments, Mapping) else {}


def _kind(layer: Layer) -> str:
    return str(layer.get("class_name", "")).rpartition(">")[2]  # registered classes are package>class


def _name(layer: Layer) -> str:
    return str(_arguments(layer).get("name", ""))


def _numbers(value: Any) -> Any:
    """Return a number or a list of them, from where JSON has arrays and tuples in a mapping."""
    if isinstance(value, Mapping):
        value = value.get("config", value.get("value"))
        value = value.get("value") if isinstance(value, Mapping) else value
    return value


def _input_steps(layers: Sequence[Layer]) -> tuple[list[Normalization | str], list[str]]:
    steps: list[Normalization | str] = []
    notes = []
    for layer in layers:
        kind, arguments = _kind(layer), _arguments(layer)
        if steps and isinstance(steps[-1], str) and _divides_again(layer):
            continue  # `compose` has it
        if kind == "Rescaling":
            steps.append(Normalization(_numbers(arguments.get("scale", 1.0)), _numbers(arguments.get("offset", 0.0))))
        elif kind == "Normalization":
            mean, variance = (_numbers(arguments.get(key)) for key in ("mean", "variance"))
            if mean is None or variance is None:
                steps.append(_name(layer))
            else:
                std = np.sqrt(np.asarray(variance, float))
                steps.append(
                    Normalization((1 / std).reshape(-1).tolist(), (-np.asarray(mean) / std).reshape(-1).tolist())
                )
        elif not kind.startswith(PASSING):
            notes.append(f"its layer {_name(layer)!r} ({kind}) in front of the network is left out")
    return steps, notes


def _divides_again(layer: Layer) -> bool:
    """Return True for the step of keras.applications behind `Normalization` that exists for its downloads alone."""
    if _kind(layer) == "Rescaling":
        scale = np.asarray(_numbers(_arguments(layer).get("scale", 1.0)), float)
        return scale.shape == (3,) and np.allclose(scale, np.asarray(IMAGENET_STD) ** -0.5, 1e-3)
    return _kind(layer) == "TFOpLambda" and _name(layer).startswith("tf.math.multiply")


def _padding(layers: Sequence[Layer]) -> str | None:
    """Return what the strided convolutions do at the edges.

    keras.applications, unlike this project's own networks, has a layer `Normalization`, and pads odd sides
    symmetrically in layers of its own, as `same` does.
    """
    found = set()
    for before, layer in itertools.pairwise(layers):
        arguments = _arguments(layer)
        strides = _numbers(arguments.get("strides", 1))
        if _kind(layer) not in CONVOLUTIONS or set(strides if isinstance(strides, list) else [strides]) == {1}:
            continue
        if arguments.get("padding") == "same" or _kind(before) != "ZeroPadding2D":
            found.add("same" if arguments.get("padding") == "same" else "none")
            continue
        sides = np.asarray(_numbers(_arguments(before).get("padding"))).reshape(-1)
        found.add("symmetric" if len(set(sides.tolist())) == 1 else "same")
    if "none" in found or not found:
        return None
    official = any(_kind(layer) == "Normalization" for layer in layers)
    return "symmetric" if found == {"symmetric"} and not official else "same"


def _size_notes(layers: Sequence[Layer]) -> list[str]:
    shapes = [_arguments(layer).get("batch_shape", _arguments(layer).get("batch_input_shape")) for layer in layers]
    anything = any(isinstance(shape, list) and len(shape) == 4 and shape[1] is None for shape in shapes)
    if anything and any(_kind(layer) == "ZeroPadding2D" for layer in layers):
        return ["it was built for images of any size, and pads odd sides as if they were even; results differ slightly"]
    return []


def _head_notes(layers: Sequence[Layer]) -> list[str]:
    norms = [i for i, layer in enumerate(layers) if _kind(layer) == "BatchNormalization"]
    behind = layers[norms[-1] + 1 :] if norms else []
    return [
        f"its layer {_name(layer)!r} ({_kind(layer)}) behind the network is left out; its classifier expects it"
        for layer in behind
        if _kind(layer) not in HEAD and not _kind(layer).startswith(PASSING)
    ]
