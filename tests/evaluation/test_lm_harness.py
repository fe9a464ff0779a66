"""Run lm-eval on tiny exported checkpoints, and compare its scores with those of our table."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.utils_hf import MultiTokenEOSCriteria
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from gkd_lab.cli import main
from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.evaluation_settings import LmEvalSettings, resolve_lm_eval_evaluations
from gkd_lab.config.fingerprint import replace_fields
from gkd_lab.evaluation import lm_scores
from gkd_lab.evaluation.lm_harness import build_task, open_checkpoint
from gkd_lab.metrics import score_many
from gkd_lab.models.build import train_tokenizer
from gkd_lab.runner.lm_eval_runs import evaluate_record, read_model_spec, write_record_tasks
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Record, Store
from gkd_lab.tasks import TASKS

from ..runner.tiny_experiments import options, table_of, tiny_grid

FAMILIES = ("arithmetic", "translation")
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [red, blue]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROWS = [{"question": f"{n} + 1 =", "label": n % 2} for n in range(6)]


def tiny(folder: Path, task: str, **changes: Any) -> Any:
    """Make an experiment whose models sometimes end a text before the limit."""
    student = {"layers": 1, "width": 16, "heads": 2, "sft": {"steps": 80, "learning_rate": 0.01}}
    settings: dict[str, Any] = {
        "grid": {"lmbda": [0]},
        "student": student,
        "learning_rate": 1e-3,
        "data": {"train": 200, "validation": 8, "test": 16},
        "max_input_tokens": 40,
        "max_output_tokens": 20,
        "evaluations": [
            {"decoding": "greedy"},
            # Long texts pay, so that a search that is ended early finds other ones.
            {"decoding": "beam", "num_beams": 3, "length_penalty": 2.0},
        ],
    }
    return tiny_grid(folder, task, name=task, **{**settings, **changes})


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cell of each family."""
    silence_libraries()
    folder = tmp_path_factory.mktemp("lm")
    for task in FAMILIES:
        assert run_grid(tiny(folder, task), options(folder / "outputs")).failures == []
    return folder / "outputs"


def load_record(outputs: Path, task: str) -> Record:
    (cell,) = tiny(outputs.parent, task).cells
    return Store(outputs).get_record(cell)


def task_file(folder: Path, text: str = TASK, rows: Any = ROWS) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(text)
    return str(folder / "task.yaml")


def built(path: str, **more: Any) -> Any:
    (evaluation,) = resolve_lm_eval_evaluations(LmEvalSettings(lm_eval=(path,), **more))
    return build_task(evaluation)


@pytest.mark.parametrize("task", FAMILIES)
def test_lm_eval_itself_gives_the_numbers_of_our_table(task: str, outputs: Path) -> None:
    (cell,) = tiny(outputs.parent, task).cells
    record = Store(outputs).get_record(cell)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(record.checkpoint)},
        tasks=[load_yaml(path) for path in write_record_tasks(record, options(outputs))],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        batch_size=1,
    )
    for evaluation in cell.evaluations:
        name = f"gkd_{task}_{evaluation.name}"
        texts = [sample["filtered_resps"][0].strip() for sample in results["samples"][name]]
        ours = record.get_evaluation(evaluation)
        assert texts == [row["prediction"] for row in ours.read_prediction_rows()]
        assert len(set(texts)) > 4
        for metric in TASKS[task].metrics:
            value = results["results"][name][f"{metric},none"]
            assert value == pytest.approx(ours.read_scores()[metric]["value"], abs=1e-9)
    ended = [
        row["ended"] for e in cell.evaluations for row in record.get_evaluation(e).read_prediction_rows()
    ]
    assert set(ended) == {True, False}


@pytest.mark.parametrize("task", FAMILIES)
def test_the_lm_eval_task_of_a_record_reproduces_its_scores(task: str, outputs: Path) -> None:
    (cell,) = tiny(outputs.parent, task).cells
    record = Store(outputs).get_record(cell)
    evaluations = evaluate_record(record, ["own"], options(outputs), batch_size=5)
    repeated = {judged.evaluation.name: judged.record for judged in evaluations}
    for evaluation in cell.evaluations:
        again, first = repeated[f"gkd_{task}_{evaluation.name}"], record.get_evaluation(evaluation)
        texts = [row["prediction"] for row in first.read_prediction_rows()]
        assert [row["prediction"].strip() for row in again.read_prediction_rows()] == texts
        for metric in TASKS[task].metrics:
            assert again.read_scores()[metric]["value"] == pytest.approx(
                first.read_scores()[metric]["value"], abs=1e-9
            )


@pytest.mark.parametrize("task", FAMILIES)
def test_the_values_of_a_task_file_are_the_metrics_of_the_table(task: str) -> None:
    texts = ["5 8 #### 8", "no number", " ein Haus am See "]
    references = [["3 #### 8"], ["#### 1"], ["ein Haus am See", "das Haus"]]
    ours = score_many(TASKS[task].metrics, [text.strip() for text in texts], references)
    documents = [
        getattr(lm_scores, task)({"references": accepted}, [text])
        for text, accepted in zip(texts, references, strict=True)
    ]
    for metric, score in ours.items():
        values = [document[metric] for document in documents]
        whole = sum(values) / 3 if metric == "accuracy" else getattr(lm_scores, metric)(values)
        assert whole == pytest.approx(score.value)


def test_one_beam_that_ends_does_not_end_the_others() -> None:
    tokenizer = train_tokenizer(TokenizerSpec(kind="word"), ["a b c d"])
    a, b = tokenizer.encode("a b")
    criterion = MultiTokenEOSCriteria("</s>", tokenizer, 1, batch_size=1)
    rows = torch.tensor([[a, b, tokenizer.eos_token_id], [a, b, a], [a, a, b]])
    assert criterion(rows, None).tolist() == [True, False, False]
    assert criterion(rows[1:2], None) is False
    assert criterion(rows[:1], None) is True


def test_lm_eval_results_are_stored_and_computed_once(outputs: Path, tmp_path: Path) -> None:
    grid, record = tiny(outputs.parent, "arithmetic"), load_record(outputs, "arithmetic")
    (judged,) = evaluate_record(record, [task_file(tmp_path)], options(outputs), limit=4)
    scores, rows = judged.record.read_scores(), judged.record.read_prediction_rows()
    hits = [row["scores"]["acc"] for row in rows]
    assert scores["acc"]["value"] == sum(hits) / 4
    assert 0 <= scores["acc"]["low"] <= scores["acc"]["value"] <= scores["acc"]["high"] <= 1
    assert [row["prompt"] for row in rows] == [row["question"] for row in ROWS[:4]]
    status = judged.record.read_status()
    assert (status["state"], status["rows"], status["lm_eval"]) == ("done", 4, lm_eval.__version__)
    (row,) = [row for row in table_of(grid, outputs) if row["role"] == "cell"]
    assert row["colours_first4/acc"] == scores["acc"]["value"]
    assert row["colours_first4.task_hash"] == scores["acc"]["task_hash"] == status["task_hash"]
    assert row["colours_first4.lm_eval"] == lm_eval.__version__
    assert (row["status"], row["evaluations"]["colours_first4"]) == ("done", "done")
    before = judged.record.status_file.stat().st_mtime_ns
    evaluate_record(record, [task_file(tmp_path)], options(outputs), limit=4)
    assert judged.record.status_file.stat().st_mtime_ns == before


def test_a_task_hash_depends_on_documents_and_configuration_only(tmp_path: Path) -> None:
    task_hash = built(task_file(tmp_path / "a")).hash
    assert built(task_file(tmp_path / "b"), limit=2).hash == task_hash
    others = [
        built(task_file(tmp_path / "c", rows=ROWS[:5])).hash,
        built(task_file(tmp_path / "d", TASK.replace("[red, blue]", "[red, green]"))).hash,
        built(task_file(tmp_path / "e", TASK.replace("question}}", "question}}?"))).hash,
        built(task_file(tmp_path / "f", TASK + "fewshot_split: test\n"), num_fewshot=1).hash,
    ]
    assert len({task_hash, *others}) == 5


UNUSABLE = {
    TASK.replace("{{question}}", "{{ question.__class__.__mro__ }}"): "SecurityError: access to attribute",
    TASK.replace("{{question}}", "{{qestion}}"): "'qestion' is undefined",
    TASK.replace("metric: acc", "metric: accc"): "did you mean 'acc'?",
    TASK.replace("dataset_path: json", "dataset_path: owner/rows").replace(
        "dataset_kwargs: {data_files: {test: rows.jsonl}}", ""
    ): "its documents are on the hub, HF_HUB_OFFLINE is set",
}


@pytest.mark.parametrize(("text", "message"), UNUSABLE.items(), ids=range(len(UNUSABLE)))
def test_a_task_that_cannot_be_set_up_is_refused_before_the_model_is_loaded(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as caught:
        built(task_file(tmp_path, text))
    assert message in str(caught.value)


def test_only_code_of_a_trusted_file_is_run(outputs: Path, tmp_path: Path) -> None:
    path = task_file(tmp_path, TASK + "process_docs: !function first.docs\n")
    (tmp_path / "first.py").write_text("def docs(rows):\n    return rows.select([0, 1])\n")
    record = load_record(outputs, "arithmetic")
    with pytest.raises(ConfigError, match="would run Python code"):
        evaluate_record(record, [path], options(outputs))
    (judged,) = evaluate_record(record, [path], options(outputs), trusted=True)
    assert len(judged.record.read_prediction_rows()) == 2


def test_a_record_without_a_search_that_lm_eval_can_repeat_has_no_lm_eval_task(
    outputs: Path, tmp_path: Path
) -> None:
    shutil.copy(load_record(outputs, "arithmetic").folder / "spec.json", tmp_path)
    with pytest.raises(ConfigError, match="greedy or beam search"):
        write_record_tasks(Record(tmp_path), options(outputs))
    (beam,) = [e for e in tiny(outputs.parent, "arithmetic").cells[0].evaluations if e.name == "beam3"]
    record = Record(tmp_path).get_evaluation(replace_fields(beam, length_penalty_form="wu"))
    record.write_spec(replace_fields(beam, length_penalty_form="wu"))
    with pytest.raises(ConfigError, match="length_penalty_form: wu"):
        write_record_tasks(Record(tmp_path), options(outputs))


def test_a_source_longer_than_the_512_positions_of_t5_is_not_cut(outputs: Path, tmp_path: Path) -> None:
    record = load_record(outputs, "translation")
    folder = shutil.copytree(record.checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_positions": 512}))
    model = read_model_spec(record)
    assert open_checkpoint(folder, model, "cpu").max_length == 512
    long = model.model_copy(update={"max_input_tokens": 1024})
    assert open_checkpoint(folder, long, "cpu").max_length == 1024


def test_an_experiment_runs_lm_eval_on_cells_and_reference_models(outputs: Path, tmp_path: Path) -> None:
    path = task_file(tmp_path)
    evaluations = [{"lm_eval": [path], "limit": 3}, {"decoding": "greedy"}]
    grid = tiny(outputs.parent, "arithmetic", evaluations=evaluations)
    assert run_grid(grid, options(outputs)).failures == []
    rows = table_of(grid, outputs)
    assert {row["status"] for row in rows} == {"done"}
    assert all(
        row["colours_first3/acc"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1) for row in rows
    )
    hashes = {row["colours_first3.task_hash"] for row in rows}
    assert len(rows) == 3 and len(hashes) == 1


def test_a_metric_that_a_task_lacks_fails_its_evaluation_alone(outputs: Path, tmp_path: Path) -> None:
    evaluations = [{"lm_eval": [task_file(tmp_path)], "limit": 5, "metric": "f1"}, {"decoding": "greedy"}]
    grid = tiny(outputs.parent, "translation", evaluations=evaluations)
    (failed,) = run_grid(grid, options(outputs)).failures
    assert failed.startswith("3 evaluations: ") and failed.count("/lm_eval-") == 4, "names and file"
    assert "'f1'" in failed and "acc" in failed
    assert {row["evaluations"]["greedy"] for row in table_of(grid, outputs)} == {"done"}


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, cwd=folder, env=environment
    )


@pytest.mark.slow
def test_the_lm_eval_command_prints_the_number_of_our_table(outputs: Path, tmp_path: Path) -> None:
    record = load_record(outputs, "translation")
    (beam,) = [path for path in write_record_tasks(record, options(outputs)) if "beam" in path.name]
    words = ["--model", "hf", "--model_args", f"pretrained={record.checkpoint}", "--device", "cpu"]
    done = command("lm_eval", "run", *words, "--tasks", str(beam), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (cell,) = tiny(outputs.parent, "translation").cells
    value = record.get_evaluation(cell.evaluations[1]).read_scores()["bleu"]["value"]
    (line,) = [line for line in done.stdout.splitlines() if "|bleu" in line.replace(" ", "")]
    assert f"{value:.4f}" in line


@pytest.mark.slow
def test_names_that_lm_eval_does_not_know_or_cannot_fetch_are_answered_by_2(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["evaluate", str(load_record(outputs, "arithmetic").folder), "--outputs", str(outputs), "--tasks"]
    for name, message in (
        ("mmul", "gkd-lab: unknown lm-eval task 'mmul'; did you mean 'mmlu'?"),
        ("mmlu", "gkd-lab: mmlu: its documents are on the hub, HF_HUB_OFFLINE is set"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*words, name])
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, "")
        assert err.startswith(message)
        assert err.count("\n") == 1
