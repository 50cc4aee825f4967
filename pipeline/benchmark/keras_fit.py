"""Training with plain Keras: keras.applications, `fit`, and a tf.data input pipeline as in Keras's guides.

`pipeline.benchmark.keras_baseline` starts this file as a program. It runs in the user's environment, without any of
this project's settings. It reads a JSON that describes the training from standard input, waits for a line before each
round, and answers with images per second.
"""

import json
import sys
import time
from typing import Any

import keras
import tensorflow as tf

Spec = dict[str, Any]


def network(spec: Spec) -> keras.Model:
    """Return Keras's own EfficientNet, compiled; for variants that Keras lacks, the same network from Keras layers."""
    keras.mixed_precision.set_global_policy(spec["dtype"])
    size = spec["resolution"]
    if spec["variant"] in [f"b{i}" for i in range(8)]:
        build = getattr(keras.applications, f"EfficientNet{spec['variant'].upper()}")
        model = build(weights=None, input_shape=(size, size, 3), classes=spec["classes"], classifier_activation=None)
    else:
        from pipeline.models.efficientnet import efficientnet
        from pipeline.models.variants import Variant

        model = efficientnet(Variant(**spec["multipliers"]), num_classes=spec["classes"], dtype=spec["dtype"])
    for layer in model.layers:
        layer.trainable = layer.name in spec["trainable"]
    optimizer = getattr(keras.optimizers, spec["optimizer"])(spec["learning_rate"], **spec["optimizer_arguments"])
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=spec["label_smoothing"])
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def dataset(spec: Spec) -> tf.data.Dataset:
    """Return an infinite dataset of random crops of the files, mirrored half of the time.

    Returns:
        Images float32 (B, R, R, 3) in [0, 255], labels float32 (B, K).
    """
    size, full_image = spec["resolution"], tf.constant([[[0.0, 0.0, 1.0, 1.0]]])

    def load(path: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image), full_image, area_range=spec["scale"], aspect_ratio_range=spec["ratio"], max_attempts=10
        )
        image = tf.image.resize(tf.slice(image, begin, extent), (size, size))
        if spec["flip"]:
            image = tf.image.random_flip_left_right(image)
        return tf.ensure_shape(image, (size, size, 3)), tf.one_hot(label, spec["classes"])

    files = tf.data.Dataset.from_tensor_slices((spec["files"], spec["labels"])).shuffle(len(spec["files"])).repeat()
    return (
        files.map(load, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(spec["batch_size"], drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )


class Rounds(keras.callbacks.Callback):
    """A callback that runs one epoch for every line on standard input."""

    def __init__(self, images: int) -> None:
        """Create the callback.

        Args:
            images: Number of images of an epoch.
        """
        super().__init__()
        self._images = images

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        """Wait for a line; an empty line or the end of the input ends the program."""
        if not sys.stdin.readline().strip():
            sys.exit(0)
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        """Print the images per second."""
        print(json.dumps(self._images / (time.perf_counter() - self._start)), flush=True)


def run_steps(model: keras.Model, spec: Spec, rounds: Rounds) -> None:
    """Run Keras's train_step again and again on one batch that is on the device."""
    shape = (spec["batch_size"], spec["resolution"], spec["resolution"], 3)
    images = tf.random.uniform(shape, 0, 255)
    labels = tf.one_hot(tf.range(spec["batch_size"]) % spec["classes"], spec["classes"])
    step = tf.function(lambda: model.train_step((images, labels)), jit_compile=spec["xla"])
    while True:
        rounds.on_epoch_begin(0)
        for _ in range(spec["steps"]):
            result = step()
        float(result["loss"])  # waits for the device
        rounds.on_epoch_end(0)


def main(spec: Spec) -> None:
    """Train in rounds until standard input ends."""
    model, rounds = network(spec), Rounds(spec["steps"] * spec["batch_size"])
    if spec["files"] is None:
        run_steps(model, spec, rounds)
    else:
        model.fit(dataset(spec), epochs=sys.maxsize, steps_per_epoch=spec["steps"], verbose=0, callbacks=[rounds])


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
