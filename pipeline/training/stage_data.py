"""What the stages of a run train on, and how the network is measured between their epochs and at the end."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.config.schema import Config
from pipeline.console import Console
from pipeline.data.data_service import check_servers, from_data_service
from pipeline.data.input_pipeline import evaluation_stream, feature_stream, steps_per_epoch, training_stream
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DataSource
from pipeline.distributed.devices import Runtime
from pipeline.distributed.signals import TrainingInterrupted
from pipeline.errors import RunError, TrainingError
from pipeline.evaluation.metrics import Evaluation, evaluate_predictions
from pipeline.evaluation.predictor import Predictions, Predictor
from pipeline.training.feature_cache import FeatureCache, are_constant, backbone_and_head
from pipeline.training.schedule import TrainStage, build_schedule
from pipeline.training.state import TrainState
from pipeline.training.trainer import StageInputs


class StageData:
    """Give the training loop its batches and its validation.

    Of pictures, or of a frozen backbone's features, computed once.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        manifest: Manifest,
        source: DataSource,
        state: TrainState,
        console: Console,
        stop_requested: Callable[[], bool],
    ) -> None:
        """Take all that a run is made from; reads nothing yet."""
        self._config, self._manifest, self._source, self._state = config, manifest, source, state
        self._screen, self._stop_requested = console, stop_requested
        self._processes, self._share = runtime.processes, runtime.shard
        self._plan = build_schedule(config, steps_per_epoch(len(manifest.indices("train")), config.train.batch_size))
        self._backbone, head = backbone_and_head(state.model)
        self._predictor, self._feature_extractor = (
            Predictor(each, runtime.strategy) for each in (state.model, self._backbone)
        )
        self._features = FeatureCache(head, self._compute_features)

    def for_stage(self, stage: TrainStage) -> StageInputs:
        """What a stage trains on. Features take the pictures' place where they are the same in every epoch."""
        config, manifest = self._config, self._manifest
        so_far = config.train.stages[: stage.number + 1]
        constant = are_constant(config, so_far, len(manifest.indices("train")), self._features.width)
        average = self._state.average
        if constant and (average is None or not average.tracks_any(self._backbone.weights)):
            rows = self._features.of("train")
            return StageInputs(
                self._features.head,
                lambda step: feature_stream(manifest, config, rows, start_step=step, share=self._share),
                self._validate_head,
            )
        self._features.forget()
        return StageInputs(self._state.model, self.stream, self._validate)

    def stream(self, step: int) -> tf.data.Dataset:
        """This process's share of the stream from a step on, prepared here or by the servers that the config names."""
        addresses = self._config.runtime.data_service
        if addresses is None:
            return self.local_stream(step, share=self._share)
        check_servers(addresses)
        return from_data_service(
            lambda server, of: self.local_stream(
                step, first=step + server, stride=of, share=self._share, workers=tf.data.AUTOTUNE
            ),
            addresses,
        )

    def local_stream(self, step: int, *, first: int | None = None, **how: Any) -> tf.data.Dataset:
        """The stream from a step on, or from a later `first` one, as the step's stage sees it, prepared here.

        `how` goes to the stream.
        """
        stage = next(stage for stage in self._plan if step < stage.stop)
        start = step if first is None else first
        return training_stream(
            self._manifest, self._source, self._config, start_step=start, augmented=stage.config.use_augmentation, **how
        )

    def predict(self, split: str, **how: Any) -> Predictions:
        """What the network as it is now says of every image of a split; `how` goes to the stream."""
        return self._predictor(self._evaluated(split, **how))

    def evaluate(self, split: str) -> tuple[Predictions, Evaluation]:
        """Measure the network as it is now on every image of a split."""
        predictions = self.predict(split)
        return predictions, self._figures(predictions, split)

    def _figures(self, predictions: Predictions, split: str) -> Evaluation:
        try:
            return evaluate_predictions(predictions, self._manifest.class_names, split)
        except RunError as error:  # of a network in training it is no mistake in the input
            raise TrainingError(str(error)) from None

    def _validate(self) -> dict[str, float]:
        return self.evaluate("val")[1].headline() if len(self._manifest.indices("val")) else {}

    def _validate_head(self) -> dict[str, float]:
        rows = self._manifest.indices("val")
        if not len(rows):
            return {}
        predictions = Predictions(rows, self._manifest.table["label"].to_numpy()[rows], self._features.logits("val"))
        return self._figures(predictions, "val").headline()

    def _evaluated(self, split: str, **how: Any) -> tf.data.Dataset:
        size = self._config.train.micro_batch_size
        return evaluation_stream(
            self._manifest, self._source, self._config, split, batch_size=size, share=self._share, **how
        )

    def _compute_features(self, split: str) -> np.ndarray:
        with self._screen.progress(f"computing the features of {split}, once") as count:

            def progress(done: int, of: int) -> None:
                count(done, of)
                if self._processes.any_process(
                    self._stop_requested()
                ):  # nothing is lost: a resume computes them anew in any case
                    raise TrainingInterrupted

            return self._feature_extractor(self._evaluated(split), progress=progress).logits
