"""What two processes say to each other."""

import os
import pickle
import socket
from multiprocessing.connection import Client, Listener

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.executor.line import Failed, Line, LoadModel, RunStep, decode, encode
from jaxserve.request import SamplingParams
from jaxserve.step import BlockCopy, Row, Seat, SlotStart, StepPlan


def test_a_plan_arrives_as_it_was_sent():
    params = SamplingParams(logit_bias={3: 1.5}, stop="end", allowed_token_ids=[1, 2])
    seat = Seat(seq_id="a", epoch=1, slot=2, params=params)
    row = Row(seat, start=3, token_ids=(4, 5), blocks=(6,), logprob_targets=(-1, 7))
    start = SlotStart(slot=2, params=params, prompt_token_ids=(1,), output_token_ids=())
    plan = StepPlan(index=8, rows=(row,), copies=(BlockCopy(1, 2),), starts=(start,))
    assert decode(encode(RunStep(0, plan))) == RunStep(0, plan)
    assert decode(encode(LoadModel(1, "tiny", EngineConfig(seed=5)))) == LoadModel(1, "tiny", EngineConfig(seed=5))


def test_numbers_of_numpy_arrive_as_those_of_python():
    seat = Seat(seq_id="a", slot=0, params=SamplingParams(top_p=np.float64(0.5)))
    row = Row(seat, start=np.int64(3), token_ids=())
    arrived = decode(encode(RunStep(0, StepPlan(index=0, rows=(row,))))).plan.rows[0]
    assert type(arrived.start) is int
    assert type(arrived.params.top_p) is float


class _Runs:
    def __reduce__(self):
        return os.putenv, ("JAXSERVE_TEST", "ran")


@pytest.mark.parametrize("content", [_Runs(), Failed(_Runs()), print, np.zeros(2)])
def test_nothing_but_messages_is_read(content):
    with pytest.raises(pickle.UnpicklingError, match="is no part of a message"):
        decode(pickle.dumps(content))


def test_what_is_no_message_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="SamplingParams is no message"):
        decode(pickle.dumps(SamplingParams()))


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="these options are Linux's")
def test_a_host_that_falls_silent_is_noticed_and_a_plan_is_sent_at_once():
    with Listener(("127.0.0.1", 0)) as listener:
        connection = Client(listener.address)
        Line(connection, "process 0")
        with socket.socket(fileno=os.dup(connection.fileno())) as line:
            assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_NODELAY")
            idle_s, every_s, times, nodelay = (line.getsockopt(socket.IPPROTO_TCP, getattr(socket, o)) for o in options)
        connection.close()
    assert idle_s + every_s * times < 15
    assert nodelay == 1
