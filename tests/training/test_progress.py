"""Steps per second, as shown while a run goes on."""

import io

import pytest
from rich import console as rich_console

from pipeline.console import Console
from pipeline.training import progress
from pipeline.training.progress import ProgressBar, Throughput


@pytest.mark.parametrize("validated", [True, False])
def test_the_lines_of_the_epochs_fit_80_columns_below_one_header(
    validated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console()
    console.rich = rich_console.Console(file=io.StringIO(), width=80, soft_wrap=True)
    bar = ProgressBar(console, first_step=0, total_steps=999 * 400, steps_per_epoch=400, global_batch_size=256)
    now = iter([0.0, 3.0, 0.0, 3.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    for epoch in (1, 998):
        metrics = {"train/loss": 12.3456, "train/accuracy": 1.0}
        record = {"epoch": epoch, "step": 400 * epoch, **metrics}
        bar.on_progress(400 * epoch - 399, metrics)
        bar.on_progress(400 * epoch, metrics)
        bar.on_epoch_end(record | ({"val/loss": 0.1234, "val/accuracy": 0.5} if validated else {}))
    header, first, last = console.rich.file.getvalue().splitlines()
    assert ("val accuracy" in header) == validated
    assert first.startswith("epoch   1/999  ")
    assert first.endswith("50 min 02 s")
    assert last.startswith("epoch 998/999  ")
    assert max(map(len, (header, first, last))) <= 80
    for title, value in (("loss", "12.346"), ("accuracy", "100.0%"), ("images/s", "34,048")):
        assert header.index(title) + len(title) == first.index(value) + len(value), "right below its title"


def test_a_run_that_goes_back_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    throughput = Throughput()
    assert [throughput.update(step) for step in (1, 21)] == [0.0, 2.0]
    throughput.update(5)
    assert throughput.update(45) == 4.0
