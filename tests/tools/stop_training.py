"""How soon `train` ends after Ctrl-C: `python -m tests.tools.stop_training TARGET`.

Each figure is a run of its own, interrupted at some moment of a stage. Sequences are short and
alone in their batch, so that every stage is reached soon; with the default options a step takes far
longer.
"""

import argparse
import json
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from dflash_mlx.machine import chip
from tests.command_line import spawn

DOCS = Path(__file__).parents[2] / "docs"
SMALL = ["--batch-size=1", "--seq-length=128", "--anchors=16", "--draft-layers=2"]
STAGES = ("timing a step", "answering", "the first loss", "a step", "measuring")


def rows(answered: bool) -> list[dict]:
    """The pages of the documentation, or questions about them."""
    text = "\n".join(page.read_text("utf-8") for page in sorted(DOCS.glob("*.md")))
    if answered:
        return [{"text": text[at : at + 400]} for at in range(0, len(text), 400)]
    lines = [line for line in text.splitlines() if len(line) > 60][:64]
    return [{"messages": [{"role": "user", "content": f"Explain: {line}"}]} for line in lines]


def stopping(target: str, stage: str, after: float) -> float:
    """Seconds from SIGINT to the end of a run, `after` so many in the stage."""
    with tempfile.TemporaryDirectory() as folder:
        data, made, said = (Path(folder) / name for name in ("data.jsonl", "made", "said"))
        content = rows(answered=stage != "answering")
        data.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
        arguments = ["train", f"--target={target}", f"--data={data}", f"-o{made}", "--steps=1"]
        arguments += SMALL
        if stage == "answering":
            arguments.append("--regenerate=64")
        with open(said, "w") as err:
            process = spawn(
                arguments, stderr=err, stdout=subprocess.DEVNULL, env={"XDG_CACHE_HOME": folder}
            )
        while not reached(stage, said.read_text("utf-8"), made):
            if process.poll() is not None:
                raise SystemExit(said.read_text("utf-8"))
            time.sleep(0.01)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        sent = time.perf_counter()
        process.wait()
        seconds = time.perf_counter() - sent
        if process.returncode != 130:
            raise SystemExit(f"ended with {process.returncode}: {said.read_text('utf-8')}")
        return seconds


def reached(stage: str, said: str, made: Path) -> bool:
    """Whether a run is in a stage, by what it said and wrote."""
    signs = {
        "timing a step": "Timing a step" in said,
        "answering": "The target is answering" in said,
        "the first loss": "Estimated" in said,
        "a step": "sequences to learn from" in said,
        "measuring": (made / "training" / "state.safetensors").exists(),
    }
    return signs[stage]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--stage", choices=STAGES, action="append", help="all if not given")
    parser.add_argument("--after", type=float, action="append", help="3 and 5.5 if not given")
    arguments = parser.parse_args()
    print(chip())
    for stage in arguments.stage or STAGES:
        for after in arguments.after or (3.0, 5.5):
            print(f"{stage}, after {after:g} s: {stopping(arguments.target, stage, after):.2f} s")


if __name__ == "__main__":
    main()
