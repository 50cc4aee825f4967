"""How fast a config trains on this machine.

The step alone, the stream alone, both together, and what the stream spends its time on.
"""

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.config.schema import Config
from pipeline.console import Console
from pipeline.data.augmentation import image_augmentation
from pipeline.data.input_pipeline import steps_per_epoch
from pipeline.data.manifest import Manifest
from pipeline.data.mixup import group_mixing, mixing_group
from pipeline.data.randaugment import randaugment
from pipeline.data.sources.base import DataSource
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import scan
from pipeline.distributed.devices import Runtime, setup_devices
from pipeline.distributed.signals import TrainingInterrupted
from pipeline.training.assembly import create_model, create_train_state
from pipeline.training.callbacks import Callback
from pipeline.training.memory import check_batch, resolve_batch_size
from pipeline.training.recipe import class_weights, resolve_recipe
from pipeline.training.schedule import TrainStage, build_schedule, set_trainable
from pipeline.training.stage_data import StageData
from pipeline.training.state import TrainState
from pipeline.training.train_step import TrainStep
from pipeline.training.trainer import StageInputs, Trainer
from pipeline.training.xla import resolve_xla

ENDLESS = 10**6  # epochs, of the one stage that is measured
ROUNDS = 3  # of every measurement, in turns: the machine's speed changes under it
WARM_UP = 2  # steps or batches that are left out behind the first one, which is compiled
TIMED_IMAGES = 256  # at most, for the time of each part of the stream


@dataclass(frozen=True)
class BenchmarkResult:
    """What a bench found. Rates are images per second over all replicas, each the median of the rounds.

    Attributes:
        step: Of the training step on a batch that lies on the device.
        stream: Of the input stream, its batches brought to the device.
        training: Of the training loop, from files to weights.
        share: What training reaches of the smaller one of the two, the median of the rounds.
        first_step_seconds: Tracing, compilation and the first step.
        first_batch_seconds: From opening the stream to its first batch.
        parts: Milliseconds for an image, on one thread, by part of the stream.
        peak_bytes: Of the GPU's memory, or where there is none of the process's.
    """

    step: float
    stream: float
    training: float
    share: float
    first_step_seconds: float
    first_batch_seconds: float
    parts: Mapping[str, float]
    peak_bytes: int

    @property
    def bound(self) -> str:
        """Which of the two holds the other back: `step` or `stream`."""
        return "step" if self.step <= self.stream else "stream"


class ThroughputBenchmark:
    """A stage of a config's training, ready to be timed. Weights are random: no figure depends on them."""

    def __init__(self, config: Config, console: Console, *, stage: int | None = None) -> None:
        """Read the data and builds what a run would.

        Args:
            config: Of the run.
            screen: Shows how far it is.
            stage: The stage to be timed, from 1, None for the last; it trains on pictures even where a run would keep
                their features.

        Raises:
            UserError: Where the run would.
        """
        self._screen = console
        self.runtime: Runtime = setup_devices(config.runtime, config.seed)
        self.source: DataSource = open_source(config.data)
        with console.progress("reading the data") as count:
            self.manifest: Manifest = scan(self.source, config.data, seed=config.seed, progress=count)
        model, _ = create_model(config, self.runtime, self.manifest.class_names, console, weights=None)
        config = resolve_recipe(resolve_batch_size(config, self.runtime, model), self.manifest)
        check_batch(config, self.runtime)
        counts = self.manifest.class_counts()["train"].tolist()
        steps = steps_per_epoch(sum(counts), config.train.batch_size)
        config, self.runtime, _ = resolve_xla(config, self.runtime, model, build_schedule(config, steps))
        endless = config.train.stage(stage).model_copy(update={"epochs": ENDLESS})
        train = config.train.model_copy(
            update={"stages": (endless,), "early_stopping": None, "checkpoint_every_steps": None}
        )
        self.config = config.model_copy(update={"train": train})
        self.state: TrainState = create_train_state(self.config, self.runtime, model)
        self.stages = StageData(
            self.config, self.runtime, self.manifest, self.source, self.state, console, lambda: False
        )
        self.clock = ThroughputTimer()
        self._trainer = OneStepTrainer(
            self.config,
            self.runtime,
            steps,
            [self.clock],
            self.clock.is_over,
            class_weights=class_weights(config, self.manifest.class_names, counts),
        )
        self._stage: TrainStage = self._trainer.stages[0]
        set_trainable(model, self._stage.config)

    @property
    def batch_size(self) -> int:
        """Images of a step."""
        return self.config.train.batch_size

    def measure(self, seconds: float) -> BenchmarkResult:
        """Time everything, each part for about so long over all rounds.

        In each round step, stream and both, in this order.
        """
        firsts, rates = [], []
        with self._screen.progress("timing step, stream and both") as count:
            for number in range(ROUNDS):
                first_step, step = self.time_step(seconds / ROUNDS)
                first_batch, stream = self.time_stream(seconds / ROUNDS)
                firsts.append((first_step, first_batch))
                rates.append((step, stream, self.train_for(seconds / ROUNDS)))
                count(number + 1, ROUNDS)
        step, stream, training = np.median(rates, axis=0).tolist()
        share = float(np.median([both / min(alone) for *alone, both in rates]))
        return BenchmarkResult(step, stream, training, share, *firsts[0], self.time_parts(), peak_bytes())

    def time_step(self, seconds: float) -> tuple[float, float]:
        """Seconds to the end of the first step, and images per second of those after it."""
        batch = next(self._batches())
        train_step = self._trainer.make_train_step(self._stage, self.state, self.state.model)

        def take(steps: int) -> float:
            start = time.perf_counter()
            for _ in range(steps):
                train_step(batch, 1e-6)
            self.state.totals.read()  # waits for the device
            return time.perf_counter() - start

        first = take(1)
        each = take(WARM_UP) / WARM_UP
        steps = max(3, round(seconds / each))
        return first, steps * self.batch_size / take(steps)

    def time_stream(self, seconds: float) -> tuple[float, float]:
        """Seconds to the first batch, and images per second of those after it."""
        start = time.perf_counter()
        batches = self._batches()
        next(batches)
        first = time.perf_counter() - start
        for _ in islice(batches, WARM_UP):
            pass
        start, number = time.perf_counter(), 0
        while number < 3 or time.perf_counter() - start < seconds:
            next(batches)
            number += 1
        return first, number * self.batch_size / (time.perf_counter() - start)

    def train_for(
        self, seconds: float, *, pause: Callable[[], None] | None = None, rounds: int = 1, one_batch: bool = False
    ) -> float:
        """Run the training loop.

        Args:
            seconds: Of each round, warm-up not counted.
            pause: Called behind each round, outside its time.
            rounds: How many.
            alone: Give it one and the same batch again and again, without decoding any.

        Returns:
            Images per second, mean of the rounds; `clock.rates` has them one by one.
        """
        self.clock.begin(seconds, self.batch_size, rounds, pause)
        stream = self._repeated if one_batch else self.stages.stream
        with suppress(TrainingInterrupted):
            self._trainer.run(self.state, lambda stage: StageInputs(self.state.model, stream, dict))
        return float(np.mean(self.clock.rates))

    def time_parts(self) -> dict[str, float]:
        """Milliseconds for an image by part of the stream, on one thread.

        What each part adds to the time of those before it.
        """
        config, settings, source = self.config, self.config.augment, self.source
        rows = self.manifest.table.iloc[self.manifest.indices("train")[:TIMED_IMAGES]]
        seeds = np.stack([np.full(len(rows), config.seed), rows.index], axis=1).astype(np.int64)
        columns = [rows[name].to_numpy(np.int32) for name in ("height", "width", "orientation")]
        pictures = tf.data.Dataset.from_tensor_slices((rows["key"].to_numpy(object), *columns, seeds))
        augment = image_augmentation(config)
        cropped = settings.backend == "native" and any(
            transform.name == "RandomResizedCrop" for transform in settings.transforms
        )
        parts: dict[str, Callable[..., tf.Tensor]] = {
            "read": lambda key, *_: source.read_tf(key),
            "decode and crop" if cropped else "decode": lambda encoded, *rest: augment.decode(encoded, *rest[:-1]),
            "resize and flip" if settings.backend == "native" else "transforms": lambda image, *rest: augment.transform(
                image, rest[-2]
            ),
        }
        if settings.randaugment:
            randomly = randaugment(settings.randaugment.num_ops, settings.randaugment.magnitude)
            parts["RandAugment"] = lambda image, *rest: randomly(image, rest[-1])

        def prepared(number: int) -> tf.data.Dataset:
            @tf.autograph.experimental.do_not_convert
            def load(value: tf.Tensor, *shape_and_seed: tf.Tensor) -> tf.Tensor:
                *shape, seed = shape_and_seed
                drawn = augment.draw(seed)
                for part in list(parts.values())[:number]:
                    value = part(value, *shape, drawn, seed)
                return value

            return pictures.map(load)

        whole = prepared(len(parts)).batch(len(rows))
        so_far = [*(_seconds(prepared(number)) for number in range(len(parts) + 1)), _seconds(whole)]
        each = [max(0.0, after - before) * 1e3 / len(rows) for before, after in pairwise(so_far)]
        times = dict(zip([*parts, "batch"], each, strict=True))
        if settings.mixup or settings.cutmix:
            images = next(iter(whole))[: mixing_group(self.batch_size, config.train.gradient_accumulation_steps)]
            mix, labels = (
                group_mixing(config),
                tf.one_hot(tf.zeros(len(images), tf.int32), len(self.manifest.class_names)),
            )
            one = tf.data.Dataset.from_tensors((images, labels)).repeat(8)
            mixed = one.enumerate().map(lambda number, group: mix(group[0], group[1], number))
            times["mix"] = max(0.0, _seconds(mixed) - _seconds(one)) * 1e3 / 8 / len(images)
        if tf.config.list_logical_devices("GPU"):
            batch = next(iter(self.stages.local_stream(0)))[0]
            start = time.perf_counter()
            with tf.device("/gpu:0"):
                tf.reduce_max(tf.identity(batch)).numpy()  # waits for the device
            times["transfer"] = (time.perf_counter() - start) * 1e3 / len(batch)
        return times

    def _batches(self) -> Iterator[Any]:
        batches: Any = self.runtime.feed(self.stages.stream(0))
        return iter(batches)

    def _repeated(self, step: int) -> tf.data.Dataset:
        batch = next(iter(self.stages.local_stream(step)))
        return tf.data.Dataset.from_tensors(batch).repeat()


class OneStepTrainer(Trainer):
    """A trainer of one stage that compiles its step once, however often it is run."""

    _step: TrainStep | None = None

    def make_train_step(self, stage: TrainStage, state: TrainState, model: keras.Model) -> TrainStep:
        """That step."""
        self._step = self._step or super().make_train_step(stage, state, model)
        return self._step


class ThroughputTimer(Callback):
    """Time rounds of the training loop.

    It starts behind the first step of the loop, which may be compiled, and behind each pause.
    """

    def __init__(self) -> None:
        """Is over before it has begun."""
        self.rates: list[float] = []
        self._rounds, self._left_out = 0, 0

    def begin(self, seconds: float, batch_size: int, rounds: int, pause: Callable[[], None] | None) -> None:
        """Take what `Bench.train_for` was given."""
        self.rates, self._seconds, self._batch_size, self._rounds, self._pause = [], seconds, batch_size, rounds, pause
        self._left_out = WARM_UP

    def is_over(self) -> bool:
        """Whether all rounds are timed."""
        return len(self.rates) >= self._rounds

    def on_progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Behind a step, or a few, that the device has finished."""
        now = time.perf_counter()
        if self._left_out:
            self._left_out -= 1
            self._start = step, now
        elif now - self._start[1] >= self._seconds:
            self.rates.append((step - self._start[0]) * self._batch_size / (now - self._start[1]))
            if self._pause is not None:
                self._pause()
                self._left_out = 1


def peak_bytes() -> int:
    """The most memory that there was in use so far: the first GPU's, or where there is none this process's."""
    if tf.config.list_logical_devices("GPU"):
        return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _seconds(dataset: tf.data.Dataset) -> float:
    """Time to go through a finite dataset on one thread; the better one of two times, behind one that traces it."""
    options = tf.data.Options()
    options.threading.private_threadpool_size = options.threading.max_intra_op_parallelism = 1
    options.experimental_optimization.apply_default_optimizations = False  # which would run parts side by side
    dataset, times = dataset.with_options(options), []
    for _ in range(3):
        start = time.perf_counter()
        for _ in dataset:
            pass
        times.append(time.perf_counter() - start)
    return min(times[1:])
