import logging

# At its import, which happens in transformers and PEFT before any module here could interfere,
# bitsandbytes warns on some processors that an optional package is missing. Nothing needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
