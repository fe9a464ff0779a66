"""Universal logit distillation: its value, its gradient, what the teacher reads, and TRL's beside it."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gkd_lab.config.artifact_specs import Family
from gkd_lab.config.loss_terms import ULDConfig
from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.losses import uld
from gkd_lab.losses.auxiliary_losses import LossInputs, ModelOutputs
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits
from gkd_lab.losses.token_spans import Span, decode_completion, encode_completion, non_text_ids
from gkd_lab.losses.uld import TextTeacherLogits, ULDModule, sorted_l1_distance, sum_span_distances
from gkd_lab.models.forward import Sequences, compute_completion_logits
from gkd_lab.models.projection import Projection
from gkd_lab.teachers.text_teacher import TextTeacher

from ..models.tiny import FAMILIES
from ..training.pairs import Plain, model_of, pieces, plain_distance, words

PLAIN = ULDConfig()
ROWS = ("a b = 12 bad", "c cab 3", "21 21")


def examples(tokenizer: PreTrainedTokenizerFast, family: Family = "decoder-only") -> list[Example]:
    """Rows that end, but for the last, whose text was cut."""
    end, found = tokenizer.eos_token_id, []
    for n, text in enumerate(ROWS):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append(
            Example(tokenizer("a b c d"[: 3 + 2 * n])["input_ids"], [*ids, end][: len(ids) + (n < 2)])
        )
    return found


def collate_texts(tokenizer: PreTrainedTokenizerFast, family: Family = "decoder-only") -> Sequences:
    return collate_examples(
        examples(tokenizer), tokenizer.pad_token_id, is_encoder_decoder=family == "encoder-decoder"
    )


def build_inputs(
    logits: Tensor, rows: Sequences, projection: Projection | None = None, config: Any = None
) -> LossInputs:
    """A step on these rows alone: each row has the same weight, shared by its tokens (Eq. 2)."""
    mask = rows.completion_mask.double()
    weights = mask / mask.sum(-1, keepdim=True) / len(mask)
    own = ModelOutputs(logits, {}, config, projection or Projection(None))
    return LossInputs(rows, own, None, weights, on_policy=False, step=0, seed=0)


def reader(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    student: PreTrainedTokenizerFast,
    **more: Any,
) -> TextTeacher:
    return TextTeacher(Plain(teacher), tokenizer, student, [student.eos_token_id], **more)


def compute_value(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
    config: ULDConfig = PLAIN,
    family: Family = "decoder-only",
) -> Tensor:
    rows = collate_texts(student_tokenizer, family)
    module = ULDModule(config)
    module.teacher = reader(teacher, teacher_tokenizer, student_tokenizer)
    value: Tensor = module(build_inputs(compute_completion_logits(student, rows), rows))
    return value


def compute_by_hand(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
    config: ULDConfig = PLAIN,
) -> Tensor:
    """Word by word: tokens of a word are found by splitting the text at its spaces, one row at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for n, row in enumerate(examples(student_tokenizer)):
        sides = []
        for tokenizer, model, temperature in (
            (student_tokenizer, student, config.student_temperature),
            (teacher_tokenizer, teacher, config.teacher_temperature),
        ):
            prompt = tokenizer(student_tokenizer.decode(row.prompt_ids))["input_ids"]
            spelt = [tokenizer(word)["input_ids"] for word in split(ROWS[n], tokenizer)]
            spelt += [[tokenizer.eos_token_id]] if n < 2 else []
            ids = torch.tensor([prompt + [i for word in spelt for i in word]])
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
            probabilities = (logits / temperature).softmax(-1)
            joined, place = [], 0
            for word in spelt:
                vector = probabilities[place + len(word) - 1]
                for offset, i in enumerate(word[:-1]):
                    vector = vector * probabilities[place + offset, i]
                joined.append(vector)
                place += len(word)
            sides.append(joined)
        distances = [plain_distance(q, p.detach()) for q, p in zip(*sides, strict=True)]
        total = total + torch.stack(distances).mean() / len(ROWS)
    return total


def split(text: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Words, with the space in front of them where the tokenizer has one."""
    first, *rest = text.split()
    return [first, *(f" {word}" for word in rest)] if len(tokenizer) > 100 else [first, *rest]


# ---- the value ----


def test_the_value_is_that_of_two_sorted_distributions() -> None:
    """Sorted: 0.5 0.3 0.2 0 and 0.4 0.3 0.2 0.1."""
    one = torch.tensor([[0.3, 0.5, 0.2]])
    other = torch.tensor([[0.1, 0.3, 0.4, 0.2]])
    torch.testing.assert_close(sorted_l1_distance(one, other), torch.tensor([0.2]))
    torch.testing.assert_close(sorted_l1_distance(other, one), torch.tensor([0.2]))


def test_tokens_of_one_span_are_joined_by_the_chain_rule() -> None:
    """The student needs two tokens where the teacher has one: 0.5 times (0.8, 0.2) beside (0.7, 0.2, 0.1)."""
    student = torch.tensor([[[0.5, 0.5], [0.2, 0.8]]]).log()
    teacher = torch.tensor([[[0.1, 0.2, 0.7]]]).log()
    rows = Sequences(*(torch.tensor([[0, 1]]), torch.ones(1, 2).long()) * 2)
    spans: list[list[Span]] = [[([0, 1], [0])]]
    reading = TextTeacherLogits(HiddenTeacherLogits(teacher, Projection(None)), torch.tensor([[2]]), spans)
    value = sum_span_distances(ULDConfig(), build_inputs(student, rows), reading)
    torch.testing.assert_close(value, torch.tensor(abs(0.4 - 0.7) + abs(0.1 - 0.2) + 0.1))


PAIRS = {"words of pieces": (words, pieces), "pieces of words": (pieces, words), "one": (words, words)}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("config", [ULDConfig(), ULDConfig(student_temperature=2.0, teacher_temperature=0.5)])
def test_it_is_the_plain_formula_s_on_rows_of_different_lengths(pair: str, config: ULDConfig) -> None:
    one, other = (make() for make in PAIRS[pair])
    student, teacher = model_of(one, 1), model_of(other, 2, width=32)
    expected = compute_by_hand(student, teacher, one, other, config)
    assert expected > 0.1
    torch.testing.assert_close(compute_value(student, teacher, one, other, config), expected)


@pytest.mark.parametrize("pair", PAIRS)
def test_its_gradient_is_the_plain_formula_s(pair: str) -> None:
    one, other = (make() for make in PAIRS[pair])
    teacher, found = model_of(other, 2, width=32), []
    for compute in (compute_value, compute_by_hand):
        student = model_of(one, 1)
        compute(student, teacher, one, other).backward()
        found.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in found[0].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_equal_to_its_teacher_has_no_loss(family: Family) -> None:
    tokenizer = pieces()
    student, teacher = (model_of(tokenizer, 1, family) for _ in range(2))
    assert compute_value(student, teacher, tokenizer, tokenizer, family=family) < 1e-12
    other = model_of(tokenizer, 2, family)
    assert compute_value(other, teacher, tokenizer, tokenizer, family=family) > 0.1


@pytest.mark.parametrize("bias", [False, True])
def test_a_chunked_head_equals_one_pass(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = words(), pieces()
    rows, teacher = collate_texts(one), model_of(other, 2)
    torch.manual_seed(0)
    hidden = torch.randn(len(ROWS), rows.completion_ids.shape[1], 8, dtype=torch.float64)
    weight = torch.randn(len(one), 8, dtype=torch.float64)
    found = []
    for size in (2**27, 2 * 8 * (len(one) + 2 * len(other))):
        monkeypatch.setattr(uld, "CHUNK_BYTES", size)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        added = torch.ones(len(one), dtype=torch.float64).requires_grad_() if bias else None
        module = ULDModule(ULDConfig())
        module.teacher = reader(teacher, other, one)
        value = module(build_inputs(leaves[0], rows, Projection(leaves[1], added, scale=0.5, softcap=5.0)))
        (3 * value).backward()
        found.append([value, *(leaf.grad for leaf in leaves), *([added.grad] if added is not None else [])])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts)
    assert found[0][2].abs().max() > 1e-3


def test_its_gradient_agrees_with_finite_differences() -> None:
    one, other = words(), pieces()
    rows, teacher = collate_texts(one), model_of(other, 2)
    torch.manual_seed(0)
    logits = torch.randn(len(ROWS), rows.completion_ids.shape[1], len(one), dtype=torch.float64)
    module = ULDModule(ULDConfig())
    module.teacher = reader(teacher, other, one)
    assert torch.autograd.gradcheck(lambda x: module(build_inputs(x, rows)), 3 * logits.requires_grad_())


def test_minus_infinity_is_a_probability_of_0() -> None:
    one, other = words(), pieces()
    rows, teacher = collate_texts(one), model_of(other, 2)
    logits = torch.zeros(len(ROWS), rows.completion_ids.shape[1], len(one), dtype=torch.float64)
    logits[..., :2] = -math.inf
    module = ULDModule(ULDConfig())
    module.teacher = reader(teacher, other, one)
    value = module(build_inputs(logits.requires_grad_(), rows))
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_without_gradients_the_value_is_the_same() -> None:
    one, other = words(), pieces()
    student, teacher = model_of(one, 1), model_of(other, 2)
    with torch.no_grad():
        quiet = compute_value(student, teacher, one, other)
    torch.testing.assert_close(quiet, compute_value(student, teacher, one, other).detach())


def test_rows_of_weight_0_and_rows_without_a_span_count_nothing() -> None:
    one, other = words(), pieces()
    rows, teacher = collate_texts(one), model_of(other, 2)
    logits = torch.zeros(len(ROWS), rows.completion_ids.shape[1], len(one), dtype=torch.float64)
    seen = build_inputs(logits.requires_grad_(), rows)
    module = ULDModule(ULDConfig())
    module.teacher = reader(teacher, other, one)
    assert module(replace(seen, weights=0 * seen.weights)) == 0
    nothing = rows.replace_completions(rows.completion_ids * 0, rows.completion_mask)
    value = module(replace(seen, rows=nothing))
    value.backward()
    assert value == 0


# ---- TRL's ----


def trl_s(strategy: str, **more: Any) -> Any:
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = {
        "uld_crossentropy_weight": 0.0,
        "uld_distillation_weight": 1.0,
        "uld_student_temperature": 1.0,
        "uld_teacher_temperature": 1.0,
        "uld_skip_student_eos": False,
        "uld_skip_teacher_eos": False,
        "use_extended_uld": True,
        "uld_token_merge_strategy": strategy,
        **more,
    }
    return ULDLoss(SimpleNamespace(**config))


def compute_by_trl(
    student: PreTrainedModel, teacher: PreTrainedModel, one: Any, other: Any, strategy: str, **more: Any
) -> Tensor:
    """TRL's loss on our offsets (as bytes: the texts are ASCII): its own encoding wants byte-level BPE."""
    sides: list[list[Tensor]] = [[], [], [], []]
    logits = []
    for side, (model, tokenizer) in enumerate(((student, one), (teacher, other))):
        found, offsets = [], []
        for row in examples(one):
            said = decode_completion(one, row.completion_ids, [one.eos_token_id], non_text_ids(one))
            ids, ends = row.completion_ids, said.ends
            if side:
                ids, ends = encode_completion(other, said, non_text_ids(other), is_encoder_decoder=False)
            prompt = tokenizer(one.decode(row.prompt_ids))["input_ids"]
            found.append((prompt, ids))
            offsets.append([0] * len(prompt) + [min(end or 0, len(said.text)) for end in ends])
        width = max(len(p) + len(c) for p, c in found)
        ids_ = torch.zeros(len(found), width, dtype=torch.long)
        labels, spans = torch.full_like(ids_, -100), torch.zeros(len(found), width, 2, dtype=torch.long)
        for n, (prompt, completion) in enumerate(found):
            end = len(prompt) + len(completion)
            ids_[n, :end] = torch.tensor(prompt + completion)
            labels[n, len(prompt) : end] = ids_[n, len(prompt) : end]
            spans[n, :end, 1] = torch.tensor(offsets[n])
        logits.append(model(ids_).logits)
        for kept, tensor in zip(sides, (labels, ids_, spans), strict=False):
            kept.append(tensor)
    loss: Tensor = trl_s(strategy, **more)(*logits, *sides[0], *sides[1], *sides[2])
    return loss


@pytest.mark.parametrize("pair", PAIRS)
def test_it_equals_trl_s_by_the_chain_rule(pair: str) -> None:
    one, other = (make() for make in PAIRS[pair])
    student, teacher = model_of(one, 1), model_of(other, 2, width=32)
    expected = compute_by_trl(student, teacher, one, other, "bayesian")
    torch.testing.assert_close(compute_value(student, teacher, one, other), expected)


def test_trl_s_default_is_shifted_by_one_token() -> None:
    """One position late: a teacher that differs in its first token alone is no different to it."""
    tokenizer = words()
    student = model_of(tokenizer, 1)
    same = compute_by_trl(student, student, tokenizer, tokenizer, "observed")
    assert same < 1e-12
    rows = collate_texts(tokenizer)
    logits = compute_completion_logits(student, rows).detach()
    changed = logits.clone()
    changed[:, 0] = changed[:, 0] * 3
    labels = torch.cat([torch.full_like(rows.prompt_ids, -100), rows.completion_ids], 1)
    labels[:, rows.prompt_ids.shape[1] :][rows.completion_mask == 0] = -100
    ids = torch.cat([rows.prompt_ids, rows.completion_ids], 1)
    behind = logits.new_zeros(*ids.shape, logits.shape[-1])

    def whole(part: Tensor) -> Tensor:
        found = behind.clone()
        found[:, rows.prompt_ids.shape[1] - 1 : -1] = part
        return found

    offsets = torch.stack([ids * 0, torch.arange(ids.shape[1]).expand_as(ids)], -1)
    for strategy, differs in (("observed", False), ("bayesian", True)):
        found = trl_s(strategy)(whole(logits), whole(changed), labels, labels, ids, ids, offsets, offsets)
        assert (found > 1e-3) == differs


def test_trl_s_default_drops_the_last_token() -> None:
    """It leaves each row's last token out, also where the row was cut and that is a word."""
    tokenizer = words()
    student, rows = model_of(tokenizer, 1), collate_texts(tokenizer)
    at_end = rows.completion_mask.sum(-1) - 1
    defaults = {"uld_skip_student_eos": True, "uld_skip_teacher_eos": True}
    ids = torch.cat([rows.prompt_ids, rows.completion_ids], 1)
    labels = ids.masked_fill(torch.cat([rows.prompt_mask * 0, rows.completion_mask], 1) == 0, -100)
    offsets = torch.stack([ids * 0, torch.arange(ids.shape[1]).expand_as(ids)], -1)
    logits = student(ids).logits.detach()
    changed = logits.clone()
    for row, place in enumerate(rows.prompt_ids.shape[1] - 1 + at_end):
        changed[row, place] *= 3
    for more, differs in ((defaults, False), ({}, True)):
        found = trl_s("bayesian", **more)(logits, changed, labels, labels, ids, ids, offsets, offsets)
        assert (found > 1e-3) == differs


def test_trl_s_hybrid_loss_drops_tokens_that_only_the_teacher_has() -> None:
    """Where the student has no token that the teacher lacks: 0.8 of the teacher's mass is left out here."""
    hybrid = {
        "uld_use_hybrid_loss": True,
        "uld_hybrid_matched_weight": 0.0,
        "uld_hybrid_unmatched_weight": 1.0,
    }
    loss = trl_s("bayesian", **hybrid)
    loss._vocab_mapping, loss._teacher_matched_ids = {0: 0, 1: 1}, {0, 1}
    loss.mapping_tensor = torch.tensor([0, 1])
    student, teacher = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.1, 0.1, 0.8]])
    assert loss._compute_hybrid_uld_loss(student, teacher) == 0
    torch.testing.assert_close(sorted_l1_distance(student, teacher), torch.tensor([0.3 + 0.4 + 0.1]))


def test_trl_encodes_with_byte_level_tokenizers_alone() -> None:
    from trl.experimental.gold.gold_trainer import encode_with_byte_offsets

    with pytest.raises(NotImplementedError, match="only ByteLevel BPE"):
        encode_with_byte_offsets(words().backend_tokenizer, ["a b"])


# ---- what the teacher reads ----


def test_the_teacher_reads_prompt_and_completion_in_its_own_tokens() -> None:
    one, other = words(), pieces()
    teacher = reader(model_of(other, 2), other, one)
    reading = teacher.read_rows(collate_texts(one))
    read = [other.decode(ids[ids != other.pad_token_id]) for ids in reading.ids]
    assert read == ["a b = 12 bad</s>", "c cab 3</s>", "21 21"]


def test_a_cached_teacher_prompt_is_used_unchanged() -> None:
    """The word tokenizer has no token for a line break, with which a decoder's prompt ends."""
    one, other = words(), pieces()
    row = examples(one)[0]
    known = {tuple(row.prompt_ids): other("a b c\n")["input_ids"]}
    assert (
        reader(model_of(other, 2), other, one)._translate_prompt(row.prompt_ids) == other("a b")["input_ids"]
    )
    found = reader(model_of(other, 2), other, one, teacher_prompts=known)._translate_prompt(row.prompt_ids)
    assert found == known[tuple(row.prompt_ids)]


def test_rows_that_cells_share_are_read_once() -> None:
    one, other = words(), pieces()
    plain = Plain(model_of(other, 2))
    teacher = TextTeacher(plain, other, one, [one.eos_token_id])
    rows = collate_texts(one)
    first = teacher.read_rows(rows)
    assert teacher.read_rows(rows.map_tensors(torch.clone)) is first
    shorter = replace(rows, completion_mask=rows.completion_mask * 0)
    assert teacher.read_rows(shorter) is not first
    assert plain.reads == 2


def test_a_teacher_of_another_family_reads_the_same_text() -> None:
    one, other = words(), pieces()
    student, teacher = model_of(one, 1), model_of(other, 2, "encoder-decoder")
    value = compute_value(student, teacher, one, other)
    assert 0 < value < 2


# ---- messages ----


def test_invalid_settings_and_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="teacher_temperature"):
        ULDConfig(teacher_temperature=0)
    one, other = words(), pieces()
    with pytest.raises(ValueError, match="`teacher`"):
        ULDModule(ULDConfig())(build_inputs(torch.zeros(1), collate_texts(one)))
    with pytest.raises(ValueError, match=r"teacher's tokenizer.*teacher_processing_class"):
        reader(model_of(other, 2), None, one)  # type: ignore[arg-type]
    other.eos_token = None
    with pytest.raises(ValueError, match=r"teacher's .*`tokenizer.eos_token`"):
        reader(model_of(pieces(), 2), other, one)
