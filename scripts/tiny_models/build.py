"""Untrained tiny models of the real classes, with tokenizer, processor and chat template.

`new_llava()`: LlavaNextForConditionalGeneration (CLIP tower, Mistral, anyres tiles) with
LlavaNextProcessor and a template in the `[INST] … [/INST]` form. `new_llama()`: LlamaForCausalLM
with a template in Llama-3's form. Both use a byte-level BPE, so that a title in any language can be
encoded. The same stage scripts run these and the 7B/8B checkpoints.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from mllmrec.data import sample_world as world
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import DOMAINS

VOCABULARY_SIZE = 900
MAX_POSITIONS = 2048
# With the usual 0.02 a model of this width does not learn to compare two words.
INITIALIZER_RANGE = 0.08

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}{% endif %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
    "message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


LANGUAGE_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": INITIALIZER_RANGE,
}
TILE, PATCH = 64, 16  # pixels


def tokenizer_text() -> list[str]:
    """What the byte-level BPE is trained on.

    The sentences of the sample world, and the words (not the sentences) of all prompts.
    """
    templates = (
        prompts.IMAGE,
        prompts.TITLE,
        prompts.FUSION,
        prompts.PREFERENCE_FIRST,
        prompts.PREFERENCE_NEXT,
        prompts.BLOCK_LINE,
        prompts.RECOMMEND,
    )
    words = sorted({word for text in templates for word in text.split() if "{" not in word})
    words += sorted({word for name in ("video", "product") for word in DOMAINS[name].values()})
    values = [value for attribute in world.ATTRIBUTES for value in world.VALUES[attribute]]
    words += [*values, *world.ADJECTIVES, *world.NOUNS, "Cover:", "Photo:", "[INST]", "[/INST]"]
    item = {"colour": "red", "shape": "star", "topic": "music"}
    sentences = [
        world.caption(item),
        world.title_note(item),
        world.fused_caption(item),
        world.preference_text(item),
        "Does this fit: Yes No None One Two Three any of these two or more how many",
    ]
    return (
        [" " + word for word in words for _ in range(20)]
        + sentences * 40
        + [f"{value}:" for value in values] * 20
        + ["\nThe"] * 20
    )


def new_tokenizer(bos: str, eos: str, pad: str, extra: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `bos` in front, as those of the real models do.

    extra: further special tokens.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[bos, eos, pad, *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(tokenizer_text(), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def language_model(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Options of a language model's config, with what it repeats from its tokenizer."""
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return LANGUAGE_MODEL | ids | {"vocab_size": len(tokenizer)}


def new_llava(seed: int) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """(model, processor) of a LLaVA-NeXT with tiles of 64 pixels, 16 patches each.

    An image is the whole image and one tile, so a cover takes 32 tokens.
    """
    torch.manual_seed(seed)
    tokenizer = new_tokenizer("<s>", "</s>", "<pad>", ["<unk>", "<image>"])
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=96,
        initializer_range=INITIALIZER_RANGE,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=MistralConfig(
            num_hidden_layers=3, sliding_window=None, **language_model(tokenizer)
        ),
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_grid_pinpoints=[[TILE, TILE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(TILE // PATCH) ** 2,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=[[TILE, TILE]],
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token, which the strategy "default" removes again
        chat_template=LLAVA_TEMPLATE,
    )
    return with_special_ids(LlavaNextForConditionalGeneration(config), tokenizer), processor


def new_llama(seed: int, **sizes: Any) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """(model, tokenizer) of a Llama with Llama 3's special tokens. sizes: others than the usual."""
    torch.manual_seed(seed)
    extra = ["<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = new_tokenizer("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", extra)
    tokenizer.chat_template = LLAMA_TEMPLATE
    config = LlamaConfig(**({"num_hidden_layers": 4} | language_model(tokenizer) | sizes))
    return with_special_ids(LlamaForCausalLM(config), tokenizer), tokenizer


def with_special_ids(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """`model`, with the ids that end and pad a generated text in its generation config."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
