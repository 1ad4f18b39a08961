"""What copies gain, in tokens per forward: `python -m tests.tools.copies_gain [MACHINE …]`.

Ten edits (`tests/edits.py`) and texts that repeat little are said word for word by a scripted
target, while a scripted draft guesses well, fairly or poorly; the real loop and the real policy
decide. So these are counts of forwards, and times of machines by script, of none that is here.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dflash_mlx.policy import AdaptiveLength, Learned
from tests.edits import EDITS, Vocabulary
from tests.policy.machines import MACHINES, TEXTS, Machine, Text
from tests.policy.scripted import Run

BLOCK = 16
USUAL = ("flat", "gentle slope", "M4 Pro 4-bit", "mixture of experts")
DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("how-it-works.md", "kernels.md", "limits.md", "serving.md", "training.md")


@dataclass(frozen=True)
class Case:
    """A prompt and its answer, in tokens."""

    name: str
    prompt: list[int]
    answer: list[int]


def edits() -> list[Case]:
    """The ten edits, each with a vocabulary of its own."""
    cases = []
    for edit in EDITS:
        encode = Vocabulary().encode
        cases.append(Case(edit.name, encode(edit.prompt), encode(edit.answer)))
    return cases


def others() -> dict[str, list[Case]]:
    """Texts where copies help little or not at all."""
    return {
        "documentation": list(_pages()),
        "chains of 3 ways": [Case(f"chain {i}", *_chain(i, 3)) for i in range(4)],
        "random tokens": [Case(f"random {i}", *_noise(i)) for i in range(4)],
    }


def _pages() -> Iterator[Case]:
    """Pages of the documentation: the second part is written behind the first."""
    for name in PAGES:
        tokens = Vocabulary().encode((DOCS / name).read_text(encoding="utf-8"))
        yield Case(name, tokens[:300], tokens[300:900])


def _chain(seed: int, ways: int) -> tuple[list[int], list[int]]:
    """Two tokens leave `ways` next ones: matches are long by chance, and tell little."""
    rng, following = random.Random(f"chain {seed}"), dict[tuple[int, ...], list[int]]()
    tokens = [rng.randrange(1, 40) for _ in range(2)]
    while len(tokens) < 500:
        choices = following.setdefault(
            tuple(tokens[-2:]), [rng.randrange(1, 40) for _ in range(ways)]
        )
        tokens.append(rng.choice(choices))
    return tokens[:100], tokens[100:]


def _noise(seed: int) -> tuple[list[int], list[int]]:
    rng = random.Random(f"noise {seed}")
    tokens = [rng.randrange(1, 30) for _ in range(500)]
    return tokens[:100], tokens[100:]


@dataclass
class Total:
    """Sums over some answers; `steps` are times in plain steps of the machine."""

    tokens: int = 0
    forwards: int = 0
    copied: int = 0
    steps: float = 0.0

    @property
    def per_forward(self) -> float:
        return self.tokens / self.forwards


def run(cases: list[Case], machine: Machine, quality: str, *, copies: bool) -> Total:
    """Answer all, one after the other, with what the earlier ones taught."""
    learned, total = Learned(BLOCK - 1), Total()
    for case in cases:
        answered = Run(
            AdaptiveLength(learned),
            machine,
            Text(TEXTS[quality], len(case.answer), case.name),
            BLOCK,
            seed=case.name,
            prompt=len(case.prompt),
            tokens=case.prompt + case.answer,
            copies=copies,
        )
        counts = answered.decoder.statistics
        total.tokens += counts.emitted - 1
        total.forwards += counts.target_forwards
        total.copied += counts.copied
        total.steps += answered.seconds
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("machines", nargs="*", metavar="MACHINE", default=USUAL)
    parser.add_argument("--each", action="store_true", help="a line for every edit")
    arguments = parser.parse_args()
    kinds = {"edits": edits(), **others()}
    if arguments.each:
        kinds = {case.name: [case] for case in kinds["edits"]}
    print(f"{'':18}{'machine':20}{'draft':8}tokens/forward      forwards  steps  copied")
    for kind, cases in kinds.items():
        for name in arguments.machines:
            for quality in ("good", "fair", "poor"):
                off = run(cases, MACHINES[name], quality, copies=False)
                on = run(cases, MACHINES[name], quality, copies=True)
                print(
                    f"{kind:18}{name:20}{quality:8}{off.per_forward:6.2f} -> {on.per_forward:5.2f}"
                    f"{off.forwards / on.forwards:11.2f}x{off.steps / on.steps:7.2f}x"
                    f"{on.copied / on.tokens:7.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
