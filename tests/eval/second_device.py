"""A device that is not the CPU, on machines that have no other: its tensors are the CPU's, but meet none of the CPU.

So what is left on the wrong device is found without a GPU. Forward passes only: torch's engine knows no such device.
Run as a script with questions and their arguments, it asks them there. A process can register it once; source:
`torch.utils.backend_registration` of torch 2.11 and later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from eval.shared.command import run

NAME = "second"
aten = torch.ops.aten


class OnSecond(Tensor):
    """A tensor there; `held` is the CPU's."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> OnSecond:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        self.held = held
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *rest: Any) -> OnSecond:
        return OnSecond(inner["held"])

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.copy_.default:
            _held(args[0]).copy_(_held(args[1]))
            return args[0]
        stays = torch.device(kwargs.get("device") or NAME).type == NAME
        inside = {name: "cpu" if name == "device" and value else value for name, value in kwargs.items()}
        args_inside, inside = pytree.tree_map(_held if func is aten._to_copy.default else _only_own, (args, inside))
        out = func(*args_inside, **inside)
        if not stays:
            return out
        out = pytree.tree_map(lambda each: OnSecond(each) if isinstance(each, Tensor) else each, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnSecond) else value


def _only_own(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, OnSecond) and value.dim() > 0:
        raise RuntimeError(f"a tensor {list(value.shape)} on {value.device} meets tensors on {NAME}")
    return _held(value)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *sizes, dtype=None, **rest: OnSecond(make(*sizes, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty.memory_format", _made(torch.empty), "PrivateUse1")
_LIBRARY.impl("empty_strided", _made(torch.empty_strided), "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


def main(lines: Sequence[str]) -> int:
    """Ask what each line says: a question and its arguments, with spaces between."""
    with pytest.raises(RuntimeError, match=f"meets tensors on {NAME}"):
        torch.ones(2).to(NAME) + torch.ones(2)
    return max(run(name, [*args, "--device", NAME]) for name, *args in (line.split() for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
