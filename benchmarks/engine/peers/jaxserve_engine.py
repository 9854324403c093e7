"""Worker: jaxserve through its public API."""

import time
from importlib.metadata import version
from typing import Any

from protocol import Engine, Prompts, Run, serve

from jaxserve import LLM, SamplingParams

BLOCK = 32  # tokens


def load(workload: dict[str, Any]) -> Engine:
    llm = LLM(
        workload["checkpoint"],
        dtype=workload["dtype"],
        max_model_len=workload["max_model_len"],
        max_num_seqs=workload["max_num_seqs"],
        block_size=BLOCK,
        num_kv_blocks=workload["kv_tokens"] // BLOCK,
        # Every repeat must compute its whole prompt.
        enable_prefix_caching=False,
        **workload.get("options", {}),
    )

    def generate(prompts: Prompts, new_tokens: int) -> Run:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        total_s = time.perf_counter() - start
        first_s = min(output.metrics.first_token_s - output.metrics.arrival_s for output in outputs)
        return Run(first_s=first_s, total_s=total_s, tokens=[list(o.outputs[0].token_ids) for o in outputs])

    versions = {name: version(name) for name in ("jaxserve", "jax", "jaxlib")}
    return Engine(generate=generate, versions=versions, mode=dict(workload.get("options", {})))


if __name__ == "__main__":
    serve(load)
