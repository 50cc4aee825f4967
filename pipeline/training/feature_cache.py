"""The features of a frozen backbone, computed once if only the head is trained and the images are not augmented.

`top_dropout` and the classifier are layers of the network itself. So the head shares its weights, its optimizer slots,
its moving average and the state of its random generator, and checkpoints are the same as without the cache.
"""

from collections.abc import Callable, Sequence

import keras
import numpy as np

from pipeline.config.augment import AugmentConfig
from pipeline.config.train import StageConfig
from pipeline.models.efficientnet import POOLING

MAX_BYTES = 4 * 2**30  # of features in memory; 800,000 images for B0


def is_augmented(augment: AugmentConfig, stage: StageConfig) -> bool:
    """Return True if a stage's images differ from one epoch to the next."""
    return stage.use_augmentation and bool(augment.transforms or augment.randaugment or augment.mixup or augment.cutmix)


def are_constant(augment: AugmentConfig, stages: Sequence[StageConfig], num_images: int, width: int) -> bool:
    """Return True if the last of `stages` sees the same features in every epoch, and if they fit into memory.

    A backbone that an earlier stage has trained does not count as constant: its moving average still changes.

    Args:
        augment: Section `augment` of the config.
        stages: Stages of the run up to the one in question.
        num_images: Images whose features would be cached.
        width: Numbers per image, C.
    """
    frozen = all(stage.trainable == "head" for stage in stages)
    return frozen and not is_augmented(augment, stages[-1]) and num_images * width * 4 <= MAX_BYTES


def backbone_and_head(model: keras.Model) -> tuple[keras.Model, keras.Model]:
    """Split a network into two models that share its layers.

    Args:
        model: A network built by `efficientnet` with its top.

    Returns:
        The backbone, float32 images (B, R, R, 3) to features (B, C), and the head, features (B, C) to float32 logits
        (B, K).
    """
    names = [layer.name for layer in model.layers]
    features = model.get_layer(POOLING).output
    inputs = keras.Input(features.shape[1:], dtype="float32", name="features")
    x = inputs
    for layer in model.layers[names.index(POOLING) + 1 :]:
        x = layer(x)
    return keras.Model(model.inputs, features, name="backbone"), keras.Model(inputs, x, name="head")


class FeatureCache:
    """A head, and the features that it is trained on, computed when they are first needed.

    Attributes:
        head: From features float32 (B, C) to logits float32 (B, K); shares the network's layers.
    """

    def __init__(self, head: keras.Model, compute: Callable[[str], np.ndarray]) -> None:
        """Create an empty cache.

        Args:
            head: Head as returned by `backbone_and_head`.
            compute: Returns the backbone's outputs for every image of a split, in the manifest's order: float32 (n, C).
        """
        self.head, self._compute = head, compute
        self._features: dict[str, np.ndarray] = {}

    @property
    def width(self) -> int:
        """Numbers per image, C."""
        return int(self.head.input_shape[-1])

    def get(self, split: str) -> np.ndarray:
        """Return the features of a split in the manifest's order, float32 (n, C)."""
        if split not in self._features:
            self._features[split] = self._compute(split)
        return self._features[split]

    def clear(self) -> None:
        """Remove all features, which frees their memory."""
        self._features.clear()

    def logits(self, split: str) -> np.ndarray:
        """Return the network's outputs for a split with the current head, float32 (n, K)."""
        return self.head(self.get(split), training=False).numpy()
