"""Every kernel by name, and every shape class by key."""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

from . import attention_class, attention_kernel, quantized_rows, rows_class
from .attention_kernel import AttentionKernel
from .quantized_rows import RowsKernel
from .shape_class import Implementation, ShapeClass

# By name: the wrapper, made with mx.fast.metal_kernel or what stands in for it.
KERNELS: dict[str, Callable[[Callable[..., Any]], Implementation]] = {
    "block_attention": AttentionKernel,
    "quantized_rows": RowsKernel,
}
# What they are used for, as the first word of a key says it.
USES = {
    "draft": "draft's attention",
    "verify": "verify's attention",
    "rows": "verify's quantized products",
}


def parse(key: str) -> ShapeClass:
    """The class with this key.

    Raises:
        ValueError: there is none.
    """
    fields = key.split("-")
    found = attention_class.parse(fields) or rows_class.parse(fields)
    if found is None:
        raise ValueError(f"{key!r} is not the key of a shape class.")
    return found


@cache
def fingerprint() -> str:
    """A few digits that change with the text of any kernel."""
    source = attention_kernel.SOURCE + quantized_rows.SOURCE
    return hashlib.sha256(source.encode()).hexdigest()[:12]
