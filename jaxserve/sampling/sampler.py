"""Choosing tokens on the device, inside the step.

Random numbers depend on a request's seed and on which of its tokens is chosen, never on the row or the step, so a
request gives the same tokens in any batch and after a preemption. What no row of a step asks for is skipped at run time
(`lax.cond`), so one compiled step serves greedy and every kind of sampling.

Where devices share the vocabulary, each keeps its part of the logits and of the state: what crosses devices is a number or
two per row, never the logits.
"""

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt

from jaxserve.request import MAX_LOGPROBS
from jaxserve.sampling.logits import IN_PROMPT, ban, keep_top, mask_words, obey, penalise, unpack
from jaxserve.sharding.collectives import gather, max_over, num_shards, shard_index, sum_over, take, to_local

_ARGMAX_BLOCK = 128  # tokens compared at a time when taking the best
_CDF_BLOCK = 512  # tokens summed at a time when drawing
PROMPT_CHUNK = 64  # prompt positions whose logits exist at once


T = TypeVar("T")  # what the tree holds: arrays of NumPy or JAX


@struct.dataclass
class SamplerState(Generic[T]):
    """What the device remembers of running sequences, by slot `r`."""

    last_r: T  # i32[r]; the token sampled last
    counts_rv: T  # i32[r v]; times a token occurs in the answer, plus IN_PROMPT
    bias_rv: T  # f32[r v]; added to the logits
    masks_rw: T  # u32[r w]; a bit for each token of the whole vocabulary: whether a grammar allows it


# Logical axes of its arrays. A mask is small, and its words would not split evenly: all devices have all of it.
STATE_AXES = {
    "last_r": ("replica",),
    "counts_rv": ("replica", "vocab"),
    "bias_rv": ("replica", "vocab"),
    "masks_rw": ("replica", None),
}


@struct.dataclass
class Asks(Generic[T]):
    """What any row of a step asks for, bool[] each. The rest is skipped. Replicas of the weights are told the same: which
    sums devices make must not depend on rows that only some of them see."""

    edits: T
    bans: T
    masks: T
    draws: T
    top_k: T
    top_p: T
    min_p: T
    logprobs: T


@struct.dataclass
class SamplingInputs(Generic[T]):
    """How each row of a step chooses its token."""

    slot_s: T  # i32[s]; r (one past the last slot) for rows that sample nothing
    temperature_s: T  # f32[s]; 0: greedy
    top_k_s: T  # i32[s]; 0: all
    top_p_s: T  # f32[s]
    min_p_s: T  # f32[s]
    presence_s: T  # f32[s]
    frequency_s: T  # f32[s]
    repetition_s: T  # f32[s]
    seed_s: T  # u32[s]
    index_s: T  # i32[s]; which token of the answer this is
    is_edited_s: T  # bool[s]; whether the slot's counts and bias apply
    banned_sb: T  # i32[s b]; v and above: padding
    is_masked_s: T  # bool[s]; whether the slot's mask applies
    asks: Asks[T]


@struct.dataclass
class Logprobs:
    """Log-probabilities of given tokens and of the likeliest ones, from raw logits."""

    token: jax.Array  # f32[n]
    rank: jax.Array  # i32[n]; 1: the likeliest
    top_ids: jax.Array  # i32[n MAX_LOGPROBS], best first
    top: jax.Array  # f32[n MAX_LOGPROBS]


def empty_state(num_slots: int, vocab_size: int) -> SamplerState[jax.Array]:
    """A state in which nothing was sampled yet."""
    return SamplerState(
        last_r=jnp.zeros(num_slots, jnp.int32),
        counts_rv=jnp.zeros((num_slots, vocab_size), jnp.int32),
        bias_rv=jnp.zeros((num_slots, vocab_size), jnp.float32),
        masks_rw=jnp.zeros((num_slots, mask_words(vocab_size)), jnp.uint32),
    )


def start_slot(
    state: SamplerState[jax.Array],
    slot: Int[Array, ""],
    is_first: jax.Array,
    floor: Float[Array, ""],
    prompt_c: Int[Array, " c"],
    answer_c: Int[Array, " c"],
    bias_ids_c: Int[Array, " c"],
    bias_c: Float[Array, " c"],
) -> SamplerState[jax.Array]:
    """Load a sequence's history and bias into a slot, a chunk at a time; the first chunk clears what was there.

    `floor` is the bias of tokens not listed: 0, or -inf where only the listed ones are allowed. Ids past the
    vocabulary are padding.
    """
    num_slots, vocab = state.counts_rv.shape
    slot = to_local("replica", slot, num_slots)
    prompt_c, answer_c, bias_ids_c = (to_local("vocab", ids, vocab) for ids in (prompt_c, answer_c, bias_ids_c))
    counts_v = jnp.where(is_first, 0, state.counts_rv[jnp.minimum(slot, num_slots - 1)])
    counts_v = counts_v.at[prompt_c].set(IN_PROMPT, mode="drop").at[answer_c].add(1, mode="drop")
    bias_v = jnp.where(is_first, floor, state.bias_rv[jnp.minimum(slot, num_slots - 1)])
    bias_v = bias_v.at[bias_ids_c].set(bias_c, mode="drop")
    return dataclasses.replace(
        state,
        counts_rv=state.counts_rv.at[slot].set(counts_v, mode="drop"),
        bias_rv=state.bias_rv.at[slot].set(bias_v, mode="drop"),
    )


def set_masks(
    state: SamplerState[jax.Array], slot_c: Int[Array, " c"], masks_cw: UInt[Array, "c w"]
) -> SamplerState[jax.Array]:
    """Lay down what some slots may choose next. Each replica counts its slots from 0; those past the last are padding."""
    return dataclasses.replace(state, masks_rw=state.masks_rw.at[slot_c].set(masks_cw, mode="drop"))


def sample(
    logits_sv: Float[Array, "s v"], state: SamplerState[jax.Array], inputs: SamplingInputs[jax.Array]
) -> tuple[Int[Array, " s"], Logprobs, SamplerState[jax.Array]]:
    """Choose a token per row. Returns tokens, their log-probabilities (zeros if not wanted), and the new state."""
    num_slots = state.last_r.shape[0]
    asks = inputs.asks
    is_plain = ~(asks.edits | asks.bans | asks.masks | asks.draws)
    # One choice around all: a `cond` that hands the logits on would copy them.
    token_s = jax.lax.cond(is_plain, _argmax, lambda x: _choose(_edit(x, state, inputs), inputs), logits_sv)
    logprobs = jax.lax.cond(
        asks.logprobs,
        lambda x: logprobs_of(x, token_s),
        lambda x: _no_logprobs(x.shape[0]),
        logits_sv,
    )
    edited_slot_s = jnp.where(inputs.is_edited_s, inputs.slot_s, num_slots)
    state = dataclasses.replace(
        state,
        last_r=state.last_r.at[inputs.slot_s].set(token_s, mode="drop"),
        counts_rv=state.counts_rv.at[edited_slot_s, to_local("vocab", token_s, logits_sv.shape[1])].add(1, mode="drop"),
    )
    return token_s, logprobs, state


def _edit(
    logits_sv: Float[Array, "s v"], state: SamplerState[jax.Array], inputs: SamplingInputs[jax.Array]
) -> Float[Array, "s v"]:
    """Penalties, bias, banned tokens and grammars, for the rows that have them."""
    slot_s = jnp.minimum(inputs.slot_s, state.last_r.shape[0] - 1)

    def edit(logits_sv):
        counts_sv = state.counts_rv[slot_s]
        edited = penalise(logits_sv, counts_sv, inputs.repetition_s, inputs.frequency_s, inputs.presence_s)
        return jnp.where(inputs.is_edited_s[:, None], edited + state.bias_rv[slot_s], logits_sv)

    def mask(edited_sv):
        may_sv = unpack(state.masks_rw[slot_s], logits_sv.shape[1])
        return jnp.where(inputs.is_masked_s[:, None], obey(logits_sv, edited_sv, may_sv), edited_sv)

    edited_sv = jax.lax.cond(inputs.asks.edits, edit, lambda x: x, logits_sv)
    banned_sb = to_local("vocab", inputs.banned_sb, logits_sv.shape[1])
    edited_sv = jax.lax.cond(inputs.asks.bans, lambda x: ban(x, banned_sb), lambda x: x, edited_sv)
    return jax.lax.cond(inputs.asks.masks, mask, lambda x: x, edited_sv)


def _choose(logits_sv: Float[Array, "s v"], inputs: SamplingInputs[jax.Array]) -> Int[Array, " s"]:
    """The likeliest token, or a random one for rows with a temperature."""
    greedy_s = _argmax(logits_sv)
    is_random_s = inputs.temperature_s > 0
    return jax.lax.cond(
        inputs.asks.draws,
        lambda x: jnp.where(is_random_s, _draw(x, inputs), greedy_s),
        lambda x: greedy_s,
        logits_sv,
    )


def logprobs_of(logits_nv: Float[Array, "n v"], token_n: Int[Array, " n"]) -> Logprobs:
    """Log-probabilities of `token_n` under raw logits, with the likeliest alternatives."""
    chosen_n = _of_token(logits_nv, token_n)
    most_n = max_over("vocab", jnp.max(logits_nv, axis=1))
    norm_n = most_n + jnp.log(sum_over("vocab", jnp.sum(jnp.exp(logits_nv - most_n[:, None]), axis=1)))
    top_nk, top_ids_nk = _top(logits_nv, MAX_LOGPROBS)
    num_above_n = sum_over("vocab", jnp.sum(logits_nv > chosen_n[:, None], axis=1))
    pad = ((0, 0), (0, MAX_LOGPROBS - top_nk.shape[1]))
    return Logprobs(
        token=chosen_n - norm_n,
        rank=(1 + num_above_n).astype(jnp.int32),
        top_ids=jnp.pad(top_ids_nk.astype(jnp.int32), pad),
        top=jnp.pad(top_nk - norm_n[:, None], pad, constant_values=-jnp.inf),
    )


def _of_token(logits_nv: Float[Array, "n v"], token_n: Int[Array, " n"]) -> Float[Array, " n"]:
    """The logit of one token of every row."""
    local_n = to_local("vocab", token_n, logits_nv.shape[1])
    found_n1 = jnp.take_along_axis(logits_nv, local_n[:, None], axis=1, mode="fill", fill_value=-jnp.inf)
    return max_over("vocab", found_n1[:, 0])


def _top(logits_nv: Float[Array, "n v"], count: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The largest logits and their tokens: the largest of every device's largest."""
    top_nk, ids_nk = jax.lax.top_k(logits_nv, min(count, logits_nv.shape[1]))
    if num_shards("vocab") == 1:
        return top_nk, ids_nk
    ids_nk = gather("vocab", ids_nk + shard_index("vocab") * logits_nv.shape[1], axis=1)
    top_nk, place_nk = jax.lax.top_k(gather("vocab", top_nk, axis=1), min(count, ids_nk.shape[1]))
    return top_nk, jnp.take_along_axis(ids_nk, place_nk, axis=1)


def prompt_logprobs(
    head: Callable[[jax.Array], jax.Array],
    hidden_te: Float[Array, "t e"],
    wanted_t: Int[Array, " t"],
    target_t: Int[Array, " t"],
    num_wanted: Int[Array, ""],
) -> Logprobs:
    """Log-probabilities of `target_t[i]` after token `wanted_t[i]`, for the first `num_wanted` entries.

    A chunk of positions at a time, so that `[t v]` logits never exist; the loop runs only as far as it must.
    """
    num_tokens = wanted_t.shape[0]
    chunk = min(PROMPT_CHUNK, num_tokens)
    if chunk == num_tokens:
        # Not a loop of one turn: its body would not depend on the turn, and XLA would compute it ahead, wanted or not.
        return jax.lax.cond(
            num_wanted > 0,
            lambda hidden_te: logprobs_of(head(take("tokens", hidden_te, wanted_t)), target_t),
            lambda hidden_te: _no_logprobs(num_tokens),
            hidden_te,
        )
    pad = (0, -num_tokens % chunk)
    wanted_t, target_t = jnp.pad(wanted_t, pad), jnp.pad(target_t, pad)

    def one_chunk(index, out: Logprobs) -> Logprobs:
        begin = index * chunk
        token_c = jax.lax.dynamic_slice_in_dim(wanted_t, begin, chunk)
        part = logprobs_of(
            head(take("tokens", hidden_te, token_c)), jax.lax.dynamic_slice_in_dim(target_t, begin, chunk)
        )
        return jax.tree.map(lambda o, p: jax.lax.dynamic_update_slice_in_dim(o, p, begin, axis=0), out, part)

    scores = jax.lax.fori_loop(0, (num_wanted + chunk - 1) // chunk, one_chunk, _no_logprobs(wanted_t.shape[0]))
    return jax.tree.map(lambda x: x[:num_tokens], scores)


def _argmax(logits_sv: Float[Array, "s v"]) -> Int[Array, " s"]:
    """The first of the likeliest tokens. In two levels, because XLA on CPU runs a long argmax element by element."""
    logits_snb = _in_blocks(logits_sv, _ARGMAX_BLOCK, -jnp.inf)
    block_s = jnp.argmax(jnp.max(logits_snb, axis=2), axis=1)
    best_sb = _block(logits_snb, block_s)
    within_s = jnp.argmax(best_sb, axis=1)
    token_s = (block_s * _ARGMAX_BLOCK + within_s).astype(jnp.int32)
    if num_shards("vocab") == 1:
        return token_s
    best_sp = gather("vocab", jnp.max(best_sb, axis=1)[:, None], axis=1)
    return _from_shard(jnp.argmax(best_sp, axis=1), token_s, logits_sv.shape[1])


def _from_shard(shard_s: Int[Array, " s"], token_s: Int[Array, " s"], size: int) -> Int[Array, " s"]:
    """The token that device `shard_s` has found in its part of the vocabulary, for all devices."""
    here = shard_index("vocab")
    return sum_over("vocab", jnp.where(shard_s == here, token_s + here * size, 0)).astype(jnp.int32)


def _in_blocks(x_sv: Float[Array, "s v"], size: int, fill: float) -> Float[Array, "s n b"]:
    """Rows cut into blocks; the last one is filled up."""
    num_rows, vocab = x_sv.shape
    return jnp.pad(x_sv, ((0, 0), (0, -vocab % size)), constant_values=fill).reshape(num_rows, -1, size)


def _block(x_snb: Float[Array, "s n b"], index_s: Int[Array, " s"]) -> Float[Array, "s b"]:
    """One block of every row."""
    return jnp.take_along_axis(x_snb, index_s[:, None, None], axis=1)[:, 0]


def _no_logprobs(count: int) -> Logprobs:
    return Logprobs(
        token=jnp.zeros(count, jnp.float32),
        rank=jnp.zeros(count, jnp.int32),
        top_ids=jnp.zeros((count, MAX_LOGPROBS), jnp.int32),
        top=jnp.zeros((count, MAX_LOGPROBS), jnp.float32),
    )


def _draw(logits_sv: Float[Array, "s v"], inputs: SamplingInputs[jax.Array]) -> Int[Array, " s"]:
    """One token per row by its probability, for rows with a temperature."""
    temperature_s = jnp.where(inputs.temperature_s > 0, inputs.temperature_s, 1.0)
    # Shifted before scaling: with a tiny temperature the best token must stay finite.
    logits_sv = (logits_sv - max_over("vocab", jnp.max(logits_sv, axis=1, keepdims=True))) / temperature_s[:, None]
    asks = inputs.asks

    def filtered(logits_sv: jax.Array) -> jax.Array:
        return keep_top(logits_sv, inputs.top_k_s, inputs.top_p_s, inputs.min_p_s, asks.top_k, asks.top_p)

    logits_sv = jax.lax.cond(asks.top_k | asks.top_p | asks.min_p, filtered, lambda x: x, logits_sv)
    weights_sv = jnp.exp(logits_sv - max_over("vocab", jnp.max(logits_sv, axis=1, keepdims=True)))
    return _inverse_cdf(weights_sv, jax.vmap(_uniform)(inputs.seed_s, inputs.index_s))


def _uniform(seed: UInt[Array, ""], index: Int[Array, ""]) -> Float[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), index), dtype=jnp.float32)


def _inverse_cdf(weights_sv: Float[Array, "s v"], uniform_s: Float[Array, " s"]) -> Int[Array, " s"]:
    """The token at which the running sum of weights passes `uniform` of the total; by levels: devices, blocks, tokens."""
    weights_snb = _in_blocks(weights_sv, _CDF_BLOCK, 0.0)
    sum_sn = jnp.sum(weights_snb, axis=2)
    sum_sp = gather("vocab", jnp.sum(sum_sn, axis=1)[:, None], axis=1)
    target_s = uniform_s * jnp.sum(sum_sp, axis=1)
    shard_s, before_s = _pass(sum_sp, target_s)
    target_s = target_s - before_s
    block_s, before_s = _pass(sum_sn, target_s)
    within_s, _ = _pass(_block(weights_snb, block_s), target_s - before_s)
    token_s = (block_s * _CDF_BLOCK + within_s).astype(jnp.int32)
    return token_s if num_shards("vocab") == 1 else _from_shard(shard_s, token_s, weights_sv.shape[1])


def _pass(weights_sn: Float[Array, "s n"], target_s: Float[Array, " s"]) -> tuple[jax.Array, jax.Array]:
    """First index with weight whose running sum exceeds the target, else the last one with weight; and the sum before."""
    cumulative_sn = jnp.cumsum(weights_sn, axis=1)
    has_weight_sn = weights_sn > 0
    passes_sn = (cumulative_sn > target_s[:, None]) & has_weight_sn
    first_s = jnp.argmax(passes_sn, axis=1)
    last_s = weights_sn.shape[1] - 1 - jnp.argmax(has_weight_sn[:, ::-1], axis=1)
    index_s = jnp.where(jnp.any(passes_sn, axis=1), first_s, last_s)
    picked_s1 = index_s[:, None]
    before_s1 = jnp.take_along_axis(cumulative_sn, picked_s1, axis=1) - jnp.take_along_axis(
        weights_sn, picked_s1, axis=1
    )
    return index_s, before_s1[:, 0]
