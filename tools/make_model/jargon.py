#!/usr/bin/env python3
"""Makes data/jargon.{train,eval}.jsonl: "What is X?" and its answer, from the Jargon File.

usage: jargon.py CACHE_DIR OUT_DIR

The answer is the entry's first sense: its first sentence, or the first two when they are short,
turned into an answer where the part of speech allows it. Standard library only; the same entries
give the same bytes.
"""

import json
import os
import re
import sys

import sources

SHORTEST, LONGEST = 30, 350
ROOM_FOR_SECOND = 130  # a first sentence up to this long takes the second along

TERM = re.compile(r"[A-Za-z0-9][A-Za-z0-9 './+&!-]*[A-Za-z0-9.!+]$")
ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|esp|prob|abbrev|cf|Dr|Mr|Mrs|Ms|St|Jr|Sr|No|approx|lit|usu|orig|U\.S|U\.K|"
    r"Inc|Corp|Co|[A-Z]|syn|Syn|var|pl|specif|acc|rel|ca|Comm|Prof|Univ|Ph\.D|p|pp|ed|ibid|viz|resp)\.|\.\.\.)[\"')]?$"
)
NOT_A_DEFINITION = re.compile(
    r"(?:See|Compare|Cf|Contrast|Also|Syn|Same as|Var|Variant|Opposite|Opposed|Antonym|Oppose|Plural|Pronounced|"
    r"Often (?:abbreviated|capitalized)|Sometimes (?:abbreviated|capitalized)|Antedates|This (?:entry|joke)|"
    r"For (?:more|further|details|an|the)|Alternate|Alternative|Another|Abbreviated|Ed|Note|Reported|So called|"
    r"This|These|It|He|They|There|When the|In 19|Historically|Originally|The emphatic)\b|[(0-9]",
)
REFERENCE = re.compile(
    r"\s*\((?:see|see also|also|compare|cf\.?|q\.v\.|sense|senses|or|contrast|syn\.?|opposite|etymology)\b[^()]*\)"
    r"|,? (?:in )?\(?senses? \d+(?:(?:,| and| or|-)+ ?\d+)*\)?"
    r"|,? q\.v\.",
    re.IGNORECASE,
)
LEADING_SPEECH = re.compile(r"^(?:(?:n|v|vi|vt|adj|adv|excl|interj|imp|prov|abbrev|obs)\.[,;/ ]*)+")


def sentences(text):
    """Splits prose; full stops of abbreviations and inside quotations end nothing."""
    parts, start = [], 0
    for match in re.finditer(r"[.!?][\"')]*\s+(?=[\"'(]*[A-Z0-9])", text):
        head = text[start : match.end()].rstrip()
        if ABBREVIATION.search(head) or head.count("(") > head.count(")") or head.count('"') % 2:
            continue
        parts.append(head)
        start = match.end()
    if text[start:].strip():
        parts.append(text[start:].strip())
    return parts


def close_quotes(text):
    """No space behind an opening quotation mark."""
    pieces = text.split('"')
    return '"'.join(p.lstrip() if i % 2 else p for i, p in enumerate(pieces))


def first_sense(entry):
    """The prose of the entry's first sense, references and bracketed notes removed."""
    numbered = [p for p in entry.paragraphs if re.match(r"(?:\[[^\]]*\] )?(?:1|1a)[.)] ", p)]
    for paragraph in numbered + entry.paragraphs:
        if not paragraph or paragraph.endswith((":", " sense")):
            return ""
        text = sources.plain_jargon(paragraph)
        text = re.sub(r"^(?:1|1a|a)[.)] ", "", LEADING_SPEECH.sub("", text))
        text = re.sub(r"^\([^()]*\)[,:;.]? ?", "", LEADING_SPEECH.sub("", text))
        text = LEADING_SPEECH.sub("", re.sub(r"^/[^/ ]+/[,;]? ?", "", LEADING_SPEECH.sub("", text)))
        text = re.sub(r"(?<=[a-z]),(?=[a-z]{3})", ", ", text)
        text = close_quotes(sources.tidy(REFERENCE.sub("", text)).lstrip(".,;: "))
        if text:
            return text
    return ""


def lower_first(text):
    """For the middle of a sentence; names and acronyms stay."""
    word = re.match(r"[A-Za-z']+", text)
    if not word or not re.match(r"(?:A|[A-Z][a-z']+)$", word[0]):
        return text
    return text[0].lower() + text[1:]


def article(term):
    if re.match(r"[A-Z0-9]{2,}\b", term):
        return "an" if term[0] in "AEFHILMNORSX8" else "a"
    if re.match(r"(?:uni|use|usen|eu|one|u[bst][iae])", term.lower()):
        return "a"
    return "an" if term[0].lower() in "aeiou" else "a"


def capital(text):
    return text[0].upper() + text[1:]


SYNONYM = re.compile(
    r"(?:Commonwealth hackish |Common |Another |Older |Usual |Less common |British )?"
    r"(?:[Ss]yn(?:onym(?:ous)?)?\.?)(?: (?:for|of|with|to))?,? (?=[A-Za-z])|Another (?:word|name|term) for |Same as "
)


def question_and_answer(entry):
    """(question, answer), or None where the entry gives no clean one."""
    term = entry.term
    parts = sentences(first_sense(entry))
    if not parts or not TERM.match(term) or len(term) > 32:
        return None
    first = parts[0].rstrip()
    if not re.search(r"[.!?][\"')]*$", first):
        first += "."
    kind = entry.speech[0] if entry.speech else "n"
    synonym = SYNONYM.match(first)
    if synonym:
        what = first[synonym.end() :]
        if len(what) > 60:
            return None
        question = f'What does "{term}" mean?'
        answer = f'"{term}" is another word for "{what.rstrip(".").strip(chr(34))}".'
    elif NOT_A_DEFINITION.match(first):
        return None
    elif kind in ("n", "abbrev") and re.match(r"(?:An?|One|Any(?: one)? of|Any) (?!\w+'s )", first):
        name = re.match(r"(?:[Tt]he |[A-Z][a-z])", term) or term.endswith("ing")
        one = term if name else f"{article(term)} {term}"
        question = f"What is {one}?"
        answer = f"{capital(one)} is {lower_first(first)}"
    elif kind == "n" and first.startswith("The ") and not term[0].islower():
        question = f"What is {term}?"
        answer = f"{capital(term)} is {lower_first(first)}"
    elif kind in ("v", "vi", "vt", "imp") and re.match(r"To [a-z]", first):
        question = f"What does it mean to {term}?"
        answer = f"To {term} is {lower_first(first)}"
    elif kind in ("n", "abbrev", "quant", "prov") and not term[0].islower():
        question, answer = f"What is {term}?", capital(first)
    else:
        question, answer = f'What does "{term}" mean?', capital(first)
    if len(first) <= ROOM_FOR_SECOND and len(parts) > 1:
        second = parts[1]
        if (
            not NOT_A_DEFINITION.match(second)
            and not re.search(r"pron(?:ounc|unc)", second)
            and re.search(r"[.!?][\"')]*$", second)
            and len(answer) + 1 + len(second) <= LONGEST
        ):
            answer += " " + second
    return question, answer


def acceptable(answer, entry):
    return (
        SHORTEST <= len(answer) <= LONGEST
        and answer.count('"') % 2 == 0
        and answer.count("(") == answer.count(")")
        and not re.search(r"[{}\[\]<>|@\\^~]|https?:|www\.|\d\d\d\d-\d\d|[^\x20-\x7e]|\.\.\.$", answer)
        and not re.search(
            r"\b(?:this|the) (?:entry|lexicon|file)\b|\bsenses?\b \d|\bsee\b|appendix|\bsex\b", answer, re.IGNORECASE
        )
        and not sources.COARSE.search(answer + " " + entry.term)
        and not sources.DISPARAGING.search(answer)
    )


def main(cache, out):
    folders = sources.unpack_packages(cache)
    lines = {"train": [], "eval": []}
    seen = set()
    for entry in sources.jargon_entries(folders["dict-jargon"]):
        pair = question_and_answer(entry)
        if pair is None or not acceptable(pair[1], entry) or pair[0].lower() in seen:
            continue
        seen.add(pair[0].lower())
        record = {
            "messages": [
                {"role": "user", "content": pair[0]},
                {"role": "assistant", "content": pair[1]},
            ]
        }
        split = "eval" if sources.held_out(entry.term) else "train"
        lines[split].append(json.dumps(record, ensure_ascii=False))
    for split, records in lines.items():
        path = os.path.join(out, f"jargon.{split}.jsonl")
        with open(path, "w", encoding="utf-8") as f:
            f.write("\n".join(records) + "\n")
        print(f"{path}: {len(records)} questions, {os.path.getsize(path) / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
