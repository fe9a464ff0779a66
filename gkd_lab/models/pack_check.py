"""Compare a pack's outputs with those of its single members, before K students train as one model.

A packed model has weights with a leading cell axis, and row `k * B + b` of a batch belongs to student k (see
`packing`). That holds for a model's own code only if it never mixes rows; this module runs it and compares
the numbers, so no list of supported architectures is needed.
Shapes: K members, N = 2*K rows, C = 3 completion tokens, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from gkd_lab.models.classifiers import get_classifier_kind
from gkd_lab.models.forward import Sequences, compute_completion_logits, eval_mode, is_decoder_only
from gkd_lab.models.heads import compute_relative_error

LogitFunction = Callable[[PreTrainedModel, Sequences], Tensor]
ROWS_PER_MEMBER = 2
"""Rows per member: one with padding and one without."""
NEW_TOKENS = 2
"""Generated tokens: one after the prompt and one with the KV cache."""


class CannotPack(ValueError):
    """Raised for models that cannot be packed; the message has the reason, and each can run alone."""


def make_perturbed_copy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a float32 copy in eval mode with seeded noise added to all weights; NaN and inf become 0."""
    perturbed = copy.deepcopy(model).float().eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for p in perturbed.parameters():
            p.nan_to_num_(0, 0, 0)
            size = p.square().mean().sqrt().clamp_min(0.1)
            p.add_(torch.randn(p.shape, generator=generator, device=p.device).mul_(0.5 * size))
    return perturbed


def check_forward_and_generation(packed: PreTrainedModel, members: Sequence[PreTrainedModel]) -> None:
    """Raise CannotPack unless a pack's logits and greedy generation with a KV cache equal its members'.

    May modify the members, which are perturbed copies. The model's code may also fail: CannotPack too.
    """
    batch = make_random_batch(packed, len(members))
    functions: dict[str, LogitFunction] = {"logits": compute_completion_logits}
    if get_classifier_kind(packed) is None:
        functions["generated logits"] = _generate_logits
    for quantity, compute in functions.items():
        with _plain_inference(packed, members):
            expected = torch.cat([compute(m, _select_cell_rows(batch, n)) for n, m in enumerate(members)])
            actual = compute(packed, batch)
        if not expected.isfinite().any():
            raise CannotPack(f"{type(packed).__name__} has no finite {quantity} to compare a pack with")
        _check_close(quantity, packed, actual, expected, torch.float32)


def check_member_logits(packed: PreTrainedModel, members: Sequence[PreTrainedModel]) -> None:
    """Raise CannotPack unless the pack's logits on random rows equal each member's own, up to rounding."""
    rows = _select_cell_rows(make_random_batch(packed, 1), 0)
    with _plain_inference(packed, members):
        # Members that are one object are computed once.
        logits = {id(member): compute_completion_logits(member, rows) for member in members}
        actual = compute_completion_logits(packed, rows.repeat_rows(len(members)))
    _check_close("logits", packed, actual, torch.cat([logits[id(m)] for m in members]), packed.dtype)


def make_random_batch(model: PreTrainedModel, cell_count: int) -> Sequences:
    """Make a batch of two random rows per cell, 4 prompt and 3 completion ids; one row of two has padding."""
    shape = (ROWS_PER_MEMBER * cell_count, 7)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, shape, generator=generator)
    mask = torch.ones_like(ids)
    mask[::ROWS_PER_MEMBER, slice(0, 2) if is_decoder_only(model) else slice(2, 4)] = 0
    return Sequences(ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:]).to(model.device)


def _select_cell_rows(batch: Sequences, cell: int) -> Sequences:
    """Return one cell's two rows of a batch."""
    return batch.map_tensors(lambda tensor: tensor[cell * ROWS_PER_MEMBER : (cell + 1) * ROWS_PER_MEMBER])


def _generate_logits(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """Generate two tokens per row greedily; return their logits (N, 2, V). Overwrites `generation_config`."""
    model.generation_config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        return_dict_in_generate=True,
        output_logits=True,
    )
    output = model.generate(input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask)
    return torch.stack(output.logits, dim=1)


@contextmanager
def _plain_inference(packed: PreTrainedModel, members: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Context manager: no dropout, gradients, autocast; turns errors except out-of-memory into CannotPack."""
    try:
        with (
            eval_mode(packed, *members),
            torch.no_grad(),
            torch.autocast(packed.device.type, enabled=False),
        ):
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CannotPack(
            f"the code of {type(packed).__name__} does not work with a pack ({reason})"
        ) from error


def _check_close(
    quantity: str, packed: PreTrainedModel, actual: Tensor, expected: Tensor, precision: torch.dtype
) -> None:
    """Raise CannotPack if the relative error of the pack's numbers is NaN or above the tolerance."""
    error = compute_relative_error(actual, expected)
    if not error <= get_tolerance(precision, packed.device):
        raise CannotPack(
            f"the {quantity} of the packed {type(packed).__name__} differ from those of its members by "
            f"{error:.0e} of the largest"
        )


def get_tolerance(precision: torch.dtype, device: torch.device) -> float:
    """Return the relative error allowed for rounding: 1e-4 (2**-7 on CUDA), in half precision 16 epsilons.

    Norms use float32 even in a float64 model, and CUDA may multiply float32 with the 10 bits of TF32.
    """
    if precision in (torch.float32, torch.float64):
        return 2.0**-7 if device.type == "cuda" else 1e-4
    return 16 * torch.finfo(precision).eps
