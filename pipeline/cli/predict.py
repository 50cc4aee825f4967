"""Label images with the most probable classes of a run or of published weights.

efficientnet predict --run latest a.jpg b.jpg                      prints the five most probable classes of each image
efficientnet predict --weights imagenet --variant lite0 a.jpg      uses published weights
efficientnet predict --run latest IMAGES --out labels.csv          writes a row for each image below a folder
find IMAGES -newer labels.csv | efficientnet predict --run latest --format jsonl - | jq .top[0].class
"""

import argparse
import csv
import json
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pipeline.cli.arguments import check_folder, command_parser, local_path, positive_int
from pipeline.cli.loaded_model import (
    LoadedModel,
    add_model_arguments,
    check_model_arguments,
    check_new_output,
    load_model,
)
from pipeline.console import Console
from pipeline.evaluation.image_paths import STDIN, image_paths

if TYPE_CHECKING:
    from pipeline.evaluation.predict import FilePrediction

IMAGES_HELP = "images to label: files, folders, quoted globs, or - for a list on standard input"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    assert __doc__ is not None
    parser = command_parser("predict", __doc__, formatter=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_output_arguments(parser)
    parser.add_argument("--out", type=local_path, metavar="FILE", help="write rows into this new file: .csv or .jsonl")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=IMAGES_HELP)
    arguments = parser.parse_intermixed_args(argv)
    check_model_arguments(parser, arguments)
    check_output_arguments(parser, arguments)
    return arguments


def add_output_arguments(parser: argparse._ActionsContainer) -> None:
    """Add --format and --top."""
    parser.add_argument(
        "--format", choices=["table", "csv", "jsonl"], help="format of the labels on standard output (default: table)"
    )
    parser.add_argument("--top", type=positive_int, metavar="K", help="number of most probable classes (default: 5)")


def check_output_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error if --format and --out are invalid. Take the format of a file from its suffix."""
    if arguments.out is not None:
        if arguments.format:
            parser.error("--format belongs to standard output; the suffix of --out selects the format: .csv or .jsonl")
        arguments.format = arguments.out.suffix.lower().removeprefix(".")
        if arguments.format not in ("csv", "jsonl"):
            parser.error(f"--out: must be a new file that ends in .csv or .jsonl. Received: {arguments.out}")


def main(console: Console, argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        console: Console for the output.
        argv: Arguments; None takes those of the process.
    """
    return predict(parse_arguments(argv), console)


def predict(arguments: argparse.Namespace, console: Console) -> int:
    """Label the images of parsed arguments and return the exit code.

    Raises:
        UserError: The output exists or its folder does not, an image does not exist, or the model cannot be loaded.
    """
    if arguments.out is not None:
        check_new_output(arguments.out)
        check_folder(arguments.out)
    paths = image_paths(arguments.images, sys.stdin.buffer if STDIN in arguments.images else ())
    stdout = console.reserve_stdout() if arguments.format in ("csv", "jsonl") and not arguments.out else None
    loaded = load_model(arguments, console)
    return predict_images(
        loaded, paths, console, k=arguments.top or 5, format=arguments.format, file=arguments.out or stdout
    )


def predict_images(
    loaded: LoadedModel,
    paths: Iterable[Path],
    console: Console,
    *,
    k: int = 5,
    format: str | None = None,
    file: Path | TextIO | None = None,
) -> int:
    """Label images with their most probable classes, in constant memory.

    Args:
        loaded: The model.
        paths: The images.
        console: Console for the messages, and for the labels where there is no `file`.
        k: Number of classes; all of them where the model has fewer.
        format: csv or jsonl, the format of `file`.
        file: A new file or an open one for rows; None prints a table for each image.

    Returns:
        The exit code: 0, 1 if an image could not be read, or 141 (128 + SIGPIPE) if the reader of the output is gone.
    """
    from pipeline.evaluation.predict import format_prediction, predict_files
    from pipeline.tasks import TASKS

    names = [" ".join(synonyms) for synonyms in zip(*loaded.class_lists, strict=True)]
    k = min(k, len(names))
    resolution, data = loaded.config.variant.resolution, loaded.config.data
    done = failed = 0
    with ExitStack() as stack:
        if isinstance(file, Path):
            file = stack.enter_context(file.open("x", encoding="utf-8", errors="backslashreplace", newline=""))
        progress = stack.enter_context(console.progress("labeling"))
        write_row = None if file is None else csv_writer(file, k) if format == "csv" else json_lines_writer(file)
        try:
            predictions = predict_files(
                loaded.model,
                names,
                paths,
                resolution=resolution,
                resize=data.resize,
                background=data.background,
                k=k,
                task=TASKS[loaded.config.task],
            )
            for prediction in predictions:
                if write_row is None:
                    console.print(format_prediction(prediction))
                else:
                    write_row(prediction)
                    if prediction.error is not None:
                        console.error(f"{prediction.path}: {prediction.error}")
                done += 1
                failed += prediction.error is not None
                progress(done, None)
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
    console.print(
        f"{done - failed:,} image{'s' * (done - failed != 1)} labeled"
        + (f", {failed:,} could not be read" if failed else "")
    )
    return 1 if failed else 0


def csv_writer(file: TextIO, k: int) -> Callable[["FilePrediction"], None]:
    """Write the header of a CSV file: path, error, class1, probability1, and so on up to `k`.

    Returns:
        A function that adds the row of a prediction.
    """
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(
        ["path", "error", *(f"{name}{rank}" for rank in range(1, k + 1) for name in ("class", "probability"))]
    )

    def add(prediction: "FilePrediction") -> None:
        cells = [cell for label in prediction.top for cell in (label.name, f"{label.probability:.6g}")]
        rows.writerow([prediction.path, prediction.error, *(cells or [""] * (2 * k))])
        file.flush()

    return add


def json_lines_writer(file: TextIO) -> Callable[["FilePrediction"], None]:
    """Return a function that writes a prediction as a line of JSON.

    A line is {"path": ..., "top": [{"class": ..., "probability": ...}, ...], "error": null or a reason}.
    """

    def add(prediction: "FilePrediction") -> None:
        top = [{"class": label.name, "probability": float(f"{label.probability:.6g}")} for label in prediction.top]
        file.write(
            json.dumps({"path": str(prediction.path), "top": top, "error": prediction.error}, ensure_ascii=False) + "\n"
        )
        file.flush()

    return add
