"""Provenance says what a result came from, and nothing that must stay secret."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gkd_lab import experiments
from gkd_lab.store import Store
from gkd_lab.store.provenance import collect_provenance, describe_checkout, describe_sources, redact_secrets

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123",
    "HF_TOKEN": "hf_abcdefghijkl",
    "MY_PASSWORD": "correcthorse",
}
PRINT = """
import json
from gkd_lab.store.provenance import collect_provenance
print(json.dumps(collect_provenance()))
"""


def test_no_secret_of_the_environment_or_the_command_is_kept() -> None:
    words = ["run", "quickstart", "--token=zzzzzzzz", "--api-key", "yyyyyyyy", *SECRETS.values()]
    words += ["https://me:xxxxxxxx@host/x", "--set", "note=correcthorse", "--max_output_tokens", "24"]
    command = [sys.executable, "-c", PRINT, *words]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "", **SECRETS})
    assert done.returncode == 0, done.stderr
    for secret in ("zzzzzzzz", "yyyyyyyy", "xxxxxxxx", *SECRETS.values()):
        assert secret not in done.stdout
    kept = json.loads(done.stdout)["command"]
    assert kept[1:3] == ["run", "quickstart"]
    assert kept[-3:] == ["note=[hidden]", "--max_output_tokens", "24"]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "quickstart", "--set", "lmbda=0,1"],
        ["cell", "--task", "arithmetic", "--tokenizer.kind", "word", "--max_input_tokens=24"],
        ["plan", "nano_grid", "--outputs", "/data/keyboard"],
    ],
)
def test_an_ordinary_command_is_kept_as_it_was(words: list[str]) -> None:
    assert redact_secrets(words) == words


def test_it_names_code_packages_and_machine_and_what_is_added() -> None:
    facts = collect_provenance(pack=["a"])
    assert facts["packages"].keys() >= {"torch", "transformers", "trl"}
    assert facts["machine"]["cpus"] >= 1
    assert facts["pack"] == ["a"]
    assert json.loads(json.dumps(facts)) == facts


def git(folder: Path, *words: str) -> None:
    names = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *names, *words], check=True, capture_output=True)


def test_changes_since_the_commit_are_told_by_a_hash_new_modules_included(tmp_path: Path) -> None:
    (tmp_path / "gkd_lab").mkdir()
    (tmp_path / "gkd_lab" / "a.py").write_text("one\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = describe_checkout(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["changed"] is False
    assert "diff" not in clean
    seen = []
    for name, text in (("a.py", "two\n"), ("a.py", "three\n"), ("ü.py", "new\n"), ("ü.py", "newer\n")):
        (tmp_path / "gkd_lab" / name).write_text(text)
        found = describe_checkout(tmp_path)
        assert (found["commit"], found["changed"]) == (clean["commit"], True)
        assert found == describe_checkout(tmp_path)
        seen.append(found["diff"])
    assert len(set(seen)) == 4
    assert "newer" not in json.dumps(found)


def test_a_training_came_from_data_seeds_and_the_weights_of_its_models(
    tmp_path: Path,
) -> None:
    cell, store = experiments.load("quickstart").cells[0], Store(tmp_path)
    teacher = store.get_artifact(cell.scale, "teacher", cell.training.teacher)
    teacher.checkpoint.mkdir(parents=True)
    (teacher.checkpoint / "model.safetensors").write_bytes(b"weights")
    (teacher.checkpoint / "config.json").write_text("{}")
    teacher.finish()
    found = describe_sources(cell.training, cell.scale, store)
    assert found["data"]["revision"] == cell.training.data.revision
    assert found["seeds"]["training"] == cell.seed
    assert found["teacher"]["fingerprint"] == cell.training.teacher.full_fingerprint
    digest = hashlib.sha256(b"weights").hexdigest()
    assert found["teacher"]["files"] == {"checkpoint/model.safetensors": digest}
    assert found["start"]["files"] == {}
