"""Compare hidden states times head with the model's own logits, also within wrappers and adapters."""

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from gkd_lab.encoding.batches import collate_examples
from gkd_lab.models.forward import Sequences, compute_completion_logits
from gkd_lab.models.heads import OutputHead, UnprojectedOutput
from gkd_lab.models.packing import Pack

from .families import FAMILIES, decoder, make
from .tiny import FAMILIES as KINDS
from .tiny import PAD, tiny_examples, tiny_model

each_family = pytest.mark.parametrize("name", FAMILIES)


def batch(model: PreTrainedModel, rows: int = 6) -> Sequences:
    return collate_examples(tiny_examples(rows), PAD, is_encoder_decoder=model.config.is_encoder_decoder)


def logits_by_hand(parts: UnprojectedOutput) -> Tensor:
    """z = cap tanh(scale (h W^T + b) / cap), (N, C, V)."""
    head, hidden = parts.projection, parts.hidden
    assert head.weight is not None
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 2e-5 if expected.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def spread(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        nn.init.normal_(parameter, float(parameter.dim() == 1), 0.4)
    return model.double().eval()


def granite() -> PreTrainedModel:
    torch.manual_seed(0)
    return spread(GraniteForCausalLM(GraniteConfig(**decoder(16, logits_scaling=4.0))))


def cohere(**more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return spread(CohereForCausalLM(CohereConfig(**decoder(16, logit_scale=0.25, **more))))


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@each_family
def test_hidden_states_times_head_are_the_model_s_logits(name: str) -> None:
    model = make(name, 0)
    head = OutputHead(model)
    assert head.is_linear
    parts = head.compute_unprojected(batch(model))
    assert parts.hidden.shape[-1] == 16
    assert parts.aux_loss is None
    assert_close(logits_by_hand(parts), compute_completion_logits(model, batch(model)))


@pytest.mark.parametrize("model", [granite(), cohere()], ids=["granite", "cohere"])
def test_the_configured_scale_of_logits_is_applied(model: PreTrainedModel) -> None:
    parts = OutputHead(model).compute_unprojected(batch(model))
    assert parts.projection.scale == 0.25
    assert_close(logits_by_hand(parts), compute_completion_logits(model, batch(model)))


@each_family
def test_gradients_equal_those_of_dense_logits(name: str) -> None:
    model = make(name, 0)
    rows, head = batch(model), OutputHead(model)
    weights = torch.linspace(-1, 1, rows.completion_mask.numel() * 14, dtype=model.dtype)

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (logits.flatten() * weights).sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters()}

    expected = gradients(compute_completion_logits(model, rows))
    for key, gradient in gradients(logits_by_hand(head.compute_unprojected(rows))).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-4, msg=key)


@each_family
def test_no_tensor_holds_the_logits_of_all_tokens(name: str) -> None:
    """Use a large vocabulary, so that the largest tensor is the head itself."""
    model = make(name, 0)
    model.resize_token_embeddings(5000, mean_resizing=False)
    rows, head = batch(model, 10), OutputHead(model)
    assert head.is_linear
    assert rows.completion_mask.numel() > 16
    with torch.no_grad(), LargestTensor() as largest:
        head.compute_unprojected(rows)
    assert largest.size <= 5000 * 16
    with torch.no_grad(), LargestTensor() as largest:
        compute_completion_logits(model, rows)
    assert largest.size > 5000 * 16


@pytest.mark.parametrize("family", KINDS)
def test_a_pack_s_head_has_a_cell_axis(family: Any) -> None:
    members = [tiny_model(family, seed) for seed in range(3)]
    pack = Pack.build(members)
    head = OutputHead(pack.model)
    assert head.is_linear
    parts = head.compute_unprojected(batch(pack.model))
    assert parts.projection.weight is not None
    assert parts.projection.weight.shape == (3, 14, 16)
    cells = parts.hidden.reshape(3, -1, 16) @ parts.projection.weight.mT
    expected = compute_completion_logits(pack.model, batch(pack.model))
    assert_close(cells.view(expected.shape), expected)
    with pack.select_cells([2]):
        some = head.compute_unprojected(batch(pack.model))
        assert some.projection.weight is not None
        assert torch.equal(some.projection.weight, members[2].get_output_embeddings().weight[None])


def test_adapters_on_inner_layers_leave_the_head_linear() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("llama", 0), config).double()
    head = OutputHead(model)
    assert head.is_linear
    parts = head.compute_unprojected(batch(model))
    assert_close(logits_by_hand(parts), compute_completion_logits(model, batch(model)))
    with model.disable_adapter():
        assert not torch.allclose(compute_completion_logits(model, batch(model)), logits_by_hand(parts))


def test_an_adapter_on_the_head_falls_back_to_all_logits_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(make("llama", 0), config).double()
    with caplog.at_level(logging.WARNING):
        head = OutputHead(model)
    assert not head.is_linear
    (record,) = [r for r in caplog.records if r.name == "gkd_lab.models.heads"]
    assert "linear layer" in record.getMessage()
    parts = head.compute_unprojected(batch(model))
    assert parts.projection.weight is None
    assert torch.equal(parts.hidden, compute_completion_logits(model, batch(model)))


def test_an_unknown_change_of_the_logits_is_detected(caplog: pytest.LogCaptureFixture) -> None:
    """Use a soft-cap that has no effect in bfloat16 on the small logits of random weights."""
    model = make("llama", 0, dtype=torch.bfloat16)
    forward = type(model).forward

    class Capped(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

    model.__class__ = Capped
    with caplog.at_level(logging.WARNING):
        head = OutputHead(model)
    assert not head.is_linear
    assert "logit of 64" in caplog.text
    assert torch.equal(
        head.compute_unprojected(batch(model)).hidden, compute_completion_logits(model, batch(model))
    )


def test_under_autocast_hidden_states_have_the_dtype_of_the_head_s_product() -> None:
    model = make("llama", 0, dtype=torch.float32)
    head = OutputHead(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = head.compute_unprojected(batch(model))
        logits = torch.nn.functional.linear(parts.hidden, parts.projection.weight)
        expected = compute_completion_logits(model, batch(model))
    assert parts.hidden.dtype == torch.bfloat16
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_family
def test_half_precision_is_recognized_as_linear(name: str, dtype: torch.dtype) -> None:
    assert OutputHead(make(name, 0, dtype=dtype)).is_linear


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain = make("llama", 0).train()
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for each in (plain, model):
        logits_by_hand(OutputHead(each).compute_unprojected(batch(each))).square().sum().backward()
    for first, second in zip(plain.parameters(), model.parameters(), strict=True):
        assert_close(first.grad, second.grad)


def test_the_head_s_forward_is_restored_even_when_the_model_s_raises() -> None:
    model = make("llama", 0)
    head, rows = OutputHead(model), batch(model)
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(IndexError):
        head.compute_unprojected(replace(rows, completion_ids=rows.completion_ids + 100))
    assert "forward" not in vars(model.lm_head)
    head_forward = model.lm_head.forward = lambda hidden: nn.Linear.forward(model.lm_head, hidden)
    head.compute_unprojected(rows)
    assert vars(model.lm_head)["forward"] is head_forward


def test_building_an_output_head_changes_no_training_flag_or_random_state() -> None:
    model = make("gpt2", 0).train()
    model.transformer.h[0].eval()
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    model.transformer.drop.p = 0.5
    OutputHead(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_on_the_meta_device_is_not_run() -> None:
    with torch.device("meta"):
        model = FAMILIES["llama"](16)
    assert OutputHead(model).is_linear


def test_hidden_states_can_be_computed_within_a_wrapper_s_forward() -> None:
    """Call `model.forward`, so that hooks of the model, as FSDP's, do not run again."""
    model = make("llama", 0)
    head, calls = OutputHead(model), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    head.compute_unprojected(batch(model))
    assert not calls


def test_pitfall_25_the_router_s_loss_equals_the_model_s_own() -> None:
    model, rows = make("qwen2_moe", 0), batch(make("qwen2_moe", 0))
    ids = torch.cat([rows.prompt_ids, rows.completion_ids], dim=1)
    mask = torch.cat([rows.prompt_mask, rows.completion_mask], dim=1)
    named = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    labels = ids.masked_fill(mask == 0, -100)
    without = model(**named, labels=labels).loss
    model.config.output_router_logits = True
    expected = model(**named, labels=labels).loss - without
    aux_loss = OutputHead(model).compute_unprojected(rows).aux_loss
    assert aux_loss is not None
    assert aux_loss > 0
    torch.testing.assert_close(aux_loss, expected, rtol=0, atol=1e-6)
    aux_loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_router_s_loss_that_the_model_does_not_return_is_refused() -> None:
    model = make("llama", 0)
    head = OutputHead(model)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .*`aux_loss`.*output_router_logits"):
        head.compute_unprojected(batch(model))


def test_a_pack_with_a_nan_member_keeps_its_linear_head() -> None:
    members = [tiny_model("decoder-only", n) for n in range(3)]
    with torch.no_grad():
        members[1].get_input_embeddings().weight.fill_(torch.nan)
    assert OutputHead(Pack.build(members).model).is_linear
