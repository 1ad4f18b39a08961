"""Load a target so that each rank holds a shard of it, by mlx-lm's own `shard`."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import hf_hub_download
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes

from dflash_mlx.distributed.ranks import Ranks
from dflash_mlx.errors import DFlashError, UnsupportedTarget, said
from dflash_mlx.repository import local_directory, read_config
from dflash_mlx.target_checkpoint import load_target


def check_shardable(path_or_repo: str | Path, revision: str | None = None) -> None:
    """Refuse a family that mlx-lm cannot shard; of a hub repository only config.json is fetched.

    What cannot be found or read is left to `load_target`, which says so.

    Raises:
        UnsupportedTarget: the family's model has no `shard`.
    """
    directory = local_directory(path_or_repo)
    if directory is None:
        try:
            file = hf_hub_download(str(path_or_repo), "config.json", revision=revision)
        except Exception:  # whatever the hub client raises, `resolve` meets it again
            return
        directory = Path(file).parent
    config = read_config(directory)
    try:
        model_class, _ = _get_classes(config)
    except (KeyError, ValueError):
        return
    if hasattr(model_class, "shard"):
        return
    family = config["model_type"]
    raise UnsupportedTarget(
        f"mlx-lm cannot shard {family}, so no more than one machine can run {path_or_repo} with a "
        "draft; start it without mlx.launch."
    )


def load_sharded(
    path_or_repo: str | Path, group: mx.distributed.Group, **options: Any
) -> tuple[nn.Module, TokenizerWrapper]:
    """This rank's shard of a target, and its tokenizer, as mlx-lm's `sharded_load` makes them.

    Args:
        path_or_repo: a directory or a hub id; a hub repository is fetched in every rank.
        group: the ranks.
        options: those of `load_target`.

    Raises:
        CheckpointError: as `load_target`.
        UnsupportedTarget: mlx-lm cannot shard the family, or not over so many ranks.
        DFlashError: an adapter was given.
    """
    if options.get("adapter_path") is not None:
        raise DFlashError(
            "mlx-lm cannot shard a model with an adapter; fuse it into the model with mlx_lm.fuse."
        )
    check_shardable(path_or_repo, options.get("revision"))
    # Lazily, so that no rank ever holds more than its shard.
    target, tokenizer = load_target(path_or_repo, **{**options, "lazy": True})
    try:
        target.shard(group)
        mx.eval(target.parameters())
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UnsupportedTarget(
            f"mlx-lm cannot shard {path_or_repo} over {group.size()} machines ({said(error)}); "
            "take another number of them."
        ) from error
    return target, tokenizer


def settle(ranks: Ranks, error: DFlashError | None) -> None:
    """Wait until all ranks have loaded; where it failed in one, all end with its sentence.

    Raises:
        DFlashError: it failed in some rank.
    """
    failed = ranks.failures(error is not None)
    if not failed:
        return
    text = ranks.told_text(str(error or ""), failed[0])
    raise error or DFlashError(f"Rank {failed[0]} cannot go on: {text}")
