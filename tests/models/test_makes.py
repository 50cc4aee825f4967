"""Weights of other makes: padding, epsilon and normalization are taken over, and logits are those of their network."""

import json
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from test_pretrained import LITE, B, legacy_h5, random_model, torch_names
from test_torch_checkpoint import tensor, torch_zip

from pipeline.errors import WeightsError
from pipeline.models.efficientnet import efficientnet, to_inference_model
from pipeline.models.variants import NORMALIZATIONS, VARIANTS, Normalization, Variant
from pipeline.models.weights.makes import HINTS, MAKES, NAMINGS, conventions, name_normalization, recognize
from pipeline.models.weights.pretrained import load_pretrained
from pipeline.models.weights.sources import read_pretrained

IMAGES = np.random.default_rng(7).uniform(0, 255, (6, 32, 32, 3)).astype("f4")


class SymmetricConv(keras.layers.Conv2D):
    """PyTorch's Conv2d(stride=2, padding=k // 2)."""

    def call(self, x: Any) -> Any:
        k = self.kernel_size[0] // 2
        return keras.ops.conv(keras.ops.pad(x, ((0, 0), (k, k), (k, k), (0, 0))), self.kernel, 2, "valid")


class SymmetricDepthwiseConv(keras.layers.DepthwiseConv2D):
    """PyTorch's Conv2d(stride=2, padding=k // 2, groups=channels)."""

    def call(self, x: Any) -> Any:
        k = self.kernel_size[0] // 2
        return keras.ops.depthwise_conv(keras.ops.pad(x, ((0, 0), (k, k), (k, k), (0, 0))), self.kernel, 2, "valid")


def reference(model: keras.Model, padding: str, epsilon: float, mean: Any, std: Any) -> keras.Model:
    """The network of another library, with the weights of `model`: written here, by that library's definitions."""

    def other(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if isinstance(layer, keras.layers.Rescaling):
            scale = 1 / np.broadcast_to(std, 3)
            config |= {"scale": (scale / 255).tolist(), "offset": (-np.broadcast_to(mean, 3) * scale).tolist()}
        if isinstance(layer, keras.layers.BatchNormalization):
            config["epsilon"] = epsilon
        if padding == "symmetric" and config.get("strides") == (2, 2):
            kind = SymmetricDepthwiseConv if isinstance(layer, keras.layers.DepthwiseConv2D) else SymmetricConv
            return kind.from_config(config)
        return type(layer).from_config(config)

    copy = keras.models.clone_model(model, clone_function=other)
    copy.set_weights(model.get_weights())
    return copy


def trained_model(variant: Variant) -> keras.Model:
    """Random weights with small variances, where an epsilon matters."""
    model = random_model(variant)
    random = np.random.default_rng(3)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_variance.assign(10 ** random.uniform(-4, 0, layer.moving_variance.shape))
            layer.gamma.assign(random.uniform(0.02, 0.1, layer.gamma.shape))
        elif isinstance(layer, keras.layers.Conv2D):
            layer.kernel.assign(random.normal(0, 0.1, layer.kernel.shape))
    return model


@pytest.fixture(scope="module")
def trained() -> keras.Model:
    return trained_model(B)


def torchvision_names(model: keras.Model) -> dict[str, np.ndarray]:
    """The names of torchvision, from those of timm."""
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "features.8.0", "bn2": "features.8.1"}
    parts = ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3")
    first = {"conv_dw": "0.0", "bn1": "0.1", "se.conv_reduce": "1.fc1", "se.conv_expand": "1.fc2", "conv_pw": "2.0"}
    first |= {"bn2": "2.1"}
    others = dict(zip(parts, ("0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"), strict=True))
    state = {}
    for name, array in torch_names(model, "timm").items():
        module, _, leaf = name.rpartition(".")
        if module.startswith("blocks."):
            _, stage, repeat, part = module.split(".", 3)
            inner = (first if stage == "0" else others)[part]
            module = f"features.{int(stage) + 1}.{repeat}.block.{inner}"
        state[f"{ends.get(module, module.replace('classifier', 'classifier.1'))}.{leaf}"] = array
    return state


def transformers_names(model: keras.Model) -> dict[str, np.ndarray]:
    """The names of Hugging Face's transformers, from those of efficientnet-pytorch."""
    ends = {"_conv_stem": "embeddings.convolution", "_bn0": "embeddings.batchnorm"}
    ends |= {"_conv_head": "encoder.top_conv", "_bn1": "encoder.top_bn"}
    parts = {"_expand_conv": "expansion.expand_conv", "_bn0": "expansion.expand_bn", "_bn2": "projection.project_bn"}
    parts |= {"_depthwise_conv": "depthwise_conv.depthwise_conv", "_bn1": "depthwise_conv.depthwise_norm"}
    parts |= {"_se_reduce": "squeeze_excite.reduce", "_se_expand": "squeeze_excite.expand"}
    parts |= {"_project_conv": "projection.project_conv"}
    state = {}
    for name, array in torch_names(model, "efficientnet-pytorch").items():
        module, _, leaf = name.rpartition(".")
        if module.startswith("_blocks."):
            _, number, part = module.split(".")
            module = f"efficientnet.encoder.blocks.{number}.{parts[part]}"
        else:
            module = "classifier" if module == "_fc" else f"efficientnet.{ends[module]}"
        state[f"{module}.{leaf}"] = array
    return state


def write_torch(state: dict[str, np.ndarray], path: Path, **beside: Any) -> Path:
    tensors = {name: tensor(np.ascontiguousarray(array), str(i)) for i, (name, array) in enumerate(state.items())}
    path.write_bytes(torch_zip({**beside, "state_dict": tensors} if beside else tensors))
    return path


def write_safetensors(state: dict[str, np.ndarray], path: Path) -> Path:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in state.items():
        if array.dtype == np.float32:
            header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
            data += np.ascontiguousarray(array).tobytes()
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


IMAGENET, HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (0.5, 0.5)
MADE = {  # file name, names, padding, epsilon, mean and standard deviation of the library
    "torchvision": ("efficientnet_b0_rwightman.pth", torchvision_names, "symmetric", 1e-5, *IMAGENET),
    "timm-native": ("efficientnet_b0_ra-3dd342df.pth", "timm", "symmetric", 1e-5, *IMAGENET),
    "timm-ra4": ("efficientnet_b0.ra4_e3600_r224_in1k.bin", "timm", "symmetric", 1e-5, *HALF),
    "timm": ("tf_efficientnet_b0_ns-c0e6a31c.pth", "timm", "same", 1e-3, *IMAGENET),
    "advprop": ("tf_efficientnet_b0_ap-f262efe1.pth", "timm", "same", 1e-3, *HALF),
    "efficientnet-pytorch": ("efficientnet-b0-355c32eb.pth", "efficientnet-pytorch", "same", 1e-3, *IMAGENET),
    "transformers": ("pytorch_model.bin", transformers_names, "same", 1e-3, *IMAGENET),
}


@pytest.mark.parametrize("make", MADE)
def test_logits_are_those_of_the_library_that_made_the_file(make: str, trained: keras.Model, tmp_path: Path) -> None:
    name, naming, *network = MADE[make]
    state = torch_names(trained, naming) if isinstance(naming, str) else naming(trained)
    source = read_pretrained(str(write_torch(state, tmp_path / name)), B)
    assert source.conventions.make == make
    assert not source.conventions.candidates
    variant = source.adapt(B)
    model = efficientnet(variant, num_classes=3)
    report = load_pretrained(model, source, variant=variant)
    expected = reference(trained, *network)(IMAGES, training=False).numpy()
    np.testing.assert_allclose(model(IMAGES, training=False).numpy(), expected, atol=1e-4 * expected.std() + 1e-6)
    assert report.network.startswith(f"make: {make}")
    assert f"{network[0]} padding" in report.network
    assert not report.notes
    assert not report.differences


def test_a_model_of_symmetric_padding_is_saved_in_plain_layers_and_read_back_as_such(tmp_path: Path) -> None:
    variant = replace(B, padding="symmetric", input_normalization=NORMALIZATIONS["inception"])
    model = to_inference_model(efficientnet(variant, num_classes=3))
    assert [layer.name for layer in model.layers if layer.name.endswith("_pad")] == [
        "stem_conv_pad",
        "block2a_dwconv_pad",
    ]
    model.save(tmp_path / "model.keras")
    again = read_pretrained(str(tmp_path / "model.keras"), B).adapt(B)
    assert (again.padding, again.normalization) == ("symmetric", NORMALIZATIONS["inception"])
    assert all(type(layer).__module__.startswith("keras.") for layer in model.layers)


@pytest.mark.parametrize("side", [32, 33, 47, 64])
def test_symmetric_padding_gives_feature_maps_of_the_same_size(side: int) -> None:
    outputs = [
        efficientnet(replace(B, resolution=side, padding=padding), include_top=False).output_shape
        for padding in ("same", "symmetric")
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("hint", "make"),
    [
        ("tf_efficientnet_b4.ns_jft_in1k", "timm"),
        ("tf_efficientnet_b4.ap_in1k", "advprop"),
        ("efficientnet_b0.ra_in1k", "timm-native"),
        ("efficientnet_b0.ra4_e3600_r224_in1k", "timm-ra4"),
        ("efficientnet_lite0.ra_in1k", "timm-native"),
    ],
)
def test_the_names_of_timm_tell_its_makes_apart(hint: str, make: str) -> None:
    assert recognize("timm", [hint]) == (make, ())


def test_every_make_can_be_recognized_and_every_naming_has_one() -> None:
    assert {make for makes in NAMINGS.values() for make in makes} == set(MAKES)
    assert {make for hints in HINTS.values() for _, make in hints} <= set(MAKES)


def test_torchvisions_larger_variants_have_another_epsilon() -> None:
    assert [conventions("torchvision", VARIANTS[name]).batch_norm_epsilon for name in ("b4", "b5")] == [1e-5, 1e-3]


def test_a_file_of_timm_without_a_telling_name_leaves_the_make_open(trained: keras.Model, tmp_path: Path) -> None:
    path = str(write_torch(torch_names(trained, "timm"), tmp_path / "best.pt"))
    source = read_pretrained(path, B)
    assert source.conventions.candidates == NAMINGS["timm"]
    assert "timm, timm-native, timm-ra4, advprop" in source.describe_choice()
    named = read_pretrained(path, B, weights_from="timm-native")
    assert (named.conventions.padding, named.conventions.candidates) == ("symmetric", ())


def test_a_make_whose_names_are_others_is_refused(trained: keras.Model, tmp_path: Path) -> None:
    path = str(write_torch(torch_names(trained, "timm"), tmp_path / "best.pt"))
    with pytest.raises(WeightsError, match=r"names are those of timm or .*, not of model\.weights_from=torchvision"):
        read_pretrained(path, B, weights_from="torchvision")


def test_the_arguments_in_a_checkpoint_tell_the_make(trained: keras.Model, tmp_path: Path) -> None:
    path = write_torch(torch_names(trained, "timm"), tmp_path / "last.pth.tar", arch="tf_efficientnet_b0", epoch=3)
    assert read_pretrained(str(path), B).conventions == conventions("timm", B)


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "encoder.", "_orig_mod.", "0.", "model.module."])
def test_a_prefix_of_a_wrapper_is_stripped(prefix: str, trained: keras.Model, tmp_path: Path) -> None:
    state = {prefix + name: array for name, array in torch_names(trained, "timm").items()}
    source = read_pretrained(str(write_torch(state, tmp_path / "tf_efficientnet_b0.pth")), B)
    assert load_pretrained(efficientnet(B, num_classes=3), source, variant=B).uninitialized == {}


def test_the_folder_of_a_hub_says_architecture_normalization_and_classes(trained: keras.Model, tmp_path: Path) -> None:
    write_safetensors(torch_names(trained, "timm"), tmp_path / "model.safetensors")
    timm = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    labels = {str(i): name for i, name in enumerate(("ant", "bee", "cat"))}
    config = {"architecture": "efficientnet_b0", "pretrained_cfg": timm, "id2label": labels}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = read_pretrained(str(tmp_path), B)
    assert (source.conventions.make, source.conventions.padding) == ("timm-native", "symmetric")
    assert source.conventions.normalization == NORMALIZATIONS["inception"]
    assert source.class_lists == (["ant", "bee", "cat"],)


def test_the_classes_of_a_file_can_be_given(trained: keras.Model, tmp_path: Path) -> None:
    path = write_torch(torch_names(trained, "timm"), tmp_path / "tf_efficientnet_b0.pth")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    source = read_pretrained(str(path), B, classes=tmp_path / "names.txt")
    report = load_pretrained(efficientnet(B, num_classes=3), source, variant=B, class_names=("ant", "bee", "cat"))
    assert str(report).endswith("classifier copied")


# --- Keras


def keras_application(path: Path, *, normalizes: bool = False, wrapped: bool = False) -> keras.Model:
    """keras.applications' B0 with random weights, under a classifier of another name."""
    base = keras.applications.EfficientNetB0(include_top=False, weights=None, input_shape=(64, 64, 3))
    random = np.random.default_rng(1)
    for layer in base.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.kernel.assign(random.normal(0, 0.1, layer.kernel.shape))
    if normalizes:
        normalization = next(layer for layer in base.layers if isinstance(layer, keras.layers.Normalization))
        normalization.set_weights([np.array(IMAGENET[0]), np.square(IMAGENET[1]), np.zeros((), "i4")])
        normalization.finalize_state()
    images = keras.Input((64, 64, 3))
    x = keras.layers.Lambda(lambda x: x, output_shape=(64, 64, 3))(images) if wrapped else images
    features = keras.layers.GlobalAveragePooling2D()(base(x))
    model = keras.Model(images, keras.layers.Dense(3, name="pred")(features))
    (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5"])
@pytest.mark.parametrize("normalizes", [False, True])
def test_a_keras_model_around_keras_applications_gives_equal_logits(
    name: str, normalizes: bool, tmp_path: Path
) -> None:
    theirs = keras_application(tmp_path / name, normalizes=normalizes)
    base = replace(VARIANTS["b0"], resolution=64)
    source = read_pretrained(str(tmp_path / name), base)
    assert name_normalization(source.conventions.normalization) == ("imagenet" if normalizes else "unit")
    variant = source.adapt(base)
    model = efficientnet(variant, num_classes=3)
    report = load_pretrained(model, source, variant=variant)
    assert report.uninitialized == {}
    images = np.random.default_rng(0).uniform(0, 255, (4, 64, 64, 3)).astype("f4")
    expected = theirs(images, training=False).numpy()
    np.testing.assert_allclose(model(images, training=False).numpy(), expected, rtol=1e-4, atol=1e-4 * expected.std())


def small_application(path: Path, scale: float | None) -> None:
    """A model of this project's shapes in a model that rescales in front of it."""
    inner = efficientnet(replace(B, input_normalization=NORMALIZATIONS["unit"]), include_top=False)
    layers = [keras.Input((32, 32, 3)), *([keras.layers.Rescaling(scale)] if scale else []), inner]
    keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)]).save(path)


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_rescaling_in_front_of_a_keras_network_counts(name: str, tmp_path: Path) -> None:
    small_application(tmp_path / name, 2.0)
    source = read_pretrained(str(tmp_path / name), B)
    np.testing.assert_allclose(source.conventions.normalization.scale, 2 / 255)
    variant = source.adapt(B)
    assert load_pretrained(efficientnet(variant, num_classes=3), source, variant=variant).uninitialized == {}


def test_another_normalization_than_the_models_is_told(tmp_path: Path) -> None:
    small_application(tmp_path / "model.keras", None)
    report = load_pretrained(efficientnet(B, num_classes=3), str(tmp_path / "model.keras"), variant=B)
    assert "normalization unit" in report.summary()
    assert "; the model normalizes its input otherwise: imagenet" in str(report)


def test_a_lambda_layer_is_no_obstacle_and_told(tmp_path: Path) -> None:
    inner = efficientnet(B, include_top=False)
    images = keras.Input((32, 32, 3))
    x = keras.layers.Lambda(lambda x: x * 2, output_shape=(32, 32, 3), name="double")(images)
    keras.Model(images, inner(x)).save(tmp_path / "lambda.keras")
    source = read_pretrained(str(tmp_path / "lambda.keras"), B)
    assert source.notes == ("its layer 'double' (Lambda) in front of the network is left out",)
    assert load_pretrained(efficientnet(B, include_top=False), source, variant=B).uninitialized == {}


def test_the_normalization_among_the_weights_of_a_download_is_imagenets(trained: keras.Model, tmp_path: Path) -> None:
    """Its variances are deviations, which the network of keras.applications makes up for."""
    legacy_h5(trained, tmp_path / "b0.h5")
    with h5py.File(tmp_path / "b0.h5", "r+") as file:
        group = file["normalization"]
        group.attrs["weight_names"] = [f"normalization/{name}:0" for name in ("mean", "variance", "count")]
        group["normalization/variance:0"] = np.array(IMAGENET[1], "f4")
        group["normalization/count:0"] = np.array(0)
    assert read_pretrained(str(tmp_path / "b0.h5"), B).conventions.normalization == NORMALIZATIONS["imagenet"]


def test_qubvels_classifier_is_the_classifier(trained: keras.Model, tmp_path: Path) -> None:
    legacy_h5(trained, tmp_path / "theirs.h5")
    with h5py.File(tmp_path / "theirs.h5", "r+") as file:
        others = ("predictions", "normalization")
        file.attrs["layer_names"] = [*(name for name in file.attrs["layer_names"] if name not in others), "probs"]
        group = file.create_group("probs")
        group.attrs["weight_names"] = [b"probs/kernel:0", b"probs/bias:0"]
        for name in ("kernel", "bias"):
            group[f"probs/{name}:0"] = np.asarray(file[f"predictions/predictions/{name}:0"])
    source = read_pretrained(str(tmp_path / "theirs.h5"), B)
    assert source.conventions.make == "qubvel"
    assert load_pretrained(efficientnet(B, num_classes=3), source, variant=B).uninitialized == {}


def keras2_weights(model: keras.Model, path: Path) -> None:
    """The layout of Keras 2's .weights.h5: by class, without the layers' names."""
    kinds = {"Conv2D": "conv2d", "DepthwiseConv2D": "depthwise_conv2d", "Dense": "dense"}
    counts = dict.fromkeys([*kinds.values(), "batch_normalization"], 0)
    with h5py.File(path, "w") as file:
        for layer in (layer for layer in model.layers if layer.weights):
            kind = kinds.get(type(layer).__name__, "batch_normalization")
            group = file.create_group(f"layers/{kind}{f'_{counts[kind]}' if counts[kind] else ''}/vars")
            counts[kind] += 1
            for i, array in enumerate(layer.get_weights()):
                group[str(i)] = array


def test_a_weights_file_of_keras_2_is_read_by_the_order_of_its_layers(trained: keras.Model, tmp_path: Path) -> None:
    keras2_weights(trained, tmp_path / "model.weights.h5")
    model = efficientnet(B, num_classes=3)
    assert load_pretrained(model, str(tmp_path / "model.weights.h5"), variant=B).uninitialized == {}
    for array, expected in zip(model.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_a_compressed_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.keras", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", bytes(2**25))
    with pytest.raises(WeightsError, match=r"bomb\.keras: model\.weights\.h5 unpacks to 33,554,432 bytes"):
        read_pretrained(str(tmp_path / "bomb.keras"), B)


# --- Files that are none


def test_torchscript_is_named_with_its_remedy(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "traced.pt", "w") as archive:
        for name in ("traced/data.pkl", "traced/constants.pkl", "traced/code/__torch__.py"):
            archive.writestr(name, b"")
    with pytest.raises(WeightsError, match=r"traced\.pt: is TorchScript.*state_dict"):
        read_pretrained(str(tmp_path / "traced.pt"), B)


@pytest.mark.parametrize("stem", ["blocks.1.0.conv_exp.weight", "features.1.0.block.0.0.weight"])
def test_the_second_version_of_the_family_is_named(stem: str, tmp_path: Path) -> None:
    ends = "features.0.0.weight" if stem.startswith("features") else "conv_stem.weight"
    state = {ends: np.zeros((24, 3, 3, 3), "f4"), stem: np.zeros((24, 24, 3, 3), "f4")}
    with pytest.raises(WeightsError, match=r"v2\.pth: holds an EfficientNetV2"):
        read_pretrained(str(write_torch(state, tmp_path / "v2.pth")), B)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_stem_for_other_channels_is_named(channels: int, trained: keras.Model, tmp_path: Path) -> None:
    state = torch_names(trained, "timm")
    state["conv_stem.weight"] = np.repeat(state["conv_stem.weight"][:, :1], channels, axis=1)
    path = str(write_torch(state, tmp_path / "tf_efficientnet_b0.pth"))
    with pytest.raises(WeightsError, match=rf"first layer takes images of {channels} channels, and the model's of 3"):
        load_pretrained(efficientnet(B, num_classes=3), path, variant=B)


def test_a_checkpoint_by_prefix_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "weights.index").touch()
    with pytest.raises(WeightsError, match=r"is a TensorFlow checkpoint.*\.keras file"):
        read_pretrained(str(tmp_path / "weights"), B)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-10], r"is cut off or damaged \(.*not fully covered\); download or copy it again"),
        (lambda data: data[:4], "is cut off or damaged|is no weight file"),
        (lambda data: data.replace(b'"F32"', b'"F99"', 1), r"is cut off or damaged \(.*F99"),
        (lambda data: data.replace(b'"F32"', b'"U32"', 1), "tensor conv_stem.weight has the dtype U32; save it as F32"),
        (lambda data: data.replace(b"data_offsets", b"date_offsets", 1), r"is cut off or damaged \(.*data_offsets"),
        (lambda data: data.replace(b'"shape": [', b'"shape": [2, ', 1), r"is cut off or damaged \("),
    ],
)
def test_a_damaged_safetensors_file_is_refused(change: Any, message: str, trained: keras.Model, tmp_path: Path) -> None:
    path = write_safetensors(torch_names(trained, "timm"), tmp_path / "model.safetensors")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(WeightsError, match=rf"model\.safetensors: {message}"):
        read_pretrained(str(path), B)


def test_numbers_for_a_normalization_are_named_where_they_are_known() -> None:
    nearly = Normalization(
        tuple(x * (1 + 1e-7) for x in NORMALIZATIONS["imagenet"].scale), NORMALIZATIONS["imagenet"].offset
    )
    assert name_normalization(nearly) == "imagenet"
    assert name_normalization(Normalization(1 / 100, -1.0)) is None


def test_timms_lite_variants_are_normalized_as_timm_does() -> None:
    assert conventions("timm", LITE).normalization == NORMALIZATIONS["inception"]
    assert conventions("efficientnet-pytorch", LITE).normalization == NORMALIZATIONS["lite"]
