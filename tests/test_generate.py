"""generate and stream_generate against unmodified mlx_lm: text, fields, caches, failures."""

import itertools
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_cache
from mlx_lm.tokenizer_utils import load as load_tokenizer

import dflash_mlx
from dflash_mlx import SpeculativeModel, make_prompt_cache, stream_generate
from dflash_mlx.decode import acceptance, emission
from dflash_mlx.draft.config import VocabularyConfig
from dflash_mlx.errors import DFlashError, InvalidCache, PairError
from tests.synthetic import SyntheticDraft
from tests.tiny_pair import write_pair

PROMPT = "Tell me about the sea, the tide and the moon."
TOKENS = 60


class Pair:
    """A random tiny target, its real random draft, and what plain mlx_lm writes with it."""

    def __init__(self, folder: Path):
        self.target_dir, self.draft_dir = write_pair(folder)
        self.model, self.tokenizer = dflash_mlx.load(self.target_dir, self.draft_dir)
        self.prompt = self.tokenizer.encode(PROMPT)
        self.plain = list(self.mlx_lm(self.prompt, max_tokens=TOKENS))
        self.tokens = [r.token for r in self.plain]

    def mlx_lm(self, prompt: list[int], **options: Any) -> Iterator[Any]:
        return mlx_lm.stream_generate(self.model.target, self.tokenizer, prompt, **options)

    def synthetic(self, right: float, text: list[int] | None = None) -> SpeculativeModel:
        text = self.prompt + self.tokens if text is None else text
        return SpeculativeModel(self.model.target, SyntheticDraft(self.model.view, text, right))

    def next_logits(self, tokens: list[int]) -> np.ndarray:
        """After a fresh prefill of `tokens`."""
        return np.array(self.model.target(mx.array(tokens)[None])[0, -1])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def ids(model: SpeculativeModel, tokenizer: Any, prompt: Any, **options: Any) -> list[int]:
    return [r.token for r in stream_generate(model, tokenizer, prompt, **options)]


def stands_for(pair: Pair, cache: Any, tokens: list[int]) -> None:
    """The cache holds exactly `tokens`: its next logits are a fresh prefill's."""
    assert cache.tokens == tokens
    assert all(c.offset == len(tokens) for c in cache.target)
    assert cache.context.offset == len(tokens)
    probe = mx.array([[tokens[-1]]])
    got = np.array(pair.model.target(probe, cache=cache.target)[0, -1])
    np.testing.assert_allclose(got, pair.next_logits([*tokens, tokens[-1]]), atol=1e-4)


@pytest.mark.parametrize("right", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("verify_length", [0, 1, 3, None])
def test_greedy_equals_mlx_lm(pair: Pair, verify_length: int | None, right: float) -> None:
    model = pair.synthetic(right)
    got = list(
        stream_generate(
            model, pair.tokenizer, PROMPT, max_tokens=TOKENS, verify_length=verify_length
        )
    )
    assert [r.token for r in got] == pair.tokens
    assert "".join(r.text for r in got) == "".join(r.text for r in pair.plain)
    for ours, theirs in zip(got, pair.plain, strict=True):
        assert ours.prompt_tokens == theirs.prompt_tokens
        assert ours.generation_tokens == theirs.generation_tokens
        assert ours.finish_reason == theirs.finish_reason
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
    last = got[-1]
    assert last.accepted == sum(r.from_draft for r in got) <= last.proposed
    assert last.acceptance_length == pytest.approx((TOKENS - 1) / last.target_forwards)
    if verify_length == 0 or right == 0:
        assert last.acceptance_length == 1
    if verify_length is None and right == 0.95:
        assert last.acceptance_length > 3


def test_the_real_draft_changes_nothing_either(pair: Pair) -> None:
    assert ids(pair.model, pair.tokenizer, PROMPT, max_tokens=TOKENS) == pair.tokens


@pytest.mark.parametrize("prompt", ["text", "list", "array"])
def test_prompts_as_text_list_and_array(pair: Pair, prompt: str) -> None:
    given = {"text": PROMPT, "list": pair.prompt, "array": mx.array(pair.prompt)}[prompt]
    assert ids(pair.model, pair.tokenizer, given, max_tokens=9) == pair.tokens[:9]


def test_generate_returns_mlx_lms_text(pair: Pair, capsys: pytest.CaptureFixture) -> None:
    text = dflash_mlx.generate(pair.model, pair.tokenizer, PROMPT, verbose=True, max_tokens=20)
    assert text == mlx_lm.generate(pair.model.target, pair.tokenizer, PROMPT, max_tokens=20)
    printed = capsys.readouterr().out
    assert text in printed and "Acceptance length" in printed


@pytest.mark.parametrize("right", [0.0, 0.95])
def test_one_synchronisation_a_cycle(
    pair: Pair, right: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def counted(*arrays: mx.array) -> list[int]:
        reads.append(arrays)
        return original(*arrays)

    original = acceptance.read
    monkeypatch.setattr(acceptance, "read", counted)
    monkeypatch.setattr(emission, "read", counted)
    *_, last = stream_generate(
        pair.synthetic(right), pair.tokenizer, PROMPT, max_tokens=TOKENS, verify_length=None
    )
    assert len(reads) == last.target_forwards + 1  # one more for the prefill's token


@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_stop_tokens_end_the_text_where_plain_decoding_would(pair: Pair, right: float) -> None:
    for stop in sorted(set(pair.tokens))[:12]:
        tokenizer = load_tokenizer(pair.target_dir, eos_token_ids=[stop])
        plain = [
            r.token
            for r in mlx_lm.stream_generate(
                pair.model.target, tokenizer, pair.prompt, max_tokens=TOKENS
            )
        ]
        model, cache = pair.synthetic(right), pair.synthetic(right).make_cache()
        got = list(stream_generate(model, tokenizer, PROMPT, max_tokens=TOKENS, prompt_cache=cache))
        assert [r.token for r in got] == plain
        assert got[-1].finish_reason == "stop"
        stands_for(pair, cache, pair.prompt + plain)


@settings(max_examples=25, deadline=None)
@given(
    first=st.integers(1, 20),
    taken=st.integers(1, 20),
    right=st.sampled_from([0.0, 0.6, 0.9, 1.0]),
    verify_length=st.sampled_from([0, 1, 3, None]),
    step=st.sampled_from([7, 2048]),
)
def test_a_kept_cache_stands_for_what_was_emitted(
    pair: Pair, first: int, taken: int, right: float, verify_length: int | None, step: int
) -> None:
    """After max_tokens or an early break; and going on gives plain decoding's next tokens."""
    model = pair.synthetic(right)
    cache = make_prompt_cache(model)
    options = {"prompt_cache": cache, "verify_length": verify_length, "prefill_step_size": step}
    stream = stream_generate(model, pair.tokenizer, PROMPT, max_tokens=first, **options)
    got = [r.token for r in itertools.islice(stream, taken)]
    stream.close()
    assert got == pair.tokens[: min(first, taken)]
    emitted = pair.prompt + got
    assert cache.tokens == emitted
    follow_up = pair.tokenizer.encode(" And then?")
    fresh = [r.token for r in pair.mlx_lm(emitted + follow_up, max_tokens=15)]
    model.draft.text = emitted + follow_up + fresh
    assert ids(model, pair.tokenizer, follow_up, max_tokens=15, **options) == fresh
    stands_for(pair, cache, emitted + follow_up + fresh)


def test_a_plain_mlx_lm_cache_is_taken_and_stays_plain(pair: Pair) -> None:
    cache = mlx_lm_cache(pair.model.target)
    first = [r.token for r in pair.mlx_lm(pair.prompt, max_tokens=10, prompt_cache=cache)]
    follow_up = pair.tokenizer.encode(" Go on.")
    fresh = [r.token for r in pair.mlx_lm([*pair.prompt, *first, *follow_up], max_tokens=30)]
    got = ids(pair.model, pair.tokenizer, follow_up, max_tokens=20, prompt_cache=cache)
    assert got == fresh[:20]
    # mlx_lm goes on with the same list.
    rest = [
        int(t)
        for t, _ in mlx_lm.generate.__globals__["generate_step"](
            mx.array(fresh[20:21]), pair.model.target, prompt_cache=cache, max_tokens=9
        )
    ]
    assert rest == fresh[21:30]


@pytest.mark.parametrize("start", [0, 50, 57, 10_000])
@pytest.mark.parametrize("right", [0.0, 0.9])
def test_quantized_cache_equals_mlx_lms(pair: Pair, start: int, right: float) -> None:
    """The start lies in the prompt, behind it, in the middle of a block, and never reached."""
    options = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": start}
    plain = [r.token for r in pair.mlx_lm(pair.prompt, max_tokens=40, **options)]
    model = pair.synthetic(right, pair.prompt + plain)
    assert ids(model, pair.tokenizer, PROMPT, max_tokens=40, **options) == plain


class Explodes(Exception):
    pass


@pytest.mark.parametrize("call", [2, 5, 9])
def test_after_a_failure_the_cache_says_so_and_is_filled_again(
    pair: Pair, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair.synthetic(0.7)
    cache = make_prompt_cache(model)
    layer = model.target.layers[2]
    calls = 0
    original = type(layer).__call__

    def explode(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        nonlocal calls
        calls += self is layer
        if self is layer and calls == call:
            raise Explodes
        return original(self, *args, **kwargs)

    got = []
    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "__call__", explode)
        with pytest.raises(Explodes):
            for r in stream_generate(
                model,
                pair.tokenizer,
                PROMPT,
                max_tokens=TOKENS,
                verify_length=None,
                prompt_cache=cache,
            ):
                got.append(r.token)
    assert not cache.valid and cache.tokens == pair.prompt + got
    with pytest.warns(UserWarning, match="filled again"):
        rest = ids(model, pair.tokenizer, pair.tokens[len(got) : len(got) + 1], prompt_cache=cache)
    assert rest[: TOKENS - len(got) - 1] == pair.tokens[len(got) + 1 :]
    assert [r.token for r in pair.mlx_lm(pair.prompt, max_tokens=10)] == pair.tokens[:10]


def test_a_failure_makes_a_plain_list_refuse_further_use(pair: Pair) -> None:
    def explode(tokens: mx.array, logits: mx.array) -> mx.array:
        raise Explodes

    cache = mlx_lm_cache(pair.model.target)
    with pytest.raises(Explodes):
        ids(pair.model, pair.tokenizer, PROMPT, prompt_cache=cache, logits_processors=[explode])
    with pytest.raises(InvalidCache, match="make a new one"):
        ids(pair.model, pair.tokenizer, PROMPT, prompt_cache=cache)
    with pytest.raises(InvalidCache):
        list(pair.mlx_lm(pair.prompt, prompt_cache=cache))


@pytest.mark.parametrize("call", [1, 3, 4, 8])
def test_an_interrupt_waits_for_the_end_of_the_cycle(
    pair: Pair, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair.synthetic(0.7)
    cache = make_prompt_cache(model)
    layer = model.target.layers[2]
    calls = 0
    original = type(layer).__call__

    def interrupt(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        nonlocal calls
        calls += self is layer
        if self is layer and calls == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    before, got = signal.getsignal(signal.SIGINT), []
    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            for r in stream_generate(
                model,
                pair.tokenizer,
                PROMPT,
                max_tokens=TOKENS,
                verify_length=None,
                prompt_cache=cache,
                prefill_step_size=20,
            ):
                got.append(r.token)
    assert signal.getsignal(signal.SIGINT) is before
    assert got == pair.tokens[: len(got)]
    assert cache.valid
    assert (pair.prompt + pair.tokens)[: len(cache.tokens)] == cache.tokens
    if got:
        assert cache.tokens == pair.prompt + got
    stands_for(pair, cache, cache.tokens)


def test_the_consumers_own_interrupt_leaves_the_cache_right(pair: Pair) -> None:
    model = pair.synthetic(0.9)
    cache = make_prompt_cache(model)
    got = []
    with pytest.raises(KeyboardInterrupt):
        for r in stream_generate(
            model, pair.tokenizer, PROMPT, max_tokens=TOKENS, prompt_cache=cache
        ):
            got.append(r.token)
            if len(got) == 13:
                os.kill(os.getpid(), signal.SIGINT)
    assert got == pair.tokens[:13]
    stands_for(pair, cache, pair.prompt + got)


def test_progress_is_reported_as_mlx_lm_reports_it(pair: Pair) -> None:
    ours: list[tuple[int, int]] = []
    theirs: list[tuple[int, int]] = []
    options = {"max_tokens": 2, "prefill_step_size": 10}
    ids(
        pair.model,
        pair.tokenizer,
        PROMPT,
        prompt_progress_callback=lambda *at: ours.append(at),
        **options,
    )
    list(
        pair.mlx_lm(pair.prompt, prompt_progress_callback=lambda *at: theirs.append(at), **options)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": ""}, "empty"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -2}, "max_tokens is -2"),
        ({"verify_length": -1}, "give"),
        ({"verify_length": 99}, "give"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
        ({"max_kv_size": 64}, "max_kv_size cannot be kept exactly"),
    ],
)
def test_arguments_that_cannot_be_meant(pair: Pair, options: dict, said: str) -> None:
    with pytest.raises(DFlashError, match=said):
        ids(pair.model, pair.tokenizer, **{"prompt": PROMPT, **options})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 32, "target_hidden_size": 32}, "32 wide"),
        ({"target_layer_ids": (1, 4)}, "taps layer 4"),
        ({"num_target_layers": 5}, "5 layers"),
        ({"vocabulary": VocabularyConfig(10, own_head=True)}, "10 tokens"),
        ({"mask_token_id": 10_000}, "mask token 10000"),
    ],
)
def test_a_wrong_pair_is_one_clear_sentence(pair: Pair, changes: dict, said: str) -> None:
    draft = SyntheticDraft(pair.model.view, [], 0.0)
    draft.config = replace(draft.config, **changes)
    with pytest.raises(PairError, match=said) as error:
        SpeculativeModel(pair.model.target, draft)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")
