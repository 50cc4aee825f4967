"""The objects that a run trains: the network with its initial weights, and the state around it."""

from collections.abc import Collection, Sequence

import keras

from pipeline.config.optimizer import OptimizerConfig
from pipeline.config.schema import Config
from pipeline.console import Console
from pipeline.distributed.devices import Runtime
from pipeline.models.efficientnet import efficientnet
from pipeline.models.layers import layer_types
from pipeline.models.weights.pretrained import load_pretrained
from pipeline.models.weights.sources import PretrainedWeights, check_class_map, read_pretrained
from pipeline.tasks import TASKS
from pipeline.training.optimizers import ModelEMA, build_optimizer
from pipeline.training.schedule import check_uninitialized_layers
from pipeline.training.state import MetricAccumulator, TrainState


def read_initial_weights(
    config: Config, class_names: Sequence[str], console: Console, *, download: bool = True
) -> PretrainedWeights | None:
    """Read the weights that a config names, and warn where their make cannot be told.

    Args:
        config: `model` is used.
        class_names: K names, in the order of the outputs.
        console: Console for the warning.
        download: Download published weights that are not on this machine yet.

    Returns:
        The weights; None if the config starts from random values.

    Raises:
        WeightsError: The weights cannot be read, or the class map does not suit them.
        WeightsNotDownloadedError: The weights are not on this machine, and `download` is False.
    """
    model = config.model
    if model.weights is None:
        return None
    check_class_map(model.weights, class_names, model.class_map)
    weights = read_pretrained(
        model.weights,
        config.variant,
        weights_from=model.weights_from,
        classes=model.weights_classes,
        download=download,
    )
    if weights.conventions.candidates:
        console.print(
            f"warning: {weights.describe_choice()}; taken for {weights.conventions.make}. If that is wrong, the "
            "accuracy suffers without another message: set model.weights_from"
        )
    return weights


def create_model(
    config: Config,
    runtime: Runtime,
    class_names: Sequence[str],
    console: Console,
    *,
    weights: PretrainedWeights | None,
) -> tuple[keras.Model, Collection[str]]:
    """Build the network under the strategy that will run it, and load its initial weights.

    Args:
        config: The variant, `model`, the seed and the stages are used.
        runtime: Strategy, precision and compilation.
        class_names: K names, in the order of the outputs.
        console: Console for the report on the weights.
        weights: The initial weights, from `read_initial_weights`; None leaves random values.

    Returns:
        The network, float32 images (B, R, R, 3) in [0, 255] to float32 logits (B, K), and the names of the layers that
        the weights do not fit.

    Raises:
        UserError: The weights do not fit, or no stage trains a layer that they do not fit.
    """
    uninitialized_layers: Collection[str] = ()
    with runtime.strategy.scope():
        model = efficientnet(
            config.variant,
            num_classes=len(class_names),
            channels=config.model.channels,
            drop_path_rate=config.model.drop_path_rate,
            batch_norm_momentum=config.model.batch_norm_momentum,
            synchronized=runtime.sync_batch_norm,
            layer_types=layer_types(jit_compile=bool(runtime.jit_compile), sync_batch_norm=runtime.sync_batch_norm),
            dtype=runtime.dtype,
            seed=config.seed,
        )
        if weights is not None:
            report = load_pretrained(
                model,
                weights,
                variant=config.variant,
                class_names=class_names,
                class_map=config.model.class_map,
                task=TASKS[config.task],
                partial=config.model.partial_weights,
            )
            console.print(f"weights: {report.summary()}", details=report.details())
            uninitialized_layers = report.uninitialized
            # A recipe chooses stages that train these layers.
            if config.recipe is None or "stages" in config.train.model_fields_set:
                check_uninitialized_layers(model, uninitialized_layers, config.train.stages)
    return model, uninitialized_layers


def create_train_state(config: OptimizerConfig, runtime: Runtime, model: keras.Model) -> TrainState:
    """Create the state of a run at its first step: optimizer, moving average and metrics around the network."""
    with runtime.strategy.scope():
        average = ModelEMA(model.weights, config.ema_decay) if config.ema_decay is not None else None
        return TrainState(model, build_optimizer(config, model.trainable_variables), average, MetricAccumulator())
