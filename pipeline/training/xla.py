"""The choice whether XLA compiles the steps of a run: it does where that saves more time than compiling takes.

`runtime.xla: auto` is resolved once, before the first step, and a resume keeps the choice: compiled steps round
differently, so a decision in the middle would make the result depend on the clock. On one GPU the choice follows an
estimate; where that is wrong, set true or false in the config.
"""

from dataclasses import replace

import keras

from pipeline.config.augment import AugmentConfig
from pipeline.config.schema import Config
from pipeline.config.train import StageConfig
from pipeline.console import format_duration
from pipeline.distributed.devices import Runtime
from pipeline.models.layers import disable_fused_layers
from pipeline.models.profile import profile_model
from pipeline.training.feature_cache import is_augmented
from pipeline.training.schedule import TrainSchedule

# Measured for B0 at 224 pixels in batches of 256, in bfloat16, on one H100 with 16 cores. Without XLA, only batch
# normalization was fused.
MULTIPLY_ADDS_PER_SECOND = 1_468 * 0.39e9  # without XLA
XLA_SPEEDUP = 7_446 / 1_468  # in images per second
COMPILE_SECONDS_PER_BLOCK = 180 / 16  # micro-batches are compiled one by one


def seconds_saved(steps: int, *, plain: float, compiled: float, compilation: float) -> float:
    """Return the seconds that compiling saves over a number of steps; below 0, compiling is not worth it.

    Args:
        steps: Number of steps.
        plain: Seconds of a step without XLA.
        compiled: Seconds of a step with XLA.
        compilation: Seconds of the compilation.
    """
    return steps * (plain - compiled) - compilation


def resolve_xla(
    config: Config,
    runtime: Runtime,
    model: keras.Model,
    schedule: TrainSchedule,
    *,
    previous: Config | None = None,
) -> tuple[Config, Runtime, str]:
    """Replace `runtime.xla: auto` by a decision.

    Args:
        config: The config, resolved but for XLA. It is returned unchanged if it says true or false.
        runtime: Devices and precision, from `setup_devices`.
        model: The network to train, in the dtype that it trains in. If XLA is to compile it, its fused layers are
            disabled, because XLA fuses them itself.
        schedule: Stages and steps of the run.
        previous: The resolved config of the run that is resumed, if any; its choice stays.

    Returns:
        The config and the runtime with the decision, and a sentence with the reason; empty if there was nothing to
        decide.
    """
    if config.runtime.xla != "auto":
        return config, runtime, ""
    jit_compile, reason = bool(runtime.jit_compile), ""
    if previous is not None and previous.runtime.xla != "auto":
        jit_compile = previous.runtime.xla
        if jit_compile != runtime.jit_compile:
            reason = f"XLA {'on' if jit_compile else 'off'}, as when the run was started"
    elif runtime.jit_compile is None:
        jit_compile, reason = _estimate(config, model, schedule)
    if jit_compile:
        disable_fused_layers(model)
    resolved = config.model_copy(update={"runtime": config.runtime.model_copy(update={"xla": jit_compile})})
    return resolved, replace(runtime, jit_compile=jit_compile), reason


def _estimate(config: Config, model: keras.Model, schedule: TrainSchedule) -> tuple[bool, str]:
    """Decide by an estimate over the steps that run the backbone; return the decision and its reason."""
    blocks = sum(isinstance(layer, keras.layers.DepthwiseConv2D) for layer in model.layers)
    plain = schedule.global_batch_size * profile_model(model).flops / MULTIPLY_ADDS_PER_SECOND
    compilation = COMPILE_SECONDS_PER_BLOCK * blocks * config.train.gradient_accumulation_steps
    steps = [stage.stop - stage.first for stage in schedule.stages if _runs_backbone(config.augment, stage.config)]
    if not sum(steps):
        return False, ""
    saved = sum(
        seconds_saved(count, plain=plain, compiled=plain / XLA_SPEEDUP, compilation=compilation) for count in steps
    )
    on, word, than = (True, "on", "more") if saved > 0 else (False, "off", "less")
    return on, (
        f"XLA {word}: over {sum(steps):,} steps it saves {format_duration(abs(saved))} {than} than compiling takes, "
        "by estimate"
    )


def _runs_backbone(augment: AugmentConfig, stage: StageConfig) -> bool:
    """Return True if the steps of a stage run the whole network, False if they start from cached features."""
    return stage.trainable != "head" or is_augmented(augment, stage)
