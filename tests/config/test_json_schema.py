"""The JSON schema of the config, by which editors complete and check it."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config.json_schema import config_schema
from pipeline.config.loader import load_config
from pipeline.config.shipped import shipped_configs

CONFIGS = Path(__file__).parents[2] / "configs"
VALIDATOR = jsonschema.Draft202012Validator(json.loads(config_schema()))


def problems(config: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(config)]


def test_the_file_is_what_the_command_writes() -> None:
    assert (CONFIGS / "config.schema.json").read_text(encoding="utf-8") == config_schema(), (
        "run python -m pipeline schema --out configs/config.schema.json"
    )
    VALIDATOR.check_schema(VALIDATOR.schema)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_accepted_as_written_and_as_resolved(path: Path) -> None:
    assert problems(yaml.safe_load(path.read_text())) == []
    assert problems(yaml.safe_load(load_config(path).to_yaml())) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("trian: {}", "$"),
        ("train: {global_batch_size: many}", "$.train.global_batch_size"),
        ("train: {stages: [{epoch: 3}]}", "$.train.stages[0]"),
        ("model: {variant: b99}", "$.model.variant"),
        ("data: {resize: stretch}", "$.data.resize"),
    ],
)
def test_mistakes_are_found_at_their_place(text: str, place: str) -> None:
    [problem] = problems(yaml.safe_load(text))
    assert problem.partition(":")[0] == place


@pytest.mark.parametrize(
    "text",
    [
        "{extends: base.yaml, train: {epochs: 3}}",
        "data: {source: folder, path: 2024}",
        "train: {on_nan: {skip: 3}, class_weights: {rare: 5}}",
        "augment: {transforms: [HorizontalFlip, {RandomResizedCrop: {scale: [0.5, 1.0]}}]}",
    ],
)
def test_what_the_loader_accepts_is_accepted(text: str) -> None:
    assert problems(yaml.safe_load(text)) == []


def test_keys_have_the_descriptions_of_the_sections() -> None:
    sections = VALIDATOR.schema["$defs"]
    assert sections["TrainConfig"]["properties"]["global_batch_size"]["description"].startswith("Images per step")
    assert sections["DataConfig"]["properties"]["on_leak"]["description"]


def test_a_shipped_config_is_known_by_its_name() -> None:
    assert {name: path.resolve() for name, path in shipped_configs().items()} == {
        path.stem: path for path in CONFIGS.glob("*.yaml")
    }
