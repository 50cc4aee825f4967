"""The official RMSProp, the learning rate by step, and the moving average, each against figures worked out here."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.optimizer import OPTIMIZERS, OptimizerConfig
from pipeline.config.train import StageConfig
from pipeline.training.optimizers import ModelEMA, build_optimizer, uses_weight_decay
from pipeline.training.schedule import learning_rate_schedule


def test_rmsprop_equals_five_steps_of_the_official_rule_from_an_accumulator_of_ones():
    rng = np.random.default_rng(0)
    value = rng.normal(size=(3, 4)).astype(np.float32)
    gradients = rng.normal(size=(5, 3, 4)).astype(np.float32)
    variable = keras.Variable(value)
    optimizer = build_optimizer(OptimizerConfig(name="rmsprop"), [variable])

    mean_square, momentum, expected = np.ones_like(value), np.zeros_like(value), value.copy()
    for gradient in gradients:
        mean_square = 0.9 * mean_square + 0.1 * gradient**2
        momentum = 0.9 * momentum + 0.016 * gradient / np.sqrt(mean_square + 1e-3)
        expected = expected - momentum
        optimizer.update_step(tf.constant(gradient), variable, tf.constant(0.016))
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5, atol=1e-6)

    from_zeros = keras.Variable(value)
    keras_own = keras.optimizers.RMSprop(0.016, rho=0.9, momentum=0.9, epsilon=1e-3)
    keras_own.build([from_zeros])
    for gradient in gradients:
        keras_own.update_step(tf.constant(gradient), from_zeros, tf.constant(0.016))
    assert np.abs(from_zeros.numpy() - expected).max() > 0.01, "the test must distinguish the two starts"


def test_sgd_is_nesterov_with_momentum():
    variable = keras.Variable(np.array([1.0], np.float32))
    optimizer = build_optimizer(OptimizerConfig(name="sgd"), [variable])
    for _ in range(2):
        optimizer.update_step(tf.constant([1.0]), variable, tf.constant(0.1))
    # velocity: -0.1, -0.19; Nesterov adds 0.9 * velocity - 0.1 each time
    assert variable.numpy()[0] == pytest.approx(1 - 0.19 - 0.271, abs=1e-6)


def test_lion_moves_by_the_sign_of_the_interpolated_momentum():
    variable = keras.Variable(np.array([1.0, -1.0], np.float32))
    optimizer = build_optimizer(OptimizerConfig(name="lion"), [variable])
    momentum, expected = np.zeros(2), np.array([1.0, -1.0])
    for gradient in ([1.0, -2.0], [-0.05, 3.0], [0.5, -0.1]):
        expected = expected - 0.1 * np.sign(0.9 * momentum + 0.1 * np.array(gradient))
        momentum = 0.99 * momentum + 0.01 * np.array(gradient)
        optimizer.update_step(tf.constant(gradient), variable, tf.constant(0.1))
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6)


def test_lamb_scales_adams_direction_to_the_norm_of_the_weights():
    rng = np.random.default_rng(1)
    value = rng.normal(size=(3, 4)).astype(np.float32)
    variable = keras.Variable(value)
    optimizer = build_optimizer(OptimizerConfig(name="lamb"), [variable])
    gradient = rng.normal(size=(3, 4)).astype(np.float32)
    optimizer.update_step(tf.constant(gradient), variable, tf.constant(0.1))
    direction = gradient / (np.abs(gradient) + 1e-7)  # both moments of the first step, corrected
    expected = value - 0.1 * np.linalg.norm(value) / np.linalg.norm(direction) * direction
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_as_many_slots_as_its_spec_says(name):
    variables = [keras.Variable(np.ones((5, 7), np.float32))]
    optimizer = build_optimizer(OptimizerConfig(name=name), variables)
    slots = [variable for variable in optimizer.variables if tuple(variable.shape) == (5, 7)]
    assert len(slots) == OPTIMIZERS[name].num_slots
    assert hasattr(keras.optimizers, OPTIMIZERS[name].keras_class)


def test_weight_decay_spares_batch_normalization_only():
    inputs = keras.Input((4, 4, 3))
    outputs = keras.layers.Dense(2)(keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(inputs)))
    names = [
        (variable.path, uses_weight_decay(variable)) for variable in keras.Model(inputs, outputs).trainable_variables
    ]
    assert [reached for _, reached in names] == [True, True, False, False, True, True], names


def rate(
    step: float, *, steps_per_epoch: int = 10, batch: int = 256, stage: StageConfig | None = None, **optimizer: object
) -> float:
    config = OptimizerConfig(**{"base_lr": 0.016, "warmup_epochs": 5, **optimizer})
    return learning_rate_schedule(
        config, stage or StageConfig(epochs=350), global_batch_size=batch, steps_per_epoch=steps_per_epoch
    )(step)


def test_learning_rate_scales_with_the_global_batch_size():
    assert rate(60, batch=512) == pytest.approx(2 * rate(60, batch=256))


def test_exponential_schedule_falls_in_stairs_counted_from_step_zero():
    assert rate(71) == pytest.approx(0.016 * 0.97**2)  # floor(71 / 24) = 2: warm-up's 50 steps count
    assert rate(72) == pytest.approx(0.016 * 0.97**3)
    assert rate(95) == rate(72)


def test_warm_up_rises_linearly_to_the_base():
    rates = [rate(step, schedule="constant") for step in range(51)]
    np.testing.assert_allclose(np.diff(rates[:50]), 0.016 / 51)
    assert rates[0] == pytest.approx(0.016 / 51)
    assert rates[50] == 0.016


def test_cosine_ends_at_zero_with_its_stage():
    stage = StageConfig(epochs=10, schedule="cosine", warmup_epochs=2, base_lr=0.1)
    assert rate(20, stage=stage) == pytest.approx(0.1)
    assert rate(60, stage=stage) == pytest.approx(0.05)
    assert 0 < rate(99, stage=stage) < 0.001


@given(
    st.sampled_from(["exponential", "cosine", "constant"]),
    st.integers(1, 400),
    st.integers(1, 2000),
    st.floats(0, 400),
    st.floats(0, 1, exclude_max=True),
)
def test_learning_rate_is_positive_and_never_above_its_base(schedule, epochs, steps_per_epoch, warmup_epochs, place):
    stage = StageConfig(epochs=epochs, schedule=schedule, warmup_epochs=warmup_epochs)
    value = rate(int(place * epochs * steps_per_epoch), stage=stage, steps_per_epoch=steps_per_epoch)
    assert 0 < value <= 0.016


def test_moving_average_warms_up_and_covers_batch_norm_statistics():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.BatchNormalization()(inputs))
    average = ModelEMA(model.weights, decay=0.25)
    average.track(model.weights)
    expected = [variable.numpy() for variable in model.weights]
    for step, value in enumerate([1.0, 5.0, -2.0, 7.0]):
        for variable in model.weights:
            variable.assign(tf.fill(variable.shape, value))
        average.update(tf.constant(step), tf.distribute.get_strategy())
        decay = min(0.25, (1 + step) / (10 + step))  # 0.1, 0.18, 0.25, 0.25
        expected = [decay * old + (1 - decay) * value for old in expected]
    assert len(average.variables) == 4, "gamma, beta and the two moving statistics"
    for variable, wanted in zip(average.variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), wanted, rtol=1e-6)


def test_swapping_the_average_in_leaves_the_weights_as_they_were_even_after_an_error():
    variable = keras.Variable(np.float32(3.0))
    average = ModelEMA([variable], decay=0.5)
    average.track([variable])
    variable.assign(4.0)
    seen = []

    def fail_inside() -> None:
        with average.applied():
            seen.append(float(variable.numpy()))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert (seen, float(variable.numpy())) == ([3.0], 4.0)
    assert average.variables[0].numpy() == 3.0


def test_a_variable_that_is_thawed_late_moves_as_one_that_was_trained_from_the_start() -> None:
    early, late, plain = (keras.Variable(np.ones(3, np.float32)) for _ in range(3))
    ours = build_optimizer(OptimizerConfig(name="adamw"), [early, late])
    keras_own = keras.optimizers.Adam(0.1)
    keras_own.build([plain])
    for step in range(100):
        gradient = tf.constant([0.1, -2.0, 3.0]) * float(np.cos(step))
        [powers] = ours.bias_correction([early])
        ours.update_step(gradient, early, tf.constant(0.1), *powers)
        ours.iterations.assign_add(1)
        keras_own.update_step(gradient, plain, tf.constant(0.1))
        keras_own.iterations.assign_add(1)
    np.testing.assert_allclose(early.numpy(), plain.numpy(), rtol=1e-5)
    [powers] = ours.bias_correction([late])
    ours.update_step(tf.constant([0.1, -2.0, 3.0]), late, tf.constant(0.1), *powers)
    np.testing.assert_allclose(late.numpy(), [0.9, 1.1, 0.9], rtol=1e-4)
