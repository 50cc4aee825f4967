"""Every command on a file system that cannot be written or is full: one line, exit code 2, nothing lost."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from class_folders import write_class_folders
from launching import LauncherProcess

CONFIG = """
model: {variant: {width: 0.1, depth: 0.3, resolution: 32}, weights: null, batch_norm_momentum: 0.9}
data: {source: folder, path: IMAGES, resize: squash}
train: {global_batch_size: 16, stages: [{epochs: 1}]}
tracking: {experiment: disks}
"""
RUN = ("--run", "run")
WRITE = ("--write", "scaled.yaml", "--data-path", "../images")
COMMANDS = {  # in a folder with a finished run, a config and images
    "train": ("train.py", "--config", "config.yaml", "--run-dir", "new"),
    "train in runs/": ("train.py", "--config", "config.yaml"),
    "evaluate": ("evaluate.py", *RUN),
    "evaluate --out": ("evaluate.py", *RUN, "--data", "../images", "--out", "figures"),
    "compare": ("-m", "pipeline", "compare", "run", "other"),
    "export": ("-m", "pipeline", "export", *RUN, "--formats", "litert"),
    "export --out": ("-m", "pipeline", "export", *RUN, "--formats", "litert", "--out", "exported"),
    "check --json": ("-m", "pipeline", "check", "--config", "config.yaml", "--json", "found.json"),
    "pack": ("-m", "pipeline", "pack", "--config", "config.yaml", "--out", "packed"),
    "bench --json": ("-m", "pipeline", "bench", "--config", "config.yaml", "--seconds", "0.1", "--json", "bench.json"),
    "scale --write": ("-m", "pipeline", "scale", "--params", "2M", *WRITE),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory, launcher_process: LauncherProcess) -> Iterator[Path]:
    """A small file system in memory with a finished run, its copy, and a config; the images lie outside."""
    root = tmp_path_factory.mktemp("disks")
    write_class_folders(root / "images", 24)
    folder = root / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system in memory can be mounted by root only")
    (folder / "config.yaml").write_text(CONFIG.replace("IMAGES", str(root / "images")))
    ended = launcher_process.run(folder, "train.py", "--config", "config.yaml", "--run-dir", "run")
    assert ended.code == 0, ended.stderr
    shutil.copytree(folder / "run", folder / "other")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(params=["read-only", "full"])
def unwritable(disk: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The folder while nothing can be written into it."""
    if request.param == "full":
        with pytest.raises(OSError, match="No space left"):
            (disk / "filler").write_bytes(bytes(256 << 20))
        yield disk
        (disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_cannot_be_written_is_named_in_one_line(command, unwritable, launcher_process):
    before = {path: path.read_bytes() for path in unwritable.rglob("*") if path.is_file() and path.name != "filler"}
    ended = launcher_process.run(unwritable, *COMMANDS[command])
    message = ended.stderr
    assert ended.code == 2, message + ended.stdout
    assert "Traceback" not in message + ended.stdout
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    assert "Read-only file system" in message or "No space left on device" in message or "cannot be written" in message
    after = {path: path.read_bytes() for path in unwritable.rglob("*") if path.is_file() and path.name != "filler"}
    lost = [path for path, content in before.items() if path.suffix != ".txt" and after.get(path) != content]
    assert lost == []
