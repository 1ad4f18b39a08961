"""How many bytes the kernels read and write, against the least they could.

`python -m tests.tools.traffic` prints the tables.
"""

from dataclasses import dataclass

from dflash_mlx.metal.attention_kernel import AttentionKernel, context_parts, row_tiles
from dflash_mlx.metal.attention_plain import first_visible
from dflash_mlx.metal.quantized_rows import MAX_ROWS, MIN_ROWS, RowsKernel
from tests.metal.cases import DTYPES, Case
from tests.metal.emulator import Emulator
from tests.metal.rows_cases import RowsCase


@dataclass(frozen=True)
class Traffic:
    """Bytes of device memory for one call, by what they are."""

    context: int  # read from the context buffers
    least: int  # every visible context element once for each KV head
    rest: int  # queries, block, result, and the parts written and read again

    @property
    def ratio(self) -> float:
        """Context bytes read as a multiple of the least."""
        return self.context / self.least


def measure(case: Case) -> Traffic:
    """Counts the bytes of one call of the kernel, emulated."""
    emulator = Emulator(orders=("forward",))
    AttentionKernel(emulator.metal_kernel)(**case.arrays())
    small = {"visible", "extent", "scale"}
    context = rest = 0
    for (_, name), (read, written) in emulator.traffic.items():
        if name.startswith("context_") and "_s" not in name:
            context += read
        elif name not in small and not name.endswith(("_shape", "_strides")):
            rest += read + written
    element = DTYPES[case.dtype].size
    least = 2 * case.batch * case.kv_heads * _seen(case) * case.dim * element
    return Traffic(context, least, rest)


def _seen(case: Case) -> int:
    first = first_visible(case.context_length, case.context_start, case.window)
    return case.context_length - first


@dataclass(frozen=True)
class RowsTraffic:
    """Bytes of device memory for one call of quantized_rows."""

    matrix: int  # read of weights, scales and biases
    least: int  # all of them once
    rest: int  # x, and the result

    @property
    def passes(self) -> float:
        """How often the matrix is read."""
        return self.matrix / self.least


def measure_rows(case: RowsCase) -> RowsTraffic:
    """Counts the bytes of one call of quantized_rows, emulated."""
    emulator, call = Emulator(orders=("forward",)), case.call()
    RowsKernel(emulator.metal_kernel)(**call)
    matrix = rest = 0
    for (_, name), (read, written) in emulator.traffic.items():
        if name in ("w", "scales", "biases"):
            matrix += read
        elif name in ("x", "out"):
            rest += read + written
    least = sum(call[name].nbytes for name in ("w", "scales", "biases"))
    return RowsTraffic(matrix, least, rest)


def passes_of_mlx(rows: int) -> tuple[int, int]:
    """How often MLX 0.32.4 reads an affine 4-bit matrix for so many rows, at least 2.

    Computed from its tiling, for sizes above 4096 on a chip without a d in its name. First for
    M1 and M2: `qmv` once a row, from 6 rows on `qmm_t` in tiles of 32 rows. Then for M3 and M4:
    `qmv_wide` in tiles of 5 rows, from 13 rows on `qmm_t`.
    """
    return rows if rows < 6 else -(-rows // 32), -(-rows // 5) if rows < 13 else -(-rows // 32)


TABLE = [
    Case(length=16, ratio=4, dim=128, kv_heads=8, context_length=4096, dtype="bfloat16"),
    Case(length=16, ratio=4, dim=128, kv_heads=8, context_length=1024, dtype="bfloat16"),
    Case(length=16, ratio=4, dim=128, kv_heads=8, context_length=4096, dtype="float32"),
    Case(length=16, ratio=4, dim=128, kv_heads=2, context_length=4096, dtype="bfloat16"),
    Case(length=8, ratio=4, dim=128, kv_heads=8, context_length=4096, dtype="bfloat16"),
    Case(length=5, ratio=6, dim=256, kv_heads=4, context_length=4096, dtype="bfloat16"),
    Case(length=16, ratio=8, dim=64, kv_heads=8, context_length=4096, dtype="bfloat16"),
    Case(16, 128, 8, 4, context_length=4096, window=2048, dtype="bfloat16"),
]


def main() -> None:
    """Prints a line for each case of TABLE, then one for each number of rows."""
    print("Device memory in KB: what of the context is read, the least, and all else.")
    print("   S  window   L  GQA    D  KV dtype     tiles parts  context  least  ratio   rest")
    for case in TABLE:
        t = measure(case)
        tiles, _ = row_tiles(case.ratio * case.length)
        parts, _ = context_parts(_seen(case), tiles * case.kv_heads)
        print(
            f"{case.context_length:4} {case.window or '-':>7} {case.length:3} {case.ratio:4}"
            f" {case.dim:4} {case.kv_heads:3} {case.dtype:9} {tiles:5} {parts:5}"
            f" {t.context // 1024:8} {t.least // 1024:6} {t.ratio:6.3f} {t.rest // 1024:6}",
            flush=True,
        )
    print("\nPasses over a 4-bit matrix (bfloat16, groups of 64, N 256, K 1024) for M rows: what")
    print("quantized_rows reads, counted; what MLX reads, computed from its tiling: see")
    print("passes_of_mlx. qmm_t reads once, for 32 rows' worth of arithmetic.")
    print("  M quantized_rows  MLX on M1, M2  on M3, M4  matrix KB  x and result KB")
    for rows in range(MIN_ROWS, MAX_ROWS + 1):
        t = measure_rows(RowsCase(rows, 256, 16, dtype="bfloat16"))
        older, newer = passes_of_mlx(rows)
        print(
            f"{rows:3} {t.passes:14.3f} {older:14} {newer:10} {t.matrix // 1024:10}"
            f" {t.rest // 1024:16}",
            flush=True,
        )


if __name__ == "__main__":
    main()
