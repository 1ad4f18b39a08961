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
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

import mlx.core as mx
import numpy as np

from .catalogue import KERNELS, parse
from .shape_class import Call, Implementation, ShapeClass
from .verdicts import Verdict

# Largest absolute difference allowed from plain MLX in float32, on results of order one.
TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
# What the kernel must gain to be worth its trouble.
FASTER = 1.05
# How long the two run in turn before a kernel counts as faster: a chip that has got warm, or has
# other clocks under load, may see it otherwise than the first milliseconds did.
LOAD_SECONDS = 3.0

_REPEATS = 10  # calls in one timed evaluation

# The seconds of one call, from several of these in a row.
Stopwatch = Callable[[Implementation, list[Call]], float]


def prove(
    shape: ShapeClass,
    kernel: Implementation,
    stopwatch: Stopwatch | None = None,
    load_seconds: float = LOAD_SECONDS,
) -> Verdict:
    """Try the kernel on the class's calls, then time it against plain MLX, and again under load.

    Whatever the kernel raises is passed on.
    """
    largest = 0.0
    for call in shape.trials():
        error = difference(kernel(**call), shape.plain(**_in_float32(call)))
        if not math.isfinite(error):
            return Verdict("wrong", detail="results that are no finite numbers")
        if error > TOLERANCE[shape.dtype]:
            return Verdict("wrong", error=error)
        largest = max(largest, error)
    bit_equal = shape.bit_equal(kernel)
    least = None
    for calls in shape.timed():
        mx.eval(calls)
        found = compare(shape, kernel, calls, stopwatch or seconds)
        if found.speed >= FASTER:
            found = compare(shape, kernel, calls, stopwatch or seconds, load_seconds)
        least = found if least is None or found.speed < least.speed else least
        if least.speed < FASTER:
            break
    assert least is not None, "a class has timed calls"
    return Verdict(
        "faster" if least.speed >= FASTER else "slower",
        error=largest,
        speed=least.speed,
        plain_ms=least.plain * 1e3,
        kernel_ms=least.kernel * 1e3,
        bit_equal=bit_equal,
    )


def difference(left: mx.array, right: mx.array) -> float:
    """The largest absolute difference; not a number if either has one."""
    if left.shape != right.shape:
        return float("nan")
    gaps = np.abs(np.array(left.astype(mx.float32)) - np.array(right.astype(mx.float32)))
    return float(gaps.max())


@dataclass(frozen=True)
class Timing:
    """Medians: plain MLX's time as a multiple of the kernel's, and the seconds of a call each."""

    speed: float
    plain: float
    kernel: float


def compare(
    shape: ShapeClass,
    kernel: Implementation,
    calls: list[Call],
    stopwatch: Stopwatch,
    load_seconds: float = 0.0,
) -> Timing:
    """Time both in turn, seven times at least and so many seconds; the later half counts.

    Without load_seconds all of them count.
    """
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + load_seconds
    while len(times) < 7 or time.perf_counter() < end:
        times.append((stopwatch(shape.plain, calls), stopwatch(kernel, calls)))
    if load_seconds:
        times = times[len(times) // 2 :]
    return Timing(
        statistics.median(plain / own for plain, own in times),
        statistics.median(plain for plain, _ in times),
        statistics.median(own for _, own in times),
    )


def seconds(run: Implementation, calls: list[Call]) -> float:
    """The seconds of one call, from several run in one evaluation after a first one."""
    mx.eval(run(**calls[0]))
    start = time.perf_counter()
    mx.eval([run(**call) for call in islice(cycle(calls), _REPEATS)])
    return (time.perf_counter() - start) / _REPEATS


def _in_float32(call: Call) -> Call:
    def converted(value: Any) -> Any:
        if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
            return value.astype(mx.float32)
        return value

    return {name: converted(value) for name, value in call.items()}


def main(
    arguments: list[str],
    make: Callable[..., Any] = mx.fast.metal_kernel,
    stopwatch: Callable[[Implementation], Stopwatch | None] = lambda kernel: None,
    load_seconds: float = LOAD_SECONDS,
) -> None:
    """Prove one class, named by its key, and print the verdict as one line of JSON.

    A second argument is the number of seconds after which the process ends itself, in case
    whoever waits for it is gone.
    """
    if len(arguments) > 1:
        signal.alarm(int(arguments[1]))
    try:
        shape = parse(arguments[0])
        kernel = KERNELS[shape.kernel](make)
        verdict = prove(shape, kernel, stopwatch(kernel), load_seconds)
    except Exception as error:  # whatever it is, the kernel cannot be used
        text = str(error).strip().splitlines() or [""]
        verdict = Verdict("failed", detail=f"{type(error).__name__}: {text[0]}"[:300])
    print(json.dumps(asdict(verdict)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
