"""A trained network written for other runtimes, each file with its class names and preprocessing.

All of them take what `model.keras` takes, float32 (B, R, R, 3), RGB in [0, 255], and give what it gives, float32 logits
(B, K).

| format      | is                     | class names and preprocessing                                               |
|-------------|------------------------|-----------------------------------------------------------------------------|
| savedmodel  | SavedModel             | signature `classify`: encoded images to probabilities and class names     |
| litert      | LiteRT (.tflite)       | `labels.txt` and `metadata.json` in a zip archive that follows the model     |
| litert-int8 | LiteRT, 8-bit integers | as litert                                                                   |
| onnx        | ONNX                   | `metadata_props`, a JSON value each                                         |
"""

import json
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.config.data import Background
from pipeline.data.manifest import Manifest
from pipeline.data.preprocessing import Resize, decode_on_background, describe, resize_to_square
from pipeline.tasks import Task

INPUT, OUTPUT = "images", "logits"
OPSET = 18  # of ONNX, 2023: old enough for the runtimes that are about


@dataclass(frozen=True)
class ModelSignature:
    """The interface of an exported file.

    Attributes:
        class_names: K names, in the order of the logits.
        resolution: Side R of the input, in pixels.
        channels: Channels C of the input.
        resize: How an image becomes a square.
        task: What the logits mean.
        background: Color behind transparent pixels.
    """

    class_names: Sequence[str]
    resolution: int
    channels: int
    resize: Resize
    task: Task
    background: Background = "white"

    @property
    def signature(self) -> tf.TensorSpec:
        """The input, of any number of images."""
        return tf.TensorSpec((None, self.resolution, self.resolution, self.channels), tf.float32, name=INPUT)

    def describe(self) -> dict[str, Any]:
        """Return the interface as JSON values."""
        side = self.resolution
        return {
            "class_names": list(self.class_names),
            "input": {
                "name": INPUT,
                "shape": [None, side, side, self.channels],
                "dtype": "float32",
                "range": [0, 255],
                "color_space": "RGB",
            },
            "preprocessing": {
                "resize": self.resize,
                "resolution": side,
                "steps": describe(side, self.resize, self.background),
            },
            "output": {
                "name": OUTPUT,
                "shape": [None, len(self.class_names)],
                "dtype": "float32",
                "meaning": f"logits, in the order of class_names; {self.task.activation_name} turns them into "
                "probabilities",
            },
        }


def calibration_rows(manifest: Manifest, count: int, seed: int) -> np.ndarray:
    """Choose the training images that int8 is calibrated on.

    Up to `count` rows of the manifest, drawn at random, int64 (n,) ascending.
    """
    train = manifest.indices("train")
    return np.sort(np.random.default_rng(seed).choice(train, min(count, len(train)), replace=False))


def write_saved_model(model: keras.Model, model_signature: ModelSignature, path: Path) -> None:
    """Write a SavedModel with the signatures `serving_default` and `classify`.

    `serving_default` maps `images` to `logits`.

    `classify` takes `encoded`, strings (N,), each a file as `pipeline.data.preprocessing.decode` takes it, and
    `orientation`, int32 (N,), their EXIF orientations, 1 where a file has none. A transparent PNG is put on the
    background. It gives `probabilities`, float32 (N,
    K), and `class_names`, strings (K,).
    """
    resolution, resize = model_signature.resolution, model_signature.resize

    def to_square(encoded: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
        image = decode_on_background(encoded, orientation, model_signature.background)
        return resize_to_square(image, resolution, resize)

    def classify(encoded: tf.Tensor, orientation: tf.Tensor) -> dict[str, tf.Tensor]:
        square = tf.TensorSpec(model_signature.signature.shape[1:], tf.uint8)
        images = tf.map_fn(lambda image: to_square(*image), (encoded, orientation), fn_output_signature=square)
        probabilities = model_signature.task.activation(model(tf.cast(images, tf.float32), training=False))
        return {"probabilities": probabilities, "class_names": tf.constant(list(model_signature.class_names))}

    encoded_specs = [
        tf.TensorSpec((None,), tf.string, name="encoded"),
        tf.TensorSpec((None,), tf.int32, name="orientation"),
    ]
    _save(model, model_signature, path, classify=tf.function(classify, input_signature=encoded_specs, autograph=False))


def write_litert(
    model: keras.Model, model_signature: ModelSignature, path: Path, *, calibration: tf.data.Dataset | None = None
) -> None:
    """Write a LiteRT model of LiteRT's own operations.

    Args:
        model: What to write.
        model_signature: Interface of the model.
        path: The file.
        calibration: Yields a training image, uint8 (1, R, R, 3), and more that is not looked at. Given, weights (by
            channel) and activations become 8-bit integers; input and output stay float32.
    """
    with tempfile.TemporaryDirectory() as folder:
        _save(model, model_signature, Path(folder))
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serving_default"])
        if calibration is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: (
                [images.numpy().astype(np.float32)] for images, *_ in calibration
            )
            # An operation without integers is an error.
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        path.write_bytes(converter.convert())
    with zipfile.ZipFile(path, "a") as archive:  # the runtime reads to the model's end, zip readers from the file's
        archive.writestr("labels.txt", "\n".join(model_signature.class_names) + "\n")
        archive.writestr("metadata.json", json.dumps(model_signature.describe(), indent=1, ensure_ascii=False))


def write_onnx(model: keras.Model, model_signature: ModelSignature, path: Path) -> None:
    """Write an ONNX model. It is checked for inputs that nothing gives."""
    import onnx
    import tf2onnx

    serve = _serving(model, model_signature)
    converted, _ = tf2onnx.convert.from_function(serve, [model_signature.signature], opset=OPSET)
    for key, value in model_signature.describe().items():
        converted.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    onnx.checker.check_model(converted, full_check=True)
    onnx.save(converted, path)


# By format: writes it, given the model, its interface, the training images that int8 is calibrated on, and the path.
WRITERS: dict[str, Callable[[keras.Model, ModelSignature, tf.data.Dataset, Path], None]] = {
    "savedmodel": lambda model, model_signature, _, path: write_saved_model(model, model_signature, path),
    "litert": lambda model, model_signature, _, path: write_litert(model, model_signature, path),
    "litert-int8": lambda model, model_signature, images, path: write_litert(
        model, model_signature, path, calibration=images
    ),
    "onnx": lambda model, model_signature, _, path: write_onnx(model, model_signature, path),
}


def _serving(model: keras.Model, model_signature: ModelSignature) -> tf.types.experimental.PolymorphicFunction:
    return tf.function(
        lambda images: {OUTPUT: model(images, training=False)},
        input_signature=[model_signature.signature],
        autograph=False,
    )


def _save(
    model: keras.Model,
    model_signature: ModelSignature,
    path: Path,
    **further: tf.types.experimental.PolymorphicFunction,
) -> None:
    module = tf.Module()
    module.weights = [weight.value for weight in model.weights]  # what is followed from here is saved
    tf.saved_model.save(module, str(path), signatures={"serving_default": _serving(model, model_signature), **further})
