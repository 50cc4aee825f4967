"""The comparison with plain Keras, which trains the same network in another process, round by round in turns.

Batch size, precision and data are the same.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE
from typing import Any, Literal

from pipeline import ORIGINAL_ENVIRONMENT
from pipeline.benchmark import keras_fit
from pipeline.benchmark.throughput import ThroughputBenchmark
from pipeline.config.optimizer import OPTIMIZERS
from pipeline.console import ProgressFn
from pipeline.data.sources.files import FileSource
from pipeline.errors import ConfigError, RunError

Baseline = Literal["keras-fit", "keras-step"]


def run_keras_baseline(
    bench: ThroughputBenchmark,
    baseline: Baseline,
    *,
    seconds: float,
    pairs: int,
    progress: ProgressFn | None = None,
) -> list[tuple[float, float]]:
    """Time this project's training and Keras's in turns.

    Args:
        bench: The benchmark of this project.
        baseline: keras-fit: from files to weights, by `fit`; keras-step: Keras's `train_step` and the project's, each
            on one batch.
        seconds: Approximate duration of a round of this project; Keras gets the same number of images.
        pairs: Number of rounds of each.
        progress: Called after each pair of rounds with the number of pairs so far and of all pairs.

    Returns:
        Images per second of this project and of Keras, for each pair.

    Raises:
        ConfigError: Keras cannot train on the same data.
        RunError: Keras failed.
    """
    one_batch = baseline == "keras-step"
    _, rate = bench.time_step(min(seconds, 10.0))
    spec = _spec(bench, one_batch=one_batch) | {"steps": max(3, round(seconds * rate / bench.batch_size))}
    keras_rates: list[float] = []
    with _keras_process(spec) as run_round:
        run_round()  # compiles it

        def run_keras() -> None:
            keras_rates.append(run_round())
            if progress is not None:
                progress(len(keras_rates), pairs)

        bench.train_for(seconds, pause=run_keras, rounds=pairs, one_batch=one_batch)
    return list(zip(bench.clock.rates, keras_rates, strict=True))


def _spec(bench: ThroughputBenchmark, *, one_batch: bool) -> dict[str, Any]:
    """Return the description of the training for `pipeline.benchmark.keras_fit`."""
    config, variant = bench.config, bench.config.variant
    stage, optimizer = config.train.stages[0], OPTIMIZERS[config.optimizer.name]
    decay = {"weight_decay": config.optimizer.weight_decay} if optimizer.decoupled_weight_decay else {}
    return {
        "variant": variant.name,
        "multipliers": asdict(variant),
        "resolution": variant.resolution,
        "classes": len(bench.manifest.class_names),
        "batch_size": bench.batch_size,
        "dtype": bench.runtime.dtype,
        "xla": bench.runtime.jit_compile,
        "trainable": [layer.name for layer in bench.state.model.layers if layer.trainable],
        "optimizer": optimizer.keras_class,
        "optimizer_arguments": {**optimizer.arguments, **decay},
        "learning_rate": (stage.base_lr or config.optimizer.base_lr) * bench.batch_size / 256,
        "label_smoothing": config.train.label_smoothing,
    } | ({"files": None} if one_batch else _files(bench))


def _files(bench: ThroughputBenchmark) -> dict[str, Any]:
    """Return files, labels and augmentation for Keras's input pipeline."""
    source, settings = bench.source, bench.config.augment
    if not isinstance(source, FileSource):
        raise ConfigError(
            "--baseline keras-fit reads images from files: take a config whose data.source is folder or csv"
        )
    transforms = {transform.name: transform.args for transform in settings.transforms}
    plain = (
        not (settings.randaugment or settings.mixup or settings.cutmix)
        and bench.config.train.stages[0].use_augmentation
    )
    even = transforms.get("HorizontalFlip", {}).get("p", 0.5) == 0.5
    if not (plain and even) or not {"RandomResizedCrop"} <= set(transforms) <= {"RandomResizedCrop", "HorizontalFlip"}:
        raise ConfigError(
            "--baseline keras-fit compares equal work: RandomResizedCrop, with or without HorizontalFlip at p = 0.5, "
            "and nothing else; choose a --stage that augments, and add "
            "'augment.transforms=[{RandomResizedCrop: {}}, {HorizontalFlip: {}}]' "
            "augment.randaugment=null augment.mixup=0 augment.cutmix=0"
        )
    crop, table = transforms["RandomResizedCrop"], bench.manifest.table.iloc[bench.manifest.indices("train")]
    return {
        "files": [str(source.root / key) for key in table["key"]],
        "labels": table["label"].tolist(),
        "scale": crop.get("scale", (0.08, 1.0)),
        "ratio": crop.get("ratio", (3 / 4, 4 / 3)),
        "flip": "HorizontalFlip" in transforms,
    }


@contextmanager
def _keras_process(spec: dict[str, Any]) -> Iterator[Callable[[], float]]:
    """Start Keras in a process; the block gets a function that runs a round there and returns images per second."""
    program, environment = (
        [sys.executable, "-P", str(Path(keras_fit.__file__))],
        ORIGINAL_ENVIRONMENT | {"TF_CPP_MIN_LOG_LEVEL": "2"},
    )
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(program, stdin=PIPE, stdout=PIPE, stderr=log, text=True, env=environment) as process,
    ):
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def send(line: str) -> None:
            stdin.write(line + "\n")
            stdin.flush()

        def run_round() -> float:
            try:
                send("go")
                return float(stdout.readline())
            except (OSError, ValueError):
                process.wait()
                log.seek(0)
                last = (log.read().strip().splitlines() or ["it printed nothing"])[-1]
                raise RunError(f"Keras ended with exit code {process.returncode}: {last}") from None

        try:
            send(json.dumps(spec))
            yield run_round
        finally:
            process.kill()
