"""The command line: exit status 0, 1 or 2, one message, no traceback, and torch only to train."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gkd_lab import experiments
from gkd_lab.cli import main
from gkd_lab.store import Store, bfloat16

RunCommand = Callable[..., tuple[int, str, str]]
BLOCKED = ("torch", "transformers", "datasets", "evaluate", "trl", "accelerate", "wandb", "lm_eval")
ROW = '{"question": "1 + 1 =", "answer": "1 1 #### 2"}\n'


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts where a user may: in a folder with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Run a command and return (exit status, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(words)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def write_experiment(text: str, name: str = "mine.yaml") -> str:
    Path(name).write_text(text)
    return name


def write_data_folder(folder: str, last: str = ROW) -> str:
    Path(folder).mkdir()
    for split in ("train", "validation", "test"):
        Path(folder, f"{split}.jsonl").write_text(ROW * 3)
    with Path(folder, "train.jsonl").open("a") as file:
        file.write(last)
    return folder


INVALID_EXPERIMENTS = {
    "task: arithmatic": "unknown task 'arithmatic'; did you mean 'arithmetic'? valid: arithmetic,",
    "task: arithmetic\nlmbd: 0": "mine.yaml:3: unknown field 'lmbd'; did you mean 'lmbda'? valid: lmbda,",
    "task: arithmetic\nlmbda: 1.5": "mine.yaml:3: lmbda: 1.5 is not valid: must be from 0 to 1",
    "task: arithmetic\nbeta: abc": "mine.yaml:3: beta: 'abc' is not valid: must be a number from 0 to 1",
    "task: arithmetic\ngrid: {beta: []}": "mine.yaml:3: grid.beta: the list is empty, so there is no cell",
    "task: arithmetic\ngrid: {beta: 1}": "grid.beta: must be a list of values, got 1; did you mean [1]?",
    "task: arithmetic\npaper: {claims: [C99]}": "paper.claims[0]: 'C99' is not valid: did you mean 'C9'?",
    "task: arithmetic\npaper: {figures: [A14]}": "'A14' is not valid: did you mean 'A.14'?",
    "task: arithmetic\nscale: smoll": "scale: 'smoll' is not valid: did you mean 'smol'? valid: nano, smol",
    "lmbda: 0": "no task: set `task:` or an axis `grid.task`",
    "task: [": "mine.yaml:3: not valid YAML",
    "lmbda: 1\ntask: arithmetic\ngrid: {lmbda: [0, 1]}": "mine.yaml:2: lmbda: the fixed value 1",
    "task: arithmetic\nper_task: {translation: {steps: 9}}": "mine.yaml:3: per_task.translation: ",
}


@pytest.mark.parametrize("command", ["plan", "run", "table"])
@pytest.mark.parametrize(("text", "message"), INVALID_EXPERIMENTS.items())
def test_an_invalid_experiment_gives_one_message_and_exit_status_2(
    command: str, text: str, message: str, run_command: RunCommand
) -> None:
    name = write_experiment(f"description: d\n{text}\n")
    status, out, err = run_command(command, name)
    assert (status, out) == (2, "")
    assert err.startswith("gkd-lab: ")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("outputs").exists()


INVALID_REQUESTS = {
    "plan quikstart": "unknown experiment 'quikstart'; did you mean 'quickstart'?",
    "plan none.yaml": "no experiment file 'none.yaml'",
    "plan quickstart --set lmbda": "--set 'lmbda': expected KEY=VALUE or KEY=V1,V2",
    "plan quickstart --set seed=1 --set seed=2": "--set seed is given twice, '1' and '2'",
    "plan quickstart --set lmbda=no": "grid.lmbda[0]: 'no' is not valid: must be a number from 0 to 1",
    "run quickstart --set seed=010": "seed: '010' is not valid: must be a whole number",
    "cell --task arithmetic --seed true": "seed: true is not valid: must be a whole number",
    "plan quickstart --set =1": "--set '=1': expected KEY=VALUE or KEY=V1,V2",
    "plan quickstart --set lmbda={": "lmbda={: expected",
    "plan quickstart --set lmbda=0,1.5": "grid.lmbda[1]: 1.5 is not valid: must be from 0 to 1",
    "plan quickstart --set stps=1": "unknown field 'stps'; did you mean 'steps'?",
    "plan quickstart --set data.source=nowhere": "data.source: no folder 'nowhere'",
    "run quickstart --set data.source=owner/rows": "the hub is offline; add it to outputs/revisions",
    "plan quickstart --scale big": "'big' is not one of 'nano', 'smol', 'paper'; see `gkd-lab plan --h",
    "plan quickstart --pack x": "--pack 'x': expected auto, off or a number of cells from 1",
    "run quickstart --pack 0": "--pack '0': expected auto, off or a number of cells from 1",
    "run quickstart --executor ray": "--executor ray is not built yet; valid: local",
    "run quickstart --executor rya": "unknown executor 'rya'; valid: local",
    "run quickstart --workers 0": "--workers 0: expected a number of processes from 1",
    "run quickstart --workers 2 --no-wait": "--workers 2 and --no-wait: the workers of a run wait for each",
    "run quickstart --workers two": "Invalid value for '--workers'",
    "run quickstart --tracker wandbb": "'wandbb' is not one of 'none', 'wandb', 'trackio'",
    "cell --task arithmetic --held never": "'never' is not one of 'wait', 'pass'",
    "sweep quikstart": "unknown experiment 'quikstart'; did you mean 'quickstart'?",
    "sweep quickstart --set lmbd=0,1": "unknown field 'grid.lmbd'; did you mean 'lmbda'?",
    "run quickstart --outputs file": "--outputs 'file' is a file; expected a folder, or none yet",
    "plan quickstart --outputs file": "--outputs 'file' is a file; expected a folder, or none yet",
    "run quickstart --outputs file/below": "--outputs 'file/below': cannot write there: Not a directory",
    "cell --task arithmetic --outputs file": "--outputs 'file' is a file; expected a folder",
    "table quickstart -o .": "-o '.' is a folder; name a file in it",
    "table quickstart --format xml": "'xml' is not one of 'md', 'csv', 'json', 'parquet'",
    "cell": "no task: give --task; valid: arithmetic, translation, summarization",
    "cell --task sums": "unknown task 'sums'",
    "cell --task arithmetic --lmbd 1": "cell: unknown field 'lmbd'; did you mean 'lmbda'?",
    "cell --task arithmetic --beta abc": "cell: beta: 'abc' is not valid: must be a number from 0 to 1",
    "cell --task arithmetic --lmbda": "--lmbda has no value",
    "cell --task arithmetic --lmbda --beta 1": "--lmbda has no value",
    "cell --task arithmetic --beta 0 --beta 1": "--beta is given twice: '0' and '1'",
    "cell --task arithmetic 0.5": "unexpected '0.5': fields of a cell are given as --FIELD VALUE",
    "cell --task arithmetic --beta 0,1": "2 cells of 'cell' match: give one value for --beta",
    "cell --experiment quickstart --task arithmetic": "15 cells of 'quickstart' match: give one value "
    "for --lmbda, --beta",
    "cell --experiment quikstart --lmbda 1": "unknown experiment 'quikstart'",
    "compare abc def": "no record 'abc'",
    "compare abc": "Missing argument 'CELL_B'; see `gkd-lab compare --help`",
    "compare a b --format xml": "'xml' is not one of 'text', 'json'",
    "compare a b --outputs file": "--outputs 'file' is a file; expected a folder",
    "rescore quikstart": "unknown experiment 'quikstart'; did you mean 'quickstart'?",
    "rescore quickstart --metrics roug1": "unknown metric 'roug1'; did you mean 'rouge1'?",
    "rescore quickstart --metrics ,": "--metrics ',' names no metric",
    "rescore quickstart --outputs file": "--outputs 'file' is a file; expected a folder",
    "verify quikstart": "unknown experiment 'quikstart'; did you mean 'quickstart'?",
    "verify quickstart --outputs file": "--outputs 'file' is a file; expected a folder",
    "verify quickstart --set data.source=owner/rows": "the hub is offline; add it to outputs/revisions",
    "evaluate 1a2b --tasks mmlu": "no record '1a2b'",
    "evaluate . --tasks mmlu": "'.' is not a record",
    "evaluate 1a2b": "Missing option '--tasks'; see `gkd-lab evaluate --help`",
    "evaluate 1a2b --tasks mmlu --limit 0": "Invalid value for '--limit'",
    "evaluate 1a2b --tasks mmlu --outputs file": "--outputs 'file' is a file; expected a folder",
    "plan quickstart --set evaluations=[{lm_eval:[x.yaml]}]": "x.yaml: cannot be read: No such file",
    "pln quickstart": "No such command 'pln'. Did you mean 'plan'",
    "plan": "Missing argument 'EXP'; see `gkd-lab plan --help`",
    "plan quickstart --foo": "No such option: --foo; see `gkd-lab plan --help`",
    "--foo": "No such option: --foo; see `gkd-lab --help`",
}


@pytest.mark.parametrize(("words", "message"), INVALID_REQUESTS.items(), ids=INVALID_REQUESTS.keys())
def test_an_invalid_request_gives_one_message_and_exit_status_2(
    words: str, message: str, run_command: RunCommand
) -> None:
    Path("file").write_text("not a folder")
    status, out, err = run_command(*words.split())
    assert (status, out) == (2, "")
    assert err.startswith("gkd-lab: ")
    assert message in err
    assert err.count("\n") == 1
    assert [item.name for item in Path().iterdir()] == ["file"]
    assert Path("file").read_text() == "not a folder"


def test_plan_works_after_adding_the_requested_revision(run_command: RunCommand) -> None:
    words = ("plan", "quickstart", "--set", "data.source=owner/rows")
    _, _, err = run_command(*words)
    place, _, line = err.strip().partition("add it to ")[2].partition(": ")
    Path(place).parent.mkdir(parents=True)
    Path(place).write_text(line.replace("COMMIT", "0a1b2c"))
    status, out, _ = run_command(*words)
    assert status == 0
    assert "15 cells" in out


def test_the_outputs_option_overrides_the_environment_variable(
    run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = experiments.load("quickstart", outputs="there").cells[0]
    Store(Path("there")).get_record(done).finish(steps=1)
    for evaluation in done.evaluations:
        scores = {metric: {"value": 1.0} for metric in evaluation.metrics}
        Store(Path("there")).get_record(done).get_evaluation(evaluation).write_results(evaluation, [], scores)
    assert "15 cells, 0 done" in run_command("plan", "quickstart")[1]
    monkeypatch.setenv("GKD_LAB_OUTPUTS", "there")
    assert "15 cells, 1 done" in run_command("plan", "quickstart")[1]
    assert "15 cells, 0 done" in run_command("plan", "quickstart", "--outputs", "outputs")[1]


def test_plan_runs_nothing_and_writes_no_file(run_command: RunCommand, empty_folder: Path) -> None:
    status, out, err = run_command("plan", "quickstart")
    assert (status, err) == (0, "")
    ids = [item.fingerprint for item in experiments.load("quickstart").cells]
    assert [line.split()[0] for line in out.splitlines()[1:16]] == ids
    assert "1 pack of 15" in out
    assert "arithmetic/xl: missing" in out
    assert list(empty_folder.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU may have TF32")
def test_bf16_on_an_old_cpu_is_said_once_and_tf32_refused_once(
    run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, empty_folder: Path
) -> None:
    (empty_folder / "cpuinfo").write_text("flags : fpu avx2\n")
    monkeypatch.setattr(bfloat16, "CPUINFO", empty_folder / "cpuinfo")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ("quickstart", "--set", "precision=bf16", "--set", "tf32=true")
    said = "15 cells compute in bf16"
    status, out, err = run_command("plan", *words)
    assert (status, out.count(said), err) == (0, 1, "")
    for more in ((), ("--workers", "2")):
        status, _, err = run_command("run", *words, *more)
        assert (status, err.count(said), err.count("tf32: true needs")) == (2, 1, 1)


def test_plan_shows_collapsed_cells_and_cells_that_run_alone(run_command: RunCommand) -> None:
    words = ("--set", "temperature=0.5,1", "--set", "lmbda=0", "--set", "dropout=0.1")
    _, out, _ = run_command("plan", "quickstart", *words)
    assert out.count("2 combinations") == 5
    assert "temperature=0.5" in out
    assert "5 cells run alone: dropout" in out


def test_output_to_a_narrow_pipe_is_not_wrapped(
    run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    axes = ["temperature=0.25,0.5", "learning_rate=0.001,0.0025", "steps=100,200", "batch_size=8,16"]
    sets = [word for axis in axes for word in ("--set", axis)]
    for command in ("plan", "status"):
        _, out, _ = run_command(command, "quickstart", "--set", "lmbda=0.5", *sets)
        header, *lines = out.splitlines()[: 1 + 5 * 2**4]
        assert header.split()[:6] == ["cell", "task", "lmbda", "beta", "seed", "temperature"]
        assert all(len(line.split()[0]) == 8 for line in lines)
        assert all("0.0025" in line or "0.001" in line for line in lines)
        assert len({line.split()[0] for line in lines}) == 80


def test_status_names_a_failed_cell_with_its_error_and_exits_with_1(run_command: RunCommand) -> None:
    failed = experiments.load("quickstart").cells[2]
    Store(Path("outputs")).get_record(failed).mark_failed("ValueError: no luck", "Traceback ...")
    status, out, _ = run_command("status", "quickstart")
    assert status == 1
    assert out.splitlines()[3].split()[:6] == [failed.fingerprint, *["arithmetic", "0", "0.5", "0", "failed"]]
    log = Store(Path("outputs")).get_record(failed).status_file
    assert all(text in out.splitlines()[-1] for text in (failed.folder, "ValueError: no luck", str(log)))


def test_watching_a_finished_grid_ends_at_once_with_its_exit_status(run_command: RunCommand) -> None:
    words = ("quickstart", "--set", "lmbda=0", "--set", "beta=0.5")
    cell = experiments.load("quickstart", overrides={"lmbda": "0", "beta": "0.5"}).cells[0]
    Store(Path("outputs")).get_record(cell).mark_failed("ValueError: no luck", "Traceback ...")
    status, out, _ = run_command("status", *words, "--watch")
    assert status == 1
    assert out.splitlines()[0].startswith("quickstart: 1 failed;")
    assert out.splitlines()[-1] == run_command("status", *words)[1].splitlines()[-1]


def test_list_shows_every_experiment_and_an_invalid_one(run_command: RunCommand) -> None:
    status, out, _ = run_command("list")
    assert status == 0
    shown = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert shown == {
        name: str(experiments.outline_experiment(name)[1]) for name in experiments.list_experiment_files()
    }
    Path("experiments").mkdir()
    write_experiment("description: d\nlmbd: 0\n", "experiments/broken.yaml")
    status, out, err = run_command("list")
    assert status == 2
    assert "quickstart" in out
    assert "broken" in out
    assert "unknown field 'lmbd'" in err


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


def test_no_command_prints_the_help_and_version_prints_one_line(run_command: RunCommand) -> None:
    status, out, _ = run_command()
    assert status == 0
    assert "plan" in out
    assert run_command("--version") == (0, "0.1.0\n", "")
    assert run_command("plan", "--help")[0] == 0


def python(code: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more})


BLOCK = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # importing it raises ImportError
from gkd_lab.cli import main
main()
"""


READING = [
    "list",
    "plan quickstart",
    "status quickstart",
    "table quickstart",
    "sweep quickstart",
    "claims paper",
]


@pytest.mark.parametrize("words", READING)
def test_reading_commands_work_without_training_libraries(words: str) -> None:
    done = python(BLOCK, ",".join(BLOCKED), *words.split())
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout or "arithmetic" in done.stdout


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


@pytest.mark.parametrize("words", ["list", "plan quickstart", "status quickstart"])
def test_plan_and_status_work_without_pandas_and_numpy(words: str) -> None:
    done = python(BLOCK, ",".join((*BLOCKED, "pandas", "numpy", "matplotlib")), *words.split())
    assert done.returncode == 0, done.stderr


def test_a_closed_output_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m gkd_lab plan nano_grid | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("cell ")
    assert done.stderr == ""


def test_a_broken_row_is_reported_with_file_and_line_and_exit_status_1() -> None:
    folder = write_data_folder("rows", '{"question": "broken\n')
    words = ["run", "quickstart", "--set", f"data.source={folder}", "--set", "lmbda=0"]
    code = "from gkd_lab.cli import main; main()"
    done = python(code, *words)
    assert done.returncode == 1
    assert done.stderr.count("rows/train.jsonl:4: ") == 1, "teacher and start have one cause"
    assert "; the start failed for the same reason (see outputs/nano/arithmetic/start-" in done.stderr
    assert "Traceback" not in done.stderr
    statuses = [json.loads(path.read_text()) for path in Path("outputs").rglob("status.json")]
    assert {item["state"] for item in statuses} == {"failed"}
    assert all("Traceback" in item["traceback"] for item in statuses)


def test_claims_judge_a_table_file(run_command: RunCommand) -> None:
    table = Path(__file__).parents[2] / "analysis" / "tables" / "lambda_beta_arithmetic.parquet"
    status, out, _ = run_command("claims", str(table), "--format", "json")
    rows = {row["id"]: row for row in json.loads(out)}
    assert (status, rows["C1"]["verdict"], rows["C1"]["n"]) == (0, "holds", 5)
    assert len(rows["C1"]["comparisons"]) == 10  # five divergences, last and best checkpoint
    status, _, err = run_command("claims", "missing.parquet")
    assert status == 2 and "missing.parquet" in err


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


def test_a_sweep_names_its_experiment_file_by_an_absolute_path(run_command: RunCommand) -> None:
    name = write_experiment("description: d\ntask: arithmetic\ngrid: {lmbda: [0, 1]}\n")
    _, out, _ = run_command("sweep", name)
    assert f"--experiment, {Path(name).resolve()}," in " ".join(out.split())
    _, out, _ = run_command("sweep", "quickstart")
    assert "--experiment, quickstart," in " ".join(out.split())


LORA_EXPERIMENT = """\
description: adapters
task: arithmetic
student: {size: small}
grid: {student.lora.r: [2, 4], lmbda: [1]}
"""


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_missing_peft_is_named_before_anything_is_trained(
    command: str, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_experiment(LORA_EXPERIMENT)
    monkeypatch.setitem(sys.modules, "peft", None)
    status, out, err = run_command(command, name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "gkd-lab[peft]" in err
    assert not list(Path("outputs").rglob("spec.json"))


def test_the_plan_says_why_cells_with_an_adapter_run_alone(run_command: RunCommand) -> None:
    status, out, _ = run_command("plan", write_experiment(LORA_EXPERIMENT))
    assert status == 0
    assert [line.split()[5] for line in out.splitlines()[1:3]] == ["2", "4"]
    assert "2 cells run alone: a LoRA adapter" in out


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
