"""What the loop asks its policy besides how much to draft, and what it tells it of a cycle."""

from dflash_mlx.decode.clock import CycleClock
from dflash_mlx.decode.device import read_signs
from dflash_mlx.decode.emission import Drafting, Emission, Judged
from dflash_mlx.decode.phases import phase
from dflash_mlx.policy import Cycle, Grown, Policy, Sign
from dflash_mlx.propose import Lattice, Proposals, Tree


def narrowed(policy: Policy, proposals: Proposals) -> tuple[Proposals, Drafting]:
    """The proposals that a policy wants verified, and what was drafted."""
    awaited = False

    def confidences() -> list[Sign]:
        nonlocal awaited
        awaited = True
        return read_signs(proposals.signs)

    with phase("choice"):
        count = policy.narrow(confidences)
    drafting = Drafting(proposals.tokens.size, proposals.signs, awaited)
    return proposals.first(count), drafting


def grown(policy: Policy, lattice: Lattice) -> tuple[Proposals, Drafting]:
    """The tree that a policy wants verified, and what was drafted; the host waits for the draft."""
    with phase("waiting"):
        tree = lattice.grow(policy.nodes)
    with phase("choice"):
        wanted = tree.first(policy.prune(tree.chances))
    return Proposals.of(wanted), Drafting(len(tree), None, True, tree=wanted)


def tell(policy: Policy, clock: CycleClock, emission: Emission, followed: bool = False) -> None:
    """Tell a policy how a cycle went, once its tokens are known.

    Args:
        clock: takes the cycle's time now.
        followed: whether the device has got the next cycle's draft already.
    """
    if not policy.learns:
        return
    drafting, own = emission.drafting, not emission.forced
    lap = clock.lap(drafting.count > 0, followed, drafting.copied)
    if emission.prefill:
        return
    policy.observe(
        Cycle(
            context=emission.context,
            lap=lap,
            drafted=drafting.count,
            verified=emission.proposed if own else 0,
            accepted=emission.accepted if own else 0,
            confidences=read_signs(drafting.signs),
            read=drafting.awaited,
            copied=drafting.copied,
            tree=_seen(drafting.tree, emission) if own and drafting.tree else None,
        )
    )


def _seen(tree: Tree, emission: Emission) -> Grown | None:
    """What the verify of a tree, or of a line that was grown as one, shows of its nodes."""
    if not isinstance(emission, Judged):
        return None
    path = emission.verdict.path or range(emission.accepted + 1)
    passed = {row - 1 for row in path}
    line = tree.line()
    kept = next((i for i, node in enumerate(line) if node not in passed), len(line))
    nodes = [node in passed for node in range(len(tree))]
    return Grown(tree.chances, nodes, len(line), kept)
