"""Trains an EfficientNet as a config says: python train.py --config configs/b2_flowers.yaml [key=value ...]

The story of a run, top to bottom: config, run directory, data, network, training, evaluation. TensorFlow is imported only once the
config is known to be good, so that a mistake in it is answered at once.
"""

import argparse
import signal
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.console import Console, python_executable
from pipeline.distributed.cluster import ProcessInfo, cluster_from_tf_config
from pipeline.errors import RunError
from pipeline.runs import run_directory
from pipeline.runs.run_directory import RunDirectory
from pipeline.training.callbacks import Callback


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train or fine-tune an EfficientNet.",
        epilog="Every key is described in pipeline/config.py, data_config.py and runtime_config.py.",
    )
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, such as configs/b2_flowers.yaml")
    parser.add_argument("--run-dir", type=Path, help="directory of the run (default: runs/<experiment>/<date-time>)")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --run-dir")
    parser.add_argument(
        "--allow-change",
        metavar="KEY",
        action="append",
        default=[],
        help="with --resume: go on although KEY differs; may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the config, the data and the cost of the network, and stop"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the config, such as train.global_batch_size=64"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.resume and arguments.run_dir is None:
        parser.error("--resume needs --run-dir: the directory of the run to go on with")
    if arguments.allow_change and not arguments.resume:
        parser.error("--allow-change belongs to --resume: a new run may be anything")
    return arguments


def main(screen: Console) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        screen.redirect_library_output(None)
        from pipeline.cli.dry_run import print_dry_run

        print_dry_run(config, screen)
        return 0
    place = cluster_from_tf_config(config.runtime.strategy)
    if place is not None and arguments.run_dir is None:
        raise RunError("a run of several processes needs one name: give each of them the same --run-dir")
    if place is not None and not place.is_chief:
        return run_worker(config, RunDirectory(arguments.run_dir), screen, place)
    if arguments.resume:
        run = run_directory.find(str(arguments.run_dir))
    else:
        run = run_directory.create(arguments.run_dir, config.tracking.experiment)
    with run.exclusive_lock():
        if run.model.exists():
            screen.print(
                f"{run.path} is finished already; measure it with: {python_executable()} evaluate.py --run {run.path}"
            )
            return 0
        resume = run.has_checkpoints()
        if not run.config.exists():
            run_directory.write(run.config, config.to_yaml())
        screen.redirect_library_output(run.log)
        return train(config, run, screen, place, resume=resume, allowed=arguments.allow_change)


def run_worker(config: Config, run: RunDirectory, screen: Console, place: ProcessInfo) -> int:
    """Trains as one of several processes but the first, which writes the run; returns the exit code."""
    if run.model.exists():
        screen.print(f"{run.path} is finished already")
        return 0
    run.path.mkdir(parents=True, exist_ok=True)
    screen.redirect_library_output(run.log_of(place.rank))
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # there is nothing to close here, and it may be waiting inside TensorFlow
        signal.signal(number, signal.SIG_DFL)
    place.wait_for_chief(screen.print)
    return train(config, run, screen, place)


def train(
    config: Config,
    run: RunDirectory,
    screen: Console,
    place: ProcessInfo | None,
    *,
    resume: bool = False,
    allowed: Sequence[str] = (),
) -> int:
    """Takes a run from its data to its evaluation.

    Args:
        config: As it is written.
        run: Its directory; of several processes the first one's alone.
        screen: Told of what happens.
        place: Of this process among those of the run; None for this one alone.
        resume: Whether there are checkpoints to go on from, as the first process sees it.
        allowed: Keys in which a resumed run may differ.

    Returns:
        The exit code.
    """
    from pipeline.cli.conclusion import evaluate_final_model, log_results, save_inference_model
    from pipeline.data.augmentation import image_augmentation
    from pipeline.data.data_service import check_servers
    from pipeline.data.input_pipeline import steps_per_epoch
    from pipeline.data.sampler import ORDER
    from pipeline.distributed.devices import setup_devices
    from pipeline.distributed.signals import StopSignal
    from pipeline.evaluation.report.figures import batch_figure, training_figure
    from pipeline.evaluation.report.tables import save, table
    from pipeline.evaluation.run_evaluation import RunEvaluator
    from pipeline.tracking.mlflow_logger import MLflowLogger
    from pipeline.training import checkpoint
    from pipeline.training.assembly import create_model, create_train_state
    from pipeline.training.memory import translate_oom_error
    from pipeline.training.nan_policy import NanPolicy
    from pipeline.training.progress import ProgressBar
    from pipeline.training.recipe import class_weights
    from pipeline.training.resolve import open_data, resolve_config
    from pipeline.training.resume import restore_latest
    from pipeline.training.stage_data import StageData
    from pipeline.training.step_times import StepTimes
    from pipeline.training.trainer import Trainer, TrainingInterrupted, build_schedule

    if place is not None:
        screen.print(f"{place.name()} waits for the others: {place.others()}")
    with place.connecting() if place is not None else nullcontext():
        runtime = setup_devices(config, place)
    processes, chief = runtime.processes, runtime.processes.is_chief
    with processes.translate_peer_failure(), ExitStack() as while_it_runs:
        image_augmentation(config)  # finds a wrong value in a transform now rather than after an hour's scan
        check_servers(config.runtime.data_service or ())  # likewise
        screen.print(
            f"run {run.path}: EfficientNet-{config.variant.name} at {config.variant.resolution} px on {runtime.describe()}"
        )
        source = open_data(config, processes)
        processes.assert_same_on_all(
            lambda: {
                "config": config.cross_process_fingerprint(),
                "classes": str(source.class_names),
                "precision and devices": runtime.describe(),
            }
        )
        resume = processes.any_process(resume)
        model, new = create_model(
            config, runtime, source.class_names, screen, weights=None if resume else config.model.weights
        )
        config, runtime, manifest = resolve_config(config, run, runtime, source, model, new, screen, resume=resume)
        counts = manifest.class_counts()
        weights = class_weights(config, manifest.class_names, counts["train"].tolist())
        state = create_train_state(config, runtime, model)
        identity = {
            "config": config.model_dump(mode="json"),
            "classes": list(manifest.class_names),
            "data": manifest.digest(),
            "order": ORDER,
            "replicas": runtime.replicas,
        }
        if resume:
            restore_latest(state, run, identity, manifest, screen.print, allowed, processes)
        processes.assert_same_on_all(lambda: {"weights": state.digest()})
        if chief:
            if resume:
                run_directory.write(run.config, config.to_yaml())
            else:  # it is new, or was cut off in front of its first checkpoint: it begins anew
                run.begin(config)
            run_directory.write(run.classes, "\n".join(manifest.class_names) + "\n")
            manifest.save(run.manifest)

        batch_size, steps = (
            config.train.batch_size,
            steps_per_epoch(len(manifest.indices("train")), config.train.batch_size),
        )
        stop = StopSignal(screen.print)
        stages = StageData(config, runtime, manifest, source, state, screen, stop)
        not_finite = NanPolicy(
            config, run.not_finite, run.checkpoints, identity, stages.pictures, screen.print, processes
        )
        hooks: list[Callback] = []
        if chief:
            tracker = MLflowLogger(config, run.path, resumed=run.mlflow_run(), changes=state.describe_changes())
            while_it_runs.enter_context(tracker)
            run.note_mlflow_run(tracker.uri, tracker.run_id)
            by_split = {
                str(split): {str(name): int(n) for name, n in column.items()} for split, column in counts.items()
            }
            tracker.log_dataset(
                config.data.name or config.data.source,
                manifest.digest(),
                str(config.data.path or config.data.source),
                by_split,
            )
            line = ProgressBar(
                screen,
                first_step=state.step,
                total_steps=build_schedule(config, steps)[-1].stop,
                steps_per_epoch=steps,
                global_batch_size=batch_size,
            )
            keeper = checkpoint.CheckpointCallback(run.checkpoints, identity, keep=config.train.max_checkpoints)
            hooks = [tracker, keeper, line, StepTimes(config, runtime)]  # what is in a checkpoint is in MLflow, too
        trainer = Trainer(config, runtime, steps, hooks, stop, not_finite, class_weights=weights)
        with (
            line if chief else nullcontext(),
            stop.listening(),
            translate_oom_error(config, runtime, model),
            processes.translate_peer_failure(),
        ):
            try:
                not_finite.prepare(state)
                history = trainer.run(state, stages.for_stage)
            except TrainingInterrupted:
                processes.barrier()  # until the state is saved
                screen.print(
                    f"stopped after step {state.step:,}; go on with the same command and --run-dir {run.path} --resume"
                )
                raise SystemExit(128 + (stop.signal or signal.SIGTERM)) from None  # or another process was asked to

        # The end: the best epoch's network and the final one (averaged); the run's on the split that nothing was selected on.
        subject = RunEvaluator(model, config, run, manifest, source, stages.predict)
        if chief:
            save(training_figure(history), run.report / "training_curves.png")
            images, labels, *_ = next(stages.pictures(0).as_numpy_iterator())
            save(batch_figure(images, labels, manifest.class_names), run.report / "first_batch.png")
            screen.print(f"measuring {subject.split} and writing the report ...")
        final_step, results = state.step, None
        if not config.train.restore_best_weights or state.best is None:
            results = evaluate_final_model(subject, stages, state, writes=chief)
        if state.best is not None:
            checkpoint.restore(state, checkpoint.checkpoint_path(run.checkpoints, int(state.best["step"])), processes)
            if chief:
                with state.averaged():
                    save_inference_model(model, run.best)
            if config.train.restore_best_weights:
                results = evaluate_final_model(subject, stages, state, writes=chief)
        if results is not None:
            screen.print()
            screen.print(table(results))
            if subject.split == "val":
                screen.print(
                    "the data have no test split: these figures are of the validation split, on which the best epoch was chosen"
                )
            log_results(tracker, results, run, subject.split, final_step, config.tracking.registered_model_name, screen)
            run.final.replace(run.model)  # from here on the run counts as finished
        processes.final_barrier()

    if not chief:
        screen.print(f"finished; the results are with the first process, in {run.path}")
        return 0
    screen.print(
        f"the model        {run.model}" + (f" (best epoch on validation: {run.best})" if state.best is not None else "")
    )
    screen.print(f"report           {run.page}")
    screen.print(f"figures          {run.evaluation(subject.split)}")
    screen.print(f"label a picture  {python_executable()} evaluate.py --run {run.path} PICTURE")
    screen.print(f"compare runs     {tracker.ui_command()}")
    return 0
