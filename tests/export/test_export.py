"""python -m pipeline export: files that are the model, and what becomes of those that are not."""

import io
import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from fake_console import FakeConsole
from PIL import Image
from short_network import short_network
from test_efficientnet import make_lively

from pipeline.cli import export as command
from pipeline.config.export import ExportConfig
from pipeline.config.loader import load_config
from pipeline.data import input_pipeline
from pipeline.data.manifest import Manifest
from pipeline.data.preprocessing import describe, preprocess, resize_to_square
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import scan
from pipeline.errors import RunError, UserError
from pipeline.evaluation.predict import predict_files
from pipeline.export import directory as export_directory
from pipeline.export import formats as written
from pipeline.export import loading as loaded
from pipeline.export import verification
from pipeline.export.verification import ParityReport, check_parity, run_reference
from pipeline.models.efficientnet import efficientnet
from pipeline.models.variants import Variant
from pipeline.runs.run_directory import RunDirectory
from pipeline.tasks import SINGLE_LABEL

NAMES = ("giant panda", "Édith's cat", "llama", "猫")
CONFIG = """
model: {variant: {width: 0.25, depth: 0.3, resolution: 32}, weights: null}
data: {source: csv, path: images.csv, resize: letterbox, on_leak: ignore}
train: {global_batch_size: 8}
export: {min_agreement: 0.75, max_accuracy_loss: 0.25, calibration_images: 10}
"""


def export(run: RunDirectory, *words: str) -> tuple[int, str]:
    console = FakeConsole()
    return command.main(console, ["--run", str(run.path), *words]), console.output


def metadata(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "metadata.json").read_text())


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def jpeg(seed: int, orientation: int) -> bytes:
    """A JPEG of a random pattern, wider than high or the other way round."""
    rng, file, exif = np.random.default_rng(seed), io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    size = (40 + seed % 17, 34 + seed % 23)
    Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)).resize(size, Image.Resampling.NEAREST).save(
        file, "JPEG", exif=exif
    )
    return file.getvalue()


to_square = tf.function(
    partial(preprocess, resolution=32, resize="letterbox"),
    input_signature=[tf.TensorSpec((), tf.string), tf.TensorSpec((), tf.int32)],
)


def finished_run(root: Path, build: Callable[[Variant], keras.Model]) -> RunDirectory:
    """Write a finished run: a network that tells images apart, and is right about 27 of its 32 test images.

    Args:
        root: Folder of the run and of its images.
        build: Builds a network for the variant of the config.
    """
    run = RunDirectory(root / "run")
    run.path.mkdir()
    config = CONFIG.replace("images.csv", str(root / "images.csv"))
    run.config.write_text(config)
    settings = load_config(run.config)
    model = build(settings.variant)
    make_lively(model)
    model.save(run.model)
    files = [(jpeg(number, number % 8 + 1), number % 8 + 1) for number in range(60)]
    squares = [to_square(data, orientation) for data, orientation in files]
    classes = model(tf.cast(tf.stack(squares), tf.float32), training=False).numpy().argmax(-1)
    rows = ["path,label,split"]
    for number, (data, _) in enumerate(files):
        (root / f"{number}.jpg").write_bytes(data)
        split = "train" if number < 24 else "val" if number < 28 else "test"
        label = number % 4 if split != "test" else (classes[number] + (number % 6 == 0)) % 4
        rows.append(f"{number}.jpg,{sorted(NAMES)[label]},{split}")
    (root / "images.csv").write_text("\n".join(rows) + "\n")
    scan(open_source(settings.data), settings.data, seed=0).save(run.manifest)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of a network of two blocks: to convert a whole one takes a minute."""
    return finished_run(
        tmp_path_factory.mktemp("export"), lambda variant: short_network(variant.resolution, num_classes=len(NAMES))
    )


@pytest.fixture(scope="module")
def model(run: RunDirectory) -> keras.Model:
    return keras.saving.load_model(run.model, compile=False)


@pytest.fixture(scope="module")
def finished(run: RunDirectory) -> tuple[Path, int, str]:
    """An export of all formats: its directory, the exit code, and the output."""
    code, output = export(run)
    return run.export, code, output


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], Any]:
    return {}


@pytest.fixture
def reused(results: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the exports of all tests share what they would compute alike: images, model, and the logits of the model."""

    def once(owner: Any, name: str, key: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def function(*arguments: Any, **keywords: Any) -> Any:
            call = name, key(*arguments)
            if call not in results:
                results[call] = real(*arguments, **keywords)
            return results[call]

        monkeypatch.setattr(owner, name, function)

    once(input_pipeline, "evaluation_stream", lambda manifest, source, config, indices: str(indices.tolist()))
    once(keras.saving, "load_model", lambda path: "")
    once(verification, "run_reference", lambda forward, class_names, dataset, split, *_: split)


@pytest.fixture
def copy(run: RunDirectory, finished: tuple[Path, int, str], reused: None, tmp_path: Path) -> RunDirectory:
    """The run with its export, to be changed."""
    shutil.copytree(run.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def squares(run: RunDirectory, split: str = "test") -> tuple[np.ndarray, list[bytes], np.ndarray]:
    """float32 (N, R, R, 3), the encoded files and their orientations, int32 (N,)."""
    manifest, config = Manifest.load(run.manifest), load_config(run.config)
    source, rows = open_source(config.data), manifest.indices(split)
    files = [source.read(manifest.table["key"][row]) for row in rows]
    orientations = manifest.table["orientation"].to_numpy(np.int32)[rows]
    images = [to_square(*file) for file in zip(files, orientations, strict=True)]
    return np.stack(images).astype(np.float32), files, orientations


def assert_every_format_is_the_model(run: RunDirectory, model: keras.Model) -> None:
    images, _, _ = squares(run)
    wanted = model(images, training=False).numpy()
    assert wanted[:, wanted.std(axis=0) > 0.5].shape == wanted.shape, "the logits tell images apart"
    for name, open_file in (
        ("savedmodel", loaded.open_saved_model),
        ("litert", loaded.open_litert),
        ("onnx", loaded.open_onnx),
    ):
        exported = open_file(run.export / export_directory.FORMATS[name].file)
        np.testing.assert_allclose(exported.forward(images), wanted, atol=1e-4 * wanted.std(), err_msg=name)
        np.testing.assert_allclose(
            exported.forward(images[:1]), wanted[:1], atol=1e-4 * wanted.std(), err_msg=f"{name}, one image"
        )
        assert metadata(run.export)["formats"][name]["parity"]["accuracy"] == 27 / 32
    rounded = loaded.open_litert(run.export / "model-int8.tflite").forward(images)
    assert 1e-3 < np.abs(rounded - wanted).mean() / wanted.std() < 0.5


def test_every_format_is_the_model_on_every_image(
    run: RunDirectory, model: keras.Model, finished: tuple[Path, int, str]
) -> None:
    _, code, output = finished
    assert code == 0, output
    assert_every_format_is_the_model(run, model)


@pytest.mark.slow
def test_every_format_is_the_model_with_all_of_its_blocks(tmp_path: Path) -> None:
    run = finished_run(tmp_path, lambda variant: efficientnet(variant, num_classes=len(NAMES)))
    code, output = export(run)
    assert code == 0, output
    assert_every_format_is_the_model(run, keras.saving.load_model(run.model, compile=False))


def tensors(path: Path) -> list[dict[str, Any]]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    return interpreter.get_tensor_details()


def test_int8_computes_in_integers_but_for_its_input_and_output(finished: tuple[Path, int, str]) -> None:
    directory, _, _ = finished
    floats = [tensor for tensor in tensors(directory / "model-int8.tflite") if tensor["dtype"] is np.float32]
    assert {tuple(tensor["shape"][1:]) for tensor in floats} == {(32, 32, 3), (4,)}
    size, whole = ((directory / name).stat().st_size for name in ("model-int8.tflite", "model.tflite"))
    assert size < whole / 2


def test_the_table_and_the_metadata_hold_what_was_found(run: RunDirectory, finished: tuple[Path, int, str]) -> None:
    directory, _, output = finished
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert rows["model.keras"][2] == "84.38%"
    found = metadata(directory)
    assert list(found["formats"]) == ["savedmodel", "litert", "litert-int8", "onnx"]
    for name, entry in found["formats"].items():
        assert (entry["passed"], entry["failures"], entry["file"]) == (True, [], export_directory.FORMATS[name].file)
        parity = entry["parity"]
        assert (parity["split"], parity["images"]) == ("test", 32)
        assert parity["model_accuracy"] == 27 / 32
        assert parity["latency_ms"] > 0
        assert rows[name][1] == f"{entry['bytes'] / 1e6:.1f}"
        assert rows[name][2:] == [
            f"{parity['max_logit_difference']:.2g}",
            f"{parity['top1_agreement']:.2%}",
            f"{parity['accuracy']:.2%}",
            f"{parity['latency_ms']:.1f}",
            "passed",
        ]
    assert f"standard deviation of the logits is {found['formats']['onnx']['parity']['logit_std']:.3g}" in output
    assert (directory / "labels.txt").read_text().splitlines() == sorted(NAMES)
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        [*(spec.file for spec in export_directory.FORMATS.values()), "labels.txt", "metadata.json"]
    )


def test_class_names_and_preprocessing_come_back_out_of_every_file(finished: tuple[Path, int, str]) -> None:
    directory, _, _ = finished
    for name, open_file in (
        ("savedmodel", loaded.open_saved_model),
        ("litert", loaded.open_litert),
        ("onnx", loaded.open_onnx),
    ):
        assert open_file(directory / export_directory.FORMATS[name].file).class_names == tuple(sorted(NAMES)), name
    for name in ("litert", "litert-int8"):
        with zipfile.ZipFile(directory / export_directory.FORMATS[name].file) as archive:
            assert archive.read("labels.txt").decode().splitlines() == sorted(NAMES)
            inside = json.loads(archive.read("metadata.json"))
    import onnx

    inside_onnx = {item.key: json.loads(item.value) for item in onnx.load(directory / "model.onnx").metadata_props}
    outside = metadata(directory)
    assert inside == inside_onnx == {key: outside[key] for key in ("class_names", "input", "preprocessing", "output")}
    assert inside["input"] == {
        "name": "images",
        "shape": [None, 32, 32, 3],
        "dtype": "float32",
        "range": [0, 255],
        "color_space": "RGB",
    }
    assert inside["preprocessing"] == {"resize": "letterbox", "resolution": 32, "steps": describe(32, "letterbox")}


def test_encoded_images_get_the_probabilities_that_evaluate_gives(
    run: RunDirectory, model: keras.Model, finished: tuple[Path, int, str], tmp_path: Path
) -> None:
    directory, _, _ = finished
    _, files, orientations = squares(run)
    classify = tf.saved_model.load(str(directory / "savedmodel")).signatures["classify"]
    found = classify(encoded=tf.constant(files), orientation=tf.constant(orientations))
    names = [name.decode() for name in found["class_names"].numpy()]
    paths = [tmp_path / f"{number}.jpg" for number in range(len(files))]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)
    wanted = list(predict_files(model, sorted(NAMES), paths, resolution=32, resize="letterbox"))
    assert len({label.name for prediction in wanted for label in prediction.top[:1]}) > 1
    for probabilities, prediction in zip(found["probabilities"].numpy(), wanted, strict=True):
        assert dict(zip(names, probabilities, strict=True)) == pytest.approx(dict(prediction.top), abs=1e-5)


@pytest.mark.parametrize("resize", ["crop", "squash", "letterbox"])
def test_the_described_preprocessing_can_be_written_anew_from_its_words(resize: Any) -> None:
    for seed, (height, width) in enumerate([(50, 71), (333, 240), (20, 31)]):
        coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        steps = " ".join(describe(32, resize))
        known: dict[str, Any] = {"H": height, "W": width, "floor": math.floor, "max": max, "min": min, "round": round}

        def value(before: str, known: dict[str, Any] = known, steps: str = steps) -> int:
            start = steps.index(before) + len(before)
            depth, end = 0, start
            while depth or steps[end] not in ", ":  # to the end of the expression: no comma or space outside brackets
                depth += {"(": 1, ")": -1}.get(steps[end], 0)
                end += 1
            return eval(steps[start:end], known)

        square = Image.fromarray(image)
        if resize == "crop":
            known["side"] = value("side = ")
            left, top = value("its left at "), value("its top at ")
            square = square.crop((left, top, left + known["side"], top + known["side"]))
        if resize != "letterbox":
            square = square.resize((32, 32), Image.Resampling.BICUBIC)
        else:
            known |= {"h": value("height h = "), "w": value("width w = ")}
            grey = int(re.findall(r"of the value (\d+)", steps)[0])
            inner = square.resize((known["w"], known["h"]), Image.Resampling.BICUBIC)
            square = Image.new("RGB", (32, 32), (grey, grey, grey))
            square.paste(inner, (value("its left at "), value("its top at ")))
        ours = resize_to_square(tf.constant(image), 32, resize).numpy().astype(int)
        assert np.abs(ours - np.asarray(square).astype(int)).max() <= 1


def spoil_a_weight(model: Any) -> None:
    from onnx import numpy_helper

    for weight in model.graph.initializer:
        if len(weight.dims) == 4:
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.05), weight.name))


def normalize_twice(model: Any) -> None:
    from onnx import helper, numpy_helper

    [images] = model.graph.input
    for node in model.graph.node:
        node.input[:] = ["again" if name == images.name else name for name in node.input]
    for name, value in (("scale", 1 / 127.5), ("offset", -1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    model.graph.node.insert(0, helper.make_node("Mul", [images.name, "scale"], ["scaled"]))
    model.graph.node.insert(1, helper.make_node("Add", ["scaled", "offset"], ["again"]))


def let_onnx_be(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the export write a given ONNX file."""
    monkeypatch.setattr(written, "write_onnx", lambda model, model_signature, path: shutil.copy(file, path))


@pytest.mark.parametrize("spoil", [spoil_a_weight, normalize_twice])
def test_a_file_that_is_not_the_model_is_saved_apart_and_ends_with_1(
    copy: RunDirectory, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], None]
) -> None:
    import onnx

    before, bad = snapshot(copy.export), copy.path / "bad.onnx"
    model = onnx.load(copy.export / "model.onnx")
    spoil(model)
    onnx.save(model, bad)
    let_onnx_be(bad, monkeypatch)
    code, output = export(copy, "--formats", "onnx")
    assert code == 1
    assert "onnx failed: a logit differs by" in output
    entry = metadata(copy.export)["formats"]["onnx"]
    assert (entry["passed"], entry["file"]) == (False, "failed/model.onnx")
    assert "export.max_logit_difference allows 0.001" in entry["failures"][0]
    after, good = snapshot(copy.export), before.pop("model.onnx")
    assert after.pop("failed/model.onnx") == bad.read_bytes() != good
    assert {name: data for name, data in after.items() if name != "metadata.json"} == {
        name: data for name, data in before.items() if name != "metadata.json"
    }


def test_a_file_that_is_the_model_replaces_one_that_was_not(
    run: RunDirectory, copy: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = metadata(copy.export)
    entries["formats"]["onnx"] |= {"passed": False, "file": "failed/model.onnx"}
    (copy.export / "metadata.json").write_text(json.dumps(entries))
    (copy.export / "failed").mkdir()
    (copy.export / "model.onnx").rename(copy.export / "failed/model.onnx")
    let_onnx_be(run.export / "model.onnx", monkeypatch)
    code, output = export(copy, "--formats", "onnx")
    assert code == 0, output
    assert metadata(copy.export)["formats"]["onnx"]["file"] == "model.onnx"
    assert not (copy.export / "failed").exists()


def test_limits_on_the_command_line_are_the_limits(copy: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    let_onnx_be(copy.export / "model.onnx", monkeypatch)
    code, output = export(
        copy, "--formats", "onnx", "export.max_logit_difference=1e-12", "--out", str(copy.path / "strict")
    )
    assert code == 1
    assert "export.max_logit_difference allows 1e-12" in output
    assert metadata(copy.path / "strict")["formats"]["onnx"]["limits"]["max_logit_difference"] == 1e-12


def test_what_a_converter_raises_fails_its_format_alone(copy: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: keras.Model, model_signature: written.ModelSignature, path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("no such\noperation")

    before = snapshot(copy.export)
    monkeypatch.setattr(written, "write_litert", write)
    code, output = export(copy, "--formats", "litert")
    assert code == 1
    assert "litert failed: cannot be written: ValueError: no such operation" in output
    after = snapshot(copy.export)
    assert after["model.tflite"] == before["model.tflite"], "the earlier one stays"
    assert metadata(copy.export)["formats"]["litert"]["passed"]
    assert after.keys() == before.keys()

    code, _ = export(copy, "--formats", "litert", "--out", str(copy.path / "new"))
    assert code == 1
    assert metadata(copy.path / "new")["formats"]["litert"]["file"] is None
    assert snapshot(copy.path / "new").keys() == {"labels.txt", "metadata.json"}


def test_what_a_runtime_cannot_load_is_saved_apart(copy: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "write_onnx", lambda model, model_signature, path: path.write_bytes(b"no model"))
    code, output = export(copy, "--formats", "onnx")
    assert code == 1
    assert "onnx failed: cannot be loaded back and run: " in output
    assert (copy.export / "failed/model.onnx").read_bytes() == b"no model"
    assert not (copy.export / "model.onnx").exists()


def test_an_export_that_is_interrupted_leaves_everything_as_it_was(
    copy: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: keras.Model, model_signature: written.ModelSignature, path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(written, "write_onnx", lambda model, model_signature, path: path.write_bytes(b"new"))
    before = snapshot(copy.export)
    (copy.export / ".new/savedmodel").mkdir(parents=True)  # as a killed one leaves it
    monkeypatch.setattr(written, "write_litert", write)
    with pytest.raises(KeyboardInterrupt):
        export(copy, "--formats", "onnx,litert")
    assert snapshot(copy.export) == before
    assert not (copy.export / ".new").exists()


def test_calibration_sees_training_images_only(
    run: RunDirectory, reused: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[int] = []

    def write(
        model: keras.Model, model_signature: written.ModelSignature, path: Path, *, calibration: tf.data.Dataset
    ) -> None:
        for images, _, _, index in calibration:
            assert images.shape == (1, 32, 32, 3)
            seen.append(int(index[0]))
        raise ValueError

    monkeypatch.setattr(written, "write_litert", write)
    export(run, "--formats", "litert-int8", "--out", str(tmp_path))
    manifest = Manifest.load(run.manifest)
    train = manifest.indices("train")
    assert len(seen) == len(set(seen)) == 10
    assert set(seen) < set(train.tolist())
    assert seen == written.calibration_rows(manifest, 10, 42).tolist()
    assert seen != written.calibration_rows(manifest, 10, 43).tolist()
    assert written.calibration_rows(manifest, 500, 42).tolist() == train.tolist()


def test_nothing_of_somebody_elses_is_overwritten(copy: RunDirectory, tmp_path: Path) -> None:
    (copy.export / "notes.txt").write_text("mine")
    for file in ("model.onnx", "labels.txt", "failed/model.onnx"):
        (tmp_path / "out" / file).parent.mkdir(parents=True)
        (tmp_path / "out" / file).write_text("mine")
        with pytest.raises(
            RunError, match=rf"{file}: was not written by an export; move it away, or choose another --out"
        ):
            export(copy, "--formats", "onnx", "--out", str(tmp_path / "out"))
        assert snapshot(tmp_path / "out") == {file: b"mine"}
        shutil.rmtree(tmp_path / "out")
    (tmp_path / "metadata.json").write_text("[]")
    with pytest.raises(RunError, match=r"metadata\.json: was not written by an export"):
        export(copy, "--formats", "onnx", "--out", str(tmp_path))
    with pytest.raises(RunError, match="is a file; name a folder"):
        export(copy, "--out", str(copy.model))
    with copy.model.open("ab") as file:
        file.write(b" ")
    with pytest.raises(RunError, match="holds an export of another model"):
        export(copy, "--formats", "onnx")
    assert (copy.export / "notes.txt").read_text() == "mine"


def test_a_missing_package_is_named_with_its_remedy_before_any_work(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda module: None)
    with pytest.raises(
        UserError, match=r"litert, onnx need.* ai-edge-litert, tf2onnx, onnx, onnxruntime.*pip install .*'\.\[export\]'"
    ):
        export(run, "--formats", "savedmodel,litert,onnx", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_model_or_a_split_is_refused(copy: RunDirectory) -> None:
    table = Manifest.load(copy.manifest).table
    Manifest(tuple(sorted(NAMES)), table.assign(split=table["split"].replace("test", "val"))).save(copy.manifest)
    with pytest.raises(RunError, match="its data have no split test"):
        export(copy, "--split", "test")
    copy.model.unlink()
    with pytest.raises(RunError, match=r"has no model\.keras yet"):
        export(copy)


LIMITS = ExportConfig(min_agreement=0.9, max_accuracy_loss=0.1, max_logit_difference=0.01)


def compared(
    change: Callable[[np.ndarray], np.ndarray], *, exact: bool = True, names: tuple[str, ...] = ("a", "b", "c")
) -> ParityReport:
    """What is found of a runtime that gives the logits of a model, changed.

    They are the first pixels of 20 images, all labelled right.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (20, 4, 4, 3)).astype(np.uint8)
    images[np.arange(20), 0, 0, np.arange(20) % 3] = 250
    labels, index = np.eye(3, dtype=np.float32)[np.arange(20) % 3], np.arange(20)
    padding = [np.zeros((4, *array.shape[1:]), array.dtype) for array in (images, labels)]
    arrays = (
        np.concatenate([images, padding[0]]),
        np.concatenate([labels, padding[1]]),
        np.ones(24, np.float32),
        np.r_[index, [-1] * 4],
    )
    dataset = tf.data.Dataset.from_tensor_slices(arrays).batch(8)
    inputs = keras.Input((4, 4, 3))
    reference = run_reference(
        loaded.run_model(keras.Model(inputs, inputs[:, 0, 0])), ("a", "b", "c"), dataset, "test", SINGLE_LABEL
    )
    assert reference.accuracy == 1
    exported = loaded.LoadedExport(lambda batch: change(batch[:, 0, 0].copy()), names)
    return check_parity(exported, reference, dataset, LIMITS, exact=exact)


def shift_some(share: float) -> Callable[[np.ndarray], np.ndarray]:
    """Makes a share of the images those of the next class."""
    drawn: Iterator[float] = iter(np.linspace(0, 1, 24, endpoint=False))

    def change(logits: np.ndarray) -> np.ndarray:
        for row in logits:
            if next(drawn, 1) < share:
                row[:] = np.roll(row, 1)
        return logits

    return change


def test_equal_outputs_pass_and_each_kind_of_difference_is_named() -> None:
    assert compared(lambda logits: logits).failures == ()
    near = compared(lambda logits: logits + np.float32(0.1))
    assert near.failures == ()
    assert near.max_logit_difference == pytest.approx(0.1, rel=1e-3)
    [failure] = compared(lambda logits: logits + 2).failures
    assert failure.startswith("a logit differs by 2, ")
    assert compared(lambda logits: logits + 2, exact=False).failures == ()
    assert compared(lambda logits: logits * np.nan).failures == ("its logits are not all finite",)
    assert compared(lambda logits: logits, names=("a", "c", "b")).failures == (
        "the class names in it are not the model's",
    )


def test_agreement_and_accuracy_have_limits_of_their_own() -> None:
    worse = compared(shift_some(0.2), exact=False)
    assert worse.agreement == worse.accuracy == 0.75
    assert worse.failures == (
        "top-1 agreement is 75.00%; export.min_agreement asks for 90.00%",
        "accuracy is 25.00% below the model's; export.max_accuracy_loss allows 10.00%",
    )
    assert compared(shift_some(0.04), exact=False).failures == ()
