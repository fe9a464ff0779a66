"""Files stay whole: the old content or the new one, and JSON lines up to the first damaged line."""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gkd_lab.store import files

UNICODE_TEXT = 'Grüße\u2028\x85\x0b\x1c\r\n\t"\\ 你好 🙂'


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_the_old_file_and_no_other(small_disk: Path) -> None:
    path = small_disk / "scores.json"
    files.write_json(path, {"value": 1})
    with pytest.raises(OSError) as caught:
        files.write_json(path, {"value": "x" * 100_000})
    assert caught.value.errno == errno.ENOSPC
    assert files.read_json(path) == {"value": 1}
    assert [path.name for path in small_disk.iterdir()] == ["scores.json"]


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    files.write_json(path, {"value": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"value": float("nan")})
    path.with_name("folder").mkdir()
    with pytest.raises(OSError):
        files.write_text(tmp_path / "folder", "x")
    with pytest.raises(OSError):
        files.write_text(path / "below-a-file", "x")
    assert files.read_json(path) == {"value": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "scores.json"]


def append_line(path: Path) -> None:
    files.append_json_line(path, {"step": 1})


def replace_file(path: Path) -> None:
    files.write_text(path, "x")


@pytest.mark.parametrize("write_file", [append_line, replace_file])
def test_full_device_raises_and_stays_a_device(write_file: Callable[[Path], None]) -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError) as caught:
        write_file(full)
    assert caught.value.errno == errno.ENOSPC
    assert full.is_char_device()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"1", b"null", b"\xff", b"\0\0\0"])
def test_damaged_json_reads_as_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_bytes(content)
    assert files.read_json(path) is None
    assert files.read_json(tmp_path / "none.json") is None
    assert files.read_json(path / "below-a-file.json") is None


def test_any_text_survives_a_json_line(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = [{"prediction": UNICODE_TEXT}, {"prediction": "b"}]
    files.write_json_lines(path, rows)
    files.append_json_line(path, rows[0])
    assert files.read_json_lines(path) == [*rows, rows[0]]
    assert "Grüße" in path.read_text()


@pytest.mark.parametrize("damaged_line", [b'{"step": 3', b"\0\0\0\0\n", b'{"step": "\xff"}\n', b"3\n", b"3"])
def test_lines_are_read_until_the_first_damaged_line(damaged_line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + damaged_line)
    assert files.read_json_lines(path) == [{"step": 1}, {"step": 2}]
    assert files.read_json_lines(tmp_path / "none.jsonl") == []


def test_history_is_truncated_to_a_step_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        files.append_json_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    files.drop_lines_beyond_step(path, 2)
    files.append_json_line(path, {"step": 3, "again": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]
    files.drop_lines_beyond_step(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


END_ROW = {"step": 10**6, "text": UNICODE_TEXT}


@pytest.mark.parametrize("block_bytes", [1, 2, 7, 64, 1 << 16])
@pytest.mark.parametrize("count", [1, 3, 40, 1000])
@pytest.mark.parametrize(
    "end", [b"", b'{"step": 3, "lo', b'{"text": "\xc3', b"[]\n", b"\n\n", b'{"step": 3}', b"\0\0\n"]
)
def test_last_json_lines_are_those_of_the_whole_file(
    block_bytes: int, count: int, end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", block_bytes)
    path = tmp_path / "metrics.jsonl"
    files.write_json_lines(path, [{"step": n, "text": UNICODE_TEXT * (n % 3)} for n in range(40)])
    with path.open("ab") as file:
        file.write(end)
    assert files.read_last_json_lines(path, count) == files.read_json_lines(path)[-count:]
    files.drop_lines_beyond_step(path, 20)
    files.append_json_line(path, END_ROW)
    rows = files.read_last_json_lines(path, count)
    assert rows == files.read_json_lines(path)[-count:]
    assert rows[-1] == END_ROW


def test_rows_after_a_damaged_line_do_not_count_from_the_end_either(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st\n{"step": 4}\n')
    assert files.read_last_json_lines(path, 3) == files.read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_row_longer_than_a_block_is_read_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1}, {"step": 2, "text": "ü" * 200_000}]
    files.write_json_lines(path, rows)
    assert files.read_last_json_lines(path, 2) == rows
    assert files.read_last_json_lines(path, 1) == rows[1:]


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    files.write_json_lines(path, ({"step": n} for n in range(100_000)))
    parsed: list[bytes] = []
    monkeypatch.setattr(files, "_parse_json_object", lambda line: parsed.append(line) or json.loads(line))
    assert files.read_last_json_lines(path, 3) == [{"step": n} for n in (99_997, 99_998, 99_999)]
    assert len(parsed) == 3
