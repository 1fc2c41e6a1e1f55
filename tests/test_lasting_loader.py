"""Readers that last from epoch to epoch change nothing that is random: neither here, nor in a resumed run."""

import os

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mivpg.training import LastingLoader


class Readers(Dataset):
    """Says who reads."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


def test_an_epoch_has_the_readers_of_the_one_before() -> None:
    loader = LastingLoader(Readers(), batch_size=2, num_workers=1, collate_fn=list)
    epochs = [[item for batch in loader for item in batch] for _ in range(3)]
    assert [index for index, _ in epochs[2]] == list(range(6))
    assert len({reader for epoch in epochs for _, reader in epoch} | {os.getpid()}) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_draws_what_starting_readers_would(num_workers) -> None:
    torch.manual_seed(0)
    expected = []
    for _ in range(2):
        list(DataLoader(Readers(), batch_size=2, collate_fn=list))
        expected.append(torch.rand(()))
    loader = LastingLoader(Readers(), batch_size=2, num_workers=num_workers, collate_fn=list)
    torch.manual_seed(0)
    for after in expected:
        list(loader)
        assert torch.equal(torch.rand(()), after)
