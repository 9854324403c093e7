"""Programs of several processes, one for each host (or device). The same script runs in all of them:

    from jaxserve import LLM, distributed

    distributed.initialize("10.0.0.1:1234", num_processes=2, process_id=0)  # on the other host: process_id=1
    llm = LLM("Qwen/Qwen3-32B", tensor_parallel_size=8)

`initialize` returns in process 0 only, which runs the rest of the script. The others stay inside: they load what process 0
loads, run what it runs, and exit when it does. If one process dies, all end within seconds, with exit code 1.
"""

import atexit
import contextlib
import ctypes
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.build import Built
from jaxserve.build import build as build_here
from jaxserve.config import EngineConfig, processes_of_environment
from jaxserve.errors import ConfigError
from jaxserve.executor.line import Hello, Line, end_process
from jaxserve.executor.lockstep import Followers, fail, follow

_LEAVE_S = 60.0  # for all processes to end together
_JAX_PATIENCE_S = 1 << 20  # longer than ours: JAX aborts the process when its own ends, and cannot say why
_ADDRESS_BYTES = 512
_PACKAGES = ("jaxserve", "jax", "jaxlib")

_followers: Followers | None = None  # of this process; JAX knows one group of processes, so there is one


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300.0,
) -> None:
    """Join the other processes of this program. Returns in process 0 only; comes before anything that uses a device.

    The arguments are those of `jax.distributed.initialize`: host and free port of process 0, how many processes there are,
    and which one this is. Without any, they are taken from JAXSERVE_COORDINATOR_ADDRESS, JAXSERVE_NUM_PROCESSES and
    JAXSERVE_PROCESS_ID; on Cloud TPU and under Slurm, Open MPI or Kubernetes JAX finds them out. For the processes' other
    connections the system chooses the ports, so firewalls must let the hosts reach each other on all.

    Ends the process with code 1 if not all processes have joined after `timeout_s` seconds.

    Raises:
      ConfigError: an argument is missing or wrong, or JAX is in use already.
      SystemExit: in all processes but 0, with code 0, when process 0 is done.
    """
    global _followers
    if _followers is not None:
        raise ConfigError("distributed.initialize was called twice")
    asked = (coordinator_address, num_processes, process_id)
    if asked == (None, None, None):
        asked = processes_of_environment()
    where = f"the coordinator address {asked[0]}" if asked[0] else "the same coordinator address"
    check = f"Were all started, with {where} and different process ids, and can their hosts reach each other?"
    with _ending_after(timeout_s, f"not all processes have joined within {timeout_s:g} s. {check}"):
        if not jax.distributed.is_initialized():
            _initialize_jax(*asked)
        if jax.process_count() == 1:
            return
        if jax.process_index() == 0:
            with _stdout_to_stderr():
                _followers = Followers(_accept(asked[0]))
            atexit.register(shutdown)
            return
        os.dup2(2, 1)  # see `_stdout_to_stderr`; no answers come from here
        line = _connect()
    follow(line, lambda model, config: build_here(model, config).executor)
    line.close()
    jax.distributed.shutdown()
    raise SystemExit(0)


def shutdown() -> None:
    """Let the other processes go; what was loaded cannot be used any more. Runs by itself at the end of the program."""
    global _followers
    if _followers is not None:
        followers, _followers = _followers, None
        if not followers.leave(_LEAVE_S):  # no timer: Python starts no threads any more at its end
            end_process(f"not all processes have left within {_LEAVE_S:g} s")
        jax.distributed.shutdown()


def build(model: str | Path, config: EngineConfig) -> Built:
    """`build.build`, in all processes.

    Raises:
      ConfigError: JAX runs several processes that have not joined here. Else what `build.build` raises, for any process.
    """
    if _followers is not None:
        with _followers.lock, _stdout_to_stderr():
            return build_here(model, config, _followers)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise ConfigError(
            f"JAX runs {jax.process_count()} processes, which do not know yet who decides",
            remedy="Call jaxserve.distributed.initialize() in all of them",
        )
    return build_here(model, config)


def _initialize_jax(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, and the process would live on
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=_JAX_PATIENCE_S,
            shutdown_timeout_seconds=int(_LEAVE_S),
        )
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(
            f"the processes cannot be joined: {str(error).rstrip('.')}",
            remedy="Give coordinator_address (host:port of process 0), num_processes and process_id",
        ) from error


def _accept(coordinator_address: str | None) -> list[Line]:
    """Process 0: let the others know where it listens, over JAX's own links, and wait for them."""
    key = secrets.token_bytes(32)
    with _listener(coordinator_address, key) as listener:
        host, port = listener.address
        _broadcast(json.dumps({"host": host, "port": port, "key": key.hex()}).encode())
        lines: list[Line] = []
        while len(lines) < jax.process_count() - 1:
            try:
                connection = listener.accept()
            except (AuthenticationError, EOFError, OSError):
                continue  # a stranger
            line = Line(connection, "a process")
            hello = line.receive()
            assert isinstance(hello, Hello), "a follower greets first"
            line.name = f"process {hello.process_id} ({hello.host})"
            lines.append(line)
            if hello.versions != _versions():
                fail(
                    f"{line.name} has {hello.versions}, process 0 has {_versions()}. Install the same everywhere.",
                    lines,
                )
    return lines


def _connect() -> Line:
    """The other processes: find process 0."""
    address = json.loads(_broadcast(b""))
    connection = Client((address["host"], address["port"]), authkey=bytes.fromhex(address["key"]))
    line = Line(connection, "process 0")
    line.send(Hello(jax.process_index(), socket.gethostname(), _versions()))
    return line


def _broadcast(content: bytes) -> bytes:
    """Give `content` in process 0, nothing in the others, and get it in all."""
    mesh = Mesh(np.asarray(jax.devices()), "device")
    said = np.tile(np.frombuffer(content.ljust(_ADDRESS_BYTES, b"\0"), np.uint8), (jax.device_count(), 1))
    parts = jax.make_array_from_callback(said.shape, NamedSharding(mesh, P("device")), lambda index: said[index])
    heard = jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(mesh, P()))(parts)
    return bytes(np.asarray(jax.block_until_ready(heard))).rstrip(b"\0")


def _listener(coordinator_address: str | None, key: bytes) -> Listener:
    """On the address at which process 0 is known, or the one that faces outwards; any free port."""
    backlog = jax.process_count()
    if coordinator_address is not None:
        with contextlib.suppress(OSError):  # known by an address that is not its own, or no IPv4
            return Listener((coordinator_address.rpartition(":")[0], 0), "AF_INET", backlog, authkey=key)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address that nobody has; connecting a datagram socket sends nothing
        return Listener((probe.getsockname()[0], 0), "AF_INET", backlog, authkey=key)


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in _PACKAGES)


@contextlib.contextmanager
def _ending_after(timeout_s: float, reason: str) -> Iterator[None]:
    """End the process if the block takes longer: nothing else can stop a thread that waits inside of JAX."""
    timer = threading.Timer(timeout_s, end_process, [reason])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Gloo, which connects CPUs, prints each connection to standard output, where only answers belong."""
    if sys.stdout is not None:
        sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
