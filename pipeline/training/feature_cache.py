"""A frozen backbone, computed once: where only the head is trained on pictures that stay the same, so do its features.

`top_dropout` and the classifier are the network's own layers, so the head has its weights, its optimizer slots, its
moving average and the state of its random generator, and the network's checkpoints are the same as without this.
"""

from collections.abc import Callable, Sequence

import keras
import numpy as np

from pipeline.config.schema import Config
from pipeline.config.train import StageConfig

FEATURE_LAYER = "avg_pool"  # the layer whose outputs are kept
MAX_BYTES = 4 * 2**30  # of features in memory; 800,000 pictures of B0


def is_augmented(config: Config, stage: StageConfig) -> bool:
    """Whether a stage's pictures differ from one epoch to the next."""
    settings = config.augment
    return stage.use_augmentation and bool(
        settings.transforms or settings.randaugment or settings.mixup or settings.cutmix
    )


def are_constant(config: Config, stages: Sequence[StageConfig], num_images: int, width: int) -> bool:
    """Whether the last of `stages` sees the same features in every epoch, and whether they fit into memory.

    A backbone that an earlier stage has trained does not count as constant: its moving average still moves.

    Args:
        config: Its augmentation is looked at.
        stages: Those of the run up to the one in question.
        num_images: Images whose features would be kept.
        width: Numbers per image, C.
    """
    frozen = all(stage.trainable == "head" for stage in stages)
    return frozen and not is_augmented(config, stages[-1]) and num_images * width * 4 <= MAX_BYTES


def backbone_and_head(model: keras.Model) -> tuple[keras.Model, keras.Model]:
    """Cut a network in two that share its layers.

    Args:
        model: Built by `efficientnet` with its top.

    Returns:
        The backbone, float32 images (B, R, R, 3) to features (B, C), and the head, features (B, C) to float32 logits
        (B, K).
    """
    names = [layer.name for layer in model.layers]
    features = model.get_layer(FEATURE_LAYER).output
    inputs = keras.Input(features.shape[1:], dtype="float32", name="features")
    x = inputs
    for layer in model.layers[names.index(FEATURE_LAYER) + 1 :]:
        x = layer(x)
    return keras.Model(model.inputs, features, name="backbone"), keras.Model(inputs, x, name="head")


class FeatureCache:
    """A head, and the features that it is trained on, computed when they are first asked for.

    Attributes:
        head: From features float32 (B, C) to logits float32 (B, K); shares the network's layers.
    """

    def __init__(self, head: keras.Model, compute: Callable[[str], np.ndarray]) -> None:
        """Compute nothing yet.

        Args:
            head: As `backbone_and_head` cuts it off.
            compute: What the backbone makes of every image of a split, in the manifest's order: float32 (n, C).
        """
        self.head, self._compute = head, compute
        self._features: dict[str, np.ndarray] = {}

    @property
    def width(self) -> int:
        """Numbers per image, C."""
        return int(self.head.input_shape[-1])

    def get(self, split: str) -> np.ndarray:
        """The features of a split in the manifest's order, float32 (n, C)."""
        if split not in self._features:
            self._features[split] = self._compute(split)
        return self._features[split]

    def clear(self) -> None:
        """Give the memory back."""
        self._features.clear()

    def logits(self, split: str) -> np.ndarray:
        """The network's outputs for a split as its head is now, float32 (n, K)."""
        return self.head(self.get(split), training=False).numpy()
