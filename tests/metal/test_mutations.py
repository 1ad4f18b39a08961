"""Every barrier and every guard of the kernels matters: without it, the checks here fail."""

import mlx.core as mx
import numpy as np
import pytest

from dflash_mlx.metal import attention_source, quantized_rows
from dflash_mlx.metal.attention_kernel import AttentionKernel
from dflash_mlx.metal.quantized_rows import RowsKernel

from .cases import KERNEL_TOLERANCE, Case, by_definition, largest_error
from .emulator import EmulationError, Emulator, need_compiler
from .mutants import Guards
from .rows_cases import TOLERANCE, RowsCase, error_of

ATTENTION = Guards(
    {"block_attention": attention_source.ATTEND, "block_attention_merge": attention_source.MERGE},
    {
        "min(begin + part_length, context_length)": "begin + part_length",
        "min(KEYS, (in_block ? length : end) - at)": "KEYS",
        "bool seen = key < count;": "bool seen = true;",
        "part + 1 == int(threadgroups_per_grid.x) ?": "true ?",
        "(sees >> (at + key) & 1) != 0": "true",
        "context_length + i - (at + key) < window": "true",
        "score == LOWEST ? 0.0f :": "false ? 0.0f :",
        " * 1.44269504f, LOWEST)": " * 1.44269504f, -INFINITY)",
    },
    # One lane of four writes what all four hold.
    no_guard=frozenset({"at_column == 0"}),
)

ROWS = Guards(
    {"quantized_rows_few": quantized_rows.FEW, "quantized_rows_many": quantized_rows.MANY},
    {
        "min(first + o, outer - 1)": "(first + o)",
        "bool inside = k < inner;": "bool inside = true;",
        "bool inside = k < inner && output < outer;": "bool inside = k < inner;",
        " && first + o < outer": "",
        "m < rows && from + own": "from + own",
        "m < rows && output": "output",
        " && from + own < inner": "",
    },
    no_guard=frozenset({"BITS == 4"}),
)

ATTENTION_CASES = [
    Case(length=5, context_length=70, ratio=3, mask="tree"),
    Case(length=5, dim=80, context_length=70, ratio=3, window=20, kv_heads=2),
    Case(length=3, context_length=600, mask="causal", in_buffer=True, sinks=True),
]
# K and N are no multiples of what a threadgroup takes at a time.
ROWS_CASES = [RowsCase(3, 21, 3), RowsCase(13, 21, 3)]


def failure_of_attention(edit) -> str | None:
    """What the checks say of the kernel with edited source, or None."""
    for case in ATTENTION_CASES:
        call = case.arrays()
        try:
            out = AttentionKernel(Emulator(edit=edit).metal_kernel)(**call)
        except EmulationError as fault:
            assert "refused" not in str(fault), "the mutant does not compile"
            return str(fault)
        error = largest_error(out, by_definition(**call))
        if not error <= KERNEL_TOLERANCE[case.dtype]:
            return f"error {error}"
    blind = ATTENTION_CASES[0].arrays() | {"context_length": 0}
    blind["visible"] = mx.zeros((5, 5), dtype=mx.bool_)
    out = AttentionKernel(Emulator(edit=edit).metal_kernel)(**blind)
    return None if not np.array(out).any() else "rows that see nothing"


def failure_of_rows(edit) -> str | None:
    """The same of quantized_rows."""
    for case in ROWS_CASES:
        call = case.call()
        try:
            out = RowsKernel(Emulator(edit=edit).metal_kernel)(**call)
        except EmulationError as fault:
            assert "refused" not in str(fault), "the mutant does not compile"
            return str(fault)
        error = error_of(out, call)
        if not error <= TOLERANCE[case.dtype]:
            return f"error {error}"
    return None


@pytest.fixture(autouse=True, scope="module")
def compiler():
    need_compiler()


def test_unchanged_kernels_pass():
    assert failure_of_attention(None) is None and failure_of_rows(None) is None


def test_every_guard_is_among_the_mutants():
    ATTENTION.check_complete(barriers=2)
    ROWS.check_complete(barriers=2)


def each(guards: Guards):
    """A parameter for each mutant."""
    return [
        pytest.param(*m, id=f"{m[0]}-{guards.sources[m[0]][slice(*m[1])][:40]}")
        for m in guards.mutants()
    ]


@pytest.mark.parametrize(("name", "span", "without"), each(ATTENTION))
def test_deletion_from_attention_is_caught(name, span, without):
    assert failure_of_attention(ATTENTION.edit(name, span, without)) is not None


@pytest.mark.parametrize(("name", "span", "without"), each(ROWS))
def test_deletion_from_quantized_rows_is_caught(name, span, without):
    assert failure_of_rows(ROWS.edit(name, span, without)) is not None
