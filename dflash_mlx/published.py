"""The published pairs: which draft was trained for which target."""

import re
from pathlib import Path

from dflash_mlx.errors import CheckpointError

# Draft repository for each target's base name, as published by the authors.
DRAFTS = {
    "Qwen3-4B": "z-lab/Qwen3-4B-DFlash-b16",
    "Qwen3-8B": "z-lab/Qwen3-8B-DFlash-b16",
    "Qwen3.5-4B": "z-lab/Qwen3.5-4B-DFlash",
    "Qwen3.5-9B": "z-lab/Qwen3.5-9B-DFlash",
    "Qwen3.5-27B": "z-lab/Qwen3.5-27B-DFlash",
    "Qwen3.5-35B-A3B": "z-lab/Qwen3.5-35B-A3B-DFlash",
    "Qwen3.5-122B-A10B": "z-lab/Qwen3.5-122B-A10B-DFlash",
    "Qwen3.6-27B": "z-lab/Qwen3.6-27B-DFlash",
    "Qwen3.6-35B-A3B": "z-lab/Qwen3.6-35B-A3B-DFlash",
    "Qwen3-Coder-30B-A3B-Instruct": "z-lab/Qwen3-Coder-30B-A3B-DFlash",
    "Qwen3-Coder-Next": "z-lab/Qwen3-Coder-Next-DFlash",
    "gpt-oss-20b": "z-lab/gpt-oss-20b-DFlash",
    "gpt-oss-120b": "z-lab/gpt-oss-120b-DFlash",
    "Kimi-K2.5": "z-lab/Kimi-K2.5-DFlash",
    "Llama-3.1-8B-Instruct": "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat",
    "gemma-4-31b-it": "z-lab/gemma-4-31B-it-DFlash",
    "gemma-4-26b-a4b-it": "z-lab/gemma-4-26B-A4B-it-DFlash",
    "gemma-4-12b-it": "z-lab/gemma4-12B-it-DFlash",
    "Qwen3.8-27B": "z-lab/Qwen3.8-27B-DFlash2",
}

# What a conversion appends to the base name: bits, formats, quantization recipes.
_SUFFIX = re.compile(
    r"-(?:\d+(?:\.\d+)?-?bit|bf16|fp16|fp8|fp4|f16|mlx|mxfp4|mxfp8|nvfp4|q\d+|dwq|awq|gptq|qat|optiq)"
    r"(?:-.*)?$",
    re.IGNORECASE,
)


def find_draft(path_or_repo: str | Path) -> str:
    """The published draft of a target, by the target's name.

    Raises:
        CheckpointError: none is known; the message names `draft`.
    """
    name = str(path_or_repo).rstrip("/").rsplit("/", 1)[-1]
    base = _SUFFIX.sub("", name).lower()
    for target, draft in DRAFTS.items():
        if target.lower() == base:
            return draft
    raise CheckpointError(
        f"No published draft is known for {path_or_repo}; name one with --draft (draft= in Python)."
    )
