"""Options of stages that load or train a model. No torch, so that --help answers at once."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from mllmrec.stage.errors import InputError
from mllmrec.stage.options import CommonOptions, option

MAX_TEXT_TOKENS = 512  # of a question in training and scoring, unless the config says otherwise


@dataclass
class ModelOptions(CommonOptions):
    """Options of every stage that loads a model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto: bfloat16 on a GPU, float32 on a CPU"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = option(
        "auto", "auto: FlashAttention 2 if installed, else SDPA"
    )
    quantization: Literal["none", "int8", "nf4"] = option(
        "none", "of the language model, by bitsandbytes: int8 or nf4 (4 bit)"
    )
    prompt_format: str = option(
        "",
        "for models without a chat template: how a prompt looks, with the places {text} and, for "
        "models with an image token, {image}; default: the model's chat template",
    )


# Options of generation that change no text.
GENERATION_SPEED_OPTIONS = (
    "batch_tokens",
    "retry_rejected",
    "base_url",
    "concurrency",
    "timeout",
    "retries",
)


DEFAULT_URL = "http://localhost:8000/v1"
KEY = "OPENAI_API_KEY"  # environment variable


@dataclass
class GenerationStageOptions(ModelOptions):
    """Options of the stages that generate text; each stage sets its own defaults."""

    max_new_tokens: int = option(1024, "length of a text", ge=1)
    temperature: float = option(0.0, "0 = greedy", ge=0, allow_inf_nan=False)
    top_p: float = option(1.0, "nucleus sampling, if temperature > 0", gt=0, le=1)
    batch_tokens: int = option(
        0,
        "tokens in a batch, images and answers included; 0: what a GPU's free memory holds, 32,768 "
        "on a CPU",
        ge=0,
    )
    retry_rejected: bool = option(False, "try rows again that were rejected earlier")
    engine: Literal["local", "server"] = option(
        "local", "who runs the model: this process, or a server with OpenAI's chat protocol"
    )
    base_url: str = option(DEFAULT_URL, "address of the server, with /v1")
    served_model: str = option("", "what the server calls the model; default: as --model")
    concurrency: int = option(64, "requests to the server at a time", ge=1, le=1000)
    timeout: float = option(
        600.0, "seconds for a whole answer, then the request is asked again", gt=0
    )
    retries: int = option(
        8,
        "how often a failed request is asked again, after 0.5 s, then twice as long, up to 8",
        ge=0,
    )

    @field_validator("base_url")
    @classmethod
    def check_base_url(cls, url: str) -> str:
        """An address without a secret, which run records and messages would show."""
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query:
            raise InputError(  # unlike that of pydantic, it does not repeat the value
                f"--base_url holds a user name or a key; export the key as {KEY}, and name the "
                "server alone"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("it must look like http://HOST:PORT/v1")
        return url


ALLOW_OTHER = "options that may differ from those of the adapter's training, by name"


@dataclass
class LoraOptions(ModelOptions):
    """What LoRA trains."""

    lora_r: int = option(8, "rank (paper: 8, released code: 16)", ge=1, le=4096)
    lora_alpha: int = option(32, "scale (released code: 32; not reported in the paper)", gt=0)
    lora_dropout: float = option(
        0.1, "dropout (released code: 0.1; not reported in the paper)", ge=0, lt=1
    )
    lora_layers: list[str] = option(
        [], "linear layers of the language model, e.g. q_proj v_proj; none = all (released code)"
    )
    lora_vision: bool = option(
        False,
        "also layers of those names outside the language model, e.g. q_proj of the vision tower "
        "(released code, which selects by name)",
    )
    lora_init: Literal["kaiming", "gaussian"] = option(
        "kaiming",
        "of the matrix A: kaiming: PEFT's default; gaussian: released code; B starts at zero",
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations instead of storing them: slower, less memory"
    )
