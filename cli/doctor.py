"""dflash-mlx doctor: is everything in order on this machine?"""

import json as jsonlib
from typing import Annotated, Any

import typer

from dflash_mlx.cli.screen import err, out, working
from dflash_mlx.measure.doctor import examine

Json = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]
Again = Annotated[
    bool,
    typer.Option("--again", help="Run the kernels' proofs again, even if they have a verdict."),
]


def doctor(json: Json = False, again: Again = False) -> None:
    """Report on the machine, the caches and the kernels, proving these; exit 1 if one is broken."""
    with working("Looking at this machine …"):
        report = examine(again=again, progress=_progress)
    if json:
        typer.echo(jsonlib.dumps(report, indent=1))
    else:
        for line in lines(report):
            out.print(line, markup=False, soft_wrap=True)
    if report["problems"]:
        raise typer.Exit(1)


def _progress(key: str) -> None:
    err.print(f"proving {key}", style="dim", markup=False, soft_wrap=True)


def lines(report: dict[str, Any]) -> list[str]:
    """The report as lines of text: a word, then what there is to say of it."""
    about, hub, kernels = report["machine"], report["hub_cache"], report["kernels"]
    wired = about["wired_limit_gb"]
    rows = [
        ("chip", f"{about['chip']}, {about['cores']} cores, {about['gflops']:.0f} GFLOP/s float32"),
        ("system", about["system"]),
        ("memory", f"{about['memory_gb']} GB" + (f", wired limit {wired} GB" if wired else "")),
        (
            "device",
            f"{about['device']}, Metal {'available' if about['metal'] else 'not available'}",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
        (
            "hub cache",
            f"{hub['path']}: {hub['models']} {'model' if hub['models'] == 1 else 'models'},"
            f" {hub['free_gb']} GB free{'' if hub['writable'] else ', not writable'}",
        ),
        ("kernels", f"{', '.join(kernels['names'])} (mode {kernels['mode']})"),
    ]
    if kernels["note"]:
        rows.append(("", kernels["note"]))
    rows += [("", _verdict(verdict)) for verdict in kernels["verdicts"]]
    rows += [("broken", problem) for problem in report["problems"]]
    if not report["problems"]:
        rows.append(("", "Nothing is broken."))
    return [f"{name:10}{text}".rstrip() for name, text in rows]


def _verdict(verdict: dict[str, Any]) -> str:
    parts = [f"{verdict['class']:42} {verdict['outcome']:8}"]
    if verdict["speed"] is not None:
        parts.append(f"{verdict['speed']:.2f}x plain MLX")
    if verdict["kernel_ms"] is not None:
        parts.append(f"{verdict['kernel_ms']:.3f} ms, plain {verdict['plain_ms']:.3f} ms")
    if verdict["error"] is not None:
        parts.append(f"largest error {verdict['error']:.1e}")
    if verdict["bit_equal"] is not None:
        parts.append("rows " + ("" if verdict["bit_equal"] else "not ") + "bit-equal to one row's")
    if verdict["detail"]:
        parts.append(verdict["detail"])
    return "  ".join(parts)
