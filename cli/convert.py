"""dflash-mlx convert: a draft in, a quantized one out."""

import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from dflash_mlx.cli.options import DraftRows, UsageError, place
from dflash_mlx.cli.screen import err, out, size
from dflash_mlx.convert import CheckReport, LayerReport, Report
from dflash_mlx.convert import convert as convert_draft
from dflash_mlx.convert.conversion import Progress
from dflash_mlx.convert.task import Task
from dflash_mlx.errors import DFlashError
from dflash_mlx.files import check_writable, write_result


class Mode(StrEnum):
    """MLX's ways of quantizing weights."""

    affine = "affine"
    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"
    mxfp8 = "mxfp8"


class Dtype(StrEnum):
    """What a draft can be stored in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Source = Annotated[
    str,
    typer.Argument(
        metavar="DRAFT",
        help="The draft: a directory or a hub id; demo is the one that comes with dflash-mlx.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="The new directory. Without it, one here named after the draft and the settings.",
        show_default=False,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        metavar="4|8", help="Bits of a weight; modes but affine have theirs.", show_default=False
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Weights that share a scale: for affine 32, 64 (the default) or 128; other modes "
        "have theirs.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help="Store scales, and what is not quantized, so. Without it, as the draft has it. "
        "float16 is for storage only: such a draft runs in bfloat16 or float32.",
        show_default=False,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Leave matching layers as they are, as fc or 'layers.0.*'; may be repeated.",
        show_default=False,
    ),
]
Check = Annotated[
    str | None,
    typer.Option(
        metavar="TARGET",
        help="Measure acceptance length and draft forward before and after, with this target; "
        "demo is the one that comes with dflash-mlx.",
        show_default=False,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the report to a JSON file.", show_default=False
    ),
]


def convert(
    draft: Source,
    output: Output = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    mode: Annotated[Mode, typer.Option(help="How weights are quantized.")] = Mode.affine,
    dtype: DtypeOption = None,
    keep: Keep = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Bring a quantized draft to full precision.")
    ] = False,
    check: Check = None,
    json_file: Json = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output if it exists.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit of the draft's hub repository.", show_default=False
        ),
    ] = None,
    draft_rows: DraftRows = None,
) -> None:
    """Quantize a draft to 4 or 8 bits, into a directory that is ready to use and to share."""
    named = None if dtype is None else dtype.value
    try:
        Task.choose(bits, group_size, mode.value, named, tuple(keep or ()), dequantize)
        if json_file is not None:
            check_writable(json_file)
    except DFlashError as error:
        raise UsageError(str(error)) from error
    with _ending_cleanly(), _progress() as progress:
        report = convert_draft(
            place(draft, draft=True),
            output,
            bits=bits,
            group_size=group_size,
            mode=mode.value,
            dtype=named,
            keep=tuple(keep or ()),
            dequantize=dequantize,
            check=None if check is None else place(check),
            dry_run=dry_run,
            force=force,
            revision=revision,
            rows=draft_rows,
            progress=progress,
        )
    _show(report)
    if json_file is not None:
        write_result(json_file, json.dumps(report.to_dict(), indent=4) + "\n")


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that what is half written is removed."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr over the draft's bytes; nothing where no one watches."""
    bar = Bar(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    task = bar.add_task("", total=None)

    def show(done: int, total: int, what: str) -> None:
        bar.update(task, completed=done, total=total, description=what)

    with bar:
        yield show


def _show(report: Report) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Layers", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    for heading in ("Before", "After"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Size", "", "Error", "worst"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (kind, before, after), layers in _kinds(report).items():
        errors = [layer.error for layer in layers if layer.error is not None]
        table.add_row(
            kind,
            f"x{len(layers)}" if len(layers) > 1 else "",
            before,
            after,
            size(sum(layer.bytes_before for layer in layers)),
            size(sum(layer.bytes_after for layer in layers)),
            f"{sum(errors) / len(errors):.4f}" if errors else "",
            f"{max(errors):.4f}" if errors else "",
        )
    out.print(table)
    out.print(
        f"{report.tensors_before} tensors, {size(report.bytes_before)} before; "
        f"{report.tensors_after} tensors, {size(report.bytes_after)} after.",
        markup=False,
    )
    out.print(
        f"Quantized: {report.quantized_share:.1%} of all weights, {report.linear_share:.1%} of "
        "those of linear layers.",
        markup=False,
    )
    _show_left(report)
    worst = report.worst_error
    if worst is not None and report.mean_error is not None:
        out.print(
            f"Relative error of a layer: {report.mean_error:.4f} on average, {worst.error:.4f} at "
            f"worst ({worst.path}).",
            markup=False,
        )
    if report.check is not None:
        _show_check(report.check)
    if report.written:
        out.print(f"Written and read again: {report.output}", markup=False, soft_wrap=True)
    else:
        out.print(f"Nothing was written; it would be {report.output}", markup=False, soft_wrap=True)


def _kinds(report: Report) -> dict[tuple[str, str, str], list[LayerReport]]:
    """Layers that share a row: of one name in their blocks, and of one fate."""
    kinds: dict[tuple[str, str, str], list[LayerReport]] = {}
    for layer in report.layers:
        name = re.sub(r"^layers\.\d+\.((self_attn|mlp)\.)?", "", layer.path)
        kinds.setdefault((name, layer.before, layer.after), []).append(layer)
    return kinds


def _show_left(report: Report) -> None:
    reasons: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.left is not None:
            reasons.setdefault(layer.left, []).append(layer.path)
    for reason, paths in reasons.items():
        out.print(f"Left as they were, {reason}: {', '.join(paths)}.", markup=False)


def _show_check(check: CheckReport) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column()
    table.add_column("Before", justify="right")
    table.add_column("After", justify="right")
    before, after = check.before, check.after
    table.add_row(
        "acceptance length", f"{before.acceptance_length:.2f}", f"{after.acceptance_length:.2f}"
    )
    table.add_row(
        "draft forward", f"{before.draft_forward_ms:.1f} ms", f"{after.draft_forward_ms:.1f} ms"
    )
    out.print(f"With {check.target}:", markup=False, soft_wrap=True)
    out.print(table)
    same = "the same text" if check.same_text else "texts that differ"
    out.print(f"Both gave {same}, {check.tokens} tokens.", markup=False)
