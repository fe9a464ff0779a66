"""Work time is the time between rows of one process, and the pace is that of the last process."""

from pathlib import Path

from gkd_lab.store import Record, timing

TWO_PROCESSES = [
    {"step": 0, "time": 100.0, "began": True},
    {"step": 10, "time": 110.0},
    {"step": 20, "time": 130.0},
    {"step": 20, "time": 1000.0, "began": True},
    {"step": 30, "time": 1005.0},
]


def test_time_between_two_processes_does_not_count() -> None:
    assert timing.sum_work_seconds(TWO_PROCESSES) == 10 + 20 + 5


def test_pace_is_that_of_the_running_process() -> None:
    assert timing.estimate_seconds_per_step(TWO_PROCESSES) == 0.5
    assert timing.estimate_seconds_per_step(TWO_PROCESSES[:3]) == 1.5
    assert timing.estimate_seconds_per_step(TWO_PROCESSES[:4]) is None
    assert timing.estimate_seconds_per_step([]) is None


def test_pace_averages_recent_rows_only() -> None:
    slow = [{"step": 0, "time": 0.0, "began": True}, {"step": 1, "time": 1000.0}]
    fast = [{"step": n, "time": 1000.0 + n} for n in range(2, 8)]
    assert timing.estimate_seconds_per_step([*slow, *fast]) == 1.0


def test_clock_set_back_counts_as_no_time() -> None:
    rows = [{"step": 0, "time": 100.0, "began": True}, {"step": 1, "time": 90.0}, {"step": 2, "time": 91.0}]
    assert timing.sum_work_seconds(rows) == 1.0


def test_tokens_are_mean_length_times_batch_size_times_steps() -> None:
    history = [{"step": 2, "completion_length": 10.0}, {"step": 5, "completion_length": 4.0}]
    assert timing.count_completion_tokens(history, batch_size=8) == 10 * 8 * 2 + 4 * 8 * 3


def test_resumed_record_drops_times_after_its_checkpoint(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.rewind_history(0)
    for step in (2, 4, 6):
        record.log_row({"step": step, "loss": 1.0})
    record.rewind_history(4)
    record.log_row({"step": 6, "loss": 1.0})
    assert [row["step"] for row in record.read_history()] == [2, 4, 6]
    assert [(row["step"], row.get("began", False)) for row in record.read_step_times()] == [
        *((0, True), (2, False), (4, False)),
        *((4, True), (6, False)),
    ]


def test_meter_reads_clock_and_processor_seconds() -> None:
    usage = timing.UsageMeter().read_usage()
    assert set(usage) == {"seconds", "cpu_seconds"}
    assert min(usage.values()) >= 0
