"""`python -m tests.tools.families table` and `python -m tests.tools.families cost`.

table: the table of families in docs/models.md, after a run of each family that has to be exact.
cost: the rollback's share of a cycle for qwen3_5 at a published model's layer shapes, random
weights, few layers; process CPU seconds, so that a busy machine disturbs little.
"""

import argparse
import time
from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_map

from dflash_mlx.target import TargetView
from dflash_mlx.target.leaf import leaves
from dflash_mlx.target.replay import Mixers
from tests.families import drive
from tests.families.configs import CONFIGS
from tests.families.models import configure

# The text side of a dense Qwen3.5 of 9 billion parameters.
SHAPES = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "rms_norm_eps": 1e-6,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "rope_parameters": {"type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}


def grouped() -> dict[tuple[str, str], list[str]]:
    """Families by the kinds of their caches and by how these are rolled back."""
    groups: dict[tuple[str, str], list[str]] = {}
    for family in CONFIGS:
        view = drive.view_of(family)
        cache = view.make_cache()
        kinds = sorted({type(leaf).__name__ for leaf in leaves(cache)})
        used = sorted(set(view.rolls_back_by(cache)))
        groups.setdefault((", ".join(kinds), ", ".join(used)), []).append(family)
    return groups


def table() -> str:
    """The table of docs/models.md."""
    lines = ["| caches | rolled back by | families |", "|---|---|---|"]
    for (kinds, used), families in grouped().items():
        lines.append(f"| {kinds} | {used} | {', '.join(families)} |")
    return "\n".join(lines)


def inexact() -> list[str]:
    """Families whose text is not plain mlx_lm's, of all that are run here and now."""
    prompt, wrong = drive.prompt_of("long"), []
    for family in CONFIGS:
        view, text = drive.view_of(family), drive.plain(family, "long")
        for m, mode in ((7, "sometimes"), (3, "often")):
            run = drive.speculate(view, prompt, text, m, mode, ())
            if tuple(run.tokens[: len(text)]) != text:
                wrong.append(family)
                break
    return wrong


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of queueing the work, and of queueing and computing it."""
    start = time.process_time()
    arrays = work()
    queued = time.process_time() - start
    mx.eval(arrays)
    return queued, time.process_time() - start


def cost(layers: int, rows: int, kept: int, repeats: int) -> None:
    """Print medians of verify and of three ways to roll back."""
    mx.random.seed(0)
    model = configure("qwen3_5", {"text_config": SHAPES | {"num_hidden_layers": layers}})
    model.update(tree_map(lambda p: p.astype(mx.float32), model.parameters()))
    mx.eval(model.parameters())
    tokens = mx.array([[(7 * i) % 4096 for i in range(rows)]])
    print(f"qwen3_5, {layers} layers, {rows} rows verified, {kept} kept; CPU seconds (queueing)")
    for name in ("state replay", "mixer replay with projections", "full replay"):
        view = TargetView(model)
        if name != "state replay":
            view._mixers._children = []
        if name == "full replay":
            view._mixers = Mixers(None)
        cache = view.make_cache()
        mx.eval(view.forward(mx.array([list(range(64))]), cache)[0])
        verify, rollback = [], []
        for _ in range(repeats + 1):
            transaction = view.begin(cache)
            verify.append(_seconds(lambda: (transaction.forward(tokens), [c.state for c in cache])))  # noqa: B023

            def commit() -> object:
                transaction.commit(kept)  # noqa: B023
                return [c.state for c in cache]  # noqa: B023

            rollback.append(_seconds(commit))
        v, r = (sorted(x[1:], key=lambda p: p[1])[repeats // 2] for x in (verify, rollback))
        print(
            f"{name:30s} verify {v[1]:.3f} ({v[0]:.4f})  rollback {r[1]:.4f} ({r[0]:.4f})  "
            f"share {r[1] / (r[1] + v[1]):.1%} (queueing {r[0] / (r[0] + v[0]):.0%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.families", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table")
    costs = commands.add_parser("cost")
    costs.add_argument("--layers", type=int, default=4)
    costs.add_argument("--rows", type=int, default=8)
    costs.add_argument("--kept", type=int, default=4)
    costs.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.command == "table":
        if wrong := inexact():
            raise SystemExit(f"Not exact: {', '.join(wrong)}")
        print(table())
    else:
        cost(args.layers, args.rows, args.kept, args.repeats)


if __name__ == "__main__":
    main()
