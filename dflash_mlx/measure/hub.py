"""What the local hub cache holds."""

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from dflash_mlx.published import PAIRS, PublishedPair, is_conversion_of


def cached_models() -> dict[str, int]:
    """Bytes on disk of every model repository in the local hub cache."""
    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):  # a ValueError where it is a file
        return {}
    return {r.repo_id: r.size_on_disk for r in repos if r.repo_type == "model"}


def cached_targets(cached: dict[str, int]) -> dict[str, PublishedPair]:
    """The cached repositories that are a published pair's target, or a conversion of it."""
    found = {}
    for repo in sorted(cached):
        for pair in PAIRS:
            if is_conversion_of(pair, repo.rsplit("/", 1)[-1]):
                found[repo] = pair
    return found
