"""Calibration of a network's probabilities: reliability, expected calibration error and temperature scaling."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from pipeline.evaluation.predictor import Predictions

NUM_BINS = 15  # of equal width; arXiv 1706.04599
NUM_SIMULATIONS = 200  # simulated networks that are perfectly calibrated
TEMPERATURE_BOUNDS = (0.05, 20.0)  # of a fitted temperature


@dataclass(frozen=True)
class Calibration:
    """The calibration of the probabilities of a split.

    Attributes:
        temperature: Divisor of the logits; 1 leaves them unchanged.
        loss: Mean negative log-likelihood of the true class, in nats.
        brier: Mean over the images of the squared distance between probabilities and truth, summed over the classes: 0
            to 2 (Brier 1950).
        overconfidence: Mean confidence minus accuracy, in [-1, 1].
        ece: Expected calibration error, in [0, 1]: the difference of confidence and accuracy in a bin of equal
            confidence, weighted by the number of images in the bin (Naeini et al. 2015).
        ece_by_chance: Mean error that a perfectly calibrated model would show on so many images; an `ece` near it is no
            evidence of miscalibration (Vaicenavicius et al. 2019, arXiv 1902.06977).
        bins: A row per bin of confidence: lower, upper (its bounds), images, confidence (mean), accuracy; NaN where a
            bin is empty.
    """

    temperature: float
    loss: float
    brier: float
    overconfidence: float
    ece: float
    ece_by_chance: float
    bins: pd.DataFrame


def measure_calibration(predictions: Predictions, temperature: float = 1.0) -> Calibration:
    """Measure the calibration of the probabilities that the logits divided by the temperature give.

    Args:
        predictions: Of at least one image, all finite.
        temperature: Above 0.
    """
    scores, rng = PerImageScores.from_predictions(predictions, temperature), np.random.default_rng(0)
    frame = pd.DataFrame({"bin": scores.bin, "confidence": scores.confidence, "accuracy": scores.correct})
    by_bin = frame.groupby("bin").agg(
        images=("bin", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
    )
    edges = np.linspace(0, 1, NUM_BINS + 1)
    bins = pd.DataFrame({"lower": edges[:-1], "upper": edges[1:]}).join(by_bin)
    bins["images"] = bins["images"].fillna(0).astype("int64")
    return Calibration(
        temperature=temperature,
        loss=float(scores.loss.mean()),
        brier=float(scores.brier.mean()),
        overconfidence=float((scores.confidence - scores.correct).mean()),
        ece=float(_ece(scores, scores.correct)),
        ece_by_chance=float(
            np.mean([_ece(scores, rng.random(len(frame)) < scores.confidence) for _ in range(NUM_SIMULATIONS)])
        ),
        bins=bins,
    )


def _ece(scores: "PerImageScores", correct: np.ndarray) -> float:
    """Compute the calibration error for a mask of correct images, (N,)."""
    return np.abs(np.bincount(scores.bin, scores.confidence - correct, NUM_BINS)).sum() / len(correct)


@dataclass(frozen=True)
class PerImageScores:
    """The scores of N images.

    Attributes:
        correct: 1 where the most probable class is the true one, else 0; float64 (N,). The first class wins among
            equals.
        confidence: Probability of the most probable class, float64 (N,).
        true_probability: Probability of the true class, float64 (N,).
        loss: Negative log-likelihood in nats, float64 (N,).
        brier: Squared distance between probabilities and truth, float64 (N,).
        bin: Bin of the confidence in [0, NUM_BINS), int64 (N,).
    """

    correct: np.ndarray
    confidence: np.ndarray
    true_probability: np.ndarray
    loss: np.ndarray
    brier: np.ndarray
    bin: np.ndarray

    @classmethod
    def from_predictions(cls, predictions: Predictions, temperature: float = 1.0) -> "PerImageScores":
        """Compute the scores at a temperature."""
        task, labels, logits = predictions.task, predictions.labels, predictions.logits
        probabilities = predictions.probabilities(temperature)
        true = probabilities[np.arange(len(labels)), labels]
        confidence = probabilities.max(axis=1)
        return cls(
            correct=(predictions.decisions == labels).astype(np.float64),
            confidence=confidence,
            true_probability=true,
            loss=task.negative_log_likelihood(labels, logits, temperature),
            brier=(probabilities**2).sum(axis=1) - 2 * true + 1,
            bin=np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1),
        )


def fit_temperature(predictions: Predictions) -> float | None:
    """Fit the divisor of the logits that maximizes the likelihood of the labels (temperature scaling).

    arXiv 1706.04599.

    Args:
        predictions: Of the validation split, not of the split whose probabilities are to be corrected.

    Returns:
        The temperature, or None where the images do not determine one: all of them are classified correctly, so that
        ever greater confidence would fit ever better, or the fit ends at a bound.
    """
    scores = PerImageScores.from_predictions(predictions)
    if scores.correct.all():
        return None

    def loss(log_t: float) -> float:
        losses = predictions.task.negative_log_likelihood(predictions.labels, predictions.logits, np.exp(log_t))
        return float(losses.mean())

    bounds = np.log(TEMPERATURE_BOUNDS)
    log_temperature = float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)
    return float(np.exp(log_temperature)) if bounds[0] + 1e-3 < log_temperature < bounds[1] - 1e-3 else None
