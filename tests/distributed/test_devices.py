"""What the machine has, and what TensorFlow can use of it."""

from pathlib import Path

import pytest
import tensorflow as tf

from pipeline.distributed.devices import unusable_gpu


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a driver with two GPUs, on a machine that hides none of them."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for gpu in ("0000:17:00.0", "0000:65:00.0"):
        (tmp_path / "gpus" / gpu).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(("with_cuda", "remedy"), [(True, "make setup GPU=1"), (False, "in place of tensorflow-cpu")])
def test_a_gpu_that_tensorflow_cannot_use_is_named_with_the_remedy(
    driver: Path, with_cuda: bool, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: with_cuda)
    sentence = unusable_gpu(driver)
    assert sentence is not None
    assert sentence.startswith("this machine has 2 NVIDIA GPUs, but TensorFlow")
    assert remedy in sentence


def test_a_machine_without_a_gpu_is_not_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert unusable_gpu(tmp_path / "absent") is None


def test_a_gpu_that_is_hidden_on_purpose_is_not_warned_of(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert unusable_gpu(driver) is None


def test_a_gpu_that_is_used_is_not_warned_of(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [object()])
    assert unusable_gpu(driver) is None
