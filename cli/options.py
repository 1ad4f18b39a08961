"""The options that commands share: names and meanings as mlx_lm's."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dflash_mlx.demo import demo_paths
from dflash_mlx.json_text import parse_json
from dflash_mlx.propose import MOST_NODES
from dflash_mlx.texts import argument_text

# The class that Typer's usage errors share; it exports only this one of them.
UsageError: Any = typer.BadParameter.__mro__[1]

_MODEL, _SAMPLING, _PROMPT, _RUN = "Model", "Sampling", "Prompt", "Running"


def verify_length(value: str | int) -> int | str:
    """`auto`, a number of proposals, or `off` for plain decoding, as `stream_generate` takes it."""
    if isinstance(value, int) or value == "auto":
        return value
    if value == "off":
        return 0
    try:
        length = int(value)
    except ValueError:
        length = -1
    if length < 0:
        raise typer.BadParameter(f"{value!r} is not auto, off or a number from 0.")
    return length


def tree(value: str | int) -> int | str:
    """A number of nodes, `auto`, or `off` for lines."""
    if isinstance(value, int) or value == "auto":
        return value
    if value == "off":
        return 0
    try:
        nodes = int(value)
    except ValueError:
        nodes = -1
    if not 0 <= nodes <= MOST_NODES:
        raise typer.BadParameter(f"{value!r} is not auto, off or a number from 0 to {MOST_NODES}.")
    return nodes


def json_object(value: str | dict[str, Any]) -> dict[str, Any]:
    """A JSON object given on the command line."""
    if isinstance(value, dict):
        return value
    try:
        parsed = parse_json(value)
    except ValueError as error:
        raise typer.BadParameter(f"it is not JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise typer.BadParameter('it is not a JSON object like {"key": "value"}.')
    return parsed


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def byte_count(value: str | int) -> int:
    """A number of bytes, plain or with a unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?b?)\s*", str(value), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    if match is None or not (size := int(float(match[1]) * _UNITS[unit.removesuffix("B") + "B"])):
        raise typer.BadParameter(f"{value!r} is no number of bytes like 8000000000 or 8GB.")
    return size


def copies(value: str) -> str:
    """`auto` or `off`."""
    if value not in ("auto", "off"):
        raise typer.BadParameter(f"{value!r} is not auto or off.")
    return value


def token_limit(value: int) -> int:
    """A number of tokens, or -1 for no limit."""
    if value == 0 or value < -1:
        raise typer.BadParameter(f"{value} is neither -1 nor at least 1.")
    return value


def stop_strings(value: list[str] | None) -> list[str] | None:
    """Texts that end an answer, none of them empty."""
    if value and "" in value:
        raise typer.BadParameter("an empty string would end every text; give some text.")
    return value and list(map(argument_text, value))


def system_prompt(value: str | None) -> str | None:
    """A system message, as the UTF-8 it is."""
    return value and argument_text(value)


def _one_of(*choices: Any) -> Callable[[Any], Any]:
    """A callback that lets these values through, and None."""

    def check(value: Any) -> Any:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(str, choices))}.")
        return value

    return check


def place(name: str, *, draft: bool = False) -> str:
    """What the user named; `demo` is the demo pair's target or draft."""
    if name != "demo" or Path(name).is_dir():
        return name
    return str(demo_paths()[1 if draft else 0])


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="The target: a directory or a hub id. Without it, the small demo pair that comes "
        "with dflash-mlx.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        help="The draft: a directory or a hub id. Without it, the one published for the target.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        help="Branch, tag or commit of the target's hub repository.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
DraftRevision = Annotated[
    str | None,
    typer.Option(
        help="Branch, tag or commit of the draft's hub repository.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
DraftWindow = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Let the draft's full-attention layers see only the first few tokens and about the "
        "last N; a long context then slows drafting down less, and the text stays the same.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
DraftRows = Annotated[
    str | None,
    typer.Option(
        metavar="anchor|fill",
        callback=_one_of("anchor", "fill"),
        help="Which rows of a draft's block propose: all, each for the token behind its own "
        "position (anchor), or all but the first, each for its own (fill). For drafts whose files "
        "do not say.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
DraftBits = Annotated[
    int | None,
    typer.Option(
        metavar="4|8",
        callback=_one_of(4, 8),
        help="Quantize the draft in memory to this many bits.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
AdapterPath = Annotated[
    str | None,
    typer.Option(
        help="Trained adapter weights for the target.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the target or its tokenizer.",
        rich_help_panel=_MODEL,
    ),
]
ExtraEosToken = Annotated[
    list[str] | None,
    typer.Option(
        help="A further token that ends the text; may be repeated.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]

Temp = Annotated[
    float,
    typer.Option(
        min=0.0, max=1e6, help="Sampling temperature; 0 is greedy.", rich_help_panel=_SAMPLING
    ),
]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Sampling top-p.", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Sampling min-p.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[
    int,
    typer.Option(min=0, max=2**31 - 1, help="Sampling top-k; 0 is off.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**64 - 1,
        help="Seed of the random numbers; the text is the one that mlx_lm draws with it, whatever "
        "--verify-length is.",
        show_default=False,
        rich_help_panel=_SAMPLING,
    ),
]

SystemPrompt = Annotated[
    str | None,
    typer.Option(
        callback=system_prompt,
        help="A system message.",
        show_default=False,
        rich_help_panel=_PROMPT,
    ),
]
Think = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think",
        help="Let the model think first, or not. Without it, as the chat template has it.",
        show_default=False,
        rich_help_panel=_PROMPT,
    ),
]
ChatTemplateConfig = Annotated[
    dict | None,
    typer.Option(
        metavar="JSON",
        parser=json_object,
        help="Further variables for the chat template.",
        show_default=False,
        rich_help_panel=_PROMPT,
    ),
]
IgnoreChatTemplate = Annotated[
    bool,
    typer.Option(
        "--ignore-chat-template",
        help="Give the prompt to the model as it is.",
        rich_help_panel=_PROMPT,
    ),
]
PrefillResponse = Annotated[
    str | None,
    typer.Option(
        help="A beginning that the answer continues.",
        show_default=False,
        rich_help_panel=_PROMPT,
    ),
]

MaxTokens = Annotated[
    int,
    typer.Option(
        callback=token_limit,
        help="The most tokens to write; -1 for no limit.",
        rich_help_panel=_RUN,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        callback=stop_strings,
        help="Text that ends the answer and is left out of it; may be repeated.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
VerifyLength = Annotated[
    Any,
    typer.Option(
        metavar="auto|N|off",
        parser=verify_length,
        help="Proposals that each cycle verifies: auto decides every time what pays, off is plain "
        "decoding.",
        rich_help_panel=_RUN,
    ),
]
Tree = Annotated[
    Any,
    typer.Option(
        metavar="N|auto|off",
        parser=tree,
        help="Verify the likeliest tree of N proposals, at most 64, in each cycle; auto grows one "
        "where --verify-length auto finds that it pays; off verifies lines, as is always done with "
        "recurrent layers.",
        rich_help_panel=_RUN,
    ),
]
Copies = Annotated[
    str,
    typer.Option(
        metavar="auto|off",
        callback=copies,
        help="Propose earlier text again where --verify-length auto expects more of that than of "
        "the draft, or leave all proposals to the draft.",
        rich_help_panel=_RUN,
    ),
]
KVBits = Annotated[
    int | None,
    typer.Option(
        callback=_one_of(2, 3, 4, 5, 6, 8),
        help="Quantize the target's cache to this many bits.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
KVGroupSize = Annotated[
    int, typer.Option(min=1, help="Group size of --kv-bits.", rich_help_panel=_RUN)
]
QuantizedKVStart = Annotated[
    int,
    typer.Option(min=0, help="Tokens from which on --kv-bits holds.", rich_help_panel=_RUN),
]
PrefillStepSize = Annotated[
    int, typer.Option(min=1, help="Prompt tokens per forward.", rich_help_panel=_RUN)
]
