"""What doctor reports: the machine, the hub cache, the kernels and their proofs, what is broken."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub.constants import HF_HUB_CACHE

from dflash_mlx.measure.machine import machine
from dflash_mlx.metal import plain_block_attention, proof
from dflash_mlx.metal.attention_class import CONTEXTS, AttentionClass
from dflash_mlx.metal.catalogue import KERNELS
from dflash_mlx.metal.rows_class import ROWS, RowsClass
from dflash_mlx.metal.selection import REASONS, Selection
from dflash_mlx.metal.shape_class import ShapeClass

# Head size, query heads for each KV head and block length of the published drafts, in bfloat16.
DRAFT_SHAPES = ((128, 4, 8), (128, 4, 16), (128, 8, 16), (64, 8, 8), (64, 8, 16))
# The same of their targets where MLX's own attention is at its worst: Qwen3.5 and 3.6.
VERIFY_SHAPES = ((256, 8, 8), (256, 8, 16))
# N and K of an 8 to 9 billion parameter target, in 4 bits by groups of 64, bfloat16: attention
# output, up, down, and the head.
PRODUCT_SHAPES = ((4096, 4096), (16384, 4096), (4096, 16384), (65536, 4096))

BROKEN = ("wrong", "failed", "stalled")

EMULATED_ONLY = (
    "There is no Metal here: the kernels cannot run, and what is known of them comes from"
    " emulation alone. Plain MLX runs instead."
)
SWITCHED_OFF = "DFLASH_MLX_KERNELS is off: the kernels do not run."

Progress = Callable[[str], None]


def published_classes() -> list[ShapeClass]:
    """The shape classes that the published drafts need, and common targets of theirs."""
    attention = [("draft", *shape) for shape in DRAFT_SHAPES]
    attention += [("verify", *shape) for shape in VERIFY_SHAPES]
    classes: list[ShapeClass] = [
        AttentionClass(use, dim, "bfloat16", length, context, ratio)
        for use, dim, ratio, length in attention
        for context in CONTEXTS
    ]
    classes += [
        RowsClass("bfloat16", last, outputs, inner, group_size=64, bits=4)
        for outputs, inner in PRODUCT_SHAPES
        for _, last in ROWS
    ]
    return classes


def examine(
    selection: Selection | None = None,
    *,
    classes: Iterable[ShapeClass] | None = None,
    again: bool = False,
    progress: Progress = lambda text: None,
    hub_cache: Path = Path(HF_HUB_CACHE),
) -> dict[str, Any]:
    """Look at everything, running the proofs that have no verdict yet.

    Args:
        selection: the choice of kernels to report on; by default that of this process's
            environment.
        classes: which shape classes to prove; by default those of the published pairs.
        again: whether to run proofs that have a verdict, too.
        progress: told what is about to be proved.

    Returns:
        JSON values; the one under "problems" lists one sentence for whatever is broken.
    """
    problems: list[str] = []
    about = machine()
    about["metal"] = mx.metal.is_available()
    about["wired_limit_gb"] = wired_limit_gb()
    if platform.system() == "Darwin" and not about["metal"]:
        problems.append("This Mac offers no Metal device to MLX: everything runs on the CPU.")
    error = arithmetic_error()
    if not error <= proof.TOLERANCE["float32"]:
        problems.append(
            f"MLX computes attention wrongly on the {about['device']} (off by {error:.2g}):"
            " reinstall mlx."
        )
    return {
        "machine": about,
        "hub_cache": _hub_cache(hub_cache, problems),
        "kernels": _kernels(selection, classes, again, progress, problems),
        "problems": problems,
    }


def arithmetic_error() -> float:
    """How far a small attention on the default device is from the same on the CPU."""
    shape = AttentionClass("draft", dim=64, dtype="float32", length=8, context=512, ratio=2)
    call = shape.call(shape.length, shape.context, seed=0)
    here = plain_block_attention(**call)
    mx.eval(here)
    with mx.stream(mx.cpu):
        there = plain_block_attention(**call)
        mx.eval(there)
    return proof.difference(here, there)


def wired_limit_gb() -> float | None:
    """The memory that the GPU may wire, in GB; None without Metal."""
    if not mx.metal.is_available():
        return None
    if megabytes := _sysctl("iogpu.wired_limit_mb"):
        return round(megabytes * 2**20 / 1e9, 1)
    # Zero stands for the system's own choice.
    size = mx.device_info().get("max_recommended_working_set_size")
    return round(int(size) / 1e9, 1) if size else None


def _sysctl(name: str) -> int:
    try:
        run = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=True
        )
        return int(run.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return 0


def _hub_cache(path: Path, problems: list[str]) -> dict[str, Any]:
    """Where models are kept, how many there are, and whether there is room for more."""
    # Before the first download it does not exist; what matters then is where it would be made.
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    if not writable:
        problems.append(
            f"Models cannot be downloaded: the hub cache {path} cannot be written;"
            " set HF_HOME to a directory that can."
        )
    models = [entry.name for entry in path.glob("models--*")] if path.is_dir() else []
    return {
        "path": str(path),
        "writable": writable,
        "models": len(models),
        "free_gb": round(shutil.disk_usage(nearest).free / 1e9, 1),
    }


def _kernels(
    selection: Selection | None,
    classes: Iterable[ShapeClass] | None,
    again: bool,
    progress: Progress,
    problems: list[str],
) -> dict[str, Any]:
    """Prove what has no verdict, and list every verdict of this machine."""
    try:
        selection = selection or Selection()
    except ValueError as error:
        problems.append(str(error))
        selection = Selection(mode="off")
    report: dict[str, Any] = {
        "names": list(KERNELS),
        "mode": selection.mode,
        "runnable": selection.ready(),
        "note": None,
        "verdicts": [],
    }
    if not report["runnable"]:
        report["note"] = EMULATED_ONLY
        return report
    if selection.mode == "off":
        report["note"] = SWITCHED_OFF
        return report
    for shape in published_classes() if classes is None else classes:
        if again or selection.book.get(shape.key) is None:
            progress(shape.key)
            selection.book.put(shape.key, selection.prover.prove(shape))
    for key, verdict in selection.book.all().items():
        report["verdicts"].append({"class": key, **asdict(verdict)})
        if verdict.outcome in BROKEN:
            reason = f": {verdict.detail}" if verdict.detail else ""
            problems.append(
                f"A kernel {REASONS[verdict.outcome]} for {key}{reason}; plain MLX runs instead."
            )
    report["file"] = str(selection.book.path)
    if selection.book.problem:
        problems.append(selection.book.problem)
    return report
