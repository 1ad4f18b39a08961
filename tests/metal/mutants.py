"""A kernel's source with one of its barriers or guards taken out."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# The first two find every barrier and every condition.
_BARRIER = r"threadgroup_barrier\([^)]*\);"
_CONDITION = r"\bif \(([^{]*)\) \{"


@dataclass(frozen=True)
class Guards:
    """What guards the kernels of one file.

    sources: by kernel name.
    expressions: guards that are written as expressions, and the same without them.
    no_guard: conditions that guard no bounds.
    """

    sources: dict[str, str]
    expressions: dict[str, str]
    no_guard: frozenset[str] = frozenset()

    def mutants(self) -> Iterator[tuple[str, tuple[int, int], str]]:
        """Kernel name, a span of its source, and what to put there instead."""
        for name, source in self.sources.items():
            for match in re.finditer(_BARRIER, source):
                yield name, match.span(), ";"
            for match in re.finditer(_CONDITION, source):
                if match[1] not in self.no_guard:
                    yield name, match.span(), "if (true) {"
            for text, without in self.expressions.items():
                for match in re.finditer(re.escape(text), source):
                    yield name, match.span(), without

    def check_complete(self, barriers: int) -> None:
        """Assert that every barrier, condition and expression is among the mutants."""
        found = list(self.mutants())
        texts = self.sources.values()
        assert sum(source.count("_barrier(") for source in texts) == barriers
        assert sum(1 for *_, without in found if without == ";") == barriers
        conditions = [c for source in texts for c in re.findall(_CONDITION, source)]
        assert self.no_guard <= set(conditions)
        guarded = sum(1 for *_, without in found if without.startswith("if"))
        assert guarded == sum(1 for c in conditions if c not in self.no_guard)
        for text in self.expressions:
            assert any(text in source for source in texts), text

    def edit(self, name: str, span: tuple[int, int], without: str):
        """The edit that makes this mutant, as Emulator takes it."""

        def apply(kernel: str, source: str) -> str:
            if kernel != name:
                return source
            return source[: span[0]] + without + source[span[1] :]

        return apply
