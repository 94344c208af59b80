"""Random-weight models of the real classes at a chosen size, for tests and benchmarks.

They measure shapes, speed and memory, not quality. Tokenizers, templates and image processors are
the tiny models', so nothing has to be downloaded. `7b` and `8b` have the published shapes of
LLaVA-v1.6-Mistral-7B, Llama-2-7B and Llama-3-8B; `100m` is a size for two CPU cores.
"""

import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaProcessor,
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


def shape(hidden, intermediate, layers, heads, **more):
    """Sizes of a stack of transformer layers, as the configs of transformers name them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


TINY = shape(64, 128, 2, 4, num_key_value_heads=2)
# size -> (vision tower, language model, tile size in pixels, pinpoints)
LLAVA_SIZES = {
    "tiny": (shape(32, 64, 2, 2, patch_size=16), TINY, 64, [[64, 64], [64, 128], [128, 64]]),
    "100m": (
        shape(384, 1536, 6, 6, patch_size=14),
        shape(768, 2048, 12, 12, num_key_value_heads=4),
        224,
        [[224, 448], [448, 224], [448, 448]],
    ),
    "7b": (
        shape(1024, 4096, 24, 16, patch_size=14),
        shape(4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=32064, rope_theta=1e6),
        336,
        [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    ),
}
LLAMA_SIZES = {
    "tiny": TINY,
    "100m": shape(768, 2048, 14, 12, num_key_value_heads=4),
    "7b": shape(4096, 11008, 32, 32, num_key_value_heads=32, vocab_size=32000),
    "8b": shape(4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256, rope_theta=5e5),
}


def special_ids(tokenizer):
    """The ids that a model's configuration repeats from its tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def build(model_class, config, seed, dtype=torch.float32, device="cpu"):
    """A model in evaluation mode."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in its own dtype: a 7B model never exists in fp32
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(device).eval()


def llava_config(size, processor, config_class=LlavaNextConfig, **more):
    """Of a LLaVA with the published options. processor: of the tiny LLaVA, for its ids."""
    vision, text, tile, _ = LLAVA_SIZES[size]
    tokenizer = processor.tokenizer
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32768, **text}
    return config_class(
        vision_config=CLIPVisionConfig(
            image_size=tile, projection_dim=vision["hidden_size"], **vision
        ),
        text_config=MistralConfig(sliding_window=None, **text, **special_ids(tokenizer)),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **more,
    )


def random_llava(size="100m", kind="next", seed=0, dtype=torch.float32, device="cpu"):
    """(model, processor). kind: next (LLaVA-NeXT, tiles) or 1.5 (LLaVA-1.5, one square image)."""
    vision, _, tile, pinpoints = LLAVA_SIZES[size]
    processor = AutoProcessor.from_pretrained(TINY_MODELS / "llava")
    square = {"height": tile, "width": tile}
    if kind == "1.5":
        config = llava_config(size, processor, LlavaConfig)
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size=square),
            tokenizer=processor.tokenizer,
            patch_size=vision["patch_size"],
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=USER_ASSISTANT,
        )
        return build(LlavaForConditionalGeneration, config, seed, dtype, device), processor
    config = llava_config(size, processor, image_grid_pinpoints=pinpoints)
    processor.patch_size = vision["patch_size"]
    processor.image_processor.size = {"shortest_edge": tile}
    processor.image_processor.crop_size = square
    processor.image_processor.image_grid_pinpoints = pinpoints
    return build(LlavaNextForConditionalGeneration, config, seed, dtype, device), processor


def llama_config(size, tokenizer):
    """Of a Llama. tokenizer: of the tiny Llama, for its ids."""
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 8192, **LLAMA_SIZES[size]}
    return LlamaConfig(**sizes, **special_ids(tokenizer))


def random_llama(size="100m", seed=0, dtype=torch.float32, device="cpu"):
    """(model, tokenizer) of a Llama."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODELS / "llama")
    return build(LlamaForCausalLM, llama_config(size, tokenizer), seed, dtype, device), tokenizer


def chatml_tokenizer():
    """The tiny Llama's with the control tokens of Qwen's."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODELS / "llama")
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def random_qwen_vl(seed=0):
    """(model, processor) of a tiny Qwen2.5-VL: other image tokens, M-RoPE, another template."""
    tokenizer = chatml_tokenizer()
    token_ids = {
        key: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for key, token in (
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
            ("image_token_id", "image_pad"),
            ("video_token_id", "video_pad"),
        )
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = TINY | special_ids(tokenizer) | {"vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text | {"max_position_embeddings": 4096}, vision_config=vision, **token_ids
    )
    pixels = {"shortest_edge": 4 * 28 * 28, "longest_edge": 36 * 28 * 28}
    processor = processor_without_video("qwen2_5_vl")(
        Qwen2VLImageProcessorPil(size=pixels), tokenizer, chat_template=CHATML
    )
    return build(Qwen2_5_VLForConditionalGeneration, config, seed), processor


def random_qwen3(seed=0):
    """(model, tokenizer) of a tiny Qwen3."""
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = CHATML
    sizes = {"vocab_size": len(tokenizer), "head_dim": 16, "max_position_embeddings": 4096}
    config = Qwen3Config(**TINY, **sizes, **special_ids(tokenizer))
    return build(Qwen3ForCausalLM, config, seed), tokenizer
