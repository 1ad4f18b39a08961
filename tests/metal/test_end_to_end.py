"""Pairs decode with the emulated kernel, through the selection that a Mac would use."""

import sys

import mlx.core as mx
import pytest

import dflash_mlx.draft.attention as draft_attention
from dflash_mlx import load, stream_generate
from dflash_mlx.demo import demo_paths, demo_prompts
from dflash_mlx.metal import block_attention, selection
from dflash_mlx.metal.attention_class import attention_class
from dflash_mlx.metal.prover import Prover
from dflash_mlx.metal.selection import Selection
from dflash_mlx.metal.verdicts import VerdictBook

from ..tiny_pair import write_pair
from .emulator import Emulator, need_compiler

CONTEXT = 300  # enough that the selection considers the kernel
TOKENS = 24


@pytest.fixture(scope="module", params=["demo", "random"])
def pair(request, tmp_path_factory):
    """The demo pair, and one of random weights, whose text hangs on every bit of the context."""
    need_compiler()
    if request.param == "demo":
        return load(*demo_paths())
    return load(*write_pair(tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module")
def prompt(pair):
    """Token ids: prompts of the demo, the last one whole."""
    _, tokenizer = pair
    tokens: list[int] = []
    for prompt in demo_prompts():
        tokens += tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True)
        if len(tokens) >= CONTEXT:
            return tokens[-CONTEXT:]
    raise AssertionError("the demo's prompts are too short")


@pytest.fixture
def draft_calls(monkeypatch):
    """Every call of the draft's attention, as the class it falls into."""
    calls = []

    def counted(queries, context_keys, *rest, **options):
        seen = options["context_length"]
        calls.append(attention_class("draft", queries, context_keys.shape[1], seen))
        return block_attention(queries, context_keys, *rest, **options)

    monkeypatch.setattr(draft_attention, "block_attention", counted)
    return calls


def decode(pair, prompt, chosen: Selection):
    before = selection.use(chosen)
    try:
        model, tokenizer = pair
        # Whole blocks: a length chosen from measured times could differ from run to run.
        return list(
            stream_generate(model, tokenizer, prompt, max_tokens=TOKENS, verify_length=None)
        )
    finally:
        selection.use(before)


def test_text_is_the_same_with_the_kernel(pair, prompt, draft_calls, tmp_path, request):
    plain = decode(pair, prompt, Selection(mode="off"))
    (shape,) = set(draft_calls)
    assert shape is not None
    draft_calls.clear()

    emulator = Emulator(orders=("forward",))
    chosen = Selection(
        mode="auto",
        ready=lambda: True,
        make=emulator.metal_kernel,
        book=VerdictBook(tmp_path / "book.json"),
        prover=Prover((sys.executable, "-m", "tests.metal.proof_child", "right"), 300),
    )
    chosen.record(shape, chosen.prover.prove(shape))
    assert chosen.book.get(shape.key).outcome == "faster"

    with_kernel = decode(pair, prompt, chosen)
    assert "".join(r.text for r in with_kernel) == "".join(r.text for r in plain)
    assert [r.token for r in with_kernel] == [r.token for r in plain]
    assert [r.from_draft for r in with_kernel] == [r.from_draft for r in plain]
    if "demo" in request.node.name:
        assert sum(r.from_draft for r in with_kernel) > len(with_kernel) // 2
    assert emulator.calls["block_attention"] == len(draft_calls) > 0
    assert emulator.calls["block_attention_merge"] == len(draft_calls)
    for one, other in zip(with_kernel, plain, strict=True):
        assert mx.allclose(one.logprobs, other.logprobs, atol=1e-4)
