"""Watch the calls of chosen module instances for the length of a `with` block.

Python looks `__call__` up on the class, so an instance is watched by giving it a generated
subclass of its own class for a while. Parameters, attributes and `isinstance` stay as they are,
and it works where a model hands out copies of its list of layers.
"""

import threading
from collections.abc import Callable, Hashable, Iterable
from copy import copy
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

# handler(call, module, args, kwargs) -> result, where call(module, *args, **kwargs) is the
# module's own behaviour.
Handler = Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any]
# What listens to a module: a handler, or a list that its outputs are appended to.
Listener = Handler | list[mx.array]


class TiedHead(NamedTuple):
    """An embedding in its other use, as the output head: the calls of its `as_linear`."""

    embedding: nn.Module


# What can be watched.
Watched = nn.Module | TiedHead


class _Local(threading.local):
    handlers: dict[Hashable, Listener] = {}  # noqa: RUF012 - replaced, never changed in place


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

    def as_linear(self: nn.Module, x: mx.array) -> Any:
        handler = _local.handlers.get(_key(TiedHead(self)))
        if callable(handler):
            return handler(own, self, (x,), {})
        return own(self, x)

    methods: dict[str, Any] = {"__call__": __call__, "__module__": cls.__module__}
    own: Any = getattr(cls, "as_linear", None)
    if own is not None:
        methods["as_linear"] = as_linear
    return type(cls.__name__, (cls,), methods)


def _key(watched: Watched) -> Hashable:
    if isinstance(watched, TiedHead):
        return "head", id(watched.embedding)
    return id(watched)


def layered(
    outer: list[tuple[nn.Module, Handler]], inner: list[tuple[Watched, Handler]]
) -> list[tuple[Watched, Handler]]:
    """The pairs of both; where both want a module, the outer handler's `call` is the inner one."""
    below = {_key(watched): handler for watched, handler in inner}
    above = {_key(watched) for watched, _ in outer}
    pairs: list[tuple[Watched, Handler]] = []
    for watched, handler in outer:
        lower = below.get(_key(watched))
        pairs.append((watched, _over(handler, lower) if lower else handler))
    return pairs + [pair for pair in inner if _key(pair[0]) not in above]


def _over(outer: Handler, inner: Handler) -> Handler:
    def handle(call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def lower(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return inner(call, module, args, kwargs)

        return outer(lower, module, args, kwargs)

    return handle


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

    def __init__(self, handlers: Iterable[tuple[Watched, Listener]]):
        self._pairs = list(handlers)
        self._done: list[nn.Module] = []

    def __enter__(self) -> "Watch":
        self._outer = _local.handlers
        try:
            with _lock:
                for watched, _ in self._pairs:
                    module = watched.embedding if isinstance(watched, TiedHead) else watched
                    entry = _swapped.get(id(module))
                    if entry is None:
                        cls = type(module)
                        subclass = _subclasses.get(cls)
                        if subclass is None:
                            subclass = _subclasses[cls] = _subclass(cls)
                        _swapped[id(module)] = [1, cls]
                        self._done.append(module)
                        object.__setattr__(module, "__class__", subclass)
                    else:
                        entry[0] += 1
                        self._done.append(module)
            own = {_key(watched): handler for watched, handler in self._pairs}
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
