"""The stream: purity, completeness, order, padding; and the rows of the manifest in a mapped file."""

import gc
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.schema import Config
from pipeline.data import input_pipeline, randaugment
from pipeline.data.input_pipeline import (
    IndexBatch,
    evaluation_stream,
    memory_mapped_table,
    steps_per_epoch,
    training_stream,
)
from pipeline.data.manifest import CHUNK_ROWS, Manifest
from pipeline.data.preprocessing import preprocess
from pipeline.data.sources.base import DataSource
from pipeline.distributed.sharding import Shard
from pipeline.errors import DataError

SIDE = 32
EVERYTHING = {"randaugment": {"num_ops": 2, "magnitude": 9}, "mixup": 0.4, "cutmix": 1.0}
CROP_AND_FLIP: list[Any] = ["RandomResizedCrop", "HorizontalFlip"]
NOISY: list[Any] = [*CROP_AND_FLIP, {"GaussNoise": {"p": 0.5}}]
KEYS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), min_size=1, max_size=20)


@pytest.fixture(autouse=True, scope="module")
def traced_once() -> Iterator[None]:
    """Trace what the streams have in common once, with three of RandAugment's operations: tracing takes most time.

    Streams with albumentations each keep transforms of their own.
    """
    every_operation = randaugment.operations

    def three_operations(magnitude: float) -> dict[str, randaugment.Operation]:
        return {name: every_operation(magnitude)[name] for name in ("Rotate", "Color", "Cutout")}

    def cached(build: Callable[..., Any]) -> Callable[..., Any]:
        built: dict[str, Any] = {}

        def build_once(*arguments: Any) -> Any:
            if getattr(arguments[0], "backend", "native") != "native":
                return build(*arguments)
            key = repr(arguments)
            if key not in built:
                built[key] = tf.function(build(*arguments), autograph=False)
            return built[key]

        return build_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randaugment, "operations", three_operations)
        for name in ("image_augmentation", "randaugment", "mixup_and_cutmix"):
            patch.setattr(input_pipeline, name, cached(getattr(input_pipeline, name)))
        yield


class Memory:
    """Images in memory; some JPEG, some PNG, of many sizes and orientations."""

    class_names = ("a", "b", "c")

    def __init__(self, count: int) -> None:
        self.files, self.sizes = [], []
        for number in range(count):
            rng = np.random.default_rng(number)
            width, height = rng.integers(36, 90, 2)
            image = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize(
                (int(width), int(height)), Image.Resampling.BICUBIC
            )
            file = io.BytesIO()
            image.save(file, "JPEG" if number % 3 else "PNG")
            self.files.append(file.getvalue())
            self.sizes.append((height, width))

    def read(self, key: str) -> bytes:
        return self.files[int(key)]

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        return tf.gather(tf.constant(self.files), tf.strings.to_number(key, tf.int32))


def make(count: int, *, test: int = 0) -> tuple[Manifest, Memory]:
    source = Memory(count)
    table = pd.DataFrame(
        {
            "key": [str(n) for n in range(count)],
            "label": np.arange(count, dtype=np.int32) % 3,
            "split": ["test" if n < test else "train" for n in range(count)],
            "group": np.arange(count),
            "sha256": "",
            "height": np.array([h for h, _ in source.sizes], np.int32),
            "width": np.array([w for _, w in source.sizes], np.int32),
            "orientation": (np.arange(count) % 8 + 1).astype(np.uint8),
        }
    )
    return Manifest(source.class_names, table), source


def config(
    batch: int = 8,
    workers: int | None = None,
    seed: int = 1,
    backend: str = "native",
    transforms: Any = (),
    **augment: Any,
) -> Config:
    return Config.model_validate(
        {
            "seed": seed,
            "model": {"variant": "b0", "weights": None, "resolution": SIDE},
            "data": {"source": "digits"},
            "augment": {"backend": backend, "transforms": list(transforms or CROP_AND_FLIP), **augment},
            "train": {"global_batch_size": batch},
            "runtime": {"num_workers": workers},
        }
    )


def batches_of(manifest: Manifest, source: DataSource, config: Config, **stream_kwargs: Any) -> tf.data.Dataset:
    return training_stream(manifest, source, config, config.train.global_batch_size, **stream_kwargs)


def take(dataset: tf.data.Dataset, count: int) -> list[tuple[np.ndarray, ...]]:
    return list(dataset.take(count).as_numpy_iterator())


def assert_equal(first: list[tuple[np.ndarray, ...]], second: list[tuple[np.ndarray, ...]]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("images", "batch", "steps"), [(100, 8, 12), (96, 8, 12), (5, 8, 1), (8, 8, 1)])
def test_an_epoch_is_the_whole_batches_in_the_images(images: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(images, batch) == steps


def test_batches_have_the_shapes_and_types_that_the_trainer_expects() -> None:
    stream = batches_of(*make(10), config(mixup=0.2))
    assert stream.element_spec == (
        tf.TensorSpec((8, SIDE, SIDE, 3), tf.uint8),
        tf.TensorSpec((8, 3), tf.float32),
        tf.TensorSpec((8,), tf.float32),
        tf.TensorSpec((8,), tf.int64),
    )
    assert stream.cardinality() == tf.data.INFINITE_CARDINALITY


@pytest.mark.parametrize(
    "augment",
    [{}, EVERYTHING, {"backend": "albumentations", "transforms": NOISY, "mixup": 0.4}],
    ids=["native", "all", "albu"],
)
def test_the_stream_is_a_function_of_the_step_whatever_the_workers(augment: dict[str, Any]) -> None:
    data = make(21)
    whole = take(batches_of(*data, config(workers=1, **augment)), 7)
    for workers, start in ((4, 0), (2, 3)):
        assert_equal(
            take(batches_of(*data, config(workers=workers, **augment), start_step=start), 7 - start), whole[start:]
        )


@pytest.mark.parametrize(
    "cases",
    [[(4, 1)], pytest.param([(2, 0), (2, 3), (4, 0), (4, 3)], marks=pytest.mark.slow)],
    ids=["four from the second step", "others"],
)
@pytest.mark.parametrize(
    "augment",
    [EVERYTHING, {"backend": "albumentations", "transforms": NOISY, "mixup": 0.4}],
    ids=["native", "albumentations"],
)
def test_shares_are_the_parts_of_the_batches_to_the_byte(augment: dict[str, Any], cases: list[tuple[int, int]]) -> None:
    """Whatever process an image falls to, it looks the same, and so does the one that it is mixed with."""
    data, settings = make(21), config(batch=32, **augment)
    steps = max(start for _, start in cases) + 1
    whole = take(batches_of(*data, settings), steps)
    for shares, start in cases:
        parts = [
            take(batches_of(*data, settings, start_step=start, shard=Shard(n, shares)), steps - start)
            for n in range(shares)
        ]
        joined = [
            tuple(np.concatenate(column) for column in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)
        ]
        assert_equal(joined, whole[start:])


@pytest.mark.parametrize(
    "augment",
    [{}, {"mixup": 0.4, "cutmix": 1.0}, pytest.param(EVERYTHING, marks=pytest.mark.slow)],
    ids=["plain", "mixed", "everything"],
)
def test_strides_are_the_steps_in_turn(augment: dict[str, Any]) -> None:
    data, settings = make(21), config(batch=16, **augment)
    whole = take(batches_of(*data, settings), 8)
    parts = [take(batches_of(*data, settings, start_step=2 + n, stride=3, shard=Shard(1, 2)), 2) for n in range(3)]
    for n, part in enumerate(parts):
        assert_equal(part, [tuple(column[8:] for column in batch) for batch in whole[2 + n :: 3]])


def test_a_share_reads_only_its_own_images() -> None:
    manifest, source = make(64)
    read: list[bytes] = []

    def noted(key: bytes) -> bytes:
        read.append(key)
        return source.read(key.decode())

    source.read_tf = lambda key: tf.ensure_shape(tf.numpy_function(noted, [key], tf.string), ())  # type: ignore[method-assign]
    batches = take(batches_of(manifest, source, config(workers=1), start_step=16, shard=Shard(1, 4)), 8)
    seen = np.concatenate([index for *_, index in batches])
    ahead = 3 * 2 + 2  # batches of two that may wait ready, and what is on its way
    assert [int(key) for key in read[: len(seen)]] == seen.tolist()
    assert len(read) <= len(seen) + ahead


def test_shares_of_an_evaluation_hold_every_image_exactly_once() -> None:
    data = make(21, test=13)
    rows = data[0].indices("test")
    whole = take(evaluation_stream(*data, config(), rows, batch_size=8), 9)
    for shares in (2, 4):
        parts = [
            take(evaluation_stream(*data, config(), rows, batch_size=8, shard=Shard(n, shares)), 9)
            for n in range(shares)
        ]
        joined = [
            tuple(np.concatenate(column) for column in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)
        ]
        assert_equal(joined, whole)
        for some in ([whole], parts):
            index = np.concatenate([batch[3] for part in some for batch in part])
            assert sorted(index[index >= 0]) == list(range(13))


def test_every_image_comes_exactly_once_per_pass_in_ever_new_orders() -> None:
    manifest, source = make(21, test=4)
    index = np.concatenate([batch[3] for batch in take(batches_of(manifest, source, config()), 17)])  # 8 passes of 17
    passes = index.reshape(8, 17)
    for one in passes:
        assert sorted(one) == list(range(4, 21))
    assert len({tuple(one) for one in passes}) == 8


def test_labels_belong_to_their_images() -> None:
    for _, labels, weights, index in take(batches_of(*make(21), config()), 5):
        np.testing.assert_array_equal(labels, np.eye(3)[index % 3])
        np.testing.assert_array_equal(weights, np.ones(8))


def test_the_same_image_looks_different_in_every_pass_and_under_every_seed() -> None:
    manifest, source = make(3)
    seen = set()
    for seed in (1, 2):
        for images, _, _, index in take(batches_of(manifest, source, config(batch=3, seed=seed)), 4):
            seen.add(images[list(index).index(1)].tobytes())
    assert len(seen) == 8


def test_fewer_images_than_a_batch_wrap_around() -> None:
    data = make(3)
    batches = take(batches_of(*data, config(mixup=0.2)), 3)
    index = np.concatenate([batch[3] for batch in batches])
    assert [sorted(index[i : i + 3]) for i in range(0, 24, 3)] == [[0, 1, 2]] * 8
    assert_equal(take(batches_of(*data, config(mixup=0.2), start_step=2), 1), batches[2:])


def test_mixing_stays_inside_groups_of_the_batch() -> None:
    manifest, source = make(16)
    plain = take(batches_of(manifest, source, config(batch=16)), 4)
    blended = take(batches_of(manifest, source, config(batch=16, mixup=1.0)), 4)
    for (images, _, _, index), (mixed, _, _, mixed_index) in zip(plain, blended, strict=True):
        np.testing.assert_array_equal(index, mixed_index)
        for start in (0, 8):
            group, result = images[start : start + 8].astype(float), mixed[start : start + 8].astype(float)
            low, high = group.min(0), group.max(0)
            assert (result >= low - 0.5).all()
            assert (result <= high + 0.5).all()
            # whatever the weights, each mixed image lies in the span of two of its own group
            for image in result:
                residuals = []
                for a in range(8):
                    for b in range(a):
                        direction = (group[a] - group[b]).ravel()
                        offset = (image - group[b]).ravel()
                        weight = np.clip(direction @ offset / (direction @ direction), 0, 1)
                        residuals.append(np.abs(offset - weight * direction).max())
                assert min(residuals) <= 1


@pytest.mark.parametrize(("count", "batch"), [(21, 8), (16, 8), (3, 8), (1, 1)])
def test_evaluation_holds_every_image_exactly_once_in_order(count: int, batch: int) -> None:
    manifest, source = make(count + 5, test=count)
    stream = evaluation_stream(manifest, source, config(**EVERYTHING), manifest.indices("test"), batch_size=batch)
    assert stream.cardinality() == -(-count // batch)
    images, labels, weights, index = (np.concatenate(part) for part in zip(*stream.as_numpy_iterator(), strict=True))
    np.testing.assert_array_equal(index[:count], np.arange(count))
    np.testing.assert_array_equal(weights, np.arange(len(index)) < count)
    assert (index[count:] == -1).all()
    assert not images[count:].any()
    assert not labels[count:].any()
    np.testing.assert_array_equal(labels[:count], np.eye(3)[np.arange(count) % 3])
    for place in range(count):
        orientation = tf.constant(manifest.table.orientation[place])
        expected = preprocess(tf.constant(source.files[place]), orientation, resolution=SIDE, resize="crop")
        np.testing.assert_array_equal(images[place], expected)


def test_an_empty_split_is_refused() -> None:
    manifest, source = make(4)
    with pytest.raises(DataError, match="split holds no images"):
        evaluation_stream(manifest, source, config(), manifest.indices("val"), batch_size=2)


def test_starting_late_does_not_decode_what_it_skips() -> None:
    manifest, source = make(21)
    read: list[bytes] = []

    class Counting:
        class_names = source.class_names

        def read(self, key: str) -> bytes:
            return source.read(key)

        def read_tf(self, key: tf.Tensor) -> tf.Tensor:
            return tf.py_function(lambda k: (read.append(k.numpy()), source.read_tf(k))[1], [key], tf.string)

    take(batches_of(manifest, Counting(), config(workers=1), start_step=10_000), 1)
    assert len(read) < 8 * 6  # the batch, and what is fetched ahead


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """The table of so many has 34 MB; it lies in a mapped file, and nothing makes a copy of it."""
    manifest, source = make(10)

    def used(repeats: int) -> int:
        table = manifest.table.iloc[np.tile(np.arange(10), repeats)].reset_index(drop=True)
        many = Manifest(manifest.class_names, table)
        before = anonymous_bytes()
        batches = iter(batches_of(many, source, config()))
        assert len(next(batches)[0]) == 8
        return anonymous_bytes() - before

    used(1)
    few, many = used(7_000), used(60_000)
    assert many - few < 16 * 2**20  # what the process holds moves by some MiB of itself


def anonymous_bytes() -> int:
    """Of this process's memory, what no file stands behind."""
    gc.collect()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


# --- the mapped file --------------------------------------------------------------------------------------------------


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


def assert_rows(manifest: Manifest, found: IndexBatch, indices: np.ndarray) -> None:
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
    assert_rows(manifest, memory_mapped_table(manifest, indices)(tf.constant(places, tf.int64)), indices[places])


def test_more_rows_than_are_written_at_once() -> None:
    manifest = manifest_of([f"class/{number}.jpg" for number in range(CHUNK_ROWS + 10)])
    indices = np.arange(CHUNK_ROWS + 5, dtype=np.int64)[::-1]
    places = np.array([0, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 4])
    assert_rows(manifest, memory_mapped_table(manifest, indices)(tf.constant(places, tf.int64)), indices[places])


def test_a_column_in_several_pieces() -> None:
    manifest = manifest_of(["a", "bc", "d"])
    table = pd.concat([manifest.table] * 3, ignore_index=True)
    indices = np.array([8, 1, 4, 6])
    for some in (indices, np.arange(9)):
        assert_rows(
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


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    with pytest.raises(
        DataError, match=r"not there: the table of 1 image cannot be written \(No such file or directory\); set TMPDIR"
    ):
        memory_mapped_table(manifest_of(["a"]), np.zeros(1, np.int64))


def mappings(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())
