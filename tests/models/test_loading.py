"""Load student and teacher by model, name or default, with a frozen teacher (pitfalls 18, 21, 22)."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from gkd_lab.config.artifact_specs import Family
from gkd_lab.models.loading import load_student, load_teacher, use_on_device

from .tiny import FAMILIES, tiny_model, tiny_tokenizer

IDS = torch.tensor([[3, 4, 5, 6]])


def save_teacher(folder: Path, family: Family = "decoder-only", seed: int = 1) -> str:
    tiny_model(family, seed, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def load(model: Any, student: PreTrainedModel | None = None, **changes: Any) -> PreTrainedModel:
    choices: dict[str, Any] = {
        "name_or_path": None,
        "init_kwargs": None,
        "dtype": None,
        "trust_remote_code": False,
        **changes,
    }
    return load_teacher(model, student=student or tiny_model("decoder-only", 0), **choices)


@pytest.mark.parametrize("family", FAMILIES)
def test_pitfall_18_a_name_loads_a_model_of_either_family(family: Family, tmp_path: Path) -> None:
    name, student = save_teacher(tmp_path, family), tiny_model(family, 0)
    teacher = load(name, student)
    expected = tiny_model(family, 1, dtype=torch.float32)
    assert type(teacher) is type(student)
    assert all(map(torch.equal, teacher.parameters(), expected.parameters()))
    loaded = load_student(name, init_kwargs=None, trust_remote_code=False)
    assert type(loaded) is type(student) and all(p.requires_grad for p in loaded.parameters())


def test_pitfall_18_a_teacher_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder-only.* teacher encoder-decoder"):
        load(tiny_model("encoder-decoder", 1))


def test_pitfall_21_init_kwargs_need_no_dtype_and_are_never_changed(tmp_path: Path) -> None:
    name = save_teacher(tmp_path)
    for kwargs in ({"use_cache": False}, {"dtype": "bfloat16"}, {"dtype": torch.bfloat16}, {"dtype": "auto"}):
        before = copy.copy(kwargs)
        dtypes = [load(name, init_kwargs=kwargs).dtype for _ in range(2)]
        expected = torch.bfloat16 if kwargs.get("dtype") in ("bfloat16", torch.bfloat16) else torch.float32
        assert dtypes == [expected] * 2 and kwargs == before


def test_init_kwargs_may_be_json_as_on_the_command_line(tmp_path: Path) -> None:
    teacher = load(save_teacher(tmp_path), init_kwargs=json.dumps({"dtype": "float16"}))
    assert teacher.dtype == torch.float16


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'bf17'"):
        load(save_teacher(tmp_path), init_kwargs={"dtype": "bf17"})


def test_init_kwargs_for_a_loaded_model_are_refused() -> None:
    for model, reason in (
        (tiny_model("decoder-only", 1), "already a model"),
        (None, "a copy of the student"),
    ):
        with pytest.raises(ValueError, match=f"teacher_model_init_kwargs.*{reason}"):
            load(model, init_kwargs={"dtype": "bfloat16"})


def test_pitfall_22_the_configured_name_is_read_when_no_teacher_is_given(tmp_path: Path) -> None:
    teacher = load(None, name_or_path=save_teacher(tmp_path))
    assert teacher.name_or_path == str(tmp_path)


@pytest.mark.parametrize("itself", [False, True])
def test_pitfall_22_no_teacher_or_the_student_itself_means_a_frozen_copy(itself: bool) -> None:
    student = tiny_model("decoder-only", 0).train()
    with pytest.warns(UserWarning, match="copy of the initial student"):
        teacher = load(student if itself else None, student)
    before = teacher(IDS).logits
    assert torch.equal(before, student(IDS).logits)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert torch.equal(before, teacher(IDS).logits)
    assert student.training and all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("by_name", [False, True])
def test_the_teacher_is_frozen_in_eval_mode_and_in_the_configured_dtype(
    by_name: bool, tmp_path: Path
) -> None:
    source = save_teacher(tmp_path) if by_name else tiny_model("decoder-only", 1).train()
    teacher = load(source, dtype="bfloat16")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


def test_two_different_dtypes_are_refused(tmp_path: Path) -> None:
    name = save_teacher(tmp_path)
    assert load(name, init_kwargs={"dtype": "bfloat16"}, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"teacher_dtype='bfloat16'.*'float16'"):
        load(name, init_kwargs={"dtype": "float16"}, dtype="bfloat16")


def test_a_teacher_without_a_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear.* config"):
        load(nn.Linear(2, 2))


def test_a_student_is_loaded_in_float32_by_default(tmp_path: Path) -> None:
    tiny_model("decoder-only", 1, dtype=torch.bfloat16).save_pretrained(tmp_path)
    dtypes = [
        load_student(str(tmp_path), init_kwargs=kwargs, trust_remote_code=False).dtype
        for kwargs in (None, {"dtype": "auto"})
    ]
    assert dtypes == [torch.float32, torch.bfloat16]


def test_a_loaded_student_is_returned_and_ignored_arguments_are_named() -> None:
    student = tiny_model("decoder-only", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_student(student, init_kwargs=None, trust_remote_code=False) is student
    with pytest.warns(UserWarning, match="are ignored"):
        assert load_student(student, init_kwargs={"dtype": "auto"}, trust_remote_code=False) is student


def test_a_parked_teacher_is_used_on_the_cpu_without_a_copy() -> None:
    teacher = tiny_model("decoder-only", 0)
    homes = [p.data_ptr() for p in teacher.parameters()]
    with pytest.raises(KeyError), use_on_device(teacher, "cpu", parked=True) as working:
        assert working is teacher and [p.data_ptr() for p in teacher.parameters()] == homes
        raise KeyError
    assert [p.data_ptr() for p in teacher.parameters()] == homes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to move the teacher to")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_parked_teacher_is_on_the_device_only_while_it_is_used(family: Family) -> None:
    teacher = tiny_model(family, 0, dtype=torch.float32).eval().requires_grad_(False)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if family == "encoder-decoder" else {})
    homes, expected = [p.data_ptr() for p in teacher.parameters()], teacher(**inputs).logits
    with use_on_device(teacher, "cuda", parked=True):
        assert {p.device.type for p in teacher.parameters()} == {"cuda"}
        logits = teacher(**{name: ids.cuda() for name, ids in inputs.items()}).logits.cpu()
    assert {t.device.type for t in (*teacher.parameters(), *teacher.buffers())} == {"cpu"}
    assert [p.data_ptr() for p in teacher.parameters()] == homes
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
