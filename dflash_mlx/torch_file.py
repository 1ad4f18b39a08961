"""Tensors of a PyTorch file (`pytorch_model.bin`), read without PyTorch and without running code.

Such a file is a zip archive: a pickle that says how tensors lie in storages, and the storages as
plain bytes. The pickle may name only what is listed here; anything else is refused before it runs.
"""

import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dflash_mlx.errors import CheckpointError

_DTYPES: dict[str, tuple[str, mx.Dtype]] = {
    "FloatStorage": ("<f4", mx.float32),
    "HalfStorage": ("<f2", mx.float16),
    "BFloat16Storage": ("<u2", mx.bfloat16),
    "LongStorage": ("<i8", mx.int64),
    "IntStorage": ("<i4", mx.int32),
    "ByteStorage": ("|u1", mx.uint8),
    "BoolStorage": ("|b1", mx.bool_),
}
_MOST_PICKLE = 2**26  # bytes


@dataclass(frozen=True)
class _Kind:
    """Stands for a torch storage class."""

    name: str


@dataclass(frozen=True)
class _Tensor:
    """A tensor's place in a storage: the storage's key and kind, offset, shape and strides."""

    key: str
    kind: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2."""
    key, kind = storage
    return _Tensor(key, kind, offset, tuple(shape), tuple(strides))


def _parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    """Stands for torch._utils._rebuild_parameter."""
    return tensor


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _Kind(name)
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it would call {module}.{name}"[:120])
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        if not (isinstance(pid, tuple) and len(pid) == 5 and isinstance(pid[1], _Kind)):
            raise pickle.UnpicklingError("a storage is described in an unknown way")
        return str(pid[2]), pid[1].name


def read_torch_file(file: Path) -> dict[str, mx.array]:
    """All tensors of a file that holds a dictionary of them, or one, which is then named "".

    Raises:
        CheckpointError: it is damaged, of PyTorch's old kind, or more than tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (listing,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = listing.removesuffix("data.pkl")
            if archive.getinfo(listing).file_size > _MOST_PICKLE:
                raise ValueError("its list of tensors is too long")
            with archive.open(listing) as stream:
                found = _Unpickler(stream).load()
            if isinstance(found, _Tensor):
                found = {"": found}
            if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
                found = found["state_dict"]
            if not isinstance(found, dict) or not all(
                isinstance(name, str) and isinstance(t, _Tensor) for name, t in found.items()
            ):
                raise ValueError("it holds more than tensors by name")
            return {name: _array(archive, root, tensor) for name, tensor in found.items()}
    except (
        *(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError),
        *(pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError, RecursionError),
    ) as error:
        raise CheckpointError(
            f"{file} cannot be read as a PyTorch file ({str(error).rstrip('.')}); download it "
            "again, or convert it to safetensors with PyTorch."
        ) from error


def _array(archive: zipfile.ZipFile, root: str, tensor: _Tensor) -> mx.array:
    entry = archive.getinfo(f"{root}data/{tensor.key}")
    # As PyTorch writes them; a compressed entry could be larger than any memory.
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("a storage is compressed")
    stored, dtype = _DTYPES[tensor.kind]
    flat = np.frombuffer(archive.read(entry), stored)
    shape, strides = tensor.shape, tensor.strides
    numbers = (tensor.offset, *shape, *strides)
    if len(shape) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("a tensor's shape cannot be")
    last = tensor.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 in shape or last >= flat.size:
        raise ValueError("a tensor is longer than its storage")
    steps = [s * flat.itemsize for s in strides]
    whole = np.lib.stride_tricks.as_strided(flat[tensor.offset :], shape, steps, writeable=False)
    array = mx.array(np.ascontiguousarray(whole))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
