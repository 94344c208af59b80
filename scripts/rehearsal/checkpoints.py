"""Checkpoints of full size with random weights: published shapes, real vocabularies and templates.

Tensors are drawn and written one shard after the other, so a 16 GB checkpoint needs the memory of
one shard.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    MistralConfig,
)
from vocabularies import llama3_tokenizer, llava_processor, mistral_tokenizer

from mllmrec.models.random_models import LLAMA_SIZES, LLAVA_SIZES, special_ids

SHARD_BYTES = 2e9
INITIALIZER_RANGE = 0.02
# Llama-2-7B: an MLP of 11008 and a key and a value for each of its 32 heads.
LLAMA2 = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def llava_config(size, **ids):
    """Of LLaVA-v1.6-Mistral-7B; size tiny: of a tiny one of that kind. ids: of special tokens."""
    vision, text, tile, pinpoints = LLAVA_SIZES["7b" if size == "full" else "tiny"]
    shape = {"vocab_size": 32064, "max_position_embeddings": 32768, "sliding_window": None} | text
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=tile, projection_dim=768, **vision),
        text_config=MistralConfig(**shape | ids),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def llama3_config(size, **ids):
    """Of Llama-3-8B-Instruct."""
    shape = LLAMA_SIZES["8b" if size == "full" else "tiny"] | {"vocab_size": 128256}
    return LlamaConfig(max_position_embeddings=8192, **shape | ids)


def llama2_config(size, vocab_size=32000, **ids):
    """Of Llama-2-7B."""
    shape = LLAMA2 if size == "full" else LLAMA_SIZES["tiny"]
    return LlamaConfig(max_position_embeddings=4096, **shape | ids | {"vocab_size": vocab_size})


CONFIGS = {"llava": llava_config, "llama3": llama3_config, "llama2": llama2_config}


def llava_next(size, folder):
    """(class, config, processor) of LLaVA-v1.6-Mistral-7B."""
    processor = llava_processor(folder)
    config = llava_config(size, **special_ids(processor.tokenizer))
    config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    tile = config.vision_config.image_size
    processor.image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    processor.patch_size = config.vision_config.patch_size
    return LlavaNextForConditionalGeneration, config, processor


def llama_3(size, folder):
    """(class, config, tokenizer) of Llama-3-8B-Instruct."""
    tokenizer = llama3_tokenizer(folder)
    return LlamaForCausalLM, llama3_config(size, **special_ids(tokenizer)), tokenizer


def llama_2(size, folder):
    """(class, config, tokenizer) of Llama-2-7B; Mistral's 32,000 pieces stand in for its own."""
    tokenizer = mistral_tokenizer(folder)
    config = llama2_config(size, len(tokenizer), **special_ids(tokenizer))
    return LlamaForCausalLM, config, tokenizer


MODELS = {"llava": llava_next, "llama3": llama_3, "llama2": llama_2}


def shards_of(model):
    """[{name: shape}]: the tensors of a model on the meta device, SHARD_BYTES of bfloat16 each."""
    shards, filled = [{}], 0
    for name, tensor in model.state_dict().items():
        size = 2 * tensor.numel()
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tuple(tensor.shape)
        filled += size
    return shards


def random_tensor(name, shape, generator):
    """A weight as transformers initialises it: norms are ones, biases zeros, others normal."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if len(shape) == 1 and "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(
        0.0, INITIALIZER_RANGE, generator=generator
    )


def write_checkpoint(folder, name, size, vocabularies, seed=0):
    """Write the checkpoint `name` of MODELS to `folder`, unless it is there; returns its bytes."""
    folder, part = Path(folder), Path(f"{folder}.part")
    if not folder.exists():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        model_class, config, processor = MODELS[name](size, vocabularies)
        with torch.device("meta"):
            model = model_class(config)
        shards, generator, places = shards_of(model), torch.Generator().manual_seed(seed), {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {n: random_tensor(n, shape, generator) for n, shape in shard.items()}
            save_file(tensors, part / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            print(f"{name}: shard {number} of {len(shards)}", flush=True)
        total = sum(file.stat().st_size for file in part.glob("*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config.architectures = [model_class.__name__]
        config.dtype = torch.bfloat16
        config.save_pretrained(part)
        GenerationConfig(**special_ids(getattr(processor, "tokenizer", processor))).save_pretrained(
            part
        )
        processor.save_pretrained(part)
        part.rename(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
