"""How a run ends: its network saved and measured, and all of it given to MLflow."""

from pathlib import Path

import keras

from pipeline.console import Screen
from pipeline.errors import TrainingError, UserError
from pipeline.evaluation.results import Results
from pipeline.evaluation.run_evaluation import Subject
from pipeline.models.efficientnet import plain_copy
from pipeline.runs.run_directory import RunDirectory
from pipeline.tracking.mlflow_logger import Tracker
from pipeline.tracking.promotion import contend
from pipeline.training.stage_data import Stages
from pipeline.training.state import State


def conclude(subject: Subject, stages: Stages, state: State, *, writes: bool) -> Results | None:
    """Makes the network as it is now, averaged, the run's: saves it, measures it, and writes its report.

    Args:
        subject: The run.
        stages: Whose network is measured.
        state: Of the run.
        writes: False only takes part in measuring.

    Returns:
        The results; None for one that does not write.
    """
    with state.averaged():
        predictions, evaluation = stages.evaluate(subject.split)
        validation = subject.predict_validation()
        if not writes:
            return None
        save_plain(state.model, subject.run.final)
        results = subject.judge(predictions, evaluation, subject.fit_temperature(validation))
        subject.write(results)
    return results


def send_results(
    tracker: Tracker, results: Results, run: RunDirectory, split: str, step: int, name: str | None, screen: Screen
) -> None:
    """Gives MLflow the files, the final network and its figures of a run that is complete; registers the network where it has a name.

    Raises:
        TrainingError: MLflow does not take them.
    """
    try:
        for path in (
            run.config,
            run.classes,
            run.manifest,
            run.calibration,
            run.report,
            run.evaluation(split),
            run.best,
        ):
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


def save_plain(model: keras.Model, path: Path) -> None:
    """Saves the network as it is now, of plain Keras layers in float32, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"new-{path.name}")
    plain_copy(model).save(aside)
    aside.replace(path)
