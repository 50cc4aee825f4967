"""The page of a report, as a browser takes it."""

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.data.manifest import Manifest
from pipeline.evaluation.metrics import evaluate_predictions
from pipeline.evaluation.predictor import Predictions
from pipeline.evaluation.report.figures import confusion_figure
from pipeline.evaluation.report.gallery import MAX_IMAGES, gallery_items, most_confident_correct, worst_errors
from pipeline.evaluation.report.html_report import write_report
from pipeline.evaluation.report.tables import save_figure
from pipeline.evaluation.results import EvaluationResults, summarize_with_intervals
from pipeline.evaluation.robustness import KINDS, SEVERITIES, corruption_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = ["<b>bold</b>", "a & b", "'quoted\""]


@pytest.fixture(scope="module")
def results() -> EvaluationResults:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 80).astype(np.int32)
    logits = rng.normal(0, 1, (80, 3)).astype(np.float32)
    logits[np.arange(80), labels] += 1.5
    predictions = Predictions(np.arange(80), labels, logits)
    keys = [f"<script>alert({i})</script>.jpg" for i in range(80)]
    manifest = Manifest(tuple(NAMES), pd.DataFrame({"key": keys, "group": range(80)}))
    found = summarize_with_intervals(predictions, evaluate_predictions(predictions, NAMES, "test"), manifest, 0.8)
    return replace(
        found, corruptions=corruption_table({(kind, severity): 0.5 for kind in KINDS for severity in SEVERITIES})
    )


def images(indices: np.ndarray) -> np.ndarray:
    """Every image has its index as its color."""
    return np.tile(indices.astype(np.uint8)[:, None, None, None], (1, 16, 16, 3))


def bright(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """In the place of Grad-CAM's maps."""
    del classes
    return np.ones(images.shape[:3], np.float32)


@pytest.fixture(scope="module")
def page(results: EvaluationResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    save_figure(confusion_figure(results.evaluation), folder / "confusion.png")
    galleries = {"Worst errors": gallery_items(results, worst_errors(results), images, bright), "Right ones": []}
    figures = {"Confusion matrix": folder / "confusion.png", "Not there": folder / "none.png"}
    write_report(folder / "report" / "index.html", "runs/<x>", results, figures, galleries, "seed: 1\nname: <y>\n")
    return folder / "report" / "index.html"


def test_the_galleries_are_ranked_and_show_the_images_that_they_name(results):
    loss = -np.log(np.exp(results.predictions.logits) / np.exp(results.predictions.logits).sum(axis=1, keepdims=True))
    wrong = results.predictions.logits.argmax(axis=1) != results.predictions.labels
    own = loss[np.arange(80), results.predictions.labels]
    worst, surest = worst_errors(results), most_confident_correct(results)
    assert worst.tolist() == sorted(np.flatnonzero(wrong), key=lambda row: -own[row])[:MAX_IMAGES]
    assert not wrong[surest].any()
    assert own[surest].max() <= np.sort(own[~wrong])[MAX_IMAGES - 1] + 1e-6
    shown = gallery_items(results, worst, images, bright)
    for card, row in zip(shown, worst, strict=True):
        assert card.title == results.keys[row]
        with Image.open(io.BytesIO(card.images[0])) as thumbnail:
            assert abs(int(np.asarray(thumbnail)[8, 8, 0]) - row) <= 3
        assert NAMES[results.predictions.labels[row]] in card.lines[1]


def test_it_needs_nothing_else_and_escapes_what_people_wrote(page):
    text = page.read_text()
    assert "Confusion matrix" in text
    assert "Not there" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "http:" not in text
    assert "https:" not in re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", text)
    assert "<script" not in text
    assert "<b>bold</b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert text.count("data:image/jpeg") == 2 * MAX_IMAGES
    assert 'name="viewport"' in text
    assert "prefers-color-scheme" in text


def test_it_says_the_figures(page, results):
    text = page.read_text()
    low, high = results.intervals["accuracy"]
    assert f"{results.evaluation.accuracy:.2%}" in text
    assert f"{low:.2%} to {high:.2%}" in text
    assert f"calibration error {results.scaled.ece:.2%}" in text.replace("\n", " ")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_finds_no_error_and_nothing_wider_than_the_screen(page, tmp_path, width):
    """The page is opened in a frame of the screen's width, which tells what it found."""
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"""<!doctype html><iframe id=f src="{page.as_uri()}" style="width:{width}px;height:800px;border:0"></iframe>
        <pre id=out></pre>
        <script>
        const frame = document.getElementById("f");
        frame.onload = () => {{
            const inner = frame.contentDocument;
            const broken = [...inner.images].filter((image) => !image.naturalWidth).length;
            const width = inner.documentElement.scrollWidth;
            const found = {{width: width, images: inner.images.length, broken: broken}};
            document.getElementById("out").textContent = JSON.stringify(found);
        }};
        </script>"""
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    size = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width + 40},900", "--virtual-time-budget=5000"]
    command = [CHROMIUM, *flags, *size, "--dump-dom", outer.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(re.search(r'<pre id="out">(.*?)</pre>', ran.stdout, re.DOTALL).group(1))
    assert found["broken"] == 0
    assert found["images"] == 2 * MAX_IMAGES + 1
    assert found["width"] <= width
    assert "CONSOLE" not in ran.stderr
