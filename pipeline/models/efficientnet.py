"""EfficientNet (Tan & Le 2019, arXiv 1905.11946): the builder that scales a family's table, and its layer names.

Follows tensorflow/tpu models/official/efficientnet. Layer names are those of keras.applications, which makes its weight
files fit. Only plain Keras layers are used: a saved model loads where this package is not installed.

| block  | operator       | kernel | stride | expansion | channels | repeats |
|--------|----------------|--------|--------|-----------|----------|---------|
| stem   | convolution    | 3      | 2      |           | 32       | 1       |
| 1      | MBConv         | 3      | 1      | 1         | 16       | 1       |
| 2      | MBConv         | 3      | 2      | 6         | 24       | 2       |
| 3      | MBConv         | 5      | 2      | 6         | 40       | 2       |
| 4      | MBConv         | 3      | 2      | 6         | 80       | 3       |
| 5      | MBConv         | 5      | 1      | 6         | 112      | 3       |
| 6      | MBConv         | 5      | 2      | 6         | 192      | 4       |
| 7      | MBConv         | 3      | 1      | 6         | 320      | 1       |
| top    | convolution    | 1      | 1      |           | 1280     | 1       |

The channels are multiplied by the variant's width and the repeats by its depth (`pipeline.models.variants`). The lite
variants leave the channels of stem and top and the repeats of blocks 1 and 7 as they are, have no
squeeze-and-excitation, and ReLU6 in place of swish.
"""

import re
import string
import sys
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import keras
from keras import layers

from pipeline.models.variants import BlockArgs, Family, Variant, end_filters, stage_filters, stage_repeats

CLASSIFIER, CLASSIFIER_BLOCK = "predictions", 9  # its name, and what `block_of` says of it
TOP_ACTIVATION, POOLING, TOP_DROPOUT = "top_activation", "avg_pool", "top_dropout"


class LayerTypes(NamedTuple):
    """The classes of some layers: Keras's own, or subclasses that train better or faster.

    `to_inference_model` puts Keras's own back.
    """

    dropout: type[layers.Dropout] = layers.Dropout
    norm: type[layers.BatchNormalization] = layers.BatchNormalization
    activation: type[layers.Activation] = layers.Activation
    dwconv: type[layers.DepthwiseConv2D] = layers.DepthwiseConv2D


KERAS_LAYERS = LayerTypes()


def block_name(stage: int, repeat: int) -> str:
    """Return the prefix of a block's layer names.

    `block2a` for the first (repeat 0) of stage 2, `block2aa` after `block2z`.
    """
    letters = string.ascii_lowercase
    return f"block{stage}{letters[repeat // 26 - 1] if repeat >= 26 else ''}{letters[repeat % 26]}"


@dataclass(frozen=True)
class LayerBuilder:
    """Builds the layers of a network by name.

    Attributes:
        family: The family, whose activation, squeeze-and-excitation and epsilon are used.
        padding: `same` or `symmetric`: that of the strided convolutions.
        layer_types: The classes of the layers.
        batch_norm_momentum: Momentum of the moving statistics.
        synchronized: Whether batch normalization takes its statistics over all replicas.
        dtype: Keras's dtype policy.
        seed: Seed of the network.
    """

    family: Family
    padding: str
    layer_types: LayerTypes
    batch_norm_momentum: float
    synchronized: bool
    dtype: str
    seed: int

    def seed_of(self, name: str) -> int:
        """Return the seed of a layer, from the seed of the network and its name."""
        return zlib.crc32(f"{self.seed}/{name}".encode())

    def kernel(self, name: str) -> keras.initializers.Initializer:
        """Return the initializer of a kernel: the official code's He initialization by fan-out."""
        return keras.initializers.VarianceScaling(
            2.0, mode="fan_out", distribution="untruncated_normal", seed=self.seed_of(name)
        )

    def pad(self, x: keras.KerasTensor, name: str, size: int, stride: int) -> tuple[keras.KerasTensor, str]:
        """Return a convolution's input, padded in a layer of its own where Keras cannot, and its `padding`.

        Without a stride, Keras's `same` is symmetric itself.
        """
        if stride == 1 or self.padding == "same":
            return x, "same"
        return layers.ZeroPadding2D(size // 2, dtype=self.dtype, name=f"{name}_pad")(x), "valid"

    def conv(self, x: keras.KerasTensor, name: str, filters: int, size: int = 1, stride: int = 1) -> keras.KerasTensor:
        """Convolve."""
        x, padding = self.pad(x, name, size, stride)
        return layers.Conv2D(
            filters,
            size,
            stride,
            padding=padding,
            use_bias=False,
            kernel_initializer=self.kernel(name),
            dtype=self.dtype,
            name=name,
        )(x)

    def dwconv(self, x: keras.KerasTensor, name: str, size: int, stride: int) -> keras.KerasTensor:
        """Convolve every channel by itself."""
        x, padding = self.pad(x, name, size, stride)
        return self.layer_types.dwconv(
            size,
            stride,
            padding=padding,
            use_bias=False,
            depthwise_initializer=self.kernel(name),
            dtype=self.dtype,
            name=name,
        )(x)

    def norm(self, x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        """Normalize by batch statistics."""
        return self.layer_types.norm(
            momentum=self.batch_norm_momentum,
            epsilon=self.family.batch_norm_epsilon,
            synchronized=self.synchronized,
            dtype=self.dtype,
            name=name,
        )(x)

    def norm_activate(self, x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        """Normalize and activate."""
        return self.layer_types.activation(self.family.activation, dtype=self.dtype, name=f"{name}_activation")(
            self.norm(x, f"{name}_bn")
        )

    def squeeze_excite(self, x: keras.KerasTensor, name: str, squeezed: int) -> keras.KerasTensor:
        """Weight the channels by a gate that sees the mean of each (arXiv 1709.01507)."""
        filters = x.shape[-1]
        gate = layers.GlobalAveragePooling2D(dtype=self.dtype, name=f"{name}_squeeze")(x)
        gate = layers.Reshape((1, 1, filters), dtype=self.dtype, name=f"{name}_reshape")(gate)
        for part, width, function in (("reduce", squeezed, self.family.activation), ("expand", filters, "sigmoid")):
            part_name = f"{name}_{part}"
            gate = layers.Conv2D(
                width,
                1,
                activation=function,
                kernel_initializer=self.kernel(part_name),
                dtype=self.dtype,
                name=part_name,
            )(gate)
        return layers.Multiply(dtype=self.dtype, name=f"{name}_excite")([x, gate])

    def mbconv(
        self, inputs: keras.KerasTensor, name: str, stage: BlockArgs, stride: int, filters: int, drop_rate: float
    ) -> keras.KerasTensor:
        """Build an inverted residual block (arXiv 1801.04381) with squeeze-and-excitation.

        Args:
            inputs: Feature map (B, H, W, C).
            name: Prefix of the layer names.
            stage: Row of the table.
            stride: Stride of the depthwise convolution.
            filters: Channels of the output.
            drop_rate: Probability that stochastic depth drops the block.

        Returns:
            Feature map (B, ceil(H / stride), ceil(W / stride), filters).
        """
        x, filters_in = inputs, inputs.shape[-1]
        if stage.expand != 1:
            x = self.norm_activate(self.conv(x, f"{name}_expand_conv", filters_in * stage.expand), f"{name}_expand")
        x = self.norm_activate(self.dwconv(x, f"{name}_dwconv", stage.kernel, stride), name)
        if self.family.se_ratio is not None:
            x = self.squeeze_excite(x, f"{name}_se", max(1, int(filters_in * self.family.se_ratio)))
        x = self.norm(self.conv(x, f"{name}_project_conv", filters), f"{name}_project_bn")
        if stride == 1 and filters == filters_in:
            if drop_rate > 0:
                drop = f"{name}_drop"
                x = self.layer_types.dropout(
                    drop_rate, noise_shape=(None, 1, 1, 1), seed=self.seed_of(drop), dtype=self.dtype, name=drop
                )(x)
            x = layers.Add(dtype=self.dtype, name=f"{name}_add")([x, inputs])
        return x

    def classifier(self, x: keras.KerasTensor, num_classes: int, dropout: float) -> keras.KerasTensor:
        """Pool a feature map and classify it: float32 logits (B, num_classes)."""
        x = layers.GlobalAveragePooling2D(dtype=self.dtype, name=POOLING)(x)
        if dropout > 0:
            x = self.layer_types.dropout(dropout, seed=self.seed_of(TOP_DROPOUT), dtype=self.dtype, name=TOP_DROPOUT)(x)
        # The official 1 / sqrt(classes), but never wider than ImageNet's: for ten classes it gives first logits of
        # standard deviation 5 and a first loss of 14 nats (lite0, digits), and fine-tuning at 1e-3 wrecks the
        # pretrained layers before it has found a direction.
        bound = max(num_classes, 1000) ** -0.5
        uniform = keras.initializers.RandomUniform(-bound, bound, seed=self.seed_of(CLASSIFIER))
        return layers.Dense(num_classes, kernel_initializer=uniform, dtype="float32", name=CLASSIFIER)(x)


BLOCKS = {"mbconv": LayerBuilder.mbconv}  # by the name in BlockArgs


def efficientnet(
    variant: Variant,
    *,
    num_classes: int = 1000,
    channels: int = 3,
    include_top: bool = True,
    dropout: float | None = None,
    drop_path_rate: float = 0.2,
    batch_norm_momentum: float = 0.99,
    synchronized: bool = False,
    layer_types: LayerTypes = KERAS_LAYERS,
    dtype: str = "float32",
    seed: int = 0,
) -> keras.Model:
    """Build an EfficientNet.

    Its input is float32 (B, R, R, 3), RGB in [0, 255], with R the variant's resolution. The first layer normalizes it
    in float32: `(x / 255 - mean) / std` with ImageNet's figures, `(x - 127) / 128` for the lite variants, or as the
    variant says.

    Args:
        variant: The member of the family.
        num_classes: Number of outputs.
        channels: Channels of the input.
        include_top: Whether pooling, dropout and classifier follow the last convolution.
        dropout: Rate in front of the classifier, in [0, 1); `None` takes the variant's own.
        drop_path_rate: Probability, in [0, 1), that stochastic depth (arXiv 1603.09382) drops a block after the last
            one. Block i of N (from 0) is dropped with `drop_path_rate * i / N`, drawn per sample; only blocks with a
            residual connection are ever dropped.
        batch_norm_momentum: Of the moving statistics.
        synchronized: Whether batch normalization takes its statistics over all replicas.
        layer_types: Keras's, or subclasses for training.
        dtype: `float32`, or `mixed_bfloat16` to compute in bfloat16 with float32 weights. The input rescaling and
            the classifier stay float32.
        seed: Decides the initial weights and the dropout masks, by way of each layer's name.

    Returns:
        A functional model. Its output is the logits, float32 (B, num_classes), without softmax; without `include_top`
        it is the feature map of `top_activation`, (B, ceil(R / 32), ceil(R / 32), C), in the dtype of the computation.
    """
    family = variant.family
    build = LayerBuilder(family, variant.padding, layer_types, batch_norm_momentum, synchronized, dtype, seed)
    stem_filters, top_filters = end_filters(variant)
    images = keras.Input((variant.resolution, variant.resolution, channels), dtype="float32", name="images")
    x = layers.Rescaling(*variant.normalization, dtype="float32", name="rescaling")(images)
    x = build.norm_activate(build.conv(x, "stem_conv", stem_filters, 3, 2), "stem")

    repeats = stage_repeats(variant)
    # Keras recurses once per layer of the longest path; L2 has about as many as Python allows.
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000 + 20 * sum(repeats)))
    block = 0
    for number, (stage, filters) in enumerate(zip(family.blocks, stage_filters(variant), strict=True)):
        for repeat in range(repeats[number]):
            x = BLOCKS[stage.block](
                build,
                x,
                block_name(number + 1, repeat),
                stage,
                stride=stage.stride if repeat == 0 else 1,
                filters=filters,
                drop_rate=drop_path_rate * block / sum(repeats),
            )
            block += 1

    x = build.norm_activate(build.conv(x, "top_conv", top_filters), "top")
    if include_top:
        x = build.classifier(x, num_classes, variant.dropout if dropout is None else dropout)
    name = "efficientnet_" + re.sub(r"[^a-z0-9.]+", "_", variant.name)  # = and , break TensorFlow's scopes
    return keras.Model(images, x, name=name)


def block_of(layer_name: str) -> int:
    """Return the position of a layer in the network, for freezing everything in front of it.

    Returns:
        0 for input, normalization and stem, 1 to 7 for the blocks, 8 for what follows the last block, 9 for the
        classifier and its dropout.
    """
    if match := re.match(r"block(\d)", layer_name):
        return int(match[1])
    if layer_name in (TOP_DROPOUT, CLASSIFIER):
        return CLASSIFIER_BLOCK
    return 8 if layer_name.startswith(("top_", POOLING)) else 0


def to_inference_model(model: keras.Model) -> keras.Model:
    """Copy a network for saving and export.

    The copy has Keras's own layers, float32, unsynchronized batch normalization, and every layer trainable.

    Args:
        model: Built by `efficientnet`; it is not changed.

    Returns:
        A new model with equal layer names and equal weights.
    """

    def plain(layer: layers.Layer) -> layers.Layer:
        config = layer.get_config() | {"dtype": "float32", "trainable": True}
        if "synchronized" in config:
            config["synchronized"] = False
        kind: type[layers.Layer] = next(base for base in type(layer).__mro__ if base.__module__.startswith("keras."))
        return kind.from_config(config)

    copy = keras.models.clone_model(model, clone_function=plain)
    copy.set_weights(model.get_weights())
    return copy
