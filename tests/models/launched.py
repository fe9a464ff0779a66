"""What `accelerate launch` runs in the GPU tests: launched.py FOLDER OUT trains; rank 0 writes its losses."""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer, PrinterCallback

from gkd_lab import GKDConfig, GKDTrainer

GLOBAL_BATCH = 8
ROWS = [{"prompt": f"{a} {b} =", "completion": f" {c} {a}"} for a in "abcd" for b in "efg" for c in "123"]


def main(folder: Path, out: Path) -> None:
    args = GKDConfig(
        output_dir=str(out.with_suffix("")),
        max_steps=4,
        learning_rate=1e-3,
        lmbda=0.5,
        temperature=1.0,
        max_new_tokens=6,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        activation_checkpointing=False,
    )
    args.per_device_train_batch_size = GLOBAL_BATCH // args.world_size
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    trainer = GKDTrainer(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=args,
        train_dataset=ROWS,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if args.process_index == 0:
        teacher = trainer.teacher_model
        facts = {
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "pieces": sorted({type(p).__name__ for p in teacher.parameters()}),
            "device": sorted({p.device.type for p in teacher.parameters()}),
        }
        out.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
