"""Quantization in memory, and the dtype that a draft computes in."""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from dflash_mlx import load_draft
from dflash_mlx.checkpoint import build_draft, read_draft
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.draft.dtype import activation_dtype, bfloat16_is_native, parameters
from dflash_mlx.draft.formats import draft_config
from dflash_mlx.draft.quantize import (
    LEGAL,
    Quantization,
    linear_layers,
    quantization_block,
    quantize_draft,
)
from dflash_mlx.errors import CheckpointError, DFlashError
from tests import draft_checkpoints as published

FLOATS = (mx.bfloat16, mx.float16, mx.float32)


def hidden(draft: DFlashDraft, scale: float = 1.0) -> mx.array:
    """What a block of random embeddings becomes over a random context."""
    config = draft.config
    width = config.hidden_size
    features = mx.random.normal((1, 40, len(config.target_layer_ids) * width), key=mx.random.key(1))
    embeddings = mx.random.normal((1, config.block_size, width), key=mx.random.key(2))
    context = draft.make_context()
    draft.extend(context, scale * features)
    return draft(embeddings, context)


@pytest.mark.parametrize(
    ("stored", "quantized", "native", "expected"),
    [
        (mx.bfloat16, True, True, mx.bfloat16),
        (mx.bfloat16, True, False, mx.float32),
        (mx.float16, True, True, mx.bfloat16),
        (mx.float16, True, False, mx.float32),
        (mx.float32, True, True, mx.float32),
        (mx.float32, True, False, mx.float32),
        (mx.bfloat16, False, True, mx.bfloat16),
        (mx.bfloat16, False, False, mx.bfloat16),
        (mx.float16, False, True, mx.bfloat16),
        (mx.float16, False, False, mx.float32),
        (mx.float32, False, False, mx.float32),
    ],
)
def test_no_draft_computes_in_float16(
    stored: mx.Dtype, quantized: bool, native: bool, expected: mx.Dtype
) -> None:
    assert activation_dtype(stored, quantized, native) == expected


@pytest.mark.parametrize(
    ("device", "architecture", "native"),
    [
        (mx.cpu, "arm64", False),
        (mx.cpu, "applegpu_g17s", False),
        (mx.gpu, "applegpu_g13g", False),
        (mx.gpu, "applegpu_g13s", False),
        (mx.gpu, "applegpu_g14d", False),
        (mx.gpu, "applegpu_g15s", True),
        (mx.gpu, "applegpu_g16p", True),
        (mx.gpu, "applegpu_g17s", True),
        (mx.gpu, "sm_90", True),
    ],
)
def test_the_m1_the_m2_and_cpus_emulate_bfloat16(
    monkeypatch: pytest.MonkeyPatch, device: mx.DeviceType, architecture: str, native: bool
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=device))
    monkeypatch.setattr(mx, "device_info", lambda device: {"architecture": architecture})
    assert bfloat16_is_native() is native


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("mode", list(LEGAL))
def test_a_quantized_draft_computes_in_one_dtype_throughout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, stored: mx.Dtype, native: bool
) -> None:
    monkeypatch.setattr("dflash_mlx.draft.dtype.bfloat16_is_native", lambda: native)
    published.write(tmp_path / "draft", published.gemma4(), dtype=stored)
    draft = load_draft(tmp_path / "draft", bits=LEGAL[mode][0][0], mode=mode)
    expected = activation_dtype(stored, True, native)
    assert draft.dtype == expected
    floating = {a.dtype for a in parameters(draft).values() if mx.issubdtype(a.dtype, mx.floating)}
    assert floating == {expected}
    assert {array.dtype for array in draft.make_context().arrays} == {expected}
    assert hidden(draft).dtype == expected


def test_context_features_beyond_float16_do_no_harm(tmp_path: Path) -> None:
    published.write(tmp_path / "draft", published.qwen3(), dtype=mx.float16)
    draft = load_draft(tmp_path / "draft", bits=4)
    assert mx.allclose(hidden(draft, scale=1e6), hidden(draft), atol=1e-3)


def test_float16_tensors_that_are_built_directly_compute_in_float32_too() -> None:
    config = published.qwen3()
    draft = build_draft(draft_config(config), published.tensors(config, dtype=mx.float16))
    assert draft.dtype == mx.float32


def test_scales_are_those_of_the_stored_weights(tmp_path: Path) -> None:
    """The dtype to compute in is set after quantizing, or the numbers would differ by machine."""
    config = published.qwen3()
    published.write(tmp_path / "draft", config, dtype=mx.bfloat16)
    weight = published.tensors(config)["fc.weight"]
    packed, scales, biases = mx.quantize(weight, group_size=64, bits=4)
    fc = load_draft(tmp_path / "draft", bits=4).fc
    assert mx.array_equal(fc.weight, packed)
    assert mx.array_equal(fc.scales, scales.astype(mx.float32))
    assert mx.array_equal(fc.biases, biases.astype(mx.float32))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 5}, r"no 5 bits; give 4 or 8 bits"),
        ({"group_size": 32}, r"needs its bits; give 4 or 8 bits"),
        ({"bits": 4, "group_size": 16}, r"no group size 16; give 32, 64 or 128"),
        ({"bits": 4, "group_size": 16, "mode": "mxfp4"}, r"no group size 16; give 32"),
        ({"bits": 8, "mode": "mxfp4"}, r"no 8 bits; give 4 bits"),
        ({"bits": 4, "mode": "mxfp8"}, r"no 4 bits; give 8 bits"),
        ({"group_size": 64, "mode": "nvfp4"}, r"no group size 64; give 16"),
        ({"bits": 4, "mode": "fp4"}, r"no mode fp4; give affine, mxfp4, nvfp4 or mxfp8"),
    ],
)
def test_settings_that_mlx_lacks_are_refused_with_those_it_has(settings: dict, said: str) -> None:
    with pytest.raises(DFlashError, match=said):
        Quantization.choose(**settings)


@pytest.mark.parametrize("mode", list(LEGAL))
def test_all_settings_that_are_offered_exist_in_mlx(mode: str) -> None:
    for bits in LEGAL[mode][0]:
        for group_size in LEGAL[mode][1]:
            chosen = Quantization.choose(bits, group_size, mode)
            mx.eval(mx.quantize(mx.ones((2, 128)), chosen.group_size, chosen.bits, chosen.mode))


def test_layers_that_the_group_size_does_not_divide_are_left(tmp_path: Path) -> None:
    config = published.qwen3() | {"intermediate_size": 160}
    published.write(tmp_path / "draft", config)
    draft = read_draft(tmp_path / "draft")
    left = quantize_draft(draft, Quantization.choose(4, 64))
    assert set(left) == {f"layers.{i}.mlp.down_proj" for i in range(5)}
    assert all("160 wide" in reason and "64" in reason for reason in left.values())
    assert {path for path, layer in linear_layers(draft) if "scales" not in layer} == set(left)


def test_a_group_size_that_divides_nothing_is_an_error(tmp_path: Path) -> None:
    config = published.qwen3(width=96) | {"intermediate_size": 160, "num_attention_heads": 1}
    published.write(tmp_path / "draft", config)
    with pytest.raises(DFlashError, match="No layer of this draft can be quantized"):
        load_draft(tmp_path / "draft", bits=4, group_size=128)


def test_quantizing_again_does_nothing_and_to_more_bits_is_refused(tmp_path: Path) -> None:
    published.write(tmp_path / "draft", published.qwen3())
    draft = read_draft(tmp_path / "draft")
    quantize_draft(draft, Quantization.choose(4))
    packed = draft.fc.weight
    quantize_draft(draft, Quantization.choose(4))
    assert draft.fc.weight is packed
    with pytest.raises(DFlashError, match="4 bits already"):
        quantize_draft(draft, Quantization.choose(8))


def test_eight_bits_can_become_four(tmp_path: Path) -> None:
    published.write(tmp_path / "draft", published.qwen3())
    draft = read_draft(tmp_path / "draft")
    quantize_draft(draft, Quantization.choose(8))
    eight = mx.dequantize(draft.fc.weight, draft.fc.scales, draft.fc.biases, 64, 8)
    quantize_draft(draft, Quantization.choose(4))
    assert mx.array_equal(draft.fc.weight, mx.quantize(eight, group_size=64, bits=4)[0])
    assert quantization_block(draft) == {"group_size": 64, "bits": 4, "mode": "affine"}


def test_biases_of_attention_stay(tmp_path: Path) -> None:
    published.write(tmp_path / "draft", published.qwen3() | {"attention_bias": True})
    plain = load_draft(tmp_path / "draft")
    draft = load_draft(tmp_path / "draft", bits=8)
    bias = draft.layers[0].self_attn.q_proj.bias
    assert mx.array_equal(bias, plain.layers[0].self_attn.q_proj.bias)
    assert mx.allclose(hidden(draft), hidden(plain), atol=0.2)


def test_a_quantization_block_of_another_runtime_is_named(tmp_path: Path) -> None:
    config = published.qwen3() | {"quantization_config": {"quant_method": "fp8"}}
    published.write(tmp_path / "draft", config)
    with pytest.raises(CheckpointError, match="without bits, so it is not MLX's"):
        load_draft(tmp_path / "draft")


def test_integers_where_weights_belong_are_named(tmp_path: Path) -> None:
    config = published.qwen3()
    tensors = published.tensors(config)
    tensors["fc.weight"] = tensors["fc.weight"].astype(mx.uint8)
    with pytest.raises(CheckpointError, match=r"fc\.weight holds uint8 numbers"):
        build_draft(draft_config(config), tensors)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_settings_of_single_layers_are_found_under_either_name(tmp_path: Path, prefix: str) -> None:
    config = published.qwen3()
    published.write(tmp_path / "draft", config)
    draft = read_draft(tmp_path / "draft")
    quantize_draft(draft, Quantization.choose(8, 32))
    quantize_draft(draft, Quantization.choose(4), keep=["fc"])
    eight = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert quantization_block(draft) == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "fc": eight,
    }
    block = {"group_size": 64, "bits": 4, f"{prefix}fc": eight}
    built = build_draft(draft_config(config | {"quantization": block}), parameters(draft))
    assert (built.fc.bits, built.layers[0].mlp.up_proj.bits) == (8, 4)
    draft.set_dtype(mx.float32)
    assert mx.array_equal(hidden(built), hidden(draft))
