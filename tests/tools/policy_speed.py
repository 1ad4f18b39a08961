"""`--verify-length auto` on this machine, in ratios: `python -m tests.tools.policy_speed [CASE …]`.

Every line is one run of `dflash-mlx bench` on the demo pair, by itself, with costs of its own: the
gain over plain decoding, and where fixed lengths were swept, the share of the best one's speed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFAMILIAR = str(Path(__file__).parent / "unfamiliar.jsonl")
CONTEXTS = "256,512,1k,2k,4k"
CASES: dict[str, tuple[list[str], int]] = {  # options, and busy loops beside it
    "its kinds of text": (["--sweep"], 0),
    "two busy loops": (["--sweep"], 2),
    "unfamiliar": (["--prompts", UNFAMILIAR], 0),
    "unfamiliar, off": (["--prompts", UNFAMILIAR, "--verify-length", "off"], 0),
    "contexts": (["--context", CONTEXTS], 0),
}


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Other programs that want the processor."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in running:
            process.kill()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeats", default="2")
    arguments = parser.parse_args()
    for name in arguments.cases or CASES:
        options, loops = CASES[name]
        with tempfile.TemporaryDirectory() as folder, busy(loops):
            file = f"{folder}/bench.json"
            subprocess.run(
                [
                    str(Path(sys.executable).with_name("dflash-mlx")),
                    "bench",
                    "--repeats",
                    arguments.repeats,
                    "--json",
                    file,
                    *options,
                ],
                env=os.environ | {"XDG_CACHE_HOME": folder},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            found = json.loads(Path(file).read_text(encoding="utf-8"))
        kinds = found["kinds"] if "--context" in options else {"": found["summary"]}
        for kind, figures in kinds.items():
            line = f"{name + ' ' + kind:24}{figures['speedup']:6.3f} of plain"
            if sweep := found["sweep"]:
                line += f"{sweep['over_best']:8.3f} of the best fixed length, {sweep['best']}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
