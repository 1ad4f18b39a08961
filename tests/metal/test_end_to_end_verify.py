"""A quantized target verifies with the emulated kernels, through the selection of a Mac."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import stream_generate as plain_stream_generate

from dflash_mlx import SpeculativeModel, load, stream_generate
from dflash_mlx.demo import demo_paths, demo_prompts
from dflash_mlx.metal import rows_class, selection
from dflash_mlx.metal.selection import Selection
from dflash_mlx.metal.verdicts import Verdict, VerdictBook

from .emulator import Emulator, need_compiler

CONTEXT, TOKENS = 270, 20


class Proved(Selection):
    """A selection by which every class that is asked for has been proved, and is remembered."""

    def __init__(self, emulator: Emulator, book: VerdictBook) -> None:
        super().__init__("auto", ready=lambda: True, make=emulator.metal_kernel, book=book)
        self.shapes: set = set()

    def kernel_for(self, shape):
        if shape is not None and shape not in self.shapes:
            self.shapes.add(shape)
            self.book.put(shape.key, Verdict("faster"))
        return super().kernel_for(shape)


@pytest.fixture(scope="module")
def pair():
    """The demo pair; of the target's matrices some are in 4 bits, most in 8."""
    need_compiler()
    model, tokenizer = load(*demo_paths())
    target = model.target
    target.set_dtype(mx.float32)

    def kind(path: str, module: nn.Module):
        return hasattr(module, "to_quantized") and {
            "group_size": 64 if "mlp.up" in path else 32,
            "bits": 4 if "layers.3." in path else 8,
        }

    nn.quantize(target, class_predicate=kind)
    return model, tokenizer


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


@pytest.fixture(scope="module")
def plain(pair, prompt):
    """What unmodified mlx_lm writes."""
    model, tokenizer = pair
    return [r.token for r in plain_stream_generate(model.target, tokenizer, prompt, TOKENS)]


@pytest.mark.parametrize(("verify_length", "few"), [(None, False), (3, True)])
def test_text_is_that_of_plain_mlx_lm(
    pair, prompt, plain, tmp_path, monkeypatch, verify_length, few
):
    monkeypatch.setattr(rows_class, "MIN_OUTPUTS", 1)
    monkeypatch.setattr(rows_class, "MIN_INNER", 1)
    emulator = Emulator(orders=("forward",))
    chosen = Proved(emulator, VerdictBook(tmp_path / "book.json"))
    model, tokenizer = SpeculativeModel(pair[0].target, pair[0].draft), pair[1]
    before = selection.use(chosen)
    try:
        responses = list(
            stream_generate(
                model, tokenizer, prompt, max_tokens=TOKENS, verify_length=verify_length
            )
        )
    finally:
        selection.use(before)
    assert [r.token for r in responses] == plain
    assert sum(r.from_draft for r in responses) > TOKENS // 2
    last, layers = responses[-1], model.view.depth
    used = emulator.calls["quantized_rows_few" if few else "quantized_rows_many"]
    # Seven matrices a layer and the head, in every verify.
    assert used and used % (7 * layers + 1) == 0
    assert emulator.calls["block_attention"] >= used // (7 * layers + 1) * layers
    assert last.target_forwards * (7 * layers + 1) >= used
    assert {shape.use for shape in chosen.shapes} == {"draft", "verify", "rows"}
    kinds = {(s.group_size, s.bits) for s in chosen.shapes if s.use == "rows"}
    assert kinds == {(32, 4), (64, 4), (32, 8), (64, 8)}
