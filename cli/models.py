"""dflash-mlx models: the published pairs, and what a model directory is."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dflash_mlx.cli import options
from dflash_mlx.cli.options import UsageError
from dflash_mlx.cli.screen import out, size, working
from dflash_mlx.draft import DraftConfig
from dflash_mlx.draft.config import CorrectionConfig, MarkovConfig, RefinerConfig, SelectorConfig
from dflash_mlx.errors import DFlashError
from dflash_mlx.measure.hub import cached_models, cached_targets
from dflash_mlx.measure.inspection import CacheKind, DraftReport, TargetReport, inspect, misfit
from dflash_mlx.published import PAIRS, find_pair

UNFOLDED = 120  # columns of the list of pairs where nobody watches

Inspect = Annotated[
    str | None,
    typer.Option(
        "--inspect",
        metavar="PATH",
        help="Say what this target or draft is: a directory or a hub id.",
        show_default=False,
    ),
]
With = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="Say also whether the inspected target fits this draft.",
        show_default=False,
    ),
]


def models(
    inspect_path: Inspect = None,
    draft: With = None,
    revision: options.Revision = None,
    draft_revision: options.DraftRevision = None,
    draft_rows: options.DraftRows = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """List the published pairs and what the local hub cache holds of them, or inspect a model."""
    if inspect_path is None:
        if draft or revision or draft_revision or draft_rows or trust_remote_code:
            raise UsageError(
                "--draft, --draft-rows and the revisions belong to --inspect; name a target there."
            )
        _list()
        return
    with working(f"Looking at {inspect_path}"):
        report = inspect(
            inspect_path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            rows=draft_rows,
        )
    if isinstance(report, DraftReport):
        if draft is not None:
            raise UsageError(f"{inspect_path} is a draft; give its target to --inspect.")
        _show_draft(report)
        return
    _show_target(report)
    _show_fit(report, inspect_path, draft, draft_revision, draft_rows)


def _list() -> None:
    cached = cached_models()
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("target", overflow="fold")
    table.add_column("draft", overflow="fold")
    table.add_column("in the cache", justify="right", no_wrap=True)
    for pair in PAIRS:
        for draft in (pair.draft, *pair.others):
            here = cached.get(draft)
            first = draft == pair.draft
            row = (pair.target if first else "  or", draft, size(here) if here is not None else "-")
            table.add_row(*(Text(cell) for cell in row), style="bold" if here else None)
    # Where nobody watches, names stay whole, so that they can be searched for.
    wide = out if out.is_terminal else Console(width=UNFOLDED, color_system=None)
    wide.print(table)
    out.print("Of several drafts the first is taken by itself; --draft names another.")
    out.print()
    targets = cached_targets(cached)
    if not targets:
        out.print("None of their targets is in the local hub cache.")
    for repo, pair in targets.items():
        out.print(f"In the cache: {repo}, {size(cached[repo])}, for {pair.draft}", markup=False)
    out.print("Without --model, the other commands use the small demo pair that comes with them.")


def _facts(rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    out.print(table)


def _show_target(report: TargetReport) -> None:
    rows = [
        ("target", f"{report.family}, {_count(report.parameters)}, {size(report.nbytes)}"),
        ("layers", f"{report.layers}, so taps 0 to {report.layers - 1}"),
        ("hidden size", str(report.hidden_size)),
        ("vocabulary", str(report.vocab_size)),
        ("head", report.head),
    ]
    if report.positions is not None:
        rows.append(("positions", str(report.positions)))
    if report.embed_scale != 1:
        rows.append(("embedding", f"scaled by {report.embed_scale:.4g}"))
    if report.streams > 1:
        rows.append(("streams", f"{report.streams}, of which taps take the mean"))
    if report.quantization:
        rows.append(("quantization", _quantization(report.quantization)))
    rows += [("caches" if i == 0 else "", _cache(kind)) for i, kind in enumerate(report.caches)]
    _facts(rows)


def _cache(kind: CacheKind) -> str:
    return f"{_ranges(kind.indices)}: {kind.name}, rolled back by {kind.rollback}"


def _ranges(indices: tuple[int, ...]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for i in sorted(set(indices)):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _show_draft(report: DraftReport) -> None:
    c = report.config
    windows = [layer.window for layer in c.layers]
    kinds = {window: windows.count(window) for window in windows}
    layers = ", ".join(
        f"{count} full" if window is None else f"{count} sliding over {window}"
        for window, count in kinds.items()
    )
    rows = [
        ("draft", f"{c.packaging}, {_count(report.parameters)}, {size(report.nbytes)}"),
        ("block", _block(c)),
        ("proposals", _proposals(c)),
        ("layers", layers),
        ("taps", f"{', '.join(map(str, c.target_layer_ids))}{_of(c.num_target_layers)}"),
        ("hidden size", str(c.hidden_size)),
        ("vocabulary", _vocabulary(c)),
        ("heads", f"{c.num_attention_heads} of {c.head_dim}, {c.num_key_value_heads} key-value"),
        ("mask token", str(c.mask_token_id)),
    ]
    if c.quantization:
        rows.append(("quantization", _quantization(c.quantization)))
    _facts(rows)


def _block(config: DraftConfig) -> str:
    rows = "the anchor's row proposes too" if config.anchor_proposes else "the anchor's does not"
    return f"{config.block_size} rows, so {config.most_proposals} proposals: {rows}"


def _proposals(config: DraftConfig) -> str:
    head = config.head
    if isinstance(head, MarkovConfig):
        said = f"a Markov chain over the block ({head.kind}, rank {head.rank})"
    elif isinstance(head, SelectorConfig):
        said = f"a selector over {head.top_k} candidates (rank {head.rank})"
    elif isinstance(head, RefinerConfig):
        said = f"a refiner in {head.passes} passes (rank {head.rank})"
    elif isinstance(head, CorrectionConfig):
        said = "hidden states corrected token by token"
    else:
        said = "each row alone"
    return f"{said}; a confidence head" if config.confidence else said


def _vocabulary(config: DraftConfig) -> str:
    vocabulary = config.vocabulary
    said = "the target's" if vocabulary.size is None else str(vocabulary.size)
    if vocabulary.draft_size is not None:
        said += f", of which {vocabulary.draft_size} can be proposed"
    own = [
        name
        for name, has in (("embedding", vocabulary.own_embedding), ("head", vocabulary.own_head))
        if has
    ]
    return f"{said}; own {' and '.join(own)}" if own else said


def _of(layers: int | None) -> str:
    return "" if layers is None else f" of {layers} layers"


def _show_fit(
    report: TargetReport,
    target: str,
    draft: str | None,
    draft_revision: str | None,
    draft_rows: str | None,
) -> None:
    if draft is None:
        try:
            pair = find_pair(target)
        except DFlashError as error:
            out.print(str(error), markup=False)
            return
        draft = pair.draft
        if draft not in cached_models():
            others = f"; others: {', '.join(pair.others)}" if pair.others else ""
            out.print(
                f"Published draft: {draft}, not in the local hub cache{others}.", markup=False
            )
            return
    drafted = inspect(draft, revision=draft_revision, rows=draft_rows)
    if isinstance(drafted, TargetReport):
        raise UsageError(f"{draft} is a target; give a draft to --draft.")
    why = misfit(report, drafted)
    out.print(f"{draft} fits this target." if why is None else why, markup=False)


def _count(parameters: int) -> str:
    for unit, divisor in (("billion", 1e9), ("million", 1e6)):
        if parameters >= divisor:
            return f"{parameters / divisor:.2f} {unit} parameters"
    return f"{parameters} parameters"


def _quantization(settings: dict) -> str:
    bits, group = settings.get("bits"), settings.get("group_size")
    return f"{bits} bits in groups of {group}, {settings.get('mode', 'affine')}"
