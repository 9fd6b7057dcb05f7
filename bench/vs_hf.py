#!/usr/bin/env python3
"""Compares moetune's training step on a GPU with transformers + PyTorch's, in one run.

usage: bench/vs_hf.py [--works 2x8192,4x512] [--only NAME,...] [--clip yes|no|both] [...]
       bench/vs_hf.py --block [--shapes 2048x4096x14336x8x2,...] [...]

Same shape of model, batch and optimizer on both sides; each contender is a process of its own, one
after another, since each fills the GPU. transformers: parameters, gradients and AdamW's states
(fused) in BF16, weights random; experts eager, grouped_mm, and grouped_mm under torch.compile.
moetune: its four rungs, the last one in FP8; where `moetune bench` has --optim-state (and --states does not say fp32)
gradients and states are BF16 too, else float32 with float32 masters. moetune always clips at 1.0, so
its ratio is to the fastest row of transformers that clips, if there is one. transformers' attention
is its sdpa with the faster of PyTorch's kernels, and without the mask that it makes under
torch.compile, which no fast kernel takes. Its step is the median from an idle GPU to an idle GPU or
the mean of steps in a row, whichever is less; moetune's is the median that it prints. "compile" is
the first step's time over the median's. Model FLOPs: docs/math.md.

--block compares the MoE block alone, router to combine, with build/release/moe_block (ninja -C
build/release moe_block): 6 k T H F FLOPs forward, twice that backward, random tokens and router.

The machine's ceiling (a BF16 product of 8192 cubed, a copy on the device) is measured in the same
run. Writes PREFIX.json and PREFIX.svg. Needs python3 with torch and transformers 5.17 alone.
"""

import argparse
import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from xml.sax.saxutils import escape

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GIB = 1 << 30
HF = {
    "hf-eager": ("eager", False),
    "hf-grouped_mm": ("grouped_mm", False),
    "hf-compiled": ("grouped_mm", True),
}
RUNGS = {
    "moetune-0": ["--experts", "loop", "--blocks", "unfused"],
    "moetune-1": ["--experts", "loop", "--blocks", "fused"],
    "moetune-2": ["--experts", "grouped", "--blocks", "fused"],
    "moetune-3": ["--experts", "fused", "--blocks", "fused"],
}
BLOCK_RUNGS = {"moetune-0": ["--loop", "--unfused"], "moetune-1": ["--loop"], "moetune-2": [], "moetune-3": []}
CLIPS = {"yes": [True], "no": [False], "both": [True, False]}
SHAPES = "2048x4096x14336x8x2,8192x4096x14336x8x2,16384x4096x14336x8x2,8192x2048x768x128x8"
SIZES = ("hidden", "ffn", "layers", "heads", "kv_heads", "experts", "top_k", "vocab")


def flops_a_token(a, length):
    h, kv = a.hidden, a.kv_heads * (a.hidden // a.heads)
    layer = 2 * (2 * h * h + 2 * h * kv) + 2 * length * h + a.top_k * 6 * h * a.ffn
    return 3 * (a.layers * layer + 2 * h * a.vocab)


def works_of(text):
    """ "2x8192,4x512" as [(2, 8192), (4, 512)]: samples, tokens of each."""
    return [tuple(int(n) for n in work.split("x")) for work in text.split(",")]


# The other side: these run as processes of their own and print one line of JSON a result.


def put(**row):
    print(json.dumps(row), flush=True)


def synchronize(device):
    if device == "cuda":
        import torch

        for i in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(i) > 0:  # elsewhere it would make a context
                torch.cuda.synchronize(i)


def times_of(device, work, count):
    """Milliseconds of each of `count` runs, device idle before and after each."""
    ms = []
    for _ in range(count):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        ms.append((time.perf_counter() - begin) * 1e3)
    return ms


def event_times(device, work, count):
    """Milliseconds of the parts of `work`, a generator that yields at each part's end."""
    import torch

    def mark():
        if device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    rows = []
    for _ in range(count):
        marks = [mark()]
        for _ in work():
            marks.append(mark())
        synchronize(device)
        pairs = zip(marks, marks[1:])
        rows.append([x.elapsed_time(y) if device == "cuda" else (y - x) * 1e3 for x, y in pairs])
    return rows


def attention_kernel(name):
    """Leaves scaled_dot_product_attention one kernel; None: all."""
    import torch

    backends = torch.backends.cuda
    backends.enable_flash_sdp(name in (None, "flash"))
    backends.enable_cudnn_sdp(name in (None, "cudnn"))
    backends.enable_mem_efficient_sdp(name is None)
    backends.enable_math_sdp(name is None)


def fastest_attention(a, works):
    """flash or cudnn: the faster on the batches' shapes, forward and backward; and both times."""
    import torch

    width, found = a.hidden // a.heads, {}
    for name in ("flash", "cudnn"):
        attention_kernel(name)
        try:
            ms = 0
            for samples, length in works:
                shape = (samples, length, a.heads, width)
                q = torch.randn(shape, device="cuda").transpose(1, 2).requires_grad_()
                k, v = (
                    torch.randn((samples, length, a.kv_heads, width), device="cuda").transpose(1, 2).requires_grad_()
                    for _ in range(2)
                )
                do = torch.randn(shape, device="cuda").transpose(1, 2)

                def both():
                    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                    torch.autograd.grad(o, (q, k, v), do)

                both()
                ms += statistics.median(times_of("cuda", both, 5))
            found[name] = ms
        except RuntimeError as e:
            print(f"attention {name}: {e}", file=sys.stderr)
    torch.cuda.empty_cache()
    attention_kernel(None)
    return (min(found, key=found.get) if found else "sdpa"), found


def choose_attention(a, works):
    """The name for transformers, and what the row says of it."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # transformers' sdpa under a name for which it makes no mask: with torch.compile it makes one, of length x length,
    # for a plain causal batch too, and then no fast kernel applies.
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    choice, times = a.attention, {}
    if choice == "fastest":
        choice, times = fastest_attention(a, works) if a.device == "cuda" else ("sdpa", {})
    if choice in ("flash", "cudnn"):
        attention_kernel(choice)
        return "sdpa_causal", {"attention": f"sdpa: {choice}", "attention_ms": times}
    return ("sdpa_causal" if choice == "sdpa" else choice), {"attention": choice}


def mixtral_config(a, experts, attention):
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=a.hidden, intermediate_size=a.ffn, num_hidden_layers=a.layers, num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads, num_local_experts=a.experts, num_experts_per_tok=a.top_k, vocab_size=a.vocab,
        max_position_embeddings=131072, sliding_window=None, tie_word_embeddings=False, output_router_logits=False,
        use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    config._experts_implementation = experts
    return config


def why_not(e):
    return f"{type(e).__name__}: {e}".split("\n")[0][:160]


def random_ids(a, samples, length):
    import torch

    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, a.vocab, (samples, length), generator=generator)


def adamw(model):
    """As moetune's ladder and bench have it; states in the parameters' format."""
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)


def train_step(model, run, optimizer, micro, clip):
    """One step on micro-batches of ids, each weighted alike; returns the last one's loss."""
    import torch

    optimizer.zero_grad(set_to_none=True)
    for ids in micro:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        (loss / len(micro) if len(micro) > 1 else loss).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


def hf_work(a, model, run, optimizer, work, compiled):
    """One batch shape with each of the asked ways of clipping; puts a row for each."""
    import torch

    samples, length = work
    ids = random_ids(a, samples, length).to(a.device)
    if a.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    last, first_ms = None, None
    for clip in CLIPS[a.clip]:

        def step():
            nonlocal last
            last = train_step(model, run, optimizer, [ids], clip)

        warm = times_of(a.device, step, max(1, a.warmup if first_ms is None else 1))
        first_ms = warm[0] if first_ms is None else first_ms
        ms = times_of(a.device, step, a.steps)
        in_a_row = times_of(a.device, lambda: [step() for _ in range(a.steps)], 1)[0] / a.steps
        row = {"work": list(work), "clip": clip, "ms": ms, "in_a_row_ms": in_a_row, "loss": last.item()}
        if compiled:
            row["compile_s"] = (first_ms - statistics.median(ms)) / 1e3
        if a.device == "cuda":
            row["memory_bytes"] = torch.cuda.max_memory_allocated()
            row["reserved_bytes"] = torch.cuda.max_memory_reserved()
        put(**row)


def hf_worker(a, name):
    import torch
    import transformers

    experts, compiled = HF[name]
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(1)
    works = works_of(a.works)
    with torch.device(a.device):
        attention, note = choose_attention(a, works)
        model = transformers.MixtralForCausalLM(mixtral_config(a, experts, attention)).train()
    model.set_experts_implementation(experts)
    optimizer = adamw(model)
    formats = sorted({str(p.dtype) for p in model.parameters()})
    count = sum(p.numel() for p in model.parameters())
    put(note={**note, "experts": model.config._experts_implementation, "parameters": count, "formats": formats,
              "torch": torch.__version__, "transformers": transformers.__version__})  # fmt: skip
    for work in works:
        if compiled:
            torch._dynamo.reset()  # a second shape must not make the first one's sizes dynamic
        run = torch.compile(model, dynamic=False) if compiled else model
        try:
            hf_work(a, model, run, optimizer, work, compiled)
        except Exception as e:
            traceback.print_exc()
            put(work=list(work), why_not=why_not(e))
            optimizer.zero_grad(set_to_none=True)


def block_worker(a, name):
    """The MoE block of transformers alone, each shape."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    experts, compiled = HF[name]
    torch.set_default_dtype(torch.bfloat16)
    for shape in works_of(a.shapes):
        tokens, a.hidden, a.ffn, a.experts, a.top_k = shape
        try:
            torch.manual_seed(1)
            with torch.device(a.device):
                block = MixtralSparseMoeBlock(mixtral_config(a, experts, "eager")).train()
                for p in block.parameters():
                    torch.nn.init.normal_(p, std=0.02)
                x = torch.randn((1, tokens, a.hidden)).requires_grad_()
                dy = torch.randn((1, tokens, a.hidden)) * 1e-3
            if compiled:
                torch._dynamo.reset()
            run = torch.compile(block, dynamic=False) if compiled else block

            def both():
                y = run(x)
                yield
                y.backward(dy)
                yield
                x.grad = None
                block.zero_grad(set_to_none=True)

            event_times(a.device, both, a.block_warmup)
            rows = event_times(a.device, both, a.block_runs)
            put(shape=list(shape), ms=[[r[i] for r in rows] for i in (0, 1)])
        except Exception as e:
            traceback.print_exc()
            put(shape=list(shape), why_not=why_not(e))
        block = x = dy = run = both = None  # the next shape needs the memory
        if a.device == "cuda":
            torch.cuda.empty_cache()


def ceiling_worker(a, _name):
    import torch

    n, count = (8192, 1 << 30) if a.device == "cuda" else (256, 1 << 20)
    with torch.device(a.device):
        x, y = (torch.randn((n, n)).to(torch.bfloat16) for _ in range(2))
        out, source = torch.empty_like(x), torch.zeros(count, dtype=torch.float32)
        target = torch.empty_like(source)

    def work():
        torch.matmul(x, y, out=out)
        yield
        target.copy_(source)
        yield

    event_times(a.device, work, 5)
    rows = event_times(a.device, work, 20)
    product, copy = (statistics.median(r[i] for r in rows) for i in (0, 1))
    name = torch.cuda.get_device_name() if a.device == "cuda" else "cpu"
    put(device=name, n=n, product_tflops=2 * n**3 / product * 1e-9, copy_gb_s=8 * count / copy * 1e-6,
        torch=torch.__version__)  # fmt: skip


WORKERS = {"hf": hf_worker, "block": block_worker, "ceiling": ceiling_worker}


# This side: starts the contenders and reads what they print.


def run_process(command, timeout, label):
    """(standard output, None), or (what it printed until then, why it ended)."""
    print(f"{label} ...", file=sys.stderr, flush=True)
    begin = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, start_new_session=True)
        except OSError as e:
            return "", str(e)
        wrong = None
        try:
            if process.wait(timeout) != 0:
                wrong = f"it ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            wrong = f"longer than {timeout:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        try:
            os.killpg(process.pid, signal.SIGKILL)  # helpers of a compiler outlive their parent
        except ProcessLookupError:
            pass
        process.wait()
        out.seek(0), errors.seek(0)
        text, log = out.read(), [line for line in errors.read().split("\n") if line.strip()]
    print(f"{label}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    if wrong and log:
        for line in log[-20:]:
            print(f"  {line}", file=sys.stderr)
        wrong += ": " + ([line for line in log if "rror" in line] or log)[-1].strip()[:160]
    return text, wrong


def run_worker(a, kind, name):
    """The JSON rows that a worker printed, and why it ended early."""
    command = [sys.executable, os.path.abspath(__file__), "--worker", kind, name, json.dumps(vars(a))]
    text, wrong = run_process(command, a.timeout, name if kind != "ceiling" else kind)
    return [json.loads(line) for line in text.split("\n") if line.startswith("{")], wrong


def hf_rows(a, name):
    lines, wrong = run_worker(a, "hf", name)
    note = next((line["note"] for line in lines if "note" in line), {})
    rows = []
    for work in works_of(a.works):
        mine = [line for line in lines if line.get("work") == list(work)]
        failed = next((line["why_not"] for line in mine if "why_not" in line), wrong or "no result")
        for clip in CLIPS[a.clip]:
            got = next((line for line in mine if line.get("clip") == clip), None)
            row = {"name": name, "work": list(work), "clip": clip, "states": "bf16", "note": note}
            rows.append({**row, **(got or {"why_not": failed})})
    return rows


@functools.cache
def moetune_help(binary):
    return run_process([binary, "bench", "--help"], 60, f"{binary} bench --help")


def bf16_states(a):
    return a.states == "bf16" or (a.states == "auto" and "--optim-state" in moetune_help(a.moetune)[0])


def precision_of(name):
    return "fp8" if name == "moetune-3" else "bf16"


def moetune_rows(a, name):
    """`moetune bench` once a work."""
    rows, (_, wrong) = [], moetune_help(a.moetune)
    states = "bf16" if bf16_states(a) else "fp32"
    sizes = {"expert-count": a.experts, **{n.replace("_", "-"): getattr(a, n) for n in SIZES if n != "experts"}}
    for samples, length in works_of(a.works):
        row = {"name": name, "work": [samples, length], "clip": True, "states": states}
        rows.append(row)
        flags = {"device": a.device, "precision": precision_of(name), "batch-size": samples, "max-seq-length": length,
                 "warmup-steps": a.warmup, "train-steps": a.steps, **sizes}  # fmt: skip
        if states == "bf16":
            flags["optim-state"] = states
        command = [a.moetune, "bench", "--json", *RUNGS[name]]
        for flag, value in flags.items():
            command += [f"--{flag}", str(value)]
        text, why = ("", wrong) if wrong else run_process(command, a.timeout, f"{name} {samples}x{length}")
        if why or not text.startswith("{"):
            row["why_not"] = why or "it printed nothing"
            continue
        got = json.loads(text)
        row.update(ms=[got["step_ms"]], memory_bytes=got.get("memory_bytes"), command=" ".join(command), printed=got)
    return rows


def ceiling(a):
    lines, wrong = run_worker(a, "ceiling", "-")
    if lines and not wrong:
        c = lines[0]
        print(f"{c['device']}, torch {c['torch']}: bf16 product {c['n']}^3 {c['product_tflops']:.0f} TFLOP/s, "
              f"copy on the device {c['copy_gb_s']:.0f} GB/s (read + written)")  # fmt: skip
        return c
    print(f"ceiling left out: {wrong}")
    return {}


def finish_rows(a, rows):
    """Adds the medians, rates and ratios."""
    for r in rows:
        if "ms" in r:
            samples, length = r["work"]
            r["step_ms"] = min(statistics.median(r["ms"]), r.get("in_a_row_ms", math.inf))
            r["tokens_per_s"] = samples * length / r["step_ms"] * 1e3
            r["tflops"] = r["tokens_per_s"] * flops_a_token(a, length) * 1e-12
    for r in rows:
        rivals = [x for x in rows if x["name"] in HF and x["work"] == r["work"] and "step_ms" in x]
        alike = [x for x in rivals if x["clip"] == r["clip"]] or rivals
        if alike and "step_ms" in r:
            r["ratio"] = min(x["step_ms"] for x in alike) / r["step_ms"]


def print_steps(rows, top):
    for work in dict.fromkeys(tuple(r["work"]) for r in rows):
        print(f"\n{work[0]} x {work[1]} tokens")
        print(f"{'':14} {'clip':>4} {'states':>6} {'ms':>8} {'TFLOP/s':>8} {'of top':>6} {'GiB':>6} {'x HF':>6}  notes")
        for r in rows:
            if tuple(r["work"]) != work:
                continue
            head = f"{r['name']:14} {'1.0' if r['clip'] else '-':>4} {r['states']:>6}"
            if "step_ms" not in r:
                print(f"{head} left out: {r['why_not']}")
                continue
            share = f"{r['tflops'] / top:6.1%}" if top else f"{'-':>6}"
            memory = f"{r['memory_bytes'] / GIB:6.1f}" if r.get("memory_bytes") else f"{'-':>6}"
            ratio = f"{r['ratio']:6.2f}" if "ratio" in r else f"{'-':>6}"
            notes = [r.get("note", {}).get("attention", "")]
            if "compile_s" in r:
                notes.append(f"compile {r['compile_s']:.0f} s")
            note = ", ".join(n for n in notes if n)
            print(f"{head} {r['step_ms']:8.1f} {r['tflops']:8.2f} {share} {memory} {ratio}  {note}".rstrip())


def steps_part(a, wanted):
    top = ceiling(a)
    rows = []
    for name in [*HF, *RUNGS]:
        if name in wanted:
            rows += hf_rows(a, name) if name in HF else moetune_rows(a, name)
    finish_rows(a, rows)
    print_steps(rows, top.get("product_tflops"))
    print("GiB: torch.cuda.max_memory_allocated; moetune: all it reserves for the model. x HF: against the fastest "
          "transformers row with the same clipping")  # fmt: skip
    groups = []
    for work in dict.fromkeys(tuple(r["work"]) for r in rows):
        bars = [
            (r["name"] + ("" if r["clip"] else ", no clip"), r.get("tflops"), r["name"] in RUNGS, r.get("why_not"))
            for r in rows
            if tuple(r["work"]) == work
        ]
        groups.append((f"{work[0]} x {work[1]} tokens a step", bars))
    model = ", ".join(f"{n.replace('_', ' ')} {getattr(a, n)}" for n in SIZES)
    return {"ceiling": top, "rows": rows}, f"Training step, model TFLOP/s: {model}", groups


def block_rows(a, name):
    shapes = works_of(a.shapes)
    rows = [{"name": name, "shape": list(s)} for s in shapes]
    if name in HF:
        lines, wrong = run_worker(a, "block", name)
        for row in rows:
            got = next((line for line in lines if line["shape"] == row["shape"]), {"why_not": wrong or "no result"})
            row.update(got)
            if "ms" in row:
                row["ms"] = [statistics.median(part) for part in row["ms"]]
        return rows
    for row in rows:  # one process a shape: one that fails must not take the others along
        recipe = precision_of(name) + ("-states" if bf16_states(a) else "")
        command = [a.moe_block, "--json", *BLOCK_RUNGS[name], "--precision", recipe, "--runs", str(a.block_runs)]
        command += [a.device, *(str(n) for n in row["shape"])]
        text, wrong = run_process(command, a.timeout, f"{name} {row['shape']}")
        if wrong or not text.startswith("{"):
            row["why_not"] = wrong or "it printed nothing"
            continue
        got = json.loads(text)
        gradients = "bf16" if bf16_states(a) else "fp32"
        row.update(ms=[got["forward_ms"], got["backward_ms"]], gradients=gradients, printed=got)
    return rows


def block_part(a, wanted):
    top = ceiling(a)
    rows = [row for name in [*HF, *RUNGS] if name in wanted for row in block_rows(a, name)]
    groups = []
    for shape in dict.fromkeys(tuple(r["shape"]) for r in rows):
        tokens, hidden, ffn, experts, k = shape
        flop, mine = 6 * k * tokens * hidden * ffn, [r for r in rows if tuple(r["shape"]) == shape]
        title = f"{tokens} tokens, hidden {hidden}, ffn {ffn}, {experts} experts, top-{k}"
        print(f"\n{title}")
        columns = f"{'TFLOP/s':>8} {'x HF':>6}"
        print(f"{'':14} {'fwd ms':>8} {columns} {'bwd ms':>8} {columns} {'both ms':>8} {columns}  gradients")
        for r in mine:
            if "ms" in r:
                r["ms"] = [*r["ms"], sum(r["ms"])]
                r["tflops"] = [part * flop / ms * 1e-9 for part, ms in zip((1, 2, 3), r["ms"])]
        bars = []
        for r in mine:
            bars.append((r["name"], r.get("tflops", [None])[-1], r["name"] in RUNGS, r.get("why_not")))
            if "ms" not in r:
                print(f"{r['name']:14} left out: {r['why_not']}")
                continue
            rivals = [x["ms"] for x in mine if x["name"] in HF and "ms" in x]
            r["ratio"] = [min(x[i] for x in rivals) / r["ms"][i] if rivals else None for i in range(3)]
            parts = [
                f"{r['ms'][i]:8.3f} {r['tflops'][i]:8.2f} {r['ratio'][i] or float('nan'):6.2f}" for i in range(3)
            ]
            print(f"{r['name']:14} {' '.join(parts)}  {r.get('gradients', 'bf16')}")
        groups.append((title, bars))
    print("x HF: against transformers' fastest in the same column")
    return {"ceiling": top, "rows": rows}, "MoE block, forward and backward, TFLOP/s", groups


def draw(path, title, groups, ceiling_tflops):
    """Horizontal bars, a group a work; a line where the machine's product lies."""
    values = [v for _, bars in groups for _, v, _, _ in bars if v]
    most = max([*values, ceiling_tflops or 0, 1e-9]) * 1.02
    left, width, bar, gap = 150, 560, 18, 6
    y, parts = 62, []
    for name, bars in groups:
        parts.append(f'<text x="{left}" y="{y}" font-weight="bold">{escape(name)}</text>')
        y += 10
        for label, value, own, why in bars:
            parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
            if value:
                length = value / most * width
                color = "#1f6feb" if own else "#9aa4b2"
                parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar}" fill="{color}"/>')
                parts.append(f'<text x="{left + length + 5:.1f}" y="{y + 13}">{value:.4g}</text>')
            else:
                reason = escape((why or "")[:70])
                parts.append(f'<text x="{left + 5}" y="{y + 13}" fill="#777">left out: {reason}</text>')
            y += bar + gap
        y += 26
    if ceiling_tflops:
        x = left + ceiling_tflops / most * width
        parts.append(f'<line x1="{x:.1f}" y1="40" x2="{x:.1f}" y2="{y - 26}" stroke="#c33" stroke-dasharray="4 3"/>')
        label = f"bf16 product: {ceiling_tflops:.4g}"
        parts.append(f'<text x="{x:.1f}" y="36" text-anchor="end" fill="#c33">{label}</text>')
    with open(path, "w", encoding="utf-8") as f:
        f.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {y}" width="800" height="{y}" '
            'font-family="sans-serif" font-size="12" fill="#222">\n<rect width="100%" height="100%" fill="#fff"/>\n'
            f'<text x="10" y="18" font-size="13">{escape(title)}</text>\n' + "\n".join(parts) + "\n</svg>\n"
        )


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--works", default="2x8192,4x512", help="samples x tokens, by commas (%(default)s)")
    p.add_argument("--only", help="names, by commas: " + ", ".join([*HF, *RUNGS]))
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--clip", choices=("yes", "no", "both"), default="both", help="of transformers (%(default)s)")
    p.add_argument("--states", choices=("auto", "fp32", "bf16"), default="auto",
                   help="of moetune: bf16 gradients and states, float32 ones, or auto: bf16 where it has them")  # fmt: skip
    p.add_argument("--attention", default="fastest", metavar="KIND",
                   help="of transformers: fastest (of PyTorch's flash and cudnn), flash, cudnn, sdpa (PyTorch "
                   "chooses), or another of its names")  # fmt: skip
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script on small sizes")
    p.add_argument("--timeout", type=float, default=200, help="seconds of one process (%(default)s)")
    p.add_argument("--moetune", default=os.path.join(ROOT, "build", "release", "moetune"))
    p.add_argument("--out", metavar="PREFIX", help="of PREFIX.json and PREFIX.svg (.cache/vs_hf, .cache/vs_hf_block)")
    defaults = (4096, 14336, 2, 32, 8, 8, 2, 32000)
    for name, value in zip(SIZES, defaults):
        p.add_argument("--" + name.replace("_", "-"), type=int, default=value, metavar="COUNT", help=f"({value})")
    p.add_argument("--block", action="store_true", help="the MoE block alone")
    p.add_argument("--shapes", default=SHAPES, help="of --block: tokens x hidden x ffn x experts x top-k, by commas")
    p.add_argument("--block-runs", type=int, default=20)
    p.add_argument("--block-warmup", type=int, default=5)
    p.add_argument("--moe-block", default=os.path.join(ROOT, "build", "release", "moe_block"))
    return p.parse_args()


def main():
    if len(sys.argv) == 5 and sys.argv[1] == "--worker":
        kind, name, settings = sys.argv[2:]
        return WORKERS[kind](argparse.Namespace(**json.loads(settings)), name)
    a = arguments()
    usual = ["hf-eager", "hf-grouped_mm", "moetune-0", "moetune-2"] if a.block else [*HF, *RUNGS]
    wanted = a.only.split(",") if a.only else usual
    unknown = [n for n in wanted if n not in HF and n not in RUNGS]
    if unknown:
        sys.exit(f"vs_hf.py: no contender '{unknown[0]}'; there are {', '.join([*HF, *RUNGS])}")
    begin = time.monotonic()
    prefix = a.out or os.path.join(ROOT, ".cache", "vs_hf_block" if a.block else "vs_hf")
    os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
    result, title, groups = (block_part if a.block else steps_part)(a, wanted)
    result["settings"] = vars(a)
    with open(prefix + ".json", "w", encoding="utf-8") as f:
        json.dump(result, f, indent=1)
    draw(prefix + ".svg", title, groups, result["ceiling"].get("product_tflops"))
    print(f"written to {prefix}.json and {prefix}.svg in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
