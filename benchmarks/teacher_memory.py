"""Measure the memory of the device while two parked teachers take turns, against the larger of them alone.

    python benchmarks/teacher_memory.py [--smoke] [--out FILE.json]

Two optimizer steps of a small student, whose target is the mixture of both teachers. On a GPU the peak is
CUDA's own. On a CPU weights are parked where they are used, so teachers are told to work on `cpu:0`, to which
torch copies what lies on `cpu`; the peak is that of torch's allocator, which counts from the first step on,
so parked weights are left out, as those in CPU memory are on a GPU.
"""

import argparse
import gc
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gkd_lab import GKDConfig, GKDTrainer
from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.models.build import train_tokenizer
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.teachers.teacher import Teacher

VOCABULARY = 4096
LARGER, SMALLER, STUDENT = (768, 8), (512, 6), (64, 2)
"""Width and layers."""
ROWS, WORDS = 4, 24


def build_model(width: int, layers: int) -> LlamaForCausalLM:
    """Build a Llama with random float32 weights and an untied head."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def count_bytes(model: LlamaForCausalLM) -> int:
    """Count the bytes of a model's weights."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def measure_peak(tokenizer: PreTrainedTokenizerFast, teachers: list[LlamaForCausalLM]) -> int:
    """Return the most bytes on the device during two steps with parked teachers."""
    mixture = {"beta": 0.1, "teachers": list(range(len(teachers)))}
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            folder,
            objectives=[mixture],
            lmbda=0.0,
            max_steps=2,
            per_device_train_batch_size=ROWS,
            park_teacher=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        )
        words = " ".join(f"w{n}" for n in range(WORDS))
        trainer = GKDTrainer(
            build_model(*STUDENT),
            teachers[0],
            args,
            train_dataset=[{"prompt": "w1 ", "completion": words}] * (2 * ROWS),
            processing_class=tokenizer,
            teacher_processing_class=tokenizer,
            more_teachers=[Teacher(model, processing_class=tokenizer) for model in teachers[1:]],
        )
        if torch.cuda.is_available():
            return train_on_gpu(trainer)
        return train_on_cpu(trainer, Path(folder))


def train_on_gpu(trainer: GKDTrainer) -> int:
    """Train; return the peak that CUDA reports, in bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return torch.cuda.max_memory_allocated()


def train_on_cpu(trainer: GKDTrainer, folder: Path) -> int:
    """Train with teachers on `cpu:0`; return the peak of torch's allocator, in bytes."""
    second_device: Any = SimpleNamespace(
        device=torch.device("cpu:0"), autocast=trainer.accelerator.autocast, state=trainer.accelerator.state
    )
    for teacher in trainer.teachers:
        teacher.accelerator = second_device  # type: ignore[attr-defined]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        trainer.train()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    allocations = (event["args"] for event in events if event.get("name") == "[memory]")
    return max(int(allocation["Total Allocated"]) for allocation in allocations)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="teachers of 2 layers")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with versions")
    options = parser.parse_args()
    silence_libraries()
    torch.manual_seed(0)
    tokenizer = train_tokenizer(
        TokenizerSpec(kind="word", vocab_size=VOCABULARY), [" ".join(f"w{n}" for n in range(VOCABULARY - 8))]
    )
    larger, smaller = (build_model(width, 2 if options.smoke else n) for width, n in (LARGER, SMALLER))
    peaks = {
        "larger alone, parked": measure_peak(tokenizer, [larger]),
        "both, parked": measure_peak(tokenizer, [larger, smaller]),
        "both, parked, the larger one second": measure_peak(tokenizer, [smaller, larger]),
    }
    baseline = peaks["larger alone, parked"]
    table = Table("teachers", "peak, MiB", "of the larger alone")
    for name, peak in peaks.items():
        table.add_row(name, f"{peak / 2**20:.1f}", f"{peak / baseline:.3f} x")
    console = Console()
    console.print(table)
    sizes = {"larger": count_bytes(larger), "smaller": count_bytes(smaller)}
    console.print({name: f"{size / 2**20:.1f} MiB of weights" for name, size in sizes.items()})
    if options.out is not None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, torch's allocator"
        versions = {name: version(name) for name in ("torch", "transformers")}
        facts = {"device": device, **versions}
        options.out.write_text(json.dumps({**facts, "weights": sizes, "peak": peaks}, indent=2) + "\n")


if __name__ == "__main__":
    main()
