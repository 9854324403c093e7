"""Checkpoints: a folder in Hugging Face format -> parameters on the device, one tensor at a time.

The folder is untrusted: only safetensors are read, never a pickle, and a name in an index cannot leave the folder.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from jaxserve.errors import CheckpointError
from jaxserve.models.spec import Part, WeightSpec, is_spec, leaves
from jaxserve.sharding.mesh import ONE_DEVICE, Parallel
from jaxserve.sharding.rules import partition

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_AT_ONCE = 32  # tensors read before their files are opened anew
# Stored by some exporters, computed or shared here.
_HARMLESS = ("rotary_emb.inv_freq", "lm_head.weight", "masked_bias", "attn.bias")


def load(folder: Path, specs: Any, dtype: jnp.dtype, mesh: Mesh | None = None) -> Any:
    """Read every parameter of the tree `specs` from a folder, cast to `dtype`, and split over a mesh if there is one.

    Names, shapes and the absence of unknown tensors are checked before any weight is read. Peak host memory is the
    parameters plus one of them.

    Raises:
      CheckpointError: a file or tensor is missing, damaged, of another shape, or not known to the model.
    """
    files = tensor_files(folder)
    _check(files, specs)
    return jax.tree.map(lambda spec: place(_read(files, spec, dtype), sharding_of(spec, mesh)), specs, is_leaf=is_spec)


def random(specs: Any, dtype: jnp.dtype, seed: int, mesh: Mesh | None = None) -> Any:
    """Random parameters made on the devices: norms are ones, matrices normal with deviation fan_in ** -0.5."""
    key = jax.random.key(seed)
    flat, tree = jax.tree.flatten(specs, is_leaf=is_spec)
    normal = functools.cache(_normal)  # one program for all layers
    made = [
        normal(spec.shape, spec.fan_in**-0.5, dtype, sharding_of(spec, mesh))(jax.random.fold_in(key, index))
        if spec.fan_in
        else place(np.ones(spec.shape, dtype), sharding_of(spec, mesh))
        for index, spec in enumerate(flat)
    ]
    return jax.tree.unflatten(tree, made)


def sharding_of(spec: WeightSpec, mesh: Mesh | None) -> NamedSharding | None:
    """How a parameter is split over a mesh."""
    return None if mesh is None else NamedSharding(mesh, partition(spec.axes))


def place(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """Put an array on the devices. Each process brings the parts of its own, so no data crosses hosts."""
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def nbytes(specs: Any, dtype: jnp.dtype, parallel: Parallel = ONE_DEVICE) -> int:
    """Bytes of all parameters of a spec tree, on each device."""
    return sum(spec.size // parallel.num_shards(*spec.axes) for spec in leaves(specs)) * jnp.dtype(dtype).itemsize


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, for a single file or a sharded index.

    Raises:
      CheckpointError: no weights, only pickles, a damaged header, or an index that points outside the folder.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    if index.is_file():
        return dict(_from_index(folder, index))
    if single.is_file():
        return dict.fromkeys(_names(single), single)
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are read",
            remedy="Convert them to safetensors first",
        )
    raise CheckpointError(f"no {_SINGLE} or {_INDEX} in {folder}")


def _from_index(folder: Path, index: Path) -> Iterator[tuple[str, Path]]:
    try:
        table = json.loads(index.read_text())["weight_map"]
        entries = [(str(name), str(file)) for name, file in table.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error}") from None
    present: dict[Path, set[str]] = {}
    for name, file in entries:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index.name} places {name} in {file!r}, which is not a safetensors file of this folder"
            )
        path = folder / file
        if path not in present:
            if not path.is_file():
                raise CheckpointError(
                    f"{index.name} names {file}, which is missing", remedy="Download the folder again"
                )
            present[path] = set(_names(path))
        if name not in present[path]:
            raise CheckpointError(f"{index.name} places {name} in {file}, which does not hold it")
        yield name, path


def _names(path: Path) -> list[str]:
    with _open(path) as tensors:
        return list(tensors.keys())


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} is damaged or incomplete: {error}", remedy="Download or export it again"
        ) from None


def _check(files: Mapping[str, Path], specs: Any) -> None:
    wanted = {part.name: (spec, part) for spec in leaves(specs) for part in spec.parts}
    missing = [name for name in wanted if name not in files]
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, first {missing[0]}", remedy="Is the download complete?"
        )
    unknown = [name for name in files if name not in wanted and not name.endswith(_HARMLESS)]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors are not known to this architecture, first {unknown[0]}",
            remedy="Its config.json may lack a key that enables them",
        )
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(files[name], []).append(name)
    for path, names in by_file.items():
        with _open(path) as tensors:
            for name in names:
                spec, part = wanted[name]
                stored, expected = tensors.get_slice(name), list(spec.stored_shape(part))
                if stored.get_shape() != expected:
                    raise CheckpointError(f"{name} has shape {stored.get_shape()}, but config.json asks for {expected}")
                if stored.get_dtype() not in _FLOATS:
                    raise CheckpointError(
                        f"{name} is stored as {stored.get_dtype()}; only {', '.join(_FLOATS)} are read"
                    )


def _read(files: Mapping[str, Path], spec: WeightSpec, dtype: jnp.dtype) -> np.ndarray:
    """Assemble one parameter."""
    if len(spec.parts) == 1 and not spec.parts[0].where:
        ((_, stored),) = _read_parts(files, spec.parts)
        return stored.reshape(spec.shape).astype(dtype, copy=False)
    whole = np.zeros(spec.shape, dtype)
    for part, stored in _read_parts(files, spec.parts):
        region = whole[part.where]
        if part.repeat > 1:
            stored = np.repeat(stored.reshape(len(region) // part.repeat, -1), part.repeat, axis=0)
        np.copyto(region, stored.reshape(region.shape), casting="unsafe")
    return whole


def _read_parts(files: Mapping[str, Path], parts: Sequence[Part]) -> Iterator[tuple[Part, np.ndarray]]:
    """Tensors of the checkpoint, one at a time. What was read of a file stays mapped while it is open; but to open one is to
    read the names of all its tensors, and a layer's experts are hundreds. So files are opened for some tensors at once."""
    for begin in range(0, len(parts), _AT_ONCE):
        some = parts[begin : begin + _AT_ONCE]
        with contextlib.ExitStack() as stack:
            opened = {path: stack.enter_context(_open(path)) for path in {files[part.name] for part in some}}
            for part in some:
                path = files[part.name]
                try:
                    stored = opened[path].get_tensor(part.name)
                except (SafetensorError, OSError, ValueError) as error:
                    raise CheckpointError(f"{part.name} in {path.name} cannot be read: {error}") from None
                yield part, stored


def _normal(shape: tuple[int, ...], scale: float, dtype: jnp.dtype, sharding: NamedSharding | None) -> Any:
    """A jitted function from a key to random numbers."""
    return jax.jit(
        lambda key: (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype), out_shardings=sharding
    )
