"""Runs train.py in processes that end where a test says.

One process loads the libraries; each run is forked from it, which saves their loading, and is a process of its own in
all else. A job is a line of JSON on standard input:

    folder      where the run's process works
    arguments   of train.py
    screen      file that takes what the run shows
    marker      file that takes a line of JSON for every trap that was sprung
    traps       a list of {function: module:name, when: before | after, action: kill | half | term | int | wait} and,
    where given,
                steps: only after so many steps of this process; match: only with this text in a path or other text
                    among the arguments;
                call: at which of the calls that fit; the process then does the action to itself
    poison      null, or {step: n} for a batch of the stream, counted from 0, whose loss is not a number; with {above:
    rate}, whose
                loss is not a number at learning rates above that
    devices     logical CPU devices
    tf_config   null, or the contents of TF_CONFIG

The answer is a line with the exit code (negative: the signal) when the run's process has ended.
"""

import functools
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT))
TRAIN_STEP, TRAINING_STREAM = (
    "pipeline.training.train_step:TrainStep.__call__",
    "pipeline.data.input_pipeline:training_stream",
)
LIBRARIES = (
    "tensorflow",
    "keras",
    "pipeline.cli.train",
    "albumentations",
    "pipeline.evaluation.report.tables",
    "pipeline.training.trainer",
)


class Steps:
    """Counts the training steps that this process took."""

    taken = 0


def act(action: str, arguments: tuple[Any, ...], marker: Path) -> None:
    """Does what a trap does, to this process."""
    if action == "half":  # as it would be in the middle of writing a file
        path, content = arguments
        path.write_bytes(content[: len(content) // 2])
    if action in ("half", "kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif action in ("term", "int"):
        os.kill(os.getpid(), signal.SIGTERM if action == "term" else signal.SIGINT)
    elif action == "wait":
        while not marker.with_suffix(".go").exists():
            time.sleep(0.01)
    else:
        raise ValueError(action)


def wrap(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts another function in the place of `module:name`."""
    module, _, path = name.partition(":")
    *parents, last = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    real = getattr(owner, last)
    setattr(owner, last, functools.wraps(real)(make(real)))


def set_trap(trap: dict[str, Any], marker: Path) -> None:
    """Springs the trap from within the function that it names."""
    calls = 0

    def come_by(arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        texts = [str(argument) for argument in arguments if isinstance(argument, str | os.PathLike)]
        fits = trap.get("steps", Steps.taken) == Steps.taken and (
            "match" not in trap or any(trap["match"] in text for text in texts)
        )
        calls += fits
        if fits and calls == trap.get("call", 1):
            with marker.open("a") as file:
                file.write(
                    json.dumps({**trap, "process": os.getpid(), "steps": Steps.taken, "arguments": texts}) + "\n"
                )
                file.flush()
                os.fsync(file.fileno())
            act(trap["action"], arguments, marker)

    def make(real: Callable[..., Any]) -> Callable[..., Any]:
        def trapped(*arguments: Any, **keywords: Any) -> Any:
            if trap["when"] == "before":
                come_by(arguments)
            result = real(*arguments, **keywords)
            if trap["when"] == "after":
                come_by(arguments)
            return result

        return trapped

    wrap(trap["function"], make)


def count_steps(real: Callable[..., None]) -> Callable[..., None]:
    """Counts the calls of a training step."""

    def counted(*arguments: Any) -> None:
        real(*arguments)
        Steps.taken += 1

    return counted


def poisoned_stream(step: int) -> Callable[..., Any]:
    """Makes one batch of the stream bad."""
    import tensorflow as tf

    def make(real: Callable[..., Any]) -> Callable[..., Any]:
        def stream(*arguments: Any, start_step: int, **further: Any) -> tf.data.Dataset:
            def poison(number: tf.Tensor, batch: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
                images, labels, weights, index = batch
                return images, labels, tf.where(number == step, float("nan"), weights), index

            return real(*arguments, start_step=start_step, **further).enumerate(start_step).map(poison)

        return stream

    return make


def poisoned_step(step: int, above: float) -> Callable[..., Any]:
    """Makes a step bad at a high learning rate only, as when training diverges."""

    def make(real: Callable[..., None]) -> Callable[..., None]:
        def train_step(self: Any, batch: Any, rate: float) -> None:
            if int(self._optimizer.iterations.numpy()) == step and rate > above:
                images, labels, weights, index = batch
                batch = images, labels, weights * float("nan"), index
            real(self, batch, rate)

        return train_step

    return make


def run(job: dict[str, Any]) -> None:
    """Becomes train.py; does not return."""
    import tensorflow as tf

    from pipeline.cli import train
    from pipeline.console import run_cli

    os.chdir(job["folder"])
    if job["tf_config"] is not None:
        os.environ["TF_CONFIG"] = json.dumps(job["tf_config"])
    screen = os.open(job["screen"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(screen, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job["devices"] > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * job["devices"])
    if job["poison"] is not None:
        function, make = (TRAIN_STEP, poisoned_step) if "above" in job["poison"] else (TRAINING_STREAM, poisoned_stream)
        wrap(function, make(**job["poison"]))
    wrap(TRAIN_STEP, count_steps)
    for trap in job["traps"]:
        set_trap(trap, Path(job["marker"]))
    sys.argv = ["train.py", *job["arguments"]]
    sys.exit(run_cli(train.main))


def serve() -> None:
    """Runs job after job."""
    from pipeline.tracking.mlflow_store import import_mlflow

    import_mlflow()
    for module in LIBRARIES:
        importlib.import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
