"""Calibration error, Brier score, temperature."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from pipeline.evaluation.calibration import NUM_BINS, fit_temperature, measure_calibration
from pipeline.evaluation.predictor import Predictions


def honest(images: int, temperature: float, seed: int = 0) -> Predictions:
    """Labels drawn from softmax(logits); the logits are then multiplied by `temperature`, which a fit must find."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (images, 4))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((images, 1))).sum(axis=1)
    return Predictions(np.arange(images), labels.astype(np.int32), (temperature * logits).astype(np.float32))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_found_and_mends_the_probabilities(temperature):
    fitted = fit_temperature(honest(20_000, temperature))
    assert fitted == pytest.approx(temperature, rel=0.03)
    other = honest(20_000, temperature, seed=1)
    mended = measure_calibration(other, fitted)
    assert mended.ece < 0.015
    assert abs(mended.overconfidence) < 0.01
    assert temperature == 1 or measure_calibration(other).ece > 0.08


def test_the_figures_are_the_textbooks():
    predictions = honest(500, 1.0)
    probabilities = softmax(predictions.logits.astype(np.float64) / 2, axis=1)
    found = measure_calibration(predictions, 2.0)
    assert found.loss == pytest.approx(log_loss(predictions.labels, probabilities, labels=range(4)))
    assert found.brier == pytest.approx(((probabilities - np.eye(4)[predictions.labels]) ** 2).sum(axis=1).mean())
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == predictions.labels
    ece = 0.0
    for i in range(NUM_BINS):
        bin_ = (confidence >= i / NUM_BINS) & ((confidence < (i + 1) / NUM_BINS) | (i == NUM_BINS - 1))
        if bin_.any():
            ece += bin_.mean() * abs(confidence[bin_].mean() - right[bin_].mean())
            assert found.bins.loc[i, "images"] == bin_.sum()
            assert found.bins.loc[i, "accuracy"] == pytest.approx(right[bin_].mean())
    assert found.ece == pytest.approx(ece)
    assert found.bins["images"].sum() == 500


def test_a_split_without_errors_settles_no_temperature():
    """Ever greater confidence would fit it ever better."""
    labels = np.arange(30, dtype=np.int32) % 3
    assert fit_temperature(Predictions(np.arange(30), labels, 2 * np.eye(3, dtype=np.float32)[labels])) is None


def test_certainty_counts_in_the_last_bin():
    found = measure_calibration(
        Predictions(np.arange(2), np.array([0, 1], np.int32), np.array([[500, 0], [500, 0]], np.float32))
    )
    assert found.bins["images"].tolist() == [0] * (NUM_BINS - 1) + [2]
    assert (found.ece, found.brier) == (0.5, 1.0)


def test_chance_alone_explains_the_error_of_a_true_confidence_and_not_that_of_a_false_one():
    true, boastful = measure_calibration(honest(300, 1.0)), measure_calibration(honest(300, 3.0))
    assert true.ece == pytest.approx(true.ece_by_chance, abs=0.02)
    assert true.ece_by_chance > 0.02
    assert boastful.ece > 3 * boastful.ece_by_chance
    assert boastful.overconfidence == pytest.approx(boastful.ece, abs=0.03)
    assert measure_calibration(honest(300, 0.3)).overconfidence < -0.1
