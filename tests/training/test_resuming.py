"""A training that was stopped and resumed is bit for bit the one that was not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gkd_lab.config.artifact_specs import Family

from ..models.tiny import tiny_model
from .driving import Run, Stopped, assert_identical, cell, distil, mixed, stop_at

pytestmark = pytest.mark.usefixtures("float64_norms")


@pytest.mark.parametrize(
    ("family", "optimizer"),
    (("decoder-only", "adamw_torch_fused"), ("encoder-decoder", "adafactor")),
)
@pytest.mark.parametrize("stop", (2, 5, 6))
def test_stopped_and_resumed_equals_straight_bit_for_bit(
    family: Family, optimizer: str, stop: int, tmp_path: Path
) -> None:
    """Five steps are an epoch, so that 2, 5 and 6 lie before, on and behind its boundary."""
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "optim": optimizer,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": stop,
    }
    straight = distil(tmp_path / "a", family, mixed(tmp_path / "a"), **options)
    cells = mixed(tmp_path / "b")
    with pytest.raises(Stopped):
        distil(tmp_path / "b", family, cells, prepare=stop_at(stop), **options)
    place = f"{cells[0].output_dir}/checkpoint-{stop}"
    resumed = distil(tmp_path / "b", family, cells, resume=place, **options)
    for n in range(len(cells)):
        assert_identical(resumed.weights(n), straight.weights(n))
        assert resumed.history[n] == straight.history[n][stop:]


@pytest.mark.parametrize("packed", (True, False))
def test_dropout_too_is_resumed_bit_for_bit(packed: bool, tmp_path: Path) -> None:
    def run(folder: Path, **more: Any) -> Run:
        return distil(
            folder,
            "decoder-only",
            [cell(folder, lmbda=0.5)],
            packed=packed,
            students=[tiny_model("decoder-only", 7, dropout=0.3, dtype=torch.float32)],
            teacher=tiny_model("decoder-only", 3, dtype=torch.float32),
            disable_dropout=False,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            **more,
        )

    straight = run(tmp_path / "a")
    with pytest.raises(Stopped):
        run(tmp_path / "b", prepare=stop_at(2))
    place = tmp_path / "b" / ("0/checkpoint-2" if packed else "checkpoint-2")
    resumed = run(tmp_path / "b", resume=str(place))
    assert_identical(resumed.weights(), straight.weights())
    without = distil(tmp_path, "decoder-only", [cell(tmp_path)], dtype=torch.float32, max_steps=4)
    assert without.losses() != straight.losses(), "dropout must do something here"


def test_only_the_last_checkpoint_of_each_cell_stays(tmp_path: Path) -> None:
    cells = mixed(tmp_path)
    distil(tmp_path, "decoder-only", cells, max_steps=4, save_strategy="steps", save_steps=2)
    for cell_args in cells:
        assert [path.name for path in Path(cell_args.output_dir).iterdir()] == ["checkpoint-4"]
