"""A model directory or hub id -> its local files, config and tensors, with clear errors."""

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE, REPO_ID_SEPARATOR
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from dflash_mlx.errors import CheckpointError, said
from dflash_mlx.json_text import parse_json
from dflash_mlx.safetensors import tensor_shapes
from dflash_mlx.torch_file import read_torch_file

_DRAFT_FILES = ["*.json", "*.safetensors", "*.md", "LICEN[CS]E*", "NOTICE*", "mask_embedding.pt"]
# For drafts without safetensors.
_TORCH_FILES = ["*.json", "pytorch_model*.bin"]
# What the class names of drafts have, those that are refused among them.
_DRAFT_WORDS = ("DFlash", "DSpark", "DFly", "Domino", "AssistantModel", "Eagle", "EAGLE")
_TARGET_FILES = DEFAULT_ALLOW_PATTERNS


def check_source(path_or_repo: Any) -> None:
    """Raise CheckpointError unless something may be the name of a directory or repository."""
    if not isinstance(path_or_repo, (str, Path)) or not str(path_or_repo).strip():
        what = "empty" if isinstance(path_or_repo, str) else f"a {type(path_or_repo).__name__}"
        raise CheckpointError(f"A model's name is {what}; give a directory or a hub id.")


def resolve(path_or_repo: str | Path, revision: str | None = None, *, draft: bool = False) -> Path:
    """The local directory of a path or hub id, downloaded if it has to be.

    Raises:
        CheckpointError: there is no such directory, repository, revision or network.
    """
    check_source(path_or_repo)
    directory = local_directory(path_or_repo)
    if directory is not None:
        return directory
    name = str(path_or_repo)
    try:
        files = _DRAFT_FILES if draft else _TARGET_FILES
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=files))
        if draft and not any(directory.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=_TORCH_FILES)
        return directory
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: ask for access at https://huggingface.co/{name}, and log in with "
            "`hf auth login`."
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
        return _without_the_hub(name, revision, error)
    except Exception as error:
        # The hub client's transport raises classes of its own for a missing network.
        raise CheckpointError(f"{name} could not be fetched from the hub: {error}.") from error


def _without_the_hub(name: str, revision: str | None, error: Exception) -> Path:
    """What the cache holds of a repository, if that may do: licences and the like may be missing.

    Whether the weights are all there is seen when they are read.
    """
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(found, str):
        return Path(found).parent
    cached = Path(HF_HUB_CACHE, REPO_ID_SEPARATOR.join(["models", *name.split("/")]))
    if not cached.is_dir():
        reason = (
            f"There is no directory {name}, the local hub cache ({HF_HUB_CACHE}) has no such "
            "repository, and the hub, from where it would be fetched to there, cannot be reached; "
            "check the name or the network."
        )
    elif revision is not None and not (cached / "refs" / revision).is_file():
        reason = (
            f"The local hub cache has {name}, but not its revision {revision!r}, and the hub "
            "cannot be reached; leave the revision out, or see to the network."
        )
    else:
        reason = (
            f"The local hub cache has {name} without its config.json, and the hub, which has the "
            "rest, cannot be reached; see to the network."
        )
    raise CheckpointError(reason) from error


def entries(directory: Path, pattern: str = "*") -> list[Path]:
    """What a directory holds, sorted, without what macOS leaves in it.

    That is a .DS_Store in folders, and on foreign volumes a ._ file beside every other one.
    """
    found = directory.glob(pattern)
    return sorted(p for p in found if p.name != ".DS_Store" and not p.name.startswith("._"))


def local_directory(path_or_repo: str | Path) -> Path | None:
    """The directory that a path names; None for what can only be a hub id.

    Raises:
        CheckpointError: it is a file, or no hub id and nothing is there.
    """
    name = str(path_or_repo)
    try:
        path = Path(path_or_repo).expanduser()
        if path.is_dir():
            return path
        is_file = path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        # Too long a name, a zero byte in it, or a home directory of nobody.
        raise CheckpointError(f"{name[:300]} is no name of a directory: {said(error)}.") from error
    if is_file:
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
        config = parse_json(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} has no config.json; give a model directory or a hub id."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {said(error)}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds no JSON object.")
    return config


def is_draft_config(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a draft rather than a target."""
    names = config.get("architectures")
    return (
        "dflash_config" in config
        or config.get("speculators_model_type") is not None
        or any(word in str(name) for name in _list(names) for word in _DRAFT_WORDS)
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def weight_files(
    directory: Path, pattern: str = "*.safetensors"
) -> dict[Path, dict[str, list[int]]]:
    """The safetensors files of a model directory: those its index names, or all of a pattern.

    Every file is checked, so that a broken download is found before it is used.

    Returns:
        Names and shapes of the tensors in each.

    Raises:
        CheckpointError: none is there, the index names a missing one, or one is damaged.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = [directory / name for name in _indexed(index)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {', '.join(missing)}, which its index names; download it again."
            )
    else:
        files = entries(directory, pattern)
    if not files:
        named = "" if pattern == "*.safetensors" else f" named {pattern}"
        raise CheckpointError(f"{directory} has no safetensors weights{named}.")
    return {file: tensor_shapes(file) for file in files}


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = set(parse_json(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read as a safetensors index.") from error
    # A name leads to no other directory, so that an index cannot have one's other files read.
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{index} cannot be read as a safetensors index.")
    return sorted(names)


def read_tensors(directory: Path) -> dict[str, mx.array]:
    """All tensors of a model directory, lazily, without a leading `model.`.

    They are read from PyTorch's files, and at once, only where there are no safetensors.

    Raises:
        CheckpointError: as `weight_files`, or a tensor stands in two files.
    """
    tensors: dict[str, mx.array] = {}
    torch_files = sorted(directory.glob("pytorch_model*.bin"))
    if any(directory.glob("*.safetensors*")):
        torch_files = []
    for file in torch_files or weight_files(directory):
        try:
            loaded = (
                read_torch_file(file)
                if torch_files
                else cast(dict[str, mx.array], mx.load(str(file)))
            )
        except CheckpointError:
            raise
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}.") from error
        for name, array in loaded.items():
            name = name.removeprefix("model.")
            if name in tensors:
                raise CheckpointError(f"{directory} holds the tensor {name} twice.")
            tensors[name] = array
    return tensors
