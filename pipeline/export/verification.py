"""Verification that an exported file equals the model: both run on every image of a split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from pipeline.config.export import ExportConfig
from pipeline.console import ProgressFn
from pipeline.evaluation.metrics import evaluate_predictions
from pipeline.evaluation.predictor import Predictions, predict_batches
from pipeline.export.loading import Forward, LoadedExport
from pipeline.models.profile import latency
from pipeline.tasks import Task


@dataclass(frozen=True, eq=False)
class ReferenceResult:
    """The model itself on a split.

    Attributes:
        split: Its name.
        class_names: K names, in the order of the logits.
        predictions: Of its N images.
        accuracy: Top-1, in [0, 1].
        logit_std: Standard deviation of all N * K logits: what a difference is to be measured by.
        latency: Seconds for one image.
        image: float32 (1, R, R, 3), an image of the split, for measuring latencies.
    """

    split: str
    class_names: tuple[str, ...]
    predictions: Predictions
    accuracy: float
    logit_std: float
    latency: float
    image: np.ndarray


@dataclass(frozen=True)
class ParityReport:
    """An exported file beside the model, over all images of a split.

    Attributes:
        max_logit_difference: The largest, absolute.
        agreement: Share of the images whose top-1 class is the model's.
        accuracy: Top-1, in [0, 1].
        latency: Seconds for one image.
        failures: Reasons why the file fails the limits; empty if it meets them.
    """

    max_logit_difference: float
    agreement: float
    accuracy: float
    latency: float
    failures: tuple[str, ...]


def run_reference(
    forward: Forward,
    class_names: Sequence[str],
    dataset: tf.data.Dataset,
    split: str,
    task: Task,
    progress: ProgressFn | None = None,
) -> ReferenceResult:
    """Run the model over a split.

    Args:
        forward: The model.
        class_names: K names.
        dataset: The split's batches, as of `evaluation_stream`.
        split: Its name.
        task: What labels and logits mean.
        progress: Called with the number of batches done and of all.

    Raises:
        RunError: If a logit is not finite.
    """
    predictions = _predict(forward, dataset, task, progress)
    accuracy = evaluate_predictions(predictions, class_names, split).accuracy
    [image] = [images[:1].numpy().astype(np.float32) for images, *_ in dataset.take(1)]
    seconds = latency(lambda: forward(image))
    return ReferenceResult(
        split, tuple(class_names), predictions, accuracy, float(predictions.logits.std()), seconds, image
    )


def check_parity(
    exported: LoadedExport,
    reference: ReferenceResult,
    dataset: tf.data.Dataset,
    limits: ExportConfig,
    *,
    exact: bool,
    progress: ProgressFn | None = None,
) -> ParityReport:
    """Run an exported network over the split that the model was run over, and compare both.

    Args:
        exported: The network as it came out of its file.
        reference: The model.
        dataset: The same batches.
        limits: Limits of the comparison.
        exact: Whether it computes in floating point as the model does, so that its logits must be the model's.
        progress: As of `run_reference`.
    """
    predictions = _predict(exported.forward, dataset, reference.predictions.task, progress)
    logits, wanted = predictions.logits, reference.predictions.logits
    assert np.array_equal(predictions.index, reference.predictions.index)
    difference = float(np.abs(logits - wanted).max())
    agreement = float((predictions.decisions == reference.predictions.decisions).mean())
    failures = [] if exported.class_names == reference.class_names else ["the class names in it are not the model's"]
    accuracy = float("nan")
    if np.isfinite(logits).all():
        accuracy = evaluate_predictions(predictions, reference.class_names, reference.split).accuracy
        failures += _shortfalls(difference, agreement, accuracy, reference, limits, exact=exact)
    else:
        failures.append("its logits are not all finite")
    return ParityReport(
        difference, agreement, accuracy, latency(lambda: exported.forward(reference.image)), tuple(failures)
    )


def _shortfalls(
    difference: float,
    agreement: float,
    accuracy: float,
    reference: ReferenceResult,
    limits: ExportConfig,
    *,
    exact: bool,
) -> list[str]:
    failures = []
    if exact and difference > limits.max_logit_difference * reference.logit_std:
        failures.append(
            f"a logit differs by {difference:.3g}, {difference / max(reference.logit_std, 1e-30):.2g} of the logits' "
            f"standard deviation; export.max_logit_difference allows {limits.max_logit_difference:g}"
        )
    if agreement < limits.min_agreement:
        failures.append(f"top-1 agreement is {agreement:.2%}; export.min_agreement asks for {limits.min_agreement:.2%}")
    # The difference of two shares may be a last digit above a limit that they meet.
    loss = round(reference.accuracy - accuracy, 9)
    if loss > limits.max_accuracy_loss:
        failures.append(
            f"accuracy is {loss:.2%} below the model's; export.max_accuracy_loss allows {limits.max_accuracy_loss:.2%}"
        )
    return failures


def _predict(forward: Forward, dataset: tf.data.Dataset, task: Task, progress: ProgressFn | None) -> Predictions:
    def step(images: tf.Tensor, labels: tf.Tensor, index: tf.Tensor) -> list[tf.Tensor | np.ndarray]:
        return [index, task.decode(labels), forward(images.numpy().astype(np.float32))]

    return predict_batches(dataset, step, task, num_batches=int(dataset.cardinality()), progress=progress)
