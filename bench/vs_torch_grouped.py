#!/usr/bin/env python3
"""PyTorch's grouped products (torch._grouped_mm, row counts on the device, as transformers calls
them) on the cases of bench/grouped_gemm: TFLOP/s from medians of CUDA events, random normal data.

usage: bench/vs_torch_grouped.py [--grouped-gemm PROGRAM] [--runs N] [--only PART_OF_A_NAME]

The cases and their row counts are what `PROGRAM --loads` prints. Results are compared with products
of torch.matmul one expert at a time ("off": largest difference over the largest value). wgrad is
bf16, the only format that it has. Needs python3 with torch, and a GPU.
"""

import argparse
import os
import statistics
import subprocess

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def median_ms(work, runs):
    """As bench/grouped_gemm does: behind a run that is not counted, the host waiting once a turn."""
    ms = []
    for _ in range(3 + runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        ms.append(begin.elapsed_time(end))
    return statistics.median(ms[3:])


def normal(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def products(rows, out, width, counts):
    """(name, grouped product, the same one expert at a time) of a layer width -> out."""
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    begins = [sum(counts[:g]) for g in range(len(counts))]
    parts = [slice(b, b + n) for b, n in zip(begins, counts)]
    x, dy, w = normal(rows, width), normal(rows, out), normal(len(counts), out, width)
    yield (
        "fwd",
        lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends),
        lambda: torch.cat([x[p] @ w[g].t() for g, p in enumerate(parts)]),
    )
    yield (
        "dgrad",
        lambda: torch._grouped_mm(dy, w, offs=ends),
        lambda: torch.cat([dy[p] @ w[g] for g, p in enumerate(parts)]),
    )
    yield (
        "wgrad",
        lambda: torch._grouped_mm(dy.t(), x, offs=ends),
        lambda: torch.stack([dy[p].t() @ x[p] for p in parts]),
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--grouped-gemm", default=os.path.join(ROOT, "build", "release", "grouped_gemm"))
    p.add_argument("--runs", type=int, default=10)
    p.add_argument("--only")
    a = p.parse_args()
    loads = subprocess.run([a.grouped_gemm, "--loads"], check=True, capture_output=True, text=True).stdout
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}: torch._grouped_mm")
    for line in loads.strip().split("\n"):
        case, h, f, counts = line.split(";")
        counts, h, f = [int(n) for n in counts.split(",")], int(h), int(f)
        for part, out, width in (("gate_up", 2 * f, h), ("down", h, f)):
            for kind, grouped, apart in products(sum(counts), out, width, counts):
                name = f"{case:23} {kind} {part}{' bf16' if kind == 'wgrad' else ''}"
                if a.only and a.only not in name:
                    continue
                try:
                    got, want = grouped(), apart()
                    off = ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()
                    del got, want
                    ms = median_ms(grouped, a.runs)
                    print(f"{name:42} {off:7.1e} | {ms:7.3f} ms {2e-9 * sum(counts) * out * width / ms:4.0f}", flush=True)
                except RuntimeError as e:
                    print(f"{name:42} left out: {str(e).splitlines()[0][:120]}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
