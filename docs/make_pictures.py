"""Make the pictures of the README and of the documentation from real runs: python docs/make_pictures.py [NAME ...].

NAME is scaling (the plots of the notebook compound_scaling), terminal (a training run on the digits) or report (the
page that the run writes). Without names, all are made. The run takes a few minutes on two cores; the report needs
Chromium. Each picture is written twice, for light and dark pages, into docs/images.
"""

import argparse
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
IMAGES = Path(__file__).resolve().parent / "images"
COMMAND = ["train.py", "--config", "configs/lite0_digits.yaml"]
COLUMNS = 110
NOTEBOOK_PLOTS = {  # files by the heading above the plot
    "Three ways to grow": "three_ways",
    "What each way costs": "cost_of_each_way",
    "Why all three at once": "same_cost_four_ways",
    "The rule": "rule",
    "The whole family": "family",
}
FIGURES = ("confusion_matrix.png", "reliability.png")
INK = {"light": "#24292f", "dark": "#d5d9e0"}
SERVER_FONTS = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)  # rich names fonts on a server
MAX_COLORS = 128


def scaling(folder: Path) -> None:
    """Run the notebook on compound scaling and save its plots as SVG."""
    del folder
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "efficientnet"  # the same plot gives the same file
    os.environ["PYTHONHASHSEED"] = "0"
    cells = json.loads((PROJECT / "notebooks/compound_scaling.ipynb").read_text())["cells"]
    scope: dict[str, object] = {}
    heading = ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^## (.+)$", source, re.MULTILINE) or [heading])[-1]
            continue
        exec(source, scope)
        for number in plt.get_fignums():
            figure = plt.figure(number)
            for shade, ink in INK.items():
                _set_ink(figure, ink)
                path = IMAGES / f"{NOTEBOOK_PLOTS[heading]}-{shade}.svg"
                figure.savefig(path, transparent=True, metadata={"Date": None})
            plt.close(figure)


def _set_ink(figure: object, ink: str) -> None:
    """Draw in `ink` what a figure draws in black or in the ink of the other shade."""
    from matplotlib.colors import to_hex

    known = {"#000000", "#262626", *INK.values()}
    for artist in figure.findobj():  # type: ignore[attr-defined]
        for name in ("color", "edgecolor", "facecolor", "markerfacecolor", "markeredgecolor"):
            read, write = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if read is None or write is None:
                continue
            try:
                if to_hex(read()) in known:
                    write(ink)
            except (TypeError, ValueError):
                continue  # several colors, or none
    for legend in figure.findobj(lambda artist: type(artist).__name__ == "Legend"):  # type: ignore[attr-defined]
        legend.get_frame().set_alpha(0)


def terminal(folder: Path) -> None:
    """Train on the digits in a terminal and save the output as SVG."""
    import io

    from rich.console import Console
    from rich.terminal_theme import DIMMED_MONOKAI, TerminalTheme
    from rich.text import Text

    light = TerminalTheme(
        (255, 255, 255),
        (36, 41, 47),
        [
            (36, 41, 47),
            (180, 30, 30),
            (20, 120, 50),
            (140, 90, 0),
            (20, 80, 190),
            (130, 50, 150),
            (0, 110, 120),
            (110, 119, 129),
        ],
    )
    transcript = train_digits(folder)
    form = SERVER_FONTS.sub("", _svg_format())
    for shade, theme in (("light", light), ("dark", DIMMED_MONOKAI)):
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
        console.print("$ make run", style="bold")
        console.print(Text.from_ansi(transcript), soft_wrap=False)
        svg = console.export_svg(title="make run", theme=theme, code_format=form, unique_id=f"terminal-{shade}")
        (IMAGES / f"terminal-{shade}.svg").write_text(svg)


def _svg_format() -> str:
    from rich._export_format import CONSOLE_SVG_FORMAT

    return CONSOLE_SVG_FORMAT.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")


def train_digits(folder: Path) -> str:
    """Train on the digits, once for all pictures, and return what the terminal received."""
    transcript = folder / "transcript.txt"
    if transcript.exists():
        return transcript.read_text()
    shutil.copytree(PROJECT / "configs", folder / "configs")
    environment = os.environ | {
        "PYTHONPATH": str(PROJECT),
        "COLUMNS": str(COLUMNS),
        "TERM": "xterm-256color",
        "TTY_INTERACTIVE": "0",  # colors, but no bars that are drawn over and over
    }
    chief, worker = pty.openpty()
    program = [sys.executable, str(PROJECT / COMMAND[0]), *COMMAND[1:]]
    process = subprocess.Popen(program, cwd=folder, env=environment, stdout=worker, stderr=worker)
    os.close(worker)
    received = b""
    while True:
        try:
            part = os.read(chief, 1 << 16)
        except OSError:  # Linux answers so when the program has closed its side
            break
        if not part:
            break
        received += part
    if process.wait():
        sys.exit(received.decode(errors="replace"))
    text = received.decode().replace("\r\n", "\n").replace(f"{folder}/", "").replace(sys.executable, ".venv/bin/python")
    transcript.write_text(text)
    return text


def report(folder: Path) -> None:
    """Save the upper part of the report of the run on the digits, as a browser shows it, and two of its figures."""
    train_digits(folder)
    [page] = folder.glob("runs/digits/*/report/index.html")
    for name in FIGURES:
        _save_small(page.parents[1] / "evaluation/test" / name, IMAGES / name)
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("the picture of the report needs Chromium: install the package chromium")
    for shade, scheme in (("light", 1), ("dark", 0)):
        path = IMAGES / f"report-{shade}.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,1100"]
        options += [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={path}"]
        subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True, timeout=120)
        _save_small(path, path)


def _save_small(source: Path, target: Path) -> None:
    """Save a picture with a palette, which takes a third of the bytes."""
    from PIL import Image

    with Image.open(source) as image:
        smaller = image.convert("RGB").quantize(MAX_COLORS)
    smaller.save(target, optimize=True)


PICTURES: dict[str, Callable[[Path], None]] = {"scaling": scaling, "terminal": terminal, "report": report}


def main() -> None:
    """Make the pictures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--folder", type=Path, help="folder of the run; one that holds a run already is used again")
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.names or PICTURES:
            PICTURES[name](folder)


if __name__ == "__main__":
    main()
