"""The network of a run: its weights decide padding and normalization once, and the config of the run keeps them."""

from dataclasses import replace
from pathlib import Path

import pytest
import tensorflow as tf
from fake_console import FakeConsole

from pipeline.cli.loaded_model import load_pretrained_model
from pipeline.config.data import DataConfig
from pipeline.config.loader import load_config
from pipeline.config.model import ModelConfig, MultipliersConfig
from pipeline.config.schema import Config
from pipeline.distributed.devices import Runtime
from pipeline.errors import ConfigError, WeightsError
from pipeline.files import atomic_write
from pipeline.models.efficientnet import efficientnet
from pipeline.models.variants import NORMALIZATIONS
from pipeline.runs.run_directory import RunDirectory
from pipeline.training.resolve import resolve_network
from pipeline.training.setup import read_initial_weights

TINY = MultipliersConfig(width=0.25, depth=0.1, resolution=32)


def config_of(**model: object) -> Config:
    return Config(model=ModelConfig(variant=TINY, **model), data=DataConfig(source="digits"))


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(tf.distribute.get_strategy(), "float32", None)


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a run with weights of PyTorch leaves it."""
    path = tmp_path_factory.mktemp("weights") / "model.keras"
    efficientnet(config_of(weights=None, padding="symmetric", normalization="inception").variant).save(path)
    return path


def test_the_weights_decide_padding_and_normalization_and_the_config_keeps_them(
    symmetric: Path, runtime: Runtime, tmp_path: Path
) -> None:
    config, run = config_of(weights=str(symmetric)), RunDirectory(tmp_path)
    weights = read_initial_weights(config, ["a"], FakeConsole())
    resolved = resolve_network(config, weights, run, runtime, resume=False)
    assert (resolved.model.padding, resolved.model.normalization) == ("symmetric", "inception")
    assert resolved.variant.normalization == NORMALIZATIONS["inception"]

    atomic_write(run.config, resolved.to_yaml())
    resumed = resolve_network(config, None, run, runtime, resume=True)  # without the file
    assert resumed.model == resolved.model
    assert load_config(run.config) == resolved


def test_what_the_config_says_is_kept(symmetric: Path, runtime: Runtime, tmp_path: Path) -> None:
    config = config_of(weights=str(symmetric), padding="same", normalization={"mean": [1, 2, 3], "std": [4, 5, 6]})
    weights = read_initial_weights(config, ["a"], FakeConsole())
    assert resolve_network(config, weights, RunDirectory(tmp_path), runtime, resume=False) == config
    assert config.variant.normalization.scale == (1 / 4, 1 / 5, 1 / 6)
    assert config.variant.normalization.offset == (-1 / 4, -2 / 5, -3 / 6)


def test_without_weights_padding_and_normalization_are_the_familys(runtime: Runtime, tmp_path: Path) -> None:
    resolved = resolve_network(config_of(weights=None), None, RunDirectory(tmp_path), runtime, resume=False)
    assert (resolved.model.padding, resolved.model.normalization) == ("same", "imagenet")


def test_keys_that_describe_weights_need_some() -> None:
    with pytest.raises(ValueError, match="weights_from and weights_classes describe the weights"):
        config_of(weights=None, weights_from="timm")


def test_an_unknown_make_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {source: digits}\nmodel: {weights: x.pth, weights_from: tim}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:2: model\.weights_from: .*timm"):
        load_config(path)


def test_evaluation_refuses_weights_of_an_uncertain_make(monkeypatch: pytest.MonkeyPatch, symmetric: Path) -> None:
    from pipeline.models.weights import sources

    source = sources.read_pretrained(str(symmetric), config_of(weights=None).variant)
    uncertain = source._replace(conventions=replace(source.conventions, candidates=("timm", "timm-native")))
    monkeypatch.setattr(sources, "read_pretrained", lambda *_, **__: uncertain)
    with pytest.raises(WeightsError, match=r"timm, timm-native, which pad .*name one of them by --weights-from"):
        load_pretrained_model("best.pt", "b0", None, FakeConsole())
    warned = FakeConsole()
    monkeypatch.setattr("pipeline.training.setup.read_pretrained", lambda *_, **__: uncertain)
    read_initial_weights(config_of(weights="best.pt"), ["a"], warned)
    assert "taken for keras" in str(warned.__dict__)
    assert "model.weights_from" in str(warned.__dict__)
