from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.models.tiles import plan_spans


@given(length=st.integers(1, 60), tile=st.integers(4, 20), side=st.integers(1, 3))
def test_spans_cover_a_side_with_shares_that_sum_to_one(length, tile, side):
    spans = plan_spans(length, tile, (2, side), torch.device("cpu"))
    total = torch.zeros(length * side)
    for span in spans:
        assert (span.weight > 0).all()
        total[span.write] += span.weight

    torch.testing.assert_close(total, torch.ones(length * side))
    assert {span.read.stop - span.read.start for span in spans} == {2 * min(tile, length)}
    for left, right in pairwise(spans):
        assert right.read.start > left.read.start
        assert left.read.stop - right.read.start >= 2 * (tile // 4)


def test_tiles_ramp_linearly_into_each_other():
    left, right = plan_spans(14, 8, (1, 2), torch.device("cpu"))  # 2 shared cells of 2 samples

    torch.testing.assert_close(left.weight[-5:], torch.tensor([1, 0.875, 0.625, 0.375, 0.125]))
    torch.testing.assert_close(right.weight[:5], torch.tensor([0.125, 0.375, 0.625, 0.875, 1]))
