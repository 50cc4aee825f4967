"""XLA is worth its compilation or not, by estimate."""

import re
from functools import cache

import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import Config
from pipeline.distributed.devices import Runtime, setup_devices
from pipeline.models.efficientnet import efficientnet
from pipeline.models.layers import FusedBatchNormalization, layer_types
from pipeline.training.schedule import build_schedule
from pipeline.training.xla import resolve_xla, seconds_saved

SECONDS = st.floats(1e-4, 1e4)
WHOLE, HEAD = {"trainable": "all"}, {"trainable": "head", "use_augmentation": False}


@given(st.integers(0, 10**7), SECONDS, SECONDS, SECONDS, st.integers(0, 10**7))
def test_a_longer_run_never_makes_compiling_less_worth_while(
    steps: int, plain: float, compiled: float, compilation: float, more: int
):
    faster, slower = sorted((plain, compiled))
    times = {"plain": slower, "compiled": faster, "compilation": compilation}
    assert seconds_saved(steps + more, **times) >= seconds_saved(steps, **times)
    assert seconds_saved(steps, plain=faster, compiled=slower, compilation=compilation) < 0, (
        "what gains nothing is never worth it"
    )


@given(st.integers(1, 10**7), SECONDS, st.floats(1.01, 100), SECONDS)
def test_compiling_is_worth_it_where_the_shorter_run_is_shorter_with_the_compilation(steps, plain, gain, compilation):
    saved = seconds_saved(steps, plain=plain, compiled=plain / gain, compilation=compilation)
    assert saved == pytest.approx(
        steps * plain - (compilation + steps * plain / gain), rel=1e-6, abs=1e-6 * (compilation + steps * plain)
    )


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU."""
    monkeypatch.setattr(Runtime, "on_one_gpu", True)


def config(*stages: dict, xla: bool | str = "auto", **train: int) -> Config:
    return Config.model_validate(
        {
            "model": {"variant": {"width": 0.25, "depth": 0.3, "resolution": 32}, "weights": "a run"},
            "data": {"source": "digits"},
            "train": {"stages": [{"epochs": 1, **stage} for stage in stages or (WHOLE,)], **train},
            "runtime": {"xla": xla},
        }
    )


def network(*, jit_compile: bool = False) -> keras.Model:
    return efficientnet(
        config().variant,
        num_classes=3,
        layer_types=layer_types(jit_compile=jit_compile, sync_batch_norm=False),
    )


shared_network = cache(network)  # for estimates, which do not ask whether its fused layers are disabled


def settle(wanted: Config, steps: int, before: Config | None = None) -> tuple[bool | str, str]:
    runtime = setup_devices(wanted.runtime, wanted.seed)
    settled, decided, reason = resolve_xla(
        wanted,
        runtime,
        shared_network(jit_compile=bool(runtime.jit_compile)),
        build_schedule(wanted.train.stages, wanted.optimizer, global_batch_size=32, steps_per_epoch=steps),
        previous=before,
    )
    assert settled.runtime.xla == decided.jit_compile
    assert Config.model_validate(settled.model_dump(mode="json")) == settled
    return settled.runtime.xla, reason


@pytest.mark.usefixtures("one_gpu")
def test_a_long_run_on_one_gpu_is_compiled_and_a_short_one_is_not() -> None:
    chosen, reason = settle(config(), 10)
    assert not chosen
    assert re.fullmatch(r"XLA off: over 10 steps it saves \d min \d\d s less than compiling takes, by estimate", reason)
    chosen, reason = settle(config(), 10**8)
    assert chosen
    assert reason.startswith("XLA on: over 100,000,000 steps it saves ")


@pytest.mark.usefixtures("one_gpu")
def test_stages_are_compiled_one_by_one_and_those_on_cached_features_do_not_count() -> None:
    low, high = 10, 10**8  # steps at which one stage is not worth its compilation, and is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settle(config(), middle)[0] else (middle, high)
    assert not settle(config(HEAD, WHOLE), low)[0]
    assert settle(config(HEAD, WHOLE), high)[0]
    assert settle(config(WHOLE, WHOLE), high)[0]
    assert not settle(config(WHOLE, WHOLE), low)[0]
    assert settle(config(HEAD), 10**9) == (False, "")


@pytest.mark.usefixtures("one_gpu")
def test_a_resume_keeps_to_the_choice_whatever_the_estimate_says() -> None:
    assert settle(config(), 10, before=config(xla=True)) == (True, "XLA on, as when the run was started")
    assert settle(config(), 10**8, before=config(xla=False)) == (False, "XLA off, as when the run was started")


def test_a_resume_on_a_cpu_keeps_to_the_gpus_choice() -> None:
    assert settle(config(), 10, before=config(xla=True)) == (True, "XLA on, as when the run was started")
    assert settle(config(), 10, before=config(xla=False)) == (False, "")


def test_on_the_cpu_there_is_nothing_to_weigh() -> None:
    assert settle(config(), 10**9) == (False, "")


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("given", [True, False])
def test_what_the_config_says_is_done(given: bool) -> None:
    assert settle(config(xla=given), 10**9) == (given, "")


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("steps", [10, 10**8])
def test_batch_normalisation_is_left_to_xla_where_it_compiles(steps: int) -> None:
    runtime = setup_devices(config().runtime, config().seed)
    model = network(jit_compile=bool(runtime.jit_compile))
    schedule = build_schedule(config().train.stages, config().optimizer, global_batch_size=32, steps_per_epoch=steps)
    _, decided, _ = resolve_xla(config(), runtime, model, schedule)
    fused = {layer.fused for layer in model.layers if isinstance(layer, FusedBatchNormalization)}
    assert fused == {not decided.jit_compile}
