"""Empty tiny models of the real classes, with tokenizer, processor and chat template, ready to be trained.

`new_llava()`: LlavaNextForConditionalGeneration (CLIP tower, Mistral, anyres tiles) with LlavaNextProcessor and a
template in the `[INST] … [/INST]` form. `new_llama()`: LlamaForCausalLM with a Llama-3-form template. Both use a
byte-level BPE, so a title in any language goes through. The same stage scripts run these and the 7B/8B checkpoints.
"""

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

from data_processing import prompts, sample_world

MAX_POSITIONS = 2048
# Matching one word against another is not learned at this width with the usual 0.02.
INITIALIZER_RANGE = 0.08

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def tokenizer_text():
    """What the byte-level BPE is trained on: the world's sentences, and the words (not the sentences) of all prompts."""
    fields = (
        prompts.IMAGE,
        prompts.TITLE,
        prompts.FUSION,
        prompts.PREFERENCE_FIRST,
        prompts.PREFERENCE_NEXT,
    )
    words = sorted(
        {
            w
            for text in (*fields, prompts.BLOCK_LINE, prompts.RECOMMEND)
            for w in text.split()
            if "{" not in w
        }
    )
    words += sorted({word for domain in prompts.DOMAINS.values() for word in domain.values()})
    values = [
        value for attribute in sample_world.ATTRIBUTES for value in sample_world.VALUES[attribute]
    ]
    words += [
        *values,
        *sample_world.ADJECTIVES,
        *sample_world.NOUNS,
        "Cover:",
        "Photo:",
        "[INST]",
        "[/INST]",
    ]
    item = {"colour": "red", "shape": "star", "topic": "music"}
    sentences = [
        sample_world.caption(item), sample_world.title_note(item), sample_world.fused_caption(item),
        sample_world.preference_text(item), "Does this fit: Yes No None One Two Three any of these two or more how many",
    ]  # fmt: skip
    return (
        [" " + word for word in words for _ in range(20)]
        + sentences * 40
        + [f"{v}:" for v in values] * 20
        + ["\nThe"] * 20
    )


def new_tokenizer(bos, eos, pad, extra, vocabulary=900):
    """A byte-level BPE tokenizer that puts `bos` in front, as the real ones do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
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


def special_ids(tokenizer):
    """The ids that a model's configuration repeats from its tokenizer."""
    return {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }


def new_llava(seed):
    """(model, processor): 64-pixel tiles of 16 patches, one tile beside the overview, so a cover is 32 tokens."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer("<s>", "</s>", "<pad>", ["<unk>", "<image>"])
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    pinpoints = [[64, 64]]
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=16,
        projection_dim=96, initializer_range=INITIALIZER_RANGE,
    )  # fmt: skip
    text = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=MAX_POSITIONS, sliding_window=None,
        initializer_range=INITIALIZER_RANGE, **special_ids(tokenizer),
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token, which the strategy "default" takes away again
        chat_template=LLAVA_TEMPLATE,
    )
    return model, processor


def new_llama(seed):
    """(model, tokenizer)"""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer(
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
    )
    tokenizer.chat_template = LLAMA_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=MAX_POSITIONS, initializer_range=INITIALIZER_RANGE,
        **special_ids(tokenizer),
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
