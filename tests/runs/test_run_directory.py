"""Runs are found again, and nothing of an old one is overwritten."""

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
    run.begin(config)
    return run


def finish(run: RunDirectory, at: int) -> RunDirectory:
    for model in (run.best, run.model):
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
    run.note_mlflow_run("sqlite:///a.db", "abc123")
    assert run_directory.find("abc123").path == run.path
    assert run_directory.find("runs/mine").mlflow_run() == ("sqlite:///a.db", "abc123")


@pytest.mark.parametrize(
    ("name", "message"),
    [("latest", "holds no finished run"), ("x", "is neither a directory"), (".", "is not a run's directory")],
)
def test_what_is_no_run_is_refused(name, message):
    with pytest.raises(RunError, match=message):
        run_directory.find(name)


def test_nothing_is_overwritten_but_an_attempt_that_never_began():
    run = begun(Path("mine"), CONFIG)
    run.log.touch()
    begun(Path("mine"), CONFIG)
    run.manifest.touch()
    with pytest.raises(RunError, match="holds an unfinished run; go on with it by --resume"):
        begun(Path("mine"), CONFIG)
    run.model.touch()
    with pytest.raises(RunError, match="nothing in it is overwritten"):
        begun(Path("mine"), CONFIG)
    Path("file").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        begun(Path("file"), CONFIG)
    assert Path("file").read_text() == "mine"


def test_a_run_is_one_processs_at_a_time_and_free_again_however_that_one_ends(tmp_path):
    run = begun(Path("mine"), CONFIG)
    code = "import pathlib, pipeline.runs.run_directory as r\nwith r.RunDirectory(pathlib.Path('mine')).alone(): print('in', flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout.readline() == b"in\n"
    with pytest.raises(RunError, match="mine: another process is at work on this run"), run.exclusive_lock():
        pass
    process.kill()
    process.wait()
    with run.exclusive_lock():
        pass


def test_mlflows_run_is_left_behind_by_a_first_attempt_with_another_config():
    run = begun(Path("mine"), CONFIG)
    run.note_mlflow_run("sqlite:///a.db", "abc123")
    run.begin(CONFIG)
    assert run.mlflow_run() is not None
    run.begin(Config.model_validate({**CONFIG.model_dump(), "seed": 1}))
    assert run.mlflow_run() is None
    assert run.load_config().seed == 1


def test_what_a_kill_left_of_a_run_before_its_first_checkpoint_is_gone_on_with_not_overwritten():
    run = begun(Path("mine"), CONFIG)
    (run.path / "manifest.parquet.part").touch()
    with pytest.raises(RunError, match="holds an unfinished run"):
        begun(Path("mine"), CONFIG)
