"""Pretrained weights for a network: layers are matched by name and shape, with a report of what was copied.

Files that fit by names and shapes may be from a network that pads or normalizes otherwise: `sources.read_pretrained`
tells, so that the network can be built alike (`PretrainedWeights.adapt`), and `load_pretrained` reports it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from pipeline.errors import WeightsError
from pipeline.models.efficientnet import CLASSIFIER
from pipeline.models.head_transfer import ClassMapping, match_classes, transfer_head
from pipeline.models.variants import VARIANTS, Variant, end_filters, stage_filters, stage_repeats
from pipeline.models.weights.makes import Conventions, describe_normalization, is_same_normalization
from pipeline.models.weights.sources import (
    LAYER_NAME,
    OTHER_WAYS,
    PretrainedWeights,
    check_class_map,
    imagenet_classes,
    read_pretrained,
)
from pipeline.models.weights.weights_file import Arrays
from pipeline.tasks import SINGLE_LABEL, Task


@dataclass(frozen=True)
class LoadReport:
    """A report of what happened to every layer.

    `str()` is one line, `summary()` is for the console, and `details()` for the log.

    Attributes:
        source: Where the weights came from.
        copied: Layers of the model that now have the source's weights.
        uninitialized: Layers of the model that keep their initial weights, each with the reason.
        skipped: Layers of the source that went nowhere, each with the reason.
        holds: The variant that the source seems to hold, where that is not the model's; else empty.
        head: Where the classes differ: which of the source's classes match which. Their rows were taken if the
            classifier counts as copied; else it is new.
        network: How the weights expect padding, normalization and epsilon.
        notes: What a user should know, a sentence each.
        differences: What the model does otherwise than the weights expect.
    """

    source: str
    copied: tuple[str, ...]
    uninitialized: Mapping[str, str]
    skipped: Mapping[str, str]
    holds: str = ""
    head: ClassMapping | None = None
    network: str = ""
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the summary for the screen."""
        done = sum(name != CLASSIFIER for name in self.copied)
        total = done + sum(name != CLASSIFIER for name in self.uninitialized)
        only = "" if done == total else "only "
        parts = [f"{self.source}: {only}{done} of {total} backbone layers copied"]
        if done < total:
            missing = [name for name in self.uninitialized if name != CLASSIFIER]
            parts.append(f"new: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}")
            parts += [f"the file seems to hold {self.holds}"] if self.holds else []
        if CLASSIFIER in self.copied:
            parts.append(f"classifier: {self.head}" if self.head else "classifier copied")
        elif CLASSIFIER in self.uninitialized:
            parts.append(f"classifier new ({self.uninitialized[CLASSIFIER]})")
        return "; ".join([*parts, *self.differences])

    def summary(self) -> str:
        """Return the lines for the console: what was copied, the network that the weights expect, and the notes."""
        network = [f"  {self.network}"] if self.network else []
        return "\n".join([str(self), *network, *(f"  note: {note}" for note in self.notes)])

    def details(self) -> str:
        """Return the summary and a line for every layer that was not simply copied."""
        lines = [self.summary()]
        lines += [f"  new: {name}: {reason}" for name, reason in self.uninitialized.items()]
        lines += [f"  skipped: {name}: {reason}" for name, reason in self.skipped.items()]
        if self.head is not None and CLASSIFIER in self.copied:
            lines += [f"  class {line}" for line in self.head.details()]
        elif self.head is not None:
            lines += [f"  class not in the file: {line}" for line in self.head.unmatched()]
        return "\n".join(lines)


def load_pretrained(
    model: keras.Model,
    weights: str | PretrainedWeights,
    *,
    variant: Variant,
    class_names: Sequence[str] | None = None,
    class_map: Path | None = None,
    task: Task = SINGLE_LABEL,
    partial: bool = False,
) -> LoadReport:
    """Copy weights into a model.

    A layer is copied when the source has one of its name with arrays of its shapes. The classifier is copied whole for
    the same classes in the same order; for others, the rows of the classes that match are, if all classes match or a
    class map is given (`pipeline.models.head_transfer`). ImageNet's go by synset or by name. A source that has no list
    of its classes and 1000 of them is taken for ImageNet's.

    Args:
        model: Built by `efficientnet`; changed in place, and only when something of its backbone fits.
        weights: What `read_pretrained` returned, or what it takes.
        variant: What the model was built from.
        class_names: The model's classes in the order of its outputs. `None` lets any classifier of the right shape in.
        class_map: A file that names old classes for new ones, see `read_class_map`; used where `class_names` are given.
        task: How several old classes are merged into one.
        partial: Accept weights that do not fit the whole backbone.

    Returns:
        What was copied, what is new, what was left.

    Raises:
        WeightsError: The source is missing, cannot be fetched within 30 seconds, is damaged, does not fit the backbone,
            or has values that no network can have; or the class map cannot be used.
    """
    if isinstance(weights, str):
        check_class_map(weights, class_names, class_map)
        weights = read_pretrained(weights, variant)
    source = weights
    _check_values(source)
    plan: dict[str, list[np.ndarray]] = {}
    uninitialized: dict[str, str] = {}
    own = {layer.name: layer for layer in model.layers if layer.weights}
    head: ClassMapping | None = None
    for name, layer in own.items():
        if name == CLASSIFIER and class_names is not None:
            arrays, head, reason = _classifier(layer, source, class_names, class_map, task)
        else:
            arrays, reason = source.layers.get(name, []), _misfit(layer, source)
        if reason:
            uninitialized[name] = reason
        else:
            plan[name] = arrays

    holds = _variant_in(source.layers)
    _check_channels(source, own)
    if not any(name != CLASSIFIER for name in plan):
        first = next(
            (f"{name}: {reason}" for name, reason in uninitialized.items() if name in source.layers),
            "no layer has a known name",
        )
        seems = f"; the file seems to hold {holds}" if holds else ""
        raise WeightsError(
            f"{source.name}: no backbone layer fits a model of variant {variant.name} ({first}){seems}. {OTHER_WAYS}"
        )
    skipped = {
        name: uninitialized.get(name, "the model has no such layer") for name in source.layers if name not in plan
    }
    _check_complete(source, variant, uninitialized, skipped, holds, partial=partial)
    epsilon = source.conventions.batch_norm_epsilon, variant.family.batch_norm_epsilon
    for name, arrays in plan.items():
        own[name].set_weights(_convert_epsilon(arrays, *epsilon) if name.endswith("_bn") else arrays)
    return LoadReport(
        source.name,
        tuple(plan),
        uninitialized,
        skipped,
        "" if holds == variant.name or source.is_partial else holds,
        head,
        str(source.conventions) + ("; moving average (EMA) of the weights" if source.is_ema else ""),
        source.notes,
        _differences(source.conventions, variant),
    )


def _check_values(source: PretrainedWeights) -> None:
    """Make sure that all numbers are finite, and no variance is negative.

    Raises:
        WeightsError: A layer has other numbers.
    """
    for name, arrays in source.layers.items():
        if not all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f"):
            raise WeightsError(
                f"{source.name}: layer {name} has values that are not finite; take an earlier checkpoint"
            )
        if name.endswith("_bn") and len(arrays) == 4 and (arrays[3] < 0).any():
            raise WeightsError(f"{source.name}: layer {name} has negative variances; the file is damaged")


def _check_channels(source: PretrainedWeights, own: Mapping[str, keras.Layer]) -> None:
    """Make sure that both first layers take the same number of channels.

    Raises:
        WeightsError: They do not.
    """
    stem = source.layers.get("stem_conv")
    ours = own["stem_conv"].kernel.shape[2] if "stem_conv" in own else None
    if stem and ours and stem[0].ndim == 4 and stem[0].shape[2] != ours:
        raise WeightsError(
            f"{source.name}: its first layer takes images of {stem[0].shape[2]} channels, and the model's of {ours}; "
            "weights of another number of channels cannot be used"
        )


def _check_complete(
    source: PretrainedWeights,
    variant: Variant,
    uninitialized: Mapping[str, str],
    skipped: Mapping[str, str],
    holds: str,
    *,
    partial: bool,
) -> None:
    """Make sure that the source's backbone is the model's.

    Raises:
        WeightsError: Layers are missing or left over, which only `partial` allows; or the families differ, which
            nothing does: the same kernels mean something else between other activations.
    """
    squeezes = any(name.endswith("_se_reduce") for name in source.layers)
    made = f"{source.name} (make {source.conventions.make})"
    seems = f"; the file seems to hold {holds}" if holds and holds != variant.name else ""
    if squeezes != (variant.family.se_ratio is not None):
        kinds = (
            ("has squeeze-and-excitation", "has none", "B0 to L2")
            if squeezes
            else ("has no squeeze-and-excitation", "needs it", "lite")
        )
        raise WeightsError(
            f"{made}: {kinds[0]}, and {variant.name} {kinds[1]}: it is of the family {kinds[2]}{seems}; set "
            "model.variant accordingly"
        )
    missing = [name for name in uninitialized if name != CLASSIFIER]
    left = [name for name in skipped if LAYER_NAME.fullmatch(name) and name not in uninitialized]
    if partial or source.is_partial or not (missing or left):
        return
    parts = []
    if missing:
        parts.append(
            f"does not fit {len(missing)} layers of {variant.name} ({missing[0]}: {uninitialized[missing[0]]})"
        )
    if left:
        parts.append(f"has {len(left)} layers that {variant.name} has not ({', '.join(left[:2])} ...)")
    raise WeightsError(
        f"{made}: {' and '.join(parts)}{seems}. Set model.variant to what the file holds, or "
        "model.partial_weights=true to take what fits"
    )


def _convert_epsilon(arrays: list[np.ndarray], theirs: float, ours: float) -> list[np.ndarray]:
    """Scale gamma so that a batch normalization with another epsilon computes the same from its moving statistics."""
    if theirs == ours or len(arrays) != 4:
        return arrays
    gamma, beta, mean, variance = arrays
    factor = np.sqrt((variance.astype(np.float64) + ours) / (variance.astype(np.float64) + theirs))
    return [(gamma * factor).astype(np.float32), beta, mean, variance]


def _differences(theirs: Conventions, variant: Variant) -> tuple[str, ...]:
    """Return sentences about what the model does otherwise than the weights expect."""
    found = []
    if theirs.padding != variant.padding:
        found.append(f"the model pads its strided convolutions otherwise: {variant.padding}")
    if not is_same_normalization(theirs.normalization, variant.normalization):
        found.append(f"the model normalizes its input otherwise: {describe_normalization(variant.normalization)}")
    return tuple(found)


def _misfit(layer: keras.Layer, source: PretrainedWeights) -> str:
    if layer.name not in source.layers:
        return "the file has no such layer"
    here, there = [tuple(w.shape) for w in layer.weights], [array.shape for array in source.layers[layer.name]]
    if here == there:
        return ""
    if layer.name == CLASSIFIER and here and there and len(here[0]) == len(there[0]) and here[0][0] == there[0][0]:
        return f"{here[0][1]} classes here, {there[0][1]} in the file"
    return f"shapes {_shapes(here)} here, {_shapes(there)} in the file"


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _classifier(
    layer: keras.Layer, source: PretrainedWeights, class_names: Sequence[str], class_map: Path | None, task: Task
) -> tuple[list[np.ndarray], ClassMapping | None, str]:
    """Return the classifier's arrays for the model's classes.

    The match where the classes differ, and the reason where there are no arrays.
    """
    arrays = source.layers.get(CLASSIFIER, [])
    known = source.class_lists
    if not known and arrays and arrays[-1].shape == (1000,):
        known = imagenet_classes()
    reason = ""
    if [array.shape[:-1] for array in arrays] != [tuple(weight.shape[:-1]) for weight in layer.weights]:
        reason = _misfit(layer, source)
    elif not known:
        reason = "the file does not say what its classes are"
    elif {array.shape[-1] for array in arrays} != {len(names) for names in known}:
        reason = f"{arrays[-1].shape[-1]} outputs but {len(known[0])} class names in the file"
    if reason:
        if class_map is not None:
            raise WeightsError(f"model.class_map: {class_map}: {source.name} has no classes to map: {reason}")
        return [], None, reason
    if class_map is None and list(class_names) in [list(names) for names in known]:
        return arrays, None, ""
    match = match_classes(class_names, known, class_map)
    if not any(match.rows):
        return [], match, f"none of its {len(class_names)} classes is among the {len(known[0])} of the file"
    if match.new and class_map is None:
        matched = len(class_names) - len(match.new)
        reason = (
            f"{matched} of {len(class_names)} classes {'is' if matched == 1 else 'are'} in the file; "
            "name them all or give a class map to keep rows"
        )
        return [], match, reason
    kernel, bias = arrays
    return [*transfer_head(kernel, bias, match.rows, task)], match, ""


def _variant_in(layers: Arrays) -> str:
    """Return the published variant whose blocks and last convolution the layers have; empty if there is none."""
    if not layers.get("top_conv"):
        return ""
    blocks = sum(bool(re.fullmatch(r"block\d[a-z]+_dwconv", name)) for name in layers)
    squeezes = any(name.endswith("_se_reduce") for name in layers)
    for variant in VARIANTS.values():
        top = (1, 1, stage_filters(variant)[-1], end_filters(variant)[1])
        same_kind = (variant.family.se_ratio is not None) == squeezes
        if same_kind and sum(stage_repeats(variant)) == blocks and layers["top_conv"][0].shape == top:
            return variant.name
    return ""
