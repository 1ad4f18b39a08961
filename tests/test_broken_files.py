"""Files that are damaged, each kind once, and what is said of it; tests/fuzz has thousands more."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer
from mlx_lm.utils import load as load_mlx_lm

from dflash_mlx.errors import CheckpointError, DFlashError, said
from dflash_mlx.json_text import parse_json
from dflash_mlx.safetensors import tensor_shapes
from dflash_mlx.target_checkpoint import load_target
from dflash_mlx.tokens import add_token
from tests.command_line import complaint, run
from tests.families.configs import CONFIGS, WIDE
from tests.families.models import build
from tests.fuzz.mutations import write_safetensors
from tests.tiny_pair import SPECIALS, write_pair, write_target, write_tokenizer


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header,said",
    [
        ({"a": entry(0, 16, [4]), "b": entry(12, 16, [1])}, "'a' and 'b' lie over each other"),
        ({"a": entry(0, 16, [5])}, "takes 16 bytes where F32 .5. needs 20"),
        ({"a": entry(0, 16, [2**40, 2**40])}, "no shape that can be"),
        ({"a": entry(0, 16, [-4])}, "no shape that can be"),
        ({"a": entry(16, 0, [4])}, "takes -16 bytes"),
        ({"a": entry(0, 16, [4], "X9")}, "dtype 'X9'"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "no data_offsets"),
        ({"a": entry(0, 8, [2])}, "damaged or cut short"),
        ({"a": 3}, "dtype None"),
    ],
)
def test_a_safetensors_header_is_checked_whole(
    tmp_path: Path, header: dict[str, Any], said: str
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(write_safetensors(header, bytes(16)))
    with pytest.raises(CheckpointError, match=said):
        tensor_shapes(file)


def test_what_mlx_writes_is_sound(tmp_path: Path) -> None:
    arrays = {
        "half": mx.zeros((2, 3), mx.bfloat16),
        "none": mx.zeros((0, 3)),
        "one": mx.array(1.0),
        "packed": mx.zeros((4, 8), mx.uint32),
    }
    file = tmp_path / "a.safetensors"
    mx.save_safetensors(str(file), arrays, {"format": "mlx"})
    assert tensor_shapes(file) == {name: list(array.shape) for name, array in arrays.items()}


@pytest.mark.parametrize(
    "text,said",
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000 + "1", "nested too deep"),
        ("9" * 5000, "too many digits"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        ("{", "line 1 column 2"),
    ],
)
def test_json_that_is_none(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_a_byte_order_mark_does_no_harm() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == parse_json('\ufeff{"a": 1}') == {"a": 1}


def change(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"hidden_size": "64"}, r"config.json.*hidden_size '64'"),
        ({"num_attention_heads": [2]}, r"config.json.*num_attention_heads"),
        ({"num_attention_heads": "gone"}, r"config.json.*num_attention_heads"),
        ({"rope_theta": None, "head_dim": 0}, r"config.json|weights of"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, and the weights hold only"),
        ({"num_hidden_layers": 5}, "weights of .*: Missing .* parameters"),
        ({"model_type": 7}, "config.json"),
        ({"quantization": {"group_size": 0, "bits": 4}}, "quantization with group_size 0"),
        ({"quantization": {"group_size": 32, "bits": 4, "a": {"bits": 0}}}, "quantization.a with"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings"),
    ],
)
def test_a_config_that_mlx_lm_stumbles_over_is_named_with_its_field(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    target = tmp_path / "target"
    write_target(target)
    change(target / "config.json", **changes)
    with pytest.raises(CheckpointError, match=said):
        load_target(target)


def test_a_quantized_weight_that_cannot_be_the_layers_ends_no_process(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_model

    target = tmp_path / "target"
    write_target(target)
    model, config = load_model(target)
    model, config = quantize_model(model, config, 32, 4)
    save_model(target, model)
    for width in (1, True, 10**6):
        (target / "config.json").write_text(json.dumps(config | {"hidden_size": width}))
        with pytest.raises(CheckpointError, match="wide, which its quantized weight"):
            load_target(target)
    (target / "config.json").write_text(json.dumps(config))
    load_target(target)


def _drop_field(content: dict[str, Any]) -> None:
    del content["added_tokens"][0]["rstrip"]


def _wrong_type(content: dict[str, Any]) -> None:
    content["model"]["type"] = "Spelling"


def _move(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {word: 10**6 + i for word, i in vocabulary.items()}
    content["added_tokens"] = []


@pytest.mark.parametrize("damage", [_drop_field, _wrong_type])
def test_a_tokenizer_that_cannot_be_read_is_named(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    target = tmp_path / "target"
    write_target(target)
    file = target / "tokenizer.json"
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_target(target)


def test_token_ids_beside_the_embedding_end_in_a_sentence(tmp_path: Path) -> None:
    target, draft = write_pair(tmp_path)
    file = target / "tokenizer.json"
    content = json.loads(file.read_text())
    _move(content)
    file.write_text(json.dumps(content))
    for command in (["generate", "-p", "a b"], ["bench"]):
        result = run(*command, "-m", str(target), "--draft", str(draft), "--max-tokens", "4")
        assert "has only" in complaint(result, 1)


def test_a_token_without_a_text_is_named() -> None:
    class Gap(list[str | None]):
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
            return [self[i] for i in ids]

    detokenizer = BPEStreamingDetokenizer(Gap(["a", None, "c"]))
    add_token(detokenizer, 0)
    with pytest.raises(DFlashError, match="wrote token 1, and its tokenizer has no text for it"):
        add_token(detokenizer, 1)


def test_all_of_an_error_is_said() -> None:
    assert said(ValueError("one:\n  two\nthree.")) == "one: two three"
    assert said(KeyError("hidden_size")) == "hidden_size"
    assert said(MemoryError()) == "MemoryError"


@pytest.mark.parametrize("family", sorted(CONFIGS | WIDE))
def test_a_target_that_mlx_lm_loads_is_loaded(tmp_path: Path, family: str) -> None:
    model = build(family)
    module, config = (CONFIGS | WIDE)[family]
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": module, **config}))
    write_tokenizer(tmp_path, SPECIALS)
    try:
        load_mlx_lm(str(tmp_path))
    except Exception as error:
        with pytest.raises(CheckpointError) as ours:
            load_target(tmp_path)
        assert said(error) in str(ours.value)
    else:
        load_target(tmp_path)
