"""Runs in a real MLflow database."""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import keras
import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline.config.schema import Config
from pipeline.distributed.signals import TrainingInterrupted
from pipeline.errors import ConfigError
from pipeline.tracking.mlflow_logger import MLflowLogger, log_evaluation
from pipeline.tracking.mlflow_store import tracking_uri


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database that the tests of this module share: making one takes seconds."""
    return tmp_path_factory.mktemp("mlflow home")


def config_for(home: Path, experiment: str = "flowers", **changes: object) -> Config:
    uri = f"sqlite:///{home}/mlflow.db"
    return Config.model_validate(
        {"data": {"source": "digits"}, "tracking": {"experiment": experiment, "uri": uri}, **changes}
    )


@pytest.fixture(scope="module")
def config(home: Path) -> Config:
    return config_for(home)


@pytest.fixture(scope="module")
def client(config: Config) -> MlflowClient:
    return MlflowClient(config.tracking.uri)


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def run_until(tracker: MLflowLogger, metrics: dict[str, float], error: BaseException) -> None:
    """A run that logs metrics and ends by `error`."""
    with tracker:
        tracker.log_metrics(metrics, step=70)
        raise error


def test_importing_the_module_imports_neither_mlflow_nor_tensorflow() -> None:
    code = (
        "import sys, pipeline.tracking.mlflow_logger; assert not {'mlflow', 'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=60)


def test_a_run_holds_params_metrics_data_set_and_artifacts(
    config: Config, client: MlflowClient, tmp_path: Path
) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "note.txt").write_text("best")
    (tmp_path / "config.yaml").write_text("seed: 42")
    with MLflowLogger(config, tmp_path / "2026-01-02_03-04-05") as tracker:
        assert client.get_run(tracker.run_id).info.status == "RUNNING"
        tracker.log_dataset("digits", "abcd" * 16, "scikit-learn", {"train": {"0": 3, "1": 4}, "val": {"0": 1, "1": 0}})
        for step in range(10, 51, 10):
            tracker.on_log(step, {"train/loss": 1 / step, "learning_rate": 0.1})
        tracker.on_epoch_end({"epoch": 1, "step": 50, "train/loss": 1 / 50, "val/accuracy": 0.75})
        tracker.log_artifacts(tmp_path / "best", "best")
        tracker.log_artifacts(tmp_path / "config.yaml")
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "2026-01-02_03-04-05"
    assert run.data.params["model.variant"] == "b0"
    assert run.data.params["optimizer.base_lr"] == "0.016"
    assert run.data.params["train.stages.0.epochs"] == "10"
    assert run.data.params["model.dropout"] == "null"
    assert run.data.params["augment.transforms"] == "[]"
    assert run.data.tags["run_directory"] == str(tmp_path / "2026-01-02_03-04-05")
    assert run.data.tags["version.tensorflow"].startswith("2.")
    assert run.data.tags["command"] == shlex.join(sys.orig_argv)
    assert history(client, tracker.run_id, "train/loss") == [(step, 1 / step) for step in range(10, 51, 10)]
    assert history(client, tracker.run_id, "val/accuracy") == [(50, 0.75)]
    assert history(client, tracker.run_id, "epoch") == [(50, 1)]
    [dataset_input] = run.inputs.dataset_inputs
    assert dataset_input.dataset.name == "digits"
    assert dataset_input.dataset.digest == ("abcd" * 16)[:36]
    assert '"num_images": {"train": 7, "val": 1}' in dataset_input.dataset.profile
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["best", "config.yaml"]
    assert [file.path for file in client.list_artifacts(tracker.run_id, "best")] == ["best/note.txt"]


def test_the_logged_model_loads_back_and_predicts_the_same(
    config: Config, client: MlflowClient, tmp_path: Path
) -> None:
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(inputs)))
    model.save(tmp_path / "model.keras")
    with MLflowLogger(config, tmp_path / "run") as tracker:
        for step in (1, 2):
            tracker.on_log(step, {"train/loss": 1 / step})
        uri = tracker.log_model(tmp_path / "model.keras", "final", step=2)
        images = np.random.default_rng(0).uniform(0, 255, (5, 8, 8, 3)).astype(np.float32)
        loaded = mlflow.keras.load_model(uri)
        np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))
        signature = mlflow.models.get_model_info(uri).signature
        logged = client.get_logged_model(uri.removeprefix("models:/"))
        again = tracker.log_model(tmp_path / "model.keras", "final", step=2)
        [only] = client.search_logged_models([logged.experiment_id], f"source_run_id = '{tracker.run_id}'")
        assert (only.model_uri, again != uri) == (again, True), "the end of a run that was cut off in it comes again"
    assert signature.inputs.inputs[0].shape == (-1, 8, 8, 3)
    assert signature.outputs.inputs[0].shape == (-1, 3)
    assert logged.source_run_id == tracker.run_id
    assert {metric.key: metric.value for metric in logged.metrics} == {"train/loss": 0.5}
    assert history(client, tracker.run_id, "train/loss") == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no such https://me:secret@host"), "FAILED"),
        (SystemExit(2), "FAILED"),
        (SystemExit(143), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (TrainingInterrupted(), "KILLED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_the_status_says_how_a_run_ended(
    config: Config, client: MlflowClient, tmp_path: Path, error: BaseException, status: str
) -> None:
    tracker = MLflowLogger(config, tmp_path / "run")
    with pytest.raises(type(error)):
        run_until(tracker, {"train/loss": 2.0}, error)
    run = client.get_run(tracker.run_id)
    assert run.info.status == status
    assert run.data.metrics["train/loss"] == 2.0
    assert ("error" in run.data.tags) == (status == "FAILED")
    if isinstance(error, ValueError):
        assert run.data.tags["error"] == "ValueError: no such https://***@host"


def test_resume_goes_on_with_the_run_and_logs_no_step_twice(
    config: Config, client: MlflowClient, tmp_path: Path
) -> None:
    first = MLflowLogger(config, tmp_path / "run")
    with contextlib.suppress(ValueError), first:
        first.log_dataset("digits", "abc", "scikit-learn", {"train": {"0": 1}})
        for step in range(1, 8):
            first.on_log(step, {"train/loss": float(step)})
        first.on_epoch_end({"epoch": 1, "step": 5, "val/accuracy": 0.5})
        raise ValueError("stop")
    assert client.get_run(first.run_id).info.status == "FAILED"
    with MLflowLogger(config, tmp_path / "run", resumed=(first.uri, first.run_id)) as second:
        assert second.run_id == first.run_id
        assert client.get_run(first.run_id).info.status == "RUNNING"
        second.log_dataset("digits", "abc", "scikit-learn", {"train": {"0": 1}})
        for step in range(4, 11):  # the checkpoint was older than the last metrics
            second.on_log(step, {"train/loss": float(step)})
        second.on_epoch_end({"epoch": 1, "step": 5, "val/accuracy": 0.5})
        second.on_epoch_end({"epoch": 2, "step": 10, "val/accuracy": 0.6})
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert "error" not in run.data.tags
    assert len(run.inputs.dataset_inputs) == 1
    assert history(client, first.run_id, "train/loss") == [(step, float(step)) for step in range(1, 11)]
    assert history(client, first.run_id, "val/accuracy") == [(5, 0.5), (10, 0.6)]


def test_what_a_kill_kept_from_being_noted_at_the_start_is_noted_on_resume(
    config: Config, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "log_params", lambda params: None)
        with MLflowLogger(config, tmp_path / "run") as first:
            pass
    assert client.get_run(first.run_id).data.params == {}
    with MLflowLogger(config, tmp_path / "run", resumed=(first.uri, first.run_id)) as second:
        second.log_dataset("digits", "abc", "scikit-learn", {"train": {"0": 1}})
    assert client.get_run(first.run_id).data.params["seed"] == "42"
    assert len(client.get_run(first.run_id).inputs.dataset_inputs) == 1
    changes = ["seed: 42 -> 7 after step 3"]
    changed = config_for(Path(config.tracking.uri.removeprefix("sqlite:///")).parent, seed=7)
    with MLflowLogger(changed, tmp_path / "run", resumed=(first.uri, first.run_id), changes=changes):
        pass
    run = client.get_run(first.run_id)
    assert run.data.tags["changes"] == changes[0]
    assert run.data.params["seed"] == "42", "MLflow's parameters are those that the run began with"


def test_metrics_wait_for_a_flush_and_checkpoints_cause_one(
    config: Config, client: MlflowClient, tmp_path: Path
) -> None:
    with MLflowLogger(config, tmp_path / "run") as tracker:
        tracker.on_log(1, {"train/loss": 1.0})
        assert "train/loss" not in client.get_run(tracker.run_id).data.metrics
        tracker.on_checkpoint(object())
        assert history(client, tracker.run_id, "train/loss") == [(1, 1.0)]
        for step in range(2, 1203):  # more than one call takes
            tracker.on_log(step, {"train/loss": 1.0})
        tracker.flush()
        assert len(history(client, tracker.run_id, "train/loss")) == 1202


def test_training_survives_an_outage_and_sends_the_metrics_later(
    config: Config,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("refused")

    with MLflowLogger(config, tmp_path / "run") as tracker:
        tracker.on_log(1, {"train/loss": 1.0})
        with monkeypatch.context() as outage:
            outage.setattr(MlflowClient, "log_batch", refuse)
            for _ in range(3):
                tracker.on_checkpoint(object())
        assert [
            record.message for record in caplog.records if "did not accept 1 metrics: refused" in record.message
        ] != []
        assert sum("did not accept" in record.message for record in caplog.records) == 1
        tracker.on_log(2, {"train/loss": 2.0})
    assert history(client, tracker.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_two_runs_compare_by_params_and_metrics(home: Path, tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.9), (2, 0.95)):
        config = config_for(home, "comparison", seed=seed)
        with MLflowLogger(config, tmp_path / f"run{seed}") as tracker:
            tracker.log_metrics({"test/accuracy": accuracy}, step=10)
    mlflow.set_tracking_uri(config.tracking.uri)
    try:
        found = mlflow.search_runs(experiment_names=["comparison"], order_by=["metrics.`test/accuracy` DESC"])
    finally:
        mlflow.set_tracking_uri(None)
    assert found["params.seed"].tolist() == ["2", "1"]
    assert found["metrics.test/accuracy"].tolist() == [0.95, 0.9]


def test_an_evaluation_is_added_to_a_run_that_has_ended(config: Config, client: MlflowClient, tmp_path: Path) -> None:
    tracker = MLflowLogger(config, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_until(tracker, {"test/accuracy": 0.5}, KeyboardInterrupt())
    results = tmp_path / "evaluation" / "test"
    results.mkdir(parents=True)
    (results / "metrics.json").write_text("{}")
    (tmp_path / "index.html").write_text("<!doctype html>")
    log_evaluation(
        config.tracking.uri, (tracker.uri, tracker.run_id), {"test/accuracy": 0.6}, results, tmp_path / "index.html"
    )
    run = client.get_run(tracker.run_id)
    assert run.info.status == "KILLED"
    assert run.data.metrics["test/accuracy"] == 0.6
    assert [file.path for file in client.list_artifacts(tracker.run_id, "evaluation/test")] == [
        "evaluation/test/metrics.json"
    ]
    assert [file.path for file in client.list_artifacts(tracker.run_id, "report")] == ["report/index.html"]


def test_the_uri_comes_from_the_config_then_the_environment_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bare = Config.model_validate({"data": {"source": "digits"}})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(bare.tracking.uri) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(bare.tracking.uri, "http://noted") == "http://noted"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(bare.tracking.uri) == "http://127.0.0.1:5000"
    assert tracking_uri(config_for(tmp_path).tracking.uri) == f"sqlite:///{tmp_path}/mlflow.db"


def test_the_environment_is_left_as_it_was(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "http://127.0.0.1:9"):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        if before is not None:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", before)
        with MLflowLogger(config, tmp_path / "run"):
            pass
        assert os.environ.get("MLFLOW_TRACKING_URI") == before
        assert mlflow.active_run() is None
    mlflow.set_tracking_uri(None)


def test_artifacts_lie_beside_the_database(config: Config, client: MlflowClient, home: Path, tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("x")
    with MLflowLogger(config, tmp_path / "run") as tracker:
        tracker.log_artifacts(tmp_path / "a b.txt")
    assert (home / "mlartifacts" / tracker.run_id / "artifacts" / "a b.txt").read_text() == "x"


@pytest.mark.slow
def test_a_server_that_is_not_there_is_named_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    config = Config.model_validate({"data": {"source": "digits"}})
    start = time.monotonic()
    with (
        pytest.raises(ConfigError, match=r"tracking.uri: MLflow cannot work with http://\*\*\*@127.0.0.1:9") as caught,
        MLflowLogger(config, tmp_path),
    ):
        raise AssertionError("the block must not be entered")
    assert "secret" not in str(caught.value)
    assert "tracking.uri=sqlite:///mlflow.db" in str(caught.value)
    assert time.monotonic() - start < 30
    assert mlflow.active_run() is None


def test_a_deleted_experiment_is_named_with_its_remedy(home: Path, client: MlflowClient, tmp_path: Path) -> None:
    config = config_for(home, "gone")
    with MLflowLogger(config, tmp_path / "run"):
        pass
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with (
        pytest.raises(ConfigError, match=r"'gone' was deleted in MLflow.*mlflow experiments restore"),
        MLflowLogger(config, tmp_path / "run"),
    ):
        raise AssertionError("the block must not be entered")


def test_a_run_that_mlflow_has_lost_is_begun_anew(config: Config, client: MlflowClient, tmp_path: Path) -> None:
    with MLflowLogger(config, tmp_path / "run", resumed=("sqlite:///elsewhere.db", "0" * 32)) as tracker:
        tracker.log_metrics({"train/loss": 1.0}, 3)
    assert tracker.run_id != "0" * 32
    run = client.get_run(tracker.run_id)
    assert run.data.params["seed"] == "42"
    assert run.data.metrics["train/loss"] == 1.0


def test_long_values_are_cut_to_what_mlflow_takes(home: Path, client: MlflowClient, tmp_path: Path) -> None:
    long = "x" * 7000
    with MLflowLogger(config_for(home, model={"weights": long}), tmp_path / "run") as tracker:
        pass
    assert client.get_run(tracker.run_id).data.params["model.weights"] == long[:6000]


def test_how_to_open_is_a_command_for_a_file_and_the_address_of_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pw@host/x")
    remote = MLflowLogger(Config.model_validate({"data": {"source": "digits"}}), tmp_path)
    assert remote.ui_command() == "https://***@host/x"
    assert remote.uri == "https://host/x", "what is noted in the run's directory holds no password"
    command = MLflowLogger(config_for(tmp_path), tmp_path).ui_command()
    assert command.endswith("-m mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1")


@pytest.mark.slow
def test_processes_that_start_together_share_a_new_database_silently(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.config.schema import Config\n"
        "from pipeline.tracking.mlflow_logger import MLflowLogger\n"
        "config = Config.model_validate({'data': {'source': 'digits'}, 'tracking': {'uri': 'sqlite:///mlflow.db'}})\n"
        "with MLflowLogger(config, Path(sys.argv[1])) as tracker:\n    tracker.on_log(1, {'train/loss': 1.0})\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"run{i}"],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert out == ""
        assert "alembic" not in err
        assert "mlflow" not in err.lower()
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert sorted(run.info.run_name for run in runs) == ["run0", "run1", "run2"]
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_weights_of_classes_with_any_name_are_params(config: Config, client: MlflowClient, tmp_path: Path) -> None:
    weights = {"lady's slipper": 5.0, "oak, white (Quercus)": 2.0}
    weighted = config.model_copy(update={"train": config.train.model_copy(update={"class_weights": weights})})
    with MLflowLogger(weighted, tmp_path / "run") as tracker:
        pass
    params = client.get_run(tracker.run_id).data.params
    assert params["train.class_weights.lady_s slipper"] == "5.0"
    assert params["train.class_weights.oak_ white _Quercus_"] == "2.0"
