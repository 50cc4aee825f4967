"""The labeling of images by the command predict and by evaluate.py: what they refuse, and what they write."""

import csv
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import keras
import pytest
from launching import LauncherProcess
from PIL import Image

from pipeline.cli import evaluate, predict
from pipeline.console import Console

PROJECT = Path(__file__).parents[2]
LITE0 = ("--weights", "imagenet", "--variant", "lite0")


LABELING = [
    ([*LITE0, "x.jpg"], "x.jpg: there is no such file"),
    ([*LITE0, "photos/*.gif"], "photos/*.gif: no file matches"),
    ([*LITE0, "empty"], "empty: the folder contains no image"),
    ([*LITE0, "photos", "--top", "0"], "argument --top: '0' is not an integer above 0"),
    ([*LITE0, "photos", "--format", "xml"], "invalid choice: 'xml'"),
    ([*LITE0, "photos", "--out", "figures"], "a new file that ends in .csv or .jsonl. Received: figures"),
    ([*LITE0, "photos", "--out", "x.csv", "--format", "csv"], "--format belongs to standard output"),
    ([*LITE0, "photos", "--out", "none/x.csv"], "there is no folder none; create it first"),
    ([*LITE0, "photos", "--out", "old.csv"], "old.csv: exists already"),
    (["--weights", "imagenet", "photos"], "--weights needs --variant"),
    (["--run", "latest", "--variant", "b0", "photos"], "--variant and --weights-from belong to --weights"),
    (["--run", "photos", "photos"], "photos: is not the directory of a run"),
    (["photos"], "one of the arguments --run --weights is required"),
]
EVALUATE_ONLY = [
    (
        [*LITE0, "photos", "--data", "photos"],
        "--split, --data, --class-map, --tta and --corruptions are for evaluation",
    ),
    ([*LITE0, "--data", "photos", "--format", "csv"], "--format and --top are for labeling"),
    (["--run", "latest", "--out", "x.csv"], "--out belongs to --data or to images"),
    (["--run", "latest", "--tta", "flip", "--corruptions"], "use one of them"),
    (
        ["--run", "latest", "--tta", "flip", "photos"],
        "--tta and --corruptions are for evaluation; omit them to label images",
    ),
    ([*LITE0], "--weights needs images to label, or labeled images: --data"),
    (["--run", "latest", "--views", "flip"], "unrecognized arguments: --views"),
]
PREDICT_ONLY = [
    ([*LITE0], "the following arguments are required: IMAGE"),
    ([*LITE0, "photos", "--corruptions"], "unrecognized arguments: --corruptions"),
]
EVALUATE, PREDICT = ("evaluate.py",), ("-m", "pipeline", "predict")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image, a folder without one, and labels of an earlier command."""
    for name in ("photos/a.png", "empty/readme.txt", "old.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("what was there")
    return tmp_path


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        *((EVALUATE, *case) for case in [*LABELING, *EVALUATE_ONLY]),
        *((PREDICT, *case) for case in [*LABELING, *PREDICT_ONLY]),
    ],
)
def test_a_wrong_request_is_refused_at_once(
    folder: Path, light_launcher: LauncherProcess, program: tuple[str, ...], arguments: list[str], message: str
) -> None:
    result = light_launcher.run(folder, *program, *arguments)
    assert result.seconds < 2, "of processor time, with the libraries if they were loaded"
    assert result.code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert (folder / "old.csv").read_text() == "what was there"


@pytest.mark.parametrize("program", [(str(PROJECT / "evaluate.py"),), PREDICT])
def test_a_new_process_refuses_at_once_too(folder: Path, program: tuple[str, ...]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, *program, *LITE0, "photos", "--out", "old.csv"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2, "seconds of processor time"
    assert result.returncode == 2
    assert "old.csv: exists already" in result.stderr
    assert "Traceback" not in result.stderr
    assert (folder / "old.csv").read_text() == "what was there"


@pytest.fixture(scope="module")
def network() -> Any:
    """Its logits are a tenth of the image's mean red, green and blue."""
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(0.1)(inputs)))
    config = SimpleNamespace(
        task="single_label",
        variant=SimpleNamespace(resolution=32),
        data=SimpleNamespace(resize="crop", background="white"),
    )
    return SimpleNamespace(model=model, class_lists=(("r", "g", "b"), ("red", "green, dark", "blue")), config=config)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """A red image, one that is none, a blue image."""
    paths = [tmp_path / name for name in ('r"ö,.png', "none.png", "blue.png")]
    Image.new("RGB", (40, 30), (250, 10, 0)).save(paths[0])
    paths[1].write_text("no image")
    Image.new("RGB", (40, 30), (0, 10, 250)).save(paths[2])
    return paths


def label(network: Any, paths: list[Path], **options: Any) -> int:
    return predict.predict_images(network, paths, Console(), **options)


def test_csv_has_a_row_for_every_image(network: Any, images: list[Path]) -> None:
    output = io.StringIO()
    assert label(network, images, file=output, format="csv", k=2) == 1
    [red, none, blue] = csv.DictReader(io.StringIO(output.getvalue()))
    assert list(red) == ["path", "error", "class1", "probability1", "class2", "probability2"]
    assert [row["path"] for row in (red, none, blue)] == list(map(str, images))
    assert (red["class1"], red["class2"], blue["class1"], blue["class2"]) == (
        "r red",
        "g green, dark",
        "b blue",
        "g green, dark",
    )
    assert float(red["probability1"]) == pytest.approx(1)
    assert none["error"] == "is not an image, or its format is not supported"
    assert (red["error"], none["class1"], none["probability2"]) == ("", "", "")


def test_json_lines_have_an_object_for_every_image(network: Any, images: list[Path]) -> None:
    output = io.StringIO()
    assert label(network, images, file=output, format="jsonl") == 1
    [red, none, _] = map(json.loads, output.getvalue().splitlines())
    assert list(red) == ["path", "top", "error"]
    assert [entry["class"] for entry in red["top"]] == ["r red", "g green, dark", "b blue"]
    assert sum(entry["probability"] for entry in red["top"]) == pytest.approx(1, abs=1e-5)
    assert red["error"] is None
    assert none == {
        "path": str(images[1]),
        "top": [],
        "error": "is not an image, or its format is not supported",
    }


def test_rows_go_into_a_new_file_and_messages_to_the_console(
    network: Any, images: list[Path], tmp_path: Path, capfd: Any
) -> None:
    images.append(tmp_path / os.fsdecode(b"\xff.png"))
    assert label(network, images, format="jsonl", file=tmp_path / "labels.jsonl") == 1
    output = capfd.readouterr()
    assert output.out == "2 images labeled, 2 could not be read\n"
    assert [line.partition(": ")[2] for line in output.err.splitlines()] == [
        "is not an image, or its format is not supported",
        "cannot be opened: No such file or directory",
    ]
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == list(map(str, images)), "also the name that is not UTF-8"


def test_the_console_shows_a_table_for_every_image(network: Any, images: list[Path], capfd: Any) -> None:
    assert label(network, images[::2]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert re.findall(r"100\.0% .* (\w red|b blue)", output.out) == ["r red", "b blue"]
    assert output.out.endswith("2 images labeled\n")


def test_an_output_that_nobody_reads_any_more_ends_it_quietly(network: Any, images: list[Path], capfd: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    output = os.fdopen(writer, "w")
    assert label(network, images, file=output, format="csv") == 141
    with pytest.raises(BrokenPipeError):  # its last row is still in it
        output.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("command", [evaluate, predict])
def test_both_commands_label_images_with_a_loaded_model(
    network: Any, images: list[Path], command: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(predict, "load_model", lambda arguments, console: network)
    arguments = ["--run", "latest", *map(str, images[::2]), "--format", "jsonl", "--top", "1"]
    assert command.main(Console(), arguments) == 0
    shown = capfd.readouterr()
    assert [json.loads(line)["top"][0]["class"] for line in shown.out.splitlines()] == ["r red", "b blue"]
    assert shown.err == "2 images labeled\n", "standard output holds the rows alone"
