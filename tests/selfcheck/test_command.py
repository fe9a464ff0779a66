"""`gkd-lab selfcheck` as a user meets it: a table for pairs in folders, its exit status, one message."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gkd_lab.cli import main
from gkd_lab.config.artifact_specs import Family
from gkd_lab.runner.progress import Reporter
from gkd_lab.selfcheck.bench import ModelPair
from gkd_lab.selfcheck.checks import BFLOAT16_CHECK, CHECKS
from gkd_lab.selfcheck.command import MADE_FAMILIES, make_pair, run_checks

Say = Callable[..., tuple[int, str, str]]
COLUMNS = 80
ROW = re.compile(r"(?P<name>\S+(?: \S+)*)  +.* (?P<limit>0|1e-0\d)  (?P<verdict>pass|FAIL)")


@pytest.fixture(scope="module")
def pairs() -> dict[str, ModelPair]:
    return {family: make_pair(family) for family in MADE_FAMILIES}


@pytest.fixture
def llamas(pairs: dict[str, ModelPair]) -> ModelPair:
    return pairs["decoder-only"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the command runs; it leaves nothing there."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run the command; returns (exit status, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(("selfcheck", *words))
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def named(folder: Path) -> tuple[str, ...]:
    return "--teacher", str(folder / "teacher"), "--student", str(folder / "student")


def saved(pair: ModelPair, folder: Path) -> tuple[str, ...]:
    """The options that name the pair, in folders of the hub's form."""
    for name, model, tokenizer in (
        ("student", pair.student, pair.tokenizer),
        ("teacher", pair.teacher, pair.teacher_tokenizer),
    ):
        model.save_pretrained(folder / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / name)
    return named(folder)


def verdicts(out: str) -> dict[str, str]:
    """Check -> pass or FAIL; of several tables the last one counts."""
    return {match["name"]: match["verdict"] for line in out.splitlines() if (match := ROW.fullmatch(line))}


def failures(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("FAIL ")]


def all_pass(*more: str) -> dict[str, str]:
    return dict.fromkeys(("tokenizers", *(check.name for check in CHECKS), *more), "pass")


# ---- what passes ----


def test_without_names_two_made_pairs_pass_in_rows_of_one_line(say: Say) -> None:
    status, out, _ = say()
    assert status == 0
    for family, table in zip(MADE_FAMILIES, out.split("\n\n")[:2], strict=True):
        lines = table.splitlines()
        assert lines[0].startswith(f"{family}, ")
        assert verdicts(table) == all_pass()
        # Above the rows: title, sizes, headings, a rule; below them the count.
        assert len(lines) == 4 + len(all_pass()) + 1
        assert max(map(len, lines)) <= COLUMNS
        assert lines[-1] == f"{len(all_pass())} of {len(all_pass())} checks passed"


@pytest.mark.parametrize("family", MADE_FAMILIES)
def test_pairs_in_folders_pass(family: Family, pairs: dict[str, ModelPair], tmp_path: Path, say: Say) -> None:
    status, out, err = say(*saved(pairs[family], tmp_path), "--bf16")
    assert (status, failures(out)) == (0, [])
    assert verdicts(out) == all_pass(BFLOAT16_CHECK.name)
    assert out.startswith(f"{tmp_path}/student <- {tmp_path}/teacher\n")
    assert "Traceback" not in err


def test_a_student_with_a_wider_head_and_a_teacher_without_tokenizer_get_notes(
    llamas: ModelPair, tmp_path: Path, say: Say
) -> None:
    status, out, _ = say(*saved(ModelPair(llamas.student, llamas.teacher, llamas.tokenizer, None), tmp_path))
    assert status == 0
    assert "teacher's is unknown" in out
    assert re.search(r"^note tokenizers: .*393 vocabulary entries", out, re.MULTILINE)

    wide = make_pair("decoder-only").student
    wide.resize_token_embeddings(400)
    status, out, _ = say(
        *saved(ModelPair(wide, llamas.teacher, llamas.tokenizer, llamas.tokenizer), tmp_path)
    )
    assert status == 0
    assert re.search(r"^note tokenizers: .*400 and 393 entries", out, re.MULTILINE)


class CountingReporter(Reporter):
    """Keeps what a phase is told."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: list[int] = []
        self.counts: list[int] = []

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        self.totals.append(total)
        self.counts.append(done)
        yield self.counts.append


@pytest.mark.parametrize("bf16", (False, True))
def test_progress_ends_at_the_number_of_checks_in_the_table(llamas: ModelPair, bf16: bool) -> None:
    reporter = CountingReporter()
    results = run_checks(llamas, reporter, bf16=bf16)
    assert len(results) == 1 + len(CHECKS) + bf16
    assert reporter.totals == [len(results)]
    assert reporter.counts == list(range(1, len(results) + 1))


# ---- what fails: status 1 and a line for each reason ----


def test_tokenizers_that_differ_end_the_checks(llamas: ModelPair, tmp_path: Path, say: Say) -> None:
    entries = dict(sorted(llamas.tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
    entries["x"], entries["y"] = entries["y"], entries["x"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=entries, merges=[])), pad_token="<pad>", eos_token="</s>"
    )
    status, out, _ = say(*saved(ModelPair(llamas.student, llamas.teacher, llamas.tokenizer, other), tmp_path))
    assert status == 1
    (line,) = failures(out)
    assert line.startswith("FAIL tokenizers: ") and "2 vocabulary entries" in line
    assert verdicts(out) == {"tokenizers": "FAIL"}
    assert "Nothing else" in out and "0 of 1 checks passed" in out


def test_a_tokenizer_without_any_end_is_a_failure_with_its_way_out(
    llamas: ModelPair, tmp_path: Path, say: Say
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=llamas.tokenizer.backend_tokenizer)
    status, out, _ = say(*saved(ModelPair(llamas.student, llamas.teacher, bare, llamas.tokenizer), tmp_path))
    assert status == 1
    (line,) = failures(out)
    assert line.startswith("FAIL trainer: ValueError: ") and "pad nor an end token" in line
    assert verdicts(out) == {"tokenizers": "pass", "trainer": "FAIL"}
    assert "Nothing else" in out


def test_a_nan_weight_fails_the_checks_that_read_it_and_no_other(tmp_path: Path, say: Say) -> None:
    pair = make_pair("decoder-only")
    pair.teacher.get_output_embeddings().weight.data[5] = torch.nan
    status, out, _ = say(*saved(pair, tmp_path))
    assert status == 1
    row_verdicts = verdicts(out)
    assert list(row_verdicts) == list(all_pass())
    assert (row_verdicts["loss"], row_verdicts["teacher padding"], row_verdicts["sampling"]) == (
        "FAIL",
        "FAIL",
        "pass",
    )
    failed = [name for name, verdict in row_verdicts.items() if verdict == "FAIL"]
    assert [line.split(":")[0] for line in failures(out)] == [f"FAIL {name}" for name in failed]
    assert any(line.startswith("FAIL loss: ") and "NaN" in line for line in failures(out))
    assert f"{len(row_verdicts) - len(failed)} of {len(row_verdicts)} checks passed" in out


# ---- what is refused: status 2 and one message ----


@pytest.mark.parametrize(("given", "missing"), (("--teacher", "--student"), ("--student", "--teacher")))
def test_a_teacher_without_a_student_is_refused_and_vice_versa(given: str, missing: str, say: Say) -> None:
    status, out, err = say(given, "somewhere")
    assert (status, out) == (2, "")
    assert err.startswith(f"gkd-lab: {missing} is missing") and err.count("\n") == 1


@pytest.mark.parametrize("option", ("student", "teacher"))
def test_a_missing_folder_is_refused(option: str, llamas: ModelPair, tmp_path: Path, say: Say) -> None:
    saved(llamas, tmp_path)
    (tmp_path / option).rename(tmp_path / "elsewhere")
    status, out, err = say(*named(tmp_path))
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"gkd-lab: --{option} '{tmp_path}/{option}': no such folder")


def test_a_folder_without_a_model_is_refused(llamas: ModelPair, tmp_path: Path, say: Say) -> None:
    saved(llamas, tmp_path)
    (tmp_path / "teacher" / "model.safetensors").unlink()
    status, out, err = say(*named(tmp_path))
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"gkd-lab: --teacher '{tmp_path}/teacher' ")


def test_a_student_without_a_tokenizer_is_refused(llamas: ModelPair, tmp_path: Path, say: Say) -> None:
    status, out, err = say(
        *saved(ModelPair(llamas.student, llamas.teacher, None, llamas.tokenizer), tmp_path)
    )
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"gkd-lab: --student '{tmp_path}/student' has no tokenizer")


def test_models_of_two_families_are_refused(pairs: dict[str, ModelPair], tmp_path: Path, say: Say) -> None:
    decoder, encoder_decoder = pairs["decoder-only"], pairs["encoder-decoder"]
    status, out, err = say(
        *saved(
            ModelPair(decoder.student, encoder_decoder.teacher, decoder.tokenizer, decoder.tokenizer),
            tmp_path,
        )
    )
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert f"--student '{tmp_path}/student' is decoder-only" in line
    assert f"--teacher '{tmp_path}/teacher' is encoder-decoder" in line
