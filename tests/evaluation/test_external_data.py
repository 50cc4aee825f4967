"""Labeled data whose classes are some of the network's, under names of their own."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.data.pack_inputs import SourceInput
from pipeline.data.packing import ShardLimit, pack
from pipeline.data.sources.files import FileSource
from pipeline.data.sources.folder import open_folder
from pipeline.errors import DataError, WeightsError
from pipeline.evaluation.external_data import SPLIT, align, open_external_data, scan_external_data
from pipeline.evaluation.metrics import evaluate_predictions
from pipeline.evaluation.predictor import Predictions
from pipeline.models.weights.sources import imagenet_classes

IMAGENET = imagenet_classes()
ANIMALS = (("ant", "bee", "cat", "dog", "eel"),)


def predictions(labels: list[int], logits: list[list[float]]) -> Predictions:
    return Predictions(np.arange(len(labels)), np.array(labels, np.int32), np.array(logits, np.float32))


def test_classes_go_by_synset_or_by_name_to_their_outputs() -> None:
    alignment = align(["n02510455", "goldfish", "zebra"], IMAGENET)
    assert alignment.labels.tolist() == [388, 1, 340]
    assert alignment.class_names[388] == "n02510455 giant panda"
    assert alignment.rows == tuple((index,) for index in range(1000))


def test_a_class_map_names_the_others(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("Katze: cat\n")
    assert align(["Katze", "bee"], ANIMALS, tmp_path / "map.yaml").labels.tolist() == [2, 1]


def test_every_class_of_the_model_competes_and_not_only_the_datas() -> None:
    alignment = align(["dog", "cat"], ANIMALS)
    aligned = alignment(predictions([0, 1, 1], [[0, 0, 1, 9, 0], [9, 0, 8, 0, 0], [0, 0, 9, 0, 0]]))
    evaluation = evaluate_predictions(aligned, alignment.class_names, "images")
    assert aligned.labels.tolist() == [3, 2, 2]
    assert evaluation.accuracy == pytest.approx(2 / 3)
    assert evaluation.metrics["balanced_accuracy"] == pytest.approx(0.75)
    assert evaluation.per_class["support"].tolist() == [0, 0, 2, 1, 0]


def test_a_class_of_several_outputs_has_the_sum_of_their_probabilities(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("pet: [dog, cat]\n")
    alignment = align(["eel", "pet"], ANIMALS, tmp_path / "map.yaml")
    assert alignment.class_names == ("ant", "bee", "pet", "eel")
    assert alignment.labels.tolist() == [3, 2]
    logits = np.log([[0.1, 0.15, 0.2, 0.15, 0.4]])
    merged = alignment(predictions([1], logits.tolist()))
    np.testing.assert_allclose(np.exp(merged.logits), [[0.1, 0.15, 0.35, 0.4]], rtol=1e-6)
    assert merged.labels.tolist() == [2]


def test_classes_that_nothing_matches_are_named_with_what_they_may_mean() -> None:
    with pytest.raises(DataError) as caught:
        align(["gaint panda", "zebra", "missile"], IMAGENET)
    assert "2 of the data's 3 classes are not among the model's 1000" in str(caught.value)
    assert "gaint panda; did you mean 'giant panda'?" in str(caught.value)
    assert "missile may mean n03773504 missile or n04008634 missile" in str(caught.value)
    assert "--class-map" in str(caught.value)


def test_two_classes_of_one_output_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="n02510455 and giant panda both match the model's class n02510455 giant panda"):
        align(["n02510455", "giant panda"], IMAGENET)


def test_a_class_map_of_other_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("tiger: cat\n")
    with pytest.raises(WeightsError, match=r"map\.yaml: 'tiger' is none of the data's classes"):
        align(["cat", "dog"], ANIMALS, tmp_path / "map.yaml")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, place in enumerate(("train/cat", "train/dog", "train/dog", "test/cat", "test/dog")):
        folder = tmp_path / "images" / place
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (40 * number, 100, 200)).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(("split", "count"), [(None, 5), ("test", 2)])
def test_all_images_are_measured_or_those_of_one_split(images: Path, split: str | None, count: int) -> None:
    manifest = scan_external_data(*open_external_data(images, split), lambda done, of: None)
    assert len(manifest.indices(SPLIT)) == len(manifest.table) == count
    assert {Path(key).parent.name for key in manifest.table["key"]} == {"cat", "dog"}


def test_a_pack_is_measured_as_what_was_packed(images: Path, tmp_path: Path) -> None:
    pack(SourceInput(open_folder(images)), tmp_path / "pack", ShardLimit(2**20, None), lambda done, of: None)
    (tmp_path / "pack" / "cat").mkdir()  # a pack is recognized by its description, whatever lies beside it
    tables = [
        scan_external_data(*open_external_data(data, "test"), lambda done, of: None).table
        for data in (images, tmp_path / "pack")
    ]
    assert len(tables[0]) == 2
    pd.testing.assert_frame_equal(*tables)


def test_measuring_a_split_leaves_what_is_known_of_the_others(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan_external_data(*open_external_data(images, None), lambda done, of: None)
    Image.new("RGB", (40, 40), "white").save(images / "test" / "cat" / "3.png")
    scan_external_data(*open_external_data(images, "test"), lambda done, of: None)
    read: list[str] = []
    monkeypatch.setattr(FileSource, "read", lambda self, key: read.append(key))
    scan_external_data(*open_external_data(images, None), lambda done, of: None)
    assert read == []


def test_images_of_a_single_class_are_measured(images: Path) -> None:
    for place in ("train/dog", "test/dog"):
        shutil.rmtree(images / place)
    assert len(scan_external_data(*open_external_data(images, None), lambda done, of: None).table) == 2


def test_a_split_that_the_data_do_not_bring_is_refused(images: Path) -> None:
    with pytest.raises(DataError, match="have no split val; omit --split"):
        open_external_data(images, "val")


def test_a_csv_is_recognized_by_its_suffix(images: Path) -> None:
    (images.parent / "list.CSV").write_text("path,label\nimages/test/cat/3.png,cat\nimages/test/dog/4.png,dog\n")
    assert open_external_data(images.parent / "list.CSV", None)[0].class_names == ("cat", "dog")
