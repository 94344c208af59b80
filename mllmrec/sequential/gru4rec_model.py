"""GRU4Rec: a gated recurrent network over the items of a history (Hidasi et al., ICLR 2016)."""

from typing import Any

import torch
from torch import nn

from mllmrec.sequential.items import ItemVectors


class GRU4Rec(nn.Module):
    """n_items: in the catalogue; features: of the items, (items, features), or None."""

    def __init__(self, n_items: int, features: torch.Tensor | None, options: Any) -> None:
        super().__init__()
        self.items = ItemVectors(n_items, options.width, features, options.item_ids)
        self.dropout = nn.Dropout(options.dropout)
        between = options.dropout if options.layers > 1 else 0.0
        self.recurrence = nn.GRU(
            options.width, options.hidden, options.layers, batch_first=True, dropout=between
        )
        self.output = nn.Linear(options.hidden, options.width)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """numbers: (users, length), 0 behind the last item -> states (users, length, width)."""
        vectors = self.items()[numbers]  # (users, length, width)
        states, _ = self.recurrence(self.dropout(vectors))  # (users, length, hidden)
        return self.output(self.dropout(states))
