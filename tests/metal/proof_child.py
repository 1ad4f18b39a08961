"""A proof in a child process, with the emulator for a GPU and a kernel that behaves as asked.

`python -m tests.metal.proof_child BEHAVIOUR KEY [SECONDS]`, where Prover appends the last two.
"""

import os
import sys

from dflash_mlx.metal import plain_block_attention, proof
from dflash_mlx.metal.attention_kernel import AttentionKernel

from .emulator import Emulator

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
EDITS = {
    "wrong": ("- (at + key) < window", "- (at + key) <= window"),
    "infinite": ("scale * 1.44269504f", "scale * INFINITY"),
    "does-not-compile": ("row % length", "row % no_such_name"),
    "out-of-bounds": ("if (key < count)", "if (true)"),
    "hangs": (BARRIER, "while (true) { " + BARRIER + " }"),
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
        if name != "block_attention" or behaviour not in EDITS:
            return source
        assert EDITS[behaviour][0] in source
        return source.replace(*EDITS[behaviour])

    def twice_as_fast(attention, call):
        return 1.0 if attention is plain_block_attention else 0.5

    kernel = AttentionKernel(Emulator(orders=("forward",), edit=edit).metal_kernel)
    stopwatch = twice_as_fast if behaviour == "right" else None
    proof.main(list(arguments), kernel, stopwatch)


if __name__ == "__main__":
    main(*sys.argv[1:])
