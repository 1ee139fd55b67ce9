"""What ranks of the tests import, once for all that are forked; it starts no thread."""

import accelerate  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import ranks  # noqa: F401
import tutelage.train.loop  # noqa: F401
