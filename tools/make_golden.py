#!/usr/bin/env python3
"""Makes a golden case as tests/golden/README.md describes: what transformers computes, in float64.

usage: tools/make_golden.py CASE OUT_DIR      CASE: one of the table below, or a JSON file of its form
       tools/make_golden.py --list

Needs torch, transformers 5.17 and safetensors (bench/vs_hf_cpu.py makes such a venv in .venv/hf).
The weights are rounded to the number formats they are saved in, saved, and read back by
transformers in float64; logits, loss, every gradient and four AdamW steps come from that model.
transformers itself keeps RMSNorm, softmax and RoPE steps in float32, so expect agreement to about
1e-6. A seed is taken whose routing decisions are all further than GAP from a tie, in all steps, so
that rounding flips none.
"""

import json
import math
import os
import sys

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

GAP = 2e-3  # least distance of router logits across the choice
STEPS = 4
ADAMW = {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay_on_2d_and_up": 0.1, "clip": 1.0}
NO_TARGET = -100

# config: what differs from transformers' defaults. lengths: tokens of each sample. prompts: how many
# first tokens of each sample are no targets. names: "packed" or "per-expert". formats: by a part of
# the tensor's name, the first that fits; the last is the rest's. shards: files of the checkpoint.
CASES = {
    "mixtral-window": {
        "config": {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5,
            "num_local_experts": 5, "num_experts_per_tok": 3, "tie_word_embeddings": True,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "output_router_logits": False,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        },
        # A padded query must see a token (else transformers' softmax is NaN): lengths within 4.
        "lengths": [19, 15, 17], "prompts": [0, 1, 3], "names": "packed",
        "formats": [["", "float32"]], "clip": 1.0,
    },
    "mixtral-formats": {
        "config": {
            "vocab_size": 112, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 3,
            "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": None, "sliding_window": None,
            "num_local_experts": 6, "num_experts_per_tok": 2, "tie_word_embeddings": False,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "output_router_logits": True,
            "router_aux_loss_coef": 0.05,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        },
        "lengths": [13, 1, 16, 7], "prompts": [3, 0, 0, 5], "names": "per-expert",
        "formats": [["norm", "float32"], ["self_attn", "float16"], [".w2.", "float16"], ["", "bfloat16"]],
        "clip": 100.0,
    },
}  # fmt: skip


def round_to_formats(model, case):
    """Weights as they will be read from the file; gives {name: format} for the in-memory names."""
    chosen = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            # The formats speak of the hub's names; w2 is down_proj.
            hub = name.replace("experts.down_proj", "experts.0.w2.weight")
            form = next(f for part, f in case["formats"] if part in hub)
            p.copy_(p.to(getattr(torch, form)).to(p.dtype))
            chosen[name] = form
    return chosen


def stored_tensors(model, case, formats):
    """The checkpoint's tensors under the names it is to have."""
    tensors = {}
    for name, p in model.named_parameters():
        value = p.detach().to(getattr(torch, formats[name])).contiguous()
        if case["names"] == "packed" or ".mlp." not in name:
            tensors[name] = value.clone()
            continue
        layer = name.split(".mlp.")[0] + ".block_sparse_moe"
        if name.endswith("mlp.gate.weight"):
            tensors[f"{layer}.gate.weight"] = value.clone()
            continue
        for e in range(value.shape[0]):
            if name.endswith("gate_up_proj"):
                half = value.shape[1] // 2
                tensors[f"{layer}.experts.{e}.w1.weight"] = value[e, :half].clone()
                tensors[f"{layer}.experts.{e}.w3.weight"] = value[e, half:].clone()
            else:
                tensors[f"{layer}.experts.{e}.w2.weight"] = value[e].clone()
    return tensors


def new_model(case, seed):
    torch.manual_seed(seed)
    config = MixtralConfig(**case["config"], attention_dropout=0.0, router_jitter_noise=0.0)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = MixtralForCausalLM(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Wider than a fresh model's, so that attention and routing have something to say.
            scale = 1.0 / math.sqrt(p.shape[-1]) if p.dim() > 1 else 0.1
            noise = torch.randn(p.shape, dtype=torch.float64) * scale
            p.copy_(1 + noise if p.dim() == 1 else noise)
    return model


def make_batch(case, seed):
    generator = torch.Generator().manual_seed(seed + 1000)
    lengths, width = case["lengths"], max(case["lengths"])
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, NO_TARGET)
    for i, (length, prompt) in enumerate(zip(lengths, case["prompts"])):
        ids[i, :length] = torch.randint(3, case["config"]["vocab_size"], (length,), generator=generator)
        mask[i, :length] = 1
        labels[i, prompt:length] = ids[i, prompt:length]
    return ids, mask, labels


def routing_gap(out, mask, top_k):
    """Least difference between the last chosen and the first not chosen expert's logit."""
    least = math.inf
    for logits in out.router_logits:
        order = logits.reshape(*mask.shape, -1)[mask.bool()].sort(-1, descending=True).values
        least = min(least, (order[:, top_k - 1] - order[:, top_k]).min().item())
    return least


def run(model, batch, case):
    """The four steps. Gives (tensors, numbers, least gap)."""
    ids, mask, labels = batch
    in_loss = case["config"]["output_router_logits"]
    clip = case["clip"]
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": ADAMW["weight_decay_on_2d_and_up"]},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=tuple(ADAMW["betas"]), eps=ADAMW["eps"])
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    losses, entropies, norms, least = [], [], [], math.inf
    for step in range(STEPS):
        optimizer.zero_grad()
        out = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True, use_cache=False)
        least = min(least, routing_gap(out, mask, case["config"]["num_experts_per_tok"]))
        aux = out.aux_loss * model.config.router_aux_loss_coef
        # Not out.loss: transformers computes that in float32.
        entropy = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_TARGET
        )
        loss = entropy + aux if in_loss else entropy
        assert abs(entropy.item() + aux.item() - out.loss.item()) < 1e-5
        loss.backward()
        if step == 0:
            tensors["logits"] = out.logits.detach().float()
            tensors.update({f"grad.{n}": p.grad.detach().float() for n, p in named.items()})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item()), entropies.append(entropy.item()), norms.append(norm.item())
    tensors.update({f"after4.{n}": p.detach().float() for n, p in named.items()})
    numbers = {
        "losses": losses,
        "cross_entropy": entropies,
        "grad_norms_before_clip": norms,
        "adamw": {**ADAMW, "clip": clip},
        "aux_loss_in_loss": in_loss,
        "dtype": "computed in float64 from the checkpoint as saved",
        "param_names": list(named),
    }
    return tensors, numbers, least


def save_model(out, case, model, formats):
    os.makedirs(out, exist_ok=True)
    model.config.dtype = case["formats"][-1][1]
    model.config.architectures = ["MixtralForCausalLM"]
    model.config.save_pretrained(out)
    save_file(stored_tensors(model, case, formats), os.path.join(out, "model.safetensors"), metadata={"format": "pt"})


def make(case, out):
    import transformers

    for seed in range(1000):
        model = new_model(case, seed)
        formats = round_to_formats(model, case)
        save_model(os.path.join(out, "model"), case, model, formats)
        read = MixtralForCausalLM.from_pretrained(
            os.path.join(out, "model"), dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        for (name, a), (_, b) in zip(model.named_parameters(), read.named_parameters()):
            assert torch.equal(a, b), f"{name} is read back otherwise"
        tensors, numbers, least = run(read.eval(), make_batch(case, seed), case)
        if least >= GAP and all(map(math.isfinite, numbers["losses"])):
            break
    else:
        sys.exit(f"no seed without near ties (the last one's gap: {least})")
    numbers["transformers"] = transformers.__version__
    numbers["least_routing_gap"] = least
    numbers["seed"] = seed
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, os.path.join(out, "expected.safetensors"))
    with open(os.path.join(out, "expected.json"), "w", encoding="utf-8") as f:
        json.dump(numbers, f, indent=1)
        f.write("\n")
    print(f"{out}: seed {seed}, least routing gap {least:.2g}, losses {numbers['losses']}")


def main():
    if sys.argv[1:] == ["--list"]:
        print("\n".join(CASES))
        return
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    name, out = sys.argv[1:]
    if name in CASES:
        case = CASES[name]
    else:
        with open(name, encoding="utf-8") as f:
            case = json.load(f)
    torch.set_num_threads(1)
    make(case, out)


if __name__ == "__main__":
    main()
