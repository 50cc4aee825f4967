"""Evaluate a run or published weights on labeled images.

efficientnet evaluate --run latest [--split test]             evaluates a split of the run's own data
efficientnet evaluate --run latest --data IMAGES              evaluates other labeled data
efficientnet evaluate --weights imagenet --variant lite0 --data IMAGES
efficientnet evaluate --run latest a.jpg b.jpg                labels images, as efficientnet predict does
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.arguments import command_parser, local_path
from pipeline.cli.loaded_model import (
    LoadedModel,
    add_model_arguments,
    check_model_arguments,
    check_new_output,
    choose_split,
    load_model,
    load_run,
)
from pipeline.cli.predict import IMAGES_HELP, add_output_arguments, check_output_arguments, predict
from pipeline.console import Console, plural
from pipeline.runs.run_directory import RunDirectory

MOVED_DATA = ("data.path=", "data.root=")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    assert __doc__ is not None
    parser = command_parser("evaluate", __doc__, formatter=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--split", choices=["train", "val", "test"], help="split to evaluate (default: a run's test; all of --data)"
    )
    parser.add_argument(
        "--tta", choices=["flip", "5-crop", "10-crop"], help="with --run: average over several views of each image"
    )
    parser.add_argument(
        "--corruptions", action="store_true", help="with --run: evaluate corrupted images, too (40 more passes)"
    )
    parser.add_argument(
        "--data", type=local_path, metavar="PATH", help="labeled images to evaluate on: a folder, a CSV file, or a pack"
    )
    parser.add_argument(
        "--class-map",
        type=local_path,
        metavar="FILE",
        help="with --data: YAML of lines `class of the data: class of the model`",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="PATH",
        help="with --data: a new folder for the results; with images: a new file",
    )
    labeling = parser.add_argument_group("labeling, as by predict")
    labeling.add_argument("images", nargs="*", metavar="IMAGE", help=IMAGES_HELP)
    add_output_arguments(labeling)
    arguments = parser.parse_intermixed_args(argv)
    arguments.moved_data = [word for word in arguments.images if word.startswith(MOVED_DATA)]
    arguments.images = [word for word in arguments.images if not word.startswith(MOVED_DATA)]
    check_model_arguments(parser, arguments)
    check_arguments(parser, arguments)
    return arguments


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error if the options do not belong together."""
    if arguments.images:
        if arguments.split or arguments.data or arguments.class_map or arguments.tta or arguments.corruptions:
            parser.error(
                "--split, --data, --class-map, --tta and --corruptions are for evaluation; omit them to label images"
            )
        check_output_arguments(parser, arguments)
        return
    if arguments.format or arguments.top is not None:
        parser.error("--format and --top are for labeling; name the images")
    if arguments.moved_data and (arguments.data or not arguments.run):
        parser.error("data.path= says where the data of a run are now: it belongs to --run, without --data")
    if arguments.weights and not arguments.data:
        parser.error("--weights needs images to label, or labeled images: --data")
    if arguments.data and (arguments.tta or arguments.corruptions):
        parser.error("--tta and --corruptions evaluate a run on its own data; omit --data")
    if arguments.tta and arguments.corruptions:
        parser.error("--tta and --corruptions are separate evaluations; use one of them")
    if arguments.class_map and not arguments.data:
        parser.error("--class-map belongs to --data")
    if arguments.out and not arguments.data:
        parser.error("--out belongs to --data or to images; the results of a run go into its directory")


def main(console: Console, argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        console: Console for the output.
        argv: Arguments; None takes those of the process.
    """
    arguments = parse_arguments(argv)
    if arguments.images:
        return predict(arguments, console)
    if arguments.out is not None:
        check_new_output(arguments.out)
    loaded = load_model(arguments, console)
    if arguments.data and arguments.split and loaded.run and is_moved(loaded.run, arguments.data, arguments.split):
        console.print(f"{arguments.data} holds the images of the run, so its own split {arguments.split} is evaluated")
        loaded = load_run(loaded.run, [f"data.path={arguments.data}"])
    elif arguments.data:
        return evaluate_external_data(
            loaded, arguments.data, console, split=arguments.split, class_map=arguments.class_map, out=arguments.out
        )
    assert loaded.run is not None
    return evaluate_run(
        loaded, loaded.run, console, split=arguments.split, tta=arguments.tta, corruptions=arguments.corruptions
    )


def evaluate_run(
    loaded: LoadedModel,
    run: RunDirectory,
    console: Console,
    *,
    split: str | None,
    tta: str | None,
    corruptions: bool,
) -> int:
    """Evaluate a run on a split of its own data. Write the results into its directory and to MLflow.

    Args:
        loaded: Model of the run.
        run: Directory of the run.
        console: Console for the results.
        split: The split; None for the one that the run is evaluated on.
        tta: Views of test-time augmentation: flip, 5-crop or 10-crop; None for none.
        corruptions: Evaluate corrupted images, too.

    Returns:
        The exit code.

    Raises:
        RunError: The data of the run have no such split.
    """
    from pipeline.data.integrity import check_images
    from pipeline.data.manifest import Manifest
    from pipeline.data.sources.catalog import open_source
    from pipeline.evaluation.metrics import evaluate_predictions
    from pipeline.evaluation.report.tables import metrics_table
    from pipeline.evaluation.results import summarize_with_intervals
    from pipeline.evaluation.robustness import NUM_CORRUPTIONS
    from pipeline.evaluation.run_evaluation import RunEvaluator
    from pipeline.tracking.mlflow_logger import log_evaluation

    manifest, source = Manifest.load(run.manifest), open_source(loaded.config.data)
    evaluator = RunEvaluator(
        loaded.model, loaded.config, run, manifest, source, loaded.predictor(manifest, source, console)
    )
    split = choose_split(run, manifest, split)
    check_images(manifest, source, split)
    if tta:
        results = evaluator.with_tta(split, tta)
    else:
        predictions = evaluator.predict(split)
        evaluation = evaluate_predictions(predictions, manifest.class_names, split)
        temperature = evaluator.temperature()
        with console.waiting("bootstrapping the intervals"):
            results = evaluator.with_batch_norm_gap(
                summarize_with_intervals(predictions, evaluation, manifest, temperature)
            )
    if corruptions:
        console.print(f"evaluating {split} on corrupted images: {NUM_CORRUPTIONS} more passes ...")
        results = evaluator.with_corruptions(results)
    with console.waiting("writing the report"):
        evaluator.write(results)
    console.print(metrics_table(results))
    results_dir = run.evaluation(results.evaluation.split)
    report = evaluator.report_path(results.evaluation.split)
    console.print(f"report   {report}", wrap=False)
    console.print(f"results  {results_dir}", wrap=False)
    if (mlflow_run := run.mlflow_run()) is not None:
        logged = log_evaluation(loaded.config.tracking.uri, mlflow_run, results.scalar_metrics(), results_dir, report)
        console.print(f"{'logged to' if logged else 'not logged: MLflow no longer has'} the run {mlflow_run[1]}")
    return 0


def is_moved(run: RunDirectory, path: Path, split: str) -> bool:
    """Return True if labeled images bring no such split, and hold all images of that split of the run."""
    from pipeline.data.manifest import Manifest
    from pipeline.evaluation.external_data import open_external_data

    images = open_external_data(path, None)[0].source.list_images()
    manifest = Manifest.load(run.manifest)
    keys = manifest.table["key"].iloc[manifest.indices(split)]
    return all(image.split != split for image in images) and set(keys) <= {image.key for image in images}


def evaluate_external_data(
    loaded: LoadedModel, path: Path, console: Console, *, split: str | None, class_map: Path | None, out: Path | None
) -> int:
    """Evaluate a model on labeled data that it was not trained on, among all classes of the model.

    Args:
        loaded: The model.
        path: The labeled images: a folder, a CSV file, or a pack.
        console: Console for the results.
        split: The split of the data; None for all images.
        class_map: YAML file that maps classes of the data to classes of the model; None matches them by name.
        out: New folder for the results; None writes nothing.

    Returns:
        The exit code.
    """
    from pipeline.data.manifest import Manifest
    from pipeline.evaluation.external_data import (
        SPLIT,
        align,
        open_external_data,
        scan_external_data,
        seen_in_training,
    )
    from pipeline.evaluation.metrics import evaluate_predictions
    from pipeline.evaluation.report.tables import metrics_table, write_results
    from pipeline.evaluation.results import summarize_with_intervals

    source, data = open_external_data(path, split, loaded.config.data.background)
    alignment = align(source.class_names, loaded.class_lists, class_map)
    with console.progress("reading the data") as progress:
        manifest = scan_external_data(source, data, progress)
    known = manifest.table["sha256"]
    if loaded.run is not None and (count := seen_in_training(Manifest.load(loaded.run.manifest), known)):
        console.print(
            f"warning: {count:,} of the {plural(len(known), 'image')} are training images of the run; the metrics "
            "below are better than they would be on images that it has not seen"
        )
    predictions = alignment(loaded.predictor(manifest, source, console)(SPLIT))
    evaluation = evaluate_predictions(predictions, alignment.class_names, path.name)
    results = summarize_with_intervals(predictions, evaluation, manifest, None)
    console.print(metrics_table(results))
    if out is not None:
        write_results(results, out)
        console.print(f"written to {out}")
    return 0
