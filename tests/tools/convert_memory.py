"""Peak memory of converting a large draft of random weights, in a process of its own.

python -m tests.tools.convert_memory [--gb 1] [--bits 4] [--shards 2]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import draft_checkpoints as published

_CONVERT = """
import json, resource, sys
from dflash_mlx.convert import convert
scale = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
before = peak()
report = convert(sys.argv[1], sys.argv[2], bits=int(sys.argv[3]))
largest = max(layer.bytes_before for layer in report.layers)
print(json.dumps({
    "draft": report.bytes_before, "result": report.bytes_after, "largest layer": largest,
    "most held by MLX": report.peak_memory, "process before": before, "process at most": peak(),
}))
"""


def config(gigabytes: float) -> published.Config:
    """Five layers of the widths of a 4B target's draft, and as many more as make up the size."""
    width, hidden, heads, kv_heads, head_dim = 2560, 9728, 32, 8, 128
    layer = 2 * width * head_dim * (heads + kv_heads) + 3 * width * hidden
    layers = max(1, round((gigabytes * 1e9 / 2 - 5 * width * width) / layer))
    return published.qwen3(width, 36, 151936) | {
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
    }


def main() -> None:
    """Write the draft, convert it, print what was held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the draft")
    parser.add_argument("--bits", type=int, default=4, help="4 or 8")
    parser.add_argument("--shards", type=int, default=2, help="files of the draft")
    parser.add_argument("--only-write", type=Path, help="write the draft into this new directory")
    asked = parser.parse_args()
    if asked.only_write:
        published.write(asked.only_write, config(asked.gb), shards=asked.shards)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, made = f"{folder}/draft", f"{folder}/made"
        # A process inherits the peak of the one that starts it, so this one must stay small.
        write = ["--only-write", source, "--gb", str(asked.gb), "--shards", str(asked.shards)]
        subprocess.run([sys.executable, "-m", "tests.tools.convert_memory", *write], check=True)
        convert = [sys.executable, "-c", _CONVERT, source, made, str(asked.bits)]
        done = subprocess.run(convert, check=True, capture_output=True, text=True)
    for what, nbytes in json.loads(done.stdout).items():
        print(f"{what:>18} {nbytes / 1e6:8.0f} MB")


if __name__ == "__main__":
    main()
