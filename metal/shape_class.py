"""Shape classes: calls of a kernel alike enough that one proof and one verdict serve them all."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import mlx.core as mx

Call = dict[str, Any]  # keyword arguments of the kernel
Implementation = Callable[..., mx.array]


class ShapeClass(Protocol):
    """What selection, prover and proof know of a class of calls.

    Classes are immutable, and equal where their keys are.
    """

    kernel: ClassVar[str]  # its name in catalogue.KERNELS

    @property
    def use(self) -> str:
        """What the kernel is used for, the first word of the key."""
        ...

    @property
    def key(self) -> str:
        """The name under which its verdict is kept."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype of its calls, as DTYPE_NAMES has it."""
        ...

    def trials(self) -> Iterator[Call]:
        """Random calls, with results of order one, that try all that the class may need."""
        ...

    def timed(self) -> Iterator[list[Call]]:
        """The calls by which the class is timed: in every list, calls of one size.

        There are several in a list where one alone could be served from a cache that no real
        decoding would find filled.
        """
        ...

    def plain(self, **call: Any) -> mx.array:
        """What runs where the kernel does not."""
        ...

    def bit_equal(self, kernel: Implementation) -> bool | None:
        """Whether a row of the kernel has the very bits of MLX's result for that row alone.

        None where nobody asks.
        """
        ...


DTYPE_NAMES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of a dtype in keys."""
    return str(dtype).removeprefix("mlx.core.")


def key_numbers(fields: list[str], letters: str) -> list[int] | None:
    """The numbers of fields such as d128 and l8, if these are their letters."""
    if len(fields) == len(letters) and all(
        f[:1] == c and f[1:].isdigit() for f, c in zip(fields, letters, strict=True)
    ):
        return [int(f[1:]) for f in fields]
    return None
