"""The way from a picture to lite0's published logits, pinned: preprocessing, normalization, network and weights.

`python tests/test_golden.py` writes the file anew. That is right only after a change which is meant to move every
prediction.
"""

import io
from itertools import combinations
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

from pipeline.data.preprocessing import preprocess
from pipeline.models.efficientnet import efficientnet
from pipeline.models.variants import VARIANTS
from pipeline.models.weights.pretrained import load_pretrained
from pipeline.models.weights.sources import imagenet_classes

GOLDEN = Path(__file__).parent / "golden" / "lite0.npz"
LITE0 = VARIANTS["lite0"]
SIZES = ((260, 300), (500, 375), (120, 180), (700, 640))  # shrunk and grown, landscape and portrait
TOLERANCE = 0.005  # logits; processors sum in other orders, which may also round a pixel to the next level


def pictures() -> list[bytes]:
    """PNG files: waves of random direction, length and colour; then with stripes, discs and noise laid over them."""
    random = np.random.default_rng(7)
    files = []
    for number, (height, width) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width] / min(height, width)
        picture = np.full((height, width, 3), 127.0)
        for _ in range(12):
            across, down = random.uniform(-12, 12, 2)
            wave = np.cos(2 * np.pi * (across * x + down * y + random.uniform()))
            picture += wave[..., None] * random.uniform(-40, 40, 3)
        if number == 1:
            picture[(x * 30 % 2 < 1) & (y > 0.5)] = random.uniform(0, 255, 3)
        if number == 2:
            for _ in range(9):
                centre, radius = random.uniform(0, 1, 2), random.uniform(0.05, 0.3)
                picture[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = random.uniform(0, 255, 3)
        if number == 3:
            picture += random.normal(0, 25, picture.shape)
        file = io.BytesIO()
        Image.fromarray(picture.round().clip(0, 255).astype(np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def logits() -> np.ndarray:
    """Lite0's for each picture, float32 (4, 1000)."""
    model = efficientnet(LITE0)
    load_pretrained(model, "imagenet", variant=LITE0, class_names=imagenet_classes()[1])
    squares = [
        preprocess(tf.constant(file), tf.constant(1), resolution=LITE0.resolution, resize="crop") for file in pictures()
    ]
    with tf.device("CPU:0"):
        return model(tf.cast(tf.stack(squares), tf.float32), training=False).numpy()


def test_generated_pictures_give_the_stored_logits() -> None:
    expected = np.load(GOLDEN)["logits"]
    assert expected.std(axis=1).min() > 1  # from class to class
    assert min(np.abs(a - b).max() for a, b in combinations(expected, 2)) > 1  # from picture to picture
    np.testing.assert_allclose(logits(), expected, rtol=0, atol=TOLERANCE)


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, logits=logits())
