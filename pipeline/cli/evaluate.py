"""Measures a finished run or published weights, or labels pictures with them.

python evaluate.py --run latest [--split test]                  every figure of a split of the run's own data
python evaluate.py --run latest --data PHOTOS                   the same on other labelled data
python evaluate.py --weights imagenet --variant lite0 --data PHOTOS
python evaluate.py --run latest a.jpg b.jpg                     the five most probable classes of each picture
python evaluate.py --weights imagenet --variant lite0 a.jpg
python evaluate.py --run latest PHOTOS --out labels.csv         of all pictures below a folder, one row each
find PHOTOS -newer labels.csv | python evaluate.py --run latest --format jsonl - | jq .top[0].class
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.schema import Config
from pipeline.console import Console, python_executable
from pipeline.errors import RunError, UserError, WeightsError
from pipeline.evaluation.image_paths import STDIN, picture_paths
from pipeline.models.variants import VARIANTS
from pipeline.runs import run_directory
from pipeline.runs.run_directory import RunDirectory

if TYPE_CHECKING:
    import keras

    from pipeline.data.manifest import Manifest
    from pipeline.data.sources.base import DataSource
    from pipeline.distributed.devices import Runtime
    from pipeline.evaluation.metrics import Predictions


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure a run or published weights on labelled data, or label pictures."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="a run's directory, its MLflow id, or latest")
    what.add_argument(
        "--weights", help="a network of ImageNet's classes: imagenet, or a file of weights; needs --variant"
    )
    parser.add_argument("--variant", choices=list(VARIANTS), help="the network that --weights belong to")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="labelled pictures to measure on: a folder, a CSV file, or a pack"
    )
    parser.add_argument(
        "--class-map", type=Path, metavar="FILE", help="with --data: YAML of lines `data's class: model's class`"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="with --data: write figures into this new folder; with pictures: rows into this new FILE.csv or .jsonl",
    )
    parser.add_argument(
        "--views", choices=["flip", "5-crop", "10-crop"], help="with --run: average over several views of each picture"
    )
    parser.add_argument(
        "--corruptions", action="store_true", help="with --run: measure on corrupted pictures, too (40 more passes)"
    )
    parser.add_argument(
        "--split", choices=["train", "val", "test"], help="the split to measure (default: a run's test; all of --data)"
    )
    parser.add_argument(
        "images",
        nargs="*",
        help="pictures to label instead: files, folders, globs in quotes, or - for a list on standard input",
    )
    parser.add_argument(
        "--format", choices=["table", "csv", "jsonl"], help="of the labels on standard output (default: table)"
    )
    parser.add_argument("--top", type=int, metavar="K", help="label with the K most probable classes (default: 5)")
    arguments = parser.parse_intermixed_args()
    if arguments.weights and not arguments.variant:
        parser.error("--weights needs --variant: the network that they belong to")
    if arguments.run and arguments.variant:
        parser.error("--variant belongs to --weights: a run knows its own")
    if arguments.weights and not (arguments.images or arguments.data):
        parser.error("--weights needs pictures to label, or labelled ones by --data")
    if arguments.images and (arguments.split or arguments.data):
        parser.error("--split and --data are for measuring; leave them out to label pictures")
    if (arguments.views or arguments.corruptions) and (arguments.images or arguments.data):
        parser.error("--views and --corruptions are for measuring a run on its own data")
    if arguments.views and arguments.corruptions:
        parser.error("--views and --corruptions are measurements of their own; give one of them")
    if arguments.class_map and not arguments.data:
        parser.error("--class-map belongs to --data")
    if arguments.out and not (arguments.images or arguments.data):
        parser.error("--out belongs to --data or to pictures: a run's own figures are written into its directory")
    if (arguments.format or arguments.top is not None) and not arguments.images:
        parser.error("--format and --top belong to pictures")
    if arguments.top is not None and arguments.top < 1:
        parser.error(f"--top must be at least 1. Received: {arguments.top}")
    if arguments.images and arguments.out:
        if arguments.format:
            parser.error("--format is of standard output; the ending of --out says the file's: .csv or .jsonl")
        arguments.format = arguments.out.suffix.lower().removeprefix(".")
        if arguments.format not in ("csv", "jsonl"):
            parser.error(
                f"--out: labels are written into a new file that ends in .csv or .jsonl. Received: {arguments.out}"
            )
    return arguments


def main(screen: Console) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse_arguments()
    if (
        arguments.out is not None
        and arguments.out.exists()
        and not (arguments.out.is_dir() and not any(arguments.out.iterdir()))
    ):
        raise UserError(f"{arguments.out}: exists already and nothing in it is overwritten; choose another --out")
    if arguments.images and arguments.out is not None and not arguments.out.parent.is_dir():
        raise UserError(f"{arguments.out}: there is no folder {arguments.out.parent}; make it first")
    pictures = picture_paths(arguments.images, sys.stdin.buffer if STDIN in arguments.images else ())
    output = screen.reserve_stdout() if arguments.format in ("csv", "jsonl") and not arguments.out else None
    if arguments.weights:
        screen.redirect_library_output(None)
        network = load_pretrained_model(arguments.weights, arguments.variant, screen)
    else:
        run = run_directory.find(arguments.run)
        if not run.model.exists():
            raise RunError(
                f"{run.path}: has no model.keras yet; finish it with: {python_executable()} train.py --config ... --run-dir {run.path} --resume"
            )
        screen.redirect_library_output(run.log)
        network = load_run(run)
    if arguments.images:
        return predict_images(network, pictures, arguments, output, screen)
    if arguments.data:
        return evaluate_external_data(network, arguments, screen)
    return evaluate_run(network, run, arguments, screen)


class LoadedModel(NamedTuple):
    """What is measured, ready to run."""

    model: "keras.Model"
    class_lists: tuple[Sequence[str], ...]
    """What its outputs are called, in their order; a list for each wording, such as synsets and readable names."""
    config: Config
    """Its `variant`, `data.resize` and `runtime` matter here."""
    runtime: "Runtime"

    def predictor(self, manifest: "Manifest", source: "DataSource", screen: Console) -> Callable[..., "Predictions"]:
        """A function from a split to its outputs, by the preprocessing of training's validation or what its further arguments say."""
        from pipeline.data.input_pipeline import evaluation_stream
        from pipeline.evaluation.metrics import Predictor

        batch_size = self.runtime.whole_batch(self.config.train.micro_batch_size)
        forward = Predictor(self.model, self.runtime.strategy)

        def predict(split: str, **how: Any) -> "Predictions":
            dataset = evaluation_stream(manifest, source, self.config, split, batch_size=batch_size, **how)
            with screen.progress(f"measuring {split}") as count:
                return forward(dataset, progress=count)

        return predict


def load_run(run: RunDirectory) -> LoadedModel:
    """A run's final network."""
    import keras

    from pipeline.data.manifest import Manifest
    from pipeline.distributed.devices import setup_devices

    config = run.load_config()
    runtime = setup_devices(config)
    with runtime.strategy.scope():
        model = keras.saving.load_model(run.model, compile=False)
    return LoadedModel(model, (Manifest.load(run.manifest).class_names,), config, runtime)


def load_pretrained_model(weights: str, name: str, screen: Console) -> LoadedModel:
    """A network of ImageNet's classes with published weights."""
    from pipeline.distributed.devices import setup_devices
    from pipeline.models.efficientnet import efficientnet
    from pipeline.models.weights.pretrained import imagenet_classes, load_pretrained

    config = Config(
        model=ModelConfig(variant=name, weights=None), data=DataConfig(source="digits")
    )  # a config without data there is not
    runtime = setup_devices(config)
    synsets, names = zip(*imagenet_classes(), strict=True)
    with runtime.strategy.scope():
        model = efficientnet(config.variant, num_classes=len(names))
        report = load_pretrained(model, weights, variant=config.variant, class_names=names)
    if report.new:
        raise WeightsError(
            f"{report}. These are not the weights of a whole {name} with ImageNet's classes; a run is evaluated by --run"
        )
    screen.print(f"weights: {report}")
    return LoadedModel(model, (synsets, names), config, runtime)


def evaluate_run(network: LoadedModel, run: RunDirectory, arguments: argparse.Namespace, screen: Console) -> int:
    """Evaluates a run on a split of its own data, for its directory and MLflow; returns the exit code."""
    from pipeline.data.manifest import Manifest
    from pipeline.data.sources.catalog import open_source
    from pipeline.evaluation.metrics import evaluate_predictions
    from pipeline.evaluation.report.tables import table
    from pipeline.evaluation.robustness import PASSES
    from pipeline.evaluation.run_evaluation import RunEvaluator
    from pipeline.tracking.mlflow_logger import log_evaluation

    manifest, source = Manifest.load(run.manifest), open_source(network.config.data)
    subject = RunEvaluator(
        network.model, network.config, run, manifest, source, network.predictor(manifest, source, screen)
    )
    split = arguments.split or subject.split
    if not len(manifest.indices(split)):
        raise RunError(f"{run.path}: its data have no split {split}")
    if arguments.views:
        results = subject.with_tta(split, arguments.views)
    else:
        predictions = subject.predict(split)
        evaluation = evaluate_predictions(predictions, manifest.class_names, split)
        results = subject.with_batch_norm_gap(
            subject.summarize_with_intervals(predictions, evaluation, subject.temperature())
        )
    if arguments.corruptions:
        screen.print(f"measuring {split} on corrupted pictures: {PASSES} more passes ...")
        results = subject.with_corruptions(results)
    subject.write(results)
    screen.print(table(results))
    folder, page = run.evaluation(results.evaluation.split), subject.page(results.evaluation.split)
    screen.print(f"report   {page}")
    screen.print(f"figures  {folder}")
    if (tracked := run.mlflow_run()) is not None:
        log_evaluation(network.config, tracked, results.headline(), folder, page)
        screen.print(f"logged to the run {tracked[1]} in MLflow")
    return 0


def evaluate_external_data(network: LoadedModel, arguments: argparse.Namespace, screen: Console) -> int:
    """Evaluates a network on labelled data that it was not made for, among all of its own classes; returns the exit code."""
    from pipeline.evaluation.external_data import SPLIT, align, open_external_data, scan_external_data
    from pipeline.evaluation.metrics import evaluate_predictions
    from pipeline.evaluation.report.tables import table, write_results
    from pipeline.evaluation.results import summarize_with_intervals

    source, data = open_external_data(arguments.data, arguments.split)
    alignment = align(source.class_names, network.class_lists, arguments.class_map)
    with screen.progress("reading the data") as count:
        manifest = scan_external_data(source, data, count)
    predictions = alignment(network.predictor(manifest, source, screen)(SPLIT))
    evaluation = evaluate_predictions(predictions, alignment.class_names, arguments.data.name)
    results = summarize_with_intervals(
        predictions, evaluation, manifest.table["key"].tolist(), manifest.table["group"].to_numpy(), None
    )
    screen.print(table(results))
    if arguments.out is not None:
        write_results(results, arguments.out)
        screen.print(f"written to {arguments.out}")
    return 0


def predict_images(
    network: LoadedModel,
    pictures: Iterable[Path],
    arguments: argparse.Namespace,
    output: TextIO | None,
    screen: Console,
) -> int:
    """Labels pictures with their most probable classes: on the screen, or in rows where there is an `output` or --out.

    Returns:
        The exit code: 1 if a picture could not be read, and that of a Unix filter if nobody reads the output any more.
    """
    from pipeline.evaluation.predict import csv_rows, json_rows, predict_files, prediction_table

    names = [" ".join(wordings) for wordings in zip(*network.class_lists, strict=True)]
    k = min(arguments.top or 5, len(names))
    resolution, resize = network.config.variant.resolution, network.config.data.resize
    done = failed = 0
    with ExitStack() as stack:
        if arguments.out is not None:
            output = stack.enter_context(
                arguments.out.open("x", encoding="utf-8", errors="backslashreplace", newline="")
            )
        count = stack.enter_context(screen.progress("labelling"))
        rows = None if output is None else csv_rows(output, k) if arguments.format == "csv" else json_rows(output)
        try:
            for prediction in predict_files(network.model, names, pictures, resolution=resolution, resize=resize, k=k):
                if rows is None:
                    screen.print(prediction_table(prediction))
                else:
                    rows(prediction)
                    if prediction.error is not None:
                        screen.error(f"{prediction.path}: {prediction.error}")
                done += 1
                failed += prediction.error is not None
                count(done, None)
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
    screen.print(
        f"{done - failed:,} picture{'s' * (done - failed != 1)} labelled"
        + (f", {failed:,} could not be read" if failed else "")
    )
    return 1 if failed else 0
