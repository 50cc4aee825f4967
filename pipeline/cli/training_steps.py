"""The steps of a training run, in the order in which `pipeline.cli.train.train` calls them."""

import shlex
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cli.final_evaluation import evaluate_final_model, log_results, save_inference_model
from pipeline.config.schema import Config
from pipeline.console import Console, command_line
from pipeline.data.integrity import name_changed_images
from pipeline.data.manifest import Manifest
from pipeline.data.sampler import SHUFFLE_ALGORITHM
from pipeline.data.sources.base import DataSource
from pipeline.distributed.cluster import ProcessInfo
from pipeline.distributed.devices import Runtime, setup_devices, unusable_gpu
from pipeline.distributed.signals import StopSignal, TrainingInterrupted
from pipeline.evaluation.report.figures import batch_figure, training_figure
from pipeline.evaluation.report.tables import metrics_table, save_figure
from pipeline.evaluation.run_evaluation import RunEvaluator
from pipeline.files import atomic_write
from pipeline.runs.run_directory import RunDirectory
from pipeline.tasks import TASKS
from pipeline.tracking.mlflow_logger import MLflowLogger
from pipeline.tracking.mlflow_store import check_store, tracking_uri
from pipeline.training import checkpoint
from pipeline.training.callbacks import Callback
from pipeline.training.class_weights import class_weights
from pipeline.training.memory import translate_oom_error
from pipeline.training.nan_policy import NanPolicy
from pipeline.training.progress import ProgressBar
from pipeline.training.resolve import (
    ResolvedConfig,
    check_before_scan,
    open_data,
    resolve_network,
    resolve_on_chief,
)
from pipeline.training.resume import restore_latest
from pipeline.training.setup import create_model, create_train_state, read_initial_weights
from pipeline.training.stage_data import StageData
from pipeline.training.state import TrainState
from pipeline.training.trainer import Trainer


@dataclass(frozen=True)
class TrainingRun:
    """A run that is ready to train: everything is resolved, and a resumed state is restored.

    Attributes:
        resolved: The resolved config, with its schedule and the devices.
        directory: Directory of the run; only the chief writes it.
        source: Source of the image files.
        manifest: All images, with label and split.
        state: Model, optimizer, moving average and counters.
        class_weights: float32 (K,), the weight of each class in the loss; None if all classes weigh the same.
        identity: Values in which a resumed run must agree with its checkpoint.
        resumed: True if the state was restored from a checkpoint.
        console: Console for progress and results.
    """

    resolved: ResolvedConfig
    directory: RunDirectory
    source: DataSource
    manifest: Manifest
    state: TrainState
    class_weights: np.ndarray | None
    identity: Mapping[str, Any]
    resumed: bool
    console: Console

    @property
    def config(self) -> Config:
        """The config with a value in the place of every auto."""
        return self.resolved.config

    @property
    def runtime(self) -> Runtime:
        """Devices, precision and compilation."""
        return self.resolved.runtime

    @property
    def is_chief(self) -> bool:
        """True in the process that writes the run."""
        return self.runtime.processes.is_chief


@dataclass(frozen=True)
class Training:
    """A trainer with what belongs to it.

    Attributes:
        trainer: The training loop.
        stage_data: Training batches and validation of every stage.
        nan_policy: Reaction to a loss or gradient that is not finite.
        stop_signal: Record of SIGTERM and Ctrl-C.
        mlflow_logger: Logger of the chief; None in the other processes.
        progress_bar: Progress bar of the chief; None in the other processes.
    """

    trainer: Trainer
    stage_data: StageData
    nan_policy: NanPolicy
    stop_signal: StopSignal
    mlflow_logger: MLflowLogger | None
    progress_bar: ProgressBar | None


def connect_devices(config: Config, process_info: ProcessInfo | None, console: Console) -> Runtime:
    """Connect the processes of the run, seed the random generators and set up the devices."""
    if process_info is not None:
        console.print(f"{process_info.name()} waits for the others: {process_info.others()}")
    with process_info.connecting() if process_info is not None else nullcontext():
        runtime = setup_devices(config.runtime, config.seed, process_info)
    if problem := unusable_gpu():
        console.print(f"warning: {problem}", wrap=False)
    return runtime


def open_data_source(config: Config, directory: RunDirectory, runtime: Runtime, console: Console) -> DataSource:
    """Check what can be checked without the images, open the data set, and compare the inputs of all processes."""
    check_before_scan(config)
    variant = config.variant
    console.print(
        f"run {directory.path}: EfficientNet-{variant.name} at {variant.resolution} px on {runtime.describe()}"
    )
    source = open_data(config.data, runtime.processes)
    if runtime.processes.is_chief:
        recorded, _ = directory.mlflow_run() or (None, None)
        check_store(tracking_uri(config.tracking.uri, recorded), config.tracking.experiment)
    runtime.processes.assert_same_on_all(
        lambda: {
            "config": config.cross_process_fingerprint(),
            "classes": str(source.class_names),
            "precision and devices": runtime.describe(),
        }
    )
    return source


def prepare_run(
    config: Config,
    directory: RunDirectory,
    runtime: Runtime,
    source: DataSource,
    console: Console,
    *,
    resume: bool,
    allowed_changes: Sequence[str],
) -> TrainingRun:
    """Create the model, scan the data, resolve the config, and create or restore the state.

    Args:
        config: The config as written.
        directory: Directory of the run.
        runtime: Devices, precision and compilation.
        source: Source of the image files.
        console: Console for the summaries of weights and data.
        resume: Continue from a checkpoint; all processes do if the chief does.
        allowed_changes: Keys in which a resumed run may differ from its checkpoint.

    Raises:
        UserError: The weights, the data or the batch size do not suit the run, or no checkpoint can be continued.
    """
    processes = runtime.processes
    resume = processes.any_process(resume)
    with console.waiting("building the model"):
        weights = None if resume else read_initial_weights(config, source.class_names, console)
        config = resolve_network(config, weights, directory, runtime, resume=resume)
        model, uninitialized_layers = create_model(config, runtime, source.class_names, console, weights=weights)
    resolved, manifest = resolve_on_chief(
        config, directory, runtime, source, model, uninitialized_layers, console, resume=resume
    )
    config, runtime = resolved.config, resolved.runtime
    weight_per_class = class_weights(config.train, manifest)
    state = create_train_state(config.optimizer, runtime, model)
    identity = {
        "config": config.model_dump(mode="json"),
        "classes": list(manifest.class_names),
        "data": manifest.digest(),
        "order": SHUFFLE_ALGORITHM,
        "replicas": runtime.replicas,
    }
    if resume:
        restore_latest(state, directory, identity, manifest, console.print, allowed_changes, processes)
    processes.assert_same_on_all(lambda: {"weights": state.digest()})
    return TrainingRun(
        resolved=resolved,
        directory=directory,
        source=source,
        manifest=manifest,
        state=state,
        class_weights=weight_per_class,
        identity=identity,
        resumed=resume,
        console=console,
    )


def save_run_inputs(run: TrainingRun) -> None:
    """Write the resolved config, the class names and the manifest into the run directory, as the chief."""
    if not run.is_chief:
        return
    directory = run.directory
    if run.resumed:
        atomic_write(directory.config, run.config.to_yaml())
    else:  # a new run, or one that was interrupted before its first checkpoint and starts again
        directory.save_config(run.config)
    atomic_write(directory.classes, "\n".join(run.manifest.class_names) + "\n")
    run.manifest.save(directory.manifest)


def build_trainer(run: TrainingRun, stack: ExitStack) -> Training:
    """Create the trainer with its data and callbacks. The chief starts the run in MLflow, which `stack` ends."""
    config, directory, state, console = run.config, run.directory, run.state, run.console
    schedule = run.resolved.schedule
    stop_signal = StopSignal(console.print)
    stage_data = StageData(run.resolved, run.manifest, run.source, state, console, stop_signal)
    nan_policy = NanPolicy(
        config.train.on_nan,
        directory.nan_batches,
        directory.checkpoints,
        run.identity,
        stage_data.local_stream,
        console.print,
        run.runtime.processes,
    )
    callbacks: list[Callback] = []
    mlflow_logger = progress_bar = None
    if run.is_chief:
        mlflow_logger = start_mlflow_run(run, stack)
        progress_bar = ProgressBar(
            console,
            first_step=state.step,
            total_steps=schedule.total_steps,
            steps_per_epoch=schedule.steps_per_epoch,
            global_batch_size=schedule.global_batch_size,
        )
        checkpoints = checkpoint.CheckpointCallback(
            directory.checkpoints, run.identity, keep=config.train.max_checkpoints
        )
        # The logger precedes the checkpoints: what is in a checkpoint is in MLflow, too.
        callbacks = [mlflow_logger, checkpoints, progress_bar]
    trainer = Trainer(
        config.train,
        config.optimizer,
        run.runtime,
        schedule,
        TASKS[config.task],
        callbacks,
        stop_signal,
        nan_policy,
        data_servers=config.runtime.data_service,
        class_weights=run.class_weights,
    )
    return Training(trainer, stage_data, nan_policy, stop_signal, mlflow_logger, progress_bar)


def start_mlflow_run(run: TrainingRun, stack: ExitStack) -> MLflowLogger:
    """Start or continue the run in MLflow until `stack` closes, and log the data set."""
    config, directory = run.config, run.directory
    logger = MLflowLogger(config, directory.path, resumed=directory.mlflow_run(), changes=run.state.describe_changes())
    stack.enter_context(logger)
    directory.save_mlflow_run(logger.uri, logger.run_id)
    class_counts = {
        str(split): {str(name): int(count) for name, count in column.items()}
        for split, column in run.manifest.class_counts().items()
    }
    data = config.data
    logger.log_dataset(data.name or data.source, run.manifest.digest(), str(data.path or data.source), class_counts)
    return logger


def fit(run: TrainingRun, training: Training) -> list[dict[str, float]]:
    """Train until the end of the last stage.

    Returns:
        The history: a record for each epoch, including those before a resume.

    Raises:
        SystemExit: A stop was requested; a checkpoint has been saved.
        TrainingError: Training failed, such as by a loss that is not finite.
    """
    processes, state = run.runtime.processes, run.state
    with (
        training.progress_bar or nullcontext(),
        training.stop_signal.listening(),
        name_changed_images(run.manifest, run.source),
        translate_oom_error(run.resolved.batch_size, run.config.optimizer, run.runtime, state.model),
        processes.translate_peer_failure(),
    ):
        try:
            training.nan_policy.prepare(state)
            return training.trainer.fit(state, training.stage_data.for_stage)
        except TrainingInterrupted:
            processes.barrier()  # until the state is saved
            run.console.print(
                f"stopped after step {state.step:,}; continue with the same command and "
                f"--run-dir {shlex.quote(str(run.directory.path))} --resume",
                wrap=False,
            )
            # Without a signal of its own, this process stops because another one was asked to.
            raise SystemExit(128 + (training.stop_signal.signal or signal.SIGTERM)) from None


def evaluate_final_and_best(run: TrainingRun, training: Training, history: Sequence[Mapping[str, float]]) -> str:
    """Save and evaluate the final model, averaged, or the best epoch's with restore_best_weights; save the best model.

    Args:
        run: The run, trained.
        training: Its trainer.
        history: A record for each epoch.

    Returns:
        The split that the model is evaluated on: no choice was made on it if the data have a test split.
    """
    config, directory, state = run.config, run.directory, run.state
    evaluator = RunEvaluator(state.model, config, directory, run.manifest, run.source, training.stage_data.predict)
    if run.is_chief:
        with run.console.waiting("drawing the training curves"):
            save_training_figures(run, training, history)
        run.console.print(f"evaluating {evaluator.split} and writing the report ...")
    final_step, results = state.step, None
    restore_best = config.train.restore_best_weights
    if not restore_best or state.best is None:
        results = evaluate_final_model(evaluator, training.stage_data, state, run.console, is_chief=run.is_chief)
    if state.best is not None:
        best = checkpoint.checkpoint_path(directory.checkpoints, int(state.best["step"]))
        checkpoint.restore(state, best, run.runtime.processes)
        if run.is_chief:
            with state.averaged():
                save_inference_model(state.model, directory.best_model)
        if restore_best:
            results = evaluate_final_model(evaluator, training.stage_data, state, run.console, is_chief=run.is_chief)
    if results is not None:
        assert training.mlflow_logger is not None
        run.console.print()
        run.console.print(metrics_table(results))
        if evaluator.split == "val":
            run.console.print(
                "the data have no test split: these results are of the validation split, which selected the best epoch"
            )
        name = config.tracking.registered_model_name
        log_results(training.mlflow_logger, results, directory, evaluator.split, final_step, name, run.console)
        directory.pending_model.replace(directory.model)  # from here on the run counts as finished
    return evaluator.split


def save_training_figures(run: TrainingRun, training: Training, history: Sequence[Mapping[str, float]]) -> None:
    """Draw the training curves and the first training batch into the report folder."""
    report = run.directory.report
    save_figure(training_figure(history), report / "training_curves.png")
    images, labels, *_ = next(training.stage_data.local_stream(0).as_numpy_iterator())
    save_figure(batch_figure(images, labels, run.manifest.class_names), report / "first_batch.png")


def print_summary(run: TrainingRun, training: Training, split: str) -> None:
    """Print where the results are, and the commands that follow."""
    directory, console = run.directory, run.console
    if training.mlflow_logger is None:
        console.print(f"finished; the chief has written the results into {directory.path}")
        return
    console.print(f"the model        {directory.model}", wrap=False)
    if run.state.best is not None:
        console.print(f"best epoch       {directory.best_model}", wrap=False)
    console.print(f"report           {directory.html_report}", wrap=False)
    console.print(f"results          {directory.evaluation(split)}", wrap=False)
    console.print(f"label an image   {command_line('predict', '--run', directory.path)} IMAGE", wrap=False)
    console.print(f"compare runs     {training.mlflow_logger.ui_command()}", wrap=False)
