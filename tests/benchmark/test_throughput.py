"""The bench: what it times, in which order, and plain Keras beside it."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

from pipeline.benchmark import keras_baseline, keras_fit
from pipeline.benchmark import throughput as bench
from pipeline.benchmark.throughput import BenchmarkResult, ThroughputBenchmark, ThroughputTimer
from pipeline.config.schema import Config
from pipeline.console import Console
from pipeline.errors import ConfigError, RunError

PROJECT = Path(__file__).parents[2]
TINY = "{width: 0.25, depth: 0.3, resolution: 32}"
CROP_FLIP = ({"RandomResizedCrop": {"scale": [0.5, 1.0]}}, {"HorizontalFlip": {}})


class Quiet(Console):
    """Leaves the test's own output alone."""

    def print(self, text: object = "", *, details: str | None = None, wrap: bool = True) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for number in range(32):
        folder = root / f"class {number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{number}.jpg")
    return root


def config(image_folder: Path, **sections: object) -> Config:
    return Config.model_validate(
        {
            "model": {"variant": {"width": 0.25, "depth": 0.3, "resolution": 32}, "weights": None},
            "data": {"source": "folder", "path": image_folder},
            "augment": {"transforms": CROP_FLIP},
            "train": {"global_batch_size": 8, "stages": [{"epochs": 1}]},
            **sections,
        }
    )


def test_rounds_leave_out_the_compilation_and_the_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    clock, paused = ThroughputTimer(), []

    def pause() -> None:
        paused.append(now[0])
        now[0] += 1000.0

    clock.begin(seconds=4.0, batch_size=10, rounds=2, pause=pause)
    # compiled, warm-up, a round; behind the pause, a round
    for step, seconds in enumerate((60.0, 5.0, 2.0, 2.0, 9.0, 1.0, 1.0, 1.0, 1.0), 1):
        now[0] += seconds
        clock.on_progress(step, {})
    assert clock.is_over()
    assert clock.rates == [2 * 10 / 4.0, 4 * 10 / 4.0]
    assert paused == [69.0, 1082.0]


@pytest.mark.parametrize(("step", "stream", "bound"), [(10.0, 30.0, "step"), (50.0, 20.0, "stream")])
def test_the_slower_one_holds_training_back(step: float, stream: float, bound: str) -> None:
    assert BenchmarkResult(step, stream, 10.0, 1.0, 1.0, 1.0, {}, 0).bound == bound


@pytest.mark.slow
def test_the_command_times_step_stream_and_both_and_writes_them_down(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"model: {{variant: {TINY}, weights: null}}\ndata: {{source: folder, path: {image_folder}}}\n"
        "augment: {transforms: [{RandomResizedCrop: {}}], randaugment: {num_ops: 1, magnitude: 5}, mixup: 0.2}\n"
        "train: {global_batch_size: 8, stages: [{epochs: 1}, {epochs: 1, trainable: head}]}\n"
    )
    words = ["--config", "config.yaml", "--stage", "1", "--seconds", "1", "--json", "figures.json"]
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", "bench", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["parts"]) == ["read", "decode and crop", "resize and flip", "RandAugment", "batch", "mix"]
    assert all(value >= 0 for value in figures["parts"].values())
    assert min(figures["step"], figures["stream"], figures["training"]) > 0
    assert 0.3 < figures["share"] < 3
    assert figures["first_step_seconds"] > 8 / figures["step"]
    assert figures["peak_bytes"] > 2**28
    assert "8 images per step, training all" in figures["what"]
    assert f"the {figures['bound']} is what holds training back" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "figures.json"], (
        "nothing else is written"
    )


@pytest.mark.slow
def test_training_and_keras_are_timed_in_turns(image_folder: Path) -> None:
    pairs = keras_baseline.run_keras_baseline(
        ThroughputBenchmark(config(image_folder), Quiet()), "keras-fit", seconds=0.3, pairs=2
    )
    assert len(pairs) == 2
    assert all(here > 0 and there > 0 for here, there in pairs)


@pytest.mark.slow
def test_keras_steps_are_timed_without_files() -> None:
    digits = Config.model_validate(
        {
            "model": {"variant": {"width": 0.25, "depth": 0.3, "resolution": 32}, "weights": None},
            "data": {"source": "digits"},
            "train": {"global_batch_size": 8, "stages": [{"epochs": 1}]},
        }
    )
    measured = ThroughputBenchmark(digits, Quiet())
    with pytest.raises(ConfigError, match=r"take a config whose data\.source is folder or csv"):
        keras_baseline.run_keras_baseline(measured, "keras-fit", seconds=0.1, pairs=1)
    assert (
        statistics.median(
            here / there
            for here, there in keras_baseline.run_keras_baseline(measured, "keras-step", seconds=0.3, pairs=1)
        )
        > 0
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"augment": {"transforms": CROP_FLIP, "mixup": 0.2}},
        {"augment": {"transforms": CROP_FLIP, "randaugment": {"num_ops": 2, "magnitude": 9}}},
        {"augment": {"transforms": [{"HorizontalFlip": {}}]}},
        {"augment": {"transforms": [CROP_FLIP[0], {"HorizontalFlip": {"p": 1.0}}]}},
        {"train": {"global_batch_size": 8, "stages": [{"epochs": 1, "use_augmentation": False}]}},
    ],
)
def test_unequal_work_is_not_compared(image_folder: Path, changed: dict[str, object]) -> None:
    wanted = config(image_folder, **changed)
    stand_in = SimpleNamespace(source=bench.open_source(wanted.data), config=wanted)
    with pytest.raises(ConfigError, match="compares equal work"):
        keras_baseline._files(stand_in)  # type: ignore[arg-type]


def test_the_last_line_of_keras_is_in_the_error_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "fit.py"
    program.write_text(
        "import json, sys\nprint('loading', file=sys.stderr)\njson.loads(sys.stdin.readline())['dtype']\n"
    )
    monkeypatch.setattr(keras_fit, "__file__", str(program))
    with (
        pytest.raises(RunError, match=r"Keras ended with exit code 1: KeyError: 'dtype'"),
        keras_baseline._keras_process({"files": None}) as ask,
    ):
        ask()


SPEC = {
    "resolution": 32,
    "classes": 3,
    "dtype": "float32",
    "optimizer": "AdamW",
    "optimizer_arguments": {"weight_decay": 1e-4},
    "learning_rate": 1e-3,
    "label_smoothing": 0.1,
    "batch_size": 4,
}


def test_kerass_own_network_trains_the_same_layers() -> None:
    names = ["predictions", "top_bn", "top_conv"]
    model = keras_fit.network(SPEC | {"variant": "b0", "trainable": names})
    assert {layer.name for layer in model.layers if layer.trainable and layer.trainable_variables} == set(names)
    with keras.StatelessScope(initialize_variables=False):  # shapes only
        reference = keras.applications.EfficientNetB0(weights=None, classes=3)
    assert model.count_params() == reference.count_params()
    other = {
        "name": "x",
        "width": 0.25,
        "depth": 0.3,
        "resolution": 32,
        "dropout": 0.2,
        "family_name": "efficientnet_lite",
    }
    tiny = keras_fit.network(SPEC | {"variant": "x", "multipliers": other, "trainable": names})
    assert {type(layer).__module__.split(".")[0] for layer in tiny.layers} == {"keras"}


def test_keras_is_fed_crops_of_the_files(image_folder: Path) -> None:
    files = sorted(map(str, image_folder.rglob("*.jpg")))
    spec = SPEC | {"files": files, "labels": [0] * len(files), "scale": [0.5, 1.0], "ratio": [0.75, 1.33], "flip": True}
    images, labels = next(iter(keras_fit.dataset(spec)))
    assert images.shape == (4, 32, 32, 3)
    assert 0 <= images.numpy().min() < 60 < 200 < images.numpy().max() <= 255
    np.testing.assert_array_equal(labels, np.eye(3)[[0, 0, 0, 0]])


def test_rates_are_medians_and_the_share_is_one_of_neighbours(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = ThroughputBenchmark.__new__(ThroughputBenchmark)
    measured._console = Quiet()
    steps, streams = iter([(9.0, 10.0), (0.1, 20.0), (0.1, 30.0)]), iter([(1.0, 90.0), (0.1, 15.0), (0.1, 90.0)])
    both = iter([9.9, 14.7, 29.1])
    monkeypatch.setattr(ThroughputBenchmark, "time_step", lambda self, seconds: next(steps))
    monkeypatch.setattr(ThroughputBenchmark, "time_stream", lambda self, seconds: next(streams))
    monkeypatch.setattr(ThroughputBenchmark, "train_for", lambda self, seconds: next(both))
    monkeypatch.setattr(ThroughputBenchmark, "time_parts", lambda self: {"read": 1.0})
    figures = measured.measure(3.0)
    assert (figures.step, figures.stream, figures.training) == (20.0, 90.0, 14.7)
    assert figures.share == pytest.approx(0.98), "of 0.99, 0.98 and 0.97, each of the smaller one of its own round"
    assert (figures.first_step_seconds, figures.first_batch_seconds) == (9.0, 1.0)


def test_a_stage_that_the_recipe_does_not_make_is_refused(image_folder: Path) -> None:
    small = {"variant": "lite0", "resolution": 32}
    auto = Config.model_validate({"recipe": "auto", "model": small, "data": {"source": "folder", "path": image_folder}})
    with pytest.raises(ConfigError, match=r"stage 2: train\.stages has the stages 1 to 1"):
        ThroughputBenchmark(auto, Quiet(), stage=2)
