"""DFlash block-diffusion speculative decoding for mlx-lm models."""

from pathlib import Path

# cli, metal and convert are top-level folders that a wheel installs inside this package. In a
# clone's root this folder shadows the installed package, so the three are found beside it.
_clone = Path(__file__).resolve().parent.parent
if (_clone / "pyproject.toml").is_file() and (_clone / "cli" / "__init__.py").is_file():
    __path__.append(str(_clone))

__version__ = "0.1.0"
