"""A small model with what a walk over a model meets."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class TinyModel(nn.Module):
    """Tied output layer, shared block, a buffer, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.again = self.blocks[0]
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in [*self.blocks, self.again]:
            x = block(x)
        return self.lm_head(self.norm(x))


TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
