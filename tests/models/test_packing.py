"""Packed equals alone: logits, gradients, generated tokens and saved weights, in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from gkd_lab.config.artifact_specs import Family
from gkd_lab.encoding.batches import collate_examples
from gkd_lab.losses.step_loss import split_blocks
from gkd_lab.models.forward import Sequences, compute_completion_logits
from gkd_lab.models.packed_layers import (
    PackedConv1D,
    PackedEmbedding,
    PackedLinear,
    PackedModule,
    PackedTorchNorm,
    pack_modules,
)
from gkd_lab.models.packing import CannotPack, Pack
from gkd_lab.models.rng import draw_uniforms
from gkd_lab.training.sampling import generate_completions

from .families import make
from .tiny import END, FAMILIES, PAD, tiny_examples, tiny_model

CELLS, ROWS = 3, 4
PACKED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "t5")


def members(family: Family, count: int = CELLS) -> list[PreTrainedModel]:
    return [tiny_model(family, seed) for seed in range(count)]


def neox(seed: int) -> PreTrainedModel:
    """A family with LayerNorms, biases and an untied head that packs without code of its own."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=14,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = GPTNeoXForCausalLM(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def batch(family: Family, seed: int = 0, rows: int = CELLS * ROWS) -> Sequences:
    """Rows of different lengths; every cell reads its own."""
    examples = tiny_examples(rows, seed)
    return collate_examples(examples, PAD, is_encoder_decoder=family == "encoder-decoder")


def parts(family: Family, rows: Sequences, cells: int = CELLS) -> list[Sequences]:
    return split_blocks(rows, cells)


def value(logits: Tensor, mask: Tensor) -> Tensor:
    """A number per sequence that every trained logit moves."""
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return ((logits.log_softmax(-1) * weights).sum(-1) * mask).sum(-1)


def assert_same_gradients(pack: Pack, alone: list[PreTrainedModel]) -> None:
    for cell, model in enumerate(alone):
        packed = pack.get_cell_gradients(cell)
        own = {name: p.grad for name, p in model.named_parameters()}
        assert packed.keys() == own.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(packed[name], gradient, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_each_model_alone(family: Family) -> None:
    alone, rows = members(family), batch(family)
    pack = Pack.build(alone)
    logits = compute_completion_logits(pack.model, rows)
    value(logits, rows.completion_mask).sum().backward()
    for cell, (model, own) in enumerate(zip(alone, parts(family, rows), strict=True)):
        expected = compute_completion_logits(model, own)
        value(expected, own.completion_mask).sum().backward()
        torch.testing.assert_close(logits[cell * ROWS : (cell + 1) * ROWS], expected, rtol=0, atol=1e-12)
    assert_same_gradients(pack, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pad_token_that_was_written_gets_the_gradient_that_it_gets_alone(family: Family) -> None:
    alone, rows = members(family), batch(family)
    rows.completion_ids[:, 0] = PAD
    pack = Pack.build(alone)
    value(compute_completion_logits(pack.model, rows), rows.completion_mask).sum().backward()
    for model, own in zip(alone, parts(family, rows), strict=True):
        value(compute_completion_logits(model, own), own.completion_mask).sum().backward()
    assert_same_gradients(pack, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_cell_s_rows_give_no_gradient_to_another(family: Family) -> None:
    pack, rows = Pack.build(members(family)), batch(family)
    values = value(compute_completion_logits(pack.model, rows), rows.completion_mask)
    values[ROWS : 2 * ROWS].sum().backward()
    for cell in range(CELLS):
        moved = any(g.abs().max() > 0 for g in pack.get_cell_gradients(cell).values() if g is not None)
        assert moved == (cell == 1)


def test_layer_norms_biases_and_an_untied_head_pack_too() -> None:
    alone, rows = [neox(seed) for seed in range(CELLS)], batch("decoder-only")
    pack = Pack.build(alone)
    logits = compute_completion_logits(pack.model, rows)
    value(logits, rows.completion_mask).sum().backward()
    for cell, (model, own) in enumerate(zip(alone, split_blocks(rows, CELLS), strict=True)):
        expected = compute_completion_logits(model, own)
        value(expected, own.completion_mask).sum().backward()
        torch.testing.assert_close(logits[cell * ROWS : (cell + 1) * ROWS], expected, rtol=0, atol=1e-11)
    assert_same_gradients(pack, alone)


def written(model: PreTrainedModel, rows: Sequences, beams: int, noise: Tensor | None) -> Sequences:
    return generate_completions(
        model,
        rows,
        max_new_tokens=9,
        end_ids=torch.tensor([END]),
        pad_id=PAD,
        uniforms=noise,
        num_beams=beams,
    )


def assert_same_rows(packed: Sequences, alone: Sequences) -> None:
    """Equal up to the width of the padding."""
    width = alone.completion_ids.shape[1]
    assert torch.equal(packed.completion_ids[:, :width], alone.completion_ids)
    assert torch.equal(packed.completion_mask[:, :width], alone.completion_mask)
    assert packed.completion_mask[:, width:].sum() == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ("greedy", "sample", "beam"))
def test_what_is_written_is_what_each_model_writes_alone(family: Family, way: str) -> None:
    alone, rows = members(family), batch(family)
    beams = 3 if way == "beam" else 1
    noise = draw_uniforms(0, 0, "sampling", CELLS * ROWS, 9) if way == "sample" else None
    together = written(Pack.build(alone).model, rows, beams, noise)
    for cell, (model, own) in enumerate(zip(alone, split_blocks(rows, CELLS), strict=True)):
        part = slice(cell * ROWS, (cell + 1) * ROWS)
        expected = written(model, own, beams, None if noise is None else noise[part])
        assert_same_rows(split_blocks(together, CELLS)[cell], expected)
    distinct = {tuple(ids) for ids in together.completion_ids.tolist()}
    assert len(distinct) > CELLS, "the models must write different things for this to mean anything"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", ([1], [0, 2], [2, 0], [0, 1, 2]))
def test_a_choice_of_cells_reads_and_writes_as_they_do_alone(family: Family, chosen: list[int]) -> None:
    alone = members(family)
    pack, rows = Pack.build(alone), batch(family, rows=len(chosen) * ROWS)
    with pack.select_cells(chosen) as model, torch.no_grad():
        logits = compute_completion_logits(model, rows)
        text = written(model, rows, 1, None)
    for place, (cell, own) in enumerate(zip(chosen, split_blocks(rows, len(chosen)), strict=True)):
        expected = compute_completion_logits(alone[cell], own)
        part = slice(place * ROWS, (place + 1) * ROWS)
        torch.testing.assert_close(logits[part], expected, rtol=0, atol=1e-12)
        assert_same_rows(split_blocks(text, len(chosen))[place], written(alone[cell], own, 1, None))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_cells_are_back_after_a_choice_even_if_it_broke(family: Family) -> None:
    pack, rows = Pack.build(members(family)), batch(family)
    before = compute_completion_logits(pack.model, rows)
    with pytest.raises(RuntimeError, match="broken on purpose"), pack.select_cells([1]):
        raise RuntimeError("broken on purpose")
    assert torch.equal(compute_completion_logits(pack.model, rows), before)


def test_the_weights_chosen_are_those_of_now() -> None:
    pack, rows = Pack.build(members("decoder-only")), batch("decoder-only", rows=ROWS)
    with torch.no_grad(), pack.select_cells([1]) as model:
        before = compute_completion_logits(model, rows)
    for view in pack.get_cell_parameters(1).values():
        view.mul_(1.5)
    with torch.no_grad(), pack.select_cells([1]) as model:
        after = compute_completion_logits(model, rows)
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_changes_none_of_the_members(family: Family) -> None:
    alone = members(family)
    before = [copy.deepcopy(model.state_dict()) for model in alone]
    pack = Pack.build(alone)
    for view in pack.get_cell_parameters(0).values():
        view.zero_()
    for model, state in zip(alone, before, strict=True):
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_stay_one_tensor(family: Family) -> None:
    model = tiny_model(family, 0)
    pack = Pack.build([model, tiny_model(family, 1)])
    assert pack.get_cell_parameters(0).keys() == dict(model.named_parameters()).keys()
    head, embedding = pack.model.get_output_embeddings(), pack.model.get_input_embeddings()
    assert head.weight is embedding.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_saved_and_loaded_is_the_model_that_it_was_in_the_pack(family: Family, tmp_path: Path) -> None:
    pack, rows = Pack.build(members(family)), batch(family)
    generator = torch.Generator().manual_seed(0)
    for cell in range(CELLS):
        for view in pack.get_cell_parameters(cell).values():
            view.add_(0.1 * torch.randn(view.shape, generator=generator, dtype=view.dtype))
    logits = compute_completion_logits(pack.model, rows)
    auto = AutoModelForCausalLM if family == "decoder-only" else AutoModelForSeq2SeqLM
    for cell, own in enumerate(split_blocks(rows, CELLS)):
        pack.unpack_cell(cell).save_pretrained(tmp_path / str(cell))
        loaded = auto.from_pretrained(tmp_path / str(cell), dtype=torch.float64)
        part = slice(cell * ROWS, (cell + 1) * ROWS)
        torch.testing.assert_close(compute_completion_logits(loaded, own), logits[part], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_a_cell_changes_it_and_nobody_else(family: Family) -> None:
    alone = members(family)
    pack, other = Pack.build(alone), tiny_model(family, 9)
    state = {name: p.detach() for name, p in other.named_parameters()}
    pack.load_cell(1, state)
    for cell, expected in ((0, alone[0]), (1, other), (2, alone[2])):
        own = dict(expected.named_parameters())
        assert all(torch.equal(v, own[name]) for name, v in pack.get_cell_parameters(cell).items())
    with pytest.raises(ValueError, match=r"weights lack '.*' \(1 of "):
        pack.load_cell(0, dict(list(state.items())[1:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_the_order_of_rows_change_nothing(family: Family) -> None:
    model, rows = tiny_model(family, 0), batch(family)
    expected = compute_completion_logits(model, rows)
    order = torch.randperm(rows.num_rows, generator=torch.Generator().manual_seed(0))
    moved = compute_completion_logits(model, rows.map_tensors(lambda tensor: tensor[order]))
    torch.testing.assert_close(moved, expected[order], rtol=0, atol=1e-12)
    left, right = ((3, 0), (0, 3)) if family == "decoder-only" else ((0, 3), (0, 3))
    wide = Sequences(
        nn.functional.pad(rows.prompt_ids, left, value=PAD),
        nn.functional.pad(rows.prompt_mask, left, value=0),
        nn.functional.pad(rows.completion_ids, right, value=PAD),
        nn.functional.pad(rows.completion_mask, right, value=0),
    )
    padded = compute_completion_logits(model, wide)[:, :-3]
    mask = rows.completion_mask.bool()
    torch.testing.assert_close(padded[mask], expected[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_of_one_and_a_model_alone_agree(family: Family) -> None:
    model, rows = tiny_model(family, 0), batch(family)
    packed, alone = Pack.build([model]), Pack.build_single(model)
    assert packed.is_packed
    assert not alone.is_packed
    assert packed.get_cell_parameters(0).keys() == alone.get_cell_parameters(0).keys()
    torch.testing.assert_close(
        compute_completion_logits(packed.model, rows),
        compute_completion_logits(alone.model, rows),
        rtol=0,
        atol=1e-12,
    )
    assert alone.unpack_cell(0) is model


def test_models_that_differ_are_refused_with_what_differs() -> None:
    small, large = (tiny_model("decoder-only", 0, width=width) for width in (16, 32))
    with pytest.raises(CannotPack, match=r"model 1 .*embed_tokens.weight: \(14, 32\) and \(14, 16\)"):
        Pack.build([small, large])
    with pytest.raises(CannotPack, match=r"model 1 .*class.*T5.*Llama"):
        Pack.build([small, tiny_model("encoder-decoder", 0)])
    with pytest.raises(CannotPack, match=r"model 1 .*float32.*float64"):
        Pack.build([small, tiny_model("decoder-only", 0, dtype=torch.float32)])


def test_equal_shapes_with_other_heads_are_refused() -> None:
    with pytest.raises(CannotPack, match=r"model 1 .*num_attention_heads"):
        Pack.build([tiny_model("decoder-only", 0, heads=heads) for heads in (4, 2)])


def test_weights_without_a_packed_form_are_named() -> None:
    model = make("qwen2_moe", 0)
    with pytest.raises(CannotPack, match=r"no packed form .*mlp\.gate\.weight"):
        Pack.build([model, model])


# ---- every family that packs ----


def rows_for(model: PreTrainedModel, rows: int = CELLS * ROWS) -> Sequences:
    return collate_examples(tiny_examples(rows), PAD, is_encoder_decoder=model.config.is_encoder_decoder)


def assert_close(found: Tensor, expected: Tensor, double: float = 1e-6) -> None:
    """Norms are in float32 whatever the model's dtype."""
    tolerance = double if expected.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PACKED)
def test_every_family_s_logits_gradients_and_text_are_those_alone(name: str) -> None:
    alone = [make(name, seed) for seed in range(CELLS)]
    pack, rows = Pack.build(alone), rows_for(alone[0])
    logits = compute_completion_logits(pack.model, rows)
    value(logits, rows.completion_mask).sum().backward()
    text = split_blocks(written(pack.model, rows, 1, None), CELLS)
    for n, (model, own) in enumerate(zip(alone, split_blocks(rows, CELLS), strict=True)):
        expected = compute_completion_logits(model, own)
        value(expected, own.completion_mask).sum().backward()
        assert_close(logits[n * ROWS : (n + 1) * ROWS], expected)
        assert_same_rows(text[n], written(model, own, 1, None))
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
            assert_close(pack.get_cell_gradients(n)[key], parameter.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PACKED)
def test_checkpointed_activations_change_no_gradient(name: str) -> None:
    packs = [Pack.build([make(name, seed) for seed in range(CELLS)]) for _ in range(2)]
    packs[1].model.gradient_checkpointing_enable()
    for pack in packs:
        rows = rows_for(pack.model)
        value(compute_completion_logits(pack.model.train(), rows), rows.completion_mask).sum().backward()
    assert packs[1].model.is_gradient_checkpointing
    for cell in range(CELLS):
        plain, saving = (pack.get_cell_gradients(cell) for pack in packs)
        for key, gradient in plain.items():
            assert gradient is not None
            assert_close(saving[key], gradient)  # type: ignore[arg-type]


def relative(found: Tensor, expected: Tensor) -> float:
    one, other = found.detach().double(), expected.detach().double()
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", PACKED)
def test_under_autocast_a_pack_is_its_members_up_to_rounding(name: str) -> None:
    alone = [make(name, seed, dtype=torch.float32) for seed in range(CELLS)]
    pack, rows = Pack.build(alone), rows_for(alone[0])
    exact = compute_completion_logits(pack.model, rows)
    with torch.autocast("cpu", torch.bfloat16):
        logits = compute_completion_logits(pack.model, rows)
        value(logits.float(), rows.completion_mask).sum().backward()
        for n, (model, own) in enumerate(zip(alone, split_blocks(rows, CELLS), strict=True)):
            expected = compute_completion_logits(model, own)
            value(expected.float(), own.completion_mask).sum().backward()
            assert expected.dtype == logits.dtype
            assert relative(logits[n * ROWS : (n + 1) * ROWS], expected) < 0.03
    assert relative(logits, exact) > 1e-4, "autocast must do something here"
    for n, model in enumerate(alone):
        for key, gradient in pack.get_cell_gradients(n).items():
            own = model.get_parameter(key).grad
            assert gradient is not None and own is not None and gradient.dtype == own.dtype
            assert relative(gradient, own) < 0.1, key


# ---- some cells only, and narrow weights ----


def packed_modules(pack: Pack) -> list[PackedModule]:
    return [module for module in pack.model.modules() if isinstance(module, PackedModule)]


def shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@pytest.mark.parametrize(("chosen", "is_view"), (([1, 2], True), ([1], True), ([0, 2], False)))
def test_neighbouring_cells_are_read_where_they_are(chosen: list[int], is_view: bool) -> None:
    pack = Pack.build(members("decoder-only"))
    with pack.select_cells(chosen):
        for module in packed_modules(pack):
            weight = module.get_active_weight()
            assert len(weight) == len(chosen)
            assert shares_memory(weight, module.get_parameter("weight")) == is_view


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("chosen", ([0, 1, 2], [1, 2], [2, 0]))
def test_narrowed_cells_write_under_autocast_what_they_hold(name: str, chosen: list[int]) -> None:
    pack = Pack.build([make(name, seed, dtype=torch.float32) for seed in range(CELLS)])
    rows = rows_for(pack.model, len(chosen) * ROWS)
    with torch.no_grad(), pack.select_cells(chosen) as model:
        exact = compute_completion_logits(model, rows)
        with torch.autocast("cpu", torch.bfloat16):
            wide = compute_completion_logits(model, rows)
    with (
        torch.no_grad(),
        pack.select_cells(chosen, torch.bfloat16) as model,
        torch.autocast("cpu", torch.bfloat16),
    ):
        narrow = compute_completion_logits(model, rows)
        assert written(model, rows, 1, None).num_rows == rows.num_rows
    assert relative(narrow, exact) < 2 * relative(wide, exact) < 0.1
    assert all(p.dtype == torch.float32 for p in pack.model.parameters())


def test_narrowed_are_linear_layers_each_weight_once() -> None:
    pack = Pack.build([make("gpt2", 0, dtype=torch.float32), make("gpt2", 1, dtype=torch.float32)])
    with pack.select_cells([0, 1], torch.bfloat16) as model:
        kinds = {type(module): module.get_active_weight().dtype for module in packed_modules(pack)}
        tied = model.get_output_embeddings(), model.get_input_embeddings()
        assert [m.get_active_tensor("weight").dtype for m in tied] == [torch.bfloat16, torch.float32]
        assert model.transformer.h[0].attn.c_attn.get_active_tensor("bias").dtype == torch.bfloat16
    narrow = torch.bfloat16
    assert kinds == {
        PackedConv1D: narrow,
        PackedLinear: narrow,
        PackedEmbedding: torch.float32,
        PackedTorchNorm: torch.float32,
    }


def test_a_model_alone_is_never_narrowed() -> None:
    model = make("llama", 0, dtype=torch.float32)
    with Pack.build_single(model).select_cells([0], torch.bfloat16) as chosen:
        assert chosen is model
        assert chosen.dtype == torch.float32


# ---- single modules ----


class Scale(nn.Module):
    """A norm that no list of names knows, with a bias and a weight that counts from 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) * (1 + self.weight) + self.bias


@pytest.mark.parametrize("shape", ((6, 5, 4), (6, 5, 2, 4), (6, 4)))
@pytest.mark.parametrize("kind", (Scale, LlamaRMSNorm, T5LayerNorm, Gemma2RMSNorm, nn.LayerNorm, nn.RMSNorm))
def test_a_norm_scales_each_row_by_its_cell(kind: type, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    alone = [kind(4) for _ in range(3)]
    for p in (p for norm in alone for p in norm.parameters()):
        nn.init.normal_(p)
    packed = pack_modules("norm", alone)
    assert packed is not None
    x = torch.randn(shape, requires_grad=True)
    y = packed(x)
    expected = torch.cat([norm(part) for norm, part in zip(alone, x.chunk(3), strict=True)])
    torch.testing.assert_close(y, expected)
    changes = torch.autograd.grad((y * y.detach().sin()).sum(), [x, *packed.parameters()])
    (expected * y.detach().sin()).sum().backward()
    torch.testing.assert_close(changes[0], x.grad)
    for (name, _), change in zip(packed.named_parameters(), changes[1:], strict=True):
        own = [norm.get_parameter(name).grad for norm in alone]
        torch.testing.assert_close(change, torch.stack(own))  # type: ignore[arg-type]
    assert not any(buffer.requires_grad for buffer in packed.buffers()), "nothing is kept of the call"


def test_ids_without_a_row_for_each_row_of_the_batch_are_refused() -> None:
    pack = Pack.build([make("gpt2", seed) for seed in range(3)])
    ids = torch.full((6, 3), 5)
    with pytest.raises(ValueError, match=r"\(1, 3\).*3 packed models.*position_ids"):
        pack.model(input_ids=ids)
    logits = pack.model(input_ids=ids, position_ids=torch.arange(3).expand(6, -1)).logits
    expected = make("gpt2", 1)(input_ids=ids[:2]).logits
    torch.testing.assert_close(logits[2:4], expected)


# ---- the check that a pack goes through when it is made ----


class Averaging(LlamaForCausalLM):
    """Its logits depend on who shares the batch."""

    def forward(self, *args: Any, **more: Any) -> Any:
        output = super().forward(*args, **more)
        output.logits = output.logits + 0.01 * output.logits.mean(0)
        return output


class Forgetful(LlamaForCausalLM):
    """With a cache, its logits depend on who shares the batch."""

    def forward(self, *args: Any, **more: Any) -> Any:
        output = super().forward(*args, **more)
        if output.logits.shape[1] == 1 and more.get("past_key_values") is not None:
            output.logits = output.logits.roll(1, 0)
        return output


class OwnPositions(GPT2LMHeadModel):
    """It lets nobody give it positions."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        more.pop("position_ids", None)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **more)


def same_as(name: str, kind: type[PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    model = make(name, seed)
    changed = kind(model.config).to(model.dtype)
    changed.load_state_dict(model.state_dict())
    return changed


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    (
        (
            "llama",
            Averaging,
            r"the logits of the packed Averaging differ from those of its members by \de-",
        ),
        ("llama", Forgetful, r"the generated logits of the packed Forgetful differ"),
        (
            "gpt2",
            OwnPositions,
            r"OwnPositions does not work with a pack \(ValueError: ids of shape \(1",
        ),
    ),
)
def test_code_that_mixes_rows_is_found_out(name: str, kind: type[PreTrainedModel], reason: str) -> None:
    model = same_as(name, kind)
    with pytest.raises(CannotPack, match=reason):
        Pack.build([model] * 3)


def test_what_only_the_numbers_of_a_member_show_is_found_out() -> None:
    alone = [make("llama", seed) for seed in range(2)]
    alone[1].model.norm.variance_epsilon = 1.0
    with pytest.raises(CannotPack, match=r"the logits of the packed LlamaForCausalLM differ .* \de"):
        Pack.build(alone)


def test_members_share_their_buffers_or_do_not_pack() -> None:
    alone = [make("llama", seed) for seed in range(2)]
    for model in alone:
        model.register_buffer("languages", torch.tensor([3.0, 1.0, 4.0]))
    kept = Pack.build(alone).unpack_cell(1).state_dict()
    assert kept.keys() == alone[1].state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in alone[1].state_dict().items())
    alone[1].languages[0] = 2.0
    with pytest.raises(CannotPack, match="model 1 differs from model 0 in its buffer 'languages'"):
        Pack.build(alone)


@pytest.mark.parametrize("broken", (0, 2))
def test_a_member_that_is_not_a_number_packs_with_the_others(broken: int) -> None:
    alone = [make("llama", seed) for seed in range(CELLS)]
    next(alone[broken].parameters()).data.fill_(torch.nan)
    pack, rows = Pack.build(alone), rows_for(alone[0])
    logits = split_blocks(
        rows.replace_completions(compute_completion_logits(pack.model, rows), rows.completion_mask), CELLS
    )
    for n, part in enumerate(logits):
        assert bool(part.completion_ids.isnan().any()) == (n == broken)


def test_members_keep_their_mode_and_their_generation_config() -> None:
    alone = [make("llama", seed).train() for seed in range(2)]
    alone[0].model.layers[1].eval()
    configs = [model.generation_config.to_dict() for model in alone]
    modes = [[m.training for m in model.modules()] for model in alone]
    state = torch.get_rng_state()
    pack = Pack.build(alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert [[m.training for m in model.modules()] for model in alone] == modes
    assert [model.generation_config.to_dict() for model in (*alone, pack.model)] == [*configs, configs[0]]
    assert not pack.model.model.layers[1].mlp.training
    assert pack.model.model.layers[0].mlp.training


def test_running_out_of_memory_is_not_taken_for_a_family_that_cannot_pack() -> None:
    class Hungry(LlamaForCausalLM):
        def forward(self, *args: Any, **more: Any) -> Any:
            raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError):
        Pack.build([same_as("llama", Hungry)])


def test_a_norm_without_weights_needs_no_packed_form() -> None:
    class Plain(nn.Module):
        """The smallest thing that packs: a head over a norm that holds nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x))

    from gkd_lab.models.packing import _replace_modules

    alone = [Plain(), Plain()]
    packed = copy.deepcopy(alone[0])
    _replace_modules(packed, alone)  # type: ignore[arg-type]
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(x), torch.cat([alone[0](x[:3]), alone[1](x[3:])]))
