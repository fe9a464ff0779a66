"""A record is found by its folder or by the first digits of its fingerprint, or one message says why not."""

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
    """Six cells and the student that they start from."""
    store = Store(tmp_path / "outputs")
    for cell in cells:
        store.get_record(cell).write_spec(cell.training, scale=cell.scale, labels=cell.labels)
    start = cells[0].training.start
    store.get_artifact("nano", "start", start).write_spec(start, role="start")
    return store.root


def test_by_digits_or_by_folder(outputs: Path, cells: tuple[Cell, ...]) -> None:
    record = Store(outputs).get_record(cells[2])
    assert find_record(cells[2].fingerprint, outputs) == record
    assert find_record(cells[2].full_fingerprint[:30], outputs) == record
    assert find_record(str(record.folder), outputs) == record
    start = cells[0].training.start
    assert find_record(start.fingerprint, outputs) == Store(outputs).get_artifact("nano", "start", start)


def test_a_longer_prefix_must_fit_to_its_end(outputs: Path, cells: tuple[Cell, ...]) -> None:
    wrong = "0" if cells[2].full_fingerprint[8] != "0" else "1"
    with pytest.raises(ConfigError, match="no record"):
        find_record(cells[2].fingerprint + wrong, outputs)


def test_several_records_of_one_prefix_are_listed(outputs: Path, cells: tuple[Cell, ...]) -> None:
    other = Record(outputs / "smol" / "arithmetic" / f"lmbda=0-{cells[0].fingerprint}")
    other.write_spec(cells[0].training)
    with pytest.raises(ConfigError) as caught:
        find_record(cells[0].fingerprint, outputs)
    assert f"'{cells[0].fingerprint}' is ambiguous, 2 records begin so: " in str(caught.value)
    assert str(other.folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zz", "no record 'zz' below '.*'; give the folder of a record or the first digits"),
        ("", "is ambiguous, 7 records begin so"),
        ("nowhere/there", "no record 'nowhere/there' below"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(name: str, said: str, outputs: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        find_record(name, outputs)


def test_the_nearest_fingerprint_is_suggested(outputs: Path, cells: tuple[Cell, ...]) -> None:
    meant = cells[3].fingerprint
    mistyped = meant[:3] + ("0" if meant[3] != "0" else "1") + meant[4:]
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'\\?"):
        find_record(mistyped, outputs)


def test_a_folder_that_is_no_record_is_refused(outputs: Path, cells: tuple[Cell, ...]) -> None:
    with pytest.raises(ConfigError, match=r"is no record: there is no spec\.json in it"):
        find_record(str(outputs), outputs)
    evaluation = Store(outputs).get_record(cells[0]).get_evaluation(cells[0].evaluations[0])
    evaluation.write_spec(cells[0].evaluations[0])
    record = re.escape(str(Store(outputs).get_record(cells[0]).folder))
    with pytest.raises(ConfigError, match=f"is an evaluation; its record is '{record}'"):
        find_record(str(evaluation.folder), outputs)


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no record 'ab': nothing was run below"):
        find_record("ab", tmp_path)
