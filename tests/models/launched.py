"""Train and evaluate under `accelerate launch`, in tests of several processes: launched.py FOLDER OUT.

The folder holds a student and a teacher; rank 0 writes its measurements to OUT.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PrinterCallback

from gkd_lab import GKDConfig, GKDTrainer

GLOBAL_BATCH, STEPS = 8, 4
WORLD = int(os.environ.get("WORLD_SIZE", 1))
ROWS = [{"prompt": f"{a} {b} =", "completion": f" {c} {a}"} for a in "abcd" for b in "efg" for c in "123"]


def main(folder: Path, out: Path) -> None:
    trainer = build_trainer(folder, out.with_suffix(""), max_steps=STEPS)
    trainer.train()
    teacher = trainer.teacher_model
    facts: dict[str, Any] = {
        "losses": losses(trainer),
        "evaluation": trainer.evaluate()["eval_loss"],
        "pieces": sorted({type(p).__name__ for p in teacher.parameters()}),
        "empty": sorted({p.numel() == 0 for p in teacher.parameters()}),
        "device": sorted({p.device.type for p in teacher.parameters()}),
    }
    again = build_trainer(folder, out.with_suffix(""), max_steps=STEPS)
    again.train(resume_from_checkpoint=str(out.with_suffix("") / f"checkpoint-{STEPS // 2}"))
    facts["resumed"] = losses(again)
    if trainer.args.process_index == 0:
        out.write_text(json.dumps(facts))


def build_trainer(folder: Path, output: Path, **more: Any) -> GKDTrainer:
    args = GKDConfig(
        output_dir=str(output),
        per_device_train_batch_size=GLOBAL_BATCH // WORLD,
        per_device_eval_batch_size=len(ROWS) // WORLD,
        learning_rate=1e-3,
        lmbda=0.5,
        temperature=1.0,
        max_new_tokens=6,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        activation_checkpointing=False,
        # Without a backend accelerate starts DeepSpeed on a CPU as a single process.
        ddp_backend="gloo" if WORLD > 1 and not torch.cuda.is_available() else None,
        **more,
    )
    if args.deepspeed_plugin is not None:
        # ZeRO-3 keeps small weights whole, and here all are small.
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    trainer = GKDTrainer(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=args,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: GKDTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
