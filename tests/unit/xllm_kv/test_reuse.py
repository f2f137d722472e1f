"""What is given up first: the end of a prefix, offline work's, and what nobody comes back for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xllm_kv.reuse import GHOSTS, Reuse


def anything(key: object) -> bool:
    return True


def filled(reuse: Reuse, *prompts: list[int]) -> None:
    for prompt in prompts:
        reuse.used(prompt)
        for key in prompt:
            reuse.held(key)


def test_a_parent_goes_after_its_children() -> None:
    reuse = Reuse(10)
    filled(reuse, [1, 2, 3], [1, 2, 4])
    assert reuse.victims(4, anything) == [3, 4, 2, 1]


def test_what_may_not_go_stays_and_so_does_what_is_before_it() -> None:
    reuse = Reuse(10)
    filled(reuse, [1, 2, 3])
    assert reuse.victims(3, lambda key: key != 3) == []
    assert reuse.victims(3, lambda key: key != 2) == [3]


def test_asking_takes_nothing_away() -> None:
    reuse = Reuse(10)
    filled(reuse, [1, 2, 3])
    assert reuse.victims(2, anything) == reuse.victims(2, anything) == [3, 2]


def test_offline_blocks_go_before_online_ones() -> None:
    reuse = Reuse(10)
    reuse.used([1, 2], online=False)
    reuse.used([3, 4])
    for key in (1, 2, 3, 4):
        reuse.held(key)
    reuse.used([1, 2], online=False)  # used last, and twice
    assert reuse.victims(4, anything) == [2, 1, 4, 3]


def test_a_block_that_online_requests_share_with_offline_ones_is_online() -> None:
    reuse = Reuse(10)
    reuse.used([1], online=False)
    reuse.used([1])
    reuse.used([1], online=False)
    reuse.used([2], online=False)
    reuse.held(1)
    reuse.held(2)
    assert reuse.victims(2, anything) == [2, 1]


def test_it_learns_that_some_are_never_used_again() -> None:
    """Sessions come back every 30 uses; between them come prompts that nobody repeats."""
    capacity, sessions = 40, [[n, n + 100] for n in range(8)]
    reuse, held, hits, single = Reuse(capacity), set[int](), 0, 10_000
    for round_ in range(300):
        for session in sessions:
            hits += all(key in held for key in session) if round_ > 150 else 0
            for prompt in (session, list(range(single, single + 6))):
                reuse.used(prompt)
                for key in prompt:
                    reuse.held(key)
                held |= set(prompt)
                for gone in reuse.victims(len(held) - capacity, anything):
                    reuse.lost(gone)
                    held.discard(gone)
            single += 6
    # The least recently used of 40 are always the sessions: 64 blocks are used between two turns.
    assert hits > 0.9 * 149 * len(sessions)


def test_uses_are_known_for_a_while_after_a_block_has_gone() -> None:
    reuse = Reuse(2)
    reuse.used([1])
    reuse.used([1])
    assert reuse.uses(1) == 2
    reuse.used(list(range(10, 10 + GHOSTS * 2)))
    assert reuse.uses(1) == 0


def test_an_empty_cache_takes_everything_and_a_full_one_what_is_worth_it() -> None:
    reuse = Reuse(2)
    reuse.used([1, 2])
    assert reuse.worth(1)
    reuse.held(1)
    reuse.held(2)
    reuse.used([5], online=False)
    assert not reuse.worth(5)


def test_a_tenant_above_its_share_gives_up_its_own_first() -> None:
    reuse = Reuse(10)
    reuse.tenant_share = 0.5
    reuse.used([1, 2], tenant="small", online=False)
    for n in range(10, 18):
        reuse.used([n], tenant="large")
    for key in (1, 2, *range(10, 18)):
        reuse.held(key)
    # Down to its five, and only then what would go first without shares.
    assert reuse.victims(5, anything) == [10, 11, 12, 2, 1]


def test_what_may_not_go_of_a_tenant_above_its_share_does_not_keep_others_from_going() -> None:
    reuse = Reuse(4)
    reuse.tenant_share = 0.5
    for n in range(4):
        reuse.used([n], tenant="large" if n else "small")
        reuse.held(n)
    assert reuse.victims(2, lambda key: key != 1) == [2, 0]
    assert reuse.victims(2, lambda key: key == 0) == [0]
    assert reuse.victims(2, anything) == [1, 0]


def test_a_tenant_within_its_share_may_push_out_who_is_above() -> None:
    reuse = Reuse(4)
    reuse.tenant_share = 0.5
    for _ in range(3):
        reuse.used([1, 2, 3, 4], tenant="large")
    for key in (1, 2, 3, 4):
        reuse.held(key)
    reuse.used([5], tenant="small", online=False)
    assert reuse.worth(5)
    reuse.used([6], tenant="large", online=False)
    assert not reuse.worth(6)


def test_what_is_pinned_stays_until_its_time_is_over() -> None:
    reuse = Reuse(8)
    reuse.pin_share = 0.5
    filled(reuse, [1, 2, 3], [4, 5, 6])
    reuse.pin([1, 2], 10.0)
    reuse.unpin(9.0)
    assert reuse.victims(6, anything) == [3, 6, 5, 4]
    reuse.unpin(10.0)
    assert set(reuse.victims(6, anything)) == {1, 2, 3, 4, 5, 6}


def test_the_end_of_what_is_pinned_stands_before_what_it_follows() -> None:
    reuse = Reuse(8)
    reuse.pin_share = 0.5
    filled(reuse, [1, 2, 3])
    reuse.pin([1, 2, 3], 10.0)
    assert reuse.victims(3, anything) == []
    reuse.unpin(10.0)
    assert reuse.victims(3, anything) == [3, 2, 1]


def test_a_pin_lasts_as_long_as_the_longest_that_was_asked() -> None:
    reuse = Reuse(4)
    reuse.pin_share = 1.0
    filled(reuse, [1])
    for until_s in (10.0, 30.0, 20.0):
        reuse.pin([1], until_s)
    reuse.unpin(20.0)
    assert reuse.victims(1, anything) == []
    reuse.unpin(30.0)
    assert reuse.victims(1, anything) == [1]


def test_no_more_is_pinned_than_the_share_for_it() -> None:
    reuse = Reuse(8)
    reuse.pin_share = 0.25
    filled(reuse, [1, 2, 3, 4])
    reuse.pin([1, 2, 3, 4], 10.0)
    assert reuse.victims(4, anything) == [4, 3]
    reuse.unpin(10.0)
    reuse.pin_share = 0.0
    reuse.pin([1, 2, 3, 4], 20.0)
    assert reuse.victims(4, anything) == [4, 3, 2, 1]


def test_what_is_pinned_is_worth_its_place() -> None:
    reuse = Reuse(2)
    reuse.pin_share = 0.5
    filled(reuse, [1, 2])
    reuse.used([5], online=False)
    assert not reuse.worth(5)
    reuse.pin([5], 10.0)
    assert reuse.worth(5)


PROMPTS = st.lists(
    st.lists(st.integers(0, 5), min_size=1, max_size=4).map(
        # A block stands for all before it, as its hash does.
        lambda path: [hash(tuple(path[: n + 1])) for n in range(len(path))]
    ),
    max_size=40,
)


@given(PROMPTS, st.integers(1, 12))
def test_it_never_gives_up_what_it_does_not_hold_nor_a_parent_before_its_child(
    prompts: list[list[int]], capacity: int
) -> None:
    reuse, held = Reuse(capacity), set[int]()
    parents: dict[int, int | None] = {}
    for prompt in prompts:
        reuse.used(prompt)
        before: int | None = None
        for key in prompt:
            parents.setdefault(key, before)
            before = key
            held.add(key)
            reuse.held(key)
        for gone in reuse.victims(len(held) - capacity, anything):
            assert gone in held
            assert not any(parents[other] == gone for other in held)
            held.discard(gone)
            reuse.lost(gone)
        assert len(held) <= capacity
    reuse.clear()
    assert reuse.victims(1, anything) == []


@given(PROMPTS, st.integers(1, 12), st.sampled_from([0.1, 0.4, 0.7]))
def test_who_is_above_the_share_gives_up_as_long_as_it_can(
    prompts: list[list[int]], capacity: int, share: float
) -> None:
    """A prompt's first block says whose it is; every block but the leaves has a child."""
    reuse, held = Reuse(capacity), dict[object, str]()
    reuse.tenant_share = share
    parents: dict[object, object] = {}
    for prompt in prompts:
        tenant = "abc"[prompt[0] % 3]
        reuse.used(prompt, tenant=tenant)
        parents |= dict(zip(prompt, [None, *prompt], strict=False))
        for key in prompt:
            held[key] = tenant
            reuse.held(key)
        gone = reuse.victims(len(held) - capacity, anything)
        assert len(gone) == max(0, len(held) - capacity)
        for lost in gone:
            most = share * capacity
            above = {t for t in held.values() if list(held.values()).count(t) > most}
            leaves = {one for one in held if not any(parents[other] == one for other in held)}
            assert lost in leaves
            if any(held[leaf] in above for leaf in leaves):
                assert held[lost] in above
            del held[lost]
            reuse.lost(lost)


@given(PROMPTS, st.integers(1, 12))
def test_without_shares_it_is_all_the_same_whose_a_block_is(
    prompts: list[list[int]], capacity: int
) -> None:
    one, several, held = Reuse(capacity), Reuse(capacity), set[int]()
    for prompt in prompts:
        one.used(prompt)
        several.used(prompt, tenant="abc"[prompt[0] % 3])
        held |= set(prompt)
        for key in prompt:
            one.held(key)
            several.held(key)
        gone = one.victims(len(held) - capacity, anything)
        assert several.victims(len(held) - capacity, anything) == gone
        for lost in gone:
            one.lost(lost)
            several.lost(lost)
        held -= set(gone)


def test_it_does_not_grow_while_one_tenant_is_always_above() -> None:
    reuse = Reuse(64)
    reuse.tenant_share = 0.25
    for n in range(5_000):
        reuse.used([n], tenant="a")
        reuse.held(n)
        for gone in reuse.victims(1, anything) if n >= 64 else ():
            reuse.lost(gone)
    entries = [*reuse._leaves, *(leaves for heaps in reuse._apart.values() for leaves in heaps)]
    assert sum(map(len, entries)) < 2 * 3 * (2 * 64 + 64)
