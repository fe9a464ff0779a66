"""Models, chats, arguments and a step clock that step.py and grid.py share.

Models have random weights and no end-of-sequence id, so that every sampled text has the full length.
"""

import os
import platform
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig as TrlConfig
from trl.experimental.gkd import GKDTrainer as TrlTrainer

from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.models.build import train_tokenizer
from gkd_lab.models.rng import is_on_policy

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
WORDS = [f"w{n}" for n in range(500)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word tokenizer with a chat template."""
    text = " ".join([*WORDS, "user", "assistant"])
    tokenizer = train_tokenizer(TokenizerSpec(kind="word", vocab_size=600), [text])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_llama(
    *, width: int, layers: int, feed_forward: int, heads: int, vocabulary: int, positions: int, seed: int
) -> LlamaForCausalLM:
    """Build a Llama with random float32 weights and no end of sequence, on the GPU if there is one.

    There a billion weights are drawn in a second, on the CPU in ten.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlamaForCausalLM(config)


def build_chats(count: int, *, prompt_words: int, answer_words: int) -> list[dict[str, Any]]:
    """Build chats of one question and one answer; prompts have up to 3 words less than `prompt_words`."""

    def join_words(first: int, length: int) -> str:
        return " ".join(WORDS[(first + n) % len(WORDS)] for n in range(length))

    return [
        {
            "messages": [
                {"role": "user", "content": join_words(n, prompt_words - n % 4)},
                {"role": "assistant", "content": join_words(7 * n, answer_words)},
            ]
        }
        for n in range(count)
    ]


def build_arguments(
    config_class: type,
    folder: str,
    *,
    steps: int,
    rows: int,
    answer_tokens: int,
    bf16: bool,
    **overrides: Any,
) -> Any:
    """Return the arguments of a run of `steps` timed steps and one before them."""
    return config_class(
        output_dir=folder,
        max_steps=steps + 1,
        per_device_train_batch_size=rows,
        learning_rate=1e-5,
        max_new_tokens=answer_tokens,
        max_length=None,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **overrides,
    )


def read_clock() -> float:
    """Return the time in seconds once the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class StepClock(TrainerCallback):
    """Measures the seconds of each step but the first, by `read_time`, and of the parts of a step."""

    def __init__(self, read_time: Callable[[], float] | None = None) -> None:
        self.read_time = read_time or read_clock
        self.step_seconds: list[float] = []
        self.part_seconds: list[dict[str, float]] = []
        self._current_parts: dict[str, float] = defaultdict(float)
        self._last_end: float | None = None

    @property
    def step(self) -> int:
        """Number of optimizer steps that have ended."""
        return len(self.step_seconds) + (self._last_end is not None)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        end = self.read_time()
        if self._last_end is not None:
            self.step_seconds.append(end - self._last_end)
            self.part_seconds.append(dict(self._current_parts))
        self._last_end = end
        self._current_parts.clear()

    def time_method(self, owner: Any, name: str, part: str) -> None:
        """Count the seconds of a method's calls as a part of the step."""
        method: Callable[..., Any] = getattr(owner, name)

        def run_timed(*args: Any, **options: Any) -> Any:
            start = read_clock()
            try:
                return method(*args, **options)
            finally:
                self._current_parts[part] += read_clock() - start

        setattr(owner, name, run_timed)


def time_trl_steps(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    chats: Sequence[dict[str, Any]],
    *,
    lmbda: float,
    seed: int,
    **settings: Any,
) -> list[float]:
    """Return the seconds of each step of TRL's GKDTrainer, whose coin falls as ours does."""
    clock = StepClock()

    def toss_coin() -> float:
        return 0.0 if is_on_policy(lmbda, seed, clock.step) else 2.0

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = TrlTrainer(
            model=student,
            teacher_model=teacher,
            args=build_arguments(TrlConfig, folder, lmbda=lmbda, **settings),
            train_dataset=datasets.Dataset.from_list(list(chats)),
            processing_class=build_tokenizer(),
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        with mock.patch("trl.experimental.gkd.gkd_trainer.random.random", toss_coin):
            trainer.train()
    return clock.step_seconds


def merge_turns(turns: Sequence[Sequence[float]]) -> list[float]:
    """Return the median over turns of each step: steps differ in kind, turns only in noise."""
    return [statistics.median(step) for step in zip(*turns, strict=True)]


def describe_machine() -> dict[str, Any]:
    """Return the device, threads and library versions that figures are stored with."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
    }
