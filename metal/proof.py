"""The proof of a kernel for one shape class: right, and faster than plain MLX, on this machine.

`python -m dflash_mlx.metal.proof KEY` runs it and prints the verdict as JSON; see prover.
"""

import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import mlx.core as mx
import numpy as np

from .attention_kernel import AttentionKernel
from .attention_plain import plain_block_attention
from .shape_class import ShapeClass, parse
from .verdicts import Verdict

# Largest absolute difference allowed from plain MLX in float32, on normal random input.
TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
# What the kernel must gain to be worth its trouble.
FASTER = 1.05

Attention = Callable[..., mx.array]
Stopwatch = Callable[[Attention, dict], float]


def prove(shape: ShapeClass, kernel: Attention, stopwatch: Stopwatch | None = None) -> Verdict:
    """Try the kernel on the class's calls, then time it against plain MLX.

    stopwatch gives the seconds of one call. Whatever the kernel raises is passed on.
    """
    largest = 0.0
    for call in shape.trials():
        error = difference(kernel(**call), plain_block_attention(**_in_float32(call)))
        if not math.isfinite(error):
            return Verdict("wrong", detail="results that are no finite numbers")
        if error > TOLERANCE[shape.dtype]:
            return Verdict("wrong", error=error)
        largest = max(largest, error)
    speed = compare(shape.typical(), kernel, stopwatch or seconds)
    return Verdict("faster" if speed >= FASTER else "slower", error=largest, speed=speed)


def difference(left: mx.array, right: mx.array) -> float:
    """The largest absolute difference; not a number if either has one."""
    if left.shape != right.shape:
        return float("nan")
    gaps = np.abs(np.array(left.astype(mx.float32)) - np.array(right.astype(mx.float32)))
    return float(gaps.max())


def compare(call: dict, kernel: Attention, stopwatch: Stopwatch) -> float:
    """Plain MLX's time as a multiple of the kernel's: the median over alternating runs."""
    ratios = []
    for _ in range(7):
        ratios.append(stopwatch(plain_block_attention, call) / stopwatch(kernel, call))
    return statistics.median(ratios)


def seconds(attention: Attention, call: dict, repeats: int = 10) -> float:
    """The seconds of one call, from several run in one evaluation after a first one."""
    mx.eval(attention(**call))
    start = time.perf_counter()
    mx.eval([attention(**call) for _ in range(repeats)])
    return (time.perf_counter() - start) / repeats


def _in_float32(call: dict) -> dict:
    return {
        name: x.astype(mx.float32) if isinstance(x, mx.array) and x.dtype != mx.bool_ else x
        for name, x in call.items()
    }


def main(
    arguments: list[str],
    kernel: Attention | None = None,
    stopwatch: Stopwatch | None = None,
) -> None:
    """Prove one class, named by its key, and print the verdict as one line of JSON.

    A second argument is the number of seconds after which the process ends itself, in case
    whoever waits for it is gone.
    """
    if len(arguments) > 1:
        signal.alarm(int(arguments[1]))
    try:
        verdict = prove(parse(arguments[0]), kernel or AttentionKernel(), stopwatch)
    except Exception as error:  # whatever it is, the kernel cannot be used
        text = str(error).strip().splitlines() or [""]
        verdict = Verdict("failed", detail=f"{type(error).__name__}: {text[0]}"[:300])
    print(json.dumps(asdict(verdict)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
