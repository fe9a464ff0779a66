"""The file that says how far the work on a record is: at once, at most once a second, gone at the end."""

from pathlib import Path

import pytest

from gkd_lab.store import live_progress
from gkd_lab.store.live_progress import PROGRESS_FILE, LiveProgress, log_live_progress, read_live_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time of the module, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(live_progress.time, "time", lambda: now[0])
    return now


def test_progress_is_written_at_once_then_each_second_and_deleted(tmp_path: Path, clock: list[float]) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with log_live_progress(folders, "distillation", "steps", 100, done=20) as update:
        first = LiveProgress("distillation", "steps", 20, 100, seconds_left=None)
        assert [read_live_progress(folder) for folder in folders] == [first, first]
        clock[0] += 0.5
        update(30)
        assert read_live_progress(folders[1]) == first
        clock[0] += 1.5
        update(40)
        # 20 steps in 2 s, so that the 60 left take 6 s.
        assert read_live_progress(folders[0]) == LiveProgress("distillation", "steps", 40, 100, 6.0)
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_progress_is_deleted_after_an_error_and_a_missing_folder_stops_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="no"),
        log_live_progress([tmp_path, tmp_path / "none"], "greedy", "rows", 10) as update,
    ):
        update(5)
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_or_one_of_another_version_is_no_progress(tmp_path: Path) -> None:
    for content in ("", '{"work": "greedy"}', "[]"):
        (tmp_path / PROGRESS_FILE).write_text(content)
        assert read_live_progress(tmp_path) is None
