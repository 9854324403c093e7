"""A batch of questions about shared documents through run-batch: planned groups against the order of the file.

    python benchmarks/engine/batch_groups.py tiny

Both engines live at once, with a pool that holds some of the documents, and take turns (A B A B); each run begins with
an empty cache. Both evict what was least recently used. Prompts are random token ids. Answers must be the same (float32).
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import append

from jaxserve import LLM
from jaxserve.batch.lines import read_lines
from jaxserve.cli.run_batch import answer_lines

RESULTS = Path(__file__).resolve().parent.parent / "results" / "batch_groups.jsonl"
BLOCK, VOCABULARY = 32, 1000
COUNTERS = ("prompt_tokens", "cached_tokens", "steps", "preemptions")


def job(num_documents: int, num_questions: int, tokens: int) -> list[str]:
    """Lines of a batch file, shuffled: documents of half to three halves of `tokens`."""
    rng = random.Random(0)
    draw = lambda least, most: [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(least, most))]  # noqa: E731
    lines = []
    for number in range(num_documents):
        document = draw(tokens // 2, 3 * tokens // 2)
        answer = (40, 80) if rng.random() < 0.3 else (4, 16)
        for question in range(num_questions):
            prompt = document + draw(10, 40)
            body = {"prompt": prompt, "max_tokens": rng.randint(*answer), "temperature": 0, "ignore_eos": True}
            lines.append(json.dumps({"custom_id": f"{number}-{question}", "url": "/v1/completions", "body": body}))
    rng.shuffle(lines)
    return lines


def run(llm: LLM, source: Path) -> tuple[float, dict[str, int], dict[str, str]]:
    """Seconds, what was counted, and the answers."""
    llm._engine.scheduler.clear_cache()
    before = llm.metrics()
    with tempfile.TemporaryFile() as results, source.open("rb") as file:
        lines = list(read_lines(file))
        begin_s = time.perf_counter()
        print(answer_lines(llm, iter(lines), ["tiny"], results, len(lines), False), file=sys.stderr)
        seconds = time.perf_counter() - begin_s
        results.seek(0)
        found = map(json.loads, results)
        answers = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in found}
    after = llm.metrics()
    return seconds, {name: after[name] - before[name] for name in COUNTERS}, answers


def main(argv: list[str] | None = None) -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=800, help="of a document, on average")
    parser.add_argument("--pool", type=int, default=4096, help="tokens")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args(argv)
    engines = {
        policy: LLM(
            options.model,
            scheduling_policy=policy,
            dtype="float32",
            num_kv_blocks=options.pool // BLOCK,
            block_size=BLOCK,
            max_model_len=2048,
            max_num_seqs=16,
            max_num_batched_tokens=256,
            progress=False,
        )
        for policy in ("fcfs", "batchllm")
    }
    times: dict[str, list[float]] = {policy: [] for policy in engines}
    counts, answers = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "job.jsonl"
        source.write_text("\n".join(job(options.documents, options.questions, options.tokens)))
        for _ in range(options.repeats):
            for policy, llm in engines.items():
                seconds, counts[policy], answers[policy] = run(llm, source)
                times[policy].append(seconds)
    assert answers["fcfs"] == answers["batchllm"], "grouping has changed an answer"
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    case = {key: getattr(options, key) for key in ("model", "documents", "questions", "tokens", "pool")}
    RESULTS.parent.mkdir(exist_ok=True)
    for policy, seconds in times.items():
        print(f"{policy}: {statistics.median(seconds):.1f} s, {counts[policy]}")
        append(RESULTS, case | {"policy": policy, "jax": jax.__version__}, "job", "s", seconds, **counts[policy])
    print(f"fcfs / batchllm, median of {options.repeats} pairs: {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
