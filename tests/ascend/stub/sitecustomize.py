"""Stands in for what vllm-ascend imports and a machine without an NPU lacks.

Found through PYTHONPATH, so that every Python process of a test has it. Any module under the names
below can be imported and any of its attributes used, called and inherited from; nothing computes.
Only what upstream's code looks at while it is imported or configured has a value.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# CANN's Python, other KV stores', and libraries that no test here computes with.
ABSENT = ("torch_npu", "acl", "mooncake", "torchvision", "scipy", "pandas")


def _attribute(owner: Any, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    found = Anything(f"{owner.__name__}.{name}")
    setattr(owner, name, found)
    return found


class Anything:
    """An attribute of a module that is not there: usable as whatever it is taken for."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    __getattr__ = _attribute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Anything(f"{self.__name__}()")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __instancecheck__(self, instance: Any) -> bool:
        return False

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__


class _Module(ModuleType):
    __getattr__ = _attribute


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in ABSENT:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module: Any = _Module(spec.name)
        module.__version__ = "1.0.0"  # numba refuses an older scipy
        return module  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "torch_npu":
            _add_npu()


def _add_npu() -> None:
    """What importing torch_npu does to torch."""
    import torch
    import torch.distributed

    torch.utils.rename_privateuse1_backend("npu")
    npu: Any = _Module("torch.npu")
    npu.is_available = lambda: False
    npu.device_count = lambda: 8
    npu.current_device = lambda: 0
    torch.npu = npu
    torch.version.cann = None
    torch.distributed.is_hccl_available = lambda: False


sys.meta_path.append(_Finder())
