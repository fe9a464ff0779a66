"""Compare a pack with its single members: logits, gradients, generated tokens and saved weights."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

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
    """A family with LayerNorms, biases and an untied head that packs without special code."""
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
    """Rows of different lengths; each cell has its own."""
    examples = tiny_examples(rows, seed)
    return collate_examples(examples, PAD, is_encoder_decoder=family == "encoder-decoder")


def value(logits: Tensor, mask: Tensor) -> Tensor:
    """A value per sequence that depends on every trained logit."""
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return ((logits.log_softmax(-1) * weights).sum(-1) * mask).sum(-1)


def assert_same_gradients(pack: Pack, alone: list[PreTrainedModel]) -> None:
    for cell, model in enumerate(alone):
        packed = pack.get_cell_gradients(cell)
        expected = {name: p.grad for name, p in model.named_parameters()}
        assert packed.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(packed[name], gradient, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_has_the_logits_and_gradients_of_its_single_members(family: Family) -> None:
    alone, rows = members(family), batch(family)
    pack = Pack.build(alone)
    logits = compute_completion_logits(pack.model, rows)
    value(logits, rows.completion_mask).sum().backward()
    for cell, (model, cell_rows) in enumerate(zip(alone, split_blocks(rows, CELLS), strict=True)):
        expected = compute_completion_logits(model, cell_rows)
        value(expected, cell_rows.completion_mask).sum().backward()
        torch.testing.assert_close(logits[cell * ROWS : (cell + 1) * ROWS], expected, rtol=0, atol=1e-12)
    assert_same_gradients(pack, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generated_pad_token_gets_the_gradient_of_the_single_model(family: Family) -> None:
    alone, rows = members(family), batch(family)
    rows.completion_ids[:, 0] = PAD
    pack = Pack.build(alone)
    value(compute_completion_logits(pack.model, rows), rows.completion_mask).sum().backward()
    for model, cell_rows in zip(alone, split_blocks(rows, CELLS), strict=True):
        value(compute_completion_logits(model, cell_rows), cell_rows.completion_mask).sum().backward()
    assert_same_gradients(pack, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_cell_give_no_gradient_to_another(family: Family) -> None:
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
    for cell, (model, cell_rows) in enumerate(zip(alone, split_blocks(rows, CELLS), strict=True)):
        expected = compute_completion_logits(model, cell_rows)
        value(expected, cell_rows.completion_mask).sum().backward()
        torch.testing.assert_close(logits[cell * ROWS : (cell + 1) * ROWS], expected, rtol=0, atol=1e-11)
    assert_same_gradients(pack, alone)


def generate(model: PreTrainedModel, rows: Sequences, beams: int, noise: Tensor | None) -> Sequences:
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
    """Compare completions up to the width of the padding."""
    width = alone.completion_ids.shape[1]
    assert torch.equal(packed.completion_ids[:, :width], alone.completion_ids)
    assert torch.equal(packed.completion_mask[:, :width], alone.completion_mask)
    assert packed.completion_mask[:, width:].sum() == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decoding", ("greedy", "sample", "beam"))
def test_a_pack_generates_the_tokens_of_its_single_members(family: Family, decoding: str) -> None:
    alone, rows = members(family), batch(family)
    beams = 3 if decoding == "beam" else 1
    noise = draw_uniforms(0, 0, "sampling", CELLS * ROWS, 9) if decoding == "sample" else None
    together = generate(Pack.build(alone).model, rows, beams, noise)
    for cell, (model, cell_rows) in enumerate(zip(alone, split_blocks(rows, CELLS), strict=True)):
        span = slice(cell * ROWS, (cell + 1) * ROWS)
        expected = generate(model, cell_rows, beams, None if noise is None else noise[span])
        assert_same_rows(split_blocks(together, CELLS)[cell], expected)
    distinct = {tuple(ids) for ids in together.completion_ids.tolist()}
    assert len(distinct) > CELLS, "the models must write different texts, or the test proves nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cells", ([1], [0, 2], [2, 0], [0, 1, 2]))
def test_selected_cells_compute_and_generate_as_their_single_models(family: Family, cells: list[int]) -> None:
    alone = members(family)
    pack, rows = Pack.build(alone), batch(family, rows=len(cells) * ROWS)
    with pack.select_cells(cells) as model, torch.no_grad():
        logits = compute_completion_logits(model, rows)
        text = generate(model, rows, 1, None)
    for index, (cell, cell_rows) in enumerate(zip(cells, split_blocks(rows, len(cells)), strict=True)):
        expected = compute_completion_logits(alone[cell], cell_rows)
        span = slice(index * ROWS, (index + 1) * ROWS)
        torch.testing.assert_close(logits[span], expected, rtol=0, atol=1e-12)
        assert_same_rows(split_blocks(text, len(cells))[index], generate(alone[cell], cell_rows, 1, None))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_cells_are_restored_after_a_selection_that_raises(family: Family) -> None:
    pack, rows = Pack.build(members(family)), batch(family)
    before = compute_completion_logits(pack.model, rows)
    with pytest.raises(RuntimeError, match="broken on purpose"), pack.select_cells([1]):
        raise RuntimeError("broken on purpose")
    assert torch.equal(compute_completion_logits(pack.model, rows), before)


def test_a_selection_has_the_current_weights() -> None:
    pack, rows = Pack.build(members("decoder-only")), batch("decoder-only", rows=ROWS)
    with torch.no_grad(), pack.select_cells([1]) as model:
        before = compute_completion_logits(model, rows)
    for view in pack.get_cell_parameters(1).values():
        view.mul_(1.5)
    with torch.no_grad(), pack.select_cells([1]) as model:
        after = compute_completion_logits(model, rows)
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_does_not_modify_its_members(family: Family) -> None:
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
def test_a_cell_computes_the_same_after_saving_and_loading(family: Family, tmp_path: Path) -> None:
    pack, rows = Pack.build(members(family)), batch(family)
    generator = torch.Generator().manual_seed(0)
    for cell in range(CELLS):
        for view in pack.get_cell_parameters(cell).values():
            view.add_(0.1 * torch.randn(view.shape, generator=generator, dtype=view.dtype))
    logits = compute_completion_logits(pack.model, rows)
    auto = AutoModelForCausalLM if family == "decoder-only" else AutoModelForSeq2SeqLM
    for cell, cell_rows in enumerate(split_blocks(rows, CELLS)):
        pack.unpack_cell(cell).save_pretrained(tmp_path / str(cell))
        loaded = auto.from_pretrained(tmp_path / str(cell), dtype=torch.float64)
        span = slice(cell * ROWS, (cell + 1) * ROWS)
        torch.testing.assert_close(
            compute_completion_logits(loaded, cell_rows), logits[span], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_a_cell_changes_no_other_cell(family: Family) -> None:
    alone = members(family)
    pack, other = Pack.build(alone), tiny_model(family, 9)
    state = {name: p.detach() for name, p in other.named_parameters()}
    pack.load_cell(1, state)
    for cell, expected in ((0, alone[0]), (1, other), (2, alone[2])):
        weights = dict(expected.named_parameters())
        assert all(torch.equal(v, weights[name]) for name, v in pack.get_cell_parameters(cell).items())
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
def test_a_pack_of_one_equals_the_single_model(family: Family) -> None:
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


def test_models_that_differ_are_refused_with_the_difference() -> None:
    small, large = (tiny_model("decoder-only", 0, width=width) for width in (16, 32))
    with pytest.raises(CannotPack, match=r"model 1 .*embed_tokens.weight: \(14, 32\) .*\(14, 16\)"):
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
    with pytest.raises(CannotPack, match=r"packed form .*mlp\.gate\.weight"):
        Pack.build([model, model])


# ---- every family that packs ----


def make_rows(model: PreTrainedModel, rows: int = CELLS * ROWS) -> Sequences:
    return collate_examples(tiny_examples(rows), PAD, is_encoder_decoder=model.config.is_encoder_decoder)


def assert_close(actual: Tensor, expected: Tensor, double: float = 1e-6) -> None:
    """Compare with a tolerance for norms, which are in float32 whatever the model's dtype."""
    tolerance = double if expected.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PACKED)
def test_every_family_packs_with_the_logits_gradients_and_tokens_of_single_models(name: str) -> None:
    alone = [make(name, seed) for seed in range(CELLS)]
    pack, rows = Pack.build(alone), make_rows(alone[0])
    logits = compute_completion_logits(pack.model, rows)
    value(logits, rows.completion_mask).sum().backward()
    text = split_blocks(generate(pack.model, rows, 1, None), CELLS)
    for n, (model, cell_rows) in enumerate(zip(alone, split_blocks(rows, CELLS), strict=True)):
        expected = compute_completion_logits(model, cell_rows)
        value(expected, cell_rows.completion_mask).sum().backward()
        assert_close(logits[n * ROWS : (n + 1) * ROWS], expected)
        assert_same_rows(text[n], generate(model, cell_rows, 1, None))
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
            assert_close(pack.get_cell_gradients(n)[key], parameter.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PACKED)
def test_checkpointed_activations_change_no_gradient(name: str) -> None:
    packs = [Pack.build([make(name, seed) for seed in range(CELLS)]) for _ in range(2)]
    packs[1].model.gradient_checkpointing_enable()
    for pack in packs:
        rows = make_rows(pack.model)
        value(compute_completion_logits(pack.model.train(), rows), rows.completion_mask).sum().backward()
    assert packs[1].model.is_gradient_checkpointing
    for cell in range(CELLS):
        plain, saving = (pack.get_cell_gradients(cell) for pack in packs)
        for key, gradient in plain.items():
            assert gradient is not None
            assert_close(saving[key], gradient)  # type: ignore[arg-type]


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative error of a tensor in the Euclidean norm."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", PACKED)
def test_under_autocast_a_pack_equals_its_members_up_to_rounding(name: str) -> None:
    alone = [make(name, seed, dtype=torch.float32) for seed in range(CELLS)]
    pack, rows = Pack.build(alone), make_rows(alone[0])
    exact = compute_completion_logits(pack.model, rows)
    with torch.autocast("cpu", torch.bfloat16):
        logits = compute_completion_logits(pack.model, rows)
        value(logits.float(), rows.completion_mask).sum().backward()
        for n, (model, cell_rows) in enumerate(zip(alone, split_blocks(rows, CELLS), strict=True)):
            expected = compute_completion_logits(model, cell_rows)
            value(expected.float(), cell_rows.completion_mask).sum().backward()
            assert expected.dtype == logits.dtype
            assert relative(logits[n * ROWS : (n + 1) * ROWS], expected) < 0.03
    assert relative(logits, exact) > 1e-4, "autocast must have an effect"
    for n, model in enumerate(alone):
        for key, gradient in pack.get_cell_gradients(n).items():
            expected = model.get_parameter(key).grad
            assert gradient is not None and expected is not None and gradient.dtype == expected.dtype
            assert relative(gradient, expected) < 0.1, key


# ---- selected cells, and weights cast in advance ----


def packed_modules(pack: Pack) -> list[PackedModule]:
    return [module for module in pack.model.modules() if isinstance(module, PackedModule)]


def shares_memory(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize(("cells", "is_view"), (([1, 2], True), ([1], True), ([0, 2], False)))
def test_neighbouring_cells_are_views_of_the_weights(cells: list[int], is_view: bool) -> None:
    pack = Pack.build(members("decoder-only"))
    with pack.select_cells(cells):
        for module in packed_modules(pack):
            weight = module.get_active_weight()
            assert len(weight) == len(cells)
            assert shares_memory(weight, module.get_parameter("weight")) == is_view


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("cells", ([0, 1, 2], [1, 2], [2, 0]))
def test_weights_cast_in_advance_compute_as_under_autocast(name: str, cells: list[int]) -> None:
    pack = Pack.build([make(name, seed, dtype=torch.float32) for seed in range(CELLS)])
    rows = make_rows(pack.model, len(cells) * ROWS)
    with torch.no_grad(), pack.select_cells(cells) as model:
        exact = compute_completion_logits(model, rows)
        with torch.autocast("cpu", torch.bfloat16):
            wide = compute_completion_logits(model, rows)
    with (
        torch.no_grad(),
        pack.select_cells(cells, torch.bfloat16) as model,
        torch.autocast("cpu", torch.bfloat16),
    ):
        narrow = compute_completion_logits(model, rows)
        assert generate(model, rows, 1, None).num_rows == rows.num_rows
    assert relative(narrow, exact) < 2 * relative(wide, exact) < 0.1
    assert all(p.dtype == torch.float32 for p in pack.model.parameters())


def test_only_linear_layers_are_cast_in_advance() -> None:
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


def test_a_single_model_is_never_cast_in_advance() -> None:
    model = make("llama", 0, dtype=torch.float32)
    with Pack.build_single(model).select_cells([0], torch.bfloat16) as selected:
        assert selected is model
        assert selected.dtype == torch.float32
