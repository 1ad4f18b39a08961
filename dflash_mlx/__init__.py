"""DFlash block-diffusion speculative decoding for mlx-lm models."""

import os
import signal
import sys
from pathlib import Path

# cli, metal and convert are top-level folders that a wheel installs inside this package. In a
# clone's root this folder shadows the installed package, so the three are found beside it.
_clone = Path(__file__).resolve().parent.parent
if (_clone / "pyproject.toml").is_file() and (_clone / "cli" / "__init__.py").is_file():
    __path__.append(str(_clone))

__version__ = "0.2.0"

# While a command's modules are imported Ctrl-C just ends it; `cli.main` handles it from then on.
_is_command = Path(*sys.argv[:1]).name == "dflash-mlx"
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# transformers asks for the working directory as it is imported, and mlx-lm imports it.
try:
    os.getcwd()
except FileNotFoundError:
    _gone = "The working directory has been removed; change to one that is there."
    if _is_command:
        sys.exit(f"dflash-mlx: {_gone}")
    raise FileNotFoundError(_gone) from None

from dflash_mlx.api import (  # noqa: E402
    batch_generate,
    generate,
    load,
    make_prompt_cache,
    stream_generate,
)
from dflash_mlx.checkpoint import load_draft  # noqa: E402
from dflash_mlx.decode import make_sampler  # noqa: E402
from dflash_mlx.pairs import SpeculativeModel  # noqa: E402
from dflash_mlx.prompt_caches import (  # noqa: E402
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from dflash_mlx.responses import GenerationResponse  # noqa: E402

__all__ = [
    "GenerationResponse",
    "SpeculativeModel",
    "__version__",
    "batch_generate",
    "can_trim_prompt_cache",
    "generate",
    "load",
    "load_draft",
    "load_prompt_cache",
    "make_prompt_cache",
    "make_sampler",
    "save_prompt_cache",
    "stream_generate",
    "trim_prompt_cache",
]
