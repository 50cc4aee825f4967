"""Test-time augmentation: a picture is looked at several times, and the probabilities are averaged."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy.special import log_softmax, logsumexp

from pipeline.data.input_pipeline import Square
from pipeline.data.preprocessing import Resize, crop_view, resize_to_square
from pipeline.errors import RunError
from pipeline.evaluation.metrics import Predictions


class TTAView(NamedTuple):
    """How to look at a picture."""

    place: tuple[float, float] | None
    """Of a partial view, as of `partial_view`; None for the square that evaluation takes."""
    mirrored: bool = False


CENTRE_AND_CORNERS = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
VIEWS = {
    "flip": (TTAView(None), TTAView(None, mirrored=True)),
    "5-crop": tuple(TTAView(place) for place in CENTRE_AND_CORNERS),
    "10-crop": tuple(
        TTAView(place, mirrored) for mirrored in (False, True) for place in CENTRE_AND_CORNERS
    ),  # Krizhevsky et al. 2012
}


def squares(name: str, resolution: int, resize: Resize) -> Iterator[Square]:
    """What makes the network's square of a picture, for each view of `VIEWS[name]`.

    Raises:
        RunError: If the run's way of resizing leaves nothing to crop.
    """
    if resize == "letterbox" and name != "flip":
        raise RunError(
            f"--views {name}: the run shows the network whole pictures (data.resize: letterbox), there is nothing to crop; use flip"
        )

    def square_of(view: TTAView) -> Square:
        def square(image: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
            del index
            seen = (
                resize_to_square(image, resolution, resize)
                if view.place is None
                else crop_view(image, resolution, resize, view.place)
            )
            return tf.reverse(seen, [1]) if view.mirrored else seen

        return square

    return map(square_of, VIEWS[name])


def averaged(views: Sequence[Predictions]) -> Predictions:
    """The predictions of several views as one: logits whose softmax is the mean of the views' probabilities."""
    logits = logsumexp([log_softmax(view.logits.astype(np.float64), axis=1) for view in views], axis=0) - np.log(
        len(views)
    )
    return Predictions(views[0].index, views[0].labels, logits.astype(np.float32))
