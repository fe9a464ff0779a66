"""Place teacher and student under accelerate: a teacher copied to every device, or sharded like the student.

accelerate only prepares trained models: `prepare_model(evaluation_mode=True)` leaves an FSDP teacher whole
and on the CPU. The teacher is not registered with the accelerator, so checkpoints hold the student alone.
"""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def place_teacher(teacher: PreTrainedModel, accelerator: Accelerator, *, parked: bool = False) -> nn.Module:
    """Return the teacher, sharded under FSDP2 and ZeRO-3, else moved whole to the device (parked: CPU).

    `parked` leaves it on the CPU: `gkd_lab.models.loading.use_on_device` moves it for the time of a block,
    and FSDP2 moves its shards. Under FSDP2 embeddings and head stay gathered from a forward pass to the end
    of that block, so that a loss can read the head. A quantized teacher stays on the device that it was
    loaded to, one copy for each process.

    Raises:
        ValueError: for FSDP1, and for `parked` with DeepSpeed or a quantized teacher.
    """
    if is_quantized(teacher):
        _refuse_parking(parked, "the weights of a quantized teacher", "turn one of them off")
        return teacher
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from trl.models.utils import prepare_deepspeed

        _refuse_parking(parked, "DeepSpeed's weights", "set `zero_optimization.offload_param` with stage 3")
        return prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        _refuse_fsdp_1(accelerator)
        offload = CPUOffloadPolicy() if parked else accelerator.state.fsdp_plugin.cpu_offload
        return _shard_with_plugin(teacher, accelerator, offload, reshard_root=False)
    return teacher if parked else teacher.to(accelerator.device)


def is_quantized(model: nn.Module) -> bool:
    """Check whether the config has `quantization_config`: such weights can be neither cast nor moved."""
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None


def _refuse_parking(parked: bool, weights_description: str, way_out: str) -> None:
    """Raise ValueError if `parked` is True: weights of this kind cannot move between CPU and device."""
    if parked:
        raise ValueError(
            f"park_teacher=True, but {weights_description} cannot be moved between uses: {way_out}"
        )


def _refuse_fsdp_1(accelerator: Accelerator) -> None:
    """Raise ValueError if accelerate uses FSDP version 1, which cannot shard a frozen teacher here."""
    if not accelerator.is_fsdp2:
        raise ValueError(
            f"fsdp_version {accelerator.state.fsdp_plugin.fsdp_version} cannot shard a frozen teacher here: "
            "set `fsdp_version: 2` in the accelerate configuration"
        )


def place_student(student: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Shard an encoder-decoder student under FSDP2, in place; any other student is returned unchanged.

    accelerate cannot: embeddings that encoder and decoder share must be in one group. Any other student is
    returned as it is, for accelerate to prepare.
    """
    if not accelerator.is_fsdp2 or not student.config.is_encoder_decoder:
        return student
    plugin = accelerator.state.fsdp_plugin
    sharded = _shard_with_plugin(student, accelerator, plugin.cpu_offload, reshard_root=None)
    # fully_shard renames the classes of sharded modules, so accelerate would not find the blocks.
    plugin.auto_wrap_policy = None
    return sharded


def _shard_with_plugin(
    model: PreTrainedModel, accelerator: Accelerator, offload: OffloadPolicy | None, reshard_root: bool | None
) -> PreTrainedModel:
    """Shard a model in place by `shard_model` with accelerate's FSDP plugin settings, and return it."""
    plugin = accelerator.state.fsdp_plugin
    return shard_model(
        model,
        _get_sharding_mesh(accelerator),
        # The plugin names the student's block classes, the fallback for a teacher that names none.
        blocks=set(model._no_split_modules or plugin.transformer_cls_names_to_wrap or ()),
        reshard_root=reshard_root,
        mp_policy=plugin.mixed_precision_policy,
        offload_policy=offload,
        broadcast_weights=bool(plugin.cpu_ram_efficient_loading),
    )


def _get_sharding_mesh(accelerator: Accelerator) -> DeviceMesh:
    """Return the FSDP dimensions of accelerate's device mesh, else a 1-D mesh of all processes."""
    mesh = accelerator.torch_device_mesh
    if mesh is None:
        return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    return mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]


def shard_model(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    blocks: set[str] | None = None,
    reshard_root: bool | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    broadcast_weights: bool = False,
) -> PreTrainedModel:
    """Shard a model in place by FSDP2, each transformer block and then the root as a group, and return it.

    The root holds embeddings, head and last norm.

    Args:
        blocks: Class names of the transformer blocks, each gathered as one; default `_no_split_modules`.
        reshard_root: Free the root's gathered weights after a forward pass. None is torch's choice: only
            after a backward pass, which a frozen model never has.
        broadcast_weights: Send rank 0's weights, one block at a time, to the other ranks, where transformers'
            `cpu_ram_efficient_loading` has left weights on the meta device.

    Raises:
        ValueError: if the model has no module of these classes.
    """
    names = set(model._no_split_modules or ()) if blocks is None else blocks
    block_modules = [module for module in model.modules() if type(module).__name__ in names]
    if not block_modules:
        raise ValueError(
            f"{type(model).__name__} has no transformer block named {sorted(names)}, so all of it would be "
            "gathered at once: set `fsdp_transformer_layer_cls_to_wrap` to the class of its layers"
        )
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mp_policy or MixedPrecisionPolicy(),
        "offload_policy": offload_policy or OffloadPolicy(),
    }
    if broadcast_weights:
        model.tie_weights()  # One tensor for a tied weight on every rank, so that all broadcast alike.
    # A tied weight has to be in one group only: as no block holds one, it is the root's, which comes last.
    for unit in (*block_modules, model):
        if broadcast_weights:
            _broadcast_weights(unit, mesh.device_type)
        fully_shard(unit, reshard_after_forward=reshard_root if unit is model else True, **options)
    # `generate` calls an encoder by itself, which alone would not gather the root's embeddings.
    register_fsdp_forward_method(model, "generate")
    return model


@torch.no_grad()
def _broadcast_weights(unit: nn.Module, device: str) -> None:
    """Replace, in place, the parameters and buffers of `unit` that are not sharded yet by rank 0's."""
    received: dict[Tensor, Tensor] = {}
    for module in unit.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stores:
            for name, tensor in list(tensors.items()):
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if tensor not in received:
                    received[tensor] = _broadcast_tensor(tensor, device)
                tensors[name] = received[tensor]


def _broadcast_tensor(tensor: Tensor, device: str) -> Tensor:
    """Send rank 0's values of `tensor` to all ranks; return them on `device`, a parameter if it is one."""
    value = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
    dist.broadcast(value, src=0)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
