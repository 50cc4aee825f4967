"""Bootstrap intervals of the headline figures."""

import numpy as np
import pytest

from pipeline.evaluation import intervals
from pipeline.evaluation.calibration import calibration
from pipeline.evaluation.intervals import BootstrapMetrics, bootstrap
from pipeline.evaluation.metrics import Predictions, evaluate_predictions

CLASSES = 5


def simulated(rng: np.random.Generator, images: int, *, sharpness: float = 1.0) -> Predictions:
    """Images of a made-up world: classes of unequal frequency, logits that favour the true one, at times too confidently."""
    labels = rng.choice(CLASSES, images, p=[0.35, 0.25, 0.2, 0.12, 0.08]).astype(np.int32)
    logits = rng.normal(0, 1.3, (images, CLASSES))
    logits[np.arange(images), labels] += 2.5
    return Predictions(np.arange(images), labels, (sharpness * logits).astype(np.float32))


def test_with_every_image_once_the_figures_are_those_of_the_evaluation():
    predictions = simulated(np.random.default_rng(0), 200)
    evaluation, calibrated = evaluate_predictions(predictions, list("abcde"), "test"), calibration(predictions)
    expected = (
        *(evaluation.top1, evaluation.top5, evaluation.balanced_accuracy, evaluation.macro_f1, evaluation.loss),
        *(calibrated.brier, calibrated.overconfidence),
    )
    np.testing.assert_allclose(BootstrapMetrics(predictions)(np.ones((1, 200)))[0], expected, rtol=1e-6)


def test_weights_count_as_so_many_equal_images():
    predictions = simulated(np.random.default_rng(1), 40)
    weights = np.random.default_rng(2).integers(0, 4, 40)
    rows = np.repeat(np.arange(40), weights)
    repeated = Predictions(np.arange(len(rows)), predictions.labels[rows], predictions.logits[rows])
    np.testing.assert_allclose(
        BootstrapMetrics(predictions)(weights[None].astype(float)),
        BootstrapMetrics(repeated)(np.ones((1, len(rows)))),
        rtol=1e-9,
    )


@pytest.mark.parametrize("sharpness", [0.7, 1.5])  # underconfident, overconfident
def test_they_hold_what_they_promise(sharpness, monkeypatch):
    """Of 95 % intervals of many samples, 93 to 97 % contain the figure of the world that the samples are from."""
    monkeypatch.setattr(intervals, "RESAMPLES", 600)  # for the test's time
    rng = np.random.default_rng(3)
    [truth] = BootstrapMetrics(simulated(rng, 1_000_000, sharpness=sharpness))(np.ones((1, 1_000_000)))
    samples = 1000
    inside = np.zeros(len(truth))
    for seed in range(samples):
        found = bootstrap(simulated(rng, 250, sharpness=sharpness), seed=seed)
        inside += [
            interval.low <= value <= interval.high for interval, value in zip(found.values(), truth, strict=True)
        ]
    coverage = dict(zip(BootstrapMetrics.names, inside / samples, strict=True))
    coverage.pop("top5_accuracy")  # of five classes it is always 1
    assert all(0.93 <= share <= 0.97 for share in coverage.values()), coverage


def test_near_duplicates_are_no_evidence_of_their_own():
    predictions = simulated(np.random.default_rng(4), 150)
    rows = np.repeat(np.arange(150), 4)
    copied = Predictions(np.arange(600), predictions.labels[rows], predictions.logits[rows])
    single, together, apart = bootstrap(predictions), bootstrap(copied, groups=rows), bootstrap(copied)
    widths = [np.subtract(*each["accuracy"][::-1]) for each in (single, together, apart)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[2] == pytest.approx(widths[0] / 2, rel=0.1)


def test_a_split_without_an_error_does_not_prove_that_there_are_none():
    labels = np.arange(60, dtype=np.int32) % 3
    predictions = Predictions(np.arange(60), labels, 20 * np.eye(3, dtype=np.float32)[labels])
    low, high = bootstrap(predictions)["accuracy"]
    assert high == 1
    assert low == pytest.approx(0.025 ** (1 / 60))  # Clopper and Pearson's bound


def test_equal_seeds_give_equal_intervals():
    predictions = simulated(np.random.default_rng(5), 100)
    assert bootstrap(predictions, seed=1) == bootstrap(predictions, seed=1) != bootstrap(predictions, seed=2)
