"""Images whose label may be wrong, because the network confidently disagrees with it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.evaluation.predictor import Predictions


def find_label_errors(predictions: Predictions, keys: Sequence[str], class_names: Sequence[str]) -> pd.DataFrame:
    """Find and rank likely label errors by confident learning (Northcutt et al. 2021, arXiv 1911.00068).

    The threshold of a class is its mean probability on the images labeled with it, so a miscalibrated network needs no
    temperature. An image is suspected where a class
    other than its label reaches that class's threshold; the most probable such class is suggested.

    Args:
        predictions: Of N images.
        keys: Name of every image of the manifest: `predictions.index` points into it.
        class_names: K names.

    Returns:
        A row per suspected image, the widest margin first: key, label, suggested, label_probability,
        suggested_probability.
    """
    rows, labels = np.arange(len(predictions.labels)), predictions.labels
    probabilities = predictions.probabilities()
    own = probabilities[rows, labels]
    images = np.bincount(labels, minlength=len(class_names))
    thresholds = np.bincount(labels, own, len(class_names)) / np.maximum(images, 1)
    thresholds[images == 0] = np.inf  # no evidence
    reached = np.where(probabilities >= thresholds, probabilities, -1.0)
    reached[rows, labels] = -1.0
    suggested = reached.argmax(axis=1)
    margin = reached[rows, suggested] - own
    suspected = np.flatnonzero(margin > 0)
    suspected = suspected[np.argsort(-margin[suspected], kind="stable")]
    names = np.array(class_names, object)
    return pd.DataFrame(
        {
            "key": [keys[i] for i in predictions.index[suspected]],
            "label": names[labels[suspected]],
            "suggested": names[suggested[suspected]],
            "label_probability": own[suspected],
            "suggested_probability": probabilities[suspected, suggested[suspected]],
        }
    )
