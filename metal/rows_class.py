"""The shape classes of a few rows times a quantized matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from .quantized_rows import BITS, GROUP_SIZES, plain_quantized_rows
from .shape_class import DTYPE_NAMES, Call, Implementation, dtype_name, key_numbers

# Buckets of rows, first and last: none has rows of both kernels.
ROWS = ((2, 3), (4, 5), (6, 8), (9, 12), (13, 16))
# Upper ends of the buckets of sizes; the last one is open. What MLX does changes at 4096.
OUTPUTS = (4096, 8192, 16384, 65536)
INNER = (1024, 2048, 4096, 8192, 16384)
# A smaller matrix is over before a call of its own has paid for the host's time.
MIN_OUTPUTS, MIN_INNER = 4096, 512

# A matrix is timed among so many others that the chip's caches cannot hold them.
_TIMED_BYTES, _TIMED_MATRICES = 128 * 2**20, 8


@dataclass(frozen=True)
class RowsClass:
    """One class of calls: a bucket of rows, named by its last, and sizes up to N and K."""

    kernel: ClassVar[str] = "quantized_rows"
    use: ClassVar[str] = "rows"

    dtype: str
    rows: int
    outputs: int
    inner: int
    group_size: int
    bits: int

    @property
    def key(self) -> str:
        """The name under which its verdict is kept."""
        sizes = f"m{self.rows}-n{self.outputs}-k{self.inner}-g{self.group_size}-b{self.bits}"
        return f"{self.use}-{self.dtype}-{sizes}"

    def trials(self) -> Iterator[Call]:
        """Every number of rows, at sizes that are even and ragged for the kernel and for MLX."""
        first = next(first for first, last in ROWS if last == self.rows)
        for rows in range(first, self.rows + 1):
            yield self.call(rows, 72, self.inner, seed=rows)
            yield self.call(rows, 101, self.inner - self.group_size, seed=rows)
        yield self.call(self.rows, self.outputs, self.inner, seed=0)

    def timed(self) -> Iterator[list[Call]]:
        """Its fewest rows and its most, each by a series of matrices."""
        size = self.outputs * self.inner * self.bits // 8
        count = max(1, min(_TIMED_MATRICES, -(-_TIMED_BYTES // size)))
        for rows in next(bucket for bucket in ROWS if bucket[1] == self.rows):
            yield [self.call(rows, self.outputs, self.inner, seed) for seed in range(count)]

    def plain(self, **call: Any) -> mx.array:
        """What runs where the kernel does not."""
        return plain_quantized_rows(**call)

    def bit_equal(self, kernel: Implementation) -> bool | None:
        """Whether every row is, at the class's own size."""
        call = self.call(self.rows, self.outputs, self.inner, seed=0)
        together = kernel(**call)
        alone = [self.plain(**{**call, "x": call["x"][i : i + 1]}) for i in range(self.rows)]
        return bool(mx.array_equal(together, mx.concatenate(alone)).item())

    def call(self, rows: int, outputs: int, inner: int, seed: int) -> Call:
        """Keyword arguments of quantized_rows with random arrays; results are of order one."""
        keys = mx.random.split(mx.random.key(seed), 3)
        dtype = DTYPE_NAMES[self.dtype]
        words = (outputs, inner * self.bits // 32)
        # Integers spread evenly over 0 ... 2^bits - 1 deviate by 2^bits / sqrt(12).
        groups = (outputs, inner // self.group_size)
        spread = mx.random.uniform(0.5, 1.5, groups, key=keys[1]) * 12**0.5 / 2**self.bits
        return {
            "x": (mx.random.normal((rows, inner), key=keys[2]) * inner**-0.5).astype(dtype),
            "w": mx.random.randint(-(2**31), 2**31 - 1, words, mx.int32, keys[0]).view(mx.uint32),
            "scales": spread.astype(dtype),
            "biases": (spread * -(2 ** (self.bits - 1))).astype(dtype),
            "group_size": self.group_size,
            "bits": self.bits,
        }


def rows_class(
    dtype: mx.Dtype, rows: int, outputs: int, inner: int, group_size: int, bits: int
) -> RowsClass | None:
    """The class of a supported call; None if it is too small to gain."""
    if outputs < MIN_OUTPUTS or inner < MIN_INNER:
        return None
    return RowsClass(
        dtype=dtype_name(dtype),
        rows=next(last for _, last in ROWS if rows <= last),
        outputs=next((n for n in OUTPUTS if outputs <= n), OUTPUTS[-1]),
        inner=next((k for k in INNER if inner <= k), INNER[-1]),
        group_size=group_size,
        bits=bits,
    )


def parse(fields: list[str]) -> RowsClass | None:
    """The class whose key has these fields; None if it is not of quantized_rows."""
    numbers = key_numbers(fields[2:], "mnkgb")
    if numbers is None or fields[0] != RowsClass.use or fields[1] not in DTYPE_NAMES:
        return None
    rows, outputs, inner, group_size, bits = numbers
    known = group_size in GROUP_SIZES and bits in BITS and rows in (last for _, last in ROWS)
    if not known or outputs not in OUTPUTS or inner not in INNER:
        return None
    return RowsClass(fields[1], rows, outputs, inner, group_size, bits)
