"""SASRec: self-attention over the items of a history (Kang and McAuley, ICDM 2018).

Differs from the published model in the place of the layer norms, before attention and feed-forward
instead of behind them, and in the activation (GELU).
"""

from typing import Any

import torch
from torch import nn

from mllmrec.sequential.items import ItemVectors
from mllmrec.stage.errors import InputError


class SASRec(nn.Module):
    """n_items: in the catalogue; features: of the items, (items, features), or None."""

    def __init__(self, n_items: int, features: torch.Tensor | None, options: Any) -> None:
        super().__init__()
        if options.width % options.heads:
            raise InputError(
                f"--heads {options.heads} does not divide --width {options.width}; change one"
            )
        self.items = ItemVectors(n_items, options.width, features, options.item_ids)
        self.positions = nn.Embedding(options.max_length, options.width)
        nn.init.normal_(self.positions.weight, std=options.width**-0.5)
        self.dropout = nn.Dropout(options.dropout)
        block = nn.TransformerEncoderLayer(
            options.width,
            options.heads,
            4 * options.width,
            options.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(options.width)
        self.blocks = nn.TransformerEncoder(block, options.layers, norm, enable_nested_tensor=False)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """numbers: (users, length), 0 behind the last item -> states (users, length, width)."""
        length = numbers.shape[1]
        states = self.items()[numbers] + self.positions.weight[:length]  # (users, length, width)
        future = nn.Transformer.generate_square_subsequent_mask(length, device=states.device)
        # No item attends to the padding, which is behind all of them.
        return self.blocks(self.dropout(states), mask=future, is_causal=True)
