"""Rows in a mapped file: those of the manifest; the file has no name, and goes when they go."""

import gc
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.input_pipeline import IndexBatch, memory_mapped_table
from pipeline.data.manifest import CHUNK_ROWS, Manifest
from pipeline.errors import DataError

KEYS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), min_size=1, max_size=20)


def manifest_of(keys: list[str]) -> Manifest:
    number = np.arange(len(keys))
    table = {
        "key": keys,
        "label": number % 7,
        "height": number + 10,
        "width": number + 20,
        "orientation": (number % 8 + 1).astype(np.uint8),
    }
    return Manifest(tuple("abcdefg"), pd.DataFrame(table))


def check(manifest: Manifest, found: IndexBatch, indices: np.ndarray) -> None:
    table = manifest.table.iloc[indices]
    assert found.index.numpy().tolist() == indices.tolist()
    assert [key.decode() for key in found.key.numpy()] == table["key"].tolist()
    for name in ("label", "height", "width", "orientation"):
        assert getattr(found, name).numpy().tolist() == table[name].tolist()


@settings(max_examples=50, deadline=None)
@given(keys=KEYS, data=st.data())
def test_rows_are_those_of_the_manifest(keys: list[str], data: st.DataObject) -> None:
    manifest = manifest_of(keys)
    indices = np.array(data.draw(st.lists(st.integers(0, len(keys) - 1), min_size=1)), np.int64)
    places = np.array(data.draw(st.lists(st.integers(0, len(indices) - 1))), np.int64)
    check(manifest, memory_mapped_table(manifest, indices)(tf.constant(places, tf.int64)), indices[places])


def test_more_rows_than_are_written_at_once() -> None:
    manifest = manifest_of([f"class/{number}.jpg" for number in range(CHUNK_ROWS + 10)])
    indices = np.arange(CHUNK_ROWS + 5, dtype=np.int64)[::-1]
    places = np.array([0, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 4])
    check(manifest, memory_mapped_table(manifest, indices)(tf.constant(places, tf.int64)), indices[places])


def test_a_column_in_several_pieces() -> None:
    manifest = manifest_of(["a", "bc", "d"])
    table = pd.concat([manifest.table] * 3, ignore_index=True)
    indices = np.array([8, 1, 4, 6])
    for some in (indices, np.arange(9)):
        check(
            Manifest(manifest.class_names, table),
            memory_mapped_table(Manifest(manifest.class_names, table), some)(tf.range(len(some))),
            some,
        )


def test_the_file_has_no_name_and_goes_with_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = memory_mapped_table(manifest_of(["a", "b"]), np.arange(2))
    assert not list(tmp_path.iterdir())
    assert mappings(tmp_path) == 2
    assert rows(tf.constant([1])).key.numpy().tolist() == [b"b"]
    del rows
    gc.collect()
    assert mappings(tmp_path) == 0


def test_no_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    with pytest.raises(
        DataError, match=r"not there: the table of 1 images cannot be written \(No such file or directory\); set TMPDIR"
    ):
        memory_mapped_table(manifest_of(["a"]), np.zeros(1, np.int64))


def mappings(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())
