import logging
import os
import time

# At its import, which happens in transformers and PEFT before any module here could interfere,
# bitsandbytes warns on some processors that an optional package is missing. Nothing needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Who started this process, and when. Looked at before the libraries are imported, which takes
# seconds, in which DVC may be killed.
PARENT, BEGUN = os.getppid(), time.monotonic()
