"""Trains a few cells on as many processes as the environment says and keeps what rank by rank was seen.

Started by test_ranks.py: python ranks.py FOLDER, with RANK and WORLD_SIZE set for more than one process.
"""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save_file

from gkd_lab import GKDTrainer
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.terms import WeightedLoss
from gkd_lab.models.packing import Pack
from tests.losses.descriptions import reward_loss
from tests.training.scripts import (
    chat_tokenizer,
    config,
    conversations,
    llama,
    logged,
    losses,
    trainer,
    weights,
)

CELLS: dict[str, dict[str, Any]] = {
    "off": {"lmbda": 0.0},
    "on": {"lmbda": 1.0},
    "mixed sequences": {"lmbda": 0.5, "loss_normalization": "sequence"},
    "accumulated": {"lmbda": 0.5, "gradient_accumulation_steps": 2},
    "rewarded": {
        "lmbda": 1.0,
        "temperature": 1.0,
        # Ranks earn rewards of both signs, whose mean in float32 is no better than the largest of them.
        "objectives": [{}, {"type": "reward", "name": "rougeL", "normalize": True, "weight": 0.05}],
    },
}


def of_steps(name: str, folder: Path, steps: int, rows_of_a_step: int = 8, **more: Any) -> GKDTrainer:
    """Steps of eight rows, whatever the number of processes; two of them are an epoch."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = dict(CELLS[name])
    parts = world * arguments.get("gradient_accumulation_steps", 1)
    return trainer(
        folder,
        conversations(16),
        model=llama(0).double(),
        teacher=llama(1, width=24).double(),
        arguments={
            **arguments,
            "max_steps": steps,
            "per_device_train_batch_size": rows_of_a_step // parts,
            "max_grad_norm": 0.5,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            **({"ddp_backend": "gloo"} if world > 1 else {}),
            **more,
        },
    )


def train(name: str, folder: Path) -> dict[str, Any]:
    made = of_steps(name, folder, 4)
    written: list[list[list[int]]] = []
    original = made.get_batch_samples

    def get_batch_samples(*args: Any) -> Any:
        samples, items = original(*args)
        for sample in samples:
            student = sample["batch"].student
            pairs = zip(student.completion_ids, student.completion_mask, strict=True)
            written.append([ids[mask.bool()].tolist() for ids, mask in pairs])
        return samples, items

    made.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
    made.train()
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        save_file({n: v.contiguous() for n, v in weights(made.model).items()}, folder / f"{name}.safetensors")
    return {
        "losses": losses(made),
        "norms": logged(made, "grad_norm"),
        "lengths": logged(made, "completion_length"),
        "truncated": logged(made, "truncated"),
        "entropy": logged(made, "entropy"),
        "on_policy": logged(made, "on_policy"),
        "reward": logged(made, "reward"),
        "advantage_std": logged(made, "advantage_std"),
        "written": written,
    }


def resumed(folder: Path) -> dict[str, list[float]]:
    """The last two of seven steps, without a stop and after one within the third epoch."""
    saving = {"save_strategy": "steps", "save_steps": 5}
    straight, again = (of_steps("mixed sequences", folder / "resumed", 7, **saving) for _ in range(2))
    straight.train()
    again.train(resume_from_checkpoint=str(folder / "resumed" / "checkpoint-5"))
    return {"straight": losses(straight)[5:], "again": losses(again)[5:]}


class Broken(GKDTrainer):
    """The first cell's loss is no number in the second process at the third step."""

    def compute_cell_sums(self, *args: Any) -> Any:
        sums, extra = super().compute_cell_sums(*args)
        if self.args.process_index == 1 and self.state.global_step == 2:
            sums = replace(sums, losses=sums.losses * torch.tensor([math.nan, 1.0]))
        return sums, extra


def no_number(prompts: list[str], texts: list[str], references: list[str]) -> list[float]:
    """A reward that fails in the second process."""
    return [math.nan if os.environ.get("RANK") == "1" else 1.0] * len(texts)


def packed(folder: Path, kind: type[GKDTrainer] = GKDTrainer, **of_first: Any) -> dict[str, Any]:
    """Two cells as one model, with checkpoints: each step's loss, and the sum of each one's weights."""
    world, rows = int(os.environ.get("WORLD_SIZE", "1")), conversations(16)
    args = config(
        folder,
        max_steps=4,
        per_device_train_batch_size=8 // world,
        save_strategy="steps",
        save_steps=2,
        temperature=1.0,
        **({"ddp_backend": "gloo"} if world > 1 else {}),
    )
    cells = [
        replace(CellArguments.build(args), lmbda=0.5, seed=seed, output_dir=str(folder / f"packed{seed}"))
        for seed in (0, 1)
    ]
    losses: list[list[float]] = [[], []]
    made = kind(
        pack=Pack.build([llama(0).double(), llama(2).double()]),
        cells=[replace(cells[0], **of_first), cells[1]],
        teacher_model=llama(1, width=24).double(),
        args=args,
        train_dataset=rows,
        processing_class=chat_tokenizer(),
        log_cell=lambda n, row: losses[n].append(row["loss"]),
    )
    made.train()
    sums = [[float(w.abs().sum()) for w in made.pack.get_cell_parameters(n).values()] for n in (0, 1)]
    return {"losses": losses, "weights": sums, "failures": made.failures}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    results: dict[str, Any] = {name: train(name, folder) for name in CELLS}
    results["resumed"] = resumed(folder)
    results["packed"] = packed(folder)
    if "WORLD_SIZE" in os.environ:
        reward = WeightedLoss(reward_loss("tests.training.ranks:no_number"), 0.1)
        results["no loss"] = packed(folder / "no loss", Broken)
        results["no reward"] = packed(folder / "no reward", objectives=(WeightedLoss(Divergence()), reward))
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
