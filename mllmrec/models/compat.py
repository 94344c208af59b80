"""Every use of a private or unstable API of transformers and accelerate, in one place.

Each function names the version it was checked with. When a library is upgraded, this is the module
to read again; nothing else in the repository depends on names that start with an underscore.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import TrainerState, TrainingArguments
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.auto.processing_auto import (
    PROCESSOR_MAPPING_NAMES,
    processor_class_from_name,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

MAX_PACKED_BYTES = 2e9  # of weights that `packed_linears` copies


def num_image_tokens(processor: Any, width: int, height: int) -> int:
    """Number of tokens that an image of this size takes in a prompt.

    `_get_num_multimodal_tokens` is private; checked with transformers 5.17 and 5.23.
    """
    return processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0]


def processor_without_video(model_type: str) -> Any:
    """The processor class of a model type, without its video part, which needs torchvision.

    Overrides `get_attributes`, which is undocumented; checked with transformers 5.17 and 5.23.
    Raises KeyError for a model type without a processor.
    """
    processor_class = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type])
    attributes = {
        "get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"]),
        "__module__": processor_class.__module__,
    }
    return type(processor_class.__name__, (processor_class,), attributes)


def has_plain_positions(model: torch.nn.Module) -> bool:
    """False for models with M-RoPE (Qwen2.5-VL), whose position ids are computed inside the model.

    Such models have a method `get_rope_index`; checked with transformers 5.17 and 5.23.
    """
    return not any(hasattr(module, "get_rope_index") for module in model.modules())


def has_full_attention(model: Any) -> bool:
    """False for models with sliding windows, or other layers than attention to all tokens before.

    `layer_types` is undocumented; checked with transformers 5.17 and 5.23.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ())
    return not getattr(config, "sliding_window", None) and layer_types <= {"full_attention"}


def takes_masks_of_pairs(model: Any) -> bool:
    """True if the attention takes a bool mask (rows, 1, tokens, tokens): SDPA, without windows.

    `_attn_implementation` is private; checked with transformers 5.17 and 5.23.
    """
    config = model.config.get_text_config()
    return has_full_attention(model) and config._attn_implementation == "sdpa"


def keep_4bit_layout(model: torch.nn.Module) -> None:
    """On a CPU, keep the 4-bit weights of a model in the layout that has gradients.

    bitsandbytes repacks them in the first pass without gradients, and its product of the repacked
    weights has none: what is trained afterwards learns from wrong ones, with a warning at most.
    `support_avx512bf16_for_cpu` is undocumented; checked with bitsandbytes 0.50.2.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer with room for the tokens to come: nothing is copied per token.

    A subclass of the cache layer that `generate` uses; checked with transformers 5.17 and 5.23.
    keys, values: (rows, heads, tokens, head size) of any rows, for shape and dtype; size: (rows,
    prompt length, room for new tokens).
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, size: tuple[int, int, int]
    ) -> None:
        super().__init__()
        rows, length, room = size
        shape = (rows, keys.shape[1], length + room)
        self.all_keys = keys.new_zeros(*shape, keys.shape[3])
        self.all_values = values.new_zeros(*shape, values.shape[3])
        self.length = length
        self.lazy_initialization(keys, values)
        self._set_views()

    def fill(self, first_row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the keys and values of a few prompts, right-aligned, from row `first_row` on."""
        rows = slice(first_row, first_row + keys.shape[0])
        start = self.length - keys.shape[2]
        self.all_keys[rows, :, start : self.length] = keys
        self.all_values[rows, :, start : self.length] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new tokens; return those of all tokens."""
        end = self.length + key_states.shape[2]
        self.all_keys[:, :, self.length : end] = key_states
        self.all_values[:, :, self.length : end] = value_states
        self.length = end
        self._set_views()
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _set_views(self) -> None:
        self.keys = self.all_keys[:, :, : self.length]
        self.values = self.all_values[:, :, : self.length]


def cache_of(layers: Sequence[Any]) -> Cache:
    """A cache of the given layers, for `generate`; checked with transformers 5.17 and 5.23."""
    return Cache(layers=list(layers))


@contextmanager
def packed_linears(model: torch.nn.Module) -> Iterator[None]:
    """Within: linear layers of a model on a CPU are computed by oneDNN, from a copy in its layout.

    torch takes MKL for float32, which computes at half the speed on AMD processors, and in each
    product brings the weights into another order (docs/benchmarks.md). Without gradients. Nothing
    changes on a GPU, on other processors, in float16, and for models whose copy would be large.
    `torch.ops.mkldnn` is private, inductor uses it; checked with torch 2.13.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear and "forward" not in vars(module)  # nor a hook
    ]
    weights = [layer.weight for layer in layers]
    dtypes = [torch.float32] if torch.backends.mkl.is_available() else []  # on x86
    if dtypes and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.append(torch.bfloat16)
    usable = all(w.device.type == "cpu" and w.dtype in dtypes for w in weights)
    if not usable or sum(w.nbytes for w in weights) > MAX_PACKED_BYTES:
        yield
        return

    def product(layer: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], "")

    for layer in layers:
        layer.forward = product(layer)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def select_cache_rows(cache: Any, rows: torch.Tensor) -> Any:
    """A copy of the cache with, for each entry of `rows`, the keys and values of that row.

    `DynamicCache.layers` is undocumented; checked with transformers 5.17 and 5.23.
    """
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def one_device_per_process(arguments: TrainingArguments) -> TrainingArguments:
    """`arguments`, with which a process that sees several GPUs uses one, without DataParallel.

    Sets `_n_gpu`; checked with transformers 5.17 and 5.23.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def stopped_after(checkpoint: str | Path) -> int | None:
    """Number of whole epochs after which the run of this checkpoint stopped, None: it did not.

    In the middle of an epoch that one is not begun again: `Trainer` resumes behind the whole ones.

    Reads `stateful_callbacks` of trainer_state.json; checked with transformers 5.17 and 5.23.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    stops = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
    return int(state.epoch + 1e-6) if stops and state.epoch is not None else None


def length_grouped_order(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[int]:
    """Indices in random order, rows of similar length together; checked with transformers 5.23."""
    return get_length_grouped_indices(list(lengths), batch_size, generator=generator)


def is_out_of_memory(error: Exception) -> bool:
    """True for the errors of a full device memory; checked with accelerate 1.15."""
    return should_reduce_batch_size(error)


def empty_device_cache(collect_garbage: bool = False) -> None:
    """Give cached device memory back; checked with accelerate 1.15."""
    clear_device_cache(garbage_collection=collect_garbage)
