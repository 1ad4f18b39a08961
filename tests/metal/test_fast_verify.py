"""The verify's products and attention go through kernels, and nothing else does."""

import threading
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import base, qwen3
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from dflash_mlx.metal import (
    attention_class,
    attention_kernel,
    plain_block_attention,
    rows_class,
    selection,
)
from dflash_mlx.metal.quantized_rows import plain_quantized_rows
from dflash_mlx.metal.selection import Selection
from dflash_mlx.target import TargetView
from dflash_mlx.target.fast_verify import FastVerify
from dflash_mlx.target.watch import Watch

from ..families import drive
from ..families.configs import CONFIGS
from ..families.models import build

TOKENS = 32
# Families none of whose attention is served, and why.
_MLA = "values of another size than keys, or none of its own"
_NONE = "no softmax attention"
STOCK = {
    "gemma2": "soft capped scores",
    "recurrent_gemma": "masks of a window",
    "plamo2": "calls MLX itself",
    "deepseek_v41": "calls MLX itself",
    **dict.fromkeys(("deepseek_v3", "kimi_k25", "deepseek_v32", "glm_moe_dsa"), _MLA),
    **dict.fromkeys(("kimi_linear", "longcat_flash_ngram", "bailing_hybrid"), _MLA),
    **dict.fromkeys(("mamba", "mamba2", "rwkv7"), _NONE),
}


class StandIn(Selection):
    """Plain MLX in place of proved kernels, counted by use, for shapes however small."""

    def __init__(self) -> None:
        super().__init__("auto", ready=lambda: True)
        self.calls: Counter[str] = Counter()

    def kernel_for(self, shape):
        if shape is None:
            return None
        plain = plain_quantized_rows if shape.use == "rows" else plain_block_attention

        def run(*args, **call):
            self.calls[shape.use] += 1
            return plain(*args, **call)

        return run


@pytest.fixture
def stand_in(monkeypatch):
    """A stand-in selection in place, with the lower limits of sizes lifted."""
    monkeypatch.setattr(attention_class, "CONTEXTS", (2, 32768))
    monkeypatch.setattr(attention_kernel, "HEAD_DIMS", (8, 16, *attention_kernel.HEAD_DIMS))
    monkeypatch.setattr(rows_class, "MIN_OUTPUTS", 1)
    monkeypatch.setattr(rows_class, "MIN_INNER", 1)
    chosen = StandIn()
    before = selection.use(chosen)
    yield chosen
    selection.use(before)


def quantized(family: str) -> nn.Module:
    """A tiny model of the family, quantized in groups of 32 where that can be."""
    model = build(family, 0)

    def fits(path: str, module: nn.Module) -> bool:
        weight = module.get("weight")
        return hasattr(module, "to_quantized") and weight is not None and weight.shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=4, class_predicate=fits)
    mx.eval(model.parameters())
    return model


def plain_text(model: nn.Module, prompt: list[int]) -> tuple[int, ...]:
    """What unmodified mlx_lm writes."""
    return tuple(int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=TOKENS))


def check(family: str, chosen: StandIn) -> None:
    model = quantized(family)
    classes = {id(m): type(m) for m in model.modules()}
    prompt = drive.prompt_of("long")
    text = plain_text(model, prompt)
    view = TargetView(model)
    taps = (0, view.depth - 1)
    assert not chosen.calls
    run = drive.speculate(view, prompt, text, 5, "sometimes", taps)
    assert tuple(run.tokens[: len(text)]) == text
    assert chosen.calls["rows"], "no quantized product was served"
    assert bool(chosen.calls["verify"]) == (family not in STOCK)
    assert all(type(m) is classes[id(m)] for m in model.modules())


QUICK = ["llama", "qwen3", "qwen3_5_moe", "gemma3_text", "gpt_oss", "deepseek_v3", "mamba"]
# Quantized, kimi_k3 cannot run in mlx_lm either.
REST = [family for family in CONFIGS if family not in QUICK and family != "kimi_k3"]


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in REST)]
)
def test_text_is_that_of_plain_mlx_lm(stand_in, family):
    check(family, stand_in)


@pytest.fixture
def view(stand_in) -> TargetView:
    """A quantized qwen3 with a tied head."""
    return TargetView(quantized("qwen3"))


def filled(view: TargetView) -> list:
    cache = view.make_cache()
    view.forward(mx.array([drive.prompt_of("long")]), cache)
    return cache


def verify(view: TargetView, cache: list, rows: int = 4) -> mx.array:
    """Logits [1, rows, V] of one verify, all of it kept."""
    transaction = view.begin(cache)
    logits, _ = transaction.forward(mx.arange(rows)[None])
    transaction.commit(rows)
    return logits


def test_what_is_served_in_a_verify(view, stand_in):
    cache = filled(view)
    assert not stand_in.calls, "a prefill is no verify"
    verify(view, cache)
    layers = view.depth
    # q, k, v, o, gate, up, down, and the tied head; down's K is no multiple of 32.
    assert stand_in.calls == {"rows": 6 * layers + 1, "verify": layers}
    view.forward(mx.array([[1]]), cache)
    verify(view, cache, rows=1)
    verify(view, cache, rows=33)
    assert stand_in.calls == {"rows": 6 * layers + 1, "verify": layers}
    verify(view, cache, rows=17)
    assert stand_in.calls == {"rows": 6 * layers + 1, "verify": 2 * layers}


def test_other_threads_are_left_alone(view, stand_in):
    cache, results = filled(view), []

    class Meanwhile(nn.Module):
        def __call__(self, *args, **kwargs):
            def other():
                with mx.stream(mx.cpu):
                    results.append(view.model(mx.arange(4)[None], cache=view.make_cache()))
                    mx.eval(results)

            if threading.current_thread() is threading.main_thread():
                before = stand_in.calls.copy()
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
                assert stand_in.calls == before
            return self.inner(*args, **kwargs)

    block = view.model.layers[1]
    swapped = Meanwhile()
    swapped.inner, block.mlp = block.mlp, swapped
    verify(view, cache)
    assert len(results) == 1 and stand_in.calls["verify"] == view.depth


def test_nothing_stays_patched_when_a_verify_fails(view):
    model, cache = view.model, filled(view)
    module_names = dict(vars(qwen3))
    classes = {id(m): type(m) for m in model.modules()}

    class Fails(nn.Module):
        def __call__(self, *args, **kwargs):
            raise KeyboardInterrupt

    model.layers[2].mlp = Fails()
    with pytest.raises(KeyboardInterrupt):
        verify(view, cache)
    assert all(type(m) is classes.get(id(m), Fails) for m in model.modules())
    assert vars(qwen3) == module_names
    assert qwen3.scaled_dot_product_attention is base.scaled_dot_product_attention


def test_caches_and_masks_that_are_left_to_mlx(view, stand_in):
    cache = filled(view)
    wide = TargetView(build("llama_wide", 0))
    quantized_cache = [c.to_quantized(group_size=32, bits=8) for c in filled(wide)]
    assert isinstance(quantized_cache[0], QuantizedKVCache)
    verify(wide, quantized_cache)
    assert not stand_in.calls["verify"]

    class OwnCache(KVCache):
        pass

    own = [OwnCache() for _ in cache]
    for mine, other in zip(own, cache, strict=True):
        mine.state = other.state
    verify(view, own)
    assert not stand_in.calls["verify"] and stand_in.calls["rows"]


def test_a_module_that_changes_its_keys_is_left_to_mlx(view, stand_in, monkeypatch):
    def update_and_fetch(self, keys, values):
        keys, values = fetch(self, keys, values)
        return keys * 2, values

    fetch = KVCache.update_and_fetch
    cache = filled(view)
    monkeypatch.setattr(KVCache, "update_and_fetch", update_and_fetch)
    expected = view.model(mx.arange(4)[None], cache=cache)
    for leaf in cache:
        leaf.trim(4)
    for _ in range(2):
        assert mx.allclose(verify(view, cache), expected, atol=1e-4)
        for leaf in cache:
            leaf.trim(4)
    assert not stand_in.calls["verify"]


def test_products_of_another_dtype_or_kind_are_left_to_mlx(stand_in):
    cases = {
        "affine": nn.QuantizedLinear(64, 32, group_size=32, bits=4),
        "other bits": nn.QuantizedLinear(64, 32, group_size=32, bits=3),
        "other mode": nn.QuantizedLinear(64, 32, group_size=32, bits=4, mode="mxfp4"),
        "no linear": nn.Linear(64, 32),
        "with a bias": nn.QuantizedLinear(64, 32, bias=True, group_size=32, bits=4),
    }
    cases["with a bias"].bias = mx.arange(32, dtype=mx.float32)

    class Model(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

    for name, part in cases.items():
        served = FastVerify(Model(part)).handlers(4)
        assert bool(served) == (name in ("affine", "with a bias")), name
        stand_in.calls.clear()
        inputs = mx.ones((1, 4, 64)), mx.ones((4, 64), mx.float16), mx.ones((1, 3, 64))
        expected = [part(x) for x in inputs]
        with Watch(served):
            for x, plain in zip(inputs, expected, strict=True):
                assert mx.array_equal(part(x), plain)
        assert stand_in.calls["rows"] == bool(served)  # for the first of them alone


def test_without_proof_or_metal_nothing_is_watched(view, monkeypatch):
    selection.use(Selection("auto"))
    if not mx.metal.is_available():
        assert view.fast_verify.handlers(8) == []
    selection.use(Selection("off", ready=lambda: True))
    assert view.fast_verify.handlers(8) == []
