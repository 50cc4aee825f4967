"""The section `train`: stages, batch size, loss, checkpoints."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.config.base import Fraction, PositiveFloat, PositiveInt, Schedule, StrictModel
from pipeline.errors import ConfigError

Trainable = Literal["head", "block1", "block2", "block3", "block4", "block5", "block6", "block7", "all"]
Metric = Literal["accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "loss"]


class StageConfig(StrictModel):
    """A stage of training with one set of trainable layers. Its schedule starts anew."""

    epochs: PositiveInt
    """Epochs of the stage."""
    trainable: Trainable = "all"
    """head: the classifier; blockN: block N and everything after it; all."""
    base_lr: PositiveFloat | None = None
    """null: that of the optimizer."""
    schedule: Schedule | None = None
    """null: that of the optimizer."""
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """null: that of the optimizer."""
    freeze_batch_norm: bool = False
    """Freeze batch normalization, scales and shifts included, in trained blocks too. In frozen blocks it is always
    frozen."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discriminative learning rates (arXiv 1801.06146): the factor of the learning rate of a block relative to the
    block after it; the classifier has factor 1."""
    use_augmentation: bool = True
    """false prepares the images as in evaluation. A run that starts by training the head then computes the features of
    the backbone once."""

    @property
    def trains_batch_norm(self) -> bool:
        """True if the stage normalizes with the statistics of its batches and moves those of inference."""
        return self.trainable != "head" and not self.freeze_batch_norm


class EarlyStoppingConfig(StrictModel):
    """The end of a stage that no longer improves; the run continues with the next stage."""

    patience: PositiveInt
    """Consecutive epochs of the stage without an improvement of best_metric."""
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Smallest change of best_metric that counts as an improvement."""


class SkipNanConfig(StrictModel):
    """The value {skip: N} of `train.on_nan`."""

    skip: PositiveInt
    """Steps that may be skipped in the whole run."""


class TrainConfig(StrictModel):
    """Stages, batch size, loss, checkpoints."""

    global_batch_size: Annotated[
        Annotated[PositiveInt, Tag("number")] | Annotated[Literal["auto"], Tag("word")],
        Discriminator(lambda value: "word" if isinstance(value, str) and not value.isdigit() else "number"),
    ] = 32
    """Images per step over all replicas. auto: about 256, in as many micro-batches as the estimated memory requires."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches of a replica per step, to save memory; their gradients are averaged and applied once."""
    label_smoothing: Fraction = 0.1
    """Share of the target that is spread evenly over all classes (arXiv 1512.00567)."""
    epochs: PositiveInt | None = None
    """Short form without stages: the epochs of the only stage, or of the last one that recipe: auto chooses."""
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)] = (StageConfig(epochs=10),)
    """Stages in their order. One stage with trainable: all is plain training."""
    class_weights: (
        Annotated[
            Annotated[Literal["balanced"], Tag("word")] | Annotated[dict[str, PositiveFloat], Tag("weights")],
            Discriminator(lambda value: "weights" if isinstance(value, Mapping) else "word"),
        ]
        | None
    ) = None
    """Weight of a class in the loss, by name; 1 for other classes. balanced: every class has the same total weight."""
    best_metric: Metric = "accuracy"
    """Metric of the validation split that selects the epoch in best/ and drives early stopping. The test split selects
    nothing."""
    early_stopping: EarlyStoppingConfig | None = None
    """null trains every stage to its end."""
    restore_best_weights: bool = False
    """Make the model of the best epoch the run's result, model.keras, instead of the last one."""
    max_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept; those of the best and the last epoch are kept in addition."""
    checkpoint_every_steps: PositiveInt | None = None
    """A checkpoint is written after each epoch and, if this is set, whenever the step is a multiple of it."""
    on_nan: Annotated[
        Annotated[Literal["stop", "rollback"], Tag("word")] | Annotated[SkipNanConfig, Tag("skip")],
        Discriminator(lambda value: "skip" if isinstance(value, Mapping | SkipNanConfig) else "word"),
    ] = "stop"
    """Reaction to a loss or gradient that is not finite; the step is not applied and its batch is saved. stop; {skip:
    3}: skip up to 3 such steps in the whole run; rollback: return to the start of the epoch with half the learning
    rate, at most three times."""

    @model_validator(mode="after")
    def _check_batch_is_divisible(self) -> "TrainConfig":
        if self.global_batch_size == "auto":
            if "gradient_accumulation_steps" in self.model_fields_set:
                raise ValueError("global_batch_size: auto chooses gradient_accumulation_steps; leave it out")
        elif self.global_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps})"
            )
        return self

    @model_validator(mode="after")
    def _epochs_are_given_once(self) -> "TrainConfig":
        if self.epochs is not None and "stages" in self.model_fields_set:
            raise ValueError("epochs is the short form without stages; write the epochs into the stages instead")
        return self

    def stage(self, number: int | None) -> StageConfig:
        """Return a stage by its number, which counts from 1; the last stage for None.

        Raises:
            ConfigError: There is no such stage.
        """
        if number is not None and not 1 <= number <= len(self.stages):
            raise ConfigError(f"stage {number}: train.stages has the stages 1 to {len(self.stages)}")
        return self.stages[-1 if number is None else number - 1]

    @property
    def micro_batch_size(self) -> int | None:
        """Images per forward pass over all replicas; None while `global_batch_size` is auto."""
        return None if self.global_batch_size == "auto" else self.global_batch_size // self.gradient_accumulation_steps
