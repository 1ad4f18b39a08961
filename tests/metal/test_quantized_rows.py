"""The kernel of a few rows times a quantized matrix, emulated, against the definition."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings

from dflash_mlx.metal.quantized_rows import (
    BITS,
    DTYPES,
    GROUP_SIZES,
    MAX_FEW,
    MAX_ROWS,
    MIN_ROWS,
    RowsKernel,
    plain_quantized_rows,
    supported,
)
from tests.tools import traffic

from .cases import DTYPES as DTYPE_NAMES
from .emulator import Emulator, need_compiler
from .rows_cases import TOLERANCE, RowsCase, error_of, in_order_of_one_row, rows_cases

EVERY_ROWS = range(MIN_ROWS, MAX_ROWS + 1)


@pytest.fixture(autouse=True, scope="module")
def compiler():
    need_compiler()


def check(case: RowsCase, orders=("forward", "reverse", "random")) -> None:
    call = case.call()
    out = RowsKernel(Emulator(orders).metal_kernel)(**call)
    assert out.dtype == call["x"].dtype and out.shape == (case.rows, case.outputs)
    error = error_of(out, call)
    assert error <= TOLERANCE[case.dtype], error
    if case.dtype == "float32":  # in 16 bits, MLX's CPU backend rounds every sum
        assert error_of(plain_quantized_rows(**call), call) <= TOLERANCE[case.dtype]


@settings(deadline=None, max_examples=40)
@given(rows_cases())
@example(RowsCase(2, 8, 1, group_size=32))  # fewer scales than MLX puts into device memory: 8
@example(RowsCase(16, 7, 1, group_size=32, bits=8))
@example(RowsCase(5, 16, 8, group_size=64))  # K = 512: two words a lane
def test_agrees_with_the_definition(case):
    check(case)


@pytest.mark.parametrize("rows", EVERY_ROWS)
def test_every_number_of_rows(rows):
    check(RowsCase(rows, outputs=37, groups=5, dtype="bfloat16", seed=rows), ("random",))


@pytest.mark.parametrize(("dtype", "group"), product(DTYPE_NAMES, GROUP_SIZES))
def test_every_dtype_and_group(dtype, group):
    for rows, bits in ((3, 4), (4, 8), (7, 8), (12, 4)):
        check(RowsCase(rows, 41, 3, group, bits, dtype), ("forward",))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "group", "bits"), product(DTYPE_NAMES, GROUP_SIZES, BITS))
def test_every_combination(dtype, group, bits):
    for rows in EVERY_ROWS:
        for outputs, groups in ((24, 1024 // group), (43, 1 + rows % 7)):
            check(RowsCase(rows, outputs, groups, group, bits, dtype, seed=rows), ("reverse",))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(16, 16), (16, 11), (13, 16)])  # even for MLX, or not
def test_few_rows_are_added_in_the_order_of_one(bits, shape):
    outputs, groups = shape
    for rows in range(MIN_ROWS, MAX_FEW + 1):
        call = RowsCase(rows, outputs, groups, bits=bits).call()
        out = RowsKernel(Emulator(("forward",)).metal_kernel)(**call)
        assert np.array_equal(np.array(out), in_order_of_one_row(call))


def test_a_row_does_not_hang_on_the_rows_beside_it():
    for least, most in ((MIN_ROWS, MAX_FEW), (MAX_FEW + 1, MAX_ROWS)):
        call = RowsCase(most, outputs=40, groups=6).call()
        kernel = RowsKernel(Emulator(("forward",)).metal_kernel)
        assert mx.array_equal(kernel(**call)[:least], kernel(**{**call, "x": call["x"][:least]}))


def test_what_is_no_number_stays_in_its_row():
    for rows in (4, 14):
        call = RowsCase(rows, outputs=16, groups=3).call()
        call["x"][1, 5] = float("nan")
        out = np.array(RowsKernel(Emulator().metal_kernel)(**call))
        assert np.isnan(out[1]).all()
        assert np.isfinite(np.delete(out, 1, axis=0)).all()


@pytest.mark.parametrize("rows", EVERY_ROWS)
def test_the_matrix_is_read_once(rows):
    for group, bits in ((32, 4), (64, 4), (128, 8)):
        measured = traffic.measure_rows(RowsCase(rows, 64, 1024 // group, group, bits, "bfloat16"))
        assert 1 <= measured.passes <= 1.05, measured


def test_what_is_taken():
    def takes(dtype=mx.float16, scales=mx.float16, biases=mx.float16, **change):
        kind = {"group_size": 64, "bits": 4, "mode": "affine"} | change
        other = None if biases is None else mx.zeros((8, 1), biases)
        return supported(dtype, mx.zeros((8, 1), scales), other, **kind)

    assert all(takes(dtype=d, scales=d, biases=d) for d in DTYPES)
    assert not takes(dtype=mx.float32) and not takes(biases=None)
    assert not takes(mode="mxfp4") and not takes(bits=3) and not takes(group_size=16)
