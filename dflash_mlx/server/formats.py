"""How a model marks thinking and tool calls in its text; all that is read of mlx_lm for it."""

import re
from collections.abc import Callable
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

# What a stretch of text can be. Of HEADER nothing is shown.
TEXT, THINKING, TOOL, HEADER = "text", "thinking", "tool", "header"

# Where a marker leads to: a state, or a function of what stood before it in its state.
Next = str | Callable[[str], str]
Transitions = dict[str, list[tuple[str, Next]]]

_MLX_LM = {"normal": TEXT, "reasoning": THINKING, "tool": TOOL, "header": HEADER}
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def is_harmony(tokenizer: TokenizerWrapper) -> bool:
    """Whether a model writes "harmony" messages, as gpt-oss does."""
    vocabulary = tokenizer.get_vocab()
    return all(marker in vocabulary for marker in ("<|channel|>", "<|message|>", "<|start|>"))


def can_call(tokenizer: TokenizerWrapper) -> bool:
    """Whether it is known how this model writes tool calls."""
    return tokenizer.has_tool_calling or is_harmony(tokenizer)


def transitions(tokenizer: TokenizerWrapper, tools: bool) -> Transitions:
    """The markers that end each kind of text, and what follows them.

    Without `tools`, what looks like a call is text like any other.
    """
    if is_harmony(tokenizer) and not tokenizer.has_thinking:
        return _harmony()
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
    if is_harmony(tokenizer) and not tokenizer.has_thinking:
        return HEADER
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
    if state == HEADER and is_harmony(tokenizer):
        ids = tokenizer.encode("<|channel|>final<|message|>", add_special_tokens=False)
        return tuple(ids)
    return ()


def called(state: str) -> str | None:
    """The function that a harmony message's state says is called."""
    return state.removeprefix(f"{TOOL}:") if state.startswith(f"{TOOL}:") else None


class _Harmony(dict):
    """States of harmony messages; a state `tool:NAME` for a call of each function."""

    def __missing__(self, state: str) -> list[tuple[str, Next]]:
        return [(end, HEADER) for end in ("<|end|>", "<|call|>", "<|return|>", "<|start|>")]


def _harmony() -> Transitions:
    return _Harmony({HEADER: [("<|message|>", _addressed)]})


def _addressed(header: str) -> str:
    recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
    if recipient:
        return f"{TOOL}:{recipient[1]}"
    return THINKING if channel and channel[1] != "final" else TEXT


def parser(tokenizer: TokenizerWrapper) -> Callable[[str, list[Any]], Any] | None:
    """mlx_lm's parser of a call's text, without its markers; None for harmony."""
    return tokenizer.tool_parser
