"""A draft, loaded from a model directory or hub id."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dflash_mlx.draft import DFlashDraft, DraftConfig
from dflash_mlx.draft.dtype import parameters, set_activation_dtype
from dflash_mlx.draft.formats import Packaging, Rows, draft_config, embeds_draft, recognise
from dflash_mlx.draft.quantize import Quantization, quantize_draft, quantize_like
from dflash_mlx.errors import CheckpointError, said
from dflash_mlx.repository import is_draft_config, read_config, read_tensors, resolve
from dflash_mlx.torch_file import read_torch_file

MASK_FILE = "mask_embedding.pt"  # MiMo's place for what stands for the mask


def load_draft(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    lazy: bool = False,
    rows: str | None = None,
) -> DFlashDraft:
    """Load a published or converted draft, whichever format it is in.

    Args:
        path_or_repo: a directory or a hub id.
        revision: a branch, tag or commit of the hub repository.
        bits, group_size, mode: quantize the linear layers in memory; None leaves them as stored.
        lazy: leave the weights unread until they are used.
        rows: "anchor" where row k of a block proposes the token k + 1 positions after the anchor,
            the anchor's row included; "fill" where it proposes the token at its own position. None
            takes what the files say.

    Raises:
        CheckpointError: it cannot be found, is no draft of a format that is supported, or its files
            are damaged, incomplete or contradictory.
        DFlashError: it cannot be quantized so.
    """
    wanted = None
    if bits is not None or group_size is not None or mode != "affine":
        wanted = Quantization.choose(bits, group_size, mode)
    directory = resolve(path_or_repo, revision, draft=True)
    draft = read_draft(directory, name=path_or_repo, rows=rows)
    if wanted is not None:
        quantize_draft(draft, wanted)
    set_activation_dtype(draft)
    if not lazy:
        try:
            for array in parameters(draft).values():
                mx.eval(array)
        except RuntimeError as error:
            raise CheckpointError(f"{directory} cannot be read: {said(error)}.") from error
    return draft


def packaging_of(config: dict[str, Any], name: str | Path) -> Packaging:
    """How a config.json's draft is packaged; `name` is what the user calls it.

    Raises:
        CheckpointError: it is no draft's, or of a format that is not supported.
    """
    if not is_draft_config(config) and not embeds_draft(config):
        raise CheckpointError(
            f"{name} is not a DFlash draft: its config.json has no dflash_config. If it is a "
            "target, give it as the model."
        )
    return recognise(config)


def read_draft(
    directory: Path, name: str | Path | None = None, rows: str | None = None
) -> DFlashDraft:
    """The draft of a directory exactly as it is stored, unread until it is used.

    Args:
        directory: a local directory.
        name: what the user calls it, for messages.
        rows: which rows of a block propose, as in `load_draft`.

    Raises:
        CheckpointError: it is no draft of a format that is supported, or its files are damaged,
            incomplete or contradictory.
    """
    raw = read_config(directory)
    packaging = packaging_of(raw, name or directory)
    stored = read_tensors(directory)
    tensors = packaging.translate(stored)
    if "d2t" in tensors:
        tensors["d2t"] = _offsets(tensors["d2t"], stored.get("t2d"))
    if (directory / MASK_FILE).is_file() and "mask_embedding" not in tensors:
        tensors["mask_embedding"] = next(iter(read_torch_file(directory / MASK_FILE).values()))
    if "mask_embedding" in tensors:
        tensors["mask_embedding"] = tensors["mask_embedding"].reshape(-1)
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}
    config = draft_config(raw, shapes, Rows.of(rows), packaging)
    return assemble_draft(config, tensors, packaging)


def _offsets(d2t: mx.array, t2d: mx.array | None) -> mx.array:
    """A reduced vocabulary's map [Vd] as it is published: from an id of the draft to the target's.

    Args:
        t2d: bool [V], which of the target's ids there are; where it says that `d2t` holds these
            ids themselves, they are made offsets.
    """
    if not mx.issubdtype(d2t.dtype, mx.integer) or d2t.ndim != 1:
        return d2t  # refused with the other tensors
    d2t = d2t.astype(mx.int64)
    if t2d is None or t2d.ndim != 1:
        return d2t
    own, stored = np.arange(d2t.size), np.array(d2t)
    listed = np.flatnonzero(np.array(t2d))
    ids_themselves = np.array_equal(np.sort(stored), listed)
    if ids_themselves and not np.array_equal(np.sort(stored + own), listed):
        return mx.array(stored - own)
    return d2t


def build_draft(config: DraftConfig, tensors: dict[str, mx.array]) -> DFlashDraft:
    """A draft with the given weights, in the dtype that it computes in on this machine.

    Raises:
        CheckpointError: as `assemble_draft`.
    """
    draft = assemble_draft(config, tensors)
    set_activation_dtype(draft)
    return draft


def assemble_draft(
    config: DraftConfig, tensors: dict[str, mx.array], packaging: Packaging | None = None
) -> DFlashDraft:
    """A draft with the given weights as they are; quantized layers are those that have scales.

    Args:
        config: the draft's.
        tensors: by our names.
        packaging: whose names the config's quantization block uses; None for ours.

    Raises:
        CheckpointError: a tensor is missing, left over, or has another shape or kind of numbers
            than the config says.
    """
    draft = DFlashDraft(config)
    if config.quantization is not None:
        quantize_like(draft, config.quantization, tensors, packaging)
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
    _check_vocabulary(draft)
    return draft


def _check_vocabulary(draft: DFlashDraft) -> None:
    """Raise CheckpointError where ids that a draft maps or embeds lie outside."""
    vocabulary, mask = draft.config.vocabulary, draft.config.mask_token_id
    if vocabulary.own_embedding and mask >= (vocabulary.size or 0):
        raise CheckpointError(
            f"The draft's mask_token_id {mask} lies outside its own embedding of "
            f"{vocabulary.size} tokens."
        )
    if vocabulary.draft_size is not None:
        ids, size = mx.arange(vocabulary.draft_size) + draft.d2t, vocabulary.size or 0
        if not mx.logical_and(ids >= 0, ids < size).all().item():
            raise CheckpointError(f"The draft's d2t leads outside its target's {size} tokens.")


def _plain(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
