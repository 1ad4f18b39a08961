"""The prefix cache: what is used again is as if it had been run afresh, on every family."""

from contextlib import closing

import numpy as np
import pytest

from dflash_mlx.api import fill_cache, make_decoder
from dflash_mlx.conversation.footprint import Footprint
from dflash_mlx.conversation.prefixes import Lease, PrefixCache, common_prefix
from dflash_mlx.decode import Options, Prefilled, PromptCache
from dflash_mlx.pairs import SpeculativeModel
from tests.families.configs import CONFIGS, VOCAB
from tests.test_conversation import FAMILIES, pair

SYSTEM, TURN, ANSWER = 24, 45, 9
OPTIONS = Options(max_tokens=ANSWER, prefill_step_size=16)


def ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def run(model: SpeculativeModel, lease: Lease, prompt: list[int]) -> tuple[list[int], int]:
    """The answer to a prompt, and how many prompt tokens were run for it."""
    chunks = [chunk.done for chunk in lease.fill(OPTIONS)]
    decoder = make_decoder(model, lease.cache, OPTIONS, 2)
    tokens = [token.id for token in decoder.run(prompt[-1:])]
    lease.release()
    return tokens, chunks[-1] + 1


def fresh(model: SpeculativeModel, prompt: list[int]) -> list[int]:
    decoder = make_decoder(model, model.make_cache(), OPTIONS, 2)
    return [token.id for token in decoder.run(prompt)]


def latest(cache: PromptCache, group: int) -> list[np.ndarray]:
    """The rows of a group that a draft block may still see."""
    found = cache.context.groups[group]
    rows = found.length if found.limit is None else min(found.length, found.limit)
    arrays = (found.keys, found.values)
    return [np.array(a[:, :, found.length - rows : found.length]) for a in arrays]


def same_context(model: SpeculativeModel, cache: PromptCache, prompt: list[int]) -> None:
    """The draft's memory is that of a run from the beginning, so that acceptance is, too."""
    reference = model.make_cache()
    with closing(fill_cache(model, reference, prompt, OPTIONS)) as chunks:
        list(chunks)
    assert cache.context.offset == reference.context.offset == len(prompt)
    for group in range(len(cache.context.groups)):
        for rows, expected in zip(latest(cache, group), latest(reference, group), strict=True):
            assert rows.shape == expected.shape
            np.testing.assert_allclose(rows, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", CONFIGS)
def test_turns_and_branches_run_only_what_is_new(family):
    model = pair(family)
    prefixes = PrefixCache(model)
    system, first = ids(1, SYSTEM), ids(2, TURN)
    one = system + first
    # The template's last two tokens are not repeated by the next turn.
    boundaries = [SYSTEM, len(one) - 2]
    lease = prefixes.take(one, boundaries)
    assert lease.cached == 0 and lease.parting is None
    answer, count = run(model, lease, one)
    assert count == len(one) and answer == fresh(model, one)

    # A second conversation with the same system message.
    other = system + ids(3, TURN)
    lease = prefixes.take(other, [SYSTEM, len(other) - 2])
    assert lease.cached == SYSTEM
    answer, count = run(model, lease, other)
    assert count == len(other) - SYSTEM and answer == fresh(model, other)

    # The first one goes on: all of its prompt but the template's tail is there still.
    two = [*one[:-2], *ids(4, 20)]
    lease = prefixes.take(two, [SYSTEM, len(two) - 2])
    assert lease.cached == len(one) - 2
    with closing(lease.fill(OPTIONS)) as chunks:
        list(chunks)
    same_context(model, lease.cache, two[:-1])
    lease.release()
    answer, count = run(model, prefixes.take(two), two)
    assert answer == fresh(model, two)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_is_continued_costs_nothing(family):
    model = pair(family)
    prefixes = PrefixCache(model)
    prompt = ids(5, 30)
    answer, _ = run(model, prefixes.take(prompt), prompt)
    # Without a stop token in it, the answer's last token is still to be run.
    longer = [*prompt, *answer, *ids(6, 5)]
    lease = prefixes.take(longer)
    assert lease.cached == len(prompt) + len(answer)
    assert run(model, lease, longer)[0] == fresh(model, longer)
    # The same prompt again: nothing but its end is run.
    lease = prefixes.take(prompt)
    assert lease.cached == len(prompt) - 1
    assert run(model, lease, prompt)[0] == answer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_that_was_cancelled_goes_on(family):
    model = pair(family)
    prefixes = PrefixCache(model)
    prompt = ids(7, 90)
    lease = prefixes.take(prompt, [80])
    with closing(lease.fill(OPTIONS)) as chunks:
        for chunk in chunks:
            if chunk.done >= 40:
                break
    lease.release()
    lease = prefixes.take(prompt, [80])
    assert lease.cached == chunk.done and lease.parting is None
    assert run(model, lease, prompt)[0] == fresh(model, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_running_sequence_lends_its_prefix(family):
    model = pair(family)
    prefixes = PrefixCache(model)
    system = ids(1, SYSTEM)
    one, two = system + ids(8, 30), system + ids(9, 30)
    lease = prefixes.take(one, [SYSTEM])
    for _ in lease.fill(OPTIONS):
        pass
    steps = make_decoder(model, lease.cache, OPTIONS, 3).steps(one[-1:])
    emitted: list[int] = []
    for step in steps:
        if not isinstance(step, Prefilled):
            emitted += [token.id for token in step]
        if len(emitted) > 2:
            break
    # In the middle of a cycle of the first, the second one begins, and ends.
    second = prefixes.take(two, [SYSTEM])
    assert second.cached == SYSTEM
    assert run(model, second, two)[0] == fresh(model, two)
    emitted += [token.id for step in steps for token in step]
    lease.release()
    assert emitted == fresh(model, one)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_part_a_second_time_where_they_parted_once(family):
    model = pair(family)
    prefixes = PrefixCache(model)
    shared = ids(10, 40)
    for seed in (11, 12, 13):
        prompt = shared + ids(seed, 20)
        lease = prefixes.take(prompt)
        if seed == 13:
            assert lease.cached == len(shared)
        assert run(model, lease, prompt)[0] == fresh(model, prompt)


def test_what_differed_is_told():
    model = pair("qwen3")
    prefixes = PrefixCache(model)
    prompt = ids(1, 40)
    run(model, prefixes.take(prompt, [20, 38]), prompt)
    changed = [*prompt[:25], (prompt[25] + 1) % VOCAB, *prompt[26:]]
    lease = prefixes.take(changed, [38])
    # The draft's window is not there any more as it was at 25.
    parting = lease.parting
    assert parting is not None and (parting.at, parting.usable) == (25, 20)
    assert parting.before[0] == prompt[25] and parting.now[0] == changed[25]
    for _ in lease.fill(OPTIONS):
        pass
    same_context(model, lease.cache, changed[:-1])
    lease.release()
    assert prefixes.take([*prompt[:38], 1, 2]).parting is None


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_bounded_and_the_longest_unused_goes_first(family):
    model = pair(family)
    prompts = [ids(20 + i, 60) for i in range(4)]
    prefixes = PrefixCache(model)
    run(model, prefixes.take(prompts[0]), prompts[0])
    prefixes.limit = 2.5 * prefixes.nbytes
    for prompt in prompts[1:]:
        run(model, prefixes.take(prompt), prompt)
        assert prefixes.nbytes <= prefixes.limit
    assert prefixes.evicted == 2
    assert [prefixes.take(p).cached > 0 for p in prompts] == [False, False, True, True]


def test_of_many_moments_those_stay_that_save_the_most():
    model = pair("mamba2")
    prefixes = PrefixCache(model)
    prefixes.stride, prefixes.most_moments = 10, 4
    prompt = ids(30, 200)
    run(model, prefixes.take(prompt), prompt)
    (entry,) = prefixes.entries
    counts = [moment.count for moment in entry.moments]
    assert len(counts) == 4 and counts[-1] == 199
    # Whatever is asked for, not much more than half of it is run again.
    assert max(np.diff([0, *counts])) < 120
    again = [*prompt[:150], *ids(31, 10)]
    assert run(model, prefixes.take(again), again)[0] == fresh(model, again)


def test_a_broken_cache_is_not_kept():
    model = pair("qwen3")
    prefixes = PrefixCache(model)
    prompt = ids(1, 40)
    lease = prefixes.take(prompt)
    lease.cache.invalidate()
    lease.release()
    assert prefixes.entries == [] and prefixes.take(prompt).cached == 0


def test_a_quantized_cache_is_used_again_or_run_afresh():
    model = pair("llama_wide")
    options = Options(max_tokens=9, kv_bits=8, kv_group_size=32, quantized_kv_start=50)
    prefixes = PrefixCache(model)

    def answer(prompt: list[int], cache: PromptCache) -> list[int]:
        return [t.id for t in make_decoder(model, cache, options, 2).run(prompt)]

    for prompt in (ids(1, 70), ids(1, 70)[:40] + ids(2, 30), ids(1, 70)[:60] + ids(3, 9)):
        lease = prefixes.take(prompt, [len(prompt) - 3])
        for _ in lease.fill(options):
            pass
        assert answer(prompt[-1:], lease.cache) == answer(prompt, model.make_cache())
        lease.release()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_a_sequence_are_foreseen(family):
    model = pair(family)
    short, long = model.make_cache(), model.make_cache()
    for cache, count in ((short, 2), (long, 900)):
        with closing(fill_cache(model, cache, ids(1, count), Options())) as chunks:
            list(chunks)
    foreseen = Footprint(short).nbytes(900)
    if family != "deepseek_v41":  # a class that nobody described
        assert 0.95 * long.nbytes <= foreseen <= 1.6 * long.nbytes


def test_common_prefix_of_lists_and_arrays():
    assert common_prefix([1, 2, 3], np.array([1, 2, 4])) == 2
    assert common_prefix([], [1]) == common_prefix([1], [2]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2
