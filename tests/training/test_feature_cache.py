"""A frozen backbone that is computed once: the same run, faster."""

import keras
import numpy as np
import pandas as pd
import pytest
from short_network import short_network

from pipeline.config.schema import Config
from pipeline.config.train import StageConfig
from pipeline.console import Console
from pipeline.data.input_pipeline import steps_per_epoch
from pipeline.data.manifest import Manifest
from pipeline.data.sources.digits import DigitsSource
from pipeline.distributed.devices import Runtime, setup_devices
from pipeline.distributed.signals import TrainingInterrupted
from pipeline.errors import TrainingError
from pipeline.models.efficientnet import LayerTypes, efficientnet, to_inference_model
from pipeline.models.layers import PerReplicaDropout
from pipeline.tasks import SINGLE_LABEL
from pipeline.training.feature_cache import MAX_BYTES, are_constant, backbone_and_head
from pipeline.training.memory import BatchSize
from pipeline.training.optimizers import ModelEMA, build_optimizer
from pipeline.training.resolve import ResolvedConfig
from pipeline.training.schedule import build_schedule
from pipeline.training.stage_data import StageData
from pipeline.training.state import MetricAccumulator, TrainState
from pipeline.training.trainer import Trainer

IMAGES = 80
HEAD = StageConfig(epochs=2, trainable="head", use_augmentation=False)
CONFIG = Config.model_validate(
    {
        "model": {"variant": {"width": 0.25, "depth": 0.3, "resolution": 32}, "weights": None},
        "data": {"source": "digits", "resize": "squash"},
        "optimizer": {"name": "adamw", "base_lr": 0.05, "ema_decay": 0.9},
        "train": {"global_batch_size": 16, "stages": [HEAD.model_dump(), {"epochs": 1, "trainable": "all"}]},
        "runtime": {"precision": "float32"},
    }
)


def digits() -> tuple[Manifest, DigitsSource]:
    source = DigitsSource()
    samples = source.list_images()[:IMAGES]
    table = pd.DataFrame(
        {
            "key": [sample.key for sample in samples],
            "label": np.array([sample.label for sample in samples], np.int32),
            "split": ["val" if number % 5 == 0 else "train" for number in range(IMAGES)],
            "group": np.arange(IMAGES),
            "sha256": "",
            "height": np.int32(8),
            "width": np.int32(8),
            "orientation": np.uint8(1),
        }
    )
    return Manifest(source.class_names, table), source


def resolved_config(runtime: Runtime, steps: int) -> ResolvedConfig:
    schedule = build_schedule(CONFIG.train.stages, CONFIG.optimizer, global_batch_size=16, steps_per_epoch=steps)
    return ResolvedConfig(CONFIG, runtime, BatchSize(16, 1), schedule)


def train() -> tuple[TrainState, list[dict[str, float]]]:
    keras.utils.clear_session()
    manifest, source = digits()
    runtime = setup_devices(CONFIG.runtime, CONFIG.seed)
    model = efficientnet(CONFIG.variant, num_classes=10, layer_types=LayerTypes(PerReplicaDropout), seed=CONFIG.seed)
    state = TrainState(
        model,
        build_optimizer(CONFIG.optimizer, model.trainable_variables),
        ModelEMA(model.weights, 0.9),
        MetricAccumulator(),
    )
    resolved = resolved_config(runtime, steps_per_epoch(len(manifest.indices("train")), 16))
    schedule = resolved.schedule
    stages = StageData(resolved, manifest, source, state, Console(), lambda: False)
    trainer = Trainer(CONFIG.train, CONFIG.optimizer, runtime, schedule, SINGLE_LABEL, [], lambda: False)
    return state, trainer.fit(state, stages.for_stage)


@pytest.mark.slow
def test_training_on_features_is_training_on_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout's masks, slots, averages and the order of the images are the same.

    A stage that follows finds nothing different.
    """
    state, history = train()
    calls: list[str] = []
    monkeypatch.setattr("pipeline.training.stage_data.are_constant", lambda *_: calls.append("asked"))
    plain_state, plain_history = train()
    assert calls == ["asked"] * 2
    assert [record["epoch"] for record in history] == [1, 2, 3]
    for record, plain in zip(history[:2], plain_history[:2], strict=True):
        assert record == pytest.approx(plain, rel=1e-4)
    for group, variables in state.groups().items():
        for name, variable in variables.items():
            wanted = plain_state.groups()[group][name].numpy().astype(np.float64)
            np.testing.assert_allclose(
                variable.numpy().astype(np.float64), wanted, rtol=1e-2, atol=2e-4, err_msg=f"{group} {name}"
            )
    start = efficientnet(CONFIG.variant, num_classes=10, seed=CONFIG.seed).get_layer("predictions").kernel.numpy()
    assert np.abs(state.model.get_layer("predictions").kernel.numpy() - start).max() > 1e-2, "the head has learned"


def test_the_cut_network_is_the_network_and_is_saved_as_before() -> None:
    model = short_network(num_classes=10, seed=3)
    kernel = model.get_layer("predictions").kernel
    kernel.assign(np.random.default_rng(1).normal(0, 1e4, kernel.shape))  # random logits are near zero
    images = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype(np.float32)
    wanted = model(images).numpy()
    backbone, head = backbone_and_head(model)
    np.testing.assert_allclose(head(backbone(images)).numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 0.1
    head.layers[-1].bias.assign_add(np.ones(10))
    np.testing.assert_allclose(model(images).numpy(), wanted + 1, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(to_inference_model(model)(images).numpy(), model(images).numpy())


@pytest.mark.parametrize(
    ("augment", "stages", "constant"),
    [
        ({}, [HEAD], True),
        ({"mixup": 0.2}, [HEAD], True),
        ({}, [StageConfig(epochs=1, trainable="head")], True),
        ({"mixup": 0.2}, [StageConfig(epochs=1, trainable="head")], False),
        ({"transforms": ["HorizontalFlip"]}, [HEAD, StageConfig(epochs=1, trainable="head")], False),
        ({}, [StageConfig(epochs=1, trainable="block7", use_augmentation=False)], False),
        ({}, [StageConfig(epochs=1), HEAD], False),
    ],
)
def test_features_are_cached_where_nothing_before_the_head_changes(augment: dict, stages: list, constant: bool) -> None:
    config = Config.model_validate({"data": {"source": "digits"}, "augment": augment})
    assert are_constant(config.augment, stages, num_images=1000, width=1280) is constant


def test_features_that_would_fill_the_memory_are_not_cached() -> None:
    most = MAX_BYTES // (4 * 1280)
    assert are_constant(CONFIG.augment, [HEAD], most, 1280)
    assert not are_constant(CONFIG.augment, [HEAD], most + 1, 1280)


def test_features_of_a_backbone_whose_average_moves_are_not_cached_and_a_stop_is_heard_while_they_are_computed() -> (
    None
):
    manifest, source = digits()
    runtime, model = (
        setup_devices(CONFIG.runtime, CONFIG.seed),
        short_network(num_classes=10, layer_types=LayerTypes(PerReplicaDropout)),
    )
    state = TrainState(
        model,
        build_optimizer(CONFIG.optimizer, model.trainable_variables),
        ModelEMA(model.weights, 0.9),
        MetricAccumulator(),
    )
    resolved = resolved_config(runtime, 4)
    [stage, *_] = resolved.schedule.stages
    stages = StageData(resolved, manifest, source, state, Console(), lambda: True)
    with pytest.raises(TrainingInterrupted):
        stages.for_stage(stage)
    state.ema.track(model.get_layer("stem_conv").weights)
    assert stages.for_stage(stage).model is model


def test_outputs_of_a_network_in_training_that_are_not_finite_are_no_mistake_in_the_input() -> None:
    manifest, source = digits()
    runtime, model = (
        setup_devices(CONFIG.runtime, CONFIG.seed),
        short_network(num_classes=10, layer_types=LayerTypes(PerReplicaDropout)),
    )
    state = TrainState(model, build_optimizer(CONFIG.optimizer, model.trainable_variables), None, MetricAccumulator())
    model.get_layer("predictions").bias.assign(np.full(10, np.nan))
    with pytest.raises(
        TrainingError, match=r"not finite for 16 of the 16 images of the split val.*lower optimizer\.base_lr"
    ):
        StageData(resolved_config(runtime, 4), manifest, source, state, Console(), bool).evaluate("val")
