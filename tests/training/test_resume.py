"""A resumed run agrees with its checkpoint, apart from allowed changes."""

import json

import pytest

from pipeline.config.schema import Config
from pipeline.errors import RunError
from pipeline.training.checkpoint import METADATA
from pipeline.training.resume import check_compatible


def test_limits_of_exports_are_no_part_of_a_run(tmp_path):
    config = Config.model_validate({"data": {"source": "digits"}}).model_dump(mode="json")
    before_there_were_any = {key: value for key, value in config.items() if key != "export"}
    (tmp_path / METADATA).write_text(json.dumps({"step": 3, "identity": {"config": before_there_were_any}}))
    for export in (config["export"], {"min_agreement": 0.5}):
        assert check_compatible(tmp_path, {"config": {**before_there_were_any, "export": export}}) == []


def test_a_changed_key_is_refused_by_name_unless_it_is_allowed(tmp_path):
    def identity(seed: int, keep: int, path: str, classes: list[str]) -> dict:
        config = {"seed": seed, "train": {"max_checkpoints": keep}, "data": {"name": path, "path": f"/{path}"}}
        return {"config": config, "classes": classes, "data": "abc", "replicas": 1}

    written = tmp_path / "step-00000003"
    written.mkdir()
    (written / METADATA).write_text(json.dumps({"step": 3, "identity": identity(1, 2, "a", ["x", "y"])}))
    assert check_compatible(written, identity(1, 3, "a", ["x", "y"])) == [], "what changes no step is free"
    changed = identity(2, 2, "b", ["x", "z"])
    with pytest.raises(RunError) as caught:
        check_compatible(written, changed, ["seed"])
    assert "  classes: was ['x', 'y'], is ['x', 'z']\n  data.name: was 'a', is 'b'\n" in str(caught.value)
    assert "seed: was" not in str(caught.value)
    assert "by --allow-change classes --allow-change data.name" in str(caught.value)
    with pytest.raises(RunError, match=r"data:\n    a/3\.png: is gone\n.*--allow-change data$"):
        check_compatible(
            written, identity(1, 2, "a", ["x", "y"]) | {"data": "def"}, details={"data": "  a/3.png: is gone"}
        )
    allowed = check_compatible(written, changed, ["seed", "data", "classes"])
    assert [(one["step"], one["key"], one["was"], one["is"]) for one in allowed] == [
        (3, "classes", ["x", "y"], ["x", "z"]),
        (3, "data.name", "a", "b"),
        (3, "seed", 1, 2),
    ]
    with pytest.raises(RunError, match="--allow-change sed: there is no such key; did you mean 'seed'"):
        check_compatible(written, changed, ["sed"])
