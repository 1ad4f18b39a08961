"""Conversions that cannot be done: a clear sentence, and nothing left behind."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from dflash_mlx import load_draft
from dflash_mlx.convert import convert
from dflash_mlx.errors import CheckpointError, DFlashError
from tests import draft_checkpoints as published


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return published.write(tmp_path / "source", published.qwen3())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "Nothing is asked for"),
        ({"bits": 3}, "give 4 or 8 bits"),
        ({"bits": 4, "group_size": 256}, "give 32, 64 or 128"),
        ({"bits": 4, "dequantize": True}, "not both"),
        ({"mode": "mxfp4", "dequantize": True}, "not both"),
        ({"dtype": "float64"}, "give one of bfloat16, float16, float32"),
        ({"dtype": "float16", "keep": ["fc"]}, "give bits too"),
        ({"bits": 4, "keep": ["fc", "head"]}, "No layer matches head"),
        ({"bits": 4, "keep": ["*"]}, "all are kept"),
        ({"dequantize": True}, "is not quantized"),
    ],
)
def test_settings_that_make_no_sense(source: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DFlashError, match=said):
        convert(source, source.parent / "made", **settings)
    assert names(source.parent) == {"source"}


def test_an_output_that_exists_is_not_touched(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    convert(source, made, bits=8)
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    with pytest.raises(DFlashError, match=r"made exists already; .* --force"):
        convert(source, made, bits=4)
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_force_replaces_a_draft(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    convert(source, made, bits=8)
    (made / "README.md").write_text("old")
    (made / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    convert(source, made, bits=4, force=True)
    assert load_draft(made).fc.bits == 4
    assert names(made) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    }
    assert names(tmp_path) == {"source", "made"}


@pytest.mark.parametrize("also", ["notes.txt", ".git/config", "config.json"])
def test_force_replaces_nothing_but_a_draft(source: Path, tmp_path: Path, also: str) -> None:
    made = tmp_path / "made"
    convert(source, made, bits=8)
    (made / also).parent.mkdir(exist_ok=True)
    (made / also).write_text("{}")
    with pytest.raises(DFlashError, match="holds more than a draft"):
        convert(source, made, bits=4, force=True)
    assert (made / also).read_text() == "{}"


def test_a_file_or_the_source_is_no_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DFlashError, match="holds more than a draft"):
        convert(source, tmp_path / "file", bits=4, force=True)
    (tmp_path / "link").symlink_to(source)
    for output in (source, tmp_path / "link", source.parent / "." / "source"):
        with pytest.raises(DFlashError, match="is the draft to convert itself"):
            convert(source, output, bits=4, force=True)
    assert load_draft(source).dtype == mx.bfloat16


def test_an_empty_directory_may_be_the_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    convert(source, tmp_path / "made", bits=4)
    assert load_draft(tmp_path / "made").fc.bits == 4


def test_folders_above_the_output_are_made(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "a/b/made", bits=4)
    assert names(tmp_path / "a/b") == {"made"}


def test_a_disk_without_room_is_known_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(DFlashError, match=r"its disk has 0\.00 GB left"):
        convert(source, tmp_path / "made", bits=4)
    assert names(tmp_path) == {"source"}


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Writing more into one file fails, as on a disk that becomes full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_becomes_full_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with largest_file(200_000), pytest.raises(DFlashError, match="could not be written"):
        convert(source, tmp_path / "made", bits=4)
    assert names(tmp_path) == {"source"}


def test_a_full_disk_leaves_the_replaced_draft(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "made", bits=8)
    with largest_file(200_000), pytest.raises(DFlashError, match="could not be written"):
        convert(source, tmp_path / "made", bits=4, force=True)
    assert names(tmp_path) == {"source", "made"}
    assert load_draft(tmp_path / "made").fc.bits == 8


def test_a_move_that_fails_brings_the_old_draft_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "made", bits=8)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DFlashError, match="Permission denied"):
        convert(source, tmp_path / "made", bits=4, force=True)
    assert names(tmp_path) == {"source", "made"}
    assert load_draft(tmp_path / "made").fc.bits == 8


def test_a_folder_that_cannot_be_made_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DFlashError, match=r"file/made could not be written \(.*\); nothing was"):
        convert(source, tmp_path / "file/made", bits=4)


@pytest.mark.parametrize("stop_at", ["fc", "layers.3.mlp.up_proj", "reading it again"])
def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path, stop_at: str) -> None:
    def progress(done: int, total: int, layer: str) -> None:
        if layer == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "made", bits=4, progress=progress)
    assert names(tmp_path) == {"source"}


def test_progress_goes_from_nothing_to_all(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = convert(source, tmp_path / "made", bits=4, progress=lambda *now: seen.append(now))
    done = [now[0] for now in seen]
    assert done == sorted(done) and done[0] == 0 and done[-1] == report.bytes_after
    assert {now[1] for now in seen} == {report.bytes_after}
    assert {layer.path for layer in report.layers} <= {now[2] for now in seen}


def test_a_file_cut_short_is_named(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        convert(source, tmp_path / "made", bits=4)
    assert names(tmp_path) == {"source"}


def rewrite(source: Path, **changes: mx.array | None) -> None:
    tensors = published.tensors(json.loads((source / "config.json").read_text()))
    for name, array in changes.items():
        name = name.replace("__", ".")
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
    mx.save_safetensors(str(source / "model.safetensors"), tensors)


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("fc__weight", None, r"lack fc\.weight"),
        ("fc__weight", mx.ones((128, 128)), r"fc\.weight is \[128, 128\]"),
        ("head__weight", mx.ones((1,)), r"hold head\.weight, which nothing uses"),
        ("fc__weight", mx.full((128, 640), float("nan")), r"fc\.\w+ would hold infinity or NaN"),
        ("norm__weight", mx.full((128,), float("inf")), r"norm\.weight would hold infinity"),
    ],
)
def test_broken_weights_are_named(
    source: Path, tmp_path: Path, name: str, array: mx.array | None, said: str
) -> None:
    rewrite(source, **{name: array})
    with pytest.raises(CheckpointError, match=said):
        convert(source, tmp_path / "made", bits=4)
    assert names(tmp_path) == {"source"}


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_no_nan_hides_in_packed_numbers(source: Path, tmp_path: Path, mode: str) -> None:
    weight = mx.ones((128, 640))
    weight[5, 7] = float("nan")
    rewrite(source, fc__weight=weight)
    with pytest.raises(CheckpointError, match="fc would hold infinity or NaN"):
        convert(source, tmp_path / "made", mode=mode)
    assert names(tmp_path) == {"source"}


@pytest.mark.parametrize("settings", [{"dtype": "float16"}, {"dtype": "float16", "bits": 4}])
def test_numbers_beyond_float16_are_found(
    source: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    rewrite(source, fc__weight=mx.full((128, 640), 1e5).astype(mx.bfloat16))
    with pytest.raises(CheckpointError, match="exceed the dtype, and bfloat16 helps"):
        convert(source, tmp_path / "made", **settings)
    assert names(tmp_path) == {"source"}


def test_what_reads_back_differently_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = mx.save_safetensors

    def spoil(file: str, arrays: dict[str, mx.array], **more: Any) -> None:
        name = "layers.2.mlp.up_proj.weight"
        save(file, arrays | {name: arrays[name] ^ mx.array(1, mx.uint32)}, **more)

    monkeypatch.setattr(mx, "save_safetensors", spoil)
    with pytest.raises(DFlashError, match="differs from what was meant"):
        convert(source, tmp_path / "made", bits=4)
    assert names(tmp_path) == {"source"}


def test_a_config_that_lost_the_quantization_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dflash_mlx.convert.conversion.quantization_block",
        lambda draft, packaging: {"group_size": 64, "bits": 8, "mode": "affine"},
    )
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "made", bits=4)
    assert names(tmp_path) == {"source"}


def test_a_target_or_nothing_as_the_draft(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target/config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(CheckpointError, match="target is not a DFlash draft"):
        convert(tmp_path / "target", tmp_path / "made", bits=4)
    with pytest.raises(CheckpointError, match="There is no directory"):
        convert(tmp_path / "none", tmp_path / "made", bits=4)


def test_a_check_target_is_looked_at_before_any_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no directory"):
        convert(source, tmp_path / "made", bits=4, check=tmp_path / "none")
    with pytest.raises(CheckpointError, match="is a draft; give the target"):
        convert(source, tmp_path / "made", bits=4, check=source)
    assert names(tmp_path) == {"source"}
