"""A count of the calls at which the host would wait for a GPU, taken on a CPU.

`HostWaits` sees what Python calls: reads of a tensor's values (`item`, `tolist`, `bool`, `cpu`, …), operations whose
result has a size that depends on values (`nonzero`, `unique`, …), and tensors that are made from Python values on a given
device, which copies them from pageable memory. It also sees reads of values by C++ (`aten::_local_scalar_dense`) and
masks that are used as indices.

It does not see: copies between devices, since on a CPU there is one device only (`x.to(device)` is counted neither);
what the backward does on autograd's own thread on a GPU; waits inside NCCL or for CUDA events; and allocations that
make the allocator wait.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

T = torch.Tensor
READS = (T.item, T.tolist, T.cpu, T.numpy, T.__bool__, T.__float__, T.__int__, T.__index__, T.__contains__)
SIZED_BY_VALUES = (torch.equal, T.equal, torch.nonzero, T.nonzero, torch.unique, T.unique, torch.masked_select)
MADE = (torch.tensor, torch.as_tensor)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")


class HostWaits(TorchFunctionMode):
    """A context that counts, by the place of the call, what would make the host wait.

    Attributes:
        places: "function at file:line" of the innermost caller outside torch → number of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._inside = False
        self._reads = _Reads(self)

    def __enter__(self) -> "HostWaits":
        super().__enter__()
        self._reads.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reads.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        waits = function in READS or function in SIZED_BY_VALUES
        if not waits and not (function in MADE and kwargs.get("device") is not None):
            return function(*args, **kwargs)
        self.note(getattr(function, "__name__", str(function)))
        outer, self._inside = self._inside, True  # the read of values inside it is the same wait
        try:
            return function(*args, **kwargs)
        finally:
            self._inside = outer

    def note(self, name: str) -> None:
        """Count a call of `name`, unless it is part of a call that was counted."""
        if self._inside:
            return
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        self.places[f"{name} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"] += 1

    @property
    def total(self) -> int:
        """Return the number of waits so far."""
        return sum(self.places.values())


class _Reads(TorchDispatchMode):
    """The part of `HostWaits` that sees reads of values which C++ code makes."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            self._waits.note("read in C++")
        elif operator._schema.name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self._waits.note("mask as an index")
        return operator(*args, **(kwargs or {}))
