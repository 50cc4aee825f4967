"""Rows of a classifier carried over by class name, when they are, and what new and merged classes start from."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.config.loader import load_config
from pipeline.errors import ConfigError, WeightsError
from pipeline.models.efficientnet import efficientnet
from pipeline.models.head_transfer import MARGIN, match_classes, read_class_map, transfer_head
from pipeline.models.variants import VARIANTS
from pipeline.models.weights.pretrained import LoadReport, load_pretrained
from pipeline.models.weights.sources import imagenet_classes
from pipeline.tasks import SINGLE_LABEL

LITE = replace(VARIANTS["lite0"], resolution=64)
SMALL = replace(VARIANTS["b0"], width=0.25, resolution=32, family_name="short")
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
SYNSETS, NAMES = map(list, imagenet_classes())


@pytest.fixture(scope="module")
def old() -> keras.Model:
    """Of `CLASSES`, with statistics and a head that give logits a few nats apart on `smooth_images`."""
    model = efficientnet(SMALL, num_classes=len(CLASSES), drop_path_rate=0, dropout=0, batch_norm_momentum=0)
    model(smooth_images(32), training=True)
    random = np.random.default_rng(3)
    kernel, bias = model.get_layer("predictions").get_weights()
    model.get_layer("predictions").set_weights([random.normal(0, 0.2, kernel.shape), random.normal(0, 0.5, bias.shape)])
    return model


@pytest.fixture(scope="module")
def run(old: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    old.save(folder / "model.keras")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return folder


def load(run: Path, class_names: Sequence[str], class_map: str | None = None) -> tuple[keras.Model, LoadReport]:
    """A new model of these classes from the run, through a class map of this text."""
    model = efficientnet(SMALL, num_classes=len(class_names), seed=8)
    path = run / "map.yaml"
    if class_map is not None:
        path.write_text(class_map)
    return model, load_pretrained(
        model, str(run), variant=SMALL, class_names=class_names, class_map=None if class_map is None else path
    )


def smooth_images(resolution: int, count: int = 8) -> np.ndarray:
    """Generated images, float32 (count, R, R, 3) in [0, 255]: smooth noise of growing contrast."""
    coarse = np.random.default_rng(0).uniform(-1, 1, (count, 4, 4, 3))
    smooth = coarse.repeat(resolution // 4, axis=1).repeat(resolution // 4, axis=2)
    contrast = np.linspace(10, 127, count)[:, None, None, None]
    return (127 + contrast * smooth).astype("float32")


# --- Kept classes
# ------------------------------------------------------------------------------------------------------------------


def assert_kept_logits_identical(
    old: keras.Model, new: keras.Model, places: dict[int, int], images: np.ndarray
) -> None:
    """Bit for bit, in one product: its last bit depends on its number of columns, and on the processor.

    Args:
        old: The source.
        new: The model with other classes.
        places: Index in the new model of each kept class -> index in the old one.
        images: float32 (B, R, R, 3).
    """
    old_features, features = (keras.Model(model.input, model.layers[-1].input)(images).numpy() for model in (old, new))
    np.testing.assert_array_equal(features, old_features)
    (old_kernel, old_bias), (kernel, bias) = (model.get_layer("predictions").get_weights() for model in (old, new))
    into, back = list(places.values()), list(places)
    np.testing.assert_array_equal(kernel[:, back], old_kernel[:, into])
    np.testing.assert_array_equal(bias[back], old_bias[into])
    put_back_kernel, put_back_bias = np.zeros_like(old_kernel), np.zeros_like(old_bias)
    put_back_kernel[:, into], put_back_bias[into] = kernel[:, back], bias[back]
    expected = (old_features @ old_kernel + old_bias)[:, into]
    assert expected.std(axis=0).mean() > 0.05  # from image to image
    np.testing.assert_array_equal((features @ put_back_kernel + put_back_bias)[:, into], expected)
    np.testing.assert_allclose(new(images).numpy()[:, back], old(images).numpy()[:, into], rtol=0, atol=3e-6)


@pytest.mark.parametrize("count", [5, 10, 17, 999, 1001, 1100])
def test_the_number_of_classes_moves_a_kept_logit_by_no_more_than_the_order_of_summing_does(count: int) -> None:
    random = np.random.default_rng(4)
    head = random.normal(0, 0.05, (1280, 1000)).astype("f4"), random.normal(0, 0.05, 1000).astype("f4")
    features = random.uniform(0, 1, (64, 1280)).astype("f4")
    bound = 16 * np.finfo("f4").eps * (features @ np.abs(head[0]))  # up to 5 were measured
    kept = min(count, 1000)
    layers = []
    for kernel, bias in (
        head,
        transfer_head(*head, [(index,) if index < 1000 else () for index in range(count)], SINGLE_LABEL),
    ):
        layer = keras.layers.Dense(len(bias))
        layer.build((None, 1280))
        layer.set_weights([kernel, bias])
        layers.append(layer)
    for size in (1, 2, 5, 16, 33, 64):
        before, after = (layer(features[:size]).numpy()[:, :kept] for layer in layers)
        assert (np.abs(after - before) <= bound[:size, :kept]).all()


@pytest.mark.parametrize(
    "class_names",
    [
        ("ant", "bee", "cat", "dog", "eel", "fox", "gnu"),
        ("asp", "ant", "auk", "bee", "cat", "cow", "dog", "eel", "fox", "gnu", "owl"),
        ("bee", "eel"),
        ("fox", "eel", "dog", "cat", "bee", "ant"),
        ("gnu", "fox", "ant", "dog"),
    ],
    ids=["added", "many added", "dropped", "reordered", "all three"],
)
def test_the_logits_of_kept_classes_are_bit_identical(
    class_names: tuple[str, ...], old: keras.Model, run: Path
) -> None:
    partial = not set(class_names) <= set(CLASSES)
    new, report = load(run, class_names, "ant: ant\n" if partial else None)
    kept = [name for name in class_names if name in CLASSES]
    assert_kept_logits_identical(
        old, new, {class_names.index(name): CLASSES.index(name) for name in kept}, smooth_images(32)
    )
    assert report.head is not None
    assert report.head.kept == {name: name for name in kept}
    assert report.head.new == tuple(name for name in class_names if name not in CLASSES)
    assert report.head.dropped == len(CLASSES) - len(kept)


def test_by_a_class_map_imagenets_classes_keep_their_logits_beside_new_ones_that_lie_below(tmp_path: Path) -> None:
    images = smooth_images(64, 3)
    whole = efficientnet(LITE)
    load_pretrained(whole, "imagenet", variant=LITE)
    class_names = ["n02510455", "my cat", "zebra", *SYNSETS[100:200], "my dog"]
    new = efficientnet(LITE, num_classes=len(class_names))
    (tmp_path / "map.yaml").write_text("zebra: zebra\n")
    load_pretrained(new, "imagenet", variant=LITE, class_names=class_names, class_map=tmp_path / "map.yaml")
    kept = [i for i, name in enumerate(class_names) if not name.startswith("my")]
    assert_kept_logits_identical(whole, new, dict(zip(kept, [388, 340, *range(100, 200)], strict=True)), images)
    logits = new(images).numpy()
    assert (logits[:, [1, -1]].max(axis=1) < logits[:, kept].min(axis=1)).all()


# --- New classes
# -------------------------------------------------------------------------------------------------------------------


def test_beside_a_class_map_new_classes_lie_below_every_kept_one(run: Path) -> None:
    class_names = ("gnu", *CLASSES, "owl")
    logits = load(run, class_names, "ant: ant\n")[0](smooth_images(32)).numpy()
    assert (logits[:, [0, -1]].max(axis=1) < logits[:, 1:-1].min(axis=1)).all()


def test_a_new_row_is_the_mean_of_the_taken_ones_with_the_margin_off_its_bias() -> None:
    kernel, bias = np.array([[1.0, 3, 100], [-2, 4, 100]], "f4"), np.array([0.5, 1.5, 100], "f4")
    new_kernel, new_bias = transfer_head(kernel, bias, [(), (1,), (0,)], SINGLE_LABEL)
    np.testing.assert_array_equal(new_kernel, [[2, 3, 1], [1, 4, -2]])
    np.testing.assert_array_equal(new_bias, [1 - MARGIN, 1.5, 0.5])


finite = st.floats(-50, 50, width=32)


@given(
    arrays(np.float32, (5, 4), elements=finite),
    arrays(np.float32, 4, elements=finite),
    arrays(np.float32, (3, 5), elements=finite),
)
def test_whatever_the_features_a_taken_class_wins_by_the_margin(
    kernel: np.ndarray, bias: np.ndarray, features: np.ndarray
) -> None:
    new_kernel, new_bias = (
        array.astype(np.float64) for array in transfer_head(kernel, bias, [(0,), (), (1, 2), (3,)], SINGLE_LABEL)
    )
    logits = features @ new_kernel + new_bias
    tolerance = 1e-5 * (1 + np.abs(features) @ np.abs(new_kernel).max(axis=1) + np.abs(new_bias).max())
    highest = logits[:, [0, 2, 3]].max(axis=1)
    assert (highest - logits[:, 1] >= MARGIN - tolerance).all()
    probability = np.exp(logits[:, 1] - np.logaddexp.reduce(logits, axis=1))
    assert (probability <= np.exp(-MARGIN + tolerance) / 3).all()


def test_a_head_that_nothing_matches_stays_as_it_was_built(run: Path) -> None:
    model, report = load(run, ("gnu", "owl"))
    expected = efficientnet(SMALL, num_classes=2, seed=8).get_layer("predictions").get_weights()
    for array, wanted in zip(model.get_layer("predictions").get_weights(), expected, strict=True):
        np.testing.assert_array_equal(array, wanted)
    assert report.uninitialized == {"predictions": "none of its 2 classes is among the 6 of the file"}
    assert "predictions" not in report.copied


@pytest.mark.parametrize(
    ("class_names", "count"),
    [
        (("ant", "gnu", "owl", "yak"), "1 of 4 classes is"),
        ((*CLASSES, "gnu"), "6 of 7 classes are"),
    ],
)
def test_without_a_class_map_classes_that_share_a_name_with_the_sources_start_as_under_any_other_name(
    class_names: tuple[str, ...], count: str, run: Path
) -> None:
    model, report = load(run, class_names)
    other, _ = load(run, [f"{name}s" for name in class_names])
    for array, wanted in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(array, wanted)
    reason = f"{count} in the file; name them all or give a class map to keep rows"
    assert report.uninitialized == {"predictions": reason}
    assert str(report).endswith(f"backbone layers copied; classifier new ({reason})")
    lines = [f"  class not in the file: {name}" for name in class_names if name not in CLASSES]
    assert report.details().splitlines()[-len(lines) :] == lines


# --- Names ------------------------------------------------------------------------------------------------------------


def test_imagenets_classes_go_by_synset_or_by_name() -> None:
    match = match_classes(["n02510455", "zebra", "my cat", "giant panda"], [SYNSETS, NAMES])
    assert match.rows == ((388,), (340,), (), (388,))
    assert match.kept["n02510455"] == match.kept["giant panda"] == "n02510455 giant panda"


@pytest.mark.parametrize(("name", "indices"), [("missile", (657, 744)), ("sunglasses", (836, 837))])
def test_a_name_of_two_classes_matches_neither_and_the_report_says_so(name: str, indices: tuple[int, int]) -> None:
    match = match_classes([name, "zebra"], [SYNSETS, NAMES])
    assert match.rows == ((), (340,))
    assert str(match) == "1 kept, 1 new (1 by an ambiguous name)"
    first, second = (SYNSETS[index] for index in indices)
    assert f"new: {name}: the name is ambiguous; it may mean {first} {name} or {second} {name}" in match.details()
    assert match_classes([first, second], [SYNSETS, NAMES]).rows == ((indices[0],), (indices[1],))


def test_an_ambiguous_name_that_leaves_the_classifier_new_is_explained() -> None:
    model = efficientnet(LITE, num_classes=2)
    report = load_pretrained(model, "imagenet", variant=LITE, class_names=["missile", "zebra"])
    assert "classifier new (1 of 2 classes is in the file; " in str(report)
    assert report.details().splitlines()[-1] == (
        "  class not in the file: missile: the name is ambiguous; it may mean n03773504 missile or n04008634 missile"
    )


def test_a_file_of_a_thousand_unnamed_classes_is_taken_for_imagenets(tmp_path: Path) -> None:
    source = efficientnet(SMALL)
    source.save(tmp_path / "model.keras")
    new = efficientnet(SMALL, num_classes=2)
    load_pretrained(new, str(tmp_path / "model.keras"), variant=SMALL, class_names=["zebra", "n02510455"])
    expected = source.get_layer("predictions").kernel.numpy()[:, [340, 388]]
    np.testing.assert_array_equal(new.get_layer("predictions").kernel.numpy(), expected)


# --- The class map
# -----------------------------------------------------------------------------------------------------------------


def test_a_class_map_renames_and_merges_and_goes_before_equal_names(old: keras.Model, run: Path) -> None:
    model, report = load(run, ("insect", "feline", "dog", "eel", "gnu"), "insect: [ant, bee]\nfeline: cat\ndog: fox\n")
    assert report.head is not None
    assert report.head.rows == ((0, 1), (2,), (5,), (4,), ())
    assert str(report).endswith("backbone layers copied; classifier: 3 kept, 1 merged, 1 new")
    lines = report.details().splitlines()
    assert lines[-6:] == [
        "  class kept: feline: from cat",
        "  class kept: dog: from fox",
        "  class kept: eel",
        "  class merged: insect: from ant, bee",
        "  class new: gnu",
        "  class dropped: 1 of the source's classes",
    ]
    assert_kept_logits_identical(old, model, {1: 2, 2: 5, 3: 4}, smooth_images(32))


def test_names_in_a_class_map_are_text_whatever_yaml_reads_in_them(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("no: yes\n7: 1e3\n'null': [08, ~]\n")
    assert read_class_map(tmp_path / "map.yaml") == {"no": ("yes",), "7": ("1e3",), "null": ("08", "~")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"map\.yaml: cannot be read \(No such file or directory\)"),
        ("a: [b\n", r"map\.yaml:2: is not valid YAML"),
        (b"a: \xff\n", r"map\.yaml: is not valid YAML"),
        ("", r"map\.yaml: must hold lines such as new class: old class"),
        ("- a\n", r"map\.yaml: must hold lines"),
        ("x: y\na:\n", r"map\.yaml:2: a: must have the name of an old class"),
        ("a: []\n", r"map\.yaml:1: a: must have the name"),
        ("a: {b: c}\n", r"map\.yaml:1: a: must have the name"),
        ("a: b\na: c\n", r"map\.yaml:2: a: is given twice"),
        ("a: [b, b]\n", r"map\.yaml:1: a: names an old class twice"),
    ],
)
def test_a_file_that_is_no_class_map_is_refused_by_line(text: str | bytes | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "map.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WeightsError, match=message):
        read_class_map(tmp_path / "map.yaml")


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({"zebbra": ("zebra",)}, r"map\.yaml: 'zebbra' is none of the data's classes; did you mean 'zebra'\?"),
        (
            {"zebra": ("giant pand",)},
            r"map\.yaml: zebra: 'giant pand' is none of the source's classes; did you mean 'giant panda'\?",
        ),
        ({"zebra": ("missile",)}, r"map\.yaml: zebra: 'missile' is ambiguous; write one of n03773504, n04008634"),
        ({"zebra": ("giant panda", "n02510455")}, r"map\.yaml: zebra: names an old class twice, in two wordings"),
    ],
)
def test_unknown_names_in_a_class_map_are_refused_with_the_nearest(
    class_map: dict[str, tuple[str, ...]], message: str, tmp_path: Path
) -> None:
    (tmp_path / "map.yaml").write_text(json.dumps(class_map))
    with pytest.raises(WeightsError, match=message):
        match_classes(["zebra", "panda"], [SYNSETS, NAMES], tmp_path / "map.yaml")


def test_a_class_map_to_a_file_without_class_names_is_refused(old: keras.Model, tmp_path: Path) -> None:
    old.save(tmp_path / "model.keras")
    model = efficientnet(SMALL, num_classes=1)
    with pytest.raises(
        WeightsError, match=r"class_map: map\.yaml: .*model\.keras has no classes to map: the file does not say"
    ):
        load_pretrained(
            model, str(tmp_path / "model.keras"), variant=SMALL, class_names=["x"], class_map=Path("map.yaml")
        )


def test_a_class_map_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {source: digits}\nmodel: {class_map: map.yaml}\n")
    assert load_config(tmp_path / "config.yaml").model.class_map == Path("map.yaml")
    with pytest.raises(ConfigError, match=r"class_map says where .*; set weights, or leave class_map out"):
        load_config(tmp_path / "config.yaml", ["model.weights=null"])


# --- Merged classes
# ----------------------------------------------------------------------------------------------------------------


def test_a_merged_row_is_the_mean_with_the_logarithm_of_the_number_on_its_bias() -> None:
    kernel, bias = np.array([[1.0, 3, 8], [-2, 4, 8]], "f4"), np.array([0.5, 1.5, 8], "f4")
    new_kernel, new_bias = transfer_head(kernel, bias, [(0, 1), (2,)], SINGLE_LABEL)
    np.testing.assert_array_equal(new_kernel, [[2, 8], [1, 8]])
    np.testing.assert_allclose(new_bias, [1 + np.log(2), 8], rtol=1e-7)


def test_exactly_merged_logits_add_probabilities() -> None:
    logits = np.array([[1.0, 2, 3, 900], [-900, -901, -902, -903]])
    merged = SINGLE_LABEL.merge_logits(logits, [(0, 3), (1, 2)])
    assert merged.shape == (2, 2)
    softmax = [np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True)) for z in (logits, merged)]
    np.testing.assert_allclose(softmax[1], softmax[0][:, [0, 1]] + softmax[0][:, [3, 2]], rtol=1e-9)


@given(
    arrays(np.float32, (5, 4), elements=finite),
    arrays(np.float32, 4, elements=finite),
    arrays(np.float32, (3, 5), elements=finite),
)
def test_a_merged_row_never_exceeds_the_exact_logit(kernel: np.ndarray, bias: np.ndarray, features: np.ndarray) -> None:
    rows = [(0, 1, 2), (3,)]
    new_kernel, new_bias = (array.astype(np.float64) for array in transfer_head(kernel, bias, rows, SINGLE_LABEL))
    exact = SINGLE_LABEL.merge_logits(features.astype(np.float64) @ kernel + bias, rows)
    assert (
        features @ new_kernel + new_bias
        <= exact + 1e-5 * (1 + np.abs(features) @ np.abs(kernel).max(axis=1)[:, None] + 50)
    ).all()


def test_a_merged_row_is_exact_where_its_classes_agree() -> None:
    kernel, bias = np.full((2, 3), 0.25, "f4"), np.zeros(3, "f4")
    new_kernel, new_bias = transfer_head(kernel, bias, [(0, 1, 2)], SINGLE_LABEL)
    features = np.array([[4.0, 8]])
    np.testing.assert_allclose(
        features @ new_kernel + new_bias, SINGLE_LABEL.merge_logits(features @ kernel + bias, [(0, 1, 2)]), rtol=1e-6
    )
