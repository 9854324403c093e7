"""What attention is measured on: shapes of real models, numbers of rows, lengths."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.ragged_paged_attention.cases import MODELS, ModelShape

DTYPE = jnp.dtype("bfloat16")
CACHED_BYTES = (
    256 << 20
)  # four times the L2 of H100 and H200: with less, repeated calls read from there and not from memory


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One call over `batch` rows of `context` tokens, of which the last `queries` are new. Ragged rows have evenly
    drawn lengths from an eighth of the context to all of it."""

    model: str
    batch: int
    context: int
    queries: int = 1
    is_ragged: bool = False

    @property
    def name(self) -> str:
        """Unique."""
        kind = "decode" if self.queries == 1 else "prefill" if self.queries == self.context else f"chunk {self.queries}"
        return f"{kind} {self.model} {self.batch} x {self.context}{' ragged' if self.is_ragged else ''}"

    @property
    def shape(self) -> ModelShape:
        """Heads."""
        return MODELS[self.model]

    @property
    def kv_len_s(self) -> np.ndarray:
        """i32[s]; tokens of each row."""
        if not self.is_ragged:
            return np.full(self.batch, self.context, np.int32)
        return np.linspace(self.context // 8, self.context, self.batch).astype(np.int32)

    @property
    def is_decode(self) -> bool:
        """Whether memory is the limit, not arithmetic."""
        return self.queries == 1

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values that are attended to."""
        return int(self.kv_len_s.sum()) * self.shape.num_kv_heads * 2 * self.shape.head_size * DTYPE.itemsize

    @property
    def num_bytes(self) -> int:
        """That must be moved: keys and values once, queries and results."""
        q = self.batch * self.queries * self.shape.num_heads * self.shape.head_size * DTYPE.itemsize
        return self.kv_bytes + 2 * q

    @property
    def flops(self) -> int:
        """Of both products, what the causal mask hides left out."""
        before = int((self.kv_len_s - self.queries).sum()) * self.queries
        own = self.batch * self.queries * (self.queries + 1) // 2
        return 4 * self.shape.num_heads * self.shape.head_size * (before + own)

    @property
    def dense_bytes(self) -> int:
        """Of keys and values padded to the same length."""
        return self.batch * self.context * self.shape.num_kv_heads * 2 * self.shape.head_size * DTYPE.itemsize


class Inputs(NamedTuple):
    """The same numbers, contiguous and in pages. The new tokens lie in both."""

    q_btnh: jax.Array
    k_bskh: jax.Array
    v_bskh: jax.Array
    pages_pkbd: jax.Array
    rows: dict[str, jax.Array]  # table_sm, q_start_s, kv_len_s
    k_tkh: jax.Array  # of the new tokens
    v_tkh: jax.Array


_SHORT = ((1, 1024), (1, 8192), (1, 131072), (16, 1024), (16, 8192), (16, 32768), (64, 1024), (64, 8192))
_DECODES = {
    "llama-3-8b": (*_SHORT, (64, 32768), (256, 1024), (256, 8192)),
    "llama-3-70b-tp8": (*_SHORT[1:3], *_SHORT[4:], (16, 131072), (256, 1024), (256, 8192), (256, 32768)),
}
_PREFILLS = ((1, 1024), (1, 8192), (1, 32768), (8, 2048))


def scenarios(*, is_quick: bool) -> list[Scenario]:
    """What is measured on a GPU, the long ones last."""
    found = []
    for model, sizes in _DECODES.items():
        found += [Scenario(model=model, batch=batch, context=context) for batch, context in sizes]
        found += [Scenario(model=model, batch=b, context=c, queries=c) for b, c in _PREFILLS]
        found.append(Scenario(model=model, batch=1, context=32768, queries=2048))
        found.append(Scenario(model=model, batch=64, context=16384, is_ragged=True))
    if is_quick:
        wanted = {(1, 8192), (64, 8192)}
        found = [s for s in found if (s.batch, s.context) in wanted]
    return sorted(found, key=lambda s: (s.queries > 1, s.model, s.dense_bytes))


def rehearsal() -> list[Scenario]:
    """A decode, a ragged decode and a prefill, small enough for any CPU."""
    size = {"model": "llama-3-70b-tp8", "batch": 2, "context": 64}
    return [Scenario(**size), Scenario(**size, is_ragged=True), Scenario(**size, queries=64)]


def make_inputs(scenario: Scenario, page_size: int) -> Inputs:
    """On the device. Pages are in random order; table columns past a row's length repeat its first page."""
    shape, batch, context = scenario.shape, scenario.batch, scenario.context
    assert context % page_size == 0
    key = jax.random.key(0)
    q_btnh = jax.random.normal(key, (batch, scenario.queries, shape.num_heads, shape.head_size), DTYPE)
    k_bskh, v_bskh = (
        _numbers(jax.random.fold_in(key, i), (batch, context, shape.num_kv_heads, shape.head_size)) for i in (1, 2)
    )
    num_pages = batch * context // page_size
    page_of = np.random.default_rng(0).permutation(num_pages).astype(np.int32)  # i32[row * column]
    starts = np.arange(batch + 1, dtype=np.int32) * scenario.queries
    rows = {"table_sm": page_of.reshape(batch, -1), "q_start_s": starts, "kv_len_s": scenario.kv_len_s}
    where_sq = scenario.kv_len_s[:, None] - scenario.queries + np.arange(scenario.queries)
    new = [x[np.arange(batch)[:, None], where_sq].reshape(-1, *x.shape[2:]) for x in (k_bskh, v_bskh)]
    pages_pkbd = _paged(k_bskh, v_bskh, jnp.asarray(np.argsort(page_of)), page_size)
    return Inputs(q_btnh, k_bskh, v_bskh, pages_pkbd, jax.tree.map(jnp.asarray, rows), *new)


@functools.partial(jax.jit, static_argnums=1)
def _numbers(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Normal numbers, the same for every 65,536 tokens: to draw all of them would take several times their memory."""
    num_tokens = shape[0] * shape[1]
    some = jax.random.normal(key, (min(num_tokens, 1 << 16), *shape[2:]), DTYPE)
    return some[jnp.arange(num_tokens) % len(some)].reshape(shape)


@functools.partial(jax.jit, static_argnums=3)
def _paged(k_bskh: jax.Array, v_bskh: jax.Array, place_p: jax.Array, page_size: int) -> jax.Array:
    """[p k b 2h]; page i holds what lies at place i of the rows one after the other."""

    def pages(x: Any) -> Any:
        return jnp.swapaxes(x.reshape(-1, page_size, *x.shape[2:])[place_p], 1, 2)

    return jnp.concatenate([pages(k_bskh), pages(v_bskh)], axis=-1)
