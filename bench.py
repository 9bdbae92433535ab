"""Measurements, each printed as Markdown under the command, the machine and the versions that made it.

    python bench.py scan             # the masked selective scan beside other ways to compute it, on the GPU or the CPU
    python bench.py scan --static    # its two main kernels, compiled for an H100: instructions, registers; no GPU
    python bench.py efficiency       # memory, latency and training time of MaBERT and its peers, beside the paper's
    python bench.py drift            # what padding does to real tokens, for each form of padding-safe masking
    python bench.py patterns         # does interleaving help? A short pretraining of Table 1's patterns, and others
    python bench.py study psm        # what padding-safe masking is worth in pretraining; also: budgets, sizes
    python bench.py recall           # which layers find the value of a key, among how many and how far away

Keep a table with a redirection, python bench.py scan > results/scan.md; efficiency and drift write their tables, JSON
and a figure with --out NAME, study and recall into their folder.
"""

import argparse
import bisect
import collections
import contextlib
import csv
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import train_mlm  # before torch, which reads OpenMP's settings when it loads
from train_mlm import bounded, describe_machine, load_tokenizer, write_atomically

# isort: split
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import mabert
from mabert import MaBERT, MaBERTConfig, MaBERTForMaskedLM, MaBERTForSequenceClassification, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def header(device: str = "cpu") -> str:
    return f"`{shlex.join(['python', 'bench.py', *sys.argv[1:]])}` on {describe_machine(device)}\n"


def table(head: list, rows: list[list]) -> str:
    return "\n".join(
        f"| {' | '.join(map(str, cells))} |" for cells in [head, ["---"] * len(head), *rows]
    )


def check_out(name: str | None):
    """Before the work: can NAME.md, NAME.json and NAME.png be written?"""
    if name:
        import matplotlib  # noqa: F401

        if name.endswith("/"):
            raise SystemExit(f"--out: {name} is a folder; it must be the beginning of file names")
        try:
            tempfile.TemporaryFile(dir=Path(name).parent).close()
        except OSError as error:
            raise SystemExit(f"--out: cannot write {name}.md: {error.strerror}") from error


def write_results(
    name: str, text: str, panels: dict[str, dict[str, dict]], x_label: str, y_scale="log"
):
    """NAME.md; NAME.json, {title: {label: {x: y}}}; and NAME.png, a panel for each title, without text and zeros. Where
    y is linear, numbers on the x axis are logarithmic; else values of x stand side by side."""
    from matplotlib.figure import Figure

    write_atomically(Path(f"{name}.md"), text)
    write_atomically(
        Path(f"{name}.json"), json.dumps(dict(made=text.split("\n")[0]) | panels, indent=1) + "\n"
    )
    columns = min(4, len(panels))
    rows = len(panels) // columns
    figure = Figure(figsize=(1 + 3 * columns, 2 + 2.4 * rows), layout="constrained")
    grid = figure.subplots(
        rows, columns, squeeze=False, sharey="row" if rows > 1 or y_scale == "linear" else "none"
    )
    for axes, (title, lines) in zip(grid.flat, panels.items()):
        for i, (label, points) in enumerate(lines.items()):
            y = [math.nan if isinstance(x, str) else x or math.nan for x in points.values()]
            x = [x if y_scale == "linear" else str(x) for x in points]
            width = max(1, 5 - 0.7 * i)  # lines that coincide show
            axes.plot(x, y, marker="osv^Dp*XPh<>"[i], lw=width, ms=4, alpha=0.8, label=label)
        if not isinstance(x[0], str):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yscale(y_scale)
        axes.set_title(title, fontsize=9)
    where = dict(loc="outside lower center", ncols=7, fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), title=f"x: {x_label}", **where)
    figure.savefig(f"{name}.png", dpi=120)


# ---- measuring: a number, or as text the reason why there is none ----


def attempt(function, *args):
    """What it returns; or what a cell says of its failure. A process that takes too much memory is killed by Linux."""
    try:
        return function(*args)
    except Exception as error:
        kind, text = type(error).__name__, str(error).strip()
        no_memory = re.search(
            "MemoryError|BrokenProcessPool|out of memory|allocate memory", f"{kind} {text}"
        )
        return "out of memory" if no_memory else (text or kind).split("\n")[0]


def alone(function, *args):
    """attempt(function, *args, device), on a CPU in a process of its own."""
    if args[-1] == "cuda":
        return attempt(function, *args)
    with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
        return attempt(pool.submit(function, *args).result)


def wall_ms(call, *args) -> float:
    start = timer()  # it waits for a GPU
    call(*args)
    return (timer() - start) * 1e3


def in_turns(calls: dict, rounds: int, seconds: float) -> dict[tuple, float | str]:
    """Of each call, which returns milliseconds, their median or why it failed. The calls take turns, so that a drifting
    clock hits all alike. The first rounds compile, find the batch that fits, and do not count: a sixth, two at least.
    When the seconds are over, five rounds suffice."""
    times, end = {key: [] for key in calls}, timer() + seconds
    for done in range(1, rounds + 1):
        for key in [key for key in calls if isinstance(times[key], list)]:
            value = attempt(calls[key])
            times[key] = value if isinstance(value, str) else [*times[key], value]
            if isinstance(value, str):
                tqdm.write(f"{', '.join(map(str, key))}: {value}", file=sys.stderr)
        if done >= 5 and timer() > end:
            break
    count = max(2, done // 6)
    return {
        key: x if isinstance(x, str) else statistics.median(x[count:]) for key, x in times.items()
    }


def most_memory(call, device: str) -> int:
    """Bytes that call() takes at most: of tensors on a GPU, else of this process (on Linux)."""

    def peak() -> int:
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    release()
    torch.cuda.reset_peak_memory_stats() if device == "cuda" else Path(
        "/proc/self/clear_refs"
    ).write_text("5")
    before = peak()  # what there is now
    call()
    return peak() - before


def release():
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


# ---- scan: time and memory of the selective scan ----


def mamba_ssm(u, delta, A, B, C, D, z, bias):
    """mamba-ssm's CUDA kernel. Its layout is channel-first, so `scan_inputs` lays memory out for it: no copies here."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
    return selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True).transpose(1, 2)


def pscan(u, delta, A, B, C, D, z, bias):
    """mambapy's parallel scan, called as its Mamba block does."""
    from mambapy.pscan import pscan

    delta = F.softplus(delta + bias)
    a, x = torch.exp(delta[..., None] * A), delta[..., None] * B[:, :, None] * u[..., None]
    return ((pscan(a, x) @ C.to(x.dtype)[..., None]).squeeze(3) + D * u) * F.silu(z)


SCANS = {  # each (u, delta, A, B, C, D, z, delta_bias) -> y as the model calls it, softplus and gate included
    "kernels": functools.partial(mabert.selective_scan, delta_softplus=True, backend="triton"),
    "loop": functools.partial(mabert.selective_scan, delta_softplus=True, backend="loop"),
    "reference": functools.partial(mabert.reference_scan, delta_softplus=True),
    "mamba_ssm": mamba_ssm,
    "pscan": pscan,
}


def run_scan(name: str, inputs: list, dy: torch.Tensor | None = None) -> list[torch.Tensor]:
    """y; given its gradient, also those of the inputs."""
    with torch.set_grad_enabled(dy is not None):
        y = SCANS[name](*inputs)
        return [y] if dy is None else [y, *torch.autograd.grad(y, inputs, dy)]


def scan_inputs(name: str, size: tuple, device: str) -> tuple[list, torch.Tensor]:
    """The inputs of a scan, and a gradient of y."""
    torch.manual_seed(0)
    (b, l, d, n), dtype = size, torch.bfloat16 if device == "cuda" else torch.float32
    rows = [torch.randn(b, l, width, device=device).to(dtype) for width in (d, d, d, d, n, n)]
    if name == "mamba_ssm":
        rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in rows]
    u, delta, z, dy, B, C = rows
    A = -torch.arange(1.0, n + 1, device=device).expand(d, n).clone()
    D, bias = torch.randn(d, device=device), torch.full((d,), -4.0, device=device)
    return [x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias)], dy


def scan_error(name: str, device: str) -> str:
    """How far y and the gradients are from the formula in float64, relative to their norms, at most."""
    inputs, dy = scan_inputs(name, (2, 300, 1536, 16), device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    pairs = zip(run_scan(name, inputs, dy), run_scan("reference", exact, dy.double()))
    return f"{torch.stack([(x - y).norm() / y.norm() for x, y in pairs]).max():.0e}"


def scan_memory(name: str, size: tuple, device: str) -> int:
    """MB that forward and backward need beyond the inputs."""
    torch.set_num_threads(1)
    run_scan(name, *scan_inputs(name, (1, 4, 8, 2), device))  # loads what first calls load
    inputs = scan_inputs(name, size, device)
    return round(most_memory(lambda: run_scan(name, *inputs), device) / 1e6)


PASSES = ("forward", "forward + backward")


def scan_times(names: list[str], size: tuple, device: str) -> dict[tuple, float | str]:
    """Medians, by name and PASSES."""
    inputs = functools.cache(lambda name: scan_inputs(name, size, device))
    clock = (
        functools.partial(triton.testing.do_bench_cudagraph, return_mode="median")
        if device == "cuda"
        else wall_ms
    )

    def ms(name: str, passes: str) -> float:
        values, dy = inputs(name)
        return clock(lambda: run_scan(name, values, dy if "backward" in passes else None))

    keys = itertools.product(names, PASSES)
    return in_turns(
        {key: functools.partial(ms, *key) for key in keys},
        rounds=7,
        seconds=5 if device == "cuda" else 60,
    )


def bounds(b: int, l: int, d: int, n: int) -> list[list]:
    """Rows of what a GPU needs for the exponentials alone, one a state update forward and two more backward, 16 a cycle
    and multiprocessor; and for the memory traffic alone, in bf16: u, delta, z and y, backward also dy, the first three
    again and their gradients."""
    gpu = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    update = (
        b * l * d * n / (16 * gpu["multiprocessor_count"] * gpu["sm_clock_rate"])
    )  # ms, since the clock is in kHz
    tensor = 2 * b * l * d / (triton.testing.get_dram_gbps() * 1e6)
    rows = (
        ("exponentials alone", update, 3 * update),
        ("memory traffic alone", 4 * tensor, 11 * tensor),
    )
    return [[name, "", f"{forward:.3g}", f"{both:.3g}", ""] for name, forward, both in rows]


def bench_scan(args):
    if args.static or args.all:
        return bench_static(args)
    torch.set_num_threads(1)
    device, names, shapes = DEVICE, ["loop", "reference", "pscan"], [(8, 128), (1, 1024)]
    if device == "cuda":
        names = ["kernels", "mamba_ssm", "pscan"]
        shapes = [(32, 128), (32, 512), (32, 4096), (8, 512), (1, 512), (1, 4096), (1, 16384)]
    print(f"""{header(device)}
Error: the largest of y and the gradients, relative to the formula in float64. Times: medians, in turns, of float32 on a
CPU and bf16 on a GPU, there of a CUDA graph's replays, without the gaps between launches; in brackets the ratio to
`{names[0]}`. Forward: without gradients. Peak memory: of forward and backward, beyond the inputs.""")
    errors = {name: attempt(scan_error, name, device) for name in names}
    for size in tqdm(args.sizes or [(b, l, 1536, 16) for b, l in shapes], unit="size"):
        times, rows = scan_times(names, size, device), []
        for name in names:
            rows.append([name, errors[name]])
            for passes in PASSES:
                found, first = times[name, passes], times[names[0], passes]
                ratio = (
                    f" ({found / first:.2f}×)"
                    if isinstance(found, float) and isinstance(first, float)
                    else ""
                )
                rows[-1].append(found if isinstance(found, str) else f"{found:.3g}{ratio}")
            rows[-1].append(alone(scan_memory, name, size, device))
        head = [
            f"(b, l, d, n) = {size}",
            "error",
            "forward, ms",
            "forward + backward, ms",
            "peak memory, MB",
        ]
        tqdm.write(
            "\n" + table(head, rows + (bounds(*size) if device == "cuda" else [])), sys.stdout
        )


# ---- without a GPU: what the compiler makes of the kernels, read from the machine code ----

STATIC_CASES = {  # kernel: constants
    "_pack": dict(TILE=8),
    "_segment_ends": dict(TILE=8, z_ptr=None),
    "_segment_ends (backward)": dict(TILE=4, BACKWARD=True),
    "_segment_starts": dict(TILE=8),
    "_outputs": dict(TILE=8),  # from start states, and keeping the chunks' states
    "_gradients": dict(TILE=4),
}
TARGETS = list(itertools.product(("sm_80", "sm_90"), ("bf16", "fp32")))


def compile_kernel(name: str, arch: str, dtype: str) -> bytes:
    """The machine code (cubin) of a kernel for d 1536, n 16, softplus and z, as the base model calls it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(mabert, name.split()[0])
    values = dict(
        d=1536, n=16, N=16, u_row=1536, v_row=1536, dy_row=1536, delta_row=1536, z_row=3072
    )
    values |= (
        dict(SOFTPLUS=True, SIGN=1, CHUNK=mabert._chunk(16), BACKWARD=False) | STATIC_CASES[name]
    )
    constants = {name: values[name] for name in kernel.arg_names if name in values}
    half = "u_ptr v_ptr delta_ptr z_ptr y_ptr dy_ptr du_ptr ddelta_ptr dz_ptr B_ptr C_ptr".split()
    kinds = {
        name: f"*{dtype if name in half else 'fp32'}" if "_ptr" in name else "i32"
        for name in kernel.arg_names
    }
    signature = kinds | dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind[0] == "*"
    }
    source, options = (
        ASTSource(kernel, signature, constants, aligned),
        {"num_warps": 1, "enable_fp_fusion": True},
    )
    return triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options).asm[
        "cubin"
    ]


def static_row(case: tuple) -> list:
    """A row of the table: registers and stack bytes of a kernel, and of its innermost loops the instructions, all,
    exponentials and the like, and shuffles, per state update and lane."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(compile_kernel(*case))
        command = [
            triton.knobs.nvidia.cuobjdump.path,
            "--dump-resource-usage",
            "--dump-sass",
            file.name,
        ]
        listing = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    line = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);"
    code = [(int(address, 16), op, rest) for address, op, rest in re.findall(line, listing)]
    jumps = [
        (int(re.search(r"0x([0-9a-f]+)", rest)[1], 16), at) for at, op, rest in code if op == "BRA"
    ]
    loops = [(start, end) for start, end in jumps if start < end]
    inner = [
        (start, end) for start, end in loops if not any(start < other < end for _, other in loops)
    ]
    updates = STATIC_CASES[case[0]]["TILE"] * (
        1 if case[0] == "_segment_starts" else 16
    )  # of an iteration, in a lane
    row = [*case, *(re.search(rf"{key}:(\d+)", listing)[1] for key in ("REG", "STACK"))]
    for kind in ("", "MUFU", "SHFL"):
        counts = [
            sum(s <= at <= e and op.startswith(kind) for at, op, _ in code) / updates
            for s, e in inner
        ]
        each = (
            " + ".join(f"{count:.2f}" for count in counts) + " = "
            if len(counts) > 1 and not kind
            else ""
        )
        row.append(f"{each}{sum(counts):.2f}")
    return row


def bench_static(args):
    if not triton or mabert.INTERPRETED:
        raise SystemExit(
            "--static needs the package triton (on Linux), and no TRITON_INTERPRET in the environment"
        )
    kernels, targets = (
        (STATIC_CASES, TARGETS) if args.all else (("_outputs", "_gradients"), [("sm_90", "bf16")])
    )
    cases = [(kernel, *target) for kernel in kernels for target in targets]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(static_row, cases), total=len(cases)))
    print(header())
    print("Compiled, not run: d 1536, n 16, softplus, D, z. Instructions of the time loops per state update and lane; "
          "_outputs keeps states for the backward pass, _gradients has two loops, replay and reverse.\n")  # fmt: skip
    head = "kernel, architecture, inputs, registers, stack bytes, instructions, exponential pipe, shuffles".split(
        ", "
    )
    print(table(head, rows))


# ---- efficiency: the paper's Tables B5 to B7 and Figure 5 ----

MEASURES = {
    "memory": "Table B5: peak memory, MiB (one forward pass at batch 1, weights included)",
    "training": "Table B6: training time, ms (one optimizer step)",
    "latency": "Table B7: latency, ms (one forward pass at batch 1)",
}
PAPER_LENGTHS = (128, 512, 1024, 2048, 4096)
PAPER = {  # on an A100
    ("BERT", "memory"): (441.364, 454.748, 471.274, 507.313, 579.392),
    ("BERT", "training"): (42.372, 189.501, 487.204, 1451.200, 4894.397),
    ("BERT", "latency"): (5.220, 5.331, 5.702, 15.122, 43.424),
    ("ALBERT", "memory"): (70.649, 90.971, 117.992, 173.382, 283.109),
    ("ALBERT", "training"): (50.941, 225.783, 545.223, 1491.872, 4662.279),
    ("ALBERT", "latency"): (6.140, 6.217, 6.692, 17.994, 48.749),
    ("Longformer", "memory"): (602.629, 652.634, 709.375, 828.660, 1066.699),
    ("Longformer", "training"): (834.994, 838.428, 1709.029, 3466.178, 6985.296),
    ("Longformer", "latency"): (36.794, 36.866, 38.420, 42.468, 55.676),
    ("BigBird", "memory"): (507.797, 551.183, 662.196, 1115.224, 2885.278),
    ("BigBird", "training"): (60.710, 263.221, 658.337, 1993.710, 6430.660),
    ("BigBird", "latency"): (7.921, 7.948, 8.059, 23.378, 67.887),
    ("DeBERTa-v3", "memory"): (742.110, 825.994, 1047.506, 1908.529, 5262.076),
    ("DeBERTa-v3", "training"): (74.079, 371.969, 1151.794, 4251.722, 16136.670),
    ("DeBERTa-v3", "latency"): (13.737, 14.038, 17.456, 57.592, 206.592),
    ("MaBERT", "memory"): (808.787, 841.846, 923.875, 1238.917, 2445.003),
    ("MaBERT", "training"): (64.117, 240.334, 516.242, 1240.849, 3319.429),
    ("MaBERT", "latency"): (9.160, 9.193, 9.263, 13.914, 34.703),
}

# The models. Those of transformers: its name for the class, and what of the published config differs from its defaults.
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
DEBERTA = dict(vocab_size=128100, type_vocab_size=0, relative_attention=True, position_buckets=256)
DEBERTA |= dict(
    norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], layer_norm_eps=1e-7
)
DEBERTA |= dict(
    position_biased_input=False, pooler_dropout=0, pooler_hidden_act="gelu", pooler_hidden_size=768
)
TRANSFORMERS = {
    "BERT": ("Bert", {}),
    "ALBERT": ("Albert", BASE),
    "Longformer": (
        "Longformer",
        dict(vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1),
    ),
    "BigBird": ("BigBird", {}),
    "DeBERTa-v3": ("DebertaV2", BASE | DEBERTA),
    "ModernBERT": ("ModernBert", dict(reference_compile=False, attn_implementation="sdpa")),
}
BASELINES = list(TRANSFORMERS)[:5]  # the paper's
OURS = {
    "MaBERT": {},
    "MaBERT-211M": dict(
        expand=8
    ),  # the paper's has 205.3 M parameters, the additional ones for "SSM capacity"
    "T12": dict(pattern="T" * 12),  # the pattern alone: pre-LN, so not BERT
    "M12": dict(pattern="M" * 12),
    "MW6": dict(pattern="MW" * 6),
    "H12": dict(pattern="H" * 12),
}
MODELS = [*TRANSFORMERS, *OURS]
SETTINGS = {
    "plain": None,
    "compiled": "default",
    "CUDA graphs": "reduce-overhead",
}  # modes of torch.compile
PAPER_ATTENTION = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
PROTOCOL = {  # lengths, rows of an optimizer step, rounds (100 after a warm-up of 20, as in the paper), seconds
    "cuda": ([*PAPER_LENGTHS, 8192, 16384], 32, 120, 600),
    "cpu": ([128, 512, 1024], 1, 7, 60),
}


def build(name: str, length: int, device: str = "cpu") -> torch.nn.Module:
    """A two-label classifier with random weights for rows of up to length tokens."""
    if name in OURS:
        config, model_class, positions = (
            MaBERTConfig(**OURS[name]),
            MaBERTForSequenceClassification,
            "max_position",
        )
    else:
        import transformers

        transformers.logging.set_verbosity_error()  # no notes on how it pads
        family, changes = TRANSFORMERS[name]
        config = getattr(transformers, f"{family}Config")(**changes)
        model_class, positions = (
            getattr(transformers, f"{family}ForSequenceClassification"),
            "max_position_embeddings",
        )
        length += -length % 64 + 2 * (
            name == "Longformer"
        )  # BigBird: whole blocks of 64; Longformer: from 2 on
    setattr(config, positions, max(getattr(config, positions), length))
    with torch.device(device):
        return model_class(config)


class Contender:
    """A model and its optimizer, with the two runs that are timed, under a setting."""

    def __init__(
        self, name: str, length: int, device: str, batch_size=1, settings=("plain",), flash=False
    ):
        self.model, self.flash = build(name, length, device), flash
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        compiled = functools.partial(torch.compile, self.model, dynamic=False)
        self.calls = {
            key: compiled(mode=SETTINGS[key]) if SETTINGS[key] else self.model for key in settings
        }
        self.rows = torch.randint(
            5, self.model.config.vocab_size, (batch_size, length), device=device
        )
        self.at_once = dict.fromkeys(settings, batch_size)

    def run(self, setting: str, rows: torch.Tensor, **labels):
        """bf16 autocast on a GPU, float32 weights; their copies in bf16 are kept only where training needs them twice.
        The mask of ones is what a tokenizer gives; FlashAttention knows no mask. Without it, the paper's kernels."""
        call, mask = self.calls[setting], None if self.flash else torch.ones_like(rows)
        kernels = (
            sdpa_kernel(PAPER_ATTENTION)
            if rows.is_cuda and not self.flash
            else contextlib.nullcontext()
        )
        if self.model.training != bool(labels):
            self.model.train(bool(labels))
        if setting == "CUDA graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with (
            torch.autocast(
                rows.device.type, torch.bfloat16, rows.is_cuda, cache_enabled=bool(labels)
            ),
            kernels,
        ):
            return call(input_ids=rows, attention_mask=mask, **labels)

    @torch.no_grad()
    def latency(self, setting: str):
        self.run(setting, self.rows[:1])

    def training(self, setting: str):
        """An optimizer step; where memory does not suffice for the batch, it is accumulated from now on."""
        try:
            for rows in self.rows.split(self.at_once[setting]):
                labels, share = rows.new_zeros(len(rows)), len(rows) / len(self.rows)
                (
                    self.run(setting, rows, labels=labels).loss * share
                ).backward()  # without a name, so it is freed
            return self.optimizer.step()
        except torch.OutOfMemoryError:
            self.optimizer.state.clear()  # which may be half made
            if self.at_once[setting] == 1 or setting == "CUDA graphs":  # which cannot accumulate
                raise
        finally:
            self.optimizer.zero_grad()
        self.at_once[setting] //= 2
        release()
        self.training(setting)


def forward_memory(name: str, length: int, device: str) -> float:
    """MiB that a model and one forward pass of it take at most, alone on the device."""
    build(name, length, "meta")  # imports what it needs
    tiny = MaBERTConfig(hidden_size=16, num_heads=2, intermediate_size=16, pattern="MT")
    with torch.device(device):
        MaBERTForSequenceClassification(tiny)(
            torch.zeros(1, 1, dtype=torch.long)
        )  # takes what first calls take
    return most_memory(lambda: Contender(name, length, device).latency("plain"), device) / 2**20


def measure(length: int, args, cells: dict, notes: dict):
    """Adds to the cells of each measure and model its value (of all settings, the fastest) or why there is none."""
    torch._dynamo.config.recompile_limit = 1000  # the models of one class share it
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    names = args.models
    if not args.fastest:
        for name in args.models:
            cells["memory"][name][length] = alone(forward_memory, name, length, args.device)
        names = [name for name in names if cells["memory"][name][length] != "out of memory"]
    how = (
        length,
        args.device,
        args.batch_size,
        args.settings,
        args.fastest and args.device == "cuda",
    )
    contender = functools.cache(lambda name: Contender(name, *how))  # made when it is first called
    for what in ("latency", "training"):
        keys = itertools.product(names, args.settings)
        calls = {
            key: lambda key=key, what=what: wall_ms(getattr(contender(key[0]), what), key[1])
            for key in keys
        }
        times = in_turns(calls, args.rounds, args.seconds)
        for name in args.models:
            own = {
                setting: times.get((name, setting), "out of memory") for setting in args.settings
            }
            best = min(
                own,
                key=lambda setting: own[setting] if isinstance(own[setting], float) else math.inf,
            )
            cells[what][name][length] = own[best]
            notes[what, name, length] += [best] * args.fastest
            if (
                isinstance(own[best], float)
                and (rows := contender(name).at_once[best]) < args.batch_size
            ):
                notes[what, name, length].append(
                    f"{math.ceil(args.batch_size / rows)} × {rows} rows"
                )
    torch.compiler.reset()


def layer_flops(letter: str, length: int) -> int:
    """Floating-point operations of a forward pass of a row through a layer of the base model: what PyTorch counts, and
    7 for each update of the scan's state: Δ A, exp, times Δ u and B, a fused multiply-add, another with C."""
    config = MaBERTConfig()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        mabert.LAYERS[letter](config)(torch.zeros(1, length, config.hidden_size))
    updates = length * config.expand * config.hidden_size * config.d_state
    return counter.get_total_flops() + 7 * updates * (letter == "M")


def paper_value(model: str, measure: str, length: int) -> float | None:
    return dict(zip(PAPER_LENGTHS, PAPER.get((model, measure), ()))).get(length)


def ratios(values: dict[str, float | str | None], over: str) -> dict[str, float]:
    """What a model takes over what MaBERT takes; and the mean of the paper's baselines: the headline of the paper."""
    values = {name: value for name, value in values.items() if isinstance(value, float)}
    found = {name: value / values[over] for name, value in values.items() if over in values}
    means = {
        "mean of the paper's baselines": BASELINES,
        "the same without DeBERTa-v3": BASELINES[:-1],
    }
    means = {what: names for what, names in means.items() if found.keys() >= {*names}}
    return found | {
        what: statistics.mean(found[name] for name in names) for what, names in means.items()
    }


def shown(value: float | str, *notes: float | str | None) -> str:
    """A value of a table or a dash; in brackets why there is none, and notes."""
    value, *notes = ("–", value, *notes) if isinstance(value, str) else (value, *notes)
    value, *notes = (
        x if isinstance(x, str) else f"{x:.0f}" if x >= 100 else f"{x:.2f}"
        for x in (value, *notes)
        if x
    )
    return f"{value} ({'; '.join(notes)})" if notes else value


def efficiency_text(cells: dict, notes: dict, parameters: dict[str, int], args) -> str:
    how = (
        "bf16 autocast, float32 weights"
        if args.device == "cuda"
        else "float32 on a CPU, PyTorch's fused attention"
    )
    setting = (
        "each model's fastest setting"
        if args.fastest
        else "neither torch.compile nor, on a GPU, FlashAttention"
    )
    text = f"""{header(args.device)}
{how}; {setting}.
Medians of {args.rounds - max(2, args.rounds // 6)} runs in turns, or at least 3, if those took over {args.seconds:g} s.
In brackets the paper's figures, from an A100, 32 rows in an optimizer step; its MaBERT has 205.3 M parameters. T12,
M12, MW6 and H12 are MaBERT with other patterns (T12 is pre-LN, so not BERT).
"""
    columns = {}
    for measure, models in cells.items():
        rows = []
        for name, values in models.items():
            own = (
                shown(x, paper_value(name, measure, l), *notes[measure, name, l])
                for l, x in values.items()
            )
            rows.append([name, f"{parameters[name] / 1e6:.1f}", *own])
        title = MEASURES[measure].replace(
            "optimizer step", f"optimizer step, batch {args.batch_size}"
        )
        text += f"\n{title}:\n\n{table(['model', 'parameters, M', *values], rows)}\n"
        length = 4096 if 4096 in values else max(values)
        paper = ratios({name: paper_value(name, measure, length) for name in MODELS}, "MaBERT")
        for over in (name for name in models if name.startswith("MaBERT")):
            own = ratios({name: values[length] for name, values in models.items()}, over)
            columns[f"{measure} ÷ {over}"] = {
                name: shown(value, paper.get(name)) for name, value in own.items()
            }
    names = dict.fromkeys(itertools.chain(*columns.values()))
    rows = [[name, *(column.get(name, "–") for column in columns.values())] for name in names]
    if rows:
        text += f"\nRatios at {length} tokens; above 1, MaBERT takes less:\n\n{table(['model', *columns], rows)}\n"
    more = (
        bisect.bisect(
            range(1, 2**16), False, key=lambda l: layer_flops("T", l) > layer_flops("M", l)
        )
        + 1
    )
    return f"{text}\nFrom {more} tokens on, a T layer of the base model takes more operations than an M layer.\n"


def bench_efficiency(args):
    if args.device == "cuda" and DEVICE == "cpu":
        raise SystemExit(
            "--device cuda: PyTorch sees no GPU here; --device cpu has a smaller measurement"
        )
    check_out(args.out)
    lengths, args.batch_size, args.rounds, seconds = PROTOCOL[args.device]
    args.lengths = args.lengths or [
        length for length in lengths if not args.fastest or length in (512, 4096)
    ]
    args.seconds = args.seconds or seconds
    args.settings = list(SETTINGS)[: (3 if args.device == "cuda" else 2) if args.fastest else 1]
    parameters = {
        name: sum(p.numel() for p in build(name, 512, "meta").parameters()) for name in args.models
    }
    cells = {what: {name: {} for name in args.models} for what in list(MEASURES)[args.fastest :]}
    notes = collections.defaultdict(list)
    for length in tqdm(sorted(args.lengths), unit="length"):
        measure(length, args, cells, notes)
        release()
        text = efficiency_text(cells, notes, parameters, args)
        if args.out:  # after every length, so that a run that is stopped has what it measured
            write_results(args.out, text, cells, x_label="tokens")
    print(text)


# ---- drift: what padding does to real tokens (the question of the paper's Figures 3 and 4) ----

PSM_FORMS = ("none", "post", "pre", "pre+post", "scan", "pre+scan", "pre+scan+post")
ROWS = 100
DRIFTS = dict(
    tokens_l2="Relative L2 change of the final hidden states of real tokens",
    cls_cosine="Cosine distance of the final [CLS] (the paper's Figures 3a and 4)",
    mean_cosine="Cosine distance of the mean over real tokens (the paper's Figure 3b)",
)


def sentences(args, config: MaBERTConfig) -> list[torch.Tensor]:
    """Token ids of --sentences, or random ones, a row each, by length; no pads."""
    if not args.sentences:
        return list(torch.randint(5, config.vocab_size, (ROWS, 24)))
    try:
        lines = Path(args.sentences).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--sentences: cannot read {args.sentences}: {error}") from error
    texts = [line.split("\t")[-1].strip() for line in lines]  # CoLA's dev.tsv has the sentence last
    texts = [text for text in texts if text][:ROWS]
    if not texts:
        raise SystemExit(f"--sentences: {args.sentences} has no text")
    if args.checkpoint:
        tokenizer = load_tokenizer(str(Path(args.checkpoint, "tokenizer.json")))
        rows = [tokenizer.encode(text).ids for text in texts]
    else:  # without a tokenizer, words are told apart, no more
        rows = [
            [5 + zlib.crc32(word.encode()) % (config.vocab_size - 5) for word in text.split()]
            for text in texts
        ]
    return [torch.tensor(row[: config.max_position]) for row in sorted(rows, key=len)]


def distances(
    model: MaBERT, rows: list[torch.Tensor], unpadded: list[torch.Tensor], pads: int, side: str
) -> list:
    """How far the real tokens' states are from those without pads, in the order of DRIFTS, as means over the rows; all
    rows are one batch, in which the longest has so many pads. Cosine distances are without cancellation."""
    lengths, found = [len(row) for row in rows], []
    mask = torch.arange(pads + max(lengths)) < torch.tensor(lengths)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    ids = torch.full(mask.shape, model.config.pad_token_id).masked_scatter(mask, torch.cat(rows))
    for x, y in zip(unpadded, model(ids, mask)[mask].split(lengths)):  # (l, h)
        vectors = [
            F.normalize(torch.stack(pair), dim=1) for pair in ((x[0], y[0]), (x.mean(0), y.mean(0)))
        ]
        found.append([(y - x).norm() / x.norm(), *((a - b).square().sum() / 2 for a, b in vectors)])
    return torch.tensor(found).mean(0).tolist()


@torch.no_grad()
def bench_drift(args):
    """Figures 3 and 4 of the paper, for every form of PSM, side of the pads and kind of convolution."""
    check_out(args.out)
    torch.manual_seed(0)
    sizes = dict(vocab_size=1000, hidden_size=64, num_heads=4, intermediate_size=256)
    try:
        base = (
            MaBERT.from_pretrained(args.checkpoint)
            if args.checkpoint
            else MaBERT(MaBERTConfig(**sizes))
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"--checkpoint: {error}") from error
    rows = sentences(args, base.config)
    cases = ["causal, pads right", "causal, pads left", "centred, pads right", "centred, pads left"]
    found = {
        f"{measure}, {case}": {form: {} for form in PSM_FORMS}
        for measure in DRIFTS
        for case in cases
    }
    for form, conv in tqdm(list(itertools.product(PSM_FORMS, ("causal", "centred"))), unit="model"):
        config = dataclasses.replace(
            base.config, psm=train_mlm.psm_stages(form), causal_conv=conv == "causal"
        )
        model = MaBERT(config).double().eval()
        model.load_state_dict(base.state_dict())
        unpadded = [
            x for _, alike in itertools.groupby(rows, len) for x in model(torch.stack(list(alike)))
        ]
        for side, pads in itertools.product(("right", "left"), args.pads):
            for measure, value in zip(DRIFTS, distances(model, rows, unpadded, pads, side)):
                found[f"{measure}, {conv}, pads {side}"][form][pads] = value
    weights = "random weights (MMT four times, hidden size 64)"
    if args.checkpoint:
        conv, psm = (
            "causal" if base.config.causal_conv else "centred",
            "+".join(base.config.psm) or "none",
        )
        weights = f"{args.checkpoint}, {base.config.pattern} pretrained with PSM {psm} and a {conv} convolution"
    source = f"sentences of {args.sentences}" if args.sentences else "random rows of 24 tokens"
    pads = " / ".join(map(str, args.pads))
    text = f"{header()}\nWith {pads} pads in the longest row, float64; {weights}, {len(rows)} {source}.\n"
    for measure, title in DRIFTS.items():
        forms = {
            form: [found[f"{measure}, {case}"][form].values() for case in cases]
            for form in PSM_FORMS
        }
        cells = [
            [form, *(" / ".join(f"{x:.0e}" for x in values) for values in row)]
            for form, row in forms.items()
        ]
        text += f"\n{title}:\n\n{table(['PSM stages', *cases], cells)}\n"
    print(text)
    if args.out:
        write_results(args.out, text, found, x_label="pads of the longest row; zero is not drawn")


# ---- patterns: the paper's Table 1 in small ----

PATTERNS = [
    unit * (12 // len(unit)) for unit in "M T MTT TM MT TMM TTM MMMTMM W H MMT MWT MW".split()
]
CAUSAL_TOO = PATTERNS[-3:]  # the others with a centred convolution only
VOCAB_SIZE = "4096"
STEPS = 1200
TOKENS = 2048  # of a step
SMALL = """--hidden-size 64 --num-heads 4 --intermediate-size 256 --d-state 8 --dropout 0 --lr 2e-3
    --warmup-steps 100""".split()


def pretrain(args, name: str, flags: list[str], profile: bool = False) -> Path:
    """The folder --out/NAME, with model.pt and log.csv of train_mlm.py under these flags, or profile.txt. What is
    finished stays as it is, and a run that was stopped goes on. One of several --jobs has its share of the cores."""
    out = Path(args.out, name)
    made, kept = out / "flags.txt", out / ("profile.txt" if profile else "model.pt")
    if kept.exists():
        if not made.exists() or made.read_text(encoding="utf-8") != shlex.join(flags):
            raise SystemExit(
                f"{out} was made with other flags than these, its flags.txt has them: give another --out"
            )
        return out
    goal = ["--profile", "10"] if profile else ["--resume"]
    threads = (
        {}
        if args.jobs == 1 or profile
        else {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
    )
    command = [sys.executable, train_mlm.__file__, *flags, *goal, "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if ran.returncode:
        why = ran.stderr.strip() or f"ended with {ran.returncode}"
        raise SystemExit(f"{out}: train_mlm.py: {' '.join(why.splitlines()[-2:])}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(made, shlex.join(flags))
    if profile:
        write_atomically(kept, ran.stdout)
    return out


def pretrain_all(args, variants: dict[str, list[str]]) -> dict[str, list[Path]]:
    """Of each named variant, which is flags of train_mlm.py, the folders of its runs, one for each seed. All share a
    tokenizer, that of a run of one step, since two trainings of one differ."""
    text = (
        ["--data", *(str(Path(path).resolve()) for path in args.data)] if args.data else ["--demo"]
    )
    rows = str(TOKENS // args.length)
    flags = [
        *SMALL,
        *text,
        "--length-schedule",
        f"{args.length}:1",
        "--batch-size",
        rows,
        "--micro-batch-size",
        rows,
    ]
    first = pretrain(
        args, "tokenizer", [*flags, "--vocab-size", VOCAB_SIZE, "--pattern", "T", "--steps", "1"]
    )
    flags += [
        "--tokenizer",
        str(first / "tokenizer.json"),
        "--steps",
        str(args.steps),
        "--eval-every",
        str(args.steps),
    ]
    runs = list(itertools.product(range(args.seeds), variants))

    def run(seed: int, name: str, profile: bool = False) -> Path:
        folder = f"{re.sub('[, ]+', '-', name)}-seed{seed}"
        return pretrain(args, folder, [*flags, *variants[name], "--seed", str(seed)], profile)

    folders = {name: [] for name in variants}
    for seed, name in tqdm(
        runs, desc="step time", unit="run"
    ):  # alone and in turns: a drifting clock hits all alike
        folders[name].append(run(seed, name, profile=True))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(run, *zip(*runs)), desc="pretraining", unit="run", total=len(runs)))
    return folders


def held_out_loss(folder: Path) -> float:
    """In nats, at the end of a run."""
    with open(folder / "log.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["held_out_loss"])


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


def compare(args, variants: dict[str, list[str]]) -> tuple[str, dict[str, dict]]:
    """A table of the variants' held-out losses and what they cost, and its numbers."""
    rows, found = [], {}
    for name, runs in pretrain_all(args, variants).items():
        profiles = [(folder / "profile.txt").read_text(encoding="utf-8") for folder in runs]
        time = min(float(re.search(r"tokens: ([\d.]+) s a step", text)[1]) for text in profiles)
        losses = list(map(held_out_loss, runs))
        model = MaBERTForMaskedLM.from_pretrained(runs[0])
        run = json.loads((runs[0] / "args.json").read_text(encoding="utf-8"))
        flops = (
            run["steps"]
            * TOKENS
            * train_mlm.flops_per_token(model.config, args.length, run["mask_rate"])
            / 1e12
        )
        size = sum(weight.numel() for weight in model.parameters()) / 1e6
        rows.append([name, spread(losses), f"{size:.2f}", f"{1000 * time:.0f}", f"{flops:.3g}"])
        found[name] = dict(
            loss=statistics.mean(losses),
            steps=run["steps"],
            TFLOP=flops,
            seconds=run["steps"] * time,
        )
        found[name]["folders"] = runs
    text = f"""{header(DEVICE)}
Masked language modelling: {args.steps} steps of {TOKENS // args.length} rows of {args.length} tokens, hidden size 64, a
centred convolution, unless said otherwise; seeds: {args.seeds}. TFLOP: PyTorch's count, without the scan.

"""
    head = [
        "",
        "held-out loss, nats",
        "parameters, M",
        f"ms a step, best of {args.seeds}",
        "TFLOP of the run",
    ]
    return text + table(head, rows), found


def bench_patterns(args):
    variants = {p: ["--pattern", p, "--no-causal-conv"] for p in args.patterns}
    variants |= {
        f"{p}, causal": ["--pattern", p, "--causal-conv"] for p in CAUSAL_TOO if p in variants
    }
    print(compare(args, variants)[0])


# ---- study: what each choice is worth: pretrainings that differ in it alone ----

STUDIES = {  # a variant's name, which begins with its pattern, and flags of train_mlm.py
    "psm": {
        f"{pattern}, {form}": f"--pattern {pattern} --psm {form} --sample-by paragraph"
        for pattern in ("MMTMMT", "MWTMWT")
        for form in ("none", "pre", "post", "pre+post", "pre+scan+post")
    },
    "budgets": {
        f"{unit}, {steps} steps": f"--pattern {unit * (12 // len(unit))} --steps {steps}"
        for unit in ("T", "MMT", "MWT")
        for steps in (400, 1000, 2000, 4000)  # 10, 25, 50, 100 %
    },
    "sizes": {
        f"{unit}, hidden {h}": f"--pattern {unit * (12 // len(unit))} --hidden-size {h} --intermediate-size {4 * h}"
        for unit in ("T", "M", "MMT", "MWT", "H")
        for h in (32, 64, 128)
    },
}
PADDINGS = {  # of held-out rows: how many at once, pads beside those of training, their side
    "as in training": (32, 1, "right"),
    "left": (32, 1, "left"),
    "4 times": (32, 4, "right"),
    "none": (1, 0, "right"),
}


@torch.no_grad()
def losses_by_padding(folder: Path, held_out: tuple) -> list[float]:
    """The loss of a run's model on the held-out rows of `train_mlm.Data`, in nats, in the order of PADDINGS."""
    model, losses = MaBERTForMaskedLM.from_pretrained(folder), []
    for size, times, side in PADDINGS.values():
        losses.append(0.0)
        for part in train_mlm.micro_batches(held_out, size):
            lengths = part[1].sum(1)
            more = round((times - 1) * (part[1].shape[1] - lengths.double().mean().item()))
            fill = (model.config.pad_token_id, False, train_mlm.IGNORED)
            part = [F.pad(x, (0, more), value=value) for x, value in zip(part, fill)]
            if side == "left":
                part = [
                    torch.stack([row.roll(len(row) - n) for row, n in zip(x, lengths.tolist())])
                    for x in part
                ]
            losses[-1] += model(*part[:2], labels=part[2], reduction="sum").loss.item()
        losses[-1] /= (held_out[2] != train_mlm.IGNORED).sum()
    return losses


def bench_study(args):
    name, args.length, args.steps = str(Path(args.out, args.study)), 64, STEPS
    Path(args.out).mkdir(parents=True, exist_ok=True)
    check_out(name)
    text, found = compare(
        args, {variant: flags.split() for variant, flags in STUDIES[args.study].items()}
    )
    panels = collections.defaultdict(lambda: collections.defaultdict(dict))
    x_axes = dict(psm=[], budgets=["steps", "seconds"], sizes=["TFLOP", "seconds"])[args.study]
    for x, (variant, run) in itertools.product(x_axes, found.items()):
        panels[f"by {x}"][variant.split(", ")[0]][run[x]] = run["loss"]
    if args.study == "psm":
        x_axes, rows = ["pads"], []
        folder = next(iter(found.values()))["folders"][
            0
        ]  # of all variants the held-out rows are the same
        flags = train_mlm.parse_args(
            shlex.split((folder / "flags.txt").read_text(encoding="utf-8"))
        )
        with contextlib.redirect_stdout(sys.stderr):
            held_out = train_mlm.prepare(flags, folder / "tokenizer.json").held_out
        for variant, run in found.items():
            losses = list(
                zip(
                    *(
                        losses_by_padding(folder, held_out)
                        for folder in tqdm(run["folders"], variant)
                    )
                )
            )
            rows.append([variant, *map(spread, losses)])
            pattern, form = variant.split(", ")
            panels[pattern][form] = dict(zip(PADDINGS, map(statistics.mean, losses)))
        text += f"\n\nThe held-out loss with other pads:\n\n{table(['', *PADDINGS], rows)}"
    print(text)
    write_results(
        name, text + "\n", panels, f"{' / '.join(x_axes)}; y: held-out loss, nats", "linear"
    )


# ---- recall: what attention brings that a state of fixed size does not, and the reverse ----

RECALL = ("TTT", "MMM", "MWM", "MMT", "HHH")
PAIRS, MOST_PAIRS = (
    (1, 2, 4, 8, 12, 16),
    12,
)  # of a row: where accuracy is measured, and at most in training
LENGTHS = (64, 128, 256)  # tokens of a row; the first is trained
MASK, KEYS, VALUES, FILLERS = 1, range(2, 34), range(34, 66), range(66, 82)  # token ids


def recall_rows(
    count: int, length: int, pairs: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, (count, length) each. Pairs, a key and its value, and fillers, the same token twice, in
    random order; then the keys in another, each with a [MASK] that stands for its value. A quarter of the fillers have
    their first token hidden, a quarter the second, half behind [MASK] and half behind any token: as in text, what is
    hidden follows from its neighbour, and this is what a model learns first."""

    def shuffled(size: int) -> torch.Tensor:
        return torch.rand(count, size, generator=rng).argsort(1)

    def any_of(ids: range, *shape: int) -> torch.Tensor:
        return torch.randint(ids.start, ids.stop, (count, *shape), generator=rng)

    fillers = length // 2 - 2 * pairs
    known = torch.stack(
        [KEYS.start + shuffled(len(KEYS))[:, :pairs], any_of(VALUES, pairs)], 2
    )  # (count, pairs, 2)
    items = torch.cat([known, any_of(FILLERS, fillers, 1).expand(-1, -1, 2)], 1)
    hidden = F.pad(F.one_hot(any_of(range(4), fillers), 4)[..., :2].bool(), (0, 0, pairs, 0))
    cover = any_of(range(KEYS.start, FILLERS.stop), *items.shape[1:])
    cover = torch.where(torch.rand(items.shape, generator=rng) < 0.5, MASK, cover)
    row, order, asked = torch.arange(count)[:, None], shuffled(len(items[0])), shuffled(pairs)
    whole = torch.cat([items[row, order], known[row, asked]], 1)
    hidden = torch.cat([hidden[row, order], torch.tensor([False, True]).expand(count, pairs, 2)], 1)
    cover = F.pad(cover[row, order], (0, 0, 0, pairs), value=MASK)
    return tuple(
        torch.where(hidden, *x).flatten(1) for x in ((cover, whole), (whole, train_mlm.IGNORED))
    )


def train_recall(pattern: str, seed: int, steps: int, out: str, threads: int) -> dict[str, dict]:
    """{length: {pairs: accuracy}} after training on LENGTHS[0] tokens with 1 to MOST_PAIRS pairs; kept in --out."""
    kept = Path(out, f"{pattern}-{steps}-steps-seed{seed}.json")
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    sizes = dict(hidden_size=64, num_heads=2, intermediate_size=256, d_state=8, dropout=0.0)
    model = MaBERTForMaskedLM(
        MaBERTConfig(FILLERS.stop, pattern=pattern, max_position=LENGTHS[0], **sizes)
    )
    for layer in (
        model.modules()
    ):  # so small a model learns nothing for long from BERT's 0.02 and random positions
        if isinstance(layer, torch.nn.Linear) and layer.in_features >= 64:
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    angles = torch.arange(LENGTHS[0])[:, None] * (2 * LENGTHS[0]) ** -torch.linspace(0, 1, 32)
    model.encoder.position_embeddings.weight.data = 0.03 * torch.cat(
        [angles.sin(), angles.cos()], 1
    )
    optimizer, rng = (
        torch.optim.AdamW(model.parameters(), weight_decay=0.01),
        torch.Generator().manual_seed(seed),
    )
    for step in tqdm(range(steps), f"{pattern}, seed {seed}", unit="step", mininterval=10):
        optimizer.param_groups[0]["lr"] = train_mlm.learning_rate(
            step, steps, 2e-3, min(200, steps // 10)
        )
        pairs = int(torch.randint(1, MOST_PAIRS + 1, (), generator=rng))
        ids, labels = recall_rows(64, LENGTHS[0], pairs, rng)
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found, positions = {}, model.encoder.position_embeddings
    for length, pairs in itertools.product(LENGTHS, PAIRS):
        model.encoder.position_embeddings = positions
        model.encoder.resize_positions(length)
        ids, labels = recall_rows(512, length, pairs, torch.Generator().manual_seed(2**31))
        labels[:, : -2 * pairs] = train_mlm.IGNORED
        with torch.no_grad():
            right = (
                model(ids, labels=labels).logits.argmax(1) == labels[labels != train_mlm.IGNORED]
            )
        found.setdefault(str(length), {})[str(pairs)] = right.double().mean().item()
    write_atomically(kept, json.dumps(found) + "\n")
    return found


def bench_recall(args):
    Path(args.out).mkdir(parents=True, exist_ok=True)
    name = str(Path(args.out, "recall"))
    check_out(name)
    runs = list(itertools.product(args.patterns, range(args.seeds)))
    how = args.steps, args.out, args.jobs > 1 and max(1, os.cpu_count() // args.jobs)
    with ProcessPoolExecutor(args.jobs, torch.multiprocessing.get_context("spawn")) as pool:
        found = dict(zip(runs, pool.map(train_recall, *zip(*runs), *map(itertools.repeat, how))))
    panels = collections.defaultdict(dict)
    text = f"""{header()}
Accuracy of the value of a key, of {len(VALUES)} values, after {args.steps} steps of 64 rows of {LENGTHS[0]} tokens with
1 to {MOST_PAIRS} pairs. Hidden size 64; weights begin with deviation 1/√inputs, positions as sinusoids. Seeds:
{args.seeds}. Longer rows have more fillers and stretched positions.
"""
    for length in map(str, LENGTHS):
        cells = {
            p: {n: [found[p, seed][length][str(n)] for seed in range(args.seeds)] for n in PAIRS}
            for p in args.patterns
        }
        rows = [[pattern, *map(spread, values.values())] for pattern, values in cells.items()]
        text += f"\n{length} tokens:\n\n{table(['pairs', *PAIRS], rows)}\n"
        for pattern, values in cells.items():
            panels[f"{length} tokens"][pattern] = {n: statistics.mean(v) for n, v in values.items()}
    print(text)
    write_results(name, text, panels, "pairs; y: accuracy", "linear")


positive = bounded(int, 1, 2**31)


def scan_size(text: str) -> tuple[int, ...]:
    size = tuple(positive(part) for part in text.split(","))
    if len(size) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not B,L,D,N")
    return size


def pattern(text: str) -> str:
    try:
        return MaBERTConfig(pattern=text).pattern
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from error


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    out = dict(metavar="NAME", help="write NAME.md, NAME.json and NAME.png (needs matplotlib)")

    def subcommand(bench, help: str):
        command = commands.add_parser(bench.__name__.removeprefix("bench_"), help=help)
        command.set_defaults(bench=bench)
        return command.add_argument

    add = subcommand(
        bench_scan, "time and memory of the selective scan: on the GPU, or on one CPU thread"
    )
    add(
        "--sizes",
        type=scan_size,
        nargs="+",
        metavar="B,L,D,N",
        help="default: the base model's, at several lengths",
    )
    add("--static", action="store_true", help="instead: what the machine code of the two main kernels costs "
        "on an H100, for bf16; needs no GPU")  # fmt: skip
    add(
        "--all",
        action="store_true",
        help="the same of all the scan's kernels, on an A100 and for float32 as well",
    )
    add = subcommand(bench_efficiency, "Tables B5 to B7 and Figure 5: MaBERT and its peers")
    add(
        "--device",
        choices=["cuda", "cpu"],
        default=DEVICE,
        help="default: the GPU, if any; a CPU measures less",
    )
    add(
        "--models",
        nargs="+",
        choices=MODELS,
        default=MODELS,
        metavar="MODEL",
        help=f"of {', '.join(MODELS)}",
    )
    add(
        "--lengths",
        type=positive,
        nargs="+",
        help="tokens (default: the paper's and up to 16384; else fewer)",
    )
    add(
        "--seconds",
        type=bounded(float, 1e-3),
        help="for the runs of a measure at a length (default: 600; on a CPU 60)",
    )
    add(
        "--fastest",
        action="store_true",
        help="best of torch.compile, CUDA graphs and neither, with FlashAttention",
    )
    add("--out", **out)
    add = subcommand(bench_drift, "what padding does to real tokens, for each form of PSM")
    pads = dict(type=bounded(int, 0, 2**16), nargs="+", default=[0, 1, 8, 64, 512])
    add(
        "--pads",
        **pads,
        help="of the longest row; shorter ones are padded to its length (%(default)s)",
    )
    add("--checkpoint", help="a folder with a trained model, instead of random weights")
    add(
        "--sentences",
        metavar="FILE",
        help=f"{ROWS} rows of CoLA's dev.tsv or of a text file, instead of random ones",
    )
    add("--out", **out)
    add = subcommand(
        bench_patterns, "a short pretraining of each pattern of the paper's Table 1, and of others"
    )
    add("--patterns", type=pattern, nargs="+", default=PATTERNS, help="default: the paper's eight, of 12 layers, and "
        f"others; {', '.join(CAUSAL_TOO)} also with a causal convolution")  # fmt: skip
    add(
        "--length",
        type=bounded(int, 8, TOKENS + 1),
        default=64,
        help="tokens of a row (%(default)s)",
    )
    add("--steps", type=positive, default=STEPS, help="of each run (%(default)s)")
    ask = subcommand(
        bench_recall, "which layers find the value of a key, among how many and how far away"
    )
    ask("--patterns", type=pattern, nargs="+", default=RECALL, help=f"default: {' '.join(RECALL)}")
    ask("--steps", type=positive, default=4000, help="of each run (%(default)s)")
    more = subcommand(
        bench_study, "what padding-safe masking, a longer and a larger pretraining are worth"
    )
    more("study", choices=STUDIES, help="which")
    for both in (add, more):
        both(
            "--data",
            nargs="+",
            metavar="PATH",
            help="text, as train_mlm.py takes it; without, its demo's",
        )
    for both, seeds, out in (
        (add, 2, "out/patterns"),
        (more, 1, "out/study"),
        (ask, 1, "out/recall"),
    ):
        both("--seeds", type=positive, default=seeds, help="runs of each variant (%(default)s)")
        both(
            "--jobs",
            type=positive,
            default=1,
            help="at the same time, each on its share of the cores (%(default)s)",
        )
        both(
            "--out",
            default=out,
            help="a folder, where finished runs of the same flags are kept (%(default)s)",
        )
    return parser.parse_args(argv)


def main(argv: list[str]):
    args = parse_args(argv)
    try:
        args.bench(args)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f'this needs the package {error.name}: pip install -e ".[bench]"'
        ) from error
    except OSError as error:  # a full disk, a folder that may not be written
        raise SystemExit(f"cannot go on: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(
            "\ninterrupted; patterns, study and recall go on when they are given again"
        ) from None


if __name__ == "__main__":
    main(sys.argv[1:])
