"""Packed equals alone: logits, gradients, generated tokens and saved weights, in float64."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

from gkd_lab.distill.batches import collate
from gkd_lab.distill.sampling import write
from gkd_lab.distill.steps import blocks
from gkd_lab.distill.streams import uniforms
from gkd_lab.models.forward import Sequences, completion_logits
from gkd_lab.models.packing import CannotPack, Pack
from gkd_lab.spec.cell import Family

from .tiny import END, FAMILIES, PAD, tiny_examples, tiny_model

CELLS, ROWS = 3, 4


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
    return collate(examples, PAD, is_encoder_decoder=family == "encoder-decoder")


def parts(family: Family, rows: Sequences, cells: int = CELLS) -> list[Sequences]:
    return blocks(rows, cells)


def value(logits: Tensor, mask: Tensor) -> Tensor:
    """A number per sequence that every trained logit moves."""
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return ((logits.log_softmax(-1) * weights).sum(-1) * mask).sum(-1)


def assert_same_gradients(pack: Pack, alone: list[PreTrainedModel]) -> None:
    for cell, model in enumerate(alone):
        packed = pack.gradients_of(cell)
        own = {name: p.grad for name, p in model.named_parameters()}
        assert packed.keys() == own.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(packed[name], gradient, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_each_model_alone(family: Family) -> None:
    alone, rows = members(family), batch(family)
    pack = Pack.of(alone)
    logits = completion_logits(pack.model, rows)
    value(logits, rows.completion_mask).sum().backward()
    for cell, (model, own) in enumerate(zip(alone, parts(family, rows), strict=True)):
        expected = completion_logits(model, own)
        value(expected, own.completion_mask).sum().backward()
        torch.testing.assert_close(logits[cell * ROWS : (cell + 1) * ROWS], expected, rtol=0, atol=1e-12)
    assert_same_gradients(pack, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pad_token_that_was_written_gets_the_gradient_that_it_gets_alone(family: Family) -> None:
    alone, rows = members(family), batch(family)
    rows.completion_ids[:, 0] = PAD
    pack = Pack.of(alone)
    value(completion_logits(pack.model, rows), rows.completion_mask).sum().backward()
    for model, own in zip(alone, parts(family, rows), strict=True):
        value(completion_logits(model, own), own.completion_mask).sum().backward()
    assert_same_gradients(pack, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_cell_s_rows_give_no_gradient_to_another(family: Family) -> None:
    pack, rows = Pack.of(members(family)), batch(family)
    values = value(completion_logits(pack.model, rows), rows.completion_mask)
    values[ROWS : 2 * ROWS].sum().backward()
    for cell in range(CELLS):
        moved = any(g.abs().max() > 0 for g in pack.gradients_of(cell).values() if g is not None)
        assert moved == (cell == 1)


def test_layer_norms_biases_and_an_untied_head_pack_too() -> None:
    alone, rows = [neox(seed) for seed in range(CELLS)], batch("decoder-only")
    pack = Pack.of(alone)
    logits = completion_logits(pack.model, rows)
    value(logits, rows.completion_mask).sum().backward()
    for cell, (model, own) in enumerate(zip(alone, blocks(rows, CELLS), strict=True)):
        expected = completion_logits(model, own)
        value(expected, own.completion_mask).sum().backward()
        torch.testing.assert_close(logits[cell * ROWS : (cell + 1) * ROWS], expected, rtol=0, atol=1e-11)
    assert_same_gradients(pack, alone)


def written(model: PreTrainedModel, rows: Sequences, beams: int, noise: Tensor | None) -> Sequences:
    return write(
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
    noise = uniforms(0, 0, "sampling", CELLS * ROWS, 9) if way == "sample" else None
    together = written(Pack.of(alone).model, rows, beams, noise)
    for cell, (model, own) in enumerate(zip(alone, blocks(rows, CELLS), strict=True)):
        part = slice(cell * ROWS, (cell + 1) * ROWS)
        expected = written(model, own, beams, None if noise is None else noise[part])
        assert_same_rows(blocks(together, CELLS)[cell], expected)
    distinct = {tuple(ids) for ids in together.completion_ids.tolist()}
    assert len(distinct) > CELLS, "the models must write different things for this to mean anything"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", ([1], [0, 2], [2, 0], [0, 1, 2]))
def test_a_choice_of_cells_reads_and_writes_as_they_do_alone(family: Family, chosen: list[int]) -> None:
    alone = members(family)
    pack, rows = Pack.of(alone), batch(family, rows=len(chosen) * ROWS)
    with pack.only(chosen) as model, torch.no_grad():
        logits = completion_logits(model, rows)
        text = written(model, rows, 1, None)
    for place, (cell, own) in enumerate(zip(chosen, blocks(rows, len(chosen)), strict=True)):
        expected = completion_logits(alone[cell], own)
        part = slice(place * ROWS, (place + 1) * ROWS)
        torch.testing.assert_close(logits[part], expected, rtol=0, atol=1e-12)
        assert_same_rows(blocks(text, len(chosen))[place], written(alone[cell], own, 1, None))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_cells_are_back_after_a_choice_even_if_it_broke(family: Family) -> None:
    pack, rows = Pack.of(members(family)), batch(family)
    before = completion_logits(pack.model, rows)
    with pytest.raises(RuntimeError, match="broken on purpose"), pack.only([1]):
        raise RuntimeError("broken on purpose")
    assert torch.equal(completion_logits(pack.model, rows), before)


def test_the_weights_chosen_are_those_of_now() -> None:
    pack, rows = Pack.of(members("decoder-only")), batch("decoder-only", rows=ROWS)
    with torch.no_grad(), pack.only([1]) as model:
        before = completion_logits(model, rows)
    for view in pack.parameters_of(1).values():
        view.mul_(1.5)
    with torch.no_grad(), pack.only([1]) as model:
        after = completion_logits(model, rows)
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_changes_none_of_the_members(family: Family) -> None:
    alone = members(family)
    before = [copy.deepcopy(model.state_dict()) for model in alone]
    pack = Pack.of(alone)
    for view in pack.parameters_of(0).values():
        view.zero_()
    for model, state in zip(alone, before, strict=True):
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_stay_one_tensor(family: Family) -> None:
    model = tiny_model(family, 0)
    pack = Pack.of([model, tiny_model(family, 1)])
    assert pack.parameters_of(0).keys() == dict(model.named_parameters()).keys()
    head, embedding = pack.model.get_output_embeddings(), pack.model.get_input_embeddings()
    assert head.weight is embedding.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_saved_and_loaded_is_the_model_that_it_was_in_the_pack(family: Family, tmp_path: Path) -> None:
    pack, rows = Pack.of(members(family)), batch(family)
    generator = torch.Generator().manual_seed(0)
    for cell in range(CELLS):
        for view in pack.parameters_of(cell).values():
            view.add_(0.1 * torch.randn(view.shape, generator=generator, dtype=view.dtype))
    logits = completion_logits(pack.model, rows)
    auto = AutoModelForCausalLM if family == "decoder-only" else AutoModelForSeq2SeqLM
    for cell, own in enumerate(blocks(rows, CELLS)):
        pack.unpack(cell).save_pretrained(tmp_path / str(cell))
        loaded = auto.from_pretrained(tmp_path / str(cell), dtype=torch.float64)
        part = slice(cell * ROWS, (cell + 1) * ROWS)
        torch.testing.assert_close(completion_logits(loaded, own), logits[part], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_a_cell_changes_it_and_nobody_else(family: Family) -> None:
    alone = members(family)
    pack, other = Pack.of(alone), tiny_model(family, 9)
    state = {name: p.detach() for name, p in other.named_parameters()}
    pack.load(1, state)
    for cell, expected in ((0, alone[0]), (1, other), (2, alone[2])):
        own = dict(expected.named_parameters())
        assert all(torch.equal(v, own[name]) for name, v in pack.parameters_of(cell).items())
    with pytest.raises(ValueError, match=r"weights lack '.*' \(1 of "):
        pack.load(0, dict(list(state.items())[1:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_the_order_of_rows_change_nothing(family: Family) -> None:
    model, rows = tiny_model(family, 0), batch(family)
    expected = completion_logits(model, rows)
    order = torch.randperm(rows.rows, generator=torch.Generator().manual_seed(0))
    moved = completion_logits(model, rows.map(lambda tensor: tensor[order]))
    torch.testing.assert_close(moved, expected[order], rtol=0, atol=1e-12)
    left, right = ((3, 0), (0, 3)) if family == "decoder-only" else ((0, 3), (0, 3))
    wide = Sequences(
        nn.functional.pad(rows.prompt_ids, left, value=PAD),
        nn.functional.pad(rows.prompt_mask, left, value=0),
        nn.functional.pad(rows.completion_ids, right, value=PAD),
        nn.functional.pad(rows.completion_mask, right, value=0),
    )
    padded = completion_logits(model, wide)[:, :-3]
    mask = rows.completion_mask.bool()
    torch.testing.assert_close(padded[mask], expected[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_of_one_and_a_model_alone_agree(family: Family) -> None:
    model, rows = tiny_model(family, 0), batch(family)
    packed, alone = Pack.of([model]), Pack.alone(model)
    assert packed.is_packed
    assert not alone.is_packed
    assert packed.parameters_of(0).keys() == alone.parameters_of(0).keys()
    torch.testing.assert_close(
        completion_logits(packed.model, rows),
        completion_logits(alone.model, rows),
        rtol=0,
        atol=1e-12,
    )
    assert alone.unpack(0) is model


def test_models_that_differ_are_refused_with_what_differs() -> None:
    small, large = (tiny_model("decoder-only", 0, width=width) for width in (16, 32))
    with pytest.raises(CannotPack, match=r"model 1 .*embed_tokens.weight: \(14, 32\) and \(14, 16\)"):
        Pack.of([small, large])
    with pytest.raises(CannotPack, match=r"model 1 .*class.*T5.*Llama"):
        Pack.of([small, tiny_model("encoder-decoder", 0)])
    with pytest.raises(CannotPack, match=r"model 1 .*float32.*float64"):
        Pack.of([small, tiny_model("decoder-only", 0, dtype=torch.float32)])


def test_equal_shapes_with_other_heads_are_refused() -> None:
    with pytest.raises(CannotPack, match=r"model 1 .*num_attention_heads"):
        Pack.of([tiny_model("decoder-only", 0, heads=heads) for heads in (4, 2)])


def test_weights_without_a_packed_form_are_named() -> None:
    config = GPT2Config(vocab_size=14, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config)
    with pytest.raises(CannotPack, match=r"no packed form.*c_attn"):
        Pack.of([model, model])


def test_an_embedding_that_is_more_than_a_look_up_is_not_taken_for_one() -> None:
    config = BartConfig(
        vocab_size=14,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    model = BartForConditionalGeneration(config)
    with pytest.raises(CannotPack, match="no packed form"):
        Pack.of([model, model])


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
