"""Loading: equal arrays however they are stored, and one clear sentence for every damaged or hostile folder."""

import json
import re
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import CheckpointError
from jaxserve.models import weights
from jaxserve.models.registry import family_of, read_config
from tests.models.toy import CASES, make_tensors, write_case

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


def load(folder, dtype=jnp.float32):
    cfg = read_config(folder)
    return weights.load(folder, family_of(cfg).abstract(cfg), jnp.dtype(dtype))


def refused(folder, message: str) -> None:
    """Loading ends in a CheckpointError, and no tensor was read for it."""
    reads = []
    original = weights._read
    weights._read = lambda *args: reads.append(args) or original(*args)
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            load(folder)
    finally:
        weights._read = original
    assert not reads, "weights were read before the folder was checked"
    assert len(str(caught.value)) < 400


def edit(folder, **changes):
    """Rewrite the single file with tensors added, replaced, or (None) removed. Dots in names are spelt `__`."""
    tensors = load_file(folder / SINGLE) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / SINGLE)
    return folder


def edit_index(folder, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def equal(one, other) -> bool:
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), one, other)
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("case", ["llama3", "qwen2_tied", "qwen3", "llama_bias", "mistral_window"])
def test_shards_and_a_single_file_load_equal_arrays(tmp_path, case):
    whole = load(write_case(tmp_path / "whole", case))
    assert equal(whole, load(write_case(tmp_path / "parts", case, shards=4)))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("asked", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_float_type_loads_as_every_other(tmp_path, stored, asked):
    params = load(write_case(tmp_path, "llama3", stored), asked)
    tensors = make_tensors(CASES["llama3"]["config"], CASES["llama3"]["seed"], stored)
    leaves = jax.tree.leaves(params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(asked)}
    total = sum(float(np.abs(t.astype(asked).astype(np.float64)).sum()) for t in tensors.values())
    got = sum(float(np.abs(np.asarray(leaf).astype(np.float64)).sum()) for leaf in leaves)
    assert got == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("length", [0, 4, 7, 8, 9, 100, 1000, -1, -1000])
def test_a_truncated_file_is_named(tmp_path, length):
    path = write_case(tmp_path, "llama3") / SINGLE
    path.write_bytes(path.read_bytes()[:length])
    refused(tmp_path, r"model\.safetensors is damaged or incomplete")


def test_any_flipped_byte_of_the_header_is_an_error_or_harmless(tmp_path):
    """Every byte of the length and the first entries, and a sample of the rest; never another kind of exception."""
    path = write_case(tmp_path, "llama3") / SINGLE
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    errors = 0
    for position in [*range(120), *range(120, 8 + size, 37)]:
        for flip in (0xFF, 0x01):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            try:
                cfg = read_config(tmp_path)
                weights._check(weights.tensor_files(tmp_path), family_of(cfg).abstract(cfg))
            except CheckpointError:
                errors += 1
    assert errors > 300


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b"{", b'{"a": 3}', b"[" * 50_000, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}']
    + [b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,16]}}'],
)
def test_a_made_up_header_is_refused(tmp_path, header):
    write_case(tmp_path, "llama3")
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(tmp_path, "damaged or incomplete|missing")


def test_a_header_length_beyond_the_file_allocates_nothing(tmp_path):
    write_case(tmp_path, "llama3")
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", (1 << 63) - 1) + b"{}" * 10)
    refused(tmp_path, "damaged or incomplete")


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "/tmp/x.safetensors", "a/b.safetensors", "..", "", "x.bin", 3, None]
)
def test_an_index_cannot_leave_its_folder(tmp_path, file):
    folder = write_case(tmp_path / "in", "llama3", shards=2)
    write_case(tmp_path, "llama3")  # the target of ../ exists
    edit_index(folder, lambda table: table.update({Q_PROJ: file}))
    refused(folder, f"places {Q_PROJ} in .* which is not a safetensors file of this folder")


def test_a_missing_shard_is_named(tmp_path):
    folder = write_case(tmp_path, "llama3", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, r"index\.json names model-00002-of-00003\.safetensors, which is missing")


def test_a_tensor_in_another_shard_is_named(tmp_path):
    folder = write_case(tmp_path, "llama3", shards=3)
    edit_index(folder, lambda table: table.update({Q_PROJ: "model-00003-of-00003.safetensors"}))
    refused(folder, f"places {Q_PROJ} in model-00003-of-00003.safetensors, which does not hold it")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[" * 100_000, b"\xff\xfe"]
)
def test_a_broken_index_is_named(tmp_path, text):
    folder = write_case(tmp_path, "llama3", shards=2)
    (folder / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, r"model\.safetensors\.index\.json is not a safetensors index")


def test_an_index_without_tensors_misses_all(tmp_path):
    folder = write_case(tmp_path, "llama3", shards=2)
    (folder / INDEX).write_text('{"weight_map": {}}')
    refused(folder, "tensors are missing, first model")


def test_a_missing_tensor_is_named(tmp_path):
    folder = edit(write_case(tmp_path, "llama3"), **{Q_PROJ.replace(".", "__"): None})
    refused(folder, f"1 tensors are missing, first {Q_PROJ}")


def test_an_unknown_tensor_is_named_and_known_leftovers_are_not(tmp_path):
    folder = write_case(tmp_path, "llama3")
    edit(folder, model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(8, np.float32))
    load(folder)
    edit(folder, model__layers__0__self_attn__q_proj__bias=np.zeros(64, np.float32))
    refused(folder, r"1 tensors are not known to this architecture, first model\.layers\.0\.self_attn\.q_proj\.bias")


@pytest.mark.parametrize(
    ("name", "expected", "shape"),
    [
        (GATE, [96, 64], (64, 96)),
        (GATE, [96, 64], (96 * 64,)),
        (GATE, [96, 64], (96, 65)),
        (GATE, [96, 64], (96, 64, 1)),
        (GATE, [96, 64], (48, 128)),
        (GATE, [96, 64], ()),
        (GATE, [96, 64], (0,)),
        (K_PROJ, [32, 64], (64, 32)),
        (K_PROJ, [32, 64], (2, 16, 64)),
        (K_PROJ, [32, 64], (2048,)),
        ("model.layers.0.self_attn.o_proj.weight", [64, 64], (64, 4, 16)),
        ("model.layers.0.mlp.down_proj.weight", [64, 96], (96, 64)),
        ("model.layers.0.self_attn.k_proj.bias", [32], (2, 16)),
        ("model.layers.0.self_attn.q_proj.bias", [64], (1, 64)),
        ("model.layers.0.mlp.gate_proj.bias", [96], (96, 1)),
        ("model.norm.weight", [64], (64, 1)),
        ("model.embed_tokens.weight", [160, 64], (64, 160)),
        ("lm_head.weight", [160, 64], (160 * 64,)),
    ],
)
def test_a_wrong_shape_is_named_even_when_its_size_is_right(tmp_path, name, expected, shape):
    folder = edit(write_case(tmp_path, "llama_bias"), **{name.replace(".", "__"): np.zeros(shape, np.float32)})
    refused(folder, re.escape(f"{name} has shape {list(shape)}, but config.json asks for {expected}"))


def test_a_config_of_another_size_is_refused_before_anything_is_allocated(tmp_path):
    folder = write_case(tmp_path, "llama3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"hidden_size": 65536, "vocab_size": 4_000_000, "head_dim": 16})
    )
    refused(folder, "has shape")


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.bool_, ml_dtypes.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(tmp_path, dtype):
    folder = edit(write_case(tmp_path, "llama3"), **{GATE.replace(".", "__"): np.zeros((96, 64), dtype)})
    refused(folder, f"{GATE} is stored as .*; only F64, F32, F16, BF16 are read")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_read(tmp_path, name):
    write_case(tmp_path, "llama3")
    (tmp_path / SINGLE).rename(tmp_path / name)
    refused(tmp_path, f"only pickled weights .{name}., which can run code")


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    write_case(tmp_path, "llama3")
    (tmp_path / SINGLE).unlink()
    refused(tmp_path, r"no model\.safetensors or model\.safetensors\.index\.json in")
