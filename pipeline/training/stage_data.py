"""The data of a run's stages: batches to train on, and the evaluation of the network between epochs and at the end."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.console import Console
from pipeline.data.data_service import check_servers, from_data_service
from pipeline.data.input_pipeline import evaluation_stream, feature_stream, training_stream
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DataSource
from pipeline.distributed.signals import TrainingInterrupted
from pipeline.errors import RunError, TrainingError
from pipeline.evaluation.metrics import Evaluation, evaluate_predictions
from pipeline.evaluation.predictor import Predictions, Predictor
from pipeline.tasks import TASKS
from pipeline.training.feature_cache import FeatureCache, are_constant, backbone_and_head
from pipeline.training.resolve import ResolvedConfig
from pipeline.training.schedule import TrainStage
from pipeline.training.state import TrainState
from pipeline.training.trainer import StageInputs


class StageData:
    """The batches and the validation of every stage: of images, or of a frozen backbone's features, computed once."""

    def __init__(
        self,
        resolved: ResolvedConfig,
        manifest: Manifest,
        source: DataSource,
        state: TrainState,
        console: Console,
        stop_requested: Callable[[], bool],
    ) -> None:
        """Prepare the data of a run; nothing is read yet.

        Args:
            resolved: The config with its devices, batch size and schedule.
            manifest: All images, with label and split.
            source: Source of the image files.
            state: State of the run; its network is evaluated.
            console: Console for the progress of computing features.
            stop_requested: Called while features are computed; True interrupts that.
        """
        config, runtime = resolved.config, resolved.runtime
        self._config, self._manifest, self._source, self._state = config, manifest, source, state
        self._console, self._stop_requested = console, stop_requested
        self._processes, self._shard, self._schedule = runtime.processes, runtime.shard, resolved.schedule
        self._batch_size = resolved.batch_size
        self._backbone, head = backbone_and_head(state.model)
        self._predictor, self._feature_extractor = (
            Predictor(model, runtime.strategy, TASKS[config.task]) for model in (state.model, self._backbone)
        )
        self._features = FeatureCache(head, self._compute_features)

    def for_stage(self, stage: TrainStage) -> StageInputs:
        """Return the inputs of a stage: features in place of images where these are the same in every epoch."""
        config, manifest = self._config, self._manifest
        so_far = config.train.stages[: stage.number + 1]
        constant = are_constant(config.augment, so_far, len(manifest.indices("train")), self._features.width)
        average = self._state.ema
        if constant and (average is None or not average.tracks_any(self._backbone.weights)):
            features = self._features.get("train")
            return StageInputs(
                self._features.head,
                lambda step: feature_stream(
                    manifest, config, self._batch_size.images, features, start_step=step, shard=self._shard
                ),
                self._validate_head,
            )
        self._features.clear()
        return StageInputs(self._state.model, self.stream, self._validate)

    def stream(self, step: int) -> tf.data.Dataset:
        """Return this process's shard of the training stream, prepared here or by the servers that the config names.

        Args:
            step: First step.
        """
        addresses = self._config.runtime.data_service
        if addresses is None:
            return self.local_stream(step, shard=self._shard)
        check_servers(addresses)
        return from_data_service(
            lambda server, num_servers: self.local_stream(
                step, first=step + server, stride=num_servers, shard=self._shard, num_workers=tf.data.AUTOTUNE
            ),
            addresses,
        )

    def local_stream(self, step: int, *, first: int | None = None, **stream_kwargs: Any) -> tf.data.Dataset:
        """Return the training stream as the stage of a step sees it, prepared in this process.

        Args:
            step: First step; its stage decides about augmentation.
            first: A later step to start from instead.
            **stream_kwargs: Further arguments of `training_stream`.
        """
        return training_stream(
            self._manifest,
            self._source,
            self._config,
            self._batch_size.images,
            start_step=step if first is None else first,
            augmented=self._schedule.stage_at(step).config.use_augmentation,
            **stream_kwargs,
        )

    def predict(self, split: str, **stream_kwargs: Any) -> Predictions:
        """Return the current network's predictions for every image of a split.

        Args:
            split: Name of the split.
            **stream_kwargs: Further arguments of `evaluation_stream`.
        """
        return self._predictor(self._evaluation_stream(split, **stream_kwargs))

    def evaluate(self, split: str) -> tuple[Predictions, Evaluation]:
        """Evaluate the current network on every image of a split.

        Raises:
            TrainingError: Outputs of the network are not finite.
        """
        predictions = self.predict(split)
        return predictions, self._evaluate_predictions(predictions, split)

    def _evaluate_predictions(self, predictions: Predictions, split: str) -> Evaluation:
        try:
            return evaluate_predictions(predictions, self._manifest.class_names, split)
        except RunError as error:  # for a network in training, this is not an error in the user's input
            raise TrainingError(str(error)) from None

    def _validate(self) -> dict[str, float]:
        return self.evaluate("val")[1].scalar_metrics() if len(self._manifest.indices("val")) else {}

    def _validate_head(self) -> dict[str, float]:
        rows = self._manifest.indices("val")
        if not len(rows):
            return {}
        labels, logits = self._manifest.table["label"].to_numpy()[rows], self._features.logits("val")
        predictions = Predictions(rows, labels, logits, TASKS[self._config.task])
        return self._evaluate_predictions(predictions, "val").scalar_metrics()

    def _evaluation_stream(self, split: str, **stream_kwargs: Any) -> tf.data.Dataset:
        return evaluation_stream(
            self._manifest,
            self._source,
            self._config,
            self._manifest.indices(split),
            batch_size=self._batch_size.images // self._batch_size.accumulation,
            shard=self._shard,
            **stream_kwargs,
        )

    def _compute_features(self, split: str) -> np.ndarray:
        with self._console.progress(f"computing the features of {split}, once") as show_progress:

            def progress(done: int, total: int | None) -> None:
                show_progress(done, total)
                # An interruption costs nothing: a resume computes the features again in any case.
                if self._processes.any_process(self._stop_requested()):
                    raise TrainingInterrupted

            return self._feature_extractor(self._evaluation_stream(split), progress=progress).logits
