"""mlx_lm's call shape on top of the decode loop: prompts in, text and responses out."""

import operator
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.arguments import (
    Generation,
    check_callable,
    check_model,
    check_quantization,
    check_whole,
    checked_processors,
    copying,
    fixed_length,
    tree_nodes,
)
from dflash_mlx.calling import called_with
from dflash_mlx.checkpoint import load_draft
from dflash_mlx.decode import (
    BorrowedCache,
    Decoder,
    Options,
    Prefilled,
    PromptCache,
    costs_file,
    fill,
)
from dflash_mlx.decode.options import ChoosingOptions, RunOptions, values_of
from dflash_mlx.decode.sampling import KeyedSampler
from dflash_mlx.distributed import Decisions
from dflash_mlx.distributed.sharding import load_sharded
from dflash_mlx.errors import DFlashError, InvalidCache, said
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.policy import AdaptiveLength, Costs, CostsFile, FixedLength, Learned
from dflash_mlx.repository import check_source
from dflash_mlx.responses import GenerationResponse, responses
from dflash_mlx.stop_strings import StopStrings
from dflash_mlx.target_checkpoint import load_target
from dflash_mlx.tokens import encode_text


def load(
    path_or_hf_repo: str | Path,
    draft: str | Path | None = None,
    *,
    revision: str | None = None,
    draft_revision: str | None = None,
    draft_bits: int | None = None,
    draft_window: int | None = None,
    draft_rows: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    trust_remote_code: bool = False,
    group: mx.distributed.Group | None = None,
) -> tuple[SpeculativeModel, TokenizerWrapper]:
    """Load a target, its tokenizer and its draft.

    Args:
        path_or_hf_repo: the target, a directory or a hub id.
        draft: the draft, a directory or a hub id; None finds the published one.
        revision, draft_revision: branch, tag or commit of either hub repository.
        draft_bits: 4 or 8 quantizes the draft in memory; None leaves it as it is stored.
        draft_window: let the draft's full-attention layers see only the first few tokens and about
            this many of the last ones, so that a long context does not slow drafting down. The text
            stays the same; acceptance may fall.
        draft_rows: which rows of the draft's block propose, "anchor" or "fill"; None takes what its
            files say. See `load_draft`.
        tokenizer_config, model_config, adapter_path, lazy, trust_remote_code: as in mlx_lm's load.
        group: the processes over which mlx-lm shall shard the target, as `mx.distributed.init()`
            gives them; all must then make the same calls in the same order.

    Raises:
        CheckpointError: either cannot be found or read, or no draft is known for the target.
        PairError: the two do not belong together.
        UnsupportedTarget: the target's family cannot work.
        DFlashError: the draft cannot be quantized or windowed so.
    """
    from dflash_mlx.published import find_draft

    check_source(path_or_hf_repo)
    if draft is None:
        draft = find_draft(path_or_hf_repo)
    loads = load_target
    if group is not None and group.size() > 1:
        loads = partial(load_sharded, group=group)
    target, tokenizer = loads(
        path_or_hf_repo,
        revision=revision,
        tokenizer_config=tokenizer_config,
        model_config=model_config,
        adapter_path=adapter_path,
        lazy=lazy,
        trust_remote_code=trust_remote_code,
    )
    drafter = load_draft(
        draft, revision=draft_revision, bits=draft_bits, lazy=lazy, rows=draft_rows
    )
    if draft_window is not None:
        drafter.limit_context(draft_window)
    return SpeculativeModel(target, drafter, group), tokenizer


def make_prompt_cache(model: SpeculativeModel) -> PromptCache:
    """An empty cache to carry a conversation from call to call.

    Raises:
        DFlashError: this is no pair of target and draft.
    """
    check_model(model)
    return model.make_cache()


@called_with(Generation)
def stream_generate(asked: Generation) -> Generator[GenerationResponse, None, None]:
    """Generate text, one response per token; the arguments mean what they mean in mlx_lm.

    Args:
        model: a target and its draft.
        tokenizer: the target's tokenizer.
        prompt: text, token ids [n] or a list of them; with a prompt cache, its continuation.
        max_tokens: the most tokens to emit; -1 for no limit.
        verify_length: "auto" decides in every cycle whether drafting pays, and how many proposals
            to verify, from what cycles cost and what was accepted so far. A number, 1 to
            `model.draft.most_proposals`, always verifies so many; "off" or 0 decodes plainly; None
            verifies the whole block.
        tree: a number of nodes, 1 to 64, puts the likeliest tree of so many proposals to the target
            in every cycle, as deep as `verify_length` says where that is a number, and else as the
            block. Where a tree cannot be verified exactly it is a line of so many proposals: with
            recurrent targets, for one. "auto" lets `verify_length="auto"` grow trees where these
            pay, each as large as pays; other verify lengths then verify lines. "off" or 0 always
            verifies lines.
        costs: what "auto" shall believe of the machine, rather than what it measures; frozen, they
            make its decisions depend on the text alone.
        copies: "auto" lets `verify_length="auto"` propose what followed in the prompt or the answer
            when the text last went as it goes now, where that promises more than the draft; "off"
            leaves all proposals to the draft. Other verify lengths never copy.
        sampler: log-probabilities [1, V] -> token [1]; None is greedy. With one from our
            `make_sampler` a block is judged in one go, with another token by token.
        logits_processors: each (tokens [n], logits [1, V]) -> logits [1, V].
        prompt_cache: from `make_prompt_cache`; it afterwards stands for the prompt and all emitted
            tokens. A plain mlx_lm list is updated in place, its draft context begins empty.
        max_kv_size: refused. mlx-lm's mask for a rotating cache with kept tokens hides the kept
            ones whenever several tokens are run at once, in its own prefill too.
        prefill_step_size: prompt tokens per forward.
        kv_bits, kv_group_size, quantized_kv_start: quantization of the target's cache.
        prompt_progress_callback: called with prompt tokens done and their total.
        sample_proposals: above temperature 0 and with our samplers, draw the proposals from the
            draft's distribution rather than take its likeliest tokens; exact either way. None
            takes what is accepted more often: drawn for DFlash 2, likeliest for DFlash 1.
        stop: strings that end the text, one or several. They are looked for in the text, wherever
            tokens and blocks are cut; the text ends before the string, and the last token is the
            one that completed it.

    Raises:
        DFlashError: an argument that cannot be meant.
    """
    model, tokenizer = asked.model, asked.tokenizer
    check_model(model)
    check_whole("max_tokens", asked.max_tokens, -1)
    check_whole("prefill_step_size", asked.prefill_step_size, 1)
    check_whole("quantized_kv_start", asked.quantized_kv_start, 0)
    check_quantization(asked.kv_bits, asked.kv_group_size)
    processors = checked_processors(asked.logits_processors)
    check_callable("sampler", asked.sampler)
    check_callable("prompt_progress_callback", asked.prompt_progress_callback)
    if asked.costs is not None and not isinstance(asked.costs, Costs):
        raise DFlashError(f"costs is a {type(asked.costs).__name__}; give what Costs.known makes.")
    if isinstance(tokenizer, str) or not hasattr(tokenizer, "encode"):
        raise DFlashError(
            f"The tokenizer is a {type(tokenizer).__name__}; give the one that load returned."
        )
    if isinstance(asked.sampler, KeyedSampler):
        asked.sampler.check_vocabulary(model.view.vocab_size)
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    prompt = encode(tokenizer, asked.prompt)
    model.view.check_tokens(prompt)
    stops = StopStrings(asked.stop)
    fixed_length(asked.verify_length, model.draft.most_proposals)
    tree_nodes(asked.tree)
    if asked.max_tokens == 0:
        raise DFlashError("max_tokens is 0; give at least 1, or -1 for no limit.")
    if asked.max_kv_size is not None:
        raise DFlashError(
            "max_kv_size cannot be kept exactly: mlx-lm masks such a cache wrongly when several "
            "tokens are run at once; leave it out."
        )
    cache = _cache(model, asked.prompt_cache)
    refill = cache.refresh(model.target)
    own = values_of(RunOptions, asked) | values_of(ChoosingOptions, asked)
    options = Options(
        **own | {"logits_processors": processors},
        stop_tokens=frozenset(tokenizer.eos_token_ids),
        copies=copying(asked.copies),
    )
    with wired_limit(model.target, [cast(mx.Stream, generation_stream)]):
        decoder = make_decoder(
            model,
            cache,
            options,
            asked.verify_length,
            tree=asked.tree,
            costs=asked.costs,
            keep_cache=asked.prompt_cache is not None,
        )
        yield from responses(decoder, tokenizer, prompt, refill, stops)


def _cache(model: SpeculativeModel, given: PromptCache | list[Any] | None) -> PromptCache:
    if given is None:
        return model.make_cache()
    if isinstance(given, PromptCache):
        model.check_cache(given)
        return given
    if not isinstance(given, list):
        raise DFlashError(
            f"prompt_cache is a {type(given).__name__}; give one from make_prompt_cache."
        )
    needed = len(model.view.make_cache())
    if len(given) != needed:
        raise InvalidCache(
            f"prompt_cache is a list of {len(given)} caches, and this target needs {needed}; make "
            "it for this target."
        )
    return BorrowedCache(given, model.draft.make_context())


def make_decoder(
    model: SpeculativeModel,
    cache: PromptCache,
    options: Options,
    verify_length: int | str | None = "auto",
    *,
    tree: int | str = "off",
    costs: Costs | None = None,
    keep_cache: bool = True,
) -> Decoder:
    """One generation on a cache, for callers that run it step by step.

    Args:
        verify_length, tree, costs: as for `stream_generate`.
        keep_cache: whether the cache is wanted afterwards.

    Raises:
        DFlashError: a verify length or tree that cannot be meant.
    """
    nodes, fixed = tree_nodes(tree), fixed_length(verify_length, model.draft.most_proposals)
    if nodes:
        # No deeper than it has nodes; where it has to be a line, that is as long.
        fixed = min(model.draft.most_proposals if fixed is None else fixed, nodes)
    if model.ranks or options.guide:
        nodes = 0  # each rank would grow a tree of its own; a guide revises lines
    return Decoder(
        model.view,
        model.draft,
        cache,
        FixedLength(fixed, nodes or 0)
        if fixed is not None
        else _adaptive_length(model, costs, trees=nodes is None),
        options,
        drafting=fixed != 0,
        keep_cache=keep_cache,
        agreement=_agreement(model),
    )


def fill_cache(
    model: SpeculativeModel,
    cache: PromptCache,
    tokens: Sequence[int],
    options: Options,
    step: Callable[[], int] | None = None,
) -> Generator[Prefilled, None, None]:
    """Run a prompt's tokens, all but its last, into a cache, chunk by chunk.

    Args:
        tokens: ids that follow what the cache stands for.
        options: of the generation that follows.
        step: gives the most tokens of the next chunk; None: `prefill_step_size`.
    """
    return fill(
        model.view, model.draft, cache, tokens, options, step=step, agreement=_agreement(model)
    )


def _agreement(model: SpeculativeModel) -> Decisions | None:
    return Decisions(model.ranks) if model.ranks else None


def generate(
    model: SpeculativeModel,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    verbose: bool = False,
    **options: Any,
) -> str:
    """Generate a complete text; `options` are those of `stream_generate`.

    With `verbose` the text is printed as it comes, and then what mlx_lm prints, and the acceptance
    length.
    """
    text, response = "", None
    if verbose:
        print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **options):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print()
        print("=" * 10)
        if not text:
            print("No text generated for this prompt")
        elif response is not None:
            print(
                f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec"
            )
            print(
                f"Generation: {response.generation_tokens} tokens, "
                f"{response.generation_tps:.3f} tokens-per-sec"
            )
            print(f"Acceptance length: {response.acceptance_length:.2f} tokens per target forward")
            print(f"Peak memory: {response.peak_memory:.3f} GB")
    return text


def batch_generate(*_: Any, **__: Any) -> NoReturn:
    """mlx_lm's function of this name has no counterpart here; says what there is instead."""
    raise DFlashError(
        "Batches are not drafted for: call generate for one prompt after the other, or "
        "mlx_lm.batch_generate(model.target, ...) for plain decoding of many at once."
    )


def encode(tokenizer: TokenizerWrapper, prompt: str | mx.array | Sequence[int]) -> list[int]:
    """A prompt as token ids, special tokens added to text as mlx_lm does.

    Raises:
        DFlashError: it is empty, or neither text nor one row of token ids.
    """
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        special = bos is None or not prompt.startswith(bos)
        ids = encode_text(tokenizer, prompt, add_special_tokens=special)
    else:
        try:
            # As mlx_lm takes them: lists, and arrays of MLX, NumPy and others.
            given: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt
            ids = [operator.index(token) for token in given]
        except TypeError as error:
            raise DFlashError(
                f"The prompt is a {type(prompt).__name__} that is not one row of token ids "
                f"({said(error)}); give text or a list of ids."
            ) from error
    if not ids:
        raise DFlashError("The prompt is empty; give at least one token.")
    return ids


def _adaptive_length(
    model: SpeculativeModel, costs: Costs | None, *, trees: bool
) -> AdaptiveLength:
    """A policy for one generation, which knows what the earlier ones learned."""
    most = model.draft.most_proposals
    if costs is not None:
        return AdaptiveLength(Learned(most, costs=costs), trees)
    if model.learned is None:
        model.learned = Learned(most, CostsFile(costs_file(model.target, model.draft)))
    return AdaptiveLength(model.learned, trees)
