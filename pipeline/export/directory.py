"""The directory of an export: its files, and how new files replace earlier ones."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.files import atomic_write

METADATA, LABELS, FAILED, STAGING = "metadata.json", "labels.txt", "failed", ".new"


@dataclass(frozen=True)
class FormatSpec:
    """An export format; `formats.WRITERS` and `loading.LOADERS` write and load it.

    Attributes:
        file: Name of its file, or of its folder.
        packages: Modules that write and load it, beside TensorFlow, with the packages that hold them.
        exact: Whether it computes in floating point as the model does, so that its logits must be the model's.
    """

    file: str
    packages: Mapping[str, str]
    exact: bool = True


_LITERT = {"ai_edge_litert": "ai-edge-litert"}
FORMATS = {
    "savedmodel": FormatSpec("savedmodel", {}),
    "litert": FormatSpec("model.tflite", _LITERT),
    "litert-int8": FormatSpec("model-int8.tflite", _LITERT, exact=False),
    "onnx": FormatSpec("model.onnx", {"tf2onnx": "tf2onnx", "onnx": "onnx", "onnxruntime": "onnxruntime"}),
}


@dataclass(frozen=True)
class ExportDirectory:
    """One network in several formats.

    Attributes:
        path: The directory: the good files, `metadata.json`, `labels.txt`, and in `failed/` the files that are not
            equal to the model.
        known: What `metadata.json` says of each format that was written by earlier exports.
    """

    path: Path
    known: Mapping[str, Any]

    @property
    def staging(self) -> Path:
        """The folder where files wait until all of them are verified."""
        return self.path / STAGING

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Provide the staging folder, empty at first; what is still in it at the end is removed."""
        shutil.rmtree(self.staging, ignore_errors=True)  # of an export that was killed
        self.staging.mkdir(parents=True)
        try:
            yield self.staging
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)

    def publish(
        self, description: Mapping[str, Any], formats: Mapping[str, Mapping[str, Any]], labels: Sequence[str]
    ) -> None:
        """Put everything in its place: good files beside the metadata, the others into `failed/`.

        A format of which there is no new file keeps the earlier one. Metadata are written first, so the next export
        recognizes and repairs an interrupted one.

        Args:
            description: What `metadata.json` says of all formats.
            formats: What it says of each new one. Its `file` is None where none could be written, and its `passed` says
                where it belongs.
            labels: The class names.
        """
        entries = dict(self.known)
        entries |= {name: entry for name, entry in formats.items() if entry["file"] is not None or name not in entries}
        atomic_write(
            self.path / METADATA, json.dumps({**description, "formats": entries}, indent=1, ensure_ascii=False) + "\n"
        )
        atomic_write(self.path / LABELS, "\n".join(labels) + "\n")
        failed = self.path / FAILED
        for name, entry in formats.items():
            if entry["file"] is not None:
                file = FORMATS[name].file
                for earlier in (self.path / file, failed / file):
                    if earlier.exists():
                        earlier.rename(self.staging / f"earlier-{earlier.parent.name}-{earlier.name}")
                target = self.path / entry["file"]
                target.parent.mkdir(exist_ok=True)
                (self.staging / file).rename(target)
        if failed.is_dir() and not any(failed.iterdir()):
            failed.rmdir()


def prepare(path: Path, formats: Sequence[str], model_digest: str) -> ExportDirectory:
    """Check whether an export can go into a directory, which need not exist; write nothing.

    Args:
        path: The directory.
        formats: Those to be written.
        model_digest: SHA-256 of the model that is exported, hexadecimal.

    Raises:
        RunError: If something stands in the way that is not an earlier export of the same model.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file; name a folder by --out")
    metadata, known = path / METADATA, {}
    if metadata.exists():
        try:
            content = json.loads(metadata.read_text(encoding="utf-8"))
            known, exported = content["formats"], content["model"]["sha256"]
        except (ValueError, LookupError, TypeError):
            raise RunError(f"{metadata}: was not written by an export; move it away, or choose another --out") from None
        if exported != model_digest:
            raise RunError(f"{path}: holds an export of another model; delete it, or choose another --out")
    files = [FORMATS[name].file for name in formats if name not in known] + ([] if metadata.exists() else [LABELS])
    for file in files:
        for existing in (path / file, path / FAILED / file):
            if existing.exists():
                raise RunError(f"{existing}: was not written by an export; move it away, or choose another --out")
    return ExportDirectory(path, known)
