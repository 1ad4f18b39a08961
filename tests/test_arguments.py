"""Arguments that cannot be meant are refused at the door, each in a sentence."""

from pathlib import Path
from typing import Any

import pytest

import dflash_mlx
from dflash_mlx.errors import DFlashError
from tests.tiny_pair import SENTENCE, write_pair


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
    ],
)
def test_an_argument_that_cannot_be_is_named(tmp_path: Path, name: str, value: Any) -> None:
    model, tokenizer = dflash_mlx.load(*write_pair(tmp_path, SENTENCE))
    with pytest.raises(DFlashError, match=name):
        dflash_mlx.generate(model, tokenizer, "hi", **{name: value})
    with pytest.raises(DFlashError, match="kv_group_size is 7"):
        dflash_mlx.generate(model, tokenizer, "hi", kv_bits=4, kv_group_size=7)
    with pytest.raises(DFlashError, match="A pair of target and draft is needed"):
        dflash_mlx.generate(model.target, tokenizer, "hi")  # type: ignore[arg-type]
