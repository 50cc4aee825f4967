"""Labels that may be wrong."""

import numpy as np
import pandas as pd

from pipeline.evaluation.label_errors import find_label_errors
from pipeline.evaluation.predictor import Predictions


def test_swapped_labels_are_found_and_ranked_first():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, 600).astype(np.int32)
    logits = rng.normal(0, 1, (600, 6))
    logits[np.arange(600), true] += 5
    swapped = rng.choice(600, 30, replace=False)
    labels = true.copy()
    labels[swapped] = (labels[swapped] + rng.integers(1, 6, 30)) % 6
    found = find_label_errors(
        Predictions(np.arange(100, 700), labels, logits.astype(np.float32)),
        [f"{i}.jpg" for i in range(700)],
        list("abcdef"),
    )
    assert set(found["key"].head(25)) <= {f"{100 + i}.jpg" for i in swapped}
    margin = found["suggested_probability"] - found["label_probability"]
    assert (margin.diff().dropna() <= 0).all()
    assert (margin > 0).all()
    row = found.iloc[0]
    index = int(row["key"].removesuffix(".jpg")) - 100
    assert (row["label"], row["suggested"]) == ("abcdef"[labels[index]], "abcdef"[true[index]])


def test_an_unsure_disagreement_is_no_suspicion():
    """Class b is held 90 % probable on its own images: 60 % on one of class a is not enough."""
    logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.1, 0.9]]).astype(np.float32)
    found = find_label_errors(
        Predictions(np.arange(5), np.array([0, 0, 0, 1, 1], np.int32), logits), list("vwxyz"), ["a", "b"]
    )
    assert found.empty
    sure = logits.copy()
    sure[2] = np.log([0.05, 0.95])
    found = find_label_errors(
        Predictions(np.arange(5), np.array([0, 0, 0, 1, 1], np.int32), sure), list("vwxyz"), ["a", "b"]
    )
    assert found["key"].tolist() == ["x"]
    np.testing.assert_allclose(found[["label_probability", "suggested_probability"]], [[0.05, 0.95]], rtol=1e-6)


def test_a_class_without_images_suspects_nothing():
    logits = np.array([[0, 9, 0], [0, 9, 0]], np.float32)
    found = find_label_errors(
        Predictions(np.arange(2), np.array([0, 0], np.int32), logits), ["a", "b"], ["a", "b", "c"]
    )
    pd.testing.assert_frame_equal(found, found.head(0))
