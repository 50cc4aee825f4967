"""The schema of a config: all sections, and the checks that involve several of them.

`load_config` creates a `Config` from YAML.
"""

from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from pipeline.config.augment import AugmentConfig
from pipeline.config.base import StrictModel
from pipeline.config.data import DataConfig
from pipeline.config.export import ExportConfig
from pipeline.config.model import ModelConfig, MultipliersConfig, PhiConfig
from pipeline.config.optimizer import OptimizerConfig
from pipeline.config.runtime import RuntimeConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.config.train import TrainConfig
from pipeline.errors import suggest
from pipeline.models.variants import IMAGENET_VARIANTS, VARIANTS, Variant, from_multipliers, from_phi


class Config(StrictModel):
    """All settings of a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Seed of splits, order of the images, augmentation and initial weights."""
    recipe: Literal["auto"] | None = None
    """auto: what optimizer and train.stages leave open follows from the number of training images, for fine-tuning;
    null: as configured."""
    task: Literal["single_label"] = "single_label"
    """single_label: each image belongs to exactly one class."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    export: ExportConfig = ExportConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _weights_are_available(self) -> "Config":
        origin, _, name = (self.model.weights or "").partition(":")
        if origin != "imagenet":
            return self
        published = ", ".join(IMAGENET_VARIANTS)
        if name and name not in IMAGENET_VARIANTS:
            raise ValueError(
                f"model.weights: imagenet is available for {published}, not for {name!r}"
                f"{suggest(name, IMAGENET_VARIANTS)}"
            )
        if not name and self.model.variant not in IMAGENET_VARIANTS:
            raise ValueError(
                f"model.weights: imagenet is available for {published}, not for {self.variant.name}; name one of them "
                "to start from its layers that fit, as in imagenet:b2, or name a file or null"
            )
        if name and VARIANTS[name].family_name != self.variant.family_name:
            raise ValueError(
                f"model.weights: {self.model.weights} does not fit {self.variant.name}: the lite variants have other "
                "activations and another normalization"
            )
        return self

    @model_validator(mode="after")
    def _recipe_needs_weights(self) -> "Config":
        if self.recipe is not None and self.model.weights is None:
            raise ValueError("recipe: auto fine-tunes; set model.weights, or set recipe to null and write the stages")
        return self

    @model_validator(mode="after")
    def _data_service_excludes_python(self) -> "Config":
        if self.runtime.data_service is not None:
            if self.augment.backend != "native":
                raise ValueError(
                    f"runtime.data_service: {self.augment.backend} runs Python functions, which servers cannot run; "
                    "set augment.backend to native, or data_service to null"
                )
            if self.data.source not in ("folder", "csv", "digits"):
                raise ValueError(
                    f"runtime.data_service: source {self.data.source} runs Python functions, which servers cannot run; "
                    "use folder or csv, or set data_service to null"
                )
        return self

    @model_validator(mode="after")
    def _no_layer_stays_random(self) -> "Config":
        if (
            self.model.weights is None
            and self.recipe is None
            and all(stage.trainable != "all" for stage in self.train.stages)
        ):
            raise ValueError(
                "train.stages: with model.weights null, blocks that no stage trains stay random; let one train all"
            )
        return self

    @property
    def variant(self) -> Variant:
        """The variant with `model.resolution`, `dropout`, `padding` and `normalization` applied.

        An unresolved auto stands for the family's own.
        """
        chosen = self.model.variant
        if isinstance(chosen, PhiConfig):
            base = from_phi(chosen.phi)
        elif isinstance(chosen, MultipliersConfig):
            base = from_multipliers(chosen.width, chosen.depth, chosen.resolution)
        else:
            base = VARIANTS[chosen]
        return Variant(
            base.name,
            base.width,
            base.depth,
            self.model.resolution or base.resolution,
            base.dropout if self.model.dropout is None else self.model.dropout,
            base.family_name,
            base.padding if self.model.padding == "auto" else self.model.padding,
            self.model.input_normalization,
        )

    def with_network(self, variant: Variant) -> "Config":
        """Return the config with the padding and the normalization of a variant in the place of auto."""
        model = self.model.with_network(variant.padding, variant.normalization)
        return self.model_copy(update={"model": model})

    def with_absolute_paths(self) -> "Config":
        """Return the config with absolute paths of the data, so that it means the same in every folder."""
        paths = {name: path.absolute() for name in ("path", "root") if (path := getattr(self.data, name)) is not None}
        return self.model_copy(update={"data": self.data.model_copy(update=paths)})

    def cross_process_fingerprint(self) -> str:
        """Return JSON of all settings that must be equal in every process of a run.

        Paths, tracking and the settings of one machine are left out.
        """
        runtime, model = {"num_workers", "data_service"}, {"weights", "weights_classes", "class_map"}
        return self.model_dump_json(exclude={"tracking": True, "runtime": runtime, "data": {"path"}, "model": model})

    def to_yaml(self) -> str:
        """Return the whole config, defaults included, as YAML that loads back equal.

        Keys that an unresolved auto will set are left out.
        """
        values = self.model_dump(mode="json")
        if self.recipe is not None:
            values["optimizer"] = self.optimizer.model_dump(mode="json", exclude_unset=True)
        if "stages" not in self.train.model_fields_set and (self.recipe or self.train.epochs):
            del values["train"]["stages"]
        if self.train.global_batch_size == "auto":
            del values["train"]["gradient_accumulation_steps"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
