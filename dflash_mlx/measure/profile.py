"""How the host spends a cycle: what `bench --profile` reports."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.api import stream_generate
from dflash_mlx.decode.phases import recording
from dflash_mlx.measure.run import Settings
from dflash_mlx.pairs import SpeculativeModel

# In the order of a cycle.
PHASES = {
    "choice": "deciding what the cycle does, and learning how the last one went",
    "draft": "building the draft's forward",
    "verify": "building the target's forward over a block",
    "plain": "building a plain step",
    "queuing": "handing it to MLX, which may wait until the device has room",
    "waiting": "waiting for the device",
    "accept": "judging the proposals, without the waiting",
    "rollback": "taking rejected rows back",
    "text": "detokenizing, and the caller's own code",
    "other": "everything else in the loop",
}


@dataclass(frozen=True)
class Profile:
    """The decode time of some generations, by what the host did.

    Where MLX limits how much may be queued, as on the CPU, queuing itself waits for the device, so
    it counts as waiting in the host's share.

    Attributes:
        seconds: per phase of PHASES; they add up to the decode time.
        cycles: target forwards after the prefill.
        tokens: emitted after the first one.
    """

    seconds: dict[str, float]
    cycles: int
    tokens: int

    @property
    def per_cycle(self) -> dict[str, float]:
        """Milliseconds of each phase in a mean cycle."""
        return {name: 1e3 * s / self.cycles for name, s in self.seconds.items()}

    @property
    def host_share(self) -> float:
        """Share of the time that the host neither waited for the device nor queued work."""
        total = sum(self.seconds.values())
        device = self.seconds["waiting"] + self.seconds["queuing"]
        return 1 - device / total if total else 0.0

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values, with milliseconds per cycle."""
        return {**asdict(self), "per_cycle": self.per_cycle, "host_share": self.host_share}


def profile(
    model: SpeculativeModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
) -> Profile:
    """Generate from each prompt with DFlash and add up where the host's time went.

    Args:
        prompts: token ids of each.
        settings: of every generation.
    """
    seconds: dict[str, float] = defaultdict(float)
    cycles = tokens = 0
    for prompt in prompts:
        with recording() as phases:
            responses = stream_generate(
                model,
                tokenizer,
                list(prompt),
                **settings.dflash_arguments(),
            )
            last = next(responses)
            phases.restart()
            tic = time.perf_counter()
            for last in responses:  # noqa: B007
                pass
            spent = time.perf_counter() - tic
        for name, part in phases.seconds.items():
            seconds[name] += part
        seconds["other"] += max(spent - sum(phases.seconds.values()), 0.0)
        cycles += last.target_forwards
        tokens += last.generation_tokens - 1
    return Profile({name: seconds[name] for name in PHASES}, cycles, tokens)
