"""train.py and evaluate.py as a user runs them: real processes, real files, real signals."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pandas as pd
import pytest
from fake_console import FakeConsole
from PIL import Image

from pipeline.cli import evaluate, export, train
from pipeline.config.loader import load_config
from pipeline.data.sources.catalog import open_source
from pipeline.errors import UserError
from pipeline.evaluation import robustness as corruptions
from pipeline.runs import run_directory
from pipeline.training import resolve
from pipeline.training.resolve import scan_images

PROJECT = Path(__file__).parents[2]
CONFIG = """
model: {variant: {width: 0.25, depth: 0.3, resolution: 32}, weights: null, batch_norm_momentum: 0.9}
data: {source: folder, path: photos, resize: squash}
augment:
  transforms:
    - RandomResizedCrop: {scale: [0.5, 1.0]}
    - HorizontalFlip
  mixup: 0.2
optimizer: {base_lr: 0.5, warmup_epochs: 0.5, ema_decay: 0.9}
train:
  global_batch_size: 8
  stages: [{epochs: 1, trainable: block7}, {epochs: 3}]
runtime: {num_workers: 2}
tracking: {experiment: test}
"""


def start(folder: Path, program: str, *arguments: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, str(PROJECT / program), *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def weights(model: Path) -> dict[str, bytes]:
    """Every weight in a .keras file."""
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(model) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of generated images in three classes, and a config."""
    root = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    for label, color in enumerate([(200, 40, 40), (40, 200, 40), (40, 40, 200)]):
        (root / "photos" / f"class {label}").mkdir(parents=True)
        for number in range(24):
            noise = rng.integers(0, 56, (36 + number % 3, 40, 3))
            pattern = 40 * rng.integers(0, 2, (5, 5, 3)).repeat(8, 0).repeat(8, 1)[: noise.shape[0], :40]
            Image.fromarray((np.array(color) // 2 + noise + pattern).astype(np.uint8)).save(
                root / "photos" / f"class {label}" / f"{number}.png"
            )
    (root / "config.yaml").write_text(CONFIG)
    return root


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str, str]:
    """A run from beginning to end in a new process: its directory, standard output and standard error."""
    process = start(
        folder, "train.py", "--config", "config.yaml", "--run-dir", "whole", "tracking.registered_model_name=colors"
    )
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    return folder / "whole", out, err


def test_a_run_leaves_everything_that_it_is(finished):
    directory, _, _ = finished
    names = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts
    }
    assert names == {
        *(
            "config.yaml",
            "manifest.parquet",
            "classes.txt",
            "model.keras",
            "best/model.keras",
            "log.txt",
            "mlflow.json",
            ".lock",
        ),
        *("calibration.json", "report/index.html", "report/training_curves.png", "report/first_batch.png"),
        *(
            f"evaluation/test/{name}"
            for name in ("metrics.json", "per_class.csv", "confusion_matrix.csv", "confusion_matrix.png")
        ),
        *(
            f"evaluation/test/{name}"
            for name in ("reliability.csv", "reliability.png", "label_errors.csv", "predictions.parquet")
        ),
    }
    assert json.loads((directory / "calibration.json").read_text()).items() >= {"split": "val", "num_images": 6}.items()
    assert (directory / "classes.txt").read_text().splitlines() == ["class 0", "class 1", "class 2"]
    splits = pd.read_parquet(directory / "manifest.parquet")["split"].value_counts()
    assert splits.to_dict() == {"train": 51, "test": 15, "val": 6}


def test_the_console_shows_progress_and_a_summary_and_no_library(finished):
    directory, out, err = finished
    assert err == ""
    lines = out.splitlines()
    assert len([line for line in lines if line.startswith("epoch ")]) == 4
    assert (
        len([line for line in lines if re.fullmatch(r"first step \d+ s, including tracing and compilation", line)]) == 2
    ), "of each stage"
    assert load_config(directory / "config.yaml").runtime.xla is False, "auto is settled"
    assert "registered as colors version 1: it is the champion, because there was none" in out
    assert f"the model        {directory.name}/model.keras" in out
    assert "mlflow ui" in out
    for noise in ("WARNING", "I0000", "oneDNN", "INFO", "retracing", "Deprecat"):
        assert noise not in out, noise
    assert "oneDNN" in (directory / "log.txt").read_text()


def test_mlflow_has_the_run_with_its_metrics_and_models_that_load_back(finished, tmp_path, monkeypatch):
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
    assert artifacts == {
        "config.yaml",
        "classes.txt",
        "manifest.parquet",
        "calibration.json",
        "report",
        "evaluation",
        "best",
    }
    best = client.download_artifacts(logged.info.run_id, "best/model.keras", str(tmp_path))
    assert weights(Path(best)) == weights(directory / "best/model.keras")
    [model] = client.search_logged_models([logged.info.experiment_id])
    linked = {metric.key: metric.dataset_digest for metric in model.metrics}
    assert linked["test/accuracy"] == logged.inputs.dataset_inputs[0].dataset.digest
    assert client.get_model_version_by_alias("colors", "champion").source == model.model_uri
    mlflow.set_tracking_uri(f"sqlite:///{directory.parent / 'mlflow.db'}")
    loaded = mlflow.keras.load_model(model.model_uri)
    images = np.random.default_rng(1).uniform(0, 255, (4, 32, 32, 3)).astype(np.float32)
    ours = keras.saving.load_model(directory / "model.keras")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), ours.predict(images, verbose=0))


@pytest.fixture(scope="module")
def evaluated(finished: tuple[Path, str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, evaluated in another process than the one that trained it, with one kind of corruption."""
    directory = tmp_path_factory.mktemp("evaluated") / "copy"
    shutil.copytree(finished[0], directory)
    for file in ("mlflow.json", "evaluation/test/metrics.json", "evaluation/test/predictions.parquet"):
        (directory / file).unlink()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(corruptions, "KINDS", {"brightness": corruptions.KINDS["brightness"]})
        call(monkeypatch, finished[0].parent, evaluate, "--run", str(directory), "--corruptions")
    return directory


def test_evaluate_gives_the_figures_of_the_end_of_training(finished, evaluated):
    before, after = (json.loads((run / "evaluation/test/metrics.json").read_text()) for run in (finished[0], evaluated))
    assert after["accuracy"] == before["accuracy"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert after["batch_norm"]["moving"] == before["accuracy"]
    rows, again = (pd.read_parquet(run / "evaluation/test/predictions.parquet") for run in (finished[0], evaluated))
    assert again["index"].tolist() == rows["index"].tolist()
    assert again["index"].is_unique
    assert len(again) == 15
    assert again["predicted_class"].tolist() == rows["predicted_class"].tolist()


def test_a_run_is_measured_on_corrupted_images(evaluated):
    figures = json.loads((evaluated / "evaluation/test/metrics.json").read_text())
    table = pd.read_csv(evaluated / "evaluation/test/corruptions.csv", index_col="corruption")
    assert figures["corruption_accuracy"] == table.loc["brightness", ["1", "2", "3", "4", "5"]].mean()
    assert "Corrupted images" in (evaluated / "report/index.html").read_text()


@pytest.mark.slow
def test_a_run_is_measured_in_several_views(finished, evaluated, monkeypatch):
    plain = json.loads((evaluated / "evaluation/test/metrics.json").read_text())
    output = call(monkeypatch, finished[0].parent, evaluate, "--run", str(evaluated), "--tta", "10-crop")
    assert "test-10-crop: 15 images" in output
    seen = json.loads((evaluated / "evaluation/test-10-crop/metrics.json").read_text())
    assert seen["loss"] != plain["loss"]
    assert (seen["batch_norm"], seen["temperature_scaled"]) == (None, None)
    assert (evaluated / "report/test-10-crop.html").exists()
    assert json.loads((evaluated / "evaluation/test/metrics.json").read_text()) == plain


@pytest.mark.slow
def test_every_export_has_the_accuracy_of_the_end_of_training_and_of_evaluate(finished, tmp_path, monkeypatch):
    directory, _, _ = finished
    at_the_end = json.loads((directory / "evaluation/test/metrics.json").read_text())["accuracy"]
    call(monkeypatch, directory.parent, evaluate, "--run", "whole")
    assert json.loads((directory / "evaluation/test/metrics.json").read_text())["accuracy"] == at_the_end
    assert (
        export.main(FakeConsole(), ["--run", "whole", "--formats", "savedmodel,litert,onnx", "--out", str(tmp_path)])
        == 0
    )
    reports = [entry["parity"] for entry in json.loads((tmp_path / "metadata.json").read_text())["formats"].values()]
    assert [report["accuracy"] for report in reports] == [at_the_end] * 3
    assert [report["model_accuracy"] for report in reports] == [at_the_end] * 3
    assert [report["images"] for report in reports] == [15] * 3


def test_evaluate_labels_images_as_it_measured_them(finished, launcher_process):
    directory, _, _ = finished
    rows = pd.read_parquet(directory / "evaluation/test/predictions.parquet").head(2)
    broken = directory.parent / "broken.jpg"
    broken.write_bytes(b"no image")
    images = [*(f"photos/{key}" for key in rows["key"]), "broken.jpg"]
    ended = launcher_process.run(directory.parent, "evaluate.py", "--run", "whole", *images)
    assert ended.code == 1, "one of the files is no image"
    assert "is not an image" in ended.stdout
    for row in rows.itertuples():
        assert f"{row.probability:6.1%}" in ended.stdout
        assert row.predicted_class in ended.stdout


@pytest.mark.slow
def test_labels_flow_through_a_pipe_until_nobody_reads_them(finished):
    directory, _, _ = finished
    endless = (
        f"yes 'photos/class 0/0.png' | {sys.executable} {PROJECT}/evaluate.py --run whole --format jsonl - | head -n 40"
    )
    result = subprocess.run(
        ["bash", "-c", f"{endless}; echo ${{PIPESTATUS[1]}}"],
        cwd=directory.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    *rows, code = result.stdout.splitlines()
    assert (len(rows), code, result.stderr) == (40, "141", "")
    assert {json.loads(row)["path"] for row in rows} == {"photos/class 0/0.png"}


def list_test_images(run: Path, folder: Path) -> None:
    """Write the test images of a run as data of other classes, with a map of the classes."""
    rows = pd.read_parquet(run / "evaluation/test/predictions.parquet")
    lines = [f"{run.parent / 'photos' / row.key},{row.true_class[-1]}\n" for row in rows.itertuples()]
    (folder / "list.csv").write_text("path,label\n" + "".join(lines))
    (folder / "map.yaml").write_text("0: class 0\n1: class 1\n2: class 2\n")


def test_other_data_are_measured_by_what_their_classes_are_in_the_run(finished, tmp_path, monkeypatch):
    directory, _, _ = finished
    before = json.loads((directory / "evaluation/test/metrics.json").read_text())
    list_test_images(directory, tmp_path)
    arguments = ("--run", str(directory), "--data", "list.csv")
    with pytest.raises(UserError, match="3 of the data's 3 classes are not among the model's 3"):
        call(monkeypatch, tmp_path, evaluate, *arguments)
    output = call(monkeypatch, tmp_path, evaluate, *arguments, "--class-map", "map.yaml", "--out", "figures")
    assert f"list.csv: 15 images, accuracy {before['accuracy']:.2%}" in output
    after = json.loads((tmp_path / "figures/metrics.json").read_text())
    assert after.pop("split") == "list.csv"
    assert before.pop("split") == "test"
    assert after.pop("batch_norm") is None
    del before["batch_norm"]  # evaluate.py measures it of a run's own data
    assert after.pop("temperature_scaled") is None  # its temperature is fitted on the run's own data
    assert (
        after.pop("intervals").keys() == before.pop("intervals").keys()
    )  # near-duplicates are drawn together in the run's own
    assert after.pop("calibration") == pytest.approx(before.pop("calibration"), rel=1e-5)
    assert after.pop("corruption_accuracy") is before.pop("corruption_accuracy") is None
    del before["temperature_scaled"]
    assert after == pytest.approx(before, rel=1e-5)
    with pytest.raises(UserError, match="figures: exists already and is not overwritten"):
        call(monkeypatch, tmp_path, evaluate, *arguments, "--class-map", "map.yaml", "--out", "figures")


@pytest.mark.slow
def test_a_run_that_is_killed_in_an_epoch_goes_on_bit_identically(folder, finished, launcher_process):
    name = "killed"
    process = start(folder, "train.py", "--config", "config.yaml", "--run-dir", name)
    deadline = time.monotonic() + 200
    while (
        not list((folder / name / "checkpoints").glob("step-*"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.kill()
    out, err = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, out + err
    last = max(int(path.name.removeprefix("step-")) for path in (folder / name / "checkpoints").glob("step-*"))
    assert 6 <= last < 24

    command = ("train.py", "--config", "config.yaml", "--run-dir", name)
    ended = launcher_process.run(folder, *command)
    assert ended.code == 2, "without --resume nothing is overwritten"
    assert "holds an unfinished run; continue it with --resume" in ended.stderr
    ended = launcher_process.run(folder, *command, "--resume", "seed=43", "optimizer.ema_decay=0.8")
    assert ended.code == 2, "another config is another run"
    assert "  seed: was 42, is 43" in ended.stderr
    assert "  optimizer.ema_decay: was 0.9, is 0.8" in ended.stderr
    ended = launcher_process.run(folder, *command, "--resume")
    assert ended.code == 0, ended.stdout + ended.stderr

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
    ended = launcher_process.run(folder, *command, "--resume")
    assert ended.code == 0
    assert "is finished already" in ended.stdout


def manifest_of(directory: Path) -> dict:
    return json.loads((directory / "checkpoints" / "step-00000024" / "metadata.json").read_text())


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, program: ModuleType, *arguments: str) -> str:
    """Runs a program in this process; returns its output."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *arguments])
    console = FakeConsole()
    assert program.main(console) == 0
    return console.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=absent"], "absent"),
        (["data.path=config.yaml"], "config.yaml"),
        (["model.weights=absent.h5"], "absent.h5"),
        (["--run-dir", "photos"], "already exists and is not overwritten"),
        (["--run-dir", "nowhere", "--resume"], "is neither a directory"),
        (["augment.backend=albumentations", "augment.transforms=[{HorizontalFlip: {p: 5}}]"], "HorizontalFlip"),
        (["augment.backend=albumentations", "augment.transforms=[Normalize]"], "Normalize"),
    ],
)
def test_bad_input_is_answered_in_one_message(folder, monkeypatch, arguments, message):
    with pytest.raises(UserError) as caught:
        call(monkeypatch, folder, train, "--config", "config.yaml", *arguments)
    assert message in str(caught.value)


def test_a_mistake_ends_the_process_with_code_2_and_no_traceback(folder, launcher_process):
    command = ("train.py", "--config", "config.yaml", "--run-dir", "mistake", "data.path=absent")
    ended = launcher_process.run(folder, *command)
    assert (ended.code, ended.stderr.count("\n")) == (2, 1)
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_run_that_failed_before_training_does_not_keep_its_directory(folder, monkeypatch):
    arguments = ("--config", "config.yaml", "--run-dir", "early")
    for _ in range(2):
        with pytest.raises(UserError, match="absent"):
            call(monkeypatch, folder, train, *arguments, "model.weights=absent.h5")


def test_mlflow_is_tried_before_the_data_are_read(folder, tmp_path, monkeypatch):
    def scan(*arguments, **keywords):
        raise AssertionError("the data are read")

    monkeypatch.setattr(resolve, "scan", scan)
    (tmp_path / "notes.txt").write_text("no database")
    uri = f"tracking.uri=sqlite:///{tmp_path / 'notes.txt'}"
    with pytest.raises(UserError, match=r"MLflow cannot work with sqlite:///.*notes\.txt"):
        call(monkeypatch, folder, train, "--config", "config.yaml", "--run-dir", "untracked", uri)
    assert not (folder / "untracked").exists()


def test_weights_that_fit_in_part_are_not_left_beside_random_layers(finished, monkeypatch):
    directory, _, _ = finished
    deeper = (
        "model.variant={width: 0.25, depth: 1.1, resolution: 32}",
        "model.weights=whole/model.keras",
        "model.partial_weights=true",
    )
    stages = "train.stages=[{epochs: 1, trainable: block2}]"
    with pytest.raises(
        UserError,
        match=r"no stage trains 6 layers that the weights do not fit .*: block1b_dwconv, .*, block1b_project_bn;",
    ):
        call(monkeypatch, directory.parent, train, "--config", "config.yaml", "--run-dir", "partial", *deeper, stages)


def test_an_image_that_cannot_be_read_is_named_before_training(folder, tmp_path, monkeypatch):
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for path in (folder / "photos" / "class 0").glob("*.png"):
            (tmp_path / "photos" / label / path.name).write_bytes(
                path.read_bytes()[: 300 if path.name == "7.png" else None]
            )
    arguments = ["--config", "config.yaml", f"data.path={tmp_path / 'photos'}", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(UserError) as caught:
        call(monkeypatch, folder, train, *arguments)
    assert "2 of 48 images cannot be used" in str(caught.value)
    assert "a/7.png" in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_goes_on_without_the_images_that_it_left_out(folder, tmp_path):
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for path in (folder / "photos" / f"class {'ab'.index(label)}").glob("*.png"):
            (tmp_path / "photos" / label / path.name).write_bytes(
                path.read_bytes()[: 300 if path.name == "7.png" else None]
            )
    config = load_config(folder / "config.yaml", [f"data.path={tmp_path / 'photos'}", "data.on_bad_image=skip"])
    run, console = run_directory.create(tmp_path / "run", "test"), FakeConsole()
    first = scan_images(open_source(config.data), config.data, config.seed, run, console)
    assert len(first.table) == 46
    listed = pd.read_csv(run.skipped_images)
    assert listed["path"].tolist() == ["a/7.png", "b/7.png"]
    assert listed["problem"].str.startswith("is a damaged PNG: ").all()
    assert f"skipped: 2 images that cannot be used, listed in {run.skipped_images}" in console.output
    assert scan_images(open_source(config.data), config.data, config.seed, run, console).digest() == first.digest()


def test_dry_run_shows_config_classes_steps_and_cost_and_writes_nothing(folder, tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("photos", str(folder / "photos")))
    output = call(monkeypatch, tmp_path, train, "--config", str(config), "--dry-run")
    for wanted in (
        "base_lr: 0.5",
        "class 2",
        "steps per epoch       6 of 8 images (51 training images)",
        "multiply-adds",
        "about 0.0 GiB",
    ):
        assert wanted in output
    assert "stage 2               3 epochs, steps 7 to 24, trains all" in output
    assert list(tmp_path.iterdir()) == [config]


def test_the_papers_recipe_passes_its_dry_run_without_its_data(tmp_path, monkeypatch):
    words = ["--config", str(PROJECT / "configs/b0_imagenet.yaml"), "train.gradient_accumulation_steps=512"]
    output = call(monkeypatch, tmp_path, train, *words, "--dry-run")
    assert "imagenet2012 is not in data/tfds yet" in output
    assert "5,288,548 trainable" in output


def test_published_weights_label_an_image_without_a_run(folder, monkeypatch):
    output = call(monkeypatch, folder, evaluate, "--weights", "imagenet", "--variant", "lite0", "photos/class 0/0.png")
    assert "98 of 98 backbone layers copied; classifier copied" in output
    assert len(re.findall(r"\d+\.\d%.* n\d{8} [A-Za-z]", output)) == 5


def test_published_weights_are_measured_on_labeled_images(tmp_path, monkeypatch):
    for name in ("zebra", "n02510455"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (50, 40), (10, 20, 30 + len(name))).save(tmp_path / "photos" / name / "a.png")
    output = call(monkeypatch, tmp_path, evaluate, "--weights", "imagenet", "--variant", "lite0", "--data", "photos")
    assert "photos: 2 images, accuracy 0.00%" in output
    assert "n02510455 giant panda" in output
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_weights_of_other_classes_are_not_passed_off_as_imagenets(finished, monkeypatch):
    directory, _, _ = finished
    with pytest.raises(UserError, match=r"no backbone layer fits|not the weights of a complete"):
        call(
            monkeypatch,
            directory.parent,
            evaluate,
            "--weights",
            "whole/model.keras",
            "--variant",
            "b0",
            "photos/class 0/0.png",
        )


@pytest.mark.slow
def test_the_recipe_trains_a_head_on_what_a_run_knows_and_keeps_its_best_epoch(finished, tmp_path, monkeypatch):
    directory, _, _ = finished
    config = """
    recipe: auto
    model: {variant: {width: 0.25, depth: 0.3, resolution: 32}, weights: whole}
    data: {source: folder, path: photos, resize: squash}
    train:
      global_batch_size: 8
      class_weights: {class 1: 2}
      best_metric: loss
      early_stopping: {patience: 2, min_delta: 20}
      restore_best_weights: true
    tracking: {experiment: test}
    """
    (directory.parent / "recipe.yaml").write_text(config)
    output = call(monkeypatch, directory.parent, train, "--config", "recipe.yaml", "--run-dir", "recipe")
    assert "classifier copied" in output
    assert "recipe: auto, which is here" in output
    assert "{epochs: 17, trainable: head, base_lr: 0.02, use_augmentation: false}" in output
    run_dir = directory.parent / "recipe"
    resolved = load_config(run_dir / "config.yaml")
    assert resolved.recipe == "auto"
    assert [stage.trainable for stage in resolved.train.stages] == ["head"]
    history = json.loads(sorted((run_dir / "checkpoints").glob("step-*"))[-1].joinpath("metadata.json").read_text())[
        "history"
    ]
    assert len(history) < 17
    assert "early stopping: no improvement; the last" in output
    assert weights(run_dir / "model.keras") == weights(run_dir / "best/model.keras")
    before, after = (read_layers(path / "model.keras") for path in (directory, run_dir))
    assert any("predictions" in name and before[name] != after[name] for name in before), "the head was trained"
    assert all(before[name] == after[name] for name in before if "predictions" not in name), "and nothing else"
    metrics = json.loads((run_dir / "evaluation/test/metrics.json").read_text())
    assert metrics["batch_norm"] is None, "the statistics stood still"
    list_test_images(run_dir, tmp_path)
    options = ("--data", "list.csv", "--class-map", "map.yaml", "--out", "figures")
    call(monkeypatch, tmp_path, evaluate, "--run", str(run_dir), *options)
    again = json.loads((tmp_path / "figures/metrics.json").read_text())
    assert again["loss"] == pytest.approx(metrics["loss"], rel=1e-4)


def read_layers(model: Path) -> dict[str, bytes]:
    """Every weight of a saved network by the name of its layer and its place in it."""
    import keras

    layers = keras.saving.load_model(model, compile=False).layers
    return {
        f"{layer.name}/{place}": np.asarray(w).tobytes() for layer in layers for place, w in enumerate(layer.weights)
    }


def test_early_stopping_without_validation_images_is_refused(folder, tmp_path, monkeypatch):
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "photos" / split / label).mkdir(parents=True)
            (tmp_path / "photos" / split / label / "1.png").write_bytes(
                (folder / "photos" / "class 0" / f"{len(split + label)}.png").read_bytes()
            )
    arguments = [
        "--config",
        "config.yaml",
        f"data.path={tmp_path / 'photos'}",
        "data.on_leak=ignore",
        "data.group_near_duplicates=false",
    ]
    with pytest.raises(UserError, match="go by the validation split"):
        call(
            monkeypatch,
            folder,
            train,
            *arguments,
            "--run-dir",
            str(tmp_path / "run"),
            "train.restore_best_weights=true",
            "train.global_batch_size=2",
        )
