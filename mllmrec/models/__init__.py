"""Loading models, prompts as token ids, LoRA."""

import logging

# When it is imported, bitsandbytes warns of a kernel that it would fetch for 4-bit products on CPUs
# with bfloat16 instructions; without it they are computed in another way.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
