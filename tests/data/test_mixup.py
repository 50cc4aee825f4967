"""MixUp and CutMix: honest labels, closed groups, stateless draws."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import Config
from pipeline.data.mixup import MixFn, beta, mixing_group_size, mixup_and_cutmix, partners
from pipeline.errors import ConfigError

SIDE, SIZE = 32, 8


def config(**augment: float) -> Config:
    return Config.model_validate(
        {
            "seed": 3,
            "model": {"variant": "b0", "weights": None, "resolution": SIDE},
            "data": {"source": "digits"},
            "augment": augment,
            "train": {"global_batch_size": 16},
        }
    )


def build_mixing(settings: Config) -> MixFn:
    group_size = mixing_group_size(settings.train.global_batch_size, settings.train.gradient_accumulation_steps)
    augment = settings.augment
    return mixup_and_cutmix(group_size, settings.variant.resolution, augment.mixup, augment.cutmix, settings.seed)


def levels() -> tf.Tensor:
    """Images of one level each: 0, 30, ... 210."""
    return tf.cast(tf.broadcast_to(tf.range(SIZE)[:, None, None, None] * 30, (SIZE, SIDE, SIDE, 3)), tf.uint8)


def mixed(number: int, **augment: float) -> tuple[np.ndarray, np.ndarray]:
    images, labels = build_mixing(config(**augment))(levels(), tf.eye(SIZE), tf.constant(number, tf.int64))
    return images.numpy(), labels.numpy()


def test_the_group_is_the_largest_that_divides_a_micro_batch() -> None:
    assert [mixing_group_size(*sizes) for sizes in ((32, 1), (32, 8), (12, 1), (64, 32), (6, 1), (2, 1))] == [
        8,
        4,
        4,
        2,
        2,
        2,
    ]


@given(st.integers(1, 512), st.integers(1, 16))
def test_a_group_never_straddles_micro_batches(micro_batch: int, accumulation: int) -> None:
    if micro_batch % 2:
        with pytest.raises(ConfigError, match="even"):
            mixing_group_size(micro_batch * accumulation, accumulation)
    else:
        assert micro_batch % mixing_group_size(micro_batch * accumulation, accumulation) == 0


def test_nobody_is_its_own_partner_and_everybody_is_one() -> None:
    shifts = set()
    for number in range(50):
        found = partners(SIZE, tf.constant([1, number], tf.int64)).numpy()
        assert sorted(found) == list(range(SIZE))
        assert (found != np.arange(SIZE)).all()
        shifts.add(found[0])
    assert shifts == set(range(1, SIZE))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_beta_has_the_mean_and_variance_of_the_beta_distribution(alpha: float) -> None:
    draws = beta((40_000,), alpha, tf.constant([1, 2], tf.int64)).numpy()
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
    assert draws.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_beta_of_a_tiny_alpha_is_finite_and_at_the_ends() -> None:
    draws = beta((1000,), 0.01, tf.constant([1, 2], tf.int64)).numpy()
    assert np.isfinite(draws).all()
    assert ((draws < 0.01) | (draws > 0.99)).mean() > 0.9


def test_mixup_labels_are_the_weights_of_the_pixels() -> None:
    for number in range(10):
        images, labels = mixed(number, mixup=1.0)
        assert (np.ptp(images, axis=(1, 2, 3)) == 0).all()
        np.testing.assert_allclose(images[:, 0, 0, 0], labels @ (np.arange(SIZE) * 30), atol=0.51)
        np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)


def test_cutmix_labels_are_the_share_of_the_pixels() -> None:
    cut = 0
    for number in range(10):
        images, labels = mixed(number, cutmix=1.0)
        for place, (image, label) in enumerate(zip(images, labels, strict=True)):
            present, counts = np.unique(image[..., 0], return_counts=True)
            shares = np.zeros(SIZE)
            shares[present // 30] = counts / SIDE**2
            np.testing.assert_allclose(label, shares, atol=1e-6)
            foreign = image[..., 0] != place * 30
            if foreign.any() and not foreign.all():
                rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
                assert foreign[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # a rectangle
                cut += 1
    assert cut > 60


def test_cutmix_pastes_from_the_same_place() -> None:
    gradient = tf.cast(tf.broadcast_to(tf.range(SIDE)[None, :, None, None] * 4, (SIZE, SIDE, SIDE, 3)), tf.uint8)
    images, _ = build_mixing(config(cutmix=1.0))(gradient, tf.eye(SIZE), tf.constant(0, tf.int64))
    np.testing.assert_array_equal(images, gradient)


def test_cutmix_areas_follow_beta_but_for_the_border() -> None:
    kept = np.concatenate([np.diag(mixed(number, cutmix=1.0)[1]) for number in range(60)])
    assert 0.6 < kept.mean() < 0.8  # 1/2 if nothing were cut off; uniform sides and centers leave about 0.7
    assert kept.std() > 0.15


def test_with_both_each_group_draws_one() -> None:
    kinds = []
    for number in range(40):
        images, _ = mixed(number, mixup=1.0, cutmix=1.0)
        kinds.append((np.ptp(images, axis=(1, 2, 3)) > 0).any())
    assert 10 < sum(kinds) < 30


def test_the_same_number_mixes_alike_and_another_one_differently() -> None:
    np.testing.assert_array_equal(mixed(5, mixup=0.4, cutmix=1.0)[1], mixed(5, mixup=0.4, cutmix=1.0)[1])
    assert not np.array_equal(mixed(5, mixup=0.4)[1], mixed(6, mixup=0.4)[1])


def test_an_odd_micro_batch_is_refused() -> None:
    odd = config(mixup=0.2).model_copy(update={"train": config().train.model_copy(update={"global_batch_size": 15})})
    with pytest.raises(ConfigError, match="even number"):
        build_mixing(odd)
