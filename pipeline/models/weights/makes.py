"""Makes of weights: what the program that trained them takes for granted and their files do not say.

Two networks with equal names and shapes compute different logits if the one pads its strided convolutions as TensorFlow
does and the other as PyTorch does, or if their inputs are normalized differently. A file's make is recognized by the
names of its tensors, by what it or the file beside it says, and by its file name. Where that leaves two, such as timm's
own weights and those that it took over from TensorFlow, the user names one: `model.weights_from`.

Pure Python: importing this module loads nothing else, so that a wrong make in a config is answered at once.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.models.variants import NORMALIZATIONS, Normalization, Variant


class Make(NamedTuple):
    """What the weights of a make have in common."""

    title: str
    """Name for the console."""
    padding: str = "same"
    """Padding of the strided convolutions, as `Variant.padding`."""
    batch_norm_epsilon: float = 1e-3
    normalization: str | None = None
    """Key of `NORMALIZATIONS`; None for that of the model's family."""
    lite_normalization: str | None = None
    """Key of `NORMALIZATIONS` for the lite variants, where they have their own."""
    epsilon_of: tuple[tuple[str, float], ...] = ()
    """Variants with another epsilon."""


_TORCHVISION_EPSILON = (("b5", 1e-3), ("b6", 1e-3), ("b7", 1e-3))

MAKES = {  # by the name in a config
    "keras": Make("Keras"),
    "qubvel": Make("qubvel's efficientnet", normalization="imagenet"),
    "efficientnet-pytorch": Make("efficientnet-pytorch"),
    "timm": Make("timm, from TensorFlow (tf_*)", normalization="imagenet", lite_normalization="inception"),
    "timm-native": Make("timm, trained by it", "symmetric", 1e-5, "imagenet"),
    "timm-ra4": Make("timm, trained by it (ra4)", "symmetric", 1e-5, "inception"),
    "advprop": Make("AdvProp (*_ap, adv-*)", normalization="inception"),
    "torchvision": Make("torchvision", "symmetric", 1e-5, "imagenet", epsilon_of=_TORCHVISION_EPSILON),
    "transformers": Make("Hugging Face transformers", normalization="imagenet"),
}

NAMINGS = {  # the makes that a naming of the tensors leaves possible; the first is taken where nothing else is known
    "keras": ("keras",),
    "qubvel": ("qubvel",),
    "efficientnet-pytorch": ("efficientnet-pytorch",),
    "timm": ("timm", "timm-native", "timm-ra4", "advprop"),
    "torchvision": ("torchvision",),
    "transformers": ("transformers",),
}
# Searched in the names of architectures and files; the first match decides.
HINTS = {
    "timm": (
        (r"tf_efficientnet_\w+?[_.]ap(?![a-z])", "advprop"),
        (r"tf_efficientnet_", "timm"),
        (r"(?<!tf_)efficientnet_\w+[._]ra4", "timm-ra4"),
        (r"(?<!tf_)efficientnet_(b\d|lite\d|l2)", "timm-native"),
    ),
    "efficientnet-pytorch": ((r"(?<![a-z])adv[-_]", "advprop"),),
}


@dataclass(frozen=True)
class Conventions:
    """How weights expect the network around them to be.

    Attributes:
        make: Key of `MAKES`.
        padding: As `Variant.padding`.
        batch_norm_epsilon: Of the network that the weights are from.
        normalization: What that network does to pixels in [0, 255].
        candidates: Makes that fit the file as well; empty if the make is certain.
    """

    make: str
    padding: str
    batch_norm_epsilon: float
    normalization: Normalization
    candidates: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Describe the conventions for the console."""
        title = MAKES[self.make].title
        return (
            f"make: {self.make}{'' if title == self.make else f' ({title})'}; {self.padding} padding, normalization "
            f"{describe_normalization(self.normalization)}, batch-norm epsilon {self.batch_norm_epsilon:g}"
        )


def recognize(naming: str, hints: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """Tell the make of a file.

    Args:
        naming: Key of `NAMINGS`.
        hints: Names of the architecture and of the file, the surest first.

    Returns:
        The make, and all that are possible where nothing tells them apart.
    """
    candidates = NAMINGS[naming]
    for hint in hints:
        for pattern, make in HINTS.get(naming, ()):
            if re.search(pattern, hint):
                return make, ()
    return candidates[0], candidates if len(candidates) > 1 else ()


def conventions(make: str, variant: Variant, candidates: tuple[str, ...] = ()) -> Conventions:
    """Return the conventions of a make for a variant."""
    spec = MAKES[make]
    family = variant.family
    normalization = spec.normalization or family.normalization
    if family.se_ratio is None and spec.lite_normalization is not None:
        normalization = spec.lite_normalization
    epsilon = dict(spec.epsilon_of).get(variant.name, spec.batch_norm_epsilon)
    return Conventions(make, spec.padding, epsilon, NORMALIZATIONS[normalization], candidates)


def name_normalization(normalization: Normalization) -> str | None:
    """Return the name of a normalization that agrees with one of `NORMALIZATIONS` to rounding; None for others."""
    return next((name for name, known in NORMALIZATIONS.items() if is_same_normalization(normalization, known)), None)


def is_same_normalization(one: Normalization, other: Normalization) -> bool:
    """Return whether two normalizations agree to rounding."""
    pairs = zip(_channels(one), _channels(other), strict=True)
    return all(abs(here - there) <= 1e-5 * max(abs(there), 1e-3) for here, there in pairs)


def mean_and_std(normalization: Normalization) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of the pixel, per channel, that a normalization stands for."""
    numbers = _channels(normalization)
    return [-offset / scale for scale, offset in zip(numbers[:3], numbers[3:], strict=True)], [
        1 / scale for scale in numbers[:3]
    ]


def describe_normalization(normalization: Normalization) -> str:
    """Return the name of a normalization, or mean and standard deviation of the pixel."""
    name = name_normalization(normalization)
    if name is not None:
        return name
    mean, std = mean_and_std(normalization)
    return f"mean {', '.join(f'{x:.4g}' for x in mean)} and std {', '.join(f'{x:.4g}' for x in std)} of the pixel"


def _channels(normalization: Normalization) -> list[float]:
    return [
        number
        for part in normalization
        for number in (tuple(part) if isinstance(part, list | tuple) else (part, part, part))
    ]
