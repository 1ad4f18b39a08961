"""A draft before and after, at work with its target."""

import time
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.api import stream_generate
from dflash_mlx.checkpoint import is_draft_config, load_draft, load_target, read_config, resolve
from dflash_mlx.convert.report import CheckReport, Measured
from dflash_mlx.decode.sampling import propose_likeliest
from dflash_mlx.demo import demo_paths, demo_prompts
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.errors import CheckpointError
from dflash_mlx.pairs import SpeculativeModel

PROMPTS = (
    "Write a Python function that merges two sorted lists into one sorted list.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Explain step by step.",
    "List the planets of the solar system as JSON, with the name and the number of moons of each.",
    "Explain in a few sentences why the sky is blue.",
)
MAX_TOKENS = 128
_CONTEXT, _WARM, _TIMED = 512, 3, 20


def check_before(target: str | Path) -> None:
    """See that a target can be had, before any work is done.

    Raises:
        CheckpointError: it cannot be found, or it is a draft.
    """
    if is_draft_config(read_config(resolve(target))):
        raise CheckpointError(f"{target} is a draft; give the target to check it with.")


def check_drafts(target: str | Path, before: Path, after: Path) -> CheckReport:
    """Run two drafts with one target, greedily and with whole blocks, on the built-in prompts.

    Raises:
        DFlashError: the target cannot be loaded, or is not the drafts'.
    """
    model, tokenizer = load_target(target)
    prompts = _prompts(tokenizer, resolve(target))
    texts, measured = [], []
    for draft in (before, after):
        pair = SpeculativeModel(model, load_draft(draft))
        tokens, length = _generate(pair, tokenizer, prompts)
        texts.append(tokens)
        measured.append(Measured(length, _draft_forward_ms(pair)))
        del pair
        mx.clear_cache()
    return CheckReport(str(target), len(texts[1]), texts[0] == texts[1], *measured)


def _prompts(tokenizer: TokenizerWrapper, target: Path) -> list[list[int]]:
    """The prompts as token ids; the demo target gets prompts of what it has learnt."""
    if target.resolve() == demo_paths()[0]:
        asked = [list(prompt.messages) for prompt in demo_prompts("held-out")]
    else:
        asked = [[{"role": "user", "content": text}] for text in PROMPTS]
    if tokenizer.chat_template is None:
        return [tokenizer.encode(messages[-1]["content"]) for messages in asked]
    # Published drafts were mostly trained without thinking; templates without it ignore this.
    return [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
        for messages in asked
    ]


def _generate(
    pair: SpeculativeModel, tokenizer: TokenizerWrapper, prompts: list[list[int]]
) -> tuple[list[int], float]:
    """All tokens, and mean tokens per target forward over all prompts."""
    tokens: list[int] = []
    emitted = forwards = 0
    length = pair.draft.block_size - 1
    for prompt in prompts:
        for response in stream_generate(pair, tokenizer, prompt, MAX_TOKENS, verify_length=length):
            tokens.append(response.token)
        emitted += response.generation_tokens - 1
        forwards += response.target_forwards
    return tokens, emitted / max(forwards, 1)


def _draft_forward_ms(pair: SpeculativeModel) -> float:
    """Median time of one block of proposals over a context of 512 positions, head included."""
    draft: DFlashDraft = pair.draft
    context = draft.make_context()
    taps = len(draft.target_layer_ids)
    draft.extend(context, mx.random.normal((1, _CONTEXT, taps * pair.view.hidden_size)))
    mx.eval(context.arrays)
    times = []
    for _ in range(_WARM + _TIMED):
        tic = time.perf_counter()
        proposals = draft.propose(
            mx.array([0]),
            context,
            draft.block_size - 1,
            pair.view.embed,
            pair.view.head,
            propose_likeliest,
        )
        mx.eval(proposals.tokens)
        times.append(time.perf_counter() - tic)
    return median(times[_WARM:]) * 1000
