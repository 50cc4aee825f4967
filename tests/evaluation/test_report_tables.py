"""The files, figures and tables of an evaluation."""

import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from pipeline.data.manifest import Manifest
from pipeline.evaluation import statistics
from pipeline.evaluation.batch_norm import BatchNormGap
from pipeline.evaluation.calibration import measure_calibration
from pipeline.evaluation.metrics import evaluate_predictions
from pipeline.evaluation.predictor import Predictions
from pipeline.evaluation.report.figures import batch_figure, confusion_figure, reliability_figure, training_figure
from pipeline.evaluation.report.tables import metrics_table, save_figure, write_results
from pipeline.evaluation.results import EvaluationResults, summarize_with_intervals
from pipeline.evaluation.robustness import KINDS, SEVERITIES, corruption_table

FILES = [
    *(
        "confusion_matrix.csv",
        "confusion_matrix.png",
        "label_errors.csv",
        "metrics.json",
        "per_class.csv",
        "predictions.parquet",
    ),
    *("reliability.csv", "reliability.png"),
]


@pytest.fixture(autouse=True, scope="module")
def few_resamples() -> Iterator[None]:
    """Draw few resamples: the tests are about where the intervals are shown."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "INTERVAL_RESAMPLES", 100)
        yield


@cache
def made(n: int, k: int, *, temperature: float | None = None) -> EvaluationResults:
    rng = np.random.default_rng(k)
    labels = rng.integers(0, k, n).astype(np.int32)
    logits = rng.normal(0, 1, (n, k)).astype(np.float32)
    logits[np.arange(n), labels] += 3
    predictions = Predictions(np.arange(0, 2 * n, 2), labels, logits)
    evaluation = evaluate_predictions(predictions, [f"class, {i}" for i in range(k)], "test")
    table = pd.DataFrame({"key": [f"{i}.jpg" for i in range(2 * n)], "group": range(2 * n)})
    return summarize_with_intervals(predictions, evaluation, Manifest((), table), temperature)


def shown(results: EvaluationResults) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(metrics_table(results))
    return console.export_text()


def test_every_file_says_what_the_evaluation_says(tmp_path: Path) -> None:
    results = made(50, 7, temperature=2.0)
    directory, evaluation = tmp_path / "evaluation" / "test", results.evaluation
    for _ in range(2):  # the second time over the first
        write_results(results, directory)
    assert sorted(path.name for path in directory.iterdir()) == FILES
    figures = json.loads((directory / "metrics.json").read_text())
    assert figures["split"] == "test"
    assert figures["num_images"] == 50
    for key, value in {**evaluation.scalar_metrics(), "brier": results.raw.brier}.items():
        assert figures[key.removeprefix("test/")] == value
    low, high = figures["intervals"]["accuracy"]
    assert low < evaluation.accuracy < high
    scaled = measure_calibration(results.predictions, 2.0)
    assert figures["calibration"]["ece"] == results.raw.ece
    assert figures["temperature_scaled"] == {
        "temperature": 2.0,
        **{name: getattr(scaled, name) for name in ("loss", "brier", "overconfidence", "ece", "ece_by_chance")},
    }
    assert (figures["batch_norm"], figures["corruption_accuracy"]) == (None, None)
    confusion = pd.read_csv(directory / "confusion_matrix.csv", index_col=0)
    assert list(confusion.columns) == list(confusion.index) == [f"class, {i}" for i in range(7)]
    np.testing.assert_array_equal(confusion.to_numpy(), evaluation.confusion)
    pd.testing.assert_frame_equal(pd.read_csv(directory / "per_class.csv"), evaluation.per_class, check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_csv(directory / "reliability.csv"), results.raw.bins)
    assert len(pd.read_csv(directory / "label_errors.csv")) == len(results.label_errors)


def test_what_is_measured_besides_has_files_figures_and_sentences(tmp_path: Path) -> None:
    accuracies = {(kind, severity): 0.9 - 0.1 * severity for kind in KINDS for severity in SEVERITIES}
    results = replace(made(50, 7), batch_norm=BatchNormGap(0.9, 0.95), corruptions=corruption_table(accuracies))
    write_results(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "corruptions.csv", "corruptions.png"])
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["batch_norm"] == {"moving": 0.9, "batch": 0.95}
    assert figures["corruption_accuracy"] == pytest.approx(0.6)
    assert results.scalar_metrics()["test/batch_norm_gap"] == pytest.approx(0.05)
    assert results.scalar_metrics()["test/corruption_accuracy"] == pytest.approx(0.6)
    text = shown(results)
    assert "accuracy 90.00% with the moving statistics, 95.00% with the statistics of each batch" in text
    assert "The accuracy on corrupted images (eight kinds, five severities) is 60.00%" in text


def test_prediction_rows_carry_key_and_top_five(tmp_path: Path) -> None:
    results = made(50, 7)
    predictions = results.predictions
    write_results(results, tmp_path)
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert rows["index"].tolist() == predictions.index.tolist()
    assert rows["key"].tolist() == [f"{i}.jpg" for i in predictions.index]
    assert (rows["true_class"] == rows["predicted_class"]).mean() == pytest.approx(results.evaluation.accuracy)
    assert -np.log(rows["true_probability"]).mean() == pytest.approx(results.evaluation.metrics["loss"])
    row, logits = rows.iloc[3], predictions.logits[3].astype(np.float64)
    order = np.argsort(-logits)[:5]
    assert list(row["top5_classes"]) == [f"class, {i}" for i in order]
    np.testing.assert_allclose(row["top5_probabilities"], np.exp(logits[order]) / np.exp(logits).sum())
    assert row["predicted_class"] == row["top5_classes"][0]
    assert row["probability"] == row["top5_probabilities"][0]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    results = made(50, 7)
    write_results(results, tmp_path)
    before = (tmp_path / "predictions.parquet").read_bytes()
    with pytest.raises(IndexError):
        write_results(replace(results, keys=results.keys[:3]), tmp_path)
    assert (tmp_path / "predictions.parquet").read_bytes() == before
    assert not list(tmp_path.glob(".new-*"))


@pytest.mark.parametrize(("k", "counts", "names"), [(10, True, True), (37, False, True), (300, False, False)])
def test_confusion_figure_shows_counts_and_names_where_they_fit(k: int, counts: bool, names: bool) -> None:
    evaluation = made(200, k).evaluation
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = confusion_figure(evaluation)
        figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == (
        [str(n) for n in evaluation.confusion[evaluation.confusion > 0]] if counts else []
    )
    assert ("class, 0" in [label.get_text() for label in axes.get_yticklabels()]) == names
    assert axes.get_xlabel().startswith("predicted class")
    assert axes.get_ylabel().startswith("true class")


def test_training_curves_are_drawn_with_and_without_validation(tmp_path: Path) -> None:
    bare = [
        {"epoch": i, "step": 9 * i, "learning_rate": 0.1 / i, "train/loss": 1 / i, "train/accuracy": 1 - 1 / i}
        for i in range(1, 40)
    ]
    full = [record | {"val/loss": 2.0, "val/accuracy": 0.5, "val/top5_accuracy": 0.9} for record in bare]
    sizes = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for history in (bare, full, full[:1]):
            save_figure(training_figure(history), tmp_path / "training_curves.png")
            with Image.open(tmp_path / "training_curves.png") as image:
                image.load()
                sizes.append(image.size)
    assert len(set(sizes)) == 1


def test_reliability_and_batch_figures_are_drawn_without_complaint() -> None:
    results = made(200, 4, temperature=0.5)
    rng = np.random.default_rng(0)
    labels = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 5)]
    labels[1] = (0.3, 0, 0.7, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = reliability_figure({"raw": results.raw, "scaled": measure_calibration(results.predictions, 0.5)})
        figure.draw_without_rendering()
        fed = batch_figure(rng.integers(0, 256, (5, 8, 8, 3), np.uint8), labels, ["$a", "b", "c$", "d"])
        fed.draw_without_rendering()
    assert [axes.get_ylabel() for axes in figure.axes] == ["proportion of correct images"] * 2 + ["images"] * 2
    assert len(fed.axes) == 5
    assert fed.axes[1].get_title() == "30% $a\n70% c$"


def test_console_shows_every_class_and_figure_with_its_interval_when_they_are_few() -> None:
    results = made(60, 12)
    text = shown(results)
    assert f"accuracy {results.evaluation.accuracy:.2%}" in text
    low, high = results.intervals["balanced_accuracy"]
    line = next(line for line in text.splitlines() if line.startswith("balanced accuracy"))
    assert line.split()[2:] == [
        f"{results.evaluation.metrics['balanced_accuracy']:.2%}",
        f"{low:.2%}",
        "to",
        f"{high:.2%}",
    ]
    assert all(f"class, {i} " in text for i in range(12))


def test_console_shows_the_five_worst_of_many_classes() -> None:
    results = made(400, 60)
    text = shown(results)
    worst = results.evaluation.per_class.sort_values("f1").head(5)["class"]
    assert text.count("class, ") == 5
    assert all(f"{name} " in text for name in worst)


def test_console_marks_undefined_figures_with_a_dash() -> None:
    predictions = Predictions(np.arange(1), np.zeros(1, np.int32), np.eye(3, dtype=np.float32)[:1])
    evaluation = evaluate_predictions(predictions, ["a", "b", "c"], "val")
    manifest = Manifest((), pd.DataFrame({"key": ["x.jpg"], "group": [0]}))
    results = summarize_with_intervals(predictions, evaluation, manifest, None)
    lines = shown(results).splitlines()
    assert next(line for line in lines if line.startswith("b ")).split() == ["b", "-", "-", "-", "0"]
