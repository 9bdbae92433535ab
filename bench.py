"""Measurements, each printed as Markdown under the command, the machine and the versions that made it.

    python bench.py scan     # the masked selective scan on a CPU: this project's loop beside other ways to write it
    python bench.py drift    # what padding does to real tokens, for each form of padding-safe masking

Keep a table with a redirection: python bench.py drift > results/drift.md
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train_mlm.py

import torch
import torch.nn.functional as F
from tqdm import tqdm

from mabert import MaBERT, MaBERTConfig, selective_scan


def header() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    command = " ".join(["python", "bench.py", *sys.argv[1:]])
    return f"`{command}` on {cpu}, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


# ----------------------------------------------------------------------------------------------------------------------
# scan: time and memory of the selective scan
# ----------------------------------------------------------------------------------------------------------------------


def loop(u, delta, A, B, C, D):
    return selective_scan(u, delta, A, B, C, D, backend="loop")


def plain(u, delta, A, B, C, D):
    """The textbook way: (b, l, d, n) tensors, then a step at a time under autograd."""
    a, x = torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
    h, states = torch.zeros_like(x[:, 0]), []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1)):
        h = a_t * h + x_t
        states.append(h)
    return (torch.stack(states, 1) @ C[..., None]).squeeze(-1) + D * u


def pscan(u, delta, A, B, C, D):
    """mambapy's parallel scan, called as its Mamba block does."""
    from mambapy.pscan import pscan

    a, x = torch.exp(delta[..., None] * A), delta[..., None] * B[:, :, None] * u[..., None]
    return (pscan(a, x) @ C[..., None]).squeeze(3) + D * u


def scan_inputs(b, l, d, n):
    torch.manual_seed(0)
    u, delta, A = torch.randn(b, l, d), torch.rand(b, l, d) * 0.1, -torch.arange(1.0, n + 1).expand(d, n)
    inputs = [u, delta, A.clone(), torch.randn(b, l, n), torch.randn(b, l, n), torch.randn(d)]
    return [x.requires_grad_() for x in inputs], torch.randn(b, l, d)


def forward(scan, inputs, dy):
    with torch.no_grad():
        return scan(*inputs)


def forward_backward(scan, inputs, dy):
    return torch.autograd.grad(scan(*inputs), inputs, dy)


def peak_memory(name: str, size: list[int]) -> str:
    """MB that forward and backward need above the inputs, in a process of their own (on Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return "not measured here"
    code = (
        f"import bench, torch; torch.set_num_threads(1); inputs, dy = bench.scan_inputs(*{size})\n"
        "bench.forward_backward(bench.loop, *bench.scan_inputs(1, 4, 8, 2))\n"  # what first calls load
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak starts anew from here
        "kb = lambda key: int(open('/proc/self/status').read().split(key + ':')[1].split()[0])\n"
        f"before = kb('VmRSS'); bench.forward_backward(bench.{name}, inputs, dy); print(kb('VmHWM') - before)"
    )
    here = Path(__file__).parent
    process = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, cwd=here)
    return f"{int(process.stdout) / 1e3:.0f}"


def bench_scan(args):
    torch.set_num_threads(1)
    scans = [loop, plain, pscan]
    try:
        import mambapy  # noqa: F401
    except ImportError:
        scans.remove(pscan)
        print("mambapy is not installed: pip install -e '.[bench]' adds it to the comparison", file=sys.stderr)
    rows, progress = [], tqdm(total=len(args.sizes) * args.runs * 2)
    for size in args.sizes:
        inputs, dy = scan_inputs(*size)
        outputs = [forward(scan, inputs, dy) for scan in scans]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-4)
        times = {(scan, run): [] for scan in scans for run in (forward, forward_backward)}
        for run in (forward, forward_backward):
            for i in range(args.runs + 1):  # the first is warm-up; the scans take turns
                for scan in scans:
                    start = time.perf_counter()
                    run(scan, inputs, dy)
                    times[scan, run] += [time.perf_counter() - start] * (i > 0)
                progress.update(i > 0)
        median = {key: statistics.median(runs) * 1e3 for key, runs in times.items()}
        for scan in scans:
            cells = [
                f"{median[scan, run]:.0f} ({median[scan, run] / median[loop, run]:.1f}×)"
                for run in (forward, forward_backward)
            ]
            rows.append([str(tuple(size)), scan.__name__, *cells, peak_memory(scan.__name__, size)])
    progress.close()
    print(header())
    print(f"Medians of {args.runs} runs in turns, float32; in brackets the ratio to this project's loop. Peak memory "
          "is that of forward and backward beyond the inputs.\n")  # fmt: skip
    print(table(["(b, l, d, n)", "scan", "forward, ms", "forward + backward, ms", "peak memory, MB"], rows))


# ----------------------------------------------------------------------------------------------------------------------
# drift: what padding does to real tokens (the question of the paper's Figures 3 and 4)
# ----------------------------------------------------------------------------------------------------------------------

PSM_FORMS = ((), ("post",), ("pre",), ("pre", "post"), ("scan",), ("pre", "scan"), ("pre", "scan", "post"))


@torch.no_grad()
def bench_drift(args):
    torch.manual_seed(args.seed)
    ids = torch.randint(1, 1000, (16, 24))
    sizes = dict(vocab_size=1000, hidden_size=64, num_heads=4, intermediate_size=256, dropout=0.0)
    cases = [(causal, side) for causal in (True, False) for side in ("right", "left")]
    rows = []
    for psm in tqdm(PSM_FORMS):
        cells = []
        for causal, side in cases:
            torch.manual_seed(args.seed)
            model = MaBERT(MaBERTConfig(psm=psm, causal_conv=causal, **sizes)).double().eval()
            expected, changes = model(ids), []
            for pads in args.pads:
                where = (0, pads) if side == "right" else (pads, 0)
                hidden = model(F.pad(ids, where), F.pad(torch.ones_like(ids), where))
                real = hidden[:, where[0] : where[0] + ids.shape[1]]
                changes.append(((real - expected).norm() / expected.norm()).item())
            cells.append(" / ".join(f"{change:.0e}" for change in changes))
        rows.append([" + ".join(psm) or "none", *cells])
    print(header())
    print("Relative L2 change of the final hidden states of real tokens (16 rows of 24) when rows get", end=" ")
    print(" / ".join(map(str, args.pads)), "pads: MMT four times, hidden size 64, random weights, float64.\n")
    head = [f"{'causal' if causal else 'centred'} convolution, pads {side}" for causal, side in cases]
    print(table(["PSM stages", *head], rows))


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scan = commands.add_parser("scan", help="time and memory of the selective scan on a CPU, one thread")
    size = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    sizes = [[8, 128, 1536, 16], [1, 1024, 1536, 16]]
    scan.add_argument("--sizes", type=size, nargs="+", default=sizes, metavar="B,L,D,N")
    scan.add_argument("--runs", type=int, default=7, help="timed runs of each")
    drift = commands.add_parser("drift", help="what padding does to real tokens, for each form of PSM")
    drift.add_argument("--pads", type=int, nargs="+", default=[4, 16, 64], help="numbers of pads to add to a row")
    drift.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    {"scan": bench_scan, "drift": bench_drift}[args.command](args)


if __name__ == "__main__":
    main(sys.argv[1:])
