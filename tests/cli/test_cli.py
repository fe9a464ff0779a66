"""The command line: exit status 0, 1 or 2, one message, no traceback, and torch only to train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gkd_lab import experiments
from gkd_lab.store import Store, bfloat16

from .command_runs import BLOCK, BLOCKED, RunCommand, python, write_experiment

ROW = '{"question": "1 + 1 =", "answer": "1 1 #### 2"}\n'


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
    "run quickstart --executor ray --time 60": "--executor ray takes --gpus, --mem, --max-jobs, --detach and",
    "run quickstart --executor rya": "unknown executor 'rya'",
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


def test_no_command_prints_the_help_and_version_prints_one_line(run_command: RunCommand) -> None:
    status, out, _ = run_command()
    assert status == 0
    assert "plan" in out
    assert run_command("--version") == (0, "0.1.0\n", "")
    assert run_command("plan", "--help")[0] == 0


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


@pytest.mark.parametrize("words", ["list", "plan quickstart", "status quickstart"])
def test_plan_and_status_work_without_pandas_and_numpy(words: str) -> None:
    done = python(BLOCK, ",".join((*BLOCKED, "pandas", "numpy", "matplotlib")), *words.split())
    assert done.returncode == 0, done.stderr


def test_run_says_what_is_ahead_before_torch_is_loaded() -> None:
    done = python(BLOCK, "torch", "run", "quickstart")
    first, second, *rest = done.stderr.splitlines()
    assert first.startswith("quickstart: 15 missing; left to do: about ")
    assert second == "quickstart: loading torch and the libraries"
    assert any("torch" in line for line in rest), "the import is blocked"


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
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: teacher arithmetic/xl and start arithmetic/small: ")
    assert "; 5 cells were not run (see outputs/nano/arithmetic/teacher-" in line
    assert "Traceback" not in done.stderr
    statuses = [json.loads(path.read_text()) for path in Path("outputs").rglob("status.json")]
    assert {item["state"] for item in statuses} == {"failed"}
    assert all("Traceback" in item["traceback"] for item in statuses)


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


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(before: str | None, after: str) -> None:
    """The variable is set before torch is loaded, which reads it then."""
    script = (
        "import os, sys\nfrom gkd_lab.cli import main\ntry:\n    main(['--version'])\n"
        "except SystemExit:\n    print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if before is not None:
        environment["OMP_WAIT_POLICY"] = before
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{after} False"
