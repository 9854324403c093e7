"""LPM: the longest cached prefix goes first, in spite of that nobody starves, and long queues stay cheap."""

import random

import pytest

from jaxserve.scheduler.policies.lpm import Lpm
from jaxserve.scheduler.policy import View
from tests.fakes import VOCAB_SIZE, ask, make_engine
from tests.scheduler.policies.watch import Watch, small_engine


def waiting_views(cached, arrivals=None):
    """Views of so many cached tokens each, and the list that notes who was asked."""
    asked = []
    views = []
    for index, count in enumerate(cached):
        view = View(f"v{index}", ask(f"v{index}", [1]), arrivals[index] if arrivals else float(index), 50, 99)
        view.watch_cache(lambda index=index, count=count: asked.append(index) or count)
        views.append(view)
    return views, asked


def ids(views):
    return [int(view.seq_id[1:]) for view in views]


def test_order_is_by_cached_prefix_then_by_arrival():
    views, _ = waiting_views([0, 16, 16, 32, 0])
    assert ids(Lpm().order(views, [], 0.0)) == [3, 1, 2, 0, 4]


def test_only_a_window_of_the_queue_is_looked_up():
    views, asked = waiting_views([0, 8, 16, 99, 98])
    assert ids(Lpm(window=3).order(views, [], 0.0)) == [2, 1, 0, 3, 4]
    assert sorted(asked) == [0, 1, 2]


def test_the_oldest_has_one_turn_in_so_much_time_and_only_if_it_is_admitted():
    views, _ = waiting_views([0, 8, 16, 0], [1.0, 2.0, 3.0, 0.5])
    policy = Lpm(patience_s=5.0)
    assert ids(policy.order(views, [], 5.4)) == [2, 1, 0, 3]
    for now_s in (5.5, 6.0):  # no room the first time
        assert ids(policy.order(views, [], now_s)) == [3, 2, 1, 0]
    policy.on_admit(views.pop(), 0, 6.0)
    assert ids(policy.order(views, [], 10.9)) == [2, 1, 0]
    assert ids(policy.order(views, [], 11.0)) == [0, 2, 1]


@pytest.mark.parametrize(("patience_s", "starves"), [(0.3, False), (1e9, True)])
def test_a_cold_request_is_served_while_hot_ones_keep_coming(patience_s, starves):
    rig = small_engine("lpm", num_blocks=60, num_slots=1, options={"patience_s": patience_s})
    watch = Watch(rig)
    rig.run(ask("warm", [1] * 16, max_tokens=1))
    cold = [ask(f"cold{i}", [2 + i] * 4, max_tokens=1) for i in range(3)]
    for request in cold:
        rig.engine.add(request)
    for index in range(150):
        for twin in "xy":
            rig.engine.add(ask(f"hot{index}{twin}", [1] * 17, max_tokens=1))
        rig.step()
    admitted = {view.request.request_id for view, _, _ in watch.admitted}
    assert {r.request_id in admitted for r in cold} == {not starves}
    rig.run()


def test_more_of_the_prompts_comes_from_the_cache_than_by_arrival():
    shares = {}
    for policy in ("fcfs", "lpm"):
        rng = random.Random(3)
        documents = [[rng.randrange(1, VOCAB_SIZE) for _ in range(24)] for _ in range(6)]
        rig = make_engine(policy=policy, num_blocks=24, num_slots=2, max_model_len=40)  # three documents fit
        requests = [ask(f"r{i}", [*rng.choice(documents), i % 19 + 1], max_tokens=3) for i in range(80)]
        rig.run(*requests)
        counters = rig.scheduler.counters
        shares[policy] = counters.cached_tokens / (counters.cached_tokens + counters.prompt_tokens)
    assert shares["lpm"] > shares["fcfs"] + 0.2, shares


def test_what_a_view_says_is_cached_is_what_its_admission_finds():
    """With and without copies in host memory that wait for it."""
    for num_host_blocks in (0, 40):
        rig = small_engine("lpm", num_blocks=14, num_host_blocks=num_host_blocks)
        rng = random.Random(5)
        documents = [[rng.randrange(1, VOCAB_SIZE) for _ in range(12)] for _ in range(3)]
        compared = []
        watch = Watch(rig)

        def order(waiting, running, now_s, policy=watch.policy, compared=compared):
            for view in policy.order(waiting, running, now_s):
                compared.append((view, view.num_cached()))
                yield view

        def on_admit(view, num_cached, now_s, policy=watch.policy, compared=compared):
            assert compared[-1] == (view, num_cached)
            policy.on_admit(view, num_cached, now_s)

        watch.order, watch.on_admit = order, on_admit
        requests = [
            ask(f"r{i}", [*rng.choice(documents), i % 19 + 1], max_tokens=9, ignore_eos=True) for i in range(30)
        ]
        rig.run(*requests)
        assert rig.scheduler.counters.preemptions
        assert bool(rig.scheduler.counters.swapped) is bool(num_host_blocks)
