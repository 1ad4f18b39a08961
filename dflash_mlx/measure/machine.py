"""The machine that figures come from."""

import os
import platform
import time
from typing import Any

import mlx.core as mx

from dflash_mlx.machine import chip, versions


def machine() -> dict[str, Any]:
    """Chip, memory, system, versions, and how fast matrices multiply, as JSON values."""
    return {
        "chip": chip(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "system": _system(),
        "device": str(mx.default_device().type).rsplit(".", 1)[-1],
        "gflops": round(matmul_gflops(), 1),
        "versions": versions(),
    }


def memory_bytes() -> int:
    """All of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _system() -> str:
    mac = platform.mac_ver()[0]
    name = f"macOS {mac}" if mac else f"{platform.system()} {platform.release().split('-')[0]}"
    return f"{name} {platform.machine()}"


def matmul_gflops() -> float:
    """GFLOP/s of a float32 matrix product on the default device, the best of three.

    The matrices grow until one product takes 50 ms: decoding figures on a CPU depend on
    the BLAS behind them, and this tells which one it is.
    """
    n = 256
    while True:
        a = mx.random.normal((n, n), key=mx.random.key(0))
        mx.eval(a, a @ a)
        seconds = min(_seconds(a) for _ in range(3))
        if seconds >= 0.05 or n == 4096:
            return 2 * n**3 / seconds / 1e9
        n *= 2


def _seconds(a: mx.array) -> float:
    tic = time.perf_counter()
    mx.eval(a @ a)
    return time.perf_counter() - tic
