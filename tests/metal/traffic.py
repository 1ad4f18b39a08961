"""How many bytes the attention kernel reads and writes, against the least it could.

`python -m tests.metal.traffic` prints the table.
"""

from dataclasses import dataclass

from dflash_mlx.metal.attention_kernel import AttentionKernel, context_parts, row_tiles
from dflash_mlx.metal.attention_plain import first_visible

from .cases import DTYPES, Case
from .emulator import Emulator


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
    """Prints one line for each case of TABLE."""
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


if __name__ == "__main__":
    main()
