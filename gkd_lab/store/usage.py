"""What a piece of work took of the machine: time by the clock and of processors, energy if it is measured.

Nothing is estimated: what cannot be read is left out.
"""

import importlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_RAPL = Path("/sys/class/powercap")


class UsageMeter:
    """Reads the counters now, and says later how far they have moved. Energy is that of the whole machine."""

    def __init__(self, powercap: Path = _RAPL) -> None:
        self.powercap = powercap
        self.start_seconds, self.start_cpu_seconds = time.monotonic(), time.process_time()
        self.packages, self.accelerators = _package_energy(powercap), _accelerator_energy()

    def read_usage(self) -> dict[str, float]:
        """`seconds`, `cpu_seconds` of this process; `cpu_joules` (RAPL), `gpu_joules` (NVML) if readable."""
        found = {
            "seconds": time.monotonic() - self.start_seconds,
            "cpu_seconds": time.process_time() - self.start_cpu_seconds,
            "cpu_joules": _moved(self.packages, _package_energy(self.powercap), _ranges(self.powercap)),
            "gpu_joules": _moved(self.accelerators, _accelerator_energy(), {}),
        }
        return {name: round(value, 3) for name, value in found.items() if value is not None}


def _moved(
    before: Mapping[str, float], now: Mapping[str, float], ranges: Mapping[str, float]
) -> float | None:
    """Joules; a counter that went back has passed its range once."""
    both = before.keys() & now.keys()
    if not both:
        return None
    return sum((now[one] - before[one]) % ranges.get(one, float("inf")) for one in both)


def _package_energy(powercap: Path) -> dict[str, float]:
    """Joules of each processor package; its parts (`intel-rapl:0:1`) are in it."""
    return _microjoules(powercap, "energy_uj")


def _ranges(powercap: Path) -> dict[str, float]:
    return _microjoules(powercap, "max_energy_range_uj")


def _microjoules(powercap: Path, name: str) -> dict[str, float]:
    found = {}
    for path in powercap.glob(f"intel-rapl:*/{name}"):
        if path.parent.name.count(":") == 1:
            try:
                found[path.parent.name] = int(path.read_text()) / 1e6
            except (OSError, ValueError):
                continue  # only root may read it on most systems
    return found


def _accelerator_energy() -> dict[str, float]:
    """Joules of each visible GPU since its driver was loaded; needs `pynvml`, which torch uses too."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return {}
    found = {}
    try:
        pynvml.nvmlInit()
        for n in range(torch.cuda.device_count()):
            uuid = f"GPU-{torch.cuda.get_device_properties(n).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            found[uuid] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except pynvml.NVMLError:
        return {}
    return found
