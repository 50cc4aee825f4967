"""How many images a device takes: what auto settles on, and the error when memory runs out."""

import keras
import pytest
import tensorflow as tf

from pipeline.config.augment import AugmentConfig
from pipeline.config.schema import Config
from pipeline.distributed.devices import Runtime, setup_devices
from pipeline.errors import ConfigError, TrainingError
from pipeline.models.efficientnet import efficientnet
from pipeline.training import memory
from pipeline.training.memory import (
    BatchSize,
    check_batch,
    device_memory,
    largest_micro_batch,
    resolve_batch_size,
    step_memory,
    translate_oom_error,
)
from pipeline.training.resolve import resolve_batch

VARIANT = {"width": 0.25, "depth": 0.3, "resolution": 64}
MIB = 2**20


def config(**train: object) -> Config:
    return Config.model_validate(
        {"model": {"variant": VARIANT, "weights": None}, "data": {"source": "digits"}, "train": train}
    )


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return efficientnet(config().variant, num_classes=10)


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return setup_devices(config().runtime, config().seed)


def test_auto_takes_256_images_in_the_fewest_micro_batches_that_fit(monkeypatch, model, runtime):
    auto = config(global_batch_size="auto")
    seen = set()
    for mib in (100_000, 600, 200, 60):
        monkeypatch.setattr(memory, "device_memory", lambda mib=mib: mib * MIB)
        batch_size = resolve_batch_size(auto.train, auto.optimizer, runtime, model)
        fitting = largest_micro_batch(auto.optimizer, model, mib * MIB)
        assert batch_size.images == 256
        assert 256 // batch_size.accumulation <= fitting
        assert batch_size.accumulation == 1 or 512 // batch_size.accumulation > fitting, "twice as many would not fit"
        resolved, _ = resolve_batch(auto, runtime, model)
        assert Config.model_validate(resolved.model_dump(mode="json")) == resolved
        assert (resolved.train.global_batch_size, resolved.train.gradient_accumulation_steps) == batch_size
        seen.add(batch_size.accumulation)
    assert 1 in seen
    assert len(seen) > 1


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 6, 8, 300])
def test_what_auto_chooses_can_be_shared_and_mixed(monkeypatch, model, replicas):
    monkeypatch.setattr(Runtime, "replicas", replicas)
    runtime = Runtime(tf.distribute.get_strategy(), "float32", False)
    mixed = config(global_batch_size="auto").model_copy(update={"augment": AugmentConfig(mixup=0.2)})
    for fitting in (8, 42, 50, 1000):
        monkeypatch.setattr(memory, "largest_micro_batch", lambda *_, fitting=fitting: fitting)
        batch_size = resolve_batch_size(mixed.train, mixed.optimizer, runtime, model)
        share = batch_size.images // batch_size.accumulation // replicas
        assert batch_size.images == share * batch_size.accumulation * replicas
        assert 1 <= share <= fitting
        assert 128 <= batch_size.images <= max(384, replicas)
        if share >= 8:
            check_batch(batch_size, mixed.augment, runtime)


def test_a_resumed_run_stays_with_what_it_settled_on(monkeypatch, model, runtime):
    monkeypatch.setattr(memory, "device_memory", lambda: 1 * MIB)
    auto, before = config(global_batch_size="auto"), config(global_batch_size=256, gradient_accumulation_steps=4)
    batch_size = resolve_batch_size(auto.train, auto.optimizer, runtime, model, previous=before.train)
    assert batch_size == (256, 4)


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    whole = device_memory()
    for text, expected in (("1073741824\n", 2**30), ("max\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(memory, "CONTAINER_LIMITS", (tmp_path / "memory.max", tmp_path / "absent"))
        assert device_memory() == expected


def test_the_estimate_counts_what_fits_and_not_one_more(model):
    plain = config()
    for mib in (50, 500, 5_000):
        limit = memory.MEMORY_FRACTION * mib * MIB
        images = largest_micro_batch(plain.optimizer, model, mib * MIB)
        assert step_memory(plain.optimizer, model, images, accumulation=True) <= limit or images == 0
        assert step_memory(plain.optimizer, model, images + 1, accumulation=True) > limit


def test_a_number_stays_and_auto_does_not_share_with_accumulation(model, runtime):
    plain = config(global_batch_size=48)
    assert resolve_batch_size(plain.train, plain.optimizer, runtime, model) == (48, 1)
    with pytest.raises(ValueError, match="auto chooses gradient_accumulation_steps"):
        config(global_batch_size="auto", gradient_accumulation_steps=2)


def test_a_network_that_fits_in_no_way_is_refused(monkeypatch, model, runtime):
    monkeypatch.setattr(memory, "device_memory", lambda: 1 * MIB)
    with pytest.raises(
        ConfigError, match=r"efficientnet_.*0\.25.* at 64 px does not fit into 0\.0 GiB with a single image"
    ):
        resolve_batch(config(global_batch_size="auto"), runtime, model)


def test_out_of_memory_names_the_batch_the_variant_and_what_would_fit(monkeypatch, model, runtime):
    monkeypatch.setattr(memory, "device_memory", lambda: 100 * MIB)
    plain = config(global_batch_size=64)

    def out_of_memory() -> None:
        with translate_oom_error(BatchSize(64, 1), plain.optimizer, runtime, model):
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[64,16]\nmore")

    with pytest.raises(TrainingError) as caught:
        out_of_memory()
    fitting = largest_micro_batch(plain.optimizer, model, 100 * MIB)
    assert 0 < fitting < 64
    for words in (
        "64 images per device",
        "at 64 px",
        f"{fitting} are estimated to fit",
        "train.gradient_accumulation_steps",
        "OOM when allocating tensor",
    ):
        assert words in str(caught.value)


def test_without_a_gpu_the_machines_memory_counts():
    assert device_memory() > 2**30
