"""A bench against plain Keras.

The same network, batch, precision and data, in a process of its own, round by round in turns.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any, Literal

from pipeline import ORIGINAL_ENVIRONMENT
from pipeline.benchmark import keras_fit
from pipeline.benchmark.throughput import ThroughputBenchmark
from pipeline.data.sources.files import FileSource
from pipeline.errors import ConfigError, RunError

Baseline = Literal["keras-fit", "keras-step"]


def run_keras_baseline(
    bench: ThroughputBenchmark,
    baseline: Baseline,
    *,
    seconds: float,
    pairs: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, float]]:
    """Time training and Keras in turns.

    Args:
        bench: What to train.
        rival: keras-fit: from files to weights, by `fit`; keras-step: Keras's `train_step` and the project's, each on
            one batch.
        seconds: About what a round takes here; Keras gets the same number of images.
        pairs: Rounds of each.
        progress: Called behind each pair with the number of them and of all.

    Returns:
        Images per second here and of Keras, for each pair.

    Raises:
        ConfigError: Keras cannot be given the same data.
        RunError: Keras failed.
    """
    alone = baseline == "keras-step"
    _, rate = bench.time_step(min(seconds, 10.0))
    spec = _spec(bench, alone) | {"steps": max(3, round(seconds * rate / bench.batch_size))}
    theirs: list[float] = []
    with _started(spec) as ask:
        ask()  # compiles it

        def their_turn() -> None:
            theirs.append(ask())
            if progress is not None:
                progress(len(theirs), pairs)

        bench.train_for(seconds, pause=their_turn, rounds=pairs, one_batch=alone)
    return list(zip(bench.clock.rates, theirs, strict=True))


def _spec(bench: ThroughputBenchmark, alone: bool) -> dict[str, Any]:
    """What to train, for `pipeline.benchmark.keras_fit`."""
    config, variant = bench.config, bench.config.variant
    stage = config.train.stages[0]
    return {
        "variant": variant.name,
        "multipliers": {
            name: getattr(variant, name) for name in ("name", "width", "depth", "resolution", "dropout", "lite")
        },
        "resolution": variant.resolution,
        "classes": len(bench.manifest.class_names),
        "batch_size": bench.batch_size,
        "dtype": bench.runtime.dtype,
        "xla": bench.runtime.jit_compile,
        "trainable": [layer.name for layer in bench.state.model.layers if layer.trainable],
        "optimizer": config.optimizer.name,
        "learning_rate": (stage.base_lr or config.optimizer.base_lr) * bench.batch_size / 256,
        "weight_decay": config.optimizer.weight_decay,
        "label_smoothing": config.train.label_smoothing,
    } | ({"files": None} if alone else _files(bench))


def _files(bench: ThroughputBenchmark) -> dict[str, Any]:
    source, settings = bench.source, bench.config.augment
    if not isinstance(source, FileSource):
        raise ConfigError(
            "--baseline keras-fit reads pictures from files: take a config whose data.source is folder or csv"
        )
    transforms = {transform.name: transform.args for transform in settings.transforms}
    plain = (
        not (settings.randaugment or settings.mixup or settings.cutmix)
        and bench.config.train.stages[0].use_augmentation
    )
    even = transforms.get("HorizontalFlip", {}).get("p", 0.5) == 0.5
    if not (plain and even) or not {"RandomResizedCrop"} <= set(transforms) <= {"RandomResizedCrop", "HorizontalFlip"}:
        raise ConfigError(
            "--baseline keras-fit compares equal work: RandomResizedCrop, with or without HorizontalFlip at p = 0.5, and nothing else; "
            "choose a --stage that augments, and add 'augment.transforms=[{RandomResizedCrop: {}}, {HorizontalFlip: {}}]' "
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
def _started(spec: dict[str, Any]) -> Iterator[Callable[[], float]]:
    """Keras in a process of its own; the block is given what has it do a round and answer with images per second."""
    program, environment = (
        [sys.executable, "-P", str(Path(keras_fit.__file__))],
        ORIGINAL_ENVIRONMENT | {"TF_CPP_MIN_LOG_LEVEL": "2"},
    )
    with (
        tempfile.TemporaryFile("w+") as words,
        subprocess.Popen(program, stdin=PIPE, stdout=PIPE, stderr=words, text=True, env=environment) as process,
    ):
        to, answers = process.stdin, process.stdout
        assert to is not None
        assert answers is not None

        def tell(line: str) -> None:
            to.write(line + "\n")
            to.flush()

        def ask() -> float:
            try:
                tell("go")
                return float(answers.readline())
            except (OSError, ValueError):
                process.wait()
                words.seek(0)
                last = (words.read().strip().splitlines() or ["it said nothing"])[-1]
                raise RunError(f"Keras ended with exit code {process.returncode}: {last}") from None

        try:
            tell(json.dumps(spec))
            yield ask
        finally:
            process.kill()
