"""What every rank runs in tests/test_distributed.py: one family's tiny model, sharded by mlx-lm.

The ranks are made to disagree wherever they may: each has a draft of its own that errs elsewhere,
and but for rank 0 each chooses the unlikeliest token. Rank 0 writes what came out as JSON.
"""

import json
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler as make_plain_sampler

import dflash_mlx
from dflash_mlx import SpeculativeModel
from dflash_mlx.decode.plain import PlainChoice
from dflash_mlx.distributed import Ranks
from dflash_mlx.target import TargetView
from tests.families.configs import CONFIGS
from tests.families.matrix import TOKENIZER
from tests.families.models import configure, lively
from tests.synthetic import SyntheticDraft

TOKENS = 24
# Every size must be divisible by the number of ranks.
SIZES = {"vocab_size": 104, "num_key_value_heads": 4}
PROMPTS = [[7, 3, 88, 41, 5], [19, 2], [64, 13, 77]]


def build(family: str) -> nn.Module:
    """The family's tiny model, whole, the same in every rank."""
    module, config = CONFIGS[family]
    config = {
        **{
            name: {**value, **SIZES, "linear_num_key_heads": 4}
            for name, value in config.items()
            if name == "text_config"
        },
        **({} if "text_config" in config else {**config, **SIZES}),
    }
    mx.random.seed(11)
    model = configure(module, config)
    model.update(tree_map_with_path(lively, model.parameters()))
    mx.eval(model.parameters())
    return model


class Case:
    """One family over all ranks."""

    def __init__(self, family: str):
        self.group = mx.distributed.init()
        self.rank = self.group.rank()
        self.model = build(family)
        hidden = mx.random.normal((1, 3, 32), key=mx.random.key(4))
        whole = TargetView(self.model).head(hidden)
        mx.eval(whole)
        self.model.shard(self.group)
        mx.eval(self.model.parameters())
        self.view = TargetView(self.model)
        self.head_gap = float(mx.abs(self.view.head(hidden) - whole).max().item())

    def plain(self, prompt: list[int], cache: Any = None, **options: Any) -> list[int]:
        """What unmodified mlx_lm writes with the sharded model."""
        steps = generate_step(
            mx.array(prompt), self.model, max_tokens=TOKENS, prompt_cache=cache, **options
        )
        return [int(token) for token, _ in steps]

    def pair(self, text: list[int], right: float = 0.8) -> SpeculativeModel:
        """The model with a draft that knows a text, but for errors of each rank's own."""
        draft: Any = SyntheticDraft(self.view, text, right, seed=self.rank)
        return SpeculativeModel(self.model, draft, self.group)

    def drafted(self, pair: SpeculativeModel, prompt: list[int], **options: Any) -> Any:
        """(tokens, last response) of one generation."""
        tokens, last = [], None
        for last in dflash_mlx.stream_generate(pair, TOKENIZER, prompt, TOKENS, **options):
            tokens.append(last.token)
        return tokens, last

    def greedy(self) -> dict[str, Any]:
        text = self.plain(PROMPTS[0])
        found: dict[str, Any] = {"plain": text}
        for verify_length in (1, None, "auto", "off"):
            pair = self.pair([*PROMPTS[0], *text])
            tokens, last = self.drafted(pair, PROMPTS[0], verify_length=verify_length)
            found[str(verify_length)] = [tokens, last.proposed, last.accepted]
        return found

    def turns(self) -> dict[str, Any]:
        plain_cache = self.view.make_cache()
        plain, drafted, pair, cache, known = [], [], None, None, list[int]()
        for prompt in PROMPTS:
            plain.append(self.plain(prompt, plain_cache))
            known += [*prompt, *plain[-1]]
        pair = self.pair(known)
        cache = dflash_mlx.make_prompt_cache(pair)
        for prompt in PROMPTS:
            drafted.append(self.drafted(pair, prompt, prompt_cache=cache, verify_length=3)[0])
        return {"plain": plain, "drafted": drafted, "cached": cache.tokens == known}

    def sampled(self) -> dict[str, Any]:
        mx.random.seed(5)
        text = self.plain(PROMPTS[0], sampler=make_plain_sampler(1.0, top_p=0.9))
        found: dict[str, Any] = {"plain": text}
        for name, make in (("rows", make_plain_sampler), ("block", dflash_mlx.make_sampler)):
            mx.random.seed(5 + self.rank)
            pair = self.pair([*PROMPTS[0], *text])
            found[name], _ = self.drafted(
                pair, PROMPTS[0], verify_length=None, sampler=make(1.0, top_p=0.9)
            )
        return found


def main() -> None:
    out, family, *parts = sys.argv[1:]
    case = Case(family)
    if case.rank:
        PlainChoice.__call__ = lambda self, logprobs, depths=None: mx.argmin(logprobs, axis=-1)  # type: ignore[method-assign]
    found = {"head_gap": case.head_gap, **{part: getattr(case, part)() for part in parts}}
    ranks = Ranks(case.group)
    # All ranks came to the same: rank 0's digest of it is every rank's.
    own = [len(json.dumps(found))]
    assert ranks.told(own) == own
    if ranks.leads:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
