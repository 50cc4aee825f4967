"""Pictures of a report: the worst errors and the surest right ones, with what the network looked at."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.evaluation.calibration import PerImageScores
from pipeline.evaluation.grad_cam import GradCam, overlay
from pipeline.evaluation.results import Results

PICTURES = 12  # of a gallery
LARGEST = 256  # pixels of a side; a report stays small enough to be sent
JPEG_QUALITY = 85


class GalleryItem(NamedTuple):
    """A picture with what is to be said of it."""

    pictures: tuple[bytes, ...]
    """JPEG files: the picture, and under it the same with the heat map."""
    title: str
    lines: tuple[str, ...]
    alt: str


def worst_errors(results: Results) -> np.ndarray:
    """Rows of the predictions: of the wrong ones those with the greatest loss, the worst first."""
    scores = PerImageScores.of(results.predictions)
    wrong = np.flatnonzero(scores.correct == 0)
    return wrong[np.argsort(-scores.loss[wrong], kind="stable")][:PICTURES]


def most_confident_correct(results: Results) -> np.ndarray:
    """Rows of the predictions: of the right ones those with the greatest confidence, the surest first."""
    scores = PerImageScores.of(results.predictions)
    right = np.flatnonzero(scores.correct == 1)
    return right[np.argsort(-scores.confidence[right], kind="stable")][:PICTURES]


def cards(
    results: Results, rows: np.ndarray, images: Callable[[np.ndarray], np.ndarray], grad_cam: GradCam
) -> list[GalleryItem]:
    """Shows pictures as the network saw them, with the map of what speaks for the class that it chose.

    Args:
        results: Of a split.
        rows: int (N,), rows of its predictions.
        images: From indices of the manifest (N,) to uint8 (N, R, R, 3).
        grad_cam: Of the network.
    """
    if not len(rows):
        return []
    predictions, names = results.predictions, results.class_names
    scores, predicted = PerImageScores.of(predictions), predictions.logits.argmax(axis=1)
    seen = images(predictions.index[rows])
    shown = []
    for row, image, heat in zip(rows, seen, grad_cam(seen, predicted[rows]), strict=True):
        key, true, chosen = results.keys[predictions.index[row]], names[predictions.labels[row]], names[predicted[row]]
        said = f"{chosen}, {scores.confidence[row]:.1%} sure"
        lines = (
            (said,)
            if true == chosen
            else (f"said to be {said}", f"labelled {true}, held {scores.true_probability[row]:.1%} probable")
        )
        shown.append(
            GalleryItem((jpeg(image), jpeg(overlay(image, heat))), str(key), lines, f"{true} taken for {chosen}")
        )
    return shown


def jpeg(image: np.ndarray) -> bytes:
    """A picture, uint8 (H, W, 3), as a JPEG file of at most 256 pixels a side."""
    picture = Image.fromarray(image)
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
