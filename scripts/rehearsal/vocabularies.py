"""The vocabularies of Mistral 7B and Llama 3 as fast tokenizers, from two packages on PyPI.

mistral-common ships the SentencePiece model (32,000 pieces), llama-models the tiktoken ranks
(128,000 tokens). Special tokens and chat formats are those of the published
llava-v1.6-mistral-7b-hf and Meta-Llama-3-8B-Instruct, the templates are written here. The files are
read where the packages are installed; nothing of the packages is imported. A rebuilt tokenizer is
kept in a folder, so that several test processes build it once.
"""

import base64
import importlib.util
from pathlib import Path

from filelock import FileLock
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, PreTrainedTokenizerFast

from mllmrec.models.random_models import TINY_MODELS

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


def merges_of(ranks):
    """BPE merges of a vocabulary (piece -> rank) in which lower ranks are merged first."""
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in ranks and b in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def rebuilt_once(folder, name, build):
    """`build()`, from the file `name` in `folder` if a test process has built it already."""
    path = Path(folder, name)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            build().save(str(path))
    return Tokenizer.from_file(str(path))


def add_special_tokens(tokenizer, tokens):
    """Add control tokens; those that are in the vocabulary keep their ids."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])


def bos_first(token, token_id):
    """Post-processor that puts the BOS token before a text."""
    return TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])


def rebuild_mistral():
    """32,000 pieces, <image> and <pad>."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(mistral_model_file().read_bytes())
    vocabulary = {piece.piece: n for n, piece in enumerate(model.pieces)}
    # By score, not by id: runs of blanks have low ids and the lowest score.
    merges = merges_of({p.piece: -p.score for p in model.pieces if p.type == p.NORMAL})
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
    add_special_tokens(tokenizer, MISTRAL_SPECIAL)
    tokenizer.post_processor = bos_first("<s>", tokenizer.token_to_id("<s>"))
    return tokenizer


def mistral_tokenizer(folder):
    """The tokenizer of LLaVA-1.6-Mistral."""
    return PreTrainedTokenizerFast(
        tokenizer_object=rebuilt_once(folder, "mistral.json", rebuild_mistral),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def llava_processor(folder):
    """The processor of LLaVA-1.6-Mistral; its images are cut as the tiny model's."""
    processor = AutoProcessor.from_pretrained(TINY_MODELS / "llava")
    processor.tokenizer = mistral_tokenizer(folder)
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    processor.chat_template = MISTRAL_TEMPLATE
    return processor


def rebuild_llama3():
    """128,000 tokens of bytes and 256 control tokens."""
    lines = llama3_model_file().read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    merges = [(byte_text(a), byte_text(b)) for a, b in merges_of(ranks)]
    vocabulary = {byte_text(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    add_special_tokens(tokenizer, LLAMA3_SPECIAL)
    bos = LLAMA3_SPECIAL[0]
    tokenizer.post_processor = bos_first(bos, tokenizer.token_to_id(bos))
    return tokenizer


def llama3_tokenizer(folder):
    """The tokenizer of Llama 3 Instruct."""
    return PreTrainedTokenizerFast(
        tokenizer_object=rebuilt_once(folder, "llama3.json", rebuild_llama3),
        bos_token=LLAMA3_SPECIAL[0],
        eos_token="<|eot_id|>",
        chat_template=LLAMA3_TEMPLATE,
    )


def byte_characters():
    """byte -> the character that stands for it in the vocabulary of a byte-level BPE (GPT-2's)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {
        byte: chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)
    }


BYTE_CHARACTERS = byte_characters()


def byte_text(token):
    """A token of bytes as a vocabulary entry."""
    return "".join(map(BYTE_CHARACTERS.__getitem__, token))
