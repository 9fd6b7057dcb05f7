#!/usr/bin/env python3
"""Checks that TensorBoard's own loader reads a run's event files as metrics.jsonl has them.

usage: check_tensorboard.py RUN_DIR   (of `moetune train --tensorboard`)

Every step's loss and every evaluation's loss must be there once, to float32, at its step, and so must
warnings; the loader checks the records' checksums. Exit 77 where the package tensorboard is missing.
"""

import json
import os
import struct
import sys

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError as why:
    print(f"skipped: {why}")
    sys.exit(77)


def float32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def main():
    run = sys.argv[1]
    want = {"train/loss": {}, "held_out/loss": {}, "train/grad_norm": {}, "speed/step_ms": {}}
    keys = {"loss": "train/loss", "eval_loss": "held_out/loss", "grad_norm": "train/grad_norm", "step_ms": "speed/step_ms"}
    layers = 0
    with open(os.path.join(run, "metrics.jsonl"), encoding="utf-8") as f:
        for line in f:
            o = json.loads(line)
            layers = len(o.get("expert_load", [])) or layers
            for key, tag in keys.items():
                if o.get(key) is not None:
                    want[tag][o["step"]] = float32(o[key])
    events = EventAccumulator(run, size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    failed = 0
    for tag, values in want.items():
        found = events.Scalars(tag) if values else []
        got = {e.step: float32(e.value) for e in found}
        off = [s for s in values if s not in got or abs(got[s] - values[s]) > 1e-6 * abs(values[s])]
        print(f"{tag}: {len(values)} values, {len(off)} missing or different")
        failed += bool(off) or set(got) != set(values) or len(found) != len(values)
    warned = any("warning" in line[:40] for line in open(os.path.join(run, "metrics.jsonl"), encoding="utf-8"))
    texts = [t for e in events.Tensors("warnings") for t in e.tensor_proto.string_val] if warned else []
    print(f"warnings: {len(texts)} texts{', such as ' + repr(texts[0].decode()) if texts else ''}")
    failed += warned and not texts
    tags = events.Tags()["scalars"]
    known = sum(f"experts/layer_{l}/load_entropy" in tags for l in range(layers))
    print(f"experts: {known} of {layers} layers; {len(tags)} scalar tags in all")
    return 1 if failed or known != layers else 0


if __name__ == "__main__":
    sys.exit(main())
