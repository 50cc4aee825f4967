"""A checkpoint is complete or absent, is used only if verified, and restores every bit."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.config.optimizer import OPTIMIZERS, OptimizerConfig
from pipeline.errors import RunError, TrainingError
from pipeline.models.layers import PerReplicaDropout
from pipeline.training import checkpoint
from pipeline.training.optimizers import ModelEMA, build_optimizer, update_arguments
from pipeline.training.state import MetricAccumulator, TrainState

IDENTITY = {"config": {"seed": 1}}


def make_state(units: int = 3, *, average: bool = True, optimizer_name: str = "rmsprop") -> TrainState:
    inputs = keras.Input((4,))
    x = keras.layers.BatchNormalization(name="norm")(keras.layers.Dense(units, name="dense")(inputs))
    model = keras.Model(inputs, PerReplicaDropout(0.5, seed=7, name="drop")(x))
    optimizer = build_optimizer(OptimizerConfig(name=optimizer_name), model.trainable_variables)
    return TrainState(model, optimizer, ModelEMA(model.weights, 0.9) if average else None, MetricAccumulator())


def scramble(state: TrainState, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for variables in state.groups().values():
        for variable in variables.values():
            drawn = (
                rng.normal(size=variable.shape)
                if "float" in str(variable.dtype)
                else rng.integers(0, 1000, variable.shape)
            )
            variable.assign(tf.cast(drawn, variable.dtype))
    state.step = int(rng.integers(1, 1000))
    state.history = [{"epoch": 1, "step": int(rng.integers(1, 1000)), "val/accuracy": float(rng.random())}]


def contents(state: TrainState) -> dict[str, bytes]:
    return {
        f"{group}/{name}": v.numpy().tobytes()
        for group, variables in state.groups().items()
        for name, v in variables.items()
    }


def test_every_bit_comes_back_random_generators_included(tmp_path):
    state = make_state()
    scramble(state, 1)
    written = checkpoint.save(state, tmp_path, IDENTITY, keep=1)
    fresh = make_state()
    assert contents(fresh) != contents(state)
    checkpoint.restore(fresh, written)
    assert contents(fresh) == contents(state)
    assert (fresh.step, fresh.history, fresh.best) == (state.step, state.history, state.best)
    names = list(contents(state))
    for wanted in ("model/drop/seed_generator_state", "model/norm/moving_variance", "totals/loss"):
        assert wanted in names
    assert any("iteration" in name for name in names)
    ones = tf.ones((8, 3))
    np.testing.assert_array_equal(
        fresh.model.layers[-1](ones, training=True), state.model.layers[-1](ones, training=True)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_bit_identically_from_a_checkpoint_with_every_optimizer(tmp_path, name):
    def train(state: TrainState, steps: range) -> None:
        trainable = state.model.trainable_variables
        for step in steps:
            rng = np.random.default_rng(step)
            for variable, further in zip(trainable, update_arguments(state.optimizer, trainable), strict=True):
                gradient = tf.constant(rng.normal(size=variable.shape), tf.float32)
                state.optimizer.update_step(gradient, variable, tf.constant(0.01), *further)
            state.optimizer.iterations.assign_add(1)
            state.step += 1

    uninterrupted, stopped, resumed = (make_state(optimizer_name=name) for _ in range(3))
    for state in (stopped, resumed):
        for ours, other in zip(state.model.variables, uninterrupted.model.variables, strict=True):
            ours.assign(other)
    train(uninterrupted, range(7))
    train(stopped, range(3))
    checkpoint.restore(resumed, checkpoint.save(stopped, tmp_path, IDENTITY, keep=1))
    train(resumed, range(resumed.step, 7))
    optimizer_and_model = [key for key in contents(resumed) if not key.startswith("average")]
    assert {key: contents(resumed)[key] for key in optimizer_and_model} == {
        key: contents(uninterrupted)[key] for key in optimizer_and_model
    }


def test_one_changed_bit_is_noticed_by_the_comparison_itself():
    state, other = make_state(), make_state()
    scramble(state, 1)
    scramble(other, 1)
    assert contents(state) == contents(other)
    kernel = other.model.get_layer("dense").kernel
    bits = kernel.numpy().view(np.int32)
    bits[0, 0] ^= 1
    kernel.assign(bits.view(np.float32))
    assert contents(state) != contents(other)


def test_the_newest_and_the_best_stay(tmp_path):
    state = make_state()
    for step in (10, 20, 30, 40, 50):
        state.step = step
        if step == 20:
            state.best = {"step": 20, "val/accuracy": 0.9}
        checkpoint.save(state, tmp_path, IDENTITY, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000040", "step-00000050"]
    assert checkpoint.latest_valid_checkpoint(tmp_path) == (tmp_path / "step-00000050", [])


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no metadata", "history", "hash"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    state = make_state()
    for step in (1, 2):
        state.step = step
        checkpoint.save(state, tmp_path, IDENTITY, keep=2)
    newest = tmp_path / "step-00000002"
    file = newest / {"no metadata": "metadata.json", "history": "metadata.json", "hash": "metadata.sha256"}.get(
        damage, "optimizer.npz"
    )
    content = bytearray(file.read_bytes())
    if damage == "history":  # it is still good JSON
        file.write_bytes(bytes(content).replace(b'"history": []', b'"history": [1]'))
    elif damage in ("flip", "hash"):
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    elif damage == "truncate":
        file.write_bytes(bytes(content[:-7]))
    else:
        file.unlink()
    found, problems = checkpoint.latest_valid_checkpoint(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert len(problems) == 1
    assert str(newest) in problems[0]
    state.step = 2
    checkpoint.save(state, tmp_path, IDENTITY, keep=2)  # the run came here again: the damaged one is replaced
    assert checkpoint.latest_valid_checkpoint(tmp_path) == (newest, [])


def test_a_best_epoch_whose_weights_are_lost_is_forgotten(tmp_path):
    state = make_state()
    for step, best in ((1, 1), (2, 1), (3, 3)):
        state.step, state.best = step, {"step": best, "val/accuracy": 0.5}
        checkpoint.save(state, tmp_path, IDENTITY, keep=2)
    (tmp_path / "step-00000003" / "model.npz").write_bytes(b"")
    newest, _ = checkpoint.latest_valid_checkpoint(tmp_path)
    assert newest == tmp_path / "step-00000002"
    checkpoint.restore(state, newest)
    assert (state.step, state.best) == (2, None), "step 1, the best by then, was removed when step 3 became it"


def test_somebody_elses_hidden_files_are_left_alone(tmp_path):
    (tmp_path / ".nfs0001").write_text("x")
    checkpoint.save(make_state(), tmp_path, IDENTITY, keep=1)
    assert (tmp_path / ".nfs0001").exists()


def test_a_kill_while_writing_leaves_the_older_checkpoint_and_no_litter(tmp_path, monkeypatch):
    state = make_state()
    state.step = 1
    checkpoint.save(state, tmp_path, IDENTITY, keep=1)
    real, calls = checkpoint._write_synced, []

    def killed(path, content):
        calls.append(path.name)
        if len(calls) == 3:
            path.write_bytes(content[: len(content) // 2])
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(checkpoint, "_write_synced", killed)
    state.step = 2
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(state, tmp_path, IDENTITY, keep=1)
    assert checkpoint.latest_valid_checkpoint(tmp_path) == (tmp_path / "step-00000001", [])
    monkeypatch.setattr(checkpoint, "_write_synced", real)
    checkpoint.save(state, tmp_path, IDENTITY, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_checkpoint_of_another_network_is_refused_in_words(tmp_path):
    written = checkpoint.save(make_state(3), tmp_path / "a", IDENTITY, keep=1)
    with pytest.raises(RunError, match="does not fit this program's model"):
        checkpoint.restore(make_state(5), written)


def test_the_manifest_says_what_the_run_was(tmp_path):
    state = make_state()
    scramble(state, 2)
    metadata = json.loads((checkpoint.save(state, tmp_path, IDENTITY, keep=1) / "metadata.json").read_text())
    assert metadata["identity"] == IDENTITY
    assert metadata["step"] == state.step
    assert set(metadata["sha256"]) == {"model.npz", "optimizer.npz", "average.npz", "totals.npz"}
    assert metadata["versions"]["tensorflow"] == tf.__version__


def test_the_last_epochs_checkpoint_stays_for_a_rollback(tmp_path):
    state = make_state()
    for step in (0, 2, 4, 5, 6, 8):
        state.step = step
        state.history = [{"step": 5}] if step >= 5 else []
        checkpoint.save(state, tmp_path, IDENTITY, keep=1)
        assert checkpoint.checkpoint_path(tmp_path, state.epoch_start).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000008"]


def test_a_disk_that_takes_no_more_is_named_and_loses_nothing(tmp_path, monkeypatch):
    state = make_state()
    checkpoint.save(state, tmp_path, IDENTITY, keep=1)
    monkeypatch.setattr(
        checkpoint.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    state.step = 7
    with pytest.raises(
        TrainingError, match=r"step-00000007: cannot be written \(No space left on device\).*continue with --resume"
    ):
        checkpoint.save(state, tmp_path, IDENTITY, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


def test_a_change_that_asks_for_what_a_checkpoint_lacks_is_refused_in_words(tmp_path):
    state = make_state(average=False)
    scramble(state, 1)
    written = checkpoint.save(state, tmp_path, IDENTITY, keep=1)
    with pytest.raises(
        RunError,
        match=r"has no average, which this run needs; resume with the program, network and optimizer that wrote it",
    ):
        checkpoint.restore(make_state(), written)


def test_what_had_an_average_of_its_own_has_it_again_whatever_is_trained_next(tmp_path):
    state = make_state()
    apart = [variable for variable in state.ema.averaged if variable.path == "dense/kernel"]
    state.ema.track(apart)
    kernel = state.model.get_layer("dense").kernel.numpy()
    for variable in apart:
        variable.assign_add(np.ones(variable.shape))
    written = checkpoint.save(state, tmp_path, IDENTITY, keep=1)
    fresh = make_state()
    checkpoint.restore(fresh, written)
    followed = [variable.path for variable in fresh.ema.averaged if fresh.ema.tracks_any([variable])]
    assert followed == ["dense/kernel"]
    with fresh.averaged():
        np.testing.assert_array_equal(fresh.model.get_layer("dense").kernel.numpy(), kernel)
    assert not np.array_equal(fresh.model.get_layer("dense").kernel.numpy(), kernel)


def test_what_never_moved_takes_no_room_and_is_put_back_over_what_has_moved_since(tmp_path):
    state = make_state(units=4096)
    start, weights = contents(state), sum(v.numpy().nbytes for v in state.model.variables)
    written = checkpoint.save(state, tmp_path, IDENTITY, keep=1)
    assert sum(file.stat().st_size for file in written.iterdir()) < weights, (
        "neither slots nor averages, nor what batch norm starts from"
    )
    scramble(state, 1)
    assert contents(state) != start
    checkpoint.restore(state, written)
    assert contents(state) == start


def test_a_checkpoint_is_a_function_of_the_state_whatever_was_written_or_restored_before(tmp_path):
    state, other = make_state(), make_state()
    for seed in (1, 2):
        written = checkpoint.save(state, tmp_path / "one", IDENTITY, keep=3)
        scramble(state, seed)
    checkpoint.restore(state, written)
    scramble(other, 1)
    one, two = (
        checkpoint.save(each, tmp_path / name, IDENTITY, keep=3) for each, name in ((state, "one"), (other, "other"))
    )
    assert checkpoint.read_metadata(one)["sha256"] == checkpoint.read_metadata(two)["sha256"]


def test_values_that_are_equal_but_not_the_same_bits_are_saved(tmp_path):
    """Zero has two signs, and NaN another payload than its like."""
    state = make_state()
    layer, averages = state.model.get_layer("dense"), state.groups()["average"]
    of = {variable.path: averages[name] for name, variable in state.averaged_variables().items()}
    of["dense/bias"].assign([-0.0, -0.0, -0.0])
    layer.kernel.assign(np.full((4, 3), 0x7FC00000, np.uint32).view(np.float32))
    of["dense/kernel"].assign(np.full((4, 3), 0x7FC00001, np.uint32).view(np.float32))
    state.model.get_layer("norm").beta.assign([0.0, -0.0, 0.0])
    fresh = make_state()
    checkpoint.restore(fresh, checkpoint.save(state, tmp_path, IDENTITY, keep=1))
    assert contents(fresh) == contents(state)
    assert np.signbit(of["dense/bias"].numpy()).all()
