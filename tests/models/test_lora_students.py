"""Adapters of LoRA students: what is added, what trains, what is saved, loaded and merged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkd_lab.config import ConfigError
from gkd_lab.config.artifact_specs import Family
from gkd_lab.config.lora import LoraSpec, list_made_layers
from gkd_lab.models.lora_students import (
    add_lora_adapter,
    holds_adapter,
    list_linear_layers,
    load_adapted_model,
    load_adapter_weights,
    save_adapter,
)

from .tiny import FAMILIES, FIRST_WORD, LAST_WORD, tiny_model

peft = pytest.importorskip("peft")
TARGETS = {"decoder-only": ("q_proj", "v_proj"), "encoder-decoder": ("q", "v")}


def compute_logits(model: Any) -> Tensor:
    ids = torch.arange(FIRST_WORD, LAST_WORD)[None]
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids, **extra).logits
    return logits


def disturb_adapter(model: Any) -> None:
    """Give the adapter weights other than those that it starts with, which change nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_made_models_are_listed_without_making_one(family: Family) -> None:
    layers = list(list_made_layers(family, 2))
    assert len(layers) == len(set(layers))
    assert set(layers) == set(list_linear_layers(tiny_model(family, 0)))


@pytest.mark.parametrize("targets", ["all-linear", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing_and_is_all_that_trains(family: Family, targets: str | None) -> None:
    base = tiny_model(family, 0)
    expected = compute_logits(base)
    lora = LoraSpec(r=3, alpha=6, targets=targets or TARGETS[family])
    model = add_lora_adapter(copy.deepcopy(base), lora, 0, "tiny")
    assert torch.equal(compute_logits(model), expected)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained}
    ends = tuple(f".{target}" for target in TARGETS[family])
    assert adapted == {
        name for name in list_linear_layers(base) if targets == "all-linear" or name.endswith(ends)
    }
    assert {min(p.shape) for p in trained.values()} == {3}
    config = model.peft_config["default"]
    assert (config.lora_alpha / config.r, config.lora_dropout) == (2, 0)
    assert config.task_type == ("SEQ_2_SEQ_LM" if family == "encoder-decoder" else "CAUSAL_LM")


def test_an_adapter_is_drawn_from_its_seed_alone() -> None:
    def draw(seed: int) -> list[Tensor]:
        model = add_lora_adapter(tiny_model("decoder-only", 0), LoraSpec(), seed, "tiny")
        return [p.detach() for name, p in model.named_parameters() if "lora_A" in name]

    before = torch.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert all(map(torch.equal, first, draw(1)))
    assert not any(map(torch.equal, first, draw(2)))


def test_a_target_that_the_model_lacks_is_refused_with_the_nearest() -> None:
    model = tiny_model("decoder-only", 0)
    with pytest.raises(ConfigError, match="did you mean 'gate_proj'") as caught:
        add_lora_adapter(model, LoraSpec(targets=("q_proj", "gate_prj")), 0, "mine")
    assert "'mine'" in str(caught.value)
    with pytest.raises(ConfigError, match="'lm_head'"):  # it is tied to the embeddings
        add_lora_adapter(model, LoraSpec(targets=("lm_head",)), 0, "mine")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_computes_the_same_on_its_base(family: Family, merged: bool, tmp_path: Path) -> None:
    base = tiny_model(family, 0)
    base.save_pretrained(tmp_path / "base")
    model = add_lora_adapter(copy.deepcopy(base), LoraSpec(r=2), 0, "tiny")
    disturb_adapter(model)
    expected = compute_logits(model)
    assert not torch.allclose(expected, compute_logits(base))
    save_adapter(model, tmp_path / "adapter", "some/base")
    assert [holds_adapter(tmp_path / name) for name in ("adapter", "base")] == [True, False]
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert config.base_model_name_or_path == "some/base"
    loaded = load_adapted_model(tmp_path / "adapter", tmp_path / "base", family, "fp64", merged=merged)
    assert type(loaded) is type(base)
    assert any("lora_" in name for name, _ in loaded.named_parameters()) is not merged
    torch.testing.assert_close(compute_logits(loaded), expected, rtol=0, atol=1e-12)


def test_the_weights_of_a_saved_adapter_are_restored(tmp_path: Path) -> None:
    model = add_lora_adapter(tiny_model("decoder-only", 0), LoraSpec(r=2), 0, "tiny")
    disturb_adapter(model)
    expected = compute_logits(model)
    save_adapter(model, tmp_path, "base")
    disturb_adapter(model)
    assert not torch.equal(compute_logits(model), expected)
    load_adapter_weights(model, tmp_path)
    assert torch.equal(compute_logits(model), expected)
