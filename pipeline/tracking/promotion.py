"""Whether a new model takes the place of the best one that is registered under its name."""

import tempfile
from pathlib import Path

from pipeline.errors import DataError, RunError
from pipeline.evaluation.compare import compare, read_measured
from pipeline.runs.run_directory import RunDirectory
from pipeline.tracking.model_registry import ModelRegistry, ModelVersion


def register_and_promote(registry: ModelRegistry, model_uri: str, run: RunDirectory, split: str) -> str:
    """Registers a run's final model, and makes it the champion where there is none or the paired test says that it beats the present one.

    Args:
        registry: The name to register it under.
        model_uri: Of the logged model.
        run: Its directory, with the evaluation.
        split: That the evaluation is of; the champion's predictions of the same split are compared.

    Returns:
        What happened and why, in words.

    Raises:
        ConfigError: If MLflow cannot be reached or does not take it.
    """
    with registry.promotion_lock():
        champion, new = registry.champion(), registry.add(model_uri)
        if champion is None:
            wins, why = True, "it is the champion, as there was none"
        elif champion.run_id == new.run_id:  # an earlier end of the run was cut off
            wins, why = True, f"it is the champion, as version {champion.number} of the same run was"
        else:
            wins, why = _beats(registry, champion, new, run, split)
        registry.finalize_version(new, why, promoted=wins)
    return f"registered as {registry.name} version {new.number}: {why}"


def _beats(
    registry: ModelRegistry, champion: ModelVersion, new: ModelVersion, run: RunDirectory, split: str
) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            theirs = [
                registry.download(champion, name, Path(folder))
                for name in (f"evaluation/{split}/predictions.parquet", "manifest.parquet")
            ]
            [pair] = compare(
                [
                    read_measured(f"version {champion.number}", split, *theirs),
                    read_measured(f"version {new.number}", split, run.predictions(split), run.manifest),
                ]
            )
        except (RunError, DataError) as error:
            reason = str(error).partition("\n")[0]
            return False, f"version {champion.number} stays the champion, as the test cannot be made: {reason}"
    if pair.verdict == "better":
        return True, f"it is the champion in the place of version {champion.number}. {pair.sentence}"
    return False, f"version {champion.number} stays the champion. {pair.sentence}"
