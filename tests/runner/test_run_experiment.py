"""`gkd_lab.run`: what it does again, says, raises and leaves alone."""

import signal
import threading
from pathlib import Path

import pytest

import gkd_lab
from gkd_lab.config import ConfigError
from gkd_lab.store import Store

from .tiny_experiments import interrupted_at, times, tiny_grid


def load_tiny(folder: Path, **axes: list[float]) -> gkd_lab.Experiment:
    """Load an experiment of two cells that trains in seconds; `axes` replace its axis lmbda."""
    tiny_grid(folder, "arithmetic", grid=axes or {"lmbda": [0, 1]})
    return gkd_lab.load(folder / "tiny.yaml", outputs=folder / "outputs")


def test_a_run_prints_nothing_and_its_table_has_every_score(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    experiment = load_tiny(tmp_path)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    capfd.readouterr()
    outcome = gkd_lab.run(experiment)
    assert capfd.readouterr() == ("", "")
    assert (outcome.is_done, outcome.states, outcome.failures) == (True, {"done": 2}, ())
    assert "of 2 cells 2 done" in repr(outcome)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    table = gkd_lab.table(experiment)
    assert table.loc[table["metric"] == "accuracy", "value"].notna().all()

    times_before = times(tmp_path / "outputs")
    assert gkd_lab.run(experiment, progress=True).is_done
    assert times(tmp_path / "outputs") == times_before


def test_progress_is_shown_on_request(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gkd_lab.run(load_tiny(tmp_path), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "4 of 4" in err or "done in" in err


def test_a_failed_cell_raises_nothing_and_is_named_with_its_log(tmp_path: Path) -> None:
    """A learning rate of 1e30 makes one of two cells fail."""
    experiment = load_tiny(tmp_path, learning_rate=[1e-3, 1e30])
    outcome = gkd_lab.run(experiment)
    assert not outcome.is_done
    assert outcome.states == {"done": 1, "failed": 1}
    (line,) = outcome.failures
    status_file = Store(experiment.outputs).get_record(experiment.cells[1]).status_file
    assert "FloatingPointError" in line and str(status_file) in line
    assert "retry_failed=True" in line and "--retry-failed" not in line
    assert f"failed: {line}" in repr(outcome)
    failure_time = status_file.stat().st_mtime_ns
    assert gkd_lab.run(experiment).failures == outcome.failures
    assert status_file.stat().st_mtime_ns == failure_time
    gkd_lab.run(experiment, retry_failed=True)
    assert status_file.stat().st_mtime_ns > failure_time


def test_it_runs_in_another_thread_and_leaves_the_signal_handlers(tmp_path: Path) -> None:
    experiment, outcomes = load_tiny(tmp_path), []
    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: outcomes.append(gkd_lab.run(experiment)))
    thread.start()
    thread.join()
    assert [outcome.states for outcome in outcomes] == [{"done": 2}]
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_tiny(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    with interrupted_at(2, monkeypatch):
        gkd_lab.run(experiment)
    assert signal.getsignal(signal.SIGINT) is handler
    assert gkd_lab.run(experiment).states == {"done": 2}


def test_a_wrong_request_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    experiment = load_tiny(tmp_path)
    with pytest.raises(ConfigError, match="expected auto, off or a number of cells"):
        gkd_lab.run(experiment, pack=0)
    with pytest.raises(ConfigError, match="unknown tracker 'wandbb'; did you mean 'wandb'"):
        gkd_lab.run(experiment, tracker="wandbb")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown experiment 'quickstat'; did you mean 'quickstart'"):
        gkd_lab.run("quickstat")
    assert not list((tmp_path / "outputs").glob("nano/*/*"))
