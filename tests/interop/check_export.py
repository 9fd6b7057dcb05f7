#!/usr/bin/env python3
"""Checks that transformers opens checkpoints as moetune sees them.

usage: check_export.py --moetune BINARY [--generate] CHECKPOINT_DIR...

For each checkpoint, in float32 on both sides: the logits of fixed ids (max|d| / max|ref| at most
1e-4); the loss on texts and conversations, which AutoTokenizer and its chat template turn into ids
(relative 1e-5: another tokenization would show); with --generate, the greedy answer to a question,
token for token. Exit 77 where torch or transformers is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

try:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as why:
    print(f"skipped: {why}")
    sys.exit(77)

LOGITS_BOUND, LOSS_BOUND = 1e-4, 1e-5
ID_COUNT = 100

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  Two spaces before,  two within, and a newline\nand a tab\tin it.",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f600 1234567890",
    "for (int i = 0; i < n; i++) sum += x[i]; /* {braces} `quotes` \\ | ~ ^ */",
]
CONVERSATIONS = [
    [("user", "What is a womble?"), ("assistant", "A womble is a user who has great difficulty.")],
    [
        ("user", "What does it mean to grok?"),
        ("assistant", "To grok is to understand."),
        ("user", "And caf\u00e9?"),
        ("assistant", "A place for coffee -- \"na\u00efve\" or not."),
    ],
]
QUESTION = "What is a brick?"
ANSWER_TOKENS = 24


def moetune(binary, *arguments):
    done = subprocess.run([binary, *map(str, arguments)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=True)
    return done.stdout.decode("utf-8")


def check_logits(binary, model, directory):
    vocab = model.config.vocab_size
    ids = [(i * i * 31 + 7 * i + 1) % vocab for i in range(ID_COUNT)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "logits.safetensors")
        moetune(binary, "eval", "--model", directory, "--ids", ",".join(map(str, ids)), "--dump-logits", path, "--precision", "fp32")
        got = load_file(path)["logits"]
    want = model(torch.tensor([ids])).logits[0]
    worst = ((got - want).abs().max() / want.abs().max()).item()
    print(f"  logits of {ID_COUNT} ids: {worst:.2e}")
    return got.shape == want.shape and worst <= LOGITS_BOUND


def conversation_ids(tokenizer, turns):
    """The ids of the template's text and which of them the answers are."""
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # An answer ends with its EOS and begins where the question's last marker ends.
    learn, answers = [False] * len(ids), sum(role == "assistant" for role, _ in turns)
    end = -1
    for k in range(answers):
        upto = messages[: 2 * k + 1]
        question = tokenizer(tokenizer.apply_chat_template(upto, tokenize=False), add_special_tokens=False)["input_ids"]
        assert ids[: len(question)] == question, "a question's ids are no prefix of the conversation's"
        end = ids.index(tokenizer.eos_token_id, len(question))
        learn[len(question) : end + 1] = [True] * (end + 1 - len(question))
    return ids, learn


def check_loss(binary, model, tokenizer, directory):
    records, samples = [], []
    for text in TEXTS:
        records.append({"text": text})
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        samples.append((ids, [True] * len(ids)))
    for turns in CONVERSATIONS:
        records.append({"messages": [{"role": r, "content": c} for r, c in turns]})
        samples.append(conversation_ids(tokenizer, turns))
    total, count = 0.0, 0
    for ids, learn in samples:
        logits = model(torch.tensor([ids])).logits[0].double()
        targets = torch.tensor([i if l else -100 for i, l in zip(ids, learn)])[1:]
        total += torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum", ignore_index=-100).item()
        count += int((targets >= 0).sum())
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "data.jsonl")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in records)
        got = json.loads(moetune(binary, "eval", "--model", directory, "--data", path, "--json", "--precision", "fp32"))
    want = total / count
    off = abs(got["loss"] - want) / want
    print(f"  loss: {got['loss']:.8f} on {got['targets']} targets, transformers {want:.8f} on {count}: {off:.1e}")
    return got["targets"] == count and off <= LOSS_BOUND


def check_generate(binary, model, tokenizer, directory):
    text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=0)
    want = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    got = moetune(
        binary, "generate", "--model", directory, "--chat", "--prompt", QUESTION, "--temperature", 0,
        "--max-new-tokens", ANSWER_TOKENS, "--precision", "fp32",
    ).strip()  # fmt: skip
    print(f"  answer: {got!r}")
    if got != want:
        print(f"  transformers: {want!r}")
    return got == want


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--moetune", required=True)
    p.add_argument("--generate", action="store_true")
    p.add_argument("checkpoints", nargs="+")
    a = p.parse_args()
    failed = 0
    with torch.no_grad():
        for directory in a.checkpoints:
            print(directory)
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(directory)
            failed += not check_logits(a.moetune, model, directory)
            failed += not check_loss(a.moetune, model, tokenizer, directory)
            if a.generate:
                failed += not check_generate(a.moetune, model, tokenizer, directory)
    print(f"{failed} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
