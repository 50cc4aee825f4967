"""Validation of a data set: files that do not decode, classes without images, duplicates across splits.

Training begins with it.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.config.data import DataConfig
from pipeline.console import ProgressFn, plural
from pipeline.data.inspection import TRANSCODED, ImageFlag, inspect_all
from pipeline.data.manifest import COLUMNS, Manifest, SkippedImage
from pipeline.data.scan_cache import ScanCache
from pipeline.data.sources.base import SPLITS, DataSource, LabeledImage, LayoutProblem, format_list
from pipeline.data.sources.files import FileSource
from pipeline.data.splits import assign_splits, near_duplicates
from pipeline.errors import DataError

EQUALS = " = "  # between the images of a group
SEVERITIES = ("error", "warning", "info")
DARK = 32  # of 255: images of 12 bits stored in 16 stay below 16
EXTREME_ASPECT = 5.0  # longer side over shorter; a center crop then shows less than a fifth of the image
# Processor time to read and crop a photo of 0.2 megapixels in the stream, in times of a JPEG of quality 90. Measured on
# one thread of an x86: 20 photos, as Pillow writes them (TIFF as LZW or Deflate).
SLOWDOWNS = {"TIFF": 2.3, "BMP": 1.2, "JPEG2000": 4.9, "AVIF": 2.7, "HEIF": 4.9}
OTHER_SLOWDOWN, PNG_SLOWDOWN = 1.8, 2.2
FLAG_TEXTS = {
    ImageFlag.GRAY: "gray: their channel is repeated",
    ImageFlag.CMYK: "CMYK: converted to RGB without a color profile",
    ImageFlag.HIGH_BIT_DEPTH: "stored with 16 bits a channel: the upper 8 are kept",
    ImageFlag.PALETTE: "stored with a palette: looked up",
    ImageFlag.ANIMATED: "animated or have several pages: their first image is taken",
    ImageFlag.UNTERMINATED: "JPEGs without an end marker, which lack nothing else: they are used",
}


@dataclass(frozen=True)
class Finding:
    """One kind of problem or property, with all images that have it.

    Attributes:
        kind: A machine-readable name.
        severity: An error prevents a run from starting, a warning is shown at every start, an info only by the check.
        text: A clause with the number of them.
        items: All of them: an image, a group of images or a class each.
        remedy: A sentence.
    """

    kind: str
    severity: Literal["error", "warning", "info"]
    text: str
    items: tuple[str, ...] = ()
    remedy: str = ""

    def __str__(self) -> str:
        """Return the text with the first items, on several lines."""
        lines = [
            f"{self.text}:" if self.items else f"{self.text}.",
            format_list([_shorten(item) for item in self.items]) if self.items else "",
            self.remedy,
        ]
        return "\n".join(line for line in lines if line)

    def sentence(self) -> str:
        """Return the text with the first items and the remedy, on one line."""
        shown = ": " + "; ".join(map(_shorten, self.items[:3])) if self.items else ""
        more = f" and {len(self.items) - 3:,} more" if len(self.items) > 3 else ""
        return f"{self.text}{shown}{more}. {self.remedy}".rstrip()


@dataclass(frozen=True, eq=False)
class ValidationReport:
    """The result of validating a data set.

    Attributes:
        manifest: Manifest of the usable images; None if nothing can be learned from them.
        findings: All findings, the most severe first.
        skipped_images: The images that cannot be used.
    """

    manifest: Manifest | None
    findings: tuple[Finding, ...]
    skipped_images: tuple[SkippedImage, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that prevent a run from starting."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def with_layout_problems(self, problems: Sequence[LayoutProblem]) -> "ValidationReport":
        """Return the report with the problems of a `LayoutError` as its first findings."""
        findings = tuple(Finding("layout", "error", *problem) for problem in problems)
        return replace(self, findings=(*findings, *self.findings))


def scan(
    source: DataSource,
    config: DataConfig,
    *,
    seed: int,
    progress: ProgressFn | None = None,
    min_classes: int = 2,
    full_dataset: bool = True,
) -> Manifest:
    """Scan a data set and return the manifest that a run trains on.

    Args:
        source: Source of the images.
        config: `splits`, `group_near_duplicates`, `on_bad_image`, `on_leak` and `path` are used.
        seed: Seed of the splits.
        progress: Called with the number of images done and of all, from the calling thread.
        min_classes: Number of classes that must have images; training needs two.
        full_dataset: Whether the source is the full data set that `config` names, not a part of it.

    Raises:
        DataError: Nothing can be learned from the data, or images cannot be used, or leak between splits; the message
            lists all of these.
    """
    report = validate(source, config, seed=seed, progress=progress, min_classes=min_classes, full_dataset=full_dataset)
    if report.errors or report.manifest is None:
        raise DataError("\n".join(map(str, report.errors)))
    return report.manifest


def validate(
    source: DataSource,
    config: DataConfig,
    *,
    seed: int,
    progress: ProgressFn | None = None,
    min_classes: int = 2,
    full_dataset: bool = True,
    exhaustive: bool = False,
) -> ValidationReport:
    """Decode every image once, find near-duplicates, assign missing splits, and report all problems.

    Data that no classifier can be learned from, whatever the files hold, are reported without opening the files, unless
    `exhaustive` asks for the problems of the files, too.

    Args:
        source: Source of the images.
        config: See `scan`.
        seed: Seed of the splits.
        progress: See `scan`.
        min_classes: See `scan`.
        full_dataset: See `scan`.
        exhaustive: Decode the images even if nothing can be learned from them.
    """
    images, classes = source.list_images(), len(source.class_names)
    labeled = [image for image in images if 0 <= image.label < classes]
    unlearnable = tuple(_unlearnable(source.class_names, labeled, min_classes))
    if unlearnable and not (exhaustive and labeled):
        return ValidationReport(None, unlearnable)
    cache = ScanCache(config.path, config.background)
    facts, problems = inspect_all(
        source, images, cache, progress, background=config.background, full_dataset=full_dataset
    )
    for i, image in enumerate(images):
        if not 0 <= image.label < classes:
            problems[i] = f"has the label {image.label}; valid are 0 to {classes - 1}"
    skipped_images = tuple(SkippedImage(images[i].key, problem) for i, problem in sorted(problems.items()))
    bad = tuple(_bad_files(skipped_images, len(images), config.on_bad_image))
    if problems:
        facts = np.delete(facts, list(problems))
        images = [image for i, image in enumerate(images) if i not in problems]
        emptied = tuple(_classes_without_images(source.class_names, labeled, images)) or tuple(
            _unlearnable(source.class_names, images, min_classes)
        )
        if config.on_bad_image == "skip":
            unlearnable = unlearnable or emptied
        if not images or (emptied and not exhaustive):
            return ValidationReport(None, (*bad, *unlearnable), skipped_images)
    manifest = Manifest(source.class_names, _table(images, facts, config, seed), skipped_images=skipped_images)
    makes_test_split = config.group_near_duplicates and not any(image.split == "test" for image in images)
    findings = [
        *unlearnable,
        *bad,
        *_duplicates(manifest, config.on_leak),
        *(_undivided_classes(manifest) if makes_test_split else ()),
        *_classes(manifest),
        *_similar_names(source.class_names),
        *_skipped_suffixes(source),
        *_decoded_by_pillow(manifest, facts, config.background),
        *_image_properties(manifest, facts),
    ]
    notes = tuple(finding.sentence() for finding in findings if finding.severity == "warning" and finding not in bad)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return ValidationReport(None if unlearnable else replace(manifest, notes=notes), tuple(findings), skipped_images)


def _table(images: Sequence[LabeledImage], facts: np.ndarray, config: DataConfig, seed: int) -> pd.DataFrame:
    """Return the manifest's rows.

    Texts are built by Arrow, which takes a fraction of the memory of as many Python strings.
    """
    label = np.fromiter((image.label for image in images), np.int32, len(images))
    group = np.arange(len(images), dtype=np.int64)
    if config.group_near_duplicates:
        group = near_duplicates(*(facts[name] for name in ("phash", "thumbnail", "pixels", "perceptual")))
    transcoded = facts["traits"] & TRANSCODED != 0
    sha256 = pa.array(np.frombuffer(facts["sha256"].tobytes().hex().encode(), "S64")).cast(pa.string()).to_pandas()
    split = assign_splits(label, group, sha256, [image.split for image in images], config.splits, seed=seed)
    table = pd.DataFrame(
        {
            "key": pa.array((image.key for image in images), pa.string(), size=len(images)).to_pandas(),
            "label": label,
            "split": pa.array(split).to_pandas(),
            "group": group,
            "sha256": sha256,
            **{name: facts[name] for name in ("height", "width", "orientation")},
        }
    ).astype(COLUMNS)
    return table.assign(transcoded=transcoded) if transcoded.any() else table


def _unlearnable(class_names: Sequence[str], images: Sequence[LabeledImage], min_classes: int) -> Iterator[Finding]:
    """Yield reasons why no classifier can be learned from the images, without opening them."""
    odd = tuple(repr(name) for name in class_names if name.splitlines() != [name])
    if odd:
        yield Finding(
            "class_names",
            "error",
            f"{plural(len(odd), 'class name is', 'class names are')} empty or broken by a line end",
            odd,
            "Rename them.",
        )
    present = {image.label for image in images}
    if not images:
        yield Finding("classes", "error", "The data set holds no labeled image")
    elif len(present) < min_classes:
        name = class_names[images[0].label]
        yield Finding("classes", "error", f"All images are of one class, {name!r}; a classifier needs two at least")
    elif images[0].split is not None:
        in_train = {image.label for image in images if image.split == "train"}
        lacking = sorted({(image.label, image.split) for image in images if image.label not in in_train})
        if not in_train:
            yield Finding("splits", "error", "The data bring splits, but none called train")
        elif lacking:
            items = tuple(f"{class_names[label]} (in {split})" for label, split in lacking)
            remedy = "Give each class images in train, or take it out everywhere."
            yield Finding("splits", "error", "train lacks classes that other splits have", items, remedy)


def _bad_files(skipped_images: Sequence[SkippedImage], total: int, on_bad_image: str) -> Iterator[Finding]:
    if skipped_images:
        items = tuple(f"{key}: {problem}" for key, problem in skipped_images)
        text = f"{len(skipped_images):,} of {plural(total, 'image')} cannot be used"
        if on_bad_image == "error":
            remedy = "Replace, convert (to JPEG or PNG) or delete them; data.on_bad_image=skip trains without them."
            yield Finding("bad_files", "error", text, items, remedy)
        else:
            yield Finding("bad_files", "warning", f"{text} and are skipped", items)


def _classes_without_images(
    class_names: Sequence[str], before: Sequence[LabeledImage], after: Sequence[LabeledImage]
) -> Iterator[Finding]:
    emptied = sorted({image.label for image in before} - {image.label for image in after})
    if emptied:
        items = tuple(class_names[label] for label in emptied)
        yield Finding(
            "classes",
            "error",
            f"{plural(len(emptied), 'class has', 'classes have')} no image that can be used",
            items,
            "Give them some, or take them out.",
        )


def _duplicates(manifest: Manifest, on_leak: str) -> Iterator[Finding]:
    """Yield findings about near-duplicates: copies, leaks between splits, different labels."""
    group = manifest.table["group"].to_numpy()
    rows = np.flatnonzero(np.bincount(group)[group] > 1)
    alike = manifest.table.iloc[rows[np.argsort(group[rows], kind="stable")]]
    alike = alike.assign(label=np.array(manifest.class_names, object)[alike["label"]])
    members = alike.groupby("group", sort=False)
    if len(alike):
        text = f"{len(alike):,} images are near-duplicates of another, in {plural(members.ngroups, 'group')}"
        yield Finding("near_duplicates", "warning", text, _groups(alike, "group"))
    copies = alike[alike["sha256"].duplicated(keep=False)]
    if len(copies):
        yield Finding(
            "identical_files",
            "info",
            f"{len(copies):,} files are the same as another, byte for byte",
            _groups(copies, "sha256"),
        )
    leaks = alike[members["split"].transform("nunique") > 1]
    if len(leaks) and on_leak != "ignore":
        text = f"{len(leaks):,} near-duplicate images are in more than one of the data set's own splits"
        items = _groups(leaks, "group", "split")
        if on_leak == "error":
            remedy = (
                "Metrics on val and test would be optimistic. Delete the copies or move them into one split; "
                "or let the program make the splits, from data without any; or accept it by data.on_leak=warn."
            )
            yield Finding("leaks", "error", text, items, remedy)
        else:
            yield Finding("leaks", "warning", text, items)
    contrary = alike[members["label"].transform("nunique") > 1]
    if len(contrary):
        yield Finding(
            "labels",
            "warning",
            f"{len(contrary):,} near-duplicate images have different labels",
            _groups(contrary, "group", "label"),
        )


def _shorten(item: str) -> str:
    """Return a group of images by its first three and the number of the others."""
    members = item.split(EQUALS)
    return item if len(members) <= 4 else f"{EQUALS.join(members[:3])} and {len(members) - 3} more"


def _groups(rows: pd.DataFrame, by: str, shown: str | None = None) -> tuple[str, ...]:
    """Return each group as `a = b`, with the value of the column `shown` behind every key."""
    named = rows["key"] + (" (" + rows[shown] + ")" if shown is not None else "")
    return tuple(named.groupby(rows[by], sort=False).agg(EQUALS.join))


def _undivided_classes(manifest: Manifest) -> Iterator[Finding]:
    """Yield a finding about classes that the test split lacks because their images are near-duplicates."""
    counts = manifest.class_counts()
    groups = manifest.table.groupby("label")["group"].nunique().reindex(range(len(counts)), fill_value=0).to_numpy()
    totals = counts.sum(axis="columns")
    undivided = counts[(counts["test"] == 0) & (totals > 2) & (groups < totals)]
    if len(undivided):
        measurable = (counts["test"] > 0).sum() > 1
        items = tuple(f"{name} ({plural(total, 'image')})" for name, total in undivided.sum(axis="columns").items())
        yield Finding(
            "undivided_classes",
            "warning" if measurable else "error",
            f"{plural(len(items), 'class has', 'classes have')} no image in test, because all images are "
            "near-duplicates of each other, which stay in one split",
            items,
            "Add other images of these classes, or bring splits of your own; if the images show different objects, set "
            "data.group_near_duplicates=false.",
        )


def _similar_names(class_names: Sequence[str]) -> Iterator[Finding]:
    """Yield a finding about class names that differ only in case, spacing, Unicode form or number format."""

    def normalized(name: str) -> str:
        text = " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ").split())
        try:
            return repr(float(text))
        except ValueError:
            return text

    names = pd.Series(class_names, dtype=object)
    groups = tuple(names.groupby(names.map(normalized), sort=False).agg(list))
    alike = tuple(EQUALS.join(map(repr, group)) for group in groups if len(group) > 1)
    if alike:
        groups_differ = plural(len(alike), "group of class names differs", "groups of class names differ")
        text = f"{groups_differ} only in case, spacing, Unicode form or number format"
        yield Finding("similar_classes", "warning", text, alike, "If they are the same class, rename them alike.")


def _classes(manifest: Manifest) -> Iterator[Finding]:
    counts = manifest.class_counts()
    for split in SPLITS:
        lacking = tuple(counts.index[counts[split] == 0])
        if not counts[split].any():
            yield Finding("splits", "warning", f"The data have no {split} split")
        elif lacking:
            yield Finding(
                "classes",
                "warning",
                f"{plural(len(lacking), 'class has', 'classes have')} no image in {split}",
                lacking,
            )
    single = tuple(counts.index[counts.sum(axis="columns") == 1])
    if single:
        yield Finding(
            "classes", "warning", f"{plural(len(single), 'class has', 'classes have')} a single image", single
        )


def _decoded_by_pillow(manifest: Manifest, facts: np.ndarray, background: str) -> Iterator[Finding]:
    """Yield findings about the images that Pillow decodes, more slowly, and about those with transparency."""
    traits, keys = facts["traits"], manifest.table["key"]
    kinds, counts = np.unique(facts["kind"][traits & ImageFlag.PILLOW != 0], return_counts=True)
    if len(kinds):
        names, total = [kind.decode() for kind in kinds], counts.sum()
        slowdown = sum(SLOWDOWNS.get(name, OTHER_SLOWDOWN) * count for name, count in zip(names, counts, strict=True))
        yield Finding(
            "decoded_by_pillow",
            "warning",
            f"{' and '.join(f'{count:,} {name}' for name, count in zip(names, counts, strict=True))} "
            f"file{'s are' if total > 1 else ' is'} decoded by Pillow: reading takes about {slowdown / total:.1f} "
            "times as long as from JPEG",
            remedy=f"`pack` converts them once to PNG, which takes {PNG_SLOWDOWN} times as long.",
        )
    transparent = traits & ImageFlag.TRANSPARENT != 0
    if transparent.any():
        yield Finding(
            "traits",
            "warning",
            f"{plural(int(transparent.sum()), 'image has', 'images have')} transparency: put on {background} "
            "(data.background)",
            tuple(keys[transparent]),
        )


def _skipped_suffixes(source: DataSource) -> Iterator[Finding]:
    """Yield a finding about files in class folders that have no image suffix."""
    if isinstance(source, FileSource) and source.skipped_suffixes:
        counts = sorted(source.skipped_suffixes.items(), key=lambda item: (-item[1], item[0]))
        total = sum(source.skipped_suffixes.values())
        text = f"{plural(total, 'file is', 'files are')} no image by the suffix"
        yield Finding(
            "skipped_files", "warning", text, tuple(f"{count:,} {name or 'without'}" for name, count in counts)
        )


def _image_properties(manifest: Manifest, facts: np.ndarray) -> Iterator[Finding]:
    """Yield findings about unusual properties of the images."""
    keys, sides = manifest.table["key"], manifest.table[["height", "width"]]
    extreme = sides.max(axis="columns") > EXTREME_ASPECT * sides.min(axis="columns")
    if extreme.any():
        items = tuple(f"{keys[i]} ({facts['height'][i]} x {facts['width'][i]})" for i in np.flatnonzero(extreme))
        yield Finding(
            "aspects",
            "warning",
            f"{plural(len(items), 'image is', 'images are')} more than {EXTREME_ASPECT:g} times as long as wide",
            items,
        )
    dark = (facts["traits"] & ImageFlag.HIGH_BIT_DEPTH != 0) & (facts["maximum"] < DARK)
    if dark.any():
        yield Finding(
            "dark",
            "warning",
            f"{plural(dark.sum(), 'image')} of 16 bits a channel with few bits in use, so nearly dark: of the "
            f"upper 8 bits, which the model sees, no pixel is above {DARK - 1}",
            tuple(keys[dark]),
            "Scale their values to the full range, or store them with 8 bits.",
        )
    kinds, counts = np.unique(facts["kind"], return_counts=True)
    formats = ", ".join(f"{count:,} {kind.decode()}" for kind, count in zip(kinds, counts, strict=True))
    yield Finding("formats", "info", formats)
    turned = facts["orientation"] != 1
    unusual = {
        "turned by their camera (EXIF or XMP): turned upright": turned,
        **{text: facts["traits"] & trait != 0 for trait, text in FLAG_TEXTS.items()},
    }
    for text, which in unusual.items():
        if which.any():
            yield Finding(
                "traits", "info", f"{plural(which.sum(), 'image is', 'images are')} {text}", tuple(keys[which])
            )
