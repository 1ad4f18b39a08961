"""The published pairs: which draft was trained for which target."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.repocard import metadata_load

from dflash_mlx.errors import CheckpointError, NoDraftKnown
from dflash_mlx.repository import is_draft_config, local_directory, read_config


@dataclass(frozen=True)
class PublishedPair:
    """A target's base repository and the drafts that are published for it.

    Attributes:
        target, draft: hub ids; the draft is the one that is taken by itself.
        aliases: other names of the target that conversions use, without an organisation.
        thinks: whether the draft was trained on texts with thinking.
        others: hub ids of further drafts, for --draft.
    """

    target: str
    draft: str
    aliases: tuple[str, ...] = ()
    thinks: bool = True
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The target's names in lower case, without an organisation."""
        return tuple(name.lower() for name in (_last(self.target), *self.aliases))


PAIRS = (
    PublishedPair(
        "Qwen/Qwen3-4B",
        "z-lab/Qwen3-4B-DFlash-b16",
        thinks=False,
        others=("deepseek-ai/dspark_qwen3_4b_block7", "deepseek-ai/dflash_qwen3_4b_block7"),
    ),
    PublishedPair(
        "Qwen/Qwen3-8B",
        "z-lab/Qwen3-8B-DFlash-b16",
        thinks=False,
        others=(
            "deepseek-ai/dspark_qwen3_8b_block7",
            "deepseek-ai/dflash_qwen3_8b_block7",
            "mgoin/Qwen3-8B-speculator.dspark",
            "AngelSlim/Qwen3-8B-DFly-Block8",
        ),
    ),
    PublishedPair(
        "Qwen/Qwen3-14B",
        "deepseek-ai/dspark_qwen3_14b_block7",
        others=("deepseek-ai/dflash_qwen3_14b_block7",),
    ),
    PublishedPair("Qwen/Qwen3.5-4B", "z-lab/Qwen3.5-4B-DFlash"),
    PublishedPair("Qwen/Qwen3.5-9B", "z-lab/Qwen3.5-9B-DFlash"),
    PublishedPair("Qwen/Qwen3.5-27B", "z-lab/Qwen3.5-27B-DFlash"),
    PublishedPair("Qwen/Qwen3.5-35B-A3B", "z-lab/Qwen3.5-35B-A3B-DFlash"),
    PublishedPair("Qwen/Qwen3.5-122B-A10B", "z-lab/Qwen3.5-122B-A10B-DFlash"),
    PublishedPair("Qwen/Qwen3.6-27B", "z-lab/Qwen3.6-27B-DFlash"),
    PublishedPair(
        "Qwen/Qwen3.6-35B-A3B",
        "z-lab/Qwen3.6-35B-A3B-DFlash",
        others=("RedHatAI/Qwen3.6-35B-A3B-speculator.dspark",),
    ),
    PublishedPair(
        "Qwen/Qwen3.8-27B",
        "z-lab/Qwen3.8-27B-DFlash2",
        others=("RedHatAI/Qwen3.8-27B-speculator.dspark", "RadixArk/Qwen3.8-27B-DSpark"),
    ),
    PublishedPair(
        "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        "z-lab/Qwen3-Coder-30B-A3B-DFlash",
        ("Qwen3-Coder-30B-A3B",),
    ),
    PublishedPair("Qwen/Qwen3-Coder-Next", "z-lab/Qwen3-Coder-Next-DFlash"),
    PublishedPair("openai/gpt-oss-20b", "z-lab/gpt-oss-20b-DFlash"),
    PublishedPair("openai/gpt-oss-120b", "z-lab/gpt-oss-120b-DFlash"),
    PublishedPair("moonshotai/Kimi-K2.5", "z-lab/Kimi-K2.5-DFlash"),
    PublishedPair("moonshotai/Kimi-K2.6", "z-lab/Kimi-K2.6-DFlash"),
    PublishedPair("moonshotai/Kimi-K3", "RadixArk/Kimi-K3-DSpark"),
    PublishedPair("MiniMaxAI/MiniMax-M2.5", "z-lab/MiniMax-M2.5-DFlash"),
    PublishedPair("MiniMaxAI/MiniMax-M2.7", "z-lab/MiniMax-M2.7-DFlash"),
    PublishedPair("zai-org/GLM-5.1", "z-lab/GLM-5.1-FP8-DFlash"),
    PublishedPair("zai-org/GLM-5.2", "RedHatAI/GLM-5.2-speculator.dspark"),
    PublishedPair("zai-org/GLM-5.3-Flash", "incoai/GLM-5.3-Flash-DFlash2"),
    PublishedPair(
        "meta-llama/Llama-3.1-8B-Instruct",
        "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat",
        ("Meta-Llama-3.1-8B-Instruct",),
    ),
    PublishedPair("google/gemma-4-31b-it", "z-lab/gemma-4-31B-it-DFlash"),
    PublishedPair(
        "google/gemma-4-26b-a4b-it",
        "z-lab/gemma-4-26B-A4B-it-DFlash",
        others=("makora-ai/gemma4-26b-a4b-dspark",),
    ),
    PublishedPair(
        "google/gemma-4-12b-it",
        "z-lab/gemma4-12B-it-DFlash",
        ("gemma4-12b-it",),
        others=("deepseek-ai/dspark_gemma4_12b_block7",),
    ),
    PublishedPair("LiquidAI/LFM2.5-1.2B-Instruct", "LiquidAI/LFM2.5-1.2B-Instruct-DSpark"),
    PublishedPair("LiquidAI/LFM2.5-2.6B", "LiquidAI/LFM2.5-2.6B-DSpark"),
    PublishedPair("LiquidAI/LFM2.5-8B-A1B", "LiquidAI/LFM2.5-8B-A1B-DSpark"),
    PublishedPair("openbmb/MiniCPM5-2B", "openbmb/MiniCPM5-2B-DSpark"),
    PublishedPair("Nanbeige/Nanbeige4.2-3B", "Nanbeige/Nanbeige4.2-3B-DSpark"),
    PublishedPair("poolside/Laguna-S-2.1", "poolside/Laguna-S-2.1-DFlash"),
    PublishedPair("poolside/Laguna-XS.2", "poolside/Laguna-XS.2-speculator.dflash"),
    PublishedPair(
        "meta-models/Muse-Glimmer-30B",
        "meta-models/Muse-Glimmer-30B-assistant",
        others=("z-lab/Muse-Glimmer-30B-DFlash2", "DaoCloud/Muse-Glimmer-30B-DSpark"),
    ),
)

# What a conversion appends to the name of what it converted: number formats, group sizes,
# quantization recipes, dates. Anything else makes it another model.
_CONVERSION = re.compile(
    r"(?:\d+(?:\.\d+)?bits?|bits?|\d{1,2}|\d{6}|bf16|fp16|fp8|fp4|f16|f32|int4|int8|mlx|mxfp4|mxfp8"
    r"|nvfp4|o?q\d+(?:\.\d+)?|dwq(?:v\d+)?|awq|gptq|qat|optiq|mixed|ud|dynamic|unquantized|gs?\d+|v\d+"
    r"|hi|qx\d+\w*)",
    re.IGNORECASE,
)


def find_pair(path_or_repo: str | Path) -> PublishedPair:
    """The published pair of a target: a base repository, a conversion of it, or a directory.

    A directory is known by its name, by the hub cache folder it lies in, or by what its
    config.json and README.md say it was made from.

    Raises:
        NoDraftKnown: none is known; the message lists what is near.
        CheckpointError: the directory's names lead to several.
    """
    names = list(dict.fromkeys(_names(path_or_repo)))
    found = list(dict.fromkeys(pair for name in names for pair in _pairs_named(name)))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path_or_repo} names more than one published target ({_listing(found)}); choose the "
            "draft with --draft (draft= in Python)."
        )
    directory = local_directory(path_or_repo)
    if directory is not None and is_draft_config(read_config(directory)):
        raise CheckpointError(
            f"{path_or_repo} is a DFlash draft; give its target as the model and this as the draft."
        )
    near = _near(names)
    hint = f" Near it are {_listing(near)}." if near else ""
    raise NoDraftKnown(
        f"No published draft is known for {path_or_repo}; name one with --draft (draft= in "
        f"Python), or train one with dflash-mlx train.{hint}"
    )


def find_draft(path_or_repo: str | Path) -> str:
    """The published draft of a target, as a hub id; raises as `find_pair`."""
    return find_pair(path_or_repo).draft


def thinks(target: str | Path, draft: str | Path) -> bool:
    """Whether a draft was trained on texts with thinking, as far as the two names tell."""
    drafts = {name.lower() for name in _names(draft)}
    if any(_last(other).lower() in drafts for pair in PAIRS for other in pair.others):
        return True
    targets = [pair for name in _names(target) for pair in _pairs_named(name)]
    return not any(
        pair in targets or _last(pair.draft).lower() in drafts for pair in PAIRS if not pair.thinks
    )


def is_conversion_of(pair: PublishedPair, name: str) -> bool:
    """Whether a name without an organisation is the pair's target or a conversion of it."""
    return pair in _pairs_named(name)


def _pairs_named(name: str) -> list[PublishedPair]:
    name = name.lower()
    found = []
    for pair in PAIRS:
        for base in pair.names:
            if name == base or (
                name.startswith((f"{base}-", f"{base}_"))
                and all(_CONVERSION.fullmatch(w) for w in re.split("[-_]", name[len(base) + 1 :]))
            ):
                found.append(pair)
                break
    return found


def _last(name: str | Path) -> str:
    return str(name).rstrip("/").rsplit("/", 1)[-1]


def _names(path_or_repo: str | Path) -> Iterator[str]:
    """Names, without organisations, that a target goes by."""
    path = Path(path_or_repo).expanduser()
    yield _last(path_or_repo)
    if not path.is_dir():
        return
    # The hub cache: models--org--name/snapshots/<commit>.
    for folder in path.absolute().parts:
        if folder.startswith("models--"):
            yield folder.rsplit("--", 1)[-1]
    yield from (_last(name) for name in _origins(path))


def _origins(directory: Path) -> Iterator[str]:
    """What config.json or the front matter of README.md says a directory was made from."""
    try:
        origin = read_config(directory).get("_name_or_path")
    except CheckpointError:
        origin = None
    if isinstance(origin, str) and origin:
        yield origin
    try:
        card = metadata_load(directory / "README.md") or {}
    except Exception:  # no card, or one whose front matter is no YAML: it names nothing
        return
    if card.get("base_model_relation", "quantized") == "quantized":
        bases = card.get("base_model") or []
        yield from (str(base) for base in ([bases] if isinstance(bases, str) else bases))


def _near(names: list[str]) -> list[PublishedPair]:
    known = {name: pair for pair in PAIRS for name in pair.names}
    near: list[str] = []
    for name in names:
        near += [base for base in known if name.lower().startswith(base)]
        near += [base for base in known if base.startswith(name.lower())]
        near += difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.65)
    return list(dict.fromkeys(known[base] for base in near))[:3]


def _listing(pairs: list[PublishedPair]) -> str:
    return ", ".join(f"{pair.draft} for {pair.target}" for pair in pairs)
