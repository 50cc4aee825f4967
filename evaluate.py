"""Measures a finished run, or labels pictures.

python evaluate.py --run latest [--split test]               every figure of a split
python evaluate.py --run latest a.jpg b.jpg                  the five most probable classes of each picture
python evaluate.py --weights imagenet --variant lite0 a.jpg  the same with published weights, ImageNet's classes
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline import run_directory
from pipeline.errors import RunError, UserError, WeightsError
from pipeline.run_directory import RunDirectory
from pipeline.scaling import VARIANTS
from pipeline.screen import Screen, run_program


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a run on a split of its data, or label pictures.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="a run's directory, its MLflow id, or latest")
    what.add_argument("--weights", help="label pictures by ImageNet's classes with these weights: imagenet, or a file; needs --variant")
    parser.add_argument("--variant", choices=list(VARIANTS), help="the network that --weights belong to")
    parser.add_argument("--split", choices=["train", "val", "test"], help="the split to measure (default: test; val where there is none)")
    parser.add_argument("images", nargs="*", type=Path, help="pictures to label instead of measuring a split")
    arguments = parser.parse_intermixed_args()
    if arguments.weights and not arguments.variant:
        parser.error("--weights needs --variant: the network that they belong to")
    if arguments.weights and not arguments.images:
        parser.error("--weights needs pictures to label")
    if arguments.images and arguments.split:
        parser.error("--split measures a split of the run's data; leave it out to label pictures")
    return arguments


def main(screen: Screen) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse_arguments()
    missing = [str(path) for path in arguments.images if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: there is no such file" + (f" ({len(missing)} are missing)" if len(missing) > 1 else ""))
    if arguments.weights:
        screen.divert_to(None)
        return label_by_imagenet(arguments.weights, arguments.variant, arguments.images, screen)
    run = run_directory.find(arguments.run)
    if not run.model.exists():
        raise RunError(f"{run.path}: has no model.keras yet; finish it with: python train.py --config ... --run-dir {run.path} --resume")
    screen.divert_to(run.log)
    return label(run, arguments.images, screen) if arguments.images else measure(run, arguments.split, screen)


def measure(run: RunDirectory, split: str | None, screen: Screen) -> int:
    """Evaluates a run's final network on a split; returns the exit code."""
    import keras

    from pipeline.data.manifest import Manifest
    from pipeline.data.sources import open_source
    from pipeline.data.stream import evaluation_stream
    from pipeline.evaluation.metrics import Predictor, evaluate_predictions
    from pipeline.evaluation.report import table, write_evaluation
    from pipeline.training.runtime import set_up
    from pipeline.training.tracking import log_evaluation

    config = run.load_config()
    manifest = Manifest.load(run.manifest)
    if split is None:
        split = "test" if len(manifest.indices("test")) else "val"
    if not len(manifest.indices(split)):
        raise RunError(f"{run.path}: its data have no split {split}")
    runtime = set_up(config)
    with runtime.strategy.scope():
        model = keras.saving.load_model(run.model, compile=False)
    batch_size = runtime.whole_batch(config.train.global_batch_size // config.train.accumulation)
    dataset = evaluation_stream(manifest, open_source(config.data), config, split, batch_size=batch_size)
    with screen.counting(f"measuring {split}") as count:
        predictions = Predictor(model, runtime.strategy)(dataset, progress=count)
    evaluation = evaluate_predictions(predictions, manifest.class_names, split)
    write_evaluation(evaluation, predictions, manifest.table["key"].tolist(), run.evaluation(split))
    screen.say(table(evaluation))
    screen.say(f"written to {run.evaluation(split)}")
    if (tracked := run.mlflow_run()) is not None:
        log_evaluation(config, tracked, evaluation.headline(), run.evaluation(split))
        screen.say(f"logged to the run {tracked[1]} in MLflow")
    return 0


def label(run: RunDirectory, images: list[Path], screen: Screen) -> int:
    """Prints the most probable classes of pictures by a run's final network; returns the exit code."""
    import keras

    from pipeline.data.manifest import Manifest

    config, class_names = run.load_config(), Manifest.load(run.manifest).class_names
    model = keras.saving.load_model(run.model, compile=False)
    return show_predictions(model, class_names, images, config.variant.resolution, config.data.resize, screen)


def label_by_imagenet(weights: str, name: str, images: list[Path], screen: Screen) -> int:
    """Prints the most probable of ImageNet's classes; returns the exit code."""
    from pipeline.model.efficientnet import efficientnet
    from pipeline.model.weights import imagenet_classes, load_pretrained

    classes = [readable for _, readable in imagenet_classes()]
    variant = VARIANTS[name]
    model = efficientnet(variant, num_classes=len(classes))
    report = load_pretrained(model, weights, variant=variant, class_names=classes)
    if report.new:
        raise WeightsError(
            f"{report}. These are not the weights of a whole {name} with ImageNet's classes; a run is labelled with by --run"
        )
    screen.say(f"weights: {report}")
    return show_predictions(model, classes, images, variant.resolution, "crop", screen)


def show_predictions(
    model: Any,
    class_names: Sequence[str],
    images: list[Path],
    resolution: int,
    resize: Literal["crop", "squash", "letterbox"],
    screen: Screen,
) -> int:
    """Prints a table for each picture; the exit code is 1 if one could not be read."""
    from pipeline.evaluation.predict import predict_files, prediction_table

    failed = 0
    for prediction in predict_files(model, class_names, images, resolution=resolution, resize=resize):
        screen.say(prediction_table(prediction))
        failed += prediction.error is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_program(main))
