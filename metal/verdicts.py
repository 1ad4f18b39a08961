"""What proofs found on this machine, kept in the user's cache directory."""

import json
import logging
import platform
import re
import threading
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from dflash_mlx.files import replace_file
from dflash_mlx.machine import cache_directory, chip, versions

from .catalogue import fingerprint

log = logging.getLogger("dflash_mlx.metal")

OUTCOMES = ("faster", "slower", "wrong", "failed", "stalled")


@dataclass(frozen=True)
class Verdict:
    """The result of one proof.

    Attributes:
        outcome: faster or slower than plain MLX; wrong (the error is too large); failed (did not
            compile, or raised; detail says what); stalled (no result within the time limit).
        error: the largest absolute difference from plain MLX in float32.
        speed: plain MLX's time as a multiple of the kernel's.
        plain_ms, kernel_ms: the times of one call.
        bit_equal: whether a row has the very bits of MLX's result for that row alone, where that
            was looked at.
    """

    outcome: str
    error: float | None = None
    speed: float | None = None
    plain_ms: float | None = None
    kernel_ms: float | None = None
    bit_equal: bool | None = None
    detail: str = ""

    @property
    def correct(self) -> bool:
        """Whether the kernel ran and gave right results."""
        return self.outcome in ("faster", "slower")

    @classmethod
    def read(cls, fields: object) -> "Verdict":
        """The verdict from its JSON form.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(fields, dict) or fields.get("outcome") not in OUTCOMES:
            raise ValueError(f"not a verdict: {fields!r:.100}")
        numbers = {n: fields.get(n) for n in ("error", "speed", "plain_ms", "kernel_ms")}
        bit_equal = fields.get("bit_equal")
        if not all(n is None or isinstance(n, int | float) for n in numbers.values()) or not (
            bit_equal is None or isinstance(bit_equal, bool)
        ):
            raise ValueError(f"not a verdict: {fields!r:.100}")
        detail = str(fields.get("detail", ""))
        return cls(fields["outcome"], bit_equal=bit_equal, detail=detail, **numbers)


class VerdictBook:
    """Verdicts by shape class key, in memory and in one JSON file.

    A file that cannot be read or written costs one log line, and the proofs are run again by the
    next process; nothing else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None  # why the file cannot be used, for doctor
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._verdicts: dict[str, Verdict] | None = None

    def get(self, key: str) -> Verdict | None:
        """The verdict, or None where there is none yet."""
        if self._verdicts is None:
            with self._lock:
                if self._verdicts is None:
                    self._verdicts = self._read()
        return self._verdicts.get(key)

    def all(self) -> dict[str, Verdict]:
        """Every verdict by key, sorted."""
        self.get("")
        return dict(sorted((self._verdicts or {}).items()))

    def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict, in the file too unless that fails."""
        self.get("")
        with self._lock:
            # Another process may have written since: keep what it found.
            self._verdicts = self._read() | (self._verdicts or {}) | {key: verdict}
            kept = {k: asdict(v) for k, v in sorted(self._verdicts.items())}
            try:
                replace_file(self.path, json.dumps(kept, indent=1) + "\n")
                self.problem = None
            except OSError as error:
                self._say(f"Kernel verdicts cannot be kept in {self.path} ({error.strerror}).")

    def _read(self) -> dict[str, Verdict]:
        try:
            fields = json.loads(self.path.read_text())
            return {str(key): Verdict.read(value) for key, value in fields.items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._say(f"Kernel verdicts in {self.path} cannot be read ({error.strerror}).")
        except (ValueError, AttributeError):
            self._say(f"Kernel verdicts in {self.path} are damaged; the proofs will run again.")
        return {}

    def _say(self, problem: str) -> None:
        self.problem = problem
        if problem not in self._said:
            self._said.add(problem)
            log.warning(problem)


def book_path() -> Path:
    """Where this machine's verdicts are: a file for each chip, macOS, MLX and kernel version."""
    name = "_".join(machine().values())
    return cache_directory() / "kernels" / (re.sub(r"[^\w.+-]+", "-", name) + ".json")


@cache
def machine() -> dict[str, str]:
    """What a verdict depends on: chip, system, MLX, package, and the kernels' own text."""
    by_package = versions()
    return {
        "chip": chip(),
        "system": f"macOS-{platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.system(),
        "mlx": f"mlx-{by_package['mlx']}",
        "package": f"dflash-mlx-{by_package['dflash-mlx']}",
        "kernels": fingerprint(),
    }
