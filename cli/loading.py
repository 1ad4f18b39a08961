"""From the options to a loaded pair, with a word about what happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import mlx.core as mx
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.api import load
from dflash_mlx.cli import ranks
from dflash_mlx.cli.groups import PairOptions, PromptOptions
from dflash_mlx.cli.screen import note, working
from dflash_mlx.conversation import Template
from dflash_mlx.distributed.sharding import check_shardable, load_sharded, settle
from dflash_mlx.errors import DFlashError, NoDraftKnown
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.published import find_pair, thinks
from dflash_mlx.repository import resolve
from dflash_mlx.target_checkpoint import load_target

NO_THINKING = "The chat template says nothing of thinking, so this may change nothing."


@dataclass
class Loaded:
    """A pair ready to use.

    Attributes:
        model, tokenizer: as `load` returns them.
        target, draft: their names as the user knows them; "no draft" where there is none.
        thinks: whether the draft was trained on texts with thinking.
        demo: whether it is the embedded pair.
    """

    model: SpeculativeModel
    tokenizer: TokenizerWrapper
    target: str
    draft: str
    thinks: bool
    demo: bool

    def template(self, prompting: PromptOptions, raw: bool = False) -> Template:
        """How prompts are made for this pair; says what it decides about thinking."""
        think, config = prompting.think, prompting.chat_template_config or {}
        template = Template(
            self.tokenizer, prompting.system_prompt, think, config, raw, self.model.ranks
        )
        if think is not None and not template.knows_thinking:
            note(NO_THINKING)
        if think is None and not self.thinks and self.tokenizer.has_thinking:
            note(f"{self.draft} was trained without thinking, so it is off; --think turns it on.")
            template.think = False
        return template


def load_pair(pair: PairOptions, seed: int | None = None, *, plainly: bool = False) -> Loaded:
    """Find, fetch and load a target and its draft; under mlx.launch, this rank's shard of it.

    Args:
        pair: which.
        seed: of MLX's random state; None leaves it.
        plainly: whether nothing will be drafted, so that a target without a known draft will do.

    Raises:
        DFlashError: as `dflash_mlx.load`, or an extra end token that the tokenizer lacks; of
            several ranks, in all of them.
    """
    together = ranks.together()
    if together is None:
        return _load_pair(pair, seed, plainly, None)
    loaded, failed = None, None
    try:
        loaded = _load_pair(pair, seed, plainly, together.group)
    except DFlashError as error:
        failed = error
    settle(together, failed)
    return cast(Loaded, loaded)


def _load_pair(
    pair: PairOptions, seed: int | None, plainly: bool, group: mx.distributed.Group | None
) -> Loaded:
    demo = pair.model is None
    draft: str | None
    draft_path: Path | None
    if pair.model is None:
        from dflash_mlx.demo import demo_paths

        target_path, draft_path = demo_paths()
        target, draft = "demo target", "demo draft"
        if pair.draft is not None:
            draft, draft_path = pair.draft, _fetch(pair.draft, pair.draft_revision, draft=True)
        note("No --model given: this is the small demo pair that comes with dflash-mlx.")
    else:
        target = pair.model
        draft = _published(target, plainly) if pair.draft is None else pair.draft
        if group is not None:
            check_shardable(target, pair.revision)
        target_path = _fetch(target, pair.revision)
        draft_path = None
        if draft is not None:
            draft_path = _fetch(draft, pair.draft_revision, draft=True)
    with working(f"Loading {target}"):
        if draft_path is None:
            loads = partial(load_sharded, group=group) if group else load_target
            plain, tokenizer = loads(
                target_path,
                adapter_path=pair.adapter_path,
                trust_remote_code=pair.trust_remote_code,
            )
            model = SpeculativeModel(plain, None, group)
        else:
            model, tokenizer = load(
                target_path,
                draft_path,
                draft_bits=pair.draft_bits,
                draft_window=pair.draft_window,
                draft_rows=pair.draft_rows,
                adapter_path=pair.adapter_path,
                trust_remote_code=pair.trust_remote_code,
                group=group,
            )
    for token in pair.extra_eos_token or ():
        _add_end(tokenizer, token)
    if seed is not None:
        mx.random.seed(seed)
    thinking = demo or draft is None or thinks(target, draft)
    return Loaded(model, tokenizer, target, draft or "no draft", thinking, demo)


def _published(target: str, plainly: bool) -> str | None:
    """The draft published for a target, and a word about it; None where plain decoding will do."""
    try:
        pair = find_pair(target)
    except NoDraftKnown:
        if not plainly:
            raise
        note(f"No draft is known for {target}; it decodes plainly. dflash-mlx train makes one.")
        return None
    others = ", ".join(pair.others)
    note(f"Draft for {target}: {pair.draft}" + (f" (--draft takes {others} too)" if others else ""))
    return pair.draft


@contextmanager
def quantizing(kv_bits: int | None, group_size: int) -> Iterator[None]:
    """Says so when it is the cache's quantization that fails, in mlx_lm's loop or ours."""
    try:
        yield
    except DFlashError:
        raise
    except (ValueError, NotImplementedError) as error:
        if kv_bits is None:
            raise
        raise DFlashError(
            f"This target's cache cannot be quantized to {kv_bits} bits in groups of {group_size} "
            f"({str(error).splitlines()[0].rstrip('.')}); change --kv-group-size or leave out "
            "--kv-bits."
        ) from error


def _fetch(name: str, revision: str | None, *, draft: bool = False) -> Path:
    # The hub client draws its own progress bars for what has to be downloaded.
    if not Path(name).expanduser().exists() and not _cached(name, revision):
        note(f"Fetching {name} from the hub to {HF_HUB_CACHE}")
    return resolve(name, revision, draft=draft)


def _cached(name: str, revision: str | None) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        return True  # no repository's name, as `resolve` will say


def _add_end(tokenizer: TokenizerWrapper, token: str) -> None:
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary and not (token.isdigit() and int(token) < len(tokenizer)):
        raise DFlashError(
            f"{token!r} is no token of this model, so it cannot end the text; give a single token "
            "or its id to --extra-eos-token."
        )
    tokenizer.add_eos_token(token)
