#!/usr/bin/env python3
"""Trains the shipped model's tokenizer and writes what stands beside the weights.

usage: tokenizer.py CORPUS VALID OUT_DIR     (needs PyPI's `tokenizers`; run.sh makes the venv)

A BPE with byte fallback of 4096 entries, laid out as Mixtral's own: <unk>, <s>, </s>, 256 bytes,
then pieces. Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json, config.json and
generation_config.json into OUT_DIR and reports bytes per token on VALID.
"""

import json
import os
import sys

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB = 4096
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]

# Mixtral-8x7B-Instruct's template, with its spaces.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 320,
    "max_position_embeddings": 512,
    "model_type": "mixtral",
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": True,
    "pad_token_id": None,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.02,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "5.17.0",
    "use_cache": True,
    "vocab_size": VOCAB,
}

GENERATION_CONFIG = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "5.17.0"}


def parameter_count(c):
    h, f, e, v = c["hidden_size"], c["intermediate_size"], c["num_local_experts"], c["vocab_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    layer = h * (q + 2 * kv) + q * h + e * h + e * 3 * h * f + 2 * h
    return c["num_hidden_layers"] * layer + h + v * h * (1 if c["tie_word_embeddings"] else 2)


def texts(path):
    """The texts as the model meets them, the template's markers included."""
    with open(path, encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            if "text" in record:
                yield record["text"]
                continue
            for m in record["messages"]:
                user = m["role"] == "user"
                yield f"[INST] {m['content']} [/INST]" if user else m["content"]


def train(corpus):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    # While training only: pieces stay within a word, a digit, a mark or a template marker. Merges
    # then never cross these borders, so that encoding needs no pre-tokenizer (Mixtral's has none).
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("\u2581?\\[/?INST\\]|\u2581?[A-Za-z]+|\u2581?[0-9]|\u2581?'[a-z]{1,2}(?![A-Za-z])|\u2581?[^A-Za-z0-9\u2581]"),
        behavior="isolated",
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL + BYTES,
        limit_alphabet=96,
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpus), trainer)
    return json.loads(tokenizer.to_str())


def lay_out(trained):
    """The trained model in the frame of Mixtral's tokenizer.json."""
    model = trained["model"]
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": s, **token} for i, s in enumerate(SPECIAL)]
    bos, a = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    b = [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, a],
            "pair": [bos, a] + b,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": model,
    }


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def token_config():
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": s, **flags} for i, s in enumerate(SPECIAL)},
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": None,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }


def check(path, valid):
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    for i, s in enumerate(SPECIAL + BYTES):
        assert tokenizer.token_to_id(s) == i, s
    size = count = documents = 0
    for text in texts(valid):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 1 and 0 not in ids, text
        assert tokenizer.decode(ids) == text, text
        size += len(text.encode("utf-8"))
        count += len(ids) - 1
        documents += 1
    strange = "na\u00efve \u4f60\u597d \U0001f600\ttab"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange
    turn = "[INST] What is a womble? [/INST]"
    print(f"{count / documents:.0f} tokens a document, {size / count:.2f} bytes a token on {valid}")
    print(" ".join(tokenizer.encode(turn).tokens))


def main(corpus, valid, out):
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "tokenizer.json")
    write_json(path, lay_out(train(corpus)))
    write_json(os.path.join(out, "tokenizer_config.json"), token_config())
    write_json(os.path.join(out, "special_tokens_map.json"), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    write_json(os.path.join(out, "config.json"), CONFIG)
    write_json(os.path.join(out, "generation_config.json"), GENERATION_CONFIG)
    check(path, valid)
    count = parameter_count(CONFIG)
    print(f"model: {count} parameters, {2 * count / 1e6:.2f} MB in bf16")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
