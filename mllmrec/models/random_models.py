"""Random-weight models of the real classes at a chosen size, for benchmarks and tests.

They measure speed and memory, not quality. Tokenizers, templates and image processors are the tiny
models', so nothing has to be downloaded. `7b` and `8b` have the published shapes of
LLaVA-v1.6-Mistral-7B and Llama-3-8B; `100m` is a size for two CPU cores.
"""

import copy
from typing import Any

import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mllmrec.models.compat import processor_without_video
from mllmrec.stage.options import ROOT

TINY_MODELS = ROOT / "Inference" / "tiny_models"
# Chat template in the form of Qwen's.
CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ "
    "part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt "
    "%}<|im_start|>assistant\n{% endif %}"
)
# Chat template in the form of LLaVA-1.5's.
USER_ASSISTANT = (
    "{% for turn in messages %}{{ turn.role.upper() }}:"
    "{% for part in turn.content %}{% if part.type == 'image' %} <image>\n{% else %} {{ part.text "
    "}}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# size -> (vision tower, language model, tile size in pixels, pinpoints)
LLAVA_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int, list[list[int]]]] = {
    "tiny": (
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 16,
        },
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        64,
        [[64, 64], [64, 128], [128, 64]],
    ),
    "100m": (
        {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "patch_size": 14,
        },
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
        224,
        [[224, 448], [448, 224], [448, 448]],
    ),
    "7b": (
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32064,
            "rope_theta": 1e6,
        },
        336,
        [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    ),
}
LLAMA_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "100m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 5e5,
    },
}


def random_llava(
    size: str = "100m",
    kind: str = "next",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Any, Any]:
    """(model, processor). kind: next (LLaVA-NeXT, tiles) or 1.5 (LLaVA-1.5, one square image)."""
    vision, text, tile, pinpoints = LLAVA_SIZES[size]
    processor = copy.deepcopy(AutoProcessor.from_pretrained(TINY_MODELS / "llava"))
    tokenizer = processor.tokenizer
    vision_config = CLIPVisionConfig(
        image_size=tile, projection_dim=vision["hidden_size"], **vision
    )
    text_config = MistralConfig(
        **{
            "vocab_size": len(tokenizer),
            "sliding_window": None,
            "max_position_embeddings": 32768,
            **text,
            **special_ids(tokenizer),
        }
    )
    shared = {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_index": processor.image_token_id,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    processor.patch_size = vision["patch_size"]
    processor.image_processor.size = {"shortest_edge": tile}
    processor.image_processor.crop_size = {"height": tile, "width": tile}
    if kind == "1.5":
        processor = _llava_1_5_processor(tokenizer, tile, vision["patch_size"])
        return _build(
            LlavaForConditionalGeneration, LlavaConfig(**shared), seed, dtype, device
        ), processor
    processor.image_processor.image_grid_pinpoints = pinpoints
    config = LlavaNextConfig(image_grid_pinpoints=pinpoints, **shared)
    return _build(LlavaNextForConditionalGeneration, config, seed, dtype, device), processor


def _llava_1_5_processor(tokenizer: Any, tile: int, patch_size: int) -> Any:
    """A processor that scales and crops every image to one square of `tile` pixels."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    square = {"height": tile, "width": tile}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=USER_ASSISTANT,
    )


def random_qwen_vl(seed: int = 0) -> tuple[Any, Any]:
    """(model, processor) of a tiny Qwen2.5-VL: other image tokens, M-RoPE, another template."""
    tokenizer = _with_chatml(AutoTokenizer.from_pretrained(TINY_MODELS / "llama"))
    tokens = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("vision_start", "vision_end", "image_pad", "video_pad")
    }
    text = (
        LLAMA_SIZES["tiny"]
        | special_ids(tokenizer)
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],
            },
        }
    )
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokens["image_pad"],
        video_token_id=tokens["video_pad"],
        vision_start_token_id=tokens["vision_start"],
        vision_end_token_id=tokens["vision_end"],
    )
    pixels = {"shortest_edge": 4 * 28 * 28, "longest_edge": 36 * 28 * 28}
    processor = processor_without_video("qwen2_5_vl")(
        Qwen2VLImageProcessorPil(size=pixels), tokenizer, chat_template=CHATML
    )
    return _build(Qwen2_5_VLForConditionalGeneration, config, seed), processor


def random_qwen3(seed: int = 0) -> tuple[Any, Any]:
    """(model, tokenizer) of a tiny Qwen3."""
    tokenizer = _with_chatml(AutoTokenizer.from_pretrained(TINY_MODELS / "llama"))
    tokenizer.chat_template = CHATML
    sizes = LLAMA_SIZES["tiny"] | {
        "vocab_size": len(tokenizer),
        "head_dim": 16,
        "max_position_embeddings": 4096,
    }
    config = Qwen3Config(**sizes, **special_ids(tokenizer))
    return _build(Qwen3ForCausalLM, config, seed), tokenizer


def _with_chatml(tokenizer: Any) -> Any:
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def random_llama(
    size: str = "100m",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Any, Any]:
    """(model, tokenizer) of a Llama."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODELS / "llama")
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 8192,
            **LLAMA_SIZES[size],
            **special_ids(tokenizer),
        }
    )
    return _build(LlamaForCausalLM, config, seed, dtype, device), tokenizer


def special_ids(tokenizer: Any) -> dict[str, Any]:
    """The ids that a model's configuration repeats from its tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def _build(
    model_class: Any,
    config: Any,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Any:
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in its own dtype: a 7B model never exists in fp32
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(device).eval()
