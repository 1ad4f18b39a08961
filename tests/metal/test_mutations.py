"""Every barrier and every guard of the kernels matters: without it, the checks here fail."""

import re

import mlx.core as mx
import numpy as np
import pytest

from dflash_mlx.metal import attention_source
from dflash_mlx.metal.attention_kernel import AttentionKernel

from .cases import KERNEL_TOLERANCE, Case, by_definition, largest_error
from .emulator import EmulationError, Emulator, need_compiler

SOURCES = {
    "block_attention": attention_source.ATTEND,
    "block_attention_merge": attention_source.MERGE,
}

# What a guard looks like, and the same without it. The first two find every barrier and every
# condition; the rest are the guards that are written as expressions.
BARRIER = r"threadgroup_barrier\([^)]*\);"
CONDITION = r"\bif \(([^{]*)\) \{"
EXPRESSIONS = {
    "min(begin + part_length, context_length)": "begin + part_length",
    "min(KEYS, (in_block ? length : end) - at)": "KEYS",
    "bool seen = key < count;": "bool seen = true;",
    "part + 1 == int(threadgroups_per_grid.x) ?": "true ?",
    "(sees >> (at + key) & 1) != 0": "true",
    "context_length + i - (at + key) < window": "true",
    "score == LOWEST ? 0.0f :": "false ? 0.0f :",
    "total == 0.0f ?": "false ?",
}

# Conditions that guard no bounds: one lane of four writes what all four hold.
NO_GUARD = {"at_column == 0"}

CASES = [
    Case(length=5, context_length=70, ratio=3, mask="tree"),
    Case(length=5, dim=80, context_length=70, ratio=3, window=20, kv_heads=2),
    Case(length=3, context_length=600, mask="causal", in_buffer=True),
]


def mutants():
    for name, source in SOURCES.items():
        for match in re.finditer(BARRIER, source):
            yield name, match.span(), ";"
        for match in re.finditer(CONDITION, source):
            if match[1] not in NO_GUARD:
                yield name, match.span(), "if (true) {"
        for text, without in EXPRESSIONS.items():
            for match in re.finditer(re.escape(text), source):
                yield name, match.span(), without


def failure(edit) -> str | None:
    """What the checks say of the kernel with edited source, or None."""
    for case in CASES:
        call = case.arrays()
        try:
            out = AttentionKernel(Emulator(edit=edit).metal_kernel)(**call)
        except EmulationError as fault:
            assert "refused" not in str(fault), "the mutant does not compile"
            return str(fault)
        error = largest_error(out, by_definition(**call))
        if not error <= KERNEL_TOLERANCE[case.dtype]:
            return f"error {error}"
    blind = CASES[0].arrays() | {"context_length": 0}
    blind["visible"] = mx.zeros((5, 5), dtype=mx.bool_)
    out = AttentionKernel(Emulator(edit=edit).metal_kernel)(**blind)
    return None if not np.array(out).any() else "rows that see nothing"


@pytest.fixture(autouse=True, scope="module")
def compiler():
    need_compiler()


def test_unchanged_kernels_pass():
    assert failure(None) is None


def test_every_guard_is_among_the_mutants():
    found = list(mutants())
    barriers = sum(source.count("_barrier(") for source in SOURCES.values())
    assert sum(1 for *_, without in found if without == ";") == barriers == 2
    conditions = sum(len(re.findall(r"\bif \(", source)) for source in SOURCES.values())
    guarded = sum(1 for *_, without in found if without.startswith("if"))
    assert guarded == conditions - len(NO_GUARD)
    for text in EXPRESSIONS:
        assert any(text in source for source in SOURCES.values()), text


@pytest.mark.parametrize(
    ("name", "span", "without"),
    [pytest.param(*m, id=f"{m[0]}-{SOURCES[m[0]][slice(*m[1])][:40]}") for m in mutants()],
)
def test_deletion_is_caught(name, span, without):
    def edit(kernel, source):
        if kernel != name:
            return source
        return source[: span[0]] + without + source[span[1] :]

    assert failure(edit) is not None
