"""mlx_lm's prompt cache functions: ours under their names, and theirs on our cache."""

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models import cache as mlx_cache

import dflash_mlx
from dflash_mlx import SpeculativeModel, make_prompt_cache, stream_generate
from dflash_mlx.errors import DFlashError, InvalidCache, PairError
from tests.test_conversation import pair
from tests.test_conversation import tokenizer as tokenizer
from tests.tiny_pair import write_pair

PROMPT = list(range(20, 60))
FOLLOW_UP = [30, 31, 32, 33]
# Caches that can be cut; windows; recurrent state; both; several in one; quantized below.
FAMILIES = ["qwen3", "gemma3_text", "qwen3_5", "recurrent_gemma", "mamba2", "deepseek_v32"]


def run(model: SpeculativeModel, tokenizer: Any, prompt: list[int], cache: Any, **options: Any):
    options = {"verify_length": None, "max_tokens": 20, **options}
    return list(stream_generate(model, tokenizer, prompt, prompt_cache=cache, **options))


def tokens(responses: list[Any]) -> list[int]:
    return [r.token for r in responses]


def fresh(model: SpeculativeModel, tokenizer: Any, prompt: list[int]) -> list[int]:
    """What plain mlx_lm writes after a prompt."""
    plain = mlx_lm.stream_generate(model.target, tokenizer, prompt, max_tokens=20)
    return [r.token for r in plain]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_cache_goes_on_as_if_it_had_never_left(family, tokenizer, tmp_path) -> None:
    model = pair(family)
    cache = make_prompt_cache(model)
    run(model, tokenizer, PROMPT, cache)
    dflash_mlx.save_prompt_cache(tmp_path / "c.safetensors", cache, {"of": "a test"})
    loaded, about = dflash_mlx.load_prompt_cache(tmp_path / "c.safetensors", return_metadata=True)
    assert about == {"of": "a test"}
    assert loaded.tokens == cache.tokens
    kept = run(model, tokenizer, FOLLOW_UP, cache)
    got = run(model, tokenizer, FOLLOW_UP, loaded)
    # The same draft saw the same context: not only the text, every acceptance is the same.
    assert [(r.token, r.from_draft) for r in got] == [(r.token, r.from_draft) for r in kept]
    assert got[-1].target_forwards == kept[-1].target_forwards
    assert loaded.tokens == cache.tokens
    for ours, theirs in zip(loaded.context.groups, cache.context.groups, strict=True):
        assert ours.kind == theirs.kind and ours.length == theirs.length
        np.testing.assert_array_equal(
            ours.keys[:, :, : ours.length], theirs.keys[:, :, : theirs.length]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_reads_what_we_write_and_we_what_it_writes(family, tokenizer, tmp_path) -> None:
    model = pair(family)
    for save in (dflash_mlx.save_prompt_cache, mlx_cache.save_prompt_cache):
        cache = make_prompt_cache(model)
        said = tokens(run(model, tokenizer, PROMPT, cache))
        file = str(tmp_path / "c.safetensors")
        save(file, cache)
        expected = fresh(model, tokenizer, [*PROMPT, *said, *FOLLOW_UP])
        plain = mlx_cache.load_prompt_cache(file)
        theirs = mlx_lm.stream_generate(
            model.target, tokenizer, FOLLOW_UP, max_tokens=20, prompt_cache=plain
        )
        assert [r.token for r in theirs] == expected
        ours = run(model, tokenizer, FOLLOW_UP, dflash_mlx.load_prompt_cache(file))
        assert tokens(ours) == expected


def test_a_quantized_cache_is_saved_too(tmp_path) -> None:
    model, tokenizer = dflash_mlx.load(*write_pair(tmp_path))
    cache = make_prompt_cache(model)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 5}
    run(model, tokenizer, PROMPT, cache, **options)
    dflash_mlx.save_prompt_cache(tmp_path / "c", cache)
    loaded = dflash_mlx.load_prompt_cache(tmp_path / "c.safetensors")
    kept = run(model, tokenizer, FOLLOW_UP, cache, **options)
    assert tokens(run(model, tokenizer, FOLLOW_UP, loaded, **options)) == tokens(kept)


@pytest.mark.parametrize("trim", [dflash_mlx.trim_prompt_cache, mlx_cache.trim_prompt_cache])
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v32", "kimi_k25"])
def test_trimmed_tokens_were_never_there(family, trim, tokenizer) -> None:
    model = pair(family)
    for count in (0, 1, 7, 1000):
        cache = make_prompt_cache(model)
        said = tokens(run(model, tokenizer, PROMPT, cache))
        whole = [*PROMPT, *said]
        assert dflash_mlx.can_trim_prompt_cache(cache) and mlx_cache.can_trim_prompt_cache(cache)
        assert trim(cache, count) == min(count, len(whole))
        left = whole[: max(0, len(whole) - count)]
        got = run(model, tokenizer, FOLLOW_UP, cache)
        assert tokens(got) == fresh(model, tokenizer, [*left, *FOLLOW_UP])
        assert cache.tokens == [*left, *FOLLOW_UP, *tokens(got)]
        assert cache.context.offset == len(cache.tokens)


@pytest.mark.parametrize("family", ["qwen3_5", "recurrent_gemma", "mamba2"])
def test_what_cannot_be_trimmed_stays_as_it_is(family, tokenizer) -> None:
    model = pair(family)
    cache = make_prompt_cache(model)
    said = tokens(run(model, tokenizer, PROMPT, cache))
    for functions in (dflash_mlx, mlx_cache):
        assert not functions.can_trim_prompt_cache(cache)
        assert functions.trim_prompt_cache(cache, 3) == 0
    got = run(model, tokenizer, FOLLOW_UP, cache)
    assert tokens(got) == fresh(model, tokenizer, [*PROMPT, *said, *FOLLOW_UP])


def test_plain_caches_are_taken_as_mlx_lm_takes_them(tokenizer, tmp_path) -> None:
    model = pair("qwen3")
    cache = mlx_cache.make_prompt_cache(model.target)
    model.target(mx.array(PROMPT)[None], cache=cache)
    assert dflash_mlx.can_trim_prompt_cache(cache)
    assert dflash_mlx.trim_prompt_cache(cache, 5) == 5
    dflash_mlx.save_prompt_cache(tmp_path / "c.safetensors", cache)
    loaded = dflash_mlx.load_prompt_cache(tmp_path / "c.safetensors")
    assert isinstance(loaded, list)
    got = tokens(run(model, tokenizer, FOLLOW_UP, loaded))
    assert got == fresh(model, tokenizer, [*PROMPT[:-5], *FOLLOW_UP])


def test_a_cache_that_something_else_extended_is_refused(tokenizer) -> None:
    model = pair("qwen3")
    cache = make_prompt_cache(model)
    said = tokens(run(model, tokenizer, PROMPT, cache))
    more = [
        r.token
        for r in mlx_lm.stream_generate(
            model.target, tokenizer, FOLLOW_UP, max_tokens=5, prompt_cache=cache
        )
    ]
    with pytest.raises(InvalidCache, match="extended to"):
        run(model, tokenizer, FOLLOW_UP, cache)
    # What the sentence says to do is exact.
    whole = [*PROMPT, *said, *FOLLOW_UP, *more][: cache.target[0].offset]
    got = tokens(run(model, tokenizer, FOLLOW_UP, cache.target))
    assert got == fresh(model, tokenizer, [*whole, *FOLLOW_UP])


def test_files_that_are_no_caches(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(DFlashError, match="There is no file"):
        dflash_mlx.load_prompt_cache(tmp_path / "none.safetensors")
    target, _ = write_pair(tmp_path)
    (tmp_path / "text.safetensors").write_text("nonsense")
    model = pair("qwen3")
    cache = make_prompt_cache(model)
    run(model, tokenizer, PROMPT, cache)
    good = tmp_path / "good.safetensors"
    dflash_mlx.save_prompt_cache(good, cache)
    (tmp_path / "short.safetensors").write_bytes(good.read_bytes()[:-100])
    arrays, metadata = mx.load(str(good), return_metadata=True)
    mx.save_safetensors(
        str(tmp_path / "bent.safetensors"), arrays, {**metadata, "0.dflash-mlx": '{"groups": []}'}
    )
    for file in ("text.safetensors", "short.safetensors", "bent.safetensors"):
        with pytest.raises(DFlashError, match="cannot be read as a prompt cache"):
            dflash_mlx.load_prompt_cache(tmp_path / file)
    with pytest.raises(DFlashError, match="cannot be read as a prompt cache"):
        dflash_mlx.load_prompt_cache(target / "model.safetensors")


def test_places_that_cannot_be_written_leave_nothing(tmp_path: Path, tokenizer) -> None:
    cache = make_prompt_cache(pair("qwen3"))
    with pytest.raises(DFlashError, match="cannot be written"):
        dflash_mlx.save_prompt_cache(tmp_path / "nowhere" / "c.safetensors", cache)
    (tmp_path / "c.safetensors").mkdir()
    with pytest.raises(DFlashError, match="cannot be written"):
        dflash_mlx.save_prompt_cache(tmp_path / "c.safetensors", cache)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_classes_that_mlx_lm_does_not_know_are_not_saved(tmp_path: Path, tokenizer) -> None:
    model = pair("deepseek_v41")
    cache = make_prompt_cache(model)
    run(model, tokenizer, PROMPT, cache)
    with pytest.raises(DFlashError, match="mlx_lm cannot read"):
        dflash_mlx.save_prompt_cache(tmp_path / "c.safetensors", cache)


def test_a_cache_of_another_pair_is_refused(tmp_path: Path, tokenizer) -> None:
    model, other = pair("qwen3"), pair("mamba2")
    cache = make_prompt_cache(model)
    if len(cache) != len(make_prompt_cache(other)):
        with pytest.raises(InvalidCache, match="another target"):
            run(other, tokenizer, PROMPT, cache)
    target, draft = write_pair(tmp_path)
    stranger, its_tokenizer = dflash_mlx.load(target, draft)
    window = dflash_mlx.load_draft(draft)
    window.limit_context(64)
    windowed = SpeculativeModel(stranger.target, window)
    with pytest.raises(InvalidCache, match="another draft"):
        run(windowed, its_tokenizer, PROMPT, make_prompt_cache(stranger))


def test_where_a_model_is_wanted_a_pair_says_so(tokenizer) -> None:
    model = pair("qwen3")
    for call in (
        lambda: mlx_lm.generate(model, tokenizer, prompt=PROMPT, max_tokens=3),
        lambda: mlx_lm.batch_generate(model, tokenizer, [PROMPT], max_tokens=3),
        lambda: model(mx.array([PROMPT])),
    ):
        with pytest.raises(PairError, match="give its `target`"):
            call()
    with pytest.raises(AttributeError, match="give its `target`"):
        model.parameters()
    assert not hasattr(model, "layers")
    with pytest.raises(DFlashError, match="one prompt after the other"):
        dflash_mlx.batch_generate(model, tokenizer, [PROMPT])


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_may_pass_a_cache_on(family, tokenizer) -> None:
    model = pair(family)
    mx.eval(model.draft.parameters())
    cache = make_prompt_cache(model)
    got: list[list[int]] = []

    def work(prompt: list[int]) -> None:
        got.append(tokens(run(model, tokenizer, prompt, cache, max_tokens=6)))

    for prompt in (PROMPT, FOLLOW_UP):
        thread = threading.Thread(target=work, args=(prompt,))
        thread.start()
        thread.join()
    work(FOLLOW_UP)
    alone = make_prompt_cache(model)
    prompts = (PROMPT, FOLLOW_UP, FOLLOW_UP)
    assert got == [tokens(run(model, tokenizer, p, alone, max_tokens=6)) for p in prompts]
