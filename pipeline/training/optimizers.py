"""Optimizers and the moving average of the weights. `OPTIMIZERS` in `pipeline.config.optimizer` lists the optimizers.

Keras's update rules take about a dozen operations for each of hundreds of variables; TensorFlow's fused operations
apply the same rules in one. For B0 the graph of a step has 10,000 nodes instead of 24,000, and its first call takes
half as long.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import keras
import numpy as np
import tensorflow as tf

from pipeline.config.optimizer import OPTIMIZERS, OptimizerConfig

# Keras has no public access to an optimizer's slots, and without it neither their initial values nor the update by a
# fused operation can be set. The next two functions contain all uses of private attributes of Keras.


def _slots(optimizer: keras.optimizers.Optimizer, name: Literal["momentums", "velocities"]) -> list[keras.Variable]:
    """Return the slots of a name, one for each variable that the optimizer was built for, in their order."""
    return getattr(optimizer, f"_{name}")


def _slot_index(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> int:
    """Return the position of a variable's slots."""
    return optimizer._get_variable_index(variable)


class RMSprop(keras.optimizers.RMSprop):
    """Keras's RMSProp with the mean square starting at ones, as in TensorFlow 1 and in the published recipe.

    Starting from zeros, the first updates are divided by numbers near zero and are several times as long as from ones
    (tensorflow/tpu models/official/efficientnet/utils.py builds tf.train.RMSPropOptimizer, whose slot `rms` is
    initialized to ones).
    """

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        """Create the slots of all of `var_list`."""
        super().build(var_list)
        for mean_square in _slots(self, "velocities"):
            mean_square.assign(tf.ones(mean_square.shape, mean_square.dtype))

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        """Update `variable` by Keras's rule."""
        index = _slot_index(self, variable)
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle,
            ms=_slots(self, "velocities")[index].handle,
            mom=_slots(self, "momentums")[index].handle,
            lr=learning_rate,
            rho=self.rho,
            momentum=self.momentum,
            epsilon=self.epsilon,
            grad=gradient,
        )


class Adam(keras.optimizers.Adam):
    """Keras's Adam with a separate number of updates for each variable.

    Keras corrects the moments of every variable for their start at zero by the number of steps of the whole run. A
    block that is unfrozen after a few hundred steps would get no correction: its first update would be
    0.1 / sqrt(0.001) = 3.2 times the learning rate.
    """

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Create the slots of all `variables`, and their numbers of updates."""
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
        """Update `variable` by Keras's rule; for the two powers, see `bias_correction`."""
        index = _slot_index(self, variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=_slots(self, "momentums")[index].handle,
            v=_slots(self, "velocities")[index].handle,
            beta1_power=beta_1_power,
            beta2_power=beta_2_power,
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )

    def bias_correction(self, variables: Sequence[keras.Variable]) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Count the next update of `variables`, and return its bias correction.

        Returns:
            For each variable, beta_1 and beta_2 to the power of the number of its updates, float32 scalars: the
            correction for moments that start at zero (arXiv 1412.6980).
        """
        indices = [_slot_index(self, variable) for variable in variables]
        increment = np.zeros(self._updates.shape, np.int64)
        increment[indices] = 1
        self._updates.assign_add(increment)
        number = tf.gather(tf.cast(self._updates.value, tf.float32), indices)
        return list(zip(tf.unstack(self.beta_1**number), tf.unstack(self.beta_2**number), strict=True))


FUSED_CLASSES: dict[str, type[keras.optimizers.Optimizer]] = {"RMSprop": RMSprop, "AdamW": Adam}
"""Classes that replace Keras's, by the name of Keras's class. The train step applies the weight decay of AdamW."""


def build_optimizer(config: OptimizerConfig, variables: Sequence[keras.Variable]) -> keras.optimizers.Optimizer:
    """Build the optimizer with slots for all `variables`; a stage may apply it to some of them.

    The train step applies the weight decay: in the loss or decoupled, as in `OPTIMIZERS`.
    """
    spec = OPTIMIZERS[config.name]
    optimizer_class = FUSED_CLASSES.get(spec.keras_class) or getattr(keras.optimizers, spec.keras_class)
    optimizer = optimizer_class(config.base_lr, **spec.arguments)
    optimizer.build(variables)
    return optimizer


def update_arguments(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> list[tuple[tf.Tensor, ...]]:
    """Return the arguments of `update_step` after gradient, variable and learning rate, for each variable."""
    if isinstance(optimizer, Adam):
        return list(optimizer.bias_correction(variables))
    return [()] * len(variables)


def uses_weight_decay(variable: keras.Variable) -> bool:
    """Return True if weight decay applies to a trainable variable: to all but those of batch normalization.

    The official code makes the same exception.
    """
    return variable.name not in ("gamma", "beta")


class ModelEMA:
    """Exponential moving average of a network's weights and of its batch normalization statistics.

    The decay warms up as min(decay, (1 + step) / (10 + step)), as tf.train.ExponentialMovingAverage does with
    `num_updates` in the official code. Keras's `use_ema` averages the trainable weights only and has no warm-up.

    The average of a variable that was never trained equals the variable, to the bit. Only variables passed to `track`
    are averaged and swapped: with a frozen backbone those of the classifier.

    Attributes:
        averaged: Variables of the network.
        decay: Upper bound of the decay.
        variables: The averages, one for each of `averaged`, in its order.
    """

    def __init__(self, averaged: Sequence[keras.Variable], decay: float) -> None:
        """Create averages that equal the current values.

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
        """Update the averages of these variables from now on, in addition to those tracked before."""
        self._tracked |= {id(variable) for variable in variables}

    def track_restored(self) -> None:
        """Track every variable that differs from its average, after both were restored."""
        pairs = zip(self.averaged, self.variables, strict=True)
        self.track(variable for variable, average in pairs if not np.array_equal(variable.numpy(), average.numpy()))

    def tracks_any(self, variables: Iterable[keras.Variable]) -> bool:
        """Return True if the average of one of these variables may differ from it."""
        return any(id(variable) in self._tracked for variable in variables)

    def _pairs(self) -> list[tuple[keras.Variable, tf.Variable]]:
        pairs = zip(self.averaged, self.variables, strict=True)
        return [(variable, average) for variable, average in pairs if id(variable) in self._tracked]

    def update(self, step: tf.Tensor, strategy: tf.distribute.Strategy) -> None:
        """Move the averages towards the current values, in cross-replica context.

        Args:
            step: Number of steps applied before this one, integer scalar.
            strategy: Strategy of the variables.
        """
        step = tf.cast(step, tf.float32)
        rate = 1 - tf.minimum(self.decay, (1 + step) / (10 + step))

        def update(average: tf.Variable, variable: tf.Tensor) -> None:
            difference = average - variable
            tf.raw_ops.ResourceApplyGradientDescent(  # one pass over the memory in place of two
                var=average.handle, alpha=tf.cast(rate, difference.dtype), delta=difference
            )

        for variable, average in self._pairs():
            strategy.extended.update(average, update, args=(variable.value,), group=False)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the network inside the block, and its own values back after it."""
        pairs = self._pairs()
        values = [variable.numpy() for variable, _ in pairs]
        for variable, average in pairs:
            variable.assign(average.numpy())
        try:
            yield
        finally:
            for (variable, _), value in zip(pairs, values, strict=True):
                variable.assign(value)
