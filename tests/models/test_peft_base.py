"""A PEFT student whose adapter is off: what is its base, and when it can teach."""

from typing import Any

import pytest
import torch

from gkd_lab.models.peft_base import check_base_can_teach, is_base_of, without_adapters

from .tiny import tiny_model

peft = pytest.importorskip("peft")


def student(**changes: Any) -> Any:
    """A tiny decoder with an adapter that changes it."""
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}
    return peft.get_peft_model(base(), peft.LoraConfig(**settings))


def base() -> Any:
    return tiny_model("decoder-only", 0, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(torch.arange(3, 8)[None]).logits
        return values


def test_the_base_is_the_module_that_holds_the_adapter() -> None:
    inner = base()
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"]))
    assert is_base_of(model, inner)
    assert is_base_of(model, model.get_base_model())
    assert is_base_of(model, model.base_model)
    assert not is_base_of(model, model)
    assert not is_base_of(model, base())
    assert not is_base_of(inner, inner)
    assert not is_base_of(model, None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"lora_dropout": 0.5},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_without_adapters_the_student_is_its_base_and_then_itself_again(changes: dict[str, Any]) -> None:
    model = student(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # also the copies of whole layers, which begin equal to the base
                parameter.add_(torch.randn_like(parameter))
    check_base_can_teach(model)
    model.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with without_adapters(model):
        assert not any(module.training for module in model.modules())
        torch.testing.assert_close(logits(model.get_base_model()), logits(base()))
    assert all(module.training for module in model.modules())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    model.eval()
    assert not torch.allclose(logits(model), logits(base()))


def test_several_adapters_are_all_off_and_a_frozen_one_stays_frozen() -> None:
    """PEFT itself lets all active adapters learn when it turns them on again."""
    model = student()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    with without_adapters(model):
        torch.testing.assert_close(logits(model), logits(base()))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if ".second." in name}
    assert model.active_adapters == ["default", "second"]


def test_the_adapter_is_on_again_after_an_error() -> None:
    model = student()
    with pytest.raises(RuntimeError, match="in the block"), without_adapters(model):
        raise RuntimeError("in the block")
    assert not torch.allclose(logits(model), logits(base()))
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bias": "all"}, "bias='all' trains"),
        ({"bias": "lora_only"}, "bias='lora_only' trains"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes"),
        ({"layer_replication": [(0, 1), (0, 1)]}, "layer_replication adds"),
    ],
)
def test_an_adapter_that_changes_its_base_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_base_can_teach(student(**changes))


def test_a_base_whose_own_weights_learn_is_refused_by_name() -> None:
    model = student()
    model.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"1 weights of the base learn \(.*norm\.weight"):
        check_base_can_teach(model)
    assert model.get_base_model().model.norm.weight.requires_grad
