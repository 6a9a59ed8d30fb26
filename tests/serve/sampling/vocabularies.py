"""Small tokenizers and a model that is nothing but its settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = 1


def byte_level() -> Any:
    """Byte-level BPE: every byte, and a few merges that cross JSON's signs."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [('"', ":"), ("{", '"'), ("t", "r"), ("u", "e"), ("tr", "ue"), ('"', "}"), ("1", "2")]
    tokens += [first + second for first, second in merges]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend)


def sentence_piece() -> Any:
    """Blanks as a sign of their own, and bytes for what no token spells."""
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [chr(code) for code in range(33, 127)] + ["▁", "é"]
    merges = [("▁", "a"), ("t", "r"), ("u", "e"), ("tr", "ue"), ('"', ":"), ("{", '"')]
    tokens += [first + second for first, second in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finished(backend)


def _finished(backend: Any) -> Any:
    ends = [AddedToken(text, normalized=False, special=True) for text in ("<s>", "</s>")]
    backend.add_tokens(ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def model_of(vocabulary: int, ends: Any = END) -> Any:
    """What a sampler needs of a model."""
    config = SimpleNamespace(vocab_size=vocabulary)
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=ends))
