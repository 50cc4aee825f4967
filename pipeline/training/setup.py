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
from pipeline.tasks import TASKS
from pipeline.training.optimizers import ModelEMA, build_optimizer
from pipeline.training.schedule import check_uninitialized_layers
from pipeline.training.state import MetricAccumulator, TrainState


def create_model(
    config: Config,
    runtime: Runtime,
    class_names: Sequence[str],
    console: Console,
    *,
    weights: str | None,
    download: bool = True,
) -> tuple[keras.Model, Collection[str]]:
    """Build the network under the strategy that will run it, and load its initial weights.

    Args:
        config: The variant, `model`, the seed and the stages are used.
        runtime: Strategy, precision and compilation.
        class_names: K names, in the order of the outputs.
        console: Console for the report on the weights.
        weights: As `model.weights`; None leaves random values.
        download: Download published weights that are not on this machine yet.

    Returns:
        The network, float32 images (B, R, R, 3) in [0, 255] to float32 logits (B, K), and the names of the layers that
        the weights do not fit.

    Raises:
        WeightsNotDownloadedError: The weights are not on this machine, and `download` is False.
        UserError: The weights cannot be read, or no stage trains a layer that they do not fit.
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
                download=download,
            )
            console.print(f"weights: {report}", details=report.details())
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
