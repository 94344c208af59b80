"""Loading models, prompts as token ids, LoRA."""
