"""The end of a training run: the trained model is saved and evaluated, and the results are logged to MLflow."""

import shlex
from pathlib import Path

import keras

from pipeline.console import Console
from pipeline.errors import TrainingError, UserError
from pipeline.evaluation.results import EvaluationResults, summarize_with_intervals
from pipeline.evaluation.run_evaluation import RunEvaluator
from pipeline.files import atomic_path
from pipeline.models.efficientnet import to_inference_model
from pipeline.runs.run_directory import RunDirectory
from pipeline.tracking.mlflow_logger import MLflowLogger
from pipeline.tracking.promotion import register_and_promote
from pipeline.training.stage_data import StageData
from pipeline.training.state import TrainState


def evaluate_final_model(
    evaluator: RunEvaluator, stage_data: StageData, state: TrainState, console: Console, *, is_chief: bool
) -> EvaluationResults | None:
    """Save the model as it is now, averaged, as the run's model; evaluate it and write its report.

    Args:
        evaluator: Evaluator of the run.
        stage_data: Data of the run.
        state: State of the run, which holds the model.
        console: Console for the time elapsed.
        is_chief: False for a process that takes part in the evaluation and writes nothing.

    Returns:
        The results; None in a process that is not the chief.
    """
    with state.averaged():
        with console.waiting(f"evaluating {evaluator.split}"):
            predictions, evaluation = stage_data.evaluate(evaluator.split)
            validation = evaluator.predict_validation()
        if not is_chief:
            return None
        with console.waiting("writing the model and the report"):
            save_inference_model(state.model, evaluator.run.pending_model)
            temperature = evaluator.fit_temperature(validation)
            results = summarize_with_intervals(predictions, evaluation, evaluator.manifest, temperature)
            evaluator.write(results)
    return results


def log_results(
    logger: MLflowLogger,
    results: EvaluationResults,
    run: RunDirectory,
    split: str,
    step: int,
    registered_model_name: str | None,
    console: Console,
) -> None:
    """Log the files, the model and the results of a complete run to MLflow, and register the model.

    Args:
        logger: Logger of the run.
        results: Results of the final evaluation.
        run: Directory of the run.
        split: The split that was evaluated.
        step: Last step of the training.
        registered_model_name: Name in the model registry; None does not register the model.
        console: Console for the outcome of the registration.

    Raises:
        TrainingError: MLflow does not accept them.
    """
    try:
        with console.waiting("logging the run to MLflow"):
            for path in (
                run.config,
                run.classes,
                run.manifest,
                run.calibration,
                run.report,
                run.evaluation(split),
                run.best_model,
            ):
                if path.exists():
                    folder = path if path.is_dir() else path.parent
                    logger.log_artifacts(path, folder.relative_to(run.path).as_posix() if folder != run.path else None)
            model = logger.log_model(run.pending_model, "model", step=step)
            if registered_model_name is not None:
                console.print(register_and_promote(logger.registry(registered_model_name), model, run, split))
            logger.log_results(results.scalar_metrics(), step)
    except UserError as error:
        raise TrainingError(
            f"{error}\nThe rest of the run is complete: the same command with --run-dir "
            f"{shlex.quote(str(run.path))} --resume finishes it"
        ) from None


def save_inference_model(model: keras.Model, path: Path) -> None:
    """Save the model as it is now, with plain Keras layers in float32. The file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        to_inference_model(model).save(temporary)
