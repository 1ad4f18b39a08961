"""The same answer, plain and with a draft, as an animated SVG of the times that were measured.

    python examples/race.py race.svg [--model TARGET [--draft DRAFT]] [--prompt TEXT]

Each way writes the answer five times, in turn, and the run of median time is drawn. What the draft
proposed is green. An answer that is over too soon to be watched is slowed down, and the picture
says so. Without a target the demo pair runs, which knows sums of three digits.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import mlx_lm

from dflash_mlx import load, stream_generate
from dflash_mlx.demo import demo_paths
from dflash_mlx.measure.machine import machine

RUNS = 5
COLUMNS, CHARACTER, LINE, MARGIN, WIDTH = 48, 8.4, 21, 24, 920
SECONDS, PAUSE = 6.0, 3.0  # the least time that plain decoding is shown for, and the end stays
INK, QUIET, PAPER, EDGE, GREEN = "#1f2328", "#6e7781", "#ffffff", "#d0d7de", "#0f7b6c"


@dataclass(frozen=True)
class Run:
    """One answer: (seconds since the prompt was given, text, whether the draft proposed it)."""

    pieces: tuple[tuple[float, str, bool], ...]

    @property
    def text(self) -> str:
        return "".join(text for _, text, _ in self.pieces)

    @property
    def seconds(self) -> float:
        return self.pieces[-1][0]


def record(responses: Iterable[Any]) -> Run:
    """Take the time of every token."""
    begin, pieces = time.perf_counter(), []
    for response in responses:
        now = time.perf_counter() - begin
        pieces.append((now, response.text, bool(response.from_draft)))
    return Run(tuple(pieces))


def race(*ways: Callable[[], Iterable[Any]]) -> list[Run]:
    """The median run of each way; all take turns, and the first turn is not counted."""
    turns = [[record(way()) for way in ways] for _ in range(RUNS + 1)][1:]
    return [
        sorted(runs, key=lambda run: run.seconds)[RUNS // 2] for runs in zip(*turns, strict=True)
    ]


def cells(run: Run) -> list[tuple[int, int, float, str, bool]]:
    """Pieces of one line each: (row, column, seconds, text, whether the draft proposed it)."""
    row = column = 0
    found = []
    for seconds, text, drafted in run.pieces:
        for i, part in enumerate(text.expandtabs(4).split("\n")):
            if i:
                row, column = row + 1, 0
            while part:
                if column == COLUMNS or (len(part) > COLUMNS - column and len(part) < COLUMNS):
                    row, column, part = row + 1, 0, part.lstrip(" ")
                now, part = part[: COLUMNS - column], part[COLUMNS - column :]
                if now:
                    found.append((row, column, seconds, now, drafted))
                column += len(now)
    return found


def picture(prompt: str, names: list[str], runs: list[Run], about: str) -> str:
    """The SVG: one panel for each run, side by side, as fast as it was, or slowed down alike."""
    slower = max(1, round(SECONDS / max(run.seconds for run in runs)))
    total = slower * max(run.seconds for run in runs) + PAUSE
    panels = [cells(run) for run in runs]
    rows = 1 + max(row for panel in panels for row, *_ in panel)
    height = 132 + rows * LINE + 62

    def appearing(seconds: float) -> str:
        at = f"{min(slower * seconds / total, 1):.5f}"
        return (
            f'<animate attributeName="opacity" values="0;1" keyTimes="0;{at}" calcMode="discrete" '
            f'dur="{total:.2f}s" repeatCount="indefinite"/>'
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="ui-monospace, Menlo, Consolas, monospace" '
        'font-size="14" xml:space="preserve">',
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8" fill="{PAPER}" '
        f'stroke="{EDGE}"/>',
        f'<text x="{MARGIN}" y="38" fill="{INK}">&gt; {escape(prompt)}</text>',
    ]
    for i, (name, run, panel) in enumerate(zip(names, runs, panels, strict=True)):
        left = MARGIN + i * WIDTH // 2
        right = round(left + COLUMNS * CHARACTER)
        tokens, ink = len(run.pieces), (INK, GREEN)
        said = f"{tokens} tokens in {run.seconds:.2f} s"
        parts += [
            f'<path d="M{left} 60H{right}" stroke="{EDGE}"/>',
            f'<text x="{left}" y="88" fill="{INK}" font-weight="bold">{escape(name)}</text>',
            f'<text x="{right}" y="88" fill="{INK}" text-anchor="end">'
            f"{appearing(run.seconds)}{said}</text>",
        ]
        for row, column, seconds, text, drafted in panel:
            word = text.strip(" ")
            if word:
                column += len(text) - len(text.lstrip(" "))
                parts.append(
                    f'<text x="{left + column * CHARACTER:.1f}" y="{122 + row * LINE}" '
                    f'textLength="{len(word) * CHARACTER:.1f}" lengthAdjust="spacingAndGlyphs" '
                    f'fill="{ink[drafted]}">{appearing(seconds)}{escape(word)}</text>'
                )
    speed = "at the speed it ran" if slower == 1 else f"shown {slower} times slower than it ran"
    for i, line in enumerate((f"Green: proposed by the draft. {speed.capitalize()}.", about)):
        parts.append(
            f'<text x="{MARGIN}" y="{height - 38 + i * 19}" fill="{QUIET}" font-size="12">'
            f"{escape(line)}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--draft")
    parser.add_argument("--prompt", default="What is 427 - 309?")
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()
    model, tokenizer = load(args.model, args.draft) if args.model else load(*demo_paths())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.prompt}], add_generation_prompt=True
    )
    options = {"prompt": prompt, "max_tokens": args.max_tokens}
    plain, drafted = race(
        lambda: mlx_lm.stream_generate(model.target, tokenizer, **options),
        lambda: stream_generate(model, tokenizer, **options),
    )
    print(f"plain {plain.seconds:.3f} s, with the draft {drafted.seconds:.3f} s")
    if plain.text != drafted.text:
        print("The two texts differ; `dflash-mlx bench` says where.", file=sys.stderr)
    here = machine()
    versions = here["versions"]
    about = (
        f"{here['chip']}, {here['device']}, mlx {versions['mlx']}, mlx-lm {versions['mlx-lm']}, "
        f"dflash-mlx {versions['dflash-mlx']}; {args.model or 'demo pair'}"
    )
    args.file.write_text(picture(args.prompt, ["mlx_lm", "dflash-mlx"], [plain, drafted], about))


if __name__ == "__main__":
    main()
