"""One engine over several processes: the leader (process 0) decides, the followers do the same in step.

Each process has some of the devices, and all must start the same programs in the same order. So every plan goes to the
followers before the leader dispatches it, and they dispatch it too. What a step returns lies on all devices, so that no
result travels back. Followers cannot fall behind: the leader waits for every step but the last two, and a step ends nowhere
before all processes have started it.

A thread that waits for the devices of a process that has gone cannot be stopped. So another one listens on each connection:
when the other side has gone, or says that it failed, it prints that and ends its own process.
"""

import contextlib
import itertools
import pickle
import queue
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError
from jaxserve.executor.base import Executor
from jaxserve.executor.line import (
    DropModel,
    Failed,
    Leave,
    Line,
    LoadModel,
    Message,
    Ready,
    Refused,
    RunStep,
    end_process,
)
from jaxserve.step import Capacity, Row, Seat, StepPlan, StepResult

_GRACE_S = 2.0  # when a step fails because a process has gone, that it has gone is the better reason: wait for it
# Opens the links between devices, so that no request waits for them. It writes to a block that nobody has yet.
_FIRST_STEP = StepPlan(index=-1, rows=(Row(Seat(seq_id="", slot=0), start=0, token_ids=(0,), blocks=(0,)),))


class Followers:
    """All other processes, as the leader sees them.

    Whoever holds `lock` may send and start programs: two engines must not start theirs in different orders here and there.
    """

    def __init__(self, lines: list[Line]):
        self.lock = threading.RLock()
        self._lines = lines
        self._engines = itertools.count()
        self._loading: int | None = None  # an engine that the followers load, and that nobody leads yet
        self._dropped: deque[int] = deque()
        self._answers: queue.SimpleQueue[tuple[Line, Ready | Refused]] = queue.SimpleQueue()
        self._is_leaving = False
        self._watchers = [threading.Thread(target=self._watch, args=(line,), daemon=True) for line in lines]
        for watcher in self._watchers:
            watcher.start()

    def load(self, model: str, config: EngineConfig) -> None:
        """Let the followers load a model, while the leader does."""
        if self._loading is not None:  # the leader could not
            self._dropped.append(self._loading)
        self._loading = next(self._engines)
        self._send(LoadModel(self._loading, model, config))

    def lead(self, executor: Executor) -> "LeaderExecutor":
        """Wait until the followers have loaded the model too, and run a first step.

        Raises: JaxserveError if one of them cannot load it.
        """
        assert self._loading is not None, "load comes first"
        engine, waiting = self._loading, set(self._lines)
        while waiting:
            line, answer = self._answers.get()
            if answer.engine == engine and isinstance(answer, Refused):
                raise JaxserveError(f"{line.name}: {answer.reason}")
            if answer.engine == engine:  # else of a model that the leader gave up
                waiting.remove(line)
        self._loading = None
        leader = LeaderExecutor(executor, self, engine)
        weakref.finalize(leader, self._dropped.append, engine).atexit = False
        leader.collect(leader.dispatch(_FIRST_STEP))
        return leader

    def run(self, engine: int, plan: StepPlan) -> None:
        """Let the followers dispatch a step."""
        self._send(RunStep(engine, plan))

    def leave(self, timeout_s: float) -> bool:
        """Let the followers go, and wait; returns whether they have."""
        self._is_leaving = True
        with contextlib.suppress(OSError):
            self._send(Leave())
        deadline_s = time.monotonic() + timeout_s
        for watcher in self._watchers:
            watcher.join(max(0.0, deadline_s - time.monotonic()))
        return not any(watcher.is_alive() for watcher in self._watchers)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """A step that fails here has run elsewhere, or hangs there: end all processes."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever it is, the processes are no longer in step
            time.sleep(_GRACE_S)
            fail(f"process 0: {_told(error)}", self._lines)

    def _send(self, message: Message) -> None:
        with self.lock:
            while self._dropped:
                self._send_to_all(DropModel(self._dropped.popleft()))
            self._send_to_all(message)

    def _send_to_all(self, message: Message) -> None:
        for line in self._lines:
            line.send(message)

    def _watch(self, line: Line) -> None:
        others = [other for other in self._lines if other is not line]
        try:
            while True:
                match line.receive():
                    case Ready() | Refused() as answer:
                        self._answers.put((line, answer))
                    case Failed(reason):
                        fail(f"{line.name}: {reason}", others)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            if not self._is_leaving:
                fail(f"{line.name} {_gone(error)}", others)


class LeaderExecutor:
    """See `executor.base.Executor`: takes the followers along. A step that fails ends all processes."""

    def __init__(self, executor: Executor, followers: Followers, engine: int):
        self._executor, self._followers, self._engine = executor, followers, engine

    def capacity(self) -> Capacity:
        """What fits on the devices of all processes."""
        return self._executor.capacity()

    def dispatch(self, plan: StepPlan) -> Any:
        """Start a step in all processes."""
        with self._followers.lock, self._followers.failing_together():
            self._followers.run(self._engine, plan)
            return self._executor.dispatch(plan)

    def collect(self, pending: Any) -> StepResult:
        """Wait for a step."""
        with self._followers.failing_together():
            return self._executor.collect(pending)


def follow(line: Line, load: Callable[[str, EngineConfig], Executor]) -> None:
    """Do what the leader says until it says goodbye. Ends the process if the leader has gone, or if a step fails.

    `load` makes an executor of a model's name and options. Ctrl-C is left to the leader.
    """
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(line, messages), daemon=True).start()
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    executors: dict[int, Executor] = {}
    under_way: deque[tuple[Executor, Any]] = deque()
    try:
        while not isinstance(message := messages.get(), Leave):
            match message:
                case LoadModel(engine, model, config):
                    try:
                        executors[engine] = load(model, config)
                        line.send(Ready(engine))
                    except JaxserveError as error:
                        line.send(Refused(engine, str(error)))
                case RunStep(engine, plan):
                    executor = executors[engine]
                    under_way.append((executor, executor.dispatch(plan)))
                    if len(under_way) > 1:  # like the engine: one step runs, one waits
                        before, pending = under_way.popleft()
                        before.collect(pending)
                case DropModel(engine):
                    executors.pop(engine, None)
    except Exception as error:  # noqa: BLE001  whatever it is, the processes are no longer in step
        traceback.print_exc()
        time.sleep(_GRACE_S)
        fail(_told(error), [line])


def fail(reason: str, lines: Iterable[Line]) -> NoReturn:
    """End this process, and those at the other ends."""

    def tell_others() -> None:
        for line in lines:
            with contextlib.suppress(OSError):
                line.send(Failed(reason))

    end_process(reason, tell_others)


def _told(error: Exception) -> str:
    """An error in one line."""
    return str(error) if isinstance(error, JaxserveError) else f"{type(error).__name__}: {error}"


def _gone(error: Exception) -> str:
    """What a connection that broke says about the other side."""
    if isinstance(error, EOFError | ConnectionError):
        return "has gone: it was killed or has crashed; see what it printed"
    return f"cannot be reached any more ({_told(error)})"


def _listen(line: Line, messages: "queue.SimpleQueue[Message]") -> None:
    try:
        while not isinstance(message := line.receive(), Leave):
            if isinstance(message, Failed):
                end_process(message.reason)
            messages.put(message)
        messages.put(message)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        end_process(f"{line.name} {_gone(error)}")
