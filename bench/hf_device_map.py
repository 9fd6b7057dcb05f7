#!/usr/bin/env python3
"""transformers' device_map="auto" as a baseline on several GPUs: layers in sequence over them.

usage: bench/hf_device_map.py [--config FILE] [--layers N] [--batch-size SAMPLES] [...]

The model is a config.json's with fewer layers, its weights random, made by transformers' own loader
on the devices that device_map="auto" gives them (which splits by memory and runs layer after layer,
one GPU at work at a time). Work, precision and optimizer are those of `moetune ladder --optim-state
bf16` on as many ranks: --batch-size is of a GPU, so that a step has GPUs x samples x length tokens;
bf16 parameters, gradients and AdamW states; clipping at 1.0. Where one batch does not fit, layers are
computed again in backward (transformers' gradient checkpointing), then the batch goes in parts of one
sample; the table says which. --recompute and --micro-batches choose instead.

Prints ms a step (median, and the mean of steps in a row), tokens/s, model TFLOP/s a GPU, and layers
and peak memory of each GPU. Needs torch, transformers 5.17 and accelerate; with --device cpu, to try
it on small sizes, "auto" is everything on the CPU. The step's code is bench/vs_hf.py's.
"""

import argparse
import json
import os
import statistics
import sys
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import vs_hf  # noqa: E402

KEYS = {"hidden": "hidden_size", "ffn": "intermediate_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "experts": "num_local_experts",
        "top_k": "num_experts_per_tok", "vocab": "vocab_size"}  # fmt: skip


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", default=os.path.join(vs_hf.ROOT, "models", "mixtral-8x7b.json"), metavar="FILE")
    p.add_argument("--layers", type=int, help="fewer than the config's")
    p.add_argument("--gpus", type=int, help="GPUs whose work a step is (all that are visible)")
    p.add_argument("--batch-size", type=int, default=1, help="samples of each GPU's share (%(default)s)")
    p.add_argument("--max-seq-length", type=int, default=8192)
    p.add_argument("--train-steps", type=int, default=6)
    p.add_argument("--warmup-steps", type=int, default=2)
    p.add_argument("--way", default="grouped_mm", choices=("eager", "grouped_mm"), help="of experts (%(default)s)")
    p.add_argument("--attention", default="fastest", help="as in vs_hf.py")
    p.add_argument("--recompute", choices=("auto", "none", "full"), default="auto")
    p.add_argument("--micro-batches", type=int, default=0, help="parts of the batch (as few as fit)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    a = p.parse_args()
    with open(a.config, encoding="utf-8") as f:
        config = json.load(f)
    for name, key in KEYS.items():
        if name != "layers" or not a.layers:
            setattr(a, name, config[key])
    if a.layers > config[KEYS["layers"]]:
        p.error(f"--layers {a.layers} is more than the {config[KEYS['layers']]} of {a.config}")
    return a


def attempts(a, samples):
    """(recompute, micro-batches), the fastest that may not fit first."""
    ways = [("none", 1), ("full", 1), ("full", samples)]
    if a.recompute != "auto":
        ways = [(a.recompute, 1), (a.recompute, samples)]
    if a.micro_batches:
        ways = [(recompute, a.micro_batches) for recompute in dict.fromkeys(r for r, _ in ways)]
    return list(dict.fromkeys(ways))


def build(a):
    """The model where device_map="auto" puts it, and what the table says of it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # it lists every weight as missing: they are to be random
    torch.manual_seed(1)
    with torch.device("cuda:0" if a.device == "cuda" else "cpu"):
        attention, note = vs_hf.choose_attention(a, [(1, a.max_seq_length)])
    model = transformers.MixtralForCausalLM.from_pretrained(
        None, config=vs_hf.mixtral_config(a, a.way, attention), state_dict={}, device_map="auto", dtype=torch.bfloat16
    )  # fmt: skip
    model.set_experts_implementation(a.way)
    away = sorted({str(p.device) for p in model.parameters() if p.device.type != a.device})
    if away:
        sys.exit(f"hf_device_map.py: the weights do not fit the GPUs: some are on {', '.join(away)}")
    return model.train(), note


def layers_of(a, model):
    """Layers by device."""
    where = {}
    for layer in model.model.layers:
        name = str(next(layer.parameters()).device)
        where[name] = where.get(name, 0) + 1
    return where


def measure(a, model, optimizer, samples, recompute, parts):
    import torch

    if recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    if a.device == "cuda":
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)
    first = next(model.parameters()).device
    micro = vs_hf.random_ids(a, samples, a.max_seq_length).to(first).chunk(parts)
    last = None

    def step():
        nonlocal last
        last = vs_hf.train_step(model, model, optimizer, micro, True)

    vs_hf.times_of(a.device, step, max(1, a.warmup_steps))
    ms = vs_hf.times_of(a.device, step, a.train_steps)
    in_a_row = vs_hf.times_of(a.device, lambda: [step() for _ in range(a.train_steps)], 1)[0] / a.train_steps
    row = {"recompute": recompute, "micro_batches": parts, "ms": ms, "in_a_row_ms": in_a_row, "loss": last.item()}
    if a.device == "cuda":
        count = torch.cuda.device_count()
        row["memory_bytes"] = {f"cuda:{i}": torch.cuda.max_memory_allocated(i) for i in range(count)}
    return row


def release(model, optimizer, device):
    import gc

    import torch

    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run(a):
    import torch
    import transformers

    gpus = a.gpus or (torch.cuda.device_count() if a.device == "cuda" else 1)
    if a.device == "cuda" and gpus == 0:
        sys.exit("hf_device_map.py: no GPU is visible")
    if a.device == "cuda" and gpus != torch.cuda.device_count():
        sys.exit("hf_device_map.py: --gpus is for --device cpu; set CUDA_VISIBLE_DEVICES")
    samples = gpus * a.batch_size
    if a.micro_batches and samples % a.micro_batches:
        sys.exit(f"hf_device_map.py: --micro-batches must divide {samples} samples")
    model, note = build(a)
    optimizer, row = vs_hf.adamw(model), None
    for recompute, parts in attempts(a, samples):
        try:
            row = measure(a, model, optimizer, samples, recompute, parts)
            break
        except torch.OutOfMemoryError as e:
            print(f"recompute {recompute}, {parts} micro-batches: {vs_hf.why_not(e)}", file=sys.stderr)
            traceback.clear_frames(e.__traceback__)  # which would hold what the step had made so far
        release(model, optimizer, a.device)
    if row is None:
        sys.exit("hf_device_map.py: no way of running the step fits the GPUs' memory")
    step_ms = min(statistics.median(row["ms"]), row["in_a_row_ms"])
    rate = samples * a.max_seq_length / step_ms * 1e3
    return {**row, **note, "gpus": gpus, "tokens": samples * a.max_seq_length, "step_ms": step_ms,
            "tokens_per_s": rate, "tflops": rate * vs_hf.flops_a_token(a, a.max_seq_length) / gpus * 1e-12,
            "layers": layers_of(a, model), "experts": a.way, "torch": torch.__version__,
            "transformers": transformers.__version__}  # fmt: skip


def show(a, r):
    print(f"transformers {r['transformers']}, torch {r['torch']}, device_map auto over {r['gpus']} GPUs: {a.layers} layers, "
          f"hidden {a.hidden}, {r['tokens']} tokens a step, experts {r['experts']}, attention {r['attention']}")  # fmt: skip
    print(f"{'':14} {'ms':>9} {'in a row':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'recompute':>9} {'micro':>5} {'loss':>9}")
    print(f"{'hf device_map':14} {statistics.median(r['ms']):9.1f} {r['in_a_row_ms']:9.1f} {r['tokens_per_s']:10.0f} "
          f"{r['tflops']:8.2f} {r['recompute']:>9} {r['micro_batches']:5d} {r['loss']:9.5f}")  # fmt: skip
    for name in sorted({*r["layers"], *r.get("memory_bytes", {})}):
        memory = r.get("memory_bytes", {}).get(name)
        text = f"{memory / vs_hf.GIB:.1f} GiB at most" if memory else "memory not counted"
        print(f"  {name:8} {r['layers'].get(name, 0):3d} layers  {text}")


def main():
    a = arguments()
    result = run(a)
    if a.json:
        print(json.dumps(result))
    else:
        show(a, result)


if __name__ == "__main__":
    main()
