"""Count what makes a host wait for the device: operators that read values of tensors."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WAITING_OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class WaitCounter(TorchDispatchMode):
    """Counts the operators that read a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += operator._schema.name in WAITING_OPERATORS
        return operator(*args, **kwargs or {})
