"""Arguments that cannot be meant are refused at the door, each in a sentence."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

import dflash_mlx
from dflash_mlx.decode.options import RunOptions
from dflash_mlx.errors import DFlashError
from tests.command_line import run
from tests.tiny_pair import SENTENCE, write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    yield dflash_mlx.load(*write_pair(tmp_path_factory.mktemp("pair"), SENTENCE))


@pytest.mark.parametrize(
    "name,value",
    [
        ("kv_bits", 7),
        ("kv_bits", "4"),
        ("max_tokens", None),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("prefill_step_size", 0),
        ("prefill_step_size", None),
        ("quantized_kv_start", -1),
        ("kv_group_size", None),
        ("sampler", 3),
        ("logits_processors", 3),
        ("logits_processors", [None]),
        ("costs", 3),
        ("stop", 3),
        ("prompt_progress_callback", 3),
        ("prompt_cache", 3),
        ("prompt_cache", []),
        ("prompt_cache", [None]),
    ],
)
def test_an_argument_that_cannot_be_is_named(pair: Any, name: str, value: Any) -> None:
    model, tokenizer = pair
    with pytest.raises(DFlashError, match=name):
        dflash_mlx.generate(model, tokenizer, "hi", **{name: value})


def test_a_call_is_that_of_a_function_with_the_options_as_parameters(pair: Any) -> None:
    parameters = inspect.signature(dflash_mlx.stream_generate).parameters
    assert [*parameters][:4] == ["model", "tokenizer", "prompt", "max_tokens"]
    assert all(p.kind is p.KEYWORD_ONLY for p in [*parameters.values()][4:])
    assert {f.name for f in fields(RunOptions)} <= {*inspect.signature(generate_step).parameters}
    documented = dflash_mlx.stream_generate.__doc__ or ""
    assert [n for n in parameters if not re.search(rf"^ .*\b{n}\b.*:", documented, re.M)] == []
    for wrong, told in [
        ({"temp": 0.5}, "unexpected keyword argument 'temp'"),
        ({"model": pair[0]}, "multiple values for argument 'model'"),
    ]:
        with pytest.raises(TypeError, match=rf"stream_generate\(\) .*{told}"):
            dflash_mlx.stream_generate(*pair, "hi", **wrong)
    with pytest.raises(TypeError, match=r"stream_generate\(\) missing .*'prompt'"):
        dflash_mlx.stream_generate(*pair)  # type: ignore[call-arg]


def test_what_is_no_pair_and_no_group_is_named(pair: Any) -> None:
    model, tokenizer = pair
    with pytest.raises(DFlashError, match="kv_group_size is 7"):
        dflash_mlx.generate(model, tokenizer, "hi", kv_bits=4, kv_group_size=7)
    for function in (dflash_mlx.make_prompt_cache, lambda m: dflash_mlx.generate(m, tokenizer, "")):
        with pytest.raises(DFlashError, match="A pair of target and draft is needed"):
            function(model.target)
    for wrong in (None, "mlx-community/Qwen3-8B-4bit"):
        with pytest.raises(DFlashError, match="The tokenizer is a "):
            dflash_mlx.generate(model, wrong, "hi")


@pytest.mark.parametrize("given", [None, 3, "", b"x"])
def test_a_name_that_is_none_is_told(given: Any) -> None:
    def load_with_draft(name: Any) -> Any:
        return dflash_mlx.load(name, draft="org/draft")

    for load in (dflash_mlx.load, dflash_mlx.load_draft, load_with_draft):
        with pytest.raises(DFlashError, match="give a directory or a hub id"):
            load(given)


def test_what_cannot_be_paired_is_told(pair: Any) -> None:
    model, _ = pair
    for target in (None, "org/target", model, model.draft):
        with pytest.raises(DFlashError, match="The target is a "):
            dflash_mlx.SpeculativeModel(target, model.draft)
    for draft in ("org/draft", model.target, model):
        with pytest.raises(DFlashError, match="The draft is a "):
            dflash_mlx.SpeculativeModel(model.target, draft)


@pytest.mark.parametrize("given", [None, 3, "cache.safetensors", {}, [None], [1, 2]])
def test_what_is_no_prompt_cache_is_told(given: Any, tmp_path: Path) -> None:
    for function in (
        dflash_mlx.can_trim_prompt_cache,
        lambda cache: dflash_mlx.trim_prompt_cache(cache, 1),
        lambda cache: dflash_mlx.save_prompt_cache(tmp_path / "cache", cache),
    ):
        with pytest.raises(DFlashError, match="The prompt cache is a "):
            function(given)
    assert not list(tmp_path.iterdir())


def test_other_arguments_of_the_cache_functions_are_told(pair: Any, tmp_path: Path) -> None:
    cache = dflash_mlx.make_prompt_cache(pair[0])
    for number in (-1, None, 1.5, "1"):
        with pytest.raises(DFlashError, match="num_tokens is "):
            dflash_mlx.trim_prompt_cache(cache, number)
    for metadata in (3, [1], {"a": 1}, {1: "a"}):
        with pytest.raises(DFlashError, match="metadata is no mapping of texts"):
            dflash_mlx.save_prompt_cache(tmp_path / "cache", cache, metadata)
    for function in (
        dflash_mlx.load_prompt_cache,
        lambda f: dflash_mlx.save_prompt_cache(f, cache),
    ):
        for name in (None, 3, [tmp_path]):
            with pytest.raises(DFlashError, match="file_name is a "):
                function(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"), [(lambda t, x: None, "NoneType"), (lambda t, x: x[:, :3], r"shape \(1, 3\)")]
)
@pytest.mark.parametrize("verify_length", [2, "off"])
def test_a_processor_that_gives_no_logits_is_told(
    pair: Any, given: Any, said: str, verify_length: Any
) -> None:
    with pytest.raises(DFlashError, match=f"A logits processor gave {said}"):
        dflash_mlx.generate(*pair, "hi", logits_processors=[given], verify_length=verify_length)


@pytest.mark.parametrize(
    "given,said",
    [
        (lambda x: mx.argmax(x), r"shape \(\) and uint32"),
        (lambda x: mx.argmax(x, axis=-1, keepdims=True), r"shape \(1, 1\)"),
        (lambda x: mx.array([1.0]), "float32"),
        (lambda x: 3, "a int;"),
        (lambda x: None, "a NoneType;"),
        (lambda x: np.array([3]), "a ndarray;"),
        (lambda x: mx.array([10**7]), "10000000, and the model's tokens go from 0"),
        (lambda x: mx.array([-1]), "-1, and"),
    ],
)
@pytest.mark.parametrize("verify_length", [2, "off"])
def test_a_sampler_that_gives_no_token_is_told(
    pair: Any, given: Any, said: str, verify_length: Any
) -> None:
    with pytest.raises(DFlashError, match=f"The sampler gave .*{said}"):
        dflash_mlx.generate(*pair, "hi", sampler=given, verify_length=verify_length)


@pytest.mark.parametrize(
    "name,values",
    [
        ("temp", [-1, float("nan"), float("inf"), None, "1", True]),
        ("top_p", [2, -0.1, float("nan"), None]),
        ("min_p", [1.1, -1]),
        ("top_k", [-2, 2.5, "3"]),
        ("min_tokens_to_keep", [0, 1.5]),
        ("xtc_probability", [2, -1]),
        ("xtc_threshold", [0.6]),
    ],
)
def test_a_sampler_out_of_range_is_not_made(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(DFlashError, match=f"{name} is "):
            dflash_mlx.make_sampler(**{"temp": 1.0, name: value})


@pytest.mark.parametrize(
    "name,options",
    [
        ("top_k", {"top_k": 10**6}),
        ("min_tokens_to_keep", {"min_p": 0.1, "min_tokens_to_keep": 10**6}),
        ("xtc_special_tokens", {"xtc_probability": 0.5, "xtc_special_tokens": [-1]}),
    ],
)
def test_a_sampler_for_a_larger_vocabulary_is_refused(pair: Any, name: str, options: Any) -> None:
    with pytest.raises(DFlashError, match=name):
        dflash_mlx.generate(*pair, "hi", sampler=dflash_mlx.make_sampler(1.0, **options))
    # What MLX had begun to compile would have left its random state unusable.
    dflash_mlx.generate(*pair, "hi", sampler=dflash_mlx.make_sampler(1.0), max_tokens=2)


@pytest.mark.parametrize(
    "option,code",
    [
        (["--seed", str(2**64)], 2),
        (["--top-k", str(2**70)], 2),
        (["--top-k", "100000", "--temp", "1"], 1),
        (["--temp", "inf"], 2),
        (["--draft-window", str(2**70)], 1),
        (["--kv-bits", "4", "--kv-group-size", str(2**70)], 1),
        (["--verify-length", str(2**70)], 1),
    ],
)
def test_absurd_numbers_in_a_command(option: list[str], code: int) -> None:
    result = run("generate", "-p", "hi", "--max-tokens", "2", *option)
    assert result.exit_code == code
    assert "Unexpected" not in result.stderr and result.stderr.count("dflash-mlx: ") == 1


def test_debug_may_be_a_value(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    said = run("generate", "-p", "--debug", "-m", missing).stderr
    assert "Traceback" not in said and said.count("dflash-mlx: ") == 1
    assert run("generate", "--max-tokens", "2", "-p", "--debug").exit_code == 0
    for command in (
        ["generate", "-p", "x", "-m", missing, "--debug"],
        ["--debug", "generate", "-p", "x", "-m", missing],
    ):
        assert "Traceback" in run(*command).stderr
