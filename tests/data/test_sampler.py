"""The order of the images: permutations, all of them equally likely, found from any position on."""

from itertools import islice, pairwise
from math import factorial

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from pipeline.data.sampler import positions, shuffled
from pipeline.distributed.sharding import Shard


def orders(count: int, seed: int, passes: int, first: int = 0) -> np.ndarray:
    """int64 (passes, count)"""
    position = tf.range(first * count, (first + passes) * count, dtype=tf.int64)
    of, images = shuffled(position, count, seed)
    assert of.numpy().tolist() == np.repeat(np.arange(first, first + passes), count).tolist()
    return images.numpy().reshape(passes, count)


def counts_of_orders(rows: np.ndarray) -> np.ndarray:
    """How often each of the orders of a few images occurs that occur at all."""
    return np.unique(rows @ rows.shape[1] ** np.arange(rows.shape[1]), return_counts=True)[1]


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 3_000), seed=st.integers(0, 2**63 - 1), first=st.integers(0, 10**12))
def test_every_image_comes_once_in_a_pass(count: int, seed: int, first: int) -> None:
    for row in orders(count, seed, 2, first):
        np.testing.assert_array_equal(np.sort(row), np.arange(count))


def test_a_graph_finds_the_same_orders() -> None:
    position = tf.range(1000, dtype=tf.int64)
    for found, expected in zip(tf.function(shuffled)(position, 300, 4), shuffled(position, 300, 4), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(count: int) -> None:
    """By chi-square over the passes of one seed, and over those of ten."""
    expected, number = 200, factorial(count)
    passes = orders(count, 7, expected * number)
    seeds = np.concatenate([orders(count, seed, expected // 10 * number) for seed in range(10)])
    for rows in (passes, seeds):
        counts = counts_of_orders(rows)
        assert len(counts) == number
        assert chi2.sf(((counts - expected) ** 2 / expected).sum(), number - 1) > 0.001


@pytest.mark.parametrize("seeds", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_the_first_orders_of_many_seeds_are_equally_likely(seeds: int) -> None:
    counts = counts_of_orders(np.concatenate([orders(3, seed, 1) for seed in range(seeds)]))
    assert len(counts) == 6
    assert chi2.sf(((counts - seeds / 6) ** 2 / (seeds / 6)).sum(), 5) > 0.001


def test_long_orders_have_no_structure() -> None:
    count, passes = 100, 500
    rows = orders(count, 1, passes)
    counts = np.stack([np.bincount(rows[:, place], minlength=count) for place in range(count)])
    assert chi2.sf(((counts - 5) ** 2 / 5).sum(), (count - 1) ** 2) > 0.001
    steps = np.concatenate([np.diff(row) % count for row in rows])
    counts = np.bincount(steps, minlength=count)[1:]
    assert chi2.sf(((counts - counts.mean()) ** 2 / counts.mean()).sum(), count - 2) > 0.001
    assert len({tuple(row) for row in rows}) == passes
    agreement = [np.mean(one == other) for one, other in pairwise(rows)]
    assert np.mean(agreement) == pytest.approx(1 / count, abs=0.002)


def test_many_images_are_in_an_order_too() -> None:
    count = 50_021
    order = np.concatenate(
        [
            shuffled(tf.range(first, min(first + 2**15, count), dtype=tf.int64), count, 1)[1]
            for first in range(0, count, 2**15)
        ]
    )
    assert len(np.unique(order)) == count
    for other in (np.arange(count), np.roll(order, 1)):
        assert abs(np.corrcoef(order, other)[0, 1]) < 4 / np.sqrt(count)


@pytest.mark.parametrize(
    ("start_step", "stride", "share"), [(0, 1, Shard()), (1000, 3, Shard(1, 4)), (10**12, 1, Shard(7, 8))]
)
def test_positions_are_those_of_the_shares_of_the_steps(start_step: int, stride: int, share: Shard) -> None:
    batch_size, part = 24, 24 // share.count
    dealt = positions(batch_size, share, start_step=start_step, stride=stride).unbatch().batch(part)
    for number, batch in enumerate(islice(dealt.as_numpy_iterator(), 200)):
        first = (start_step + number * stride) * batch_size + share.index * part
        assert batch.tolist() == list(range(first, first + part))
