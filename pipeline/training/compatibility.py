"""What a resumed run must agree with.

The config, the classes, the data, their order and the number of replicas of its checkpoint.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from pipeline.errors import RunError, suggest
from pipeline.training.checkpoint import read_manifest

FREE_TO_CHANGE = (  # no step taken so far would have come out otherwise
    "tracking",
    "export",
    "runtime.num_workers",
    "runtime.data_service",
    "train.max_checkpoints",
    "train.checkpoint_every_steps",
    "train.on_nan",
)


def check_compatible(
    checkpoint: Path,
    identity: Mapping[str, Any],
    allowed: Sequence[str] = (),
    *,
    details: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Refuse to go on with another config, other data, another order or another number of replicas than the checkpoint's.

    Args:
        checkpoint: A verified one.
        identity: What this run is.
        allowed: Keys that may differ all the same, each with everything below it.
        details: Lines that say more of a key than its two values do.

    Returns:
        `step`, `key`, `was` and `is` of every difference that was allowed.

    Raises:
        RunError: Naming every other difference, or a key of `allowed` that there is not.
    """
    manifest = read_manifest(checkpoint)
    old, new = _keys(manifest["identity"]), _keys(json.loads(json.dumps(identity)))
    keys = sorted(old.keys() | new.keys())
    for name in allowed:
        if not any(_within(key, [name]) for key in keys):
            raise RunError(f"--allow-change {name}: there is no such key{suggest(name, keys)}")
    differing = [
        {"step": manifest["step"], "key": key, "was": old.get(key), "is": new.get(key)}
        for key in keys
        if old.get(key) != new.get(key) and not _within(key, FREE_TO_CHANGE)
    ]
    refused = [change for change in differing if not _within(change["key"], allowed)]
    if refused:
        lines = "\n".join(_line(change, (details or {}).get(change["key"], "")) for change in refused)
        remedy = " ".join(f"--allow-change {change['key']}" for change in refused)
        raise RunError(
            f"{checkpoint}: belongs to a run that differs in\n{lines}\n"
            f"resume it as it was, start a new run, or go on with the change knowingly by {remedy}"
        )
    return differing


def _line(change: Mapping[str, Any], detail: str) -> str:
    return f"  {change['key']}:" + (
        f"\n{indent(detail, '  ')}" if detail else f" was {change['was']!r}, is {change['is']!r}"
    )


def _within(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _keys(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("config."): value for key, value in _flat(dict(identity)).items()}


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        return {
            k: v for key, value in values.items() for k, v in _flat(value, f"{path}.{key}" if path else key).items()
        }
    return {path: values}
