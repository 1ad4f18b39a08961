"""The target view: parts, taps, and a model that is left as it was."""

import gc
import threading
import weakref
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from dflash_mlx.errors import PairError
from dflash_mlx.target import TargetView
from dflash_mlx.target.watch import Watch

from .families import drive
from .families.configs import CONFIGS, VOCAB
from .families.models import build, configure

ROOT = 32**0.5  # of the hidden size
SCALES = {
    "gemma2": ROOT,
    "gemma3_text": ROOT,
    "gemma3n": ROOT,
    "gemma4": ROOT,
    "gemma4_text": ROOT,
    "gear": ROOT,
    "recurrent_gemma": ROOT,
    "granitemoehybrid": 3.0,
}


def state_of(model: nn.Module) -> tuple[list[type], list[tuple[str, Any]], list[set[str]]]:
    """What a caller could see changed: classes, parameters, attribute names."""
    modules = list(model.modules())
    names = [set(vars(m)) | set(m) for m in modules]
    parameters: Any = tree_flatten(model.parameters())
    return [type(m) for m in modules], parameters, names


def assert_unchanged(before: Any, model: nn.Module) -> None:
    classes, parameters, names = state_of(model)
    assert classes == before[0] and names == before[2]
    assert [k for k, _ in parameters] == [k for k, _ in before[1]]
    for (name, new), (_, old) in zip(parameters, before[1], strict=True):
        assert mx.array_equal(new, old), name


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "gemma4", "rwkv7", "nanbeige", "kimi_k25"])
def test_taps_are_layer_outputs(family: str) -> None:
    """Against a copy of the model whose layers were subclassed for good."""
    model, view = build(family), drive.view_of(family)
    outputs: list[mx.array] = []
    entering: list[mx.array] = []
    for layer in {id(layer): layer for layer in model.layers}.values():

        class Kept(type(layer)):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                entering.append(args[0])
                out = super().__call__(*args, **kwargs)
                outputs.append(out[0] if isinstance(out, tuple) else out)
                return out

        layer.__class__ = Kept
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2]])
    expected = model(tokens, cache=view.make_cache())
    assert len(outputs) == view.depth
    taps = (view.depth - 1, 0, 1)
    logits, features = view.forward(tokens, view.make_cache(), taps)
    assert mx.array_equal(logits, expected)
    assert all(map(mx.array_equal, features, (outputs[t] for t in taps)))
    assert [f.shape for f in features] == [(1, 7, view.hidden_size)] * 3
    for taps in ((-1,), (1, -1), (-1, 0, 1)):
        _, features = view.forward(tokens, view.make_cache(), taps)
        wanted = [entering[0] if t < 0 else outputs[t] for t in taps]
        assert len(features) == len(wanted) and all(map(mx.array_equal, features, wanted))


def test_parallel_streams_are_tapped_as_their_mean() -> None:
    assert drive.view_of("gemma3n").streams == 3 and drive.view_of("deepseek_v41").streams == 2
    view = drive.view_of("gemma3n")
    _, features = view.forward(mx.array([[1, 2, 3]]), view.make_cache(), (0, 1))
    assert [f.shape for f in features] == [(1, 3, view.hidden_size)] * 2
    assert drive.view_of("llama").streams == 1


def test_a_tap_outside_the_target_is_named() -> None:
    view = drive.view_of("llama")
    with pytest.raises(PairError, match=r"layer 4.*0 to 3"):
        view.forward(mx.array([[1]]), view.make_cache(), (0, 4))
    with pytest.raises(PairError):
        view.check_taps([-2])


@pytest.mark.parametrize("family", CONFIGS)
def test_embedding_and_head(family: str) -> None:
    """The family's scale, and a head that gives the raw logits of a hidden state."""
    view = drive.view_of(family)
    tokens = mx.array([[5, 6, 7]])
    embedded = view.embed(tokens)
    assert embedded.shape == (1, 3, view.hidden_size)
    assert view.embed_scale == pytest.approx(SCALES.get(family, 1.0), rel=1e-5)
    assert view.head(embedded).shape == (1, 3, VOCAB)
    assert view.vocab_size == VOCAB


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2"])
def test_the_head_is_linear_and_reaches_the_logits(family: str) -> None:
    """No norm, cap or multiplier; after the model's own norm it gives the model's logits."""
    view, model = drive.view_of(family), drive.model_of(family)
    a = mx.random.normal((1, 2, view.hidden_size))
    assert drive.gap(view.head(2 * a), 2 * view.head(a)) < 1e-4
    tokens = mx.array([[1, 2, 3]])
    logits, (last,) = view.forward(tokens, view.make_cache(), (view.depth - 1,))
    raw = view.head(model.model.norm(last))
    if family == "gemma2":
        raw = mx.tanh(raw / 30.0) * 30.0
    assert drive.gap(raw, logits) < 1e-4


def test_a_quantized_target_has_the_same_parts() -> None:
    for family, config in (("qwen3", {}), ("llama", {"tie_word_embeddings": False})):
        model = configure(
            family, {**CONFIGS[family][1], "hidden_size": 64, "intermediate_size": 64} | config
        )
        nn.quantize(model, group_size=32, bits=4)
        mx.eval(model.parameters())
        view = TargetView(model)
        assert (view.vocab_size, view.hidden_size) == (VOCAB, 64)
        hidden = view.embed(mx.array([[1, 2]]))
        assert hidden.shape == (1, 2, 64) and view.head(hidden).shape == (1, 2, VOCAB)


def test_a_half_precision_target_keeps_the_exact_scale() -> None:
    model = build("gemma2")
    model.set_dtype(mx.bfloat16)
    view = TargetView(model)
    assert view.embed_scale == 32**0.5
    assert view.embed(mx.array([[1]])).dtype == mx.bfloat16


@pytest.mark.parametrize("family", CONFIGS)
def test_nothing_stays_patched(family: str) -> None:
    model = build(family)
    # gemma3n casts and clips two weights in its own forward: let it settle.
    model(mx.array([[1, 2]]), cache=drive.view_of(family).make_cache())
    before = state_of(model)
    text = [int(t) for t, _ in generate_step(mx.array([3, 1, 4]), model, max_tokens=6)]
    view = TargetView(model)
    assert_unchanged(before, model)
    cache = view.make_cache()
    view.forward(mx.array([[1, 2, 3]]), cache, (0, 1))
    transaction = view.begin(cache)
    transaction.forward(mx.array([[1, 2, 3]]), (0, 1))
    assert_unchanged(before, model)
    transaction.commit(1)
    assert_unchanged(before, model)
    again = [int(t) for t, _ in generate_step(mx.array([3, 1, 4]), model, max_tokens=6)]
    assert again == text


class _Interrupting(nn.Module):
    """A layer part that raises once."""

    def __init__(self, inner: nn.Module, error: BaseException):
        super().__init__()
        self.inner, self._error = inner, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._error


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_an_exception_in_a_layer_leaves_the_model_as_it_was(
    family: str, error: BaseException
) -> None:
    model = build(family)
    text = [int(t) for t, _ in generate_step(mx.array([3, 1, 4]), model, max_tokens=6)]
    view = TargetView(model)
    layer = model.layers[2]
    inner = layer.mlp
    layer.mlp = _Interrupting(inner, error)
    before = [type(m) for m in model.modules()]
    cache = view.make_cache()
    with pytest.raises(type(error)):
        view.forward(mx.array([[1, 2, 3]]), cache, (0, 2))
    with pytest.raises(type(error)):
        view.begin(cache).forward(mx.array([[1, 2, 3]]), (0, 3))
    assert [type(m) for m in model.modules()] == before
    layer.mlp = inner
    again = [int(t) for t, _ in generate_step(mx.array([3, 1, 4]), model, max_tokens=6)]
    assert again == text


def test_other_threads_are_neither_recorded_nor_disturbed() -> None:
    """A forward in another thread, in the middle of a tapped one, passes through."""
    model = build("llama")
    view = TargetView(model)
    tokens, other = mx.array([[1, 2, 3]]), mx.array([[9, 8, 7]])
    expected = view.forward(tokens, view.make_cache(), (0, 3))[1]
    results: list[Any] = []

    class Meanwhile(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner, self._done = inner, False

        def __call__(self, x: mx.array) -> mx.array:
            if not self._done:
                self._done = True

                def work() -> None:
                    results.append(view.forward(other, view.make_cache(), (3,))[0].shape)
                    results.append(model(other, cache=view.make_cache()).shape)

                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
            return self.inner(x)

    model.layers[1].mlp = Meanwhile(model.layers[1].mlp)
    before = [type(m) for m in model.modules()]
    features = view.forward(tokens, view.make_cache(), (0, 3))[1]
    assert results == [(1, 3, VOCAB), (1, 3, VOCAB)]
    assert len(features) == 2 and all(map(mx.array_equal, features, expected))
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "gemma4", "deepseek_v41"])
def test_recorded_arrays_die_without_the_collector(family: str) -> None:
    view = drive.view_of(family)
    cache = view.make_cache()
    view.forward(mx.array([[1, 2, 3]]), cache)
    gc.collect()
    gc.disable()
    try:
        transaction = view.begin(cache)
        logits, features = transaction.forward(mx.array([[4, 5, 6]]), (0, 1))
        mx.eval(logits, features)
        transaction.commit(2)
        found = [weakref.ref(x) for x in (transaction, logits, *features)]
        del transaction, logits, features
        assert not any(ref() for ref in found)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        before = mx.get_active_memory()
        for _ in range(5):
            transaction = view.begin(cache)
            out = transaction.forward(mx.array([[4, 5, 6]]), (0, 1))
            mx.eval(out)
            transaction.commit(1)
            mx.eval([c.state for c in cache])
        del transaction, out
        assert mx.get_active_memory() <= before + 20_000
    finally:
        gc.enable()


def test_the_buffers_of_an_ordinary_cache_are_not_copied() -> None:
    """They would be at every append while something else referred to them."""
    view = drive.view_of("llama")
    cache: list[Any] = view.make_cache()
    mx.eval(view.forward(mx.array([[1, 2, 3]]), cache)[0])
    for leaf in cache:
        more = [(0, 0), (0, 0), (0, 50_000), (0, 0)]
        leaf.keys, leaf.values = mx.pad(leaf.keys, more), mx.pad(leaf.values, more)
    mx.eval([(leaf.keys, leaf.values) for leaf in cache])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    transaction = view.begin(cache)
    mx.eval(transaction.forward(mx.array([[4, 5, 6]])))
    transaction.commit(2)
    mx.eval(view.forward(mx.array([[7]]), cache)[0])
    held = sum(leaf.keys.nbytes + leaf.values.nbytes for leaf in cache)
    assert mx.get_peak_memory() - before < held / 10


def test_commit_is_checked() -> None:
    view = drive.view_of("llama")
    transaction = view.begin(view.make_cache())
    with pytest.raises(RuntimeError):
        transaction.commit(1)
    transaction.forward(mx.array([[1, 2, 3]]))
    for kept in (0, 4):
        with pytest.raises(ValueError):
            transaction.commit(kept)
    transaction.commit(3)
    with pytest.raises(RuntimeError):
        transaction.commit(1)


@pytest.mark.parametrize("family", CONFIGS)
def test_nothing_is_evaluated(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = drive.view_of(family)

    def waited(*_: Any, **__: Any) -> None:
        raise AssertionError("the view waited for the device")

    monkeypatch.setattr(mx, "eval", waited)
    monkeypatch.setattr(mx, "async_eval", waited)
    cache = view.make_cache()
    view.forward(mx.array([[1, 2, 3]]), cache, (0,))
    transaction = view.begin(cache)
    transaction.forward(mx.array([[1, 2, 3]]), (0,))
    transaction.commit(2)


def test_rows_that_were_never_trained_hide_no_scale() -> None:
    model = build("gemma2")
    weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = mx.concatenate([mx.zeros((30, 32)), weight[30:]])
    assert TargetView(model).embed_scale == ROOT


def test_a_replaced_mixer_is_noticed() -> None:
    """Its state would silently stay behind."""
    model = build("qwen3_5")
    view = TargetView(model)
    old = model.layers[0].linear_attn
    model.layers[0].linear_attn = build("qwen3_5", 1).layers[0].linear_attn
    cache = view.make_cache()
    transaction = view.begin(cache)
    transaction.forward(mx.array([[1, 2, 3]]))
    with pytest.raises(RuntimeError, match="again"):
        transaction.commit(1)
    model.layers[0].linear_attn = old


class _Outer(nn.Module):
    """A mixer that writes one slot itself and lets an inner one write the others."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        before = 0.0 if cache[2] is None else cache[2]
        sums = before + mx.cumsum(x, axis=1)
        cache[2] = sums[:, -1:]
        return self.inner(x, mask, cache) + 0.1 * sums


def test_a_mixer_inside_a_mixer_is_replayed_once() -> None:
    from mlx_lm.models.cache import ArraysCache, KVCache

    model = build("qwen3_5")
    for layer in model.layers:
        if layer.is_linear:
            layer.linear_attn = _Outer(layer.linear_attn)
    object.__setattr__(
        model,
        "make_cache",
        lambda: [ArraysCache(size=3) if c.is_linear else KVCache() for c in model.layers],
    )
    view = TargetView(model)
    cache, other = view.make_cache(), view.make_cache()
    for c in (cache, other):
        model(mx.array([[1, 2, 3]]), cache=c)
    transaction = view.begin(cache)
    transaction.forward(mx.array([[4, 5, 6, 7]]))
    outer = [layer.linear_attn for layer in model.layers if layer.is_linear]
    again: list[mx.array] = []
    mixers = [*outer, *(mixer.inner for mixer in outer)]
    with Watch([(mixer, again) for mixer in mixers]), Watch([(model.layers[-1], again)]):
        transaction.commit(2)
    assert len(again) == len(mixers)  # each once, and no layer
    model(mx.array([[4, 5]]), cache=other)
    for a, b in zip(cache, other, strict=True):
        if isinstance(a, ArraysCache):
            slots: list[tuple[Any, Any]] = list(zip(a.cache, b.cache, strict=True))
            assert max(drive.gap(x, y) for x, y in slots) < 1e-5
