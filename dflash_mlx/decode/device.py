"""Work for the device: on mlx_lm's stream, queued, and read where its results are needed."""

from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream

from dflash_mlx.decode.cache import PromptCache
from dflash_mlx.decode.phases import phase
from dflash_mlx.policy import Sign


class DeviceWork:
    """`with` it, work goes to the generation stream; what breaks it leaves the cache invalid."""

    def __init__(self, cache: PromptCache):
        self._cache = cache
        self._stream = mx.stream(generation_stream)

    def __enter__(self) -> None:
        self._stream.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._stream.__exit__(kind, *rest)
        if kind is not None:
            self._cache.invalidate()


@phase("queuing")
def queue(*arrays: mx.array | None) -> None:
    """Start computing, without waiting for it as far as MLX allows."""
    mx.async_eval(*arrays)


@phase("waiting")
def read(*arrays: mx.array) -> list[int]:
    """The integers of 1-d arrays, one after the other, in one synchronisation."""
    joined = arrays[0] if len(arrays) == 1 else mx.concatenate([a.astype(mx.int32) for a in arrays])
    return cast(list[int], joined.tolist())


@phase("waiting")
def read_signs(array: mx.array | None) -> list[Sign]:
    """A policy's signs of proposals; none where there is no array."""
    return [] if array is None else cast(list[Sign], array.tolist())
