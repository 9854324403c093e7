"""Steps are cut at compiled sizes, for all replicas at once."""

from jaxserve.scheduler.draft import Draft, trim
from tests.fakes import ask, make_engine

RUNGS = (16, 64, 256)


def drafts(*parts: list[int]) -> list[Draft]:
    """Drafts of so many tokens for each sequence."""
    found = [Draft(budget=256) for _ in parts]
    for draft, part in zip(found, parts, strict=True):
        for count in part:
            draft.add(object(), count)  # pyright: ignore[reportArgumentType]
    return found


def trimmed(*parts: list[int]) -> list[list[int]]:
    found = drafts(*parts)
    trim(found, RUNGS)
    return [[count for _, count in draft.entries] for draft in found]


def test_one_replica_alone():
    assert trimmed([70]) == [[64]]
    assert trimmed([1, 1, 68]) == [[1, 1, 62]]
    assert trimmed([200]) == [[200]], "the rest would need another long step"
    assert trimmed([64]) == [[64]]
    assert trimmed([10]) == [[10]], "there is no smaller step"
    assert trimmed([]) == [[]]


def test_all_that_are_above_a_step_size_shed_what_is_above_it():
    assert trimmed([70], [5, 80]) == [[64], [5, 59]]
    assert trimmed([70], [20, 30], []) == [[64], [20, 30], []]
    assert trimmed([1, 1], [1, 16]) == [[1, 1], [1, 15]]


def test_none_sheds_where_one_could_not():
    assert trimmed([70], [65, 1]) == [[70], [65, 1]], "a decode is not cut"
    assert trimmed([70], [70, 6]) == [[70], [70, 6]], "nor a chunk to nothing"
    assert trimmed([70], [70, 13]) == [[70], [70, 13]]
    assert trimmed([70], [60, 6]) == [[64], [60, 4]]


def test_none_sheds_where_the_longest_rest_costs_more_than_padding():
    assert trimmed([70], [200]) == [[70], [200]]


def test_a_step_runs_at_the_size_that_its_fullest_replica_needs():
    rig = make_engine(budget=256, rungs=RUNGS, num_blocks=300, max_model_len=256, num_replicas=2)
    rig.run(ask("a", [1] * 70, max_tokens=1), ask("b", [2] * 75, max_tokens=1))
    assert [[row.num_tokens for row in plan.rows] for plan in rig.executor.plans] == [[64, 64], [6, 11]]
    rig = make_engine(budget=256, rungs=RUNGS, num_blocks=300, max_model_len=256, num_replicas=2)
    rig.run(ask("a", [1] * 70, max_tokens=1), ask("b", [2] * 200, max_tokens=1))
    assert [[row.num_tokens for row in plan.rows] for plan in rig.executor.plans] == [[70, 200]]
