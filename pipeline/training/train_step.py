"""One training step.

Micro-batches, gradients, a guard against values that are not finite, the update, the moving average.
"""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from pipeline.config.optimizer import OPTIMIZERS
from pipeline.config.schema import Config
from pipeline.distributed.devices import Runtime
from pipeline.models.efficientnet import CLASSIFIER_BLOCK, block_of
from pipeline.training.optimizers import Adam, ModelEMA, uses_weight_decay
from pipeline.training.state import MetricAccumulator

Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]


def mutable_variables(model: keras.Model) -> list[keras.Variable]:
    """The variables that a step changes.

    Those that gradients reach, and the statistics and generators of layers that are not frozen.
    """
    return [
        *model.trainable_variables,
        *(v for layer in model.layers if layer.trainable for v in layer.non_trainable_variables),
    ]


def batch_norm_statistics(model: keras.Model) -> list[keras.Variable]:
    """The moving means and variances that a step moves."""
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
    return [variable for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]


class TrainStep:
    """A compiled step for one set of trainable variables; a stage that changes the set makes a new one.

    Neither Keras's `fit` nor its `train_step` serves here: under MirroredStrategy a conditional around the update
    raises, and a value that is not finite is seen only after batch normalisation and metrics have moved. The gradients
    come from `strategy.run`, everything that changes the state from the cross-replica context, inside one
    `tf.function`.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        ema: ModelEMA | None,
        metrics: MetricAccumulator,
        config: Config,
        runtime: Runtime,
        *,
        layer_decay: float = 1.0,
        class_weights: np.ndarray | None = None,
    ) -> None:
        """Prepare a step that trains what is trainable in `model` now.

        Args:
            model: From float32 images (B, R, R, 3) in [0, 255] to float32 logits (B, K); or its head, from features to
                logits.
            optimizer: Built for at least the model's trainable variables.
            average: Updated after each step; None for no moving average.
            totals: Added to by each step.
            config: Label smoothing, weight decay, micro-batches and global batch size are taken from it.
            runtime: Strategy and compilation.
            layer_decay: The learning rate of a block, over that of the block behind it. It scales the update: a
                gradient that is scaled changes nothing under RMSProp and Adam, which divide by its size.
            class_weights: float32 (K,), how many images an image of each class counts as; None for one each.
        """
        self._model, self._optimizer, self._ema, self._metrics = model, optimizer, ema, metrics
        self._strategy = runtime.strategy
        self._trainable: Sequence[keras.Variable] = model.trainable_variables
        blocks = {
            id(variable): block_of(layer.name) for layer in model.layers for variable in layer.trainable_variables
        }
        self._rate_factors = [layer_decay ** (CLASSIFIER_BLOCK - blocks[id(variable)]) for variable in self._trainable]
        self._class_weights = class_weights
        self._moving = mutable_variables(model)[len(self._trainable) :]
        self._local_statistics = [] if runtime.replicas == 1 or runtime.sync_batch_norm else batch_norm_statistics(model)
        self._label_smoothing = config.train.label_smoothing
        self._accumulation = config.train.gradient_accumulation_steps
        self._global_batch_size = config.train.batch_size
        self._weight_decay = [
            config.optimizer.weight_decay if uses_weight_decay(variable) else 0.0 for variable in self._trainable
        ]
        self._decoupled = OPTIMIZERS[config.optimizer.name].decoupled_weight_decay
        if ema is not None:
            ema.track(mutable_variables(model))
        self._compiled = tf.function(self._step, jit_compile=runtime.jit_compile, autograph=False)

    def __call__(self, batch: Batch, learning_rate: float) -> None:
        """Take one step.

        Args:
            batch: Of the stream: images uint8 (B, R, R, 3) or features float32 (B, C), labels float32 (B, K), weights
                float32 (B,), index int64 (B,); or their per-replica values.
            learning_rate: Of this step.
        """
        with self._strategy.scope():  # the update below runs in cross-replica context
            self._compiled(batch, tf.constant(learning_rate, tf.float32))

    def _step(self, batch: Batch, learning_rate: tf.Tensor) -> None:
        before = [tf.identity(variable.value) for variable in self._moving]
        gradients, sums, statistics = self._strategy.run(self._gradients, args=batch)
        first = self._strategy.experimental_local_results
        norm = tf.linalg.global_norm([first(gradient)[0] for gradient in gradients])
        sums = {name: first(value)[0] for name, value in sums.items()}
        good = tf.math.is_finite(norm) & tf.math.is_finite(sums["loss"]) & ~self._metrics.halted

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
            for variable, value in zip(self._moving, before, strict=True):
                variable.assign(value)
            self._metrics.halted.assign(True)
            return tf.constant(False)

        tf.cond(good, apply, undo)

    def _update(self, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor) -> None:
        """Move the weights.

        `Optimizer.apply` cannot do it here: it needs the replica context, where it may not be conditional.
        """

        def update(
            variable: tf.Variable, gradient: tf.Tensor, powers: Sequence[tf.Tensor], decay: float, factor: float
        ) -> None:
            rate = learning_rate * factor
            if self._decoupled and decay:
                variable.assign_sub(rate * decay * variable)
            self._optimizer.update_step(gradient, variable, rate, *powers)

        adam = isinstance(self._optimizer, Adam)
        powers = self._optimizer.bias_correction(self._trainable) if adam else [()] * len(self._trainable)
        for variable, *arguments in zip(
            self._trainable, gradients, powers, self._weight_decay, self._rate_factors, strict=True
        ):
            self._strategy.extended.update(variable.value, update, args=tuple(arguments), group=False)
        self._optimizer.iterations.assign_add(1)

    def _gradients(
        self, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, index: tf.Tensor
    ) -> tuple[list[tf.Tensor], dict[str, tf.Tensor], list[tf.Tensor]]:
        """One replica's share.

        Gradients and sums added up over the replicas, batch normalisation's own statistics averaged over them.
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
        if (
            not self._decoupled
        ):  # the gradient of 1/2 * weight_decay * ||w||^2, which the official code adds to the loss
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
        target = tf.argmax(labels, -1)
        labels, counted = self._weigh(labels, weights)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([variable.value for variable in self._trainable])
            logits = self._model(tf.cast(images, tf.float32), training=True)
            smoothed = labels * (1 - self._label_smoothing) + self._label_smoothing / labels.shape[-1]
            loss = tf.reduce_sum(counted * tf.nn.softmax_cross_entropy_with_logits(smoothed, logits))
            objective = loss / self._global_batch_size
        gradients = tape.gradient(objective, [variable.value for variable in self._trainable])
        hits = tf.cast(tf.argmax(logits, -1) == target, tf.float32)
        return gradients, {"loss": loss, "correct": tf.reduce_sum(weights * hits), "images": tf.reduce_sum(weights)}

    def _weigh(self, labels: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The labels and how many images each counts as.

        Linear in the label: a mixed image counts as the shares that it is mixed from.
        """
        if self._class_weights is None:
            return labels, weights
        shares = labels * self._class_weights
        counts = tf.reduce_sum(shares, -1)
        return shares / counts[:, tf.newaxis], weights * counts
