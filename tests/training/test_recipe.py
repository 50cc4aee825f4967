"""Settings that follow from the data."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from pipeline.config.schema import Config
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError
from pipeline.training.class_weights import class_weights
from pipeline.training.recipe import resolve_recipe


def images(train: int, val: int = 1) -> Manifest:
    return Manifest(("a", "b"), pd.DataFrame({"split": np.repeat(["train", "val"], [train, val])}))


def of_classes(names: str, counts: list[int]) -> Manifest:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Manifest(tuple(names.split()), pd.DataFrame({"label": labels, "split": "train"}))


def config(**sections: object) -> Config:
    return Config.model_validate({"data": {"source": "digits"}, **sections})


def test_a_config_without_a_recipe_stays_as_it_is():
    plain = config()
    assert resolve_recipe(plain, images(1000)) is plain


@given(st.integers(2, 10**5), st.integers(1, 512))
def test_the_recipe_gives_every_data_set_a_config_that_loads_back_equal(num_images, batch):
    settled = resolve_recipe(config(recipe="auto", train={"global_batch_size": batch}), images(num_images))
    assert settled.recipe is None
    assert Config.model_validate(settled.model_dump(mode="json")) == settled
    assert [stage.trainable for stage in settled.train.stages] == (["head", "all"] if num_images >= 500 else ["head"])
    assert all(1 <= stage.epochs <= 20 for stage in settled.train.stages)
    assert 0.9 <= settled.optimizer.ema_decay <= 0.9999


def test_small_data_are_seen_more_often_and_averaged_over_fewer_steps():
    small, large = (resolve_recipe(config(recipe="auto"), images(count)) for count in (600, 50_000))
    assert small.train.stages[1].epochs > large.train.stages[1].epochs
    assert small.optimizer.ema_decay < large.optimizer.ema_decay
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
    np.testing.assert_allclose(
        class_weights(config(train={"class_weights": "balanced"}).train, of_classes("a b c", counts)), wanted, rtol=1e-6
    )


def test_given_weights_keep_their_ratios_and_count_a_training_image_as_one_on_average():
    weights = class_weights(config(train={"class_weights": {"b": 4.0}}).train, of_classes("a b c", [50, 30, 20]))
    assert weights[1] / weights[0] == pytest.approx(4)
    assert weights[2] == weights[0]
    assert np.average(weights, weights=[50, 30, 20]) == pytest.approx(1)


def test_a_weight_of_no_class_is_named_with_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"train.class_weights: 'tulips' is none of the data's classes; did you mean 'tulip'"
    ):
        class_weights(config(train={"class_weights": {"tulips": 2.0}}).train, of_classes("rose tulip", [1, 1]))


def test_weights_that_fit_only_parts_are_trained_as_a_whole_from_the_start():
    settled = resolve_recipe(config(recipe="auto"), images(100), ["block2a_expand_conv", "predictions"])
    assert [(stage.trainable, stage.freeze_batch_norm) for stage in settled.train.stages] == [("all", False)]
    assert [
        stage.trainable for stage in resolve_recipe(config(recipe="auto"), images(100), ["predictions"]).train.stages
    ] == ["head"]


def test_a_resumed_run_keeps_to_what_the_recipe_came_to():
    began = resolve_recipe(config(recipe="auto"), images(600))
    assert resolve_recipe(config(recipe="auto"), images(60_000), previous=began) == began


@pytest.mark.parametrize("train", [{"restore_best_weights": True}, {"early_stopping": {"patience": 1}}])
def test_what_goes_by_the_validation_split_wants_one(train):
    assert resolve_recipe(config(train=train), images(10)) == config(train=train)
    with pytest.raises(ConfigError, match="the data have none"):
        resolve_recipe(config(train=train), images(10, val=0))
