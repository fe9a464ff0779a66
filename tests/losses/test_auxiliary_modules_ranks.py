"""Terms that read whole passes learn alike however a step is split up: over ranks (gloo, on the CPU), over
micro-batches, over shards of the models, and in chunks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from gkd_lab import GKDTrainer
from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.losses import discriminator, uld
from gkd_lab.models.build import train_tokenizer

from ..training import scripts
from ..training.scripts import WORDS, conversations, llama, logged, losses, trainer

RANKS, ROWS, STEPS = 2, 8, 3
CASES: dict[str, dict[str, Any]] = {
    "uld": {
        "objectives": [{"type": "uld"}, {"type": "cross_entropy", "weight": 0.2}],
        "loss_normalization": "sequence",
    },
    "adversarial sequences": {
        "objectives": [{}, {"type": "adversarial", "reads": "sequences", "width": 8, "weight": 0.5}],
    },
    "adversarial states": {
        "objectives": [{}, {"type": "adversarial", "width": 8, "weight": 0.5}],
        "loss_normalization": "sequence",
    },
    "hidden_states": {
        "objectives": [{}, {"type": "hidden_states", "weight": 0.05}],
    },
}
Facts = dict[str, Any]


class Sharded(GKDTrainer):
    """As accelerate would have it by `fsdp2.yaml` if it ever chose FSDP on a CPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def teacher_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of words, and a chat template unlike the student's."""
    tokenizer = train_tokenizer(TokenizerSpec(kind="bpe", vocab_size=300), [WORDS])
    answer = "{% if messages[1:] %}{{ messages[1].content }}{% endif %}"
    tokenizer.chat_template = "Q: {{ messages[0].content }}\nA: " + answer
    return tokenizer


def sure(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Where a teacher of many tokens is less sure than its student of each, uld has no gradient."""
    with torch.no_grad():
        model.model.norm.weight.mul_(4)
    return model


def train(case: str, folder: Path, *, parts: int = 1, **more: Any) -> Facts:
    """Steps of eight rows, whatever the number of processes and micro-batches; two of them are an epoch."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    teacher, options = llama(1, width=24), dict[str, Any]()
    if case == "uld":
        tokenizer = teacher_tokenizer()
        teacher = sure(llama(1, width=24, vocabulary=len(tokenizer)))
        options["teacher_processing_class"] = tokenizer
    made = trainer(
        folder,
        conversations(16),
        model=llama(0).double(),
        teacher=teacher.double(),
        arguments={
            **CASES[case],
            "lmbda": 0.5,
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS // (world * parts),
            "gradient_accumulation_steps": parts,
            "max_grad_norm": 0.5,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            **({"ddp_backend": "gloo"} if world > 1 else {}),
            **more,
        },
        **options,
    )
    drawn = learnt(made)
    made.train()
    return {
        "losses": losses(made),
        "norms": logged(made, "grad_norm"),
        "on_policy": logged(made, "on_policy"),
        "figures": [figures(row) for row in made.state.log_history if "loss" in row],
        "student": {name: whole(p.detach()).clone() for name, p in made.model.named_parameters()},
        "drawn": drawn,
        "learnt": learnt(made),
    }


def figures(row: dict[str, float]) -> dict[str, float]:
    """What is logged of each term."""
    return {name: value for name, value in row.items() if name.startswith(("loss/", "adversarial/"))}


def learnt(made: GKDTrainer) -> dict[str, Tensor]:
    """Parameters of the terms themselves."""
    return {
        f"{place}.{name}": p.detach().clone()
        for (_, place), own in made.auxiliary_modules._term_modules.items()
        for name, p in own.module.named_parameters()
    }


@contextmanager
def in_chunks() -> Iterator[None]:
    """Within it a chunk has three of a micro-batch's tokens."""
    with (
        patch.object(discriminator, "CHUNK_BYTES", 3 * 28 * 8),
        patch.object(uld, "CHUNK_BYTES", 3 * (28 + 300) * 8),
    ):
        yield


def ranks_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    place, facts = Path(folder), dict[str, Facts]()
    for case in CASES:
        facts[case] = {"whole": train(case, place / case)}
        with in_chunks():
            facts[case]["in parts"] = train(case, place / case, parts=2)
        with patch.object(scripts, "GKDTrainer", Sharded):
            # The norms of the terms take the same rows again.
            facts[case]["sharded"] = train(case, place / case, log_term_gradients=case == "uld")
    torch.save(facts, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Facts]:
    """What rank 0 and rank 1 found."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(ranks_main, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What one process found, which took each step at once."""
    folder = tmp_path_factory.mktemp("alone")
    return {case: train(case, folder / case) for case in CASES}


def same_course(found: Facts, wanted: Facts) -> None:
    assert min(map(abs, wanted["losses"])) > 1e-4
    assert min(wanted["norms"]) > 1e-2
    # The Trainer adds up losses in float32 for its log.
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-9)
    assert found["on_policy"] == wanted["on_policy"]
    assert set(wanted["on_policy"]) == {0, 1}
    for one, other in zip(found["figures"], wanted["figures"], strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    for name in ("student", "learnt"):
        assert found[name].keys() == wanted[name].keys()
        for key, value in wanted[name].items():
            torch.testing.assert_close(found[name][key], value, rtol=0, atol=1e-9, msg=f"{name} {key}")
    moved = [(value - wanted["drawn"][key]).abs().max() for key, value in wanted["learnt"].items()]
    assert not moved or max(moved) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("split", ("whole", "in parts", "sharded"))
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_rank(two: list[Facts], alone: Facts, case: str, split: str) -> None:
    for rank in two:
        same_course(rank[case][split], alone[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_micro_batches_equal_one(alone: Facts, case: str, tmp_path: Path) -> None:
    same_course(train(case, tmp_path, parts=2), alone[case])


@pytest.mark.parametrize("case", ("uld", "adversarial sequences"))
def test_a_step_in_chunks_equals_a_step_at_once(alone: Facts, case: str, tmp_path: Path) -> None:
    with in_chunks():
        same_course(train(case, tmp_path), alone[case])
