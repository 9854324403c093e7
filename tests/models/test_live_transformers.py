"""The golden tensors are what today's `transformers` computes: neither stale nor made from another config.

pip install torch transformers
pytest -m torch tests/models/test_live_transformers.py
"""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the live check needs torch (CPU is enough)")
pytest.importorskip("transformers", reason="the live check needs transformers")

from scripts import make_reference_tensors
from tests.models import toy

# Other libraries warn about things that are not ours to fix.
pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("case", toy.CASES)
def test_golden_logits_equal_transformers(case, tmp_path):
    golden = np.load(toy.golden_path(case))
    model = make_reference_tensors.load_reference(toy.write_case(tmp_path, case, shards=2))
    logits_nv = make_reference_tensors.prompt_logits(model, golden["prompt_token_ids"])
    # Another machine sums in another order; 1e-5 of the largest logit is far below any real difference.
    limit = 1e-5 * np.abs(golden["logits"]).max()
    np.testing.assert_allclose(logits_nv, golden["logits"], rtol=0, atol=limit)


@pytest.mark.parametrize("case", toy.CASES)
def test_golden_continuation_equals_transformers(case, tmp_path):
    golden = np.load(toy.golden_path(case))
    model = make_reference_tensors.load_reference(toy.write_case(tmp_path, case))
    tokens, gap = make_reference_tensors.greedy(model, golden["prompt_token_ids"])
    assert tokens.tolist() == golden["greedy_token_ids"].tolist()
    assert gap >= 1e-3, "a near tie: rounding could change the tokens, choose another seed"


def test_every_golden_file_has_a_case():
    expected = {toy.golden_path(case).name for case in toy.CASES}
    assert {path.name for path in toy.GOLDEN.glob("*.npz")} == expected
