"""train.py --dry-run says no where the training would, with its words."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_console import FakeConsole

from pipeline.cli import train
from pipeline.errors import UserError
from pipeline.training import memory

CONFIG = """
model: {variant: {width: 0.25, depth: 0.3, resolution: 32}, weights: null}
data: {source: digits}
train: {global_batch_size: 64, stages: [{epochs: 1}]}
"""
MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "map.yaml").write_text("eleven: [tench]\n")
    (tmp_path / "text.h5").write_text("not weights")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("not a run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path


def content(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "keras" not in path.parts}


def refusal(arguments: Sequence[str]) -> str:
    with pytest.raises((UserError, OSError)) as caught:
        train.main(FakeConsole(), ["--config", "config.yaml", *arguments])
    return f"{caught.type.__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["model.weights=absent.h5"], "absent.h5: there is no such file"),
        (["model.weights=text.h5"], "text.h5: is no weight file"),
        (["model.weights=full"], "full: has no model.keras"),
        (["model.variant=lite0", "model.weights=imagenet", "model.class_map=map.yaml"], "'eleven' is none of the data"),
        (["model.variant=b0", "model.weights=imagenet", "model.class_map=map.yaml"], "'eleven' is none of the data"),
        (["--run-dir", "full"], "full: already exists"),
        (["--run-dir", "config.yaml/run"], "config.yaml/run"),
        (["--run-dir", "/proc/run"], "/proc/run"),
        (["tracking.uri=sqlite:///text.h5"], "MLflow cannot work with sqlite:///"),
        (["runtime.data_service=[127.0.0.1:9]"], "nothing answers at 127.0.0.1:9"),
    ],
)
def test_a_dry_run_and_a_training_are_refused_with_the_same_words(
    folder: Path, arguments: list[str], reason: str
) -> None:
    before = content(folder)
    message = refusal([*arguments, "--dry-run"])
    assert reason in message
    assert content(folder) == before
    assert refusal(arguments) == message


@pytest.mark.parametrize(
    ("mib", "words"),
    [
        (20, "set train.gradient_accumulation_steps="),
        (1, "take a smaller variant or model.resolution"),
    ],
)
def test_a_batch_beyond_the_memory_is_refused_by_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mib: int, words: str
) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda: mib * MIB)
    message = refusal(["train.global_batch_size=512", "--dry-run"])
    assert "512 images per device and micro-batch" in message
    assert words in message
    assert refusal(["train.global_batch_size=512"]) == message


def test_the_batch_that_the_message_names_is_accepted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda: 20 * MIB)
    remedy = refusal(["train.global_batch_size=512", "--dry-run"]).partition("; set ")[2].partition(",")[0]
    assert (
        train.main(FakeConsole(), ["--config", "config.yaml", "train.global_batch_size=512", remedy, "--dry-run"]) == 0
    )


def test_a_stage_that_trains_the_head_is_not_refused_by_the_memory_of_all_layers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda: 20 * MIB)
    stages = "train.stages=[{epochs: 1, trainable: head}]"
    words = ["model.variant=lite0", "model.weights=imagenet", "train.global_batch_size=128", stages, "--dry-run"]
    assert train.main(FakeConsole(), ["--config", "config.yaml", *words]) == 0


def test_weights_that_are_to_be_downloaded_are_announced_and_nothing_is_fetched(folder: Path) -> None:
    console = FakeConsole()
    words = ["model.variant=b0", "model.weights=imagenet", "train.global_batch_size=8", "--dry-run"]
    assert train.main(console, ["--config", "config.yaml", *words]) == 0
    assert "efficientnetb0.h5 is not on this machine yet: training will download it" in " ".join(console.output.split())
    assert not (folder / "keras").exists()


def test_a_dry_run_with_a_run_directory_leaves_none(folder: Path) -> None:
    before = content(folder)
    assert train.main(FakeConsole(), ["--config", "config.yaml", "--run-dir", "a/b/c", "--dry-run"]) == 0
    assert train.main(FakeConsole(), ["--config", "config.yaml", "--dry-run"]) == 0
    assert content(folder) == before
