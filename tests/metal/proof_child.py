"""A proof in a child process, with the emulator for a GPU and a kernel that behaves as asked.

`python -m tests.metal.proof_child BEHAVIOUR KEY [SECONDS]`, where Prover appends the last two.
"""

import os
import sys

from dflash_mlx.metal import proof

from .emulator import Emulator

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
EDITED = ("block_attention", "quantized_rows_many")
# For each behaviour, of a kernel's text the first that is in it, and what to put there.
EDITS = {
    "wrong": [
        ("- (at + key) < window", "- (at + key) <= window"),
        ("scale + bias", "scale + bias * 0.99f"),
    ],
    "infinite": [("scale * 1.44269504f", "scale * INFINITY"), ("scale + bias", "scale / 0.0f")],
    "does-not-compile": [
        ("row % length", "row % no_such_name"),
        ("int nth = own", "int nth = no_such_name"),
    ],
    "out-of-bounds": [
        ("if (key < count)", "if (true)"),
        ("bool inside = k < inner", "bool inside = true"),
    ],
    "hangs": [(BARRIER, "while (true) { " + BARRIER + " }")],
}


def main(behaviour: str, *arguments: str) -> None:
    """Prove the class with a kernel of that behaviour."""
    if behaviour == "crashes":
        sys.stderr.write("a message from below\n")
        sys.stderr.flush()
        os.abort()
    if behaviour == "babbles":
        print("no verdict at all")
        return

    def edit(name: str, source: str) -> str:
        if name not in EDITED or behaviour not in EDITS:
            return source
        text, instead = next(e for e in EDITS[behaviour] if e[0] in source)
        return source.replace(text, instead)

    def twice_as_fast(kernel):
        return lambda run, calls: 0.5 if run is kernel else 1.0

    make = Emulator(orders=("forward",), edit=edit).metal_kernel
    stopwatch = {"right": twice_as_fast, "faster-at-first": Tiring}.get(behaviour, lambda _: None)
    proof.main(list(arguments), make, stopwatch, load_seconds=0.01)


class Tiring:
    """A stopwatch by which the kernel is faster in its first calls and slower from then on."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, 0

    def __call__(self, run, calls):
        self.calls += 1
        return 1.0 if run is not self.kernel else 0.5 if self.calls < 15 else 1.2


if __name__ == "__main__":
    main(*sys.argv[1:])
