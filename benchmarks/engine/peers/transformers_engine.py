"""Worker: `transformers` on torch, the strongest way to run it on a CPU that we found.

Options (workload key `options`): `decode` is "eager" or "compiled" (static cache, `torch.compile`), `batch` is
"padded:N" (left-padded batches of N prompts sorted by length) or "continuous" (`generate_batch`).
The loop is our own instead of `generate`, which adds host work per token; attention is torch's fused one (sdpa).
"""

import time
from typing import Any

import torch
import transformers
from protocol import Engine, Prompts, Run, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, StaticCache

PAD = 0


def greedy_padded(model: Any, prompts: Prompts, new_tokens: int) -> tuple[float, float, Prompts]:
    """Decodes one left-padded batch with a growing cache; returns times of first and last token, and the tokens."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = None
    positions: dict[str, Any] = {}
    if any(len(prompt) != longest for prompt in prompts):
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        mask = (torch.arange(longest)[None] >= longest - lengths).long()
    past, made, first = None, [], 0.0
    for step in range(new_tokens):
        if mask is not None:
            positions = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
        out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1, **positions)
        past, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        made.append(ids)
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        first = first if step else time.perf_counter()
    return first, time.perf_counter(), torch.cat(made, 1).tolist()


def make_compiled_decode(model: Any, max_len: int) -> Any:
    """Single-stream decoding with a static cache and a compiled step; prefill is not compiled."""
    # Lengths in steps of 128 keep attention over the unused rest of the cache small.
    step_fn = torch.compile(model.forward, dynamic=False, fullgraph=True)

    def decode(prompt: list[int], new_tokens: int) -> tuple[float, float, Prompts]:
        length = min(max_len, -(-(len(prompt) + new_tokens) // 128) * 128)
        cache = StaticCache(config=model.config, max_cache_len=length)
        ids = torch.tensor([prompt])
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        made = [token]
        for position in range(len(prompt), len(prompt) + new_tokens - 1):
            where = torch.tensor([[position]])
            out = step_fn(token, past_key_values=cache, use_cache=True, position_ids=where, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
            made.append(token)
        return first, time.perf_counter(), torch.cat(made, 1).tolist()

    return decode


def generate_continuous(model: Any, prompts: Prompts, new_tokens: int, kv_tokens: int) -> Prompts:
    """The library's own continuous batching; without a limit its cache takes most of the machine's memory."""
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    limits = ContinuousBatchingConfig(num_blocks=kv_tokens // ContinuousBatchingConfig.page_size, max_batch_tokens=2048)
    outputs = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=limits, persistent_manager=True
    )
    by_number = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[-1]))
    return [list(output.generated_tokens) for output in by_number]


def load(workload: dict[str, Any]) -> Engine:
    torch.set_num_threads(workload["threads"])
    options = {"decode": "eager", "batch": "padded:16"} | workload.get("options", {})
    dtype = getattr(torch, workload["dtype"])
    model = AutoModelForCausalLM.from_pretrained(workload["checkpoint"], dtype=dtype, attn_implementation="sdpa").eval()
    compiled = make_compiled_decode(model, workload["max_model_len"]) if options["decode"] == "compiled" else None

    def run_sorted(prompts: Prompts, new_tokens: int, size: int) -> tuple[float, float, Prompts]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        tokens: Prompts = [[] for _ in prompts]
        firsts, last = [], 0.0
        for begin in range(0, len(order), size):
            chosen = order[begin : begin + size]
            first, last, made = greedy_padded(model, [prompts[i] for i in chosen], new_tokens)
            firsts.append(first)
            for i, new in zip(chosen, made, strict=True):
                tokens[i] = new
        return firsts[0], last, tokens

    @torch.no_grad()  # not inference_mode: continuous batching works on the same tensors in another thread
    def generate(prompts: Prompts, new_tokens: int) -> Run:
        start = time.perf_counter()
        if len(prompts) == 1 and compiled is not None and new_tokens > 1:
            first, last, tokens = compiled(prompts[0], new_tokens)
        elif len(prompts) == 1 or options["batch"].startswith("padded"):
            size = int(options["batch"].split(":")[1]) if len(prompts) > 1 else 1
            first, last, tokens = run_sorted(prompts, new_tokens, size)
        else:
            tokens = generate_continuous(model, prompts, new_tokens, workload["kv_tokens"])
            first = last = time.perf_counter()
        return Run(first_s=first - start, total_s=last - start, tokens=tokens)

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return Engine(generate=generate, versions=versions, mode=options)


if __name__ == "__main__":
    serve(load)
