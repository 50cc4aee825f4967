"""The section `train`: how long a run trains, on which layers, and in what batches."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.config.base import Fraction, PositiveFloat, PositiveInt, Schedule, StrictModel
from pipeline.errors import ConfigError

Trainable = Literal["head", "block1", "block2", "block3", "block4", "block5", "block6", "block7", "all"]
Metric = Literal["accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "loss"]


class StageConfig(StrictModel):
    """A stretch of training with one set of trainable weights. Its schedule starts anew."""

    epochs: PositiveInt
    trainable: Trainable = "all"
    """head; blockN: the blocks from N on and everything behind them; all."""
    base_lr: PositiveFloat | None = None
    """null takes the optimizer's."""
    schedule: Schedule | None = None
    """null takes the optimizer's."""
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """null takes the optimizer's."""
    freeze_batch_norm: bool = False
    """Freeze batch normalisation, its scales and shifts included, where its block is trained, too.

    In frozen blocks it always is.
    """
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discriminative learning rates (arXiv 1801.06146): each block moves by this factor of the one behind it.

    The classifier by 1.
    """
    use_augmentation: bool = True
    """false prepares the pictures as in evaluation.

    From its start on, a run that trains the head so computes the backbone once.
    """


class EarlyStoppingConfig(StrictModel):
    """Leaves a stage that no longer helps; the run goes on with the next one."""

    patience: PositiveInt
    """Epochs of the stage, one after the other, in which best_metric may fail to improve."""
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """What best_metric must improve by to count."""


class SkipNanConfig(StrictModel):
    """What `train.on_nan` may be beside a word."""

    skip: PositiveInt
    """Steps that may be passed over in the whole run."""


class TrainConfig(StrictModel):
    """How long and in what portions."""

    global_batch_size: Annotated[
        Annotated[PositiveInt, Tag("number")] | Annotated[Literal["auto"], Tag("word")],
        Discriminator(lambda value: "word" if isinstance(value, str) and not value.isdigit() else "number"),
    ] = 32
    """Images per step over all replicas.

    auto: about 256, in as many micro-batches as the devices' memory asks for by estimate.
    """
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches that a replica's share of the batch is cut into, to save memory.

    Their gradients are averaged and applied once.
    """
    label_smoothing: Fraction = 0.1
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)] = (StageConfig(epochs=10),)
    """One stage with trainable: all is plain training."""
    class_weights: (
        Annotated[
            Annotated[Literal["balanced"], Tag("word")] | Annotated[dict[str, PositiveFloat], Tag("weights")],
            Discriminator(lambda value: "weights" if isinstance(value, Mapping) else "word"),
        ]
        | None
    ) = None
    """What an image of a class counts in the loss beside the others: by name, 1 where none is given; balanced.

    Every class the same.
    """
    best_metric: Metric = "accuracy"
    """Of the validation split; decides which epoch is kept in best/, and early stopping.

    The test split decides nothing.
    """
    early_stopping: EarlyStoppingConfig | None = None
    """null trains every stage to its end."""
    restore_best_weights: bool = False
    """Make the best epoch's network the run's result, model.keras, in place of the last one's."""
    max_checkpoints: PositiveInt = 2
    """Newest ones; the best epoch's and the last epoch's are kept besides."""
    checkpoint_every_steps: PositiveInt | None = None
    """A checkpoint is written after each epoch and, if this is set, whenever the step is a multiple of it."""
    on_nan: Annotated[
        Annotated[Literal["stop", "rollback"], Tag("word")] | Annotated[SkipNanConfig, Tag("skip")],
        Discriminator(lambda value: "skip" if isinstance(value, Mapping | SkipNanConfig) else "word"),
    ] = "stop"
    """When a step's loss or gradient is not finite (nothing of it is applied, its batch is saved): stop; {skip: 3}
    passes over that many such steps in the whole run; rollback goes back to the start of the epoch with the learning
    rate halved, three times at most.
    """

    @model_validator(mode="after")
    def _check_batch_is_divisible(self) -> "TrainConfig":
        if self.global_batch_size == "auto":
            if "gradient_accumulation_steps" in self.model_fields_set:
                raise ValueError("global_batch_size: auto chooses gradient_accumulation_steps; leave it out")
        elif self.global_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of gradient_accumulation_steps ({self.gradient_accumulation_steps})"
            )
        return self

    def stage(self, number: int | None) -> StageConfig:
        """The stage of a number that counts from 1; the last one for None.

        Raises:
            ConfigError: There is none.
        """
        if number is not None and not 1 <= number <= len(self.stages):
            raise ConfigError(f"stage {number}: train.stages has the stages 1 to {len(self.stages)}")
        return self.stages[-1 if number is None else number - 1]

    @property
    def batch_size(self) -> int:
        """`global_batch_size`, once it is a number."""
        assert self.global_batch_size != "auto", "fit_batch settles it"
        return self.global_batch_size

    @property
    def micro_batch_size(self) -> int:
        """Images that go through the network at once, over all replicas."""
        return self.batch_size // self.gradient_accumulation_steps
