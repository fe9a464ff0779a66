"""Every family that packs: cells trained in a pack learn what they learn alone, from the same text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedModel

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.step_loss import split_blocks
from gkd_lab.models.packing import CannotPack, Pack
from gkd_lab.training.trainer import GKDTrainer

from ..models.families import SPREAD, decoder, make
from ..models.tiny import tiny_model
from .driving import Run, assert_close, cell, distil

PACKED = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "t5 tied", "t5")
ALONE = {
    "bart": r"BartForConditionalGeneration .*\(TypeError: .*position_ids",
    "mbart": "MBartForConditionalGeneration",
    "qwen2_moe": r"'model\.layers\.0\.mlp\.gate\.weight'",
}
LMBDAS, BETAS, SEEDS = (0.0, 0.5, 1.0), (0.1, 0.9), (0, 1)
OPTIONS: dict[str, Any] = {"per_device_train_batch_size": 3, "max_new_tokens": 5}
Tokens = list[list[list[int]]]
"""Of each step, of each row: the tokens that were trained on."""


@pytest.fixture(autouse=True)
def all_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models' code casts to float32 here and there, which would turn 1e-16 into 1e-8."""
    cast, single, softmax = torch.Tensor.to, torch.Tensor.float, nn.functional.softmax

    def to(tensor: Tensor, *args: Any, **more: Any) -> Tensor:
        narrows = tensor.dtype == torch.float64 and tensor.dim() >= 3 and args[:1] == (torch.float32,)
        return tensor if narrows else cast(tensor, *args, **more)

    def wide_softmax(scores: Tensor, *args: Any, **more: Any) -> Tensor:
        return softmax(scores, *args, **more | ({"dtype": None} if scores.dtype == torch.float64 else {}))

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else single(t))
    monkeypatch.setattr(nn.functional, "softmax", wide_softmax)


def gemma(seed: int, width: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GemmaForCausalLM(GemmaConfig(**decoder(width, head_dim=width // 4))).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.0, SPREAD * (16 / width) ** 0.5)
    return model


def model_of(name: str, seed: int, dtype: torch.dtype, width: int = 16) -> PreTrainedModel:
    if name == "gemma":
        return gemma(seed, width).to(dtype)
    if name == "t5 tied":
        return tiny_model("encoder-decoder", seed, width=width, dtype=dtype)
    return make(name, seed, width, dtype)


def cells_of(folder: Path, kinds: Sequence[tuple[int, float, float]]) -> list[CellArguments]:
    return [
        cell(folder, str(n), seed=seed, lmbda=lmbda, beta=beta) for n, (seed, lmbda, beta) in enumerate(kinds)
    ]


def grid(folder: Path) -> list[CellArguments]:
    kinds = [(seed, lmbda, beta) for seed in SEEDS for lmbda in LMBDAS for beta in BETAS]
    return cells_of(folder, kinds)


def few(folder: Path) -> list[CellArguments]:
    """Every lmbda, both betas, both seeds."""
    kinds = ((0, 0.0, 0.1), (0, 0.5, 0.9), (0, 1.0, 0.1), (1, 1.0, 0.9))
    return cells_of(folder, kinds)


def trained(name: str, folder: Path, cells: Sequence[CellArguments], packed: bool, **options: Any) -> Any:
    """A finished run, and for each cell the tokens that it was trained on."""
    dtype = options.get("dtype", torch.float64)
    texts: list[Tokens] = [[] for _ in cells]

    def watch(trainer: GKDTrainer) -> None:
        samples_of = trainer.get_batch_samples

        def get_batch_samples(*args: Any) -> Any:
            samples, items = samples_of(*args)
            for sample in samples:
                for n, part in enumerate(split_blocks(sample["batch"].student, len(cells))):
                    rows = zip(part.completion_ids, part.completion_mask.bool(), strict=True)
                    texts[n].append([ids[mask].tolist() for ids, mask in rows])
            return samples, items

        trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]

    run = distil(
        folder,
        "decoder-only",
        cells,
        packed=packed,
        students=[model_of(name, 7, dtype)] * len(cells),
        teacher=model_of(name, 3, dtype, width=24),
        prepare=watch,
        **{**OPTIONS, **options},
    )
    return run, texts


def each_alone(name: str, folder: Path, cells: Sequence[CellArguments], **options: Any) -> Iterator[Any]:
    for cell_args in cells:
        run, texts = trained(name, folder, [cell_args], packed=False, **options)
        yield run, texts[0]


def losses_apart(together: Run, alone: Run, n: int) -> float:
    return max(abs(a - b) for a, b in zip(together.losses(n), alone.losses(), strict=True))


def assert_packed_equals_alone(name: str, folder: Path, cells: Sequence[CellArguments]) -> None:
    together, texts = trained(name, folder, cells, packed=True, max_steps=20)
    for n, (alone, pack_number) in enumerate(each_alone(name, folder, cells, max_steps=20)):
        assert texts[n] == pack_number
        assert losses_apart(together, alone, n) < 1e-9
        assert_close(together.weights(n), alone.weights())
    assert together.trainer.failures == {}
    assert len({str(text) for text in texts}) > len(LMBDAS), "cells must write different things"
    assert len({tuple(together.losses(n)) for n in range(len(cells))}) == len(cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_twenty_steps_packed_are_twenty_steps_alone(name: str, tmp_path: Path) -> None:
    assert_packed_equals_alone(name, tmp_path, few(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ("llama", "t5"))
def test_a_whole_grid_packed_is_the_grid_alone(name: str, tmp_path: Path) -> None:
    assert_packed_equals_alone(name, tmp_path, grid(tmp_path))


@pytest.mark.parametrize("name", PACKED)
def test_in_float32_the_losses_agree_within_rounding(name: str, tmp_path: Path) -> None:
    cells, options = few(tmp_path)[1:3], {"dtype": torch.float32, "max_steps": 3}
    together, texts = trained(name, tmp_path, cells, packed=True, **options)
    for n, (alone, pack_number) in enumerate(each_alone(name, tmp_path, cells, **options)):
        assert texts[n] == pack_number
        assert losses_apart(together, alone, n) < 1e-5


@pytest.mark.parametrize("name", ALONE)
def test_an_unpackable_family_is_refused_with_the_reason(name: str) -> None:
    model = make(name, 0)
    with pytest.raises(CannotPack, match=ALONE[name]):
        Pack.build([model, model])
