#!/usr/bin/env python3
"""PyTorch's grouped products (torch._grouped_mm, row counts on the device, as transformers calls
them) on the cases of bench/grouped_gemm: TFLOP/s from medians of CUDA events, random normal data.

usage: bench/vs_torch_grouped.py [--grouped-gemm PROGRAM] [--runs N] [--only PART_OF_A_NAME]
                                 [--mixtral ROWS] [--scaled]

The cases and their row counts are what `PROGRAM --loads` prints; with --mixtral, so many rows shared
evenly by 8 experts of hidden 4096 and ffn 14336 (bench/fp8_grouped's), and the rate of all six
products together. --scaled adds torch._scaled_grouped_mm: e4m3 with a scale for each row of either
operand, the one recipe it has on Hopper, on operands that are quantized before the clock starts.
Results are compared with products of torch.matmul one expert at a time ("off": largest difference
over the largest value). wgrad is bf16, the only format that it has. Needs python3 with torch, and a
GPU.
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


def e4m3(x):
    """x [..., K] in e4m3 and its scales [...], the largest of each row at 448."""
    scale = x.float().abs().amax(-1) / 448
    return (x.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


def scaled_products(rows, out, width, counts):
    """As products(), of e4m3 with a scale a row: the copies that each product needs are made here."""
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    begins = [sum(counts[:g]) for g in range(len(counts))]
    parts = [slice(b, b + n) for b, n in zip(begins, counts)]
    options = dict(offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True)
    mm = torch._scaled_grouped_mm

    def back(q, scale):
        return q.float() * scale.unsqueeze(-1)

    def rowwise(kind, a, w):
        (qa, sa), (qw, sw) = e4m3(a), e4m3(w.contiguous())
        return (
            kind,
            lambda: mm(qa, qw.transpose(1, 2), sa, sw, **options),
            lambda: torch.cat([back(qa[p], sa[p]) @ back(qw[g], sw[g]).t() for g, p in enumerate(parts)]),
        )

    x, dy, w = normal(rows, width), normal(rows, out), normal(len(counts), out, width)
    yield rowwise("fwd", x, w)
    yield rowwise("dgrad", dy, w.transpose(1, 2))
    cut = [(e4m3(dy[p].t()), e4m3(x[p].t())) for p in parts]
    qa, qb = (torch.cat([c[i][0] for c in cut], 1).contiguous() for i in (0, 1))
    sa, sb = (torch.cat([c[i][1] for c in cut]) for i in (0, 1))
    yield (
        "wgrad",
        lambda: mm(qa, qb.t(), sa, sb, **options),
        lambda: torch.stack([back(*a) @ back(*b).t() for a, b in cut]),
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--grouped-gemm", default=os.path.join(ROOT, "build", "release", "grouped_gemm"))
    p.add_argument("--runs", type=int, default=10)
    p.add_argument("--only")
    p.add_argument("--mixtral", type=int, metavar="ROWS")
    p.add_argument("--scaled", action="store_true")
    a = p.parse_args()
    if a.mixtral:
        loads = f"mixtral {a.mixtral} even;4096;14336;" + ",".join([str(a.mixtral // 8)] * 8)
    else:
        loads = subprocess.run([a.grouped_gemm, "--loads"], check=True, capture_output=True, text=True).stdout
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    makers = [("", products)] + ([(" e4m3", scaled_products)] if a.scaled else [])
    for line in loads.strip().split("\n"):
        case, h, f, counts = line.split(";")
        counts, h, f = [int(n) for n in counts.split(",")], int(h), int(f)
        for format, make in makers:
            spent = tera = 0
            for part, out, width in (("gate_up", 2 * f, h), ("down", h, f)):
                for kind, grouped, apart in make(sum(counts), out, width, counts):
                    name = f"{case:23} {kind} {part}{' bf16' if kind == 'wgrad' and not format else format}"
                    if a.only and a.only not in name:
                        continue
                    try:
                        got, want = grouped(), apart()
                        off = ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()
                        del got, want
                        ms = median_ms(grouped, a.runs)
                        work = 2e-9 * sum(counts) * out * width
                        spent, tera = spent + ms, tera + work
                        print(f"{name:42} {off:7.1e} | {ms:7.3f} ms {work / ms:4.0f}", flush=True)
                    except RuntimeError as e:
                        print(f"{name:42} left out: {str(e).splitlines()[0][:120]}", flush=True)
                torch.cuda.empty_cache()
            if a.mixtral and spent:
                print(f"{case:23} all{format:26} | {spent:7.3f} ms {tera / spent:4.0f}", flush=True)


if __name__ == "__main__":
    main()
