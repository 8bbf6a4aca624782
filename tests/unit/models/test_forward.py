"""Padding of batches: token ids and attention masks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from saexp.models.forward import padded

PAD = 7


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_a_batch_holds_each_sequence_on_the_other_side_of_its_padding(sequences, padding_side):
    ids, mask = padded(sequences, PAD, padding_side=padding_side)
    width = max(map(len, sequences))
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)
    for row, sequence in enumerate(sequences):
        padding, ones = [PAD] * (width - len(sequence)), [1] * len(sequence)
        zeros = [0] * len(padding)
        left = padding_side == "left"
        assert ids[row].tolist() == (padding + sequence if left else sequence + padding)
        assert mask[row].tolist() == (zeros + ones if left else ones + zeros)
