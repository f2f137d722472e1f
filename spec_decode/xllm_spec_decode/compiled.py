"""Loops over tokens, compiled where numba is installed, as it is wherever vLLM is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
Parts = tuple[Any, ...]
"""A named tuple as a plain one: numba takes microseconds to see what a named one is at each call,
so that a function is given plain ones, and names them itself."""


def compiled(function: F) -> F:
    """The same function, compiled when it is first called; as it is where there is no numba.

    What was compiled is kept for the next process, where numba finds a directory for it.
    """
    try:
        from numba import njit
    except ModuleNotFoundError:
        return function
    try:
        return cast(F, njit(function, cache=True))
    except RuntimeError:
        return cast(F, njit(function))
