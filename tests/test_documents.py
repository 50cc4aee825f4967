"""The README and the documentation: commands that exist, links that lead somewhere, references that are up to date."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from launching import LauncherProcess
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.__main__ import COMMANDS
from pipeline.config.loader import load_config
from pipeline.console import DEBUG

PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
PAGES = [*sorted(PROJECT.glob("*.md")), *sorted((PROJECT / "data").glob("*.md")), *sorted(DOCS.rglob("*.md"))]
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402

LINK = re.compile(r"\]\(([^)\s#]*)(#[^)\s]+)?\)")
SOURCE = re.compile(r'(?:src|srcset)="([^"]+)"')


def test_the_references_are_what_the_schema_and_the_parsers_say() -> None:
    outdated = [
        name for name, write in generate.REFERENCES.items() if (DOCS / "reference" / name).read_text() != write()
    ]
    assert not outdated, "run .venv/bin/python docs/generate.py and commit docs/reference"


def test_every_key_has_a_type_and_a_text() -> None:
    entries = re.split(r"^### ", generate.config_reference(), flags=re.MULTILINE)[1:]
    assert len(entries) > 60
    for entry in entries:
        key, kind, text = entry.split("\n\n")[:3]
        assert kind.startswith("*"), key
        assert len(text.strip()) > 5, f"{key} has no docstring in pipeline/config"


def test_every_command_has_its_section() -> None:
    assert re.findall(r"^## (.+)$", generate.command_reference(), re.MULTILINE) == list(COMMANDS)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    for target, anchor in [*LINK.findall(page.read_text()), *((each, "") for each in SOURCE.findall(page.read_text()))]:
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if DOCS in page.parents:
            assert path.is_relative_to(DOCS), f"{target} is not part of the site"
        if anchor and path.suffix == ".md":
            assert anchor[1:] in anchors(path), f"{target}{anchor}"


def test_every_page_of_the_documentation_is_in_the_navigation() -> None:
    def files(part: object) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from files(each)

    listed = list(files(yaml.safe_load((PROJECT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page that start this program, as lists of words from the command's name on.

    Those inside the quotes of another program, as ssh and srun have them, are left out. Words in brackets are optional.
    """
    for line in re.sub(r"\\\n\s*", "", page.read_text()).splitlines():
        if not line.startswith("    ") or ".venv/bin/python " not in line or "TF_CONFIG" in line:
            continue
        words = shlex.split(line, comments=True)
        for number, word in enumerate(words):
            ends = [at for at, each in enumerate(words) if at > number and each in ("|", ">")]
            rest = words[number + 1 : min(ends, default=len(words))]
            if word in ("train.py", "evaluate.py"):
                yield [word.removesuffix(".py"), *rest]
            elif word == "pipeline" and words[number - 1] == "-m":
                yield rest


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_documented_commands_are_accepted_by_their_parsers_and_their_configs_load(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG, "0")  # one of them sets it
    for command, *written in commands(page):
        words = [word for word in written if "=" in word or not (word.startswith("[") or word.endswith("]"))]
        parser = generate.parser_of(command)
        parser.error = lambda message, words=words: pytest.fail(f"{words}: {message}")  # type: ignore[method-assign]
        arguments: argparse.Namespace = parser.parse_intermixed_args(words)
        config = getattr(arguments, "config", None)
        if config is not None and config.exists():
            load_config(config, arguments.overrides)


def test_documented_commands_are_found() -> None:
    assert len([words for page in PAGES for words in commands(page)]) > 40


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path: Path, launcher_process: LauncherProcess) -> None:
    for name in ("configs", "train.py", "evaluate.py"):
        (tmp_path / name).symlink_to(PROJECT / name)
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label < 3 and number < 120:
            folder = tmp_path / "IMAGES" / ("zero", "one", "two")[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15.9).astype("uint8")).resize((64, 64)).save(folder / f"{number}.png")
    run = list(commands(PROJECT / "README.md"))
    assert [command for command, *_ in run] == ["check", "train", "predict", "evaluate"]
    for words in run:
        result = launcher_process.run(tmp_path, "-m", "pipeline", *words)
        assert result.code == 0, (words, result.stdout, result.stderr)
    labels = (tmp_path / "labels.csv").read_text().splitlines()
    assert len(labels) == 1 + len(list((tmp_path / "IMAGES").rglob("*.png")))
    [report] = tmp_path.glob("runs/folder/*/report/index.html")
    assert "accuracy" in report.read_text()


def test_the_site_builds_without_a_warning_and_asks_no_server(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(build, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for path in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="?(https?:[^" >]+)', path.read_text())
        assert not loaded, path
