"""Memory of the device while two parked teachers take turns, against the larger of them alone.

    python benchmarks/teacher_memory.py [--out FILE.json]

Two optimizer steps of a small student, which compares with the mixture of both teachers. On a GPU the peak is
CUDA's own. On a CPU weights are parked where they are used, so teachers are told to work on `cpu:0`, to which
torch copies what lies on `cpu`; the peak is that of torch's allocator, which counts from the first step on,
so that weights at home are left out as those in CPU memory are on a GPU.
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
from gkd_lab.runner.library_logging import silence_libraries
from gkd_lab.teachers.teacher import Teacher

VOCABULARY = 4096
LARGER, SMALLER, STUDENT = (768, 8), (512, 6), (64, 2)
"""Width and layers."""
ROWS, WORDS = 4, 24


def model(width: int, layers: int) -> LlamaForCausalLM:
    """Llama-like, float32, with a head of its own."""
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


def weights(of: LlamaForCausalLM) -> int:
    """Bytes."""
    return sum(p.numel() * p.element_size() for p in of.parameters())


def peak(tokenizer: PreTrainedTokenizerFast, teachers: list[LlamaForCausalLM], *, parked: bool) -> int:
    """Most bytes on the device during two steps."""
    mixture = {"beta": 0.1, "teachers": list(range(len(teachers)))}
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            folder,
            objectives=[mixture],
            lmbda=0.0,
            max_steps=2,
            per_device_train_batch_size=ROWS,
            park_teacher=parked,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        )
        words = " ".join(f"w{n}" for n in range(WORDS))
        trainer = GKDTrainer(
            model(*STUDENT),
            teachers[0],
            args,
            train_dataset=[{"prompt": "w1 ", "completion": words}] * (2 * ROWS),
            processing_class=tokenizer,
            teacher_processing_class=tokenizer,
            more_teachers=[Teacher(one, processing_class=tokenizer) for one in teachers[1:]],
        )
        return _on_gpu(trainer) if torch.cuda.is_available() else _on_cpu(trainer, Path(folder))


def _on_gpu(trainer: GKDTrainer) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return torch.cuda.max_memory_allocated()


def _on_cpu(trainer: GKDTrainer, folder: Path) -> int:
    elsewhere: Any = SimpleNamespace(
        device=torch.device("cpu:0"), autocast=trainer.accelerator.autocast, state=trainer.accelerator.state
    )
    for teacher in trainer.teachers:
        teacher._accelerator = elsewhere  # type: ignore[attr-defined]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        trainer.train()
    trace = folder / "trace.json"
    seen.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    return max(int(e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]")


def main() -> None:
    """Print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    silence_libraries()
    torch.manual_seed(0)
    tokenizer = train_tokenizer(
        TokenizerSpec(kind="word", vocab_size=VOCABULARY), [" ".join(f"w{n}" for n in range(VOCABULARY - 8))]
    )
    larger, smaller = model(*LARGER), model(*SMALLER)
    found = {
        "larger alone, parked": peak(tokenizer, [larger], parked=True),
        "both, parked": peak(tokenizer, [larger, smaller], parked=True),
        "both, parked, the larger one second": peak(tokenizer, [smaller, larger], parked=True),
    }
    alone = found["larger alone, parked"]
    table = Table("teachers", "peak, MiB", "of the larger alone")
    for name, most in found.items():
        table.add_row(name, f"{most / 2**20:.1f}", f"{most / alone:.3f} x")
    console = Console()
    console.print(table)
    sizes = {"larger": weights(larger), "smaller": weights(smaller)}
    console.print({name: f"{size / 2**20:.1f} MiB of weights" for name, size in sizes.items()})
    if asked.out is not None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, torch's allocator"
        facts = {"device": device, **{name: version(name) for name in ("torch", "transformers")}}
        asked.out.write_text(json.dumps({**facts, "weights": sizes, "peak": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
