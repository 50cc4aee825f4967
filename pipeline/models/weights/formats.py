"""Weight files of every format, read into one form: arrays by the layer names of `pipeline.models.efficientnet`.

| suffix        | format                                                                                        |
|---------------|-----------------------------------------------------------------------------------------------|
| .h5, .hdf5    | Keras weights by layer name, alone or in a saved model, and Keras 3's .weights.h5               |
| .keras        | a saved Keras model, loaded in safe mode                                                      |
| .pth, .pt     | a PyTorch state dict in the naming of efficientnet-pytorch or timm                            |

Nothing is ever unpickled or executed. timm's own weights, unlike its `tf_` ones, were trained with a batch
normalization epsilon of 1e-5 and symmetric padding. The files do not say so: such weights fit, and need some
fine-tuning.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.errors import WeightsError
from pipeline.models.variants import Variant
from pipeline.models.weights.keras_files import read_keras_archive, read_keras_h5
from pipeline.models.weights.torch_checkpoint import read_torch
from pipeline.models.weights.torch_names import to_keras_layers

Arrays = dict[str, list[np.ndarray]]  # by layer name, in the order of the layer's weights; channels last


def _read_torch(path: Path, variant: Variant) -> Arrays:
    return to_keras_layers(read_torch(path), variant)


FORMATS: dict[str, Callable[[Path, Variant], Arrays]] = {  # by suffix
    ".h5": lambda path, variant: read_keras_h5(path),
    ".hdf5": lambda path, variant: read_keras_h5(path),
    ".keras": lambda path, variant: read_keras_archive(path),
    ".pth": _read_torch,
    ".pt": _read_torch,
}


def read_weights(path: Path, variant: Variant) -> Arrays:
    """Read a weight file.

    Args:
        path: The file; its suffix tells its format.
        variant: What the weights are meant for; resolves the stages of files that number their blocks through.

    Returns:
        The arrays of every layer that has weights. Names that are not understood are kept as they stand in the file.

    Raises:
        WeightsError: The suffix is unknown, or the file is damaged or not of the format that its suffix says.
    """
    reader = FORMATS.get(path.suffix.lower())
    if reader is None:
        raise WeightsError(f"{path}: weights come in {', '.join(FORMATS)} files")
    return reader(path, variant)
