"""Reversible changes of a model, which its copies do not get.

Hooks, replaced methods and overridden configs lead to the engine of *this* model. A copy or a
pickle that carried them along would be half compressed, and could not be restored. So each changed
module gets a ``__reduce_ex__`` of its own, which `copy` and `pickle` ask first: it hands out the
module as it was before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
REDUCE = "__reduce_ex__"
_ABSENT: Any = object()


class Patches:
    """Changes of modules that belong together, until `undo`."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()

    def hook(
        self,
        module: nn.Module,
        before: Callable[..., Any] | None,
        after: Any = None,
        first: bool = False,
    ) -> None:
        """Call ``before`` and ``after`` around a forward, with its keyword arguments.

        ``after`` is called after an exception, too; with ``first`` before the hooks that are there.
        """
        # A compiled model runs hooks as they are: traced, they would be compiled again each step.
        eagerly: Any = torch.compiler.disable
        handles = []
        if before is not None:
            handles.append(module.register_forward_pre_hook(eagerly(before), with_kwargs=True))
        if after is not None:
            handles.append(
                module.register_forward_hook(
                    eagerly(after), prepend=first, with_kwargs=True, always_call=True
                )
            )
        original = _original_of(module)
        for handle in handles:
            original.hooks.add(handle.id)
            self._undo.callback(self._unhook, original, handle)

    def replace(self, module: nn.Module, name: str, value: Any) -> None:
        """Put ``value`` in place of an attribute, for this one module."""
        original = _original_of(module)
        original.values.setdefault(name, []).append(vars(module).get(name, _ABSENT))
        vars(module)[name] = value
        self._undo.callback(self._put_back, original, name)

    def undo(self) -> None:
        """Give everything back, the last change first. Harmless when called twice."""
        self._undo.close()

    @staticmethod
    def _unhook(original: _Original, handle: Any) -> None:
        handle.remove()
        original.hooks.discard(handle.id)
        original.forget()

    @staticmethod
    def _put_back(original: _Original, name: str) -> None:
        _put(vars(original.module), name, original.values[name].pop())
        if not original.values[name]:
            del original.values[name]
        original.forget()


class _Original:
    """A changed module as it was before: what `copy` and `pickle` get of it.

    Attributes
    ----------
    hooks : ids of the hooks that were added.
    values : per replaced attribute, what was there before, the oldest first.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.hooks: set[int] = set()
        self.values: dict[str, list[Any]] = {}

    def __call__(self, protocol: Any) -> Any:
        reduced: Any = type(self.module).__reduce_ex__(self.module, protocol)
        if len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced  # a class that says itself what it is made from (torch.compile's)
        make, args, state, *rest = reduced
        state = dict(state)
        state.pop(REDUCE, None)
        for name, before in self.values.items():
            _put(state, name, before[0])
        for name in set(HOOKS) & set(state):
            hooks = state[name]
            state[name] = type(hooks)((k, v) for k, v in hooks.items() if k not in self.hooks)
        return make, args, state, *rest

    def forget(self) -> None:
        """Leave the module, once nothing of it is changed any more."""
        if not self.hooks and not self.values:
            vars(self.module).pop(REDUCE, None)


def _original_of(module: nn.Module) -> _Original:
    original: _Original = vars(module).setdefault(REDUCE, _Original(module))
    return original


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        values.pop(name, None)
    else:
        values[name] = value
