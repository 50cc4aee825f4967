"""The model of a command that evaluates or predicts: the final model of a run, or a model with published weights."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.schema import Config
from pipeline.console import Console, command_line
from pipeline.errors import RunError, UserError, WeightsError
from pipeline.models.variants import VARIANTS
from pipeline.models.weights.makes import MAKES
from pipeline.runs import run_directory
from pipeline.runs.run_directory import RunDirectory

if TYPE_CHECKING:
    import keras

    from pipeline.data.manifest import Manifest
    from pipeline.data.sources.base import DataSource
    from pipeline.distributed.devices import Runtime
    from pipeline.evaluation.predictor import Predictions


DEFAULT_BATCH_SIZE = 32  # images, for a model whose config leaves the batch size to the devices


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that is needed to run it.

    Attributes:
        model: float32 images (B, R, R, 3) in [0, 255] to float32 logits (B, K).
        class_lists: Names of the K outputs, in their order; a list for each naming, such as synsets and readable names.
        config: Config of the run; of a model with published weights only `variant`, `data.resize`,
            `data.background` and `runtime` matter.
        runtime: Devices that run the model.
        run: Directory of the run; None for published weights.
    """

    model: "keras.Model"
    class_lists: tuple[Sequence[str], ...]
    config: Config
    runtime: "Runtime"
    run: RunDirectory | None = None

    def predictor(self, manifest: "Manifest", source: "DataSource", console: Console) -> Callable[..., "Predictions"]:
        """Return a function that predicts a split with the preprocessing of validation.

        The function takes the split, and further arguments that it passes to `evaluation_stream`.
        """
        from pipeline.data.input_pipeline import evaluation_stream
        from pipeline.evaluation.predictor import Predictor
        from pipeline.tasks import TASKS

        batch_size = self.runtime.round_up_to_replicas(self.config.train.micro_batch_size or DEFAULT_BATCH_SIZE)
        forward = Predictor(self.model, self.runtime.strategy, TASKS[self.config.task])

        def predict(split: str, **stream_kwargs: Any) -> "Predictions":
            indices = manifest.indices(split)
            dataset = evaluation_stream(manifest, source, self.config, indices, batch_size=batch_size, **stream_kwargs)
            with console.progress(f"evaluating {split}") as progress:
                return forward(dataset, progress=progress)

        return predict


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --run, --weights and --variant."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=os.path.expanduser, help="a run's directory, its MLflow run id, or latest")
    model.add_argument(
        "--weights", help="a model of the ImageNet classes: imagenet, or a file of weights; needs --variant"
    )
    parser.add_argument(
        "--weights-from", choices=list(MAKES), help="who made the file of --weights, where it does not say"
    )
    parser.add_argument("--variant", choices=list(VARIANTS), help="the EfficientNet that --weights belong to")


def check_model_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error if --variant is missing or not wanted."""
    if arguments.weights and not arguments.variant:
        parser.error("--weights needs --variant: the EfficientNet that they belong to")
    if arguments.run and (arguments.variant or arguments.weights_from):
        parser.error("--variant and --weights-from belong to --weights; a run knows its own")


def check_new_output(path: Path) -> None:
    """Check that an output path is new or an empty folder.

    Raises:
        UserError: The path exists.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists already and is not overwritten; choose another --out")


def choose_split(run: RunDirectory, manifest: "Manifest", split: str | None) -> str:
    """Return the split to evaluate on: the given one; for None, the one that the run is evaluated on.

    Raises:
        RunError: The data of the run have no such split.
    """
    split = split or manifest.evaluation_split
    if not len(manifest.indices(split)):
        raise RunError(f"{run.path}: its data have no split {split}")
    return split


def find_finished_run(name: str) -> RunDirectory:
    """Find a run that has its final model.

    Args:
        name: Directory of the run, its MLflow run id, or latest.

    Raises:
        RunError: There is no such run, or it is not finished.
    """
    run = run_directory.find(name)
    if not run.model.exists():
        command = command_line("train", "--config", "CONFIG", "--run-dir", run.path, "--resume")
        raise RunError(f"{run.path}: has no model.keras yet; finish the run with: {command}")
    return run


def load_model(arguments: argparse.Namespace, console: Console) -> LoadedModel:
    """Load the model that the arguments of `add_model_arguments` name. Library output is redirected from here on.

    Raises:
        RunError: There is no such run, or it is not finished.
        WeightsError: The weights cannot be read, or do not fit the whole model.
    """
    if arguments.weights:
        console.redirect_library_output(None)
        with console.waiting("loading the model"):
            return load_pretrained_model(arguments.weights, arguments.variant, arguments.weights_from, console)
    run = find_finished_run(arguments.run)
    console.redirect_library_output(run.log)
    with console.waiting("loading the model"):
        return load_run(run, getattr(arguments, "moved_data", ()))


def load_run(run: RunDirectory, moved_data: Sequence[str] = ()) -> LoadedModel:
    """Load the final model of a run.

    Args:
        run: Directory of the run.
        moved_data: data.path=PATH or data.root=PATH where the data are no longer where they were.
    """
    import keras

    from pipeline.data.manifest import Manifest
    from pipeline.distributed.devices import setup_devices

    config = run.load_config(moved_data)
    runtime = setup_devices(config.runtime, config.seed)
    with runtime.strategy.scope():
        model = keras.saving.load_model(run.model, compile=False)
    return LoadedModel(model, (Manifest.load(run.manifest).class_names,), config, runtime, run)


def load_pretrained_model(weights: str, variant: str, weights_from: str | None, console: Console) -> LoadedModel:
    """Build a model of the ImageNet classes and load published weights into it.

    Args:
        weights: `imagenet`, or a file of weights.
        variant: Name of the published variant.
        weights_from: The make of the file; None for what it says.
        console: Console for the summary of the weights.

    Raises:
        WeightsError: The weights cannot be read, do not fit the whole model, or may be of several makes.
    """
    from pipeline.distributed.devices import setup_devices
    from pipeline.models.efficientnet import efficientnet
    from pipeline.models.weights.pretrained import load_pretrained
    from pipeline.models.weights.sources import imagenet_classes, read_pretrained

    config = Config(  # a config needs data; any source will do, as none is opened
        model=ModelConfig(variant=variant, weights=None), data=DataConfig(source="digits")
    )
    source = read_pretrained(weights, config.variant, weights_from=weights_from)
    if source.conventions.candidates:
        raise WeightsError(f"{source.describe_choice()}; name one of them by --weights-from")
    adapted = source.adapt(config.variant)
    runtime = setup_devices(config.runtime, config.seed)
    synsets, names = imagenet_classes()
    with runtime.strategy.scope():
        model = efficientnet(adapted, num_classes=len(names))
        report = load_pretrained(model, source, variant=adapted, class_names=names)
    if report.uninitialized:
        raise WeightsError(
            f"{report}. These are not the weights of a complete {variant} with the ImageNet classes; "
            "to evaluate a run, use --run"
        )
    console.print(f"weights: {report.summary()}")
    return LoadedModel(model, (synsets, names), config, runtime)
