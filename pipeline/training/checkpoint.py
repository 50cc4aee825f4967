"""Checkpoints that survive being killed: written aside, hashed, renamed into place, and verified before they are believed."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.errors import RunError
from pipeline.training.hooks import Hook
from pipeline.training.optimizer import MovingAverage
from pipeline.training.step import Totals

MANIFEST = "manifest.json"


@dataclass
class State:
    """All that a run is at one point between two steps.

    Attributes:
        model: The network, its batch normalisation statistics and the state of its random generators included.
        optimizer: With the slots of all the network's trainable variables.
        average: The moving average, if the run keeps one.
        totals: Sums of the metrics of the epoch under way.
        step: Steps taken since the start of the run.
        history: One record for each epoch that ended.
        best: The record of the best epoch so far, None before the first.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    average: MovingAverage | None
    totals: Totals
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None

    def averaged(self) -> AbstractContextManager[None]:
        """A block inside which the network holds the moving average, where the run keeps one."""
        return nullcontext() if self.average is None else self.average.swapped_in()

    def groups(self) -> dict[str, dict[str, keras.Variable | tf.Variable]]:
        """Every variable by group and by a name that is the same in every process."""
        weights = {f"{layer.name}/{variable.name}": variable for layer in self.model.layers for variable in layer.variables}
        groups: dict[str, dict[str, Any]] = {
            "model": weights,
            "optimizer": {f"{number:05d}/{variable.name}": variable for number, variable in enumerate(self.optimizer.variables)},
            "totals": dict(self.totals.sums),
        }
        if self.average is not None:
            groups["average"] = {f"{number:05d}/{v.name}": average for number, (v, average) in enumerate(self._averaged())}
        return groups

    def _averaged(self) -> Iterable[tuple[keras.Variable, tf.Variable]]:
        assert self.average is not None
        return zip(self.average.averaged, self.average.variables, strict=True)


def save(state: State, directory: Path, identity: Mapping[str, Any], *, keep: int) -> Path:
    """Writes a checkpoint, then removes those that are older than the newest `keep` and not the best.

    The files go into a hidden folder, each is synced to the disk, and the folder is renamed into place: a kill at any moment leaves
    either the whole checkpoint or none.

    Args:
        state: What to write.
        directory: The run's folder of checkpoints; made if missing.
        identity: What a resuming run must agree with; JSON values. Kept in the manifest.
        keep: Number of newest checkpoints to leave, at least 1.

    Returns:
        The checkpoint's folder, `step-<step>`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in (*directory.glob(".step-*"), *directory.glob(".old-step-*")):
        shutil.rmtree(leftover)
    final = checkpoint_path(directory, state.step)
    aside = directory / f".{final.name}"
    aside.mkdir()
    files = {f"{name}.npz": _pack(variables) for name, variables in state.groups().items()}
    manifest = {
        "step": state.step,
        "history": state.history,
        "best": state.best,
        "identity": dict(identity),
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__},
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    for name, content in {**files, MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
        _write_synced(aside / name, content)
    _sync_folder(aside)
    if final.exists():  # damaged: the run was resumed from an older one and has come here again
        old = directory / f".old-{final.name}"
        final.rename(old)
        aside.rename(final)
        shutil.rmtree(old)
    else:
        aside.rename(final)
    _sync_folder(directory)
    protected = {final, *_checkpoints(directory)[-keep:]}
    if state.best is not None:
        protected.add(checkpoint_path(directory, int(state.best["step"])))
    for checkpoint in _checkpoints(directory):
        if checkpoint not in protected:
            shutil.rmtree(checkpoint)
    return final


class Keeper(Hook):
    """A hook of the training loop that saves the state whenever it should be kept."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], *, keep: int) -> None:
        """Takes what `save` wants beside the state."""
        self._directory, self._identity, self._keep = directory, identity, keep

    def on_checkpoint(self, state: State) -> None:
        """Saves the state."""
        save(state, self._directory, self._identity, keep=self._keep)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return directory / f"step-{step:08d}"


def newest_verified(directory: Path) -> tuple[Path | None, list[str]]:
    """Finds the newest checkpoint whose files all have the contents that its manifest says.

    Returns:
        The checkpoint's folder, None where there is none, and a sentence for each newer one that had to be passed over.
    """
    problems: list[str] = []
    for checkpoint in reversed(_checkpoints(directory)):
        problem = _problem(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems.append(f"{checkpoint}: {problem}")
    return None, problems


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a verified checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text())


FREE_TO_CHANGE = ("config.tracking", "config.runtime.input_workers", "config.train.keep_checkpoints")  # without changing the result


def check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuses to go on with another config, other data or another number of replicas than the checkpoint's.

    Raises:
        RunError: Naming every difference.
    """
    old, new = _flat(read_manifest(checkpoint)["identity"]), _flat(json.loads(json.dumps(identity)))
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not key.startswith(FREE_TO_CHANGE)]
    if differing:
        lines = "\n".join(f"  {key.removeprefix('config.')}: was {old.get(key)!r}, is {new.get(key)!r}" for key in differing)
        raise RunError(f"{checkpoint}: belongs to a run that differs in\n{lines}\nresume it as it was, or start a new run")


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        return {k: v for key, value in values.items() for k, v in _flat(value, f"{path}.{key}" if path else key).items()}
    return {path: values}


def restore(state: State, checkpoint: Path) -> None:
    """Puts a verified checkpoint into a state that was built for the same config. A best epoch whose checkpoint is damaged is forgotten.

    Raises:
        RunError: If the checkpoint's variables are not those of the state.
    """
    for group, variables in state.groups().items():
        with np.load(checkpoint / f"{group}.npz", allow_pickle=False) as stored:
            differing = sorted(set(stored.files) ^ set(variables)) or [
                name for name, variable in variables.items() if tuple(stored[name].shape) != tuple(variable.shape)
            ]
            if differing:
                raise RunError(
                    f"{checkpoint}: does not fit this program's {group} (first difference: {differing[0]}); "
                    "resume with the version of the program that wrote it, or start a new run"
                )
            for name, variable in variables.items():
                variable.assign(stored[name])
    manifest = read_manifest(checkpoint)
    state.step, state.history, state.best = manifest["step"], manifest["history"], manifest["best"]
    if state.best is not None and _problem(checkpoint_path(checkpoint.parent, int(state.best["step"]))) is not None:
        state.best = None  # its weights are lost; the best of the epochs to come takes its place


def _pack(variables: Mapping[str, keras.Variable | tf.Variable]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: variable.numpy() for name, variable in variables.items()})
    return buffer.getvalue()


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"))


def _problem(checkpoint: Path) -> str | None:
    try:
        expected = read_manifest(checkpoint)["sha256"]
        for name, digest in expected.items():
            if hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError) as error:
        return f"incomplete ({error})"
    return None


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
