"""Settings that follow from the data."""

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from pipeline.config.schema import Config
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError
from pipeline.training.class_weights import class_weights
from pipeline.training.recipe import describe_recipe, resolve_recipe

BATCH = 32


def images(train: int, val: int = 1) -> Manifest:
    return Manifest(("a", "b"), pd.DataFrame({"split": np.repeat(["train", "val"], [train, val])}))


def of_classes(names: str, counts: list[int]) -> Manifest:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Manifest(tuple(names.split()), pd.DataFrame({"label": labels, "split": "train"}))


def config(**sections: object) -> Config:
    return Config.model_validate({"data": {"source": "digits"}, **sections})


def test_a_config_without_a_recipe_stays_as_it_is():
    plain = config()
    assert resolve_recipe(plain, images(1000), BATCH) is plain


@settings(deadline=None)
@given(st.integers(2, 10**5), st.integers(1, 512))
def test_the_recipe_gives_every_data_set_a_config_that_loads_back_equal(num_images, batch):
    settled = resolve_recipe(config(recipe="auto"), images(num_images), batch)
    assert Config.model_validate(settled.model_dump(mode="json")) == settled
    assert [stage.trainable for stage in settled.train.stages] == (["head", "all"] if num_images >= 500 else ["head"])
    assert all(1 <= stage.epochs <= 20 for stage in settled.train.stages)
    assert 0.9 <= settled.optimizer.ema_decay <= 0.9999


def test_small_data_are_seen_more_often_and_averaged_over_fewer_steps():
    small, large = (resolve_recipe(config(recipe="auto"), images(count), BATCH) for count in (600, 50_000))
    assert small.train.stages[1].epochs > large.train.stages[1].epochs
    assert small.optimizer.ema_decay < large.optimizer.ema_decay
    assert small.train.stages[1].freeze_batch_norm
    assert not large.train.stages[1].freeze_batch_norm


def test_the_recipe_needs_weights():
    with pytest.raises(ValueError, match=r"set model.weights"):
        config(recipe="auto", model={"weights": None})


@pytest.mark.parametrize("num_images", [100, 1000])
def test_keys_of_the_config_replace_those_of_the_recipe_one_by_one(num_images):
    plain = resolve_recipe(config(recipe="auto"), images(num_images), BATCH)
    changed = resolve_recipe(config(recipe="auto", optimizer={"weight_decay": 0.5}), images(num_images), BATCH)
    assert changed.optimizer == plain.optimizer.model_copy(update={"weight_decay": 0.5})
    assert changed.train == plain.train

    faster = resolve_recipe(config(recipe="auto", optimizer={"base_lr": 0.5}), images(num_images), BATCH)
    last = faster.train.stages[-1]
    assert (last.base_lr or faster.optimizer.base_lr) == 0.5
    assert faster.train.stages[:-1] == plain.train.stages[:-1]

    longer = resolve_recipe(config(recipe="auto", train={"epochs": 17}), images(num_images), BATCH)
    assert longer.train.stages[-1].epochs == 17
    assert longer.train.stages[:-1] == plain.train.stages[:-1]
    assert longer.train.epochs is None

    stages = [{"epochs": 2, "trainable": "block7"}]
    own = resolve_recipe(config(recipe="auto", train={"stages": stages}), images(num_images), BATCH)
    assert own.train == config(train={"stages": stages}).train
    assert own.optimizer.name == "adamw"


@settings(deadline=None)
@given(st.sampled_from([{}, {"base_lr": 0.1}, {"name": "sgd"}]), st.sampled_from([{}, {"epochs": 3}]))
def test_a_resolved_config_resolves_to_itself_when_it_is_read_again(optimizer, train):
    resolved = resolve_recipe(config(recipe="auto", optimizer=optimizer, train=train), images(700), BATCH)
    again = Config.model_validate(yaml.safe_load(resolved.to_yaml()))
    assert again == resolved
    assert resolve_recipe(again, images(50), BATCH) == resolved


def test_the_recipe_is_shown_as_the_lines_of_a_config():
    resolved = resolve_recipe(config(recipe="auto", train={"epochs": 3}), images(100), BATCH)
    first, *lines = describe_recipe(resolved).splitlines()
    assert first == "recipe: auto, which is here"
    shown = yaml.safe_load("\n".join(lines))
    as_written = config(optimizer=shown["optimizer"], train=shown["train"])
    assert (as_written.optimizer, as_written.train.stages) == (resolved.optimizer, resolved.train.stages)


def test_epochs_alone_are_those_of_the_only_stage():
    stages = resolve_recipe(config(train={"epochs": 7}), images(100), BATCH).train.stages
    assert [(stage.epochs, stage.trainable) for stage in stages] == [(7, "all")]
    with pytest.raises(ValueError, match="write the epochs into the stages"):
        config(train={"epochs": 7, "stages": [{"epochs": 1}]})


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
    settled = resolve_recipe(config(recipe="auto"), images(100), BATCH, ["block2a_expand_conv", "predictions"])
    assert [(stage.trainable, stage.freeze_batch_norm) for stage in settled.train.stages] == [("all", False)]
    assert [
        stage.trainable
        for stage in resolve_recipe(config(recipe="auto"), images(100), BATCH, ["predictions"]).train.stages
    ] == ["head"]


def test_a_resumed_run_keeps_to_what_the_recipe_came_to():
    began = resolve_recipe(config(recipe="auto"), images(600), BATCH)
    assert resolve_recipe(config(recipe="auto"), images(60_000), BATCH, previous=began) == began


@pytest.mark.parametrize("train", [{"restore_best_weights": True}, {"early_stopping": {"patience": 1}}])
def test_what_goes_by_the_validation_split_wants_one(train):
    assert resolve_recipe(config(train=train), images(10), BATCH) == config(train=train)
    with pytest.raises(ConfigError, match="the data have none"):
        resolve_recipe(config(train=train), images(10, val=0), BATCH)
