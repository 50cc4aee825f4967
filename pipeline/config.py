"""The schema of a config: every key, its type, bounds, default and meaning. `load_config` makes one from YAML."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipeline.data_config import AugmentConfig, DataConfig, Section
from pipeline.errors import ConfigError, nearest
from pipeline.runtime_config import RuntimeConfig
from pipeline.scaling import VARIANTS, Variant, from_multipliers, from_phi

IMAGENET_VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "lite0", "lite1", "lite2")  # with weights to be had by name

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MlflowName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", max_length=100)]
Schedule = Literal["exponential", "cosine", "constant"]
Trainable = Literal["head", "block1", "block2", "block3", "block4", "block5", "block6", "block7", "all"]
Metric = Literal["accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "loss"]


class Phi(Section):
    """A variant by its compound coefficient."""

    phi: Annotated[float, Field(ge=-6, le=9)]
    """0 is B0; the resolution is 224 * 1.15^phi."""


class Multipliers(Section):
    """A variant by its multipliers of B0."""

    width: Annotated[float, Field(gt=0, le=10)]
    """Of the channels."""
    depth: Annotated[float, Field(gt=0, le=6)]
    """Of the repeats of a stage."""
    resolution: Annotated[int, Field(ge=32, le=4096)]
    """Side of the square input, in pixels."""


def _variant_form(value: Any) -> str:
    if isinstance(value, Phi) or (isinstance(value, Mapping) and "phi" in value):
        return "phi"
    return "multipliers" if isinstance(value, Mapping | Multipliers) else "name"


class ModelConfig(Section):
    """The network."""

    variant: Annotated[
        Annotated[Literal[tuple(VARIANTS)], Tag("name")] | Annotated[Phi, Tag("phi")] | Annotated[Multipliers, Tag("multipliers")],  # type: ignore[valid-type]
        Discriminator(_variant_form),
    ] = "b0"
    """b0 to b8, l2, lite0 to lite4, {phi: 1.5} or {width: 1.1, depth: 1.2, resolution: 260}."""
    resolution: Annotated[int, Field(ge=32, le=4096)] | None = None
    """Side of the square input in pixels; null takes the variant's own."""
    weights: str | None = "imagenet"
    """null: random values; imagenet; imagenet:b2, what fits of another variant's; a file (.h5, .keras, .pth); or the directory of a run."""
    class_map: Path | None = None
    """YAML of `new class: old class` or `new class: [old classes to merge]`, for the classifier of the weights; null goes by names."""
    dropout: Fraction | None = None
    """Rate in front of the classifier; null takes the variant's own."""
    survival: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Probability that the last block survives stochastic depth; the first always does, between them it falls linearly."""
    batch_norm_momentum: Fraction = 0.99
    """Of the moving statistics. 0.99 is the paper's; runs of a few hundred steps from random weights want about 0.9."""

    @model_validator(mode="after")
    def _map_has_weights(self) -> "ModelConfig":
        if self.class_map is not None and self.weights is None:
            raise ValueError("class_map says where the rows of the weights' classifier go; set weights, or leave class_map out")
        return self


class OptimizerConfig(Section):
    """How the weights move. The defaults are the paper's recipe."""

    name: Literal["rmsprop", "sgd", "adamw"] = "rmsprop"
    """rmsprop: TensorFlow 1's (decay 0.9, momentum 0.9, epsilon 1e-3, accumulator from ones); sgd: Nesterov, momentum 0.9; adamw."""
    base_lr: PositiveFloat = 0.016
    """Learning rate per 256 images; multiplied by global_batch_size / 256."""
    schedule: Schedule = "exponential"
    """exponential: x decay_rate every decay_epochs, in steps; cosine: to zero at the stage's end; constant."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.97
    """Of the exponential schedule."""
    decay_epochs: PositiveFloat = 2.4
    """Of the exponential schedule."""
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Linear rise at the start of each stage."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    """rmsprop, sgd: factor of half the squared norm in the loss; adamw: decoupled. Never on batch normalisation's weights."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = 0.9999
    """Decay of the moving average of all weights and statistics, min(ema, (1 + step) / (10 + step)); null for none."""


class StageConfig(Section):
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
    """Freeze batch normalisation, its scales and shifts included, where its block is trained, too; in frozen blocks it always is."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discriminative learning rates (arXiv 1801.06146): each block moves by this factor of the one behind it; the classifier by 1."""
    augment: bool = True
    """false prepares the pictures as in evaluation. From its start on, a run that trains the head so computes the backbone once."""


class EarlyStoppingConfig(Section):
    """Leaves a stage that no longer helps; the run goes on with the next one."""

    patience: PositiveInt
    """Epochs of the stage, one after the other, in which best_metric may fail to improve."""
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """What best_metric must improve by to count."""


class Skip(Section):
    """What `train.on_nan` may be beside a word."""

    skip: PositiveInt
    """Steps that may be passed over in the whole run."""


class TrainConfig(Section):
    """How long and in what portions."""

    global_batch_size: Annotated[
        Annotated[PositiveInt, Tag("number")] | Annotated[Literal["auto"], Tag("word")],
        Discriminator(lambda value: "word" if isinstance(value, str) and not value.isdigit() else "number"),
    ] = 32
    """Images per step over all replicas. auto: about 256, in as many micro-batches as the devices' memory asks for by estimate."""
    accumulation: PositiveInt = 1
    """Micro-batches that a replica's share of the batch is cut into, to save memory; their gradients are averaged and applied once."""
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
    """What an image of a class counts in the loss beside the others: by name, 1 where none is given; balanced: every class the same."""
    best_metric: Metric = "accuracy"
    """Of the validation split; decides which epoch is kept in best/, and early stopping. The test split decides nothing."""
    early_stopping: EarlyStoppingConfig | None = None
    """null trains every stage to its end."""
    restore_best: bool = False
    """Make the best epoch's network the run's result, model.keras, in place of the last one's."""
    keep_checkpoints: PositiveInt = 2
    """Newest ones; the best epoch's and the last epoch's are kept besides."""
    checkpoint_every_steps: PositiveInt | None = None
    """A checkpoint is written after each epoch and, if this is set, whenever the step is a multiple of it."""
    on_nan: Annotated[
        Annotated[Literal["stop", "rollback"], Tag("word")] | Annotated[Skip, Tag("skip")],
        Discriminator(lambda value: "skip" if isinstance(value, Mapping | Skip) else "word"),
    ] = "stop"
    """When a step's loss or gradient is not finite (nothing of it is applied, its batch is saved): stop; {skip: 3} passes over that many
    such steps in the whole run; rollback goes back to the start of the epoch with the learning rate halved, three times at most."""

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.global_batch_size == "auto":
            if "accumulation" in self.model_fields_set:
                raise ValueError("global_batch_size: auto chooses accumulation; leave it out")
        elif self.global_batch_size % self.accumulation:
            raise ValueError(f"global_batch_size ({self.global_batch_size}) must be a multiple of accumulation ({self.accumulation})")
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
        return self.batch_size // self.accumulation


class ExportConfig(Section):
    """What an exported file must come up to, over all images of a split, to be taken for the model."""

    min_agreement: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Share of the images to which it must give the same top-1 class as the model."""
    max_accuracy_loss: Fraction = 0.01
    """How far its accuracy may lie below the model's."""
    max_logit_difference: PositiveFloat = 1e-3
    """The largest difference of a logit, in standard deviations of the model's logits. Not asked of int8, which rounds by intention."""
    calibration_images: PositiveInt = 200
    """Training images that int8 takes the ranges of its activations from."""


warnings.filterwarnings("ignore", 'Field name "register"')  # pydantic's, of ABCMeta.register, which every model has and none uses


class TrackingConfig(Section):
    """MLflow."""

    experiment: MlflowName = "default"
    """Name of the experiment in MLflow and of the folder under runs/."""
    uri: str | None = None
    """null takes MLFLOW_TRACKING_URI, else the file mlflow.db in the current folder."""
    register: MlflowName | None = None
    """Name in MLflow's model registry for the final model; null registers nothing. The model takes the alias champion if none has it, or if
    the paired test on the same images says that it beats the one that has it."""

    @field_validator("uri", mode="after")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is not None and re.search(r"://[^/@]+@", uri):
            raise ValueError("a config is copied into every run: give user and password by MLFLOW_TRACKING_USERNAME and _PASSWORD")
        return uri


class Config(Section):
    """Everything that a run is made from."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    recipe: Literal["auto"] | None = None
    """auto: optimizer and train.stages follow from the number of training images, for fine-tuning; null: as they are written."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    export: ExportConfig = ExportConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _weights_exist(self) -> "Config":
        origin, _, name = (self.model.weights or "").partition(":")
        if origin != "imagenet":
            return self
        published = ", ".join(IMAGENET_VARIANTS)
        if name and name not in IMAGENET_VARIANTS:
            raise ValueError(f"model.weights: imagenet is to be had for {published}, not for {name!r}{nearest(name, IMAGENET_VARIANTS)}")
        if not name and self.model.variant not in IMAGENET_VARIANTS:
            raise ValueError(
                f"model.weights: imagenet is to be had for {published}, not for {self.variant.name}; name one of them to start from what "
                "fits of it, as in imagenet:b2, or give a file or null"
            )
        if name and VARIANTS[name].lite != self.variant.lite:
            raise ValueError(
                f"model.weights: {self.model.weights} and {self.variant.name} do not go together: the lite variants have other activations "
                "and another normalisation"
            )
        return self

    @model_validator(mode="after")
    def _recipe_has_its_hands_free(self) -> "Config":
        if self.recipe is not None:
            given = [*(["optimizer"] if "optimizer" in self.model_fields_set else []), *(self.train.model_fields_set & {"stages"})]
            if given:
                keys = " and ".join({"optimizer": "optimizer", "stages": "train.stages"}[key] for key in given)
                raise ValueError(f"recipe: auto chooses optimizer and train.stages; leave {keys} out, or set recipe to null")
            if self.model.weights is None:
                raise ValueError("recipe: auto fine-tunes; set model.weights, or set recipe to null and write the stages")
        return self

    @model_validator(mode="after")
    def _servers_need_no_python(self) -> "Config":
        if self.runtime.data_service is not None:
            if self.augment.backend != "native":
                raise ValueError(
                    f"runtime.data_service: {self.augment.backend} are Python functions, which do not travel to servers; set "
                    "augment.backend to native, or data_service to null"
                )
            if self.data.source not in ("folder", "csv", "digits"):
                raise ValueError(
                    f"runtime.data_service: source {self.data.source} is read by Python functions, which do not travel to servers; take a "
                    "folder or csv, or set data_service to null"
                )
        return self

    @model_validator(mode="after")
    def _nothing_stays_random(self) -> "Config":
        if self.model.weights is None and self.recipe is None and all(stage.trainable != "all" for stage in self.train.stages):
            raise ValueError("train.stages: with model.weights null, blocks that no stage trains stay random; let one train all")
        return self

    @property
    def variant(self) -> Variant:
        """The numbers behind `model.variant`, with `model.resolution` and `model.dropout` applied."""
        chosen = self.model.variant
        if isinstance(chosen, Phi):
            base = from_phi(chosen.phi)
        elif isinstance(chosen, Multipliers):
            base = from_multipliers(chosen.width, chosen.depth, chosen.resolution)
        else:
            base = VARIANTS[chosen]
        return Variant(
            base.name,
            base.width,
            base.depth,
            self.model.resolution or base.resolution,
            base.dropout if self.model.dropout is None else self.model.dropout,
            base.lite,
        )

    def of_every_process(self) -> str:
        """JSON of what has to be the same in every process of a run: all but where things are, and this machine's own business."""
        runtime = {"input_workers", "data_service"}
        return self.model_dump_json(exclude={"tracking": True, "runtime": runtime, "data": {"path"}, "model": {"weights", "class_map"}})

    def to_yaml(self) -> str:
        """The whole config, defaults included, as a YAML that loads back equal. What auto is still to choose is left out."""
        values = self.model_dump(mode="json")
        if self.recipe is not None:
            del values["optimizer"], values["train"]["stages"]
        if self.train.global_batch_size == "auto":
            del values["train"]["accumulation"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
