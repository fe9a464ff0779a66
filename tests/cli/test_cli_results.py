"""Commands that read what a run has stored: scores, claims, comparisons, checks, reports and exports."""

import json
import re
from pathlib import Path

import pytest

from gkd_lab import experiments
from gkd_lab.store import Store

from .command_runs import BLOCK, BLOCKED, RunCommand, python, write_experiment


def write_scored_cell(*texts: str, lmbda: float = 0) -> str:
    """Write a quickstart cell with these answers, where `1 #### 1` is right; return its fingerprint."""
    from gkd_lab.metrics.scored_predictions import Prediction, score_predictions

    cell = next(item for item in experiments.load("quickstart").cells if item.lmbda == lmbda)
    record, evaluation = Store(Path("outputs")).get_record(cell), cell.evaluations[0]
    record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
    written = [Prediction(f"{n}?", text, ("1 #### 1",), 3, True) for n, text in enumerate(texts)]
    scores, rows = score_predictions(("exact_match",), written)
    record.get_evaluation(evaluation).write_results(evaluation, rows, scores, rows=len(rows))
    record.finish(steps=1)
    return cell.fingerprint


def test_evaluate_needs_a_finished_training_and_a_valid_task(run_command: RunCommand) -> None:
    begun = experiments.load("quickstart").cells[0]
    record = Store(Path("outputs")).get_record(begun)
    record.write_spec(begun.training, scale=begun.scale, labels=begun.labels)
    status, out, err = run_command("evaluate", begun.fingerprint, "--tasks", "mmlu")
    assert (status, out) == (2, "")
    assert (
        err.startswith(f"gkd-lab: {record.folder}: ")
        and "training is missing" in err
        and err.count("\n") == 1
    )
    record.finish(steps=1)
    Path("task.yaml").write_text("task: [")
    status, out, err = run_command("evaluate", str(record.folder), "--tasks", "task.yaml")
    assert (status, out) == (2, "")
    assert err.startswith("gkd-lab: task.yaml:1: ")


def test_table_creates_the_folder_of_its_file(run_command: RunCommand) -> None:
    assert run_command("table", "quickstart", "--format", "json", "-o", "deep/er/rows.json")[0] == 0
    table = json.loads(Path("deep/er/rows.json").read_text())
    assert [row["role"] for row in table].count("cell") == 15
    assert {row["status"] for row in table} == {"missing"}


def test_a_full_device_gives_one_message_and_exit_status_1(run_command: RunCommand) -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("no /dev/full here")
    status, out, err = run_command("table", "quickstart", "-o", str(full))
    assert (status, out) == (1, "")
    assert err.startswith("gkd-lab: ") and "No space" in err and err.count("\n") == 1
    assert full.is_char_device()


LIST_HEAVY = """
import sys
from gkd_lab.cli import main
try:
    main()
finally:
    print(*sorted({"torch", "transformers", "sklearn", "scipy"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        "plan quickstart",
        "status quickstart",
        "rescore quickstart --metrics accuracy,accuracy_flexible,exact_match,bleu,chrf",
    ],
)
def test_commands_load_neither_torch_nor_scikit_learn_nor_scipy(words: str) -> None:
    """ROUGE and Self-BLEU are left out: nltk imports scikit-learn and scipy by itself."""
    write_scored_cell("1 #### 1", "#### 2")
    done = python(LIST_HEAVY, *words.split())
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == ""


def test_claims_judge_the_numbers_of_the_paper(run_command: RunCommand) -> None:
    status, out, err = run_command("claims", "paper", "--format", "json")
    assert (status, err) == (0, "")
    first = json.loads(out)[0]
    assert (first["id"], first["verdict"], first["n"]) == ("C1", "fails", 1)
    assert first["detail"].startswith("54 of 55")
    assert first["detail"].startswith("54 of 55")
    assert "C27" in run_command("claims", "paper")[1].split("not judged:")[1]


def test_claims_of_a_missing_run_are_undecided_with_the_reason(run_command: RunCommand) -> None:
    status, out, _ = run_command("claims", "quickstart", "--format", "json")
    assert status == 0
    assert {(item["verdict"], item["n"]) for item in json.loads(out)} == {("undecided", 0)}
    assert "not done: " in run_command("claims", "quickstart")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("claims paper --scale nano", "--scale"),
        ("claims paper --set lmbda=1", "--set"),
        ("claims papr", "unknown experiment 'papr'"),
        ("claims quickstart --format xml", "'xml' is"),
    ],
)
def test_an_invalid_request_for_claims_gives_one_message_and_exit_status_2(
    words: str, message: str, run_command: RunCommand
) -> None:
    status, out, err = run_command(*words.split())
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_claims_judge_a_table_file(run_command: RunCommand) -> None:
    table = Path(__file__).parents[2] / "analysis" / "tables" / "lambda_beta_arithmetic.parquet"
    status, out, _ = run_command("claims", str(table), "--format", "json")
    rows = {row["id"]: row for row in json.loads(out)}
    assert (status, rows["C1"]["verdict"], rows["C1"]["n"]) == (0, "holds", 5)
    assert len(rows["C1"]["comparisons"]) == 10  # five divergences, last and best checkpoint
    status, _, err = run_command("claims", "missing.parquet")
    assert status == 2 and "missing.parquet" in err


@pytest.mark.parametrize("words", ["compare {a} {b}", "rescore quickstart", "verify quickstart"])
def test_compare_rescore_and_verify_work_without_training_libraries(words: str) -> None:
    digits = {
        "a": write_scored_cell("1 #### 1", "?"),
        "b": write_scored_cell("1 #### 1", "1 #### 1", lmbda=1),
    }
    done = python(BLOCK, ",".join(BLOCKED), *words.format(**digits).split())
    assert done.returncode == (1 if words.startswith("verify") else 0), done.stderr
    assert "accuracy" in done.stdout or "mismatch: " in done.stdout


def test_verify_reports_mismatches_and_exits_with_1(run_command: RunCommand) -> None:
    status, out, _ = run_command("verify", "quickstart")
    assert (status, out.count("\n")) == (0, 1)
    assert all(text in out for text in ("0 records", "all match", "15 of 15 cells"))
    write_scored_cell("1 #### 1", "?")
    (path,) = Path("outputs").glob("*/*/*/spec.json")
    (path.parent / "provenance.json").write_text('{"python": "3"}')
    path.with_name("files.json").unlink()
    status, out, _ = run_command("verify", "quickstart")
    assert status == 1
    assert "mismatch: " in out and "scores.json" in out and "accuracy" in out
    assert run_command("rescore", "quickstart")[0] == 0
    status, out, _ = run_command("verify", "quickstart")
    assert status == 0
    assert "note: " in out and "mismatch" not in out
    path.write_text(path.read_text().replace('"steps": 400', '"steps": 401', 1))
    status, out, _ = run_command("verify", "quickstart")
    assert status == 1
    name = path.parent.relative_to("outputs")
    assert f"mismatch: {name}: spec.json was {path.parent.name[-8:]} and now describes" in out
    assert "1 do not match" in out and "14 of 15 cells" in out


def test_compare_shows_the_difference_and_the_examples(run_command: RunCommand) -> None:
    a, b = write_scored_cell("1 #### 1", "?", "?"), write_scored_cell("1 #### 1", "1 #### 1", "?", lmbda=1)
    status, out, err = run_command("compare", a, b[:6], "--metric", "accuracy")
    assert (status, err) == (0, "")
    assert f"A: cell {a}, " in out and f"B: cell {b}, " in out
    assert "source.lmbda" in out and "+33.33" in out
    assert "undecided" in out and "3 examples, paired; other seeds not covered" in out
    assert re.search("1 of 1 differing examples .*, of 3", out)
    comparison = json.loads(run_command("compare", a, b, "--format", "json")[1])
    assert (comparison["n"], comparison["effect"]["verdict"]) == (3, "undecided")
    error = run_command("compare", a, b, "--metric", "acuracy")[2]
    assert error.startswith("gkd-lab: ") and "'acuracy'; did you mean 'accuracy'" in error


def test_rescore_reports_changes_and_exits_with_1_for_a_damaged_file(run_command: RunCommand) -> None:
    a = write_scored_cell("1 #### 1", "?")
    write_scored_cell("1 #### 1", "1 #### 1", lmbda=1)
    status, out, _ = run_command("rescore", "quickstart")
    assert status == 0
    assert "2 evaluations of 2 records, 4 predictions" in out
    assert "greedy/accuracy: new in 2, mean 75.00; accuracy|rule:gsm8k" in out
    (path,) = Path("outputs").glob(f"*/*/*{a}/evaluations/*/predictions.jsonl")
    path.write_text('{"prompt": "0?"\n')
    status, out, err = run_command("rescore", "quickstart")
    assert status == 1
    assert "greedy/accuracy: unchanged in 1" in out
    assert err.count(f"failed: {path}:1: ") == 1


def test_rescore_without_evaluations_exits_with_1(run_command: RunCommand) -> None:
    status, out, err = run_command("rescore", "quickstart")
    assert (status, out) == (1, "")
    assert err.startswith("gkd-lab: nothing to rescore")


def test_reports_of_different_grids_of_one_name_stand_beside_each_other(run_command: RunCommand) -> None:
    name = write_experiment("description: d\ntask: arithmetic\ngrid: {lmbda: [0, 1]}\n")
    status, first, _ = run_command("report", name)
    assert status == 0
    status, second, _ = run_command("report", name, "--set", "lmbda=0.5")
    assert status == 0
    paths = [Path(out.removeprefix("report: ").strip()) for out in (first, second)]
    assert paths[0] != paths[1] and all(path.is_file() for path in paths)
    latest = paths[0].with_name("mine-nano-latest.html")
    assert sorted(paths[0].parent.iterdir()) == sorted([*paths, latest])
    assert latest.read_bytes() == paths[1].read_bytes() != paths[0].read_bytes()
    run_command("report", name, "--set", "lmbda=0.5", "--paper", "-o", "mine.html")
    assert latest.read_bytes() == paths[1].read_bytes(), "-o writes its file alone"
    assert Path("mine.html").is_file()


@pytest.mark.parametrize("command", ["report quickstart -o", "table quickstart --format csv -o"])
def test_an_output_that_is_no_file_is_refused_with_a_name(command: str, run_command: RunCommand) -> None:
    Path("folder").mkdir()
    Path("file").write_text("")
    status, out, err = run_command(*command.split(), "folder")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "-o 'folder' is a folder; name a file in it, such as folder/quickstart." in err
    status, out, err = run_command(*command.split(), "file/page")
    assert (status, out, err.count("\n")) == (2, "", 1) and "file' is a file; name a file in a folder" in err
    assert not Path("outputs").exists()


def test_export_refuses_what_is_no_finished_record(run_command: RunCommand) -> None:
    status, out, err = run_command("export", "1a2b3c4d", "-o", "new")
    assert (status, out, err.count("\n")) == (2, "", 1) and "1a2b3c4d" in err
    folder = Path("outputs/nano/arithmetic/lmbda=1-1a2b3c4d")
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text("{}")
    status, _, err = run_command("export", "1a2b3c4d", "-o", "new")
    assert status == 2 and "missing" in err
    status, _, err = run_command("export", "1a2b3c4d")
    assert status == 2 and "-o" in err
    assert not Path("new").exists()
