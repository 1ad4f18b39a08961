"""A draft before and after, at work with its target."""

import time
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.checkpoint import load_draft
from dflash_mlx.conversation import Template
from dflash_mlx.convert.report import CheckReport, Measured
from dflash_mlx.decode.sampling import Likeliest
from dflash_mlx.demo import demo_paths
from dflash_mlx.errors import CheckpointError
from dflash_mlx.measure.prompts import builtin_questions, demo_questions, rendered
from dflash_mlx.measure.run import Run, Settings, dflash_run
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.published import thinks
from dflash_mlx.repository import is_draft_config, read_config, resolve
from dflash_mlx.target_checkpoint import load_target

MAX_TOKENS = 128
_CONTEXT, _WARM, _TIMED = 512, 3, 20


def check_before(target: str | Path) -> None:
    """See that a target can be had, before any work is done.

    Raises:
        CheckpointError: it cannot be found, or it is a draft.
    """
    if is_draft_config(read_config(resolve(target))):
        raise CheckpointError(f"{target} is a draft; give the target to check it with.")


def check_drafts(
    target: str | Path, before: Path, after: Path, rows: str | None = None
) -> CheckReport:
    """Run two drafts with one target, greedily and with whole blocks, on the built-in prompts.

    Raises:
        DFlashError: the target cannot be loaded, or is not the drafts'.
    """
    model, tokenizer = load_target(target)
    is_demo = resolve(target).resolve() == demo_paths()[0]
    # The demo target knows nothing of what other models are asked.
    questions = demo_questions(("held-out",)) if is_demo else builtin_questions()
    think = None if is_demo or thinks(target, before) else False
    prompts = rendered(questions, Template(tokenizer, think=think))
    texts: list[list[list[int]]] = []
    measured: list[Measured] = []
    for draft in (before, after):
        pair = SpeculativeModel(model, load_draft(draft, rows=rows))
        runs = _run(pair, tokenizer, [prompt.tokens for prompt in prompts])
        forwards = [forward for run in runs for forward in run.forwards]
        length = sum(f.emitted for f in forwards) / max(len(forwards), 1)
        texts.append([run.tokens for run in runs])
        measured.append(Measured(length, _draft_forward_ms(pair)))
        del pair
        mx.clear_cache()
    tokens = sum(len(text) for text in texts[1])
    return CheckReport(str(target), tokens, texts[0] == texts[1], *measured)


def _run(
    pair: SpeculativeModel, tokenizer: TokenizerWrapper, prompts: list[tuple[int, ...]]
) -> list[Run]:
    settings = Settings(max_tokens=MAX_TOKENS, verify_length=pair.draft.most_proposals)
    return [dflash_run(pair, tokenizer, prompt, settings) for prompt in prompts]


def _draft_forward_ms(pair: SpeculativeModel) -> float:
    """Median time of one block of proposals over 512 positions, the target's head included."""
    draft, view = pair.draft, pair.view
    context = draft.make_context()
    shape = 1, _CONTEXT, view.hidden_size
    draft.extend(context, [mx.random.normal(shape) for _ in draft.target_layer_ids])
    mx.eval(context.arrays)
    count, times = draft.most_proposals, []
    for _ in range(_WARM + _TIMED):
        tic = time.perf_counter()
        proposals = draft.propose(mx.array([0]), context, count, view.embed, view.head, Likeliest())
        mx.eval(proposals.tokens)
        times.append(time.perf_counter() - tic)
    return median(times[_WARM:]) * 1000
