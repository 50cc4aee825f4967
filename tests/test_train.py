"""train.py and evaluate.py as a user runs them: real processes, real files, real signals."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

PROJECT = Path(__file__).parents[1]
CONFIG = """
model: {variant: {width: 0.25, depth: 0.3, resolution: 32}, weights: null, batch_norm_momentum: 0.9}
data: {source: folder, path: photos, resize: squash}
augment:
  transforms:
    - RandomResizedCrop: {scale: [0.5, 1.0]}
    - HorizontalFlip
  mixup: 0.2
optimizer: {base_lr: 0.5, warmup_epochs: 0.5, ema: 0.9}
train:
  global_batch_size: 8
  stages: [{epochs: 1, trainable: block7}, {epochs: 3}]
runtime: {input_workers: 2}
tracking: {experiment: test}
"""


def start(folder: Path, program: str, *arguments: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, str(PROJECT / program), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(folder: Path, program: str, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, program, *arguments)
    out, err = process.communicate(timeout=250)
    return process.returncode, out, err


def weights(model: Path) -> dict[str, bytes]:
    """Every weight in a .keras file."""
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(model) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        file.visititems(lambda name, item: found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of generated photos in three classes, and a config."""
    root = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    for label, colour in enumerate([(200, 40, 40), (40, 200, 40), (40, 40, 200)]):
        (root / "photos" / f"class {label}").mkdir(parents=True)
        for number in range(24):
            noise = rng.integers(0, 56, (36 + number % 3, 40, 3))
            pattern = 40 * rng.integers(0, 2, (5, 5, 3)).repeat(8, 0).repeat(8, 1)[: noise.shape[0], :40]
            Image.fromarray((np.array(colour) // 2 + noise + pattern).astype(np.uint8)).save(
                root / "photos" / f"class {label}" / f"{number}.png"
            )
    (root / "config.yaml").write_text(CONFIG)
    return root


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str, str]:
    """A run from beginning to end: its directory and what the screen showed."""
    code, out, err = run(folder, "train.py", "--config", "config.yaml", "--run-dir", "whole")
    assert code == 0, out + err
    return folder / "whole", out, err


def test_a_run_leaves_everything_that_it_is(finished):
    directory, _, _ = finished
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file() and "checkpoints" not in path.parts}
    assert names == {
        *("config.yaml", "manifest.parquet", "classes.txt", "model.keras", "best/model.keras", "log.txt", "mlflow.json"),
        "report/training_curves.png",
        *(f"evaluation/test/{name}" for name in ("metrics.json", "per_class.csv", "confusion_matrix.csv", "confusion_matrix.png")),
        "evaluation/test/predictions.parquet",
    }
    assert (directory / "classes.txt").read_text().splitlines() == ["class 0", "class 1", "class 2"]
    splits = pd.read_parquet(directory / "manifest.parquet")["split"].value_counts()
    assert splits.to_dict() == {"train": 51, "test": 15, "val": 6}


def test_the_screen_shows_progress_and_a_summary_and_no_library(finished):
    directory, out, err = finished
    assert err == ""
    lines = out.splitlines()
    assert len([line for line in lines if line.startswith("epoch ")]) == 4
    assert f"the model        {directory.name}/model.keras" in out
    assert "mlflow ui" in out
    for noise in ("WARNING", "I0000", "oneDNN", "INFO", "retracing", "Deprecat"):
        assert noise not in out, noise
    assert "oneDNN" in (directory / "log.txt").read_text()


def test_mlflow_has_the_run_with_its_metrics_and_a_model_that_loads_back(finished, monkeypatch):
    directory, _, _ = finished
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{directory.parent / 'mlflow.db'}")
    import keras
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{directory.parent / 'mlflow.db'}")
    logged = client.get_run(json.loads((directory / "mlflow.json").read_text())["run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["optimizer.base_lr"] == "0.5"
    assert logged.inputs.dataset_inputs[0].dataset.name == "folder"
    steps = [metric.step for metric in client.get_metric_history(logged.info.run_id, "val/accuracy")]
    assert steps == [6, 12, 18, 24]
    metrics = json.loads((directory / "evaluation/test/metrics.json").read_text())
    assert logged.data.metrics["test/accuracy"] == pytest.approx(metrics["accuracy"])
    artifacts = {artifact.path for artifact in client.list_artifacts(logged.info.run_id)}
    assert {"config.yaml", "classes.txt", "manifest.parquet", "report", "evaluation"} <= artifacts
    [model] = client.search_logged_models([logged.info.experiment_id])
    mlflow.set_tracking_uri(f"sqlite:///{directory.parent / 'mlflow.db'}")
    loaded = mlflow.keras.load_model(model.model_uri)
    images = np.random.default_rng(1).uniform(0, 255, (4, 32, 32, 3)).astype(np.float32)
    ours = keras.saving.load_model(directory / "model.keras")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), ours.predict(images, verbose=0))


def test_evaluate_in_a_new_process_gives_the_figures_of_the_end_of_training(finished):
    directory, _, _ = finished
    file = directory / "evaluation/test/metrics.json"
    before = json.loads(file.read_text())
    rows = pd.read_parquet(directory / "evaluation/test/predictions.parquet")
    file.unlink()
    code, out, err = run(directory.parent, "evaluate.py", "--run", "whole")
    assert (code, err) == (0, ""), out
    after = json.loads(file.read_text())
    assert after["accuracy"] == before["accuracy"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    again = pd.read_parquet(directory / "evaluation/test/predictions.parquet")
    assert again["index"].tolist() == rows["index"].tolist()
    assert again["index"].is_unique
    assert len(again) == 15
    assert again["predicted_class"].tolist() == rows["predicted_class"].tolist()


def test_evaluate_labels_pictures_as_it_measured_them(finished):
    directory, _, _ = finished
    rows = pd.read_parquet(directory / "evaluation/test/predictions.parquet").head(2)
    broken = directory.parent / "broken.jpg"
    broken.write_bytes(b"no picture")
    code, out, _ = run(directory.parent, "evaluate.py", "--run", "whole", *(f"photos/{key}" for key in rows["key"]), "broken.jpg")
    assert code == 1, "one of the files is no picture"
    assert "is not a picture" in out
    for row in rows.itertuples():
        assert f"{row.probability:6.1%}" in out
        assert row.predicted_class in out


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_a_run_that_is_ended_in_an_epoch_goes_on_bit_identically(folder, finished, how):
    name = f"ended-{how}"
    process = start(folder, "train.py", "--config", "config.yaml", "--run-dir", name)
    deadline = time.monotonic() + 200
    while not list((folder / name / "checkpoints").glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (143 if how == signal.SIGTERM else -9), out + err
    if how == signal.SIGTERM:
        assert f"--run-dir {name} --resume" in out
    last = max(int(path.name.removeprefix("step-")) for path in (folder / name / "checkpoints").glob("step-*"))
    assert 6 <= last < 24

    code, out, err = run(folder, "train.py", "--config", "config.yaml", "--run-dir", name)
    assert code == 2, "without --resume nothing is overwritten"
    assert "holds an unfinished run; go on with it by --resume" in err
    code, out, err = run(folder, "train.py", "--config", "config.yaml", "--run-dir", name, "--resume", "seed=43", "optimizer.ema=0.8")
    assert code == 2, "another config is another run"
    assert "  seed: was 42, is 43" in err
    assert "  optimizer.ema: was 0.9, is 0.8" in err
    code, out, err = run(folder, "train.py", "--config", "config.yaml", "--run-dir", name, "--resume")
    assert code == 0, out + err

    directory, _, _ = finished
    for model in ("model.keras", "best/model.keras"):
        resumed, whole = weights(folder / name / model), weights(directory / model)
        assert len(whole) > 100
        assert resumed == whole
    assert manifest_of(folder / name)["history"] == manifest_of(directory)["history"]

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    logged = client.get_run(json.loads((folder / name / "mlflow.json").read_text())["run_id"])
    assert logged.info.status == "FINISHED"
    for key in ("train/loss", "val/loss", "learning_rate"):
        steps = [metric.step for metric in client.get_metric_history(logged.info.run_id, key)]
        assert len(steps) == len(set(steps)), f"{key} has a step twice"
    code, out, _ = run(folder, "train.py", "--config", "config.yaml", "--run-dir", name, "--resume")
    assert code == 0
    assert "is finished already" in out


def manifest_of(directory: Path) -> dict:
    return json.loads((directory / "checkpoints" / "step-00000024" / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=absent"], "absent"),
        (["data.path=config.yaml"], "config.yaml"),
        (["model.weights=absent.h5"], "absent.h5"),
        (["--run-dir", "photos"], "nothing in it is overwritten"),
        (["--run-dir", "nowhere", "--resume"], "is neither a directory"),
    ],
)
def test_bad_input_gets_one_message_and_exit_code_2(folder, arguments, message):
    code, _, err = run(folder, "train.py", "--config", "config.yaml", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_picture_that_cannot_be_read_is_named_before_training(folder, tmp_path):
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for path in (folder / "photos" / "class 0").glob("*.png"):
            (tmp_path / "photos" / label / path.name).write_bytes(path.read_bytes()[: 300 if path.name == "7.png" else None])
    code, _, err = run(
        folder, "train.py", "--config", "config.yaml", f"data.path={tmp_path / 'photos'}", "--run-dir", str(tmp_path / "run")
    )
    assert code == 2
    assert "2 of 48 pictures cannot be used" in err
    assert "a/7.png" in err
    assert not (tmp_path / "run" / "checkpoints").exists()
