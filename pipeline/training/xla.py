"""The choice whether XLA compiles the steps of a run: where that saves more time than compiling takes.

`runtime.xla: auto` is resolved once, before the first step, and kept by a resume: compiled steps round differently, so
a decision in the middle would make the result depend on the clock. On one GPU it goes by an estimate; where that is
wrong, the config says true or false.
"""

from collections.abc import Sequence
from dataclasses import replace

import keras

from pipeline.config.schema import Config
from pipeline.config.train import StageConfig
from pipeline.distributed.devices import Runtime
from pipeline.models.layers import disable_fused_layers
from pipeline.models.profile import profile_model
from pipeline.training.feature_cache import is_augmented
from pipeline.training.progress import duration
from pipeline.training.schedule import TrainStage

# Estimates are scaled from B0 at 224 pixels in batches of 256, in bfloat16, on one H100 with 16 cores; without XLA,
# batch normalisation alone was fused.
MULTIPLY_ADDS_PER_SECOND = 1_468 * 0.39e9  # without XLA
XLA_SPEEDUP = 7_446 / 1_468  # of XLA, in images per second
COMPILE_SECONDS_PER_BLOCK = 180 / 16  # of compilation; micro-batches are compiled one by one


def seconds_saved(steps: int, *, plain: float, compiled: float, compilation: float) -> float:
    """What compiling gains over so many steps of `plain` or `compiled` seconds.

    Above 0 it is worth the seconds of `compilation`.
    """
    return steps * (plain - compiled) - compilation


def resolve_xla(
    config: Config,
    runtime: Runtime,
    model: keras.Model,
    stages: Sequence[TrainStage],
    *,
    previous: Config | None = None,
) -> tuple[Config, Runtime, str]:
    """Replace `runtime.xla: auto` by a decision. Where that is to compile, `model` leaves to XLA what it else fuses itself.

    Args:
        config: Of the run, all else being settled. Comes back as it is where it says true or false.
        runtime: Of the run, by `set_up`.
        model: What is to be trained, in the dtype that it trains in.
        stages: Of the whole run.
        before: What a run that is resumed had settled on; it stays with that.

    Returns:
        A config and a runtime that say so, and a sentence with the reason; empty where there was nothing to weigh.
    """
    if config.runtime.xla != "auto":
        return config, runtime, ""
    chosen, reason = bool(runtime.jit_compile), ""
    if previous is not None and previous.runtime.xla != "auto":
        chosen = previous.runtime.xla
        reason = f"XLA {'on' if chosen else 'off'}, as the run began" if chosen != runtime.jit_compile else ""
    elif runtime.jit_compile is None:
        chosen, reason = _weigh(config, runtime, model, stages)
    if chosen:
        disable_fused_layers(model)
    settled = config.model_copy(update={"runtime": config.runtime.model_copy(update={"xla": chosen})})
    return settled, replace(runtime, jit_compile=chosen), reason


def _weigh(config: Config, runtime: Runtime, model: keras.Model, stages: Sequence[TrainStage]) -> tuple[bool, str]:
    """Weigh XLA over the steps that go through the backbone, and say why."""
    blocks = sum(isinstance(layer, keras.layers.DepthwiseConv2D) for layer in model.layers)
    plain = config.train.batch_size * profile_model(model).flops / MULTIPLY_ADDS_PER_SECOND
    compilation = COMPILE_SECONDS_PER_BLOCK * blocks * config.train.gradient_accumulation_steps
    steps = [stage.stop - stage.first for stage in stages if _runs_backbone(config, stage.config)]
    if not sum(steps):
        return False, ""
    saved = sum(
        seconds_saved(count, plain=plain, compiled=plain / XLA_SPEEDUP, compilation=compilation) for count in steps
    )
    on, word, than = (True, "on", "more") if saved > 0 else (False, "off", "less")
    return on, (
        f"XLA {word}: over {sum(steps):,} steps it saves {duration(abs(saved))} {than} than compiling takes, by estimate"
    )


def _runs_backbone(config: Config, stage: StageConfig) -> bool:
    """Return whether the steps of a stage go through the whole network, rather than start from cached features."""
    return stage.trainable != "head" or is_augmented(config, stage)
