"""`gkd-lab train` in processes of its own: from and to a hub, and several processes under accelerate."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from .hub_server import COMMIT, TOKEN, HubServer, run_hub
from .user_pair import ROOT, read_yaml_block, run_child, write_own_answers, write_run_file

pytestmark = pytest.mark.slow


def train(*words: str, launcher: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    return run_child("train", "--config", "run.yaml", *words, launcher=launcher, **variables)


# ---- the hub ----


def test_a_student_is_pushed_with_its_card_and_the_token_of_the_file_is_nowhere(
    hub: HubServer, folder: Path
) -> None:
    write_own_answers(Path("data/test.jsonl"), "teacher")
    write_run_file(push_to_hub=True, hub_model_id="someone/mine", hub_token=TOKEN, metrics=["rouge1"])
    done = train(**hub.environment(folder / "home", token=None))
    assert done.returncode == 0, done.stderr
    assert "pushed: someone/mine" in done.stdout
    model = hub.models["someone/mine"]
    for name in ("model.safetensors", "tokenizer.json", "config.json", "README.md", "test_scores.json"):
        assert model.files[name] == Path("out", name).read_bytes()
    assert not any(path.startswith("_") for path in model.files) and not hub.unknown
    scores = json.loads(model.files["test_scores.json"])["scores"]
    (result,) = ModelCard(model.files["README.md"].decode()).data.eval_results
    assert result.metric_value == scores["rouge1"]["value"]
    stored = b"".join(path.read_bytes() for path in Path("out").rglob("*") if path.is_file())
    sent = b"".join(model.files.values())
    assert TOKEN.encode() not in stored + sent + done.stdout.encode() + done.stderr.encode()


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (None, "someone/mine", "hf auth login"),
        (TOKEN, "others/mine", "others/mine"),
    ],
    ids=["no token", "another's name"],
)
def test_a_push_that_the_hub_would_refuse_is_refused_before_training(
    hub: HubServer, folder: Path, token: str | None, name: str, message: str
) -> None:
    write_run_file()
    variables = hub.environment(folder / "home", token)
    done = train("--push_to_hub", "--hub_model_id", name, **variables)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1 and not Path("out").exists()


def test_a_hub_that_is_down_gives_one_message_and_exit_status_1(folder: Path) -> None:
    write_run_file()
    with run_hub() as server:
        variables = server.environment(folder / "home")
    done = train("--push_to_hub", **variables)
    assert done.returncode == 1 and f"{server.url} cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1 and not Path("out").exists()


def test_models_and_rows_are_loaded_from_the_hub_by_name(hub: HubServer, folder: Path) -> None:
    for name, path in (("student", "student"), ("teacher", "teacher"), ("rows", "data")):
        kind = "datasets/" if name == "rows" else ""
        hub.served[f"{kind}owner/{name}"] = (folder / path).rename(folder / f"{name}-of-the-hub")
    write_run_file(
        model_name_or_path="owner/student",
        teacher_model_name_or_path="owner/teacher",
        dataset_name="owner/rows",
    )
    done = train("--metrics", "rouge1", **hub.environment(folder / "home", token=None))
    assert done.returncode == 0, done.stderr
    text = Path("out/README.md").read_text()
    assert ModelCard(text).data.base_model == "owner/student" and ModelCard(text).data.datasets == [
        "owner/rows"
    ]
    assert read_yaml_block(text, "Provenance")["weights"] == dict.fromkeys(
        ("student", "teacher"), f"commit {COMMIT}"
    )
    assert "trained on: 12 rows of `train`; scored: 5 rows of `test`" in text


# ---- several processes ----


def test_two_processes_under_accelerate_train_and_score_as_one(folder: Path) -> None:
    write_own_answers(Path("data/test.jsonl"), "student")
    options: dict[str, Any] = {
        "metrics": ["rouge1"],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
    }
    write_run_file(**options, save_strategy="steps", save_steps=2, lmbda=0.5, seed=1)
    assert train("--per_device_train_batch_size=4", "--output_dir=alone").returncode == 0
    configuration = str(ROOT / "docs" / "accelerate" / "ddp.yaml")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", configuration)
    launcher += ("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0")
    # On a machine with a GPU the backend would be the GPU's.
    backend = ("--ddp_backend=gloo",) if torch.cuda.is_available() else ()
    together = train(*backend, "--per_device_train_batch_size=2", "--output_dir=together", launcher=launcher)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("student: together") == 1
    logs = []
    for name in ("alone", "together"):
        state = json.loads(Path(name, "checkpoint-2/trainer_state.json").read_text())
        logs.append([row.get("loss", row.get("eval_rouge1")) for row in state["log_history"]])
    assert len(logs[0]) == 4 and logs[1] == pytest.approx(logs[0], rel=1e-4)
    alone, both = (load_file(f"{name}/model.safetensors") for name in ("alone", "together"))
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-5)
    predictions = [Path(name, "_test_predictions.jsonl").read_text() for name in ("alone", "together")]
    assert predictions[0] == predictions[1] and len(predictions[0].splitlines()) == 5
    scores = [json.loads(Path(name, "test_scores.json").read_text()) for name in ("alone", "together")]
    assert scores[0] == scores[1] and scores[0]["scores"]["rouge1"]["value"] > 0
    assert read_yaml_block(Path("together/README.md").read_text(), "Provenance")["processes"] == 2
