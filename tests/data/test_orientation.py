"""EXIF rotation is applied, and the same everywhere: the scan, training by both backends, evaluation and prediction."""

import io
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from pipeline.config.schema import Config
from pipeline.data.augmentation import Augmentation, image_augmentation
from pipeline.data.input_pipeline import evaluation_stream
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DataSource
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import scan
from pipeline.evaluation.predict import predict_files

SIDE = 32
UNDONE_BY = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # orientation to the one that turns the other way
TURNS = {
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    },
}
KINDS: dict[str, dict[str, object]] = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 100, "subsampling": 0},
}


def as_a_camera_stores_it(upright: Image.Image, kind: str, orientation: int) -> bytes:
    stored = upright if orientation == 1 else upright.transpose(TURNS[UNDONE_BY[orientation]])
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored.save(file, kind, exif=exif, **KINDS[kind])
    return file.getvalue()


@pytest.fixture(scope="module")
def oriented_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, DataSource, Config]:
    """One image, 60 x 84, in three formats and eight orientations.

    In a/ as it is, in b/ with its colors inverted.
    """
    root = tmp_path_factory.mktemp("turned")
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    upright = coarse.resize((84, 60), Image.Resampling.BICUBIC)
    for name, image in (("a", upright), ("b", Image.eval(upright, lambda value: 255 - value))):
        (root / "test" / name).mkdir(parents=True)
        (root / "train" / name).mkdir(parents=True)
        for kind in KINDS:
            for orientation in range(1, 9):
                (root / "test" / name / f"{kind}{orientation}.{kind.lower()}").write_bytes(
                    as_a_camera_stores_it(image, kind, orientation)
                )
        (root / "train" / name / "other.png").write_bytes(as_a_camera_stores_it(image.rotate(90), "PNG", 1))
    config = Config.model_validate(
        {
            "model": {"variant": "b0", "weights": None, "resolution": SIDE},
            "data": {"source": "folder", "path": str(root), "on_leak": "warn"},
        }
    )
    source = open_source(config.data)
    return root, scan(source, config.data, seed=0), source, config


def build_augmentation(settings: Config) -> Augmentation:
    return image_augmentation(settings.augment, settings.variant.resolution, settings.data.resize)


def same(oriented_files: dict[str, np.ndarray]) -> None:
    """Whether images, by the name of their file, show the same; those without loss to the bit."""
    for key, image in oriented_files.items():
        upright = oriented_files[f"{key.rpartition('/')[0]}/PNG1.png"].astype(int)
        if key.endswith(".jpeg"):
            assert np.abs(image - upright).mean() < 3, key
        else:
            np.testing.assert_array_equal(image, upright, key)


def test_the_scan_sees_one_image_in_all_of_them(oriented_files):
    _, manifest, _, _ = oriented_files
    table = manifest.table[manifest.table["split"] == "test"]
    assert table["orientation"].tolist() == [int(key[-1]) for key in table["key"].str.rpartition(".")[0]]
    assert table.groupby("label")["group"].nunique().tolist() == [1, 1]
    sideways = table["orientation"] >= 5
    assert set(zip(table["height"][sideways], table["width"][sideways], strict=True)) == {(84, 60)}
    assert set(zip(table["height"][~sideways], table["width"][~sideways], strict=True)) == {(60, 84)}


def test_evaluation_turns_them_upright(oriented_files):
    _, manifest, source, config = oriented_files
    seen = {}
    for images, _, weights, index in evaluation_stream(
        manifest, source, config, manifest.indices("test"), batch_size=16
    ).as_numpy_iterator():
        seen |= {
            manifest.table["key"][i]: image for image, weight, i in zip(images, weights, index, strict=True) if weight
        }
    assert len(seen) == 48
    same(seen)


@pytest.mark.parametrize("backend", ["native", "albumentations"])
@pytest.mark.parametrize(
    "transforms", [[], [{"RandomResizedCrop": {"scale": [0.2, 0.6]}}, "HorizontalFlip"]], ids=["plain", "cropped"]
)
def test_training_crops_and_flips_the_upright_image(oriented_files, backend, transforms):
    _, manifest, source, config = oriented_files
    changed = {**config.model_dump(mode="json"), "augment": {"backend": backend, "transforms": transforms}}
    augment = tf.function(build_augmentation(Config.model_validate(changed)))
    for seed in range(4):
        rows = manifest.table[manifest.table["split"] == "test"].itertuples()
        seen = {
            row.key: augment(
                source.read_tf(tf.constant(row.key)),
                tf.constant(row.height),
                tf.constant(row.width),
                tf.constant(row.orientation, tf.int32),
                tf.constant([7, seed], tf.int64),
            ).numpy()
            for row in rows
        }
        same(seen)


def test_prediction_turns_them_upright(oriented_files):
    root, manifest, _, _ = oriented_files
    keras.utils.set_random_seed(1)
    inputs = keras.Input((SIDE, SIDE, 3))
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))))
    keys = [key for key in manifest.table["key"] if key.startswith("test/a/")]
    predictions = predict_files(model, list("wxyz"), [root / key for key in keys], resolution=SIDE, resize="crop")
    probabilities = {
        key: {label.name: label.probability for label in p.top} for key, p in zip(keys, predictions, strict=True)
    }
    for key, found in probabilities.items():
        assert found == pytest.approx(probabilities["test/a/PNG1.png"], abs=0.05 if key.endswith(".jpeg") else 1e-6), (
            key
        )
