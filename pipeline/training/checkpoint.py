"""Checkpoints that survive being killed: written aside, hashed, renamed into place, and verified before they are believed.

Most of the state of a run with a frozen backbone says nothing: slots that no step has touched, averages of weights that
never moved. By their values, bit for bit, an array of one value is kept as that value, and an average that is its
variable is not kept.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import RunError, TrainingError
from pipeline.files import fsync, sha256_of
from pipeline.training.callbacks import Callback
from pipeline.training.state import TrainState

MANIFEST = "manifest.json"  # with the hashes of all files but itself and the next
MANIFEST_HASH = "manifest.sha256"


MANIFEST_FIELDS = ("step", "history", "best", "skipped", "rollbacks", "changes")  # of a state, kept in the manifest


def save(state: TrainState, directory: Path, identity: Mapping[str, Any], *, keep: int) -> Path:
    """Write a checkpoint, then removes those that are older than the newest `keep`, not the best and not the last epoch's.

    Args:
        state: What to write.
        directory: The run's folder of checkpoints; made if missing.
        identity: What a resuming run must agree with; JSON values. Kept in the manifest.
        keep: Number of newest checkpoints to leave, at least 1.

    Returns:
        The checkpoint's folder, `step-<step>`.

    Raises:
        TrainingError: If the disk does not take it. The older checkpoints are as they were.
    """
    final = write(state, checkpoint_path(directory, state.step), identity)
    protected = {final, checkpoint_path(directory, state.epoch_start), *_checkpoints(directory)[-keep:]}
    if state.best is not None:
        protected.add(checkpoint_path(directory, int(state.best["step"])))
    for checkpoint in _checkpoints(directory):
        if checkpoint not in protected:
            _remove(checkpoint)
    return final


def write(
    state: TrainState, final: Path, identity: Mapping[str, Any], *, extra_files: Mapping[str, bytes] | None = None
) -> Path:
    """Write a state into a folder of its own.

    The files go into a hidden folder, each is synced to the disk, and the folder is renamed into place: a kill at any
    moment leaves either the whole checkpoint or none.

    Args:
        state: What to write.
        final: The folder, `step-<number>`; one that stands there is replaced.
        identity: As of `save`.
        beside: Further files by name.

    Returns:
        The folder.

    Raises:
        TrainingError: If the disk does not take it.
    """
    aside = final.with_name(f".{final.name}")
    implied = {"average": state.averaged_variables()}
    files: dict[str, Callable[[], bytes]] = {
        f"{name}.npz": partial(_pack, group, implied.get(name, {})) for name, group in state.groups().items()
    }
    files |= {name: partial(bytes, content) for name, content in (extra_files or {}).items()}

    def put(name: str, content: bytes) -> str:
        _write_synced(aside / name, content)
        return sha256_of(content)

    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (*final.parent.glob(".step-*"), *final.parent.glob(".old-step-*")):
            shutil.rmtree(leftover)
        aside.mkdir()
        with ThreadPoolExecutor(
            len(files)
        ) as side_by_side:  # while one file is written and hashed, the next is packed; that holds the GIL
            hashes = {name: side_by_side.submit(put, name, pack()) for name, pack in files.items()}
        manifest = {
            **{name: getattr(state, name) for name in MANIFEST_FIELDS},
            "identity": dict(identity),
            "versions": {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__},
            "sha256": {name: digest.result() for name, digest in hashes.items()},
        }
        packed = json.dumps(manifest, indent=1).encode()
        for name, content in {MANIFEST: packed, MANIFEST_HASH: sha256_of(packed).encode()}.items():
            _write_synced(aside / name, content)
        fsync(aside)
        if final.exists():  # damaged: the run was resumed from an older one and has come here again
            _remove(final)
        aside.rename(final)
        fsync(final.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)  # what little room it takes may be needed
        raise TrainingError(
            f"{final}: cannot be written ({error.strerror or error}); what was saved before is untouched. "
            "Put that right, such as by making room on the disk, and go on with --resume"
        ) from error
    return final


class CheckpointCallback(Callback):
    """A hook of the training loop that saves the state whenever it should be kept."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], *, keep: int) -> None:
        """Take what `save` wants beside the state."""
        self._directory, self._identity, self._keep = directory, identity, keep

    def on_checkpoint(self, state: TrainState) -> None:
        """Save the state."""
        save(state, self._directory, self._identity, keep=self._keep)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return directory / f"step-{step:08d}"


def latest_valid_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint whose files all have the contents that its manifest says.

    Returns:
        The checkpoint's folder, None where there is none, and a sentence for each newer one that had to be passed over.
    """
    problems: list[str] = []
    for checkpoint in reversed(_checkpoints(directory)):
        found = verify_checkpoint(checkpoint)
        if found is None:
            return checkpoint, problems
        problems.append(f"{checkpoint}: {found}")
    return None, problems


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a verified checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text())


def restore(state: TrainState, checkpoint: Path, processes: ProcessGroup | None = None) -> None:
    """Put a verified checkpoint into a state that was built for the same config. A best epoch whose checkpoint is damaged is forgotten.

    Args:
        state: To be changed; of several processes, each its own.
        checkpoint: Read by the chief, which need not share its disk with the others.
        processes: Those of the run; None for this one alone.

    Raises:
        RunError: If the checkpoint's variables are not those of the state.
    """
    contents = (processes or ProcessGroup()).broadcast_from_chief(lambda: _read(checkpoint))
    advice = "resume with the program, network and optimizer that wrote it, or start a new run from its weights"
    for group, variables in state.groups().items():
        if f"{group}.npz" not in contents:
            raise RunError(f"{checkpoint}: has no {group}, which this run wants; {advice}")
        with np.load(io.BytesIO(contents[f"{group}.npz"]), allow_pickle=False) as stored:
            arrays, implied = dict(stored), state.averaged_variables() if group == "average" else {}
            differing = sorted((set(arrays) ^ set(variables)) - set(implied)) or [
                name for name, array in arrays.items() if array.shape not in ((), tuple(variables[name].shape))
            ]
            if differing:
                raise RunError(
                    f"{checkpoint}: does not fit this program's {group} (first difference: {differing[0]}); {advice}"
                )
            for name, variable in variables.items():
                value = arrays[name] if name in arrays else implied[name].numpy()
                variable.assign(np.broadcast_to(value, variable.shape))
    if state.ema is not None:
        state.ema.track_restored()
    for name, value in json.loads(contents["plain"]).items():
        setattr(state, name, value)


def _read(checkpoint: Path) -> dict[str, bytes]:
    """The files of the groups by name, and the plain fields as JSON."""
    manifest = read_manifest(checkpoint)
    plain = {name: manifest[name] for name in MANIFEST_FIELDS}
    if (
        plain["best"] is not None
        and verify_checkpoint(checkpoint_path(checkpoint.parent, int(plain["best"]["step"]))) is not None
    ):
        plain["best"] = None  # its weights are lost; the best of the epochs to come takes its place
    return {file.name: file.read_bytes() for file in checkpoint.glob("*.npz")} | {"plain": json.dumps(plain).encode()}


def _pack(variables: Mapping[str, keras.Variable | tf.Variable], implied: Mapping[str, keras.Variable]) -> bytes:
    """An .npz without the variables that are equal to those of `implied`.

    One value in place of an array that holds no other.
    """
    arrays = {}
    for name, variable in variables.items():
        array = _value(variable)
        bits = _bits(array)
        if name not in implied or (bits != _bits(_value(implied[name]))).any():
            arrays[name] = array.flat[0] if array.size and (bits == bits[0]).all() else array
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _value(variable: keras.Variable | tf.Variable) -> np.ndarray:
    """What a variable holds now, not to be written to.

    On the CPU it is its own memory, which `numpy()` would copy twice.
    """
    return np.asarray(tf.convert_to_tensor(variable))


def _bits(array: np.ndarray) -> np.ndarray:
    """To be compared as they are: zero has two signs, and NaN is not equal to itself."""
    return array.reshape(-1).view(f"u{array.itemsize}")


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"))


def verify_checkpoint(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where they are as its manifest says."""
    try:
        if sha256_of((checkpoint / MANIFEST).read_bytes()) != (checkpoint / MANIFEST_HASH).read_text():
            return f"{MANIFEST} is damaged"
        for name, digest in read_manifest(checkpoint)["sha256"].items():
            if sha256_of((checkpoint / name).read_bytes()) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError) as error:
        return f"incomplete ({error})"
    return None


def delete_checkpoints_after(directory: Path, step: int) -> None:
    """Remove the checkpoints of later steps: the run went back."""
    for checkpoint in _checkpoints(directory):
        if checkpoint > checkpoint_path(directory, step):
            _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    """Out of sight first, so that a kill leaves no half of it to be believed."""
    old = checkpoint.with_name(f".old-{checkpoint.name}")
    shutil.rmtree(old, ignore_errors=True)
    checkpoint.rename(old)
    shutil.rmtree(old)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
