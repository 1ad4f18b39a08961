"""The plain-MLX attention against the definition."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings

from dflash_mlx.metal import attention_plain, block_attention, plain_block_attention

from .cases import PLAIN_TOLERANCE, Case, by_definition, cases, largest_error


@settings(deadline=None, max_examples=150)
@given(cases(dims=(8, 32), dtypes=("float32", "float16", "bfloat16")))
@example(Case(length=1))
@example(Case(length=16, context_length=700, kv_heads=2, ratio=3, mask="causal", batch=2))
@example(Case(length=16, context_length=700, window=600, mask="tree"))
@example(Case(length=9, context_length=700, window=600))
@example(Case(length=5, context_length=30, context_start=30, window=3))
def test_agrees_with_the_definition(case):
    call = case.arrays()
    error = largest_error(block_attention(**call), by_definition(**call))
    assert error <= PLAIN_TOLERANCE[case.dtype], error


def test_without_mask_and_window_no_mask_is_built(monkeypatch):
    def refuse(*args):
        raise AssertionError("a mask was built")

    monkeypatch.setattr(attention_plain, "_window_mask", refuse)
    monkeypatch.setattr(mx, "ones", refuse)
    monkeypatch.setattr(mx, "where", refuse)
    for context_length in (0, 40, 600):
        call = Case(length=8, context_length=context_length).arrays()
        block_attention(**call)
        # A window that reaches every row's whole context cuts nothing.
        block_attention(**{**call, "window": context_length + 8})


@pytest.mark.parametrize("context_length", [20, 600])
def test_may_be_traced(context_length):
    # A mask that is kept from a traced call must serve the calls after it. No other test has
    # blocks of this length, so it is made here.
    call = Case(
        length=33, context_length=context_length, window=context_length - 5, mask="causal"
    ).arrays()
    arrays = {n: x for n, x in call.items() if isinstance(x, mx.array)}
    rest = {n: x for n, x in call.items() if n not in arrays}
    traced = mx.compile(lambda arrays: block_attention(**arrays, **rest))
    expected = by_definition(**call)
    for out in (traced(arrays), block_attention(**call), traced(arrays)):
        assert largest_error(out, expected) <= PLAIN_TOLERANCE["float32"]


@pytest.mark.parametrize("context_length", [20, 600])
def test_gradient_agrees_with_finite_differences(context_length):
    call = Case(
        length=4, dim=8, ratio=2, context_length=context_length, window=context_length, mask="tree"
    ).arrays()
    # The buffer's unused rows must be finite here: a gradient passes zeros through them.
    names = ["queries", "context_keys", "context_values", "block_keys", "block_values"]
    arrays = {n: mx.nan_to_num(call.pop(n)) for n in names}
    rest = {k: v for k, v in call.items() if k not in names}
    weight = mx.random.normal(arrays["queries"].shape, key=mx.random.key(1))

    def loss(arrays):
        return (plain_block_attention(**arrays, **rest) * weight).sum()

    gradients = mx.grad(loss)(arrays)
    for name in names:
        direction = mx.random.normal(arrays[name].shape, key=mx.random.key(2))
        step = 1e-2
        up, down = (
            loss({**arrays, name: arrays[name] + sign * step * direction}) for sign in (1, -1)
        )
        expected = (up - down).item() / (2 * step)
        assert np.isclose(
            (gradients[name] * direction).sum().item(), expected, rtol=2e-2, atol=2e-2
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_length": 60}, "rows"),
        ({"visible": mx.ones((3, 3), dtype=mx.bool_)}, "visible"),
        ({"visible": mx.ones((4, 4))}, "boolean"),
        ({"block_values": None}, "both"),
        ({"block_keys": mx.zeros((1, 2, 5, 64))}, "Block"),
        ({"context_values": mx.zeros((1, 2, 5, 64))}, "Context"),
        ({"queries": mx.zeros((1, 3, 4, 64))}, "heads"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    call = Case(length=4, kv_heads=2, ratio=2, context_length=10).arrays()
    with pytest.raises(ValueError, match=message):
        block_attention(**{**call, **change})
