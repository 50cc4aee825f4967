"""A run survives anything: real processes of train.py on an EfficientNet, ended in every place where it could hurt.

A life is one run that is ended again and again and gone on with each time. The places are drawn from a seed. After
every fault it is checked that the process ended where it should, that every checkpoint equals that of the uninterrupted
run at the same step bit by bit, and that MLflow has the run once and with the right status; at the end of the life,
that the whole result is the same.
"""

import hashlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from launcher import PROJECT, TRAIN_STEP
from launching import LauncherProcess, RunLauncher
from PIL import Image

from pipeline.config.loader import load_config
from pipeline.tracking.mlflow_store import import_mlflow
from pipeline.training import checkpoint

pytestmark = pytest.mark.timeout(1200)
SEED = 20
CONFIG = """
model: {variant: {width: 0.1, depth: 0.3, resolution: 32}, weights: null, batch_norm_momentum: 0.9}
data: {source: folder, path: photos, resize: squash}
augment:
  transforms: [{RandomResizedCrop: {scale: [0.5, 1.0]}}, HorizontalFlip]
  randaugment: {num_ops: 2, magnitude: 9}
  mixup: 0.2
optimizer: {base_lr: 0.5, warmup_epochs: 0.5, ema_decay: 0.9}
train:
  global_batch_size: 16
  stages: [{epochs: 2, trainable: block7}, {epochs: 2}]
  checkpoint_every_steps: 2
runtime: {precision: float32, num_workers: 2}
tracking: {experiment: faults}
"""
EPOCH, STAGE, END = 4, 8, 16  # steps
VARIANTS = {
    "one device": [],
    "two devices": ["runtime.strategy=mirrored"],
    "bfloat16": ["runtime.precision=bfloat16"],
    "albumentations": [
        "augment.backend=albumentations",
        "augment.transforms=[{RandomResizedCrop: {scale: [0.5, 1.0]}}, HorizontalFlip, {Rotate: {limit: 20}}]",
    ],
    "accumulation": ["train.gradient_accumulation_steps=2"],
    "features": [  # of a frozen backbone, computed once
        "train.stages=[{epochs: 2, trainable: head, use_augmentation: false}, {epochs: 2, layer_decay: 0.8}]",
        "train.class_weights={class 1: 2}",
    ],
}
FILES = ("model.npz", "optimizer.npz", "average.npz", "totals.npz", "metadata.json", "metadata.sha256")
SAVE, VALIDATION = "pipeline.training.checkpoint:_write_synced", "pipeline.evaluation.predictor:Predictor.__call__"
FIGURES = "pipeline.evaluation.metrics:evaluate_predictions"


# --- faults -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One way in which a process can end.

    Attributes:
        name: In words.
        steps: Steps behind which it may happen, counted from the start of the run.
        traps: What the launcher sets, given that step.
        code: The process's exit code.
        status: The run's in MLflow afterwards.
        damage: What happens to the files of the run besides.
    """

    name: str
    steps: Sequence[int]
    traps: Callable[[int], list[dict[str, Any]]]
    code: int = -signal.SIGKILL
    status: str = "RUNNING"
    damage: str | None = None


def trap(function: str, when: str, action: str = "kill", **further: Any) -> Callable[[int], list[dict[str, Any]]]:
    """One trap; `{step}` in `match` becomes the number of the step."""

    def at(step: int) -> list[dict[str, Any]]:
        match = {"match": further["match"].format(step=step)} if "match" in further else {}
        return [{"function": function, "when": when, "action": action, **further, **match}]

    return at


def several(*traps: Callable[[int], list[dict[str, Any]]]) -> Callable[[int], list[dict[str, Any]]]:
    """Traps that are sprung one after the other."""
    return lambda step: [one for make in traps for one in make(step)]


STEPS, SAVES, EPOCHS = range(1, END), range(2, END + 1, 2), range(EPOCH, END + 1, EPOCH)
PRUNES = (6, 10, 14)  # there a checkpoint becomes superfluous that is not an epoch's
AFTER_STEP = trap(TRAIN_STEP, "after")
KILLED_IN_STEP = Fault("kill -9 in an epoch", STEPS, AFTER_STEP)
KILLED_IN_FILE = {
    file: Fault(
        f"kill -9 in the middle of writing {file}",
        SAVES,
        trap(SAVE, "before", "half", match=f".step-{{step:08d}}/{file}"),
    )
    for file in FILES
}
BEFORE_RENAME = Fault(
    "kill -9 before the rename", SAVES, trap("pathlib:Path.rename", "before", match="/.step-{step:08d}")
)
AFTER_RENAME = Fault(
    "kill -9 between rename and clean-up", SAVES, trap("pathlib:Path.rename", "after", match="/.step-{step:08d}")
)
BEFORE_REMOVAL = Fault("kill -9 before a removal", PRUNES, trap("shutil:rmtree", "before", match="/.old-step-", call=2))
IN_REMOVAL = Fault("kill -9 in a removal", PRUNES, trap("os:unlink", "after", match=".npz", call=2))
BEFORE_VALIDATION = Fault("kill -9 at the start of validation", EPOCHS, trap(VALIDATION, "before"))
IN_VALIDATION = Fault("kill -9 in validation", EPOCHS, trap(FIGURES, "before"))
TERMINATED_IN_VALIDATION = Fault("SIGTERM in validation", EPOCHS, trap(FIGURES, "before", "term"), 143, "KILLED")
BEFORE_STAGE = Fault("kill -9 in a change of stage", [STAGE], trap("pipeline.training.trainer:set_trainable", "before"))
IN_STAGE = Fault(
    "kill -9 in a change of stage", [STAGE], trap("pipeline.training.train_step:TrainStep.__init__", "after")
)
TERMINATED = Fault("SIGTERM in an epoch", STEPS, trap(TRAIN_STEP, "after", "term"), 143, "KILLED")
TERMINATED_IN_SAVE = Fault(
    "SIGTERM while saving", SAVES, trap(SAVE, "before", "term", match=".step-{step:08d}/average.npz"), 143, "KILLED"
)
INTERRUPTED = Fault(
    "SIGINT twice", STEPS, several(trap(TRAIN_STEP, "after", "int"), trap(TRAIN_STEP, "after", "int")), 130, "KILLED"
)
INTERRUPTED_IN_SAVE = Fault(
    "SIGINT, and again while saving",
    STEPS,
    several(trap(TRAIN_STEP, "after", "int"), trap(SAVE, "before", "int", match=".step-{step:08d}/optimizer.npz")),
    130,
    "KILLED",
)
FLIPPED = {
    file: Fault(f"kill -9, and a bit of the newest {file} flipped", range(5, END), AFTER_STEP, damage=file)
    for file in ("model.npz", "average.npz", "metadata.json")
}
SECOND_PROCESS = Fault("a second process, then kill -9", STEPS, several(trap(TRAIN_STEP, "after", "wait"), AFTER_STEP))
IN_SCAN = Fault("kill -9 while the data are read", [0], trap("pipeline.data.validation:scan", "before"))
BEFORE_FIRST = Fault("kill -9 before the first checkpoint", [1], AFTER_STEP)
IN_EVALUATION = Fault("kill -9 in the evaluation at the end", [END], trap(VALIDATION, "before", call=2))
TERMINATED_IN_EVALUATION = Fault(
    "SIGTERM in the evaluation at the end", [END], trap(VALIDATION, "before", "term", call=2), 143, "KILLED"
)
BEFORE_END = Fault(
    "kill -9 before the last rename", [END], trap("pathlib:Path.replace", "before", match="final.keras", call=2)
)

LIVES: dict[str, tuple[str, list[Fault]]] = {  # name -> variant, faults
    "files": ("one device", [IN_SCAN, *KILLED_IN_FILE.values(), IN_EVALUATION]),
    "renames": (
        "one device",
        [BEFORE_FIRST, BEFORE_RENAME, AFTER_RENAME, BEFORE_REMOVAL, IN_REMOVAL, IN_VALIDATION, KILLED_IN_STEP],
    ),
    "signals": (
        "one device",
        [TERMINATED, INTERRUPTED, TERMINATED_IN_VALIDATION, IN_STAGE, INTERRUPTED_IN_SAVE, TERMINATED_IN_SAVE],
    ),
    "damage": ("one device", [*FLIPPED.values(), SECOND_PROCESS, BEFORE_VALIDATION, BEFORE_END]),
    "steps": ("one device", [*[KILLED_IN_STEP] * 4, BEFORE_STAGE, IN_VALIDATION, TERMINATED_IN_EVALUATION]),
    "two devices": (
        "two devices",
        [KILLED_IN_STEP, KILLED_IN_FILE["optimizer.npz"], TERMINATED_IN_VALIDATION, BEFORE_STAGE],
    ),
    "bfloat16": ("bfloat16", [TERMINATED, KILLED_IN_FILE["model.npz"], IN_VALIDATION, KILLED_IN_STEP]),
    "albumentations": ("albumentations", [INTERRUPTED, KILLED_IN_STEP, AFTER_RENAME, IN_STAGE]),
    "accumulation": ("accumulation", [KILLED_IN_STEP, KILLED_IN_FILE["totals.npz"], TERMINATED, FLIPPED["model.npz"]]),
    "features": ("features", [KILLED_IN_STEP, KILLED_IN_FILE["average.npz"], TERMINATED, BEFORE_STAGE]),
}


def drawn(life: str) -> list[tuple[Fault, int]]:
    """The faults of a life, each with the step behind which it happens, no two behind one step, in the steps' order."""
    generator = random.Random(f"{SEED} {life}")
    while True:
        steps = [generator.choice(fault.steps) for fault in LIVES[life][1]]
        if len(set(steps)) == len(steps):
            return sorted(zip(LIVES[life][1], steps, strict=True), key=lambda pair: pair[1])


# --- runs -------------------------------------------------------------------------------------------------------------


class Launcher(RunLauncher):
    """Runs train.py in one folder, and knows what MLflow has of it."""

    def __init__(self, folder: Path, launcher: LauncherProcess) -> None:
        super().__init__(folder, launcher)
        import_mlflow()
        from mlflow import MlflowClient

        self.client = MlflowClient(f"sqlite:///{folder}/mlflow.db")

    def start(
        self,
        run: str,
        *arguments: str,
        variant: str = "one device",
        traps: Sequence[dict] = (),
        poison: dict | None = None,
    ) -> None:
        """Starts a process of a run; `ended` waits for its end."""
        self.marker(run).unlink(missing_ok=True)
        devices = 2 if variant == "two devices" else 1
        self.launch(
            run,
            "--config",
            "config.yaml",
            *VARIANTS[variant],
            *arguments,
            traps=list(traps),
            poison=poison,
            devices=devices,
        )

    def run(self, run: str, *arguments: str, **keywords: Any) -> int:
        """Runs a process of a run to its end; returns its exit code."""
        self.start(run, *arguments, **keywords)
        return self.ended()

    def sprung(self, run: str) -> list[dict[str, Any]]:
        """Their contents."""
        marker = self.marker(run)
        return [json.loads(line) for line in marker.read_text().splitlines()] if marker.exists() else []

    def mlflow_run(self, run: str) -> Any:
        """The one run that MLflow has of a run."""
        [experiment] = self.client.search_experiments(filter_string="name = 'faults'")
        [found] = self.client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run}'")
        return found

    def metrics(self, run: str) -> dict[tuple[str, int], float]:
        """Every value that MLflow has of a run; none may be there twice."""
        logged, values = self.mlflow_run(run), {}
        for key in logged.data.metrics:
            if not key.startswith("system/"):
                for metric in self.client.get_metric_history(logged.info.run_id, key):
                    assert (key, metric.step) not in values, f"{key} has step {metric.step} twice"
                    values[key, metric.step] = metric.value
        return values

    def whole(self, variant: str) -> str:
        """The uninterrupted run, with a checkpoint for every step; made when first asked for."""
        name = f"whole {variant}"
        if not (self.folder / name).exists():
            assert self.run(name, "train.checkpoint_every_steps=1", "train.max_checkpoints=1000", variant=variant) == 0
        return name


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory, launcher_process: LauncherProcess) -> Launcher:
    """A launcher in a folder with generated images in three classes, and a config."""
    root = tmp_path_factory.mktemp("faults")
    rng = np.random.default_rng(0)
    for label, color in enumerate([(200, 40, 40), (40, 200, 40), (40, 40, 200)]):
        (root / "photos" / f"class {label}").mkdir(parents=True)
        for number in range(32):
            noise = rng.integers(0, 56, (36 + number % 3, 40, 3))
            pattern = 40 * rng.integers(0, 2, (5, 5, 3)).repeat(8, 0).repeat(8, 1)[: noise.shape[0], :40]
            image = Image.fromarray((np.array(color) // 2 + noise + pattern).astype(np.uint8))
            image.save(root / "photos" / f"class {label}" / f"{number}.png")
    (root / "config.yaml").write_text(CONFIG)
    return Launcher(root, launcher_process)


# --- the comparison ---------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """All that a checkpoint holds, to the bit: weights, statistics, averages, slots, generators, sums, history."""
    found = {}
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as stored:
            found |= {
                f"{file.stem}/{name}": f"{stored[name].dtype}{stored[name].shape}".encode() + stored[name].tobytes()
                for name in stored
            }
    metadata = json.loads((folder / "metadata.json").read_text())
    return found | {name: json.dumps(metadata[name]).encode() for name in checkpoint.METADATA_FIELDS}


def weights(model: Path) -> dict[str, bytes]:
    """All weights of a .keras file, to the bit."""
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(model) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
        )
    return found


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Names of what is not the same."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def assert_checkpoints_are_those_of(whole: Path, run: Path) -> int:
    """Compares every checkpoint of a run with the uninterrupted run's of the same step.

    Returns the step of the newest good one.
    """
    newest = 0
    for found in sorted((run / "checkpoints").glob("step-*")):
        if checkpoint.verify_checkpoint(found) is None:
            newest = int(found.name.removeprefix("step-"))
            assert len(contents(found)) > 300
            assert differing(contents(found), contents(whole / "checkpoints" / found.name)) == []
    return newest


def assert_ends_like(launcher: Launcher, run: str, whole: str) -> None:
    """Compares all that a finished run leaves with what the uninterrupted one left."""
    one, other = launcher.folder / run, launcher.folder / whole
    assert assert_checkpoints_are_those_of(other, one) == END
    for model in ("model.keras", "best/model.keras"):
        assert len(weights(one / model)) > 100
        assert differing(weights(one / model), weights(other / model)) == []
    logged = launcher.mlflow_run(run)
    assert logged.info.status == "FINISHED"
    [_] = launcher.client.search_logged_models([logged.info.experiment_id], f"source_run_id = '{logged.info.run_id}'")
    assert launcher.metrics(run) == launcher.metrics(whole)
    assert not list((one / "checkpoints").glob(".*")), "no litter"


# --- the tests --------------------------------------------------------------------------------------------------------


def suffer(
    launcher: Launcher, run: str, whole: str, faults: Sequence[tuple[Fault, int]], *arguments: str, **keywords: Any
) -> None:
    """Takes a run through faults, each behind its step, and compares it after each with the uninterrupted run."""
    directory, newest = launcher.folder / run, 0
    for fault, step in faults:
        what = f"{fault.name} behind step {step}"
        traps = [{"steps": step - newest, **one} for one in fault.traps(step)]
        launcher.start(run, *(["--resume"] if directory.exists() else []), *arguments, traps=traps, **keywords)
        if fault is SECOND_PROCESS:
            assert_a_second_process_is_refused(launcher, run)
        assert launcher.ended() == fault.code, f"{what}\n{launcher.output(run).read_text()}"

        sprung = launcher.sprung(run)
        expected = [(one["function"], one["action"], step - newest) for one in traps]
        assert [(one["function"], one["action"], one["steps"]) for one in sprung] == expected, (
            f"{what}: ended elsewhere"
        )
        assert all(one["match"] in " ".join(one["arguments"]) for one in sprung if "match" in one), what
        if (directory / "mlflow.json").exists():
            assert launcher.mlflow_run(run).info.status == fault.status, what
        if fault.damage is not None:
            flip_a_bit(checkpoint.latest_valid_checkpoint(directory / "checkpoints")[0] / fault.damage)
        newest = assert_checkpoints_are_those_of(launcher.folder / whole, directory)


def finish(launcher: Launcher, run: str, whole: str, *arguments: str, **keywords: Any) -> None:
    """Takes a run to its end and compares all that it leaves."""
    assert launcher.run(run, "--resume", *arguments, **keywords) == 0, launcher.output(run).read_text()
    assert_ends_like(launcher, run, whole)
    assert "unexpected" not in launcher.output(run).read_text()


def assert_a_second_process_is_refused(launcher: Launcher, run: str) -> None:
    """Starts another train.py on a run that is under way, in both ways."""
    while not launcher.sprung(run):
        time.sleep(0.05)
    try:
        before = {path: path.stat().st_mtime_ns for path in (launcher.folder / run).rglob("*") if path.suffix != ".txt"}
        for arguments, message in (
            (["--resume"], "another process is working on this run"),
            ([], "holds an unfinished run"),
        ):
            command = [sys.executable, str(PROJECT / "train.py"), "--config", "config.yaml", "--run-dir", run]
            second = subprocess.run(
                [*command, *arguments], cwd=launcher.folder, capture_output=True, text=True, timeout=60, check=False
            )
            assert (second.returncode, message in second.stderr) == (2, True), second.stderr
        assert {path: path.stat().st_mtime_ns for path in before} == before
    finally:  # or the process of the run would wait for ever, and the tests behind it for the launcher
        launcher.marker(run).with_suffix(".go").touch()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_the_network_has_every_kind_of_block_and_no_smaller_one_has(tmp_path):
    from pipeline.models.efficientnet import efficientnet

    def kinds(depth: float) -> set[str]:
        (tmp_path / "config.yaml").write_text(CONFIG.replace("depth: 0.3", f"depth: {depth}"))
        model = efficientnet(load_config(tmp_path / "config.yaml").variant, num_classes=3, drop_path_rate=0.2)
        found = {"expansion"} if any("expand_conv" in layer.name for layer in model.layers) else set()
        for layer in model.layers:
            if "dwconv" in layer.name:
                found |= {f"kernel {layer.kernel_size[0]}", f"stride {layer.strides[0]}"}
                found |= {"no expansion"} if layer.name == "block1a_dwconv" else set()
            found |= {kind for kind in ("se_reduce", "drop", "add") if layer.name.endswith(f"_{kind}")}
        return found

    every = {"expansion", "no expansion", "kernel 3", "kernel 5", "stride 1", "stride 2", "se_reduce", "drop", "add"}
    assert kinds(0.3) == every
    assert kinds(0.25) < every


def test_at_least_twenty_places_are_drawn_on_one_device_and_four_for_each_other_way_to_run():
    places = {life: {(fault.name, step) for fault, step in drawn(life)} for life in LIVES}
    assert len(set().union(*(places[life] for life, (variant, _) in LIVES.items() if variant == "one device"))) >= 20
    assert all(len(places[variant]) == 4 for variant in VARIANTS if variant != "one device")


SHORT = ((KILLED_IN_FILE["optimizer.npz"], 4), (TERMINATED, 5))
FASTER = ("augment.randaugment=null",)  # a quarter of the processor time goes into the tracing of its operations


@pytest.fixture(scope="module")
def begun(launcher: Launcher) -> str:
    """A run that was not interrupted before its sixth step, with a checkpoint for every step."""
    name, traps = "begun", [{"steps": 6, **one} for one in AFTER_STEP(6)]
    every_step = ("train.checkpoint_every_steps=1", "train.max_checkpoints=1000")
    assert launcher.run(name, *FASTER, *every_step, traps=traps) == -signal.SIGKILL
    assert assert_checkpoints_are_those_of(launcher.folder / name, launcher.folder / name) == 5
    return name


@pytest.fixture(scope="module")
def survivor(launcher: Launcher, begun: str) -> str:
    """A run of the same config that was ended in the save at the end of an epoch, and by SIGTERM behind step 5."""
    suffer(launcher, "survivor", begun, SHORT, *FASTER)
    return "survivor"


def test_a_run_survives_the_commonest_faults(launcher, begun, survivor):
    assert assert_checkpoints_are_those_of(launcher.folder / begun, launcher.folder / survivor) == 5
    logged, whole = launcher.metrics(survivor), launcher.metrics(begun)
    assert len(logged) > 25
    assert logged == {key: whole[key] for key in logged}


@pytest.mark.parametrize("group", ["model", "optimizer", "average", "totals"])
def test_the_comparison_sees_one_bit_of_any_variable(launcher, begun, tmp_path, group):
    checkpoints = launcher.folder / begun / "checkpoints"
    shutil.copytree(checkpoints / "step-00000005", tmp_path / "checkpoints" / "step-00000005")
    file = tmp_path / "checkpoints" / "step-00000005" / f"{group}.npz"
    with np.load(file) as stored:
        values = {name: stored[name] for name in stored}
    kinds = ("moving_variance", "seed_generator", "momentum", "")
    for name in {
        next(name for name in values if kind in name) for kind in kinds if any(kind in name for name in values)
    }:
        changed = values[name].copy()
        changed.reshape(-1).view(np.uint8)[0] ^= 1
        np.savez(file, allow_pickle=False, **{**values, name: changed})
        found, whole = (contents(folder / "step-00000005") for folder in (tmp_path / "checkpoints", checkpoints))
        assert differing(found, whole) == [f"{group}/{name}"]
        rehash(file.parent)
        with pytest.raises(AssertionError):
            assert_checkpoints_are_those_of(launcher.folder / begun, tmp_path)


def test_the_comparison_sees_the_last_digit_of_the_history(launcher, begun, tmp_path):
    folder = launcher.folder / begun / "checkpoints" / "step-00000005"
    shutil.copytree(folder, tmp_path / "other")
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["history"][0]["val/loss"] = float(np.nextafter(metadata["history"][0]["val/loss"], 9))
    (tmp_path / "other" / "metadata.json").write_text(json.dumps(metadata))
    assert differing(contents(folder), contents(tmp_path / "other")) == ["history"]


def rehash(folder: Path) -> None:
    """Makes a checkpoint's metadata say that its files are as they should be."""
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in metadata["sha256"]}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "metadata.sha256").write_text(hashlib.sha256((folder / "metadata.json").read_bytes()).hexdigest())


def test_a_resume_names_what_has_changed_and_goes_on_only_with_what_is_allowed(launcher, survivor):
    directory = launcher.folder / survivor
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != "log.txt"}

    def refused(*arguments: str) -> str:
        launcher.output(survivor).unlink()
        assert launcher.run(survivor, "--resume", *FASTER, *arguments) == 2
        return launcher.output(survivor).read_text()

    change = ["train.label_smoothing=0.2", "optimizer.ema_decay=0.8"]
    output = refused(*change, "--allow-change", "optimizer.ema_decay")
    assert "  train.label_smoothing: was 0.1, is 0.2" in output
    assert "ema_decay: was" not in output
    image = launcher.folder / "photos" / "class 1" / "3.png"
    content = image.read_bytes()
    image.write_bytes((launcher.folder / "photos" / "class 1" / "4.png").read_bytes())
    (launcher.folder / "photos" / "class 2").rename(launcher.folder / "photos" / "class 3")
    output = refused()
    assert "class 1/3.png: has other contents" in output
    assert "classes: were class 0, class 1, class 2; are class 0, class 1, class 3" in output
    image.write_bytes(content)
    (launcher.folder / "photos" / "class 3").rename(launcher.folder / "photos" / "class 2")
    assert {path: path.read_bytes() for path in before} == before, "a refusal changes nothing"

    allowed = [
        *change,
        "--allow-change",
        "optimizer",
        "--allow-change",
        "train.label_smoothing",
        "train.max_checkpoints=5",
    ]
    assert launcher.run(survivor, "--resume", *FASTER, *allowed, traps=TERMINATED.traps(6)) == 143
    newest, _ = checkpoint.latest_valid_checkpoint(directory / "checkpoints")
    assert newest == directory / "checkpoints" / "step-00000006"
    changes = ["optimizer.ema_decay: 0.9 -> 0.8 after step 5", "train.label_smoothing: 0.1 -> 0.2 after step 5"]
    noted = checkpoint.read_metadata(newest)["changes"]
    assert [f"{one['key']}: {one['was']} -> {one['is']} after step {one['step']}" for one in noted] == changes
    config = load_config(directory / "config.yaml")
    assert (config.optimizer.ema_decay, config.train.label_smoothing) == (0.8, 0.2)
    assert launcher.mlflow_run(survivor).data.tags["changes"].splitlines() == changes


@pytest.mark.slow
@pytest.mark.parametrize("life", LIVES)
def test_a_run_survives_the_faults_of_its_life(launcher, life):
    variant = LIVES[life][0]
    run, whole = life.replace(" ", "-"), launcher.whole(variant)
    suffer(launcher, run, whole, drawn(life), variant=variant)
    finish(launcher, run, whole, variant=variant)


@pytest.fixture
def small_disk(launcher: Launcher) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """The folder of checkpoints of the run `full` as a file system in memory, and what sets its size in bytes."""
    folder = launcher.folder / "full" / "checkpoints"
    folder.mkdir(parents=True)

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False).returncode == 0

    if not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs"):
        pytest.skip("a file system in memory can be mounted by root only")
    yield folder, lambda size: mount("-o", f"remount,size={size}")
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_run_survives_a_full_disk(launcher, small_disk):
    folder, resize = small_disk
    whole = launcher.whole("one device")
    (folder.parent / "config.yaml").write_text(load_config(launcher.folder / "config.yaml").to_yaml())
    assert (
        launcher.run("full", "--resume", traps=[{"steps": 5, **one} for one in KILLED_IN_STEP.traps(5)])
        == -signal.SIGKILL
    )
    size = sum(file.stat().st_size for file in (folder / "step-00000004").iterdir())
    resize(2 * size + size // 2)
    assert launcher.run("full", "--resume") == 1
    output = launcher.output("full").read_text()
    assert "step-00000006: cannot be written (No space left on device); older checkpoints are unchanged" in output
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000002", "step-00000004"]
    assert assert_checkpoints_are_those_of(launcher.folder / whole, folder.parent) == 4
    logged = launcher.mlflow_run("full")
    assert logged.info.status == "FAILED"
    assert "No space left on device" in logged.data.tags["error"]
    resize(64 << 20)
    finish(launcher, "full", whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "poison", "places"),
    [
        (
            "{skip: 2}",
            {"step": 7},
            [
                {"function": SAVE, "when": "before", "action": "half", "match": "nan/.step-00000008/optimizer.npz"},
                {"function": VALIDATION, "when": "before", "action": "kill", "call": 1, "steps": 2},
            ],
        ),
        (
            "rollback",
            {"step": 11, "above": 0.02},
            [
                {
                    "function": "shutil:rmtree",
                    "when": "before",
                    "action": "kill",
                    "match": "/.old-step-00000010",
                    "call": 2,
                },
                {"function": TRAIN_STEP, "when": "after", "action": "kill", "steps": 6},
            ],
        ),
    ],
    ids=["skip", "rollback"],
)
def test_what_is_done_about_nan_survives_a_kill(launcher, policy, poison, places):
    arguments = [f"train.on_nan={policy}"]
    run, whole = f"nan-{policy.strip('{}: 2')}", f"whole nan {policy}"
    assert launcher.run(whole, *arguments, poison=poison) == 0
    for number, place in enumerate(places):
        resume = ["--resume"] if number else []
        assert launcher.run(run, *resume, *arguments, poison=poison, traps=[place]) == -signal.SIGKILL
        [sprung] = launcher.sprung(run)
        assert (sprung["function"], sprung.get("match", "") in " ".join(sprung["arguments"])) == (
            place["function"],
            True,
        )
    finish(launcher, run, whole, *arguments, poison=poison)
    [saved] = (launcher.folder / run / "nan").iterdir()
    assert differing(contents(saved), contents(launcher.folder / whole / "nan" / saved.name)) == []
    assert "batch/images" in contents(saved)
    metadata = checkpoint.read_metadata(launcher.folder / run / "checkpoints" / f"step-{END:08d}")
    assert (metadata["skipped"], metadata["rollbacks"]) == (([7], 0) if "skip" in policy else ([], 1))


@pytest.mark.slow
def test_the_weights_do_not_depend_on_the_number_of_input_workers(launcher):
    arguments = [*VARIANTS["albumentations"], "train.stages=[{epochs: 2}]"]
    found = []
    for name, workers in (("workers 1", 1), ("workers 2", 2), ("workers 4", 4), ("workers 2 again", 2)):
        traps = [{"steps": 7, **one} for one in TERMINATED.traps(7)]
        assert launcher.run(name, *arguments, f"runtime.num_workers={workers}", traps=traps) == 143
        found.append(contents(launcher.folder / name / "checkpoints" / "step-00000007"))
    assert len(found[0]) > 500
    assert [differing(found[0], other) for other in found[1:]] == [[], [], []]
