"""Scikit-learn's handwritten digits, as PNG files in memory."""

import io

import numpy as np
import tensorflow as tf
from PIL import Image

from pipeline.data.sources.base import LabeledImage


class DigitsSource:
    """Scikit-learn's 1,797 handwritten digits, 8x8 pixels, gray. No network, no files."""

    class_names = tuple("0123456789")

    def __init__(self) -> None:
        """Create the source."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        # 0..16 to 0..255; 8, the only value that falls between two integers, becomes 128 (rint rounds 127.5 to even)
        self._files = [_png(image) for image in np.rint(digits.images * (255 / 16)).astype(np.uint8)]
        self._labels = [int(label) for label in digits.target]

    def list_images(self) -> list[LabeledImage]:
        """List all images, always in the same order."""
        return [LabeledImage(str(i), label, None) for i, label in enumerate(self._labels)]

    def stat(self, key: str) -> None:
        """Return None: there is no file whose size and version could tell that an image has changed."""

    def read(self, key: str) -> bytes:
        """Return the encoded file of an image."""
        return self._files[int(key)]

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        """Return the encoded file of an image in a tf.data graph."""
        return tf.gather(tf.constant(self._files), tf.strings.to_number(key, tf.int32))


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
