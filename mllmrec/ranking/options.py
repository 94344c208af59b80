"""Options that training and scoring share. No torch, so that --help answers at once."""

from typing import Literal

from pydantic.dataclasses import dataclass

from mllmrec.models.options import ModelOptions
from mllmrec.stage.options import option


@dataclass
class RankerOptions(ModelOptions):
    """What training and scoring must agree on."""

    model: str = option(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "model that ranks, hub id or folder; a text model takes rows without images "
        "(paper: LLaVA-v1.6-Mistral-7B)",
    )
    max_text_tokens: int = option(
        512, "of one row, the image counted as one token (paper: 512, released code: 1024)", ge=0
    )
    image_tiles: Literal["full", "single"] = option(
        "full",
        "single: LLaVA-NeXT gets the whole image only, 577 tokens instead of up to 2,900, for 24 "
        "GB",
    )
