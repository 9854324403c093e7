"""Worker: torch's attention, timed when asked. Started by `contenders.py`; needs torch alone.

    python benchmarks/kernels/torch_attention.py cuda        # requests on standard input, answers on standard output

Each is a line of JSON. `prepare` makes inputs, compiles, and captures a loop of calls in a CUDA graph, because to start a
call from Python takes longer than a short decode does; `run` replays it. Compiling is not part of the time.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Runs = dict[str, Callable[[], float]]


def prepare(request: dict[str, Any], device: str) -> Callable[[], float]:
    """A function that runs all calls once, and returns seconds per call."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    size, number = request["size"], request["number"]
    dtype = getattr(torch, request["dtype"])

    def numbers(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(size["batch"], heads, tokens, size["head_size"], dtype=dtype, device=device)

    q = numbers(size["heads"], size["queries"])
    k, v = (numbers(size["kv_heads"], size["context"]) for _ in range(2))
    is_causal = size["queries"] > 1
    if request["name"] == "torch sdpa":

        def call() -> torch.Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    else:
        mask = None
        if is_causal:
            mask = create_block_mask(
                lambda batch, head, query, key: query >= key, None, None, q.shape[2], k.shape[2], device=device
            )
        flex = torch.compile(flex_attention, dynamic=False)

        def call() -> torch.Tensor:
            return flex(q, k, v, block_mask=mask, enable_gqa=True)

    with torch.no_grad():
        call()
        return on_cuda(call, number) if device == "cuda" else on_cpu(call, number)


def on_cuda(call: Callable[[], Any], number: int) -> Callable[[], float]:
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(number):
            call()

    def run() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / number

    run()
    return run


def on_cpu(call: Callable[[], Any], number: int) -> Callable[[], float]:
    def run() -> float:
        begin_s = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - begin_s) / number

    return run


def answer(request: dict[str, Any], runs: Runs, device: str) -> dict[str, Any]:
    """What a request is answered with."""
    if request["what"] == "prepare":
        begin_s = time.perf_counter()
        runs[request["name"]] = prepare(request, device)
        return {"compile_s": time.perf_counter() - begin_s}
    if request["what"] == "run":
        return {"seconds": runs[request["name"]]()}
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    runs.clear()
    if device == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return {"version": torch.__version__}


def main() -> int:
    device, runs = sys.argv[1], {}
    for line in sys.stdin:
        try:
            said = answer(json.loads(line), runs, device)
        except ModuleNotFoundError as error:
            said = {"refusal": f"not installed ({error.name})"}
        except Exception as error:  # noqa: BLE001 - whatever torch cannot do, the others can still be measured
            said = {"refusal": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
        print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
