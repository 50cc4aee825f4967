"""python -m pipeline as a user runs it."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from fake_console import FakeConsole
from hypothesis import given
from hypothesis import strategies as st
from launching import Ended, LauncherProcess

from pipeline.__main__ import COMMANDS
from pipeline.cli import check, predict, scale, train
from pipeline.cli.arguments import BYTES, COUNT, SECONDS, program_name, quantity, value_range
from pipeline.config.loader import load_config
from pipeline.console import DEBUG, is_debugging
from pipeline.models import compound_search

PROJECT = Path(__file__).parents[2]
BENCH = ("bench", "--config", "configs/lite0_digits.yaml")


Run = Callable[..., Ended]


@pytest.fixture
def run(launcher_process: LauncherProcess) -> Run:
    """Runs python -m pipeline."""
    return partial(launcher_process.run, PROJECT, "-m", "pipeline")


OPTIONS = {
    "train": "--resume",
    "evaluate": "--tta",
    "predict": "--top",
    "compare": "--split",
    "export": "--formats",
    "check": "--json",
    "pack": "--tfrecord",
    "data-server": "--address",
    "bench": "--baseline",
    "schema": "--out",
    "scale": "--latency",
}


@pytest.mark.parametrize("program", [["train.py"], ["evaluate.py"], ["-m", "pipeline"]])
def test_outside_the_environment_the_remedy_is_named(program: list[str]) -> None:
    command = [sys.executable, "-S", *program, "--help"]  # -S: without the installed packages
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: \S+ has no package \w+; run `make setup` .*\n", result.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_instant_and_loads_no_tensorflow(command: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", command, "--help"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2, "seconds of processor time"
    assert f"usage: python -m pipeline {command} " in result.stdout
    assert OPTIONS[command] in result.stdout
    assert "--debug" in result.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "pipeline" in loaded
    assert not loaded & {"tensorflow", "keras", "mlflow", "pandas"}


def test_the_commands_are_listed_and_an_unknown_one_is_refused(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    assert re.findall(r"^    ([a-z][a-z-]*)", result.stdout, re.MULTILINE) == list(COMMANDS)
    result = run("serve")
    assert result.code == 2
    assert "invalid choice: 'serve'" in result.stderr


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("train.py", "train.py"),
        ("/usr/bin/efficientnet", "efficientnet train"),
        ("pipeline/__main__.py", "python -m pipeline train"),
        ("evaluate.py", "python -m pipeline train"),
    ],
)
def test_the_usage_names_the_program_as_it_was_started(
    program: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    assert program_name("train") == words


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (train, ["--config", "x.yaml", "a=1", "--debug", "b=2"]),
        (predict, ["--run", "latest", "a.png", "--debug", "b.png"]),
        (check, ["--debug", "--config", "x.yaml"]),
    ],
)
def test_debug_is_an_option_of_every_command_and_sets_what_the_console_reads(
    command: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG, "0")
    assert not is_debugging()
    command.parse_arguments(arguments)
    assert is_debugging()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scale", "--latency", "50parsecs"], "write it like 50ms (units: us, ms, s)"),
        (["scale", "--latency", "50"], "write it like 50ms"),
        (["scale", "--memory", "4G"], "KiB, MiB, GiB"),
        (["scale", "--params", "-8e6"], "--params"),
        (["scale", "--params", "0"], "above 0"),
        (["scale", "--params", "8e6", "--search"], "one at a time"),
        (["scale", "--params", "8e6", "--write", "x.yaml"], "--data-path"),
        (["scale", "--write", "x.yaml", "--data-path", "p"], "needs a budget"),
        (["scale", "--search", "--alpha", "2:1:0.1"], "must rise"),
        (["scale", "--params", "8e6", "--write", "pyproject.toml", "--data-path", "p"], "exists already"),
        (["scale", "--params", "8e6", "--write", "none/x.yaml", "--data-path", "p"], "no folder none"),
        ([*BENCH, "--seconds", "0"], "--seconds must be above 0"),
        ([*BENCH, "--pairs", "0"], "argument --pairs: '0' is not an integer above 0"),
        ([*BENCH, "--stage", "3"], "stage 3: train.stages has the stages 1 to 1"),
        ([*BENCH, "--baseline", "torch"], "invalid choice: 'torch'"),
        ([*BENCH, "--json", "none/x.json"], "there is no folder none"),
        (["data-server", "--address", "here"], "write it like host1:5050"),
        (["pack", "--config", "configs/lite0_digits.yaml"], "--out names the folder"),
        (["pack", "--verify", "tests", "--out", "x"], "--out names the folder"),
        (["pack", "--verify", "tests"], "tests holds no finished pack"),
        (["pack", "--config", "configs/lite0_digits.yaml", "--out", "tests"], "tests exists and is no pack"),
        (
            ["pack", "--config", "configs/lite0_digits.yaml", "--out", "x", "--first-label", "1"],
            "--first-label belongs to --tfrecord and --webdataset",
        ),
        (["pack", "--tfrecord", "x", "--out", "x", "--root", "y"], "--root belongs to --csv"),
        (["pack", "--csv", "x.csv", "--out", "x", "--columns", "file=path"], "--columns file=path: write path=NAME"),
        (["pack", "--csv", "none.csv", "--out", "x"], "--csv none.csv cannot be read: No such file"),
        (["pack", "--webdataset", "none-{0..3}.tar", "--out", "x"], "none-{0..3}.tar: there is no such file"),
        (["pack", "--csv", "s5://b/a.csv", "--out", "x"], "s5://b/a.csv is no address that fsspec knows"),
        (["pack", "--tfrecord", "train=none-*", "--out", "x"], "--tfrecord train=none-*: there is no such file"),
        (["pack", "--config", "configs/lite0_digits.yaml", "--out", "x", "--shard-size", "5"], "write it like 256MB"),
        (
            ["export", "--run", "tests", "--formats", "onnx,litret"],
            "there is no format 'litret'; did you mean 'litert'?",
        ),
        (["export", "--run", "tests", "data.resize=squash"], "only keys of export can be changed here"),
        (["export", "--run", "tests"], "tests: is not the directory of a run"),
    ],
)
def test_a_wrong_request_is_refused_by_name(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("units", "unit"), [(units, unit) for units in (COUNT, BYTES, SECONDS) for unit in units])
def test_a_unit_multiplies(units: dict[str, float], unit: str) -> None:
    assert quantity(units, "")(f"1.5{unit}") == 1.5 * units[unit]


@given(st.integers(1000, 2000), st.integers(0, 50), st.integers(1, 100))
def test_a_range_holds_both_ends(start: int, count: int, step: int) -> None:
    stop = start + count * step
    if stop <= 4000:
        values = value_range(f"{start / 1000}:{stop / 1000}:{step / 1000}")
        assert values == pytest.approx([(start + i * step) / 1000 for i in range(count + 1)])


@pytest.mark.slow
def test_the_largest_network_is_written_as_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compound_search, "LARGEST_PHI", -5)  # fewer and smaller networks to build
    file, console = tmp_path / "my.yaml", FakeConsole()
    arguments = ["--params", "900K", "--classes", "10", "--write", str(file), "--data-path", "PHOTOS"]
    assert scale.main(console, arguments) == 0
    assert "binds" in console.output
    assert load_config(file).data.path == Path("PHOTOS")


def completions(line: str, folder: Path) -> list[str]:
    """What the shell is offered for a line, as argcomplete's shell function asks for it."""
    code = "import sys; sys.argv = ['efficientnet']; from pipeline.__main__ import run; sys.exit(run())"
    environment = {
        **os.environ,
        "PYTHONPATH": str(PROJECT),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "answer"),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    }
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=False, capture_output=True)
    return (folder / "answer").read_text().split("\n")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("efficientnet da", ["data-server"]),
        ("efficientnet train --res", ["--resume"]),
        ("efficientnet train --config lite0_di", ["lite0_digits"]),
        ("efficientnet check --config m", ["mine.yaml"]),
        ("efficientnet evaluate --split ", ["train", "val", "test"]),
        ("efficientnet data-server --b", ["--bind"]),
    ],
)
def test_the_shell_completes_commands_options_values_and_configs(line: str, offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "map.txt").touch()
    assert completions(line, tmp_path) == offered


@pytest.mark.parametrize("words", [["--config", "lite0_digits"], ["--config", "./lite0_digits"]])
def test_a_name_is_a_shipped_config_and_a_path_is_a_file(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = train.parse_arguments(words).config
    assert path == (PROJECT / "configs/lite0_digits.yaml" if words[1] == "lite0_digits" else Path("lite0_digits"))


def test_an_unknown_name_is_answered_with_the_nearest_shipped_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train.parse_arguments(["--config", "lite0_digit"])
    assert "neither a file nor a shipped config 'lite0_digit'; did you mean 'lite0_digits'?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_family_has_the_published_rows(run: Run) -> None:
    lines = [line for line in run("scale").stdout.splitlines() if line.strip()]
    table = lines[: [line.split()[0] for line in lines].index("lite4") + 1]
    assert max(map(len, table)) <= 80
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["b0"][1:8] == ["1.0", "1.0", "224", "0.2", "16", "5,288,548", "0.39"]
    assert rows["l2"][1:8] == ["4.3", "5.3", "800", "0.5", "88", "480,309,308", "475.70"]
    assert rows["lite4"][5:7] == ["30", "13,006,568"]


def test_a_search_lists_the_papers_triple(run: Run) -> None:
    lines = run("scale", "--search", "--alpha", "1.2", "--beta", "1.1", "--gamma", "1.15").stdout.splitlines()
    assert lines[1].split()[:4] == ["1.2", "1.1", "1.15", "1.920"]
