"""How a run ends: its network saved and measured, and all of it given to MLflow."""

from pathlib import Path

import keras

from pipeline.console import Console
from pipeline.errors import TrainingError, UserError
from pipeline.evaluation.results import Results
from pipeline.evaluation.run_evaluation import RunEvaluator
from pipeline.models.efficientnet import to_inference_model
from pipeline.runs.run_directory import RunDirectory
from pipeline.tracking.mlflow_logger import MLflowLogger
from pipeline.tracking.promotion import register_and_promote
from pipeline.training.stage_data import StageData
from pipeline.training.state import TrainState


def evaluate_final_model(
    subject: RunEvaluator, stages: StageData, state: TrainState, *, writes: bool
) -> Results | None:
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
        save_inference_model(state.model, subject.run.final)
        results = subject.summarize_with_intervals(predictions, evaluation, subject.fit_temperature(validation))
        subject.write(results)
    return results


def log_results(
    tracker: MLflowLogger, results: Results, run: RunDirectory, split: str, step: int, name: str | None, screen: Console
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
            screen.print(register_and_promote(tracker.registry(name), model, run, split))
        tracker.log_results(results.headline(), step)
    except UserError as error:
        raise TrainingError(
            f"{error}\nThe run is complete but for this: the same command with --run-dir {run.path} --resume ends it"
        ) from None


def save_inference_model(model: keras.Model, path: Path) -> None:
    """Saves the network as it is now, of plain Keras layers in float32, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"new-{path.name}")
    to_inference_model(model).save(aside)
    aside.replace(path)
