"""LRURec: blocks of a linear recurrent unit and a position-wise feed-forward network.

(Yue et al., "Linear Recurrent Units for Sequential Recommendation", WSDM 2024; the retriever of
MLLM4Rec.) The recurrence is computed for all positions at once, see `linear_recurrence`.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mllmrec.sequential.items import ItemVectors
from mllmrec.sequential.sequences import PADDING

CHUNK = 32  # positions whose states are computed by one matrix product
RING = (0.8, 0.99)  # absolute values of the decays at the start


def linear_recurrence(inputs: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """h_t = decay * h_(t-1) + inputs_t with h_(-1) = 0, without a loop over the positions.

    inputs: complex (users, length, channels); log_decay: complex (channels,), the logarithm of the
    decay. Returns the states, of the shape of the inputs. Within a chunk of positions the states
    are a product with the powers of the decay; the states at the ends of the chunks follow the
    same recurrence, which is solved in log2(chunks) steps, each reaching twice as far back.
    """
    users, length, channels = inputs.shape
    kind, log_decay = inputs.dtype, log_decay.to(torch.complex128)  # angles of large powers
    n_chunks = math.ceil(length / CHUNK)
    filled = functional.pad(inputs, (0, 0, 0, n_chunks * CHUNK - length))
    chunks = filled.reshape(users * n_chunks, CHUNK, channels).permute(2, 0, 1)
    steps = torch.arange(CHUNK, device=inputs.device)
    lag = steps[:, None] - steps  # (CHUNK, CHUNK): of a state behind an input
    powers = (torch.exp(log_decay[:, None, None] * lag.clamp(min=0)) * (lag >= 0)).to(kind)
    inside = _real_product(chunks, powers).reshape(channels, users, n_chunks, CHUNK)
    ends, reach = inside[..., -1], 1  # (channels, users, chunks)
    while reach < n_chunks:
        decay = torch.exp(log_decay * CHUNK * reach).to(kind)[:, None, None]
        ends = ends + decay * functional.pad(ends[..., :-reach], (reach, 0))
        reach *= 2
    before = functional.pad(ends[..., :-1], (1, 0))[..., None]  # the state ahead of each chunk
    since = torch.exp(log_decay[:, None] * (steps + 1)).to(kind)  # (channels, CHUNK)
    states = inside + before * since[:, None, None, :]
    return states.permute(1, 2, 3, 0).reshape(users, n_chunks * CHUNK, channels)[:, :length]


def _real_product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows @ matrix^T of complex tensors (batch, n, k) and (batch, k, k), by real products.

    A batched product of complex matrices is computed one by one on a CPU.
    """
    batch, _, size = rows.shape
    pairs = torch.view_as_real(torch.stack([matrix, matrix * 1j], dim=-1))  # (b, out, in, 2, 2)
    real = pairs.permute(0, 2, 3, 1, 4).reshape(batch, 2 * size, 2 * size)
    product = torch.view_as_real(rows).reshape(batch, -1, 2 * size) @ real
    return torch.view_as_complex(product.reshape(batch, -1, size, 2))


class LinearRecurrentUnit(nn.Module):
    """A complex diagonal recurrence between two linear maps (Orvieto et al., ICML 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = 2 * width
        low, high = RING
        radius = torch.sqrt(torch.rand(channels) * (high**2 - low**2) + low**2)
        self.log_rate = nn.Parameter(torch.log(-torch.log(radius)))
        self.log_angle = nn.Parameter(torch.log(torch.rand(channels) * 2 * math.pi))
        # Keeps the size of the states near that of the inputs, whatever the decay.
        self.log_scale = nn.Parameter(torch.log(torch.sqrt(1 - radius**2)))
        self.inputs = nn.Linear(width, 2 * channels)  # real and imaginary parts, side by side
        self.outputs = nn.Linear(2 * channels, width)

    def forward(self, vectors: torch.Tensor, is_item: torch.Tensor) -> torch.Tensor:
        """vectors: (users, length, width); is_item: (users, length), False for padding.

        Padding adds nothing to a state, so padding on the left changes no score.
        """
        log_decay = torch.complex(-torch.exp(self.log_rate), torch.exp(self.log_angle))
        real, imaginary = (self.inputs(vectors) * is_item[..., None]).chunk(2, dim=-1)
        scaled = torch.complex(real, imaginary) * torch.exp(self.log_scale)
        states = linear_recurrence(scaled, log_decay)
        return self.outputs(torch.cat([states.real, states.imag], dim=-1))


class LRUBlock(nn.Module):
    """Recurrence, then a feed-forward network of four times the width; each with a residual."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.recurrence = LinearRecurrentUnit(width)
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: torch.Tensor, is_item: torch.Tensor) -> torch.Tensor:
        """vectors: (users, length, width); is_item: (users, length)."""
        vectors = self.first_norm(vectors + self.dropout(self.recurrence(vectors, is_item)))
        return self.second_norm(vectors + self.dropout(self.feed_forward(vectors)))


class LRURec(nn.Module):
    """n_items: in the catalogue; features: of the items, (items, features), or None."""

    def __init__(self, n_items: int, features: torch.Tensor | None, options: Any) -> None:
        super().__init__()
        self.vectors = ItemVectors(n_items, options.width, features, options.item_ids)
        self.bias = nn.Parameter(torch.zeros(n_items + 1))
        self.norm = nn.LayerNorm(options.width)
        self.dropout, self.dropout_first = nn.Dropout(options.dropout), options.dropout_first
        self.blocks = nn.ModuleList(
            LRUBlock(options.width, options.dropout) for _ in range(options.layers)
        )

    def items(self) -> torch.Tensor:
        """(items + 1, width + 1): an item's vector and its bias, which meets a 1 in each state."""
        return torch.cat([self.vectors(), self.bias[:, None]], dim=1)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """numbers: (users, length), 0 = padding -> states (users, length, width + 1)."""
        is_item = numbers != PADDING
        vectors = self.vectors()[numbers]
        if self.dropout_first:
            states = self.norm(self.dropout(vectors))
        else:
            states = self.dropout(self.norm(vectors))
        for block in self.blocks:
            states = block(states, is_item)
        return functional.pad(states, (0, 1), value=1.0)
