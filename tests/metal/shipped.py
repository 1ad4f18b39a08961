"""mlx-lm's kernels as shipped, loaded so that the emulator runs them."""

import importlib.util
from pathlib import Path
from types import ModuleType
from unittest import mock

import mlx.core as mx
import mlx_lm

from .emulator import Emulator


def load_shipped(module: str, emulator: Emulator) -> ModuleType:
    """A second copy of an mlx_lm module whose kernels are made by the emulator."""
    path = Path(mlx_lm.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    package = ".".join(["mlx_lm", *module.split(".")[:-1]])
    spec = importlib.util.spec_from_file_location(f"{package}._emulated_{path.stem}", path)
    assert spec and spec.loader
    copy = importlib.util.module_from_spec(spec)
    with (
        mock.patch.object(mx.fast, "metal_kernel", emulator.metal_kernel),
        mock.patch.object(mx.metal, "is_available", lambda: True),
    ):
        spec.loader.exec_module(copy)
    return copy
