"""The throughput of a config on this machine: step alone, input stream alone, both together, parts of the stream."""

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.config.schema import Config
from pipeline.console import Console
from pipeline.data.augmentation import image_augmentation
from pipeline.data.manifest import Manifest
from pipeline.data.mixup import mixing_group_size, mixup_and_cutmix
from pipeline.data.randaugment import randaugment
from pipeline.data.sources.base import DataSource
from pipeline.data.sources.catalog import open_source
from pipeline.data.transcoding import file_reader
from pipeline.data.validation import scan
from pipeline.distributed.devices import Runtime, setup_devices
from pipeline.distributed.signals import TrainingInterrupted
from pipeline.tasks import TASKS
from pipeline.training.callbacks import Callback
from pipeline.training.class_weights import class_weights
from pipeline.training.resolve import resolve
from pipeline.training.schedule import TrainStage, build_schedule, set_trainable
from pipeline.training.setup import create_model, create_train_state
from pipeline.training.stage_data import StageData
from pipeline.training.state import TrainState
from pipeline.training.train_step import TrainStep
from pipeline.training.trainer import StageInputs, Trainer

ENDLESS = 10**6  # epochs of the one stage that is timed
ROUNDS = 3  # rounds of every measurement, in turns: the speed of the machine varies
WARM_UP = 2  # steps or batches that are not timed after the first one, which is compiled
TIMED_IMAGES = 256  # largest number of images for timing the parts of the stream


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of a benchmark. Rates are images per second over all replicas, each the median of the rounds.

    Attributes:
        step: Rate of the training step on a batch that is on the device already.
        stream: Rate of the input stream, with its batches brought to the device.
        training: Rate of the training loop, from files to weights.
        share: Ratio of `training` to the smaller one of the two other rates, the median of the rounds.
        first_step_seconds: Seconds of tracing, compilation and the first step.
        first_batch_seconds: Seconds from opening the stream to its first batch.
        parts: Milliseconds per image, on one thread, by part of the stream.
        peak_bytes: Peak memory of the GPU; without a GPU, of the process.
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
        """The bottleneck: `step` or `stream`."""
        return "step" if self.step <= self.stream else "stream"


class ThroughputBenchmark:
    """A stage of a config's training, ready to be timed. Weights are random: no rate depends on them."""

    def __init__(self, config: Config, console: Console, *, stage: int | None = None) -> None:
        """Scan the data and build the objects that a run would train.

        Args:
            config: The config as written.
            console: Console for the progress.
            stage: Number of the stage to time, from 1; None for the last one. It trains on images even where a run
                would train on cached features.

        Raises:
            UserError: The run itself would raise it.
        """
        self._console = console
        self.runtime: Runtime = setup_devices(config.runtime, config.seed)
        self.source: DataSource = open_source(config.data)
        with console.progress("reading the data") as progress:
            self.manifest: Manifest = scan(self.source, config.data, seed=config.seed, progress=progress)
        model, _ = create_model(config, self.runtime, self.manifest.class_names, console, weights=None)
        resolved = resolve(config, self.runtime, model, self.manifest)
        config, self.runtime, self.batch_size = resolved.config, resolved.runtime, resolved.batch_size.images
        endless = config.train.stage(stage).model_copy(update={"epochs": ENDLESS})
        train = config.train.model_copy(
            update={"stages": (endless,), "early_stopping": None, "checkpoint_every_steps": None}
        )
        self.config = config.model_copy(update={"train": train})
        schedule = build_schedule(
            train.stages,
            self.config.optimizer,
            global_batch_size=self.batch_size,
            steps_per_epoch=resolved.schedule.steps_per_epoch,
        )
        self.resolved = replace(resolved, config=self.config, schedule=schedule)
        self.state: TrainState = create_train_state(self.config.optimizer, self.runtime, model)
        self.stage_data = StageData(self.resolved, self.manifest, self.source, self.state, console, lambda: False)
        self.clock, self._task = ThroughputTimer(), TASKS[self.config.task]
        self._trainer = OneStepTrainer(
            self.config.train,
            self.config.optimizer,
            self.runtime,
            schedule,
            self._task,
            [self.clock],
            self.clock.is_over,
            data_servers=self.config.runtime.data_service,
            class_weights=class_weights(config.train, self.manifest),
        )
        [self._stage] = schedule.stages
        set_trainable(model, self._stage.config)

    def measure(self, seconds: float) -> BenchmarkResult:
        """Time the step, the stream and both together, in this order in each round, then the parts of the stream.

        Args:
            seconds: Approximate duration of each measurement, over all rounds.
        """
        firsts, rates = [], []
        with self._console.progress("timing step, stream and both") as progress:
            for number in range(ROUNDS):
                first_step, step = self.time_step(seconds / ROUNDS)
                first_batch, stream = self.time_stream(seconds / ROUNDS)
                firsts.append((first_step, first_batch))
                rates.append((step, stream, self.train_for(seconds / ROUNDS)))
                progress(number + 1, ROUNDS)
        step, stream, training = np.median(rates, axis=0).tolist()
        share = float(np.median([both / min(alone) for *alone, both in rates]))
        return BenchmarkResult(step, stream, training, share, *firsts[0], self.time_parts(), peak_bytes())

    def time_step(self, seconds: float) -> tuple[float, float]:
        """Return the seconds to the end of the first step, and the images per second of later ones."""
        batch = next(self._batches())
        train_step = self._trainer.make_train_step(self._stage, self.state, self.state.model)

        def take(steps: int) -> float:
            start = time.perf_counter()
            for _ in range(steps):
                train_step(batch, 1e-6)
            self.state.metrics.read()  # waits for the device
            return time.perf_counter() - start

        first = take(1)
        each = take(WARM_UP) / WARM_UP
        steps = max(3, round(seconds / each))
        return first, steps * self.batch_size / take(steps)

    def time_stream(self, seconds: float) -> tuple[float, float]:
        """Return the seconds to the first batch, and the images per second of later ones."""
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
            seconds: Duration of each round, without its warm-up.
            pause: Called after each round; its time does not count.
            rounds: Number of rounds.
            one_batch: Train on the same batch again and again instead of decoding new ones.

        Returns:
            Images per second, mean of the rounds; `clock.rates` has the rate of each.
        """
        self.clock.begin(seconds, self.batch_size, rounds, pause)
        stream = self._repeated if one_batch else self.stage_data.stream
        with suppress(TrainingInterrupted):
            self._trainer.fit(self.state, lambda stage: StageInputs(self.state.model, stream, dict))
        return float(np.mean(self.clock.rates))

    def time_parts(self) -> dict[str, float]:
        """Return the milliseconds per image that each part of the stream adds to the parts before it, on one thread."""
        config, settings = self.config, self.config.augment
        read = file_reader(self.source, self.manifest.transcoded, config.data.background)
        rows = self.manifest.table.iloc[self.manifest.indices("train")[:TIMED_IMAGES]]
        seeds = np.stack([np.full(len(rows), config.seed), rows.index], axis=1).astype(np.int64)
        columns = [rows[name].to_numpy(np.int32) for name in ("height", "width", "orientation")]
        images = tf.data.Dataset.from_tensor_slices((rows["key"].to_numpy(object), *columns, seeds))
        augment = image_augmentation(config.augment, config.variant.resolution, config.data.resize)
        cropped = settings.backend == "native" and any(
            transform.name == "RandomResizedCrop" for transform in settings.transforms
        )
        parts: dict[str, Callable[..., tf.Tensor]] = {
            "read": lambda key, *rest: read(key, rest[-1][1]),
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

            return images.map(load)

        batched = prepared(len(parts)).batch(len(rows))
        so_far = [*(_seconds(prepared(number)) for number in range(len(parts) + 1)), _seconds(batched)]
        each = [max(0.0, after - before) * 1e3 / len(rows) for before, after in pairwise(so_far)]
        times = dict(zip([*parts, "batch"], each, strict=True))
        if settings.mixup or settings.cutmix:
            group_size = mixing_group_size(self.batch_size, config.train.gradient_accumulation_steps)
            group_images = next(iter(batched))[:group_size]
            mix, labels = (
                mixup_and_cutmix(group_size, config.variant.resolution, settings.mixup, settings.cutmix, config.seed),
                self._task.encode(tf.zeros(len(group_images), tf.int32), len(self.manifest.class_names)),
            )
            one = tf.data.Dataset.from_tensors((group_images, labels)).repeat(8)
            mixed = one.enumerate().map(lambda number, group: mix(group[0], group[1], number))
            times["mix"] = max(0.0, _seconds(mixed) - _seconds(one)) * 1e3 / 8 / len(group_images)
        if tf.config.list_logical_devices("GPU"):
            batch = next(iter(self.stage_data.local_stream(0)))[0]
            start = time.perf_counter()
            with tf.device("/gpu:0"):
                tf.reduce_max(tf.identity(batch)).numpy()  # waits for the device
            times["transfer"] = (time.perf_counter() - start) * 1e3 / len(batch)
        return times

    def _batches(self) -> Iterator[Any]:
        batches: Any = self.runtime.feed(self.stage_data.stream(0))
        return iter(batches)

    def _repeated(self, step: int) -> tf.data.Dataset:
        batch = next(iter(self.stage_data.local_stream(step)))
        return tf.data.Dataset.from_tensors(batch).repeat()


class OneStepTrainer(Trainer):
    """A trainer of one stage that compiles its step once, however often it is run."""

    _step: TrainStep | None = None

    def make_train_step(self, stage: TrainStage, state: TrainState, model: keras.Model) -> TrainStep:
        """Return the step of the first call."""
        self._step = self._step or super().make_train_step(stage, state, model)
        return self._step


class ThroughputTimer(Callback):
    """A timer of rounds of the training loop.

    It starts after the first step, which may be compiled, and after pauses.
    """

    def __init__(self) -> None:
        """Create a timer without rounds, so that it is over."""
        self.rates: list[float] = []
        self._rounds, self._warm_up_left = 0, 0

    def begin(self, seconds: float, batch_size: int, rounds: int, pause: Callable[[], None] | None) -> None:
        """Start a series of rounds; for the arguments, see `ThroughputBenchmark.train_for`."""
        self.rates, self._seconds, self._batch_size, self._rounds, self._pause = [], seconds, batch_size, rounds, pause
        self._warm_up_left = WARM_UP

    def is_over(self) -> bool:
        """Return True if all rounds are timed."""
        return len(self.rates) >= self._rounds

    def on_progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the time after one or several steps that the device has finished."""
        now = time.perf_counter()
        if self._warm_up_left:
            self._warm_up_left -= 1
            self._start = step, now
        elif now - self._start[1] >= self._seconds:
            self.rates.append((step - self._start[0]) * self._batch_size / (now - self._start[1]))
            if self._pause is not None:
                self._pause()
                self._warm_up_left = 1


def peak_bytes() -> int:
    """Return the peak memory in bytes so far: of the first GPU; without a GPU, of this process."""
    if tf.config.list_logical_devices("GPU"):
        return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _seconds(dataset: tf.data.Dataset) -> float:
    """Return the time to iterate over a finite dataset on one thread: the best of two, after one that traces it."""
    options = tf.data.Options()
    options.threading.private_threadpool_size = options.threading.max_intra_op_parallelism = 1
    options.experimental_optimization.apply_default_optimizations = False  # they would run parts in parallel
    dataset, times = dataset.with_options(options), []
    for _ in range(3):
        start = time.perf_counter()
        for _ in dataset:
            pass
        times.append(time.perf_counter() - start)
    return min(times[1:])
