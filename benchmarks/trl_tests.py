"""TRL's own tests of its GKD trainer, from a checkout of TRL, run against TRL's trainer and against ours.

    python benchmarks/trl_tests.py CHECKOUT [--against trl|gkd_lab] [--verbose]

Nothing of the checkout is copied: pytest runs in a temporary folder in which the hub names of the tests
are local folders with tiny models and rows made here, and two names of `trl.experimental.gkd` are
replaced. The test file and what it imports is executed, the checkout's conftest.py and pytest settings
are not. Without a GPU everything runs on the CPU, tests that ask for an accelerator included.
Exit status: 0; 1 if ours fails where TRL's passes and no reason is listed, or if nothing ran;
2 if the request is wrong.
"""

import argparse
import functools
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

TEST_FILE = Path("tests/experimental/test_gkd_trainer.py")
TRAINERS = ("trl", "gkd_lab")
Outcomes = dict[str, tuple[str, str]]
"""For each test (outcome, first line of what went wrong)."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled", "NO_COLOR": "1"}
HUB = "trl-internal-testing"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The first is the longer of the first two in both parts: one of TRL's tests counts on it.
ROWS = (
    ("What do bees make?", "Honey, from nectar."),
    ("Spell cat.", "C, A, T."),
    ("Which is larger, a pond or a lake?", "A lake."),
    ("Name a prime number.", "Seven is one."),
)
TRAIN_ROWS, TEST_ROWS = 17, 2

DIFFERENCES = {
    "test_loss_covers_all_completion_tokens_with_variable_length_prompts": (
        "our batches pad prompts and completions apart, so no completion begins left of the widest prompt, "
        "which the test asserts of its batch before it looks at a loss"
    ),
}
"""Tests that TRL's trainer passes and ours fails on purpose, and why."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="folder of a TRL checkout")
    parser.add_argument("--against", choices=TRAINERS, help="run only this trainer")
    parser.add_argument("--verbose", action="store_true", help="show pytest's own output")
    asked = parser.parse_args()
    file = asked.checkout.resolve() / TEST_FILE
    if not file.is_file():
        print(f"{asked.checkout} is no checkout of TRL: it has no {TEST_FILE}", file=sys.stderr)
        return 2
    print(versions(asked.checkout))
    trainers = [asked.against] if asked.against else list(TRAINERS)
    outcomes = {trainer: in_a_process(file, trainer, asked.verbose) for trainer in trainers}
    print_table(outcomes)
    missed = unexplained(outcomes)
    if missed:
        print("ours fails for no listed reason, and TRL's was not seen to:", ", ".join(missed))
    return 1 if missed or not all(outcomes.values()) else 0


def versions(checkout: Path) -> str:
    """Which TRL is installed and which the tests are of: they only fit each other."""
    stated = checkout / "VERSION"
    of_tests = stated.read_text().strip() if stated.is_file() else "unknown"
    return f"TRL {importlib.metadata.version('trl')} is installed; the checkout's version is {of_tests}"


def in_a_process(file: Path, trainer: str, verbose: bool) -> Outcomes:
    """Each trainer has a process of its own: what is replaced for one is not seen by the other."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, file, trainer, verbose).result()


def run(file: Path, trainer: str, verbose: bool) -> Outcomes:
    """The tests of `file` against `trainer`, in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.update(OFFLINE, HF_HOME=str(folder / "cache"))
        import torch

        if not torch.cuda.is_available():
            # A device to transformers' decorators, which skip tests on one that is called "cpu".
            os.environ["TRANSFORMERS_TEST_DEVICE"] = "cpu:0"
        os.chdir(folder)
        make_models(folder / HUB)
        make_rows(folder / HUB / "zen")
        replace_names(trainer, use_cpu=not torch.cuda.is_available())
        return run_pytest(file, folder, verbose)


def replace_names(trainer: str, *, use_cpu: bool) -> None:
    """Let the test file import the trainer that is asked for, with a configuration that runs here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental.*")
        import trl.experimental.gkd as names

    if trainer == "gkd_lab":
        from gkd_lab import GKDConfig, GKDTrainer

        names.GKDConfig, names.GKDTrainer = GKDConfig, GKDTrainer
    if use_cpu:
        # TRL's default is bf16, which transformers refuses without a GPU unless this is said.
        names.GKDConfig = functools.partial(names.GKDConfig, use_cpu=True)


def run_pytest(file: Path, folder: Path, verbose: bool) -> Outcomes:
    import pytest

    outcomes: Outcomes = {}

    class Recorder:
        def pytest_runtest_logreport(self, report: Any) -> None:
            name = report.nodeid.rpartition("::")[2]
            if report.when == "call" or report.outcome != "passed":
                outcomes[name] = (report.outcome, what_happened(report))

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                outcomes["(collecting)"] = ("failed", what_happened(report))

    (folder / "pytest.ini").write_text("[pytest]\n")
    options = ["--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    shown = ["-v"] if verbose else ["-p", "no:terminal"]
    pytest.main([str(file), "-c", str(folder / "pytest.ini"), *options, *shown], plugins=[Recorder()])
    return outcomes


def what_happened(report: Any) -> str:
    """The reason of a skip or the message of a failure, one line."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash else report.longrepr).strip()
    return text.splitlines()[0 if crash else -1]


# ---- what stands in for the hub ----


def make_models(folder: Path) -> None:
    """Tiny random models under the names that the tests ask the hub for."""
    import torch
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        GenerationConfig,
        Qwen2Config,
        Qwen2ForCausalLM,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = byte_tokenizer()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    models = {
        "tiny-Qwen2ForCausalLM-2.5": Qwen2ForCausalLM(Qwen2Config(**shape)),
        "tiny-Gemma3ForConditionalGeneration": Gemma3ForConditionalGeneration(
            Gemma3Config(text_config={**shape, "head_dim": 4}, vision_config={**vision, "image_size": 28})
        ),
    }
    for name, model in models.items():
        # As Qwen 2.5 ships: two ends of sequence, and a penalty that must not reach the sampling.
        model.generation_config = GenerationConfig(
            eos_token_id=[end, pad], pad_token_id=pad, do_sample=True, repetition_penalty=1.05
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def byte_tokenizer() -> Any:
    """Byte-level, without merges: any text is tokens; ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
        model_max_length=1024,
    )


def make_rows(folder: Path) -> None:
    """A data set with one configuration of the one on the hub: json lines, and a card that lists them."""
    name = "conversational_language_modeling"
    lines = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    (folder / name).mkdir(parents=True)
    for split, count in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        rows = [{"messages": conversation(*ROWS[n % len(ROWS)])} for n in range(count)]
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def conversation(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


# ---- the table ----


def unexplained(outcomes: Mapping[str, Outcomes]) -> list[str]:
    """Tests that ours fails, that TRL's does not fail too, and that have no listed reason."""
    theirs = outcomes.get("trl", {})
    return [
        name
        for name, (outcome, _) in outcomes.get("gkd_lab", {}).items()
        if outcome == "failed" and theirs.get(name, ("",))[0] != "failed" and name not in DIFFERENCES
    ]


def print_table(outcomes: Mapping[str, Outcomes]) -> None:
    """Tests down, trainers across, and what is known of those that did not pass."""
    names = list(dict.fromkeys(name for run in outcomes.values() for name in run))
    width = max([len(name) for name in names], default=4)
    print(f"{'test':{width}}", *(f"{trainer:8}" for trainer in outcomes), "reason")
    for name in names:
        cells = [run.get(name, ("missing", "")) for run in outcomes.values()]
        reason = DIFFERENCES.get(name) or next((why for _, why in cells if why), "")
        print(f"{name:{width}}", *(f"{outcome:8}" for outcome, _ in cells), reason)
    for trainer, run in outcomes.items():
        passed = sum(outcome == "passed" for outcome, _ in run.values())
        print(f"{trainer}: {passed} of {len(run)} passed")


if __name__ == "__main__":
    sys.exit(main())
