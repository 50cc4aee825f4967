"""Trains an EfficientNet as a config says: python train.py --config configs/b2_flowers.yaml [key=value ...]

The story of a run, top to bottom: config, run directory, data, network, training, evaluation. TensorFlow is imported only once the
config is known to be good, so that a mistake in it is answered at once.
"""

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pipeline import run_directory
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import RunError, TrainingError, UserError
from pipeline.run_directory import RunDirectory
from pipeline.screen import Screen, run_program, this_python


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train or fine-tune an EfficientNet.", epilog="Every key is described in pipeline/config.py."
    )
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, such as configs/b2_flowers.yaml")
    parser.add_argument("--run-dir", type=Path, help="directory of the run (default: runs/<experiment>/<date-time>)")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --run-dir")
    parser.add_argument(
        "--allow-change", metavar="KEY", action="append", default=[], help="with --resume: go on although KEY differs; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the config, the data and the cost of the network, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config, such as train.global_batch_size=64")
    arguments = parser.parse_intermixed_args()
    if arguments.resume and arguments.run_dir is None:
        parser.error("--resume needs --run-dir: the directory of the run to go on with")
    if arguments.allow_change and not arguments.resume:
        parser.error("--allow-change belongs to --resume: a new run may be anything")
    return arguments


def main(screen: Screen) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        screen.divert_to(None)
        from pipeline.preview import show

        show(config, screen)
        return 0
    if arguments.resume:
        run = run_directory.find(str(arguments.run_dir))
    else:
        run = run_directory.create(arguments.run_dir, config.tracking.experiment)
    with run.alone():
        if run.model.exists():
            screen.say(f"{run.path} is finished already; measure it with: {this_python()} evaluate.py --run {run.path}")
            return 0
        resume = run.has_checkpoints()
        if not run.config.exists():
            run_directory.write(run.config, config.to_yaml())
        screen.divert_to(run.log)
        return train(config, run, screen, resume=resume, allowed=arguments.allow_change)


def train(config: Config, run: RunDirectory, screen: Screen, *, resume: bool, allowed: Sequence[str] = ()) -> int:
    """Takes a run from its data to its evaluation; returns the exit code. `allowed` are the keys in which a resumed run may differ."""
    from pipeline.assembly import build_network, new_state
    from pipeline.data.augment import image_augmentation
    from pipeline.data.sources import open_source
    from pipeline.data.stream import steps_per_epoch
    from pipeline.evaluation.figures import batch_figure, training_figure
    from pipeline.evaluation.report import save, table
    from pipeline.measure import Subject
    from pipeline.stages import Stages
    from pipeline.training import checkpoint
    from pipeline.training.compilation import settle_xla
    from pipeline.training.loop import Interrupted, Trainer, plan
    from pipeline.training.memory import explained, fit_batch
    from pipeline.training.not_finite import NotFinitePolicy
    from pipeline.training.progress import ProgressLine
    from pipeline.training.recipe import class_weights
    from pipeline.training.runtime import check_batch, set_up
    from pipeline.training.step_times import StepTimes
    from pipeline.training.stop_request import StopRequest
    from pipeline.training.tracking import Tracker

    runtime = set_up(config)
    image_augmentation(config)  # finds a wrong value in a transform now rather than after an hour's scan
    screen.say(f"run {run.path}: EfficientNet-{config.variant.name} at {config.variant.resolution} px on {runtime.describe()}")
    source = open_source(config.data)
    model, new = build_network(config, runtime, source.class_names, screen, weights=None if resume else config.model.weights)
    before = run.load_config() if resume else None
    config = fit_batch(config, runtime, model, before=before.train if before else None)
    check_batch(config, runtime)
    manifest = read_data(source, config, run, screen)
    config = settle_recipe(config, manifest, new, before, screen)
    batch_size, steps = config.train.batch_size, steps_per_epoch(len(manifest.indices("train")), config.train.batch_size)
    config, runtime, reason = settle_xla(config, runtime, model, plan(config, steps), before=before)
    if reason:
        screen.say(reason)
    counts = manifest.class_counts()
    weights = class_weights(config, manifest.class_names, counts["train"].tolist())
    state = new_state(config, runtime, model)
    identity = {
        "config": config.model_dump(mode="json"),
        "classes": list(manifest.class_names),
        "data": manifest.digest(),
        "replicas": runtime.replicas,
    }
    if resume:
        restore_newest(state, run, identity, manifest, screen, allowed)
        run_directory.write(run.config, config.to_yaml())
    else:  # it is new, or was cut off in front of its first checkpoint: it begins anew
        run.begin(config)
    run_directory.write(run.classes, "\n".join(manifest.class_names) + "\n")
    manifest.save(run.manifest)

    stop = StopRequest(screen.say)
    stages = Stages(config, runtime, manifest, source, state, screen, stop)
    not_finite = NotFinitePolicy(config, run.not_finite, run.checkpoints, identity, stages.pictures, screen.say)
    with Tracker(config, run.path, resumed=run.mlflow_run(), changes=state.describe_changes()) as tracker:
        run.note_mlflow_run(tracker.uri, tracker.run_id)
        by_split = {split: column.to_dict() for split, column in counts.items()}
        tracker.log_dataset(
            config.data.name or config.data.source, manifest.digest(), str(config.data.path or config.data.source), by_split
        )
        line = ProgressLine(
            screen, first_step=state.step, total_steps=plan(config, steps)[-1].stop, steps_per_epoch=steps, global_batch_size=batch_size
        )
        keeper = checkpoint.Keeper(run.checkpoints, identity, keep=config.train.keep_checkpoints)
        hooks = [tracker, keeper, line, StepTimes(config, runtime)]  # what is in a checkpoint is in MLflow, too
        trainer = Trainer(config, runtime, steps, hooks, stop, not_finite, class_weights=weights)
        with line, stop.listening(), explained(config, runtime, model):
            try:
                not_finite.prepare(state)
                history = trainer.run(state, stages.work)
            except Interrupted:
                screen.say(f"stopped after step {state.step:,}; go on with the same command and --run-dir {run.path} --resume")
                raise SystemExit(128 + stop.signal) from None

        # The end: the best epoch's network and the final one (averaged); the run's on the split that nothing was selected on.
        save(training_figure(history), run.report / "training_curves.png")
        images, labels, *_ = next(stages.pictures(0).as_numpy_iterator())
        save(batch_figure(images, labels, manifest.class_names), run.report / "first_batch.png")
        subject = Subject(model, config, run, manifest, source, stages.predict)
        screen.say(f"measuring {subject.split} and writing the report ...")
        final_step = state.step
        if not config.train.restore_best or state.best is None:
            results = conclude(subject, stages, state)
        if state.best is not None:
            checkpoint.restore(state, checkpoint.checkpoint_path(run.checkpoints, int(state.best["step"])))
            with state.averaged():
                save_plain(model, run.best)
            if config.train.restore_best:
                results = conclude(subject, stages, state)
        screen.say()
        screen.say(table(results))
        if subject.split == "val":
            screen.say("the data have no test split: these figures are of the validation split, on which the best epoch was chosen")
        send_results(tracker, results, run, subject.split, final_step, config.tracking.register, screen)
        run.final.replace(run.model)  # from here on the run counts as finished

    screen.say(f"the model        {run.model}" + (f" (best epoch on validation: {run.best})" if state.best is not None else ""))
    screen.say(f"report           {run.page}")
    screen.say(f"figures          {run.evaluation(subject.split)}")
    screen.say(f"label a picture  {this_python()} evaluate.py --run {run.path} PICTURE")
    screen.say(f"compare runs     {tracker.how_to_open()}")
    return 0


def read_data(source: Any, config: Config, run: RunDirectory, screen: Screen) -> Any:
    """Scans the data: every sample is decoded before any training, by this scan or an earlier one of the same files."""
    from pipeline.data.check import scan

    with screen.counting("reading the data") as count:
        manifest = scan(source, config.data, seed=config.seed, progress=count)
    if manifest.left_out:
        manifest.write_left_out(run.left_out)
    sizes = ", ".join(f"{len(manifest.indices(split)):,} {split}" for split in ("train", "val", "test"))
    screen.say(f"data: {len(manifest.class_names)} classes; images: {sizes}")
    for note in manifest.notes:
        screen.say(f"note: {note}")
    if manifest.left_out:
        screen.say(f"left out: {len(manifest.left_out):,} pictures that cannot be used, listed in {run.left_out}")
    return manifest


def settle_recipe(config: Config, manifest: Any, new: Collection[str], before: Config | None, screen: Screen) -> Config:
    """What the config comes to for these data."""
    from pipeline.training.recipe import settle

    settled = settle(config, manifest, new, before=before)
    if settled != config:
        stages = " and ".join(f"{stage.epochs} epochs of {stage.trainable}" for stage in settled.train.stages)
        screen.say(f"recipe: {stages}, moving average {settled.optimizer.ema}")
    return settled


def restore_newest(state: Any, run: RunDirectory, identity: dict[str, Any], manifest: Any, screen: Screen, allowed: Sequence[str]) -> None:
    """Puts the newest good checkpoint into the state, if it is one of the same run but for what is allowed to differ."""
    from pipeline.data.manifest import Manifest, differences
    from pipeline.training import checkpoint
    from pipeline.training.identity import check_identity

    newest, problems = checkpoint.newest_verified(run.checkpoints)
    for problem in problems:
        screen.say(f"passed over {problem}")
    if newest is None:
        raise RunError(f"{run.checkpoints}: holds no usable checkpoint to resume from; start a new run")
    changes = check_identity(newest, identity, allowed, details={"data": differences(Manifest.load(run.manifest), manifest)})
    checkpoint.restore(state, newest)
    state.changes += changes
    for change in state.describe_changes():
        screen.say(f"changed: {change}")
    screen.say(f"resumed behind step {state.step:,} from {newest}")


def conclude(subject: Any, stages: Any, state: Any) -> Any:
    """Makes the network as it is now, averaged, the run's: saves it, measures it, and writes its report; returns the results."""
    with state.averaged():
        predictions, evaluation = stages.evaluate(subject.split)
        save_plain(state.model, subject.run.final)
        results = subject.judge(predictions, evaluation, subject.fit_temperature())
        subject.write(results)
    return results


def send_results(tracker: Any, results: Any, run: RunDirectory, split: str, step: int, name: str | None, screen: Screen) -> None:
    """Gives MLflow the files, the final network and its figures of a run that is complete; registers the network where it has a name."""
    from pipeline.champion import contend

    try:
        for path in (run.config, run.classes, run.manifest, run.calibration, run.report, run.evaluation(split), run.best):
            if path.exists():
                folder = path if path.is_dir() else path.parent
                tracker.log_artifacts(path, folder.relative_to(run.path).as_posix() if folder != run.path else None)
        model = tracker.log_model(run.final, "model", step=step)
        if name is not None:
            screen.say(contend(tracker.registry(name), model, run, split))
        tracker.log_results(results.headline(), step)
    except UserError as error:
        raise TrainingError(
            f"{error}\nThe run is complete but for this: the same command with --run-dir {run.path} --resume ends it"
        ) from None


def save_plain(model: Any, path: Path) -> None:
    """Saves the network as it is now, of plain Keras layers in float32, whole or not at all."""
    from pipeline.model.efficientnet import plain_copy

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"new-{path.name}")
    plain_copy(model).save(aside)
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(run_program(main))
