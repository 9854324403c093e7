"""Batches in the background: which run, which wait, and their end with the server."""

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jaxserve.batch.endpoints import ENDPOINTS, Model
from jaxserve.batch.job import Reader
from jaxserve.errors import UnavailableError
from jaxserve.openai.batch import BatchBody
from jaxserve.openai.errors import ApiError
from jaxserve.server.batch_run import Limits, Run
from jaxserve.server.batch_state import Batch, BatchStore
from jaxserve.server.caller import Caller, owned
from jaxserve.server.files import BATCH, FileStore
from jaxserve.server.lane import Lane, Share
from jaxserve.server.state import ServerState

_log = logging.getLogger(__name__)

_AT_ONCE = 8  # batches that run; each reads ahead
_AT_ONCE_PER_CLIENT = 2  # so that no client can keep all others waiting
_MOST_UNFINISHED = 100  # of a client
_SWEEP_S = 600.0
_LOADING_S = 0.1  # between looks whether the engine is there


class Batches:
    """Those of all clients. Lives on the event loop."""

    def __init__(self, state: ServerState, store: BatchStore, files: FileStore):
        self._state = state
        self._store = store
        self._files = files
        self._share: Share | None = None
        self._waiting = store.unfinished()  # those that a server before this one has left, and then new ones
        self._running: dict[str, asyncio.Task[None]] = {}
        self._clients = Counter[str]()  # of those that run
        self._is_closing = threading.Event()
        self._tasks = [asyncio.create_task(self._begin()), asyncio.create_task(self._sweep())]

    async def add(self, body: BatchBody, caller: Caller, meta: Mapping[str, Any]) -> Batch:
        """A new batch.

        Raises:
          ApiError: there is no such file or endpoint, or the client has too many batches already.
        """
        if body.endpoint not in ENDPOINTS:
            known = ", ".join(ENDPOINTS)
            raise ApiError(
                f"endpoint {body.endpoint!r} is not one of {known}", param="endpoint", code="invalid_endpoint"
            )
        unfinished = sum(not batch.has_ended for batch in self._store.of(caller.client))
        if unfinished >= _MOST_UNFINISHED:
            raise ApiError(f"{unfinished} batches are unfinished; wait for some", status=429, code="too_many_batches")
        file = self._files.get(caller.client, body.input_file_id)
        if file.purpose != BATCH:
            raise ApiError(
                f"the purpose of file {file.file_id} is {file.purpose!r}, not {BATCH!r}",
                param="input_file_id",
                code="invalid_purpose",
            )
        add = functools.partial(
            self._store.add,
            self._files.path(file),
            client=caller.client,
            endpoint=body.endpoint,
            input_file_id=file.file_id,
            completion_window=body.completion_window,
            expires_at=time.time() + body.window_s,
            meta=dict(meta),
            metadata=body.metadata,
            output_ttl_s=None if body.output_expires_after is None else body.output_expires_after.seconds,
        )
        try:
            batch = await asyncio.to_thread(add)
        except FileNotFoundError:  # deleted a moment ago
            raise ApiError("the file has just been deleted", status=404, code="file_not_found") from None
        self._waiting.append(batch)
        self._pump()
        return batch

    async def cancel(self, batch: Batch) -> None:
        """End a batch early. Lines under way are not answered; files of what was answered come.

        Raises:
          ApiError: it has ended, or is about to.
        """
        move = functools.partial(self._store.move, batch, "validating", "in_progress", to="cancelling")
        if not await asyncio.to_thread(move) and batch.status != "cancelling":
            raise ApiError(f"the batch is {batch.status}, and cannot be cancelled", status=409, code="batch_ended")
        self._pump()

    async def close(self) -> None:
        """Stop all, wherever they are. What is answered is on disk; another server goes on."""
        self._is_closing.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._running.values(), return_exceptions=True)

    async def _begin(self) -> None:
        while self._state.engine is None:
            await asyncio.sleep(_LOADING_S)
        self._share = Share(self._state.engine, self._state.config.batch_share)
        self._pump()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._pump()  # some may have expired
            with contextlib.suppress(OSError):  # next time
                await asyncio.to_thread(self._files.sweep)
                await asyncio.to_thread(self._store.sweep)

    def _pump(self) -> None:
        """Start batches that wait, while there is room: the oldest first, but of each client only some. Those that are
        to end have to wait for nobody."""
        for batch in list(self._waiting):
            if self._share is None or self._is_closing.is_set():
                return
            has_room = len(self._running) < _AT_ONCE and self._clients[batch.client] < _AT_ONCE_PER_CLIENT
            if has_room or self._reason(batch):
                self._waiting.remove(batch)
                self._clients[batch.client] += 1
                self._share.num_lanes += 1
                self._running[batch.batch_id] = asyncio.create_task(self._run(batch, self._share))

    async def _run(self, batch: Batch, share: Share) -> None:
        state, config = self._state, self._state.config
        account = state.account_of_batches(batch.client)
        lane = Lane(
            state.ready_engine,
            share,
            asyncio.get_running_loop(),
            stop=lambda: self._reason(batch),
            wait_s=lambda: state.quotas.wait_s(account, time.monotonic()),
        )
        run = Run(
            batch=batch,
            store=self._store,
            files=self._files,
            lane=lane,
            reader=Reader(
                model=model_of(state),
                endpoints=(batch.endpoint,),
                own=lambda meta: owned(batch.meta | meta, Caller(batch.client), isolate=config.isolate_clients),
            ),
            limits=Limits(max_lines=config.max_batch_lines, max_line_bytes=config.max_body_bytes),
        )
        try:
            await _in_thread(run, f"jaxserve-{batch.batch_id[:14]}")
        except UnavailableError:  # the engine has ended first; the next one goes on
            pass
        except Exception as error:  # noqa: BLE001  one batch must not stop the others
            _log.error("a batch has failed, which is a bug", exc_info=error)
            with contextlib.suppress(OSError):  # a full disk: it stays as it is, and the next server goes on
                await asyncio.to_thread(run.fail, f"{type(error).__name__}: {error!s:.200}")
        finally:
            share.num_lanes -= 1
            self._clients[batch.client] -= 1
            del self._running[batch.batch_id]
            self._pump()

    def _reason(self, batch: Batch) -> str:
        """Why it must end now."""
        if self._is_closing.is_set():
            return "closing"
        if batch.status == "cancelling":
            return "cancelled"
        return "expired" if time.time() >= batch.expires_at else ""


def model_of(state: ServerState) -> Model:
    """What request bodies are read for."""
    return Model(
        names=state.model_names,
        tokenizer=state.tokenizer,
        dialect=state.dialect,
        max_model_len=state.ready_engine.max_model_len,
        embedding_size=state.ready_engine.embedding_size,
    )


async def _in_thread(run: Run, name: str) -> None:
    """Not one of asyncio's threads, of which there are few: a batch may take days."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def work() -> None:
        failure: BaseException | None = None
        try:
            run()
        except BaseException as error:  # noqa: BLE001  it is raised below
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            done.get_loop().call_soon_threadsafe(_settle, done, failure)

    threading.Thread(target=work, name=name, daemon=True).start()
    await done


def _settle(done: asyncio.Future[None], failure: BaseException | None) -> None:
    if done.cancelled():
        return
    if failure is None:
        done.set_result(None)
    else:
        done.set_exception(failure)
