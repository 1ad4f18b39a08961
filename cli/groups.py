"""Options that go together: a command takes a dataclass, its user the dataclass's fields."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

from dflash_mlx.cli import options
from dflash_mlx.decode import Options


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Which target and draft, and how they are read."""

    model: options.Model = None
    draft: options.Draft = None
    revision: options.Revision = None
    draft_revision: options.DraftRevision = None
    draft_bits: options.DraftBits = None
    draft_window: options.DraftWindow = None
    draft_rows: options.DraftRows = None
    adapter_path: options.AdapterPath = None
    trust_remote_code: options.TrustRemoteCode = False
    extra_eos_token: options.ExtraEosToken = None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn."""

    temp: options.Temp = 0.0
    top_p: options.TopP = 1.0
    min_p: options.MinP = 0.0
    top_k: options.TopK = 0


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How a prompt is made of messages."""

    system_prompt: options.SystemPrompt = None
    think: options.Think = None
    chat_template_config: options.ChatTemplateConfig = None


@dataclass(frozen=True, kw_only=True)
class ProposingOptions:
    """What is put to the target in a cycle."""

    verify_length: options.VerifyLength = "auto"
    tree: options.Tree = "off"
    copies: options.Copies = "auto"


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How the target's cache is filled and kept."""

    kv_bits: options.KVBits = Options.kv_bits
    kv_group_size: options.KVGroupSize = Options.kv_group_size
    quantized_kv_start: options.QuantizedKVStart = Options.quantized_kv_start
    prefill_step_size: options.PrefillStepSize = Options.prefill_step_size


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for Typer, of one with parameters that are groups."""
    parameters = inspect.signature(command).parameters
    groups: dict[str, Any] = {
        name: p.annotation for name, p in parameters.items() if is_dataclass(p.annotation)
    }
    shown: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        if name not in groups:
            shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        shown += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in fields(groups[name])
        ]

    @wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run
