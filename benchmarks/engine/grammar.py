"""What structured outputs cost: 32 rows of the bundled model with a JSON schema, with an expression, and without.

    python benchmarks/engine/grammar.py

The cases take turns (A B C A B C). Every answer has the same number of tokens. Rows with a grammar cannot be planned ahead,
so a step of nothing but such rows does not overlap with the host's work; "plain, no overlap" shows what that alone costs.
Beside it: what one mask costs on the host.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import append_line, machine, spread

from jaxserve import LLM, SamplingParams
from jaxserve.sampling.grammar import Grammars
from jaxserve.structured import StructuredOutputsParams

ROWS, TOKENS = 32, 128
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {}}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}
GRAMMARS: dict[str, Any] = {"schema": {"json": SCHEMA}, "expression": {"regex": "([a-z]{2,9} ){1000}"}}
RESULTS = Path(__file__).resolve().parent.parent / "results" / "grammar.jsonl"


def tokens_per_second(llm: LLM, params: SamplingParams) -> float:
    """Of answers; prompts are short."""
    begin_s = time.perf_counter()
    outputs = llm.generate([f"# {number}\ndef " for number in range(ROWS)], params)
    seconds = time.perf_counter() - begin_s
    assert all(len(output.outputs[0].token_ids) == TOKENS for output in outputs)
    return ROWS * TOKENS / seconds


def mask_us(llm: LLM, wanted: dict[str, Any], token_ids: list[int]) -> list[float]:
    """Microseconds for each token of an answer: it is taken in, and the next mask is made."""
    tokenizer = llm.tokenizer
    compiled = Grammars(tokenizer.as_json, 1024, (2,)).compile(StructuredOutputsParams(**wanted))
    taken = list[float]()
    for _ in range(5):
        guide = compiled.start()
        for token in token_ids:
            begin_s = time.perf_counter()
            guide.advance(token)
            taken.append(1e6 * (time.perf_counter() - begin_s))
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    options: dict[str, Any] = {"dtype": "float32", "max_num_seqs": ROWS, "max_model_len": 256, "progress": False}
    overlapping, waiting = LLM("tiny", **options), LLM("tiny", **options, async_scheduling=False)
    plain: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}
    cases = {
        "plain": (overlapping, SamplingParams(**plain)),
        "plain, no overlap": (waiting, SamplingParams(**plain)),
        "drawn": (overlapping, SamplingParams(**plain | {"temperature": 1.0, "seed": 1})),
        **{
            name: (overlapping, SamplingParams(**plain, structured_outputs=wanted)) for name, wanted in GRAMMARS.items()
        },
    }
    for case in cases.values():
        tokens_per_second(*case)
    rounds = [{name: tokens_per_second(*case) for name, case in cases.items()} for _ in range(args.repeats)]
    facts = {"benchmark": "grammar", "model": "tiny", "rows": ROWS, "tokens": TOKENS, "machine": machine()}
    for name in cases:
        values = [one[name] for one in rounds]
        ratio = statistics.median(one[name] / one["plain"] for one in rounds)
        print(f"{name}: {statistics.median(values):.0f} tokens/s, {ratio:.2f} of plain (medians of {len(rounds)})")
        append_line(RESULTS, facts | {"case": name, "tokens_per_s": spread(values), "of_plain": ratio})
    for name, wanted in GRAMMARS.items():
        (answer,) = overlapping.generate("def ", cases[name][1])[0].outputs
        taken = mask_us(overlapping, wanted, answer.token_ids)
        print(f"{name}: {statistics.median(taken):.1f} us for a token and the next mask, {max(taken):.0f} at most")
        append_line(RESULTS, facts | {"case": name, "mask_us": spread(taken)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
