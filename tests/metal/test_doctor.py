"""doctor, with and without a GPU (the emulator) to prove kernels on."""

import importlib
import json
import os
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from dflash_mlx.cli import app as command_line
from dflash_mlx.measure import doctor
from dflash_mlx.measure.doctor import examine, published_classes
from dflash_mlx.metal.attention_class import AttentionClass
from dflash_mlx.metal.catalogue import parse
from dflash_mlx.metal.prover import Prover
from dflash_mlx.metal.rows_class import RowsClass
from dflash_mlx.metal.selection import Selection
from dflash_mlx.metal.verdicts import VerdictBook

from .emulator import need_compiler

# The package gives the function of this name, which hides its module.
command = importlib.import_module("dflash_mlx.cli.doctor")

SHAPE = AttentionClass("draft", dim=32, dtype="float32", length=4, context=512, ratio=1)
PRODUCT = RowsClass("float32", rows=3, outputs=4096, inner=1024, group_size=64, bits=4)

without_metal = pytest.mark.skipif(mx.metal.is_available(), reason="this machine has Metal")


@pytest.fixture
def app(tmp_path, monkeypatch):
    """The command line, with a hub cache and verdicts that are no one's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DFLASH_MLX_KERNELS", raising=False)
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    report = examine

    def here(**options):
        return report(hub_cache=tmp_path / "hub", **options)

    monkeypatch.setattr(command, "examine", here)
    return command_line


def emulated(behaviour: str, path: Path, time_limit: float = 60) -> Selection:
    need_compiler()
    child = (sys.executable, "-m", "tests.metal.proof_child", behaviour)
    return Selection(
        "auto", ready=lambda: True, book=VerdictBook(path), prover=Prover(child, time_limit)
    )


@without_metal
def test_without_metal_it_says_so_and_nothing_is_broken(app):
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "There is no Metal here" in result.output and "emulation" in result.output
    assert "Nothing is broken" in result.output
    assert "1 model," in result.output
    for name in ("mlx ", "mlx-lm ", "dflash-mlx ", "GB", "block_attention", "quantized_rows"):
        assert name in result.output


@without_metal
def test_json(app):
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["problems"] == []
    assert report["machine"]["chip"] and report["machine"]["versions"]["mlx"]
    assert report["kernels"]["runnable"] is False and report["kernels"]["verdicts"] == []
    assert report["hub_cache"]["models"] == 1 and report["hub_cache"]["writable"]


def test_a_bad_mode_is_a_problem(app, monkeypatch):
    monkeypatch.setenv("DFLASH_MLX_KERNELS", "maybe")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 2 and "use off, auto or on" in result.output


def test_a_hub_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    report = examine(hub_cache=tmp_path / "file" / "hub")
    assert not report["hub_cache"]["writable"]
    assert "HF_HOME" in report["problems"][0]


def test_a_hub_cache_that_does_not_exist_yet(tmp_path):
    report = examine(hub_cache=tmp_path / "not" / "yet")
    assert report["hub_cache"] == {
        "path": str(tmp_path / "not" / "yet"),
        "writable": True,
        "models": 0,
        "free_gb": report["hub_cache"]["free_gb"],
    }
    assert report["problems"] == [] and not (tmp_path / "not").exists()


def test_wrong_arithmetic_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.proof, "difference", lambda a, b: float("nan"))
    report = examine(hub_cache=tmp_path)
    assert "computes attention wrongly" in report["problems"][0]


def test_proofs_run_ahead_once(tmp_path):
    path = tmp_path / "book.json"
    told: list[str] = []
    options = {"classes": [SHAPE, PRODUCT], "progress": told.append, "hub_cache": tmp_path}
    report = examine(emulated("right", path), **options)
    assert told == [SHAPE.key, PRODUCT.key] and report["problems"] == []
    verdict, product = report["kernels"]["verdicts"]
    assert verdict["class"] == SHAPE.key and verdict["outcome"] == "faster"
    assert verdict["speed"] == 2 and verdict["error"] < 1e-5 and verdict["bit_equal"] is None
    assert product["class"] == PRODUCT.key and product["speed"] == 2
    assert product["bit_equal"] in (True, False)
    line, other = (x for x in command.lines(report) if SHAPE.key in x or PRODUCT.key in x)
    assert "2.00x plain MLX  500.000 ms, plain 1000.000 ms  largest error" in line
    assert ("rows not bit-equal" in other) != product["bit_equal"] and "bit-equal" in other

    examine(emulated("crashes", path), **options)
    assert told == [SHAPE.key, PRODUCT.key]
    report = examine(emulated("crashes", path), again=True, **options)
    assert told == [SHAPE.key, PRODUCT.key] * 2
    assert "does not run" in report["problems"][0]


def test_a_broken_kernel_is_a_problem_and_ends_with_one(app, tmp_path, monkeypatch):
    path = tmp_path / "book.json"

    def wrong(**options):
        return examine(emulated("wrong", path), classes=[SHAPE], hub_cache=tmp_path, **options)

    monkeypatch.setattr(command, "examine", wrong)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "gave wrong results" in result.output
    assert "Nothing is broken" not in result.output


def test_verdicts_that_cannot_be_kept_are_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    selection = emulated("right", tmp_path / "file" / "book.json")
    report = examine(selection, classes=[SHAPE], hub_cache=tmp_path)
    assert any("cannot be kept" in problem for problem in report["problems"])


def test_switched_off(tmp_path):
    selection = emulated("crashes", tmp_path / "book.json")
    selection.mode = "off"
    report = examine(selection, hub_cache=tmp_path)
    assert report["kernels"]["note"] == doctor.SWITCHED_OFF
    assert report["kernels"]["verdicts"] == []


def test_published_classes_have_keys():
    for shape in published_classes():
        assert parse(shape.key) == shape


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_hub_cache_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert not examine(hub_cache=tmp_path)["hub_cache"]["writable"]
    finally:
        tmp_path.chmod(0o700)
