"""What a model directory is, as DFlash sees it, without reading its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dflash_mlx.checkpoint import load_draft
from dflash_mlx.conversation import max_positions
from dflash_mlx.draft import DFlashDraft, DraftConfig
from dflash_mlx.errors import DFlashError
from dflash_mlx.pairs import check_pair
from dflash_mlx.repository import is_draft_config, read_config, resolve
from dflash_mlx.target import TargetView
from dflash_mlx.target.anatomy import examine
from dflash_mlx.target.leaf import Leaf, leaves
from dflash_mlx.target_checkpoint import load_target


@dataclass(frozen=True)
class CacheKind:
    """Caches of one class: how many, which of the target's caches, and how they are rolled back."""

    name: str
    indices: tuple[int, ...]
    rollback: str


@dataclass(frozen=True)
class TargetReport:
    """A target.

    Attributes:
        family: its model type.
        layers: layer calls in a forward; taps are 0 to layers - 1.
        hidden_size, vocab_size, positions: as it is; positions None where its config has none.
        embed_scale: what the family multiplies its embedding by.
        head: "tied to the embedding" or the class of the head.
        streams: parallel residual streams; 1 as a rule.
        parameters, nbytes: of its weights as they are stored.
        quantization: its config's entry, None where it has none.
        caches: its kinds of caches, in the order of their first.
    """

    family: str
    layers: int
    hidden_size: int
    vocab_size: int
    positions: int | None
    embed_scale: float
    head: str
    streams: int
    parameters: int
    nbytes: int
    quantization: dict[str, Any] | None
    caches: tuple[CacheKind, ...]
    view: TargetView


@dataclass(frozen=True)
class DraftReport:
    """A draft: its config, and the size of its weights as they are stored."""

    config: DraftConfig
    parameters: int
    nbytes: int
    draft: DFlashDraft


def inspect(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    rows: str | None = None,
) -> TargetReport | DraftReport:
    """Look at a target or a draft, a directory or a hub id.

    Raises:
        CheckpointError: it is neither, or damaged.
        UnsupportedTarget: it is a target that DFlash cannot work with.
    """
    config = read_config(resolve(path_or_repo, revision))
    if is_draft_config(config):
        draft = load_draft(path_or_repo, revision=revision, lazy=True, rows=rows)
        return DraftReport(draft.config, *_size(draft), draft)
    target, _ = load_target(
        path_or_repo, revision=revision, lazy=True, trust_remote_code=trust_remote_code
    )
    found, view = examine(target), TargetView(target)
    tied = getattr(found.head, "__self__", None) is found.embedding
    return TargetReport(
        family=str(config.get("model_type", type(target).__name__)),
        layers=view.depth,
        hidden_size=view.hidden_size,
        vocab_size=view.vocab_size,
        positions=max_positions(target),
        embed_scale=view.embed_scale,
        head="tied to the embedding" if tied else type(found.head).__name__,
        streams=view.streams,
        parameters=_size(target)[0],
        nbytes=_size(target)[1],
        quantization=config.get("quantization"),
        caches=_caches(view),
        view=view,
    )


def misfit(target: TargetReport, draft: DraftReport) -> str | None:
    """Why a draft cannot be paired with a target, in a sentence; None if it can."""
    try:
        check_pair(target.view, draft.draft)
    except DFlashError as error:
        return str(error)
    return None


def _caches(view: TargetView) -> tuple[CacheKind, ...]:
    cache = view.make_cache()
    owners = [i for i, entry in enumerate(cache) for _ in leaves([entry])]
    names = [_name(leaf) for leaf in leaves(cache)]
    kinds: dict[tuple[str, str], list[int]] = {}
    for owner, name, rollback in zip(owners, names, view.rolls_back_by(cache), strict=True):
        kinds.setdefault((name, rollback), []).append(owner)
    return tuple(CacheKind(name, tuple(at), back) for (name, back), at in kinds.items())


def _name(leaf: Leaf) -> str:
    window = getattr(leaf, "max_size", None)
    name = type(leaf).__name__
    return f"{name}, window {window}" if isinstance(window, int) else name


def _size(module: nn.Module) -> tuple[int, int]:
    """Parameters (quantized ones counted as what they stand for) and bytes as stored."""
    arrays = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    packed = {name.removesuffix("scales") for name, _ in arrays if name.endswith(".scales")}
    bits = {f"{name}.": part.bits for name, part in module.named_modules() if hasattr(part, "bits")}
    parameters = 0.0
    for name, array in arrays:
        owner = name.rpartition(".")[0] + "."
        if owner not in packed:
            parameters += array.size
        elif name.endswith(".weight"):
            parameters += array.size * 32 / bits[owner]
    return round(parameters), sum(array.nbytes for _, array in arrays)
