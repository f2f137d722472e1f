"""The global index: exact prefixes, whatever the engines call their blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_kv.events import AllBlocksCleared, BlockRemoved, BlockStored
from xllm_kv.index import KvIndex, Match, Prompt
from xllm_kv.keys import chain, extras_of, root

SIZE = 4
MODEL = "m"


@dataclass
class Engine:
    """Tells of blocks as vLLM does, under hashes of its own."""

    name: str
    size: int = SIZE
    seed: int = 0
    held: dict[tuple[int, ...], int] = field(default_factory=dict)

    def hash(self, tokens: tuple[int, ...]) -> int:
        return hash((self.seed, tokens))

    def stores(self, tokens: list[int], medium: str = "GPU", **more: Any) -> BlockStored:
        """The event of all full blocks of a prompt."""
        return self.extends([], tokens, medium, **more)

    def extends(
        self, before: list[int], tokens: list[int], medium: str = "GPU", **more: Any
    ) -> BlockStored:
        whole = [*before, *tokens]
        ends = range(len(before) + self.size, len(whole) + 1, self.size)
        hashes = [self.hash(tuple(whole[:end])) for end in ends]
        parent = self.hash(tuple(before)) if before else None
        kept = tokens[: len(hashes) * self.size]
        return BlockStored(hashes, parent, kept, self.size, medium, **more)

    def removes(self, tokens: list[int], medium: str = "GPU", **more: Any) -> BlockRemoved:
        """The event of the block that ends a prompt."""
        return BlockRemoved([self.hash(tuple(tokens))], medium, **more)


def index_of(*engines: Engine, **more: Any) -> KvIndex:
    made = KvIndex(**more)
    for engine in engines:
        made.add(engine.name, MODEL, engine.size)
    return made


def lengths(index: KvIndex, tokens: list[int], **more: Any) -> dict[str, tuple[int, ...]]:
    return {n: m.tokens for n, m in index.match(Prompt(MODEL, tokens, **more)).items()}


PROMPT = list(range(100, 118))  # four blocks and two tokens


def test_engines_with_other_hashes_are_compared_by_tokens() -> None:
    a, b = Engine("a", seed=1), Engine("b", seed=2)
    index = index_of(a, b)
    assert index.apply("a", [a.stores(PROMPT)])
    assert index.apply("b", [b.stores(PROMPT[:8])])
    assert lengths(index, PROMPT) == {"a": (16, 0, 0, 0), "b": (8, 0, 0, 0)}
    assert lengths(index, [*PROMPT[:8], 1, 2, 3, 4]) == {"a": (8, 0, 0, 0), "b": (8, 0, 0, 0)}
    assert lengths(index, [9, *PROMPT]) == {}


def test_a_prefix_with_a_hole_ends_at_the_hole() -> None:
    a = Engine("a")
    index = index_of(a)
    index.apply("a", [a.stores(PROMPT), a.removes(PROMPT[:8])])
    assert lengths(index, PROMPT) == {"a": (4, 0, 0, 0)}


def test_slower_tiers_go_on_where_faster_ones_end() -> None:
    a = Engine("a")
    index = index_of(a)
    stored = [a.stores(PROMPT[:4]), a.stores(PROMPT[:12], "CPU"), a.stores(PROMPT, "STORAGE")]
    index.apply("a", stored)
    assert lengths(index, PROMPT) == {"a": (4, 8, 4, 0)}
    assert index.match(Prompt(MODEL, PROMPT))["a"].total == 16
    index.apply("a", [a.stores(PROMPT, "somewhere else")])
    assert lengths(index, [*PROMPT[:16], 1]) == {"a": (4, 8, 4, 0)}


def test_storage_elsewhere_is_another_tier_than_a_disk() -> None:
    a = Engine("a")
    index = index_of(a)
    index.apply("a", [a.stores(PROMPT[:8], "STORAGE")])
    index.apply("a", [a.stores(PROMPT, "STORAGE", locality="REMOTE")])
    assert lengths(index, PROMPT) == {"a": (0, 0, 8, 8)}
    index.apply("a", [a.removes(PROMPT[:16], "STORAGE", locality="REMOTE")])
    assert lengths(index, PROMPT) == {"a": (0, 0, 8, 4)}


def test_a_block_in_another_tier_is_a_parent_too() -> None:
    a = Engine("a")
    index = index_of(a)
    assert index.apply("a", [a.stores(PROMPT[:8], "CPU"), a.extends(PROMPT[:8], PROMPT[8:])])
    assert lengths(index, PROMPT) == {"a": (0, 8, 0, 0)}
    index.apply("a", [a.stores(PROMPT[:8])])
    assert lengths(index, PROMPT) == {"a": (16, 0, 0, 0)}


def test_an_unknown_parent_is_not_guessed_at() -> None:
    a = Engine("a")
    index = index_of(a)
    assert not index.apply("a", [a.extends(PROMPT[:8], PROMPT[8:])])
    assert lengths(index, PROMPT) == {}
    assert index.counts.unknown_parents == 2
    assert index.apply("a", [a.stores(PROMPT)])
    assert lengths(index, PROMPT) == {"a": (16, 0, 0, 0)}


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        ({}, {}, 16),
        ({}, {"salt": "s"}, 0),
        ({"salt": "s"}, {"salt": "s"}, 16),
        ({"salt": "s"}, {}, 0),
        ({"salt": "s"}, {"salt": "t"}, 0),
        ({"lora": "l"}, {"lora": "l"}, 16),
        ({"lora": "l"}, {}, 0),
        ({"lora": "l", "salt": "s"}, {"lora": "l", "salt": "s"}, 16),
        ({"lora": "l", "salt": "s"}, {"lora": "l"}, 0),
    ],
)
def test_salt_and_adapter_keep_kv_apart(
    stored: dict[str, str], asked: dict[str, str], found: int
) -> None:
    a = Engine("a")
    index = index_of(a)
    # The wire makes lists of tuples.
    extras = extras_of(4, **stored)
    wire = None if extras is None else [list(e) if isinstance(e, tuple) else e for e in extras]
    index.apply("a", [a.stores(PROMPT, extra_keys=wire)])
    assert sum(lengths(index, PROMPT, **asked).get("a", (0,))) == found


def test_other_models_and_block_sizes_do_not_meet() -> None:
    a, b = Engine("a"), Engine("b", size=8)
    index = index_of(a, b)
    index.add("c", "other", SIZE)
    index.apply("a", [a.stores(PROMPT)])
    index.apply("b", [b.stores(PROMPT)])
    index.apply("c", [Engine("c").stores(PROMPT)])
    assert lengths(index, PROMPT[:15]) == {"a": (12, 0, 0, 0), "b": (8, 0, 0, 0)}


def test_all_full_attention_groups_have_to_hold_a_block() -> None:
    a = Engine("a")
    index = KvIndex()
    index.add("a", MODEL, SIZE, groups=(0, 2))
    index.apply("a", [a.stores(PROMPT, group_idx=0), a.stores(PROMPT, group_idx=1)])
    assert lengths(index, PROMPT) == {}
    index.apply("a", [a.stores(PROMPT, group_idx=2)])
    assert lengths(index, PROMPT) == {"a": (16, 0, 0, 0)}
    index.apply("a", [a.removes(PROMPT[:12], group_idx=1)])
    assert lengths(index, PROMPT) == {"a": (16, 0, 0, 0)}
    index.apply("a", [a.removes(PROMPT[:12], group_idx=2)])
    assert lengths(index, PROMPT) == {"a": (8, 0, 0, 0)}


def test_partial_blocks_are_left_out() -> None:
    a = Engine("a")
    index = index_of(a)
    index.apply("a", [BlockStored([1], None, PROMPT[:2], 2, "GPU")])
    assert len(index) == 0


def test_clearing_is_of_the_device_alone() -> None:
    a = Engine("a")
    index = index_of(a)
    index.apply("a", [a.stores(PROMPT), a.stores(PROMPT[:8], "CPU"), AllBlocksCleared()])
    assert lengths(index, PROMPT) == {"a": (0, 8, 0, 0)}


def test_who_leaves_takes_all_along() -> None:
    a, b = Engine("a"), Engine("b")
    index = index_of(a, b)
    for engine in (a, b):
        index.apply(engine.name, [engine.stores(PROMPT)])
    index.remove("a")
    assert lengths(index, PROMPT) == {"b": (16, 0, 0, 0)}
    assert len(index) == 4
    index.add("c", MODEL, SIZE)  # takes over the place that a had
    assert lengths(index, PROMPT) == {"b": (16, 0, 0, 0)}


def test_it_stays_within_its_bound_and_forgets_the_oldest() -> None:
    a = Engine("a")
    index = index_of(a, most_blocks=4)
    other = [t + 1000 for t in PROMPT]
    index.apply("a", [a.stores(PROMPT), a.stores(other)])
    assert len(index) == 4
    assert index.counts.dropped == 4
    assert lengths(index, PROMPT) == {}
    assert lengths(index, other) == {"a": (16, 0, 0, 0)}
    index.apply("a", [a.removes(PROMPT[:4])])
    assert index.counts.unknown_removals == 1


def test_a_promise_holds_until_its_time_and_events_outlive_it() -> None:
    a, b = Engine("a"), Engine("b")
    index = index_of(a, b)
    index.promise("a", Prompt(MODEL, PROMPT), 2.0)
    index.promise("unknown", Prompt(MODEL, PROMPT), 2.0)
    index.apply("b", [b.stores(PROMPT[:8])])
    assert lengths(index, PROMPT) == {"a": (16, 0, 0, 0), "b": (8, 0, 0, 0)}
    index.apply("a", [a.stores(PROMPT[:4])])
    index.expire(1.9)
    assert lengths(index, PROMPT)["a"] == (16, 0, 0, 0)
    index.expire(2.0)
    assert lengths(index, PROMPT) == {"a": (4, 0, 0, 0), "b": (8, 0, 0, 0)}


def test_a_key_depends_on_all_that_kv_depends_on() -> None:
    tokens = list(range(8))
    begin = root(MODEL, SIZE)
    keys = chain(begin, tokens, SIZE)
    assert len(keys) == 2
    assert keys[1] == chain(keys[0], tokens[4:], SIZE)[0]
    others = {
        chain(root("other", SIZE), tokens, SIZE)[1],
        chain(root(MODEL, 8), tokens, 8)[0],
        chain(begin, [9, *tokens[1:]], SIZE)[1],
        chain(begin, tokens, SIZE, [("salt",), None])[1],
    }
    assert keys[1] not in others
    assert len(others) == 4
    with pytest.raises(ValueError, match="token id"):
        chain(begin, [-1, 2, 3, 4], SIZE)


BLOCKS = st.lists(st.integers(0, 2), min_size=1, max_size=5)
STEPS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(["store", "remove"]),
              st.sampled_from(["GPU", "CPU"]), BLOCKS), max_size=40)  # fmt: skip


@given(steps=STEPS, asked=BLOCKS)
def test_it_finds_what_a_search_over_everything_finds(
    steps: list[tuple[str, str, str, list[int]]], asked: list[int]
) -> None:
    """A block is a number, repeated; a brute-force set of (tier, prefix) is the truth."""
    engines = {"a": Engine("a", seed=1), "b": Engine("b", seed=2)}
    index = index_of(*engines.values())
    truth: dict[str, set[tuple[str, tuple[int, ...]]]] = {"a": set(), "b": set()}
    for name, what, medium, blocks in steps:
        tokens = [b for b in blocks for _ in range(SIZE)]
        if what == "store":
            index.apply(name, [engines[name].stores(tokens, medium)])
            truth[name] |= {(medium, tuple(blocks[:n])) for n in range(1, len(blocks) + 1)}
        else:
            index.apply(name, [engines[name].removes(tokens, medium)])
            truth[name].discard((medium, tuple(blocks)))
    found = index.match(Prompt(MODEL, [b for b in asked for _ in range(SIZE)]))
    for name, held in truth.items():
        prefixes = [tuple(asked[:n]) for n in range(1, len(asked) + 1)]
        device = _leading(prefixes, lambda p, held=held: ("GPU", p) in held)
        host = _leading(prefixes[device:], lambda p, held=held: ("CPU", p) in held)
        expected = Match((device * SIZE, host * SIZE, 0, 0))
        assert found.get(name, Match((0, 0, 0, 0))) == expected
    assert len(index) == sum(len(held) for held in truth.values())


def _leading(prefixes: list[tuple[int, ...]], holds: Any) -> int:
    return next((n for n, prefix in enumerate(prefixes) if not holds(prefix)), len(prefixes))
