"""mlx_lm's functions on prompt caches, under their names, for ours and for plain ones.

A file is one that mlx_lm reads as well: the target's caches as it writes them. Behind their arrays
stand the tokens and the draft's context, which it does not look at.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache as mlx_cache

from dflash_mlx.arguments import check_whole
from dflash_mlx.decode import PromptCache
from dflash_mlx.draft import Context, LayerGroup
from dflash_mlx.errors import CheckpointError, DFlashError, InvalidCache, said
from dflash_mlx.files import replacing
from dflash_mlx.target import can_rewind, rewind
from dflash_mlx.target.leaf import leaves

# What is ours in a file's metadata.
_OURS = "dflash-mlx"


def can_trim_prompt_cache(cache: PromptCache | list[Any]) -> bool:
    """Whether the last tokens can be taken out of a cache.

    Raises:
        InvalidCache: it is none.
    """
    _check_cache(cache)
    if isinstance(cache, PromptCache):
        return cache.valid and can_rewind(cache.target)
    return mlx_cache.can_trim_prompt_cache(cache)


def trim_prompt_cache(cache: PromptCache | list[Any], num_tokens: int) -> int:
    """Take the last tokens out of a cache, of the draft's context as well.

    Returns:
        How many were taken out; 0 where the cache cannot be trimmed.

    Raises:
        InvalidCache: it is none.
        DFlashError: `num_tokens` is no whole number from 0.
    """
    _check_cache(cache)
    check_whole("num_tokens", num_tokens, 0)
    if not isinstance(cache, PromptCache):
        return cast(int, mlx_cache.trim_prompt_cache(cache, num_tokens))
    if not can_trim_prompt_cache(cache):
        return 0
    cache.follow()
    kept = max(0, len(cache.tokens) - max(0, num_tokens))
    trimmed = len(cache.tokens) - kept
    rewind(cache.target, kept)
    cache.follow()
    return trimmed


def save_prompt_cache(
    file_name: str | Path,
    cache: PromptCache | list[Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a prompt cache to a .safetensors file, with the draft's context.

    Args:
        file_name: where; the ending .safetensors is added if it lacks.
        cache: ours, or a plain one of mlx_lm.
        metadata: texts to keep beside it.

    Raises:
        InvalidCache: it is none, or half-written.
        DFlashError: the cache is of a class that mlx_lm cannot read back, another argument cannot
            be meant, or the file cannot be written.
    """
    _check_cache(cache)
    file = _path(file_name)
    if not _are_texts(metadata):
        raise DFlashError("metadata is no mapping of texts to texts; give one, or None.")
    kinds, states = [type(c).__name__ for c in cache], [c.state for c in cache]
    for kind in [*kinds, *(type(leaf).__name__ for leaf in leaves(cache))]:
        if not hasattr(mlx_cache, kind):
            raise DFlashError(f"mlx_lm cannot read a {kind} back from a file; it is not saved.")
    about = dict(metadata or {})
    if isinstance(cache, PromptCache):
        state, about[_OURS] = _packed(cache)
        states.append(state)
    arrays, scalars = _as_arrays(states)
    if file.suffix != ".safetensors":
        file = file.with_name(file.name + ".safetensors")
    kept = dict(tree_flatten([about, kinds, scalars]))
    try:
        with replacing(file) as partial:
            mx.save_safetensors(str(partial), arrays, kept)
    except (OSError, RuntimeError) as error:
        raise DFlashError(f"{file} cannot be written: {said(error)}.") from error


def load_prompt_cache(file_name: str | Path, return_metadata: bool = False) -> Any:
    """Read a prompt cache from a file.

    Returns:
        Ours, with the draft's context, if `save_prompt_cache` wrote one of ours; mlx_lm's plain
        list otherwise. With `return_metadata`, a tuple of it and the texts kept beside it.

    Raises:
        CheckpointError: there is no such file, or it is something else.
        DFlashError: `file_name` is no path.
    """
    if not _path(file_name).is_file():
        raise CheckpointError(f"There is no file {file_name}.")
    try:
        plain, metadata = mlx_cache.load_prompt_cache(str(file_name), return_metadata=True)
        cache = _unpacked(plain, metadata.pop(_OURS), file_name) if _OURS in metadata else plain
    except Exception as error:
        # mlx_lm reads what a file says of itself without looking, so anything may go wrong.
        raise CheckpointError(
            f"{file_name} cannot be read as a prompt cache ({said(error)}); give a file that "
            "save_prompt_cache wrote."
        ) from error
    return (cache, metadata) if return_metadata else cache


def _check_cache(cache: Any) -> None:
    """Raise InvalidCache unless it is a prompt cache, ours or a plain list of mlx_lm's."""
    if isinstance(cache, PromptCache):
        return
    if not isinstance(cache, list) or not all(hasattr(leaf, "is_trimmable") for leaf in cache):
        what = "list of other things" if isinstance(cache, list) else type(cache).__name__
        raise InvalidCache(
            f"The prompt cache is a {what}; give one that make_prompt_cache made, ours or mlx_lm's."
        )


def _path(file_name: Any) -> Path:
    if not isinstance(file_name, (str, os.PathLike)):
        raise DFlashError(f"file_name is a {type(file_name).__name__}; give a path.")
    return Path(file_name)


def _are_texts(metadata: Any) -> bool:
    if metadata is None:
        return True
    return isinstance(metadata, Mapping) and all(
        isinstance(text, str) for entry in metadata.items() for text in entry
    )


def _packed(cache: PromptCache) -> tuple[dict[str, Any], str]:
    """What mlx_lm does not know of a cache: a state for its file, and a text about it."""
    if not cache.valid:
        raise InvalidCache(
            "An exception left this prompt cache half-written; the next generation with it mends "
            "it, so save it after that."
        )
    cache.follow()
    context = cache.context
    rows = [
        {"keys": g.keys[:, :, : g.length], "values": g.values[:, :, : g.length]}
        for g in context.groups
    ]
    about = {
        "offset": context.offset,
        "groups": [{"limit": g.limit, "sinks": g.sinks} for g in context.groups],
    }
    return {"tokens": mx.array(cache.tokens, mx.int32), "rows": rows}, json.dumps(about)


def _unpacked(target: list[Any], text: str, file_name: str | Path) -> PromptCache:
    """Our cache from mlx_lm's part of a file, and ours."""
    prefix, about = f"{len(target)}.", json.loads(text)
    arrays = cast(dict[str, mx.array], mx.load(str(file_name)))
    ours = tree_unflatten(
        [(name.removeprefix(prefix), a) for name, a in arrays.items() if name.startswith(prefix)]
    )
    groups = []
    for described, rows in zip(about["groups"], ours["rows"], strict=True):
        keys, values = rows["keys"], rows["values"]
        layers, heads, _, dim = keys.shape
        group = LayerGroup(layers, heads, dim, keys.dtype, described["limit"], described["sinks"])
        group.append(keys, values)
        groups.append(group)
    context = Context(groups)
    context.offset = about["offset"]
    cache = PromptCache(target, context)
    cache.tokens = ours["tokens"].tolist()
    return cache


def _as_arrays(states: list[Any]) -> tuple[dict[str, mx.array], list[Any]]:
    """States as arrays by name, and which of them were none, as mlx_lm's loader expects it."""
    arrays: dict[str, mx.array] = {}
    scalars: list[Any] = [""]
    for name, value in cast(list[tuple[str, Any]], tree_flatten(states)):
        if isinstance(value, mx.array):
            arrays[name] = value
        elif value is None:
            arrays[name] = mx.array([])
            scalars.append((name, "none"))
        elif isinstance(value, str):
            arrays[name] = mx.array([ord(character) for character in value])
            scalars.append((name, "string"))
        elif isinstance(value, (bool, int, float)):
            arrays[name] = mx.array(value)
            scalars.append((name, "scalar"))
        else:
            raise DFlashError(
                f"A cache holds a {type(value).__name__}, which no file can; it is not saved."
            )
    return arrays, scalars
