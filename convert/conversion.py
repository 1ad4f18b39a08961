"""Converting a draft: read lazily, change layer by layer, write, and read again."""

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.checkpoint import packaging_of, read_draft
from dflash_mlx.convert.card import write_card
from dflash_mlx.convert.check import check_before, check_drafts
from dflash_mlx.convert.files import (
    check_output,
    copy_legal_texts,
    new_directory,
    write_json,
    write_weights,
)
from dflash_mlx.convert.report import LayerReport, Report
from dflash_mlx.convert.task import Task
from dflash_mlx.draft import DraftConfig
from dflash_mlx.draft.dtype import parameters
from dflash_mlx.draft.formats import Packaging
from dflash_mlx.draft.quantize import (
    Quantization,
    linear_layers,
    quantization_block,
    weight_rows,
    width,
)
from dflash_mlx.errors import CheckpointError, DFlashError
from dflash_mlx.repository import read_config, read_tensors, resolve

# Called with bytes done, bytes in all, and what is next: a layer, or a word on what follows them.
Progress = Callable[[int, int, str], None]


def convert(
    draft: str | Path,
    output: str | Path | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: str | None = None,
    keep: Sequence[str] = (),
    dequantize: bool = False,
    check: str | Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    revision: str | None = None,
    rows: str | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Report:
    """Quantize, dequantize or cast a draft into a new directory that `load_draft` takes.

    Args:
        draft: a published or converted one, a directory or a hub id.
        output: the new directory; None makes one here, named after the draft and the settings.
        bits, group_size, mode: how to quantize linear layers; None is the mode's own.
        dtype: "bfloat16", "float16" or "float32" for what is not quantized, and for scales; None
            leaves it.
        keep: patterns as of file names, as "fc" or "layers.0.*"; matching layers are left as they
            are.
        dequantize: bring quantized layers back to full precision.
        check: a target, to measure the draft before and after with.
        dry_run: report what would be done, and write nothing.
        force: replace an output that exists.
        revision: branch, tag or commit of the hub repository.
        rows: which rows of a block propose, "anchor" or "fill", where the draft does not say; the
            result does.
        progress: told before each layer, before all is read again, and before the check.

    Raises:
        DFlashError: settings that do not go together, an output that exists, a draft that cannot
            be read, or a disk that is full. Nothing is left behind then.
    """
    task = Task.choose(bits, group_size, mode, dtype, tuple(keep), dequantize)
    source = resolve(draft, revision, draft=True)
    output = Path(output or _default_name(draft, task)).expanduser().absolute()
    check_output(output, source, force)
    if check is not None:
        check_before(check)
    mx.reset_peak_memory()
    packaging = packaging_of(read_config(source), draft)
    pieces, report, after, block = _plan(source, task, str(draft), str(output), packaging, rows)
    if dry_run:
        return report
    config = _config(source, task, block)
    if rows is not None:
        config["sample_from_anchor"] = after.anchor_proposes
    aside = _aside(source, packaging)
    sizes = {
        packaging.theirs(name): array.nbytes
        for piece in pieces
        for name, array in piece.arrays.items()
    } | {name: array.nbytes for name, array in aside.items()}
    with new_directory(output, report.bytes_after) as directory:
        meant: dict[str, _Tensor] = {}
        finished = _finished(pieces, meant, progress)
        named = ((packaging.theirs(name), array) for name, array in finished)
        tensors = chain(named, aside.items())
        write_weights(directory, tensors, sizes, report.weights)
        progress(report.bytes_after, report.bytes_after, "reading it again")
        write_json(directory / "config.json", config)
        copy_legal_texts(source, directory)
        target = None if check is None else str(check)
        write_card(directory, source, report, after, target)
        _compare(directory, meant, block, packaging)
        report.peak_memory = mx.get_peak_memory()
    report.written = True
    if check is not None:
        progress(report.bytes_after, report.bytes_after, "checking")
        try:
            report.check = check_drafts(check, source, output, rows)
        except DFlashError as error:
            raise DFlashError(f"{output} is finished, but not checked: {error}") from error
    return report


@dataclass
class _Piece:
    """A layer's arrays, unread; and its report and itself, before and after, if it is linear."""

    path: str
    arrays: dict[str, mx.array]
    linear: tuple[LayerReport, nn.Module, nn.Module] | None


# Shape, dtype and checksum of a tensor.
_Tensor = tuple[tuple[int, ...], mx.Dtype, int]


def _plan(
    source: Path, task: Task, name: str, output: str, packaging: Packaging, rows: str | None
) -> tuple[list[_Piece], Report, DraftConfig, dict[str, Any] | None]:
    """Everything that will be done, with nothing read yet but names and shapes."""
    # Two drafts over the same files: each layer is read once for either, when its turn comes.
    before, after = read_draft(source, name, rows), read_draft(source, name, rows)
    left = task.apply(after)
    stored, made = parameters(before), parameters(after)
    old, new = dict(linear_layers(before)), dict(linear_layers(after))
    packed = {f"{path}.{kind}" for path in new for kind in ("weight", "scales", "biases")}
    report = Report(
        source=name,
        output=output,
        settings=task.words,
        tensors_before=len(stored),
        tensors_after=len(made),
        bytes_before=sum(array.nbytes for array in stored.values()),
        bytes_after=sum(array.nbytes for array in made.values()),
        weights=sum(array.size for path, array in made.items() if path not in packed)
        + sum(layer.weight.shape[0] * width(layer) for layer in new.values()),
    )
    pieces = []
    for path, names in groupby(made, lambda name: name.rpartition(".")[0]):
        arrays = {name: made[name] for name in names}
        linear = None
        if path in new:
            layer = _layer_report(path, old[path], new[path], left.get(path))
            linear = layer, old[path], new[path]
            report.layers.append(layer)
        pieces.append(_Piece(path, arrays, linear))
    return pieces, report, after.config, quantization_block(after, packaging)


def _aside(source: Path, packaging: Packaging) -> dict[str, mx.array]:
    """Tensors that nothing here uses and other readers of the packaging expect, unread."""
    if not packaging.kept_aside:
        return {}
    tensors = read_tensors(source).items()
    return {name: array for name, array in tensors if name.startswith(packaging.kept_aside)}


def _layer_report(path: str, before: nn.Module, after: nn.Module, left: str | None) -> LayerReport:
    def words(layer: nn.Module) -> str:
        dtype = str(layer.weight.dtype).removeprefix("mlx.core.")
        return str(Quantization.of(layer) or dtype)

    def nbytes(layer: nn.Module) -> int:
        return sum(array.nbytes for array in layer.values() if isinstance(array, mx.array))

    return LayerReport(
        path=path,
        shape=(after.weight.shape[0], width(after)),
        before=words(before),
        after=words(after),
        bytes_before=nbytes(before),
        bytes_after=nbytes(after),
        quantized="scales" in after,
        left=left,
    )


def _finished(
    pieces: list[_Piece], meant: dict[str, _Tensor], progress: Progress
) -> Iterator[tuple[str, mx.array]]:
    """The converted tensors, read and computed one layer at a time; `pieces` is used up."""
    total = sum(array.nbytes for piece in pieces for array in piece.arrays.values())
    done = 0
    pieces.reverse()
    while pieces:
        piece = pieces.pop()
        progress(done, total, piece.path)
        _evaluate(piece)
        if piece.linear is not None:
            report, before, after = piece.linear
            report.error = relative_error(before, after)
            if not isfinite(report.error):
                raise _not_finite(piece.path)
            del before, after
        arrays = piece.arrays
        del piece
        for name in list(arrays):
            array = arrays.pop(name)
            done += array.nbytes
            meant[name] = (array.shape, array.dtype, checksum(array))
            yield name, array
            del array
        mx.clear_cache()


def _evaluate(piece: _Piece) -> None:
    try:
        mx.eval(piece.arrays)
    except RuntimeError as error:
        raise CheckpointError(f"The draft's {piece.path} cannot be read: {error}.") from error
    for name, array in piece.arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise _not_finite(name)


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(
        f"The draft's {name} would hold infinity or NaN: either its file is damaged, and another "
        "download helps, or its numbers exceed the dtype, and bfloat16 helps."
    )


def relative_error(before: nn.Module, after: nn.Module) -> float:
    """Norm of the change of a linear layer's weight, over the norm of the weight."""
    rows = max(1, 2**18 // width(after))
    change = norm = mx.array(0.0)
    for start in range(0, after.weight.shape[0], rows):
        old = weight_rows(before, start, start + rows).astype(mx.float32)
        new = weight_rows(after, start, start + rows).astype(mx.float32)
        change, norm = change + (new - old).square().sum(), norm + old.square().sum()
        mx.eval(change, norm)
    return sqrt(cast(float, change.item()) / max(cast(float, norm.item()), 1e-30))


def checksum(array: mx.array) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(cast(bytes, mx.contiguous(array).view(mx.uint8)))


def _config(source: Path, task: Task, block: dict[str, Any] | None) -> dict[str, Any]:
    """The source's config.json with the quantization that the result has."""
    config = read_config(source)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
        if block is not None:
            config[key] = block
    for key in ("dtype", "torch_dtype"):
        if task.dtype is not None and key in config:
            config[key] = task.dtype
    return config


def _compare(
    directory: Path,
    meant: dict[str, _Tensor],
    block: dict[str, Any] | None,
    packaging: Packaging,
) -> None:
    """Load what was written, and see that it is what was meant.

    Raises:
        DFlashError: it is not.
    """
    written = read_draft(directory)
    arrays = parameters(written)
    same = quantization_block(written, packaging) == block and arrays.keys() == meant.keys()
    del written
    for name in list(arrays):
        array = arrays.pop(name)
        same = same and (array.shape, array.dtype, checksum(array)) == meant[name]
        del array
        mx.clear_cache()
    if not same:
        raise DFlashError(
            "What was written differs from what was meant when it is read again, so nothing was "
            "kept; the disk may be failing."
        )


def _default_name(name: str | Path, task: Task) -> str:
    base = Path(name).expanduser().resolve().name if Path(name).exists() else Path(name).name
    base = re.sub(r"-(?:[48]bit|mxfp[48]|nvfp4|bfloat16|float16|float32|dequantized)$", "", base)
    return f"{base}-{task.suffix}"
