"""Find out without torch whether this machine multiplies in bfloat16, as `plan` loads no torch.

What a cell computes in is part of its fingerprint, so nothing here changes it: a note says what
else to ask for.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from gkd_lab.config.cell import Cell

CPUINFO = Path("/proc/cpuinfo")
"""The kernel's list of the processors and their instructions; Linux only."""
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "avx10_2", "bf16", "svebf16"}
"""Names of the instructions there, x86 and ARM."""
_GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
"""Devices of NVIDIA, of AMD, and of both under Windows' Linux."""


def has_bfloat16_instructions() -> bool | None:
    """Return whether this CPU multiplies in bfloat16; None where the kernel lists no instructions."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    lists = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return not _BFLOAT16_FLAGS.isdisjoint(lists[0]) if lists else None


def has_gpu() -> bool:
    """Return whether a GPU's device file is here and CUDA_VISIBLE_DEVICES does not hide all of them."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not is_hidden and any(path.exists() for path in _GPU_FILES)


def list_bfloat16_notes(cells: Iterable[Cell]) -> list[str]:
    """Return one note in a list if cells compute in bf16 and this machine has only a CPU that cannot."""
    count = sum(cell.training.precision == "bf16" for cell in cells)
    if not count or has_gpu() or has_bfloat16_instructions() is not False:
        return []
    return [
        f"{count} cells compute in bf16, for which this CPU has no instructions, and no GPU was found: "
        "without AVX-512 that is up to 40 times as slow as fp32; `--set precision=fp32` makes other cells"
    ]
