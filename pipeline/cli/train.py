"""Train an EfficientNet as a config describes: python train.py --config configs/b2_flowers.yaml [key=value ...].

`train` tells a run in its steps: devices, data, model, training, evaluation, report. The steps are in
`pipeline.cli.training_steps`. TensorFlow is imported only after the config has been validated, so that a mistake in the
config is reported at once.
"""

import argparse
import signal
from collections.abc import Sequence
from contextlib import ExitStack

from pipeline.cli.arguments import add_config, add_overrides, command_parser, local_path
from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.console import Console, command_line
from pipeline.distributed.cluster import ProcessInfo, cluster_from_tf_config
from pipeline.errors import RunError
from pipeline.files import atomic_write
from pipeline.runs import run_directory
from pipeline.runs.run_directory import RunDirectory


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "train", "Train or fine-tune an EfficientNet.", epilog="Every key is described in pipeline/config/."
    )
    add_config(parser, "b2_flowers")
    parser.add_argument(
        "--run-dir", type=local_path, help="directory of the run (default: runs/<experiment>/<date-time>)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the unfinished run in --run-dir")
    parser.add_argument(
        "--allow-change",
        metavar="KEY",
        action="append",
        default=[],
        help="with --resume: continue although KEY differs; may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that a start checks, show config, data and cost, and stop"
    )
    add_overrides(parser, "train.global_batch_size=64")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resume and arguments.run_dir is None:
        parser.error("--resume needs --run-dir: the directory of the run to continue")
    if arguments.allow_change and not arguments.resume:
        parser.error("--allow-change belongs to --resume; a new run may differ in any key")
    return arguments


def main(console: Console, argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        console: Console for the output.
        argv: Arguments; None takes those of the process.
    """
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides).with_absolute_paths()
    if arguments.dry_run:
        if not arguments.resume:
            run_directory.check_can_create(arguments.run_dir, config.tracking.experiment, config)
        console.redirect_library_output(None)
        from pipeline.cli.dry_run import print_dry_run

        print_dry_run(config, console)
        return 0
    process_info = cluster_from_tf_config(config.runtime.strategy)
    if process_info is not None and arguments.run_dir is None:
        raise RunError("a run of several processes needs one directory: give each of them the same --run-dir")
    if process_info is not None and not process_info.is_chief:
        return run_worker(config, RunDirectory(arguments.run_dir), console, process_info)
    if arguments.resume:
        run = run_directory.find(str(arguments.run_dir))
    else:
        run = run_directory.create(arguments.run_dir, config.tracking.experiment)
    with run.exclusive_lock():
        if run.model.exists():
            command = command_line("evaluate", "--run", run.path)
            console.print(f"{run.path} is finished already; evaluate it with: {command}", wrap=False)
            return 0
        resume = run.has_checkpoints()
        if not run.config.exists():
            atomic_write(run.config, config.to_yaml())
        console.redirect_library_output(run.log)
        with run.removed_if_unused():
            return train(config, run, console, process_info, resume=resume, allowed_changes=arguments.allow_change)


def run_worker(config: Config, run: RunDirectory, console: Console, process_info: ProcessInfo) -> int:
    """Train as a process other than the chief, which writes the run. Return the exit code."""
    if run.model.exists():
        console.print(f"{run.path} is finished already")
        return 0
    run.path.mkdir(parents=True, exist_ok=True)
    console.redirect_library_output(run.worker_log(process_info.rank))
    # A worker has no files to close, and it may be blocked inside TensorFlow, so signals end it at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    process_info.wait_for_chief(console.print)
    return train(config, run, console, process_info)


def train(
    config: Config,
    run: RunDirectory,
    console: Console,
    process_info: ProcessInfo | None,
    *,
    resume: bool = False,
    allowed_changes: Sequence[str] = (),
) -> int:
    """Take a run from its data to its report.

    Args:
        config: The config as written.
        run: Directory of the run; only the chief writes it.
        console: Console for progress and results.
        process_info: Rank and addresses of this process; None for a run of a single process.
        resume: Continue from a checkpoint, as the chief decides.
        allowed_changes: Keys in which a resumed run may differ from its checkpoint.

    Returns:
        The exit code.
    """
    with console.waiting("loading TensorFlow"):
        from pipeline.cli import training_steps as steps

    runtime = steps.connect_devices(config, process_info, console)
    with runtime.processes.translate_peer_failure(), ExitStack() as stack:
        source = steps.open_data_source(config, run, runtime, console)
        training_run = steps.prepare_run(
            config, run, runtime, source, console, resume=resume, allowed_changes=allowed_changes
        )
        steps.save_run_inputs(training_run)
        training = steps.build_trainer(training_run, stack)
        history = steps.fit(training_run, training)
        split = steps.evaluate_final_and_best(training_run, training, history)
        runtime.processes.final_barrier()
    steps.print_summary(training_run, training, split)
    return 0
