"""The seeded workload that every engine runs: prompts are random token ids, so no tokenizer takes part.

A row is one number of the final table. Its prompts are the same for every engine and every machine.
"""

import random
from typing import Any

VOCAB = 151_936
SEED = 20_260
DECODE_TOKENS = 32
MIXED_REQUESTS, MIXED_TOKENS = 32, 64
# Longest sequence of any row: 2048 prompt tokens and what follows; engines may reserve memory for it.
MAX_MODEL_LEN = 4096
# Room for keys and values of all sequences together, so that peak memory is compared at equal capacity.
KV_TOKENS = 24_576

ROWS = ("decode_128", "decode_1024", "prefill_512", "prefill_2048", "mixed_32")
UNITS = {"decode": "output tokens/s", "prefill": "prompt tokens/s", "batch": "output tokens/s"}


def make_row(name: str) -> dict[str, Any]:
    """One row: its kind, its prompts (lists of token ids) and the number of tokens to generate per prompt.

    decode_C: one prompt of C tokens; rate over the tokens after the first.
    prefill_C: one prompt of C tokens; C divided by the time to the first token.
    mixed_N: N prompts of 32 to 512 tokens at once; all output tokens divided by the time until the last one.
    """
    kind, size = name.split("_")
    rng = random.Random(f"{SEED}/{name}")
    lengths = [rng.randint(32, 512) for _ in range(int(size))] if kind == "mixed" else [int(size)]
    return {
        "name": name,
        "kind": "batch" if kind == "mixed" else kind,
        "prompts": [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths],
        "new_tokens": {"decode": DECODE_TOKENS, "prefill": 1, "mixed": MIXED_TOKENS}[kind],
    }


def make_workload(checkpoint: str, cache: str, dtype: str, threads: int, rows: list[str]) -> dict[str, Any]:
    """What a worker reads. `checkpoint` is a Hugging Face folder, `cache` a folder for converted models."""
    return {
        "checkpoint": checkpoint,
        "cache": cache,
        "dtype": dtype,
        "threads": threads,
        "max_model_len": MAX_MODEL_LEN,
        "kv_tokens": KV_TOKENS,
        "max_num_seqs": MIXED_REQUESTS,
        "rows": [make_row(name) for name in rows],
    }
