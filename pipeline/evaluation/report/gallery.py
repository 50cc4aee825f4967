"""Image galleries of a report: the worst errors and the most confident correct images, with Grad-CAM heat maps."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.evaluation.calibration import PerImageScores
from pipeline.evaluation.grad_cam import GradCam, overlay
from pipeline.evaluation.report.images import jpeg
from pipeline.evaluation.results import EvaluationResults

MAX_IMAGES = 12  # per gallery
MAX_SIDE = 256  # pixels; a report stays small enough to be sent by mail
JPEG_QUALITY = 85


class GalleryItem(NamedTuple):
    """An image of a gallery with its text."""

    images: tuple[bytes, ...]
    """JPEG files: the image, and below it the image with the heat map."""
    title: str
    lines: tuple[str, ...]
    alt: str


def worst_errors(results: EvaluationResults) -> np.ndarray:
    """Return the rows of the wrong predictions with the greatest loss, the worst first."""
    scores = PerImageScores.from_predictions(results.predictions)
    wrong = np.flatnonzero(scores.correct == 0)
    return wrong[np.argsort(-scores.loss[wrong], kind="stable")][:MAX_IMAGES]


def most_confident_correct(results: EvaluationResults) -> np.ndarray:
    """Return the rows of the correct predictions with the greatest confidence, the most confident first."""
    scores = PerImageScores.from_predictions(results.predictions)
    correct = np.flatnonzero(scores.correct == 1)
    return correct[np.argsort(-scores.confidence[correct], kind="stable")][:MAX_IMAGES]


def gallery_items(
    results: EvaluationResults, rows: np.ndarray, images: Callable[[np.ndarray], np.ndarray], grad_cam: GradCam
) -> list[GalleryItem]:
    """Create the items of a gallery: images as the network sees them, with the heat map of the predicted class.

    Args:
        results: Of a split.
        rows: int (N,), rows of its predictions.
        images: From indices of the manifest (N,) to uint8 (N, R, R, 3).
        grad_cam: Grad-CAM of the network.
    """
    if not len(rows):
        return []
    predictions, class_names = results.predictions, results.class_names
    scores, predicted = PerImageScores.from_predictions(predictions), predictions.decisions
    inputs = images(predictions.index[rows])
    items = []
    for row, image, heat in zip(rows, inputs, grad_cam(inputs, predicted[rows]), strict=True):
        key, true, chosen = (
            results.keys[predictions.index[row]],
            class_names[predictions.labels[row]],
            class_names[predicted[row]],
        )
        prediction = f"predicted {chosen}, {scores.confidence[row]:.1%}"
        lines = (prediction,) if true == chosen else (prediction, f"labeled {true}, {scores.true_probability[row]:.1%}")
        alt = f"{true} predicted as {chosen}"
        files = tuple(jpeg(each, MAX_SIDE, JPEG_QUALITY) for each in (image, overlay(image, heat)))
        items.append(GalleryItem(files, str(key), lines, alt))
    return items
