"""Pack a data set into a few large files with random access."""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.arguments import BYTES, add_config, add_overrides, command_parser, local_path, positive_int, quantity
from pipeline.config.base import is_address
from pipeline.config.data import SOURCE_KEYS, ColumnsConfig, DataConfig
from pipeline.config.loader import load_config
from pipeline.console import Console, command_line, plural
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.data.pack_inputs import PackInput
    from pipeline.data.sources.pack import PackMetadata

LABEL_OPTIONS = ("classes", "first_label", "image_feature", "label_feature", "class_feature")
CSV_OPTIONS = ("columns", "root")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "pack",
        "Write a data set as ArrayRecord shards with the unchanged bytes of each image, and read them back. Run again, "
        "the command continues an interrupted pack, and verifies and repairs a finished one. The data set is never "
        "changed.",
        epilog="Then: data.source=pack data.path=FOLDER data.name=null. Exit code: 0 if the pack is intact, 2 if not.",
    )
    add_inputs(parser)
    parser.add_argument(
        "--out", type=local_path, metavar="FOLDER", help="folder of the pack, on a disk with room for all of it"
    )
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument(
        "--shard-size", type=quantity(BYTES, "256MB"), default=256e6, help="size of a shard (default: 256MB)"
    )
    shards.add_argument("--shard-images", type=positive_int, metavar="N", help="images of a shard, in place of a size")
    add_label_options(parser)
    add_overrides(parser, "data.path=IMAGES")
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.verify is None) != (arguments.out is not None):
        parser.error(
            "--out names the folder of the pack; it is required by --config, --csv, --tfrecord and --webdataset, and "
            "not used by --verify"
        )
    if arguments.config is None and arguments.overrides:
        parser.error(f"{arguments.overrides[0]}: changes to the config need --config")
    for name in LABEL_OPTIONS:
        if arguments.tfrecord is None and arguments.webdataset is None and getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} belongs to --tfrecord and --webdataset")
    for name in CSV_OPTIONS:
        if arguments.csv is None and getattr(arguments, name) is not None:
            parser.error(f"--{name} belongs to --csv")
    return arguments


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name what is packed, of which one is given."""
    pack_input = parser.add_mutually_exclusive_group(required=True)
    add_config(pack_input, "lite0_folder", required=False)
    pack_input.add_argument(
        "--csv", metavar="FILE", help="a CSV file to pack; it and its images may lie at addresses, such as s3://..."
    )
    pack_input.add_argument(
        "--tfrecord",
        nargs="+",
        metavar="SPLIT=FILES",
        help="TFRecord files to pack, also at addresses, as in 'train=FOLDER/train-*'",
    )
    pack_input.add_argument(
        "--webdataset",
        nargs="+",
        metavar="SPLIT=FILES",
        help="tar shards to pack, also at addresses, as in 'FOLDER/train-{000000..000012}.tar', or their folder",
    )
    pack_input.add_argument(
        "--verify", type=local_path, metavar="FOLDER", help="only read a pack and compare it with its hashes"
    )


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the files of --csv, --tfrecord and --webdataset have images and labels."""
    table = parser.add_argument_group("CSV files")
    table.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN=NAME",
        help="names of the columns path, label and split, as in path=file label=species",
    )
    table.add_argument("--root", metavar="FOLDER", help="path or address that relative paths start from")
    records = parser.add_argument_group("TFRecord files and tar shards")
    records.add_argument(
        "--classes", type=local_path, metavar="FILE", help="class names, one per line, in the order of the labels"
    )
    records.add_argument(
        "--first-label",
        type=int,
        choices=[0, 1],
        help="label of the first class; 1 if 0 is the background",
    )
    records.add_argument(
        "--image-feature",
        metavar="NAME",
        help="feature of the encoded image (default: image/encoded or image), or extension of the images",
    )
    records.add_argument(
        "--label-feature",
        metavar="NAME",
        help="feature of the label (default: image/class/label or label); of tar shards: extension, or field of json "
        "(default: cls, the field label, or txt)",
    )
    records.add_argument(
        "--class-feature",
        metavar="NAME",
        help="feature of the class name (default: image/class/text); of tar shards: extension, or field of json",
    )


def main(console: Console, argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        console: Console for the output.
        argv: Arguments; None takes those of the process.
    """
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    console.redirect_library_output(None)

    import pyarrow.compute as pc
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    if arguments.verify is not None:
        verify(arguments.verify, console)
        return 0

    from pipeline.data.packing import ShardLimit, pack

    pack_input = files_input(arguments) if config is None else source_input(config.data, arguments.out)
    limit = (
        ShardLimit(arguments.shard_size)
        if arguments.shard_images is None
        else ShardLimit(math.inf, arguments.shard_images)
    )
    start = time.monotonic()
    with console.progress("packing") as progress:
        packed = pack(pack_input, arguments.out, limit, progress)
    seconds, size, num_images = time.monotonic() - start, pc.sum(packed.index["bytes"]).as_py(), len(packed.index)
    print_pack(arguments.out, packed.metadata, console)
    if packed.written == num_images:
        console.print(
            f"written  {size / 1e6:,.1f} MB in {seconds:,.1f} s, {size / 1e6 / seconds:,.0f} MB/s, "
            "read back and verified"
        )
    elif packed.written:
        console.print(
            f"written  {plural(packed.written, 'image')} in {seconds:,.1f} s; the others existed, and all are intact"
        )
    else:
        console.print(f"written  nothing: the pack was complete, and is intact (read in {seconds:,.1f} s)")
    words = (arguments.config or "CONFIG", *pack_overrides(arguments.out, config.data if config else None))
    console.print(f"train    {command_line('train', '--config', *words)}", wrap=False)
    return 0


def pack_overrides(folder: Path, data: DataConfig | None) -> list[str]:
    """Return the changes to a config that replace its data set by a pack.

    Args:
        folder: Folder of the pack.
        data: Data set of the config; None if the config is not known.
    """
    words = ["data.source=pack", f"data.path={folder}"]
    if data is None:
        return [*words, "data.name=null"]
    for key in SOURCE_KEYS[data.source][0] | dict.fromkeys(SOURCE_KEYS[data.source][1]):
        if key not in SOURCE_KEYS["pack"][0] and getattr(data, key) != DataConfig.model_fields[key].default:
            words.append(f"data.{key}=" + ("{}" if key == "columns" else "null"))
    return words


def source_input(data: DataConfig, folder: Path) -> "PackInput":
    """Open the data set of a config, to be packed into a folder.

    Raises:
        DataError: The data set is not available, or the folder lies in it.
    """
    from pipeline.data.pack_inputs import SourceInput
    from pipeline.data.sources.catalog import open_source

    if data.source == "folder" and data.path is not None and folder.resolve().is_relative_to(data.path.resolve()):
        raise DataError(
            f"--out {folder} lies in the data set, {data.path}, where it would count as a class; choose another folder"
        )
    return SourceInput(open_source(data))


def files_input(arguments: argparse.Namespace) -> "PackInput":
    """Open the files of the command line: a CSV file, TFRecord files or tar shards.

    Raises:
        DataError: The files, the columns or the class names are not valid.
    """
    if arguments.csv is not None:
        from pipeline.data.csv_input import CsvSource
        from pipeline.data.pack_inputs import SourceInput

        address = arguments.csv if is_address(arguments.csv) else str(local_path(arguments.csv))
        return SourceInput(CsvSource(address, parse_columns(arguments.columns or ()), arguments.root))

    from pipeline.data.tfrecord import TFRecordInput
    from pipeline.data.webdataset import WebDatasetInput

    names = {"image": arguments.image_feature, "label": arguments.label_feature, "class_name": arguments.class_feature}
    features = {field: name for field, name in names.items() if name is not None}
    classes = class_names(arguments.classes) if arguments.classes else None
    if arguments.tfrecord is not None:
        return TFRecordInput(arguments.tfrecord, features, classes, arguments.first_label)
    return WebDatasetInput(arguments.webdataset, features, classes, arguments.first_label)


def parse_columns(words: Sequence[str]) -> ColumnsConfig:
    """Parse names of columns, such as path=file.

    Raises:
        DataError: A word has another form, or names another column than path, label and split.
    """
    columns = {}
    for word in words:
        column, separator, name = word.partition("=")
        if not (separator and name) or column not in ("path", "label", "split"):
            raise DataError(f"--columns {word}: write path=NAME, label=NAME or split=NAME")
        columns[column] = name
    return ColumnsConfig(**columns)


def class_names(path: Path) -> tuple[str, ...]:
    """Read class names from a file, one per line.

    Raises:
        DataError: The file cannot be read, or a line is empty or a duplicate.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {path} cannot be read: {error}") from None
    faults = [
        f"line {number}: {name or 'is empty'}"
        for number, name in enumerate(names, 1)
        if not name or names.index(name) < number - 1
    ]
    if faults or not names:
        raise DataError(
            f"--classes {path}: must hold one name per line, without duplicates:\n"
            + ("\n".join(faults[:20]) or "it is empty")
        )
    return tuple(names)


def verify(folder: Path, console: Console) -> None:
    """Read a pack, compare it with its hashes, and print that it is intact.

    Raises:
        DataError: The pack is damaged. The message lists what is.
    """
    from pipeline.data.sources.base import format_list
    from pipeline.data.sources.pack import verify as verify_pack

    with console.progress("reading the pack") as progress:
        metadata, damaged = verify_pack(folder, progress)
    if damaged:
        remedy = "Run python -m pipeline pack with the data set again, which repairs it, or restore it from a copy."
        count = plural(len(damaged), "file or record is", "files or records are")
        raise DataError(f"{folder}: {count} damaged:\n{format_list(damaged)}\n{remedy}")
    print_pack(folder, metadata, console)
    console.print("intact   every shard has the SHA-256 that it was written with")


def print_pack(folder: Path, metadata: "PackMetadata", console: Console) -> None:
    """Print the contents of a pack."""
    num_images, size = (sum(getattr(shard, name) for shard in metadata.shards) for name in ("num_images", "size"))
    console.print(
        f"pack     {folder}: {plural(num_images, 'image')} of "
        f"{plural(len(metadata.class_names), 'class', 'classes')}, "
        f"{size / 1e6:,.1f} MB in {plural(len(metadata.shards), 'shard')}"
    )
