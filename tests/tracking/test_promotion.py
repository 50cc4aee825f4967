"""Models under one name in a real MLflow registry: which of them is the champion, and why."""

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.data.manifest import COLUMNS, Manifest
from pipeline.errors import ConfigError
from pipeline.evaluation.metrics import evaluate_predictions
from pipeline.evaluation.predictor import Predictions
from pipeline.evaluation.report import tables
from pipeline.evaluation.report.tables import write_results
from pipeline.evaluation.results import summarize_with_intervals
from pipeline.runs.run_directory import RunDirectory
from pipeline.tracking.mlflow_logger import MLflowLogger, log_comparison, log_evaluation
from pipeline.tracking.promotion import register_and_promote

CLASSES = ("ant", "bee")
IMAGES = 100


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database that the tests of this module share, and a network."""
    folder = tmp_path_factory.mktemp("registry")
    inputs = keras.Input((8, 8, 3))
    keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(inputs))).save(folder / "final.keras")
    return folder


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of evaluations out: they take most of the time, and nothing here reads them."""
    monkeypatch.setattr(tables, "save_figure", lambda *_, **__: None)


@pytest.fixture(scope="module")
def config(home: Path) -> Config:
    return Config.model_validate({"data": {"source": "digits"}, "tracking": {"uri": f"sqlite:///{home}/mlflow.db"}})


@pytest.fixture(scope="module")
def client(config: Config) -> MlflowClient:
    return MlflowClient(config.tracking.uri)


def measured_run(directory: Path, wrong: int, *, contents: str = "") -> RunDirectory:
    """A run that gets all but the first images right; `contents` makes their files other ones."""
    run, labels = RunDirectory(directory), np.arange(IMAGES) % 2
    directory.mkdir()
    table = pd.DataFrame(
        {"key": [f"{i}.png" for i in range(IMAGES)], "label": labels, "split": "test", "group": range(IMAGES)}
    )
    table["sha256"] = [hashlib.sha256(f"{contents}{i}".encode()).hexdigest() for i in range(IMAGES)]
    manifest = Manifest(CLASSES, table.assign(height=8, width=8, orientation=1)[list(COLUMNS)].astype(COLUMNS))
    manifest.save(run.manifest)
    classes = np.where(np.arange(IMAGES) < wrong, 1 - labels, labels)
    predictions = Predictions(np.arange(IMAGES), labels.astype(np.int32), np.eye(2, dtype=np.float32)[classes])
    evaluation = evaluate_predictions(predictions, CLASSES, "test")
    write_results(summarize_with_intervals(predictions, evaluation, manifest, None), run.evaluation("test"))
    return run


def end(
    config: Config, home: Path, run: RunDirectory, name: str, *, resumed: tuple[str, str] | None = None
) -> tuple[str, MLflowLogger]:
    """End a training; return the message about the champion, and the logger."""
    with MLflowLogger(config, run.path, resumed=resumed) as tracker:
        tracker.log_artifacts(run.manifest)
        tracker.log_artifacts(run.evaluation("test"), "evaluation/test")
        model = tracker.log_model(home / "final.keras", "model", step=5)
        return register_and_promote(tracker.registry(name), model, run, "test"), tracker


def champion(client: MlflowClient, name: str) -> int:
    return int(client.get_model_version_by_alias(name, "champion").version)


def test_only_a_model_that_proves_to_be_better_takes_the_place_of_the_champion(
    config: Config, home: Path, client: MlflowClient, tmp_path: Path
) -> None:
    name = "ants and bees"
    message, first = end(config, home, measured_run(tmp_path / "first", wrong=20), name)
    assert message == "registered as ants and bees version 1: it is the champion, because there was none"
    assert client.get_model_version_by_alias(name, "champion").run_id == first.run_id

    message, _ = end(config, home, measured_run(tmp_path / "worse", wrong=40), name)
    assert message.startswith(
        "registered as ants and bees version 2: version 1 stays the champion. version 2 is worse than version 1: 60.0%"
    )
    message, _ = end(config, home, measured_run(tmp_path / "equal", wrong=17), name)
    assert (
        "version 3: version 1 stays the champion. These 100 test images show no significant difference between "
        "version 3 and version 1: 83.0%" in message
    )
    assert champion(client, name) == 1

    message, better = end(config, home, measured_run(tmp_path / "better", wrong=2), name)
    assert (
        "version 4: it replaces version 1 as the champion. version 4 is better than version 1: 98.0% of the 100 test"
        in message
    )
    version = client.get_model_version_by_alias(name, "champion")
    assert (int(version.version), version.run_id) == (4, better.run_id)
    assert version.description == message.partition(": ")[2], "the registry says why, too"

    message, _ = end(config, home, measured_run(tmp_path / "others", wrong=0, contents="other"), name)
    assert "version 5: version 4 stays the champion, because the test is not possible: " in message
    assert message.endswith("they were not evaluated on the same images")
    assert champion(client, name) == 4


def test_an_end_that_comes_again_leaves_one_version_and_the_title(
    config: Config, home: Path, client: MlflowClient, tmp_path: Path
) -> None:
    run = measured_run(tmp_path / "run", wrong=5)
    _, tracker = end(config, home, run, "again")
    message, _ = end(config, home, run, "again", resumed=(tracker.uri, tracker.run_id))
    assert message.endswith("version 2: it is the champion, as version 1 of the same run was")
    assert champion(client, "again") == 2
    assert [int(version.version) for version in client.search_model_versions("name = 'again'")] == [2]
    assert (
        client.get_logged_model(client.get_model_version("again", "2").source.removeprefix("models:/")).source_run_id
        == tracker.run_id
    )


def test_runs_that_end_together_contend_one_after_the_other(
    config: Config, home: Path, client: MlflowClient, tmp_path: Path
) -> None:
    run = measured_run(tmp_path / "run", wrong=5)
    with MLflowLogger(config, run.path) as tracker:
        model, registry = tracker.log_model(home / "final.keras", "model", step=5), tracker.registry("together")
        contender = threading.Thread(target=register_and_promote, args=(registry, model, run, "test"))
        with registry.promotion_lock():
            contender.start()
            contender.join(1)
            assert contender.is_alive()
            assert not client.search_model_versions("name = 'together'")
        contender.join()
    assert champion(client, "together") == 1


def test_a_champion_without_predictions_keeps_its_title(
    config: Config, home: Path, client: MlflowClient, tmp_path: Path
) -> None:
    run = measured_run(tmp_path / "silent", wrong=50)
    with MLflowLogger(config, run.path) as tracker:
        register_and_promote(
            tracker.registry("silent"), tracker.log_model(home / "final.keras", "model", step=5), run, "test"
        )
    message, _ = end(config, home, measured_run(tmp_path / "loud", wrong=0), "silent")
    assert "is not possible: the run of version 1 has no evaluation/test/predictions.parquet in MLflow" in message
    assert champion(client, "silent") == 1


def test_results_are_linked_to_the_model_and_the_data_set(
    config: Config, home: Path, client: MlflowClient, tmp_path: Path
) -> None:
    run = measured_run(tmp_path / "run", wrong=5)
    with MLflowLogger(config, run.path) as tracker:
        tracker.log_dataset("insects", "abcd" * 16, "here", {"test": {"ant": 50, "bee": 50}})
        tracker.log_metrics({"train/loss": 0.5}, 5)
        model = tracker.log_model(home / "final.keras", "model", step=5)
        tracker.log_results({"test/accuracy": 0.95}, 5)
    log_evaluation(
        config.tracking.uri, (tracker.uri, tracker.run_id), {"val/accuracy": 0.9}, run.evaluation("test"), run.manifest
    )
    logged = client.get_logged_model(model.removeprefix("models:/"))
    found = {
        metric.key: (metric.value, metric.step, metric.dataset_name, metric.dataset_digest) for metric in logged.metrics
    }
    digest = ("abcd" * 16)[:36]
    assert found["test/accuracy"] == (0.95, 5, "insects", digest)
    assert found["val/accuracy"] == (0.9, 5, "insects", digest)
    assert client.get_run(tracker.run_id).data.metrics == {
        "train/loss": 0.5,
        "test/accuracy": 0.95,
        "val/accuracy": 0.9,
    }
    assert client.search_logged_models(
        [logged.experiment_id], "metrics.`test/accuracy` > 0.9 AND source_run_id = '" + tracker.run_id + "'"
    )


def test_a_comparison_is_added_to_the_run_that_is_judged(config: Config, client: MlflowClient, tmp_path: Path) -> None:
    run = measured_run(tmp_path / "run", wrong=5)
    with MLflowLogger(config, run.path) as tracker:
        pass
    folder = run.comparison(["plain (1)"])
    folder.mkdir(parents=True)
    (folder / "test.html").write_text("page")
    log_comparison(config.tracking.uri, (tracker.uri, tracker.run_id), {"compare/plain (1)": "it is better"}, folder)
    logged = client.get_run(tracker.run_id)
    assert (logged.info.status, logged.data.tags["compare/plain _1_"]) == ("FINISHED", "it is better")
    assert [file.path for file in client.list_artifacts(tracker.run_id, "report/compare/plain (1)")] == [
        "report/compare/plain (1)/test.html"
    ]


def test_the_key_register_hides_nothing_and_brings_no_warning() -> None:
    subprocess.run(
        [sys.executable, "-W", "error", "-c", "import pipeline.config.schema"],
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=60,
    )


def test_a_name_that_mlflow_refuses_is_refused_in_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {source: digits}\ntracking: {registered_model_name: a/b}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:2: tracking\.registered_model_name: "):
        load_config(tmp_path / "config.yaml")
    assert (
        load_config(
            tmp_path / "config.yaml", ["tracking.registered_model_name=flowers17 lite0"]
        ).tracking.registered_model_name
        == "flowers17 lite0"
    )
