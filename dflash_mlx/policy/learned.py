"""What outlives a generation: costs and texts by the length of the context, and chances."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dflash_mlx.policy.branches import Branches
from dflash_mlx.policy.chances import LEVELS, NO_TEXTS, Chances
from dflash_mlx.policy.costs import SECOND_HAND, Costs
from dflash_mlx.policy.kept import Store
from dflash_mlx.policy.looks import Account, Rest


@dataclass
class Place:
    """What generations have learned near one context length; drafts differ in how far they reach.

    Attributes:
        costs: of cycles there.
        texts: what the texts that began there were like, see `Text`.
        rest: of the latest of them, when it ended.
    """

    costs: Costs
    texts: Sequence[float] = NO_TEXTS
    rest: Rest = field(default_factory=Rest)


class Learned:
    """What generations of a pair that take turns share.

    Attributes:
        gain: tokens a cycle that choosing by confidence yields beyond choosing by depth.
    """

    def __init__(self, most: int, store: Store | None = None, costs: Costs | None = None):
        """Start from costs that are kept in a store, from given ones, or from none.

        Args:
            most: proposals of a block.
        """
        kept = store.load(most) if store else {}
        self._store = store
        self._places = {level: Place(Costs.known(*seconds)) for level, seconds in kept.items()}
        if costs or not kept:
            self._places[0] = Place(costs or Costs(most))
        self.chances, self.branches, self.account = Chances(most), Branches(), Account()
        self.gain = 0.0

    def at(self, context: int) -> Place:
        """The place of `context` tokens in the target's cache, which are taken in doublings."""
        level = (context >> 9).bit_length()
        if level not in self._places:
            near = min(self._places, key=lambda known: abs(known - level))
            found = self._places[near]
            # Good texts behind half the context promise little, bad ones no better.
            shares = [SECOND_HAND if logit > 0 and level > near else 1.0 for logit in LEVELS]
            texts = [share * t for share, t in zip(shares, found.texts, strict=True)]
            self._places[level] = Place(found.costs.elsewhere(), texts, replace(found.rest))
        return self._places[level]

    @property
    def looked(self) -> bool:
        """Whether a drafted cycle was timed in this process."""
        return any(place.costs.drafts or place.costs.frozen for place in self._places.values())

    def save(self) -> None:
        """Keep the costs."""
        if self._store:
            costs = {level: place.costs for level, place in self._places.items()}
            self._store.save({level: c.seconds() for level, c in costs.items() if c.settled})
