"""Measurements, each printed as Markdown under the command, the machine and the versions that made it.

    python bench.py scan             # the masked selective scan beside other ways to compute it, on the GPU or the CPU
    python bench.py scan --static    # the scan's kernels, compiled for A100 and H100: instructions, registers; no GPU
    python bench.py drift            # what padding does to real tokens, for each form of padding-safe masking

Keep a table with a redirection: python bench.py drift > results/drift.md
"""

import argparse
import collections
import concurrent.futures
import importlib.util
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train_mlm.py

import torch
import torch.nn.functional as F
from tqdm import tqdm

import mabert
from mabert import INTERPRETED, MaBERT, MaBERTConfig, selective_scan, triton


def header() -> str:
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        device = f"{model[1] if model else platform.processor() or platform.machine()}, "
        device += f"{torch.get_num_threads()} thread(s)"
    versions = f"torch {torch.__version__}" + (f", triton {triton.__version__}" if triton else "")
    command = " ".join(["python", "bench.py", *sys.argv[1:]])
    return f"`{command}` on {device}, {versions}\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


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


def contenders(names: list[str]) -> list:
    found = []
    for name in names:
        package = {"mamba_ssm": "mamba_ssm", "pscan": "mambapy"}.get(name)
        if package is None or importlib.util.find_spec(package):
            found.append(globals()[name])
        else:
            print(f"{package} is not installed, and not in the comparison", file=sys.stderr)
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


def prepare(run, scan, size):
    """A CUDA graph of a run, its inputs, and the bytes it needs beyond these; None where memory does not suffice."""
    try:
        inputs, dy = scan_inputs(*size, scan, "cuda", torch.bfloat16)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # capture wants a warm-up beside the default stream
            run(scan, inputs, dy)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run(scan, inputs, dy)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(scan, inputs, dy)
        return graph, inputs, dy, peak
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def device_ms(graph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def wall_ms(run, scan, inputs, dy) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(scan, inputs, dy)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


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
    scans, warm_up, rows = contenders(["kernels", "mamba_ssm", "loop", "pscan"]), 3, []
    for size in tqdm(sizes):
        cells = {scan: [] for scan in scans}
        for run in (forward, forward_backward):
            prepared = {scan: prepare(run, scan, size) for scan in scans}
            prepared = {scan: what for scan, what in prepared.items() if what}
            device, wall = ({scan: [] for scan in prepared} for _ in range(2))
            for _ in range(warm_up + args.runs):  # the scans take turns
                for scan, (graph, inputs, dy, _) in prepared.items():
                    device[scan].append(device_ms(graph))
                    wall[scan].append(wall_ms(run, scan, inputs, dy))
            exponentials, memory = bounds_ms(run, *size)
            for scan in scans:
                if scan not in prepared:
                    cells[scan] += ["out of memory", "", ""]
                    continue
                ms, own = (statistics.median(device[which][warm_up:]) for which in (scan, kernels))
                ratios = f"{ms / own:.2f}×, {ms / exponentials:.1f}× exp., {ms / memory:.1f}× memory"
                wall_time, peak = statistics.median(wall[scan][warm_up:]), prepared[scan][3] / 1e6
                cells[scan] += [f"{ms:.3f} ({ratios})", f"{wall_time:.3f}", f"{peak:.0f}"]
            del prepared
            torch.cuda.empty_cache()
        rows += [[str(tuple(size)), scan.__name__, *row] for scan, row in cells.items()]
    print(header())
    print(f"bf16, medians of {args.runs} runs in turns. Device time: replays of a CUDA graph; in brackets its ratio to "
          "that of `kernels`, to the time of the exponentials alone and of the memory traffic alone. Peak memory: "
          "beyond the inputs.\n")  # fmt: skip
    head = [f"{run}, {what}" for run in ("forward", "forward + backward") for what in ("ms", "wall ms", "peak MB")]
    print(table(["(b, l, d, n)", "scan", *head], rows))


# Without a GPU: what the compiler makes of the kernels, read from the machine code.

STATIC_CASES = {  # kernel: TILE, constants. An iteration of a time loop makes TILE · n state updates a lane
    "_outputs": (8, {"starts_ptr": None}),  # saves the chunks' states
    "_ends": (8, {"ADJOINT": False, "z_ptr": None}),
    "_ends (adjoint)": (4, {"ADJOINT": True}),
    "_gradients": (4, {"starts_ptr": None}),
}


def compile_kernel(name: str, arch: int, dtype: str) -> bytes:
    """The machine code (cubin) of a kernel for d 1536, n 16, softplus and z, as the base model calls it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile, constants = STATIC_CASES[name]
    kernel = getattr(mabert, name.split()[0])
    sizes = dict(d=1536, n=16, u_row=1536, v_row=1536, dy_row=1536, delta_row=1536, z_row=3072)
    sizes |= dict(SOFTPLUS=True, SIGN=1, CHUNK=64, TILE=tile, **constants)
    constexprs = {argument: value for argument, value in sizes.items() if argument in kernel.arg_names}
    half = ["u_ptr", "v_ptr", "delta_ptr", "z_ptr", "y_ptr", "dy_ptr", "du_ptr", "ddelta_ptr", "dz_ptr"]
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
    updates = STATIC_CASES[name][0] * 16
    count = lambda *ops: sum(loop[op] for loop in loops for op in loop if op.startswith(ops)) / updates  # noqa: E731
    each = [loop.total() / updates for loop in loops]
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
          "_outputs saves states for the backward pass, _gradients has two loops, replay and reverse.\n")  # fmt: skip
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
    scan = commands.add_parser("scan", help="time and memory of the selective scan: on the GPU, or on one CPU thread")
    size = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    scan.add_argument("--sizes", type=size, nargs="+", metavar="B,L,D,N")
    scan.add_argument("--runs", type=int, default=7, help="timed runs of each")
    scan.add_argument(
        "--static", action="store_true", help="instead: what the kernels' machine code costs; needs no GPU"
    )
    drift = commands.add_parser("drift", help="what padding does to real tokens, for each form of PSM")
    drift.add_argument("--pads", type=int, nargs="+", default=[4, 16, 64], help="numbers of pads to add to a row")
    drift.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    {"scan": bench_scan, "drift": bench_drift}[args.command](args)


if __name__ == "__main__":
    main(sys.argv[1:])
