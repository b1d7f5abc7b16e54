"""A small tokenizer, saved as any other."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["[UNK]", "[END]", "[BEGIN]", "a", "b", "c"]


def save_tokenizer(folder: Path, **special: str) -> str:
    """One that splits at white space, with `special` tokens such as bos_token; returns `folder`."""
    vocab = {word: 3 * i for i, word in enumerate(WORDS)}  # ids with gaps
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)
    return str(folder)
