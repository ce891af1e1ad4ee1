"""Tiny tokenizers as exports have them, of every class that the light tokenizer knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.train.conftest import CHATML

CORPUS = [
    "The quick brown fox isn't lazy, it's 12345 years old! They'd say: we've seen 67 of them .",
    "Ärger über Öl: naïve cafés, Straße, El Niño, 日本語のテキスト と 中文字符, emoji 😀🎉, и по-русски.",
    "def f(x):\n    return x ** 2  # spaces   and\ttabs\r\n\r\n\n",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool>"]
BRACKETS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]

TEXTS = [
    "",
    " ",
    "a",
    "  two spaces,   three;\ttabs\n\nlines\r\n end  ",
    "It's 12345 o'clock , isn't it ? They 've said: don't ! we 're off .",
    "e\u0301 and é, ﬁne, Å (Angstrom), İstanbul, ﷺ, ①, \u200bzero width, a\u0300\u0301",
    "日本語のテキスト、中文字符。한국어 ไทย עברית العربية",
    "😀🎉👩\u200d👩\u200d👧 flags 🇩🇪, and a lone \ufffd",
    "<s>special</s> inside<|im_end|>text <|im_start|> spaced <mask> <tool>x</tool> [MASK] [SEP]<pad>",
    "plain\u0000null \u0007bell \x7f \u2028line \u00a0space \u2581 underline ▁▁",
    "def f(x):\n    return x ** 2  # 3.14159e-10\n" * 5,
    "CamelCase UPPER lower MiXeD under_score kebab-case http://example.org/a?b=c&d=%20",
]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS] + [
    [{"role": "system", "content": "Be brief ."}, {"role": "user", "content": "Hi <|im_end|>\n there  "}],
    [
        {"role": ("user", "assistant")[turn % 2], "content": f"turn {turn}: {TEXTS[turn % len(TEXTS)]}"}
        for turn in range(41)
    ],
]


def byte_level() -> Tokenizer:
    """Pieces of bytes, whose file splits digits apart, which classes that make it anew do not."""
    tokenizer = Tokenizer(models.BPE())
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = in_bytes
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL[:-1], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "1234567 12345 67"], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), in_bytes])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """Pieces of sentences with bytes for what has none; a beginning is put before every text."""
    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "\u2581")} - {"日"})
    vocabulary = {token: number for number, token in enumerate(SPECIAL[:-1])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *letters]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [("t", "h"), ("th", "e"), ("\u2581", "a"), ("i", "s"), ("\u2581", "\u2581"), ("\u2581", "the")]
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[:-1]])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True, special=False)])
    return tokenizer


def words() -> Tokenizer:
    """Words of small letters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=BRACKETS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write(
    directory: Path, tokenizer: Tokenizer, model_type: str, class_name: str | None = None, /, **options: Any
) -> Path:
    """Write the files of a tokenizer.

    Args:
        directory: Where to.
        tokenizer: Becomes `tokenizer.json`.
        model_type: Of `config.json`.
        class_name: Of `tokenizer_config.json`; None for none.
        **options: What else is in there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if class_name is not None:
        options["tokenizer_class"] = class_name
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML} | options))
    return directory
