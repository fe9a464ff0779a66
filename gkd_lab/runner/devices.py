"""Give each worker of a run a GPU of its own, as far as there are enough, by the variable that CUDA reads."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gkd_lab.config.errors import ConfigError

_DEVICE_FILES = ("nvidia[0-9]*", "kfd", "dxg")
"""Files of `/dev` that a machine with a GPU has: of NVIDIA, of AMD, of either under WSL."""


def get_visibility_variable(environment: Mapping[str, str]) -> str:
    """Return the name of the variable with the visible GPUs: HIP's if it alone is set, else CUDA's."""
    is_hip = "HIP_VISIBLE_DEVICES" in environment and "CUDA_VISIBLE_DEVICES" not in environment
    return "HIP_VISIBLE_DEVICES" if is_hip else "CUDA_VISIBLE_DEVICES"


def count_gpus() -> int:
    """Return how many GPUs PyTorch sees, 0 without any.

    A child process counts them, so that torch is not loaded here. Raises ConfigError where the child fails.
    """
    if not any(file for pattern in _DEVICE_FILES for file in Path("/dev").glob(pattern)):
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not done.stdout.strip().isdecimal():
        lines = done.stderr.strip().splitlines() or ["no answer"]
        raise ConfigError(f"--workers: PyTorch could not count the GPUs: {lines[-1]}")
    return int(done.stdout)


def list_gpus(
    environment: Mapping[str, str] = os.environ, count_devices: Callable[[], int] = count_gpus
) -> list[str]:
    """Return the names of the GPUs that this process may use, as the variable has them; [] without any.

    A name is a number or a UUID, of a GPU or of a part of one (MIG).
    """
    count = count_devices()
    visible_devices = environment.get(get_visibility_variable(environment))
    if visible_devices is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in visible_devices.split(",")][:count]


def assign_gpu(number: int, gpus: Sequence[str]) -> str:
    """Return the GPU of the worker with a number from 1: round robin."""
    return gpus[(number - 1) % len(gpus)]


def count_workers_on_gpu(number: int, workers: int, gpus: Sequence[str]) -> int:
    """Return how many of a run's workers share the GPU of worker `number`, itself included."""
    return sum(assign_gpu(other, gpus) == assign_gpu(number, gpus) for other in range(1, workers + 1))
