"""dflash-mlx bench: plain mlx_lm against DFlash, on this machine."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START

from dflash_mlx.cli import bench_screen, options
from dflash_mlx.cli.loading import Loaded, load_pair
from dflash_mlx.cli.options import UsageError
from dflash_mlx.cli.screen import note, progress, working
from dflash_mlx.conversation import Template, check_positions
from dflash_mlx.measure import summary
from dflash_mlx.measure.comparison import BenchPrompt, Result, compare
from dflash_mlx.measure.machine import machine
from dflash_mlx.measure.prompts import (
    Question,
    builtin_questions,
    demo_questions,
    read_questions,
    rendered,
)
from dflash_mlx.measure.run import Settings

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


def bench(
    prompts: Prompts = None,
    repeats: Repeats = 3,
    cooldown: Cooldown = 0.0,
    json_file: Json = None,
    model: options.Model = None,
    draft: options.Draft = None,
    revision: options.Revision = None,
    draft_revision: options.DraftRevision = None,
    draft_bits: options.DraftBits = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    extra_eos_token: options.ExtraEosToken = None,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    top_k: options.TopK = 0,
    seed: options.Seed = 0,
    system_prompt: options.SystemPrompt = None,
    think: options.Think = None,
    chat_template_config: options.ChatTemplateConfig = None,
    ignore_chat_template: options.IgnoreChatTemplate = False,
    max_tokens: options.MaxTokens = 256,
    verify_length: options.VerifyLength = None,
    kv_bits: options.KVBits = None,
    kv_group_size: options.KVGroupSize = 64,
    quantized_kv_start: options.QuantizedKVStart = DEFAULT_QUANTIZED_KV_START,
    prefill_step_size: options.PrefillStepSize = 2048,
) -> None:
    """Measure how much faster DFlash is than plain mlx_lm, and whether the text is the same."""
    _check_target(json_file)
    questions = read_questions(prompts) if prompts else None
    pair = options.Pair(
        model,
        draft,
        revision,
        draft_revision,
        adapter_path,
        trust_remote_code,
        tuple(extra_eos_token or ()),
        draft_bits,
    )
    loaded = load_pair(pair)
    template = Template(
        loaded.tokenizer,
        system_prompt,
        loaded.think(think),
        chat_template_config or {},
        ignore_chat_template,
    )
    settings = Settings(
        max_tokens=max_tokens,
        verify_length=verify_length,
        temp=temp,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        seed=seed or 0,
        prefill_step_size=prefill_step_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
    )
    to_run = _prompts(questions, loaded, template)
    with working("Looking at the machine"):
        about = machine()
    bench_screen.header(about, loaded, settings, to_run, repeats)
    with progress() as step:
        results = compare(
            loaded.model,
            loaded.tokenizer,
            to_run,
            settings,
            repeats=repeats,
            cooldown=cooldown,
            progress=step,
        )
    bench_screen.report(results)
    if json_file:
        report = _report(results, about, loaded, settings, repeats)
        _write(json_file, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def _prompts(
    questions: list[Question] | None, loaded: Loaded, template: Template
) -> list[BenchPrompt]:
    if questions is None:
        questions = demo_questions() if loaded.demo else builtin_questions()
    prompts = rendered(questions, template)
    for prompt in prompts:
        check_positions(loaded.model.target, len(prompt.tokens))
    return prompts


def _report(
    results: list[Result],
    about: dict[str, Any],
    loaded: Loaded,
    settings: Settings,
    repeats: int,
) -> dict[str, Any]:
    return {
        "summary": summary.overall(results).as_json(),
        "kinds": {kind: s.as_json() for kind, s in summary.by_kind(results).items()},
        "prompts": summary.as_json(results),
        "settings": {
            "model": loaded.target,
            "draft": loaded.draft,
            "repeats": repeats,
            "max_tokens": settings.max_tokens,
            "verify_length": settings.verify_length,
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
    if file is None:
        return
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{file} cannot be written: there is no directory {folder}.")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise UsageError(f"{file} cannot be written; choose another place.")


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    note(f"Written: {file}")
