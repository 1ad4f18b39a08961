"""How a model marks thinking and tool calls in its text; all that is read of mlx_lm for it."""

from collections.abc import Callable
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.conversation.harmony import speaks_harmony

# What a stretch of text can be. Of HEADER nothing is shown.
TEXT, THINKING, TOOL, HEADER = "text", "thinking", "tool", "header"

# For every state, the markers that end it, and the states they lead to.
Transitions = dict[str, list[tuple[str, str]]]

_MLX_LM = {"normal": TEXT, "reasoning": THINKING, "tool": TOOL, "header": HEADER}


def speaks_only_harmony(tokenizer: TokenizerWrapper) -> bool:
    """Whether a model's answers are harmony messages, as those of gpt-oss."""
    return speaks_harmony(tokenizer) and not tokenizer.has_thinking


def can_call(tokenizer: TokenizerWrapper) -> bool:
    """Whether it is known how this model writes tool calls."""
    return tokenizer.has_tool_calling or speaks_only_harmony(tokenizer)


def transitions(tokenizer: TokenizerWrapper, tools: bool) -> Transitions:
    """The markers that end each kind of text, and what follows them.

    Without `tools`, what looks like a call is text like any other.
    """
    found: Transitions = {TEXT: [], THINKING: [], TOOL: [], HEADER: []}
    if tokenizer.has_thinking:
        found[TEXT].append((tokenizer.think_start, THINKING))
        found[THINKING].append((tokenizer.think_end, TEXT))
    found[TEXT] += [(marker, TEXT) for marker in tokenizer.structural_markers]
    own = tokenizer.response_transitions
    for state, edges in own.items():
        found[_MLX_LM[state]] += [(m, _MLX_LM[to]) for m, to in edges if tools or to != "tool"]
    if tools and tokenizer.has_tool_calling:
        start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
        # A response format that leads to calls says itself where they begin.
        if not any(to == "tool" for edges in own.values() for _, to in edges):
            found[TEXT].append((start, TOOL))
        if tokenizer.has_thinking:
            found[THINKING].append((start, TOOL))
        if end:
            found[TOOL].append((end, TEXT))
    return found


def initial(tokenizer: TokenizerWrapper, prompt: list[int]) -> str:
    """What an answer begins with behind a prompt."""
    if tokenizer.response_initial_state:
        return _MLX_LM[tokenizer.response_initial_state]
    if tokenizer.has_thinking and (
        tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
    ):
        return THINKING
    return TEXT


def thinking_end(tokenizer: TokenizerWrapper, state: str) -> tuple[int, ...]:
    """The tokens that end the thinking that an answer begins with; empty where it begins none."""
    if state == THINKING:
        return tuple(tokenizer.think_end_tokens)
    if speaks_only_harmony(tokenizer):
        ids = tokenizer.encode("<|channel|>final<|message|>", add_special_tokens=False)
        return tuple(ids)
    return ()


def called(state: str) -> str | None:
    """The function that a harmony message's state says is called."""
    return state.removeprefix(f"{TOOL}:") if state.startswith(f"{TOOL}:") else None


def parser(tokenizer: TokenizerWrapper) -> Callable[[str, list[Any]], Any] | None:
    """mlx_lm's parser of a call's text, without its markers; None for harmony."""
    return tokenizer.tool_parser
