"""This machine: its chip, the versions that run on it, and where the user's cache is."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import dflash_mlx


def cache_directory() -> Path:
    """The package's own directory in the user's cache; it need not exist yet."""
    mac = sys.platform == "darwin"
    usual = Path.home() / "Library" / "Caches" if mac else Path.home() / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "dflash-mlx"


def versions() -> dict[str, str]:
    """The versions that speed and numbers depend on, by package."""
    others = {package: metadata.version(package) for package in ("mlx", "mlx-lm")}
    return {"dflash-mlx": dflash_mlx.__version__, **others, "python": platform.python_version()}


def chip() -> str:
    """The processor's name, such as Apple M4 Max."""
    readers: list[Callable[[], str]] = [_sysctl_chip, _proc_chip, platform.machine]
    for read in readers:
        try:
            if name := read():
                return name
        except (OSError, subprocess.SubprocessError):
            continue
    return "unknown"


def _sysctl_chip() -> str:
    if sys.platform != "darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=5, check=True
    ).stdout.strip()


def _proc_chip() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else ""
