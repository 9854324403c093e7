"""The reader of compiled programs, on real text of this machine's compiler and on excerpts of what others print."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxserve.sharding.hlo import Collective, collectives, totals

GPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%wrapped (p.1: f32[64,4]) -> f32[64,4] {
  %p.1 = f32[64,4]{1,0} parameter(0)
  ROOT %all-to-all.1 = f32[64,4]{1,0} all-to-all(%p.1), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (p: f32[64,4]) -> f32[64,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %all-gather-start = (f32[64,4]{1,0}, f32[256,4]{1,0}) all-gather-start(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, metadata={op_name="jit(f)/layer0/gather"}
  %async-start = ((f32[64,4]{1,0}), f32[64,4]{1,0}) async-start(%p), calls=%wrapped
  %fusion.1 = f32[64,4]{1,0} fusion(%p), kind=kLoop, calls=%other
  %all-gather-done = f32[256,4]{1,0} all-gather-done(%all-gather-start)
  %fusion.2 = f32[64,4]{1,0} fusion(%all-gather-done), kind=kLoop, calls=%other
  %async-done = f32[64,4]{1,0} async-done(%async-start), calls=%wrapped
  %all-reduce-start = (bf16[64]{0}, f32[4]{0}) all-reduce-start(%x, %y), channel_id=2, replica_groups={}, to_apply=%add
  %all-reduce-done = (bf16[64]{0}, f32[4]{0}) all-reduce-done(%all-reduce-start)
  %reduce-scatter-start = ((f32[64,4]{1,0}), f32[16,4]{1,0}) reduce-scatter-start(%p), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":true}}
  %reduce-scatter-done = f32[16,4]{1,0} reduce-scatter-done(%reduce-scatter-start)
  ROOT %add.1 = f32[64,4]{1,0} add(%fusion.2, %async-done)
}
"""  # noqa: E501

TPU = """HloModule jit_f, is_scheduled=true, num_partitions=4

%started (p.1: bf16[8,128]) -> (bf16[8,128], bf16[32,128]) {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.3 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %custom-call.1 = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) custom-call(%all-gather.3), custom_call_target="AsyncCollectiveStart"
}

%carrier (p.2: bf16[8,128]) -> bf16[8,128] {
  %convolution.1 = bf16[8,128]{1,0} convolution(%p.2, %p.2), dim_labels=bf_io->bf
  %all-gather.5 = bf16[32,128]{1,0} all-gather(%p.2), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%finished (p.3: bf16[8,128]) -> bf16[32,128] {
  %all-gather.7 = bf16[32,128]{1,0} all-gather(%p.3), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %custom-call.3 = bf16[32,128]{1,0} custom-call(%p.3, %all-gather.7), custom_call_target="AsyncCollectiveDone"
}

%body (p.4: bf16[8,128]) -> bf16[8,128] {
  %collective-permute-start = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, /*index=3*/u32[]{:S(2)}) collective-permute-start(%p.4), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %fusion.9 = bf16[8,128]{1,0} fusion(%p.4), kind=kOutput, calls=%carrier
  %collective-permute-done = bf16[8,128]{1,0} collective-permute-done(%collective-permute-start)
}

ENTRY %main (p: bf16[8,128]) -> bf16[32,128] {
  %async-collective-start = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) fusion(%p), kind=kCustom, calls=%started
  %while.1 = (bf16[8,128]{1,0}) while(%t), condition=%cond, body=%body
  ROOT %async-collective-done = bf16[32,128]{1,0} fusion(%p), kind=kCustom, calls=%finished
}
"""  # noqa: E501


def by_kind(text: str) -> dict[str, Collective]:
    return {one.kind: one for one in collectives(text)}


def test_reads_this_compiler():
    """Kinds, bytes, groups and loops with a known number of turns, along one axis of two."""
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("outer", "inner"), axis_types=kinds)
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def talk(x):
        gathered = jax.lax.all_gather(x, "inner", axis=0, tiled=True)
        exchanged = jax.lax.all_to_all(x, "inner", split_axis=1, concat_axis=0, tiled=True)
        turned = jax.lax.fori_loop(0, 5, lambda _, y: jax.lax.ppermute(jnp.sin(y), "inner", ring), x)
        scattered = jax.lax.psum_scatter(x, "inner", tiled=True)
        return jax.lax.psum(gathered.sum() + exchanged.sum() + turned.sum() + scattered.sum(), "outer")[None]

    spec = PartitionSpec(("outer", "inner"))
    jitted = jax.jit(jax.shard_map(talk, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = jitted.lower(jnp.ones((8 * 16, 32))).compile().as_text()

    one = 16 * 32 * 4
    assert totals(collectives(text)) == {
        "all-gather": (1, 3 * one),
        "all-to-all": (1, 3 * one // 4),
        "collective-permute": (5, 5 * one),
        "reduce-scatter": (1, 3 * one // 4),
        "all-reduce": (1, 4),
    }
    read = by_kind(text)
    assert read["all-gather"].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert read["all-reduce"].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert set(read["collective-permute"].groups) == {(i + r, j + r) for i, j in ring for r in (0, 4)}
    assert read["all-gather"].op_name.endswith("all_gather")


@pytest.mark.parametrize(
    ("axis", "groups"), [("inner", ((0, 1, 2, 3), (4, 5, 6, 7))), ("outer", ((0, 4), (1, 5), (2, 6), (3, 7)))]
)
def test_reads_what_xla_adds_by_itself(axis: str, groups: tuple[tuple[int, ...], ...]):
    """Split by rows, wanted by columns; XLA writes such groups by the axes of its mesh."""
    mesh = jax.make_mesh((2, 4), ("outer", "inner"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((axis,), (None, axis)))
    jitted = jax.jit(lambda x: x, in_shardings=rows, out_shardings=columns)
    (one,) = collectives(jitted.lower(jax.ShapeDtypeStruct((16, 32), jnp.float32)).compile().as_text())
    assert (one.kind, one.groups, one.result_bytes) == ("all-to-all", groups, 16 * 32 * 4 // mesh.shape[axis])


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("mesh['a'=2,'b'=3] {'b'}", ((0, 1, 2), (3, 4, 5))),
        ("mesh['a'=2,'b'=3] {'a'}", ((0, 3), (1, 4), (2, 5))),
        ("mesh['a'=2,'b'=1,'c'=2] {'a','c'}", ((0, 1, 2, 3),)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ],
)
def test_reads_groups_by_the_axes_of_a_mesh(written: str, groups: tuple[tuple[int, ...], ...]):
    text = GPU.replace("replica_groups=[2,4]<=[4,2]T(1,0)", f"replica_groups={written}")
    assert by_kind(text)["all-gather"].groups == groups


def test_reads_starts_and_dones_of_gpus():
    read = by_kind(GPU)
    gathered = read["all-gather"]
    assert gathered.groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert (gathered.result_bytes, gathered.sent_bytes, gathered.op_name) == (4096, 3072, "jit(f)/layer0/gather")
    assert (gathered.is_async, gathered.between) == (True, 1)
    exchanged = read["all-to-all"]
    assert (exchanged.count, exchanged.sent_bytes, exchanged.is_async, exchanged.between) == (1, 768, True, 2)
    scattered = read["reduce-scatter"]
    assert (scattered.result_bytes, scattered.sent_bytes, scattered.is_async) == (256, 768, False)
    reduced = read["all-reduce"]
    assert reduced.groups == (tuple(range(8)),)
    assert (reduced.result_bytes, reduced.sent_bytes, reduced.between) == (144, 252, 0)


def test_reads_fused_starts_and_open_loops_of_tpus():
    read = by_kind(TPU)
    gathered = read["all-gather"]
    assert (gathered.count, gathered.result_bytes, gathered.is_async, gathered.between) == (1, 8192, True, 1)
    turned = read["collective-permute"]
    assert (turned.result_bytes, turned.in_open_loop, turned.between) == (2048, True, 1)
    assert totals(collectives(TPU)) == {"all-gather": (1, 6144), "collective-permute": (1, 2048)}


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'c','a'}", ((0, 4, 1, 5), (2, 6, 3, 7))),
        ("mesh['data'=1,'tensor'=2] {'data'}", ((0,), (1,))),
        ("{}", (tuple(range(8)),)),
    ],
)
def test_all_forms_of_groups(written, groups):
    assert by_kind(GPU.replace("=[2,4]<=[8]", f"={written}"))["all-to-all"].groups == groups


def test_groups_of_one_send_nothing():
    assert totals(collectives(GPU.replace("=[2,4]<=[8]", "={{0},{1},{2},{3},{4},{5},{6},{7}}"))).keys() == {
        "all-gather",
        "all-reduce",
        "reduce-scatter",
    }


def test_what_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="no text of a compiled program"):
        collectives("module @jit_f {}")
    with pytest.raises(ValueError, match="replica groups in an unknown form"):
        collectives(GPU.replace("=[2,4]<=[8]", "=@mesh<2,4>"))
