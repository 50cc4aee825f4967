"""Resuming a run: the checkpoint to continue from, and the check that it belongs to the same run.

A resumed run has the config, the classes, the data, their order and the number of replicas of its checkpoint.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from pipeline.data.manifest import Manifest, describe_changes
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import RunError, suggest
from pipeline.runs.run_directory import RunDirectory
from pipeline.training import checkpoint
from pipeline.training.state import TrainState

FREE_TO_CHANGE = (  # these keys have no influence on the steps taken so far
    "tracking",
    "data.path",  # the contents are compared by their hashes
    "data.root",
    "export",
    "runtime.num_workers",
    "runtime.data_service",
    "train.max_checkpoints",
    "train.checkpoint_every_steps",
    "train.on_nan",
)


def restore_latest(
    state: TrainState,
    run: RunDirectory,
    identity: Mapping[str, Any],
    manifest: Manifest,
    log: Callable[[str], None],
    allowed: Sequence[str],
    processes: ProcessGroup,
) -> None:
    """Restore the state from the newest valid checkpoint, if that belongs to the same run or differs as allowed.

    Args:
        state: State to change; every process has its own.
        run: Directory of the run; only the chief reads it.
        identity: Values in which the run must agree with the checkpoint.
        manifest: Images of the run.
        log: Prints a line for the user.
        allowed: Keys in which the run may differ from the checkpoint.
        processes: Processes of the run.

    Raises:
        RunError: There is no valid checkpoint, or it belongs to another run.
    """

    def choose() -> dict[str, bytes]:
        newest, problems = checkpoint.latest_valid_checkpoint(run.checkpoints)
        for problem in problems:
            log(f"skipped {problem}")
        if newest is None:
            raise RunError(f"{run.checkpoints}: holds no usable checkpoint to resume from; start a new run")
        changes = check_compatible(
            newest, identity, allowed, details={"data": describe_changes(Manifest.load(run.manifest), manifest)}
        )
        return {"name": newest.name.encode(), "changes": json.dumps(changes).encode()}

    chosen = processes.broadcast_from_chief(choose)
    newest: Path = run.checkpoints / chosen["name"].decode()
    checkpoint.restore(state, newest, processes)
    state.changes += json.loads(chosen["changes"])
    for change in state.describe_changes():
        log(f"changed: {change}")
    log(f"resumed after step {state.step:,} from {newest}")


def check_compatible(
    checkpoint_path: Path,
    identity: Mapping[str, Any],
    allowed: Sequence[str] = (),
    *,
    details: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Check that config, classes, data, order and number of replicas are those of a checkpoint.

    Args:
        checkpoint_path: A verified checkpoint.
        identity: The values of this run.
        allowed: Keys that may differ, each including everything below it.
        details: Lines that describe the difference of a key, in place of its two values.

    Returns:
        `step`, `key`, `was` and `is` of every difference that was allowed.

    Raises:
        RunError: Another key differs (the message names all of them), or a key of `allowed` does not exist.
    """
    metadata = checkpoint.read_metadata(checkpoint_path)
    previous, current = _keys(metadata["identity"]), _keys(json.loads(json.dumps(identity)))
    keys = sorted(previous.keys() | current.keys())
    for name in allowed:
        if not any(_within(key, [name]) for key in keys):
            raise RunError(f"--allow-change {name}: there is no such key{suggest(name, keys)}")
    differing = [
        {"step": metadata["step"], "key": key, "was": previous.get(key), "is": current.get(key)}
        for key in keys
        if previous.get(key) != current.get(key) and not _within(key, FREE_TO_CHANGE)
    ]
    refused = [change for change in differing if not _within(change["key"], allowed)]
    if refused:
        lines = "\n".join(_line(change, (details or {}).get(change["key"], "")) for change in refused)
        remedy = " ".join(f"--allow-change {change['key']}" for change in refused)
        raise RunError(
            f"{checkpoint_path}: belongs to a run that differs in\n{lines}\n"
            f"resume with the previous values, start a new run, or accept the change by {remedy}"
        )
    return differing


def _line(change: Mapping[str, Any], detail: str) -> str:
    return f"  {change['key']}:" + (
        f"\n{indent(detail, '  ')}" if detail else f" was {change['was']!r}, is {change['is']!r}"
    )


def _within(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _keys(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("config."): value for key, value in _flatten(dict(identity)).items()}


def _flatten(values: Any, path: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        return {
            k: v for key, value in values.items() for k, v in _flatten(value, f"{path}.{key}" if path else key).items()
        }
    return {path: values}
