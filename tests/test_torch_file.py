"""PyTorch files as PyTorch writes them, read without it; and nothing in them is ever run."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dflash_mlx.checkpoint import load_draft
from dflash_mlx.errors import CheckpointError
from dflash_mlx.torch_file import read_torch_file
from tests.checkpoint_parts import write
from tests.format_checkpoints import CASES


class Storage:
    def __init__(self, kind: type, key: str, array: np.ndarray):
        self.kind, self.key, self.array = kind, key, array


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            return ("storage", obj.kind, obj.key, "cpu", obj.array.size)
        return None


def torch_stand_in() -> dict[str, types.ModuleType]:
    """Modules under PyTorch's names, with what its files name."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*args: Any) -> None:
        raise AssertionError("only its name is written")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    for name in ("FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage", "BoolStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    return {"torch": torch, "torch._utils": utils}


class Rebuilt:
    def __init__(self, *args: Any):
        self.args = args

    def __reduce__(self) -> tuple:
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.args


def save(
    file: Path,
    arrays: dict[str, tuple[str, np.ndarray, tuple, tuple]],
    monkeypatch: pytest.MonkeyPatch,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """A file of {name: (storage class, storage, shape, strides)}."""
    for name, module in torch_stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    state: dict[str, Any] = OrderedDict()
    storages: dict[str, np.ndarray] = {}
    for i, (name, (kind, array, shape, strides)) in enumerate(arrays.items()):
        storage = Storage(getattr(sys.modules["torch"], kind), str(i), array)
        state[name] = Rebuilt(storage, 0, shape, strides, False, OrderedDict())
        storages[str(i)] = array
    listing = io.BytesIO()
    Pickler(listing, protocol=2).dump(state)
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("pytorch_model/data.pkl", listing.getvalue())
        archive.writestr("pytorch_model/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"pytorch_model/data/{key}", array.tobytes())


def test_dtypes_and_strides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.arange(6, dtype=np.float32)
    brain = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    save(
        tmp_path / "f.bin",
        {
            "whole": ("FloatStorage", numbers, (2, 3), (3, 1)),
            "turned": ("FloatStorage", numbers, (3, 2), (1, 3)),
            "half": ("HalfStorage", numbers.astype(np.float16), (6,), (1,)),
            "brain": ("BFloat16Storage", brain, (6,), (1,)),
            "long": ("LongStorage", numbers.astype(np.int64), (6,), (1,)),
        },
        monkeypatch,
    )
    found = read_torch_file(tmp_path / "f.bin")
    assert found["whole"].tolist() == numbers.reshape(2, 3).tolist()
    assert found["turned"].tolist() == numbers.reshape(2, 3).T.tolist()
    assert found["brain"].dtype == mx.bfloat16 and found["half"].dtype == mx.float16
    assert found["brain"].tolist() == found["long"].tolist() == list(range(6))


def test_a_draft_in_a_torch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write(tmp_path, CASES["DFly"])
    want = load_draft(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    arrays = {
        f"draft_model.{name}": (
            "FloatStorage",
            array,
            array.shape,
            tuple(s // array.itemsize for s in array.strides),
        )
        for name, array in weights.items()
    }
    save(tmp_path / "pytorch_model.bin", arrays, monkeypatch)
    got = load_draft(tmp_path)
    assert mx.array_equal(got.fc.weight, want.fc.weight)
    assert mx.array_equal(got.layers[1].mlp.up_proj.weight, want.layers[1].mlp.up_proj.weight)


class Evil:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('ran')",)


def test_nothing_is_run_and_damage_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f.bin"
    numbers = np.arange(6, dtype=np.float32)
    good = {"a": ("FloatStorage", numbers, (6,), (1,))}
    save(file, good, monkeypatch)
    whole = file.read_bytes()
    with zipfile.ZipFile(tmp_path / "evil.bin", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": Evil()}))
    (tmp_path / "short.bin").write_bytes(whole[:-40])
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"a": 1}))
    save(tmp_path / "long.bin", {"a": ("FloatStorage", numbers, (7,), (1,))}, monkeypatch)
    save(tmp_path / "packed.bin", good, monkeypatch, zipfile.ZIP_DEFLATED)
    for name in ("evil", "short", "old", "long", "packed"):
        with pytest.raises(CheckpointError, match="cannot be read as a PyTorch file") as error:
            read_torch_file(tmp_path / f"{name}.bin")
        assert "\n" not in str(error.value)
