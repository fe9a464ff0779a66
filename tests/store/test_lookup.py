"""A record is found by its folder or by the first digits of its fingerprint."""

import re
from pathlib import Path

import pytest

from gkd_lab import experiments
from gkd_lab.config import Cell, ConfigError
from gkd_lab.store import Record, Store
from gkd_lab.store.lookup import find_record


@pytest.fixture(scope="module")
def cells() -> tuple[Cell, ...]:
    return experiments.load("quickstart").cells[:6]


@pytest.fixture
def outputs(tmp_path: Path, cells: tuple[Cell, ...]) -> Path:
    """Outputs with six cells and their SFT student."""
    store = Store(tmp_path / "outputs")
    for cell in cells:
        store.get_record(cell).write_spec(cell.training, scale=cell.scale, labels=cell.labels)
    sft_student = cells[0].training.start
    store.get_artifact("nano", "start", sft_student).write_spec(sft_student, role="start")
    return store.root


def test_record_is_found_by_digits_or_folder(outputs: Path, cells: tuple[Cell, ...]) -> None:
    record = Store(outputs).get_record(cells[2])
    assert find_record(cells[2].fingerprint, outputs) == record
    assert find_record(cells[2].full_fingerprint[:30], outputs) == record
    assert find_record(str(record.folder), outputs) == record
    sft_student = cells[0].training.start
    assert find_record(sft_student.fingerprint, outputs) == Store(outputs).get_artifact(
        "nano", "start", sft_student
    )


def test_long_prefix_must_match_to_its_end(outputs: Path, cells: tuple[Cell, ...]) -> None:
    wrong = "0" if cells[2].full_fingerprint[8] != "0" else "1"
    with pytest.raises(ConfigError, match="no record"):
        find_record(cells[2].fingerprint + wrong, outputs)


def test_ambiguous_prefix_lists_the_records(outputs: Path, cells: tuple[Cell, ...]) -> None:
    second_record = Record(outputs / "smol" / "arithmetic" / f"lmbda=0-{cells[0].fingerprint}")
    second_record.write_spec(cells[0].training)
    with pytest.raises(ConfigError) as caught:
        find_record(cells[0].fingerprint, outputs)
    assert f"'{cells[0].fingerprint}' is ambiguous" in str(caught.value)
    assert "2 records" in str(caught.value)
    assert str(second_record.folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zz", "no record 'zz' below"),
        ("", "ambiguous: .* 7 records"),
        ("nowhere/there", "no record 'nowhere/there' below"),
    ],
)
def test_unknown_name_is_refused(name: str, expected: str, outputs: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        find_record(name, outputs)


def test_nearest_fingerprint_is_suggested(outputs: Path, cells: tuple[Cell, ...]) -> None:
    fingerprint = cells[3].fingerprint
    mistyped_fingerprint = fingerprint[:3] + ("0" if fingerprint[3] != "0" else "1") + fingerprint[4:]
    with pytest.raises(ConfigError, match=f"did you mean '{fingerprint}'"):
        find_record(mistyped_fingerprint, outputs)


def test_folder_without_a_record_is_refused(outputs: Path, cells: tuple[Cell, ...]) -> None:
    with pytest.raises(ConfigError, match=r"spec\.json"):
        find_record(str(outputs), outputs)
    evaluation = Store(outputs).get_record(cells[0]).get_evaluation(cells[0].evaluations[0])
    evaluation.write_spec(cells[0].evaluations[0])
    record = re.escape(str(Store(outputs).get_record(cells[0]).folder))
    with pytest.raises(ConfigError, match=f"an evaluation.*'{record}'"):
        find_record(str(evaluation.folder), outputs)


def test_empty_store_has_no_record(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no record 'ab'"):
        find_record("ab", tmp_path)
