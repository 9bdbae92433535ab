"""Measurements for a quarter of an hour on a GPU, as Markdown; the most wanted come first.

    python results/gpu.py --data texts/ --vocab-size 30522 > out/gpu.md

Run it in the repository's folder, with the extras test and bench installed; the flags are those of
train_mlm.py. First come the kernels for attention and the product of the head; then, by the
commands below, training steps, the scan, the tests of the kernels, and efficiency. What is finished
is printed, even if the rest is not reached.
"""

import functools
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # train_mlm.py, bench.py

import bench
import train_mlm

# isort: split
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

COMMANDS = """
    bench.py step FLAGS --no-compile
    bench.py step FLAGS --compile
    bench.py scan
    -m pytest -q -m gpu -k "scan or kernels"
    bench.py efficiency --seconds 4 --out out/efficiency
    bench.py efficiency --seconds 4 --models MaBERT BERT ModernBERT --lengths 512 4096 --fastest
"""


def time_table(calls: dict) -> str:
    """Milliseconds of each call, medians of calls in turns, or why one failed."""
    # interleaved_medians names its calls by tuples
    timed = {(name,): functools.partial(bench.wall_ms, call) for name, call in calls.items()}
    body = []
    for (name,), ms in bench.interleaved_medians(timed, rounds=30, seconds=20).items():
        body.append([name, ms if isinstance(ms, str) else f"{ms:.3f}"])
    return bench.table(["forward and backward", "ms"], body)


def random(*size: int, device: str) -> torch.Tensor:
    return torch.randn(size, dtype=torch.bfloat16, device=device, requires_grad=True)


# ---- Attention of a T layer in training ----


def attend(backends: list, q, k, v, dy, mask):
    """Forward and backward by the first of the backends that can."""
    with sdpa_kernel(backends, set_priority=True):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1)
    torch.autograd.grad(y, (q, k, v), dy)


def attention(device: str, rows: int = 64, length: int = 512) -> str:
    """A table of PyTorch's kernels, each alone and as train_mlm.py asks for them; and the name of
    what then ran on the GPU."""
    tensors = [random(rows, 12, length, 64, device=device) for _ in range(4)]
    mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=device)
    choices = {backend.name: [backend] for backend in train_mlm.ATTENTION}
    choices["as in train_mlm.py"] = train_mlm.ATTENTION
    calls = {}
    for name, backends in choices.items():
        calls[name] = functools.partial(attend, backends, *tensors, mask)
    text = time_table(calls)

    with torch.profiler.profile() as profile:
        calls["as in train_mlm.py"]()
    kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    return f"{text}\n\nKernels that took longest: {', '.join(kernel.key for kernel in kernels[:3])}"


# ---- The head ----


def multiply(x, weight, dy):
    torch.autograd.grad(F.linear(x, weight), (x, weight), dy)


def head(device: str, labelled: int = 4915) -> str:
    """A table of its product with BERT's 30,522 words, and with 30,528, a multiple of 64.

    `labelled`: tokens to predict, by default 15 % of 64 × 512.
    """
    calls = {}
    for words in (30522, 30528):
        sizes = ((labelled, 768), (words, 768), (labelled, words))
        tensors = [random(*size, device=device) for size in sizes]  # x, words, the logits' gradient
        calls[f"{words} words"] = functools.partial(multiply, *tensors)
    return time_table(calls)


# ---- The command line ----


def main(argv: list[str]):
    train_mlm.parse_args(argv)  # refuses wrong flags at once
    if bench.DEVICE != "cuda":
        raise SystemExit("there is no GPU")
    print(bench.title_line("cuda"))
    for part in (attention, head):
        print(f"\n## {part.__name__}\n\n{part('cuda')}", flush=True)

    for line in COMMANDS.strip().replace("FLAGS", shlex.join(argv)).splitlines():
        print(f"\n## {line.strip()}\n", flush=True)
        subprocess.run([sys.executable, *shlex.split(line)])


if __name__ == "__main__":
    main(sys.argv[1:])
