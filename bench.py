"""Measurements, each printed as Markdown under the command, the machine and the versions that made it.

    python bench.py scan             # the masked selective scan beside other ways to compute it, on the GPU or the CPU
    python bench.py scan --static    # the scan's kernels, compiled for A100 and H100: instructions, registers; no GPU
    python bench.py efficiency       # memory, latency and training time of MaBERT and its peers, beside the paper's
    python bench.py drift            # what padding does to real tokens, for each form of padding-safe masking
    python bench.py patterns         # does interleaving help? A short pretraining of the patterns of Table 1

Keep a table with a redirection, python bench.py scan > results/scan.md; efficiency and drift write their tables, JSON
and a figure with --out NAME.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train_mlm.py

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import mabert
from mabert import (
    INTERPRETED,
    MaBERT,
    MaBERTConfig,
    MaBERTForMaskedLM,
    MaBERTForSequenceClassification,
    selective_scan,
    triton,
)


def circumstances(device: str) -> dict[str, str]:
    """command, device, driver (of a GPU) and versions."""
    found = dict(command=shlex.join(["python", "bench.py", *sys.argv[1:]]))
    if device == "cuda":
        found["device"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        with contextlib.suppress(OSError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        name = model[1] if model else platform.processor() or platform.machine()
        found["device"] = f"{name}, {torch.get_num_threads()} thread(s)"
    found["versions"] = f"torch {torch.__version__}"
    for package in ("triton", "transformers", "mamba_ssm", "mambapy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"] += f", {package} {importlib.metadata.version(package)}"
    return found


def header(device: str = "cpu") -> str:
    found = circumstances(device)
    driver = f", driver {found['driver']}" if "driver" in found else ""
    return f"`{found['command']}` on {found['device']}{driver}, {found['versions']}\n"


def require(package: str):
    if not importlib.util.find_spec(package):
        raise SystemExit(f'this needs the package {package}: pip install -e ".[bench]"')


def check_out(name: str | None):
    """Before the work: whether NAME.md, NAME.json and NAME.png can be written."""
    if name:
        require("matplotlib")
        if name.endswith("/") or not Path(name).parent.is_dir():
            raise SystemExit(f"--out: {name} must be the beginning of file names in a folder that exists")


def write_results(name: str, text: str, summary: dict, device: str = "cpu"):
    Path(f"{name}.md").write_text(text, encoding="utf-8")
    Path(f"{name}.json").write_text(json.dumps(circumstances(device) | summary, indent=1) + "\n", encoding="utf-8")


def table_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(map(table_row, [head, ["---"] * len(head), *rows]))


# ----------------------------------------------------------------------------------------------------------------------
# scan: time and memory of the selective scan
# ----------------------------------------------------------------------------------------------------------------------
#
# Ways to compute it, each (u, delta, A, B, C, D, z, delta_bias) -> y as the model calls it, softplus and gate included.


def kernels(u, delta, A, B, C, D, z, bias):
    return selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, backend="triton")


def loop(u, delta, A, B, C, D, z, bias):
    return selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, backend="loop")


def mamba_ssm(u, delta, A, B, C, D, z, bias):
    """mamba-ssm's CUDA kernel. Its layout is channel-first, so `scan_inputs` lays memory out for it: no copies here."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
    return selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True).transpose(1, 2)


def plain(u, delta, A, B, C, D, z, bias):
    """The textbook way: (b, l, d, n) tensors, then a step at a time under autograd."""
    delta = F.softplus(delta + bias)
    a, x = torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
    h, states = torch.zeros_like(x[:, 0]), []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1)):
        h = a_t * h + x_t
        states.append(h)
    return ((torch.stack(states, 1) @ C.to(h.dtype)[..., None]).squeeze(-1) + D * u) * F.silu(z)


def pscan(u, delta, A, B, C, D, z, bias):
    """mambapy's parallel scan, called as its Mamba block does."""
    from mambapy.pscan import pscan

    delta = F.softplus(delta + bias)
    a, x = torch.exp(delta[..., None] * A), delta[..., None] * B[:, :, None] * u[..., None]
    return ((pscan(a, x) @ C.to(x.dtype)[..., None]).squeeze(3) + D * u) * F.silu(z)


PACKAGES = {"mamba_ssm": "mamba_ssm.ops.selective_scan_interface", "pscan": "mambapy.pscan"}


def contenders(names: list[str]) -> list:
    found = []
    for name in names:
        try:
            if name in PACKAGES:
                importlib.import_module(PACKAGES[name])
            found.append(globals()[name])
        except ImportError as error:
            print(f"{name} is not in the comparison: {error}", file=sys.stderr)
    return found


def scan_inputs(b, l, d, n, scan=None, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    rows = [torch.randn(b, l, width) for width in (d, d, d, d, n, n)]
    u, delta, z, dy, B, C = (x.to(device, dtype) for x in rows)
    if scan is mamba_ssm:
        u, delta, z, dy, B, C = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (u, delta, z, dy, B, C))
    A = -torch.arange(1.0, n + 1).expand(d, n).clone()
    A, D, bias = A.to(device), torch.randn(d).to(device), torch.full((d,), -4.0, device=device)
    return [x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias)], dy


def forward(scan, inputs, dy):
    with torch.no_grad():
        return scan(*inputs)


def forward_backward(scan, inputs, dy):
    return torch.autograd.grad(scan(*inputs), inputs, dy)


def resident(key: str) -> int:
    """Bytes of memory that this process has (VmRSS) or had at most since reset_resident_peak (VmHWM). Linux only."""
    return 1024 * int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])


def reset_resident_peak():
    Path("/proc/self/clear_refs").write_text("5")


def in_a_process(call: str) -> str:
    """What a function of this file returns in a process of its own, as text; "" where Linux is not there to tell."""
    if not Path("/proc/self/clear_refs").exists():
        return ""
    code = f"import bench; print(bench.{call})"
    here = Path(__file__).parent
    return subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=here).stdout


def scan_memory(scan: str, size: list[int]) -> float:
    """MB that forward and backward need above the inputs, on one thread, in this process."""
    torch.set_num_threads(1)
    inputs, dy = scan_inputs(*size)
    forward_backward(loop, *scan_inputs(1, 4, 8, 2))  # loads what first calls load
    before = resident("VmRSS")
    reset_resident_peak()
    forward_backward(globals()[scan], inputs, dy)
    return (resident("VmHWM") - before) / 1e6


def bench_scan_cpu(args):
    torch.set_num_threads(1)
    scans = contenders(["loop", "plain", "pscan"])
    sizes = args.sizes or [[8, 128, 1536, 16], [1, 1024, 1536, 16]]
    rows, progress = [], tqdm(total=len(sizes) * args.runs * 2)
    for size in sizes:
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
            memory = in_a_process(f"scan_memory({scan.__name__!r}, {size})")
            rows.append([str(tuple(size)), scan.__name__, *cells, f"{float(memory):.0f}" if memory else "not measured"])
    progress.close()
    print(header())
    print(f"Medians of {args.runs} runs in turns, float32; in brackets the ratio to this project's loop. Peak memory "
          "is that of forward and backward beyond the inputs.\n")  # fmt: skip
    print(table(["(b, l, d, n)", "scan", "forward, ms", "forward + backward, ms", "peak memory, MB"], rows))


# On a GPU: device time is that of a CUDA graph's replays, without the gaps between launches; wall time has them.

WARM_UP = 3


class Prepared(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple  # which the graph reads
    wall_ms: float
    peak_bytes: int  # beyond the inputs


def prepare(run, scan, size, runs) -> Prepared | None:
    """A CUDA graph of a run, with its wall time and memory without one; None where memory does not suffice."""
    try:
        inputs, dy = scan_inputs(*size, scan, "cuda", torch.bfloat16)
        stream, walls = torch.cuda.Stream(), []
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # capture wants a warm-up beside the default stream
            for _ in range(WARM_UP):
                run(scan, inputs, dy)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(runs):
                start = time.perf_counter()
                run(scan, inputs, dy)
                torch.cuda.synchronize()
                walls.append((time.perf_counter() - start) * 1e3)
            peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(scan, inputs, dy)
        return Prepared(graph, (inputs, dy), statistics.median(walls), peak)
    except torch.OutOfMemoryError:
        return None


def device_ms(graph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def gpu_cells(run, scans, size, runs) -> dict:
    """Of each scan the cells of a run: device time with its ratios, wall time, peak memory."""
    prepared = {}
    for scan in scans:
        torch.cuda.empty_cache()
        prepared[scan] = prepare(run, scan, size, runs)
    times = {scan: [] for scan in scans if prepared[scan]}
    for _ in range(WARM_UP + runs):  # the scans take turns
        for scan in times:
            times[scan].append(device_ms(prepared[scan].graph))
    median = {scan: statistics.median(ms[WARM_UP:]) for scan, ms in times.items()}
    exponentials, memory = bounds_ms(run, *size)
    cells = {scan: ["out of memory", "", ""] for scan in scans}
    for scan, ms in median.items():
        own = f"{ms / median[kernels]:.2f}×, " if kernels in median else ""
        ratios = f"{own}{ms / exponentials:.1f}× exp., {ms / memory:.1f}× memory"
        wall, peak = prepared[scan].wall_ms, prepared[scan].peak_bytes / 1e6
        cells[scan] = [f"{ms:.3f} ({ratios})", f"{wall:.3f}", f"{peak:.0f}"]
    return cells


def check_on_gpu(scans):
    """Prints how far values and gradients are from the loop in float64, relative to its norm, on inputs in bf16."""
    size, rows = (2, 300, 256, 16), []
    inputs, dy = scan_inputs(*size, loop, "cuda", torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = [forward(loop, exact, None), *forward_backward(loop, exact, dy.double())]
    for scan in scans:
        inputs, dy = scan_inputs(*size, scan, "cuda", torch.bfloat16)
        results = [forward(scan, inputs, dy), *forward_backward(scan, inputs, dy)]
        errors = [((x.double() - exact).norm() / exact.norm()).item() for x, exact in zip(results, expected)]
        rows.append([scan.__name__, *(f"{error:.0e}" for error in errors)])
    print(f"Relative error of y and of the gradients at {size}, bf16, against the loop in float64:\n")
    print(table(["scan", "y", "u", "delta", "A", "B", "C", "D", "z", "delta_bias"], rows) + "\n", flush=True)


def bounds_ms(run, b, l, d, n) -> tuple[float, float]:
    """The time of the exponentials alone, one a state update forward and two more backward, 16 a cycle and
    multiprocessor; and that of the memory traffic alone, u, delta, z and y, backward also dy, the first three again
    and their gradients, in bf16."""
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    per_ms = 16 * properties["multiprocessor_count"] * properties["sm_clock_rate"]  # the clock rate is in kHz
    exponentials, tensors = (1, 4) if run is forward else (3, 11)
    return exponentials * b * l * d * n / per_ms, tensors * 2 * b * l * d / (triton.testing.get_dram_gbps() * 1e6)


def bench_scan_gpu(args):
    sizes = [(32, 128), (32, 512), (32, 2048), (32, 4096), (1, 512), (1, 4096), (1, 16384)]
    sizes = args.sizes or [[b, l, 1536, 16] for b, l in sizes]
    scans = contenders(["kernels", "mamba_ssm", "loop", "pscan"])
    print(header("cuda"))
    check_on_gpu(scans)
    print(f"bf16, medians of {args.runs} runs. Device time: replays of CUDA graphs, in turns; in brackets its ratio to "
          "that of `kernels`, to the time of the exponentials alone and of the memory traffic alone. Forward: without "
          "gradients. Peak memory: beyond the inputs.\n")  # fmt: skip
    head = [f"{run}, {what}" for run in ("forward", "forward + backward") for what in ("ms", "wall ms", "peak MB")]
    print(table(["(b, l, d, n)", "scan", *head], []), flush=True)
    for size in tqdm(sizes):
        cells, more = (gpu_cells(run, scans, size, args.runs) for run in (forward, forward_backward))
        for scan in scans:
            tqdm.write(table_row([str(tuple(size)), scan.__name__, *cells[scan], *more[scan]]), file=sys.stdout)


# Without a GPU: what the compiler makes of the kernels, read from the machine code.

STATIC_CASES = {  # kernel: TILE, constants
    "_pack": (8, {}),
    "_ends": (8, {"ADJOINT": False, "z_ptr": None}),
    "_ends (adjoint)": (4, {"ADJOINT": True}),
    "_carry": (8, {"ADJOINT": False}),
    "_outputs": (8, {}),  # from start states, and keeping the chunks' states
    "_gradients": (4, {}),
}


def compile_kernel(name: str, arch: int, dtype: str) -> bytes:
    """The machine code (cubin) of a kernel for d 1536, n 16, softplus and z, as the base model calls it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile, constants = STATIC_CASES[name]
    kernel = getattr(mabert, name.split()[0])
    sizes = dict(d=1536, n=16, N=16, u_row=1536, v_row=1536, dy_row=1536, delta_row=1536, z_row=3072)
    sizes |= dict(SOFTPLUS=True, SIGN=1, CHUNK=64, TILE=tile, **constants)
    constexprs = {argument: value for argument, value in sizes.items() if argument in kernel.arg_names}
    half = "u_ptr v_ptr delta_ptr z_ptr y_ptr dy_ptr du_ptr ddelta_ptr dz_ptr B_ptr C_ptr".split()
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        pointer = argument.endswith("_ptr")
        signature[argument] = "constexpr" if argument in constexprs else "i32" if not pointer else "*fp32"
        if argument in half and argument not in constexprs:
            signature[argument] = f"*{dtype}"
        if pointer and argument not in constexprs:
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]


def machine_code(cubin: bytes) -> tuple[dict, list[collections.Counter]]:
    """Registers and stack bytes of a kernel; and how often each instruction stands in each of its innermost loops."""
    import triton.backends.nvidia as nvidia

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = [Path(nvidia.__file__).parent / "bin" / "cuobjdump"]
        usage, listing = (
            subprocess.run([*tool, flag, file], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    resources = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);")
    code = [(int(address, 16), op, rest) for address, op, rest in line.findall(listing)]
    jumps = [(int(re.search(r"0x([0-9a-f]+)", rest)[1], 16), at) for at, op, rest in code if op == "BRA"]
    loops = [(start, end) for start, end in jumps if start < end]
    inner = [(s, e) for s, e in loops if not any(s <= s2 and e2 <= e for s2, e2 in loops if (s, e) != (s2, e2))]
    return resources, [collections.Counter(op for at, op, _ in code if s <= at <= e) for s, e in inner]


def static_row(case: tuple) -> list:
    """[kernel, architecture, inputs, registers, stack bytes, instructions of each loop, exponentials, shuffles]; the
    last three per state update and lane."""
    name, arch, dtype = case
    resources, loops = machine_code(compile_kernel(*case))
    updates = STATIC_CASES[name][0] * (1 if name == "_carry" else 16)  # of an iteration, in a lane
    count = lambda *ops: sum(loop[op] for loop in loops for op in loop if op.startswith(ops)) / updates  # noqa: E731
    each = [loop.total() / updates for loop in loops] or [0.0]  # _pack has no loop
    return [name, f"sm_{arch}", dtype, *resources.values(), each, count("MUFU"), count("SHFL")]


def bench_scan_static(args):
    cases = list(itertools.product(STATIC_CASES, (80, 90), ("bf16", "fp32")))
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(static_row, cases), total=len(cases)))
    for row in rows:
        each = [f"{instructions:.2f}" for instructions in row[5]]
        row[5] = " + ".join(each) + (f" = {sum(row[5]):.2f}" if len(each) > 1 else "")
        row[6:] = [f"{instructions:.2f}" for instructions in row[6:]]
    print(header())
    print("Compiled, not run: d 1536, n 16, softplus, D, z. Instructions of the time loops per state update and lane; "
          "_outputs keeps states for the backward pass, _gradients has two loops, replay and reverse.\n")  # fmt: skip
    head = "kernel, architecture, inputs, registers, stack bytes, instructions, exponential pipe, shuffles".split(", ")
    print(table(head, [list(map(str, row)) for row in rows]))


def bench_scan(args):
    if args.static and (not triton or INTERPRETED):
        raise SystemExit("--static needs the package triton (on Linux), and no TRITON_INTERPRET in the environment")
    if args.static:
        bench_scan_static(args)
    elif torch.cuda.is_available():
        bench_scan_gpu(args)
    else:
        bench_scan_cpu(args)


# ----------------------------------------------------------------------------------------------------------------------
# efficiency: the paper's Tables B5 to B7 and Figure 5
# ----------------------------------------------------------------------------------------------------------------------

PAPER_LENGTHS = (128, 512, 1024, 2048, 4096)
PAPER = {  # on an A100: memory of a forward pass in MB, latency of it and time of an optimizer step in ms
    "BERT": dict(
        memory=(441.364, 454.748, 471.274, 507.313, 579.392),
        latency=(5.220, 5.331, 5.702, 15.122, 43.424),
        training=(42.372, 189.501, 487.204, 1451.200, 4894.397),
    ),
    "ALBERT": dict(
        memory=(70.649, 90.971, 117.992, 173.382, 283.109),
        latency=(6.140, 6.217, 6.692, 17.994, 48.749),
        training=(50.941, 225.783, 545.223, 1491.872, 4662.279),
    ),
    "Longformer": dict(
        memory=(602.629, 652.634, 709.375, 828.660, 1066.699),
        latency=(36.794, 36.866, 38.420, 42.468, 55.676),
        training=(834.994, 838.428, 1709.029, 3466.178, 6985.296),
    ),
    "BigBird": dict(
        memory=(507.797, 551.183, 662.196, 1115.224, 2885.278),
        latency=(7.921, 7.948, 8.059, 23.378, 67.887),
        training=(60.710, 263.221, 658.337, 1993.710, 6430.660),
    ),
    "DeBERTa-v3": dict(
        memory=(742.110, 825.994, 1047.506, 1908.529, 5262.076),
        latency=(13.737, 14.038, 17.456, 57.592, 206.592),
        training=(74.079, 371.969, 1151.794, 4251.722, 16136.670),
    ),
    "MaBERT": dict(
        memory=(808.787, 841.846, 923.875, 1238.917, 2445.003),
        latency=(9.160, 9.193, 9.263, 13.914, 34.703),
        training=(64.117, 240.334, 516.242, 1240.849, 3319.429),
    ),
}
MEASURES = dict(  # in the order of the tables
    memory="Table B5: peak memory, MiB (one forward pass at batch 1, weights included)",
    training="Table B6: training time, ms (one optimizer step)",
    latency="Table B7: latency, ms (one forward pass at batch 1)",
)

# The models. Those of transformers: its name for the class, and what of the published config differs from the class's
# defaults. 4,096 tokens are the digest of the paper's protocol: BERT's and ALBERT's position tables are interpolated,
# Longformer and BigBird have theirs, DeBERTa's relative range is extended.
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
DEBERTA = dict(vocab_size=128100, type_vocab_size=0, relative_attention=True, position_buckets=256)
DEBERTA |= dict(norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], layer_norm_eps=1e-7)
DEBERTA |= dict(position_biased_input=False, pooler_dropout=0, pooler_hidden_act="gelu", pooler_hidden_size=768)
TRANSFORMERS = {
    "BERT": ("Bert", BASE),
    "ALBERT": ("Albert", BASE),
    "Longformer": (
        "Longformer",
        BASE | dict(vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1, attention_window=512),
    ),
    "BigBird": ("BigBird", BASE | dict(vocab_size=50358, max_position_embeddings=4096)),
    "DeBERTa-v3": ("DebertaV2", BASE | DEBERTA),
    "ModernBERT": ("ModernBert", dict(reference_compile=False, attn_implementation="sdpa")),
}
BASELINES = list(TRANSFORMERS)[:5]  # the paper's
OURS = {
    "MaBERT": {},
    "MaBERT-206M": dict(hidden_size=1024, num_heads=16, intermediate_size=4224),  # the paper's has 205.3 M parameters
    "T12": dict(pattern="T" * 12),  # the pattern alone: pre-LN, so not BERT
    "M12": dict(pattern="M" * 12),
}
MODELS = [*TRANSFORMERS, *OURS]


class Setting(NamedTuple):
    flash: bool = False  # FlashAttention allowed
    compile: str | None = None  # a mode of torch.compile

    def __str__(self):
        return ", ".join(["flash"] * self.flash + [f"compile {self.compile}"] * bool(self.compile)) or "plain"


FASTEST = [Setting(True), Setting(True, "default"), Setting(True, "reduce-overhead")]  # the last with CUDA graphs


@torch.no_grad()
def stretch(embeddings: torch.nn.Module, length: int, first: int):
    """Interpolates a table of absolute positions of transformers to rows for length tokens, where it has fewer.

    The first rows are not positions, and stay.
    """
    table = embeddings.position_embeddings.weight  # (first + old, h)
    if len(table) >= first + length:
        return
    new = F.interpolate(table[first:].T[None], size=length, mode="linear", align_corners=True)[0].T  # (length, h)
    embeddings.position_embeddings.weight = torch.nn.Parameter(torch.cat([table[:first], new]))
    embeddings.position_embeddings.num_embeddings = first + length
    for name in ("position_ids", "token_type_ids"):
        if hasattr(embeddings, name):
            ids = torch.arange(length, device=table.device)[None]
            setattr(embeddings, name, ids if name == "position_ids" else torch.zeros_like(ids))


def build(name: str, length: int, device: str = "cpu") -> torch.nn.Module:
    """A two-label classifier with random weights for rows of up to length tokens."""
    if name in OURS:
        with torch.device(device):
            model = MaBERTForSequenceClassification(MaBERTConfig(**OURS[name]))
            model.encoder.resize_positions(max(length, model.config.max_position))
            return model
    import transformers

    transformers.logging.set_verbosity_error()  # no notes on how it pads
    family, sizes = TRANSFORMERS[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    model_class = getattr(transformers, f"{family}ForSequenceClassification")
    absolute = name in ("BERT", "ALBERT", "Longformer", "BigBird")
    if not absolute:
        config.max_position_embeddings = max(length, config.max_position_embeddings)
    with torch.device(device):
        model = model_class(config)
        if absolute:
            rows = length + -length % config.block_size if name == "BigBird" else length  # which pads to whole blocks
            stretch(model.base_model.embeddings, rows, first=2 if name == "Longformer" else 0)
        return model


def attention_kernels(device: torch.device, flash: bool):
    """Without flash, the paper's kernels for attention. A CPU has but one that saves memory, and it stays."""
    if flash or device.type == "cpu":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])


class Contender:
    """A model under a setting, with the two runs that are timed."""

    def __init__(self, model, optimizer, setting: Setting, length: int, batch_size: int):
        self.model, self.optimizer, self.setting, self.micro_batch_size = model, optimizer, setting, batch_size
        self.call = torch.compile(model, mode=setting.compile, dynamic=False) if setting.compile else model
        self.device = next(model.parameters()).device
        self.rows = torch.randint(5, model.config.vocab_size, (batch_size, length), device=self.device)

    def run(self, rows: torch.Tensor, **labels):
        """bf16 autocast on a GPU, float32 weights; their copies in bf16 are kept only where training needs them twice.
        The mask of ones is what a tokenizer gives; FlashAttention knows no mask."""
        mask = None if self.setting.flash else torch.ones_like(rows)
        on_gpu = self.device.type == "cuda"
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=bool(labels))
        if self.setting.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with attention_kernels(self.device, self.setting.flash), half:
            return self.call(input_ids=rows, attention_mask=mask, **labels)

    @torch.no_grad()
    def latency(self):
        self.run(self.rows[:1])

    def training(self):
        """An optimizer step; where memory does not suffice for the batch, it is accumulated from now on."""
        while not self.step():
            if self.micro_batch_size == 1 or self.setting.compile == "reduce-overhead":  # graphs cannot accumulate
                raise torch.OutOfMemoryError
            self.micro_batch_size //= 2
            release()

    def step(self) -> bool:
        try:
            for rows in self.rows.split(self.micro_batch_size):
                labels = torch.zeros(len(rows), dtype=torch.long, device=self.device)
                (self.run(rows, labels=labels).loss * len(rows) / len(self.rows)).backward()
            self.optimizer.step()
        except torch.OutOfMemoryError:
            self.optimizer.state.clear()  # which may be half made
            return False
        finally:
            self.optimizer.zero_grad()
        return True


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def release():
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def forward_memory(name: str, length: int, device: str, *setting) -> float:
    """MiB that a model and one forward pass of it take at most, alone on the device; on a CPU, in this process."""
    build(name, length, "meta")  # imports what it needs
    tiny = MaBERTConfig(hidden_size=16, num_heads=2, intermediate_size=16, pattern="MT")
    with torch.device(device):
        MaBERTForSequenceClassification(tiny)(torch.zeros(1, 1, dtype=torch.long))  # takes what first calls take
    release()
    before = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    contender = Contender(build(name, length, device).eval(), None, Setting(*setting), length, batch_size=1)
    contender.latency()
    release()
    torch.cuda.reset_peak_memory_stats() if device == "cuda" else reset_resident_peak()
    contender.latency()
    return ((torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")) - before) / 2**20


def reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):  # SIGKILL is how Linux ends who takes too much
        return "out of memory" if error.returncode == -signal.SIGKILL else "failed, see above"
    text = str(error).strip() or type(error).__name__
    no_memory = isinstance(error, torch.OutOfMemoryError) or re.search(r"out of memory|allocate memory", text)
    return "out of memory" if no_memory else text.split("\n")[0]


def measure_memory(name: str, length: int, args) -> dict:
    """forward_memory, on a CPU in a process of its own."""
    cell = dict(model=name, length=length, measure="memory", value=None)
    try:
        if args.device == "cuda":
            return cell | dict(value=forward_memory(name, length, args.device, *args.settings[0]))
        memory = in_a_process(f"forward_memory{(name, length, args.device, *args.settings[0])}")
        return cell | (dict(value=float(memory)) if memory else dict(failed="measured on Linux only"))
    except Exception as error:
        return cell | dict(failed=reason(error))


def in_turns(contenders: dict[tuple, Contender], measure: str, args) -> tuple[dict, dict]:
    """Milliseconds of the timed runs of each contender, and why others failed.

    They take turns run by run, so that a drifting clock hits all alike. The first round, which compiles, does not
    count; the second tells how many rounds fit into args.seconds: at most args.warm_up + args.runs, at least 1 + 3.
    """
    times, failed, rounds, number = {key: [] for key in contenders}, {}, 2, 0
    while number < rounds and times:
        began = time.perf_counter()
        for key in list(times):
            contender = contenders[key]
            contender.model.train(measure == "training")
            rows = contender.micro_batch_size
            try:
                synchronize(args.device)
                start = time.perf_counter()
                getattr(contender, measure)()
                synchronize(args.device)
                times[key].append((time.perf_counter() - start) * 1e3)
            except Exception as error:
                failed[key] = reason(error)
                del times[key]
            if contender.micro_batch_size != rows and key in times:
                times[key].clear()  # other work than what follows
        number += 1
        if number == 2:
            fitting = int(args.seconds / (time.perf_counter() - began))
            rounds = 1 + max(4, min(args.warm_up + args.runs, fitting))
    timed = (rounds - 1) - max(1, (rounds - 1) * args.warm_up // (args.warm_up + args.runs))
    return {key: runs[-timed:] for key, runs in times.items() if runs}, failed


def measure_times(length: int, args) -> list[dict]:
    """Latency and training time of all models at a length; of each model's settings, the fastest."""
    if any(setting.compile for setting in args.settings):
        torch._dynamo.config.recompile_limit = 1000  # the models of one class share it
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    models = {}
    for name in args.models:
        model = build(name, length, args.device)
        models[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    contenders = {
        (name, setting): Contender(*models[name], setting, length, args.batch_size)
        for name, setting in itertools.product(args.models, args.settings)
    }
    found = []
    for measure in ("latency", "training"):
        times, failed = in_turns(contenders, measure, args)
        for (name, setting), why in failed.items():
            print(f"{name}, {setting}, {length} tokens: no {measure}: {why}", file=sys.stderr)
        for name in args.models:
            medians = {key: statistics.median(runs) for key, runs in times.items() if key[0] == name}
            cell = dict(model=name, length=length, measure=measure, value=None, setting=None, runs=0)
            if not medians:
                cell["failed"] = failed.get((name, args.settings[0]), "out of memory")
            else:
                best = min(medians, key=medians.get)
                cell |= dict(value=medians[best], setting=str(best[1]), runs=len(times[best]))
                if measure == "training":
                    cell["micro_batch_size"] = contenders[best].micro_batch_size
            found.append(cell)
    torch.compiler.reset()
    return found


def forward_cost(config: MaBERTConfig, kind: str, length: int) -> tuple[float, float]:
    """Floating-point operations of a layer's forward pass for one row, and bytes it moves through memory in bf16.

    Operations: matrix products, convolution, attention, and 7 for each update of the scan's state (Δ A, its
    exponential, times Δ u and B, a fused multiply-add, another with C). Bytes: the weights once, and of every operation
    in eager mode, masks included, its inputs and outputs; scan and attention keep what is between theirs on the chip.
    """
    h, d, n, i = config.hidden_size, config.expand * config.hidden_size, config.d_state, config.intermediate_size
    r, k = config.dt_rank or math.ceil(h / 16), config.d_conv
    feed_forward = 2 * h * i
    if kind == "T":
        weights = 4 * h * h + feed_forward
        operations = length * (2 * weights + 4 * length * h)
        others = 4 * h + i + h + 4 * h  # biases and norms
        values = length * (22 * h + 4 * i)
    else:
        weights = h * 2 * d + d * (r + 2 * n) + r * d + d * h + feed_forward
        operations = length * (2 * (weights + k * d) + 7 * d * n)
        others = (k + 1) * d + d + d * n + d + i + h + 4 * h  # convolution, bias of Δ, A, D, biases and norms
        values = length * (18 * h + 17 * d + 4 * i + 2 * r + 4 * n)
    return operations, 2 * (weights + others + values)


def crossover(config: MaBERTConfig) -> int:
    """The length from which on a T layer takes more operations than an M layer."""
    (m, _), (t, _) = (forward_cost(config, kind, 1) for kind in "MT")
    return max(1, 2 + (m - t) // (4 * config.hidden_size))


def cost_table(lengths: list[int]) -> str:
    config, rows = MaBERTConfig(), []
    for length in lengths:
        (m, m_bytes), (t, t_bytes) = (forward_cost(config, kind, length) for kind in "MT")
        rows.append([str(length), *(f"{x / 1e9:.3g}" for x in (m, t)), *(f"{x / 1e6:.3g}" for x in (m_bytes, t_bytes))])
    head = ["length", "M layer, GFLOP", "T layer, GFLOP", "M layer, MB", "T layer, MB"]
    return (
        "Cost model, one layer of the base model, forward, one row: matrix products, convolution, attention and scan; "
        f"bytes of its inputs, outputs and weights in bf16. From {crossover(config)} tokens on, a T layer takes more "
        f"operations than an M layer.\n\n{table(head, rows)}\n"
    )


def paper_value(model: str, measure: str, length: int) -> float | None:
    known = model in PAPER and length in PAPER_LENGTHS
    return PAPER[model][measure][PAPER_LENGTHS.index(length)] if known else None


def ratio(value, names: list[str], over: str) -> float | None:
    """The mean of value(model) over some models, over that of another; None where one is missing."""
    values = [value(name) for name in [*names, over]]
    return None if None in values else statistics.mean(values[:-1]) / values[-1]


def efficiency_ratios(found: list[dict], length: int) -> list[dict]:
    """What a model takes over what MaBERT takes, and the mean of the paper's baselines: the headline of the paper."""
    values = {(cell["model"], cell["measure"]): cell["value"] for cell in found if cell["length"] == length}
    rows = [([name], name) for name in MODELS if any(cell["model"] == name for cell in found)]
    rows += [(BASELINES, "mean of the paper's baselines"), (BASELINES[:-1], "the same without DeBERTa-v3")]
    ratios = []
    for (names, what), over, measure in itertools.product(rows, ("MaBERT", "MaBERT-206M"), MEASURES):
        measured = ratio(lambda name: values.get((name, measure)), names, over)  # noqa: B023
        paper = ratio(lambda name: paper_value(name, measure, length), names, "MaBERT")  # noqa: B023
        ratios.append(dict(what=what, over=over, measure=measure, length=length, measured=measured, paper=paper))
    return ratios


def number(value: float | None, *notes) -> str:
    notes = [note for note in notes if note]
    text = "–" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return text + f" ({'; '.join(notes)})" * bool(notes)


def paper_note(value: float | None) -> str:
    return number(value) if value else ""


def efficiency_cell(cell: dict | None, args) -> str:
    if not cell:
        return ""
    paper = paper_note(paper_value(cell["model"], cell["measure"], cell["length"]))
    if cell["value"] is None:
        return number(None, cell["failed"], paper)
    micro = cell.get("micro_batch_size", args.batch_size)
    accumulated = f"{math.ceil(args.batch_size / micro)} × {micro} rows" if micro < args.batch_size else ""
    return number(cell["value"], paper, accumulated, cell["setting"] if args.fastest else "")


def efficiency_text(found: list[dict], parameters: dict[str, int], args) -> str:
    lengths = sorted({cell["length"] for cell in found})
    cells = {(cell["model"], cell["length"], cell["measure"]): cell for cell in found}
    text = f"{header(args.device)}\n"
    if args.device == "cuda":
        text += f"bf16 autocast, float32 weights; FlashAttention {'on' if args.flash or args.fastest else 'off'}"
    else:
        text += "A measurement on a CPU: float32, PyTorch's fused attention"
    text += ", each model's fastest setting" if args.fastest else f", torch.compile {'on' if args.compile else 'off'}"
    text += """. Medians; the models take turns, so all of them
and their optimizers are in memory. In brackets the paper's figures, from an A100, 32 rows in an optimizer step; its
MaBERT has 205.3 M parameters. T12 and M12 are MaBERT with one type of layer (T12 is pre-LN, so not BERT).
"""
    for measure, title in MEASURES.items():
        if any(cell["measure"] == measure for cell in found):
            title = title.replace("optimizer step", f"optimizer step, batch {args.batch_size}")
            rows = [
                [name, f"{parameters[name] / 1e6:.1f}"]
                + [efficiency_cell(cells.get((name, length, measure)), args) for length in lengths]
                for name in args.models
            ]
            if measure != "memory":
                timed = [{c["runs"] for c in found if (c["length"], c["measure"]) == (n, measure)} for n in lengths]
                rows.append(["timed runs", "", *(str(max(runs)) for runs in timed)])
            text += f"\n{title}:\n\n{table(['model', 'parameters, M', *map(str, lengths)], rows)}\n"
    length = 4096 if 4096 in lengths else lengths[-1]
    ratios = [row for row in efficiency_ratios(found, length) if row["over"] in args.models]
    if ratios:
        head = dict.fromkeys(f"{row['measure']} ÷ {row['over']}" for row in ratios)
        rows = {}
        for row in ratios:
            rows.setdefault(row["what"], [row["what"]]).append(number(row["measured"], paper_note(row["paper"])))
        text += f"\nRatios at {length} tokens; above 1, MaBERT takes less:\n\n"
        text += table(["model", *head], list(rows.values())) + "\n"
    return text + "\n" + cost_table(lengths)


def draw_efficiency(found: list[dict], args):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    measures = [measure for measure in MEASURES if any(cell["measure"] == measure for cell in found)]
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for measure, axes in zip(measures, panels):
        for name in args.models:
            i = MODELS.index(name)
            own = dict(ls="-", lw=1.8, zorder=3) if name in OURS else dict(ls="--", lw=1.2)
            points = [(c["length"], c["value"]) for c in found if (c["model"], c["measure"]) == (name, measure)]
            lengths, values = zip(*((length, value or math.nan) for length, value in points))
            axes.plot(lengths, values, marker="osv^Dp*XPh"[i], ms=5, color=f"C{i}", label=name, **own)
            paper = [paper_value(name, measure, length) or math.nan for length in lengths]
            axes.plot(lengths, paper, "osv^Dp*XPh"[i], ms=6, mew=0, color=f"C{i}", alpha=0.25)
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=MEASURES[measure].split(": ")[1].split(" (")[0])
        ticks = sorted({cell["length"] for cell in found})
        axes.set_xticks(ticks, labels=map(str, ticks), fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    title = "faint points: the paper's, on an A100"
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, title=title, title_fontsize=8)
    figure.savefig(f"{args.out}.png", dpi=120)


def bench_efficiency(args):
    on_gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if on_gpu else "cpu")
    if args.device == "cuda" and not on_gpu:
        raise SystemExit("--device cuda: PyTorch sees no GPU here; --device cpu has a smaller measurement")
    if args.device == "cpu" and args.flash:
        raise SystemExit("--flash is for a GPU")
    if args.fastest and (args.flash or args.compile):
        raise SystemExit("--fastest tries --flash and --compile by itself")
    defaults = dict(lengths=[*PAPER_LENGTHS, 8192, 16384], batch_size=32, warm_up=20, runs=100, seconds=600)
    if args.device == "cpu":
        defaults = dict(lengths=[128, 512, 1024], batch_size=1, warm_up=1, runs=5, seconds=60)
    if args.fastest:
        defaults["lengths"] = [512, 4096] if args.device == "cuda" else [512]
    vars(args).update({name: getattr(args, name) or value for name, value in defaults.items()})
    if any(name in TRANSFORMERS for name in args.models):
        require("transformers")
    check_out(args.out)
    plain = Setting(args.flash, "default" if args.compile else None)
    args.settings = [plain]
    if args.fastest:
        args.settings = FASTEST if args.device == "cuda" else [plain, Setting(compile="default")]
    parameters = {name: sum(p.numel() for p in build(name, 512, "meta").parameters()) for name in args.models}
    need, free = 15 * sum(parameters.values()), math.inf  # weights and Adam's two moments, gradients, some activations
    if args.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
    elif Path("/proc/meminfo").exists():
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    if need > free:
        sizes = f"they need {need / 1e9:.0f} GB together, and {free / 1e9:.0f} GB are free"
        raise SystemExit(f"the models take turns, so all are in memory; {sizes}: name fewer --models")
    found = []
    with tqdm(total=len(args.lengths) * (len(args.models) + 1), unit="cell") as progress:
        for length in sorted(args.lengths):
            for name in args.models:
                if not args.fastest:
                    found.append(measure_memory(name, length, args))
                progress.update()
            found += measure_times(length, args)
            release()
            progress.update()
            if args.out:  # after every length, so that a run that is stopped has what it measured
                settings = {key: value for key, value in vars(args).items() if key not in ("command", "settings")}
                settings["variants"] = [str(setting) for setting in args.settings]
                summary = dict(settings=settings, parameters=parameters, cells=found)
                summary["ratios"] = [row for done in args.lengths for row in efficiency_ratios(found, done)]
                write_results(args.out, efficiency_text(found, parameters, args), summary, args.device)
                draw_efficiency(found, args)
    print(efficiency_text(found, parameters, args))


# ----------------------------------------------------------------------------------------------------------------------
# drift: what padding does to real tokens (the question of the paper's Figures 3 and 4)
# ----------------------------------------------------------------------------------------------------------------------

PSM_FORMS = ((), ("post",), ("pre",), ("pre", "post"), ("scan",), ("pre", "scan"), ("pre", "scan", "post"))


def sentences(args, vocab_size: int, longest: int) -> list[torch.Tensor]:
    """Token ids of --sentences, or random ones, (rows, length) for each length; no pads."""
    if not args.sentences:
        return [torch.randint(5, vocab_size, (args.count, 24))]
    try:
        lines = Path(args.sentences).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--sentences: cannot read {args.sentences}: {error}") from error
    texts = [line.split("\t")[-1].strip() for line in lines]  # CoLA's dev.tsv has the sentence last
    texts = [text for text in texts if text][: args.count]
    if args.checkpoint:
        try:
            tokenizer = Tokenizer.from_file(str(Path(args.checkpoint, "tokenizer.json")))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise SystemExit(f"--checkpoint: cannot read its tokenizer.json: {error}") from error
        rows = [tokenizer.encode(text).ids[:longest] for text in texts]
    else:  # without a tokenizer, words are told apart, no more
        rows = [[5 + zlib.crc32(word.encode()) % (vocab_size - 5) for word in text.split()][:longest] for text in texts]
    if not rows:
        raise SystemExit(f"--sentences: {args.sentences} has no text")
    return [torch.tensor([row for row in rows if len(row) == length]) for length in sorted(set(map(len, rows)))]


def distances(model: MaBERT, rows: list[torch.Tensor], unpadded: list[torch.Tensor], pads: int, side: str) -> dict:
    """How far the final hidden states of real tokens are from those without pads, as means over the rows.

    All rows are one batch, in which the longest has so many pads. The paper's measures are the cosine distances of the
    first token's state and of the mean over the tokens; beside them are relative L2 changes, those of all tokens too.
    """
    total = collections.Counter()
    length = pads + max(ids.shape[1] for ids in rows)
    wheres = [(0, length - ids.shape[1]) if side == "right" else (length - ids.shape[1], 0) for ids in rows]
    pad = model.config.pad_token_id
    ids = torch.cat([F.pad(part, where, value=pad) for part, where in zip(rows, wheres)])
    mask = torch.cat([F.pad(torch.ones_like(part), where) for part, where in zip(rows, wheres)])
    for x, y, (before, after) in zip(unpadded, model(ids, mask).split(list(map(len, rows))), wheres):
        y = y[:, before : length - after]
        for name, a, b in (
            ("tokens", x.flatten(1), y.flatten(1)),
            ("cls", x[:, 0], y[:, 0]),
            ("mean", x.mean(dim=1), y.mean(dim=1)),
        ):
            total[f"{name}_l2"] += ((b - a).norm(dim=1) / a.norm(dim=1)).sum().item()
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
            cosine_distance = (b - a).square().sum(dim=1) / 2  # 1 - cosine, without cancellation
            total[f"{name}_cosine"] += cosine_distance.sum().item()
    return {name: value / len(ids) for name, value in total.items()}


@torch.no_grad()
def bench_drift(args):
    """Figures 3 and 4 of the paper, for every form of PSM, side of the pads and kind of convolution."""
    check_out(args.out)
    cases = [(causal, side) for causal in (True, False) for side in ("right", "left")]
    sizes = dict(vocab_size=1000, hidden_size=64, num_heads=4, intermediate_size=256, dropout=0.0)
    config, weights, found = MaBERTConfig(**sizes), None, []
    if args.checkpoint:
        try:
            trained = MaBERT.from_pretrained(args.checkpoint)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--checkpoint: {error}") from error
        config, weights = trained.config, trained.state_dict()
    for psm, causal in tqdm(list(itertools.product(PSM_FORMS, (True, False))), unit="model"):
        torch.manual_seed(args.seed)
        model = MaBERT(dataclasses.replace(config, psm=psm, causal_conv=causal)).double().eval()
        if weights:
            model.load_state_dict(weights)
        rows = sentences(args, config.vocab_size, config.max_position)
        unpadded = list(map(model, rows))
        for side, pads in itertools.product(("right", "left"), args.pads):
            case = dict(psm="+".join(psm) or "none", causal=causal, side=side, pads=pads)
            found.append(case | distances(model, rows, unpadded, pads, side))

    def cells(form, measure):
        values = {(r["causal"], r["side"], r["pads"]): r[measure] for r in found if r["psm"] == form}
        return [" / ".join(f"{values[(*case, pads)]:.0e}" for pads in args.pads) for case in cases]

    forms = list(dict.fromkeys(r["psm"] for r in found))
    what = "random weights (MMT four times, hidden size 64)"
    if args.checkpoint:
        convolution = "causal" if config.causal_conv else "centred"
        psm = "+".join(config.psm) or "none"
        what = f"{args.checkpoint}, pretrained with PSM {psm} and a {convolution} convolution"
    source = f"sentences of {args.sentences}" if args.sentences else "random rows of 24 tokens"
    what += f", {sum(map(len, rows))} {source}"
    head = ["PSM stages", *(f"{'causal' if causal else 'centred'}, pads {side}" for causal, side in cases)]
    text = f"{header()}\nWith {' / '.join(map(str, args.pads))} pads in the longest row, float64; {what}.\n"
    titles = dict(
        tokens_l2="Relative L2 change of the final hidden states of real tokens",
        cls_l2="Relative L2 change of the final [CLS]",
        mean_l2="Relative L2 change of the mean over real tokens",
        cls_cosine="Cosine distance of the final [CLS] (the paper's Figures 3a and 4)",
        mean_cosine="Cosine distance of the mean over real tokens (the paper's Figure 3b)",
    )
    for measure, title in titles.items():
        text += f"\n{title}:\n\n{table(head, [[form, *cells(form, measure)] for form in forms])}\n"
    print(text)
    if args.out:
        write_results(args.out, text, dict(what=what, distances=found))
        draw_drift(args.out, args.pads, found, forms, cases)


def draw_drift(out: str, pads: list[int], found: list[dict], forms: list[str], cases: list[tuple]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    measures = dict(
        tokens_l2="relative L2, real tokens", cls_cosine="cosine distance, [CLS]", mean_cosine="cosine distance, mean"
    )
    panels = figure.subplots(len(measures), len(cases), sharex=True, sharey="row")
    for (measure, label), line in zip(measures.items(), panels):
        for (causal, side), axes in zip(cases, line):
            for i, form in enumerate(forms):
                values = [r[measure] for r in found if (r["psm"], r["causal"], r["side"]) == (form, causal, side)]
                lowest = 1e-18 if measure == "tokens_l2" else 1e-36  # stands for zero on a log axis
                values = [max(value, lowest) for value in values]
                axes.plot(pads, values, "osv^Dx+"[i] + "-", label=form, lw=6 - 0.8 * i, ms=4, alpha=0.8)  # all are seen
            axes.set_yscale("log")
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.set_xticks(pads, labels=map(str, pads), fontsize=8)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            if measure == "tokens_l2":
                axes.set_title(f"{'causal' if causal else 'centred'} convolution, pads {side}", fontsize=9)
            if measure == "mean_cosine":
                axes.set_xlabel("pads of the longest row")
        line[0].set_ylabel(label)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    title = "PSM stages; no change at all is drawn at the bottom"
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8, title=title, title_fontsize=8)
    figure.savefig(f"{out}.png", dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# patterns: the paper's Table 1 in small
# ----------------------------------------------------------------------------------------------------------------------

PATTERNS = [unit * (12 // len(unit)) for unit in ("M", "T", "MTT", "TM", "MT", "TMM", "MMT", "TTM")]
CENTRED = "MMT" * 4  # with a centred convolution, one more row
SMALL = """--vocab-size 4096 --hidden-size 64 --num-heads 4 --intermediate-size 256 --d-state 8 --dropout 0
    --length-schedule 64:1 --batch-size 32 --micro-batch-size 32 --bucket --lr 2e-3 --warmup-steps 100""".split()


def resolved(paths: list[str] | None) -> list[Path]:
    return [Path(path).resolve() for path in paths or []]


def pretrain(args, pattern: str, centred: bool, seed: int, profile: bool) -> float:
    """The last held-out loss, in nats, of a run of train_mlm.py, or seconds a step; a finished one is only read."""
    out = Path(args.out, f"{pattern}{'-centred' if centred else ''}-seed{seed}")
    flags = [*SMALL, "--pattern", pattern, "--steps", args.steps, "--seed", seed, "--eval-every", args.steps]
    flags += ["--no-causal-conv"] * centred + ["--cache-dir", Path(args.out, "tokens"), "--out", out]
    flags += ["--data", *args.data, "--sample-by", "paragraph"] if args.data else ["--demo"]
    flags += ["--profile", "10"] if profile else ["--resume"]
    if (out / "args.json").exists():
        made = json.loads((out / "args.json").read_text())
        if made["steps"] != args.steps or resolved(made["data"]) != resolved(args.data):
            raise SystemExit(f"{out} has --steps {made['steps']} --data {made['data']}: give another --out for others")
    kept = out / ("profile.txt" if profile else "model.pt")
    if not kept.exists():
        command = list(map(str, [sys.executable, Path(__file__).with_name("train_mlm.py"), *flags]))
        threads = {} if profile or args.jobs == 1 else {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        if result.returncode:
            raise SystemExit(f"{out}: train_mlm.py: {result.stderr.strip().splitlines()[-1]}")
        if profile:
            out.mkdir(parents=True, exist_ok=True)
            kept.write_text(result.stdout)
    if profile:
        return float(re.search(r"tokens: ([\d.]+) s a step", kept.read_text())[1])
    with open(out / "log.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["held_out_loss"])


def bench_patterns(args):
    for path in args.data or []:
        if not Path(path).exists():
            raise SystemExit(f"--data: {path} does not exist")
    for pattern in args.patterns:
        try:
            MaBERTConfig(pattern=pattern)
        except ValueError as error:
            raise SystemExit(f"--patterns: {error}") from error
    cases = [(pattern, False) for pattern in args.patterns] + [(CENTRED, True)]
    runs = [(*case, seed) for seed in range(args.seeds) for case in cases]
    # First the step times, alone and in turns: a drifting clock hits all alike. The first run makes the token cache.
    seconds = {run: pretrain(args, *run, profile=True) for run in tqdm(runs, desc="step time", unit="run")}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        losses = pool.map(lambda run: pretrain(args, *run, profile=False), runs)
        losses = dict(zip(runs, list(tqdm(losses, desc="pretraining", unit="run", total=len(runs)))))
    rows = []
    for pattern, centred in cases:
        found = [losses[pattern, centred, seed] for seed in range(args.seeds)]
        step = min(seconds[pattern, centred, seed] for seed in range(args.seeds))
        model = MaBERTForMaskedLM.from_pretrained(Path(args.out, f"{pattern}{'-centred' if centred else ''}-seed0"))
        deviation = f" ± {statistics.stdev(found):.3f}" if args.seeds > 1 else ""
        cells = [f"{statistics.mean(found):.3f}{deviation}", f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"]
        rows.append([f"{pattern}{', centred convolution' if centred else ''}", *cells, f"{1000 * step:.0f}"])
    print(header("cuda" if torch.cuda.is_available() else "cpu"))
    seeds = f"{args.seeds} seed{'s' * (args.seeds > 1)}"
    print(f"{args.steps} steps of masked language modelling, 32 rows of 64 tokens, hidden size 64, {seeds}.\n")
    print(table(["pattern", "held-out loss, nats", "parameters, M", f"ms a step, best of {args.seeds}"], rows))


def at_least(low: int):
    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return int(text)

    return number


positive = at_least(1)


def scan_size(text: str) -> list[int]:
    size = [positive(number) for number in text.split(",")]
    if len(size) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not B,L,D,N")
    return size


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scan = commands.add_parser("scan", help="time and memory of the selective scan: on the GPU, or on one CPU thread")
    scan.add_argument("--sizes", type=scan_size, nargs="+", metavar="B,L,D,N")
    scan.add_argument("--runs", type=positive, default=7, help="timed runs of each")
    scan.add_argument(
        "--static", action="store_true", help="instead: what the kernels' machine code costs; needs no GPU"
    )
    efficiency = commands.add_parser("efficiency", help="Tables B5 to B7 and Figure 5: MaBERT and its peers")
    add = efficiency.add_argument
    add("--device", choices=["cuda", "cpu"], help="default: the GPU, if there is one; on a CPU 15 to 20 minutes")
    add("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    add(
        "--lengths",
        type=positive,
        nargs="+",
        help="tokens; default: the paper's, 8192 and 16384; on a CPU 128, 512 and 1024; with --fastest less",
    )
    add("--batch-size", type=positive, help="rows of an optimizer step; default: 32 (the paper's); on a CPU 1")
    add("--warm-up", type=positive, help="runs before those timed; default: 20 (the paper's); on a CPU 1")
    add("--runs", type=positive, help="timed runs; default: 100 (the paper's); on a CPU 5")
    add("--seconds", type=float, help="for all runs of a measure at a length: there are fewer if they would take "
        "longer, but three; default: 600; on a CPU 60")  # fmt: skip
    add("--flash", action="store_true", help="allow FlashAttention")
    add("--compile", action="store_true", help="torch.compile every model")
    add("--fastest", action="store_true", help="times of every model at its fastest setting: FlashAttention, with and "
        "without torch.compile and CUDA graphs (on a CPU, with and without torch.compile)")  # fmt: skip
    add("--out", metavar="NAME", help="write NAME.md, NAME.json and NAME.png (needs matplotlib)")
    drift = commands.add_parser("drift", help="what padding does to real tokens, for each form of PSM")
    drift.add_argument(
        "--pads",
        type=at_least(0),
        nargs="+",
        default=[0, 1, 8, 64, 512],
        help="pads of the longest row; shorter ones are padded to its length (%(default)s)",
    )
    drift.add_argument("--checkpoint", help="a folder with a trained model, instead of random weights")
    drift.add_argument(
        "--sentences",
        metavar="FILE",
        help="CoLA's dev.tsv, or a text file of lines, instead of random rows; without --checkpoint, a token a word",
    )
    drift.add_argument("--count", type=positive, default=100, help="rows (%(default)s)")
    drift.add_argument("--out", metavar="NAME", help="write NAME.md, NAME.json and NAME.png (needs matplotlib)")
    drift.add_argument("--seed", type=int, default=0, help="of the random weights and rows (%(default)s)")
    patterns = commands.add_parser("patterns", help="a short pretraining of each pattern of the paper's Table 1")
    patterns.add_argument(
        "--data", nargs="+", metavar="PATH", help="text, as train_mlm.py takes it; without, its demo's"
    )
    patterns.add_argument(
        "--patterns",
        nargs="+",
        default=PATTERNS,
        help="one letter a layer, M or T (the paper's eight, of 12 layers); MMT × 4, centred convolution, comes last",
    )
    patterns.add_argument("--steps", type=positive, default=1200, help="of each run (%(default)s)")
    patterns.add_argument("--seeds", type=positive, default=2, help="runs of each pattern (%(default)s)")
    patterns.add_argument(
        "--jobs",
        type=positive,
        default=1,
        help="pretraining runs at the same time, each on its share of the cores (%(default)s)",
    )
    patterns.add_argument(
        "--out",
        default="out/patterns",
        help="a folder, where finished runs of the same --steps and --data are kept (%(default)s)",
    )
    args = parser.parse_args(argv)
    globals()[f"bench_{args.command}"](args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(
            "\ninterrupted; patterns goes on when it is given again, efficiency --out has whole lengths"
        ) from None
