"""Sampled text of real models, over every kind of cache, is plain mlx_lm's."""

from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

import dflash_mlx
from dflash_mlx import make_sampler, stream_generate
from dflash_mlx.demo import demo_paths
from tests.families import drive, matrix
from tests.sampled_tables import (
    SAMPLERS,
    equal,
    state,
)

# Caches that can be cut, windows, recurrent state in its three kinds, both, a class of their own.
FAMILIES = ["qwen3", "gemma3_text", "gpt_oss", "qwen3_5", "mamba2", "recurrent_gemma", "rwkv7"]
FAMILIES += ["jamba", "deepseek_v41", "baichuan_m1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cache_kind_over_three_turns(family: str) -> None:
    """One cache, each turn seeded; the third turn from the state that the second one left."""
    settings = list(SAMPLERS.values())[FAMILIES.index(family) % len(SAMPLERS)]
    turns = [drive.prompt_of("long"), [7, 3, 11], [5]]
    plain_cache = drive.view_of(family).make_cache()
    drive.model_of(family)  # built before anything is seeded
    cache, history = matrix.new_cache(family), []
    for turn, prompt in enumerate(turns):
        sampler = mlx_lm_sampler(**settings)
        before = state()
        if turn < 2:
            mx.random.seed(turn)
        text = matrix.plain_with(family, prompt, 30, sampler=sampler, prompt_cache=plain_cache)
        after = state()
        mx.random.seed(turn if turn < 2 else before[0] << 32 | before[1])
        got, last = matrix.generate(
            family,
            prompt,
            text,
            0.7,
            history=history,
            verify_length=(None, 3, 1)[turn],
            sampler=make_sampler(**settings),
            prompt_cache=cache,
        )
        assert tuple(got) == text
        assert last.accepted > 0
        assert state() == after
        history += [*prompt, *text]
    matrix.check_logits(family, cache, history)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return dflash_mlx.load(*demo_paths())


@pytest.mark.parametrize("verify_length", ["off", 3, None, "auto"])
@pytest.mark.parametrize("sampled", [False, True], ids=["likeliest", "drawn"])
def test_the_demo_pair_writes_mlx_lms_text(
    demo: tuple[Any, Any], verify_length: int | str | None, sampled: bool
) -> None:
    """A trained draft, text and all; three texts of which the last two are not seeded again."""
    model, tokenizer = demo
    prompts = ["Hello, I am Zokkim.", "What is 14 plus 25?", "Please write"]
    for settings in ({"temp": 0.7}, {"temp": 1.5, "top_p": 0.98, "xtc_probability": 0.2}):
        assert equal(
            lambda settings=settings: [
                r.token
                for prompt in prompts
                for r in stream_generate(
                    model,
                    tokenizer,
                    prompt,
                    30,
                    verify_length=verify_length,
                    sampler=make_sampler(**settings),
                    sample_proposals=sampled,
                )
            ],
            lambda settings=settings: [
                r.token
                for prompt in prompts
                for r in mlx_lm.stream_generate(
                    model.target, tokenizer, prompt, 30, sampler=mlx_lm_sampler(**settings)
                )
            ],
        )


@pytest.mark.parametrize("verify_length", [1, 3, None])
def test_a_cache_that_becomes_quantized_on_the_way(
    demo: tuple[Any, Any], verify_length: int | None
) -> None:
    model, tokenizer = demo
    prompt = tokenizer.encode("Hello, I am Zokkim.")
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": len(prompt) + 12}
    settings = {"temp": 1.5, "min_p": 0.01}
    assert equal(
        lambda: [
            r.token
            for r in stream_generate(
                model,
                tokenizer,
                prompt,
                40,
                verify_length=verify_length,
                sampler=make_sampler(**settings),
                **options,
            )
        ],
        lambda: [
            r.token
            for r in mlx_lm.stream_generate(
                model.target, tokenizer, prompt, 40, sampler=mlx_lm_sampler(**settings), **options
            )
        ],
    )
