"""What bench shows in the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dflash_mlx.cli.loading import Loaded
from dflash_mlx.cli.screen import out
from dflash_mlx.measure.advice import low_acceptance
from dflash_mlx.measure.comparison import BenchPrompt, Result
from dflash_mlx.measure.kernels import NO_METAL, Kernels, side_name
from dflash_mlx.measure.profile import PHASES, Profile
from dflash_mlx.measure.run import Settings
from dflash_mlx.measure.summary import Summary, by_kind, overall, summarize
from dflash_mlx.measure.sweep import Sweep, swept
from dflash_mlx.measure.trees import Trees, against_lines, wants_trees

_BAR = 30


def header(
    about: dict[str, Any],
    loaded: Loaded,
    settings: Settings,
    prompts: Sequence[BenchPrompt],
    repeats: int,
) -> None:
    """The machine, the pair and the plan."""
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    out.print(
        f"{about['chip']}, {about['cores']} cores, {about['memory_gb']:.0f} GB, {about['system']}, "
        f"{about['device']}: {about['gflops']:.0f} GFLOP/s in a float32 matrix product",
        markup=False,
    )
    out.print(versions, style="dim", markup=False)
    temp = f"temperature {settings.temp:g}" if settings.temp else "greedy"
    out.print(
        f"{loaded.target} with {loaded.draft}, {len(prompts)} prompts, {temp}, "
        f"{settings.max_tokens} tokens at most, {repeats}x each way",
        markup=False,
    )
    if loaded.model.ranks is not None:
        out.print(f"Over {loaded.model.ranks.size} ranks; machine and memory are rank 0's.")
    out.print()


def report(results: Sequence[Result], each: bool, settings: Settings) -> None:
    """Tables, drawings and the verdict; with `each`, a row for every prompt."""
    total, sweep = overall(results), swept(results)
    out.print(_table(results, total, sweep, each))
    out.print()
    _histogram(total)
    _positions(total)
    _verdict(results, total)
    if wants_trees(settings):
        _trees(settings.tree, total, against_lines(results))
    if sweep:
        _sweep(sweep)


def kernels(found: Kernels | None) -> None:
    """What DFlash gains by each kernel; None where none can run."""
    out.print()
    if found is None:
        out.print(NO_METAL, markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("kernels", no_wrap=True)
    for name in ("tok/s", "against off", "against plain"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, side in found.sides.items():
        gain = f"{found.gains[name]:.3f}x" if found.gains else ""
        table.add_row(
            Text(side_name(name)),
            f"{side.dflash.generation_tps:.1f}",
            gain,
            f"{side.speedup:.2f}x",
        )
    out.print(table)


def profile(found: Profile) -> None:
    """Where the host's time in a mean cycle goes."""
    total = sum(found.per_cycle.values())
    out.print()
    out.print(f"The host in a mean cycle of {total:.2f} ms", style="bold")
    for name, ms in found.per_cycle.items():
        out.print(f"{ms:8.3f} ms {ms / total:6.1%}  {name}: {PHASES[name]}", markup=False)
    out.print(
        f"The host's own share, without queuing and waiting: {found.host_share:.1%}.", markup=False
    )


def _table(results: Sequence[Result], total: Summary, sweep: Sweep | None, each: bool) -> Table:
    unit = "GB" if total.plain.peak_memory >= 1 else "MB"
    spread = total.speedup_interval is not None and out.width >= 96
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("\nkind", no_wrap=True)
    for name in (
        "prompt\ntokens",
        "plain\ntok/s",
        "DFlash\ntok/s",
        "speed-\nup",
        *(["95 %\ninterval"] if spread else []),
        "accept.\nlength",
        "first token\nms, both",
        f"peak memory\n{unit}, both",
        "same\ntext",
    ):
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, s: Summary, style: str | None = None) -> None:
        plain, dflash = s.plain, s.dflash
        table.add_row(
            Text(name),
            f"{s.prompt_tokens:.0f}",
            f"{plain.generation_tps:.1f}",
            f"{dflash.generation_tps:.1f}",
            f"{s.speedup:.2f}x",
            *([_range(s.speedup_interval)] if spread else []),
            f"{s.acceptance_length:.2f}",
            f"{1000 * plain.first_token_seconds:.0f} / {1000 * dflash.first_token_seconds:.0f}",
            _memory(s, unit),
            "yes" if s.identical else "no",
            style=style,
        )

    def kind(name: str, s: Summary) -> None:
        row(name, s)
        if each:
            for r in results:
                if r.prompt.kind == name:
                    row(f"  {_shortened(r.prompt.text)}", summarize([r]), "dim")

    rows = by_kind(results)
    outside = {r.prompt.kind for r in results if not r.prompt.counts}
    apart = outside if len(outside) < len(rows) else set()
    for name in rows:
        if name not in apart:
            kind(name, rows[name])
    row("overall", total, "bold")
    if sweep:
        row(f"best fixed: {sweep.best}", sweep.lengths[sweep.best])
    if apart:
        table.add_row()
        table.add_row(Text("not in it:", style="dim"))
    for name in rows:
        if name in apart:
            kind(name, rows[name])
    return table


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 20 else text[:19] + "…"


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"


def _memory(s: Summary, unit: str) -> str:
    if unit == "GB":
        return f"{s.plain.peak_memory:.2f} / {s.dflash.peak_memory:.2f}"
    return f"{1000 * s.plain.peak_memory:.0f} / {1000 * s.dflash.peak_memory:.0f}"


def _bars(title: str, labels: Sequence[str], shares: Sequence[float], longest: float) -> None:
    out.print(title, style="bold")
    for label, share in zip(labels, shares, strict=True):
        bar = "█" * round(_BAR * share / longest)
        out.print(f"{label:>4}  {bar:<{_BAR}} {share:6.1%}", markup=False)
    out.print()


def _histogram(total: Summary) -> None:
    forwards = sum(total.histogram)
    if forwards:
        labels = [str(n + 1) for n in range(len(total.histogram))]
        shares = [count / forwards for count in total.histogram]
        _bars("Tokens per target forward", labels, shares, max(shares))


def _positions(total: Summary) -> None:
    if total.by_position:
        labels = [str(n + 1) for n in range(len(total.by_position))]
        _bars("Proposals accepted, by position in the block", labels, total.by_position, 1.0)


def _verdict(results: Sequence[Result], total: Summary) -> None:
    out.print(
        f"Speedup {total.speedup:.2f}x{_interval(total)}: {total.plain.generation_tps:.1f} "
        f"tokens/s plain, {total.dflash.generation_tps:.1f} with DFlash; acceptance length "
        f"{total.acceptance_length:.2f}.",
        style="bold",
        markup=False,
    )
    if total.plain.collectives is not None and total.dflash.collectives is not None:
        out.print(
            f"The ranks exchange numbers {total.plain.collectives:.1f} times a token in plain "
            f"decoding, {total.dflash.collectives:.1f} times with DFlash.",
            markup=False,
        )
    copied = f", {total.copied_share:.0%} of the tokens copied" if total.copied_share else ""
    out.print(
        f"Verify length {total.verify_length:.1f} on average, {total.plain_share:.0%} plain "
        f"cycles{copied}.",
        markup=False,
    )
    forwards = [f for r in results if r.prompt.counts for run in r.dflash for f in run.forwards]
    forwards = [f for f in forwards if not f.copied]
    proposed, accepted = sum(f.proposed for f in forwards), sum(f.accepted for f in forwards)
    if hint := low_acceptance(proposed, accepted, len(forwards)):
        out.print(hint, markup=False)
    parted = [(i, r.difference) for i, r in enumerate(results, 1) if r.difference]
    if not parted:
        out.print("The text is identical, token for token.")
    for number, d in parted:
        out.print(
            f"Prompt {number} ({results[number - 1].prompt.kind}) differs from token "
            f"{d.position + 1} on: plain {_shown(d.plain)}, DFlash {_shown(d.dflash)}; there the "
            f"target's two likeliest tokens lie {d.margin:.2g} apart in log-probability.",
            markup=False,
        )


def _trees(tree: int | str, total: Summary, found: Trees | None) -> None:
    if found is None:
        out.print(f"No trees can be verified here: --tree {tree} put lines to the target.")
        return
    which, lines = "where they pay" if tree == "auto" else f"of {tree}", found.lines
    out.print(
        f"Trees {which}: {total.acceptance_length:.2f} tokens per target forward at "
        f"{total.dflash.generation_tps:.1f} tokens/s; lines: {lines.acceptance_length:.2f} at "
        f"{lines.dflash.generation_tps:.1f}.",
        markup=False,
    )


def _sweep(sweep: Sweep) -> None:
    for title, sides in (("Fixed verify lengths", sweep.lengths), ("Trees", sweep.trees)):
        if sides:
            each = (f"{n}: {s.speedup:.2f}x at {s.acceptance_length:.2f}" for n, s in sides.items())
            out.print(f"{title}: {', '.join(each)} tokens per forward.", markup=False)
    best, spread = sweep.lengths[sweep.best], sweep.over_best_interval
    out.print(
        f"Against the best verify length, {sweep.best}: {sweep.over_best:.3f}x"
        + (f" (95 % interval {spread[0]:.3f} to {spread[1]:.3f})." if spread else "."),
        markup=False,
    )
    if (nodes := sweep.faster_tree) is not None:
        tree = sweep.trees[nodes]
        out.print(
            f"A tree of {nodes} is faster than that: {tree.speedup:.2f}x against "
            f"{best.speedup:.2f}x.",
            markup=False,
        )


def _interval(total: Summary) -> str:
    if total.speedup_interval is None:
        return ""
    low, high = total.speedup_interval
    return f" (95 % interval {low:.2f} to {high:.2f})"


def _shown(token: str | None) -> str:
    return "had ended" if token is None else repr(token)
