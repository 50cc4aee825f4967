"""Images whose label may be wrong: the network disagrees with it, and confidently so."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import softmax

from pipeline.evaluation.metrics import Predictions


def label_suspects(
    predictions: Predictions, keys: Sequence[str], class_names: Sequence[str], temperature: float = 1.0
) -> pd.DataFrame:
    """Finds and ranks them by confident learning (Northcutt et al. 2021, arXiv 1911.00068).

    A class's threshold is the mean probability that the network gives it on the images labelled with it. An image is suspected where
    another class than its label reaches that class's threshold; of several, the most probable is meant.

    Args:
        predictions: Of N images.
        keys: Name of every image of the manifest: `predictions.index` points into it.
        class_names: K names.
        temperature: What the logits are divided by.

    Returns:
        A row per suspect, the widest margin first: key, label, suggested, label_probability, suggested_probability.
    """
    rows, labels = np.arange(len(predictions.labels)), predictions.labels
    probabilities = softmax(predictions.logits.astype(np.float64) / temperature, axis=1)
    own = probabilities[rows, labels]
    images = np.bincount(labels, minlength=len(class_names))
    thresholds = np.bincount(labels, own, len(class_names)) / np.maximum(images, 1)
    thresholds[images == 0] = np.inf  # nothing to go by
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
