"""Run TRL's tests of its GKD trainer, from a checkout of TRL, against TRL's trainer and against ours.

    python benchmarks/trl_tests.py CHECKOUT [--against trl|gkd_lab] [--verbose]

Nothing of the checkout is copied: pytest runs in a temporary folder in which the hub names of the tests
are local folders with tiny models and rows made here, and two names of `trl.experimental.gkd` are
replaced. The test file and its imports are executed, the checkout's conftest.py and pytest settings
are not. Without a GPU everything runs on the CPU, tests that ask for an accelerator included.
Exit status: 0; 1 if ours fails where TRL's passes and no reason is listed, or if no test ran;
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
"""For each test (outcome, first line of the failure)."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled", "NO_COLOR": "1"}
HUB = "trl-internal-testing"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The first row's question and answer are longer than the second's: one of TRL's tests relies on it.
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
    """Run the tests against each trainer, print, return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="folder of a TRL checkout")
    parser.add_argument("--against", choices=TRAINERS, help="run only this trainer")
    parser.add_argument("--verbose", action="store_true", help="show pytest's own output")
    options = parser.parse_args()
    file = options.checkout.resolve() / TEST_FILE
    if not file.is_file():
        print(f"{options.checkout} is no checkout of TRL: it has no {TEST_FILE}", file=sys.stderr)
        return 2
    print(describe_versions(options.checkout))
    trainers = [options.against] if options.against else list(TRAINERS)
    outcomes = {trainer: run_in_process(file, trainer, options.verbose) for trainer in trainers}
    print_table(outcomes)
    unexplained = list_unexplained_failures(outcomes)
    if unexplained:
        print("ours fails without a listed reason, and TRL's does not:", ", ".join(unexplained))
    return 1 if unexplained or not all(outcomes.values()) else 0


def describe_versions(checkout: Path) -> str:
    """Name the versions of the installed TRL and of the tests: they should be equal."""
    file = checkout / "VERSION"
    test_version = file.read_text().strip() if file.is_file() else "unknown"
    return f"TRL {importlib.metadata.version('trl')} is installed; the checkout's version is {test_version}"


def run_in_process(file: Path, trainer: str, verbose: bool) -> Outcomes:
    """Run the tests in a new process, so that names replaced for one trainer do not reach the other."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_tests, file, trainer, verbose).result()


def run_tests(file: Path, trainer: str, verbose: bool) -> Outcomes:
    """Run the tests of `file` against `trainer`, in a temporary folder."""
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
    """Let the test file import the chosen trainer, with a configuration that runs on this machine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental.*")
        import trl.experimental.gkd as names

    if trainer == "gkd_lab":
        from gkd_lab import GKDConfig, GKDTrainer

        names.GKDConfig, names.GKDTrainer = GKDConfig, GKDTrainer
    if use_cpu:
        # TRL's default is bf16, which transformers refuses without a GPU unless use_cpu is set.
        names.GKDConfig = functools.partial(names.GKDConfig, use_cpu=True)


def run_pytest(file: Path, folder: Path, verbose: bool) -> Outcomes:
    """Run pytest on the file and collect the outcome of each test."""
    import pytest

    outcomes: Outcomes = {}

    class Recorder:
        def pytest_runtest_logreport(self, report: Any) -> None:
            name = report.nodeid.rpartition("::")[2]
            if report.when == "call" or report.outcome != "passed":
                outcomes[name] = (report.outcome, get_reason(report))

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                outcomes["(collecting)"] = ("failed", get_reason(report))

    (folder / "pytest.ini").write_text("[pytest]\n")
    options = ["--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    output = ["-v"] if verbose else ["-p", "no:terminal"]
    pytest.main([str(file), "-c", str(folder / "pytest.ini"), *options, *output], plugins=[Recorder()])
    return outcomes


def get_reason(report: Any) -> str:
    """Return the reason of a skip or the first line of a failure."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash else report.longrepr).strip()
    return text.splitlines()[0 if crash else -1]


# ---- local models and rows in place of the hub's ----


def make_models(folder: Path) -> None:
    """Write tiny random models under the hub names that the tests load."""
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
    tokenizer = build_byte_tokenizer()
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
        # As Qwen 2.5 is published: two ends of sequence, and a penalty that the sampling must ignore.
        model.generation_config = GenerationConfig(
            eos_token_id=[end, pad], pad_token_id=pad, do_sample=True, repetition_penalty=1.05
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def build_byte_tokenizer() -> Any:
    """Build a byte-level tokenizer without merges, which encodes any text, with the ChatML template."""
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
    """Write one configuration of the hub's dataset: JSON lines, and a card that lists them."""
    name = "conversational_language_modeling"
    lines = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    (folder / name).mkdir(parents=True)
    for split, count in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        rows = [{"messages": build_conversation(*ROWS[n % len(ROWS)])} for n in range(count)]
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def build_conversation(question: str, answer: str) -> list[dict[str, str]]:
    """Build the messages of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# ---- the table ----


def list_unexplained_failures(outcomes: Mapping[str, Outcomes]) -> list[str]:
    """List the tests that ours fails and TRL's does not, without a reason in `DIFFERENCES`."""
    trl_outcomes = outcomes.get("trl", {})
    return [
        name
        for name, (outcome, _) in outcomes.get("gkd_lab", {}).items()
        if outcome == "failed" and trl_outcomes.get(name, ("",))[0] != "failed" and name not in DIFFERENCES
    ]


def print_table(outcomes: Mapping[str, Outcomes]) -> None:
    """Print a row for each test, a column for each trainer, and the reason where a test did not pass."""
    names = list(dict.fromkeys(name for run in outcomes.values() for name in run))
    width = max([len(name) for name in names], default=4)
    print(f"{'test':{width}}", *(f"{trainer:8}" for trainer in outcomes), "reason")
    for name in names:
        cells = [run.get(name, ("missing", "")) for run in outcomes.values()]
        reason = DIFFERENCES.get(name) or next((reason for _, reason in cells if reason), "")
        print(f"{name:{width}}", *(f"{outcome:8}" for outcome, _ in cells), reason)
    for trainer, run in outcomes.items():
        passed = sum(outcome == "passed" for outcome, _ in run.values())
        print(f"{trainer}: {passed} of {len(run)} passed")


if __name__ == "__main__":
    sys.exit(main())
