"""The likeliest tree of proposals, grown best first (DDTree, arXiv:2604.12989). Pure Python."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import exp

MOST_NODES = 64  # of a tree; more rows cost any machine more than they are likely to give


@dataclass(frozen=True)
class Tree:
    """Proposals of which several may stand for one position. A line is the tree without branches.

    Nodes come best first, so the first n of a tree are the best tree of n nodes. In a verify the
    anchor's row is row 0, and node i's is row i + 1.

    Attributes:
        tokens: each node's token id; siblings differ.
        parents: each node's parent, an earlier node; -1 is the anchor.
        depths: 1 for the anchor's children.
        chances: the draft's, that the target goes through the node, 0 … 1.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    chances: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def branches(self) -> bool:
        """Whether it is more than a line."""
        return any(parent != i - 1 for i, parent in enumerate(self.parents))

    def first(self, count: int) -> "Tree":
        """The best tree of so many nodes."""
        if count >= len(self):
            return self
        parts = self.tokens, self.parents, self.depths, self.chances
        return Tree(*(part[:count] for part in parts))  # type: ignore[arg-type]

    def line(self) -> list[int]:
        """Its likeliest line: from the anchor on, each node's best child."""
        best: dict[int, int] = {}
        for node, parent in enumerate(self.parents):
            best.setdefault(parent, node)
        nodes, node = [], -1
        while node in best:
            node = best[node]
            nodes.append(node)
        return nodes

    def ancestors(self) -> list[list[bool]]:
        """Which rows of a verify each row sees, [n + 1][n + 1]: its ancestors' and its own."""
        rows = len(self) + 1
        seen = [[False] * rows for _ in range(rows)]
        seen[0][0] = True
        for row, parent in enumerate(self.parents, start=1):
            seen[row] = list(seen[parent + 1])
            seen[row][row] = True
        return seen

    def children(self) -> dict[tuple[int, int], int]:
        """The row of every node, by its parent's row and its token."""
        pairs = zip(self.parents, self.tokens, strict=True)
        return {(parent + 1, token): row for row, (parent, token) in enumerate(pairs, start=1)}


def grow(
    tokens: Sequence[Sequence[int]],
    scores: Sequence[Sequence[Sequence[float]]],
    budget: int,
) -> Tree:
    """The prefix-closed tree of at most `budget` nodes with the largest sum of chances.

    A heap on log-probability: each node that is taken brings in its next sibling and its first
    child, and neither is likelier than itself.

    Args:
        tokens: [m][k], the candidates of each depth; ids of one depth differ.
        scores: [m][1 or k][k], log-probabilities of a depth's candidates, given the candidate of
            the depth before that a row stands for; one row where these do not matter. -inf leaves
            a candidate out.
        budget: nodes.
    """
    orders: dict[tuple[int, int], list[int]] = {}

    def push(score: float, depth: int, parent: int, given: int, rank: int) -> None:
        """Put the `rank`th candidate at a depth below a parent of so much into the heap."""
        row = given if len(scores[depth]) > 1 else 0
        order = orders.get((depth, row))
        if order is None:
            own = scores[depth][row]
            order = sorted(range(len(own)), key=lambda c: (-own[c], c))
            orders[depth, row] = order
        if rank < len(order) and scores[depth][row][order[rank]] > float("-inf"):
            candidate = order[rank]
            total = score + scores[depth][row][candidate]
            # Of equals the shallower, and then the one that came in earlier.
            heappush(heap, (-total, depth, parent, rank, given, candidate, score))

    heap: list[tuple[float, int, int, int, int, int, float]] = []
    found: list[tuple[int, int, int, float]] = []
    if tokens:
        push(0.0, 0, -1, 0, 0)
    while heap and len(found) < budget:
        negative, depth, parent, rank, given, candidate, above = heappop(heap)
        node = len(found)
        found.append((tokens[depth][candidate], parent, depth + 1, exp(min(-negative, 0.0))))
        push(above, depth, parent, given, rank + 1)
        if depth + 1 < len(tokens):
            push(-negative, depth + 1, node, candidate, 0)
    if not found:
        return Tree((), (), (), ())
    return Tree(*(tuple(part) for part in zip(*found, strict=True)))  # type: ignore[arg-type]
