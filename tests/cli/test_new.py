"""`gkd-lab new`: a commented experiment for a user's data and pair, which `gkd-lab plan` accepts at once."""

import json
import os
import pty
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gkd_lab import experiments
from gkd_lab.cli.data_preview import _preview_hub, preview_data
from gkd_lab.cli.experiment_draft import format_value
from gkd_lab.cli.pair_preview import compare_tokenizers, preview_model
from gkd_lab.config.yaml_files import parse_yaml

from ..training.scripts import llama, saved, t5
from .command_runs import BLOCK, BLOCKED, RunCommand, python

FORMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "arithmetic": lambda n: {"question_text": f"{n} plus 1?", "solution": f"{n} + 1 #### {n + 1}"},
    "summarization": lambda n: {"article": f"It rained on day {n}. " * 3, "highlights": f"Rain, {n}."},
    "translation": lambda n: {"src_en": f"house {n}", "tgt_de": f"Haus {n}"},
    "text": lambda n: {"id": str(n), "left side": f"a: {n}", "right side": f"# b {n}"},
}
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {"decoder-only": llama, "encoder-decoder": t5}


def write_data(form: str, folder: str = "rows", splits: tuple[str, ...] = ("train", "dev", "test")) -> str:
    Path(folder).mkdir()
    for split in splits:
        lines = (json.dumps(FORMS[form](number)) + "\n" for number in range(30))
        Path(folder, f"{split}.jsonl").write_text("".join(lines))
    return folder


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with all bytes, so that it reads any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def write_pair(family: str, student_text: str = "a house of rain") -> None:
    build = FAMILIES[family]
    saved(build(1, width=24, vocabulary=320), Path("teacher"), make_tokenizer("a house of rain"))
    saved(build(2, width=16, vocabulary=320), Path("student"), make_tokenizer(student_text))


PAIR = ("--teacher", "./teacher", "--student", "./student")


def read_file(name: str = "mine.yaml") -> dict[str, Any]:
    content = parse_yaml(Path(name).read_text())
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_for_a_pair_passes_plan_at_once(
    form: str, family: str, run_command: RunCommand
) -> None:
    write_data(form)
    write_pair(family)
    status, out, err = run_command("new", "mine.yaml", "--data", "rows", *PAIR)
    assert status == 0, err
    assert out == "wrote: mine.yaml\nnext:  gkd-lab plan mine.yaml\n"
    written = read_file()
    assert written["task"] == form
    assert written["data"]["columns"] == dict(
        zip(("prompt", "target"), [name for name in FORMS[form](0) if name != "id"], strict=True)
    )
    assert (written["family"], written["teacher"], written["student"]) == (family, "./teacher", "./student")
    status, plan, err = run_command("plan", "mine.yaml")
    assert (status, err) == (0, "")
    assert "9 cells" in plan


@pytest.mark.parametrize("form", FORMS)
def test_without_a_pair_models_are_made_on_the_rows(form: str, run_command: RunCommand) -> None:
    write_data(form)
    assert run_command("new", "mine.yaml", "--data", "rows", "--seeds", "3", "--beta", "0,1")[0] == 0
    written = read_file()
    assert (written["scale"], written["teacher"]) == ("nano", "xl")
    assert written["grid"] == {"lmbda": [0, 0.5, 1], "beta": [0, 1], "seed": [0, 1, 2]}
    status, plan, _ = run_command("plan", "mine.yaml")
    assert status == 0
    assert "18 cells" in plan


def test_every_line_but_the_description_has_a_comment(run_command: RunCommand) -> None:
    write_data("arithmetic")
    write_pair("decoder-only")
    run_command("new", "mine.yaml", "--data", "rows", *PAIR, "--sft-steps", "5")
    lines = Path("mine.yaml").read_text().splitlines()
    start, end = lines.index("description: >-"), next(n for n, line in enumerate(lines) if "scale:" in line)
    assert all("  # " in line for line in lines[end:])
    assert lines[0].startswith("# ")
    assert start == 1
    assert read_file()["teacher"] == {"pretrained": "./teacher", "sft": {"steps": 5}}


def test_lengths_are_those_of_the_first_rows_in_tokens_of_the_pair(run_command: RunCommand) -> None:
    write_data("summarization")
    write_pair("decoder-only")
    run_command("new", "mine.yaml", "--data", "rows", *PAIR)
    tokenizer = Tokenizer.from_file("student/tokenizer.json")
    texts = [FORMS["summarization"](number)["article"].strip() for number in range(30)]
    longest = max(len(tokenizer.encode(text).ids) + 1 for text in texts)
    assert read_file()["max_input_tokens"] == -(-longest // 16) * 16
    assert f"90 of the first 90 rows fit; the longest has {longest} tokens" in Path("mine.yaml").read_text()


def test_lengths_fit_the_positions_of_the_model(run_command: RunCommand) -> None:
    write_data("summarization")
    write_pair("decoder-only")
    for role in ("teacher", "student"):
        config = json.loads(Path(role, "config.json").read_text())
        for name in ("rope_theta", "rope_scaling", "rope_parameters"):
            config.pop(name, None)
        Path(role, "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    status, _, err = run_command("new", "mine.yaml", "--data", "rows", *PAIR)
    assert status == 0, err
    written = read_file()
    assert written["max_input_tokens"] + written["max_output_tokens"] <= 40
    assert run_command("plan", "mine.yaml")[0] == 0


def test_two_tokenizers_give_cells_that_do_not_compare_tokens(run_command: RunCommand) -> None:
    write_data("text")
    write_pair("decoder-only", student_text="zebra quartz zebra quartz")
    status, _, err = run_command("new", "mine.yaml", "--data", "rows", *PAIR)
    assert status == 0
    assert "tokenizers differ: " in err
    written = read_file()
    assert written["lmbda"] == 0
    assert written["grid"]["objectives"][1] == [{"type": "cross_entropy"}, {"type": "uld"}]
    status, plan, err = run_command("plan", "mine.yaml")
    assert (status, err) == (0, "")
    assert "4 cells" in plan


def test_data_without_test_rows_is_scored_on_held_out_ones(run_command: RunCommand) -> None:
    write_data("text", splits=("train",))
    run_command("new", "mine.yaml", "--data", "rows")
    assert read_file()["evaluations"] == [{"decoding": "greedy", "split": "validation"}]
    assert "of the 3 last rows of train, as there are no test rows" in Path("mine.yaml").read_text()
    assert run_command("plan", "mine.yaml")[0] == 0


@pytest.mark.parametrize(("rows", "batch_size", "passes"), [(2, 1, "300"), (10, 8, "267"), (18, 16, "282")])
def test_a_batch_has_no_more_rows_than_there_are_to_train_on(
    rows: int, batch_size: int, passes: str, run_command: RunCommand
) -> None:
    write_data("text", splits=("train",))
    lines = Path("rows/train.jsonl").read_text().splitlines(keepends=True)
    Path("rows/train.jsonl").write_text("".join(lines[:rows]))
    status, _, err = run_command("new", "mine.yaml", "--data", "rows")
    assert status == 0, err
    assert read_file()["batch_size"] == batch_size
    assert f"{passes} passes over the rows" in Path("mine.yaml").read_text()
    assert run_command("plan", "mine.yaml")[0] == 0


def test_one_row_cannot_be_scored_on_held_out_ones(run_command: RunCommand) -> None:
    write_data("text", splits=("train",))
    Path("rows/train.jsonl").write_text(json.dumps(FORMS["text"](1)))
    status, out, err = run_command("new", "mine.yaml", "--data", "rows")
    assert (status, out) == (2, "")
    assert "no split 'validation'" in err
    assert not Path("mine.yaml").exists()


def test_many_test_rows_are_cut_to_500(run_command: RunCommand) -> None:
    write_data("text")
    Path("rows/test.jsonl").write_text('{"left side": "a", "right side": "b"}\n' * 501)
    run_command("new", "mine.yaml", "--data", "rows")
    assert read_file()["data"]["test"] == 500


def test_a_file_is_overwritten_with_force_alone(run_command: RunCommand) -> None:
    write_data("text")
    Path("mine.yaml").write_text("mine")
    status, out, err = run_command("new", "mine.yaml", "--data", "rows")
    assert (status, out) == (2, "")
    assert "'mine.yaml' is there already; give another name, or --force" in err
    assert Path("mine.yaml").read_text() == "mine"
    assert run_command("new", "mine.yaml", "--data", "rows", "--force")[0] == 0
    assert read_file()["task"] == "text"


def test_the_file_is_named_by_the_data_and_its_name_is_quoted_for_the_shell(run_command: RunCommand) -> None:
    write_data("text", folder="my rows")
    assert run_command("new", "--data", "my rows/")[1] == (
        "wrote: my rows.yaml\nnext:  gkd-lab plan 'my rows.yaml'\n"
    )
    assert run_command("plan", "my rows.yaml")[0] == 0


def test_hub_models_whose_configuration_is_not_here_need_their_family(run_command: RunCommand) -> None:
    write_data("text")
    words = ("new", "mine.yaml", "--data", "rows", "--teacher", "owner/a", "--student", "owner/b")
    status, _, err = run_command(*words)
    assert status == 2
    assert "owner/a and owner/b: their family is not known" in err
    status, _, err = run_command(*words, "--family", "encoder-decoder")
    assert status == 0
    assert "the revisions of 2 hub names are unknown" in err
    assert read_file()["family"] == "encoder-decoder"


def test_a_standard_t5_of_the_hub_is_known_offline() -> None:
    model = preview_model("--teacher", "google/flan-t5-xl")
    assert (model.family, model.parameters) == ("encoder-decoder", 2_849_757_184)
    assert compare_tokenizers(model, preview_model("--student", "google/flan-t5-small")) is None


def test_weights_are_counted_by_their_headers() -> None:
    model = llama(1)
    saved(model, Path("teacher"), make_tokenizer("a"))
    expected = sum(weight.numel() for weight in model.state_dict().values())
    assert preview_model("--teacher", "teacher").parameters == expected


def test_a_data_set_is_read_by_its_first_rows() -> None:
    write_data("arithmetic", folder="owner")
    Path("owner").rename("rows")
    Path("owner").mkdir()
    Path("rows").rename("owner/rows")
    by_library, by_folder = _preview_hub("owner/rows", None), preview_data("owner/rows")
    assert sorted(by_library.row_counts) == sorted(by_folder.row_counts)
    assert list(by_library.rows) == list(by_folder.rows)


WRONG = {
    "new": "--data is missing, and there is no terminal to ask in",
    "new x.yaml --data row": "--data: no folder 'row', nor a hub name (owner/name); did you mean rows?",
    "new x.yaml --data owner/rows": "--data: cannot look at 'owner/rows' on the hub",
    "new x.yaml --data empty": "--data: empty holds no file of rows",
    "new x.yaml --data tests": "--data: tests has no split 'train' to distil on; it has: test",
    "new x.yaml --data rows/train.jsonl": "rows/train.jsonl is a file; give the folder that holds it",
    "new x.yaml --data rows --task arithmetik": "unknown task 'arithmetik'; did you mean 'arithmetic'?",
    "new x.yaml --data rows --task arithmetic": "no task reads the rows; arithmetic: field 'answer' must be",
    "new x.yaml --data rows --prompt lefts": "--prompt: no column 'lefts'",
    "new x.yaml --data rows --teacher ./teacher": "--student is missing: a pair is two models, or none",
    "new x.yaml --data rows --teacher ./techer --student ./student": "no folder './techer'; did you mean "
    "./teacher?",
    "new x.yaml --data rows --teacher ./teacher --student ./other": "./teacher is decoder-only, ./other is "
    "encoder-decoder: they do not go together",
    "new x.yaml --data rows --teacher ./teacher --student ./broken": "has no tokenizer",
    "new x.yaml --data rows --teacher ./teacher --student ./student --family encoder-decoder": "--family "
    "encoder-decoder: the models are decoder-only; leave it out",
    "new x.yaml --data rows --lmbda 2": "--lmbda 2: 2 is not valid: must be a number from 0 to 1",
    "new x.yaml --data rows --beta no": "--beta no: 'no' is not valid: must be a number from 0 to 1",
    "new x.yaml --data rows --seeds 0": "Invalid value for '--seeds'",
    "new x.txt --data rows": "'x.txt': an experiment's file ends in .yaml; write x.yaml",
    "new rows/train.jsonl/x.yaml --data rows": "is a file; name a file in a folder",
    "new x.yaml --data rows --outputs rows/train.jsonl": "--outputs 'rows/train.jsonl' is a file",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items())
def test_a_wrong_request_gives_one_message_and_writes_nothing(
    words: str, message: str, run_command: RunCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data("text")
    write_data("text", folder="tests", splits=("test",))
    Path("empty").mkdir()
    write_pair("decoder-only")
    saved(t5(1), Path("other"), make_tokenizer("a"))
    saved(llama(1), Path("broken"))
    capsys.readouterr()  # what the library says of the files that it writes
    before = sorted(Path().rglob("*"))
    status, out, err = run_command(*words.split())
    assert (status, out) == (2, "")
    assert err.startswith("gkd-lab: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_the_faults_of_data_teacher_and_student_come_at_once(run_command: RunCommand) -> None:
    write_data("text")
    saved(llama(1), Path("broken"))
    Path("broken/model.safetensors").unlink()
    words = ("new", "x.yaml", "--data", "row", "--teacher", "./broken", "--student", "./nowhere")
    status, out, err = run_command(*words)
    assert (status, out) == (2, "")
    first, *faults = err[err.index("gkd-lab: ") :].splitlines()
    assert first == "gkd-lab: 4 faults:"
    assert [fault.strip().split(":")[0] for fault in faults] == [
        "--data",
        "--teacher",
        "--teacher",
        "--student",
    ]
    assert "did you mean rows?" in faults[0]
    assert not Path("x.yaml").exists()
    status, _, err = run_command("new", "x.yaml", "--teacher", "./nowhere")
    assert status == 2
    assert [line.split()[0] for line in err.splitlines()[1:]] == ["--teacher:", "--data", "--student"]
    status, _, err = run_command("new", "x.yaml", "--data", "rows", "--prompt", "lefts", *words[4:])
    assert status == 2
    assert "--prompt: no column 'lefts'" in err.splitlines()[1]
    assert "--student: no folder './nowhere'" in err


def test_an_empty_model_is_none(run_command: RunCommand) -> None:
    write_data("text")
    write_pair("decoder-only")
    words = ("new", "x.yaml", "--data", "rows", "--teacher")
    status, _, err = run_command(*words, "./teacher", "--student", "")
    assert status == 2
    assert err.endswith("gkd-lab: --student is missing: a pair is two models, or none\n")
    assert run_command(*words, "", "--student", "")[0] == 0
    assert read_file("x.yaml")["scale"] == "nano"


TEXTS = [
    "rows",
    "./my rows",
    "no",
    "1e5",
    "null",
    "a: b",
    "a #b",
    "#a",
    "ümlaut",
    "[x]",
    "",
    "a, b",
    "{a: b}",
]


@pytest.mark.parametrize("value", [*TEXTS, 1, 0.5, None])
def test_a_value_reads_back_as_it_was_written(value: Any) -> None:
    for wrapped in (value, [value], {"key": value}, [{"key": [value]}]):
        assert parse_yaml(f"field: {format_value(wrapped)}  # comment") == {"field": wrapped}


def test_new_loads_no_torch() -> None:
    write_data("arithmetic")
    write_pair("decoder-only")
    blocked = ",".join(BLOCKED)
    result = python(BLOCK, blocked, "new", "mine.yaml", "--data", "rows", *PAIR)
    assert result.returncode == 0, result.stderr


def answer_in_terminal(words: list[str], answers: list[str]) -> tuple[int, str]:
    """Return (exit status, screen) of a command in a terminal, an answer for each question."""
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "gkd_lab", *words])
    screen, remaining, deadline = b"", list(answers), time.monotonic() + 60
    asked_at = 0
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                screen += os.read(terminal, 65536)
            except OSError:  # Linux's end of a terminal
                break
        elif remaining and screen[asked_at:].rstrip(b" ").endswith(b":"):
            asked_at = len(screen)
            os.write(terminal, f"{remaining.pop(0)}\n".encode())
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return status, screen.decode().replace("\r", "")


def test_in_a_terminal_what_is_missing_is_asked_for_until_it_is_valid() -> None:
    write_data("arithmetic")
    write_pair("decoder-only")
    answers = ["nowhere", "rows", "./techer", "./teacher", "./student"]
    answers += ["txt", "text", "", "", "-1", "7", ""]
    status, screen = answer_in_terminal(["new"], answers)
    assert status == 0, screen
    assert "Error: --data: no folder 'nowhere'" in screen
    assert "Error: --teacher: no folder './techer'; did you mean ./teacher?" in screen
    assert "Error: unknown task 'txt'; did you mean 'text'?" in screen
    assert "Error: '-1' is not valid: must be a whole number from 0" in screen
    assert "Task [arithmetic]: " in screen
    assert "question_text: 0 plus 1?" in screen
    written = read_file("rows.yaml")
    assert written["task"] == "text"
    assert written["student"] == {"pretrained": "./student", "sft": {"steps": 7}}
    experiments.check_models_and_splits(experiments.load("rows.yaml"))


def test_in_a_terminal_the_faults_of_what_is_given_come_before_a_question() -> None:
    write_data("arithmetic")
    status, screen = answer_in_terminal(["new", "--data", "row", "--teacher", "./nowhere"], ["./student"])
    assert status == 2, screen
    assert "2 faults:" in screen
    assert "Student, " not in screen


def test_in_a_terminal_a_whole_request_asks_nothing() -> None:
    write_data("arithmetic")
    write_pair("decoder-only")
    status, screen = answer_in_terminal(["new", "mine.yaml", "--data", "rows", *PAIR], [])
    assert status == 0, screen
    assert "next:  gkd-lab plan mine.yaml" in screen


def test_in_a_terminal_no_pair_is_an_empty_answer() -> None:
    write_data("summarization")
    status, screen = answer_in_terminal(["new", "--data", "rows", "--task", "summarization"], [""] * 4)
    assert status == 0, screen
    assert read_file("rows.yaml")["scale"] == "nano"
