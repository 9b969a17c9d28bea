"""Tokens in blocks of equal length, and the order in which they are trained on.

Shapes: `N` blocks, `B` batch, `T` tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBlocks:
    """Token ids of a text, packed for training."""

    train: torch.Tensor
    """(N, T) int32: the training blocks, in an order that the seed decided."""
    held_out: torch.Tensor
    """(N, T) int32: blocks of other documents, for measuring."""
    fingerprint: str
    """Hash of both, 16 hex digits."""
    source: str
    """Where the text came from."""

    @classmethod
    def from_tensors(cls, train: torch.Tensor, held_out: torch.Tensor, *, source: str) -> TokenBlocks:
        """Blocks with their fingerprint; both (N, T) int32."""
        assert train.ndim == held_out.ndim == 2, "blocks are (N, T)"
        assert train.shape[1] == held_out.shape[1], "all blocks have one length"
        digest = hashlib.sha256()
        for blocks in (train, held_out):
            digest.update(repr(tuple(blocks.shape)).encode())
            digest.update(blocks.contiguous().numpy().astype("<i4").tobytes())
        return cls(train=train, held_out=held_out, fingerprint=digest.hexdigest()[:16], source=source)

    @property
    def num_tokens(self) -> int:
        """Training tokens, each counted once."""
        return self.train.numel()

    @property
    def seq_len_tokens(self) -> int:
        """Tokens of a block."""
        return self.train.shape[1]

    def batch(self, step: int, *, batch_size: int, seed: int) -> torch.Tensor:
        """The batch of one optimizer step, (B, T) int64; depends on nothing but its arguments."""
        assert step >= 0, "steps count from 0"
        assert batch_size >= 1, "a batch holds at least one block"
        return self.take(step * batch_size, batch_size, seed=seed)

    def take(self, first: int, num_blocks: int, *, seed: int) -> torch.Tensor:
        """`num_blocks` blocks from number `first` on in the order of training, (num_blocks, T) int64.

        Each epoch takes all blocks in a new order; what is taken may hold the end of one and the start of the next.
        """
        num_all, chosen = self.train.shape[0], []
        for epoch in range(first // num_all, (first + num_blocks - 1) // num_all + 1):
            start = max(first - epoch * num_all, 0)
            stop = first + num_blocks - epoch * num_all
            chosen.append(_epoch_order(num_all, seed, epoch)[start:stop])
        return self.train[torch.cat(chosen)].long()

    def first(self, num_blocks: int) -> torch.Tensor:
        """The first training blocks as they lie, (num_blocks, T)."""
        return self.train[:num_blocks]

    def position(self) -> None:
        """Nothing to remember: any batch is found at once."""
        return

    def seek(self, position: None) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to wait for."""

    def batches(self, batch_size: int, *, seed: int, start_step: int = 0) -> Iterator[torch.Tensor]:
        """Batches of all steps from `start_step` on, without an end; each (B, T) int64."""
        step = start_step
        while True:
            yield self.batch(step, batch_size=batch_size, seed=seed)
            step += 1


def _epoch_order(num_blocks: int, seed: int, epoch: int) -> torch.Tensor:
    # A hash keeps the epochs of one seed apart from those of the next.
    key = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.randperm(num_blocks, generator=torch.Generator().manual_seed(int.from_bytes(key[:7], "little")))
