"""Runs can be found, and an earlier run is never overwritten."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.schema import Config
from pipeline.errors import RunError
from pipeline.runs import run_directory
from pipeline.runs.run_directory import RunDirectory

CONFIG = Config.model_validate({"data": {"source": "digits"}, "tracking": {"experiment": "tries"}})


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def begun(path: Path | None, config: Config) -> RunDirectory:
    run = run_directory.create(path, config.tracking.experiment)
    run.save_config(config)
    return run


def finish(run: RunDirectory, at: int) -> RunDirectory:
    for model in (run.best_model, run.model):
        model.parent.mkdir(exist_ok=True)
        model.touch()
        os.utime(model, (at, at))
    return run


def test_two_runs_of_one_second_get_two_directories():
    first, second = begun(None, CONFIG), begun(None, CONFIG)
    assert first.path != second.path
    assert first.path.parent == second.path.parent == Path("runs/tries")
    assert first.load_config() == CONFIG


def test_latest_is_the_newest_finished_run_wherever_it_stands_under_runs():
    finish(begun(None, CONFIG), 1000)
    named = finish(begun(Path("runs/mine"), CONFIG), 2000)
    begun(Path("runs/unfinished"), CONFIG)
    assert run_directory.find("latest").path == named.path


def test_a_run_is_found_by_its_directory_and_by_its_mlflow_id():
    run = begun(Path("runs/mine"), CONFIG)
    assert run.mlflow_run() is None
    run.save_mlflow_run("sqlite:///a.db", "abc123")
    assert run_directory.find("abc123").path == run.path
    assert run_directory.find("runs/mine").mlflow_run() == ("sqlite:///a.db", "abc123")


@pytest.mark.parametrize(
    ("name", "message"),
    [("latest", "holds no finished run"), ("x", "is neither a directory"), (".", "is not the directory of a run")],
)
def test_a_name_that_is_no_run_is_refused(name, message):
    with pytest.raises(RunError, match=message):
        run_directory.find(name)


def test_only_an_attempt_that_failed_before_its_data_were_read_is_overwritten():
    run = begun(Path("mine"), CONFIG)
    run.log.touch()
    begun(Path("mine"), CONFIG)
    run.manifest.touch()
    with pytest.raises(RunError, match="holds an unfinished run; continue it with --resume"):
        begun(Path("mine"), CONFIG)
    run.model.touch()
    with pytest.raises(RunError, match="already exists and is not overwritten"):
        begun(Path("mine"), CONFIG)
    Path("file").write_text("mine")
    with pytest.raises(RunError, match="already exists"):
        begun(Path("file"), CONFIG)
    assert Path("file").read_text() == "mine"


def test_a_run_is_one_processs_at_a_time_and_free_again_however_that_one_ends(tmp_path):
    run = begun(Path("mine"), CONFIG)
    code = (
        "import pathlib, pipeline.runs.run_directory as r\n"
        "with r.RunDirectory(pathlib.Path('mine')).exclusive_lock(): print('in', flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout.readline() == b"in\n"
    with pytest.raises(RunError, match="mine: another process is working on this run"), run.exclusive_lock():
        pass
    process.kill()
    process.wait()
    with run.exclusive_lock():
        pass


def test_a_first_attempt_with_another_config_gets_another_run_in_mlflow():
    run = begun(Path("mine"), CONFIG)
    run.save_mlflow_run("sqlite:///a.db", "abc123")
    run.save_config(CONFIG)
    assert run.mlflow_run() is not None
    run.save_config(Config.model_validate({**CONFIG.model_dump(), "seed": 1}))
    assert run.mlflow_run() is None
    assert run.load_config().seed == 1


def test_a_run_killed_before_its_first_checkpoint_is_not_overwritten():
    run = begun(Path("mine"), CONFIG)
    (run.path / ".new-manifest.parquet").touch()
    with pytest.raises(RunError, match="holds an unfinished run"):
        begun(Path("mine"), CONFIG)
