"""The rules that keep the project readable: imports point one way, modules stay small, libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
MODULES = sorted((PROJECT / "pipeline").rglob("*.py"))
LIGHT = {
    "address",
    "cluster",
    "errors",
    "scaling",
    "data_config",
    "runtime_config",
    "config",
    "config_file",
    "run_directory",
    "export_directory",
    "screen",
}
ALLOWED = {  # part -> the parts that it may import
    "errors": set(),
    "scaling": set(),
    "address": set(),
    "disk": set(),
    "cluster": {"address", "errors"},
    "augmentations": {"errors"},
    "data_config": {"augmentations"},
    "runtime_config": {"address", "data_config"},
    "config": {"data_config", "runtime_config", "scaling", "errors"},
    "config_file": {"config", "errors", "data_config"},
    "run_directory": {"config", "config_file", "errors"},
    "export_directory": {"errors", "run_directory"},
    "screen": {"errors"},
    "model": {"scaling", "config", "errors"},
    "data": {"scaling", "address", "config", "disk", "errors", "data_config"},
    "training": {"scaling", "cluster", "config", "disk", "errors", "model", "data", "run_directory", "screen"},
    "evaluation": {"scaling", "config", "errors", "model", "data", "data_config"},
    "assembly": {"config", "model", "screen", "training"},
    "bench": {"assembly", "config", "data", "screen", "stages", "training"},
    "keras_fit": {"model", "scaling"},
    "rival": {"bench", "data", "errors", "keras_fit", "GIVEN_ENVIRONMENT"},
    "champion": {"errors", "evaluation", "run_directory", "training"},
    "measure": {"config", "data", "evaluation", "run_directory"},
    "settle": {"config", "data", "run_directory", "runtime_config", "screen", "training"},
    "conclusion": {"champion", "errors", "evaluation", "measure", "model", "run_directory", "screen", "stages", "training"},
    "stages": {"config", "data", "errors", "evaluation", "screen", "training"},
    "preview": {"config", "data", "model", "screen", "training", "errors"},
    "__main__": {"screen"},  # the programs are imported once one is named
    "commands": {path.relative_to(PROJECT / "pipeline").with_suffix("").parts[0] for path in MODULES},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def part(path: Path) -> str:
    return path.relative_to(PROJECT / "pipeline").with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_imports_point_one_way(path):
    if part(path) == "__init__":
        return
    used = {name.split(".")[1] for name in imports(path) if name.startswith("pipeline.")}
    assert used <= ALLOWED[part(path)] | {part(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_modules_are_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 350


def test_only_tracking_its_store_and_the_registry_know_mlflow():
    users = [path.stem for path in MODULES if any(name.split(".")[0] == "mlflow" for name in imports(path))]
    assert users == ["mlflow_store", "registry", "tracking"]


def test_the_light_modules_load_no_heavy_library():
    heavy = ["tensorflow", "keras", "mlflow", "pandas", "albumentations", "sklearn", "matplotlib"]
    light = ", ".join(f"pipeline.{name}" for name in sorted(LIGHT))
    code = f"import sys, {light}, train, evaluate; print([module for module in {heavy} if module in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_unpickling_anywhere_but_in_the_restricted_reader():
    users = [
        path.stem for path in MODULES if any(name.split(".")[0] in ("pickle", "cloudpickle", "joblib", "dill") for name in imports(path))
    ]
    assert users == ["torch_file"]


def test_no_archive_is_unpacked_anywhere():
    """So none can write outside its folder."""
    assert not [path for path in MODULES if any(word in path.read_text() for word in ("extractall", "unpack_archive", "extract=True"))]


def test_every_command_that_opens_mlflow_binds_it_to_this_machine():
    commands = [
        line for path in PROJECT.glob("*.md") for line in path.read_text().splitlines() if "mlflow ui" in line or "mlflow server" in line
    ]
    assert commands
    assert all("--host 127.0.0.1" in line for line in commands)
