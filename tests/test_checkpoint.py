"""Published files, one or sharded, with or without a prefix; and what is said of broken ones."""

import json
import shutil
from pathlib import Path

import httpx
import mlx.core as mx
import pytest
from huggingface_hub.errors import GatedRepoError
from mlx.utils import tree_flatten

from dflash_mlx import repository
from dflash_mlx.checkpoint import load_draft
from dflash_mlx.draft.formats.fields import default_target_layer_ids
from dflash_mlx.errors import CheckpointError
from dflash_mlx.repository import resolve
from dflash_mlx.target_checkpoint import load_target
from tests.tiny_pair import write_draft, write_pair


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_draft(tmp_path / "draft", 100)
    return tmp_path / "draft"


def rewrite(folder: Path, change: dict | None = None, drop: tuple[str, ...] = ()) -> None:
    config = json.loads((folder / "config.json").read_text()) | (change or {})
    for key in drop:
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))


def tensors(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))


def refused(folder: Path, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as error:
        load_draft(folder)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_one_file_shards_and_a_prefix_hold_the_same_draft(folder: Path, tmp_path: Path) -> None:
    whole = dict(tree_flatten(load_draft(folder).parameters()))
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(folder / "config.json", sharded)
    names, index = sorted(tensors(folder)), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        mx.save_safetensors(str(sharded / file), {f"model.{n}": tensors(folder)[n] for n in part})
        index |= {f"model.{n}": file for n in part}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = dict(tree_flatten(load_draft(sharded).parameters()))
    assert loaded.keys() == whole.keys()
    assert all(mx.array_equal(loaded[name], whole[name]) for name in whole)


def test_unknown_keys_are_ignored_and_published_places_are_read(folder: Path) -> None:
    rewrite(
        folder,
        {
            "transformers_version": "4.57",
            "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
            "dflash_config": {
                "target_layer_ids": [1, 2],
                "mask_token_id": 5,
                "block_size": 4,
                "other": 1,
            },
        },
        drop=("rope_theta", "block_size"),
    )
    config = load_draft(folder).config
    theta = config.layers[0].rope.theta
    assert (theta, config.block_size, config.mask_token_id) == (5e5, 4, 5)


@pytest.mark.parametrize(
    ("change", "drop", "said"),
    [
        ({}, ("hidden_size", "rms_norm_eps"), "lacks hidden_size, rms_norm_eps"),
        ({}, ("block_size",), "lacks block_size"),
        ({}, ("rope_theta",), "lacks rope_theta"),
        ({"dflash_config": {"target_layer_ids": [1, 2]}}, (), "lacks dflash_config.mask_token_id"),
        (
            {"dflash_config": {"target_layer_ids": [1, 2], "mask_token_id": 5, "block_size": 9}},
            (),
            "block_size is 4 at the top and 9",
        ),
        ({"dflash_config": {"target_layer_ids": [], "mask_token_id": 5}}, (), "target_layer_ids"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, (), "do not divide"),
        ({"hidden_size": "64"}, (), "hidden_size '64'"),
        ({"layer_types": ["full_attention"] * 2}, (), "2 layer_types for 1 layers"),
        ({"layer_types": ["mamba"]}, (), "layer_types mamba"),
        ({"layer_types": ["sliding_attention"]}, (), "sliding_window None"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2}}, (), "rope_scaling"),
        ({"architectures": ["LagunaDFlashModel"]}, (), "LagunaDFlashModel"),
        ({"architectures": ["Qwen3ForCausalLM"]}, ("dflash_config",), "not a DFlash draft"),
        ({"block_size": 1}, (), "block_size 1"),
        ({"dflash_config": {"target_layer_ids": [1], "mask_token_id": 5}}, (), r"fc.weight is"),
        ({"intermediate_size": 32}, (), "its config.json makes it"),
    ],
)
def test_a_config_that_cannot_be_right(
    folder: Path, change: dict, drop: tuple[str, ...], said: str
) -> None:
    rewrite(folder, change, drop)
    refused(folder, said)


def test_missing_and_left_over_tensors_are_listed(folder: Path) -> None:
    found = tensors(folder)
    mx.eval(found)
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, {n: a for n, a in found.items() if n != "norm.weight"})
    refused(folder, "lack norm.weight")
    mx.save_safetensors(file, found | {"layers.0.self_attn.g_proj.weight": mx.zeros((2, 2))})
    refused(folder, "hold layers.0.self_attn.g_proj.weight, which nothing uses")


def test_damaged_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-100], whole[:5], b"", whole[:200], b"\xff" * 3000, whole + b"x"):
        file.write_bytes(broken)
        refused(folder, "damaged or cut short")
    file.unlink()
    refused(folder, "no safetensors weights")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    )
    refused(folder, "lacks gone.safetensors")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(folder, "cannot be read as a safetensors index")
    (folder / "config.json").write_text("{")
    refused(folder, "cannot be read as JSON")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, said in (
        (str(tmp_path / "nothing"), "no directory"),
        ("./nothing", "no directory"),
        ("a/b/c", "no directory"),
        ("nothing", "no directory"),
        ("org/na me", "neither a directory nor a valid hub id"),
    ):
        with pytest.raises(CheckpointError, match=said):
            resolve(name)
    with pytest.raises(CheckpointError, match="hub"):
        resolve("nobody/no-such-model")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "file")


def test_targets_that_cannot_be_loaded(tmp_path: Path) -> None:
    target, draft = write_pair(tmp_path)
    with pytest.raises(CheckpointError, match="is a DFlash draft"):
        load_target(draft)
    with pytest.raises(CheckpointError, match="no adapter directory"):
        load_target(target, adapter_path=str(tmp_path / "none"))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(CheckpointError, match="nonesuch"):
        load_target(target)
    (target / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    (target / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="trust"):
        load_target(target)
    (target / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (target / file).rename(target / f"{file}.away")
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        load_target(target)


def test_a_gated_repository_says_how_to_get_access(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: object) -> str:
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "x")))

    monkeypatch.setattr(repository, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"huggingface.co/z-lab/some-draft.*hf auth login"):
        resolve("z-lab/some-draft", draft=True)


def test_default_taps() -> None:
    assert default_target_layer_ids(1, 36) == [18]
    assert default_target_layer_ids(5, 36) == [1, 9, 17, 25, 33]
    assert default_target_layer_ids(5, 32) == [1, 8, 15, 22, 29]
