"""Conversions of tiny checkpoints in every published format: what is written, and what it gives."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from huggingface_hub import ModelCard

from dflash_mlx import load_draft
from dflash_mlx.checkpoint import read_draft
from dflash_mlx.convert import Report, convert, files
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.draft.dtype import parameters
from tests import draft_checkpoints as published

SETTINGS: list[dict[str, Any]] = [
    *({"bits": bits, "group_size": size} for bits in (4, 8) for size in (32, 64, 128)),
    *({"mode": mode} for mode in ("mxfp4", "nvfp4", "mxfp8")),
]
LINEAR = ("fc", "_proj", "_projection")


def stored(directory: Path) -> dict[str, mx.array]:
    """All tensors of a directory, whatever its files."""
    found: dict[str, mx.array] = {}
    for file in directory.glob("*.safetensors"):
        found.update(cast(dict[str, mx.array], mx.load(str(file))))
    return found


def quantization(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with MLX's own defaults filled in."""
    mode = settings.get("mode", "affine")
    bits = settings.get("bits", 8 if mode == "mxfp8" else 4)
    size = {"affine": 64, "nvfp4": 16, "mxfp4": 32, "mxfp8": 32}[mode]
    return {"group_size": settings.get("group_size", size), "bits": bits, "mode": mode}


def output(draft: DFlashDraft) -> mx.array:
    """What a block of random embeddings becomes over a random context."""
    config = draft.config
    shape = (1, 40, len(config.target_layer_ids) * config.hidden_size)
    context = draft.make_context()
    draft.extend(context, mx.random.normal(shape, key=mx.random.key(1)))
    shape = (1, config.block_size, config.hidden_size)
    return draft(mx.random.normal(shape, key=mx.random.key(2)), context)


def assert_round_trip(folder: Path, config: published.Config, settings: dict[str, Any]) -> Report:
    """Convert, and compare with the stored weights quantized here and with memory."""
    source, made = folder / "source", folder / "made"
    published.write(source, config, seed=3)
    report = convert(source, made, **settings)
    wanted, expected = quantization(settings), {}
    for name, array in published.tensors(config, seed=3).items():
        path = name.removesuffix(".weight")
        if path.endswith(LINEAR):
            packed = mx.quantize(array, **wanted)
            for kind, part in zip(("weight", "scales", "biases"), packed, strict=False):
                expected[f"{path}.{kind}"] = part
        else:
            expected[name] = array
    written = stored(made)
    assert written.keys() == expected.keys()
    for name, array in written.items():
        assert array.dtype == expected[name].dtype
        assert mx.array_equal(array, expected[name]), name
    assert mx.array_equal(
        output(load_draft(made)), output(load_draft(source, **{"bits": None, **settings}))
    )
    assert report.linear_share == 1.0
    assert report.quantized_share > 0.9
    return report


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("width", [128, 256])
def test_every_setting(tmp_path: Path, width: int, settings: dict[str, Any]) -> None:
    config = published.qwen3(width) | {"num_hidden_layers": 2, "layer_types": None}
    assert_round_trip(tmp_path, config, settings)


@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("family", published.FAMILIES)
def test_every_family(tmp_path: Path, family: str, width: int) -> None:
    config = published.FAMILIES[family](width)
    assert_round_trip(tmp_path, config, {"bits": 4 if width == 128 else 8})


def test_a_report_counts_what_is_on_disk(tmp_path: Path) -> None:
    report = assert_round_trip(tmp_path, published.qwen3(), {"bits": 4, "group_size": 32})
    before, after = stored(tmp_path / "source"), stored(tmp_path / "made")
    assert (report.tensors_before, report.tensors_after) == (len(before), len(after))
    assert report.bytes_before == sum(array.nbytes for array in before.values())
    assert report.bytes_after == sum(array.nbytes for array in after.values())
    assert report.weights == sum(array.size for array in before.values())
    fc = report.layers[0]
    weight = before["fc.weight"].astype(mx.float32)
    parts = (after["fc.weight"], after["fc.scales"], after["fc.biases"])
    change = mx.dequantize(*parts, 32, 4).astype(mx.float32) - weight
    expected = mx.linalg.norm(change) / mx.linalg.norm(weight)
    assert fc.path == "fc" and fc.error == pytest.approx(expected.item(), rel=1e-4)
    errors = [layer.error for layer in report.layers if layer.error is not None]
    assert len(errors) == len(report.layers) == 1 + 7 * 5
    assert report.mean_error == pytest.approx(sum(errors) / len(errors))
    assert report.worst_error is not None and report.worst_error.error == max(errors)
    assert json.loads(json.dumps(report.to_dict()))["linear_share"] == 1.0


def test_errors_of_large_layers_are_summed_over_rows(tmp_path: Path) -> None:
    """A weight of more numbers than are compared at once."""
    config = published.qwen3() | {"num_hidden_layers": 1, "layer_types": None}
    config["intermediate_size"] = 2**15 + 2**13
    report = assert_round_trip(tmp_path, config, {"bits": 4})
    for layer in report.layers:
        assert layer.error == pytest.approx(0.09, abs=0.01), layer.path


def test_config_keeps_every_key_and_gains_the_quantization(tmp_path: Path) -> None:
    config = published.gpt_oss()
    assert_round_trip(tmp_path, config, {"bits": 8})
    written = json.loads((tmp_path / "made/config.json").read_text())
    block = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert written == config | {"quantization": block, "quantization_config": block}


def test_shards_and_index_are_those_of_mlx_lm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARD_BYTES", 300_000)
    report = assert_round_trip(tmp_path, published.qwen3(), {"bits": 4})
    made = tmp_path / "made"
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {
        "total_size": report.bytes_after,
        "total_parameters": report.weights,
    }
    names = sorted(set(index["weight_map"].values()))
    count = len(names)
    assert count > 2
    assert names == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name in names:
        loaded: Any = mx.load(str(made / name), return_metadata=True)
        part, metadata = loaded
        assert metadata == {"format": "mlx"}
        assert {key for key, file in index["weight_map"].items() if file == name} == part.keys()
        assert len(part) == 1 or sum(array.nbytes for array in part.values()) <= 300_000


def test_published_shards_and_prefix_are_read(tmp_path: Path) -> None:
    config = published.kimi()
    published.write(tmp_path / "one", config, seed=5)
    published.write(tmp_path / "many", config, seed=5, shards=3, prefix="model.")
    convert(tmp_path / "one", tmp_path / "a", bits=4)
    convert(tmp_path / "many", tmp_path / "b", bits=4)
    assert same(stored(tmp_path / "a"), stored(tmp_path / "b"))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype and bool(mx.array_equal(x, b[name]).item())
        for name, x in a.items()
    )


def test_kept_layers_are_left_at_full_precision(tmp_path: Path) -> None:
    config = published.qwen3()
    published.write(tmp_path / "source", config)
    keep = ["fc", "layers.0.*", "*.down_proj"]
    report = convert(tmp_path / "source", tmp_path / "made", bits=4, keep=keep)
    kept = {layer.path for layer in report.layers if layer.left == "kept"}
    expected = {"fc", *(f"layers.{i}.mlp.down_proj" for i in range(5))}
    expected |= {layer.path for layer in report.layers if layer.path.startswith("layers.0.")}
    assert kept == expected
    written, original = stored(tmp_path / "made"), published.tensors(config)
    for layer in report.layers:
        scaled = f"{layer.path}.scales" in written
        assert scaled == layer.quantized == (layer.path not in kept)
        if layer.path in kept:
            assert mx.array_equal(written[f"{layer.path}.weight"], original[f"{layer.path}.weight"])
    block = json.loads((tmp_path / "made/config.json").read_text())["quantization"]
    assert {path for path, value in block.items() if value is False} == kept
    in_file = load_draft(tmp_path / "made")
    assert parameters(in_file).keys() == written.keys()
    assert mx.isfinite(output(in_file)).all()


def test_layers_of_several_settings_load_as_they_were_made(tmp_path: Path) -> None:
    """8 bits for some, 4 for the rest, in two conversions; the block names the fewer."""
    published.write(tmp_path / "source", published.gemma4())
    convert(tmp_path / "source", tmp_path / "eight", bits=8, group_size=32)
    convert(tmp_path / "eight", tmp_path / "mixed", bits=4, keep=["fc", "*.v_proj"])
    block = json.loads((tmp_path / "mixed/config.json").read_text())["quantization"]
    assert {key: block[key] for key in ("group_size", "bits", "mode")} == quantization({"bits": 4})
    eight = quantization({"bits": 8, "group_size": 32})
    own = {key: value for key, value in block.items() if key not in eight}
    assert own == {"fc": eight, **{f"layers.{i}.self_attn.v_proj": eight for i in range(5)}}
    draft = load_draft(tmp_path / "mixed")
    attention = draft.layers[2].self_attn
    assert (attention.v_proj.bits, attention.k_proj.bits, draft.fc.group_size) == (8, 4, 32)
    assert mx.isfinite(output(draft)).all()


@pytest.mark.parametrize(
    ("settings", "dtype", "atol"),
    [
        # Eight bits and a bias are more than bfloat16 holds; nvfp4's weights fit into it.
        ({"bits": 8}, "bfloat16", 0.1),
        ({"bits": 8}, "float32", 1e-5),
        ({"bits": 4, "group_size": 32}, "float32", 1e-5),
        ({"mode": "nvfp4"}, "bfloat16", 1e-5),
    ],
)
def test_dequantized_weights_are_what_the_quantized_ones_stand_for(
    tmp_path: Path, settings: dict[str, Any], dtype: str, atol: float
) -> None:
    config = published.minimax()
    published.write(tmp_path / "source", config)
    convert(tmp_path / "source", tmp_path / "packed", dtype=dtype, **settings)
    report = convert(tmp_path / "packed", tmp_path / "plain", dequantize=True)
    packed, written = stored(tmp_path / "packed"), stored(tmp_path / "plain")
    original = published.tensors(config)
    assert written.keys() == original.keys()
    for key, array in written.items():
        assert (array.shape, array.dtype) == (original[key].shape, getattr(mx, dtype))
        path = key.removesuffix(".weight")
        if f"{path}.scales" in packed:
            parts = packed[key], packed[f"{path}.scales"], packed.get(f"{path}.biases")
            assert mx.array_equal(array, mx.dequantize(*parts, **quantization(settings))), key
    assert json.loads((tmp_path / "plain/config.json").read_text()) == config | {"dtype": dtype}
    assert report.linear_share == 0.0
    dequantized = read_draft(tmp_path / "plain")
    dequantized.set_dtype(mx.float32)
    difference = mx.abs(output(load_draft(tmp_path / "packed")) - output(dequantized))
    assert mx.max(difference) < atol


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_that_of_scales_and_norms(tmp_path: Path, dtype: str) -> None:
    config = published.qwen3()
    published.write(tmp_path / "source", config)
    convert(tmp_path / "source", tmp_path / "made", bits=4, dtype=dtype)
    wanted = getattr(mx, dtype)
    written = stored(tmp_path / "made")
    assert {array.dtype for array in written.values()} == {mx.uint32, wanted}
    packed = mx.quantize(published.tensors(config)["fc.weight"].astype(wanted), bits=4)
    assert mx.array_equal(written["fc.scales"], packed[1])
    assert json.loads((tmp_path / "made/config.json").read_text())["dtype"] == dtype
    assert load_draft(tmp_path / "made").dtype == mx.float32


def test_a_draft_can_be_cast_alone(tmp_path: Path) -> None:
    config = published.qwen3()
    published.write(tmp_path / "source", config)
    report = convert(tmp_path / "source", tmp_path / "made", dtype="float32")
    written = stored(tmp_path / "made")
    assert {array.dtype for array in written.values()} == {mx.float32}
    assert same(written, {k: v.astype(mx.float32) for k, v in published.tensors(config).items()})
    assert report.quantized_share == 0.0 and report.bytes_after == 2 * report.bytes_before


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    published.write(tmp_path / "source", published.llama3_1())
    dry = convert(tmp_path / "source", tmp_path / "made", mode="nvfp4", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    wet = convert(tmp_path / "source", tmp_path / "made", mode="nvfp4")
    assert not dry.written and wet.written
    assert (dry.bytes_after, dry.tensors_after) == (wet.bytes_after, wet.tensors_after)
    assert [layer.after for layer in dry.layers] == [layer.after for layer in wet.layers]
    assert dry.mean_error is None and wet.mean_error is not None


def test_the_card_names_source_target_settings_and_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = published.write(tmp_path / "snapshot", published.qwen3_5())
    (source / "README.md").write_text(
        "---\nlicense: mit\nbase_model: Qwen/Qwen3.5-9B\ntags: [dflash]\n---\n# A draft\n"
    )
    (source / "LICENSE").write_text("The terms.")
    (source / "Notice.txt").write_text("More terms.")
    hub = "z-lab/Qwen3.5-9B-DFlash"
    monkeypatch.setattr(
        "dflash_mlx.convert.conversion.resolve",
        lambda name, *args, **more: source if name == hub else Path(name),
    )
    convert(hub, tmp_path / "made", bits=4, group_size=32)
    card = ModelCard.load(tmp_path / "made/README.md")
    assert card.data.license == "mit"
    assert (card.data.base_model, card.data.base_model_relation) == (hub, "quantized")
    assert card.data.library_name == "mlx"
    for text in (hub, "Qwen/Qwen3.5-9B", "4 bit, affine, group size 32"):
        assert text in card.text
    assert (tmp_path / "made/LICENSE").read_text() == "The terms."
    assert (tmp_path / "made/Notice.txt").read_text() == "More terms."
    # A conversion of the conversion still knows where it came from.
    convert(tmp_path / "made", tmp_path / "again", mode="nvfp4")
    again = ModelCard.load(tmp_path / "again/README.md")
    assert (again.data.base_model, again.data.license) == (hub, "mit")
    assert "Qwen/Qwen3.5-9B" in again.text


def test_a_broken_card_of_the_source_does_no_harm(tmp_path: Path) -> None:
    source = published.write(tmp_path / "source", published.qwen3())
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    convert(source, tmp_path / "made", bits=8)
    assert "from source by" in (tmp_path / "made/README.md").read_text()


def test_the_output_is_named_after_the_draft_and_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    published.write(tmp_path / "draft", published.qwen3())
    for source, settings, name in (
        ("draft", {"bits": 8}, "draft-8bit"),
        ("draft-8bit", {"bits": 4}, "draft-4bit"),
        ("draft-8bit/", {"mode": "mxfp4"}, "draft-mxfp4"),
        ("draft-8bit", {"dequantize": True}, "draft-dequantized"),
        ("draft", {"dtype": "float16"}, "draft-float16"),
    ):
        assert convert(source, **settings).output == str(tmp_path / name)
        assert (tmp_path / name / "config.json").is_file()


def test_one_shard_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory stays near one shard, one layer and what compares it, whatever the draft."""
    monkeypatch.setattr(files, "SHARD_BYTES", 1_000_000)
    config = published.qwen3(256) | {"num_hidden_layers": 24, "layer_types": None}
    published.write(tmp_path / "source", config, shards=4)
    largest = 5 * 256 * 256 * 2
    others = mx.get_active_memory()  # what earlier tests still hold
    report = convert(tmp_path / "source", tmp_path / "made", bits=8)
    taken = report.peak_memory - others
    assert taken < 1_000_000 + 2 * largest + 6 * 2**20
    assert report.bytes_after > 2 * taken
