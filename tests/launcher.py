"""Runs the commands of the program in processes that are forked from one that has loaded the libraries.

A run saves the seconds of loading, and is a process of its own in all else. `python launcher.py light` loads only what
every command loads. A job is a line of JSON on standard input:

    folder      where the process works
    command     what follows python on the command line: train.py ..., evaluate.py ... or -m pipeline ...
    stdin, stdout, stderr: files; the last two may be one file
    faults      null, or what ends the process where a test says, an object of
        marker      file that takes a line of JSON for every trap that was sprung
        traps       a list of {function: module:name, when: before | after, action: kill | half | term | int | wait}
                    and, where given,
                    steps: only after so many steps of this process;
                    match: only with this text in a path or other text among the arguments;
                    call: at which of the calls that fit; the process then does the action to itself
        poison      null, or {step: n} for a batch of the stream, counted from 0, whose loss is not a number; with
                    {above: rate}, whose loss is not a number at learning rates above that
        devices     logical CPU devices
        tf_config   null, or the contents of TF_CONFIG

The answer is a line of JSON when the process has ended: its exit code (negative: the signal) and its seconds of
processor time.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT))
TRAIN_STEP, TRAINING_STREAM = (
    "pipeline.training.train_step:TrainStep.__call__",
    "pipeline.data.input_pipeline:training_stream",
)
COMMANDS = ("train", "evaluate", "predict", "compare", "export", "check", "pack", "bench", "scale")
LIGHT = tuple(f"pipeline.cli.{command}" for command in COMMANDS)
LIBRARIES = (
    "tensorflow",
    "keras",
    "albumentations",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "matplotlib.backends.backend_agg",
    "pipeline.cli.training_steps",
    "pipeline.evaluation.predict",
    "pipeline.evaluation.report.comparison_report",
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
    """Put another function in the place of `module:name`, also in modules that imported it by its name."""
    module, _, path = name.partition(":")
    *parents, last = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    real = getattr(owner, last)
    wrapped = functools.wraps(real)(make(real))
    setattr(owner, last, wrapped)
    for user in [module for name, module in sys.modules.items() if name.startswith("pipeline.")]:
        if not parents and vars(user).get(last) is real:
            setattr(user, last, wrapped)


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


def set_faults(faults: dict[str, Any]) -> None:
    """Prepares this process to end where the job says."""
    import tensorflow as tf

    if faults["tf_config"] is not None:
        os.environ["TF_CONFIG"] = json.dumps(faults["tf_config"])
    if faults["devices"] > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * faults["devices"])
    if faults["poison"] is not None:
        function, make = (
            (TRAIN_STEP, poisoned_step) if "above" in faults["poison"] else (TRAINING_STREAM, poisoned_stream)
        )
        wrap(function, make(**faults["poison"]))
    wrap(TRAIN_STEP, count_steps)
    for trap in faults["traps"]:
        set_trap(trap, Path(faults["marker"]))


def run(job: dict[str, Any]) -> None:
    """Becomes the process of a command; does not return."""
    os.chdir(job["folder"])
    os.dup2(os.open(job["stdin"], os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)  # the other one has read ahead in the jobs
    if job["faults"] is not None:
        set_faults(job["faults"])
    if job["command"][0] == "-m":
        _, module, *arguments = job["command"]
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        program, *arguments = job["command"]
        sys.argv = [program, *arguments]
        runpy.run_path(str(PROJECT / program), run_name="__main__")
    sys.exit(0)


def serve(modules: Sequence[str]) -> None:
    """Runs job after job."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or every process goes through all objects of the libraries when it ends, which takes seconds
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        _, status, usage = os.wait4(child, 0)
        answer = {"code": os.waitstatus_to_exitcode(status), "seconds": usage.ru_utime + usage.ru_stime}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["light"]:
        serve(LIGHT)
    else:
        from pipeline.tracking.mlflow_store import import_mlflow

        import_mlflow()
        serve((*LIGHT, *LIBRARIES))
