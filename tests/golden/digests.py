"""Show whether a refactor moved a bit: digest the results of short training runs and compare two such records.

    python tests/golden/digests.py record before.json
    python tests/golden/digests.py compare before.json after.json

Make both records on the same machine with the same libraries: processors and thread counts sum in other orders. To
record another checkout, start the copy of this script that lies in it.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
# Logical CPU devices by config, the longest run first.
DEVICES = {"two_devices": 2, "augmented": 1, "digits": 1, "augmented_albumentations": 1, "head": 1}
# Parts of the names in metrics.json that are left out.
TIME_DEPENDENT = ("seconds", "per_second", "duration", "timestamp")
ON_DEVICES = """
import sys
try:
    from pipeline.cli.train import main
    from pipeline.console import run_cli
except ModuleNotFoundError:
    from train import main
    from pipeline.screen import run_program as run_cli
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * {devices})
sys.argv[0] = "train.py"
sys.exit(run_cli(main))
"""

Digests = dict[str, str]


def digest_array(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's type, shape and bytes."""
    head = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def digest_column(column: pd.Series) -> str:
    """Return the SHA-256 of a table's column; of one that holds no numbers, by the values' JSON."""
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
        return digest_array(column.to_numpy())
    values = [value.tolist() if hasattr(value, "tolist") else value for value in column.tolist()]
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()


def digest_model(path: Path) -> Digests:
    """Digest every array of a .keras file."""
    found: Digests = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = digest_array(np.asarray(item[()]))

    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as weights:
        weights.visititems(visit)
    return found


def digest_npz(path: Path) -> Digests:
    """Digest every array of an .npz file."""
    with np.load(path) as arrays:
        return {name: digest_array(arrays[name]) for name in arrays.files}


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by their dotted names, without those that depend on time."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, item in items:
        if not any(part in key for part in TIME_DEPENDENT):
            leaves |= flatten(item, f"{name}.{key}" if name else key)
    return leaves


def digest_run(run: Path) -> dict[str, Any]:
    """Digest what a finished run left behind.

    Args:
        run: Its directory.

    Returns:
        Under `arrays`, digests by file and by name; under `metrics`, values by file and by name.
    """
    checkpoint = max(run.glob("checkpoints/step-*"))
    arrays = {"model.keras": digest_model(run / "model.keras")}
    for path in sorted(checkpoint.glob("*.npz")):
        arrays[path.relative_to(run).as_posix()] = digest_npz(path)
    metrics: dict[str, dict[str, Any]] = {}
    for path in sorted(run.glob("evaluation/*/predictions.parquet")):
        table = pd.read_parquet(path)
        arrays[path.relative_to(run).as_posix()] = {str(name): digest_column(table[name]) for name in table.columns}
        figures = path.with_name("metrics.json")
        metrics[figures.relative_to(run).as_posix()] = flatten(json.loads(figures.read_text(encoding="utf-8")))
    if not metrics or len(arrays) < 3 or not all(arrays.values()):
        raise RuntimeError(
            f"{run}: has no checkpoint, no predictions or an empty file; digests.py no longer knows a run"
        )
    return {"arrays": arrays, "metrics": metrics}


def train(name: str, devices: int, folder: Path) -> Path:
    """Train as one of the configs beside this script says.

    Args:
        name: The config's, without its suffix.
        devices: Logical CPU devices.
        folder: Takes all that is written.

    Returns:
        The run's directory.
    """
    program = ["train.py"] if devices == 1 else ["-c", ON_DEVICES.format(devices=devices)]
    config = (HERE / f"{name}.yaml").relative_to(PROJECT)
    command = [sys.executable, *program, "--config", str(config), "--run-dir", str(folder / name)]
    environment = {key: value for key, value in os.environ.items() if key not in ("TF_CONFIG", "MLFLOW_RUN_ID")}
    environment |= {
        "PYTHONPATH": str(PROJECT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ended = subprocess.run(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if ended.returncode:
        raise RuntimeError(f"{name}: training ended with {ended.returncode}\n{ended.stdout}")
    return folder / name


def record_run(name: str, devices: int) -> dict[str, Any]:
    """Run a config in a folder of its own; return the digests."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        digests = digest_run(train(name, devices, Path(folder)))
    number = sum(map(len, digests["arrays"].values()))
    print(f"{name}: {number} arrays in {time.perf_counter() - start:.0f} s", flush=True)
    return digests


def record(out: Path) -> None:
    """Run every config, two at a time, and write the digests to a file."""
    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(DEVICES, pool.map(record_run, DEVICES, DEVICES.values()), strict=True))
    out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def compare_names(place: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """Print which names went, a difference each, and which came; return the number of differences."""
    for name in sorted(old.keys() - new.keys()):
        print(f"DIFFERENCE {place}: {name} is missing")
    for name in sorted(new.keys() - old.keys()):
        print(f"note {place}: {name} was added")
    return len(old.keys() - new.keys())


def compare_arrays(place: str, old: Digests, new: Digests) -> int:
    """Compare the arrays of a file, whatever their names.

    Returns:
        The number of old arrays that the new file has under no name.
    """
    old_left = {name: digest for name, digest in old.items() if new.get(name) != digest}
    new_left = {name: digest for name, digest in new.items() if old.get(name) != digest}
    common = Counter(old_left.values()) & Counter(new_left.values())
    renamed = common.total()
    if renamed:
        print(f"note {place}: {renamed} of {len(old)} arrays renamed")
    differences = 0
    unmatched = Counter(common)
    for name, digest in old_left.items():
        if unmatched[digest]:
            unmatched[digest] -= 1
        else:
            print(f"DIFFERENCE {place}: {name} " + ("has other values" if name in new else "is missing"))
            differences += 1
    unmatched = Counter(common)
    for name, digest in new_left.items():
        if unmatched[digest]:
            unmatched[digest] -= 1
        elif name not in old:
            print(f"note {place}: {name} was added")
    return differences


def compare_metrics(place: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """Compare the metrics of a file that both have; return the number of differences."""
    for names, what in ((old.keys() - new.keys(), "removed"), (new.keys() - old.keys(), "added")):
        for name in sorted(names):
            print(f"note {place}: {name} was {what}")
    moved = [name for name in old if name in new and json.dumps(old[name]) != json.dumps(new[name])]
    for name in moved:
        print(f"DIFFERENCE {place}: {name} was {old[name]!r}, is {new[name]!r}")
    return len(moved)


def compare(old_path: Path, new_path: Path) -> int:
    """Print how two records differ; return the exit code, 1 for any difference."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (old_path, new_path))
    differences = compare_names("runs", old, new)
    for run in old.keys() & new.keys():
        for kind, compare_file in (("arrays", compare_arrays), ("metrics", compare_metrics)):
            old_files, new_files = old[run][kind], new[run][kind]
            differences += compare_names(run, old_files, new_files)
            for file in sorted(old_files.keys() & new_files.keys()):
                differences += compare_file(f"{run}/{file}", old_files[file], new_files[file])
    count = sum(len(names) for run in old.values() for kind in run.values() for names in kind.values())
    print(
        f"{differences} differences among {count} arrays and metrics" if differences else f"no difference among {count}"
    )
    return 1 if differences else 0


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Digest short training runs and compare two such records.")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run every config beside this script and write the digests")
    recording.add_argument("out", type=Path, metavar="OUT.json")
    comparing = commands.add_parser("compare", help="print how two records differ; exit code 1 for any difference")
    comparing.add_argument("old", type=Path, metavar="OLD.json")
    comparing.add_argument("new", type=Path, metavar="NEW.json")
    arguments = parser.parse_args()
    if arguments.command == "compare":
        return compare(arguments.old, arguments.new)
    record(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
