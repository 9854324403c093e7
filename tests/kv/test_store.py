"""KVStore, one law at a time. Block size 4 throughout."""

import pytest

from jaxserve.errors import InvariantError
from jaxserve.kv.evict import least_frequently_used, least_recently_used
from jaxserve.kv.store import KVStore
from jaxserve.step import BlockCopy

A, B = list(range(100, 116)), list(range(200, 216))


def make(num_blocks: int = 16, **options) -> KVStore:
    return KVStore(num_blocks, 4, **options)


def compute(store: KVStore, seq_id: str, tokens: list[int], namespace: str = "") -> int:
    """Open, grow and register a whole sequence; returns how much of it was cached."""
    cached = store.open(seq_id, tokens, namespace, limit=len(tokens))
    store.touch(seq_id)
    assert store.grow(seq_id, len(tokens))
    store.register(seq_id, tokens)
    store.check()
    return cached


def fill(store: KVStore, *sequences: list[int]) -> None:
    """Leave sequences in the cache, in this order of use."""
    for number, tokens in enumerate(sequences):
        compute(store, f"fill{number}", tokens)
        store.release(f"fill{number}")
        store.check()


def cached(store: KVStore, tokens: list[int], namespace: str = "") -> int:
    """How much of `tokens` is cached. Counts as a use."""
    found = store.open("probe", tokens, namespace, limit=len(tokens))
    store.touch("probe")
    store.release("probe")
    return found


def test_a_match_is_whole_blocks_and_within_its_limit():
    store = make()
    fill(store, A)
    for limit, found in ((16, 16), (15, 12), (4, 4), (3, 0), (0, 0)):
        assert store.open("s", A, limit=limit) == found
        assert len(store.table("s")) == found // 4
        store.release("s")
    assert store.open("s", A[:10], limit=99) == 8


def test_asking_what_is_cached_is_no_use_and_no_hold():
    store = make()
    fill(store, A)
    uses = [node.num_uses for node in store._tree.nodes()]
    for limit in (99, 16, 15, 3, 0):
        assert store.cached(A, limit=limit) == min(limit, 16) // 4 * 4
    assert store.cached(A, "other", limit=16) == 0
    assert [node.num_uses for node in store._tree.nodes()] == uses
    assert store.num_held == 0
    assert make(caching=False).cached(A, limit=16) == 0


def test_a_match_ends_at_the_first_difference():
    store = make()
    fill(store, A)
    assert cached(store, A[:8] + B[:8]) == 8
    assert cached(store, [1, *A[1:]]) == 0
    assert cached(store, A[4:]) == 0, "content matches only behind the same prefix"


def test_an_unfinished_block_is_not_cached():
    store = make()
    compute(store, "s", A[:7])
    assert cached(store, A) == 4
    store.register("s", A[:8])
    assert cached(store, A) == 8


def test_sequences_with_one_prefix_hold_the_same_blocks():
    store = make()
    compute(store, "a", A)
    assert compute(store, "b", A[:8] + B[:4]) == 8
    assert store.table("a")[:2] == store.table("b")[:2]
    assert store.table("a")[2] != store.table("b")[2]
    assert store.num_held == 5
    store.release("a")
    store.check()
    assert store.num_held == 3
    assert store.num_available == 13


def test_namespaces_never_share():
    store = make()
    compute(store, "a", A, "x")
    assert compute(store, "b", A, "y") == 0
    assert not set(store.table("a")) & set(store.table("b"))
    assert (cached(store, A, "x"), cached(store, A, "y"), cached(store, A)) == (16, 16, 0)


def test_without_caching_nothing_is_found_and_everything_is_freed():
    store = make(caching=False)
    compute(store, "a", A)
    store.release("a")
    assert cached(store, A) == 0
    assert store.num_available == 16


def test_equal_content_computed_twice_becomes_one_block():
    store = make()
    for seq_id in "ab":
        assert store.open(seq_id, A, limit=16) == 0
        assert store.grow(seq_id, 16)
    assert store.num_held == 8
    store.register("a", A)
    store.register("b", A)
    store.check()
    assert list(store.table("a")) == list(store.table("b"))
    assert store.num_held == 4


def test_a_fork_follows_when_its_shared_block_is_replaced_by_the_cached_one():
    """Else the fork would hold a cached block whose prefix nobody holds: counted as evictable, but not evictable."""
    store = make()
    for seq_id in ("first", "parent"):
        store.open(seq_id, A, limit=16)
        assert store.grow(seq_id, 12)
    assert store.fork("parent", "child", 12) == []
    store.register("first", A[:4])
    store.register("parent", A[:12])
    store.check()
    store.release("first")
    store.release("parent")
    store.check()
    assert store.num_held == 3
    assert store.grow("child", 64)
    store.check()


def test_eviction_takes_the_least_recently_used_leaf_first():
    store = make(8)
    fill(store, A, B)  # full
    cached(store, A)  # B is now the older one
    assert store.open("new", [], limit=0) == 0
    assert store.grow("new", 4 * 3)
    store.check()
    assert cached(store, B) == 4, "B has lost its end, not its beginning"
    assert cached(store, A) == 16


def test_eviction_by_frequency_keeps_what_is_used_often():
    store = make(8, order=least_frequently_used)
    fill(store, A, B)
    for _ in range(3):
        cached(store, A)
    cached(store, B)  # the newest use, but fewer of them
    store.open("new", [], limit=0)
    assert store.grow("new", 16)
    store.check()
    assert cached(store, B) == 0
    assert cached(store, A) == 16


@pytest.mark.parametrize("order", [least_recently_used, least_frequently_used])
def test_a_match_that_is_given_back_untouched_is_no_use(order):
    store = make(8, order=order)
    fill(store, A, B)
    cached(store, B)
    for _ in range(99):  # an admission that fails, step after step
        store.open("waits", A, limit=16)
        store.release("waits")
        store.check()
    store.open("new", [], limit=0)
    assert store.grow("new", 16)
    assert (cached(store, A), cached(store, B)) == (0, 16)


def test_blocks_of_a_sequence_are_never_evicted():
    store = make(4)
    compute(store, "a", A[:8])
    store.open("b", B, limit=0)
    assert not store.grow("b", 12)
    assert store.grow("b", 8)
    assert not set(store.table("a")) & set(store.table("b"))


def test_growing_is_all_or_nothing():
    store = make(4)
    store.open("a", A, limit=0)
    assert store.grow("a", 5)
    before = list(store.table("a"))
    assert not store.grow("a", 17)
    assert list(store.table("a")) == before
    assert store.num_available == 2
    assert store.grow("a", 3), "shorter than it is: nothing to do"
    assert list(store.table("a")) == before
    assert store.grow("a", 16)
    assert store.num_available == 0
    store.check()


def test_a_fork_at_a_block_border_copies_nothing():
    store = make()
    compute(store, "p", A)
    assert store.fork("p", "c", 8) == []
    assert list(store.table("c")) == list(store.table("p"))[:2]
    store.check()


def test_a_fork_within_a_block_copies_that_block_only():
    store = make()
    compute(store, "p", A[:10])
    copies = store.fork("p", "c", 10)
    assert copies == [BlockCopy(source=store.table("p")[2], target=store.table("c")[2])]
    assert store.table("c")[:2] == store.table("p")[:2]
    assert store.table("c")[2] != store.table("p")[2]
    store.check()
    store.register("c", A[:10] + B[:2])
    store.release("p")
    store.check()
    assert cached(store, A[:10] + B[:2]) == 12


def test_a_fork_that_finds_no_block_changes_nothing():
    store = make(3)
    compute(store, "p", A[:10])
    assert store.fork("p", "c", 10) is None
    store.check()
    with pytest.raises(KeyError):
        store.table("c")
    assert store.fork("p", "c", 8) == []


def test_clearing_the_cache_keeps_what_is_held():
    store = make()
    compute(store, "a", A[:8])
    fill(store, A, B)
    store.clear_cache()
    store.check()
    assert store.num_held == 2
    assert cached(store, A) == 8
    assert cached(store, B) == 0


def test_one_sequence_has_one_table():
    store = make()
    store.open("a", A, limit=0)
    with pytest.raises(AssertionError, match="already has a table"):
        store.open("a", A, limit=0)
    store.release("a")
    with pytest.raises(KeyError):
        store.release("a")


def test_the_books_notice_a_block_with_two_owners():
    store = make()
    compute(store, "a", A)
    store.open("b", B, limit=0)
    store._tables["b"].blocks.append(store.table("a")[0])
    with pytest.raises(InvariantError, match="reference counts"):
        store.check()
