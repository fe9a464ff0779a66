"""Sampling with vLLM instead of transformers' `generate`, by way of TRL's `VLLMGeneration`.

It never ran with vLLM itself: tests use a stand-in, and compare the calls with TRL's signatures.
Shapes: N rows, P prompt tokens, C completion tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.models.forward import Sequences, make_completion_mask
from gkd_lab.models.rng import derive_seed
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.rollout import MicroBatchPosition

FULL_DISTRIBUTION_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Settings that leave the student's distribution as it is; a server would take missing ones from the model's
generation configuration. 0 switches top-k off."""


class VllmBackend(Protocol):
    """The used part of TRL's `VLLMGeneration`."""

    temperature: float
    max_completion_length: int

    def sync_weights(self) -> None:
        """Copy the student's current weights to vLLM; all ranks call it."""

    def generate(self, prompts: list[list[int]], images: None, num_generations: int) -> tuple[Any, ...]:
        """Return (prompt ids, completion ids, ...), each a list of ids per prompt; all ranks call it."""


class VllmSampler:
    """Samples the student's answers with vLLM, which serves the checkpoint that the student was loaded from.

    Each call draws other noise. With `vllm_mode="colocate"` it is keyed by (seed, step, purpose, call of that
    step, rank), so a resumed run draws the same as long as vLLM batches the same way; a server draws from a
    generator of its own, and a resumed run differs. vLLM computes in the dtype that the checkpoint's
    configuration names, which need not be the one that the student trains in.

    Args:
        model: The student, not wrapped.
        end_ids: Every id that ends a sequence.
        vocabulary_size: Only these first entries may be sampled; None: all.
        backend: Class with the arguments of `VLLMGeneration`, in its place.

    Raises:
        ValueError: For an encoder-decoder, and for a model that was not loaded from a folder or a hub name.
        ImportError: Where vLLM is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        accelerator: Any,
        args: GKDConfig,
        end_ids: Tensor,
        vocabulary_size: int | None = None,
        backend: Callable[..., VllmBackend] | None = None,
    ) -> None:
        _check_model_is_servable(model, args)
        if backend is None:
            _check_vllm_is_installed()
            backend = VLLMGeneration
        self.end_ids, self.pad_id = end_ids, tokenizer.pad_token_id
        self.device: torch.device = accelerator.device
        # A tensor-parallel group answers the same prompts together, so its ranks draw the same noise.
        self.group = accelerator.process_index // args.vllm_tensor_parallel_size
        self.is_colocated = args.vllm_mode == "colocate"
        self.backend = backend(
            model=model,
            accelerator=accelerator,
            processing_class=tokenizer,
            **_build_backend_settings(args, end_ids, vocabulary_size),
        )
        self.max_new_tokens = args.max_new_tokens
        self._synced_step: int | None = None
        self._last_call: tuple[int, str] | None = None
        self._call_number = 0

    def sample(
        self,
        cells: Sequence[CellArguments],
        on_policy_cells: Sequence[int],
        rows: Sequences,
        position: MicroBatchPosition,
        purpose: str,
    ) -> dict[int, Sequences]:
        """Sample the only cell's completions of (B) prompts; return {0: rows}. Several cells: ValueError."""
        (cell,) = cells
        completions = self.sample_completions(
            rows,
            max_new_tokens=self.max_new_tokens,
            temperature=cell.temperature,
            step=position.step,
            seed=cell.seed,
            purpose=purpose,
        )
        return {0: completions}

    def sample_completions(
        self,
        prompts: Sequences,
        *,
        max_new_tokens: int,
        temperature: float,
        step: int,
        seed: int,
        purpose: str = "sampling",
    ) -> Sequences:
        """Return the prompts with sampled completions of at most `max_new_tokens`, padded on the right.

        `step` counts optimizer steps: the first call of a step copies the weights to vLLM. All ranks must
        call it with equally many rows.
        """
        if step != self._synced_step:
            self.backend.sync_weights()
            self._synced_step = step
        self.backend.temperature, self.backend.max_completion_length = temperature, max_new_tokens
        with self._seed_generators(seed, step, purpose):
            answers = self.backend.generate(
                prompts=_list_prompt_ids(prompts), images=None, num_generations=1
            )[1]
        ids, mask = self._pad_completions(answers)
        device = prompts.prompt_ids.device
        return prompts.replace_completions(ids.to(device), mask.to(device))

    @contextmanager
    def _seed_generators(self, seed: int, step: int, purpose: str) -> Iterator[None]:
        """Seed torch by (seed, step, purpose, call, group) for the block, then restore it; server: no-op.

        A seed among the sampling parameters would be one for all rows, and rows of equal seed draw equal
        noise (vLLM issue 50440), so vLLM draws from this process's generator instead.
        """
        self._call_number = self._call_number + 1 if self._last_call == (step, purpose) else 0
        self._last_call = (step, purpose)
        if not self.is_colocated:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(seed, step, f"vllm {purpose} {self._call_number} {self.group}"))
            yield

    def _pad_completions(self, answers: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return (padded ids, mask), each (N, C); the mask is 1 up to and including the first end id."""
        rows = [torch.tensor(answer, dtype=torch.long) for answer in answers]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        mask = make_completion_mask(ids, self.end_ids.to(ids.device)) & (torch.arange(ids.shape[1]) < lengths)
        return ids.masked_fill(~mask, self.pad_id), mask.long()


def _list_prompt_ids(prompts: Sequences) -> list[list[int]]:
    """Return each prompt's token ids as a list, without padding."""
    return [
        ids[mask.bool()].tolist() for ids, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)
    ]


def _build_backend_settings(args: GKDConfig, end_ids: Tensor, vocabulary: int | None) -> dict[str, Any]:
    """Return `VLLMGeneration`'s keyword arguments besides the models: every choice that affects the text."""
    sampling: dict[str, Any] = {"stop_token_ids": end_ids.tolist()}
    if vocabulary is not None:
        sampling["allowed_token_ids"] = list(range(vocabulary))
    rows = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
    return {
        "mode": args.vllm_mode,
        "server_base_url": args.vllm_server_base_url,
        "server_timeout": args.vllm_server_timeout,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        "max_model_length": args.vllm_max_model_length,
        "max_num_seqs": rows * args.vllm_tensor_parallel_size,
        "enable_sleep_mode": args.vllm_enable_sleep_mode,
        "trust_remote_code": args.trust_remote_code,
        "temperature": args.temperature,
        "max_completion_length": args.max_new_tokens,
        "logprobs": None,
        "generation_kwargs": sampling,
        **FULL_DISTRIBUTION_SAMPLING,
    }


def _check_model_is_servable(model: PreTrainedModel, args: GKDConfig) -> None:
    """Raise ValueError for an encoder-decoder and, when colocated, a model without a folder or hub name."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"use_vllm=True with a {type(model).__name__}: vLLM serves decoder-only models here; "
            "leave use_vllm False to sample with transformers' generate"
        )
    if args.vllm_mode == "colocate" and not model.name_or_path:
        raise ValueError(
            "use_vllm=True with a model that was not loaded from anywhere: vLLM reads it from a "
            "checkpoint; call `save_pretrained` for model and tokenizer and load both from that folder"
        )


def _check_vllm_is_installed() -> None:
    """Raise ImportError, with the command that installs vLLM, if it is missing."""
    if not is_vllm_available():
        raise ImportError(
            "use_vllm=True needs the package vllm, which is not installed: `pip install vllm`, or "
            "`pip install 'gkd-lab[vllm]'` (without constraints.txt: vllm pins a torch of its own); "
            "or leave use_vllm False to sample with transformers' generate"
        )
