"""How a model marks thinking and tool calls in its text; all that is read of mlx_lm for it."""

from collections.abc import Callable
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.conversation.harmony import speaks_only_harmony
from dflash_mlx.conversation.thinking import starts_thinking

# What a stretch of text can be. Of HEADER nothing is shown.
TEXT, THINKING, TOOL, HEADER = "text", "thinking", "tool", "header"

# For every state, the markers that end it, and the states they lead to.
Transitions = dict[str, list[tuple[str, str]]]

# How a harmony answer's header may say what its text is.
_TYPED = ("", " ", " <|constrain|>json", "<|constrain|>json", " json")

_MLX_LM = {"normal": TEXT, "reasoning": THINKING, "tool": TOOL, "header": HEADER}


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
    return THINKING if starts_thinking(tokenizer, prompt) else TEXT


def thinking_ends(tokenizer: TokenizerWrapper, state: str) -> list[tuple[int, ...]]:
    """Tokens that can end the thinking that an answer begins with; none where it begins none."""
    if state == THINKING:
        return [tuple(tokenizer.think_end_tokens)]
    if speaks_only_harmony(tokenizer):
        headers = [f"<|channel|>final{typed}<|message|>" for typed in _TYPED]
        return [tuple(tokenizer.encode(h, add_special_tokens=False)) for h in headers]
    return []


def called(state: str) -> str | None:
    """The function that a harmony message's state says is called."""
    return state.removeprefix(f"{TOOL}:") if state.startswith(f"{TOOL}:") else None


def parser(tokenizer: TokenizerWrapper) -> Callable[[str, list[Any]], Any] | None:
    """mlx_lm's parser of a call's text, without its markers; None for harmony."""
    return tokenizer.tool_parser
