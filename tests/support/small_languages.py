"""Directories of causal models with random weights and tokenizers trained on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "the cat sat on the mat and the other cat sat there", "a dog that barked at the cats in the gardens",
    "once there was a garden with other animals", "nobody understands understanding better than the one who sat",
    "bright birds brightly brightened another morning", "Zoë's café öffnet später", "sunny mornings, rainy evenings",
] * 3  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def byte_level() -> Tokenizer:
    """Byte-pair encoding over bytes, as GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return made


def with_bytes() -> Tokenizer:
    """Byte-pair encoding over characters, with bytes for those that are no token, as Llama's."""
    made = Tokenizer(models.BPE(unk_token="<pad>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=360, special_tokens=[*SPECIAL, *BYTES]))
    document = json.loads(made.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in SPECIAL]
    made = Tokenizer.from_str(json.dumps(document))
    spaces = decoders.Replace("▁", " ")
    made.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


def unigram() -> Tokenizer:
    """The likeliest split, with bytes for characters that are no token."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(
        SENTENCES, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<pad>")
    )
    document = json.loads(made.to_str())
    entries = document["model"]["vocab"]
    entries[len(SPECIAL) : len(SPECIAL)] = [[token, -20.0] for token in BYTES]
    document["model"] |= {"byte_fallback": True, "unk_id": 0}
    made = Tokenizer.from_str(json.dumps(document))
    spaces = decoders.Replace("▁", " ")
    made.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


KINDS = {"byte level": byte_level, "with bytes": with_bytes, "unigram": unigram}


def directory(folder: Path, kind: str = "with bytes", tied: bool = True, **sizes: Any) -> Path:
    """A Llama of two layers and 32 channels, saved with its tokenizer, which begins texts with `<s>`."""
    made = KINDS[kind]()
    made.add_tokens([AddedToken("<call>", special=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**shape, **sizes}, vocab_size=len(whole), tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, safe_serialization=True)
    whole.save_pretrained(folder)
    return folder
