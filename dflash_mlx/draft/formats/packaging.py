"""What a packaging is: how its files are known, read, and named."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dflash_mlx.draft.config import DraftConfig
from dflash_mlx.errors import CheckpointError

# Shapes of the tensors in the files, by our names; empty where only the config is at hand.
Shapes = Mapping[str, tuple[int, ...]]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Rows:
    """Which rows of a block propose, as the user decided it; None leaves it to the files."""

    anchor: bool | None = None

    @classmethod
    def of(cls, word: str | None) -> "Rows":
        """`--draft-rows`: "anchor", "fill" or None.

        Raises:
            CheckpointError: another word.
        """
        if word not in (None, "anchor", "fill"):
            raise CheckpointError(f"draft_rows is {word!r}; give anchor or fill.")
        return cls(None if word is None else word == "anchor")


AS_FILED = Rows()


@dataclass(frozen=True)
class Packaging:
    """One packaging of drafts.

    Attributes:
        name: it in words, as "DSpark (DeepSpec)".
        matches: whether a config.json is packed so; asked in the order of `PACKAGINGS`.
        read: (config.json, shapes of the tensors, the user's rows) -> the config.
        prefixes: what their tensor names may begin with.
        renamed: their names, or beginnings of names, and ours.
        left_aside: prefixes of tensors that nothing uses, such as copies of the target's.
        kept_aside: of those, the ones that a converted draft carries on.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], Shapes, Rows], DraftConfig]
    prefixes: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    left_aside: tuple[str, ...] = ()
    kept_aside: tuple[str, ...] = ()

    def ours(self, name: str) -> str:
        """A tensor or module by the name that the library gives it."""
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return _renamed(name, self.renamed)

    def theirs(self, name: str) -> str:
        """A tensor or module of ours by the name that the packaging gives it."""
        return _renamed(name, tuple((ours, theirs) for theirs, ours in self.renamed))

    def translate(self, tensors: Mapping[str, Value]) -> dict[str, Value]:
        """Tensors by our names, without those that nothing uses.

        Raises:
            CheckpointError: two have the same name then.
        """
        found: dict[str, Value] = {}
        for name, tensor in tensors.items():
            name = self.ours(name)
            if name.startswith(self.left_aside):
                continue
            if name in found:
                raise CheckpointError(f"The draft's weights hold {name} twice.")
            found[name] = tensor
        return found


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name
