"""The platform that a program is traced for: the fastest way to compute some layers depends on it.

Results are equal up to rounding. It is that of the default devices, unless a program is compiled
ahead of time for others.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

_CUDA_NAMES = ("gpu", "cuda")
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def current_platform() -> str:
    """The platform of the devices that will run what is traced now: "cpu", "gpu" or "tpu"."""
    return _platform.get() or _short_name(jax.default_backend())


def _short_name(name: str) -> str:
    return "gpu" if name in _CUDA_NAMES else name


@contextlib.contextmanager
def tracing_for(name: str) -> Iterator[None]:
    """Trace for the devices of a platform, whatever the default devices are.

    Args:
      name: `platform` of these devices.
    """
    token = _platform.set(_short_name(name))
    try:
        yield
    finally:
        _platform.reset(token)


def traced_for(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap a function that is jitted as a whole: it is traced for a platform, see `tracing_for`.

    A scope of `tracing_for` around its first call has precedence.
    """

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with tracing_for(_platform.get() or name):
            return function(*args)

    return wrapped
