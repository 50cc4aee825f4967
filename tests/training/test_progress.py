"""Steps per second, as shown while a run goes on."""

import pytest

from pipeline.training import progress
from pipeline.training.progress import Throughput


def test_a_run_that_goes_back_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    throughput = Throughput()
    assert [throughput.update(step) for step in (1, 21)] == [0.0, 2.0]
    throughput.update(5)
    assert throughput.update(45) == 4.0
