#!/usr/bin/env python3
"""Compares moetune's training step on the CPU with transformers + PyTorch's, in one run.

usage: bench/vs_hf_cpu.py [--rounds 3] [--steps 5] [--warmup 2] [--threads 2] [--out FILE.json]
                          [--moetune build/release/moetune] [--only NAME[,NAME]]

Same model, tokens a step, float32, threads, AdamW (fused) and clipping at 1.0 on both sides. The
contenders take turns (A B C A B C ...), each idle while another runs, so that other load on the
machine falls on all of them; the median over all measured steps counts. transformers runs with its
three ways of computing experts: eager, grouped_mm, and grouped_mm under torch.compile (left out,
saying why, where that does not compile). PyTorch and transformers come from PyPI into .venv/hf.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv", "hf")
PACKAGES = ["torch", "transformers==5.17.*", "safetensors", "numpy"]

MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
}
SAMPLES, LENGTH = 4, 256
WAYS = {
    "hf-eager": ("eager", False),
    "hf-grouped_mm": ("grouped_mm", False),
    "hf-compiled": ("grouped_mm", True),
}


def flops_a_step():
    """Products of matrices alone: 2 x weights x tokens forward, twice that backward."""
    m = MODEL
    h, f, head = m["hidden_size"], m["intermediate_size"], m["hidden_size"] // m["num_attention_heads"]
    qkv = h * head * (m["num_attention_heads"] + 2 * m["num_key_value_heads"])
    layer = qkv + h * h + h * m["num_local_experts"] + m["num_experts_per_tok"] * 3 * h * f
    scores = 2 * h * (LENGTH + 1) / 2  # query x key and probability x value, causal
    return 6 * SAMPLES * LENGTH * (m["num_hidden_layers"] * (layer + scores) + h * m["vocab_size"])


def clean_environment(threads):
    """Without what this machine may set for another BLAS."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS", "NVPL", "MKL", "KMP", "GOMP"))}
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return environment


def ensure_venv():
    python = os.path.join(VENV, "bin", "python")
    probe = [python, "-c", "import torch, transformers"]
    if os.path.exists(python) and subprocess.run(probe, capture_output=True).returncode == 0:
        return python
    print(f"making {VENV} (PyTorch and transformers from PyPI, some GB)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


# The other side: runs in the venv, one process a way, told by lines on standard input.


def worker(way, threads):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    experts, compiled = WAYS[way]
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    config = MixtralConfig(
        **MODEL, max_position_embeddings=2048, sliding_window=None, tie_word_embeddings=False,
        output_router_logits=False, use_cache=False,
    )  # fmt: skip
    config._experts_implementation = experts
    model = MixtralForCausalLM(config).float().train()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(experts)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, MODEL["vocab_size"], (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(2))

    def step():
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value = loss.item()
        return (time.perf_counter() - begin) * 1e3, value

    for line in sys.stdin:
        steps = [step() for _ in range(int(line))]
        note = {"experts": model.config._experts_implementation, "torch": torch.__version__}
        print(json.dumps({"ms": [t for t, _ in steps], "loss": steps[-1][1], **note}), flush=True)


class HfContender:
    def __init__(self, way, python, threads):
        self.name, self.ms, self.info, self.why_not = way, [], {}, None
        self.errors = open(os.path.join(ROOT, ".cache", f"vs_hf_cpu.{way}.log"), "w+")
        self.process = subprocess.Popen(
            [python, os.path.abspath(__file__), "--worker", way, "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=clean_environment(threads),
        )  # fmt: skip

    def run(self, steps, measured=True):
        if self.why_not:
            return
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            lines = [l for l in self.errors.read().strip().split("\n") if l.strip()] or ["it ended"]
            wrong = [l for l in lines if "Error" in l] or lines
            self.why_not = wrong[-1].strip()[:200]
            return
        self.info = json.loads(line)
        if measured:
            self.ms += self.info["ms"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def moetune_step(binary, threads, warmup, steps):
    """Runs `moetune bench --json` on the same work and gives what it printed."""
    flags = {
        "hidden": MODEL["hidden_size"], "ffn": MODEL["intermediate_size"], "layers": MODEL["num_hidden_layers"],
        "heads": MODEL["num_attention_heads"], "kv-heads": MODEL["num_key_value_heads"],
        "expert-count": MODEL["num_local_experts"], "top-k": MODEL["num_experts_per_tok"],
        "vocab": MODEL["vocab_size"], "batch-size": SAMPLES, "max-seq-length": LENGTH,
        "warmup-steps": warmup, "train-steps": steps, "precision": "fp32", "threads": threads,
    }  # fmt: skip
    command = [binary, "bench", "--cpu", "--json"]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=clean_environment(threads))
    return json.loads(done.stdout)


class MoetuneContender:
    def __init__(self, binary, threads, warmup):
        self.name, self.ms, self.info, self.why_not = "moetune", [], {}, None
        self.binary, self.threads, self.warmup = binary, threads, warmup
        if not os.access(binary, os.X_OK):
            self.why_not = f"{binary} is not built"

    def run(self, steps, measured=True):
        if self.why_not or not measured:
            return
        try:
            self.info = moetune_step(self.binary, self.threads, self.warmup, steps)
            # One median stands for the round's steps.
            self.ms += [self.info["step_ms"]] * steps
        except (subprocess.CalledProcessError, ValueError, KeyError) as e:
            self.why_not = str(e)[:200]

    def close(self):
        pass


def report(contenders, out, settings):
    tokens = SAMPLES * LENGTH
    gflop = flops_a_step() / 1e9
    rows = []
    for c in contenders:
        row = {"name": c.name, "why_not": c.why_not}
        if c.ms and not c.why_not:
            ms = statistics.median(c.ms)
            row.update(step_ms=ms, fastest_ms=min(c.ms), tokens_per_s=tokens / ms * 1e3, gflops=gflop / ms * 1e3)
        row["info"] = {k: v for k, v in c.info.items() if k != "ms"}
        rows.append(row)
    rivals = [r["tokens_per_s"] for r in rows if r["name"] != "moetune" and "step_ms" in r]
    best = max(rivals, default=None)
    print(f"{'':14} {'step ms':>9} {'fastest':>9} {'tokens/s':>9} {'GFLOP/s':>8} {'x best HF':>9}")
    for r in rows:
        if "step_ms" not in r:
            print(f"{r['name']:14} left out: {r['why_not']}")
            continue
        ratio = f"{r['tokens_per_s'] / best:9.2f}" if best else f"{'-':>9}"
        print(
            f"{r['name']:14} {r['step_ms']:9.0f} {r['fastest_ms']:9.0f} {r['tokens_per_s']:9.0f} {r['gflops']:8.0f} {ratio}"
        )
    result = {"settings": settings, "model": MODEL, "tokens_a_step": tokens, "gflop_a_step": gflop, "rows": rows}
    with open(out, "w", encoding="utf-8") as f:
        json.dump(result, f, indent=1)
    print(f"written to {out}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--moetune", default=os.path.join(ROOT, "build", "release", "moetune"))
    p.add_argument("--only", help="names, by commas: " + ", ".join([*WAYS, "moetune"]))
    p.add_argument("--out", default=os.path.join(ROOT, ".cache", "vs_hf_cpu.json"))
    p.add_argument("--worker", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        return worker(a.worker, a.threads)
    os.makedirs(os.path.join(ROOT, ".cache"), exist_ok=True)
    wanted = a.only.split(",") if a.only else [*WAYS, "moetune"]
    python = ensure_venv() if any(w in wanted for w in WAYS) else None
    contenders = [HfContender(w, python, a.threads) for w in WAYS if w in wanted]
    if "moetune" in wanted:
        contenders.append(MoetuneContender(a.moetune, a.threads, a.warmup))
    load_before = os.getloadavg()
    for c in contenders:
        c.run(a.warmup, measured=False)
    for r in range(a.rounds):
        for c in contenders:
            c.run(a.steps)
        print(f"round {r + 1} of {a.rounds}", file=sys.stderr, flush=True)
    for c in contenders:
        c.close()
    settings = {k: getattr(a, k) for k in ("rounds", "steps", "warmup", "threads")}
    settings.update(dtype="float32", clip=1.0, optimizer="AdamW", load_before=load_before, load_after=os.getloadavg())
    report(contenders, a.out, settings)


if __name__ == "__main__":
    main()
