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
    answer_token: Literal["rendered", "bare"] = option(
        "rendered",
        "what is scored: rendered: the token that follows the prompt, e.g. ▁Yes; bare: the one "
        "called Yes, which the model may never emit (released code)",
    )
    end_token: bool = option(
        True, "the answer is followed by the end token in training (released code: false)"
    )
    pad_images: int = option(
        0,
        "pad the images of N consecutive rows with black to the largest, in training those of a "
        "micro-batch (released code: 6 in scoring, 12 without adapter); 0 = none",
        ge=0,
    )
    image_tiles: Literal["full", "single"] = option(
        "full",
        "single: LLaVA-NeXT gets the whole image only, 577 tokens instead of up to 2,900, for 24 "
        "GB",
    )
