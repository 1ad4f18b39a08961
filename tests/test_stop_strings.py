"""Stop strings: found in the text, however tokens and blocks cut it, and the cache ends with it."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dflash_mlx
from dflash_mlx import make_prompt_cache, stream_generate
from dflash_mlx.errors import DFlashError
from dflash_mlx.measure.run import Settings, dflash_run, plain_run
from dflash_mlx.stop_strings import StopStrings
from tests.command_line import complaint, run
from tests.test_generate import Pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


letters = st.text("ab", max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    text=letters,
    strings=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    sizes=st.lists(st.integers(0, 7), max_size=12),
)
def test_it_does_not_matter_how_the_text_is_cut(
    text: str, strings: list[str], sizes: list[int]
) -> None:
    stops, shown = StopStrings(strings), ""
    pieces = cut(text, sizes)
    for i, piece in enumerate(pieces):
        shown += stops.feed(piece, last=i == len(pieces) - 1)
        assert text.startswith(shown)
    # The first character at which any string is complete; of those the longest.
    ended = [(n, s) for n in range(len(text) + 1) for s in strings if text[:n].endswith(s)]
    if not ended:
        assert stops.found is None and shown == text
        return
    first = min(n for n, _ in ended)
    assert stops.found == max((s for n, s in ended if n == first), key=len)
    assert shown == text[: first - len(stops.found)]


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["</s>", "\n\nUser"])
    assert stops.feed("a < b") == "a < b"
    assert stops.feed(" <") == " "
    assert stops.feed("/i>\n") == "</i>"
    assert stops.feed("\n", last=True) == "\n\n"


@pytest.mark.parametrize("stop", ["", ["ok", ""], [3], [None]])
def test_what_is_no_stop_string_is_refused(pair: Pair, stop: Any) -> None:
    with pytest.raises(DFlashError, match="cannot be a stop string"):
        next(stream_generate(pair.model, pair.tokenizer, "Hello", stop=stop))


def test_the_text_ends_before_it_and_the_cache_with_it(pair: Pair) -> None:
    """Inside a block and across blocks, at every verify length; going on is plain decoding's."""
    segments = [r.text for r in pair.plain]
    text = "".join(segments)
    for at, length in [(0, 1), (3, 2), (7, 6), (20, 9), (31, 1), (40, 12)]:
        stop = text[at : at + length]
        first = text.index(stop)
        # The last token is the one that completes the string.
        needed = next(n for n in range(1, len(segments) + 1) if stop in "".join(segments[:n]))
        for right in (0.0, 0.7, 1.0):
            for verify_length in (0, 2, None):
                model = pair.synthetic(right)
                cache = make_prompt_cache(model)
                got = list(
                    stream_generate(
                        model,
                        pair.tokenizer,
                        pair.prompt,
                        max_tokens=60,
                        stop=["never there", stop],
                        prompt_cache=cache,
                        verify_length=verify_length,
                    )
                )
                assert "".join(r.text for r in got) == text[:first]
                assert [r.token for r in got] == pair.tokens[:needed]
                assert got[-1].finish_reason == "stop" and got[-1].stop_string == stop
                assert all(r.finish_reason is None and r.stop_string is None for r in got[:-1])
                assert cache.tokens == pair.prompt + pair.tokens[:needed]
                assert all(c.offset == len(cache.tokens) for c in cache.target)
                assert cache.context.offset == len(cache.tokens)
        probe = mx.array([[5]])
        logits = pair.model.target(probe, cache=cache.target)[0, -1]
        fresh = pair.next_logits([*cache.tokens, 5])
        np.testing.assert_allclose(np.array(logits), fresh, atol=1e-4)


def test_what_was_held_back_is_shown_when_the_text_ends(pair: Pair) -> None:
    text = "".join(r.text for r in pair.plain[:20])
    ours = dflash_mlx.generate(
        pair.model, pair.tokenizer, pair.prompt, max_tokens=20, stop=text[-4:] + "\0"
    )
    assert ours == text


def test_both_sides_of_a_comparison_end_with_it(pair: Pair) -> None:
    stop = "".join(r.text for r in pair.plain)[9:12]
    how = Settings(max_tokens=60, stop=(stop,))
    plain = plain_run(pair.model, pair.tokenizer, pair.prompt, how)
    dflash = dflash_run(pair.model, pair.tokenizer, pair.prompt, how)
    assert plain.tokens == dflash.tokens and 0 < len(plain.tokens) < 60


def test_the_commands_take_several(reciting: list[str], tmp_path: Path) -> None:
    ending = ["--stop", "nowhere", "--stop", "four fi"]
    result = run("generate", *reciting, "-p", "Count.", *ending)
    assert result.exit_code == 0 and result.stdout == "One two three \n"
    chat = run("chat", *reciting, "--stop", "ee four", stdin="Count.\nAgain.\n")
    assert chat.exit_code == 0 and chat.stdout == "One two thr\n" * 2
    for command in (["generate", "-p", "x"], ["chat"], ["bench"]):
        said = complaint(run(*command, *reciting, "--stop", ""), 2)
        assert "an empty string would end every text" in said
