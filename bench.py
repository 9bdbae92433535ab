"""Measurements, each printed as Markdown under the command, the machine and the versions that made it.

    python bench.py scan             # the masked selective scan beside other ways to compute it, on the GPU or the CPU
    python bench.py scan --static    # the scan's kernels, compiled for A100 and H100: instructions, registers; no GPU
    python bench.py drift            # what padding does to real tokens, for each form of padding-safe masking
    python bench.py patterns         # does interleaving help? A short pretraining of the patterns of Table 1

Keep a table with a redirection: python bench.py scan > results/scan.md. `drift --out NAME` draws a figure too.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
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
from tqdm import tqdm

import mabert
from mabert import INTERPRETED, MaBERT, MaBERTConfig, MaBERTForMaskedLM, selective_scan, triton


def header() -> str:
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        device = f"{model[1] if model else platform.processor() or platform.machine()}, "
        device += f"{torch.get_num_threads()} thread(s)"
    versions = f"torch {torch.__version__}"
    for package in ("triton", "mamba_ssm", "mambapy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions += f", {package} {importlib.metadata.version(package)}"
    command = " ".join(["python", "bench.py", *sys.argv[1:]])
    return f"`{command}` on {device}, {versions}\n"


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
            rows.append([str(tuple(size)), scan.__name__, *cells, peak_memory(scan.__name__, size)])
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
    print(header())
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


def distances(model: MaBERT, rows: list[torch.Tensor], pads: int, side: str) -> dict[str, float]:
    """How far the final hidden states of real tokens are from those without pads, as means over the rows.

    "tokens" is the relative L2 change of all of them; "cls" and "mean" are the paper's, cosine distances of the first
    token's and of the mean over the tokens.
    """
    total = dict(tokens=0.0, cls=0.0, mean=0.0)
    for ids in rows:
        where = (0, pads) if side == "right" else (pads, 0)
        x = model(ids)
        y = model(F.pad(ids, where), F.pad(torch.ones_like(ids), where))[:, where[0] : where[0] + ids.shape[1]]
        total["tokens"] += ((y - x).norm(dim=(1, 2)) / x.norm(dim=(1, 2))).sum().item()
        for name, a, b in (("cls", x[:, 0], y[:, 0]), ("mean", x.mean(dim=1), y.mean(dim=1))):
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
            total[name] += ((a - b).square().sum(dim=1) / 2).sum().item()  # 1 - cosine, without cancellation
    return {name: value / sum(map(len, rows)) for name, value in total.items()}


@torch.no_grad()
def bench_drift(args):
    """Figures 3 and 4 of the paper, for every form of PSM, side of the pads and kind of convolution."""
    if args.out and not importlib.util.find_spec("matplotlib"):
        raise SystemExit('--out draws a figure with matplotlib: pip install -e ".[bench]"')
    cases = [(causal, side) for causal in (True, False) for side in ("right", "left")]
    sizes = dict(vocab_size=1000, hidden_size=64, num_heads=4, intermediate_size=256, dropout=0.0)
    found = []
    for psm, causal in tqdm(list(itertools.product(PSM_FORMS, (True, False))), unit="model"):
        torch.manual_seed(args.seed)
        if args.checkpoint:
            try:
                model = MaBERT.from_pretrained(args.checkpoint, psm=psm, causal_conv=causal)
            except (OSError, ValueError) as error:
                raise SystemExit(f"--checkpoint: {error}") from error
        else:
            model = MaBERT(MaBERTConfig(psm=psm, causal_conv=causal, **sizes))
        model, config = model.double().eval(), model.config
        rows = sentences(args, config.vocab_size, config.max_position)
        for side, pads in itertools.product(("right", "left"), args.pads):
            case = dict(psm="+".join(psm) or "none", causal=causal, side=side, pads=pads)
            found.append(case | distances(model, rows, pads, side))

    def cells(form, measure):
        values = {(r["causal"], r["side"], r["pads"]): r[measure] for r in found if r["psm"] == form}
        return [" / ".join(f"{values[(*case, pads)]:.0e}" for pads in args.pads) for case in cases]

    forms = list(dict.fromkeys(r["psm"] for r in found))
    what = f"{args.checkpoint}" if args.checkpoint else "random weights (MMT four times, hidden size 64)"
    what += (
        f", {sum(map(len, rows))} {'sentences of ' + args.sentences if args.sentences else 'random rows of 24 tokens'}"
    )
    head = ["PSM stages", *(f"{'causal' if causal else 'centred'}, pads {side}" for causal, side in cases)]
    text = f"{header()}\nWith {' / '.join(map(str, args.pads))} pads, float64; {what}.\n"
    titles = dict(
        tokens="Relative L2 change of the final hidden states of real tokens",
        cls="Cosine distance of the final [CLS] (the paper's Figures 3a and 4)",
        mean="Cosine distance of the mean over real tokens (the paper's Figure 3b)",
    )
    for measure, title in titles.items():
        text += f"\n{title}:\n\n{table(head, [[form, *cells(form, measure)] for form in forms])}\n"
    print(text)
    if args.out:
        summary = dict(command=header().strip(), what=what, distances=found)
        Path(f"{args.out}.md").write_text(text, encoding="utf-8")
        Path(f"{args.out}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        draw_drift(args, found, forms, cases)


def draw_drift(args, found: list[dict], forms: list[str], cases: list[tuple]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(2, len(cases), sharex=True, sharey="row")
    measures = dict(tokens="relative L2, real tokens", cls="cosine distance, [CLS]")
    for (measure, label), line in zip(measures.items(), panels):
        for (causal, side), axes in zip(cases, line):
            for i, form in enumerate(forms):
                values = [r[measure] for r in found if (r["psm"], r["causal"], r["side"]) == (form, causal, side)]
                values = [
                    max(value, 1e-18 if measure == "tokens" else 1e-36) for value in values
                ]  # zero, on a log axis
                axes.plot(args.pads, values, "osv^Dx+"[i] + "-", label=form, lw=1.2, ms=4, alpha=0.8)
            axes.set_yscale("log")
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.grid(alpha=0.3)
            if measure == "tokens":
                axes.set_title(f"{'causal' if causal else 'centred'} convolution, pads {side}", fontsize=9)
            else:
                axes.set_xlabel("pads")
        line[0].set_ylabel(label)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(forms), fontsize=8)
    figure.savefig(f"{args.out}.png", dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# patterns: the paper's Table 1 in small
# ----------------------------------------------------------------------------------------------------------------------

PATTERNS = [unit * (12 // len(unit)) for unit in ("M", "T", "MTT", "TM", "MT", "TMM", "MMT", "TTM")]
CENTRED = "MMT" * 4  # with a centred convolution, one more row
SMALL = """--vocab-size 4096 --hidden-size 64 --num-heads 4 --intermediate-size 256 --d-state 8 --dropout 0
    --length-schedule 64:1 --batch-size 32 --micro-batch-size 32 --bucket --lr 2e-3 --warmup-steps 100""".split()


def pretrain(args, pattern: str, centred: bool, seed: int, profile: bool) -> float:
    """The last held-out loss, in nats, of a run of train_mlm.py, or seconds a step; a finished one is only read."""
    out = Path(args.out, f"{pattern}{'-centred' if centred else ''}-seed{seed}")
    flags = [*SMALL, "--pattern", pattern, "--steps", args.steps, "--seed", seed, "--eval-every", args.steps]
    flags += ["--no-causal-conv"] * centred + ["--cache-dir", Path(args.out, "tokens"), "--out", out]
    flags += ["--data", *args.data, "--sample-by", "paragraph"] if args.data else ["--demo"]
    flags += ["--profile", "10"] if profile else ["--resume"]
    kept = out / ("profile.txt" if profile else "model.pt")
    if not kept.exists():
        command = list(map(str, [sys.executable, Path(__file__).with_name("train_mlm.py"), *flags]))
        threads = {} if profile or args.jobs == 1 else {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
        if profile:
            out.mkdir(parents=True, exist_ok=True)
            kept.write_text(result.stdout)
    if profile:
        return float(re.search(r"tokens: ([\d.]+) s a step", kept.read_text())[1])
    with open(out / "log.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["held_out_loss"])


def bench_patterns(args):
    cases = [(pattern, False) for pattern in args.patterns] + [(CENTRED, True)]
    runs = [(*case, seed) for seed in range(args.seeds) for case in cases]
    # First the step times, alone and in turns: a drifting clock hits all alike. The first run makes the token cache.
    seconds = {run: pretrain(args, *run, profile=True) for run in tqdm(runs, desc="step time", unit="run")}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        losses = pool.map(lambda run: pretrain(args, *run, profile=False), runs)
        losses = dict(zip(runs, tqdm(losses, desc="pretraining", unit="run", total=len(runs))))
    rows = []
    for pattern, centred in cases:
        found = [losses[pattern, centred, seed] for seed in range(args.seeds)]
        step = min(seconds[pattern, centred, seed] for seed in range(args.seeds))
        model = MaBERTForMaskedLM.from_pretrained(Path(args.out, f"{pattern}{'-centred' if centred else ''}-seed0"))
        deviation = f" ± {statistics.stdev(found):.3f}" if args.seeds > 1 else ""
        cells = [f"{statistics.mean(found):.3f}{deviation}", f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"]
        rows.append([f"{pattern}{', centred convolution' if centred else ''}", *cells, f"{1000 * step:.0f}"])
    print(header())
    print(
        f"{args.steps} steps of masked language modelling, 32 rows of 64 tokens, hidden size 64, {args.seeds} seeds.\n"
    )
    print(table(["pattern", "held-out loss, nats", "parameters, M", "ms a step"], rows))


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scan = commands.add_parser("scan", help="time and memory of the selective scan: on the GPU, or on one CPU thread")
    size = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    scan.add_argument("--sizes", type=size, nargs="+", metavar="B,L,D,N")
    scan.add_argument("--runs", type=int, default=7, help="timed runs of each")
    scan.add_argument(
        "--static", action="store_true", help="instead: what the kernels' machine code costs; needs no GPU"
    )
    drift = commands.add_parser("drift", help="what padding does to real tokens, for each form of PSM")
    drift.add_argument(
        "--pads", type=int, nargs="+", default=[0, 1, 8, 64, 512], help="numbers of pads to add to a row"
    )
    drift.add_argument("--checkpoint", help="a folder of train_mlm.py, instead of random weights")
    drift.add_argument(
        "--sentences", metavar="FILE", help="CoLA's dev.tsv, or a text file of lines, instead of random rows"
    )
    drift.add_argument("--count", type=int, default=100, help="rows")
    drift.add_argument("--out", metavar="NAME", help="write NAME.md, NAME.json and NAME.png (needs matplotlib)")
    drift.add_argument("--seed", type=int, default=0)
    patterns = commands.add_parser("patterns", help="a short pretraining of each pattern of the paper's Table 1")
    patterns.add_argument(
        "--data", nargs="+", metavar="PATH", help="text, as train_mlm.py takes it; without, its demo's"
    )
    patterns.add_argument("--patterns", nargs="+", default=PATTERNS)
    patterns.add_argument("--steps", type=int, default=1200)
    patterns.add_argument("--seeds", type=int, default=2)
    patterns.add_argument("--jobs", type=int, default=1, help="runs at the same time, each on its share of the cores")
    patterns.add_argument("--out", default="out/patterns", help="finished runs are kept here, and not run again")
    args = parser.parse_args(argv)
    {"scan": bench_scan, "drift": bench_drift, "patterns": bench_patterns}[args.command](args)


if __name__ == "__main__":
    main(sys.argv[1:])
