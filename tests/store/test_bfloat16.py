"""What is said of cells in bf16 on a CPU without the instructions."""

from pathlib import Path

import pytest
import torch

from gkd_lab.store import bfloat16
from gkd_lab.store.bfloat16 import has_bfloat16_instructions, has_gpu, list_bfloat16_notes

from ..tables.synthetic_store import build_grid

OLD = "processor : 0\nmodel name : Some CPU\nflags : fpu avx2 avx512f avx512bw\nbugs : bf16\n"
NEW = "flags : fpu avx512f avx512_bf16\n"
ARM = "processor : 0\nFeatures : fp asimd i8mm bf16\nCPU part : 0xd4f\n"


@pytest.fixture
def cpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a GPU, whose list of processors is the file returned."""
    monkeypatch.setattr(bfloat16, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(bfloat16, "_GPU_FILES", (tmp_path / "nvidiactl",))
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(OLD, False), (NEW, True), (OLD.replace("avx2", "amx_bf16"), True), (ARM, True), ("bogus\n", None)],
)
def test_the_kernel_s_list_of_instructions_is_read(text: str, expected: bool | None, cpu_alone: Path) -> None:
    cpu_alone.write_text(text)
    assert has_bfloat16_instructions() is expected


def test_without_a_list_nothing_is_said(cpu_alone: Path) -> None:
    assert has_bfloat16_instructions() is None
    assert list_bfloat16_notes(build_grid(precision="bf16").cells) == []


def test_this_machine_is_seen_as_torch_sees_it() -> None:
    seen = has_bfloat16_instructions()
    names = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "avx10_2", "bf16", "sve_bf16")
    capabilities = torch.cpu.get_capabilities()
    assert seen in (None, any(capabilities.get(name) is True for name in names))


def test_only_cells_in_bf16_on_such_a_cpu_alone_are_noted(
    cpu_alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_alone.write_text(OLD)
    grid = build_grid(grid={"precision": ["fp32", "bf16"], "lmbda": [0, 1]})
    (note,) = list_bfloat16_notes(grid.cells)
    assert note.startswith("2 cells compute in bf16")
    assert "--set precision=fp32" in note
    assert list_bfloat16_notes([cell for cell in grid.cells if cell.training.precision == "fp32"]) == []
    cpu_alone.with_name("nvidiactl").touch()
    assert has_gpu() and list_bfloat16_notes(grid.cells) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not has_gpu() and list_bfloat16_notes(grid.cells) == [note]
    cpu_alone.write_text(NEW)
    assert list_bfloat16_notes(grid.cells) == []
