"""The rehearsal's result, kept in the user's cache directory for the next time."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dflash_mlx.decode.cost import Costs
from dflash_mlx.metal.verdicts import cache_directory, chip


def kept_costs(file: Path, block_size: int, measure: Callable[[], Costs]) -> Costs:
    """Read the costs from a file, or measure them and write it.

    A file that is damaged or of another block size is measured again and replaced; one that cannot
    be written is done without.
    """
    costs = _read(file, block_size)
    if costs is None:
        costs = measure()
        _write(file, costs)
    return costs


def costs_file(target: nn.Module, draft: nn.Module) -> Path:
    """Where the costs of a pair on this machine are: a file per machine, versions and shapes."""
    about = [chip(), str(mx.default_device()), *(_version(p) for p in ("mlx", "mlx-lm"))]
    about.append(_version("dflash-mlx"))
    for model in (target, draft):
        arrays = dict(tree_flatten(model.parameters()))
        about += [f"{name} {a.shape} {a.dtype}" for name, a in arrays.items()]
    name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:24]
    return cache_directory() / "costs" / f"{name}.json"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source"


def _read(file: Path, block_size: int) -> Costs | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        numbers = [found["plain"], found["reading"], *found["cycle"]]
        if len(found["cycle"]) != block_size or not all(map(_is_time, numbers)):
            return None
        if not min(found["plain"], *found["cycle"]) > 0:
            return None
        return Costs(found["plain"], tuple(found["cycle"]), found["reading"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value < 3600


def _write(file: Path, costs: Costs) -> None:
    text = json.dumps(
        {"plain": costs.plain, "cycle": list(costs.cycle), "reading": costs.reading}, indent=1
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text)
            # No reader and no crash ever sees half a file.
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError:
        pass
