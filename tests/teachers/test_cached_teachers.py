"""Kept distributions in the place of a teacher: what is exact, what is lost, how they are read."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkd_lab.config.artifact_specs import Family
from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.fused_loss import compute_cell_losses
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits
from gkd_lab.models.forward import compute_completion_logits
from gkd_lab.models.projection import Projection
from gkd_lab.teachers import score_files
from gkd_lab.teachers.cached_teachers import CachedTeacher
from gkd_lab.teachers.score_files import INDEX_FILE, ScoreLayout, ScoreReader
from gkd_lab.teachers.score_writer import number_examples, write_teacher_scores
from gkd_lab.teachers.top_k_distributions import (
    TopKScores,
    TopKTeacherLogits,
    compute_top_k_scores,
    concatenate_scores,
    select_top_k,
)

from ..losses.loss_problems import normal
from ..models.tiny import FAMILIES, PAD, tiny_examples, tiny_model, tiny_tokenizer
from ..training.driving import Run, Stopped, assert_close, assert_identical, cell, distil, stop_at

BLOCKS, TOKENS, WIDTH, VOCABULARY = 2, 7, 5, 11
DIVERGENCES = (
    Divergence(beta=0.0),
    Divergence(beta=0.5, teacher_temperature=0.5),
    Divergence(beta=1.0, student_temperature=2.0, teacher_temperature=2.0),
    Divergence("tv"),
)


def logits() -> Tensor:
    return 3 * normal(1, BLOCKS, TOKENS, VOCABULARY)


def stored(top_k: int | None, dtype: torch.dtype = torch.float64) -> TopKTeacherLogits:
    return TopKTeacherLogits.create(select_top_k(logits(), top_k, dtype), VOCABULARY)


def read(guide: Any, vocabulary: int = VOCABULARY) -> Tensor:
    """All logits, block after block, three rows at once."""
    reader = guide.create_reader(vocabulary, torch.float64, 3)
    rows = torch.arange(guide.shape[1]).split(3)
    return torch.stack([torch.cat([reader(m, some).clone() for some in rows]) for m in range(guide.shape[0])])


def test_top_2_of_4_tokens_are_named_and_the_others_share_the_tail() -> None:
    logits_of_row = torch.tensor([[0.5, 0.1, 0.3, 0.1]], dtype=torch.float64).log()
    scores = select_top_k(logits_of_row, 2, torch.float64)
    assert scores.ids is not None and scores.tail_log_prob is not None
    assert scores.ids.tolist() == [[0, 2]]
    torch.testing.assert_close(scores.tail_log_prob.exp(), torch.tensor([0.2], dtype=torch.float64))
    guide = TopKTeacherLogits.create(scores.apply(lambda tensor: tensor[None]), 4)
    torch.testing.assert_close(read(guide, 4).exp()[0], logits_of_row.exp())


def test_a_tail_too_small_for_one_minus_the_sum_keeps_its_digits() -> None:
    logits_of_row = torch.tensor([[0.0, -40.0, -41.0, -42.0]])
    tail = select_top_k(logits_of_row, 1, torch.float32).tail_log_prob
    assert tail is not None
    expected = math.log(math.exp(-40) + math.exp(-41) + math.exp(-42))
    assert tail.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("top_k", [None, VOCABULARY, VOCABULARY + 5])
def test_full_distributions_are_stored_exactly_in_vocabulary_order(top_k: int | None) -> None:
    guide = stored(top_k)
    assert guide.ids is None
    torch.testing.assert_close(read(guide), logits().log_softmax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 3, VOCABULARY - 1])
def test_stored_logits_are_a_distribution_with_the_named_probabilities(top_k: int) -> None:
    guide, exact = stored(top_k), logits().log_softmax(-1)
    stored_logits = read(guide)
    torch.testing.assert_close(stored_logits.exp().sum(-1), torch.ones(BLOCKS, TOKENS, dtype=torch.float64))
    named = exact.topk(top_k).indices
    torch.testing.assert_close(stored_logits.gather(-1, named), exact.gather(-1, named))
    if top_k == VOCABULARY - 1:
        torch.testing.assert_close(stored_logits, exact)


def test_a_smaller_vocabulary_is_the_beginning_of_the_larger_one() -> None:
    for top_k in (None, 4):
        guide = stored(top_k)
        torch.testing.assert_close(read(guide, 6), read(guide)[..., :6])


def test_chosen_tokens_are_those_of_the_whole() -> None:
    positions = torch.tensor([[5, 0], [2, 6]])
    for top_k in (None, 4):
        guide = stored(top_k)
        assert guide.select_positions(positions).shape == (BLOCKS, 2)
        some = read(guide.select_positions(positions))
        for m in range(BLOCKS):
            torch.testing.assert_close(some[m], read(guide)[m, positions[m]])


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_full_stored_distributions_give_the_live_teacher_s_loss_and_gradient(
    divergence: Divergence,
) -> None:
    student, head = normal(2, BLOCKS, TOKENS, WIDTH).requires_grad_(), normal(3, 2, VOCABULARY, WIDTH)
    weights = torch.rand(BLOCKS, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for guide in (HiddenTeacherLogits(logits(), Projection(None)), stored(None)):
        sums = compute_cell_losses(
            student,
            Projection(head),
            None,
            None,
            (0, 1),
            [divergence] * 2,
            weights,
            teachers={0: guide},
        )
        results.append((sums.losses.detach(), *torch.autograd.grad(sums.losses.sum(), student)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_the_error_falls_with_top_k() -> None:
    exact, student = logits(), normal(5, BLOCKS, TOKENS, VOCABULARY)
    for divergence in DIVERGENCES[::3]:
        errors = []
        for top_k in (1, 3, 6, 9):
            top_k_logits = read(stored(top_k))
            pairs = (
                divergence(student.flatten(0, 1), teacher_logits.flatten(0, 1))
                for teacher_logits in (top_k_logits, exact)
            )
            errors.append(float((next(pairs) - next(pairs)).abs().mean()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)]
)
def test_narrower_numbers_round_and_stay_finite(dtype: torch.dtype, most: float) -> None:
    for top_k in (None, 3):
        guide = stored(top_k, dtype)
        assert guide.dtype == dtype
        assert (read(guide) - read(stored(top_k))).abs().max() < most
    excluded = torch.tensor([[[0.0, -torch.inf, -torch.inf, -torch.inf]]])
    for top_k in (None, 1, 2):
        stored_logits = read(TopKTeacherLogits.create(select_top_k(excluded, top_k, dtype), 4), 4)
        assert stored_logits.isfinite().all()
        assert stored_logits.log_softmax(-1).exp()[0, 0].tolist() == [1, 0, 0, 0]


def test_ids_of_the_whole_vocabulary_leave_no_tail() -> None:
    scores = TopKScores(torch.zeros(1, 1, 4), torch.arange(4).view(1, 1, 4), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="4 tokens of a vocabulary of 4"):
        TopKTeacherLogits.create(scores, 4)


def test_chunks_change_nothing() -> None:
    guide = HiddenTeacherLogits(logits()[:1], Projection(None))
    for top_k in (None, 4):
        whole, parts = (
            compute_top_k_scores(guide, top_k, torch.float32, size) for size in (2**20, VOCABULARY * 8 * 2)
        )
        assert torch.equal(whole.log_probs, parts.log_probs)
        again = concatenate_scores(whole.split([3, 0, 4]))
        assert torch.equal(again.log_probs, whole.log_probs)


# ---- on disk ----


def written(folder: Path, family: Family, **how: Any) -> tuple[Any, list[Example]]:
    teacher, rows = tiny_model(family, 3, dtype=torch.float32), tiny_examples(9)
    write_teacher_scores(teacher, rows, folder, pad_id=PAD, **how)
    return teacher, rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top_k", [None, 4])
def test_a_row_on_disk_has_the_teacher_s_scores(
    family: Family, top_k: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_files, "TARGET_FILE_BYTES", 700)
    teacher, rows = written(tmp_path, family, top_k=top_k)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    files = ScoreReader(tmp_path)
    for number, row in enumerate(rows):
        alone = collate_examples([row], PAD, is_encoder_decoder=family == "encoder-decoder")
        with torch.no_grad():
            exact = select_top_k(compute_completion_logits(teacher, alone)[0], top_k, torch.float32)
        tokens, scores = files.read_row(number)
        assert tokens.tolist() == row.completion_ids
        torch.testing.assert_close(scores.log_probs, exact.log_probs, rtol=0, atol=1e-4)
        if top_k is not None:
            assert torch.equal(scores.ids, exact.ids)  # type: ignore[arg-type]
            torch.testing.assert_close(scores.tail_log_prob, exact.tail_log_prob, rtol=0, atol=1e-4)


def test_a_resumed_writer_rebuilds_missing_and_truncated_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_files, "TARGET_FILE_BYTES", 700)
    written(tmp_path, "decoder-only", top_k=4)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    whole = [file.read_bytes() for file in files]
    files[0].unlink()
    files[2].write_bytes(whole[2][:-5])
    stamps = [file.stat().st_mtime_ns for file in files if file.exists()]
    written(tmp_path, "decoder-only", top_k=4)
    assert [file.read_bytes() for file in files] == whole
    again = [file.stat().st_mtime_ns for file in files[1:]]
    assert [a == b for a, b in zip(stamps, again, strict=True)] == [n != 1 for n in range(len(again))]


def test_a_folder_of_another_layout_is_written_anew(tmp_path: Path) -> None:
    written(tmp_path, "decoder-only", top_k=4)
    written(tmp_path, "decoder-only", top_k=2, dtype="bfloat16")
    _, scores = ScoreReader(tmp_path).read_row(8)
    assert (scores.log_probs.shape[1], scores.log_probs.dtype) == (2, torch.bfloat16)


def anonymous_and_mapped() -> tuple[int, int]:
    """Bytes of this process's memory that are its own, and that are files' pages."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, mapped = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, mapped


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_store_is_mapped_and_not_loaded(tmp_path: Path) -> None:
    rows, length, vocabulary = 64, 16, 16_384
    layout = ScoreLayout.create([length] * rows, None, vocabulary, "float32")
    writer = score_files.ScoreWriter(tmp_path, layout)
    for some in writer.list_missing_rows():
        logs = TopKScores(torch.zeros(length, vocabulary))
        writer.write_file(some, [[7] * length] * len(some), [logs] * len(some))
        del logs
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size > 60 * 2**20
    before = anonymous_and_mapped()
    files = ScoreReader(tmp_path)
    for number in (1, 40):
        files.read_row(number)
    anonymous, mapped = (b - a for a, b in zip(before, anonymous_and_mapped(), strict=True))
    assert max(anonymous, mapped) < size / 4


def test_a_row_that_was_not_scored_is_told(tmp_path: Path) -> None:
    written(tmp_path, "decoder-only", top_k=4)
    for number in (-1, 9):
        with pytest.raises(ValueError, match=f"rows 0 to 8, .*row {number} "):
            ScoreReader(tmp_path).read_row(number)


def test_a_folder_without_scores_and_a_file_that_is_gone_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no {INDEX_FILE}"):
        ScoreReader(tmp_path)
    written(tmp_path, "decoder-only", top_k=4)
    (tmp_path / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00000.safetensors .*delete it"):
        ScoreReader(tmp_path).read_row(0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' .*float16"),
        ({"top_k": 0}, "top_k 0 "),
    ],
)
def test_invalid_dtype_or_top_k_is_refused(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        written(tmp_path, "decoder-only", **how)


# ---- in the trainer ----


def numbered_examples() -> list[Example]:
    return number_examples(tiny_examples())


def kept_scores(folder: Path, family: Family, top_k: int | None = None) -> CachedTeacher:
    """Of the teacher that `driving.distil` has where none is given, in float32."""
    teacher = tiny_model(family, 3, width=32, dtype=torch.float32)
    write_teacher_scores(teacher, numbered_examples(), folder / "scores", pad_id=PAD, top_k=top_k)
    return CachedTeacher(folder / "scores", tiny_tokenizer())


def trained(folder: Path, family: Family, cells: list[CellArguments], teacher: Any, **changes: Any) -> Run:
    return distil(
        folder,
        family,
        cells,
        teacher=teacher,
        examples=numbered_examples(),
        dtype=torch.float32,
        **changes,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_training_on_full_cached_scores_equals_training_with_the_live_teacher(
    family: Family, tmp_path: Path
) -> None:
    cells = [cell(tmp_path, lmbda=0.0, beta=0.5, teacher_temperature=0.7)]
    live = tiny_model(family, 3, width=32, dtype=torch.float32)
    runs = [
        trained(tmp_path, family, cells, teacher, packed=False)
        for teacher in (live, kept_scores(tmp_path, family))
    ]
    assert runs[0].losses() == pytest.approx(runs[1].losses(), rel=1e-5)
    assert_close(runs[0].weights(), runs[1].weights(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_of_three_is_three_alone(family: Family, tmp_path: Path) -> None:
    teacher = kept_scores(tmp_path, family, top_k=4)
    cells = [
        cell(tmp_path, "0", lmbda=0.0, beta=0.0),
        cell(tmp_path, "1", lmbda=0.0, beta=0.5),
        cell(tmp_path, "2", lmbda=0.0, beta=0.5, seed=1),
    ]
    packed = trained(tmp_path, family, cells, teacher)
    for n, cell_args in enumerate(cells):
        alone = trained(tmp_path, family, [cell_args], teacher, packed=False)
        assert packed.losses(n) == pytest.approx(alone.losses(), rel=1e-5)
        assert_close(packed.weights(n), alone.weights(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(family: Family, tmp_path: Path) -> None:
    teacher = kept_scores(tmp_path, family, top_k=4)
    cells = [cell(tmp_path, "0", lmbda=0.0), cell(tmp_path, "1", lmbda=0.0, seed=1)]
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path, family, cells, teacher, **saving)
    with pytest.raises(Stopped):
        trained(tmp_path, family, cells, teacher, prepare=stop_at(3), **saving)
    resumed = trained(tmp_path, family, cells, teacher, resume=str(tmp_path / "0" / "checkpoint-3"))
    for n in range(2):
        assert whole.losses(n)[3:] == resumed.losses(n)
        assert_identical(whole.weights(n), resumed.weights(n))


def test_a_trainer_with_cached_scores_has_no_teacher_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = kept_scores(tmp_path, "decoder-only", top_k=4)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a teacher's model was loaded")

    monkeypatch.setattr("gkd_lab.teachers.load_teachers.load_teacher", never)
    run = trained(tmp_path, "decoder-only", [cell(tmp_path, lmbda=0.0)], teacher)
    assert run.trainer.teacher_model is None


def refused(folder: Path, family: Family = "decoder-only", lmbda: float = 0.0, **changes: Any) -> str:
    teacher = kept_scores(folder, family, top_k=4)
    with pytest.raises(ValueError) as caught:
        distil(
            folder,
            family,
            [cell(folder, lmbda=lmbda)],
            teacher=teacher,
            dtype=torch.float32,
            **{"examples": numbered_examples(), **changes},
        )
    return str(caught.value)


def test_on_policy_steps_are_refused_with_cached_scores(tmp_path: Path) -> None:
    assert "lmbda=0.5" in refused(tmp_path, lmbda=0.5)
    assert "eval_on_policy=True" in refused(tmp_path, eval_on_policy=True)
    assert "seq_kd=True" in refused(tmp_path, seq_kd=True)


def test_rows_that_were_not_scored_are_refused(tmp_path: Path) -> None:
    assert "`row_index`" in refused(tmp_path, examples=tiny_examples())
    moved = [replace(row, row_index=39 - n) for n, row in enumerate(tiny_examples())]
    assert "another completion" in refused(tmp_path, examples=moved)


def test_a_term_that_reads_the_teacher_s_states_is_refused(tmp_path: Path) -> None:
    teacher = kept_scores(tmp_path, "decoder-only", top_k=4)
    with pytest.raises(ValueError, match=r"teacher's hidden_states.* store"):
        teacher.compute_output(None, ["hidden_states"])  # type: ignore[arg-type]
