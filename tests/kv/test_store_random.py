"""Random walks over KVStore, against a model that remembers what every block holds."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.kv.evict import ORDERS
from jaxserve.kv.store import KVStore

BLOCK = 2
# Few different tokens and lengths, so that equal prefixes are the rule.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class StoreWalk(RuleBasedStateMachine):
    """`known[seq]` are a sequence's tokens, `done[seq]` how many are computed; `pool` is what a device would hold."""

    @initialize(num_blocks=st.integers(4, 16), caching=st.booleans(), order=st.sampled_from(sorted(ORDERS)))
    def start(self, num_blocks, caching, order):
        self.store = KVStore(num_blocks, BLOCK, caching=caching, order=ORDERS[order])
        self.pool = [[None] * BLOCK for _ in range(num_blocks)]
        self.known, self.done, self.space = {}, {}, {}
        self.asked = {}  # (tokens, namespace, limit) -> the last answer
        self.count = 0

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.known)))

    @rule(tokens=TOKENS, namespace=st.sampled_from(("", "other")), limit=st.integers(0, 14), touches=st.booleans())
    def open(self, tokens, namespace, limit, touches):
        self.count += 1
        name = f"s{self.count}"
        expected = self.store.cached(tokens, namespace, limit=limit)
        found = self.store.open(name, tokens, namespace, limit=limit)
        assert found == expected
        if touches:
            self.store.touch(name)
        assert found <= min(limit, len(tokens))
        assert found % BLOCK == 0
        assert len(self.store.table(name)) * BLOCK == found
        self.known[name], self.done[name], self.space[name] = tokens, found, namespace

    @rule(tokens=TOKENS, namespace=st.sampled_from(("", "other")), limit=st.integers(0, 14))
    def ask(self, tokens, namespace, limit):
        """From now on, ask this again after each step."""
        self.asked.setdefault((tuple(tokens), namespace, limit))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), count=st.integers(1, 6), registers=st.booleans())
    def compute(self, data, count, registers):
        """Grow, write as a device would, and usually register, as the scheduler does after a step."""
        name = self.pick(data)
        tokens, start = self.known[name], self.done[name]
        end = min(start + count, len(tokens))
        free, table = self.store.num_available, list(self.store.table(name))
        missing = max(-(-end // BLOCK) - len(table), 0)
        grown = self.store.grow(name, end)
        assert grown == (missing <= free)
        assert self.store.num_available == free - (missing if grown else 0)
        if not grown:
            assert list(self.store.table(name)) == table
            return
        for position in range(start, end):
            block = self.store.table(name)[position // BLOCK]
            sharers = [n for n in self.known if block in self.store.table(n)]
            assert sharers == [name], "a block that others hold is written"
            self.pool[block][position % BLOCK] = tokens[position]
        self.done[name] = end
        if registers:
            self.store.register(name, tokens[:end])

    @precondition(lambda self: self.known)
    @rule(data=st.data(), more=TOKENS)
    def answer(self, data, more):
        name = self.pick(data)
        self.known[name] = [*self.known[name], *more]

    @precondition(lambda self: self.known)
    @rule(data=st.data(), tail=TOKENS)
    def fork(self, data, tail):
        parent = self.pick(data)
        shared = data.draw(st.integers(0, self.done[parent]))
        self.count += 1
        child, free = f"s{self.count}", self.store.num_available
        copies = self.store.fork(parent, child, shared)
        assert (copies is None) == (shared % BLOCK > 0 and free == 0)
        if copies is None:
            return
        for source, target, _ in copies:
            self.pool[target] = list(self.pool[source])
        assert len(copies) == (shared % BLOCK > 0)
        self.known[child] = self.known[parent][:shared] + tail
        self.done[child], self.space[child] = shared, self.space[parent]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def release(self, data):
        name = self.pick(data)
        self.store.release(name)
        del self.known[name], self.done[name], self.space[name]

    @rule()
    def clear_cache(self):
        held = self.store.num_held
        self.store.clear_cache()
        assert self.store.num_held == held

    @invariant()
    def books_agree_and_every_sequence_reads_its_own_tokens(self):
        if not hasattr(self, "store"):
            return
        self.store.check()
        assert self.store.num_held == len({b for name in self.known for b in self.store.table(name)})
        for name, tokens in self.known.items():
            table, done = self.store.table(name), self.done[name]
            assert [self.pool[table[p // BLOCK]][p % BLOCK] for p in range(done)] == tokens[:done]

    @invariant()
    def who_asks_again_is_told_what_a_walk_from_the_root_would_find(self):
        for (tokens, namespace, limit), last in getattr(self, "asked", {}).items():
            mark = self.store.mark(tokens, namespace, limit=limit, last=last)
            assert mark.num_tokens == self.store.cached(tokens, namespace, limit=limit)
            longer = self.store.mark([*tokens, 0, 1, 0], namespace, limit=limit + 3, last=mark)
            assert longer.num_tokens == self.store.cached([*tokens, 0, 1, 0], namespace, limit=limit + 3)
            self.asked[tokens, namespace, limit] = mark

    @invariant()
    def namespaces_never_share_a_block(self):
        if not hasattr(self, "store"):
            return
        spaces = {b: self.space[name] for name in self.known for b in self.store.table(name)}
        for name in self.known:
            assert all(spaces[b] == self.space[name] for b in self.store.table(name))

    @precondition(lambda self: self.known)
    @rule()
    def take_all(self):
        """A new sequence can have every available block."""
        free = self.store.num_available
        self.store.open("all", [], limit=0)
        assert self.store.grow("all", free * BLOCK)
        assert self.store.num_available == 0
        for block in self.store.table("all"):
            self.pool[block] = [None] * BLOCK
        self.store.release("all")


StoreWalk.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStoreWalk = StoreWalk.TestCase
