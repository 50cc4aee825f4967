"""Several processes and several devices train as one.

The same weights, the same data, one set of files, one end for all.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from class_folders import write_class_folders
from launcher import PROJECT, TRAIN_STEP
from launching import LauncherProcess, RunLauncher

from pipeline.distributed.cluster import ProcessInfo, cluster_from_tf_config
from pipeline.errors import ConfigError, RunError

CONFIG = """
model: {variant: {width: 0.1, depth: 0.3, resolution: 32}, weights: null, batch_norm_momentum: 0.9}
data: {source: folder, path: IMAGES, resize: squash, splits: {train: 0.6, val: 0.2, test: 0.2}}
augment:
  transforms: [{RandomResizedCrop: {scale: [0.5, 1.0]}}, HorizontalFlip]
  mixup: 0.2
optimizer: {base_lr: 0.05, warmup_epochs: 0.5, ema_decay: 0.9}
train:
  global_batch_size: 16
  stages: [{epochs: 1, trainable: block7}, {epochs: 2}]
  checkpoint_every_steps: 1
  max_checkpoints: 100
runtime: {precision: float32, num_workers: 2}
tracking: {experiment: machines}
"""
END = 9  # steps


# --- TF_CONFIG
# ----------------------------------------------------------------------------------------------------------------------


def tf_config(task: tuple[str, int] = ("worker", 1), **cluster: Any) -> str:
    return json.dumps({"cluster": cluster or {"worker": ["a:1", "b:2"]}, "task": {"type": task[0], "index": task[1]}})


@pytest.mark.parametrize("strategy", ["auto", "multi_worker"])
def test_tf_config_gives_a_process_its_place(monkeypatch, strategy):
    monkeypatch.setenv("TF_CONFIG", tf_config())
    assert cluster_from_tf_config(strategy) == ProcessInfo(("a:1", "b:2"), 1)
    monkeypatch.setenv("TF_CONFIG", tf_config(("worker", 0), chief=["c:1"], worker=["a:1", "b:2"]))
    place = cluster_from_tf_config(strategy)
    assert place == ProcessInfo(("c:1", "a:1", "b:2"), 1, has_chief=True)
    assert [place.rank_of("chief", 0), place.rank_of("worker", 0), place.rank_of("worker", 1)] == [0, 1, 2]
    assert not place.is_chief
    assert place.name() == "process 2 of 3 (a:1)"
    assert place.others() == "c:1, b:2"


@pytest.mark.parametrize("strategy", ["single", "mirrored"])
def test_a_run_of_one_process_does_not_care_for_tf_config(monkeypatch, strategy):
    monkeypatch.setenv("TF_CONFIG", tf_config())
    assert cluster_from_tf_config(strategy) is None


def test_without_others_there_is_no_place(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert cluster_from_tf_config("auto") is None
    monkeypatch.setenv("TF_CONFIG", tf_config(("worker", 0), worker=["a:1"]))
    assert cluster_from_tf_config("auto") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "runtime.strategy: multi_worker needs the variable TF_CONFIG"),
        ("{", "TF_CONFIG: is not such as"),
        ("[]", "TF_CONFIG: is not such as"),
        ('{"cluster": {"worker": "a:1"}, "task": {"type": "worker", "index": 0}}', "TF_CONFIG: is not such as"),
        ('{"cluster": {"worker": ["a", "b"]}, "task": {"type": "worker", "index": 0}}', "TF_CONFIG: is not such as"),
        ('{"cluster": {"worker": ["a:x", "b:"]}, "task": {"type": "worker", "index": 0}}', "TF_CONFIG: is not such as"),
        (tf_config(("worker", 2)), "its task, worker 2, is not among its chief and workers"),
        (tf_config(("evaluator", 0)), "its task, evaluator 0, is not among its chief and workers"),
        (tf_config(("worker", 0), worker=["a:1", "a:1"]), "two processes have the same address"),
        (tf_config(("worker", 0), chief=["c:1", "d:1"], worker=["a:1"]), "there can be one chief at most"),
    ],
)
def test_a_tf_config_that_does_not_serve_is_refused_in_words(monkeypatch, text, message):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match=message):
        cluster_from_tf_config("multi_worker")


def test_a_process_waits_for_the_first_one_and_says_so():
    with socket.create_server(("127.0.0.1", 0)) as server:
        output: list[str] = []
        ProcessInfo((f"127.0.0.1:{server.getsockname()[1]}", "b:2"), 1).wait_for_chief(output.append, timeout=20)
        assert output == []
        port = server.getsockname()[1]
    with pytest.raises(RunError, match=rf"process 1 of 2 \(127.0.0.1:{port}\) cannot be reached after 1 s"):
        ProcessInfo((f"127.0.0.1:{port}", "b:2"), 1).wait_for_chief(output.append, timeout=1)
    assert output == [f"process 2 of 2 (b:2) waits for the chief at 127.0.0.1:{port}"]


def test_several_processes_need_the_name_of_the_run(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    environment = {**os.environ, "TF_CONFIG": tf_config(("worker", 0))}
    command = [sys.executable, str(PROJECT / "train.py"), "--config", "config.yaml"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: a run of several processes needs one directory: give each of them the same --run-dir\n"


# --- runs -------------------------------------------------------------------------------------------------------------


class Machine(RunLauncher):
    """Runs train.py in a folder of its own, as on a machine that shares no disk with others."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        super().__init__(folder, LauncherProcess())

    def start(
        self, run: str, *arguments: str, devices: int = 1, cluster: dict | None = None, traps: Sequence[dict] = ()
    ) -> None:
        """Starts a process; `ended` waits for its end."""
        self.launch(
            run, "--config", "../config.yaml", *arguments, devices=devices, tf_config=cluster, traps=list(traps)
        )

    def shown(self, run: str) -> str:
        """Output of the run's processes here."""
        return self.output(run).read_text()


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    root = tmp_path_factory.mktemp("machines")
    write_class_folders(root / "images", 32)
    (root / "config.yaml").write_text(CONFIG.replace("IMAGES", str(root / "images")))
    started = Machine(root / "first"), Machine(root / "second")
    yield started
    for machine in started:
        machine.launcher.close()


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def run_together(
    machines: Sequence[Machine], run: str, *arguments: str, traps: dict[int, list[dict]] | None = None
) -> list[int]:
    """Runs one process on each machine to its end; returns the exit codes."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(len(machines))]
    for number, machine in enumerate(machines):
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": number}}
        machine.start(run, *arguments, cluster=cluster, traps=(traps or {}).get(number, []))
    return [machine.ended() for machine in machines]


def stored(machine: Machine, run: str, step: int) -> dict[str, np.ndarray]:
    """All variables of a checkpoint by group and name."""
    found: dict[str, np.ndarray] = {}
    for group in ("model", "optimizer", "average", "totals"):
        with np.load(machine.folder / run / "checkpoints" / f"step-{step:08d}" / f"{group}.npz") as arrays:
            found |= {f"{group}/{name}": arrays[name] for name in arrays}
    return found


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Euclidean, over all weights and statistics of the network."""
    names = [name for name in one if name.startswith("model/") and "seed" not in name]
    return float(np.sqrt(sum(np.sum((one[name].astype(float) - other[name]) ** 2) for name in names)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_devices_and_processes_train_as_one_device_does(machines):
    """At the same global batch, synchronised batch normalisation, dropout off.

    Weights after five steps, and the images of each step.
    """
    first, _ = machines
    plain = ["model.dropout=0", "model.drop_path_rate=0", "train.global_batch_size=32", "train.stages=[{epochs: 5}]"]
    for run, devices in (("one", 1), ("two", 2), ("four", 4)):
        first.start(run, *plain, f"runtime.strategy={'single' if devices == 1 else 'mirrored'}", devices=devices)
        assert first.ended() == 0, first.shown(run)
    assert run_together(machines, "processes", *plain) == [0, 0], first.shown("processes")
    one, start = stored(first, "one", 5), stored(first, "one", 1)
    moved = distance(one, start)
    assert moved > 0.1
    for run in ("two", "four", "processes"):
        apart = distance(one, stored(first, run, 5))
        assert apart < 1e-3 * moved, f"{run}: {apart} apart, {moved} moved"
        assert stored(first, run, 5)["totals/images"] == one["totals/images"]
        histories = [
            json.loads((first.folder / name / "checkpoints/step-00000005/metadata.json").read_text())
            for name in (run, "one")
        ]
        losses = [[record["train/loss"] for record in one["history"]] for one in histories]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    tables = [
        pd.read_parquet(first.folder / run / "evaluation/test/predictions.parquet") for run in ("one", "processes")
    ]
    assert list(tables[0]["key"]) == list(tables[1]["key"]), "every image of the split exactly once"
    [port] = free_ports(1)
    served = [sys.executable, "-m", "pipeline", "data-server", "--address", f"127.0.0.1:{port}"]
    with subprocess.Popen(served, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("serving at")
        assert run_together(machines, "served", *plain, f"runtime.data_service=[127.0.0.1:{port}]") == [0, 0], (
            first.shown("served")
        )
        server.kill()
    here, there = stored(first, "processes", 5), stored(first, "served", 5)
    assert [name for name in here if not np.array_equal(here[name], there[name])] == [], "servers change nothing"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_process_ends_all_and_all_resume_bit_identically(machines):
    first, second = machines
    assert run_together(machines, "whole") == [0, 0], first.shown("whole") + second.shown("whole")
    assert sorted(path.name for path in (second.folder / "whole").iterdir()) == ["log-of-process-2.txt"], (
        "the first writes all there is"
    )
    assert (first.folder / "whole/model.keras").exists()

    def killed(steps: int) -> list[dict]:
        return [{"function": TRAIN_STEP, "when": "after", "action": "kill", "steps": steps}]

    for resume, number, steps in (((), 1, 4), (("--resume",), 0, 3)):
        assert sorted(run_together(machines, "broken", *resume, traps={number: killed(steps)})) == [-9, 1]
        other = machines[1 - number]
        died, ended = machines[number].marker("broken"), other.output("broken")
        assert ended.stat().st_mtime - died.stat().st_mtime < 60
        assert f"another process of the run has ended or cannot be reached: process {number + 1} of 2" in other.shown(
            "broken"
        )
        assert "Traceback" not in other.shown("broken")
    assert run_together(machines, "broken", "--resume") == [0, 0]
    for step in range(1, END + 1):
        one, other_one = stored(first, "whole", step), stored(first, "broken", step)
        assert one.keys() == other_one.keys()
        assert [name for name in one if not np.array_equal(one[name], other_one[name])] == []


@pytest.mark.slow
def test_processes_with_another_network_or_other_data_are_refused(machines):
    first, second = machines
    images = first.folder.parent / "images"
    shutil.copytree(images, first.folder.parent / "other images")
    shutil.copytree(images / "class 0", first.folder.parent / "other images" / "class 3")
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    other = [
        "model.variant={width: 0.2, depth: 0.3, resolution: 32}",
        f"data.path={first.folder.parent / 'other images'}",
    ]
    for number, machine in enumerate(machines):
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": number}}
        machine.start("other", *(other if number == 1 else []), cluster=cluster)
    assert [machine.ended() for machine in machines] == [2, 2]
    message = f"the processes of the run differ from the chief in\n  process 2 of 2 ({addresses[1]}): config, classes\n"
    assert message in first.shown("other")
    assert message in second.shown("other")


@pytest.mark.slow
def test_a_process_that_is_asked_to_stop_stops_all_and_another_number_of_them_goes_on_knowingly(machines):
    asked = {"function": TRAIN_STEP, "when": "after", "action": "term", "steps": 1}
    assert run_together(machines, "asked", "train.stages=[{epochs: 9}]", traps={1: [asked]}) == [143, 143]
    for machine in machines:
        assert re.search(
            r"stopped after step \d+; continue with the same command and --run-dir asked --resume",
            machine.shown("asked"),
        )
    assert list((machines[0].folder / "asked" / "checkpoints").glob("step-*"))
    first, further = machines[0], ("--resume", "train.stages=[{epochs: 9}]")
    first.start("asked", *further)
    assert first.ended() == 2
    assert "\n  replicas: was 2, is 1\n" in first.shown("asked")
    first.start("asked", *further, "--allow-change", "replicas")
    assert first.ended() == 0
    assert "changed: replicas: 2 -> 1 after step" in first.shown("asked")
    assert stored(first, "asked", 27)["totals/images"] == 0
