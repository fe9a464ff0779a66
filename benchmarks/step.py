"""Milliseconds of an optimizer step at lmbda 0, 0.5 and 1: ours against TRL's GKDTrainer.

    python benchmarks/step.py [--small] [--out FILE.json]

Both get the same models, rows, precision and coin, and sample with a KV cache (gradient checkpointing off:
with it on TRL samples without). The two take turns, run by run, and each step is timed by itself; a ratio is
of medians. Target: ours is never slower.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig as TrlConfig
from trl.experimental.gkd import GKDTrainer as TrlTrainer

from gkd_lab import GKDConfig, GKDTrainer
from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.models.build import train_tokenizer
from gkd_lab.models.rng import is_on_policy

TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
LMBDAS = (0.0, 0.5, 1.0)
WORDS = [f"w{n}" for n in range(500)]


@dataclass(frozen=True)
class Size:
    """Widths and layers of student and teacher, vocabulary, rows of a step, prompt and answer tokens."""

    name: str
    student: tuple[int, int]
    teacher: tuple[int, int]
    vocabulary: int
    rows: int
    prompt: int
    answer: int
    dtype: torch.dtype = torch.float32


NANO = Size("nano", (64, 2), (128, 4), 600, 16, 24, 24)
SMALL_LM = Size("25 M, V = 32,768", (256, 4), (384, 6), 32_768, 4, 48, 32)
HALF_B = Size("0.5 B, T = 1,024", (896, 24), (1536, 28), 151_936, 4, 512, 512, torch.bfloat16)


def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer(
        TokenizerSpec(kind="word", vocab_size=600), [" ".join([*WORDS, "user", "assistant"])]
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATE
    return made


def model(shape: tuple[int, int], size: Size, seed: int) -> LlamaForCausalLM:
    """Random weights: it hardly ever ends a sequence, so that both trainers sample equally many tokens."""
    width, layers = shape
    torch.manual_seed(seed)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(4, width // 64),
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return made.to(size.dtype)


def rows(size: Size, count: int) -> datasets.Dataset:
    def words(first: int, length: int) -> str:
        return " ".join(WORDS[(first + n) % len(WORDS)] for n in range(length))

    return datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": words(n, size.prompt - 6 - n % 4)},
                    {"role": "assistant", "content": words(7 * n, size.answer - 1)},
                ]
            }
            for n in range(count)
        ]
    )


class Clock(TrainerCallback):
    """Seconds of each step, from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


@contextmanager
def our_coin(lmbda: float, seed: int, clock: Clock) -> Iterator[None]:
    """TRL's coin falls as ours does."""

    def random() -> float:
        return 0.0 if is_on_policy(lmbda, seed, len(clock.seconds) + (clock.last is not None)) else 2.0

    with mock.patch("trl.experimental.gkd.gkd_trainer.random.random", random):
        yield


def seconds(ours: bool, size: Size, lmbda: float, steps: int) -> list[float]:
    """Seconds of each step but the first."""
    kind, config = (GKDTrainer, GKDConfig) if ours else (TrlTrainer, TrlConfig)
    clock = Clock()
    cpu = not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = config(
            output_dir=folder,
            max_steps=steps + 1,
            per_device_train_batch_size=size.rows,
            learning_rate=1e-5,
            lmbda=lmbda,
            max_new_tokens=size.answer,
            max_length=None,
            gradient_checkpointing=False,
            bf16=size.dtype == torch.bfloat16,
            use_cpu=cpu,
            save_strategy="no",
            logging_steps=1000,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        tokens = tokenizer()
        trainer = kind(
            model=model(size.student, size, 0),
            teacher_model=model(size.teacher, size, 1),
            args=arguments,
            train_dataset=rows(size, size.rows * (steps + 1)),
            processing_class=tokens,
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        with our_coin(lmbda, arguments.seed, clock):
            trainer.train()
    return clock.seconds


def compare(size: Size, lmbda: float, steps: int, turns: int) -> dict[str, Any]:
    """Medians over steps, and the range of the turns' own ratios; steps at 0.5 are averaged."""
    middle = statistics.median if lmbda in (0, 1) else statistics.fmean
    taken: dict[bool, list[list[float]]] = {True: [], False: []}
    for turn in range(turns):
        for ours in (True, False) if turn % 2 else (False, True):
            taken[ours].append(seconds(ours, size, lmbda, steps))
    of_turns = [middle(a) / middle(b) for a, b in zip(taken[True], taken[False], strict=True)]
    # At 0.5 steps differ by kind, so turns are compared step by step before they are averaged.
    by_step = {kind: [statistics.median(s) for s in zip(*runs, strict=True)] for kind, runs in taken.items()}
    ours, theirs = middle(by_step[True]), middle(by_step[False])
    return {
        "size": size.name,
        "lmbda": lmbda,
        "ours_ms": 1000 * ours,
        "trl_ms": 1000 * theirs,
        "ratio": ours / theirs,
        "lowest": min(of_turns),
        "highest": max(of_turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="nano alone, in half a minute")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    sizes = [NANO] if options.small else [NANO, HALF_B if gpu else SMALL_LM]
    steps, turns = (6, 2) if options.small else (12, 3)
    found = [compare(size, lmbda, steps, turns) for size in sizes for lmbda in LMBDAS]
    table = Table(title=f"One optimizer step, {turns} turns of {steps} steps")
    for name in ("size", "lmbda", "ours, ms", "TRL, ms", "ours / TRL", "turns"):
        table.add_column(name, justify="left" if name == "size" else "right")
    for row in found:
        table.add_row(
            row["size"],
            f"{row['lmbda']:g}",
            f"{row['ours_ms']:.0f}",
            f"{row['trl_ms']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['lowest']:.2f} to {row['highest']:.2f}",
        )
    Console().print(table)
    if options.out is not None:
        device = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
        versions = {m.__name__: m.__version__ for m in (torch, transformers, trl)}
        facts = {"device": device, "threads": torch.get_num_threads(), "versions": versions, "steps": found}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
