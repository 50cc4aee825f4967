"""Labels for image files."""

import io
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from rich.console import Console

from pipeline.data.preprocessing import preprocess
from pipeline.errors import RunError
from pipeline.evaluation.predict import BATCH_SIZE, FilePrediction, Label, format_prediction, predict_files, top_k

RESOLUTION = 32
NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def color_model() -> keras.Model:
    """The logits are a tenth of the image's mean red, green and blue."""
    inputs = keras.Input((None, None, 3))
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(0.1)(inputs)))


@pytest.fixture(scope="module")
def place_model() -> keras.Model:
    """The logits are a tenth of the mean red of the top half, the bottom half and the left half."""
    inputs = keras.Input((RESOLUTION, RESOLUTION, 3))
    red = keras.layers.Rescaling(0.1)(inputs)[..., :1]
    halves = [red[:, :16], red[:, 16:], red[:, :, :16]]
    return keras.Model(
        inputs, keras.layers.Concatenate()([keras.layers.GlobalAveragePooling2D()(half) for half in halves])
    )


def save(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, color).save(path)
    return path


def test_each_file_gets_its_labels_in_order(color_model: keras.Model, tmp_path: Path) -> None:
    colors = {"red": (200, 30, 20), "green": (10, 220, 90), "blue": (0, 20, 240)}
    paths = [
        save(tmp_path / f"{name}{suffix}", colors[name])
        for name in NAMES
        for suffix in (".png", ".jpg", ".bmp", ".gif", ".webp", ".tiff")
    ]
    got = list(predict_files(color_model, NAMES, paths, resolution=RESOLUTION, resize="crop"))
    assert [prediction.path for prediction in got] == paths
    assert [prediction.top[0].name for prediction in got] == [name for name in NAMES for _ in range(6)]
    exponentials = np.exp(np.array([200, 30, 20]) / 10)
    expected = exponentials / exponentials.sum()
    assert [label.name for label in got[0].top] == ["red", "green", "blue"]
    np.testing.assert_allclose([label.probability for label in got[0].top], expected, rtol=1e-4)


def test_prediction_sees_what_validation_sees(tmp_path: Path) -> None:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((RESOLUTION, RESOLUTION, 3))
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))))
    noise = np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8)
    path = tmp_path / "noise.jpg"
    Image.fromarray(noise).save(path)
    for resize in ("crop", "squash", "letterbox"):
        square = preprocess(tf.constant(path.read_bytes()), tf.constant(1), resolution=RESOLUTION, resize=resize)
        logits = model(tf.cast(square, tf.float32)[None]).numpy()
        [expected] = top_k(logits, list("abcd"))
        [got] = predict_files(model, list("abcd"), [path], resolution=RESOLUTION, resize=resize)
        assert [label.name for label in got.top] == [label.name for label in expected]
        np.testing.assert_allclose(
            [label.probability for label in got.top], [label.probability for label in expected], rtol=1e-4
        )


@pytest.mark.parametrize(("orientation", "expected"), [(1, "left"), (3, None), (6, "top"), (8, "bottom"), (99, "left")])
def test_exif_orientation_is_honoured(
    place_model: keras.Model, tmp_path: Path, orientation: int, expected: str | None
) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    [got] = predict_files(
        place_model, ["top", "bottom", "left"], [tmp_path / "turned.jpg"], resolution=RESOLUTION, resize="squash"
    )
    if expected is None:  # red is on the right: the left half has none, the other two have equally much
        assert got.top[-1].name == "left"
    else:
        assert got.top[0].name == expected


def test_unreadable_files_are_reported_and_the_others_predicted(color_model: keras.Model, tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", (250, 0, 0))
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    Image.new("F", (8, 8)).save(tmp_path / "odd.tiff")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    bad = [tmp_path / name for name in ("missing.jpg", "cut.jpg", "text.jpg", "empty.jpg", "odd.tiff", "huge.png")] + [
        tmp_path
    ]
    got = list(predict_files(color_model, NAMES, [*bad[:3], good, *bad[3:]], resolution=RESOLUTION, resize="crop"))
    reasons = {prediction.path.name: prediction.error for prediction in got if prediction.error}
    assert [prediction.path for prediction in got if prediction.top] == [good]
    assert list(reasons) == [path.name for path in bad]
    assert "No such file" in reasons["missing.jpg"]
    assert reasons["cut.jpg"] == "is a damaged JPEG: it is truncated"
    assert reasons["text.jpg"] == "is not an image, or its format is not supported"
    assert reasons["empty.jpg"] == "is empty"
    assert reasons["odd.tiff"].startswith("holds 32-bit numbers")
    assert "10000 x 10000 pixels" in reasons["huge.png"]
    assert "directory" in reasons[tmp_path.name]


def test_however_many_files_there_are_two_batches_are_held(color_model: keras.Model) -> None:
    asked = 0

    def paths() -> Iterator[str]:
        nonlocal asked
        while asked < 20_000:
            asked += 1
            yield f"none/{asked}.jpg"

    for got, prediction in enumerate(
        predict_files(color_model, NAMES, paths(), resolution=RESOLUTION, resize="crop"), start=1
    ):
        assert prediction.error
        assert asked - got < 2 * BATCH_SIZE
    assert got == 20_000


def test_the_next_batch_is_read_while_the_model_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / str(number) for number in range(2 * BATCH_SIZE + 5)]
    begun = {path: Event() for path in paths}

    def read(_: object, path: Path) -> np.ndarray:
        begun[path].set()
        return np.full((RESOLUTION, RESOLUTION, 3), int(path.name), np.uint8)

    def work(images: np.ndarray) -> np.ndarray:
        first = int(images[0, 0, 0, 0])
        ahead = paths[first + BATCH_SIZE : first + 2 * BATCH_SIZE]
        assert all(begun[path].wait(20) for path in ahead)
        return np.eye(len(paths), dtype=np.float32)[images[:, 0, 0, 0].astype(int)]

    monkeypatch.setattr("pipeline.evaluation.predict._read", read)
    wait_and_answer = keras.layers.Lambda(
        lambda images: tf.numpy_function(work, [images], tf.float32), output_shape=(len(paths),)
    )
    results = predict_files(
        keras.Sequential([keras.Input((RESOLUTION, RESOLUTION, 3)), wait_and_answer]),
        [path.name for path in paths],
        paths,
        resolution=RESOLUTION,
        resize="crop",
    )
    assert [(result.path.name, result.top[0].name) for result in results] == [(path.name, path.name) for path in paths]


def test_an_output_that_is_not_finite_is_refused() -> None:
    with pytest.raises(RunError, match="weights have diverged"):
        top_k(np.array([[0, np.nan]]), ["a", "b"])


def test_top_k_sorts_by_probability_and_breaks_ties_by_class_order() -> None:
    [first, tied] = top_k(np.array([[0, 2, 1, -1], [5, 5, 5, 5]], np.float32), ["a", "b", "c", "d"], 3)
    assert [label.name for label in first] == ["b", "c", "a"]
    assert [label.name for label in tied] == ["a", "b", "c"]
    assert tied[0].probability == pytest.approx(0.25)
    [large] = top_k(np.array([[1e4, 0]], np.float32), ["a", "b"])
    assert large == (Label("a", 1.0), Label("b", 0.0))


def test_table_shows_labels_with_probabilities_and_markup_as_text() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(
        format_prediction(FilePrediction(Path("[b]x.jpg"), (Label("giant panda", 0.956), Label("[red]fox", 0.01))))
    )
    console.print(format_prediction(FilePrediction(Path("y.jpg"), error="is not an image")))
    text = console.export_text()
    for part in ("[b]x.jpg", "95.6%", "giant panda", "[red]fox", "y.jpg", "is not an image"):
        assert part in text
