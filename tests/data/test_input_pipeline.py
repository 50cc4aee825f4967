"""The stream: purity, completeness, order, padding."""

import gc
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

from pipeline.config.schema import Config
from pipeline.data.input_pipeline import evaluation_stream, steps_per_epoch, training_stream
from pipeline.data.manifest import Manifest
from pipeline.data.preprocessing import preprocess
from pipeline.distributed.sharding import Shard
from pipeline.errors import DataError

SIDE = 32
EVERYTHING = {"randaugment": {"num_ops": 2, "magnitude": 9}, "mixup": 0.4, "cutmix": 1.0}
CROP_AND_FLIP: list[Any] = ["RandomResizedCrop", "HorizontalFlip"]
NOISY: list[Any] = [*CROP_AND_FLIP, {"GaussNoise": {"p": 0.5}}]


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
    stream = training_stream(*make(10), config(mixup=0.2))
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
    whole = take(training_stream(*data, config(workers=1, **augment)), 7)
    for workers, start in ((4, 0), (2, 3)):
        assert_equal(
            take(training_stream(*data, config(workers=workers, **augment), start_step=start), 7 - start), whole[start:]
        )


@pytest.mark.parametrize(
    "augment",
    [EVERYTHING, {"backend": "albumentations", "transforms": NOISY, "mixup": 0.4}],
    ids=["native", "albumentations"],
)
@pytest.mark.parametrize("shares", [2, 4])
def test_shares_are_the_parts_of_the_batches_to_the_byte(augment: dict[str, Any], shares: int) -> None:
    """Whatever process an image falls to, it looks the same, and so does the one that it is mixed with."""
    data, settings = make(21), config(batch=32, **augment)
    whole = take(training_stream(*data, settings), 4)
    for start in (0, 3):
        parts = [
            take(training_stream(*data, settings, start_step=start, shard=Shard(n, shares)), 4 - start)
            for n in range(shares)
        ]
        joined = [
            tuple(np.concatenate(column) for column in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)
        ]
        assert_equal(joined, whole[start:])


@pytest.mark.parametrize("augment", [{}, EVERYTHING], ids=["plain", "everything"])
def test_strides_are_the_steps_in_turn(augment: dict[str, Any]) -> None:
    data, settings = make(21), config(batch=16, **augment)
    whole = take(training_stream(*data, settings), 8)
    parts = [take(training_stream(*data, settings, start_step=2 + n, stride=3, shard=Shard(1, 2)), 2) for n in range(3)]
    for n, part in enumerate(parts):
        assert_equal(part, [tuple(column[8:] for column in batch) for batch in whole[2 + n :: 3]])


def test_a_share_reads_only_its_own_images() -> None:
    manifest, source = make(64)
    read: list[bytes] = []

    def noted(key: bytes) -> bytes:
        read.append(key)
        return source.read(key.decode())

    source.read_tf = lambda key: tf.ensure_shape(tf.numpy_function(noted, [key], tf.string), ())  # type: ignore[method-assign]
    batches = take(training_stream(manifest, source, config(workers=1), start_step=16, shard=Shard(1, 4)), 8)
    seen = np.concatenate([index for *_, index in batches])
    ahead = 3 * 2 + 2  # batches of two that may wait ready, and what is on its way
    assert [int(key) for key in read[: len(seen)]] == seen.tolist()
    assert len(read) <= len(seen) + ahead


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_shares_of_an_evaluation_hold_every_image_exactly_once(shares: int) -> None:
    data = make(21, test=13)
    rows = data[0].indices("test")
    whole = take(evaluation_stream(*data, config(), rows, batch_size=8), 9)
    parts = [
        take(evaluation_stream(*data, config(), rows, batch_size=8, shard=Shard(n, shares)), 9) for n in range(shares)
    ]
    joined = [
        tuple(np.concatenate(column) for column in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)
    index = np.concatenate([batch[3] for part in parts for batch in part])
    assert sorted(index[index >= 0]) == list(range(13))


def test_every_image_comes_exactly_once_per_pass_in_ever_new_orders() -> None:
    manifest, source = make(21, test=4)
    index = np.concatenate(
        [batch[3] for batch in take(training_stream(manifest, source, config()), 17)]
    )  # 8 passes of 17
    passes = index.reshape(8, 17)
    for one in passes:
        assert sorted(one) == list(range(4, 21))
    assert len({tuple(one) for one in passes}) == 8


def test_labels_belong_to_their_images() -> None:
    for _, labels, weights, index in take(training_stream(*make(21), config()), 5):
        np.testing.assert_array_equal(labels, np.eye(3)[index % 3])
        np.testing.assert_array_equal(weights, np.ones(8))


def test_the_same_image_looks_different_in_every_pass_and_under_every_seed() -> None:
    manifest, source = make(3)
    seen = set()
    for seed in (1, 2):
        for images, _, _, index in take(training_stream(manifest, source, config(batch=3, seed=seed)), 4):
            seen.add(images[list(index).index(1)].tobytes())
    assert len(seen) == 8


def test_fewer_images_than_a_batch_wrap_around() -> None:
    data = make(3)
    batches = take(training_stream(*data, config(mixup=0.2)), 3)
    index = np.concatenate([batch[3] for batch in batches])
    assert [sorted(index[i : i + 3]) for i in range(0, 24, 3)] == [[0, 1, 2]] * 8
    assert_equal(take(training_stream(*data, config(mixup=0.2), start_step=2), 1), batches[2:])


def test_mixing_stays_inside_groups_of_the_batch() -> None:
    manifest, source = make(16)
    plain = take(training_stream(manifest, source, config(batch=16)), 4)
    blended = take(training_stream(manifest, source, config(batch=16, mixup=1.0)), 4)
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

    take(training_stream(manifest, Counting(), config(workers=1), start_step=10_000), 1)
    assert len(read) < 8 * 6  # the batch, and what is fetched ahead


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """The table of so many has 68 MB; it lies in a mapped file, and nothing makes a copy of it."""
    manifest, source = make(10)

    def used(repeats: int) -> int:
        table = manifest.table.iloc[np.tile(np.arange(10), repeats)].reset_index(drop=True)
        many = Manifest(manifest.class_names, table)
        before = anonymous_bytes()
        batches = iter(training_stream(many, source, config()))
        assert len(next(batches)[0]) == 8
        return anonymous_bytes() - before

    used(1)
    few, many = used(7_000), used(120_000)
    assert many - few < 16 * 2**20  # what the process holds moves by some MiB of itself


def anonymous_bytes() -> int:
    """Of this process's memory, what no file stands behind."""
    gc.collect()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024
