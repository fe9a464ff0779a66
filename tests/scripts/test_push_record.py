"""`gkd-lab push`: what arrives at the hub, and what is refused before anything is sent."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from gkd_lab.config.artifact_specs import ModelSpec
from gkd_lab.config.cell import Cell
from gkd_lab.config.fingerprint import replace_fields
from gkd_lab.config.grid import Grid
from gkd_lab.config.lora import LoraSpec
from gkd_lab.models.lora_students import add_lora_adapter
from gkd_lab.runner.student_files import save_student
from gkd_lab.store import Record, Store

from ..training.scripts import chat_tokenizer, llama, saved
from .hub_server import TOKEN, HubServer, run_hub
from .user_pair import read_yaml_block, run_child

SCORES = {
    "accuracy": {"value": 41.25, "low": 35.5, "high": 47.0, "n": 80, "signature": "accuracy"},
    "mean_length": {"value": 12.0},
}
PROVENANCE = {
    "time": "2026-01-02T03:04:05+00:00",
    "gkd_lab": "0.1.0",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0"},
    "code": "0123456789abcdef",
    "data": {"kind": "made", "revision": "arithmetic-made-1"},
    "teacher": {"seeds": {"sft": 3}, "files": {"checkpoint/model.safetensors": 64 * "9"}},
    "command": ["gkd-lab", "run", "/home/someone/secret/mine.yaml"],
    "machine": {"system": "a-host-of-mine"},
}


def make_grid(outputs: Path = Path("outputs")) -> Grid:
    from gkd_lab import experiments

    fields = {"task": "arithmetic", "lmbda": "0.5", "beta": "0.1", "seed": "0"}
    return experiments.load_single_cell(fields, scale="nano", outputs=outputs)


def write_finished_cell(*, finished: bool = True) -> tuple[Cell, Record]:
    """Write the record of a cell as a run leaves it, with a tiny student."""
    (cell,) = make_grid().cells
    record = Store(Path("outputs")).get_record(cell)
    record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
    if finished:
        saved(llama(0), record.checkpoint, chat_tokenizer())
        record.write_provenance(PROVENANCE)
        record.finish()
        evaluation = cell.evaluations[0]
        record.get_evaluation(evaluation).write_results(evaluation, [], SCORES)
    return cell, record


def push(*words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run_child("push", *words, **environment)


def test_a_pushed_cell_arrives_with_its_weights_tokenizer_and_card(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cell, record = write_finished_cell()
    done = push(cell.fingerprint[:5], "--private", environment=hub.environment(tmp_path / "home"))
    assert (done.returncode, done.stderr) == (0, "")
    name = f"someone/gkd-arithmetic-{cell.fingerprint}"
    assert done.stdout.strip() == f"{hub.url}/{name}"
    model = hub.models[name]
    assert model.private and not hub.unknown
    stored = {path.name: path.read_bytes() for path in record.checkpoint.iterdir() if path.is_file()}
    assert {path: content for path, content in model.files.items() if path != "README.md"} == stored
    assert {"model.safetensors", "config.json", "tokenizer.json"} < set(model.files)
    text = model.files["README.md"].decode()
    card = ModelCard(text)
    (score,) = card.data.eval_results
    assert (score.metric_value, score.metric_type, score.dataset_split) == (41.25, "accuracy", "test")
    assert score.metric_args == {"low": 35.5, "high": 47.0, "interval": "95 %", "examples": 80}
    assert "| greedy | test | accuracy | 41.25 | [35.50, 47.00] | 80 |" in text
    assert "JSD(beta) of teacher and student with beta = 0.1" in text and "lmbda = 0.5" in text
    assert "agarwal2024onpolicy" in text and f'from_pretrained("{name}")' in text
    provenance = read_yaml_block(text, "Provenance")
    kept = ("time", "code", "python", "packages", "data", "teacher")
    assert {key: provenance[key] for key in kept} == {key: PROVENANCE[key] for key in kept}
    assert (provenance["cell"], provenance["seed"]) == (cell.fingerprint, 0)
    for private in ("/home", "secret", "a-host-of-mine", str(tmp_path), TOKEN):
        assert private not in text


@pytest.mark.parametrize("start_is_on_hub", [False, True])
def test_an_adapter_is_pushed_with_a_base_that_the_hub_has_or_merged(
    start_is_on_hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    (plain,) = make_grid(outputs=tmp_path).cells
    start = plain.training.start
    if start_is_on_hub:
        place = ModelSpec(name="base", pretrained="someone/base", revision="abc")
        start = replace_fields(start, model=place, sft=None)
    training = replace_fields(plain.training, start=start, lora=LoraSpec(r=2))
    cell = replace(plain, training=training)
    store = Store(tmp_path)
    record, base = store.get_record(cell), store.get_sft_student(cell)
    saved(llama(0), base.checkpoint, chat_tokenizer())
    base.write_spec(start, role="start")
    base.finish()
    adapted = add_lora_adapter(llama(0), LoraSpec(r=2), 0, "tiny")
    record.write_spec(training, scale=cell.scale, labels=cell.labels)
    save_student(adapted, chat_tokenizer(), cell, record.checkpoint)
    record.write_provenance(PROVENANCE)
    record.finish()
    with run_hub() as hub:
        done = push(str(record.folder), environment=hub.environment(tmp_path / "home"))
    assert (done.returncode, done.stderr) == (0, "")
    (model,) = hub.models.values()
    card = ModelCard(model.files["README.md"].decode())
    assert card.data.library_name == ("peft" if start_is_on_hub else "transformers")
    assert ("adapter_model.safetensors" in model.files) is start_is_on_hub
    assert ("model.safetensors" in model.files) is not start_is_on_hub
    if start_is_on_hub:
        config = json.loads(model.files["adapter_config.json"])
        assert (config["base_model_name_or_path"], config["revision"]) == ("someone/base", "abc")
        assert card.data.base_model == "someone/base"
    assert not any(str(tmp_path).encode() in content for content in model.files.values())


def test_the_folder_of_a_record_and_a_name_can_be_given(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, record = write_finished_cell()
    environment = hub.environment(tmp_path / "home")
    assert push(str(record.folder), "--repo", "someone/mine", environment=environment).returncode == 0
    assert list(hub.models) == ["someone/mine"] and not hub.models["someone/mine"].private
    refused = push(str(record.folder), "--repo", "others/mine", environment=environment)
    assert refused.returncode == 2 and "others/mine" in refused.stderr
    assert refused.stderr.count("\n") == 1
    misnamed = push(str(record.folder), "--repo", "a/b/c", environment=environment)
    assert misnamed.returncode == 2 and "a/b/c" in misnamed.stderr


@pytest.mark.parametrize(
    ("token", "finished", "words", "named"),
    [
        (None, True, (), "hf auth login"),
        ("hf_" + "x" * 20, True, (), "hf auth login"),
        (TOKEN, False, (), "gkd-lab run"),
        (TOKEN, True, ("ffffffff",), "ffffffff"),
    ],
    ids=["no token", "wrong token", "unfinished", "unknown"],
)
def test_what_cannot_be_pushed_gives_one_message_and_exit_status_2(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    finished: bool,
    words: tuple[str, ...],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    cell, _ = write_finished_cell(finished=finished)
    environment = hub.environment(tmp_path / "home", token)
    done = push(*(words or (cell.fingerprint,)), environment=environment)
    assert done.returncode == 2 and named in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not hub.models


def test_offline_mode_and_a_hub_that_is_down_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cell, _ = write_finished_cell()
    with run_hub() as server:
        environment = server.environment(tmp_path / "home")
    offline = push(cell.fingerprint, environment=environment | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 2 and "HF_HUB_OFFLINE" in offline.stderr
    down = push(cell.fingerprint, environment=environment)
    assert down.returncode == 1 and down.stderr.count("\n") == 1
    assert json.dumps(server.url)[1:-1] in down.stderr
