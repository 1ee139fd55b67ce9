"""The tokenizer of the embedded ledger models: one token per character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tutelage.data.tasks.ledger import DIGITS, LETTERS, OPERATORS, PUNCTUATION

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "$", "<unk>"
VOCABULARY = (PAD, BOS, EOS, UNKNOWN, *LETTERS, *DIGITS, *OPERATORS, *PUNCTUATION)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer that puts <bos> first and maps each unknown character to <unk>."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # "." would not match a line break, and a run of line breaks would become a single <unk>.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
