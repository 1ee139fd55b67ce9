"""What ranks of the tests import, once for all that are forked; it starts no thread."""

import atexit
import gc

import accelerate  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import ranks  # noqa: F401
import tutelage.train.loop  # noqa: F401

gc.freeze()  # the collector of a rank need not look at all of it again and again
atexit.register(gc.unfreeze)  # before the interpreter ends, which tells of what is left
