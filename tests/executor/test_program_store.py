"""Programs on disk: what is read is what was written, and nothing else is ever taken for it."""

import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxserve import build
from jaxserve.errors import ConfigError
from jaxserve.executor import program_store
from jaxserve.executor.program_store import Program, ProgramStore, open_store
from jaxserve.models import llama
from tests.models import toy

ROOT = Path(__file__).resolve().parents[2]


@struct.dataclass
class State:
    total_a: jax.Array
    step: int = struct.field(pytree_node=False, default=0)


def add(state: State, x_a: jax.Array) -> tuple[dict[str, jax.Array], State]:
    return {"sum": jnp.sum(x_a * 3)}, state.replace(total_a=state.total_a + x_a)


def program(size: int = 8, dtype: type = np.float32, function=add, step: int = 0) -> Program:
    args = State(jnp.zeros(size, dtype), step=step), np.ones(size, dtype)
    return Program(jax.jit(function, donate_argnums=0), args)


def opened(folder: Path, **facts) -> ProgramStore:
    store = open_store(folder / "programs", facts, jax.devices()[:1])
    assert store is not None
    return store


def is_found(store: ProgramStore, name: str = "add", **options) -> bool:
    before = len(store.loaded)
    store.get(name, program(**options))
    return len(store.loaded) > before


def files(folder: Path) -> list[Path]:
    return sorted((folder / "programs").iterdir())


def test_a_program_that_is_read_does_what_the_compiled_one_did(tmp_path: Path):
    made = program()
    for compiled in (opened(tmp_path).get("add", made), opened(tmp_path).get("add", made)):
        state = State(jnp.arange(8.0))
        sums, after = compiled(state, np.full(8, 0.1, np.float32))
        assert state.total_a.is_deleted(), "its state is donated"
        assert np.asarray(sums["sum"]).tobytes() == np.asarray(jnp.sum(jnp.full(8, np.float32(0.1)) * 3)).tobytes()
        np.testing.assert_array_equal(after.total_a, np.arange(8.0, dtype=np.float32) + np.float32(0.1))
        with pytest.raises(TypeError):
            compiled(State(jnp.zeros(9)), np.zeros(9, np.float32))
    assert is_found(opened(tmp_path))


def test_on_a_mesh_each_part_comes_back_to_its_device(tmp_path: Path):
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=np.asarray(jax.devices())[[3, 1, 6, 4]])
    split = jax.NamedSharding(mesh, jax.P("a", "b"))
    x_ab = jax.device_put(np.arange(16.0, dtype=np.float32).reshape(4, 4), split)

    def shift(x_ab):
        return jax.lax.ppermute(x_ab, "a", [(0, 1), (1, 0)]) * (1 + jax.lax.axis_index("b").astype(jnp.float32))

    over_mesh = jax.jit(jax.shard_map(shift, mesh=mesh, in_specs=jax.P("a", "b"), out_specs=jax.P("a", "b")))
    for _ in range(2):
        store = open_store(tmp_path / "programs", {}, tuple(mesh.devices.flat))
        assert store is not None
        found = store.get("shift", Program(over_mesh, (x_ab,)))(x_ab)
        np.testing.assert_array_equal(found, over_mesh(x_ab))
        assert found.sharding == split
    assert store.loaded == ["shift"]


def test_whatever_decides_a_program_is_in_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = opened(tmp_path, model="a")
    assert not is_found(store)
    assert is_found(store)
    assert not is_found(store, size=9)
    assert not is_found(store, dtype=np.int32)
    assert not is_found(store, step=1), "what the structure holds that is no array"
    assert not is_found(store, "other")
    assert not is_found(opened(tmp_path, model="b"))
    with jax.default_matmul_precision("float32"):
        assert not is_found(opened(tmp_path, model="a"))
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false")
        assert not is_found(opened(tmp_path, model="a"))
    with monkeypatch.context() as patch:
        patch.setattr(program_store, "_processor", lambda: ("another", 2, []))
        assert not is_found(opened(tmp_path, model="a"))
    with monkeypatch.context() as patch:
        patch.setattr(program_store, "_version", lambda package: "another")
        assert not is_found(opened(tmp_path, model="a"))
    assert is_found(opened(tmp_path, model="a"))


def test_other_sources_find_a_program_only_by_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def otherwise(state: State, x_a: jax.Array):
        return {"sum": jnp.sum(x_a * 4)}, state.replace(total_a=state.total_a + x_a)

    otherwise.__name__ = "add"
    assert not is_found(opened(tmp_path))
    monkeypatch.setattr(program_store, "_digest_of_sources", lambda package: "edited")
    assert is_found(opened(tmp_path)), "an edit that changes nothing"
    monkeypatch.setattr(program_store, "_digest_of_sources", lambda package: "edited again")
    store = opened(tmp_path)
    sums, _ = store.get("add", program(function=otherwise))(State(jnp.zeros(8)), np.ones(8, np.float32))
    assert sums["sum"] == 32 and not store.loaded


def test_a_text_does_not_say_which_argument_was_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = np.float32(1), np.float32(2)

    def first(a, b):
        return a + 1

    def second(a, b):
        return b + 1

    first.__name__ = second.__name__ = "one"
    assert opened(tmp_path).get("one", Program(jax.jit(first), args))(*args) == 2
    monkeypatch.setattr(program_store, "_digest_of_sources", lambda package: "edited")
    assert opened(tmp_path).get("one", Program(jax.jit(second), args))(*args) == 3


def test_sources_that_changed_after_they_were_loaded_are_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program_store, "_STARTED_S", time.time() - 10 * 365 * 86400)
    assert open_store(tmp_path, {}, jax.devices()[:1]) is None


def test_functions_of_a_notebook_in_our_place_are_no_key_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def mine() -> None:
        pass

    mine.__module__ = "__main__"
    monkeypatch.setattr(llama, "forward", mine)
    assert open_store(tmp_path, {}, jax.devices()[:1]) is None


def test_where_programs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "ours"))
    options = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, option) for option in options]
    assert before[0], "JAX's own, as tests have it"
    assert build._use_compilation_cache("auto") is None
    assert build._use_compilation_cache("none") is None
    assert build._use_compilation_cache(str(tmp_path / "asked")) == tmp_path / "asked" / "programs"
    assert jax.config.jax_compilation_cache_dir == before[0]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert build._use_compilation_cache("none") is None
        assert jax.config.jax_compilation_cache_dir is None
        for _ in range(2):  # the second engine of a process finds ours
            assert build._use_compilation_cache("auto") == tmp_path / "ours" / "programs"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ours" / "jax")
        with program_store.instead_of_jaxs_cache():
            assert jax.config.jax_persistent_cache_min_compile_time_secs == float("inf")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1
    finally:
        for option, value in zip(options, before, strict=True):
            jax.config.update(option, value)
    assert (tmp_path / "ours" / "programs").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        build._use_compilation_cache(str(tmp_path / "file"))


def test_all_that_makes_programs_is_in_the_digest(tmp_path: Path):
    for name in ("executor", "models"):
        (tmp_path / name).mkdir()
    for name in ("config.py", "executor/program.py", "models/llama.py"):
        (tmp_path / name).write_text("")
    os.utime(tmp_path / "config.py", (0, 0))
    digests = [program_store._digest_of_sources(tmp_path)]  # newer than this process
    for path in tmp_path.rglob("*.py"):
        os.utime(path, (0, 0))
    digests.append(program_store._digest_of_sources(tmp_path))
    (tmp_path / "models/llama.py").write_text("x")
    os.utime(tmp_path / "models/llama.py", (0, 0))
    digests.append(program_store._digest_of_sources(tmp_path))
    assert digests[0] is None and None not in digests[1:] and digests[1] != digests[2]

    code = "import sys, jaxserve.executor.local; print(*(n for n in sys.modules if n.startswith('jaxserve.')))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {name.split(".")[1] for name in told.split() if name.count(".") > 1}
    assert folders <= set(program_store._MAKERS), "the steps are made by others, too"


@pytest.mark.parametrize("harm", ["cut short", "one bit", "empty", "another format"])
def test_a_damaged_file_is_told_and_replaced(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture):
    assert not is_found(opened(tmp_path))
    for path in files(tmp_path):
        whole = path.read_bytes()
        flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
        strange = program_store.hashlib.sha256(b"strange").digest() + b"strange"
        harmed = {"cut short": whole[:-1], "one bit": flipped, "empty": b"", "another format": strange}
        path.write_bytes(harmed[harm])
    with caplog.at_level(logging.WARNING):
        assert not is_found(opened(tmp_path))
    assert caplog.records
    caplog.clear()
    assert is_found(opened(tmp_path)) and not caplog.records


def test_what_others_may_write_to_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert not is_found(opened(tmp_path))
    assert {path.stat().st_mode & 0o777 for path in files(tmp_path)} == {0o600}
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700
    for path in files(tmp_path):
        path.chmod(0o620)
    assert not is_found(opened(tmp_path))
    assert "others may write to it" in caplog.text
    (tmp_path / "programs").chmod(0o770)
    assert open_store(tmp_path / "programs", {}, jax.devices()[:1]) is None
    assert "others may write there" in caplog.text


def test_where_nothing_can_be_written_everything_still_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = opened(tmp_path)
    (tmp_path / "programs").rmdir()
    assert not is_found(store)
    assert "cannot be written" in caplog.text
    (tmp_path / "file").write_text("")
    assert open_store(tmp_path / "file" / "programs", {}, jax.devices()[:1]) is None


def test_a_program_that_calls_python_is_not_kept(tmp_path: Path):
    def calls(x_a):
        return jax.pure_callback(lambda x: np.asarray(x) * 2, jax.ShapeDtypeStruct(x_a.shape, x_a.dtype), x_a)

    args = (np.ones(3, np.float32),)
    assert opened(tmp_path).get("calls", Program(jax.jit(calls), args))(*args).tolist() == [2, 2, 2]
    assert not files(tmp_path)


def test_a_program_of_jaxs_own_cache_is_not_kept(tmp_path: Path):
    """XLA for CPU writes such a program without its code. It is read without a complaint, and fails when it runs."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        for _ in range(2):  # the second finds it in JAX's cache, if an earlier run has not left it there
            jax.clear_caches()
            program(size=13).lower().compile()
        jax.clear_caches()
        assert not is_found(opened(tmp_path), size=13)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    assert not files(tmp_path)


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = opened(tmp_path)
    sizes = (3, 4, 5)
    for age, size in enumerate(sizes):
        there = set(files(tmp_path))
        is_found(store, size=size)
        for path in set(files(tmp_path)) - there:
            os.utime(path, (1000 + age, 1000 + age))
    assert is_found(opened(tmp_path), size=3), "used again: now the newest"
    newest = [path.stat() for path in files(tmp_path) if path.stat().st_mtime >= 1002]
    monkeypatch.setattr(program_store, "_MOST_BYTES", sum(status.st_size for status in newest))
    store.trim()
    assert [is_found(opened(tmp_path), size=size) for size in sizes] == [True, False, True]


def test_many_at_once_do_not_disturb_each_other(tmp_path: Path):
    def run(index: int) -> float:
        compiled = opened(tmp_path).get("add", program(size=3))
        return float(compiled(State(jnp.zeros(3)), np.ones(3, np.float32))[0]["sum"])

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(run, range(16))) == {9.0}
    assert len(files(tmp_path)) == 2, "one by sources, one by text, and nothing half written"


ENGINE = """
import json, sys
from jaxserve import LLM, SamplingParams
folder, cache = sys.argv[1:]
llm = LLM(folder, compilation_cache=cache, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=64, num_kv_blocks=8,
          block_size=8, progress=False)
params = SamplingParams(temperature=0.9, seed=3, max_tokens=20, ignore_eos=True, logprobs=1)
answer = llm.generate([list(range(40))], params)[0].outputs[0]
print(json.dumps([answer.token_ids, answer.cumulative_logprob, llm.metrics()]))
"""


@pytest.mark.slow
def test_an_engine_from_disk_gives_the_answers_of_a_fresh_one(tmp_path: Path):
    """In processes of their own: the C++ kernels must be there although nothing is traced."""
    toy.write_checkpoint(tmp_path, toy.CASES["llama3"]["config"], toy.CASES["llama3"]["seed"])
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compiles quickly

    command = [sys.executable, "-c", ENGINE, str(tmp_path), str(tmp_path / "cache")]
    told = [subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True).stdout for _ in range(2)]
    (*answer, fresh), (*again, facts) = map(json.loads, told)
    assert again == answer
    assert fresh["attention_backend"] == facts["attention_backend"]
    assert facts["programs_from_disk"] == fresh["warm_up_compiles"] and not fresh["programs_from_disk"]
    assert not facts["warm_up_compiles"] and not facts["compiles_after_ready"]
