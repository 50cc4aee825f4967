"""The files, figures and tables of an evaluation."""

import io
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from pipeline.evaluation.metrics import Evaluation, Predictions, evaluate_predictions
from pipeline.evaluation.report import confusion_figure, table, write_evaluation, write_training_curves


def made(n: int, k: int) -> tuple[Predictions, Evaluation]:
    rng = np.random.default_rng(k)
    labels = rng.integers(0, k, n).astype(np.int32)
    logits = rng.normal(0, 1, (n, k)).astype(np.float32)
    logits[np.arange(n), labels] += 3
    predictions = Predictions(np.arange(0, 2 * n, 2), labels, logits)
    return predictions, evaluate_predictions(predictions, [f"class, {i}" for i in range(k)], "test")


def shown(evaluation: Evaluation) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(evaluation))
    return console.export_text()


def test_every_file_says_what_the_evaluation_says(tmp_path: Path) -> None:
    predictions, evaluation = made(50, 7)
    directory = tmp_path / "evaluation" / "test"
    for _ in range(2):  # the second time over the first
        write_evaluation(evaluation, predictions, [f"{i}.jpg" for i in range(100)], directory)
    names = ["confusion_matrix.csv", "confusion_matrix.png", "metrics.json", "per_class.csv", "predictions.parquet"]
    assert sorted(path.name for path in directory.iterdir()) == names
    figures = json.loads((directory / "metrics.json").read_text())
    assert figures["split"] == "test"
    assert figures["num_images"] == 50
    for key, value in evaluation.headline().items():
        assert figures[key.removeprefix("test/")] == value
    confusion = pd.read_csv(directory / "confusion_matrix.csv", index_col=0)
    assert list(confusion.columns) == list(confusion.index) == [f"class, {i}" for i in range(7)]
    np.testing.assert_array_equal(confusion.to_numpy(), evaluation.confusion)
    pd.testing.assert_frame_equal(pd.read_csv(directory / "per_class.csv"), evaluation.per_class, check_dtype=False)


def test_prediction_rows_carry_key_and_top_five(tmp_path: Path) -> None:
    predictions, evaluation = made(50, 7)
    write_evaluation(evaluation, predictions, [f"{i}.jpg" for i in range(100)], tmp_path)
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert rows["index"].tolist() == predictions.index.tolist()
    assert rows["key"].tolist() == [f"{i}.jpg" for i in predictions.index]
    assert (rows["true_class"] == rows["predicted_class"]).mean() == pytest.approx(evaluation.top1)
    row, logits = rows.iloc[3], predictions.logits[3].astype(np.float64)
    order = np.argsort(-logits)[:5]
    assert list(row["top5_classes"]) == [f"class, {i}" for i in order]
    np.testing.assert_allclose(row["top5_probabilities"], np.exp(logits[order]) / np.exp(logits).sum())
    assert row["predicted_class"] == row["top5_classes"][0]
    assert row["probability"] == row["top5_probabilities"][0]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    predictions, evaluation = made(50, 7)
    keys = [f"{i}.jpg" for i in range(100)]
    write_evaluation(evaluation, predictions, keys, tmp_path)
    before = (tmp_path / "predictions.parquet").read_bytes()
    with pytest.raises(IndexError):
        write_evaluation(evaluation, predictions, keys[:3], tmp_path)
    assert (tmp_path / "predictions.parquet").read_bytes() == before
    assert not list(tmp_path.glob(".new-*"))


@pytest.mark.parametrize(("k", "counts", "names"), [(10, True, True), (37, False, True), (300, False, False)])
def test_confusion_figure_shows_counts_and_names_where_they_fit(k: int, counts: bool, names: bool) -> None:
    _, evaluation = made(200, k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = confusion_figure(evaluation)
        figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ([str(n) for n in evaluation.confusion[evaluation.confusion > 0]] if counts else [])
    assert ("class, 0" in [label.get_text() for label in axes.get_yticklabels()]) == names
    assert axes.get_xlabel().startswith("predicted class")
    assert axes.get_ylabel().startswith("true class")


def test_training_curves_are_drawn_with_and_without_validation(tmp_path: Path) -> None:
    bare = [{"epoch": i, "step": 9 * i, "learning_rate": 0.1 / i, "train/loss": 1 / i, "train/accuracy": 1 - 1 / i} for i in range(1, 40)]
    full = [record | {"val/loss": 2.0, "val/accuracy": 0.5, "val/top5_accuracy": 0.9} for record in bare]
    sizes = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for history in (bare, full, full[:1]):
            write_training_curves(history, tmp_path / "training_curves.png")
            with Image.open(tmp_path / "training_curves.png") as picture:
                picture.load()
                sizes.append(picture.size)
    assert sizes == [(1800, 570)] * 3


def test_screen_shows_every_class_when_they_are_few() -> None:
    _, evaluation = made(60, 12)
    text = shown(evaluation)
    assert f"accuracy {evaluation.top1:.2%}" in text
    assert all(f"class, {i} " in text for i in range(12))


def test_screen_shows_the_five_worst_of_many_classes() -> None:
    _, evaluation = made(400, 60)
    text = shown(evaluation)
    worst = evaluation.per_class.sort_values("f1").head(5)["class"]
    assert text.count("class, ") == 5
    assert all(f"{name} " in text for name in worst)


def test_screen_marks_undefined_figures_with_a_dash() -> None:
    evaluation = evaluate_predictions(
        Predictions(np.arange(1), np.zeros(1, np.int32), np.eye(3, dtype=np.float32)[:1]), ["a", "b", "c"], "val"
    )
    lines = shown(evaluation).splitlines()
    assert next(line for line in lines if " b " in line).split() == ["b", "-", "-", "-", "0"]
