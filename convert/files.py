"""Writing a draft directory: all of it or nothing."""

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import MAX_FILE_SIZE_GB

from dflash_mlx.errors import CheckpointError, DFlashError
from dflash_mlx.repository import entries, is_draft_config, read_config

SHARD_BYTES = MAX_FILE_SIZE_GB << 30
_LEGAL_TEXTS = ("license", "licence", "notice", "copying", "use_policy")


def check_output(output: Path, source: Path, force: bool) -> None:
    """See that a directory can be written, before any work is done.

    Raises:
        DFlashError: it exists and may not be replaced, or it is the source.
    """
    if output.exists() and source.exists() and output.samefile(source):
        raise DFlashError(f"{output} is the draft to convert itself; give another output.")
    if not output.exists() or (output.is_dir() and not entries(output)):
        return
    if not force:
        raise DFlashError(
            f"{output} exists already; give another output, or --force to replace it."
        )
    if not _is_draft(output):
        raise DFlashError(
            f"{output} holds more than a draft, so it is not replaced; give another output."
        )


def _is_draft(directory: Path) -> bool:
    """Whether a directory holds a draft and nothing else that anyone might miss."""
    try:
        if not is_draft_config(read_config(directory)):
            return False
    except CheckpointError:
        return False
    return all(
        file.is_file() and (file.suffix in (".safetensors", ".json", ".md") or _is_legal(file))
        for file in entries(directory)
    )


def _is_legal(file: Path) -> bool:
    return file.name.lower().startswith(_LEGAL_TEXTS)


@contextmanager
def new_directory(output: Path, needed: int) -> Iterator[Path]:
    """A directory to write into that becomes `output` when the block ends well.

    Args:
        output: replaced if it exists; see `check_output` first.
        needed: bytes that will be written.

    Raises:
        DFlashError: no room, no permission, or a full disk; nothing is left behind then.
    """
    sibling = f".{output.name}.{secrets.token_hex(4)}"
    partial, old = output.with_name(f"{sibling}.partial"), output.with_name(f"{sibling}.old")
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(output.parent).free
            if free < needed:
                raise DFlashError(
                    f"{output} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB "
                    "left; free some, or give an output elsewhere."
                )
            partial.mkdir()
            yield partial
            _move(partial, output, old)
        except OSError as error:
            raise DFlashError(
                f"{output} could not be written ({error.strerror or error}); nothing was left "
                "behind."
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, output: Path, old: Path) -> None:
    if output.exists():
        output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def split_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Tensor names in files of at most `limit` bytes, in order; a larger tensor has its own."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_weights(
    directory: Path, tensors: Iterator[tuple[str, mx.array]], sizes: Mapping[str, int], weights: int
) -> None:
    """Write tensors in mlx-lm's layout, holding one file's at a time.

    Args:
        directory: an existing one.
        tensors: evaluated arrays by name, in the order of `sizes`.
        sizes: bytes of each tensor.
        weights: numbers that they stand for, for the index.
    """
    shards = split_shards(sizes, SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{i:05}-of-{len(shards):05}.safetensors"
        )
        part = dict(islice(tensors, len(names)))
        try:
            mx.save_safetensors(str(directory / file), part, metadata={"format": "mlx"})
        except RuntimeError as error:
            raise OSError(f"{error}") from error
        weight_map.update(dict.fromkeys(part, file))
        del part
        mx.clear_cache()
    write_json(
        directory / "model.safetensors.index.json",
        {
            "metadata": {"total_size": sum(sizes.values()), "total_parameters": weights},
            "weight_map": dict(sorted(weight_map.items())),
        },
    )


def write_json(file: Path, content: dict[str, Any]) -> None:
    """A JSON file as mlx-lm writes them."""
    file.write_text(json.dumps(content, indent=4), encoding="utf-8")


def copy_legal_texts(source: Path, directory: Path) -> None:
    """Carry licences and notices over."""
    for file in entries(source):
        if file.is_file() and _is_legal(file):
            shutil.copyfile(file, directory / file.name)
