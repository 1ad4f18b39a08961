"""Kernels for the verify: the target's quantized products and its attention.

For the length of a verify forward, quantized linear modules and attention modules are watched, and
what a kernel has proved right and faster for on this machine goes through it. Everything else
goes the stock way: other cache classes and masks, values of another size than keys, and the
products of gathered experts.
"""

from types import FunctionType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, RotatingKVCache

from dflash_mlx.metal import attention_kernel, quantized_rows, selection
from dflash_mlx.metal.attention_class import attention_class
from dflash_mlx.metal.rows_class import rows_class
from dflash_mlx.metal.shape_class import Implementation
from dflash_mlx.target.leaf import Counting, Leaf
from dflash_mlx.target.watch import Handler, TiedHead, Watched

_NAME = "scaled_dot_product_attention"
_STOCK = base.scaled_dot_product_attention

Kind = tuple[mx.Dtype, int, int, int, int]  # dtype, N, K, group size, bits


class FastVerify:
    """A target's modules that kernels can serve, and handlers for those that one serves now."""

    def __init__(self, model: nn.Module):
        self._products: dict[Kind, list[Watched]] = {}
        self._attention: list[nn.Module] = []
        for module in {id(m): m for m in model.modules()}.values():
            if kind := _kind(module):
                user = TiedHead(module) if type(module) is nn.QuantizedEmbedding else module
                self._products.setdefault(kind, []).append(user)
            elif _calls_attention(type(module)):
                self._attention.append(module)
        self._fit: dict[int, bool] = {}  # by id of an attention module, once it is known

    def handlers(self, rows: int) -> list[tuple[Watched, Handler]]:
        """What to watch during a verify of so many rows; nothing where no kernel can run."""
        chosen = selection.current()
        pairs: list[tuple[Watched, Handler]] = []
        if chosen.active("rows") and quantized_rows.MIN_ROWS <= rows <= quantized_rows.MAX_ROWS:
            for kind, users in self._products.items():
                dtype, *sizes = kind
                kernel = chosen.kernel_for(rows_class(dtype, rows, *sizes))
                if kernel is not None:
                    handler = _product(kernel, kind, rows)
                    pairs += [(user, handler) for user in users]
        if chosen.active("verify") and rows <= attention_kernel.MAX_LENGTH:
            pairs += [(module, self._attend) for module in self._attention]
        return pairs

    def _attend(self, call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The module's own code, in which the name of mlx-lm's attention means another function."""

        def attention(
            queries: mx.array,
            keys: mx.array,
            values: mx.array,
            cache: Any,
            scale: float,
            mask: Any,
            sinks: mx.array | None = None,
        ) -> mx.array:
            kernel = None
            if isinstance(mask, str) and mask == "causal":
                kernel = _attention_kernel(queries, keys, values, cache)
            if kernel is None or not self._fits(module, keys, values, cache):
                return _STOCK(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
            return kernel(
                queries,
                cache.keys,
                cache.values,
                context_length=keys.shape[2] - queries.shape[2],
                visible="causal",
                scale=scale,
                sinks=sinks,
            )

        names = {**call.__globals__, _NAME: attention}
        own = FunctionType(call.__code__, names, None, call.__defaults__, call.__closure__)
        own.__kwdefaults__ = call.__kwdefaults__
        return own(module, *args, **kwargs)

    def _fits(self, module: nn.Module, keys: mx.array, values: mx.array, cache: Counting) -> bool:
        """Whether the module attends to the cache's rows as they are.

        A module might change keys after it has fetched them. The first time that a kernel could
        serve it, the host waits and compares; what a module does with its keys does not change.
        """
        fit = self._fit.get(id(module))
        if fit is None:
            end = keys.shape[2]
            same = mx.array_equal(keys, cache.keys[:, :, :end])
            same = same & mx.array_equal(values, cache.values[:, :, :end])
            fit = self._fit[id(module)] = bool(same.item())
        return fit


def _kind(module: nn.Module) -> Kind | None:
    """What matrix a module multiplies by, if quantized_rows may be worth a call for it.

    Exact classes: a subclass may do anything.
    """
    if type(module) not in (nn.QuantizedLinear, nn.QuantizedEmbedding):
        return None
    group_size, bits = module.group_size, module.bits
    scales: mx.array = module["scales"]
    biases: mx.array | None = module.get("biases")
    if not quantized_rows.supported(
        scales.dtype, scales, biases, group_size=group_size, bits=bits, mode=module.mode
    ):
        return None
    outputs, inner = scales.shape[0], scales.shape[1] * group_size
    if rows_class(scales.dtype, 2, outputs, inner, group_size, bits) is None:
        return None
    return scales.dtype, outputs, inner, group_size, bits


def _product(kernel: Implementation, kind: Kind, rows: int) -> Handler:
    """The handler of modules that multiply by such matrices."""
    dtype, outputs, inner, group_size, bits = kind

    def multiply(call: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0]
        if x.dtype != dtype or x.size != rows * inner:
            return call(module, *args, **kwargs)
        out = kernel(
            x.reshape(rows, inner),
            module["weight"],
            module["scales"],
            module["biases"],
            group_size=group_size,
            bits=bits,
        ).reshape(*x.shape[:-1], outputs)
        return out + module["bias"] if "bias" in module else out

    return multiply


def _calls_attention(cls: type) -> bool:
    """Whether calls of this class run code that calls mlx-lm's attention by its name."""
    call = cls.__call__
    return (
        isinstance(call, FunctionType)
        and _NAME in call.__code__.co_names
        and call.__globals__.get(_NAME) is _STOCK
    )


def _attention_kernel(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Leaf | None
) -> Implementation | None:
    """The kernel for a causal call over a cache that holds its rows in their order, if one serves.

    A rotating cache does while nothing has been dropped from it, and only then is a mask causal.
    """
    if type(cache) not in (KVCache, RotatingKVCache):
        return None
    held = cast(Counting, cache)
    buffers = held.keys, held.values
    end = held.offset if type(cache) is KVCache else buffers[0].shape[2]
    rows = queries.shape[2]
    if (
        keys.shape != values.shape
        or keys.shape != (*buffers[0].shape[:2], end, queries.shape[3])
        or buffers[0].shape != buffers[1].shape
        or end < rows
        or not attention_kernel.supported(queries, *buffers)
    ):
        return None
    return selection.current().kernel_for(
        attention_class("verify", queries, keys.shape[1], end - rows)
    )
