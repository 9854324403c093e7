"""Measure how fast a model is served: by this process, or by a server that speaks OpenAI's protocol.

examples:
  jaxserve bench throughput --model tiny --num-prompts 64 --input-len 128 --output-len 64
  jaxserve bench serve --base-url http://127.0.0.1:8000 --num-prompts 200 --max-concurrency 16
"""

COMMANDS = {
    "throughput": (
        "jaxserve.cli.bench_throughput",
        "all prompts at once, as a batch job: tokens per second, TTFT, TPOT",
    ),
    "latency": ("jaxserve.cli.bench_latency", "a batch again and again: how long one takes"),
    "serve": ("jaxserve.cli.bench_serve", "load on a server, ours or another: TTFT, TPOT, ITL, goodput"),
}
