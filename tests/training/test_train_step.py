"""The train step: micro-batches, the check for NaN, weight decay, frozen layers; and the step on several replicas."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from short_network import short_network

from pipeline.config.optimizer import OPTIMIZERS
from pipeline.config.schema import Config
from pipeline.distributed.devices import Runtime, setup_devices
from pipeline.errors import ConfigError
from pipeline.models.efficientnet import LayerTypes, to_inference_model
from pipeline.models.layers import PerReplicaDropout
from pipeline.tasks import SINGLE_LABEL
from pipeline.training.memory import BatchSize, check_batch
from pipeline.training.optimizers import FUSED_CLASSES, ModelEMA, build_optimizer
from pipeline.training.state import MetricAccumulator
from pipeline.training.train_step import TrainStep

PROJECT = Path(__file__).parents[2]
CLASSES = 4


def small_network(*, drop: float = 0.0, batch_norm: bool = True) -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    x = keras.layers.Conv2D(6, 3, name="conv", kernel_initializer=keras.initializers.HeNormal(seed=1))(x)
    if batch_norm:
        x = keras.layers.BatchNormalization(name="norm")(x)
    x = PerReplicaDropout(drop, seed=5, name="drop")(keras.layers.Activation("swish")(x))
    x = keras.layers.Dense(CLASSES, name="predictions", kernel_initializer=keras.initializers.HeNormal(seed=2))(
        keras.layers.GlobalAveragePooling2D()(x)
    )
    return keras.Model(inputs, x)


def dense_network() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 127.5, -1)(inputs))
    return keras.Model(
        inputs,
        keras.layers.Dense(CLASSES, name="predictions", kernel_initializer=keras.initializers.HeNormal(seed=2))(x),
    )


def make_config(**sections: dict) -> Config:
    return Config.model_validate({"data": {"source": "digits"}, "model": {"weights": None}, **sections})


def batch(size: int = 8, seed: int = 0) -> tuple[tf.Tensor, ...]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8)
    labels = rng.dirichlet(np.ones(CLASSES), size).astype(np.float32)
    return tuple(tf.constant(array) for array in (images, labels, np.ones(size, np.float32), np.arange(size)))


class Bench:
    """A network with everything that a step changes."""

    def __init__(self, model: keras.Model, config: Config) -> None:
        self.model, self.config = model, config
        self.runtime = setup_devices(config.runtime, config.seed)
        self.optimizer = build_optimizer(config.optimizer, model.trainable_variables)
        self.ema = ModelEMA(model.weights, 0.99)
        self.metrics = MetricAccumulator()

    def step(self) -> TrainStep:
        config = self.config
        return TrainStep(
            self.model,
            self.optimizer,
            self.ema,
            self.metrics,
            config.train,
            config.train.global_batch_size,
            config.optimizer,
            self.runtime,
            SINGLE_LABEL,
        )

    def everything(self) -> list[np.ndarray]:
        variables = [
            *self.model.variables,
            *self.optimizer.variables,
            *self.ema.variables,
            *self.metrics.sums.values(),
        ]
        return [variable.numpy() for variable in variables]


def test_gradient_is_that_of_the_smoothed_soft_label_loss_with_half_squared_norm():
    config = make_config(
        optimizer={"name": "sgd", "weight_decay": 0.01},
        train={"global_batch_size": 8, "label_smoothing": 0.1},
        runtime={"precision": "float32"},
    )
    bench = Bench(small_network(batch_norm=False), config)
    images, labels, *_ = batch()
    with tf.GradientTape() as tape:
        smoothed = 0.9 * labels + 0.1 / CLASSES
        logits = bench.model(tf.cast(images, tf.float32))
        loss = tf.reduce_mean(-tf.reduce_sum(smoothed * tf.nn.log_softmax(logits), -1))
        objective = loss + 0.01 * sum(tf.nn.l2_loss(variable.value) for variable in bench.model.trainable_variables)
    gradients = tape.gradient(objective, [variable.value for variable in bench.model.trainable_variables])
    before = [variable.numpy() for variable in bench.model.trainable_variables]
    bench.step()(batch(), 0.1)
    for old, gradient, variable in zip(before, gradients, bench.model.trainable_variables, strict=True):
        np.testing.assert_allclose(
            variable.numpy(), old - 0.1 * 1.9 * gradient, rtol=1e-4, atol=1e-6
        )  # Nesterov's first step
    sums = bench.metrics.read()
    assert sums["images"] == 8
    assert sums["loss"] / 8 == pytest.approx(float(loss), rel=1e-5)
    assert sums["gradient_norm"] == pytest.approx(float(tf.linalg.global_norm(gradients)), rel=1e-5)
    assert sums["correct"] == np.sum(np.argmax(logits, -1) == np.argmax(labels, -1))


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if spec.decoupled_weight_decay])
def test_decoupled_weight_decay_shrinks_the_weights_before_the_update(name):
    config = make_config(optimizer={"name": name, "weight_decay": 0.5}, train={"global_batch_size": 8})
    without = make_config(optimizer={"name": name, "weight_decay": 0.0}, train={"global_batch_size": 8})
    results = []
    for one in (config, without):
        bench = Bench(small_network(), one)
        before = {variable.path: variable.numpy() for variable in bench.model.trainable_variables}
        bench.step()(batch(), 0.01)
        results.append({variable.path: variable.numpy() for variable in bench.model.trainable_variables})
    for path, old in before.items():
        shrink = 0.0 if path.startswith("norm") else 0.01 * 0.5
        shrunk = 1 - shrink if name == "lamb" and np.any(old) else 1.0  # LAMB's update is as long as the weights
        update = (results[1][path] - old) * shrunk
        np.testing.assert_allclose(results[0][path], old - shrink * old + update, atol=1e-6)


def test_micro_batches_give_the_same_update_as_the_full_batch():
    results = []
    for accumulation in (1, 4):
        bench = Bench(
            small_network(batch_norm=False),
            make_config(train={"global_batch_size": 8, "gradient_accumulation_steps": accumulation}),
        )
        step = bench.step()
        for number in range(3):
            step(batch(seed=number), 0.01)
        results.append([variable.numpy() for variable in bench.model.weights])
    for full, accumulated in zip(*results, strict=True):
        np.testing.assert_allclose(full, accumulated, rtol=1e-4, atol=1e-6)


def test_class_weights_count_a_mixed_image_as_the_shares_that_it_is_mixed_from():
    """An image that counts twice moves the weights as two of it would, under label smoothing, too.

    A mixed one as its parts.
    """
    config = make_config(
        optimizer={"name": "sgd", "weight_decay": 0.0},
        train={"global_batch_size": 8, "label_smoothing": 0.2},
        runtime={"precision": "float32"},
    )
    counts = np.array([2.0, 1.0, 0.5, 3.0], np.float32)
    images, labels, _, index = batch()
    bench = Bench(small_network(batch_norm=False), config)
    step = TrainStep(
        bench.model,
        bench.optimizer,
        bench.ema,
        bench.metrics,
        config.train,
        config.train.global_batch_size,
        config.optimizer,
        bench.runtime,
        SINGLE_LABEL,
        class_weights=counts,
    )
    with tf.GradientTape() as tape:
        logits = bench.model(tf.cast(images, tf.float32))
        loss = 0.0
        for k in range(
            CLASSES
        ):  # every image once for each class that is in it, as a plain smoothed label of that class
            smoothed = 0.8 * tf.one_hot(k, CLASSES) + 0.2 / CLASSES
            loss += (
                tf.reduce_sum(labels[:, k] * counts[k] * -tf.reduce_sum(smoothed * tf.nn.log_softmax(logits), -1)) / 8
            )
    gradients = tape.gradient(loss, [v.value for v in bench.model.trainable_variables])
    before = [v.numpy() for v in bench.model.trainable_variables]
    step((images, labels, tf.ones(8), index), 0.1)
    for old, gradient, variable in zip(before, gradients, bench.model.trainable_variables, strict=True):
        np.testing.assert_allclose(variable.numpy(), old - 0.1 * 1.9 * gradient, rtol=1e-4, atol=1e-6)
    sums = bench.metrics.read()
    assert sums["loss"] / 8 == pytest.approx(float(loss), rel=1e-5)
    assert sums["images"] == 8
    assert sums["correct"] == np.sum(np.argmax(logits, -1) == np.argmax(labels, -1)), "the accuracy counts images"


@pytest.mark.parametrize("poison", ["weights", "labels"])
def test_a_step_that_is_not_finite_changes_nothing_at_all(poison):
    bench = Bench(small_network(drop=0.3), make_config(train={"global_batch_size": 8}))
    step = bench.step()
    step(batch(), 0.01)
    before = bench.everything()
    images, labels, weights, index = batch(seed=1)
    bad = (images, labels * np.inf, weights, index) if poison == "labels" else (images, labels, weights * np.nan, index)
    step(bad, 0.01)
    assert bool(bench.metrics.halted)
    for old, new in zip(before, bench.everything(), strict=True):
        np.testing.assert_array_equal(old, new)
    step(batch(seed=2), 0.01)
    for old, new in zip(before, bench.everything(), strict=True):
        np.testing.assert_array_equal(old, new, "a halted run must stay where it is")


def test_frozen_layers_keep_weights_statistics_and_do_not_drop():
    bench = Bench(small_network(drop=0.5), make_config(train={"global_batch_size": 8}))
    for layer in bench.model.layers:
        layer.trainable = layer.name == "predictions"
    before = {variable.path: variable.numpy() for variable in bench.model.variables}
    step = bench.step()
    for number in range(3):
        step(batch(seed=number), 0.1)
    moved = {
        variable.path
        for variable in bench.model.variables
        if not np.array_equal(variable.numpy(), before[variable.path])
    }
    assert moved == {"predictions/kernel", "predictions/bias"}


def test_the_averages_follow_the_steps():
    bench = Bench(small_network(), make_config(train={"global_batch_size": 8}))
    start = [variable.numpy() for variable in bench.model.weights]
    bench.step()(batch(), 0.1)
    for old, variable, average in zip(start, bench.model.weights, bench.ema.variables, strict=True):
        np.testing.assert_allclose(
            average.numpy(), 0.1 * old + 0.9 * variable.numpy(), rtol=1e-5, atol=1e-6
        )  # min(0.99, 1 / 10)


MASKS = """
import sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from pipeline.models.layers import PerReplicaDropout
strategy = tf.distribute.MirroredStrategy([device.name for device in tf.config.list_logical_devices("CPU")])
with strategy.scope():
    layer = PerReplicaDropout(0.5, noise_shape=(None, 1), seed=3)
    layer.build((None, 5))
masks = strategy.run(tf.function(lambda: layer(tf.ones((64, 5)), training=True)))
np.save(sys.argv[1], np.stack([mask.numpy() for mask in strategy.experimental_local_results(masks)]))
"""


@pytest.mark.slow
def test_two_replicas_draw_different_masks(tmp_path):
    command = [sys.executable, "-c", MASKS, str(tmp_path / "masks.npy")]
    ran = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    masks = np.load(tmp_path / "masks.npy")
    assert masks.shape == (2, 64, 5)
    assert np.mean(masks[0] != masks[1]) > 0.3
    assert np.all(masks == masks[:, :, :1]), "the noise shape makes one draw per image"
    assert set(np.unique(masks)) == {0.0, 2.0}


LOCAL_STATISTICS = """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from test_train_step import batch, make_config
import keras
from pipeline.models.layers import layer_types
from pipeline.training.optimizers import ModelEMA, build_optimizer
from pipeline.distributed.devices import setup_devices
from pipeline.training.state import MetricAccumulator
from pipeline.training.train_step import TrainStep
from pipeline.tasks import SINGLE_LABEL
config = make_config(train={"global_batch_size": 8}, runtime={"strategy": "mirrored", "sync_batch_norm": False})
runtime = setup_devices(config.runtime, config.seed)
with runtime.strategy.scope():
    inputs = keras.Input((8, 8, 3))
    types = layer_types(jit_compile=bool(runtime.jit_compile), sync_batch_norm=runtime.sync_batch_norm)
    norm = types.norm(momentum=0.5, name="norm")
    x = keras.layers.GlobalAveragePooling2D()(norm(inputs))
    model = keras.Model(inputs, keras.layers.Dense(4, name="predictions")(x))
    optimizer, ema = build_optimizer(config.optimizer, model.trainable_variables), ModelEMA(model.weights, 0.9)
    step = TrainStep(
        model, optimizer, ema, MetricAccumulator(), config.train, 8, config.optimizer, runtime, SINGLE_LABEL
    )
images = batch()[0].numpy().astype(float)
for one in runtime.feed(tf.data.Dataset.from_tensors(batch())):
    step(one, 0.01)
first = runtime.strategy.experimental_local_results
for variable, start, statistic in ((norm.moving_mean, 0, np.mean), (norm.moving_variance, 1, np.var)):
    of_replicas = [statistic(shard, axis=(0, 1, 2)) for shard in (images[:4], images[4:])]
    expected = 0.5 * start + 0.5 * np.mean(of_replicas, axis=0)
    for copy in first(variable.value):
        np.testing.assert_allclose(copy.numpy(), expected, rtol=1e-5)
"""


@pytest.mark.slow
def test_local_statistics_of_the_replicas_are_averaged():
    command = [sys.executable, "-c", LOCAL_STATISTICS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        command, cwd=PROJECT / "tests" / "training", env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


EVERY_OPTIMIZER = """
import sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from test_train_step import batch, dense_network, make_config
from pipeline.training.optimizers import ModelEMA, build_optimizer
from pipeline.distributed.devices import setup_devices
from pipeline.training.state import MetricAccumulator
from pipeline.training.train_step import TrainStep
from pipeline.tasks import SINGLE_LABEL
for name in sys.argv[1:]:
    results = []
    for runtime in ({"strategy": "single"}, {"strategy": "mirrored"}, {"strategy": "single", "xla": True}):
        optimizer = {"name": name, "weight_decay": 0.1}
        config = make_config(optimizer=optimizer, train={"global_batch_size": 8}, runtime=runtime)
        runtime = setup_devices(config.runtime, config.seed)
        with runtime.strategy.scope():
            model = dense_network()
            start = [variable.numpy() for variable in model.trainable_variables]
            optimizer, ema = build_optimizer(config.optimizer, model.trainable_variables), ModelEMA(model.weights, 0.9)
            metrics = MetricAccumulator()
            step = TrainStep(model, optimizer, ema, metrics, config.train, 8, config.optimizer, runtime, SINGLE_LABEL)
        for one in runtime.feed(tf.data.Dataset.from_tensors(batch()).repeat(3)):
            step(one, 0.01)
        variables = [*model.trainable_variables, *ema.variables, *optimizer.variables]
        results.append([variable.numpy() for variable in variables])
        moved = [np.abs(after - before).max() for after, before in zip(results[-1], start)]
        assert min(moved) > 1e-4, (name, moved)
    for other in results[1:]:
        for expected, value in zip(results[0], other, strict=True):
            np.testing.assert_allclose(value, expected, rtol=2e-3, atol=2e-5, err_msg=name)
"""


FUSED = [name for name, spec in OPTIMIZERS.items() if spec.keras_class in FUSED_CLASSES]


@pytest.mark.slow
@pytest.mark.parametrize("names", [FUSED, sorted(OPTIMIZERS.keys() - set(FUSED))], ids=" ".join)
def test_every_optimizer_moves_the_weights_alike_on_two_devices_and_by_xla(names):
    command = [sys.executable, "-c", EVERY_OPTIMIZER, *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        command, cwd=PROJECT / "tests" / "training", env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_bfloat16_trains_float32_weights_and_their_average(tmp_path):
    config = make_config(train={"global_batch_size": 8}, runtime={"precision": "bfloat16"})
    runtime = setup_devices(config.runtime, config.seed)
    assert runtime.dtype == "mixed_bfloat16"
    model = short_network(
        num_classes=CLASSES, drop_path_rate=0.5, layer_types=LayerTypes(PerReplicaDropout), dtype=runtime.dtype
    )
    average, totals = ModelEMA(model.weights, 0.9), MetricAccumulator()
    optimizer = build_optimizer(config.optimizer, model.trainable_variables)
    step = TrainStep(
        model,
        optimizer,
        average,
        totals,
        config.train,
        config.train.global_batch_size,
        config.optimizer,
        runtime,
        SINGLE_LABEL,
    )
    before = model.get_layer("stem_conv").kernel.numpy()
    rng = np.random.default_rng(0)
    images = tf.constant(rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8))
    step((images, *batch()[1:]), 0.1)
    assert not np.array_equal(before, model.get_layer("stem_conv").kernel.numpy())
    assert {str(variable.dtype.name) for variable in average.variables} == {"float32"}
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    assert np.isfinite(totals.read()["loss"])
    with average.applied():
        to_inference_model(model).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert {layer.compute_dtype for layer in loaded.layers} == {"float32"}
    np.testing.assert_array_equal(loaded.get_layer("stem_conv").kernel.numpy(), average.variables[0].numpy())


def test_an_indivisible_batch_is_refused():
    config = make_config(
        train={"global_batch_size": 12, "gradient_accumulation_steps": 2},
        runtime={"strategy": "single"},
        augment={"mixup": 0.2},
    )
    two = Runtime(SimpleNamespace(num_replicas_in_sync=2), "float32", False)
    check_batch(BatchSize(12, 2), config.augment, setup_devices(config.runtime, config.seed))
    with pytest.raises(
        ConfigError, match=r"groups of 2 images, which 3 images per replica and micro-batch would cut apart; .* of 8"
    ):
        check_batch(BatchSize(12, 2), config.augment, two)
    with pytest.raises(
        ConfigError,
        match="6 images cannot be shared evenly among 2 replicas with 2 micro-batches each; take a multiple of 4",
    ):
        check_batch(BatchSize(6, 2), config.augment, two)
    assert two.round_up_to_replicas(31) == 32
