"""Settings that follow from the data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.training.recipe import class_weights, settle


def config(**sections: object) -> Config:
    return Config.model_validate({"data": {"source": "digits"}, **sections})


def test_a_config_without_a_recipe_stays_as_it_is():
    plain = config()
    assert settle(plain, 1000) is plain


@given(st.integers(2, 10**7), st.integers(1, 512))
def test_the_recipe_gives_every_data_set_a_config_that_loads_back_equal(num_images, batch):
    settled = settle(config(recipe="auto", train={"global_batch_size": batch}), num_images)
    assert settled.recipe is None
    assert Config.model_validate(settled.model_dump(mode="json")) == settled
    assert [stage.trainable for stage in settled.train.stages] == (["head", "all"] if num_images >= 500 else ["head"])
    assert all(1 <= stage.epochs <= 20 for stage in settled.train.stages)
    assert 0.9 <= settled.optimizer.ema <= 0.9999


def test_small_data_are_seen_more_often_and_averaged_over_fewer_steps():
    small, large = (settle(config(recipe="auto"), count) for count in (600, 50_000))
    assert small.train.stages[1].epochs > large.train.stages[1].epochs
    assert small.optimizer.ema < large.optimizer.ema
    assert small.train.stages[1].freeze_batch_norm
    assert not large.train.stages[1].freeze_batch_norm


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"base_lr": 1.0}}, "leave optimizer out"),
        ({"train": {"stages": [{"epochs": 1}]}}, "leave train.stages out"),
        ({"model": {"weights": None}}, "set model.weights"),
    ],
)
def test_the_recipe_does_not_share_its_keys(sections, message):
    with pytest.raises(ValueError, match=message):
        config(recipe="auto", **sections)


def test_balanced_weights_are_those_of_scikit_learn():
    counts = [5, 20, 75]
    labels = np.repeat(np.arange(3), counts)
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(class_weights(config(train={"class_weights": "balanced"}), list("abc"), counts), wanted, rtol=1e-6)


def test_given_weights_keep_their_ratios_and_count_a_training_image_as_one_on_average():
    weights = class_weights(config(train={"class_weights": {"b": 4.0}}), list("abc"), [50, 30, 20])
    assert weights[1] / weights[0] == pytest.approx(4)
    assert weights[2] == weights[0]
    assert np.average(weights, weights=[50, 30, 20]) == pytest.approx(1)


def test_a_weight_of_no_class_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"train.class_weights: 'tulips' is none of the data's classes; did you mean 'tulip'"):
        class_weights(config(train={"class_weights": {"tulips": 2.0}}), ["rose", "tulip"], [1, 1])
