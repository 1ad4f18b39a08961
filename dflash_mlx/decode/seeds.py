"""What cycles cost, kept in the user's cache directory for the next process."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dflash_mlx.decode.cost import CostModel, Costs
from dflash_mlx.metal.verdicts import cache_directory, chip


class KeptCosts(CostModel):
    """Costs that begin with a file's, and are written to it again when they have changed."""

    change = 0.2

    def __init__(self, file: Path, kept: Mapping[int, Costs]):
        super().__init__(kept[0], kept)
        self._file, self._kept = file, dict(kept)

    def save(self) -> None:
        """Write what was learned, where it is new or differs by more than a fifth."""
        now = {level: costs.smoothed() for level, costs in self.learned().items()}
        if any(_differ(costs, self._kept.get(level), self.change) for level, costs in now.items()):
            self._kept = now
            _write(self._file, now)


def kept_costs(file: Path, block_size: int, measure: Callable[[], Costs]) -> KeptCosts:
    """Read the costs from a file, or measure them and write it.

    A file that is damaged or of another block size is measured again and replaced; one that cannot
    be written is done without.
    """
    kept = _read(file, block_size)
    if kept is None:
        kept = {0: measure()}
        _write(file, kept)
    return KeptCosts(file, kept)


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


def _differ(now: Costs, kept: Costs | None, change: float) -> bool:
    if kept is None:
        return True
    pairs = zip((now.plain, *now.cycle), (kept.plain, *kept.cycle), strict=True)
    return any(abs(a - b) > change * b for a, b in pairs)


def _read(file: Path, block_size: int) -> dict[int, Costs] | None:
    """Costs by level of context length, which are numbers in the file too."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kept = {int(level): _costs(entry, block_size) for level, entry in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return kept if 0 in kept and min(kept) == 0 else None


def _costs(entry: dict[str, Any], block_size: int) -> Costs:
    """Raises ValueError, KeyError or TypeError for an entry that is not what `_write` wrote."""
    costs = Costs(entry["plain"], tuple(entry["cycle"]), entry["reading"])
    numbers = [costs.plain, costs.reading, *costs.cycle]
    if len(costs.cycle) != block_size or not all(map(_is_time, numbers)):
        raise ValueError
    if not min(costs.plain, *costs.cycle) > 0:
        raise ValueError
    return costs


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value < 3600


def _write(file: Path, kept: Mapping[int, Costs]) -> None:
    text = json.dumps({level: asdict(costs) for level, costs in sorted(kept.items())}, indent=1)
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
