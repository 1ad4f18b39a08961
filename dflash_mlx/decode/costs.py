"""Where the costs of a pair on this machine are kept."""

import hashlib
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dflash_mlx.machine import cache_directory, chip, versions


def costs_file(target: nn.Module, draft: nn.Module) -> Path:
    """A file for each machine, its versions and its BLAS library, and the pair's shapes."""
    about = [chip(), str(mx.default_device()), *blas()]
    about += versions().values()
    for model in (target, draft):
        arrays = dict(tree_flatten(model.parameters()))
        about += [f"{name} {a.shape} {a.dtype}" for name, a in arrays.items()]
    name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:24]
    return cache_directory() / "costs" / f"{name}.json"


def blas() -> list[str]:
    """The names of the BLAS libraries in this process, which one may preload over MLX's own.

    Empty where the system does not say; on macOS there is only Accelerate.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return sorted(set(re.findall(r"/([^/\n]*(?:blas|mkl)[^/\n]*\.so[^/\n]*)$", maps, re.M | re.I)))
