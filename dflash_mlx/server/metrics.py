"""Counts of a server's life, in Prometheus' text format."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from dflash_mlx.server.job import Figures

_HELP = {
    "http_requests_total": "Answers begun, by API.",
    "http_refused_total": "Requests answered with an error, by status.",
    "first_token_seconds_sum": "Seconds from requests to their first tokens.",
    "first_token_seconds_count": "Answers that came to a first token.",
    "decode_seconds_total": "Seconds between first and last tokens.",
    "acceptance_length": "Tokens per target forward in the last answer.",
    "verify_length": "Proposals by target forward that verified any, in the last answer.",
    "tokens_per_second": "Speed of the last answer.",
    "active": "Sequences that take turns.",
    "waiting": "Requests that wait for a place.",
    "cache_bytes": "What the prefix cache holds.",
    "cache_entries": "Prompts in the prefix cache.",
    "up": "1 while the worker lives.",
}

# What the engine keeps beside its totals that can also fall.
_STATES = ("cache_bytes", "cache_entries")


class Counts:
    """Adds up what requests did."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._last: dict[str, float] = {}

    def begun(self, api: str) -> None:
        """Count a request that got into the engine."""
        self._values["http_requests_total", f'{{api="{api}"}}'] += 1

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._values["http_refused_total", f'{{status="{status}"}}'] += 1

    def ended(self, figures: Figures) -> None:
        """Take in what an answer did, finished or not."""
        if not figures.first_token_s:
            return
        self._values["first_token_seconds_sum", ""] += figures.first_token_s
        self._values["first_token_seconds_count", ""] += 1
        if figures.generation_tps:
            behind = figures.generation_tokens - 1
            self._values["decode_seconds_total", ""] += behind / figures.generation_tps
        self._last = {
            "acceptance_length": figures.acceptance_length,
            "verify_length": figures.verify_length,
            "tokens_per_second": figures.generation_tps,
        }

    def text(self, totals: Any, gauges: Mapping[str, float]) -> str:
        """Everything, with the engine's totals (a dataclass of numbers) and present state."""
        return "".join(self._lines(dataclasses.asdict(totals), gauges))

    def _lines(self, totals: Mapping[str, float], gauges: Mapping[str, float]) -> Iterator[str]:
        rows = [("counter", n, labels, value) for (n, labels), value in self._values.items()]
        states = {name: value for name, value in totals.items() if name in _STATES}
        rows += [("counter", f"{n}_total", "", v) for n, v in totals.items() if n not in _STATES]
        rows += [("gauge", n, "", v) for n, v in {**self._last, **states, **gauges}.items()]
        last = ""
        for kind, name, labels, value in sorted(rows):
            if name != last:
                about = _HELP.get(name, name.removesuffix("_total").replace("_", " ") + ".")
                yield f"# HELP dflash_{name} {about}\n# TYPE dflash_{name} {kind}\n"
                last = name
            yield f"dflash_{name}{labels} {value:.15g}\n"
