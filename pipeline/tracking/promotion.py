"""Promotion of a new model to champion of its registered name, decided by a paired test."""

import tempfile
from pathlib import Path

from pipeline.errors import DataError, RunError
from pipeline.evaluation.compare import compare, read_run_predictions
from pipeline.runs.run_directory import RunDirectory
from pipeline.tracking.model_registry import ModelRegistry, ModelVersion


def register_and_promote(registry: ModelRegistry, model_uri: str, run: RunDirectory, split: str) -> str:
    """Register the final model of a run, and promote it to champion if it is the first or beats the present champion.

    Args:
        registry: The registered model to add it to.
        model_uri: URI of the logged model.
        run: Directory of the run, with the evaluation.
        split: Split of the evaluation; the champion's predictions on the same split are compared.

    Returns:
        The decision and its reason, as a sentence.

    Raises:
        ConfigError: If MLflow cannot be reached or does not accept the model.
    """
    with registry.promotion_lock():
        champion, new = registry.champion(), registry.add(model_uri)
        if champion is None:
            promoted, reason = True, "it is the champion, because there was none"
        elif champion.run_id == new.run_id:  # from an interrupted end of the run
            promoted, reason = True, f"it is the champion, as version {champion.number} of the same run was"
        else:
            promoted, reason = _beats(registry, champion, new, run, split)
        registry.finalize_version(new, reason, promoted=promoted)
    return f"registered as {registry.name} version {new.number}: {reason}"


def _beats(
    registry: ModelRegistry, champion: ModelVersion, new: ModelVersion, run: RunDirectory, split: str
) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            champion_files = [
                registry.download(champion, name, Path(folder))
                for name in (f"evaluation/{split}/predictions.parquet", "manifest.parquet")
            ]
            [pair] = compare(
                [
                    read_run_predictions(f"version {champion.number}", split, *champion_files),
                    read_run_predictions(f"version {new.number}", split, run.predictions(split), run.manifest),
                ]
            )
        except (RunError, DataError) as error:
            reason = str(error).partition("\n")[0]
            return False, f"version {champion.number} stays the champion, because the test is not possible: {reason}"
    if pair.verdict == "better":
        return True, f"it replaces version {champion.number} as the champion. {pair.sentence}"
    return False, f"version {champion.number} stays the champion. {pair.sentence}"
