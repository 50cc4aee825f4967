"""The table of samples, every one read and decoded before training begins."""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

from pipeline.config import DataConfig
from pipeline.data.preprocess import decode
from pipeline.data.sources import SPLITS, FileSource, Sample, Source, listing
from pipeline.data.splits import Signature, assign_splits, near_duplicates, signature
from pipeline.errors import DataError

MOST_PIXELS = 89_478_485  # 256 MiB as RGB; PIL warns from here on, for a few kilobytes of PNG can hold more
DECODABLE = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP")  # PIL's names of what tf.io.decode_image decodes
ORIENTATION = 0x0112  # EXIF tag
COLUMNS = {
    "key": "str",
    "label": "int32",
    "split": "str",
    "group": "int64",
    "sha256": "str",
    "height": "int32",
    "width": "int32",
    "orientation": "uint8",
}


@dataclass(frozen=True, eq=False)
class Manifest:
    """Every sample of a data set.

    Attributes:
        class_names: In the order of the labels.
        table: One row per sample; the row's number is the sample's index. Columns: key (str), label (int32), split (train, val or test),
            group (int64, equal for near-duplicates), sha256 (of the encoded file, hexadecimal), height, width (int32, pixels as stored),
            orientation (uint8, EXIF 1 to 8: how to turn what is stored).
        notes: What is worth knowing of the data, a sentence each.
    """

    class_names: tuple[str, ...]
    table: pd.DataFrame
    notes: tuple[str, ...] = ()

    def indices(self, split: str) -> np.ndarray:
        """The samples of a split, int64 (n,), ascending."""
        return np.flatnonzero(self.table["split"].to_numpy() == split).astype(np.int64)

    def class_counts(self) -> pd.DataFrame:
        """Samples per class (rows, by name) and split (columns train, val, test), int64."""
        counts = pd.crosstab(self.table["label"], self.table["split"]).reindex(
            index=range(len(self.class_names)), columns=SPLITS, fill_value=0
        )
        return counts.set_axis(list(self.class_names), axis="index").rename_axis(index="class", columns="split").astype("int64")

    def digest(self) -> str:
        """SHA-256 of class names, keys, labels, splits and contents, hexadecimal: equal if and only if training sees the same."""
        digest = hashlib.sha256()
        for column in (list(self.class_names), *(self.table[name].tolist() for name in ("key", "label", "split", "sha256"))):
            digest.update(json.dumps(column).encode())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes a Parquet file, whole or not at all."""
        rows = pa.Table.from_pandas(self.table, preserve_index=False)
        metadata = {"class_names": json.dumps(self.class_names), "notes": json.dumps(self.notes)}
        part = path.with_name(path.name + ".part")
        pq.write_table(rows.replace_schema_metadata({**(rows.schema.metadata or {}), **metadata}), part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Reads what `save` wrote.

        Raises:
            DataError: The file is missing or is no manifest.
        """
        try:
            rows = pq.read_table(path)
            texts = {key: tuple(json.loads(rows.schema.metadata[key.encode()])) for key in ("class_names", "notes")}
            table = rows.to_pandas()[list(COLUMNS)].astype(COLUMNS)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a readable manifest: {error}") from error
        return cls(texts["class_names"], table, texts["notes"])


@dataclass(frozen=True)
class _Inspection:
    """What one picture turned out to be."""

    sha256: str
    height: int
    width: int
    orientation: int
    signature: Signature


def scan(source: Source, config: DataConfig, *, seed: int, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Reads and decodes every picture once, finds near-duplicates, and makes the splits that the data do not bring.

    Args:
        source: Where the samples come from.
        config: `splits` and `group_near_duplicates` are used.
        seed: Of the splits.
        progress: Called with the number of pictures done and of all, from the calling thread.

    Raises:
        DataError: Nothing can be learned from the data, or pictures cannot be read; all of these are named.
    """
    samples = source.samples()
    _check_labels(source.class_names, samples)
    inspections: list[_Inspection] = []
    bad: list[str] = []
    for sample, found in zip(samples, _inspect_all(source, samples), strict=True):
        if isinstance(found, str):
            bad.append(f"{sample.key}: {found}")
        else:
            inspections.append(found)
        if progress is not None:
            progress(len(inspections) + len(bad), len(samples))
    if bad:
        raise DataError(
            f"{len(bad)} of {len(samples)} pictures cannot be used:\n{listing(bad)}\nReplace, convert (to JPEG or PNG) or delete them."
        )

    label = np.array([sample.label for sample in samples], np.int32)
    group = np.arange(len(samples), dtype=np.int64)
    if config.group_near_duplicates:
        signatures = [found.signature for found in inspections]
        group = near_duplicates(
            np.array([s.phash for s in signatures], np.uint64),
            np.stack([s.thumbnail for s in signatures]),
            np.array([s.pixels for s in signatures], np.uint64),
            np.array([s.perceptual for s in signatures], bool),
        )
    given = [sample.split for sample in samples]
    table = pd.DataFrame(
        {
            "key": [sample.key for sample in samples],
            "label": label,
            "split": assign_splits(label, group, [found.sha256 for found in inspections], given, config.splits, seed=seed),
            "group": group,
            "sha256": [found.sha256 for found in inspections],
            "height": [found.height for found in inspections],
            "width": [found.width for found in inspections],
            "orientation": [found.orientation for found in inspections],
        }
    ).astype(COLUMNS)
    manifest = Manifest(source.class_names, table)
    return Manifest(source.class_names, table, tuple(_notes(manifest)))


def differences(manifest: Manifest, source: Source, *, since: float) -> str:
    """What has become of the data since they were scanned, a line each; empty where nothing has.

    Files are read again only if they were written since.

    Args:
        manifest: Of the scan.
        source: The data as they are now.
        since: Time of the scan, in seconds since the epoch.
    """
    before = dict(zip(manifest.table["key"], manifest.table["label"], strict=True))
    now = {sample.key: sample.label for sample in source.samples()}
    found: list[str] = []
    if source.class_names != manifest.class_names:
        found.append(f"classes: were {', '.join(manifest.class_names)}; are {', '.join(source.class_names)}")
    found += [f"{key}: is new" for key in now if key not in before]
    found += [f"{key}: is gone" for key in before if key not in now]
    found += [f"{key}: has another label" for key in now if key in before and now[key] != before[key]]
    if not found and list(now) != list(before):
        found.append("the samples come in another order")
    if isinstance(source, FileSource):
        hashes = zip(manifest.table["key"], manifest.table["sha256"], strict=True)
        written = [(key, digest) for key, digest in hashes if key in now and (source.root / key).stat().st_mtime > since]
        found += [f"{key}: has other contents" for key, digest in written if hashlib.sha256(source.read(key)).hexdigest() != digest]
    return listing(found)


def _check_labels(class_names: Sequence[str], samples: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("The data set holds no picture.")
    odd = [name for name in class_names if name.splitlines() != [name]]
    if odd:
        raise DataError(f"{len(odd)} class names are empty or have a line break in them:\n{listing(list(map(repr, odd)))}\nRename them.")
    unlabelled = [sample.key for sample in samples if not 0 <= sample.label < len(class_names)]
    if unlabelled:
        raise DataError(f"{len(unlabelled)} pictures have no label:\n{listing(unlabelled)}\nTrain on labelled pictures only.")
    if len({sample.label for sample in samples}) < 2:
        raise DataError(f"All pictures are of one class, {class_names[samples[0].label]!r}; a classifier needs two at least.")
    if samples[0].split is None:
        return
    in_train = {sample.label for sample in samples if sample.split == "train"}
    if not in_train:
        raise DataError("The data bring splits, but none called train.")
    lacking = sorted({(sample.label, sample.split) for sample in samples if sample.label not in in_train})
    if lacking:
        raise DataError(
            f"train lacks classes that other splits have:\n{listing([f'{class_names[label]} (in {split})' for label, split in lacking])}\n"
            "Give each class pictures in train, or take it out everywhere."
        )


def _inspect_all(source: Source, samples: Sequence[Sample]) -> Iterator[_Inspection | str]:
    """In the samples' order, in threads, with a bounded number under way."""
    remaining = iter(samples)
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd files; what cannot be used is reported
            while batch := list(islice(remaining, 64 * workers)):
                yield from pool.map(lambda sample: _inspect(source, sample.key), batch)
    finally:
        pool.shutdown(cancel_futures=True)


class Header(NamedTuple):
    """What an image file says of itself."""

    kind: str
    """PIL's name of its format."""
    height: int
    width: int
    orientation: int
    """EXIF, 1 to 8: how to turn what is stored."""


def read_header(data: bytes) -> Header | str:
    """Reads an image file's header, or says why the file cannot be used; decodes nothing.

    Args:
        data: The encoded file.
    """
    if not data:
        return "is empty"
    try:
        with Image.open(io.BytesIO(data)) as header:
            kind, (width, height) = header.format or "", header.size
            orientation = header.getexif().get(ORIENTATION, 1) if kind in ("JPEG", "MPO") and "exif" in header.info else 1
    except UnidentifiedImageError:
        return "is not a picture, or of a format that is not read here"
    except Image.DecompressionBombError as error:
        return f"would decode to too many pixels: {error}"
    except Exception as error:  # PIL's parsers raise all sorts on damaged headers
        return f"has a damaged header: {error}"
    if kind not in DECODABLE:
        return f"is {kind}, which TensorFlow does not decode"
    if width * height > MOST_PIXELS:
        return f"has {width} x {height} pixels; at most {MOST_PIXELS / 1e6:.0f} million are read, shrink it"
    return Header(kind, height, width, orientation if orientation in range(1, 9) else 1)


def _inspect(source: Source, key: str) -> _Inspection | str:
    """What a picture is, or why it cannot be used."""
    try:
        data = source.read(key)
    except OSError as error:
        return f"cannot be opened: {error.strerror or error}"
    header = read_header(data)
    if isinstance(header, str):
        return header
    try:
        with tf.device("CPU:0"):
            picture = decode(tf.constant(data), tf.constant(1)).numpy()
    except (tf.errors.OpError, ValueError) as error:
        return f"is a damaged {header.kind}: {_reason(error)}"
    found = signature(picture, header.orientation)
    return _Inspection(hashlib.sha256(data).hexdigest(), header.height, header.width, header.orientation, found)


def _reason(error: Exception) -> str:
    message = getattr(error, "message", str(error))
    return message.rpartition("}} ")[2].partition(" [Op:")[0].strip()


def _notes(manifest: Manifest) -> Iterator[str]:
    """What is worth knowing of the data."""
    table = manifest.table.assign(label=np.array(manifest.class_names)[manifest.table["label"]])
    members = table.groupby("group")
    together = members["key"].transform("size") > 1
    if together.any():
        yield f"{together.sum()} pictures are near-duplicates of another, in {table.loc[together, 'group'].nunique()} groups."
    for column, what in (("split", "stand in more than one split, as the data give them"), ("label", "have different labels")):
        apart = table[members[column].transform("nunique") > 1]
        if len(apart):
            first = [apart[apart["group"] == group] for group in apart["group"].unique()[:3]]
            shown = "; ".join(" = ".join(f"{key} ({value})" for key, value in zip(g["key"], g[column], strict=True)) for g in first)
            yield f"{len(apart)} near-duplicate pictures {what}: {shown}{'; ...' if apart['group'].nunique() > 3 else '.'}"
    counts = manifest.class_counts()
    for split in SPLITS:
        lacking = list(counts.index[counts[split] == 0])
        if lacking and counts[split].any():
            yield f"{len(lacking)} classes have no picture in {split}: {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else '.'}"
        elif not counts[split].any():
            yield f"The data have no {split} split."
