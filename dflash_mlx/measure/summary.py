"""From runs to the figures of a comparison."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from dflash_mlx.measure.comparison import Result
from dflash_mlx.measure.run import Forward, Run


@dataclass(frozen=True)
class Side:
    """One way of decoding over some prompts: medians of the repeats, summed over the prompts.

    Attributes:
        generation_tps: tokens after the first ones, by the seconds after them.
        decode_seconds: those seconds.
        tokens: tokens emitted.
        first_token_seconds: mean over the prompts.
        peak_memory: the largest, in GB.
        collectives: how often the ranks exchange numbers, per token; None where there is one.
    """

    generation_tps: float
    decode_seconds: float
    tokens: int
    first_token_seconds: float
    peak_memory: float
    collectives: float | None = None


@dataclass(frozen=True)
class Summary:
    """DFlash against plain decoding over some prompts.

    Attributes:
        speedup: summed plain decode seconds / summed DFlash decode seconds, each per token so that
            it stays fair where sampled texts differ in length.
        speedup_interval: 95 % interval of the median over repeats of that ratio (bootstrap);
            None with fewer than three repeats.
        acceptance_length: tokens emitted after the first ones by the target forwards they took.
        identical: whether all texts were.
        prompt_tokens: mean over the prompts.
        verify_length: mean proposals verified per target forward that verified any.
        plain_share: share of the target's forwards that verified none.
        copied_share: share of the tokens after the first ones that were copied from the text.
        histogram: histogram[n - 1] forwards emitted n tokens.
        by_position: share of the proposals verified at each position that were accepted; empty
            where trees were asked for.
    """

    prompts: int
    speedup: float
    speedup_interval: tuple[float, float] | None
    acceptance_length: float
    identical: bool
    plain: Side
    dflash: Side
    prompt_tokens: float
    verify_length: float
    plain_share: float
    copied_share: float
    histogram: list[int]
    by_position: list[float]

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def summarize(results: Sequence[Result]) -> Summary:
    """The figures of one or more prompts."""
    plain, dflash = _side([r.plain for r in results]), _side([r.dflash for r in results])
    forwards = [f for r in results for run in r.dflash for f in run.forwards]
    verifies = [f for f in forwards if f.proposed]
    return Summary(
        prompts=len(results),
        speedup=_ratio(dflash.generation_tps, plain.generation_tps),
        speedup_interval=_interval(results),
        acceptance_length=_ratio(sum(f.emitted for f in forwards), len(forwards)),
        identical=all(r.identical for r in results),
        plain=plain,
        dflash=dflash,
        prompt_tokens=sum(len(r.prompt.tokens) for r in results) / len(results),
        verify_length=_ratio(sum(f.proposed for f in verifies), len(verifies)),
        plain_share=_ratio(len(forwards) - len(verifies), len(forwards)),
        copied_share=_ratio(
            sum(f.accepted for f in forwards if f.copied), sum(f.emitted for f in forwards)
        ),
        histogram=_histogram(forwards),
        by_position=_by_position([f for f in verifies if not f.tree]),
    )


def by_kind(results: Sequence[Result]) -> dict[str, Summary]:
    """A summary for each kind, in the order of the prompts."""
    kinds = dict.fromkeys(r.prompt.kind for r in results)
    return {kind: summarize([r for r in results if r.prompt.kind == kind]) for kind in kinds}


def overall(results: Sequence[Result]) -> Summary:
    """The prompts that count; all of them if none does."""
    return summarize([r for r in results if r.prompt.counts] or results)


def sides(results: Sequence[Result], tried: str) -> dict[Any, Summary]:
    """The further sides that tried one thing, against plain decoding, by which of it they tried."""
    names = [name for name in results[0].sides if name[0] == tried]
    return {name[1]: overall([replace(r, dflash=r.sides[name]) for r in results]) for name in names}


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One JSON object per prompt: its summary's keys, its kind, and every run's seconds."""
    listed = []
    for r in results:
        entry: dict[str, Any] = {
            "kind": r.prompt.kind,
            "text": r.prompt.text,
            "counts": r.prompt.counts,
            **summarize([r]).as_json(),
        }
        entry["prompt_tokens"] = len(r.prompt.tokens)
        entry["difference"] = asdict(r.difference) if r.difference else None
        entry["runs"] = {
            side: [
                {
                    "tokens": len(run.tokens),
                    "first_token_seconds": run.first_seconds,
                    "decode_seconds": run.decode_seconds,
                }
                for run in runs
            ]
            for side, runs in (("plain", r.plain), ("dflash", r.dflash))
        }
        listed.append(entry)
    return listed


def _side(prompts: Sequence[list[Run]]) -> Side:
    seconds = sum(median(run.decode_seconds for run in runs) for runs in prompts)
    decoded = sum(median(run.decoded for run in runs) for runs in prompts)
    firsts = [median(run.first_seconds for run in runs) for runs in prompts]
    return Side(
        generation_tps=_ratio(decoded, seconds),
        decode_seconds=seconds,
        tokens=sum(len(runs[0].tokens) for runs in prompts),
        first_token_seconds=sum(firsts) / len(firsts),
        peak_memory=max(run.peak_memory for runs in prompts for run in runs),
        collectives=_collectives([run for runs in prompts for run in runs]),
    )


def _collectives(runs: Sequence[Run]) -> float | None:
    counts = [run.collectives for run in runs if run.collectives is not None]
    return _ratio(sum(counts), sum(len(run.tokens) for run in runs)) if counts else None


def _interval(results: Sequence[Result]) -> tuple[float, float] | None:
    ratios = []
    for plain, dflash in zip(
        zip(*(r.plain for r in results), strict=True),
        zip(*(r.dflash for r in results), strict=True),
        strict=True,
    ):
        ratios.append(_ratio(_pace(plain), _pace(dflash)))
    if len(ratios) < 3:
        return None
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def _pace(runs: Sequence[Run]) -> float:
    """Decode seconds per token."""
    return _ratio(sum(run.decode_seconds for run in runs), sum(run.decoded for run in runs))


def _histogram(forwards: Sequence[Forward]) -> list[int]:
    counts = Counter(f.emitted for f in forwards)
    return [counts[n] for n in range(1, max(counts, default=0) + 1)]


def _by_position(verifies: Sequence[Forward]) -> list[float]:
    longest = max((f.proposed for f in verifies), default=0)
    return [
        sum(f.accepted > i for f in verifies) / sum(f.proposed > i for f in verifies)
        for i in range(longest)
    ]


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0
