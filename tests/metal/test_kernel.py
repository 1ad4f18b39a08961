"""The attention kernel, emulated, against the definition in float64."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dflash_mlx.metal.attention_kernel import (
    DTYPES,
    HEAD_DIMS,
    AttentionKernel,
    context_parts,
    row_tiles,
    supported,
    visible_bits,
)
from tests.tools import traffic

from .cases import KERNEL_TOLERANCE, Case, by_definition, cases, largest_error
from .emulator import Emulator, need_compiler


@pytest.fixture(autouse=True, scope="module")
def compiler():
    need_compiler()


def check(case: Case, orders=("forward", "reverse", "random")) -> None:
    call = case.arrays()
    out = AttentionKernel(Emulator(orders).metal_kernel)(**call)
    assert out.dtype == call["queries"].dtype
    error = largest_error(out, by_definition(**call))
    assert error <= KERNEL_TOLERANCE[case.dtype], error


@settings(deadline=None, max_examples=50)
@given(cases(dims=(32, 80), dtypes=("float32", "bfloat16"), max_context=150))
@example(Case(length=1))
@example(Case(length=7, dim=128, ratio=4, context_length=1000, dtype="bfloat16"))
@example(Case(length=16, ratio=2, context_length=600, window=300, mask="causal"))
@example(Case(length=5, context_length=30, context_start=30, window=3, in_buffer=True))
@example(Case(length=32, dim=32, ratio=8, context_length=64, mask="tree", batch=2))
def test_agrees_with_the_definition(case):
    check(case)


def test_scores_far_apart():
    # The running maximum moves by hundreds, within a part and between parts.
    call = Case(length=9, dim=32, ratio=2, context_length=700, mask="tree", spread=100).arrays()
    call["context_keys"] *= mx.linspace(0.1, 3, call["context_keys"].shape[2])[:, None]
    out = AttentionKernel(Emulator().metal_kernel)(**call)
    assert largest_error(out, by_definition(**call)) <= 1e-3


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_head_size_and_dtype(dim, dtype):
    check(
        Case(length=11, dim=dim, ratio=3, context_length=70, window=64, mask="tree", dtype=dtype),
        orders=("forward",),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_length(dim, dtype):
    for length in range(1, 33):
        case = Case(
            length=length,
            dim=dim,
            kv_heads=1 + length % 2,
            ratio=1 + length % 5,
            context_length=37 * length % 120,
            context_start=length % 7,
            window=None if length % 3 else 40,
            mask=("none", "causal", "tree")[length % 3],
            in_buffer=length % 4 == 0,
            dtype=dtype,
        )
        check(case, orders=("reverse",))


@pytest.mark.slow
@settings(deadline=None, max_examples=250)
@given(cases(dims=(64, 128), dtypes=("float32", "float16", "bfloat16"), max_context=900))
def test_agrees_with_the_definition_at_length(case):
    check(case)


def test_buffers_with_any_strides_are_read_in_place():
    call = Case(length=6, kv_heads=2, ratio=2, context_length=50, window=30).arrays()
    expected = by_definition(**call)
    for name in ("queries", "context_keys", "context_values", "block_keys"):
        call[name] = mx.contiguous(call[name].transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    call["block_values"] = mx.contiguous(call["block_values"].transpose(0, 1, 3, 2))
    call["block_values"] = call["block_values"].transpose(0, 1, 3, 2)
    out = AttentionKernel(Emulator().metal_kernel)(**call)
    assert largest_error(out, expected) <= KERNEL_TOLERANCE["float32"]


def test_a_row_that_sees_nothing_gives_zeros():
    call = Case(length=4, context_length=0, ratio=2).arrays()
    call["visible"] = mx.array(np.diag([True, False, True, False]))
    out = np.array(AttentionKernel(Emulator().metal_kernel)(**call))
    assert not out[:, :, [1, 3]].any() and out[:, :, [0, 2]].all()


def test_what_is_no_number_stays_so_in_its_row_alone():
    call = Case(length=4, context_length=600, ratio=2).arrays()
    call["queries"][0, 1, 2] = float("nan")
    out = np.array(AttentionKernel(Emulator().metal_kernel)(**call))
    assert np.isnan(out[0, 1, 2]).all()
    out[0, 1, 2] = 0
    assert np.isfinite(out).all()


def test_context_traffic_is_the_least():
    case = Case(length=16, dim=128, ratio=4, context_length=4096, dtype="bfloat16")
    measured = traffic.measure(case)
    assert measured.least == 2 * 4096 * 128 * 2
    assert 1 <= measured.ratio <= 1.1


def test_two_row_tiles_read_the_context_twice():
    measured = traffic.measure(Case(length=32, ratio=3, context_length=64))
    assert measured.ratio == 2


@given(st.integers(1, 1000))
def test_row_tiles_cover_the_rows(rows):
    tiles, simdgroups = row_tiles(rows)
    assert simdgroups * 8 <= 64
    assert tiles * simdgroups * 8 >= rows
    assert tiles == -(-rows // 64)


@given(st.integers(0, 100_000), st.integers(1, 500))
def test_context_parts_cover_the_context_and_none_is_empty(seen, threadgroups):
    parts, length = context_parts(seen, threadgroups)
    assert parts * length >= seen
    assert parts == 1 or (parts - 1) * length < seen


@given(st.integers(1, 32), st.integers(0, 2**20))
def test_visible_bits(length, seed):
    mask = np.random.default_rng(seed).random((length, length)) < 0.5
    bits = visible_bits(mx.array(mask))
    assert bits.dtype == mx.uint32 and bits.shape == (max(length, 8),)
    for i in range(length):
        assert int(bits[i].item()) == sum(1 << j for j in range(length) if mask[i, j])


@pytest.mark.parametrize("dtype", DTYPES)
def test_supported_shapes(dtype):
    def queries(length=16, dim=128, dtype=dtype):
        return mx.zeros((1, 4, length, dim), dtype=dtype)

    assert supported(queries(), queries(), None)
    assert supported(queries(length=32)) and not supported(queries(length=33))
    assert not supported(queries(dim=48))
    assert not supported(queries(), queries(dtype=mx.int32))
    assert not supported(queries(dtype=mx.int32))
