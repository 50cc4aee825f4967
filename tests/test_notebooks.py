"""The notebooks: that they run from the first cell to the last, and what is kept of them."""

import ast
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

PROJECT = Path(__file__).parents[1]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
KNOWN = {
    "pipeline",
    "keras",
    "tensorflow",
    "matplotlib",
    "numpy",
    "pandas",
    "PIL",
    "sklearn",
    "IPython",
} | sys.stdlib_module_names
PROMISED = "exits-with-"  # a cell's tag: the exit code of the program that it calls, where that is not 0


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")
    for cell in code_cells(notebook):
        assert (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_calls_the_project_and_well_known_libraries_only(path: Path) -> None:
    for cell in code_cells(read(path)):
        lines = [line for line in cell.source.splitlines() if not line.startswith("!")]
        for node in ast.walk(ast.parse("\n".join(lines))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= KNOWN


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    for name, value in {"PYTHONPATH": PROJECT, "TMPDIR": tmp_path / "home", "IPYTHONDIR": tmp_path / "ipython"}.items():
        monkeypatch.setenv(name, str(value))
    before = listing(PROJECT)
    notebook = read(path)
    for cell in code_cells(notebook):
        commands = [line for line in cell.source.splitlines() if line.startswith("!")]
        assert len(commands) <= 1, "of several, only the last one's exit code is known"
        if commands:
            [promised, *_] = [
                tag.removeprefix(PROMISED) for tag in cell.metadata.get("tags", []) if tag.startswith(PROMISED)
            ] + ["0"]
            cell.source += f"\nassert _exit_code == {promised}, _exit_code"
    NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    drawn = [
        output for cell in code_cells(notebook) for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert drawn
    assert listing(PROJECT) == before
    shutil.rmtree(tmp_path / "home")


def listing(folder: Path) -> list[str]:
    """What stands in a folder, and in its notebooks' and configs', but for what tools hide there."""
    parts = (folder, folder / "notebooks", folder / "configs")
    return sorted(entry.path for part in parts for entry in os.scandir(part) if not entry.name.startswith((".", "__")))
