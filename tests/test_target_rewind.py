"""Whole prompt caches taken back to a prefix: exact, or refused with the cache untouched."""

import mlx.core as mx
import pytest

from dflash_mlx.errors import InvalidCache, UnsupportedTarget
from dflash_mlx.target import can_rewind, restore, rewind, snapshot

from .families import drive
from .families.configs import WINDOW

KINDS = ["llama", "deepseek_v32", "llama4", "gpt_oss", "qwen3_5", "falcon_h1", "deepseek_v41"]
WINDOWED = {"llama4", "gpt_oss"}
RECURRENT = {"qwen3_5", "falcon_h1", "deepseek_v41"}


def run(family: str, tokens: list[int], cache: list, chunk: int) -> mx.array:
    """Feed tokens in chunks; the last position's logits [V]."""
    model = drive.model_of(family)
    for at in range(0, len(tokens), chunk):
        logits = model(mx.array([tokens[at : at + chunk]]), cache=cache)
    return logits[0, -1]


def fresh(family: str, tokens: list[int]) -> mx.array:
    return run(family, tokens, drive.view_of(family).make_cache(), len(tokens))


def assert_same(a: mx.array, b: mx.array) -> None:
    assert drive.gap(a, b) < 1e-4


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("family", KINDS)
def test_rewind_is_exact_or_refused(family: str, chunk: int) -> None:
    prompt = drive.prompt_of("long")
    for length in (WINDOW - 4, len(prompt)):
        for keep in (1, WINDOW - 5, length - 1, length):
            cache = drive.view_of(family).make_cache()
            before = run(family, prompt[:length], cache, chunk)
            allowed = can_rewind(cache, keep)
            if family in RECURRENT:
                assert not allowed
            if family == "llama" or (family in WINDOWED and length < WINDOW):
                assert allowed and can_rewind(cache)
            if family in WINDOWED and length > WINDOW:
                assert not can_rewind(cache)
            if allowed:
                rewind(cache, keep)
                for step in (3, 1, 5):  # a window must survive any order of calls
                    kept = prompt[:keep] + [7] * step
                    assert_same(run(family, [7] * step, cache, step), fresh(family, kept))
                    if not can_rewind(cache, keep):
                        break
                    rewind(cache, keep)
            else:
                with pytest.raises(InvalidCache):
                    rewind(cache, keep)
                after = run(family, [7], cache, 1)
                assert_same(after, fresh(family, [*prompt[:length], 7]))
                assert before.shape == after.shape


def test_a_full_window_is_not_rewound_when_it_has_turned() -> None:
    cache = drive.view_of("gpt_oss").make_cache()
    run("gpt_oss", drive.prompt_of("long"), cache, 1)
    assert not can_rewind(cache, 35)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("family", KINDS)
def test_a_snapshot_is_restored_exactly_more_than_once(family: str, chunk: int) -> None:
    prompt = drive.prompt_of("long")
    for length in (WINDOW - 4, len(prompt)):
        cache = drive.view_of(family).make_cache()
        run(family, prompt[:length], cache, chunk)
        moment = snapshot(cache)
        for turn in ([5, 6, 7], [8] * (WINDOW + 3), [9]):
            after = run(family, turn, cache, chunk)
            assert_same(after, fresh(family, prompt[:length] + turn))
            restore(cache, moment)
        # Transactions may come between.
        view = drive.view_of(family)
        transaction = view.begin(cache)
        transaction.forward(mx.array([[1, 2, 3, 4]]))
        transaction.commit(2)
        restore(cache, moment)
        assert_same(run(family, [4], cache, 1), fresh(family, [*prompt[:length], 4]))


def test_a_snapshot_of_another_kind_or_of_a_cut_cache_is_refused() -> None:
    model = drive.model_of("llama")
    cache = drive.view_of("llama").make_cache()
    model(mx.array([[1, 2, 3, 4]]), cache=cache)
    moment = snapshot(cache)
    rewind(cache, 2)
    with pytest.raises(InvalidCache, match="cut"):
        restore(cache, moment)
    with pytest.raises(InvalidCache, match="kind"):
        restore(drive.view_of("gpt_oss").make_cache(), moment)


def test_snapshots_hold_no_rows_of_an_ordinary_cache() -> None:
    cache = drive.view_of("llama").make_cache()
    drive.model_of("llama")(mx.array([[1, 2, 3, 4]]), cache=cache)
    moment = snapshot(cache)
    assert [mark for _, _, mark in moment.marks] == [4] * len(cache)


def test_kept_tokens_in_a_window_are_refused() -> None:
    from mlx_lm.models.cache import RotatingKVCache

    view = drive.view_of("llama")
    cache = [RotatingKVCache(max_size=WINDOW, keep=4) for _ in range(view.depth)]
    with pytest.raises(UnsupportedTarget, match="max_kv_size"):
        view.check_cache(cache)
    with pytest.raises(UnsupportedTarget, match="max_kv_size"):
        view.begin(cache).forward(mx.array([[1, 2]]))
