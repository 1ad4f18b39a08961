"""A draft, loaded from a model directory or hub id."""

from pathlib import Path

import mlx.core as mx

from dflash_mlx.draft import DFlash2Draft, DFlashDraft, DraftConfig
from dflash_mlx.draft.dtype import parameters, set_activation_dtype
from dflash_mlx.draft.quantize import Quantization, quantize_draft, quantize_like
from dflash_mlx.errors import CheckpointError, said
from dflash_mlx.repository import is_draft_config, read_config, read_tensors, resolve


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
            raise CheckpointError(f"{directory} cannot be read: {said(error)}.") from error
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
