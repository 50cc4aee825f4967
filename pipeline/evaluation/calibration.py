"""Whether a network's probabilities may be believed: reliability, expected calibration error, and the temperature that mends them."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from pipeline.evaluation.metrics import Predictions

BINS = 15  # of equal width; arXiv 1706.04599
NUM_SIMULATIONS = 200  # simulations of a network whose confidences are true
TEMPERATURES = (0.05, 20.0)  # what a fitted one is looked for between


@dataclass(frozen=True)
class Calibration:
    """How well the probabilities of a split agree with what happened.

    Attributes:
        temperature: What the logits were divided by; 1 leaves them as they are.
        loss: Mean negative log-likelihood of the true class, in nats.
        brier: Mean over the images of the squared distance between probabilities and truth, summed over the classes: 0 to 2
            (Brier 1950).
        overconfidence: Mean confidence less accuracy, in [-1, 1].
        ece: Expected calibration error, in [0, 1]: how far confidence and accuracy lie apart in a bin of equal confidence, weighted by
            the bins' images (Naeini et al. 2015).
        ece_by_chance: What it would be on the mean for as many images if every confidence were true; an `ece` near it is no reason to
            doubt them (Vaicenavicius et al. 2019, arXiv 1902.06977).
        bins: A row per bin of confidence: lower, upper (its bounds), images, confidence (mean), accuracy; NaN where there are none.
    """

    temperature: float
    loss: float
    brier: float
    overconfidence: float
    ece: float
    ece_by_chance: float
    bins: pd.DataFrame


def calibration(predictions: Predictions, temperature: float = 1.0) -> Calibration:
    """Measures the probabilities softmax(logits / temperature).

    Args:
        predictions: Of at least one image, all finite.
        temperature: Above 0.
    """
    scores, rng = PerImageScores.of(predictions, temperature), np.random.default_rng(0)
    frame = pd.DataFrame({"bin": scores.bin, "confidence": scores.confidence, "accuracy": scores.correct})
    by_bin = frame.groupby("bin").agg(
        images=("bin", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
    )
    edges = np.linspace(0, 1, BINS + 1)
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
    """The calibration error if these images, bool (N,), were the right ones."""
    return np.abs(np.bincount(scores.bin, scores.confidence - correct, BINS)).sum() / len(correct)


@dataclass(frozen=True)
class PerImageScores:
    """What each of N images adds to the figures.

    Attributes:
        correct: Whether the most probable class is the true one, float64 (N,) of 0 and 1; the first class wins among equals.
        confidence: Probability of the most probable class, float64 (N,).
        true_probability: Of the true class, float64 (N,).
        loss: Negative log-likelihood in nats, float64 (N,).
        brier: Squared distance from the truth, float64 (N,).
        bin: Bin of the confidence in [0, BINS), int64 (N,).
    """

    correct: np.ndarray
    confidence: np.ndarray
    true_probability: np.ndarray
    loss: np.ndarray
    brier: np.ndarray
    bin: np.ndarray

    @classmethod
    def of(cls, predictions: Predictions, temperature: float = 1.0) -> "PerImageScores":
        """Counts them, at a temperature."""
        rows, labels = np.arange(len(predictions.labels)), predictions.labels
        logits = predictions.logits.astype(np.float64) / temperature
        probabilities = softmax(logits, axis=1)
        true = probabilities[rows, labels]
        confidence = probabilities.max(axis=1)
        return cls(
            correct=(predictions.logits.argmax(axis=1) == labels).astype(np.float64),
            confidence=confidence,
            true_probability=true,
            loss=-log_softmax(logits, axis=1)[rows, labels],
            brier=(probabilities**2).sum(axis=1) - 2 * true + 1,
            bin=np.minimum((confidence * BINS).astype(np.int64), BINS - 1),
        )


def fit_temperature(predictions: Predictions) -> float | None:
    """Finds what the logits must be divided by for the greatest likelihood of the labels (temperature scaling, arXiv 1706.04599).

    Args:
        predictions: Of a split that the figures to be mended are not of: the validation split.

    Returns:
        The temperature, or None where the images do not settle one: all of them are right, so that ever greater confidence would fit ever
        better, or the fit ends at a bound.
    """
    scores = PerImageScores.of(predictions)
    if scores.correct.all():
        return None
    rows, labels, logits = np.arange(len(predictions.labels)), predictions.labels, predictions.logits.astype(np.float64)

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[rows, labels].mean())

    bounds = np.log(TEMPERATURES)
    found = float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)
    return float(np.exp(found)) if bounds[0] + 1e-3 < found < bounds[1] - 1e-3 else None
