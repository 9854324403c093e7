"""Worker: CTranslate2; the model is written from safetensors here. On CPU it computes in float32 or 8-bit integers.

Option `batch`: prompts per batch (default 8). Prompts of unequal length in a batch are fed together only up to the
shortest of them, so small batches of sorted prompts are best.
"""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.converters import utils
from ctranslate2.specs import common_spec, transformer_spec
from protocol import Engine, Prompts, Run, serve
from safetensors.numpy import load_file


def model_folder(workload: dict[str, Any]) -> Path:
    return Path(workload["cache"]) / f"ctranslate2-{workload['dtype']}-{version('ctranslate2')}"


def prepare(workload: dict[str, Any]) -> None:
    """Writes the checkpoint in CTranslate2's format, with token ids as its vocabulary."""
    folder, checkpoint = model_folder(workload), Path(workload["checkpoint"])
    if (folder / "complete").is_file():
        return
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = {name: value.astype(np.float32) for name, value in load_file(checkpoint / "model.safetensors").items()}
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["num_hidden_layers"],
        config["num_attention_heads"],
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,  # all of the head
        rotary_interleave=False,
        rotary_base=config["rope_theta"],
        num_heads_kv=config["num_key_value_heads"],
    )

    def set_linear(target: Any, name: str) -> Any:
        target.weight = tensors[f"{name}.weight"]
        if f"{name}.bias" in tensors:
            target.bias = tensors[f"{name}.bias"]
        return target

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = tensors["model.embed_tokens.weight"]
    decoder.projection.weight = tensors["model.embed_tokens.weight"]
    decoder.layer_norm.gamma = tensors["model.norm.weight"]
    for index, layer in enumerate(decoder.layer):
        prefix = f"model.layers.{index}"
        layer.self_attention.layer_norm.gamma = tensors[f"{prefix}.input_layernorm.weight"]
        layer.ffn.layer_norm.gamma = tensors[f"{prefix}.post_attention_layernorm.weight"]
        split = [set_linear(common_spec.LinearSpec(), f"{prefix}.self_attn.{part}_proj") for part in "qkv"]
        utils.fuse_linear(layer.self_attention.linear[0], split)
        set_linear(layer.self_attention.linear[1], f"{prefix}.self_attn.o_proj")
        set_linear(layer.ffn.linear_0, f"{prefix}.mlp.gate_proj")
        set_linear(layer.ffn.linear_0_noact, f"{prefix}.mlp.up_proj")
        set_linear(layer.ffn.linear_1, f"{prefix}.mlp.down_proj")
    spec.config.layer_norm_epsilon = config["rms_norm_eps"]
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "0", "1", "2"
    spec.register_vocabulary([str(token) for token in range(config["vocab_size"])])
    spec.validate()
    spec.optimize(quantization=None)
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))
    (folder / "complete").touch()


def load(workload: dict[str, Any]) -> Engine:
    options = {"batch": "8"} | workload.get("options", {})
    generator = ctranslate2.Generator(
        str(model_folder(workload)),
        device="cpu",
        compute_type=workload["dtype"],
        inter_threads=1,
        intra_threads=workload["threads"],
    )

    def generate(prompts: Prompts, new_tokens: int) -> Run:
        start = time.perf_counter()
        firsts: list[float] = []

        def note_first(_: Any) -> bool:
            if not firsts:
                firsts.append(time.perf_counter() - start)
            return False

        results = generator.generate_batch(
            [list(map(str, prompt)) for prompt in prompts],
            max_batch_size=int(options["batch"]),  # the library sorts by length
            beam_size=1,
            sampling_topk=1,
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            callback=note_first,
        )
        total_s = time.perf_counter() - start
        return Run(first_s=firsts[0], total_s=total_s, tokens=[list(result.sequences_ids[0]) for result in results])

    return Engine(generate=generate, versions={"ctranslate2": version("ctranslate2")}, mode=options)


if __name__ == "__main__":
    serve(load, prepare)
