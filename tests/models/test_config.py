"""Hostile and damaged configurations: one clear sentence that names the key, before anything is allocated."""

import json

import pytest

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models.config import ARCHITECTURES, from_hf
from jaxserve.models.registry import read_config
from jaxserve.models.rope import inverse_frequencies
from tests.models.toy import CASES

BASE = CASES["llama3"]["config"]
ROPE = BASE["rope_scaling"]
DEEP = "[" * 200_000

REFUSED = [
    ({"hidden_size": None}, "config.json lacks hidden_size"),
    ({"hidden_size": -64}, "hidden_size=-64 must be a whole number from 1"),
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"hidden_size": 1 << 40}, "hidden_size="),
    ({"hidden_size": 64.5}, "hidden_size=64.5"),
    ({"hidden_size": "64"}, "hidden_size must be a finite number, not '64'"),
    ({"hidden_size": True}, "hidden_size must be a finite number"),
    ({"hidden_size": [64]}, "hidden_size must be a finite number"),
    ({"hidden_size": float("nan")}, "hidden_size must be a finite number"),
    ({"hidden_size": float("inf")}, "hidden_size must be a finite number"),
    ({"hidden_size": 10**400}, "hidden_size must be a finite number"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
    ({"vocab_size": 1 << 30}, "vocab_size="),
    ({"vocab_size": None}, "lacks vocab_size"),
    ({"intermediate_size": 1 << 29}, "intermediate_size="),
    ({"max_position_embeddings": 1 << 40}, "max_position_embeddings="),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ({"head_dim": 15}, "head_dim=15 is odd or below 4"),
    ({"head_dim": 1 << 20}, "head_dim="),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented"),
    ({"hidden_act": ["silu"]}, "hidden_act="),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
    ({"quantization_config": {"bits": 4}}, r"quantised \(unknown\)"),
    ({"quantization_config": "gptq"}, "quantised"),
    ({"quantization_config": [1]}, "quantised"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"layer_types": ["linear_attention"] * 3}, "layer_types .*linear_attention"),
    ({"layer_types": "full"}, "layer_types"),
    ({"layer_types": [["full_attention"]]}, "layer_types"),
    ({"layer_types": {"a": 1}}, "layer_types"),
    ({"architectures": ["GPT2LMHeadModel"]}, "the architecture GPT2LMHeadModel is not supported. Supported: Llama"),
    ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures must be a list of names"),
    ({"architectures": [], "model_type": "mamba"}, "'mamba' is not supported"),
    ({"architectures": None, "model_type": None}, "not supported"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not implemented"),
    ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "rope type"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
    ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope parameters must be positive"),
    ({"rope_scaling": ROPE | {"factor": "8"}}, "factor must be a finite number"),
    ({"rope_scaling": ROPE | {"low_freq_factor": 4.0}}, "rope"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.0}}, "rope"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": -1.0}}, "rope"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "rope"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim"),
    ({"rope_theta": -1.0}, "rope parameters must be positive"),
    ({"rope_theta": None, "rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a finite number"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of token ids, not '</s>'"),
    ({"eos_token_id": [1, -1]}, "eos_token_id"),
    ({"eos_token_id": 1 << 40}, "eos_token_id"),
    ({"bos_token_id": 1.5}, "bos_token_id"),
]


def changed(changes: dict) -> dict:
    merged = BASE | changes
    return {k: v for k, v in merged.items() if v is not None}


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda v: f"{v!s:.40}")
def test_a_damaged_config_is_refused_by_the_name_of_its_key(changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        from_hf(changed(changes))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mixtral", {"num_local_experts": None}, "lacks num_local_experts"),
        ("mixtral", {"num_local_experts": 1 << 20}, "num_local_experts=1048576 must be"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 8 experts"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "lacks shared_expert_intermediate_size"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window is not implemented for Qwen2-MoE"),
        ("qwen2_moe", {"mlp_only_layers": 1}, "mlp_only_layers must be a list of layers, not 1"),
        ("qwen2_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers must be"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts=0 must be"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be"),
    ],
)
def test_a_damaged_config_with_experts_is_refused_by_the_name_of_its_key(case, changes, message):
    with pytest.raises(CheckpointError, match=message):
        from_hf({k: v for k, v in (CASES[case]["config"] | changes).items() if v is not None})


def test_which_layers_have_experts():
    layers = {
        case: from_hf(CASES[case]["config"]).experts for case in ("llama3", "mixtral", "qwen2_moe", "qwen3_moe_sparse")
    }
    assert layers.pop("llama3") is None
    assert {case: experts.layers for case, experts in layers.items() if experts} == {
        "mixtral": (True, True, True),
        "qwen2_moe": (True, False, True),
        "qwen3_moe_sparse": (False, True, False),
    }


def test_windows_and_biases_of_families_with_experts():
    config = CASES["qwen3_moe"]["config"] | {"sliding_window": 8}
    assert from_hf(config).windows == (None,) * 3
    assert from_hf(config | {"use_sliding_window": True}).windows == (8,) * 3
    assert from_hf(CASES["mixtral"]["config"] | {"sliding_window": 8}).windows == (8,) * 3
    assert from_hf(CASES["qwen2_moe"]["config"]).qkv_bias
    assert not from_hf(CASES["qwen2_moe"]["config"] | {"qkv_bias": False}).qkv_bias


@pytest.mark.parametrize("case", CASES)
def test_every_toy_config_is_accepted_and_gives_finite_frequencies(case):
    cfg = from_hf(CASES[case]["config"])
    frequencies, scale = inverse_frequencies(cfg.rope, cfg.head_size)
    assert (frequencies > 0).all()
    assert scale > 0
    assert hash(cfg) == hash(from_hf(CASES[case]["config"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"unknown_key": {"deep": [1]}, "transformers_version": "9"},
        {"quantization_config": None},
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"hidden_act": "swish"},
        {"architectures": ["Unknown", "LlamaForCausalLM"]},
        {"architectures": []},
        {"hidden_size": 64.0},
        {"partial_rotary_factor": 1.0},
        {"eos_token_id": [1, 2]},
    ],
    ids=str,
)
def test_what_does_not_change_the_numbers_is_accepted(changes):
    assert from_hf(BASE | changes).embed_size == 64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_is_found_by_its_model_type(architecture):
    config = next(c["config"] for c in CASES.values() if c["config"]["architectures"] == [architecture])
    assert from_hf({k: v for k, v in config.items() if k != "architectures"}).architecture == architecture


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json is missing from"),
        ("", "config.json cannot be read as JSON"),
        ("{", "config.json cannot be read as JSON"),
        ("[1, 2]", "config.json must hold a JSON object, not list"),
        ('"text"', "must hold a JSON object, not str"),
        (DEEP, "config.json cannot be read as JSON"),
        ('{"a":' * 100_000, "config.json cannot be read as JSON"),
        (b"\xff\xfe{}", "config.json cannot be read as JSON"),
        ("{}", "not supported"),
    ],
    ids=lambda v: f"{v!s:.20}",
)
def test_a_config_file_that_is_none_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_a_config_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_config(tmp_path)


def test_generation_config_names_the_end_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"eos_token_id": 2}))
    assert read_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert read_config(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": {"a": 1}}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        read_config(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("case", "shards", "message"),
    [
        (
            "mixtral",
            (3, 3, 3),
            "8 experts cannot be shared evenly by 3 devices. Choose expert_parallel_size from 1, 2, 4, 8",
        ),
        (
            "qwen3_moe",
            (64, 1, 1),
            "32 columns of an expert .* by 64 devices. Choose tensor_parallel_size from 1, 2, 4, 8, 16",
        ),
        ("qwen2_moe", (16, 1, 4), "40 columns of the shared expert .* by 16 devices"),
        ("qwen2_moe", (8, 8, 4), "4 heads .* cannot be shared evenly by 8 devices"),
    ],
)
def test_devices_that_cannot_share_experts(case, shards, message):
    with pytest.raises(ConfigError, match=message):
        from_hf(CASES[case]["config"]).for_shards(*shards)


def test_dense_columns_count_only_if_a_layer_is_dense():
    config = CASES["qwen3_moe"]["config"] | {"intermediate_size": 7}
    assert from_hf(config).for_shards(4, 4, 2).num_kv_heads == 4
    with pytest.raises(ConfigError, match="7 feed-forward columns"):
        from_hf(config | {"mlp_only_layers": [0]}).for_shards(4, 4, 2)
