"""How transformers makes tokenizers anew from a vocabulary, whatever else `tokenizer.json` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

__all__ = [
    "Parts",
    "Recipe",
    "UnsureError",
    "byte_level",
    "composed_byte_level",
    "finish_between_ends",
    "finish_pair_of_ends",
    "sentence_pieces",
    "spaces_replaced",
    "split_byte_level",
    "words",
]

# As transformers and the checkpoints have it: contractions, words, single digits, punctuation, line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "\u2581"


class UnsureError(Exception):
    """It is not known here whether transformers would give the same."""


@dataclass(frozen=True)
class Parts:
    """What a tokenizer is made of.

    Attributes:
        vocabulary: Ids by token.
        merges: Pairs of pieces that become one, in order; none of a vocabulary of words.
        options: Keyword arguments of the class.
        named: Special tokens by name, as text.
    """

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    options: Mapping[str, Any]
    named: Mapping[str, str]

    def flag(self, name: str, default: bool) -> bool:
        """A keyword argument that is true or false; the default also for None."""
        value = self.options.get(name)
        return default if value is None else bool(value)

    def token(self, tokenizer: Tokenizer, name: str) -> tuple[str, int]:
        """A special token and its id."""
        number = tokenizer.token_to_id(self.named[name])
        if number is None:
            raise UnsureError(f"{name} is not in the vocabulary")
        return self.named[name], number


@dataclass(frozen=True)
class Recipe:
    """How a class makes its tokenizer.

    Attributes:
        make: Makes it, without special tokens.
        defaults: Special tokens where the files name none.
        model: What the vocabulary is of, as `tokenizer.json` calls it.
        padding_side: Where shorter texts are filled up.
        gives_token_types: Whether the model is told which of two texts a token is of.
        keeps_post_processor: Whether `tokenizer.json` says what is put around a text.
        adds_named_again: Whether special tokens by name are added once more at the end.
        finish: Says what is put around a text; None where that is said already.
    """

    make: Callable[[Parts], Tokenizer]
    defaults: Mapping[str, str]
    model: str = "BPE"
    padding_side: str = "right"
    gives_token_types: bool = False
    keeps_post_processor: bool = True
    adds_named_again: bool = False
    finish: Callable[[Tokenizer, Parts], None] | None = None


def byte_level(parts: Parts) -> Tokenizer:
    """Pieces of bytes."""
    tokenizer = _pieces_of_bytes(parts)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=parts.flag("add_prefix_space", False))
    return tokenizer


def composed_byte_level(parts: Parts) -> Tokenizer:
    """Pieces of bytes, where accents are one with their letters."""
    tokenizer = _pieces_of_bytes(parts)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=parts.flag("add_prefix_space", False), trim_offsets=parts.flag("trim_offsets", True)
    )
    return tokenizer


def split_byte_level(parts: Parts) -> Tokenizer:
    """Pieces of bytes, where accents are one with their letters and digits stand for themselves."""
    tokenizer = _pieces_of_bytes(parts)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=parts.flag("add_prefix_space", False), use_regex=False),
        ]
    )
    return tokenizer


def _pieces_of_bytes(parts: Parts) -> Tokenizer:
    model = BPE(
        vocab=parts.vocabulary,
        merges=parts.merges,
        dropout=None,
        continuing_subword_prefix="",
        end_of_word_suffix="",
        fuse_unk=False,
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_pieces(parts: Parts) -> Tokenizer:
    """Pieces of sentences, whose spaces are letters; what has no piece is written in bytes."""
    prefix = parts.flag("add_prefix_space", True)
    model = BPE(vocab=parts.vocabulary, merges=parts.merges, fuse_unk=True, byte_fallback=True, dropout=None)
    tokenizer = Tokenizer(model)
    scheme = ("always" if parts.flag("legacy", False) else "first") if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * prefix)
    return tokenizer


def spaces_replaced(parts: Parts) -> Tokenizer:
    """As `sentence_pieces`, but nothing is put before a sentence."""
    model = BPE(
        vocab=parts.vocabulary,
        merges=parts.merges,
        fuse_unk=True,
        unk_token=parts.named["unk_token"],
        dropout=None,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def words(parts: Parts) -> Tokenizer:
    """Words, and pieces that begin with ##."""
    tokenizer = Tokenizer(WordPiece(parts.vocabulary, unk_token=parts.named["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=parts.flag("tokenize_chinese_chars", True),
        strip_accents=parts.options.get("strip_accents"),
        lowercase=parts.flag("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def finish_between_ends(tokenizer: Tokenizer, parts: Parts) -> None:
    """A beginning, the text, an end; two ends between two texts."""
    tokenizer.post_processor = processors.RobertaProcessing(
        parts.token(tokenizer, "sep_token"),
        parts.token(tokenizer, "cls_token"),
        parts.flag("trim_offsets", True),
        parts.flag("add_prefix_space", False),
    )


def finish_pair_of_ends(tokenizer: Tokenizer, parts: Parts) -> None:
    """A beginning, the text, an end; and the second text and an end, of type 1."""
    first, last = parts.token(tokenizer, "cls_token"), parts.token(tokenizer, "sep_token")
    single = f"{first[0]}:0 $A:0 {last[0]}:0"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1 {last[0]}:1", special_tokens=[first, last]
    )
