"""A pack against its members, in numbers: whatever a model's own code does with a batch, it shows here.

Shapes: K members, N = 2*K rows, C = 3 completion tokens, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from gkd_lab.models.classifiers import get_classifier_kind
from gkd_lab.models.forward import Sequences, compute_completion_logits, eval_mode
from gkd_lab.models.heads import compute_relative_error

LogitFunction = Callable[[PreTrainedModel, Sequences], Tensor]
ROWS_PER_MEMBER = 2
"""Of each member: one with padding and one without."""
NEW_TOKENS = 2
"""New tokens: one after the prompt and one with a cache."""


class CannotPack(ValueError):
    """These models cannot become one; the message says why, and each can run alone."""


def make_perturbed_copy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy in float32 whose weights all differ from those of another seed; no number in it is NaN."""
    changed = copy.deepcopy(model).float().eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for p in changed.parameters():
            p.nan_to_num_(0, 0, 0)
            size = p.square().mean().sqrt().clamp_min(0.1)
            p.add_(torch.randn(p.shape, generator=generator, device=p.device).mul_(0.5 * size))
    return changed


def check_forward_and_generation(packed: PreTrainedModel, members: Sequence[PreTrainedModel]) -> None:
    """Logits and what is written with a cache, of members made by `perturbed`, which this may change.

    Raises:
        CannotPack: if the pack differs, or its model's code cannot work with one.
    """
    batch = _make_random_batch(packed, len(members))
    computed: list[tuple[str, LogitFunction]] = [("logits", compute_completion_logits)]
    if get_classifier_kind(packed) is None:
        computed.append(("generated logits", _generate_logits))
    for what, compute in computed:
        with _plain_inference(packed, members):
            expected = torch.cat([compute(m, _select_cell_rows(batch, n)) for n, m in enumerate(members)])
            found = compute(packed, batch)
        if not expected.isfinite().any():
            raise CannotPack(f"{_get_class_name(packed)} has no finite {what} to compare a pack with")
        _check_close(what, packed, found, expected, torch.float32)


def check_member_logits(packed: PreTrainedModel, members: Sequence[PreTrainedModel]) -> None:
    """Each member's logits; those that are the same object are computed once.

    Raises:
        CannotPack: if the pack's differ.
    """
    rows = _select_cell_rows(_make_random_batch(packed, 1), 0)
    with _plain_inference(packed, members):
        alone = {id(member): compute_completion_logits(member, rows) for member in members}
        found = compute_completion_logits(packed, rows.repeat_rows(len(members)))
    _check_close("logits", packed, found, torch.cat([alone[id(m)] for m in members]), packed.dtype)


def _make_random_batch(model: PreTrainedModel, cell_count: int) -> Sequences:
    """Random tokens; prompts padded where the model's family has its padding."""
    count = ROWS_PER_MEMBER * cell_count
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (count, 7), generator=draw)
    mask = torch.ones_like(ids)
    padded_right = model.config.is_encoder_decoder or get_classifier_kind(model) is not None
    mask[::ROWS_PER_MEMBER, slice(2, 4) if padded_right else slice(0, 2)] = 0
    return Sequences(ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:]).to(model.device)


def _select_cell_rows(batch: Sequences, cell: int) -> Sequences:
    return batch.map_tensors(lambda tensor: tensor[cell * ROWS_PER_MEMBER : (cell + 1) * ROWS_PER_MEMBER])


def _generate_logits(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """Logits of the tokens that a greedy search chooses, (N, WRITTEN, V)."""
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
    written = model.generate(input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask)
    return torch.stack(written.logits, dim=1)


@contextmanager
def _plain_inference(packed: PreTrainedModel, members: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Without dropout, gradients and autocast; what the model's code raises becomes CannotPack."""
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
            f"the code of {_get_class_name(packed)} does not work with a pack ({reason})"
        ) from error


def _check_close(
    quantity: str, packed: PreTrainedModel, actual: Tensor, expected: Tensor, precision: torch.dtype
) -> None:
    off = compute_relative_error(actual, expected)
    if not off <= _get_tolerance(precision, packed.device):
        raise CannotPack(
            f"the {quantity} of the packed {_get_class_name(packed)} differ from those of its members by {off:.0e} "
            "of the largest"
        )


def _get_tolerance(precision: torch.dtype, device: torch.device) -> float:
    """Largest relative difference between products of other shapes, through all layers.

    Norms are in float32 in a float64 model too, and CUDA may multiply float32 with the 10 bits of TF32.
    """
    if precision in (torch.float32, torch.float64):
        return 2.0**-7 if device.type == "cuda" else 1e-4
    return 16 * torch.finfo(precision).eps


def _get_class_name(model: PreTrainedModel) -> str:
    return type(model).__name__
