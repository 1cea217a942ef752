"""A device that computes on the processor and refuses to mix devices, as a GPU would, where there is none.

Its tensors say that they are on `meta`, hold their values on the CPU, and raise where an operation is given
tensors of both (a CPU scalar is allowed, as on a GPU). `.cpu()` and `.to("cpu")` bring values back;
`.numpy()` without them fails, as on a GPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
# a GPU tensor may be indexed by a CPU one
MAY_MIX = ("aten._to_copy", "aten.copy_", "aten.index.Tensor", "aten.index_put_", "aten._index_put_impl_")


class Away(torch.Tensor):
    "A tensor that pretends to be on another device."

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Away({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    "Compute on the CPU; what comes out is away where what went in was, or where it was asked for."
    flat = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    away = any(isinstance(t, Away) for t in flat)
    if away and not str(func).startswith(MAY_MIX):
        here = [tuple(t.shape) for t in flat if not isinstance(t, Away) and t.ndim]
        if here:
            raise RuntimeError(f"{func}: tensors on two devices, one of shape {here[0]} was left on the CPU")
    target = kwargs.get("device")
    goes = torch.device(target) == DEVICE if target is not None else away
    inner = tree_map(
        lambda t: t.held if isinstance(t, Away) else t,
        (
            args,
            {k: v for k, v in kwargs.items() if k != "device"}
            | ({"device": torch.device("cpu")} if target is not None else {}),
        ),
    )
    out = func(*inner[0], **inner[1])
    if func._schema.name.endswith("_") and isinstance(args[0], torch.Tensor):
        return args[0]  # in place
    return tree_map(lambda t: Away(t) if goes and isinstance(t, torch.Tensor) else t, out)


class Pretend(TorchDispatchMode):
    "Within it, `meta` is the pretended device."

    def __enter__(self):
        self.tensor = torch.tensor  # makes a meta tensor without values before any operation is seen
        torch.tensor = lambda data, *args, device=None, **more: self.tensor(data, *args, **more).to(device)
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self.tensor
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})
