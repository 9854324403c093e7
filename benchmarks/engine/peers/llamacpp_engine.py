"""Worker: llama.cpp through the C API that llama-cpp-python exposes; the GGUF file is written here.

Single prompts use a context of one sequence, batches one of many, all prompts first and then all sequences in step,
which is what llama.cpp's own `llama-batched-bench` does. Options: `kv_unified` "true" keeps all sequences in one cache.
The KV cache is float32 for float32 weights and float16 (llama.cpp's default) otherwise.
"""

import ctypes
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import ml_dtypes  # noqa: F401  lets NumPy and safetensors read bfloat16
import numpy as np
from protocol import Engine, Prompts, Run, serve
from safetensors.numpy import load_file

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TYPES = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor of a Qwen2 checkpoint."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    stem, leaf = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[stem]}.{leaf}"


def gguf_path(workload: dict[str, Any]) -> Path:
    return Path(workload["cache"]) / f"llamacpp-{workload['dtype']}.gguf"


def prepare(workload: dict[str, Any]) -> None:
    path = gguf_path(workload)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(Path(workload["checkpoint"]), path.with_suffix(".part"), workload["dtype"])
        path.with_suffix(".part").rename(path)


def write_gguf(checkpoint: Path, path: Path, dtype: str) -> None:
    """Converts a Qwen2 folder; matrices get the type of the run, vectors stay float32 as llama.cpp wants them."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[TYPES[dtype]]
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        tensor = tensor.astype(np.float32)
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), tensor)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Context:
    """One llama.cpp context with a reusable batch of up to `n_batch` tokens."""

    n_batch = 2048

    def __init__(self, model: Any, vocab: int, sequences: int, tokens: int, workload: dict[str, Any]) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = tokens * sequences, sequences
        params.n_batch = self.n_batch
        params.n_threads = params.n_threads_batch = workload["threads"]
        params.kv_unified = workload.get("options", {}).get("kv_unified") == "true"
        params.no_perf = True
        if workload["dtype"] == "float32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.vocab = vocab
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Runs rows (token, position, sequence, wants a next token); returns the greedy token per such sequence."""
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = wanted
        self.batch.n_tokens = len(rows)
        if code := llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode failed with code {code}")
        found = {}
        for i, (_, _, sequence, wanted) in enumerate(rows):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(self.context, i)
                address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocab))
                found[sequence] = int(np.frombuffer(address.contents, np.float32).argmax())
        return found

    def generate(self, prompts: Prompts, new_tokens: int) -> Run:
        self.clear()
        start, first_s = time.perf_counter(), 0.0
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        made: Prompts = [[] for _ in prompts]
        for begin in range(0, len(rows), self.n_batch):
            for sequence, token in self.decode(rows[begin : begin + self.n_batch]).items():
                made[sequence].append(token)
                first_s = first_s or time.perf_counter() - start
        for step in range(new_tokens - 1):
            lasts = [(made[s][-1], len(prompt) + step, s, True) for s, prompt in enumerate(prompts)]
            for sequence, token in self.decode(lasts).items():
                made[sequence].append(token)
        return Run(first_s=first_s, total_s=time.perf_counter() - start, tokens=made)


def batch_size(workload: dict[str, Any]) -> tuple[int, int]:
    """Number of sequences and room per sequence (tokens, a multiple of 256) for the batches of the workload."""
    batches = [row for row in workload["rows"] if row["kind"] == "batch"]
    longest = max(len(prompt) + row["new_tokens"] for row in batches for prompt in row["prompts"])
    return max(len(row["prompts"]) for row in batches), -(-longest // 256) * 256


@llama_cpp.llama_log_callback
def print_nothing(*_: Any) -> None:
    """llama.cpp prints thousands of lines while it makes a context."""


def load(workload: dict[str, Any]) -> Engine:
    vocab = json.loads((Path(workload["checkpoint"]) / "config.json").read_text())["vocab_size"]
    llama_cpp.llama_log_set(print_nothing, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(gguf_path(workload)).encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError("llama.cpp could not load the GGUF file")
    contexts: dict[int, Context] = {}

    def generate(prompts: Prompts, new_tokens: int) -> Run:
        sequences, tokens = (1, workload["max_model_len"]) if len(prompts) == 1 else batch_size(workload)
        if sequences not in contexts:
            contexts[sequences] = Context(model, vocab, sequences, tokens, workload)
        return contexts[sequences].generate(prompts, new_tokens)

    versions = {"llama-cpp-python": version("llama-cpp-python"), "gguf": version("gguf")}
    features = llama_cpp.llama_print_system_info().decode()
    return Engine(generate=generate, versions=versions, mode={"features": features} | workload.get("options", {}))


if __name__ == "__main__":
    serve(load, prepare)
