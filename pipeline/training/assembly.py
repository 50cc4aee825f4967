"""What a run trains, put together: the network with the weights that it starts from, and the state around it."""

from collections.abc import Collection, Sequence

import keras

from pipeline.config.schema import Config
from pipeline.console import Console
from pipeline.distributed.devices import Runtime
from pipeline.models.efficientnet import efficientnet
from pipeline.models.layers import layer_types
from pipeline.models.weights.pretrained import load_pretrained
from pipeline.training.optimizers import ModelEMA, build_optimizer
from pipeline.training.schedule import check_new_layers
from pipeline.training.state import MetricAccumulator, TrainState


def create_model(
    config: Config, runtime: Runtime, class_names: Sequence[str], console: Console, *, weights: str | None
) -> tuple[keras.Model, Collection[str]]:
    """Build the network under the strategy that will run it.

    Args:
        config: Variant, drop_path_rate, seed and what belongs to the weights are taken from it.
        runtime: Strategy, precision and compilation.
        class_names: K names, in the order of the outputs.
        screen: Told what the weights gave.
        weights: As `model.weights`; None leaves random values.

    Returns:
        The network, float32 images (B, R, R, 3) in [0, 255] to float32 logits (B, K), and the layers that the weights
        do not fit, by name.

    Raises:
        UserError: The weights cannot be read, or no stage trains a layer that they do not fit.
    """
    new: Collection[str] = ()
    with runtime.strategy.scope():
        model = efficientnet(
            config.variant,
            num_classes=len(class_names),
            drop_path_rate=config.model.drop_path_rate,
            batch_norm_momentum=config.model.batch_norm_momentum,
            synchronized=runtime.sync_batch_norm,
            layer_types=layer_types(jit_compile=bool(runtime.jit_compile), sync_batch_norm=runtime.sync_batch_norm),
            dtype=runtime.dtype,
            seed=config.seed,
        )
        if weights is not None:
            report = load_pretrained(
                model, weights, variant=config.variant, class_names=class_names, class_map=config.model.class_map
            )
            console.print(f"weights: {report}", details=report.details())
            if config.recipe is None:  # which sees to that by itself
                check_new_layers(model, report.new, config.train.stages)
            new = report.new
    return model, new


def create_train_state(config: Config, runtime: Runtime, model: keras.Model) -> TrainState:
    """The network with the optimizer's slots, its moving average and the sums of the metrics."""
    with runtime.strategy.scope():
        average = (
            ModelEMA(model.weights, config.optimizer.ema_decay) if config.optimizer.ema_decay is not None else None
        )
        return TrainState(
            model, build_optimizer(config.optimizer, model.trainable_variables), average, MetricAccumulator()
        )
