"""Try whether a target's rows come out of a tree as they do of lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from dflash_mlx.propose import Tree
from dflash_mlx.target.branches import can_branch

if TYPE_CHECKING:
    from dflash_mlx.target.view import TargetView

# A tree of seven rows, and its paths from the anchor on.
_TRIAL = Tree((0, 0, 0, 0, 0, 0), (-1, -1, 0, 0, 1, 4), (1, 1, 2, 2, 2, 3), (1.0,) * 6)
_PATHS = ([0, 1, 3], [0, 1, 4], [0, 2, 5, 6])
_CONTEXT = 3
_LIE = 1_000_003  # positions; a target that reads them elsewhere than in rotary modules goes wrong
# Of the largest logit: what rounding may do, and what it may at most where lines show as much.
_ROUNDING, _NOISE = 1e-3, 1 / 32


def branching(view: TargetView) -> bool:
    """Whether a tree's rows come out as those of its paths do, each as a line, for this target.

    Some short forwards, once for a target. The caches' offsets are false meanwhile, so that it is
    seen if rows depend on them in another way than by the modules that turn them.
    """
    rows = _CONTEXT + len(_TRIAL) + 1
    step = max(view.vocab_size // (rows + 3), 1)
    tokens = mx.arange(step, step * (rows + 1), step) % view.vocab_size
    context, tree = tokens[:_CONTEXT], tokens[_CONTEXT:]
    try:
        cache = view.make_cache()
        if not can_branch(cache):
            return False
        view.forward(context[None], cache)
        transaction = view.begin(cache)
        found, _ = transaction.forward(tree[None], (), _TRIAL, lie=_LIE)
        transaction.commit(3, _PATHS[-1])
        behind, _ = view.forward(tree[:1][None], cache)
        gaps, noises, largest = [], [], []
        for path in _PATHS:
            line = tree[mx.array(path)]
            whole, _ = view.forward(mx.concatenate([context, line])[None], view.make_cache())
            again = view.make_cache()
            view.forward(context[None], again)
            parts, _ = view.forward(line[None], again)
            wanted = whole[0, _CONTEXT:].astype(mx.float32)
            gaps.append(mx.abs(found[0, mx.array(path)] - wanted).max())
            noises.append(mx.abs(parts[0] - wanted).max())
            largest.append(mx.abs(wanted).max())
        kept = mx.concatenate([context, tree[mx.array(_PATHS[-1][:3])], tree[:1]])
        whole, _ = view.forward(kept[None], view.make_cache())
        gaps.append(mx.abs(behind[0, -1] - whole[0, -1].astype(mx.float32)).max())
        gap, noise, most = (mx.stack(x).max() for x in (gaps, noises, largest))
        allowed = mx.minimum(4 * noise, _NOISE * most) + _ROUNDING * most
        return bool((gap <= allowed).item())
    except Exception:  # whatever a target's own code does not allow
        return False
