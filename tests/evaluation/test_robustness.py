"""Corrupted images."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.stats import spearmanr
from sklearn.datasets import load_sample_image

from pipeline.data.preprocessing import resize_to_square
from pipeline.evaluation.robustness import KINDS, SEVERITIES, corruption_preprocess_fns, corruption_table


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.ascontiguousarray(load_sample_image("flower.jpg")[60:380, 100:420])


@pytest.fixture(scope="module")
def corrupted(image: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """One image under several indices, corrupted: uint8 (4, 160, 160, 3) by kind and severity."""
    return {
        (kind, severity): np.stack([square(tf.constant(image), tf.constant(index, tf.int64)) for index in range(4)])
        for kind, severity, square in corruption_preprocess_fns(160, "squash")
    }


def test_every_kind_gets_worse_with_its_severity(image, corrupted):
    clean = resize_to_square(tf.constant(image), 160, "squash").numpy().astype(np.float32)
    assert list(corrupted) == [(kind, severity) for kind in KINDS for severity in SEVERITIES]
    for kind in KINDS:
        errors = [float(np.abs(corrupted[kind, severity] - clean).mean()) for severity in SEVERITIES]
        assert spearmanr(SEVERITIES, errors).statistic > 0.89, (
            kind,
            errors,
        )  # not 1: pixels of 1.67 may hit edges worse than those of 2
        assert 1 < errors[0] < errors[-1], kind
        assert all(corrupted[kind, severity].shape == (4, 160, 160, 3) for severity in SEVERITIES)


def test_an_image_is_corrupted_alike_each_time_and_unlike_another(image, corrupted):
    drawn = ("gaussian noise", "shot noise", "motion blur")
    for kind, severity, square in corruption_preprocess_fns(160, "squash"):
        first, second, *_ = corrupted[kind, severity]
        np.testing.assert_array_equal(square(tf.constant(image), tf.constant(0, tf.int64)), first)
        assert (first != second).any() == (kind in drawn), kind


def test_the_table_has_kinds_severities_and_their_mean():
    table = corruption_table({(kind, severity): severity / 10 for kind in KINDS for severity in SEVERITIES})
    assert list(table.index) == list(KINDS)
    assert list(table.columns) == [*SEVERITIES, "mean"]
    assert table.loc["contrast", 2] == 0.2
    assert table["mean"].tolist() == pytest.approx([0.3] * len(KINDS))
