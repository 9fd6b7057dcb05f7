#!/usr/bin/env python3
"""Makes the pre-training corpus of the shipped model: JSON lines, one document each.

usage: corpus.py CACHE_DIR OUT_DIR

Writes OUT_DIR/corpus.jsonl and, of the same kinds, OUT_DIR/corpus.valid.jsonl (one document in
200). Most are {"text"}; a third of the tokens are {"messages"} whose questions and answers come from WordNet, so
that the model knows the form. The Jargon File's held-out entries (sources.held_out) are not in it,
and none of its entries are in question form. Standard library only; the same packages give the
same bytes.
"""

import json
import os
import random
import re
import sys

import sources
from jargon import TERM, article, capital

SEED = 20261124
VALID_ONE_IN = 200
SHORTEST, LONGEST = 250, 840  # characters of a document, about 70 to 250 tokens


def finish(text):
    return text if re.search(r"[.!?][\"')]*$", text) else text + "."


def join_short(pieces, shortest=SHORTEST, longest=LONGEST, glue="\n"):
    """Joins neighbours until each document has a fair length."""
    documents, current = [], ""
    for piece in pieces:
        if current and len(current) + len(piece) + 1 > longest:
            documents.append(current)
            current = ""
        current = current + glue + piece if current else piece
        if len(current) >= shortest:
            documents.append(current)
            current = ""
    if current:
        documents.append(current)
    return documents


def cut_long(text):
    """Parts of at most LONGEST characters, cut between sentences where there are any."""
    while len(text) > LONGEST:
        ends = [m.end() for m in re.finditer(r"[.!?][\"')]*\s|\n", text[:LONGEST])]
        at = max((e for e in ends if e >= SHORTEST), default=LONGEST)
        yield text[:at].strip()
        text = text[at:].strip()
    if text:
        yield text


def bible_documents(folder, rng):
    """Passages of neighbouring verses of one chapter."""
    documents, current, where, room = [], [], None, 700
    for book, chapter, verse in sources.bible_verses(folder):
        size = sum(map(len, current))
        if current and ((book, chapter) != where or size + len(verse) > room):
            documents.append(" ".join(current))
            current, room = [], rng.randint(400, 800)
        where = (book, chapter)
        if not sources.COARSE.search(verse):
            current.append(verse)
    documents.append(" ".join(current))
    return documents


def devil_documents(folder, rng):
    del rng
    pieces = []
    for paragraphs in sources.devil_entries(folder):
        text = "\n".join(paragraphs)
        if not sources.COARSE.search(text):
            pieces.append(text)
    return join_short(pieces)


def jargon_documents(folder, rng):
    """Each entry twice: as the File has it, and told as a sentence."""
    plain, told = [], []
    for entry in sources.jargon_entries(folder):
        if sources.held_out(entry.term):
            continue
        paragraphs = [sources.plain_jargon(p) for p in entry.paragraphs]
        text = ""
        for p in paragraphs:
            if not p or sources.COARSE.search(p) or re.search(r"[\u2500-\u257f]", p):
                continue
            if text and len(text) + len(p) > LONGEST:
                plain.append(f"{entry.term}: {text}")
                text = ""
            text = f"{text} {p}" if text else p
        if not text:
            continue
        plain.append(f"{entry.term}: {text}")
        lead = rng.choice(('Hackers say "%s".', 'A word of hackers is "%s".', 'The term is "%s".'))
        told.append((lead % entry.term) + " " + text)
    return join_short(plain) + join_short(told, glue=" ")


def countable(definition):
    return re.match(r"(?:an?|one|any) [a-z]", definition)


def noun_sentence(synset, rng):
    """The synset's definition as an English sentence, in one of several forms."""
    name, definition = synset.lemmas[0], synset.definition
    others = [l for l in synset.lemmas[1:] if l.lower() != name.lower()]
    if name[0].isupper() and synset.key.startswith("i"):
        person = re.search(r"\((?:born (?:in )?)?\d{3,4}", definition)
        if re.match(r"(?:an?|the|one|any) ", definition):
            return f"{name} is {finish(definition)}"
        if person and re.match(r"[A-Za-z]", definition):
            return f"{name} was {article(definition.split()[0])} {finish(definition)}"
        return f"{name}: {finish(definition)}"
    one = name if name[0].isupper() and not name.isupper() else f"{article(name)} {name}"
    if countable(definition):
        forms = [f"{capital(one)} is {finish(definition)}"] * 3
        if others:
            forms.append(f"{capital(one)}, or {others[0]}, is {finish(definition)}")
            forms.append(f"{capital(one)} is also called {article(others[0])} {others[0]}. It is {finish(definition)}")
        forms.append(f"{capital(definition)}: that is {one}.")
        forms.append(f"{capital(definition)} is called {one}.")
        return rng.choice(forms)
    if re.match(r"the ", definition):
        forms = [f"{capital(name)} is {finish(definition)}", f'"{capital(name)}" means {finish(definition)}']
        if others:
            forms.append(f"{capital(name)}, or {others[0]}, is {finish(definition)}")
        return rng.choice(forms)
    forms = [f'"{capital(name)}" means {finish(definition)}', f"{capital(name)}: {finish(definition)}"]
    if others:
        forms.append(f'"{capital(name)}" and "{others[0]}" mean the same: {finish(definition)}')
    return rng.choice(forms)


def quoted(example):
    return finish(capital(example)) if len(example.split()) > 3 else f'One says "{example}".'


def verb_sentence(synset, rng):
    name, definition = synset.lemmas[0], synset.definition
    others = [l for l in synset.lemmas[1:] if l.lower() != name.lower()]
    forms = [f"To {name} is to {finish(definition)}", f"To {name} means to {finish(definition)}"]
    if others:
        forms.append(f"To {name} or to {others[0]} is to {finish(definition)}")
    return rng.choice(forms)


def quality_sentence(synset, rng):
    name, definition = synset.lemmas[0], synset.definition
    others = [l for l in synset.lemmas[1:] if l.lower() != name.lower()]
    forms = [f'"{capital(name)}" means {finish(definition)}', f"{capital(name)}: {finish(definition)}"]
    if others:
        forms.append(f'"{capital(name)}" means the same as "{others[0]}": {finish(definition)}')
    return rng.choice(forms)


SENTENCE = {"noun": noun_sentence, "verb": verb_sentence, "adj": quality_sentence, "adv": quality_sentence}


def sense_text(kind, synset, rng):
    text = SENTENCE[kind](synset, rng)
    for example in synset.examples[:2]:
        text += " " + quoted(example)
    return text


def usable(synset):
    name = synset.lemmas[0]
    return (
        8 <= len(synset.definition) <= 400
        and re.match(r"[A-Za-z]", name)
        and not re.match(r"(?:genus|family|order|class|suborder|subfamily|phylum) ", name)
        and not re.match(r"(?:[a-z]+ )?genus |type genus|family of", synset.definition)
    )


def family_documents(nouns, rng):
    """A thing, its parts, and some of its kinds."""
    children = {}
    for key, synset in nouns.items():
        for parent in synset.hypernyms[:1]:
            children.setdefault(parent, []).append(key)
    documents = []
    for parent in sorted(children):
        kinds = children[parent]
        rng.shuffle(kinds)
        while kinds:
            take, kinds = kinds[:7], kinds[7:]
            text = noun_sentence(nouns[parent], rng) if parent in nouns else ""
            if parent in nouns:
                parts = [nouns[p].lemmas[0] for p in nouns[parent].parts if p in nouns][:4]
                if parts:
                    names = ", ".join(f"the {p}" for p in parts[:-1])
                    names = f"{names} and the {parts[-1]}" if names else f"the {parts[-1]}"
                    text += f" Its parts include {names}."
                name = nouns[parent].lemmas[0]
                if rng.random() < 0.4 and not nouns[take[0]].key.startswith("i"):
                    kind = nouns[take[0]].lemmas[0]
                    text += f" One kind of {name} is the {kind}."
            for key in take:
                piece = sense_text("noun", nouns[key], rng)
                if len(text) + len(piece) > LONGEST:
                    break
                text = f"{text} {piece}" if text else piece
            documents.append(text)
    return join_short(documents, glue=" ")


def senses_documents(kinds, rng):
    """A word and its meanings, over all parts of speech."""
    senses = {}
    for kind, synsets in kinds.items():
        for key in sorted(synsets):
            for lemma in synsets[key].lemmas[:3]:
                senses.setdefault(lemma, []).append((kind, synsets[key]))
    called = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    pieces = []
    for lemma in sorted(senses):
        found = senses[lemma]
        if len(found) < 2 or not lemma[0].islower():
            continue
        text, last = f'The word "{lemma}" has several meanings.', None
        for kind, synset in found[:8]:
            lead = "It can also mean" if kind == last else f"As {'an' if kind[0] == 'a' else 'a'} {called[kind]} it means"
            last = kind
            text += f" {lead} {'to ' if kind == 'verb' else ''}{finish(synset.definition)}"
            if synset.examples:
                text += " " + quoted(rng.choice(synset.examples))
            if len(text) > LONGEST - 200:
                break
        pieces.append(text)
    return join_short(pieces)


def neighbour_documents(kind, synsets, rng):
    """Synsets that stand together in WordNet's files, which order them by subject."""
    pieces = []
    for key in sorted(synsets):
        synset = synsets[key]
        text = sense_text(kind, synset, rng)
        opposites = [synsets[a].lemmas[0] for a in synset.antonyms if a in synsets]
        if opposites:
            text += f' The opposite of "{synset.lemmas[0]}" is "{opposites[0]}".'
        pieces.append(text)
    return join_short(pieces, shortest=400, glue=" ")


def question(kind, synset):
    """(question, answer) in the forms that jargon.py uses, or None."""
    name, definition = synset.lemmas[0], synset.definition
    if not TERM.match(name) or not 25 <= len(definition) <= 300:
        return None
    if kind == "verb":
        return f"What does it mean to {name}?", f"To {name} is to {finish(definition)}"
    if kind == "noun" and countable(definition) and not synset.key.startswith("i"):
        one = name if name[0].isupper() and not name.isupper() else f"{article(name)} {name}"
        return f"What is {one}?", f"{capital(one)} is {finish(definition)}"
    if kind == "noun" and name[0].isupper() and re.match(r"(?:an?|the) ", definition):
        return f"What is {name}?", f"{name} is {finish(definition)}"
    answer = capital(finish(definition))
    if synset.examples and kind != "noun":
        answer += f' "{finish(capital(synset.examples[0]))}"'
    return f'What does "{name}" mean?', answer


def question_records(kinds, rng):
    pairs = []
    for kind, synsets in kinds.items():
        found = [question(kind, synsets[key]) for key in sorted(synsets)]
        pairs += [p for p in found if p]
    rng.shuffle(pairs)
    records, seen = [], set()
    while pairs:
        messages = []
        for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
            if not pairs:
                break
            q, a = pairs.pop()
            if q in seen:
                continue
            seen.add(q)
            messages += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        if messages:
            records.append({"messages": messages})
    return records


def report(name, records):
    size = sum(len(json.dumps(r, ensure_ascii=False)) for r in records)
    print(f"{name:12} {len(records):7} documents {size / 1e6:7.2f} MB")


def main(cache, out):
    rng = random.Random(SEED)
    folders = sources.unpack_packages(cache)
    kinds = {}
    for kind in SENTENCE:
        synsets = sources.wordnet_synsets(folders["wordnet-base"], kind)
        kinds[kind] = {key: s for key, s in synsets.items() if usable(s)}
    parts = {
        "bible": bible_documents(folders["bible-kjv-text"], rng),
        "devil": devil_documents(folders["dict-devil"], rng),
        "jargon": jargon_documents(folders["dict-jargon"], rng),
        "families": family_documents(kinds["noun"], rng),
        "senses": senses_documents(kinds, rng),
    }
    for kind in ("verb", "adj", "adv"):
        parts[kind] = neighbour_documents(kind, kinds[kind], rng)
    records = []
    for name, documents in parts.items():
        made = [{"text": part} for d in documents for part in cut_long(d)]
        report(name, made)
        records += made
    questions = question_records(kinds, rng)
    report("questions", questions)
    records += questions
    rng.shuffle(records)
    os.makedirs(out, exist_ok=True)
    split = {"corpus.valid.jsonl": records[::VALID_ONE_IN], "corpus.jsonl": []}
    split["corpus.jsonl"] = [r for i, r in enumerate(records) if i % VALID_ONE_IN]
    for name, chosen in split.items():
        with open(os.path.join(out, name), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in chosen)
        report(name, chosen)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
