"""The vocabularies of Mistral 7B and Llama 3 as fast tokenizers, from two packages on PyPI.

mistral-common ships the SentencePiece model (32,000 pieces), llama-models the tiktoken ranks
(128,000 tokens). Special tokens and chat formats are those of the published
llava-v1.6-mistral-7b-hf and Meta-Llama-3-8B-Instruct, the templates are written here. The files are
read where the packages are installed; nothing of the packages is imported.
"""

import importlib.util
from pathlib import Path

from random_models import TINY_MODELS
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import generate_merges

MISTRAL_SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
)
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As published: no <s>, which the tokenizer adds, and a mistyped </s> behind an answer.
MISTRAL_TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'user' %}[INST] "
    "{% for part in turn.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in turn.content if part.type == 'text' %}{{ part.text }}{% endfor %} [/INST]"
    "{% else %} {{ turn.content[0].text }}{{ '<\\\\s> ' }}{% endif %}{% endfor %}"
)
LLAMA3_TEMPLATE = (
    "{% for turn in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n{{ turn.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def package_file(package, name):
    """Path of a file of an installed package, which is not imported."""
    [folder] = importlib.util.find_spec(package).submodule_search_locations
    return Path(folder, name)


def mistral_model_file():
    """The SentencePiece model."""
    return package_file("mistral_common", "data/tokenizer.model.v1")


def llama3_model_file():
    """The tiktoken ranks."""
    return package_file("llama_models", "llama3/api/tokenizer.model")


def bos_first(token, token_id):
    """Post-processor that puts the BOS token before a text."""
    return TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])


def rebuild_mistral():
    """32,000 pieces, <image> and <pad>."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(mistral_model_file().read_bytes())
    vocabulary = {piece.piece: n for n, piece in enumerate(model.pieces)}
    # By score, not by id: runs of blanks have low ids and the lowest score.
    merges = generate_merges(vocabulary, {p.piece: p.score for p in model.pieces if p.type == 1})
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in MISTRAL_SPECIAL])
    tokenizer.post_processor = bos_first("<s>", tokenizer.token_to_id("<s>"))
    return tokenizer


def llava_processor():
    """The processor of LLaVA-1.6-Mistral; its images are cut as the tiny model's."""
    processor = AutoProcessor.from_pretrained(TINY_MODELS / "llava")
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rebuild_mistral(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    processor.chat_template = MISTRAL_TEMPLATE
    return processor


def llama3_tokenizer():
    """The tokenizer of Llama 3 Instruct: 128,000 tokens of bytes and 256 control tokens."""
    converter = TikTokenConverter(
        str(llama3_model_file()), LLAMA3_WORDS, extra_special_tokens=LLAMA3_SPECIAL
    )
    tokenizer, bos = converter.converted(), LLAMA3_SPECIAL[0]
    tokenizer.post_processor = bos_first(bos, tokenizer.token_to_id(bos))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        chat_template=LLAMA3_TEMPLATE,
    )
