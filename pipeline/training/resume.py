"""Going on from the newest good checkpoint of a run."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.manifest import Manifest, differences
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import RunError
from pipeline.runs.run_directory import RunDirectory
from pipeline.training import checkpoint
from pipeline.training.compatibility import check_compatible
from pipeline.training.state import TrainState


def restore_latest(
    state: TrainState,
    run: RunDirectory,
    identity: Mapping[str, Any],
    manifest: Manifest,
    say: Callable[[str], None],
    allowed: Sequence[str],
    processes: ProcessGroup,
) -> None:
    """Put the newest good checkpoint into the state, if it is one of the same run but for what is allowed to differ.

    Args:
        state: Of every process.
        run: The directory, which the chief reads.
        identity: What this run is.
        manifest: Its samples.
        say: Tells the user.
        allowed: Keys in which the run may differ from the checkpoint's.
        processes: Those of the run.

    Raises:
        RunError: There is no such checkpoint.
    """

    def choose() -> dict[str, bytes]:
        newest, problems = checkpoint.latest_valid_checkpoint(run.checkpoints)
        for problem in problems:
            say(f"passed over {problem}")
        if newest is None:
            raise RunError(f"{run.checkpoints}: holds no usable checkpoint to resume from; start a new run")
        changes = check_compatible(
            newest, identity, allowed, details={"data": differences(Manifest.load(run.manifest), manifest)}
        )
        return {"name": newest.name.encode(), "changes": json.dumps(changes).encode()}

    chosen = processes.broadcast_from_chief(choose)
    newest: Path = run.checkpoints / chosen["name"].decode()
    checkpoint.restore(state, newest, processes)
    state.changes += json.loads(chosen["changes"])
    for change in state.describe_changes():
        say(f"changed: {change}")
    say(f"resumed behind step {state.step:,} from {newest}")
