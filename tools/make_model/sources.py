"""The public texts that the shipped model is made of, read from Debian packages.

Each reader takes the folder that the package was unpacked into and gives plain Python values with
typewriter quotes. Standard library only.
"""

import gzip
import hashlib
import os
import re
import struct
import subprocess
import sys
from collections import namedtuple

PACKAGES = ("dict-jargon", "dict-devil", "bible-kjv-text", "wordnet-base")

# One entry in this many of the Jargon File is held out of all training.
HELD_OUT_ONE_IN = 11

# Entries with these words are left out of everything that is shipped or learned.
COARSE = re.compile(
    r"\b(?:(?:mother)?f[u*]ck\w*|f\*\*\w*|bullsh\w+|shit\w*|cunt\w*|bitch\w*|whor\w+|slut\w*|rap(?:e[ds]?|ing|ist\w*)"
    r"|nazi\w*|hitler\w*|nigg\w+|negro\w*|fag(?:got)?s?|dyke\w*|kike\w*|spic|wop|dago|chink|gook|jap|honky"
    r"|retard(?:ed|s)?|cripple\w*|masturbat\w*|orgasm\w*|penis\w*|vagina\w*|copulat\w*|coitus"
    r"|intercourse|erotic\w*|pornograph\w*|prostitut\w*|sodom\w*|incest\w*|pederast\w*|semen|testic\w+"
    r"|genital\w*|scrotum|clitor\w*|foreskin\w*|buttocks|arsehole|ass-?holes?|piss\w*|turds?|feces"
    r"|sexual\w*|lynch\w*|suicid\w*|genocid\w*|slave\w*|slavery|terroris\w+)\b",
    re.IGNORECASE,
)
DISPARAGING = re.compile(
    r"offensive (?:name|term|word|slang)|\bslur\b|disparag|derogat|obscene|vulgar|pejorative|insulting"
    r"|\(ethnic|slang term for|contemptuous|lewd|prurient|lust",
    re.IGNORECASE,
)

TYPEWRITER = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--",
        "\u2026": "...", "\u00a0": " ", "\u00b4": "'", "\u00d7": "x", "\u2212": "-",
    }
)  # fmt: skip


def unpack_packages(cache):
    """Gives {name: folder}; downloads and unpacks under `cache` what no earlier run left there."""
    folders = {}
    for name in PACKAGES:
        folder = os.path.join(cache, "packages", name)
        folders[name] = folder
        if os.path.isdir(os.path.join(folder, "usr")):
            continue
        os.makedirs(folder, exist_ok=True)
        download = subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name], cwd=folder)
        archives = sorted(f for f in os.listdir(folder) if f.endswith(".deb"))
        if download.returncode != 0 or not archives:
            sys.exit(f"apt-get download {name} failed (run 'apt-get update' once as root)")
        subprocess.run(["dpkg", "-x", archives[-1], "."], cwd=folder, check=True)
    return folders


def tidy(text):
    """One line, typewriter quotes, no space before punctuation."""
    text = text.translate(TYPEWRITER)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"\s+([,.;:!?)])(?=\s|$)", r"\1", text)


def _dict_number(text):
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = 0
    for c in text:
        value = value * 64 + digits.index(c)
    return value


def dict_entries(folder, name):
    """Texts of a dictd database in file order, without its notes on itself."""
    base = os.path.join(folder, "usr/share/dictd", name)
    with gzip.open(base + ".dict.dz") as f:
        data = f.read()
    spans = set()
    with open(base + ".index", encoding="utf-8") as f:
        for line in f:
            term, offset, size = line.rstrip("\n").split("\t")
            if not term.startswith("00-"):
                spans.add((_dict_number(offset), _dict_number(size)))
    return [data[o : o + n].decode("utf-8", "replace") for o, n in sorted(spans)]


JargonEntry = namedtuple("JargonEntry", "term speech paragraphs")

SPEECH = re.compile(
    r"(?:^|[\s,/;])(n|v|vi|vt|adj|adv|excl|interj|imp|prov|abbrev|suff|pref|prefix|suffix|comb|quant|obs)\."
)


def jargon_entries(folder):
    """Entries of the Jargon File: term, parts of speech ("n", "v", ...), paragraphs of prose."""
    entries = []
    for text in dict_entries(folder, "jargon"):
        head, _, rest = text.partition("\n")
        term = tidy(head)
        blocks = [b for b in re.split(r"\n\s*\n", rest) if b.strip()]
        speech = []
        # Below the term stands a line of pronunciation and part of speech, one space in.
        if blocks and re.match(r" \S", blocks[0]) and not blocks[0].startswith("    "):
            speech = SPEECH.findall(" " + tidy(blocks[0]))
            blocks = blocks[1:]
        # Prose is indented by four; what is indented further is verse, code or a picture: "" here.
        paragraphs = [
            tidy(b) if re.match(r"\n? {4}\S", b) and "\n      " not in b else "" for b in blocks
        ]
        if term and any(paragraphs):
            entries.append(JargonEntry(term, speech, paragraphs))
    return entries


def plain_jargon(text):
    """Without cross-reference braces and notes in brackets."""
    text = re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", text)
    text = re.sub(r"\s*\[[^\[\]]*\]", "", text)
    return tidy(text)


def held_out(term):
    """Whether the Jargon File's entry belongs to the evaluation set and is never learned from."""
    digest = hashlib.sha256(term.lower().encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def devil_entries(folder):
    """Entries of the Devil's Dictionary as lists of paragraphs; verse keeps its lines."""
    entries = []
    for text in dict_entries(folder, "devil"):
        paragraphs = []
        for block in re.split(r"\n\s*\n", text):
            lines = [line for line in block.split("\n") if line.strip()]
            if not lines:
                continue
            if lines[0].startswith("    "):
                paragraphs.append("\n".join(tidy(line) for line in lines))
            else:
                paragraphs.append(tidy(" ".join(lines)).replace("_", ""))
        if paragraphs:
            entries.append(paragraphs)
    return entries


def bible_verses(folder):
    """(book, chapter, text) of each verse of the King James Version.

    The file is a table of 64 KiB windows, each the body of a compress(1) file (16 bits, block mode)
    without its header: gzip reads them with the header put back.
    """
    with open(os.path.join(folder, "usr/lib/bible.data"), "rb") as f:
        data = f.read()
    if not data.startswith(b"EC02Compressed Data File"):
        sys.exit("bible.data: not the expected format")
    first = struct.unpack_from(">I", data, 0x5C)[0]
    count = (first - 0x5C) // 4
    starts = struct.unpack_from(f">{count}I", data, 0x5C)
    starts = [s for s in starts if first <= s <= len(data)]
    text = b""
    for begin, end in zip(starts, starts[1:]):
        window = b"\x1f\x9d\x90" + data[begin:end]
        text += subprocess.run(["gzip", "-dc"], input=window, stdout=subprocess.PIPE, check=True).stdout
    verses = []
    for line in text.decode("ascii", "replace").split("\n"):
        match = re.match(r"(\d?[A-Za-z]+?)(\d+):(\d+) (.*)", line)
        if match:
            verses.append((match[1], int(match[2]), tidy(match[4])))
    return verses


Synset = namedtuple("Synset", "key lemmas definition examples hypernyms parts antonyms")

# Pointer symbols: wndb(5WN).
_KINDS = {"@": "hypernyms", "@i": "hypernyms", "%p": "parts", "!": "antonyms"}


def wordnet_synsets(folder, kind):
    """Synsets of data.KIND (noun, verb, adj, adv), without coarse or disparaging ones.

    Pointers are keys (the offset in the file as text) to synsets of the same kind.
    """
    synsets = {}
    letters = {"noun": "n", "verb": "v", "adj": "as", "adv": "r"}[kind]
    path = os.path.join(folder, "usr/share/wordnet/data." + kind)
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            if line.startswith("  "):
                continue
            left, _, gloss = line.partition(" | ")
            if COARSE.search(line) or DISPARAGING.search(gloss):
                continue
            fields = left.split()
            count = int(fields[3], 16)
            lemmas = [re.sub(r"\([a-z]+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2]]
            at = 4 + 2 * count
            links = {"hypernyms": [], "parts": [], "antonyms": []}
            for i in range(int(fields[at])):
                symbol, target, letter, _ = fields[at + 1 + 4 * i : at + 5 + 4 * i]
                if symbol in _KINDS and letter in letters:
                    links[_KINDS[symbol]].append(target)
            instance = " @i " in left
            gloss = tidy(gloss).replace("`", "'")
            examples = re.findall(r'"([^"]+)"', gloss)
            definition = re.sub(r'[;:,]?\s*"[^"]*"?.*$', "", gloss).strip(" ;:,")
            if not definition:
                continue
            synsets[fields[0]] = Synset(
                ("i" if instance else "") + fields[0], lemmas, definition, examples, **links
            )
    return synsets
