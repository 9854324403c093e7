"""The training loop of `tiny`: curriculum, weighted loss, resumable checkpoints, a log of JSON lines."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

from tiny import tasks
from tiny.model import Config, forward, init
from tiny.optim import make_optimizer

# what one token of each kind weighs in the loss: sure answers count more than text, see tasks.KINDS
WEIGHTS = (0.0, 1.0, 4.0, 8.0, 2.0, 2.0, 1.5, 4.0)


class Stage(NamedTuple):
    """Steps up to `until` draw a row length by `lengths` (length -> share) and rows by `mix`; both per step."""

    until: int
    tokens: int
    lengths: dict[int, float]
    mix: dict[str, float]


FULL = {"text": 0.25, "stream": 0.05, "recall": 0.2, "needle": 0.15, "arithmetic": 0.2, "chat": 0.15}
# long rows cost most and only lookups need them; the library text between the pairs trains the text as well
LONG = {"stream": 0.1, "recall": 0.4, "needle": 0.35, "chat": 0.15}
CURRICULUM = (
    Stage(700, 2048, {64: 1.0}, {"stream": 0.7, "recall": 0.3}),
    Stage(900, 4096, {64: 0.3, 256: 0.7}, {"stream": 0.25, "recall": 0.35, "text": 0.2, "needle": 0.2}),
    Stage(1200, 4096, {64: 0.1, 256: 0.65, 1024: 0.25}, FULL),
    Stage(1500, 4096, {256: 0.6, 1024: 0.2, 2048: 0.2}, FULL),
    Stage(10**9, 4096, {256: 0.5, 1024: 0.2, 2048: 0.3}, FULL),
)


class Settings(NamedTuple):
    """Everything that decides the outcome of a run, next to the model sizes."""

    steps: int
    seed: int = 0
    optimizer: str = "muon"
    lr: float = 4e-3
    warmup: int = 100
    decay: int = 1000


def plan(step: int, seed: int, curriculum=CURRICULUM):
    """(numpy Generator, rows, length, mix) of a step: a function of seed and step only, so runs can resume."""
    rng = np.random.default_rng([seed, step])
    stage = next(s for s in curriculum if step < s.until)
    shares = np.array(list(stage.lengths.values()))
    length = int(rng.choice(list(stage.lengths), p=shares / shares.sum()))
    return rng, max(1, stage.tokens // length), length, LONG if length >= 1024 else stage.mix


def loss_and_counts(params, tokens: jax.Array, kind: jax.Array, cfg: Config):
    """Weighted mean cross entropy in nats, and [3, kinds] sums over tokens: cross entropy, hits, number.

    tokens, kind: [batch, length]; the token at position t is predicted from those before it.
    """
    logits = forward(params, tokens, cfg)[:, :-1]
    target, kind = tokens[:, 1:], kind[:, 1:]
    true = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - true
    weight = jnp.asarray(WEIGHTS)[kind]
    one_hot = jax.nn.one_hot(kind.ravel(), len(tasks.KINDS))
    # a hit is a token no other token beats; that needs no argmax, which is slow on CPUs
    hit = (true >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    counts = jnp.stack([nats.ravel() @ one_hot, hit.ravel() @ one_hot, one_hot.sum(0)])
    return (nats * weight).sum() / jnp.maximum(weight.sum(), 1.0), counts


def make_step(cfg: Config, optimizer: optax.GradientTransformation):
    """The jitted training step; one compilation per row length."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, kind):
        (loss, counts), grads = jax.value_and_grad(loss_and_counts, has_aux=True)(params, tokens, kind, cfg)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, counts

    return step


def open_checkpoints(folder: Path) -> ocp.CheckpointManager:
    """The two newest checkpoints are kept."""
    return ocp.CheckpointManager(folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True))


def load_params(folder: Path, cfg: Config, settings: Settings):
    """(step, params) of the newest checkpoint of a run."""
    params, state = start(cfg, settings)
    with open_checkpoints(folder / "checkpoints") as manager:
        step = manager.latest_step()
        saved = manager.restore(step, args=ocp.args.StandardRestore({"params": params, "state": state}))
    return step, saved["params"]


def start(cfg: Config, settings: Settings):
    """Fresh (params, optimiser state)."""
    params = init(cfg, jax.random.key(settings.seed))
    return params, optimizer_of(settings).init(params)


def optimizer_of(s: Settings) -> optax.GradientTransformation:
    return make_optimizer(s.optimizer, s.lr, s.steps, s.warmup, s.decay)


def train(
    cfg: Config,
    settings: Settings,
    lex: tasks.Lexicon,
    folder: Path,
    *,
    stop_at: int | None = None,
    log_every: int = 20,
    save_every: int = 100,
    curriculum=CURRICULUM,
    probe=None,
    probe_every: int = 200,
):
    """Train from the newest checkpoint in folder (or from scratch) to settings.steps, or to stop_at; -> params.

    probe: params -> dict of numbers, called now and then and written to the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params, state = start(cfg, settings)
    step_fn = make_step(cfg, optimizer_of(settings))
    stop = min(settings.steps, stop_at or settings.steps)
    sums, seen, began = np.zeros((3, len(tasks.KINDS))), 0, time.time()
    with open_checkpoints(folder / "checkpoints") as manager, open(folder / "log.jsonl", "a") as log:
        first = 0
        if manager.latest_step() is not None:
            first = manager.latest_step()
            restored = manager.restore(first, args=ocp.args.StandardRestore({"params": params, "state": state}))
            params, state = restored["params"], restored["state"]
        total = sum(r * n for r, n in (plan(i, settings.seed, curriculum)[1:3] for i in range(first)))
        bar = tqdm(range(first, stop), initial=first, total=stop, mininterval=5.0)
        for i in bar:
            rng, rows, length, mix = plan(i, settings.seed, curriculum)
            tokens, kind, _ = tasks.make_batch(lex, rng, rows, length, mix)
            params, state, _, counts = step_fn(params, state, tokens, kind)
            sums += np.asarray(counts)
            seen += rows * length
            total += rows * length
            done = i + 1
            if done % log_every == 0 or done == stop:
                line = {"step": done, "tokens": total, "tokens_per_s": round(seen / (time.time() - began))}
                for k in range(1, len(tasks.KINDS)):
                    if sums[2, k]:
                        line[f"loss_{tasks.KINDS[k]}"] = round(float(sums[0, k] / sums[2, k]), 4)
                        line[f"hit_{tasks.KINDS[k]}"] = round(float(sums[1, k] / sums[2, k]), 4)
                bar.set_postfix_str(" ".join(f"{k[5:]} {v:.2f}" for k, v in line.items() if k.startswith("loss_")))
                if probe and (done % probe_every == 0 or done == stop):
                    line |= probe(params)
                log.write(json.dumps(line) + "\n")
                log.flush()
                sums, seen, began = np.zeros_like(sums), 0, time.time()
            if done % save_every == 0 or done == stop:
                manager.save(done, args=ocp.args.StandardSave({"params": params, "state": state}))
                manager.wait_until_finished()
    return params
