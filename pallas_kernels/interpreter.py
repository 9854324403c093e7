"""How Pallas kernels for TPU run: compiled, or, in a program for a CPU, interpreted."""

from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.platform import target_platform

PARAMS = pltpu.InterpretParams()  # tests turn on the detection of races


def interpret() -> pltpu.InterpretParams | bool:
    """What `pallas_call` takes as `interpret` in the program that is being traced."""
    return PARAMS if target_platform() == "cpu" else False
