"""A model directory or hub id <-> config and weights, with clear errors."""

import json
import struct
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load as load_mlx_lm

from dflash_mlx.draft import DFlash2Draft, DFlashDraft, DraftConfig
from dflash_mlx.draft.dtype import parameters, set_activation_dtype
from dflash_mlx.draft.quantize import Quantization, quantize_draft, quantize_like
from dflash_mlx.errors import CheckpointError

_DRAFT_FILES = ["*.json", "*.safetensors", "*.md", "LICEN[CS]E*", "NOTICE*"]
_TARGET_FILES = [
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]


def resolve(path_or_repo: str | Path, revision: str | None = None, *, draft: bool = False) -> Path:
    """The local directory of a path or hub id, downloaded if it has to be.

    Raises:
        CheckpointError: there is no such directory, repository, revision or network.
    """
    directory = local_directory(path_or_repo)
    if directory is not None:
        return directory
    name = str(path_or_repo)
    try:
        files = _DRAFT_FILES if draft else _TARGET_FILES
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its terms on the hub and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r} on the hub.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is neither a directory nor a hub repository {name} that you can read."
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{name} is neither a directory nor a valid hub id.") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"There is no directory {name}, the local hub cache ({HF_HUB_CACHE}) has no such "
            "repository, and the hub, from where it would be fetched to there, cannot be reached; "
            "check the name or the network."
        ) from error
    except Exception as error:
        # The hub client's transport raises classes of its own for a missing network.
        raise CheckpointError(f"{name} could not be fetched from the hub: {error}.") from error


def local_directory(path_or_repo: str | Path) -> Path | None:
    """The directory that a path names; None for what can only be a hub id.

    Raises:
        CheckpointError: it is a file, or no hub id and nothing is there.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if path.exists():
        raise CheckpointError(f"{name} is a file; give the directory that holds config.json.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"There is no directory {name}; give a model directory, or a hub id like org/name."
        )
    return None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} has no config.json; give a model directory or a hub id."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds no JSON object.")
    return config


def is_draft_config(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a draft rather than a target."""
    names = config.get("architectures") or []
    return "dflash_config" in config or any("DFlash" in str(name) for name in names)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: those its index names, or all there are.

    Every file is checked for truncation, so that a broken download is found before it is used.

    Raises:
        CheckpointError: none is there, the index names a missing one, or one is damaged.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} cannot be read as a safetensors index.") from error
        files = [directory / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {', '.join(missing)}, which its index names; download it again."
            )
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no safetensors weights.")
    for file in files:
        _check_safetensors(file)
    return files


def _check_safetensors(file: Path) -> None:
    damaged = CheckpointError(f"{file} is damaged or cut short; download it again.")
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise damaged
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if error is damaged:
            raise
        raise damaged from error
    if size != 8 + length + max(ends, default=0):
        raise damaged


def read_tensors(directory: Path) -> dict[str, mx.array]:
    """All tensors of a model directory, lazily, without a leading `model.`.

    Raises:
        CheckpointError: as `weight_files`, or a tensor stands in two files.
    """
    tensors: dict[str, mx.array] = {}
    for file in weight_files(directory):
        try:
            loaded = cast(dict[str, mx.array], mx.load(str(file)))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}.") from error
        for name, array in loaded.items():
            name = name.removeprefix("model.")
            if name in tensors:
                raise CheckpointError(f"{directory} holds the tensor {name} twice.")
            tensors[name] = array
    return tensors


def load_draft(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    lazy: bool = False,
) -> DFlashDraft:
    """Load a published or converted draft.

    Args:
        path_or_repo: a directory or a hub id.
        revision: a branch, tag or commit of the hub repository.
        bits, group_size, mode: quantize the linear layers in memory; None leaves them as stored.
        lazy: leave the weights unread until they are used.

    Raises:
        CheckpointError: it cannot be found, is no DFlash draft, or its files are damaged,
            incomplete or contradictory.
        DFlashError: it cannot be quantized so.
    """
    wanted = None
    if bits is not None or group_size is not None or mode != "affine":
        wanted = Quantization.choose(bits, group_size, mode)
    directory = resolve(path_or_repo, revision, draft=True)
    draft = read_draft(directory, name=path_or_repo)
    if wanted is not None:
        quantize_draft(draft, wanted)
    set_activation_dtype(draft)
    if not lazy:
        try:
            for array in parameters(draft).values():
                mx.eval(array)
        except RuntimeError as error:
            raise CheckpointError(f"{directory} cannot be read: {error}.") from error
    return draft


def read_draft(directory: Path, name: str | Path | None = None) -> DFlashDraft:
    """The draft of a directory exactly as it is stored, unread until it is used.

    Args:
        directory: a local directory.
        name: what the user calls it, for messages.

    Raises:
        CheckpointError: it is no DFlash draft, or its files are damaged, incomplete or
            contradictory.
    """
    raw = read_config(directory)
    if not is_draft_config(raw):
        raise CheckpointError(
            f"{name or directory} is not a DFlash draft: its config.json has no dflash_config. If "
            "it is a target, give it as the model."
        )
    return assemble_draft(DraftConfig.from_dict(raw), read_tensors(directory))


def build_draft(config: DraftConfig, tensors: dict[str, mx.array]) -> DFlashDraft:
    """A draft with the given weights, in the dtype that it computes in on this machine.

    Raises:
        CheckpointError: as `assemble_draft`.
    """
    draft = assemble_draft(config, tensors)
    set_activation_dtype(draft)
    return draft


def assemble_draft(config: DraftConfig, tensors: dict[str, mx.array]) -> DFlashDraft:
    """A draft with the given weights as they are; quantized layers are those that have scales.

    Raises:
        CheckpointError: a tensor is missing, left over, or has another shape or kind of numbers
            than the config says.
    """
    draft = DFlashDraft(config) if config.dflash2 is None else DFlash2Draft(config)
    if config.quantization is not None:
        quantize_like(draft, config.quantization, tensors)
    wanted = parameters(draft)
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"The draft's weights lack {_some(missing)}.")
    extra = sorted(tensors.keys() - wanted.keys())
    if extra:
        raise CheckpointError(f"The draft's weights hold {_some(extra)}, which nothing uses.")
    for name, array in wanted.items():
        given = tensors[name]
        if given.shape != array.shape:
            raise CheckpointError(
                f"The draft's {name} is {list(given.shape)}, but its config.json makes it "
                f"{list(array.shape)}."
            )
        floating = mx.issubdtype(array.dtype, mx.floating)
        if given.dtype != array.dtype and not (
            floating and mx.issubdtype(given.dtype, mx.floating)
        ):
            raise CheckpointError(
                f"The draft's {name} holds {_plain(given.dtype)} numbers, but its config.json "
                f"asks for {'floating ones' if floating else _plain(array.dtype)}."
            )
    draft.load_weights(list(tensors.items()))
    draft.eval()
    return draft


def _plain(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _some(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def load_target(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a target and its tokenizer through mlx_lm, after a look at what could be wrong.

    Raises:
        CheckpointError: it cannot be found, is a draft, or its files are damaged, incomplete or of
            a family that mlx-lm does not know.
    """
    directory = resolve(path_or_repo, revision)
    config = read_config(directory)
    if is_draft_config(config):
        raise CheckpointError(
            f"{path_or_repo} is a DFlash draft; give its target as the model and this as the draft."
        )
    weight_files(directory)
    if not any(
        (directory / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    ):
        raise CheckpointError(
            f"{directory} has no tokenizer files (tokenizer.json); download it again."
        )
    if adapter_path is not None and not Path(adapter_path).is_dir():
        raise CheckpointError(f"There is no adapter directory {adapter_path}.")
    tokenizer_config = dict(tokenizer_config or {})
    if trust_remote_code:
        tokenizer_config.setdefault("trust_remote_code", True)
    try:
        target, tokenizer = load_mlx_lm(  # type: ignore[misc]
            str(directory),
            tokenizer_config=tokenizer_config,
            model_config=model_config,
            adapter_path=adapter_path,
            lazy=lazy,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"mlx-lm cannot load {path_or_repo}: {_first_line(error)}") from error
    return target, tokenizer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
