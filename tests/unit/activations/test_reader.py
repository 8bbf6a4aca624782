"""The shuffled reader gives every row once an epoch, in an order that a restart finds again."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saexp.activations.reader import ShuffledReader

ACTS = torch.arange(40, dtype=torch.float32)[:, None].expand(40, 3)


def read_rows(reader: ShuffledReader, n: int) -> torch.Tensor:
    return torch.cat([next(reader) for _ in range(n)])[:, 0]


@settings(max_examples=50)
@given(st.integers(1, 17), st.integers(0, 30), st.integers(0, 3))
def test_a_reader_started_late_goes_on_as_the_first_one_would(batch_size, step, seed):
    rows = np.arange(3, 40, 2)
    first = ShuffledReader(ACTS, rows, batch_size, seed)
    for _ in range(step):
        next(first)
    late = ShuffledReader(ACTS, rows, batch_size, seed, step)
    assert torch.equal(read_rows(first, 4), read_rows(late, 4))


def test_an_epoch_holds_every_chosen_row_once_and_no_other():
    rows = np.arange(1, 40, 3)
    read = read_rows(ShuffledReader(ACTS, rows, len(rows), seed=0), 2).long().tolist()
    one, two = read[: len(rows)], read[len(rows) :]
    assert sorted(one) == sorted(two) == rows.tolist()
    assert one != two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batches_are_float32_whatever_is_stored(dtype):
    batch = next(ShuffledReader(ACTS.to(dtype), np.arange(40), 8, seed=0))
    assert batch.dtype == torch.float32
    assert batch.shape == (8, 3)
