"""Loading the frozen model of stage 2 or 3 as a generation engine."""

from mllmrec.generation.engine import GenerationEngine, GenerationOptions
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_multimodal, load_text, max_prompt_tokens
from mllmrec.models.options import GenerationStageOptions


def load_engine(
    name: str, options: GenerationStageOptions, multimodal: bool
) -> tuple[GenerationEngine, int]:
    """(engine, how many tokens a prompt may have) for the model `name`."""
    model, processor = (load_multimodal if multimodal else load_text)(name, options)
    limit = max_prompt_tokens(model, options.max_new_tokens)
    chat = ChatProcessor(processor, prompt_format=options.prompt_format)
    generation = GenerationOptions(
        max_new_tokens=options.max_new_tokens,
        batch_tokens=options.batch_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    return GenerationEngine(model, chat, generation), limit
