"""The weights of the classes in the loss."""

import numpy as np

from pipeline.config.train import TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, suggest


def class_weights(config: TrainConfig, manifest: Manifest) -> np.ndarray | None:
    """Return the weight of each class in the loss; its mean over the training images is 1.

    Args:
        config: The section `train`. `class_weights: balanced` gives every class the same total weight: N / (K * n_k)
            for n_k of the N images.
        manifest: All images; the training images of each class are counted.

    Returns:
        float32 (K,), or None if all images weigh the same.

    Raises:
        ConfigError: A weight is given for a class that does not exist.
    """
    given = config.class_weights
    if given is None:
        return None
    class_names, counts = manifest.class_names, manifest.class_counts()["train"].to_numpy(np.float64)
    if given == "balanced":
        weights = 1 / np.maximum(counts, 1)
    else:
        unknown = [name for name in given if name not in class_names]
        if unknown:
            raise ConfigError(
                "\n".join(
                    f"train.class_weights: {name!r} is none of the data's classes{suggest(name, class_names)}"
                    for name in unknown
                )
            )
        weights = np.array([given.get(name, 1.0) for name in class_names])
    return (weights * counts.sum() / (weights * counts).sum()).astype(np.float32)
