"""Compare packed modules with the K modules that they replace."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from gkd_lab.models.packed_layers import pack_modules
from gkd_lab.models.packing import Pack, _replace_modules

from .families import make


class Scale(nn.Module):
    """A norm of an unknown class, with a bias and a weight that is added to 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) * (1 + self.weight) + self.bias


@pytest.mark.parametrize("shape", ((6, 5, 4), (6, 5, 2, 4), (6, 4)))
@pytest.mark.parametrize("kind", (Scale, LlamaRMSNorm, T5LayerNorm, Gemma2RMSNorm, nn.LayerNorm, nn.RMSNorm))
def test_a_norm_scales_each_row_by_its_cell(kind: type, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    alone = [kind(4) for _ in range(3)]
    for p in (p for norm in alone for p in norm.parameters()):
        nn.init.normal_(p)
    packed = pack_modules("norm", alone)
    assert packed is not None
    x = torch.randn(shape, requires_grad=True)
    y = packed(x)
    expected = torch.cat([norm(part) for norm, part in zip(alone, x.chunk(3), strict=True)])
    torch.testing.assert_close(y, expected)
    changes = torch.autograd.grad((y * y.detach().sin()).sum(), [x, *packed.parameters()])
    (expected * y.detach().sin()).sum().backward()
    torch.testing.assert_close(changes[0], x.grad)
    for (name, _), change in zip(packed.named_parameters(), changes[1:], strict=True):
        gradients = [norm.get_parameter(name).grad for norm in alone]
        torch.testing.assert_close(change, torch.stack(gradients))  # type: ignore[arg-type]
    assert not any(buffer.requires_grad for buffer in packed.buffers()), "no weights of the call remain"


def test_ids_without_a_row_for_each_row_of_the_batch_are_refused() -> None:
    pack = Pack.build([make("gpt2", seed) for seed in range(3)])
    ids = torch.full((6, 3), 5)
    with pytest.raises(ValueError, match=r"\(1, 3\).*3 packed models.*position_ids"):
        pack.model(input_ids=ids)
    logits = pack.model(input_ids=ids, position_ids=torch.arange(3).expand(6, -1)).logits
    expected = make("gpt2", 1)(input_ids=ids[:2]).logits
    torch.testing.assert_close(logits[2:4], expected)


def test_a_norm_without_weights_needs_no_packed_form() -> None:
    class Plain(nn.Module):
        """A minimal module that can be packed: a head and a norm without weights."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x))

    alone = [Plain(), Plain()]
    packed = copy.deepcopy(alone[0])
    _replace_modules(packed, alone)  # type: ignore[arg-type]
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(x), torch.cat([alone[0](x[:3]), alone[1](x[3:])]))
