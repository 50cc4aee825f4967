"""Test-time augmentation: the network sees several views of an image, and their probabilities are averaged."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from pipeline.data.preprocessing import PreprocessFn, Resize, crop_view, resize_to_square
from pipeline.errors import RunError
from pipeline.evaluation.predictor import Predictions


class TTAView(NamedTuple):
    """A view of an image."""

    position: tuple[float, float] | None
    """Position of a partial view, as for `crop_view`; None for the view of plain evaluation."""
    mirrored: bool = False


CENTER_AND_CORNERS = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
VIEWS = {
    "flip": (TTAView(None), TTAView(None, mirrored=True)),
    "5-crop": tuple(TTAView(position) for position in CENTER_AND_CORNERS),
    # Krizhevsky et al. 2012
    "10-crop": tuple(TTAView(position, mirrored) for mirrored in (False, True) for position in CENTER_AND_CORNERS),
}


def tta_preprocess_fns(name: str, resolution: int, resize: Resize) -> Iterator[PreprocessFn]:
    """Return a preprocessing function for each view of `VIEWS[name]`.

    Raises:
        RunError: If the run's method of resizing leaves nothing to crop.
    """
    if resize == "letterbox" and name != "flip":
        raise RunError(
            f"--tta {name}: with data.resize: letterbox the network sees complete images, so there is nothing "
            "to crop; use flip"
        )

    def preprocess_fn_of(view: TTAView) -> PreprocessFn:
        def preprocess_fn(image: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
            del index
            pixels = (
                resize_to_square(image, resolution, resize)
                if view.position is None
                else crop_view(image, resolution, resize, view.position)
            )
            return tf.reverse(pixels, [1]) if view.mirrored else pixels

        return preprocess_fn

    return map(preprocess_fn_of, VIEWS[name])


def average_predictions(views: Sequence[Predictions]) -> Predictions:
    """Combine the predictions of several views: its probabilities are the mean of the views'."""
    first = views[0]
    logits = first.task.average([view.logits for view in views])
    return replace(first, logits=logits.astype(np.float32))
