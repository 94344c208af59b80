import logging

# Without an optional kernel for processors with bfloat16 instructions bitsandbytes warns at import; nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
