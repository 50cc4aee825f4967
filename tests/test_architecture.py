"""The rules that keep the project readable.

Imports point one way, modules stay small, libraries stay where they belong.
"""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PROJECT = Path(__file__).parents[1]
MODULES = sorted((PROJECT / "pipeline").rglob("*.py"))
LIGHT = {
    "config.address",
    "distributed.cluster",
    "errors",
    "models.variants",
    "config.data",
    "config.runtime",
    "config.schema",
    "config.loader",
    "runs.run_directory",
    "export.directory",
    "console",
    "cli.train",
    "cli.evaluate",
}
ROOMS = (  # imports point up this list: a module may import from its own room and from those above it
    "errors",
    "console",
    "files",
    "tasks",
    "models",
    "config",
    "runs",
    "distributed",
    "data",
    "evaluation",
    "training",
    "tracking",
    "export",
    "benchmark",
    "cli",
    "__main__",
)


PRIVATE_WORDS = {  # that this project once used where the field has a term, with the term
    "beside": "extra_files",
    "contend": "register_and_promote",
    "crowned": "promoted",
    "hook": "callback",
    "judge": "summarize",
    "keeper": "checkpoint callback",
    "lost": "missing",
    "passes": "epochs",
    "photo": "image",
    "photos": "images",
    "picture": "image",
    "place": "position",
    "remarks": "comments",
    "said": "output",
    "screen": "console",
    "settle": "resolve",
    "spent": "seconds",
    "told": "received",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def module_graph() -> dict[str, set[str]]:
    """The modules that each module imports, lazily and for typing included."""
    names = {module_name(path): path for path in MODULES}
    return {name: {used for used in imports(path) if used in names and used != name} for name, path in names.items()}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def room(name: str) -> str:
    return name.split(".")[1]


def test_nothing_lies_loose_at_the_root() -> None:
    loose = {path.stem for path in (PROJECT / "pipeline").glob("*.py")}
    assert loose <= {"__init__", "__main__", "errors", "console", "files", "tasks"}


def test_every_room_is_listed() -> None:
    assert {room(name) for name in module_graph() if name != "pipeline"} <= set(ROOMS)


def test_imports_go_down_the_list_of_rooms() -> None:
    upward = [
        f"{name} imports {used}"
        for name, uses in module_graph().items()
        for used in uses
        if "pipeline" not in (name, used) and ROOMS.index(room(used)) > ROOMS.index(room(name))
    ]
    assert not upward


def test_the_module_graph_has_no_circle_and_is_shallow() -> None:
    graph = module_graph()
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    depth: dict[str, int] = {}
    for name in order:
        depth[name] = 1 + max((depth[used] for used in graph[name]), default=0)
    assert max(depth.values()) <= 12, max(depth, key=depth.__getitem__)


def test_only_tracking_its_store_and_the_registry_know_mlflow():
    users = [path.stem for path in MODULES if any(name.split(".")[0] == "mlflow" for name in imports(path))]
    assert users == ["mlflow_logger", "mlflow_store", "model_registry"]


def test_the_light_modules_load_no_heavy_library():
    heavy = ["tensorflow", "keras", "mlflow", "pandas", "albumentations", "sklearn", "matplotlib"]
    light = ", ".join(f"pipeline.{name}" for name in sorted(LIGHT))
    code = f"import sys, {light}; print([module for module in {heavy} if module in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_no_unpickling_anywhere_but_in_the_restricted_reader():
    users = [
        path.stem
        for path in MODULES
        if any(name.split(".")[0] in ("pickle", "cloudpickle", "joblib", "dill") for name in imports(path))
    ]
    assert users == ["torch_checkpoint"]


def test_no_archive_is_unpacked_anywhere():
    """So none can write outside its folder."""
    assert not [
        path
        for path in MODULES
        if any(word in path.read_text() for word in ("extractall", "unpack_archive", "extract=True"))
    ]


def test_every_command_that_opens_mlflow_binds_it_to_this_machine():
    commands = [
        line
        for path in (*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md"))
        for line in path.read_text().splitlines()
        if "mlflow ui" in line or "mlflow server" in line
    ]
    assert commands
    assert all("--host 127.0.0.1" in line for line in commands)


def identifiers(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def test_names_are_the_terms_of_the_field() -> None:
    private = [
        f"{module_name(path)}: {name}: {word}; say {PRIVATE_WORDS[word]}"
        for path in MODULES
        for name in identifiers(path)
        for word in re.split("_+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())
        if word in PRIVATE_WORDS
    ]
    assert not private, "\n".join(private)


def test_no_function_is_longer_than_90_lines_and_none_of_the_training_command_than_60() -> None:
    longest = {"train": 60, "training_steps": 60}
    long = [
        f"{module_name(path)}.{node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= longest.get(path.stem, 90)
    ]
    assert not long
