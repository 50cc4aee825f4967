"""Near-duplicates are found and kept together; splits are stratified, seeded and stable."""

import io
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.data import SplitsConfig
from pipeline.data.splits import assign_splits, near_duplicates, signature

SHARES = SplitsConfig(train=0.7, val=0.1, test=0.2)


def random_image(seed: int, size: tuple[int, int] = (120, 160)) -> np.ndarray:
    """uint8 (H, W, 3), coarse and colorful."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def recompressed(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def groups(images: list[np.ndarray], orientations: list[int] | None = None) -> list[int]:
    signatures = [
        signature(image, orientation)
        for image, orientation in zip(images, orientations or [1] * len(images), strict=True)
    ]
    return near_duplicates(
        np.array([s.phash for s in signatures], np.uint64),
        np.stack([s.thumbnail for s in signatures]),
        np.array([s.pixels for s in signatures], np.uint64),
        np.array([s.perceptual for s in signatures], bool),
    ).tolist()


def test_recompressed_shrunk_and_brightened_copies_are_found_and_others_are_not():
    one = random_image(1)
    shrunk = np.asarray(Image.fromarray(one).resize((80, 60), Image.Resampling.LANCZOS))
    brighter = np.clip(one * 0.9 + 20, 0, 255).astype(np.uint8)
    assert groups([random_image(0), one, recompressed(one, 60), random_image(2), shrunk, brighter]) == [
        0,
        1,
        1,
        2,
        1,
        1,
    ]


def test_the_same_shapes_in_other_colors_are_no_duplicates():
    one = random_image(3)
    gray = np.asarray(Image.fromarray(one).convert("L"))
    tinted = np.stack([gray, gray // 4, 255 - gray], -1)
    assert groups([one, tinted]) == [0, 1]


def test_a_image_turned_by_exif_equals_the_turned_image():
    one = random_image(4, (120, 120))
    assert groups([one, np.ascontiguousarray(np.rot90(one))], [1, 6]) == [0, 0]
    assert groups([one, np.ascontiguousarray(np.rot90(one))]) == [0, 1]


def test_small_images_are_compared_by_their_pixels():
    small = random_image(5, (8, 8))
    other = small.copy()
    other[3, 3, 0] ^= 1
    assert groups([small, other, small.copy(), small.reshape(4, 16, 3)]) == [0, 1, 0, 2]


def test_flat_images_do_not_chain():
    rng = np.random.default_rng(0)
    flat = [np.clip(250 + rng.normal(0, 2, (64, 64, 3)), 0, 255).astype(np.uint8) for _ in range(30)]
    assert groups([*flat, flat[7].copy()]) == [*range(30), 7]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), flips=st.integers(0, 8))
def test_hashes_within_the_distance_are_found_and_beyond_it_are_not(seed, flips):
    rng = np.random.default_rng(seed)
    phash = rng.integers(0, 2**64, 50, dtype=np.uint64)
    phash[49] = phash[7] ^ np.bitwise_xor.reduce(
        np.uint64(1) << rng.choice(64, flips, replace=False).astype(np.uint64), initial=np.uint64(0)
    )
    thumbnail = np.broadcast_to(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (50, 8, 8, 3))
    group = near_duplicates(phash, thumbnail, np.arange(50, dtype=np.uint64), np.ones(50, bool))
    assert (group[49] == group[7]) == (flips <= 4)
    assert len(np.unique(group)) == (49 if flips <= 4 else 50)


@pytest.mark.slow
def test_time_grows_with_the_images_where_all_hashes_are_equal():
    n = 4000
    thumbnail = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)
    equal, begun = np.full(n, 0x5555_0F0F_3333_1234, np.uint64), time.process_time()
    assert len(np.unique(near_duplicates(equal, thumbnail, np.arange(n, dtype=np.uint64), np.ones(n, bool)))) == n
    thumbnail[:] = thumbnail[0]
    assert (near_duplicates(equal, thumbnail, np.arange(n, dtype=np.uint64), np.ones(n, bool)) == 0).all()
    assert time.process_time() - begun < 20  # 16 million pairs of 0.5 us or more would take longer


def test_groups_do_not_depend_on_how_many_pairs_are_held_at_once(monkeypatch):
    monkeypatch.setattr("pipeline.data.splits.MAX_EDGES", 3)
    images = [
        image
        for seed in range(4)
        for image in (random_image(seed), recompressed(random_image(seed), 80), recompressed(random_image(seed), 60))
    ]
    assert groups(images) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def contents(n: int) -> list[str]:
    return [f"content {i}" for i in range(n)]


labels_and_groups = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=60
)  # a label and a size for each group


@settings(max_examples=150, deadline=None)
@given(drawn=labels_and_groups, seed=st.integers(0, 5))
def test_made_splits_are_stratified_whole_and_repeatable(drawn, seed):
    label = np.array([label for label, size in drawn for _ in range(size)], np.int32)
    group = np.array([g for g, (_, size) in enumerate(drawn) for _ in range(size)], np.int64)
    order = np.random.default_rng(seed).permutation(len(label))
    content = contents(len(label))
    split = assign_splits(label, group, content, [None] * len(label), SHARES, seed=seed)
    shuffled = assign_splits(
        label[order], group[order], [content[i] for i in order], [None] * len(label), SHARES, seed=seed
    )
    np.testing.assert_array_equal(split[order], shuffled)
    assert set(split) <= {"train", "val", "test"}
    assert all(len(set(split[group == g])) == 1 for g in set(group))
    for one in set(label):
        sizes = [size for label, size in drawn if label == one]
        counts = {name: int((split[label == one] == name).sum()) for name in ("train", "val", "test")}
        if len(sizes) >= 3:
            assert min(counts.values()) > 0
        if len(sizes) >= 12:  # enough that no split needs help to be there at all
            for name, count in counts.items():
                assert abs(count - getattr(SHARES, name) * sum(sizes)) <= max(sizes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [1, 0, 0]),
        (2, [1, 0, 1]),
        (3, [1, 1, 1]),
        (4, [2, 1, 1]),
        (10, [7, 1, 2]),
        (80, [56, 8, 16]),
        (1000, [700, 100, 200]),
    ],
)
def test_a_class_of_single_images_is_cut_at_the_shares(size, expected):
    split = assign_splits(np.zeros(size, np.int32), np.arange(size), contents(size), [None] * size, SHARES, seed=42)
    assert [(split == name).sum() for name in ("train", "val", "test")] == expected


def test_the_seed_changes_the_splits():
    a, b = (
        assign_splits(np.zeros(50, np.int32), np.arange(50), contents(50), [None] * 50, SHARES, seed=seed)
        for seed in (1, 2)
    )
    assert (a != b).any()


def test_one_image_more_moves_few_others():
    split = assign_splits(np.zeros(200, np.int32), np.arange(200), contents(200), [None] * 200, SHARES, seed=0)
    more = assign_splits(np.zeros(201, np.int32), np.arange(201), contents(201), [None] * 201, SHARES, seed=0)
    assert (split != more[:200]).sum() <= 2


def test_given_splits_are_kept_and_only_val_is_made_where_it_is_missing():
    given_splits = ["train"] * 80 + ["test"] * 20
    split = assign_splits(np.zeros(100, np.int32), np.arange(100), contents(100), list(given_splits), SHARES, seed=0)
    assert (split[80:] == "test").all()
    assert (split[:80] == "val").sum() == 10  # 0.1 / (0.7 + 0.1) of 80
    assert (split[:80] == "train").sum() == 70


@pytest.mark.parametrize("names", [("train", "val"), ("train", "val", "test")])
def test_given_val_means_that_nothing_is_made(names):
    given_splits = [names[i % len(names)] for i in range(30)]
    assert (
        assign_splits(np.zeros(30, np.int32), np.arange(30), contents(30), list(given_splits), SHARES, seed=0).tolist()
        == given_splits
    )


def test_train_alone_is_cut_into_all_three():
    split = assign_splits(np.zeros(100, np.int32), np.arange(100), contents(100), ["train"] * 100, SHARES, seed=0)
    assert [(split == name).sum() for name in ("train", "val", "test")] == [70, 10, 20]
