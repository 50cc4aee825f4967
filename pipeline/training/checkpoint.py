"""Checkpoints that survive a kill: written into a hidden folder, hashed, renamed, and verified before they are used.

Most of the state of a run with a frozen backbone is redundant: slots that no step has changed, and averages of weights
that never changed. Constant arrays are stored as one value; an EMA entry equal to its weight is omitted. Both are
compared bit for bit.
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

METADATA = "metadata.json"  # contains the hashes of all files except itself and METADATA_HASH
METADATA_HASH = "metadata.sha256"
METADATA_FIELDS = ("step", "history", "best", "skipped", "rollbacks", "changes")  # of a state, stored in the metadata


def save(state: TrainState, directory: Path, identity: Mapping[str, Any], *, keep: int) -> Path:
    """Write a checkpoint, then remove old ones: all but the newest `keep`, the best epoch's and the last epoch's.

    Args:
        state: State to write.
        directory: The run's folder of checkpoints; created if missing.
        identity: Values in which a resumed run must agree; JSON values, stored in the metadata.
        keep: Number of newest checkpoints to keep, at least 1.

    Returns:
        The checkpoint's folder, `step-<step>`.

    Raises:
        TrainingError: The checkpoint cannot be written. The older checkpoints are unchanged.
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
    """Write a state into a folder.

    The files are written into a hidden folder, each is synced to the disk, and the folder is renamed into place: after
    a kill at any moment there is either a complete checkpoint or none.

    Args:
        state: State to write.
        final: The folder, `step-<number>`; an existing one is replaced.
        identity: Values in which a resumed run must agree, as in `save`.
        extra_files: Contents of additional files, by name.

    Returns:
        The folder.

    Raises:
        TrainingError: The checkpoint cannot be written.
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
        # While a file is written and hashed, the next one is packed, which holds the GIL.
        with ThreadPoolExecutor(len(files)) as executor:
            hashes = {name: executor.submit(put, name, pack()) for name, pack in files.items()}
        metadata = {
            **{name: getattr(state, name) for name in METADATA_FIELDS},
            "identity": dict(identity),
            "versions": {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__},
            "sha256": {name: digest.result() for name, digest in hashes.items()},
        }
        packed = json.dumps(metadata, indent=1).encode()
        for name, content in {METADATA: packed, METADATA_HASH: sha256_of(packed).encode()}.items():
            _write_synced(aside / name, content)
        fsync(aside)
        if final.exists():  # a damaged one: the run was resumed from an older one and has reached this step again
            _remove(final)
        aside.rename(final)
        fsync(final.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)  # to free its space on the disk
        raise TrainingError(
            f"{final}: cannot be written ({error.strerror or error}); older checkpoints are unchanged. "
            "Correct the cause, for instance by freeing disk space, and continue with --resume"
        ) from error
    return final


class CheckpointCallback(Callback):
    """A callback that saves the state at every checkpoint of the training loop."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], *, keep: int) -> None:
        """Create the callback; for the arguments, see `save`."""
        self._directory, self._identity, self._keep = directory, identity, keep

    def on_checkpoint(self, state: TrainState) -> None:
        """Save the state."""
        save(state, self._directory, self._identity, keep=self._keep)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return directory / f"step-{step:08d}"


def latest_valid_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files all match the hashes in its metadata.

    Returns:
        The checkpoint's folder, or None if there is none, and a message for each newer one that had to be skipped.
    """
    problems: list[str] = []
    for checkpoint in reversed(_checkpoints(directory)):
        problem = verify_checkpoint(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems.append(f"{checkpoint}: {problem}")
    return None, problems


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Return the metadata of a verified checkpoint."""
    return json.loads((checkpoint / METADATA).read_text())


def restore(state: TrainState, checkpoint: Path, processes: ProcessGroup | None = None) -> None:
    """Restore a state, built for the same config, from a verified checkpoint.

    If the checkpoint of the best epoch is damaged, the state has no best epoch.

    Args:
        state: State to change; every process has its own.
        checkpoint: Folder, read by the chief; the other processes need no access to its disk.
        processes: Processes of the run; None for this process alone.

    Raises:
        RunError: The variables of the checkpoint are not those of the state.
    """
    contents = (processes or ProcessGroup()).broadcast_from_chief(lambda: _read(checkpoint))
    advice = "resume with the program, network and optimizer that wrote it, or start a new run from its weights"
    for group, variables in state.groups().items():
        if f"{group}.npz" not in contents:
            raise RunError(f"{checkpoint}: has no {group}, which this run needs; {advice}")
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
    for name, value in json.loads(contents["fields"]).items():
        setattr(state, name, value)


def _read(checkpoint: Path) -> dict[str, bytes]:
    """Return the files of the groups by name, and the fields of the metadata as JSON under the name `fields`."""
    metadata = read_metadata(checkpoint)
    fields = {name: metadata[name] for name in METADATA_FIELDS}
    best = fields["best"]
    if best is not None and verify_checkpoint(checkpoint_path(checkpoint.parent, int(best["step"]))) is not None:
        fields["best"] = None  # its weights are damaged; the best of the following epochs replaces it
    return {file.name: file.read_bytes() for file in checkpoint.glob("*.npz")} | {"fields": json.dumps(fields).encode()}


def _pack(variables: Mapping[str, keras.Variable | tf.Variable], implied: Mapping[str, keras.Variable]) -> bytes:
    """Return an .npz without the variables that equal those of `implied`; constant arrays are stored as one value."""
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
    """Return the value of a variable, which must not be written to.

    On the CPU it is the variable's memory, which `numpy()` would copy twice.
    """
    return np.asarray(tf.convert_to_tensor(variable))


def _bits(array: np.ndarray) -> np.ndarray:
    """Return the bits of an array, flat, to compare: zero has two signs, and NaN does not equal itself."""
    return array.reshape(-1).view(f"u{array.itemsize}")


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"))


def verify_checkpoint(checkpoint: Path) -> str | None:
    """Return the problem with a checkpoint's files, or None if they match its metadata."""
    try:
        if sha256_of((checkpoint / METADATA).read_bytes()) != (checkpoint / METADATA_HASH).read_text():
            return f"{METADATA} is damaged"
        for name, digest in read_metadata(checkpoint)["sha256"].items():
            if sha256_of((checkpoint / name).read_bytes()) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError) as error:
        return f"incomplete ({error})"
    return None


def delete_checkpoints_after(directory: Path, step: int) -> None:
    """Remove the checkpoints of later steps, after a rollback."""
    for checkpoint in _checkpoints(directory):
        if checkpoint > checkpoint_path(directory, step):
            _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a kill leaves no incomplete one that could be read."""
    old = checkpoint.with_name(f".old-{checkpoint.name}")
    shutil.rmtree(old, ignore_errors=True)
    checkpoint.rename(old)
    shutil.rmtree(old)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
