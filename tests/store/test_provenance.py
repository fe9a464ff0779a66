"""Provenance describes code, machine and sources of a result, without secrets."""

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
PRINT_PROVENANCE = """
import json
from gkd_lab.store.provenance import collect_provenance
print(json.dumps(collect_provenance()))
"""


def test_secrets_of_environment_and_command_are_redacted() -> None:
    words = ["run", "quickstart", "--token=zzzzzzzz", "--api-key", "yyyyyyyy", *SECRETS.values()]
    words += ["https://me:xxxxxxxx@host/x", "--set", "note=correcthorse", "--max_output_tokens", "24"]
    command = [sys.executable, "-c", PRINT_PROVENANCE, *words]
    process = subprocess.run(command, capture_output=True, text=True, env={"PATH": "", **SECRETS})
    assert process.returncode == 0, process.stderr
    for secret in ("zzzzzzzz", "yyyyyyyy", "xxxxxxxx", *SECRETS.values()):
        assert secret not in process.stdout
    stored_command = json.loads(process.stdout)["command"]
    assert stored_command[1:3] == ["run", "quickstart"]
    assert stored_command[-3:] == ["note=[hidden]", "--max_output_tokens", "24"]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "quickstart", "--set", "lmbda=0,1"],
        ["cell", "--task", "arithmetic", "--tokenizer.kind", "word", "--max_input_tokens=24"],
        ["plan", "nano_grid", "--outputs", "/data/keyboard"],
    ],
)
def test_command_without_secrets_is_unchanged(words: list[str]) -> None:
    assert redact_secrets(words) == words


def test_provenance_has_packages_machine_and_extra_facts() -> None:
    facts = collect_provenance(pack=["a"])
    assert facts["packages"].keys() >= {"torch", "transformers", "trl"}
    assert facts["machine"]["cpus"] >= 1
    assert facts["pack"] == ["a"]
    assert json.loads(json.dumps(facts)) == facts


def run_git(folder: Path, *words: str) -> None:
    names = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *names, *words], check=True, capture_output=True)


def test_uncommitted_changes_and_new_modules_change_the_hash(tmp_path: Path) -> None:
    (tmp_path / "gkd_lab").mkdir()
    (tmp_path / "gkd_lab" / "a.py").write_text("one\n")
    run_git(tmp_path, "init")
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "-m", "first")
    clean = describe_checkout(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["changed"] is False
    assert "diff" not in clean
    hashes = []
    for name, text in (("a.py", "two\n"), ("a.py", "three\n"), ("ü.py", "new\n"), ("ü.py", "newer\n")):
        (tmp_path / "gkd_lab" / name).write_text(text)
        changed = describe_checkout(tmp_path)
        assert (changed["commit"], changed["changed"]) == (clean["commit"], True)
        assert changed == describe_checkout(tmp_path)
        hashes.append(changed["diff"])
    assert len(set(hashes)) == 4
    assert "newer" not in json.dumps(changed)


def test_sources_are_data_seeds_and_weight_hashes(
    tmp_path: Path,
) -> None:
    cell, store = experiments.load("quickstart").cells[0], Store(tmp_path)
    teacher = store.get_artifact(cell.scale, "teacher", cell.training.teacher)
    teacher.checkpoint.mkdir(parents=True)
    (teacher.checkpoint / "model.safetensors").write_bytes(b"weights")
    (teacher.checkpoint / "config.json").write_text("{}")
    teacher.finish()
    sources = describe_sources(cell.training, cell.scale, store)
    assert sources["data"]["revision"] == cell.training.data.revision
    assert sources["seeds"]["training"] == cell.seed
    assert sources["teacher"]["fingerprint"] == cell.training.teacher.full_fingerprint
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert sources["teacher"]["files"] == {"checkpoint/model.safetensors": sha256}
    assert sources["start"]["files"] == {}
