"""Changes to logits before a token is chosen: history penalties, bias, banned tokens, top-k / top-p / min-p.

All on whole rows of float32 logits `[s v]`, or on a device's part of them; nothing sorts. Thresholds are found by bisection
over the bits of the floats, which is exact: 32 passes of compare and sum, alike on CPU, GPU and TPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxserve.sharding.collectives import max_over, num_shards, shard_index, sum_over

IN_PROMPT = 1 << 30  # flag beside the count of a token: it occurs in the prompt
_MASK_ROWS = 8  # whose masks are unpacked at a time


def penalise(
    logits_sv: Float[Array, "s v"],
    counts_sv: Int[Array, "s v"],
    repetition_s: Float[Array, " s"],
    frequency_s: Float[Array, " s"],
    presence_s: Float[Array, " s"],
) -> Float[Array, "s v"]:
    """Repetition (prompt and answer; CTRL, arXiv 1909.05858), then frequency and presence (answer only; OpenAI's API)."""
    is_seen_sv = counts_sv > 0
    in_answer_sv = (counts_sv & (IN_PROMPT - 1)).astype(jnp.float32)
    factor_sv = jnp.where(is_seen_sv, repetition_s[:, None], 1.0)
    logits_sv = jnp.where(logits_sv > 0, logits_sv / factor_sv, logits_sv * factor_sv)
    logits_sv = logits_sv - frequency_s[:, None] * in_answer_sv
    return logits_sv - presence_s[:, None] * (in_answer_sv > 0).astype(jnp.float32)


def ban(logits_sv: Float[Array, "s v"], banned_sb: Int[Array, "s b"]) -> Float[Array, "s v"]:
    """Set the listed tokens to -inf; ids past the vocabulary are padding."""
    row_s1 = jnp.arange(logits_sv.shape[0])[:, None]
    return logits_sv.at[row_s1, banned_sb].set(-jnp.inf, mode="drop")


def mask_words(vocab_size: int) -> int:
    """How many u32 hold a bit for each token."""
    return -(-vocab_size // 32)


def unpack(masks_sw: UInt[Array, "s w"], size: int) -> Bool[Array, "s v"]:
    """Masks of the whole vocabulary (bit i % 32 of word i // 32 is token i) -> those of this device's `size` tokens."""
    if num_shards("vocab") == 1:
        return _bits(masks_sw)[:, :size]
    begin = shard_index("vocab") * size
    width = size // 32 + 2  # words that `size` bits may lie in, wherever they begin
    words_sw = jnp.pad(masks_sw, ((0, 0), (0, width)))  # else a slice at the end would be moved
    words_sw = jax.lax.dynamic_slice_in_dim(words_sw, begin // 32, width, axis=1)
    return jax.lax.dynamic_slice_in_dim(_bits(words_sw), begin % 32, size, axis=1)


def _bits(words_sw: UInt[Array, "s w"]) -> Bool[Array, "s v"]:
    # Some rows at a time: a TPU fills the axis of 32 bits up to 128, and all rows at once would be the most a step needs.
    def of_row(words_w: jax.Array) -> jax.Array:
        place_1b = jnp.arange(32, dtype=jnp.uint32)[None, :]
        return ((words_w[:, None] >> place_1b) & jnp.uint32(1) == 1).reshape(-1)

    return jax.lax.map(of_row, words_sw, batch_size=min(_MASK_ROWS, words_sw.shape[0]))


def obey(
    logits_sv: Float[Array, "s v"], wanted_sv: Float[Array, "s v"], may_sv: Bool[Array, "s v"]
) -> Float[Array, "s v"]:
    """`wanted`, with -inf where a token may not be chosen. A row in which nothing is left then takes plain `logits` instead:
    a grammar must always find a token."""
    wanted_sv = jnp.where(may_sv, wanted_sv, -jnp.inf)
    is_stuck_s1 = max_over("vocab", jnp.max(wanted_sv, axis=1, keepdims=True)) == -jnp.inf
    return jnp.where(is_stuck_s1 & may_sv, logits_sv, wanted_sv)


def keep_top(
    logits_sv: Float[Array, "s v"],
    top_k_s: Int[Array, " s"],
    top_p_s: Float[Array, " s"],
    min_p_s: Float[Array, " s"],
    any_top_k: Bool[Array, ""],
    any_top_p: Bool[Array, ""],
) -> Float[Array, "s v"]:
    """-inf for all but the likeliest tokens: at least `min_p` times the best, the `top_k` best (0: all), the `top_p` mass.

    Applied in this order, each on what the one before left. Tokens as likely as the last one kept are kept too. Where no row
    has a `top_k` or a `top_p`, it is skipped.
    """
    weights_sv = jnp.exp(logits_sv - max_over("vocab", jnp.max(logits_sv, axis=1, keepdims=True)))
    kept_sv = weights_sv >= min_p_s[:, None]
    keys_sv = _sortable(logits_sv)

    def tokens_of(at_least_sv: Bool[Array, "s v"]) -> Int[Array, " s"]:
        return jnp.sum(at_least_sv & kept_sv, axis=1)

    kept_sv = jax.lax.cond(
        any_top_k,
        lambda kept: kept & ((keys_sv >= _highest(tokens_of, top_k_s, keys_sv)[:, None]) | (top_k_s <= 0)[:, None]),
        lambda kept: kept,
        kept_sv,
    )
    mass_sv = jnp.where(kept_sv, weights_sv, 0.0)
    wanted_s = top_p_s * sum_over("vocab", jnp.sum(mass_sv, axis=1))

    def mass_of(at_least_sv: Bool[Array, "s v"]) -> Float[Array, " s"]:
        return jnp.sum(jnp.where(at_least_sv, mass_sv, 0.0), axis=1)

    kept_sv = jax.lax.cond(
        any_top_p,
        lambda kept: kept & ((keys_sv >= _highest(mass_of, wanted_s, keys_sv)[:, None]) | (top_p_s >= 1.0)[:, None]),
        lambda kept: kept,
        kept_sv,
    )
    return jnp.where(kept_sv, logits_sv, -jnp.inf)


def _sortable(x: Float[Array, "s v"]) -> UInt[Array, "s v"]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _highest(
    amount_of: Callable[[jax.Array], jax.Array], wanted_s: jax.Array, keys_sv: UInt[Array, "s v"]
) -> jax.Array:
    """The highest threshold per row, u32[s], for which `amount_of(keys >= threshold)` is at least `wanted`, as it must be
    for 0. Its bits are found one at a time, or four where devices share the vocabulary and each turn is a sum over them.
    """
    bits = 1 if num_shards("vocab") == 1 else 4

    def one_digit(turn, threshold_s):
        shift = (32 - bits * (turn + 1)).astype(jnp.uint32)
        raised = [threshold_s | (jnp.uint32(digit) << shift) for digit in range(1, 1 << bits)]
        amount_ds = sum_over("vocab", jnp.stack([amount_of(keys_sv >= raised_s[:, None]) for raised_s in raised]))
        digit_d1 = jnp.arange(1, 1 << bits, dtype=jnp.uint32)[:, None]
        digit_s = jnp.max(jnp.where(amount_ds >= wanted_s[None, :], digit_d1, 0), axis=0)
        return threshold_s | (digit_s << shift)

    return jax.lax.fori_loop(0, 32 // bits, one_digit, jnp.zeros(keys_sv.shape[0], jnp.uint32))
