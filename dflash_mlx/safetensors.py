"""Safetensors headers, checked whole before MLX reads a tensor.

The format: eight bytes of length, a JSON object {name: {dtype, shape, data_offsets}}, the data.
https://github.com/huggingface/safetensors#format
"""

import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dflash_mlx.errors import CheckpointError
from dflash_mlx.json_text import parse_json

# Bits of a number; MLX says itself which of them it can read.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_MOST_HEADER = 100_000_000  # bytes, as in the format's own library


class _Tensor(NamedTuple):
    name: str
    shape: list[int]
    start: int
    end: int


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes of a file's tensors, its header checked against itself and the file.

    Raises:
        CheckpointError: it is cut short, damaged or contradicts itself.
    """
    header, size = _header(file)
    tensors = sorted(
        (_tensor(file, name, entry) for name, entry in header.items() if name != "__metadata__"),
        key=lambda tensor: tensor.start,
    )
    for one, next_one in pairwise(tensor for tensor in tensors if tensor.start < tensor.end):
        if next_one.start < one.end:
            raise CheckpointError(
                f"{file} is damaged: its tensors {one.name!r} and {next_one.name!r} lie over each "
                "other; download it again."
            )
    if size != max((tensor.end for tensor in tensors), default=0):
        raise _damaged(file)
    return {tensor.name: tensor.shape for tensor in tensors}


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and the bytes of data behind it."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _MOST_HEADER):
                raise _damaged(file)
            header = parse_json(stream.read(length))
    except CheckpointError:
        raise
    except (OSError, struct.error, ValueError) as error:
        raise _damaged(file) from error
    if not isinstance(header, dict):
        raise _damaged(file)
    return header, size - 8 - length


def _tensor(file: Path, name: str, entry: Any) -> _Tensor:
    """A tensor of the header.

    Raises:
        CheckpointError: it makes no sense.
    """
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    about = f"{file} is damaged: its tensor {name!r}"
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(f"{about} has dtype {dtype!r}, which is none of safetensors'.")
    # MLX counts a tensor's sizes in 32 bits.
    if not _whole_numbers(shape) or any(n >= 2**31 for n in shape):
        raise CheckpointError(f"{about} has no shape that can be ({shape!r}); download it again.")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{about} has no data_offsets that can be; download it again.")
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * bits:
        raise CheckpointError(
            f"{about} takes {end - start} bytes where {dtype} {shape} needs "
            f"{math.prod(shape) * bits // 8}; download it again."
        )
    return _Tensor(name, shape, start, end)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _damaged(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or cut short; download it again.")
