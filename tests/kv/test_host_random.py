"""Random walks over a pool and its tier in host memory, against a model that remembers what every block of both holds.

The walk does what `scheduler/replica.py` does with them: swap out, swap in, leave copies behind, find those of others.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.kv.host import HostTier
from jaxserve.kv.store import KVStore

BLOCK = 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=11)  # equal prefixes are the rule
SPACES = st.sampled_from(("", "other"))


class HostWalk(RuleBasedStateMachine):
    """`running` and `parked`: tokens and namespace of each sequence; all its tokens are computed. `pool` and `memory` are
    what the blocks of device and host would hold."""

    @initialize(num_blocks=st.integers(6, 14), num_host_blocks=st.integers(1, 12))
    def start(self, num_blocks, num_host_blocks):
        self.store, self.host = KVStore(num_blocks, BLOCK), HostTier(num_host_blocks, BLOCK)
        self.pool = [[None] * BLOCK for _ in range(num_blocks)]
        self.memory = [[None] * BLOCK for _ in range(num_host_blocks)]
        self.running, self.parked = {}, {}
        self.count = 0

    def name(self):
        self.count += 1
        return f"s{self.count}"

    def compute(self, name, tokens, start):
        """Write tokens from `start` on, and register, as a step does. Returns whether there was room."""
        if not self.store.grow(name, len(tokens)):
            return False
        table = self.store.table(name)
        for position in range(start, len(tokens)):
            holders = [other for other in self.store.seq_ids if table[position // BLOCK] in self.store.table(other)]
            assert holders == [name], "a block that others hold is written"
            self.pool[table[position // BLOCK]][position % BLOCK] = tokens[position]
        self.store.register(name, tokens)
        return True

    def bring_in(self, name, first):
        """Copy the blocks from the `first` on from host memory, then let go of the copies."""
        pairs = zip(self.store.table(name)[first:], self.host.store.table(name)[first:], strict=False)
        for device, copy in pairs:
            self.pool[device] = list(self.memory[copy])
        self.host.store.release(name)

    def copy_out(self, name, tokens, space):
        """Returns whether there was room for the copies; if not, nothing may have changed."""
        free, tables = self.host.store.num_available, set(self.host.store.seq_ids)
        found = self.host.store.cached(tokens, space, limit=len(tokens))
        swaps = self.host.park(name, tokens, space, self.store.table(name), 3)
        num_blocks = -(-len(tokens) // BLOCK)
        if swaps is None:
            assert num_blocks - found // BLOCK > free - found // BLOCK, "there was room"
            assert (self.host.store.num_available, set(self.host.store.seq_ids)) == (free, tables)
            return False
        assert len(swaps) == num_blocks - found // BLOCK, "what is there already is copied again"
        assert [swap.replica for swap in swaps] == [3] * len(swaps)
        for device, copy, _ in swaps:
            others = [o for o in self.host.store.seq_ids if o != name and copy in self.host.store.table(o)]
            assert not others, "the copy of somebody who waits is overwritten"
            self.memory[copy] = list(self.pool[device])
        return True

    @rule(tokens=TOKENS, space=SPACES)
    def begin(self, tokens, space):
        """A new sequence, with what it finds in the pool and, of what follows, in host memory."""
        name = self.name()
        limit = max(len(tokens) - 1, 0)
        cached = self.store.open(name, tokens, space, limit=limit)
        copied = self.host.store.cached(tokens, space, limit=limit)
        if copied > cached:
            assert self.host.hold(name, tokens, space, limit) == copied
            assert self.host.holds(name)
            if self.store.grow(name, copied):
                self.bring_in(name, cached // BLOCK)
                cached = copied
            else:
                self.host.store.release(name)
        if self.compute(name, tokens, cached):
            self.running[name] = tokens, space
        else:
            self.store.release(name)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def answer(self, data, more):
        name = data.draw(st.sampled_from(sorted(self.running)))
        tokens, space = self.running[name]
        if self.compute(name, [*tokens, *more], len(tokens)):
            self.running[name] = [*tokens, *more], space

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def park(self, data):
        name = data.draw(st.sampled_from(sorted(self.running)))
        if self.copy_out(name, *self.running[name]):
            self.store.release(name)
            self.parked[name] = self.running.pop(name)

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def resume(self, data):
        name = data.draw(st.sampled_from(sorted(self.parked)))
        tokens, space = self.parked[name]
        cached = self.store.open(name, tokens, space, limit=len(tokens))
        if self.store.grow(name, len(tokens)):
            self.bring_in(name, cached // BLOCK)
            self.running[name] = self.parked.pop(name)
        else:
            self.store.release(name)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keeps_copy=st.booleans())
    def end(self, data, keeps_copy):
        name = data.draw(st.sampled_from(sorted(self.running)))
        if keeps_copy and self.copy_out(name, *self.running[name]):
            self.host.store.release(name)
        self.store.release(name)
        del self.running[name]

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def drop(self, data):
        name = data.draw(st.sampled_from(sorted(self.parked)))
        self.host.store.release(name)
        del self.parked[name]

    @rule(device=st.booleans(), host=st.booleans())
    def clear(self, device, host):
        """Whoever holds blocks keeps them."""
        for store, goes in ((self.store, device), (self.host.store, host)):
            if goes:
                held = store.num_held
                store.clear_cache()
                assert (store.num_held, len(store._free)) == (held, store.num_blocks - held)

    @invariant()
    def books_agree_and_every_sequence_finds_its_own_tokens(self):
        if not hasattr(self, "store"):
            return
        for store, blocks, known in (
            (self.store, self.pool, self.running),
            (self.host.store, self.memory, self.parked),
        ):
            store.check()
            assert set(store.seq_ids) == set(known)
            for name, (tokens, _) in known.items():
                table = store.table(name)
                assert [blocks[table[p // BLOCK]][p % BLOCK] for p in range(len(tokens))] == tokens

    @invariant()
    def whatever_the_trees_promise_is_there(self):
        """Also of blocks that nobody holds any more: a match is taken at its word."""
        for store, blocks in (
            ((self.store, self.pool), (self.host.store, self.memory)) if hasattr(self, "store") else ()
        ):
            for node in store._tree.nodes():
                assert tuple(blocks[node.block]) == node.key


HostWalk.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestHostWalk = HostWalk.TestCase
