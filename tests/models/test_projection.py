"""A head as data: its cells, and when its weight is converted to the dtype of the products."""

import pytest
import torch

from gkd_lab.models import projection
from gkd_lab.models.projection import MatmulPrecision, Projection

BF16 = MatmulPrecision(torch.bfloat16, torch.float32)


def test_a_head_is_converted_at_once_on_a_device_and_by_rows_on_a_cpu() -> None:
    on_cpu = Projection(torch.ones(2, 5, 3))
    assert BF16.convert_head(on_cpu) is on_cpu
    # Tensors of the device `meta` have no data, and show what a GPU would be given.
    on_device = BF16.convert_head(Projection(torch.ones(2, 5, 3, device="meta"), scale=2.0))
    assert on_device.weight is not None
    assert (on_device.weight.dtype, on_device.scale) == (torch.bfloat16, 2.0)
    assert BF16.convert_head(Projection(None)).weight is None


@pytest.mark.parametrize(("cells", "rows"), ((1, 8), (2, 4), (16, 1)))
def test_what_is_converted_by_rows_is_so_many_in_all_cells(
    cells: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "CONVERTED_ROWS", 8)
    weight = torch.ones(cells, 11, 3)
    spans = list(BF16.split_rows(weight))
    assert [span.start for span in spans] == list(range(0, 11, rows))
    assert list(MatmulPrecision(torch.float32, torch.float32).split_rows(weight)) == [slice(0, 11)]


def test_selected_cells_keep_a_bias_that_all_share() -> None:
    weight = torch.arange(12.0).view(3, 2, 2)
    separate = Projection(weight, torch.arange(6.0).view(3, 2)).select_cells(torch.tensor([2, 0]))
    assert separate.weight is not None and torch.equal(separate.weight, weight[[2, 0]])
    assert separate.bias is not None and separate.bias.tolist() == [[4, 5], [0, 1]]
    shared = Projection(weight, torch.ones(1, 2)).select_cells(slice(1, 3))
    assert shared.bias is not None and shared.bias.shape == (1, 2)
