"""python -m pipeline pack: a data set as a few large files that are read in any order."""

import argparse
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.scale import BYTES, quantity
from pipeline.config.data import DataConfig
from pipeline.config.loader import load_config
from pipeline.console import Console, python_executable
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.data.pack_inputs import PackInput
    from pipeline.data.sources.pack import PackMetadata

TFRECORD_ONLY = ("classes", "first_label", "image_feature", "label_feature", "class_feature")


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line behind the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline pack",
        description="Write a data set as ArrayRecord shards, each picture's bytes as they were, and read them back. Cut off and run again, "
        "it goes on; run on a finished pack, it looks whether all is whole, and mends what is not. The data set is never changed.",
        epilog="Then: data.source=pack data.path=FOLDER data.name=null. Exit code: 0 if the pack is whole, 2 if not.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", type=Path, help="a YAML file whose data set is packed, such as configs/lite0_folder.yaml"
    )
    what.add_argument(
        "--tfrecord", nargs="+", metavar="SPLIT=FILES", help="TFRecord files to pack, as in 'train=FOLDER/train-*'"
    )
    what.add_argument("--verify", type=Path, metavar="FOLDER", help="only read a pack and compare it with its hashes")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the pack goes, on a disk with room for all of it"
    )
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument(
        "--shard-size", type=quantity(BYTES, "256MB"), default=256e6, help="bytes of a shard (default: 256MB)"
    )
    shards.add_argument("--shard-images", type=int, metavar="N", help="pictures of a shard, in place of bytes")
    records = parser.add_argument_group("of TFRecord files")
    records.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names, one a line, in the order of the labels"
    )
    records.add_argument(
        "--first-label",
        type=int,
        choices=[0, 1],
        help="the label of the first class; 1 where 0 is left to a background",
    )
    records.add_argument("--image-feature", metavar="NAME", help="the encoded picture (found: image/encoded, image)")
    records.add_argument("--label-feature", metavar="NAME", help="the class's number (found: image/class/label, label)")
    records.add_argument("--class-feature", metavar="NAME", help="the class's name (found: image/class/text)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the config, such as data.path=PHOTOS"
    )
    arguments = parser.parse_intermixed_args(words)
    if (arguments.verify is None) != (arguments.out is not None):
        parser.error("--out says where the pack goes; it belongs to --config and to --tfrecord, not to --verify")
    if arguments.config is None and arguments.overrides:
        parser.error(f"{arguments.overrides[0]}: only a --config can be changed so")
    for name in TFRECORD_ONLY:
        if arguments.tfrecord is None and getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} belongs to --tfrecord")
    if arguments.shard_images is not None and arguments.shard_images < 1:
        parser.error("--shard-images must be at least 1")
    return arguments


def main(words: Sequence[str], screen: Console) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse_arguments(words)
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    screen.redirect_library_output(None)

    import pyarrow.compute as pc
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    if arguments.verify is not None:
        verify(arguments.verify, screen)
        return 0

    from pipeline.data.packing import ShardLimit, pack

    origin = tfrecord_origin(arguments) if config is None else source_origin(config.data, arguments.out)
    limit = (
        ShardLimit(arguments.shard_size)
        if arguments.shard_images is None
        else ShardLimit(math.inf, arguments.shard_images)
    )
    start = time.monotonic()
    with screen.progress("packing") as count:
        packed = pack(origin, arguments.out, limit, count)
    seconds, size, pictures = time.monotonic() - start, pc.sum(packed.index["bytes"]).as_py(), len(packed.index)
    print_pack(arguments.out, packed.description, screen)
    if packed.written == pictures:
        screen.print(
            f"written  {size / 1e6:,.1f} MB in {seconds:,.1f} s, {size / 1e6 / seconds:,.0f} MB/s, read back and found right"
        )
    elif packed.written:
        screen.print(
            f"written  {packed.written:,} pictures in {seconds:,.1f} s; the others were there, and all are whole"
        )
    else:
        screen.print(f"written  nothing: all of it was there, and is whole (read in {seconds:,.1f} s)")
    path = shlex.quote(str(arguments.out))
    screen.print(
        f"train    {python_executable()} train.py --config CONFIG data.source=pack data.path={path} data.name=null"
    )
    return 0


def source_origin(data: DataConfig, folder: Path) -> "PackInput":
    """The data set of a config, to be packed into a folder.

    Raises:
        DataError: It cannot be had, or the folder lies in it.
    """
    from pipeline.data.pack_inputs import SourceOrigin
    from pipeline.data.sources.catalog import open_source

    if data.source == "folder" and data.path is not None and folder.resolve().is_relative_to(data.path.resolve()):
        raise DataError(
            f"--out {folder} lies in the data set, {data.path}, where it would be taken for a class; choose another folder"
        )
    return SourceOrigin(open_source(data))


def tfrecord_origin(arguments: argparse.Namespace) -> "PackInput":
    """The TFRecord files of the command line.

    Raises:
        DataError: They or the class names are not as they should be.
    """
    from pipeline.data.tfrecord import TfrecordOrigin

    names = {"image": arguments.image_feature, "label": arguments.label_feature, "class_name": arguments.class_feature}
    given = {field: name for field, name in names.items() if name is not None}
    return TfrecordOrigin(
        arguments.tfrecord, given, class_names(arguments.classes) if arguments.classes else None, arguments.first_label
    )


def class_names(path: Path) -> tuple[str, ...]:
    """The lines of a file, each once and none empty."""
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
            f"--classes {path}: needed is a name a line, each another:\n" + ("\n".join(faults[:20]) or "it is empty")
        )
    return tuple(names)


def verify(folder: Path, screen: Console) -> None:
    """Reads a pack and says that it is whole.

    Raises:
        DataError: It is not; what is damaged is listed.
    """
    from pipeline.data.sources.base import format_list
    from pipeline.data.sources.pack import verify as read

    with screen.progress("reading the pack") as count:
        description, damaged = read(folder, count)
    if damaged:
        remedy = "Run python -m pipeline pack with the data set again, which mends it, or restore it from a copy."
        raise DataError(f"{folder}: {len(damaged)} things are damaged:\n{format_list(damaged)}\n{remedy}")
    print_pack(folder, description, screen)
    screen.print("whole    every shard has the SHA-256 that it was written with")


def print_pack(folder: Path, description: "PackMetadata", screen: Console) -> None:
    """Says what a pack holds."""
    pictures, size = (sum(getattr(shard, name) for shard in description.shards) for name in ("pictures", "size"))
    screen.print(
        f"pack     {folder}: {pictures:,} pictures of {len(description.class_names):,} classes, {size / 1e6:,.1f} MB in "
        f"{len(description.shards):,} shards"
    )
