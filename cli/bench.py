"""dflash-mlx bench: plain mlx_lm against DFlash, on this machine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dflash_mlx.cli import bench_screen, options
from dflash_mlx.cli.chart import check_format, write_chart, write_sweep
from dflash_mlx.cli.groups import (
    CacheOptions,
    PairOptions,
    PromptOptions,
    ProposingOptions,
    SamplingOptions,
    grouped,
)
from dflash_mlx.cli.loading import Loaded, load_pair, quantizing
from dflash_mlx.cli.options import UsageError
from dflash_mlx.cli.ranks import decided, follows, together
from dflash_mlx.cli.screen import note, progress, working
from dflash_mlx.conversation import Template, check_positions, max_positions
from dflash_mlx.errors import DFlashError
from dflash_mlx.files import check_writable, write_result
from dflash_mlx.measure import summary
from dflash_mlx.measure.comparison import BenchPrompt, Result, Sides, compare
from dflash_mlx.measure.context import context_prompts
from dflash_mlx.measure.kernels import KERNELS, KernelSide, compared, kernel_sides
from dflash_mlx.measure.kernels import modes as kernel_modes
from dflash_mlx.measure.machine import machine
from dflash_mlx.measure.profile import profile as host_profile
from dflash_mlx.measure.prompts import (
    Question,
    builtin_questions,
    demo_questions,
    read_questions,
    rendered,
)
from dflash_mlx.measure.run import Settings
from dflash_mlx.measure.summary import Summary
from dflash_mlx.measure.sweep import sweep_sides, swept
from dflash_mlx.measure.trees import against_lines, lines_side, wants_trees
from dflash_mlx.metal import selection

_BENCH = "Benchmark"
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help='Prompts of your own, one a line: {"prompt" | "messages", "kind"}.',
        show_default=False,
        rich_help_panel=_BENCH,
    ),
]
Repeats = Annotated[
    int, typer.Option(min=1, help="Pairs of runs per prompt.", rich_help_panel=_BENCH)
]
Cooldown = Annotated[
    float, typer.Option(min=0.0, help="Seconds to wait before each run.", rich_help_panel=_BENCH)
]
Each = Annotated[
    bool,
    typer.Option("--each", help="Show every prompt, not just each kind.", rich_help_panel=_BENCH),
]
SweepOption = Annotated[
    bool,
    typer.Option(
        "--sweep",
        help="Measure fixed verify lengths and trees, too, and show the best length.",
        rich_help_panel=_BENCH,
    ),
]
KernelsOption = Annotated[
    str | None,
    typer.Option(
        "--kernels",
        metavar="off,auto",
        help="Compare these modes of the Metal kernels, and each kernel alone.",
        show_default=False,
        rich_help_panel=_BENCH,
    ),
]
ProfileOption = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Show what the host does in a cycle, from one more run of each prompt.",
        rich_help_panel=_BENCH,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write all figures to a JSON file.",
        show_default=False,
        rich_help_panel=_BENCH,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.svg|png",
        help="Draw a chart of the speeds; .png needs Pillow.",
        show_default=False,
        rich_help_panel=_BENCH,
    ),
]


def _lengths(value: str | list[int]) -> list[int]:
    """\"1k,4096\" as token counts; a k is 1024."""
    if isinstance(value, list):
        return value
    lengths = []
    for part in value.lower().split(","):
        number = part.strip().removesuffix("k")
        if not number.isdecimal() or int(number) == 0:
            raise typer.BadParameter(f"{part.strip()!r} is no length like 4k or 4096.")
        lengths.append(int(number) * (1024 if part.strip().endswith("k") else 1))
    return lengths


Context = Annotated[
    Any,
    typer.Option(
        metavar="1k,4k,...",
        parser=_lengths,
        help="Measure at these context lengths, with conversations that long.",
        show_default=False,
        rich_help_panel=_BENCH,
    ),
]


@grouped
def bench(
    *,
    prompts: Prompts = None,
    repeats: Repeats = 3,
    cooldown: Cooldown = 0.0,
    context: Context = None,
    each: Each = False,
    sweep: SweepOption = False,
    kernels: KernelsOption = None,
    profile: ProfileOption = False,
    json_file: Json = None,
    plot: Plot = None,
    pair: PairOptions,
    sampling: SamplingOptions,
    seed: options.Seed = 0,
    prompting: PromptOptions,
    ignore_chat_template: options.IgnoreChatTemplate = False,
    max_tokens: options.MaxTokens = 256,
    stop: options.Stop = None,
    proposing: ProposingOptions,
    caching: CacheOptions,
) -> None:
    """Measure how much faster DFlash is than plain mlx_lm, and whether the text is the same."""
    _check_target(json_file)
    _check_target(plot)
    if plot and not follows():
        check_format(plot)
    with_kernels = _kernel_sides(kernels) if kernels else None
    questions = _questions(prompts) if prompts else None
    loaded = load_pair(pair)
    template = loaded.template(prompting, ignore_chat_template)
    settings = Settings(
        max_tokens=max_tokens,
        **vars(proposing),
        **vars(sampling),
        seed=seed or 0,
        **vars(caching),
        stop=tuple(stop or ()),
    )
    to_run = _prompts(questions, loaded, template, context, max_tokens)
    with working("Looking at the machine"):
        about = machine()
    bench_screen.header(about, loaded, settings, to_run, repeats)
    sides: Sides = {
        **lines_side(loaded.model, settings),
        **(sweep_sides(loaded.model, settings) if sweep else {}),
        **{(KERNELS, name): (side.run, settings) for name, side in (with_kernels or {}).items()},
    }
    with quantizing(settings.kv_bits, settings.kv_group_size), progress() as step:
        results = compare(
            loaded.model,
            loaded.tokenizer,
            to_run,
            settings,
            repeats=repeats,
            cooldown=cooldown,
            sides=sides,
            progress=step,
        )
    bench_screen.report(results, each, settings)
    if with_kernels is not None:
        bench_screen.kernels(compared(results))
    host = None
    if profile:
        with working("Profiling"):
            host = host_profile(loaded.model, loaded.tokenizer, _counted(to_run), settings)
        bench_screen.profile(host)
    if follows():
        return
    if json_file:
        report = _report(results, about, loaded, settings, repeats, context)
        report["profile"] = host.as_json() if host else None
        text = json.dumps(report, indent=2, ensure_ascii=False)
        write_result(json_file, text + "\n")
        note(f"Written: {json_file}")
    if plot:
        name = "demo pair" if loaded.demo else Path(loaded.target).name
        by = "verify length" if sweep else "context length" if context else "kind of prompt"
        title = f"Tokens per second by {by}: {name}"
        if found := swept(results):
            write_sweep(plot, title, found, {_as_run(settings): summary.overall(results)}, about)
        else:
            write_chart(plot, title, _charted(results, context is not None), about)
        note(f"Written: {plot}")


def _kernel_sides(text: str) -> dict[str, KernelSide]:
    """The sides that --kernels asks for; none where no kernel can run."""
    if together() is not None:
        raise UsageError("--kernels compares the kernels of one machine; leave out mlx.launch.")
    try:
        wanted = kernel_modes(text)
    except ValueError as error:
        raise UsageError(f"--kernels: {error}") from None
    chosen = selection.current()
    return kernel_sides(wanted, chosen) if chosen.ready() else {}


def _questions(file: Path) -> list[Question]:
    """What is asked in a file, which rank 0 alone need have."""
    rows = decided(lambda: [asdict(question) for question in read_questions(file)])
    return [
        Question(**{**row, "messages": tuple(row["messages"]), "tools": tuple(row["tools"])})
        for row in rows
    ]


def _prompts(
    questions: list[Question] | None,
    loaded: Loaded,
    template: Template,
    context: list[int] | None,
    max_tokens: int,
) -> list[BenchPrompt]:
    target = loaded.model.target
    if questions is None:
        questions = demo_questions() if loaded.demo else builtin_questions()
    if context is None:
        prompts = rendered(questions, template)
    else:
        most = max_positions(target)
        need = max(context) + max(max_tokens, 1)
        if most is not None and need > most:
            raise DFlashError(
                f"A context of {max(context)} tokens and an answer of {max(max_tokens, 1)} need "
                f"{need} positions, and this model has {most}; choose shorter ones."
            )
        with working("Writing conversations"):
            prompts = context_prompts(loaded.model, template, questions, context)
    for prompt in prompts:
        check_positions(target, len(prompt.tokens))
        loaded.model.view.check_tokens(prompt.tokens)
    return prompts


def _counted(prompts: list[BenchPrompt]) -> list[tuple[int, ...]]:
    return [p.tokens for p in prompts if p.counts] or [p.tokens for p in prompts]


def _as_run(settings: Settings) -> str:
    """What was run beside a sweep, for the chart."""
    trees = wants_trees(settings)
    asked = settings.tree if trees else settings.verify_length
    name = f"tree {asked}" if trees else f"{asked}"
    return name if asked == "auto" else f"{name}, as run"


def _charted(results: list[Result], by_context: bool) -> dict[str, Summary]:
    counted = [r for r in results if r.prompt.counts] or results
    rows = summary.by_kind(counted)
    if len(rows) > 1 and not by_context:
        rows["overall"] = summary.overall(results)
    return rows


def _report(
    results: list[Result],
    about: dict[str, Any],
    loaded: Loaded,
    settings: Settings,
    repeats: int,
    context: list[int] | None,
) -> dict[str, Any]:
    return {
        "summary": summary.overall(results).as_json(),
        "kinds": {kind: s.as_json() for kind, s in summary.by_kind(results).items()},
        "prompts": summary.as_json(results),
        "kernels": gains.as_json() if (gains := compared(results)) else None,
        "trees": trees.as_json() if (trees := against_lines(results)) else None,
        "sweep": found.as_json() if (found := swept(results)) else None,
        "settings": {
            "model": loaded.target,
            "draft": loaded.draft,
            "repeats": repeats,
            "context": context,
            "max_tokens": settings.max_tokens,
            "stop": list(settings.stop or ()),
            "verify_length": settings.verify_length,
            "tree": settings.tree,
            "copies": settings.copies,
            "temp": settings.temp,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "top_k": settings.top_k,
            "seed": settings.seed,
            "kv_bits": settings.kv_bits,
        },
        "machine": about,
    }


def _check_target(file: Path | None) -> None:
    """Find out before the work whether its result can be written."""
    if file is not None:
        try:
            decided(lambda: check_writable(file))
        except DFlashError as error:
            raise UsageError(str(error)) from error
