"""Tally: what has become of requests, tokens and steps, in counts for whoever watches an engine.

The engine counts and others read when they like. Nobody is called back: a slow reader costs the engine nothing, and the
engine need not know who reads. Buckets are those of vLLM's metrics, so that its dashboards fit.
"""

import dataclasses
from collections.abc import Mapping

from jaxserve.histogram import Histogram, one_two_five
from jaxserve.output import RequestOutput
from jaxserve.request import Finish, Request, Task

PARTS = ("plan", "dispatch", "wait", "commit", "events", "deliver")  # of a turn of the engine's loop

_MOST_CLIENTS = 100  # each is a label in Prometheus, and names come from outside
_LONGEST_NAME = 64
OTHERS = "other"  # the name of all clients that have none of their own here
NOBODY = "none"  # the name of a client that has not said its name

# Upper ends of buckets, in seconds.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_GAP = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_PHASE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_PART = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 10.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N = (1, 2, 5, 10, 20)


@dataclasses.dataclass(slots=True)
class Client:
    """What was done for a client, in requests that have ended."""

    requests: int = 0
    prompt_tokens: int = 0  # cached ones included
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.output_tokens

    def add(self, other: "Client") -> None:
        """Count what another has."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens


class Tally:
    """Totals since the start. One thread counts; any may read, and two readings may be a step apart."""

    def __init__(self, max_model_len: int):
        lengths = one_two_five(max_model_len)
        self.prompt_tokens = 0  # of requests whose first answer token, or whose end, has come; cached ones included
        self.finished = dict.fromkeys(map(str, Finish), 0)  # answers, by why they ended
        self.clients: dict[str, Client] = {}  # at most _MOST_CLIENTS, and one for all others
        # Seconds.
        self.first_token = Histogram(_FIRST_TOKEN)  # from arrival
        self.gap = Histogram(_GAP)  # from a token of an answer to the next one
        self.per_token = Histogram(_GAP)  # a request's mean of these
        self.latency = Histogram(_PHASE)  # from arrival to the end
        self.queued = Histogram(_PHASE)  # from arrival to the first blocks
        self.prefill = Histogram(_PHASE)  # from there to the first token
        self.decode = Histogram(_PHASE)  # from there to the end
        self.inference = Histogram(_PHASE)  # the last two together
        self.parts = {part: Histogram(_PART) for part in PARTS}  # of a turn of the engine's loop
        # Numbers.
        self.step_tokens = Histogram(_STEP_TOKENS)
        self.prompt_lengths = Histogram(lengths)
        self.output_lengths = Histogram(lengths)  # of all answers of a request together
        self.longest_outputs = Histogram(lengths)  # of a request's answers the longest
        self.asked_n = Histogram(_N)
        self.asked_max_tokens = Histogram(lengths)
        self._since: dict[float | None, int] = {}  # time of an answer's last token -> answers with a new one

    def token(self, last_s: float | None) -> None:
        """An answer has got a token in this step, and the one before it at `last_s` (None: it is its first)."""
        self._since[last_s] = self._since.get(last_s, 0) + 1

    def stepped(self, num_tokens: int, now_s: float) -> None:
        """A step of so many input tokens (0: none) was collected, and `token` has been told all that it brought.

        Most answers had a token in the step before, and so one gap stands for all of these.
        """
        if num_tokens:
            self.step_tokens.add(num_tokens)
        since, self._since = self._since, {}
        for last_s, times in since.items():
            if last_s is not None:
                self.gap.add(now_s - last_s, times)

    def took(self, seconds: Mapping[str, float]) -> None:
        """How long parts of a turn took."""
        for part, value in seconds.items():
            self.parts[part].add(value)

    def began(self, request: Request, arrival_s: float, now_s: float) -> None:
        """A request has got its first token."""
        self.prompt_tokens += len(request.prompt_token_ids)
        self.first_token.add(now_s - arrival_s)

    def ended(self, request: Request, output: RequestOutput) -> None:
        """All answers of a request have ended."""
        metrics, lengths = output.metrics, [len(answer.token_ids) for answer in output.outputs]
        num_prompt, num_output = len(request.prompt_token_ids), sum(lengths)
        for answer in output.outputs:
            self.finished[str(answer.finish_reason)] += 1
        if metrics.first_token_s is None and metrics.started_s is not None:
            self.prompt_tokens += num_prompt
        self._count(request.client, Client(1, num_prompt, metrics.num_cached_tokens, num_output))
        if any(answer.finish_reason in (Finish.ABORT, Finish.ERROR) for answer in output.outputs):
            return  # cut short: its times and lengths say nothing of the others'
        self._observe_times(output, num_output)
        self.prompt_lengths.add(num_prompt)
        if request.task is Task.GENERATE:
            self.output_lengths.add(num_output)
            self.longest_outputs.add(max(lengths))
            self.asked_n.add(request.params.n)
            if request.params.max_tokens is not None:
                self.asked_max_tokens.add(request.params.max_tokens)

    def _observe_times(self, output: RequestOutput, num_output: int) -> None:
        metrics = output.metrics
        started_s, first_s, end_s = metrics.started_s, metrics.first_token_s, metrics.finished_s
        assert started_s is not None and end_s is not None, "it has run, and has ended"
        self.latency.add(end_s - metrics.arrival_s)
        self.queued.add(started_s - metrics.arrival_s)
        self.inference.add(end_s - started_s)
        if first_s is not None:
            self.prefill.add(first_s - started_s)
            self.decode.add(end_s - first_s)
            if num_output > len(output.outputs):
                self.per_token.add((end_s - first_s) * len(output.outputs) / (num_output - len(output.outputs)))

    def _count(self, name: str, done: Client) -> None:
        """For a client. When there are too many, the one with the fewest tokens joins the others: thousands of new names
        push each other out, and not those who were here for long."""
        name, clients = client_name(name), self.clients
        if name not in clients:
            clients = {OTHERS: Client()} | clients  # a new one: somebody may be reading the old one
            if len(clients) > _MOST_CLIENTS:
                smallest = min(clients.keys() - {OTHERS}, key=lambda each: clients[each].num_tokens)
                clients[OTHERS].add(clients.pop(smallest))
            clients.setdefault(name, Client())
            self.clients = clients
        clients[name].add(done)


def client_name(name: str) -> str:
    """A client's name as a label: short, and text that can be encoded."""
    return name[:_LONGEST_NAME].encode(errors="replace").decode() or NOBODY
