"""What stands between two turns is the chat template's text, and generated ids stay as they are."""

from __future__ import annotations

from tutelage.models.tiny import tiny_tokenizer
from tutelage.models.turn_template import TurnTemplate


def test_the_end_of_a_turn_is_left_out_since_the_model_generated_it() -> None:
    tokenizer = tiny_tokenizer()
    template = TurnTemplate(tokenizer, {tokenizer.eos_token_id})
    ids = template.between([{"role": "tool", "name": "f", "content": "<|im_end|>"}], (), "p")
    wanted = "\n<|im_start|>tool\n< |im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == wanted
