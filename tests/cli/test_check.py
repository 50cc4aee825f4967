"""python -m pipeline check as a user runs it."""

import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_console import FakeConsole
from launching import LauncherProcess
from PIL import Image

from pipeline.cli import check
from pipeline.errors import UserError

PROJECT = Path(__file__).parents[2]


def image(seed: int) -> bytes:
    coarse, file = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config of two classes of ten images each."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "photos" / name / f"{number}.png").write_bytes(image(100 * label + number))
    (tmp_path / "config.yaml").write_text(f"data: {{source: folder, path: {tmp_path / 'photos'}}}\n")
    return tmp_path / "config.yaml"


def run(config: Path, *words: str) -> tuple[int, str]:
    console = FakeConsole()
    return check.main(console, ["--config", str(config), *words]), console.output


def test_usable_data_end_with_0_and_a_verdict(config: Path) -> None:
    code, output = run(config)
    assert code == 0
    assert "20 usable images" in output
    assert "20 PNG" in output
    assert output.rstrip().endswith("usable")
    assert [line.split() for line in output.splitlines() if line.strip().startswith("cat")] == [["cat", "7", "1", "2"]]


def test_bad_files_end_with_2_unless_they_are_skipped(config: Path) -> None:
    (config.parent / "photos/cat/cut.png").write_bytes(image(7)[:-60])
    code, output = run(config)
    assert code == 2
    assert "cat/cut.png: is a damaged PNG" in output
    assert "not usable: 1 of 21 images cannot be used" in output
    code, output = run(config, "data.on_bad_image=skip")
    assert code == 0
    assert "1 of 21 images cannot be used and are skipped: cat/cut.png: is a damaged PNG" in output


def test_leakage_ends_with_2_unless_it_is_accepted(config: Path) -> None:
    photos = config.parent / "photos"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (photos / split / name).mkdir(parents=True)
    for path in list(photos.glob("*/*.png")):
        path.rename(photos / ("test" if path.stem == "0" else "train") / path.relative_to(photos))
    for name in ("cat", "dog"):
        (photos / name).rmdir()
    (photos / "test/cat/again.png").write_bytes(image(3))
    code, output = run(config)
    assert code == 2
    assert "test/cat/again.png (test) = train/cat/3.png (train)" in output
    assert run(config, "data.on_leak=warn")[0] == 0
    assert "more than one of" not in run(config, "data.on_leak=ignore")[1]


def test_json_holds_every_finding_with_every_file(config: Path, tmp_path: Path) -> None:
    for number in range(30):
        (config.parent / f"photos/dog/bad{number:02}.png").touch()
    code, output = run(config, "--json", str(tmp_path / "found.json"))
    assert code == 2
    assert "and 10 more" in output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["usable"] is False
    assert found["num_images"] == 20
    assert found["classes"]["cat"] == {"train": 7, "val": 1, "test": 2}
    assert found["bad_files"] == [{"path": f"dog/bad{number:02}.png", "problem": "is empty"} for number in range(30)]
    [bad] = [finding for finding in found["findings"] if finding["kind"] == "bad_files"]
    assert (bad["severity"], len(bad["items"])) == ("error", 30)


def test_data_that_cannot_be_learned_from_are_reported_without_a_table(config: Path, tmp_path: Path) -> None:
    for path in (config.parent / "photos/dog").iterdir():
        path.unlink()
    (config.parent / "photos/dog/bad.png").touch()
    code, output = run(config, "data.on_bad_image=skip", "--json", str(tmp_path / "found.json"))
    assert code == 2
    assert "1 class has no image that can be used:\n           dog\n" in output
    assert json.loads((tmp_path / "found.json").read_text())["classes"] is None


def test_mistakes_in_the_layout_do_not_hide_damaged_files(config: Path, tmp_path: Path) -> None:
    images = config.parent / "photos"
    (images / "emu").mkdir()
    (images / "stray.png").write_bytes(image(1))
    (images / "cat/cut.png").write_bytes(image(7)[:-60])
    code, output = run(config, "--json", str(tmp_path / "found.json"))
    assert code == 2
    for words in (
        "1 image lies in no class folder",
        "1 class folder holds no image:\n           emu\n",
        "1 of 21 images cannot be used",
        "cat/cut.png: is a damaged PNG",
        "20 usable images",
    ):
        assert words in output
    found = json.loads((tmp_path / "found.json").read_text())
    assert [finding["items"] for finding in found["findings"] if finding["kind"] == "layout"] == [
        [str(images / "stray.png")],
        ["emu"],
    ]
    assert [file["path"] for file in found["bad_files"]] == ["cat/cut.png"]


def test_a_single_class_hides_neither_damaged_files_nor_duplicates(config: Path) -> None:
    images = config.parent / "photos"
    for path in (images / "dog").iterdir():
        path.rename(images / "cat" / f"dog-{path.name}")
    (images / "dog").rmdir()
    (images / "cat/empty.png").touch()
    (images / "cat/again.png").write_bytes(image(3))
    code, output = run(config)
    assert code == 2
    for words in ("All images are of one class, 'cat'", "cat/empty.png: is empty", "in 1 group: ", "21 PNG"):
        assert words in output


def test_wrong_rows_of_a_csv_file_do_not_hide_damaged_files(config: Path) -> None:
    images = config.parent / "photos"
    (images / "cat/cut.png").write_bytes(image(7)[:-60])
    rows = [f"{path.relative_to(images)},{path.parent.name}" for path in sorted(images.rglob("*.png"))]
    (images / "list.csv").write_text("\n".join(["path,label", "cat/absent.png,cat", *rows]) + "\n")
    code, output = run(config, "data.source=csv", f"data.path={images / 'list.csv'}")
    assert code == 2
    assert "1 thing is wrong:\n           line 2: there is no file cat/absent.png" in output
    assert "cat/cut.png: is a damaged PNG" in output


def test_a_report_without_a_folder_to_go_to_is_refused_before_the_scan(config: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        run(config, "--json", "nowhere/at/all.json")


def test_the_program_ends_with_its_code_and_without_a_traceback(
    config: Path, launcher_process: LauncherProcess
) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    help_page = subprocess.run(
        [sys.executable, "-m", "pipeline", "check", "--help"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    assert "data.path=IMAGES" in help_page
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2, "seconds of processor time"
    (config.parent / "photos/cat/empty.png").touch()
    command = ("-m", "pipeline", "check", "--config", str(config))
    result = launcher_process.run(PROJECT, *command)
    assert (result.code, result.stderr) == (2, "")
    assert "cat/empty.png: is empty" in result.stdout
    result = launcher_process.run(PROJECT, *command, "data.on_bad_image=perhaps")
    assert result.code == 2
    assert "data.on_bad_image" in result.stderr
    assert "Traceback" not in result.stderr
