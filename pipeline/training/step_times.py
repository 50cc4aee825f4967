"""What the steps of a run on one GPU take: noted for later runs on the same machine, which decide by it whether to compile theirs."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.config.train import StageConfig
from pipeline.distributed.devices import Runtime, processor
from pipeline.runs import run_directory
from pipeline.training.callbacks import Callback
from pipeline.training.feature_cache import is_augmented

TIMED_STEPS = 20
STEP = 2  # to be raised when a step is computed otherwise, so that older times do not count


class StepTimes(Callback):
    """Times the first step of a stage and the later ones, and notes both under XDG_CACHE_HOME."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        """Takes what the steps are made from."""
        self._config, self._runtime = config, runtime
        self._stage: StageConfig | None = None
        self._start: tuple[int, float] | None = None

    def on_compile_end(self, stage: StageConfig, seconds: float) -> None:
        """Waits for the later ones."""
        self._stage = stage if self._runtime.on_one_gpu and runs_the_backbone(self._config, stage) else None
        self._first, self._start = seconds, None

    def on_progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes their mean, once there are enough in one go."""
        if self._stage is None:
            return
        now = time.monotonic()
        if self._start is None or step < self._start[0]:
            self._start = step, now
        elif step - self._start[0] >= TIMED_STEPS:
            mean = (now - self._start[1]) / (step - self._start[0])
            kind = "XLA" if self._runtime.jit_compile else "plain"
            _note(key(self._config, self._runtime, self._stage), {f"{kind} first": self._first, f"{kind} step": mean})
            self._stage = None

    def on_checkpoint(self, state: Any) -> None:
        """Starts anew: validating and saving is no part of a step."""
        self._start = None


def runs_the_backbone(config: Config, stage: StageConfig) -> bool:
    """Whether the steps of a stage go through all of the network, or start from features that were computed once."""
    return stage.trainable != "head" or is_augmented(config, stage)


def key(config: Config, runtime: Runtime, stage: StageConfig) -> str:
    """What the seconds of a step depend on; of the pictures, which it may have to wait for, a digest."""
    variant, train = config.variant, config.train
    pictures = hashlib.sha256(repr((config.data, config.augment, stage.use_augmentation)).encode()).hexdigest()[:8]
    return (
        f"step {STEP} on {processor()}, {variant.name} at {variant.resolution} px, {runtime.dtype}, {train.batch_size} images in "
        f"{train.gradient_accumulation_steps} micro-batches, training {stage.trainable}, pictures {pictures}"
    )


def noted() -> dict[str, dict[str, float]]:
    """By `key`, as far as it was measured: seconds of the `plain first`, a later `plain step`, the `XLA first` and a later `XLA step`."""
    with suppress(OSError, RuntimeError, ValueError):  # RuntimeError: no home
        return json.loads(_path().read_text(encoding="utf-8"))
    return {}


def _note(name: str, seconds: Mapping[str, float]) -> None:
    notes = noted()
    notes[name] = {**notes.get(name, {}), **seconds}
    with suppress(OSError, RuntimeError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        run_directory.write(_path(), json.dumps(notes, indent=1) + "\n")


def _path() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efficientnet-pipeline" / "step_times.json"
    )
