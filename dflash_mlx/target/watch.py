"""Watch the calls of chosen module instances for the length of a `with` block.

Python looks `__call__` up on the class, so an instance is watched by giving it a generated
subclass of its own class for a while. Parameters, attributes and `isinstance` stay as they are,
and it works where a model hands out copies of its list of layers.
"""

import threading
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# handler(call, module, args, kwargs) -> result, where call(module, *args, **kwargs) is the
# module's own behaviour.
Handler = Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any]
# What listens to a module: a handler, or a list that its outputs are appended to.
Listener = Handler | list[mx.array]


class _Local(threading.local):
    handlers: dict[int, Listener] = {}  # noqa: RUF012 - replaced, never changed in place


_local = _Local()
_lock = threading.Lock()
_subclasses: dict[type, type] = {}
# The swap is visible to every thread, so it is counted: the last watch to leave restores.
_swapped: dict[int, list[Any]] = {}  # id(module) -> [watches, original class]


def _subclass(cls: type) -> type:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handler = _local.handlers.get(id(self))
        if handler is None:
            return cls.__call__(self, *args, **kwargs)
        if isinstance(handler, list):
            out = cls.__call__(self, *args, **kwargs)
            handler.append(own_handle(out))
            return out
        return handler(cls.__call__, self, args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})


def hidden_state(output: Any) -> Any:
    """The array in what a layer returned: itself, or the first one of a tuple."""
    if isinstance(output, (tuple, list)):
        return next((o for o in output if isinstance(o, mx.array)), None)
    return output


def own_handle(output: Any) -> mx.array:
    """The array in what a layer returned, safe from what the model writes into it later."""
    return copy(hidden_state(output))


def is_callable(module: nn.Module) -> bool:
    """Whether calls of this module can be watched: its class defines `__call__`."""
    return any("__call__" in vars(cls) for cls in type(module).__mro__)


class Watch:
    """Route calls of the given modules, made by this thread inside the block, to handlers.

    A list in place of a handler costs less. Calls from other threads pass through untouched. Blocks
    nest; an inner handler of the same module hides the outer one.
    """

    def __init__(self, handlers: Iterable[tuple[nn.Module, Listener]]):
        self._pairs = list(handlers)
        self._done: list[nn.Module] = []

    def __enter__(self) -> "Watch":
        self._outer = _local.handlers
        try:
            with _lock:
                for module, _ in self._pairs:
                    entry = _swapped.get(id(module))
                    if entry is None:
                        cls = type(module)
                        watched = _subclasses.get(cls)
                        if watched is None:
                            watched = _subclasses[cls] = _subclass(cls)
                        _swapped[id(module)] = [1, cls]
                        self._done.append(module)
                        object.__setattr__(module, "__class__", watched)
                    else:
                        entry[0] += 1
                        self._done.append(module)
            own = {id(module): handler for module, handler in self._pairs}
            _local.handlers = {**self._outer, **own} if self._outer else own
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        _local.handlers = self._outer
        with _lock:
            for module in self._done:
                entry = _swapped[id(module)]
                entry[0] -= 1
                if entry[0] == 0:
                    object.__setattr__(module, "__class__", entry[1])
                    del _swapped[id(module)]
        # Handlers hold what they recorded; nothing of it may outlive the block through us.
        self._done, self._pairs = [], []
