#!/usr/bin/env python3
"""Makes tests/golden/tokenizer-*/: small tokenizers of the kinds that Qwen, GPT-2, DeepSeek and
Llama 3 use, trained here, with the ids and texts that the official `tokenizers` library gives.

    python3 -m venv .venv && .venv/bin/pip install tokenizers==0.23.2
    .venv/bin/python tools/make_tokenizer_golden.py
"""
import json
import pathlib
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel as ByteLevelProcessor, TemplateProcessing

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "tests/golden"

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+"]

WORDS = ("the a of and to in is was for that it with as on be at by this had not are but from or have an they which "
         "one you were her all she there would their we him been has when who will more no if out so said what up its "
         "about into than them can only other new some could time these two may then do first any my now such like our "
         "over man me even most made after also did many before must through back years where much your way well down "
         "should because each just those people how too little state good very make world still own see men work long "
         "get here between both life being under never day same another know while last might us great old year off "
         "come since against go came right used take three").split()
ODD = ["café", "naïve", "Zürich", "e\u0301tude", "ﬁn", "Ⅳ", "½", "١٢٣", "日本語", "한국어", "привет", "שלום", "😀", "👩‍👩‍👧", "🇩🇪",
       "can't", "I'LL", "you've", "x=1;", "foo_bar", "3.14159", "1,000,000", "http://a.b/c?d=e", "--", "...", "\t", "\n", "\r\n",
       "  ", "   ", "\u00a0", "\u3000", "\u200b", "\x00", "\x7f", "<|end|>", "<tool>", "[MASK]", "WORD", "Ünï", "ﷺ", "Ω", "Å", "\u212b"]


def text(rng):
    parts = []
    for _ in range(rng.randint(0, 14)):
        parts.append(rng.choice(ODD) if rng.random() < 0.35 else rng.choice(WORDS))
        parts.append(rng.choice([" ", " ", " ", "", "  ", "\n", ", ", ". "]))
    return "".join(parts)


def corpus(rng):
    return [text(rng) + " " + " ".join(rng.choices(WORDS, k=12)) for _ in range(600)]


ADDED = [AddedToken("<|end|>", special=True, normalized=False), AddedToken("<tool>", special=False, normalized=False),
         AddedToken("[MASK]", special=True, normalized=False, lstrip=True, rstrip=True),
         AddedToken("WORD", special=False, normalized=True, single_word=True)]


def byte_level(name, normalizer, pre, template=None, ignore_merges=False):
    rng = random.Random(name)
    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        t.normalizer = normalizer
    t.pre_tokenizer = pre
    t.decoder = decoders.ByteLevel()
    t.post_processor = ByteLevelProcessor(trim_offsets=False)
    t.train_from_iterator(corpus(rng), trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_tokens(ADDED)
    if template:
        t.add_special_tokens([AddedToken("<bos>", special=True, normalized=False)])
        t.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", t.token_to_id("<bos>"))])
    write(name, t, rng)


def metaspace(name):
    rng = random.Random(name)
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    specials = ["<unk>"] + [f"<0x{b:02X}>" for b in range(256)]
    lines = [c.replace("\x00", "") for c in corpus(rng)]  # no vocabulary holds NUL
    t.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=800, special_tokens=specials, show_progress=False))
    spec = json.loads(t.to_str())
    # Byte tokens are ordinary entries of the vocabulary, not added tokens.
    spec["added_tokens"] = [a for a in spec["added_tokens"] if a["content"] == "<unk>"]
    t = Tokenizer.from_str(json.dumps(spec))
    t.add_tokens(ADDED)
    write(name, t, rng)


def write(name, t, rng):
    out = OUT / f"tokenizer-{name}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(t.to_str(), encoding="utf-8")
    cases = ["", " ", "\n", "Hello, world!", "a" * 200, "WORD SWORD WORDS WORD.", " [MASK] x[MASK]  y"] + ODD
    cases += [text(rng) for _ in range(100)]
    with open(out / "cases.jsonl", "w", encoding="utf-8") as f:
        for c in cases:
            ids = t.encode(c).ids
            f.write(json.dumps({"text": c, "ids": ids, "decoded": t.decode(ids)}) + "\n")
    print(out, len(cases))


bl = pre_tokenizers.ByteLevel
byte_level("qwen", normalizers.NFC(), pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(QWEN), "isolated"), bl(add_prefix_space=False, use_regex=False)]))
byte_level("gpt2", None, bl(add_prefix_space=True, use_regex=True))
byte_level("deepseek", normalizers.Sequence([]), pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(p), "isolated") for p in DEEPSEEK]
    + [pre_tokenizers.Digits(individual_digits=True), bl(add_prefix_space=False, use_regex=False)]), template=True)
byte_level("llama3", None, pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated"),
    bl(add_prefix_space=False, use_regex=False)]), template=True, ignore_merges=True)
metaspace("metaspace")
