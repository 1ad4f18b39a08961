"""The embedded demo pair: a small trained target, its trained draft, and prompts for both."""

import json
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class DemoPrompt:
    """A prompt for `bench`.

    Attributes:
        messages: a conversation that ends with the user.
        kind: what is asked, as "arithmetic".
        group: "held-out" (names and numbers that training never used, of its syllables), "novel"
            (real names and words) or "bad" (what the pair never learnt).
    """

    messages: tuple[dict[str, str], ...]
    kind: str
    group: str


def demo_paths() -> tuple[Path, Path]:
    """The directories of the target and of its draft."""
    return _HERE / "target", _HERE / "draft"


def demo_prompts(*groups: str) -> list[DemoPrompt]:
    """The prompts of these groups, or all of them, in the file's order."""
    lines = (_HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        DemoPrompt(tuple(row["messages"]), row["kind"], row["set"])
        for row in rows
        if not groups or row["set"] in groups
    ]
