"""Exported files loaded back, each in its own runtime, and the model itself beside them."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from pipeline.export.formats import OUTPUT

Forward = Callable[[np.ndarray], np.ndarray]


class LoadedExport(NamedTuple):
    """A network that came out of a file."""

    forward: Forward
    """float32 (B, R, R, 3), RGB in [0, 255], to float32 logits (B, K)."""
    class_names: tuple[str, ...]
    """As they stand in the file, in the order of the logits."""


def run_model(model: keras.Model) -> Forward:
    """Return the forward pass of the model that files are made from."""
    infer = tf.function(
        lambda images: model(images, training=False), input_signature=[tf.TensorSpec(model.input.shape, tf.float32)]
    )
    return lambda images: infer(tf.constant(images)).numpy()


def open_saved_model(path: Path) -> LoadedExport:
    """Load a SavedModel."""
    signatures = tf.saved_model.load(str(path)).signatures
    serve = signatures["serving_default"]
    image = tf.io.encode_png(tf.zeros((1, 1, 3), tf.uint8))  # any will do; but none makes oneDNN's kernels fail
    classified = signatures["classify"](encoded=image[None], orientation=tf.constant([1]))
    names = tuple(name.decode() for name in classified["class_names"].numpy())
    return LoadedExport(lambda images: serve(images=tf.constant(images))[OUTPUT].numpy(), names)


def open_litert(path: Path) -> LoadedExport:
    """Load a LiteRT model, with and without 8-bit integers inside."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=os.cpu_count())
    [source], [target] = interpreter.get_input_details(), interpreter.get_output_details()
    allocated: tuple[int, ...] = ()

    def forward(images: np.ndarray) -> np.ndarray:
        nonlocal allocated
        if images.shape != allocated:
            interpreter.resize_tensor_input(source["index"], images.shape)
            interpreter.allocate_tensors()
            allocated = images.shape
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(target["index"])

    with zipfile.ZipFile(path) as archive:
        return LoadedExport(forward, tuple(json.loads(archive.read("metadata.json"))["class_names"]))


def open_onnx(path: Path) -> LoadedExport:
    """Load an ONNX model, to be run on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [source] = session.get_inputs()
    names = tuple(json.loads(session.get_modelmeta().custom_metadata_map["class_names"]))
    return LoadedExport(lambda images: session.run([OUTPUT], {source.name: images})[0], names)


LOADERS: dict[str, Callable[[Path], LoadedExport]] = {  # by format
    "savedmodel": open_saved_model,
    "litert": open_litert,
    "litert-int8": open_litert,
    "onnx": open_onnx,
}
