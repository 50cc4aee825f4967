"""The manifest says all that training sees, and comes back as it was written."""

import csv
import hashlib
import json

import numpy as np
import pytest

from pipeline.config.data import DataConfig
from pipeline.data.manifest import Manifest, SkippedImage
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import scan
from pipeline.errors import DataError


@pytest.fixture(scope="module")
def digits() -> Manifest:
    config = DataConfig(source="digits")
    return scan(open_source(config), config, seed=42)


def test_every_index_is_in_one_split_and_counts_agree(digits):
    parts = [digits.indices(split) for split in ("train", "val", "test")]
    assert all(part.dtype == np.int64 for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(1797))
    counts = digits.class_counts()
    assert counts.index.tolist() == list("0123456789")
    assert counts.columns.tolist() == ["train", "val", "test"]
    assert counts.sum().tolist() == [len(part) for part in parts]
    assert counts.to_numpy().sum(1).tolist() == np.bincount(digits.table["label"]).tolist()
    assert np.abs(counts["test"] / counts.sum(axis=1) - 0.2).max() < 0.005


def test_a_saved_manifest_comes_back_equal(tmp_path, digits):
    noted = Manifest(digits.class_names, digits.table, ("a note",), (SkippedImage("x.jpg", "is empty"),))
    noted.save(tmp_path / "manifest.parquet")
    loaded = Manifest.load(tmp_path / "manifest.parquet")
    assert (loaded.class_names, loaded.notes, loaded.skipped_images) == (
        noted.class_names,
        noted.notes,
        noted.skipped_images,
    )
    assert loaded.table.equals(noted.table)
    assert loaded.table.dtypes.equals(noted.table.dtypes)
    assert loaded.digest() == noted.digest()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.parquet"]


def test_a_file_that_is_no_manifest_is_refused(tmp_path, digits):
    digits.save(tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-100])
    digits.table.to_parquet(tmp_path / "other.parquet")
    for name in ("cut.parquet", "other.parquet", "missing.parquet"):
        with pytest.raises(DataError, match=f"{name} is not a readable manifest"):
            Manifest.load(tmp_path / name)


def test_the_digest_changes_with_all_that_training_sees(digits):
    changed = {digits.digest(), Manifest(tuple("abcdefghij"), digits.table).digest()}
    for column, value in (("label", 9), ("split", "none"), ("key", "x"), ("sha256", "00")):
        table = digits.table.copy()
        table.loc[5, column] = value if table.loc[5, column] != value else 8
        changed.add(Manifest(digits.class_names, table).digest())
    assert len(changed) == 6


def test_the_digest_is_that_of_whole_columns(digits, monkeypatch):
    whole = hashlib.sha256()
    for column in (
        list(digits.class_names),
        *(digits.table[name].tolist() for name in ("key", "label", "split", "sha256")),
    ):
        whole.update(json.dumps(column).encode())
    monkeypatch.setattr("pipeline.data.manifest.CHUNK_ROWS", 100)
    assert digits.digest() == whole.hexdigest()


def test_what_was_left_out_is_written_as_csv(digits, tmp_path):
    skipped_images = (
        SkippedImage('a, "b".jpg', "is empty"),
        SkippedImage("c.jpg", "has the label 9; valid are 0 to 1"),
    )
    Manifest(digits.class_names, digits.table, (), skipped_images).write_skipped_images(
        tmp_path / "report" / "skipped_images.csv"
    )
    with (tmp_path / "report" / "skipped_images.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["path", "problem"], *map(list, skipped_images)]
