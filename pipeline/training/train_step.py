"""One training step.

It computes the gradients of the micro-batches, checks that they are finite, and updates the weights and their moving
average.
"""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from pipeline.config.optimizer import OPTIMIZERS, OptimizerConfig
from pipeline.config.train import TrainConfig
from pipeline.distributed.devices import Runtime
from pipeline.models.efficientnet import CLASSIFIER_BLOCK, block_of
from pipeline.tasks import Task
from pipeline.training.optimizers import ModelEMA, update_arguments, uses_weight_decay
from pipeline.training.state import MetricAccumulator

Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]


def mutable_variables(model: keras.Model) -> list[keras.Variable]:
    """Return the variables that a step changes.

    These are the trainable weights, and the statistics and random generators of layers that are not frozen.
    """
    return [
        *model.trainable_variables,
        *(v for layer in model.layers if layer.trainable for v in layer.non_trainable_variables),
    ]


def batch_norm_statistics(model: keras.Model) -> list[keras.Variable]:
    """Return the moving means and variances that a step changes."""
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
    return [variable for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]


class TrainStep:
    """A compiled step for one set of trainable variables; a stage that changes the set needs another step.

    Keras's `fit` and `train_step` do not suffice: under MirroredStrategy a conditional around the update raises an
    error, and a value that is not finite is detected only after batch normalization and metrics have changed. Here
    `strategy.run` computes the gradients, and the cross-replica context changes the state, inside one `tf.function`.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        ema: ModelEMA | None,
        metrics: MetricAccumulator,
        train: TrainConfig,
        global_batch_size: int,
        optimizer_config: OptimizerConfig,
        runtime: Runtime,
        task: Task,
        *,
        layer_decay: float = 1.0,
        class_weights: np.ndarray | None = None,
    ) -> None:
        """Create a step for the weights that are trainable in `model` now; the first call compiles it.

        Args:
            model: Network from float32 images (B, R, R, 3) in [0, 255] to float32 logits (B, K); or its head, from
                features to logits.
            optimizer: Optimizer, built for at least the model's trainable variables.
            ema: Moving average to update after each step; None for no moving average.
            metrics: Sums to which each step adds.
            train: Label smoothing and micro-batches are used.
            global_batch_size: Images per step over all replicas.
            optimizer_config: Name and weight decay are used.
            runtime: Strategy and compilation.
            task: What labels and logits mean.
            layer_decay: Ratio of a block's learning rate to that of the next block, nearer the head. It scales the
                update, since scaling the gradient has no effect under RMSProp and Adam, which normalize it.
            class_weights: float32 (K,), the weight of each class in the loss; None if all classes weigh the same.
        """
        self._model, self._optimizer, self._ema, self._metrics = model, optimizer, ema, metrics
        self._strategy = runtime.strategy
        self._trainable: Sequence[keras.Variable] = model.trainable_variables
        blocks = {
            id(variable): block_of(layer.name) for layer in model.layers for variable in layer.trainable_variables
        }
        self._rate_factors = [layer_decay ** (CLASSIFIER_BLOCK - blocks[id(variable)]) for variable in self._trainable]
        self._task, self._class_weights = task, class_weights
        self._mutable_non_trainable = mutable_variables(model)[len(self._trainable) :]
        self._local_statistics = (
            [] if runtime.replicas == 1 or runtime.sync_batch_norm else batch_norm_statistics(model)
        )
        self._label_smoothing = train.label_smoothing
        self._accumulation = train.gradient_accumulation_steps
        self._global_batch_size = global_batch_size
        self._weight_decay = [
            optimizer_config.weight_decay if uses_weight_decay(variable) else 0.0 for variable in self._trainable
        ]
        self._decoupled = OPTIMIZERS[optimizer_config.name].decoupled_weight_decay
        if ema is not None:
            ema.track(mutable_variables(model))
        self._compiled = tf.function(self._step, jit_compile=runtime.jit_compile, autograph=False)

    def __call__(self, batch: Batch, learning_rate: float) -> None:
        """Take one step.

        Args:
            batch: Images uint8 (B, R, R, 3) or features float32 (B, C), labels float32 (B, K), weights float32 (B,) and
                index int64 (B,); or their per-replica values.
            learning_rate: Learning rate of this step.
        """
        with self._strategy.scope():  # the update below runs in cross-replica context
            self._compiled(batch, tf.constant(learning_rate, tf.float32))

    def _step(self, batch: Batch, learning_rate: tf.Tensor) -> None:
        before = [tf.identity(variable.value) for variable in self._mutable_non_trainable]
        gradients, sums, statistics = self._strategy.run(self._gradients, args=batch)
        first = self._strategy.experimental_local_results
        norm = tf.linalg.global_norm([first(gradient)[0] for gradient in gradients])
        sums = {name: first(value)[0] for name, value in sums.items()}
        is_finite = tf.math.is_finite(norm) & tf.math.is_finite(sums["loss"]) & ~self._metrics.halted

        def apply() -> tf.Tensor:
            if self._ema is not None:
                step = tf.identity(self._optimizer.iterations.value)
            self._update(gradients, learning_rate)
            for variable, mean in zip(self._local_statistics, statistics, strict=True):
                self._strategy.extended.update(variable.value, lambda v, m: v.assign(m), args=(mean,), group=False)
            if self._ema is not None:
                self._ema.update(step, self._strategy)
            for name, value in {**sums, "gradient_norm": norm, "steps": 1.0}.items():
                self._metrics.sums[name].assign_add(tf.cast(value, tf.float64))
            return tf.constant(True)

        def undo() -> tf.Tensor:
            for variable, value in zip(self._mutable_non_trainable, before, strict=True):
                variable.assign(value)
            self._metrics.halted.assign(True)
            return tf.constant(False)

        tf.cond(is_finite, apply, undo)

    def _update(self, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor) -> None:
        """Update the weights.

        `Optimizer.apply` cannot be used here: it needs the replica context, where it must not be conditional.
        """

        def update(
            variable: tf.Variable, gradient: tf.Tensor, further: Sequence[tf.Tensor], decay: float, factor: float
        ) -> None:
            rate = learning_rate * factor
            if self._decoupled and decay:
                variable.assign_sub(rate * decay * variable)
            self._optimizer.update_step(gradient, variable, rate, *further)

        further = update_arguments(self._optimizer, self._trainable)
        for variable, *arguments in zip(
            self._trainable, gradients, further, self._weight_decay, self._rate_factors, strict=True
        ):
            self._strategy.extended.update(variable.value, update, args=tuple(arguments), group=False)
        self._optimizer.iterations.assign_add(1)

    def _gradients(
        self, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, index: tf.Tensor
    ) -> tuple[list[tf.Tensor], dict[str, tf.Tensor], list[tf.Tensor]]:
        """Return the results of one replica's shard of the batch, combined over all replicas.

        Returns:
            Gradients, one for each trainable variable, and metrics by name, both summed over the replicas; and the
            local statistics of batch normalization, averaged over the replicas.
        """
        del index
        parts = zip(*(tf.split(tensor, self._accumulation) for tensor in (images, labels, weights)), strict=True)
        micro_batches = [self._micro_batch(*part) for part in parts]
        gradients = [
            tf.add_n(list(parts)) for parts in zip(*(gradients for gradients, _ in micro_batches), strict=True)
        ]
        sums = {name: tf.add_n([sums[name] for _, sums in micro_batches]) for name in micro_batches[0][1]}
        context = tf.distribute.get_replica_context()
        gradients, sums = context.all_reduce(tf.distribute.ReduceOp.SUM, (gradients, sums))
        if not self._decoupled:  # gradient of 1/2 * weight_decay * ||w||^2, which the official code adds to the loss
            pairs = zip(gradients, self._weight_decay, self._trainable, strict=True)
            gradients = [
                gradient + decay * variable.value if decay else gradient for gradient, decay, variable in pairs
            ]
        statistics = [variable.value / self._strategy.num_replicas_in_sync for variable in self._local_statistics]
        if statistics:
            statistics = context.all_reduce(tf.distribute.ReduceOp.SUM, statistics)
        return gradients, sums, statistics

    def _micro_batch(
        self, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor
    ) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([variable.value for variable in self._trainable])
            logits = self._model(tf.cast(images, tf.float32), training=True)
            losses = self._task.loss(
                labels, logits, label_smoothing=self._label_smoothing, class_weights=self._class_weights
            )
            loss = tf.reduce_sum(weights * losses)
            objective = loss / self._global_batch_size
        gradients = tape.gradient(objective, [variable.value for variable in self._trainable])
        correct = tf.cast(self._task.is_correct(labels, logits), tf.float32)
        return gradients, {"loss": loss, "correct": tf.reduce_sum(weights * correct), "images": tf.reduce_sum(weights)}
