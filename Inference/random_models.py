"""Random-weight models of the real classes at a chosen size, for benchmarks and tests: speed and memory, not quality.

They speak through the tiny models' tokenizers, templates and image processors, so nothing has to be downloaded. `7b`
and `8b` have the published shapes of LLaVA-v1.6-Mistral-7B and Llama-3-8B; `100m` is what two CPU cores can bear.
"""

import copy
from pathlib import Path

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
)

from Inference.tiny_models.build import special_ids

TINY = Path(__file__).parent / "tiny_models"
# size -> (vision tower, language model, tile size in pixels, pinpoints)
LLAVA_SIZES = {
    "tiny": (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        64,
        [[64, 64], [64, 128], [128, 64]],
    ),
    "100m": (
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6, "patch_size": 14},
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4},
        224,
        [[224, 448], [448, 224], [448, 448]],
    ),
    "7b": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
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
LLAMA_SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12, "num_key_value_heads": 4},
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "rope_theta": 5e5,
    },
}  # fmt: skip


def random_llava(size="100m", kind="next", seed=0, dtype=torch.float32, device="cpu"):
    """(model, processor). kind: next (LLaVA-NeXT, tiles) or 1.5 (LLaVA-1.5, one square picture)."""
    vision, text, tile, pinpoints = LLAVA_SIZES[size]
    processor = copy.deepcopy(AutoProcessor.from_pretrained(TINY / "llava"))
    tokenizer = processor.tokenizer
    vision_config = CLIPVisionConfig(image_size=tile, projection_dim=vision["hidden_size"], **vision)
    text_config = MistralConfig(
        **{"vocab_size": len(tokenizer), "sliding_window": None, "max_position_embeddings": 32768, **text, **special_ids(tokenizer)}
    )
    shared = {
        "vision_config": vision_config, "text_config": text_config, "image_token_index": processor.image_token_id,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    processor.patch_size, processor.image_processor.size = vision["patch_size"], {"shortest_edge": tile}
    processor.image_processor.crop_size = {"height": tile, "width": tile}
    if kind == "next":
        config, model_class = LlavaNextConfig(image_grid_pinpoints=pinpoints, **shared), LlavaNextForConditionalGeneration
        processor.image_processor.image_grid_pinpoints = pinpoints
    else:
        from transformers import CLIPImageProcessorPil, LlavaProcessor

        config, model_class = LlavaConfig(**shared), LlavaForConditionalGeneration
        square = {"height": tile, "width": tile}
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size=square), tokenizer=tokenizer,
            patch_size=vision["patch_size"], vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=processor.chat_template,
        )  # fmt: skip
    return _built(model_class, config, seed, dtype, device), processor


def random_llama(size="100m", seed=0, dtype=torch.float32, device="cpu"):
    """(model, tokenizer)"""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "llama")
    config = LlamaConfig(**{"vocab_size": len(tokenizer), "max_position_embeddings": 8192, **LLAMA_SIZES[size], **special_ids(tokenizer)})
    return _built(LlamaForCausalLM, config, seed, dtype, device), tokenizer


def _built(model_class, config, seed, dtype, device):
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in its own format: a 7B model never exists in fp32
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(device).eval()
