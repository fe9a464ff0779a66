"""Provenance says what a result came from, and nothing that must stay secret."""

import json
import subprocess
import sys

import pytest

from gkd_lab.records.provenance import provenance, without_secrets

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123",
    "HF_TOKEN": "hf_abcdefghijkl",
    "MY_PASSWORD": "correcthorse",
}
PRINT = "import json; from gkd_lab.records.provenance import provenance; print(json.dumps(provenance()))"


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
    assert without_secrets(words) == words


def test_it_names_code_packages_and_machine_and_what_is_added() -> None:
    facts = provenance(pack=["a"])
    assert facts["packages"].keys() >= {"torch", "transformers", "trl"}
    assert facts["machine"]["cpus"] >= 1
    assert facts["pack"] == ["a"]
    assert json.loads(json.dumps(facts)) == facts
