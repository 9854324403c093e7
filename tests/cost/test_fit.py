"""Fitting: known models are found again, through noise; and what is told of others' errors is true."""

import random

import pytest

from jaxserve.cost.fit import Sample, errors, fit, scaled
from jaxserve.cost.forms import Fitted
from jaxserve.cost.model import CostModel, Host
from jaxserve.cost.work import Work, decode_work, prompt_work

TRUTH = CostModel(
    name="truth",
    device=Fitted(
        decode=((1, 1e-3), (8, 2e-3), (32, 5e-3)),
        mixed=((16, 3e-3), (64, 4e-3), (512, 20e-3)),
        decode_kv_s=2e-7,
        chunk_kv_s=5e-7,
        pair_s=1e-8,
        row_s=2e-5,
    ),
    host=Host(step_s=3e-4, row_s=1e-5, token_s=1e-6),
    hidden=0.7,
)


def works(seed: int, count: int = 80) -> list[Work]:
    """Steps of all sizes."""
    rng, made = random.Random(seed), []
    for _ in range(count // 2):
        rung = rng.choice([1, 8, 32])
        rows = rng.randint(rung // 2 + 1, rung)
        made.append(decode_work(rows, rows * rng.randrange(2000), rung=rung))
        rung, decodes = rng.choice([16, 64, 512]), rng.randrange(8)
        chunk = rng.randint(2, rung - decodes)
        made.append(prompt_work(chunk, rng.randrange(2000), decodes=decodes, decode_kv=decodes * 500, rung=rung))
    return made


def measured(model: CostModel, some: list[Work], noise: float = 0.0, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)

    def noisy(seconds: float) -> float:
        """Mostly a little longer; at times much."""
        return seconds * (1 + noise * rng.random()) * (3 if noise and rng.random() < 0.05 else 1)

    return [
        Sample(work, noisy(model.device_s(work)), noisy(model.host_s(work)), noisy(model.step_s(work))) for work in some
    ]


def test_a_known_model_is_found_again():
    model = fit(measured(TRUTH, works(0)), "found")
    device = model.device
    assert isinstance(device, Fitted) and isinstance(TRUTH.device, Fitted)
    assert device.decode_kv_s == pytest.approx(TRUTH.device.decode_kv_s, rel=1e-3)
    assert device.pair_s == pytest.approx(TRUTH.device.pair_s, rel=1e-3)
    assert dict(device.mixed) == pytest.approx(dict(TRUTH.device.mixed), rel=1e-3)
    assert model.hidden == pytest.approx(0.7, abs=1e-3)
    told = errors(model, measured(TRUTH, works(1)))
    assert told.median < 1e-3 and told.p90 < 1e-2 and told.rank > 0.999 and abs(told.bias) < 1e-3


def test_noise_is_borne():
    model = fit(measured(TRUTH, works(0), noise=0.3), "found")
    told = errors(model, measured(TRUTH, works(1), noise=0.3, seed=1))
    assert told.median < 0.15 and told.rank > 0.95
    assert errors(model, measured(TRUTH, works(1))).median < 0.25  # it is 15 % slow itself, as measured


def test_a_fit_obeys_the_laws():
    """Whatever was measured: nothing is negative, and larger sizes take no less."""
    rng = random.Random(3)
    wild = [Sample(work, *(rng.lognormvariate(-6, 1) for _ in range(3))) for work in works(2, 40)]
    model = fit(wild, "wild")
    device = model.device
    assert isinstance(device, Fitted)
    for curve in (device.decode, device.mixed):
        assert [seconds for _, seconds in curve] == sorted(seconds for _, seconds in curve)
    assert min(device.decode_kv_s, device.chunk_kv_s, device.pair_s, device.row_s, *vars_of(model.host)) >= 0
    assert 0 <= model.hidden <= 1
    told, measured_s = (sum(each) for each in zip(*((model.step_s(s.work), s.period_s) for s in wild), strict=True))
    assert told == pytest.approx(measured_s), "a stream of steps takes as long as it did"


def vars_of(host: Host) -> tuple[float, float, float]:
    return host.step_s, host.row_s, host.token_s


def test_a_slower_stream_than_its_parts_is_a_factor():
    """Device and host that hinder each other: periods beyond the sum of both."""
    slow = [sample._replace(period_s=1.5 * (sample.device_s + sample.host_s)) for sample in measured(TRUTH, works(0))]
    model = fit(slow, "slow")
    assert model.hidden == 0
    assert errors(model, slow).median < 0.02
    assert scaled(model, 2.0).step_s(works(1)[0]) == pytest.approx(2 * model.step_s(works(1)[0]))


def test_errors_are_those_of_the_periods():
    some = [sample._replace(period_s=1.1 * sample.period_s) for sample in measured(TRUTH, works(0))]
    told = errors(TRUTH, some)
    assert (told.median, told.p90, told.bias) == pytest.approx((0.1, 0.1, 0.1))
    assert errors(TRUTH, [s._replace(period_s=1 / s.period_s) for s in some]).rank == pytest.approx(-1)


def test_steps_of_one_kind_alone_do_not_suffice():
    with pytest.raises(ValueError, match="steps of decodes are needed, and steps with prompts"):
        fit(measured(TRUTH, [decode_work(1, 10)] * 5), "half")
