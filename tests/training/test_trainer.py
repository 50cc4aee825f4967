"""The training loop: stages as steps, freezing, history, the best epoch, stopping and resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.config.schema import Config
from pipeline.config.train import StageConfig
from pipeline.console import plural
from pipeline.distributed.devices import setup_devices
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import TrainingInterrupted
from pipeline.errors import ConfigError, TrainingError
from pipeline.models.layers import PerReplicaDropout
from pipeline.tasks import SINGLE_LABEL
from pipeline.training import checkpoint, trainer
from pipeline.training.callbacks import Callback
from pipeline.training.checkpoint import CheckpointCallback
from pipeline.training.nan_policy import MAX_ROLLBACKS, NanPolicy, raise_nan_error
from pipeline.training.optimizers import ModelEMA, build_optimizer
from pipeline.training.schedule import TrainSchedule, build_schedule, check_uninitialized_layers, set_trainable
from pipeline.training.state import MetricAccumulator, TrainState
from pipeline.training.train_step import TrainStep
from pipeline.training.trainer import StageInputs, Trainer

STEPS = 5  # per epoch
CONFIG = Config.model_validate(
    {
        "data": {"source": "digits"},
        "optimizer": {"base_lr": 1.0, "schedule": "cosine"},
        "train": {
            "global_batch_size": 4,
            "stages": [{"epochs": 2, "trainable": "head"}, {"epochs": 2, "trainable": "block6", "base_lr": 0.5}],
        },
    }
)


def network() -> keras.Model:
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3, name="stem_conv", kernel_initializer=keras.initializers.HeNormal(seed=1))(inputs)
    x = keras.layers.BatchNormalization(name="stem_bn")(x)
    x = keras.layers.Conv2D(4, 1, name="block6a_expand_conv", kernel_initializer=keras.initializers.HeNormal(seed=2))(x)
    x = keras.layers.BatchNormalization(name="block6a_expand_bn")(x)
    x = PerReplicaDropout(0.2, seed=9, name="block6a_drop")(x)
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    return keras.Model(
        inputs, keras.layers.Dense(3, name="predictions", kernel_initializer=keras.initializers.HeNormal(seed=3))(x)
    )


def fresh_state() -> TrainState:
    model = network()
    return TrainState(
        model,
        build_optimizer(CONFIG.optimizer, model.trainable_variables),
        ModelEMA(model.weights, 0.9),
        MetricAccumulator(),
    )


def stream(start: int, *, poisoned: int | None = None) -> tf.data.Dataset:
    """Batch number n is a function of n alone."""

    def batch(number: tf.Tensor) -> tuple[tf.Tensor, ...]:
        seed = tf.stack([number, 0])
        images = tf.cast(tf.random.stateless_uniform((4, 6, 6, 3), seed, 0, 256, tf.int32), tf.uint8)
        labels = tf.one_hot(tf.random.stateless_uniform((4,), seed, 0, 3, tf.int32), 3)
        weights = tf.where(number == (-1 if poisoned is None else poisoned), np.nan, 1.0) * tf.ones(4)
        return images, labels, weights, tf.range(4, dtype=tf.int64)

    return tf.data.Dataset.range(start, 10**9).map(batch)


class Recorder(Callback):
    """A callback that records its calls and checks their arguments."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.epochs: list[dict] = []
        self.saved: list[int] = []
        self.skipped_images: list[int] = []
        self.first_steps: list[str] = []

    def on_progress(self, step: int, metrics: dict) -> None:
        assert set(metrics) == {"train/loss", "train/accuracy", "train/gradient_norm", "learning_rate"}

    def on_compile_end(self, stage: StageConfig, seconds: float) -> None:
        assert seconds > 0
        self.first_steps.append(stage.trainable)

    def on_log(self, step: int, metrics: dict) -> None:
        self.steps.append(step)

    def on_epoch_end(self, record: dict) -> None:
        self.epochs.append(dict(record))

    def on_early_stop(self, epochs: int) -> None:
        self.skipped_images.append(epochs)

    def on_checkpoint(self, state: TrainState) -> None:
        self.saved.append(state.step)


def schedule_of(config: Config, steps_per_epoch: int) -> TrainSchedule:
    return build_schedule(config.train.stages, config.optimizer, global_batch_size=4, steps_per_epoch=steps_per_epoch)


def run(
    state: TrainState,
    callbacks: list,
    *,
    accuracies: tuple[float, ...] = (0.1, 0.9, 0.5, 0.9),
    stop_at: int | None = None,
    config: Config = CONFIG,
    on_nan: Callable[[TrainState], None] = raise_nan_error,
    poisoned: int | None = None,
) -> list[dict]:
    loop = Trainer(
        config.train,
        config.optimizer,
        setup_devices(config.runtime, config.seed),
        schedule_of(config, STEPS),
        SINGLE_LABEL,
        callbacks,
        lambda: state.step == stop_at,
        on_nan,
    )

    def validate() -> dict[str, float]:
        return {"val/accuracy": accuracies[state.step // STEPS - 1], "val/loss": 1.0}

    return loop.fit(
        state, lambda stage: StageInputs(state.model, lambda start: stream(start, poisoned=poisoned), validate)
    )


def contents(state: TrainState) -> dict[str, bytes]:
    return {
        f"{group}/{name}": v.numpy().tobytes()
        for group, variables in state.groups().items()
        for name, v in variables.items()
    }


class FinishedRun(NamedTuple):
    """A run to its end.

    Attributes:
        state: Its state; not to be changed.
        history: Its history.
        recorder: Its record.
        checkpoints: The folder of its last checkpoint.
    """

    state: TrainState
    history: list[dict]
    recorder: Recorder
    checkpoints: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run that nothing interrupts: compiling its two steps takes most of the time of a test."""
    state, recorder, folder = fresh_state(), Recorder(), tmp_path_factory.mktemp("whole")
    return FinishedRun(state, run(state, [recorder, CheckpointCallback(folder, {}, keep=1)]), recorder, folder)


@pytest.fixture(scope="module")
def seven_steps() -> TrainState:
    """The state of a run that is stopped after seven steps; not to be changed."""
    state = fresh_state()
    with pytest.raises(TrainingInterrupted):
        run(state, [], stop_at=7)
    return state


class CountedStep(TrainStep):
    """A step that counts, and trains nothing: for what the loop does whatever the weights are."""

    def __call__(self, batch: tuple, learning_rate: float) -> None:
        self._optimizer.iterations.assign_add(1)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the trainer take steps that train nothing."""
    monkeypatch.setattr(trainer, "TrainStep", CountedStep)


def test_epochs_become_steps_once_and_each_stage_has_its_own_schedule():
    stages = schedule_of(CONFIG, STEPS).stages
    assert [(stage.first, stage.stop) for stage in stages] == [(0, 10), (10, 20)]
    assert stages[0].learning_rate(0) == pytest.approx(4 / 256)
    assert stages[1].learning_rate(0) == pytest.approx(0.5 * 4 / 256)


@pytest.mark.parametrize(
    ("trainable", "freeze", "expected"),
    [
        ("head", False, {"predictions"}),
        ("block7", False, {"predictions"}),
        ("block6", False, {"block6a_expand_conv", "block6a_expand_bn", "predictions"}),
        ("block1", True, {"block6a_expand_conv", "predictions"}),
        ("all", False, {"stem_conv", "stem_bn", "block6a_expand_conv", "block6a_expand_bn", "predictions"}),
        ("all", True, {"stem_conv", "block6a_expand_conv", "predictions"}),
    ],
)
def test_a_stage_trains_its_blocks_and_what_lies_behind_them(trainable, freeze, expected):
    model = network()
    set_trainable(model, StageConfig(epochs=1, trainable=trainable, freeze_batch_norm=freeze))
    assert {variable.path.split("/")[0] for variable in model.trainable_variables} == expected


def test_a_run_saves_history_best_epoch_and_checkpoints(whole: FinishedRun):
    state, history, recorder = whole.state, whole.history, whole.recorder
    assert [record["step"] for record in history] == [5, 10, 15, 20] == recorder.saved
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert recorder.steps == list(range(1, 21))
    assert recorder.first_steps == ["head", "block6"]
    assert state.best == history[1], "the first of two equal ones"
    assert state.metrics.read()["images"] == 0, "the sums begin anew with each epoch"
    assert all(np.isfinite(record["train/loss"]) for record in history)


def test_frozen_blocks_do_not_move_and_slots_outlive_the_change_of_stage():
    state = fresh_state()
    start = {variable.path: variable.numpy() for variable in state.model.variables}
    with pytest.raises(TrainingInterrupted):
        run(state, [], stop_at=10)
    moved = {
        path
        for path, value in start.items()
        if not np.array_equal(value, {v.path: v.numpy() for v in state.model.variables}[path])
    }
    assert moved == {"predictions/kernel", "predictions/bias"}
    slots = {v.name: v.numpy() for v in state.optimizer.variables if "predictions" in v.name and "velocity" in v.name}
    assert any((value != 1).any() for value in slots.values())
    with pytest.raises(TrainingInterrupted):
        run(state, [], stop_at=11)
    later = {v.name: v.numpy() for v in state.optimizer.variables if v.name in slots}
    for name, value in slots.items():  # one step of decay 0.9 on what was there, not a new start from ones
        assert (later[name] >= 0.9 * value - 1e-7).all()
    assert np.array_equal(start["stem_bn/gamma"], state.model.get_layer("stem_bn").gamma.numpy())
    assert np.array_equal(start["stem_bn/moving_mean"], state.model.get_layer("stem_bn").moving_mean.numpy())
    assert not np.array_equal(
        start["block6a_expand_bn/moving_mean"], state.model.get_layer("block6a_expand_bn").moving_mean.numpy()
    )


@pytest.mark.parametrize(
    "stop_at",
    [*(pytest.param(step, marks=pytest.mark.slow) for step in (3, 5, 10, 19)), 13],
)
def test_an_interrupted_run_goes_on_bit_identically(tmp_path: Path, whole: FinishedRun, stop_at: int):
    stopped = fresh_state()
    with pytest.raises(TrainingInterrupted):
        run(stopped, [CheckpointCallback(tmp_path, {}, keep=1)], stop_at=stop_at)
    resumed = fresh_state()
    newest, problems = checkpoint.latest_valid_checkpoint(tmp_path)
    assert problems == []
    assert newest is not None
    checkpoint.restore(resumed, newest)
    assert resumed.step == stop_at
    assert run(resumed, []) == whole.history
    assert contents(resumed) == contents(whole.state)


def test_a_stop_after_a_step_that_is_not_finite_saves_nothing(tmp_path: Path):
    state = fresh_state()
    loop = Trainer(
        CONFIG.train,
        CONFIG.optimizer,
        setup_devices(CONFIG.runtime, CONFIG.seed),
        schedule_of(CONFIG, 100),
        SINGLE_LABEL,
        [CheckpointCallback(tmp_path, {}, keep=1)],
        lambda: state.step == 4,
    )  # reports every 5 steps
    with pytest.raises(TrainingError, match="not finite in step 3"):
        loop.fit(state, lambda stage: StageInputs(state.model, lambda start: stream(start, poisoned=2), lambda: {}))
    assert not list(tmp_path.iterdir())


def test_validation_sees_the_moving_average():
    state = fresh_state()
    seen = []

    def validate() -> dict[str, float]:
        seen.append(
            all(
                np.array_equal(v.numpy(), a.numpy())
                for v, a in zip(state.ema.averaged, state.ema.variables, strict=True)
            )
        )
        return {}

    runtime, schedule = (
        setup_devices(CONFIG.runtime, CONFIG.seed),
        schedule_of(CONFIG, STEPS),
    )
    loop = Trainer(CONFIG.train, CONFIG.optimizer, runtime, schedule, SINGLE_LABEL, [], lambda: False)
    loop.fit(state, lambda stage: StageInputs(state.model, stream, validate))
    assert seen == [True] * 4
    assert state.best is None, "without a validation metric no epoch is best"


def test_a_step_that_is_not_finite_ends_the_run_with_advice_and_the_last_good_state(seven_steps: TrainState):
    bad = fresh_state()
    with pytest.raises(
        TrainingError, match=r"not finite in step 8; nothing of that step was applied. Try a lower optimizer.base_lr"
    ):
        run(bad, [], poisoned=7)
    assert {k: v for k, v in contents(bad).items() if "totals" not in k} == {
        k: v for k, v in contents(seven_steps).items() if "totals" not in k
    }


def early(**rule: float) -> Config:
    """Two stages of four epochs; five steps each."""
    stages = [{"epochs": 4, "trainable": "head"}, {"epochs": 4, "trainable": "block6"}]
    return Config.model_validate(
        {
            "data": {"source": "digits"},
            "optimizer": {"base_lr": 1.0},
            "train": {"global_batch_size": 4, "early_stopping": rule, "stages": stages},
        }
    )


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("rule", "accuracies", "epochs", "skipped_images"),
    [
        ({"patience": 1}, (0.5, 0.4, None, None, 0.3, 0.6, 0.7, 0.8), [1, 2, 5, 6, 7, 8], [2]),
        ({"patience": 2}, (0.5, 0.4, 0.5, None, 0.3, 0.2, 0.2, None), [1, 2, 3, 5, 6, 7], [1, 1]),
        ({"patience": 1, "min_delta": 0.15}, (0.5, 0.6, None, None, 0.1, 0.3, 0.5, 0.6), [1, 2, 5, 6, 7, 8], [2]),
        ({"patience": 4}, (0.5, 0.4, 0.3, 0.2, 0.5, 0.4, 0.3, 0.2), [1, 2, 3, 4, 5, 6, 7, 8], []),
    ],
)
def test_early_stopping_leaves_a_stage_that_does_not_improve_and_goes_on_with_the_next(
    rule, accuracies, epochs, skipped_images
):
    state, recorder = fresh_state(), Recorder()
    history = run(state, [recorder], config=early(**rule), accuracies=accuracies)
    assert [record["epoch"] for record in history] == epochs
    assert recorder.skipped_images == skipped_images
    assert state.step == 40, "a later stage begins at its own step, whatever was left out before it"
    assert state.best["val/accuracy"] == max(value for value in accuracies if value is not None)


PATIENT = {"config": early(patience=2), "accuracies": (0.5, 0.4, 0.3, None, 0.3, 0.6, 0.7, 0.8)}


@pytest.fixture(scope="module")
def stopped_early() -> TrainState:
    """The state at the end of a run whose first stage is left early; not to be changed."""
    state = fresh_state()
    run(state, [], **PATIENT)
    return state


@pytest.mark.parametrize(
    "stop_at",
    [15, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 21, 25))],
)
def test_early_stopping_survives_a_resume(tmp_path: Path, stopped_early: TrainState, stop_at: int):
    assert [record["epoch"] for record in stopped_early.history] == [1, 2, 3, 5, 6, 7, 8]
    stopped = fresh_state()
    with pytest.raises(TrainingInterrupted):
        run(stopped, [CheckpointCallback(tmp_path, {}, keep=1)], stop_at=stop_at, **PATIENT)
    resumed = fresh_state()
    newest, _ = checkpoint.latest_valid_checkpoint(tmp_path)
    checkpoint.restore(resumed, newest)
    assert run(resumed, [], **PATIENT) == stopped_early.history
    assert contents(resumed) == contents(stopped_early)


def test_the_average_of_a_block_goes_on_after_the_block_is_frozen_again():
    stages = [{"epochs": 1, "trainable": "all"}, {"epochs": 1, "trainable": "head"}]
    config = Config.model_validate(
        {
            "data": {"source": "digits"},
            "optimizer": {"base_lr": 1.0},
            "train": {"global_batch_size": 4, "stages": stages},
        }
    )

    def distance(state: TrainState) -> float:
        pairs = zip(state.ema.averaged, state.ema.variables, strict=True)
        return max(np.abs(v.numpy() - a.numpy()).max() for v, a in pairs if v.path == "stem_conv/kernel")

    state, between = fresh_state(), []
    with pytest.raises(TrainingInterrupted):
        run(state, [], config=config, stop_at=5)
    between.append(distance(state))
    run(state, [], config=config)  # as a resumed process does: the first stage is over
    between.append(distance(state))
    assert between[0] > between[1] > 0


def test_layer_decay_scales_the_update_of_each_block_under_rmsprop():
    moved = {}
    for decay in (1.0, 0.5):
        stages = [{"epochs": 1, "trainable": "all", "layer_decay": decay}]
        config = Config.model_validate(
            {
                "data": {"source": "digits"},
                "optimizer": {"base_lr": 1.0, "weight_decay": 0.0, "ema_decay": None},
                "train": {"global_batch_size": 4, "stages": stages},
            }
        )
        model = network()
        before = {v.path: v.numpy() for v in model.trainable_variables}
        state = TrainState(
            model, build_optimizer(config.optimizer, model.trainable_variables), None, MetricAccumulator()
        )
        with pytest.raises(TrainingInterrupted):
            run(state, [], config=config, stop_at=1)
        moved[decay] = {v.path: v.numpy() - before[v.path] for v in model.trainable_variables}
    for path, factor in {
        "predictions/kernel": 1.0,
        "block6a_expand_conv/kernel": 0.5**3,
        "stem_conv/kernel": 0.5**9,
    }.items():
        assert np.abs(moved[1.0][path]).max() > 1e-4
        np.testing.assert_allclose(moved[0.5][path], factor * moved[1.0][path], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("stages", "stuck"),
    [
        ([{}], []),
        ([{"trainable": "head"}, {"trainable": "all"}], []),
        ([{"freeze_batch_norm": True}, {"trainable": "block6"}], ["stem_bn"]),
        ([{"trainable": "head"}, {"trainable": "block6"}], ["stem_bn", "stem_conv"]),
        ([{"trainable": "block6", "freeze_batch_norm": True}], ["block6a_expand_bn", "stem_bn", "stem_conv"]),
        ([{"trainable": "head"}], ["block6a_expand_bn", "block6a_expand_conv", "stem_bn", "stem_conv"]),
    ],
)
def test_no_layer_stays_random_through_all_stages(stages: list[dict], stuck: list[str]) -> None:
    model = network()
    new = [layer.name for layer in model.layers if layer.weights]
    configs = [StageConfig(epochs=1, **stage) for stage in stages]
    if not stuck:
        check_uninitialized_layers(model, new, configs)
        return
    with pytest.raises(ConfigError, match=f"no stage trains {plural(len(stuck), 'layer')} ") as caught:
        check_uninitialized_layers(model, new, configs)
    assert all(name in str(caught.value) for name in stuck)
    assert "predictions" not in str(caught.value)
    check_uninitialized_layers(model, [name for name in new if name not in stuck], configs)


def with_train(**changes: object) -> Config:
    return Config.model_validate({**CONFIG.model_dump(), "train": {**CONFIG.train.model_dump(), **changes}})


@pytest.mark.usefixtures("untrained")
def test_checkpoints_are_saved_between_epochs_as_the_config_says():
    recorder = Recorder()
    run(fresh_state(), [recorder], config=with_train(checkpoint_every_steps=4))
    assert recorder.saved == [4, 5, 8, 10, 12, 15, 16, 20]


class Policy(NanPolicy):
    """A policy with a record of its messages."""

    def __init__(self, config: Config, folder: Path, **kwargs: int) -> None:
        self.messages: list[str] = []
        self.checkpoint_callback = CheckpointCallback(folder / "checkpoints", {}, keep=1)
        super().__init__(
            config.train.on_nan,
            folder / "nan",
            folder / "checkpoints",
            {},
            lambda start: stream(start, **kwargs),
            self.messages.append,
            ProcessGroup(),
        )


@pytest.mark.parametrize(  # in an epoch, at the end of a stage, at the start of one
    "bad", [*(pytest.param(step, marks=pytest.mark.slow) for step in (6, 9)), 10]
)
def test_a_bad_batch_is_passed_over_and_the_schedule_and_the_epochs_go_on(tmp_path: Path, whole: FinishedRun, bad: int):
    config = with_train(on_nan={"skip": 1})
    state = fresh_state()
    policy, recorder = Policy(config, tmp_path, poisoned=bad), Recorder()
    history = run(state, [recorder], config=config, on_nan=policy, poisoned=bad)
    reference = whole.history
    assert state.skipped == [bad]
    assert int(state.optimizer.iterations.numpy()) == 19, "all but one of the steps were applied"
    for key in ("epoch", "step", "learning_rate"):
        assert [record[key] for record in history] == [record[key] for record in reference]
    assert recorder.saved == [5, 10, 15, 20]
    assert history[0] == reference[0]
    assert history[bad // STEPS]["train/loss"] != reference[bad // STEPS]["train/loss"]
    [message] = policy.messages
    assert f"not finite in step {bad + 1}; nothing of that step was applied. Skipped, 1 of at most 1 steps" in message


def test_a_bad_batch_is_saved_as_it_was_fed_beside_the_state_that_it_met(tmp_path: Path, seven_steps: TrainState):
    state = fresh_state()
    with pytest.raises(TrainingError) as caught:
        run(state, [], on_nan=Policy(CONFIG, tmp_path, poisoned=7), poisoned=7)
    folder = tmp_path / "nan" / "step-00000008"
    for words in ("not finite in step 8", "Try a lower optimizer.base_lr", str(folder), "--allow-change"):
        assert words in str(caught.value)
    with np.load(folder / "batch.npz") as saved:
        fed = next(iter(stream(7, poisoned=7)))
        for name, expected in zip(("images", "labels", "weights", "index"), fed, strict=True):
            np.testing.assert_array_equal(saved[name], expected.numpy())
    assert checkpoint.verify_checkpoint(folder) is None
    met = fresh_state()
    checkpoint.restore(met, folder)
    assert contents(met) == contents(seven_steps)
    assert (met.step, met.history) == (7, seven_steps.history)


def test_no_more_bad_steps_are_passed_over_than_the_config_allows(tmp_path: Path):
    config = with_train(on_nan={"skip": 2})
    state = fresh_state()
    policy = Policy(config, tmp_path)
    policy._training_stream = lambda start: stream(start).map(
        lambda images, labels, weights, index: (images, labels, weights * np.nan, index)
    )
    runtime, schedule = (
        setup_devices(config.runtime, config.seed),
        schedule_of(config, STEPS),
    )
    loop = Trainer(config.train, config.optimizer, runtime, schedule, SINGLE_LABEL, [], lambda: False, policy)
    with pytest.raises(TrainingError, match=r"not finite in step 3; .*\n2 steps have already been skipped"):
        loop.fit(state, lambda stage: StageInputs(state.model, policy._training_stream, lambda: {}))
    assert state.skipped == [0, 1]
    assert {path.name for path in (tmp_path / "nan").iterdir()} == {f"step-{number:08d}" for number in (1, 2, 3)}


def diverging(monkeypatch: pytest.MonkeyPatch, step: int, above: float) -> None:
    """Makes a step bad at a high learning rate only."""
    real = TrainStep.__call__

    def train_step(self: TrainStep, batch: tuple, rate: float) -> None:
        images, labels, weights, index = batch
        bad = int(self._optimizer.iterations.numpy()) == step and rate > above
        real(self, (images, labels, weights * (np.nan if bad else 1.0), index), rate)

    monkeypatch.setattr(TrainStep, "__call__", train_step)


@pytest.mark.parametrize(  # in the first epoch, in the second, in the second stage
    "bad", [*(pytest.param(step, marks=pytest.mark.slow) for step in (3, 7)), 12]
)
def test_a_run_that_diverges_goes_back_to_the_epochs_start_with_half_the_learning_rate(
    tmp_path: Path, monkeypatch, bad: int
):
    config = with_train(on_nan="rollback", checkpoint_every_steps=1)
    rates = [
        stage.learning_rate(step - stage.first)
        for stage in schedule_of(config, STEPS).stages
        for step in range(stage.first, stage.stop)
    ]
    diverging(monkeypatch, bad, above=0.6 * rates[bad])
    state = fresh_state()
    policy = Policy(config, tmp_path)
    policy.prepare(state)
    state.changes = [{"step": 0, "key": "seed", "was": 1, "is": 2}]  # allowed since that checkpoint
    history = run(state, [policy.checkpoint_callback], config=config, on_nan=policy)
    assert [change["key"] for change in state.changes] == ["seed"]
    epoch = bad // STEPS
    assert state.rollbacks == 1
    assert [record["epoch"] for record in history] == [1, 2, 3, 4], "no epoch is lost or counted twice"
    factors = [record["learning_rate"] / rates[int(record["step"]) - 1] for record in history]
    np.testing.assert_allclose(factors, [1.0] * epoch + [0.5] * (4 - epoch))
    assert (
        f"Rolled back to the end of step {epoch * STEPS} with half the learning rate, 1 of at most 3 times"
        in policy.messages[0]
    )
    [newest] = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name == "step-00000020"]
    assert json.loads((tmp_path / "checkpoints" / newest / "metadata.json").read_text())["rollbacks"] == 1


def test_a_run_goes_back_a_few_times_only(tmp_path: Path, monkeypatch):
    config = with_train(on_nan="rollback")
    diverging(monkeypatch, 7, above=0.0)
    state = fresh_state()
    policy = Policy(config, tmp_path)
    policy.prepare(state)
    with pytest.raises(TrainingError, match=r"not finite in step 8; .*\nThe run has already been rolled back 3 times"):
        run(state, [policy.checkpoint_callback], config=config, on_nan=policy)
    assert len(policy.messages) == MAX_ROLLBACKS


def test_a_run_does_not_go_back_to_a_damaged_checkpoint(tmp_path: Path, monkeypatch):
    config = with_train(on_nan="rollback")
    diverging(monkeypatch, 7, above=0.0)
    policy = Policy(config, tmp_path)

    class Damage(Recorder):
        def on_checkpoint(self, state: TrainState) -> None:
            (tmp_path / "checkpoints" / "step-00000005" / "model.npz").write_bytes(b"")

    with pytest.raises(
        TrainingError, match=r"not finite in step 8; .*\n.*cannot go back to .*step-00000005: model.npz is damaged"
    ):
        run(fresh_state(), [policy.checkpoint_callback, Damage()], config=config, on_nan=policy)


def test_a_stage_that_was_left_is_left_again_when_the_run_goes_back_into_it(tmp_path: Path, monkeypatch):
    stages = [{"epochs": 4, "trainable": "head"}, {"epochs": 2, "trainable": "block6"}]
    train = {
        "global_batch_size": 4,
        "early_stopping": {"patience": 1, "min_delta": 0.2},
        "on_nan": "rollback",
        "stages": stages,
    }
    config = Config.model_validate({"data": {"source": "digits"}, "optimizer": {"base_lr": 1.0}, "train": train})
    rate = schedule_of(config, STEPS).stages[1].learning_rate(2)
    diverging(monkeypatch, 12, above=0.6 * rate)  # the third step of the second stage, ten of the first being left out
    state = fresh_state()
    policy, recorder = Policy(config, tmp_path), Recorder()
    policy.prepare(state)
    accuracies = (0.5, 0.6, None, None, 0.5, 0.9)  # the second epoch is the best so far, but too little better to go on
    history = run(state, [policy.checkpoint_callback, recorder], config=config, on_nan=policy, accuracies=accuracies)
    assert [record["epoch"] for record in history] == [1, 2, 5, 6]
    assert state.rollbacks == 1
    assert "not finite in step 23" in policy.messages[0]
    assert "Rolled back to the end of step 10" in policy.messages[0]
    assert recorder.skipped_images == [2, 2]
    assert state.best["epoch"] == 6


def test_a_run_that_is_resumed_at_its_end_still_has_its_average(whole: FinishedRun):
    resumed = fresh_state()
    checkpoint.restore(resumed, checkpoint.latest_valid_checkpoint(whole.checkpoints)[0])
    assert run(resumed, []) == whole.history
    for one in (whole.state, resumed):
        with one.averaged():
            assert all(
                np.array_equal(v.numpy(), a.numpy()) for v, a in zip(one.ema.averaged, one.ema.variables, strict=True)
            )
