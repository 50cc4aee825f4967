"""How the weights move: the official RMSProp, the learning rate as a function of the step, and the moving average.

Keras's update rules are a dozen operations for each of hundreds of variables. TensorFlow's fused ones are the same
rules in one operation. Measured for B0: the graph of a step has 10,000 nodes instead of 24,000, and its first call
takes half as long.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import keras
import numpy as np
import tensorflow as tf

from pipeline.config.optimizer import OPTIMIZERS, OptimizerConfig
from pipeline.config.train import StageConfig


class RMSprop(keras.optimizers.RMSprop):
    """Keras's RMSProp with the mean square starting at ones, as TensorFlow 1's does and the published recipe needs.

    From zeros, the first updates are divided by nearly nothing and are several times as long as from ones
    (tensorflow/tpu models/official/efficientnet/utils.py builds tf.train.RMSPropOptimizer, whose slot `rms` is
    initialised to ones).
    """

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        """Make the slots of all of `var_list`."""
        super().build(var_list)
        for mean_square in self._velocities:
            mean_square.assign(tf.ones(mean_square.shape, mean_square.dtype))

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        """Move `variable` by Keras's rule."""
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle,
            ms=self._velocities[index].handle,
            mom=self._momentums[index].handle,
            lr=learning_rate,
            rho=self.rho,
            momentum=self.momentum,
            epsilon=self.epsilon,
            grad=gradient,
        )


class Adam(keras.optimizers.Adam):
    """Keras's Adam with a count of its own for each variable.

    Keras corrects every variable's moments for their start at zero by the number of steps of the whole run. A block
    that is thawed after a few hundred of them would get no correction: its first update would be 0.1 / sqrt(0.001) =
    3.2 times the learning rate.
    """

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Make the slots of all `variables`, and their counts."""
        super().build(variables)
        self._updates = self.add_variable(
            (len(variables),), initializer="zeros", dtype="int64", aggregation="only_first_replica", name="updates"
        )

    def update_step(
        self,
        gradient: tf.Tensor,
        variable: keras.Variable,
        learning_rate: tf.Tensor,
        beta_1_power: tf.Tensor,
        beta_2_power: tf.Tensor,
    ) -> None:
        """Move `variable` by Keras's rule, by what `advance` gives for it."""
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].handle,
            v=self._velocities[index].handle,
            beta1_power=beta_1_power,
            beta2_power=beta_2_power,
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )

    def bias_correction(self, variables: Sequence[keras.Variable]) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Count the update of `variables` that follows.

        Returns:
            For each, beta_1 and beta_2 to the power of the number of its updates, float32 scalars: the correction for
            moments that start at zero (arXiv 1412.6980).
        """
        indices = [self._get_variable_index(variable) for variable in variables]
        moved = np.zeros(self._updates.shape, np.int64)
        moved[indices] = 1
        self._updates.assign_add(moved)
        number = tf.gather(tf.cast(self._updates.value, tf.float32), indices)
        return list(zip(tf.unstack(self.beta_1**number), tf.unstack(self.beta_2**number), strict=True))


CLASSES: dict[str, type[keras.optimizers.Optimizer]] = {"RMSprop": RMSprop, "AdamW": Adam}  # in the place of Keras's


def build_optimizer(config: OptimizerConfig, variables: Sequence[keras.Variable]) -> keras.optimizers.Optimizer:
    """Make the optimizer with its slots for all `variables`; a stage may apply it to some of them.

    Weight decay is applied by the train step: part of the loss or decoupled, as `OPTIMIZERS` has it.
    """
    spec = OPTIMIZERS[config.name]
    optimizer_class = CLASSES.get(spec.keras_class) or getattr(keras.optimizers, spec.keras_class)
    optimizer = optimizer_class(config.base_lr, **spec.arguments)
    optimizer.build(variables)
    return optimizer


def uses_weight_decay(variable: keras.Variable) -> bool:
    """Whether weight decay reaches a variable.

    All trainable ones but batch normalisation's, as in the official code.
    """
    return variable.name not in ("gamma", "beta")


def learning_rate(
    optimizer: OptimizerConfig, stage: StageConfig, *, global_batch_size: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """The learning rate of a stage as a function of the step within it.

    Linear warm-up from zero; then `exponential` (base * decay_rate^floor(step / (decay_epochs * steps_per_epoch)), the
    decay counted from the stage's first step as in the official code), `cosine` (from the end of warm-up to zero at the
    stage's end) or `constant`. The base is base_lr * global_batch_size / 256.
    """
    base = (stage.base_lr or optimizer.base_lr) * global_batch_size / 256
    schedule = stage.schedule or optimizer.schedule
    warmup_epochs = optimizer.warmup_epochs if stage.warmup_epochs is None else stage.warmup_epochs
    warmup, total = warmup_epochs * steps_per_epoch, stage.epochs * steps_per_epoch

    def at(step: int) -> float:
        if step < warmup:
            return base * (step + 1) / (warmup + 1)
        if schedule == "exponential":
            return base * optimizer.decay_rate ** int(step / (optimizer.decay_epochs * steps_per_epoch))
        if schedule == "cosine":
            return base * 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / (total - warmup))))
        return base

    return at


class ModelEMA:
    """Exponential moving average of a network's weights and of its batch normalisation statistics.

    The decay warms up as min(decay, (1 + step) / (10 + step)), as tf.train.ExponentialMovingAverage does with
    `num_updates` in the official code. Keras's `use_ema` averages the trainable weights only and has no warm-up.

    A variable that has never been trained is its own average, to the bit. Only those that `follow` names are computed
    and swapped: with a frozen backbone that is the classifier.

    Attributes:
        variables: The averages, one for each of `averaged`, in its order.
    """

    def __init__(self, averaged: Sequence[keras.Variable], decay: float) -> None:
        """Start at the present values.

        Args:
            averaged: Weights and moving statistics of the network.
            decay: Upper bound of the decay, in (0, 1).
        """
        self.averaged = list(averaged)
        self.decay = decay
        self._tracked: set[int] = set()
        self.variables = [
            tf.Variable(variable.value, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
            for variable in self.averaged
        ]

    def track(self, variables: Iterable[keras.Variable]) -> None:
        """Says that these change from now on, beside those named before."""
        self._tracked |= {id(variable) for variable in variables}

    def track_restored(self) -> None:
        """The same for every variable that is not its own average, once values from elsewhere have been put in."""
        pairs = zip(self.averaged, self.variables, strict=True)
        self.track(variable for variable, average in pairs if not np.array_equal(variable.numpy(), average.numpy()))

    def tracks_any(self, variables: Iterable[keras.Variable]) -> bool:
        """Whether the average of one of these may differ from it."""
        return any(id(variable) in self._tracked for variable in variables)

    def _pairs(self) -> list[tuple[keras.Variable, tf.Variable]]:
        pairs = zip(self.averaged, self.variables, strict=True)
        return [(variable, average) for variable, average in pairs if id(variable) in self._tracked]

    def update(self, step: tf.Tensor, strategy: tf.distribute.Strategy) -> None:
        """Move the averages towards the present values, in cross-replica context.

        Args:
            step: Number of steps applied before this one, integer scalar.
            strategy: That of the variables.
        """
        step = tf.cast(step, tf.float32)
        rate = 1 - tf.minimum(self.decay, (1 + step) / (10 + step))

        def update(average: tf.Variable, variable: tf.Tensor) -> None:
            apart = average - variable
            tf.raw_ops.ResourceApplyGradientDescent(
                var=average.handle, alpha=tf.cast(rate, apart.dtype), delta=apart
            )  # one pass for two

        for variable, average in self._pairs():
            strategy.extended.update(average, update, args=(variable.value,), group=False)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network holds the averages inside the block and its own values again after it."""
        pairs = self._pairs()
        kept = [variable.numpy() for variable, _ in pairs]
        for variable, average in pairs:
            variable.assign(average.numpy())
        try:
            yield
        finally:
            for (variable, _), value in zip(pairs, kept, strict=True):
                variable.assign(value)
