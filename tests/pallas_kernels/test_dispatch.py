"""Dispatch by refusal."""

import pytest

from jaxserve.pallas_kernels.dispatch import dispatch


def refuse(x: int) -> int:
    raise NotImplementedError("never")


def double(x: int) -> int:
    return 2 * x


def test_the_first_that_does_not_refuse_is_taken():
    assert dispatch("op", {"a": refuse, "b": double}, None, 3) == 6


def test_a_named_one_is_never_replaced():
    with pytest.raises(NotImplementedError, match="never"):
        dispatch("op", {"a": refuse, "b": double}, "a", 3)


def test_all_reasons_are_shown_when_all_refuse():
    with pytest.raises(ExceptionGroup) as caught:
        dispatch("op", {"a": refuse, "b": refuse}, None, 3)
    assert [str(e) for e in caught.value.exceptions] == ["a: never", "b: never"]
