"""Whether XLA compiles the steps of a run: where that saves more time than it takes.

`runtime.xla: auto` is settled once, in front of the first step, and kept by a resume: compiled steps round otherwise, so that a decision in
the middle would let the result depend on the clock. On one GPU it goes by what such steps took there before (`step_times`); what no run has
measured yet is estimated.
"""

from collections.abc import Sequence
from dataclasses import replace

import keras

from pipeline.config.schema import Config
from pipeline.distributed.devices import Runtime
from pipeline.models.layers import disable_fused_layers
from pipeline.models.profile import profile_model
from pipeline.training import step_times
from pipeline.training.progress import duration
from pipeline.training.trainer import TrainStage

# Estimates are scaled from B0 at 224 pixels in batches of 256, in bfloat16, on one H100 with 16 cores; without XLA, batch normalisation
# alone was fused.
MULTIPLY_ADDS_PER_SECOND = 1_468 * 0.39e9  # without XLA
GAIN = 7_446 / 1_468  # of XLA, in images per second
SECONDS_PER_BLOCK = 180 / 16  # of compilation; micro-batches are compiled one by one


def seconds_saved(steps: int, *, plain: float, compiled: float, compilation: float) -> float:
    """What compiling gains over so many steps of `plain` or `compiled` seconds; above 0 it is worth the seconds of `compilation`."""
    return steps * (plain - compiled) - compilation


def resolve_xla(
    config: Config, runtime: Runtime, model: keras.Model, stages: Sequence[TrainStage], *, before: Config | None = None
) -> tuple[Config, Runtime, str]:
    """Replaces `runtime.xla: auto` by a decision. Where that is to compile, `model` leaves to XLA what it else fuses itself.

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
    if before is not None and before.runtime.xla != "auto":
        chosen = before.runtime.xla
        reason = f"XLA {'on' if chosen else 'off'}, as the run began" if chosen != runtime.jit_compile else ""
    elif runtime.jit_compile is None:
        chosen, reason = _weigh(config, runtime, model, stages)
    if chosen:
        disable_fused_layers(model)
    settled = config.model_copy(update={"runtime": config.runtime.model_copy(update={"xla": chosen})})
    return settled, replace(runtime, jit_compile=chosen), reason


def _weigh(config: Config, runtime: Runtime, model: keras.Model, stages: Sequence[TrainStage]) -> tuple[bool, str]:
    """The decision over the steps that go through the backbone, and its reason."""
    blocks = sum(isinstance(layer, keras.layers.DepthwiseConv2D) for layer in model.layers)
    guess = config.train.batch_size * profile_model(model).flops / MULTIPLY_ADDS_PER_SECOND
    noted, total, saved, measured = step_times.noted(), 0, 0.0, True
    for stage in stages:
        if not step_times.runs_the_backbone(config, stage.config):
            continue
        seconds, steps = noted.get(step_times.key(config, runtime, stage.config), {}), stage.stop - stage.first
        plain = seconds.get("plain step") or (seconds["XLA step"] * GAIN if "XLA step" in seconds else guess)
        compiled = seconds.get("XLA step", plain / GAIN)
        compilation = SECONDS_PER_BLOCK * blocks * config.train.gradient_accumulation_steps
        if "XLA first" in seconds:
            compilation = seconds["XLA first"] - seconds.get("plain first", 0.0)
        saved += seconds_saved(steps, plain=plain, compiled=compiled, compilation=compilation)
        total, measured = total + steps, measured and {"plain step", "XLA step"} <= seconds.keys()
    if not total:
        return False, ""
    on, word, than = (True, "on", "more") if saved > 0 else (False, "off", "less")
    basis = "measured on this machine" if measured else "estimated, as not all of it was measured on this machine yet"
    return on, f"XLA {word}: over {total:,} steps it saves {duration(abs(saved))} {than} than compiling takes ({basis})"
