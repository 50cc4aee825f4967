"""Bootstrap intervals of the metrics, and the comparison of two runs by them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import matthews_corrcoef

from pipeline.evaluation import statistics
from pipeline.evaluation.calibration import measure_calibration
from pipeline.evaluation.metrics import METRICS, evaluate_predictions
from pipeline.evaluation.predictor import Predictions
from pipeline.evaluation.statistics import BootstrapMetrics, bootstrap_intervals, compare_class_metrics

CLASSES = 5


def simulated(rng: np.random.Generator, images: int, *, sharpness: float = 1.0) -> Predictions:
    """Simulated images: classes of unequal frequency, logits that favor the true one, at times too confidently."""
    labels = rng.choice(CLASSES, images, p=[0.35, 0.25, 0.2, 0.12, 0.08]).astype(np.int32)
    logits = rng.normal(0, 1.3, (images, CLASSES))
    logits[np.arange(images), labels] += 2.5
    return Predictions(np.arange(images), labels, (sharpness * logits).astype(np.float32))


def test_with_every_image_once_the_metrics_are_those_of_the_evaluation():
    predictions = simulated(np.random.default_rng(0), 200)
    evaluation, calibrated = evaluate_predictions(predictions, list("abcde"), "test"), measure_calibration(predictions)
    values = BootstrapMetrics(predictions)(np.ones((1, 200)))[0]
    np.testing.assert_allclose(values, [evaluation.metrics[name] for name in METRICS], rtol=1e-12)
    by_name = dict(zip(METRICS, values, strict=True))
    for name in ("loss", "brier", "overconfidence"):
        assert by_name[name] == pytest.approx(getattr(calibrated, name))


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


@pytest.mark.parametrize(
    ("samples", "resamples", "off"),
    [(200, 300, 0.045), pytest.param(1000, 600, 0.02, marks=pytest.mark.slow)],  # three standard errors
    ids=["some", "many"],
)
@pytest.mark.parametrize("sharpness", [0.7, 1.5], ids=["underconfident", "overconfident"])
def test_they_hold_what_they_promise(sharpness, samples, resamples, off, monkeypatch):
    """Of 95 % intervals of many samples, 95 % contain the figure of the world that the samples are from."""
    monkeypatch.setattr(statistics, "INTERVAL_RESAMPLES", resamples)  # for the test's time
    rng, world = np.random.default_rng(3), 1000 * samples
    [truth] = BootstrapMetrics(simulated(rng, world, sharpness=sharpness))(np.ones((1, world)))
    inside = np.zeros(len(truth))
    for seed in range(samples):
        found = bootstrap_intervals(simulated(rng, 250, sharpness=sharpness), seed=seed)
        inside += [
            interval.low <= value <= interval.high for interval, value in zip(found.values(), truth, strict=True)
        ]
    coverage = dict(zip(METRICS, inside / samples, strict=True))
    coverage.pop("top5_accuracy")  # of five classes it is always 1
    assert all(0.95 - off <= share <= 0.95 + off for share in coverage.values()), coverage


def test_near_duplicates_are_no_evidence_of_their_own():
    predictions = simulated(np.random.default_rng(4), 150)
    rows = np.repeat(np.arange(150), 4)
    copied = Predictions(np.arange(600), predictions.labels[rows], predictions.logits[rows])
    single, together, apart = (
        bootstrap_intervals(predictions),
        bootstrap_intervals(copied, groups=rows),
        bootstrap_intervals(copied),
    )
    widths = [np.subtract(*each["accuracy"][::-1]) for each in (single, together, apart)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[2] == pytest.approx(widths[0] / 2, rel=0.1)


def certain(labels: list[int], classes: int) -> Predictions:
    """Images that are all classified as what they are."""
    truth = np.array(labels, np.int32)
    return Predictions(np.arange(len(truth)), truth, 20 * np.eye(classes, dtype=np.float32)[truth])


def test_a_split_without_an_error_does_not_prove_that_there_are_none():
    found = bootstrap_intervals(certain([0, 1, 2] * 20, 3))
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert found[name] == (pytest.approx(0.025 ** (1 / 60)), 1), "Clopper and Pearson's bound"
    assert "matthews_corrcoef" not in found, "nothing is known of what does not vary"


def test_a_class_of_few_images_says_little_of_a_mean_over_classes():
    found = bootstrap_intervals(certain([0] * 38 + [1] * 2, 2))
    assert found["accuracy"].low == pytest.approx(0.025 ** (1 / 40))
    trials = 4 / (1 / 38 + 1 / 2)
    assert found["balanced_accuracy"].low == found["macro_f1"].low == pytest.approx(0.025 ** (1 / trials))
    copies = bootstrap_intervals(certain([0] * 38 + [1] * 2, 2), groups=np.repeat(np.arange(10), 4))
    assert copies["accuracy"].low == pytest.approx(0.025 ** (1 / 10)), "near-duplicates are one image"


@given(
    seed=st.integers(0, 99),
    images=st.integers(1, 60),
    classes=st.integers(1, 60),
    shift=st.sampled_from([0.0, 2.0, 9.0]),
)
@settings(max_examples=40, deadline=None)
def test_an_interval_holds_its_value_and_lies_in_the_metrics_bounds(seed, images, classes, shift):
    """However few the images of a class are: none, one, all."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images).astype(np.int32)
    logits = rng.normal(0, 1, (images, classes))
    logits[np.arange(images), labels] += shift
    predictions = Predictions(np.arange(images), labels, logits.astype(np.float32))
    values = evaluate_predictions(predictions, [str(i) for i in range(classes)], "test").metrics
    for name, (low, high) in bootstrap_intervals(predictions).items():
        least, greatest = METRICS[name].bounds
        assert least <= low <= values[name] + 1e-12
        assert values[name] - 1e-12 <= high <= greatest
        assert low < high, name


def test_the_macro_f1_of_classes_of_one_image_lies_inside_its_interval():
    labels = np.arange(1000, dtype=np.int32)
    predicted = np.where(np.random.default_rng(7).random(1000) < 0.9, labels, (labels + 1) % 1000)
    predictions = Predictions(labels, labels, 9 * np.eye(1000, dtype=np.float32)[predicted])
    value = evaluate_predictions(predictions, [str(i) for i in labels], "test").metrics["macro_f1"]
    low, high = bootstrap_intervals(predictions)["macro_f1"]
    assert 0.01 < value - low < 0.05
    assert 0.01 < high - value < 0.05


def test_equal_seeds_give_equal_intervals():
    predictions = simulated(np.random.default_rng(5), 100)
    assert (
        bootstrap_intervals(predictions, seed=1)
        == bootstrap_intervals(predictions, seed=1)
        != bootstrap_intervals(predictions, seed=2)
    )


def test_the_difference_of_class_metrics_is_paired_and_draws_whole_groups():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 4, 300)
    a = np.where(rng.random(300) < 0.7, labels, (labels + 1) % 4)
    b = np.where(rng.random(300) < 0.5, labels, a)
    once = compare_class_metrics(labels, a, b, 4, np.arange(300))
    assert list(once) == [name for name, spec in METRICS.items() if spec.from_counts is not None]
    matthews = once["matthews_corrcoef"]
    assert (matthews.a, matthews.b) == pytest.approx((matthews_corrcoef(labels, a), matthews_corrcoef(labels, b)))
    for metric in once.values():
        assert metric.difference.value == metric.b - metric.a
        assert 0 < metric.difference.low < metric.difference.value < metric.difference.high
    copies = compare_class_metrics(np.tile(labels, 3), np.tile(a, 3), np.tile(b, 3), 4, np.tile(np.arange(300), 3))
    assert copies["macro_f1"].difference == pytest.approx(once["macro_f1"].difference)
    same = compare_class_metrics(labels, a, a, 4, np.arange(300))
    assert all(metric.difference == (0, 0, 0) for metric in same.values())
