"""Worker: OpenVINO GenAI's continuous batching pipeline; the checkpoint is converted once with optimum-intel.

Precision: weights, arithmetic and KV cache all have the type of the run. OpenVINO's own default is a KV cache of 8
bits; option `kv` "u8" measures that instead.
"""

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import Engine, Prompts, Run, serve

BLOCK = 32  # tokens; fixed in OpenVINO's CPU plugin
PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def model_folder(workload: dict[str, Any]) -> Path:
    return Path(workload["cache"]) / f"openvino-{workload['dtype']}-{version('openvino')}"


def prepare(workload: dict[str, Any]) -> None:
    """Writes the model as OpenVINO IR, keeping the stored type of the weights."""
    folder = model_folder(workload)
    if (folder / "complete").is_file():
        return
    from optimum.exporters.openvino import main_export  # brings torch, which the worker itself does not need

    main_export(workload["checkpoint"], folder, task="text-generation-with-past", convert_tokenizer=False)
    (folder / "complete").touch()


def load(workload: dict[str, Any]) -> Engine:
    options = workload.get("options", {})
    precision = PRECISION[workload["dtype"]]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": options.get("kv", precision),
        "INFERENCE_NUM_THREADS": workload["threads"],
    }
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = workload["max_num_seqs"]
    scheduler.max_num_batched_tokens = int(options.get("max_num_batched_tokens", 2048))
    scheduler.num_kv_blocks = workload["kv_tokens"] // BLOCK
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(model_folder(workload)), scheduler, "CPU", properties)

    def generate(prompts: Prompts, new_tokens: int) -> Run:
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        start, first_s = time.perf_counter(), 0.0
        handles = [
            pipeline.add_request(number, openvino.Tensor(np.array([prompt], np.int64)), config)
            for number, prompt in enumerate(prompts)
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            if not first_s and any(handle.can_read() for handle in handles):
                first_s = time.perf_counter() - start
        total_s = time.perf_counter() - start
        tokens = [list(handle.read_all()[0].generated_ids) for handle in handles]
        return Run(first_s=first_s, total_s=total_s, tokens=tokens)

    versions = {name: version(name) for name in ("openvino", "openvino-genai", "optimum-intel")}
    return Engine(generate=generate, versions=versions, mode=properties | options)


if __name__ == "__main__":
    serve(load, prepare)
