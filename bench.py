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
import bisect
import collections
import contextlib
import csv
import dataclasses
import functools
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import train_mlm  # before torch, which reads OpenMP's settings when it loads
from train_mlm import load_tokenizer, machine, number, write_whole

# isort: split
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import mabert
from mabert import MaBERT, MaBERTConfig, MaBERTForMaskedLM, MaBERTForSequenceClassification, triton


def header(device: str | None = "cpu") -> str:
    return f"`{shlex.join(['python', 'bench.py', *sys.argv[1:]])}` on {machine(device)}\n"


def table_row(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(head: list, rows: list[list]) -> str:
    return "\n".join(map(table_row, [head, ["---"] * len(head), *rows]))


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


def write_results(name: str, text: str, results: dict, panels: dict, columns: int, x_label: str):
    """NAME.md, NAME.json, and NAME.png with panels by their titles, row by row: {label: {x: y}}; zero is not drawn."""
    from matplotlib.figure import Figure

    write_whole(Path(f"{name}.md"), text)
    write_whole(Path(f"{name}.json"), json.dumps(dict(made=text.split("\n")[0]) | results, indent=1) + "\n")
    rows = len(panels) // columns
    figure = Figure(figsize=(1 + 3 * columns, 2 + 2.4 * rows), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items()):
        for i, (label, points) in enumerate(lines.items()):
            width = max(1, 5 - 0.7 * i)  # lines that coincide show
            axes.plot(points.keys(), points.values(), marker="osv^Dp*XPh"[i], lw=width, ms=4, alpha=0.8, label=label)
        axes.set_xscale("symlog", base=2, linthresh=1)  # pads begin at 0
        axes.set_xticks(list(points), labels=map(str, points), fontsize=8)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
    figure.supxlabel(x_label, fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    figure.savefig(f"{name}.png", dpi=120)


# ---- measuring: a number, or as text the reason why there is none ----


def reason(error: Exception) -> str:
    """What a cell says of a failure. A process that takes too much memory is killed by Linux."""
    text = str(error).strip() or type(error).__name__
    no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError, BrokenProcessPool))
    return "out of memory" if no_memory or re.search("out of memory|allocate memory", text) else text.split("\n")[0]


def in_turns(calls: dict, rounds: int, seconds: float, measure=None) -> dict[tuple, float | str]:
    """Of each call its median in milliseconds (of wall time, or as measure(call) says), or why it failed. They take
    turns run by run, so that a drifting clock hits all alike. The first rounds compile, find the batch that fits, and
    do not count: a sixth, two at least. When the seconds are over, five rounds suffice."""
    times, failed, end = {key: [] for key in calls}, {}, timer() + seconds
    for done in range(1, rounds + 1):
        for key in [key for key in calls if key not in failed]:
            try:
                start = timer()  # it waits for a GPU
                value = measure(calls[key]) if measure else calls[key]()
                times[key].append(value if measure else (timer() - start) * 1e3)
            except Exception as error:
                failed[key] = reason(error)
                tqdm.write(f"{', '.join(map(str, key))}: {failed[key]}", file=sys.stderr)
        if done >= 5 and timer() > end:
            break
    return {key: failed.get(key) or statistics.median(found[max(2, done // 6) :]) for key, found in times.items()}


def memory(device: str, most: bool = False) -> int:
    """Bytes that tensors have on a GPU, or that this process has (on Linux): now, or at most since `forget_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:" if most else "VmRSS:")[1].split()[0])


def forget_peak(device: str):
    gc.collect()
    torch.cuda.reset_peak_memory_stats() if device == "cuda" else Path("/proc/self/clear_refs").write_text("5")


def attempt(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return reason(error)


def alone(function, *args):
    """function(*args, device), on a CPU in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return function(*args) if args[-1] == "cuda" else pool.submit(function, *args).result()


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


def forward(name: str, inputs, dy):
    with torch.no_grad():
        return SCANS[name](*inputs)


def forward_backward(name: str, inputs, dy):
    return torch.autograd.grad(SCANS[name](*inputs), inputs, dy)


RUNS = {"forward": forward, "forward + backward": forward_backward}


def scan_errors(name: str, device: str) -> list[str]:
    """How far y and the gradients are from the formula in float64, relative to their norms."""
    inputs, dy = scan_inputs(name, (2, 300, 256, 16), device)
    exact = "reference", [x.detach().double().requires_grad_() for x in inputs], dy.double()
    found = [forward(name, inputs, dy), *forward_backward(name, inputs, dy)]
    return [f"{(x - y).norm() / y.norm():.0e}" for x, y in zip(found, [forward(*exact), *forward_backward(*exact)])]


def scan_memory(name: str, size: tuple, device: str) -> int:
    """MB that forward and backward need beyond the inputs."""
    torch.set_num_threads(1)
    forward_backward(name, *scan_inputs(name, (1, 4, 8, 2), device))  # loads what first calls load
    inputs = scan_inputs(name, size, device)
    before = memory(device)
    forget_peak(device)
    forward_backward(name, *inputs)
    return round((memory(device, most=True) - before) / 1e6)


def scan_rows(names: list[str], size: tuple, device: str) -> list[list]:
    """Rows of the table for a size."""
    inputs = functools.cache(lambda name: scan_inputs(name, size, device))
    keys = list(itertools.product(names, RUNS))
    calls = {(name, run): lambda name=name, run=run: RUNS[run](name, *inputs(name)) for name, run in keys}
    clocks = [in_turns(calls, rounds=7, seconds=60)]
    if device == "cuda":
        replays = functools.partial(triton.testing.do_bench_cudagraph, return_mode="median")
        clocks = [in_turns(calls, rounds=5, seconds=60, measure=replays), *clocks]
    rows = {name: [size, name] for name in names}
    for (name, run), times in itertools.product(keys, clocks):
        found, first = times[name, run], times[names[0], run]
        ratio = f" ({found / first:.2f}×)" if isinstance(found, float) and isinstance(first, float) else ""
        rows[name].append(found if isinstance(found, str) else f"{found:.3g}{ratio}")
    return [[*rows[name], attempt(alone, scan_memory, name, size, device)] for name in names]


def bounds(b: int, l: int, d: int, n: int) -> list[list]:
    """More rows: what a GPU needs for the exponentials alone, one a state update forward and two more backward, 16 a
    cycle and multiprocessor; and for the memory traffic alone, in bf16: u, delta, z and y, backward also dy, the first
    three again and their gradients."""
    gpu = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    update = b * l * d * n / (16 * gpu["multiprocessor_count"] * gpu["sm_clock_rate"])  # ms, since the clock is in kHz
    tensor = 2 * b * l * d / (triton.testing.get_dram_gbps() * 1e6)
    rows = ["exponentials alone", update, 3 * update], ["memory traffic alone", 4 * tensor, 11 * tensor]
    return [[(b, l, d, n), name, f"{one:.3g}", "", f"{both:.3g}", "", ""] for name, one, both in rows]


def bench_scan(args):
    if args.static:
        return bench_static()
    torch.set_num_threads(1)
    device, clocks, names, shapes = "cpu", ["ms"], ["loop", "reference", "pscan"], [(8, 128), (1, 1024)]
    if torch.cuda.is_available():
        device, clocks, names = "cuda", ["ms", "wall ms"], ["kernels", "mamba_ssm", "loop", "pscan"]
        shapes = [(32, 128), (32, 512), (32, 2048), (32, 4096), (1, 512), (1, 4096), (1, 16384)]
    print(header(device))
    print("Relative error of y and of the gradients, against the formula in float64:\n")
    errors = {name: attempt(scan_errors, name, device) for name in names}
    rows = [[name, *([found] if isinstance(found, str) else found)] for name, found in errors.items()]
    print(table("scan, y, u, delta, A, B, C, D, z, delta_bias".split(", "), rows))
    names = [name for name in names if not isinstance(errors[name], str)]
    print(f"""
Medians, in turns, of float32 on a CPU and bf16 on a GPU; in brackets the ratio to `{names[0]}`. Forward: without
gradients. On a GPU, ms are of a CUDA graph's replays, without the gaps between launches that wall time has. Peak
memory: of forward and backward, beyond the inputs.
""")
    head = [f"{run}, {clock}" for run in RUNS for clock in clocks]
    print(table(["(b, l, d, n)", "scan", *head, "peak memory, MB"], []), flush=True)
    for size in tqdm(args.sizes or [(b, l, 1536, 16) for b, l in shapes], unit="size"):
        for row in scan_rows(names, size, device) + (bounds(*size) if device == "cuda" else []):
            tqdm.write(table_row(row), file=sys.stdout)


# ---- without a GPU: what the compiler makes of the kernels, read from the machine code ----

STATIC_CASES = {  # kernel: TILE, constants
    "_pack": (8, {}),
    "_segment_ends": (8, {"BACKWARD": False, "z_ptr": None}),
    "_segment_ends (backward)": (4, {"BACKWARD": True}),
    "_segment_starts": (8, {"BACKWARD": False}),
    "_outputs": (8, {}),  # from start states, and keeping the chunks' states
    "_gradients": (4, {}),
}


def compile_kernel(name: str, arch: str, dtype: str) -> bytes:
    """The machine code (cubin) of a kernel for d 1536, n 16, softplus and z, as the base model calls it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile, constants = STATIC_CASES[name]
    kernel = getattr(mabert, name.split()[0])
    constants = dict(d=1536, n=16, N=16, u_row=1536, v_row=1536, dy_row=1536, delta_row=1536, z_row=3072) | constants
    constants |= dict(SOFTPLUS=True, SIGN=1, CHUNK=64, TILE=tile)
    half = "u_ptr v_ptr delta_ptr z_ptr y_ptr dy_ptr du_ptr ddelta_ptr dz_ptr B_ptr C_ptr"
    half = {name: f"*{dtype}" for name in half.split()}
    signature = {name: half.get(name, "*fp32" if "_ptr" in name else "i32") for name in kernel.arg_names}
    constants = {name: constants[name] for name in signature if name in constants}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source, options = ASTSource(kernel, signature, constants, aligned), {"num_warps": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options).asm["cubin"]


def machine_code(cubin: bytes) -> tuple[list[int], list[collections.Counter]]:
    """Registers and stack bytes of a kernel; and how often each instruction stands in each of its innermost loops."""
    import triton.backends.nvidia as nvidia

    with tempfile.TemporaryDirectory() as folder:
        file, tool = Path(folder, "kernel.cubin"), Path(nvidia.__file__).with_name("bin") / "cuobjdump"
        file.write_bytes(cubin)
        flags = "--dump-resource-usage", "--dump-sass"
        usage, listing = (
            subprocess.check_output([tool, flag, file], text=True, stderr=subprocess.DEVNULL) for flag in flags
        )
    line = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);"
    code = [(int(address, 16), op, rest) for address, op, rest in re.findall(line, listing)]
    jumps = [(int(re.search(r"0x([0-9a-f]+)", rest)[1], 16), at) for at, op, rest in code if op == "BRA"]
    loops = [(start, end) for start, end in jumps if start < end]
    inner = [(s, e) for s, e in loops if not any(s <= s2 and e2 <= e for s2, e2 in loops if (s, e) != (s2, e2))]
    resources = [int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")]
    return resources, [collections.Counter(op for at, op, _ in code if s <= at <= e) for s, e in inner]


def static_row(case: tuple) -> list:
    """A row of the table; its last three cells are numbers of instructions per state update and lane."""
    resources, loops = machine_code(compile_kernel(*case))
    updates = STATIC_CASES[case[0]][0] * (1 if case[0] == "_segment_starts" else 16)  # of an iteration, in a lane
    sums = []
    for op in ("", "MUFU", "SHFL"):  # all, exponentials and the like, shuffles
        counts = [sum(n for name, n in loop.items() if name.startswith(op)) / updates for loop in loops]
        each = " + ".join(f"{n:.2f}" for n in counts) + " = " if len(loops) > 1 and not op else ""
        sums.append(f"{each}{sum(counts):.2f}")
    return [*case, *resources, *sums]


def bench_static():
    if not triton or mabert.INTERPRETED:
        raise SystemExit("--static needs the package triton (on Linux), and no TRITON_INTERPRET in the environment")
    cases = list(itertools.product(STATIC_CASES, ("sm_80", "sm_90"), ("bf16", "fp32")))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(static_row, cases), total=len(cases)))
    print(header())
    print("Compiled, not run: d 1536, n 16, softplus, D, z. Instructions of the time loops per state update and lane; "
          "_outputs keeps states for the backward pass, _gradients has two loops, replay and reverse.\n")  # fmt: skip
    head = "kernel, architecture, inputs, registers, stack bytes, instructions, exponential pipe, shuffles".split(", ")
    print(table(head, rows))


# ---- efficiency: the paper's Tables B5 to B7 and Figure 5 ----

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
MEASURES = {
    "memory": "Table B5: peak memory, MiB (one forward pass at batch 1, weights included)",
    "training": "Table B6: training time, ms (one optimizer step)",
    "latency": "Table B7: latency, ms (one forward pass at batch 1)",
}

# The models. Those of transformers: its name for the class, and what of the published config differs from the class's
# defaults.
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
LONGFORMER = dict(vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1, attention_window=512)
DEBERTA = dict(vocab_size=128100, type_vocab_size=0, relative_attention=True, position_buckets=256)
DEBERTA |= dict(norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], layer_norm_eps=1e-7)
DEBERTA |= dict(position_biased_input=False, pooler_dropout=0, pooler_hidden_act="gelu", pooler_hidden_size=768)
TRANSFORMERS = {
    "BERT": ("Bert", BASE),
    "ALBERT": ("Albert", BASE),
    "Longformer": ("Longformer", BASE | LONGFORMER),
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
SETTINGS = {  # FlashAttention allowed, mode of torch.compile
    "plain": (False, None),
    "compiled": (False, "default"),
    "flash": (True, None),
    "flash, compiled": (True, "default"),
    "flash, CUDA graphs": (True, "reduce-overhead"),
}
PAPER_ATTENTION = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
FASTEST = {"cpu": list(SETTINGS)[:2], "cuda": list(SETTINGS)[2:]}


def build(name: str, length: int, device: str = "cpu") -> torch.nn.Module:
    """A two-label classifier with random weights for rows of up to length tokens."""
    if name in OURS:
        config = MaBERTConfig(**OURS[name])
        config.max_position = max(config.max_position, length)
        with torch.device(device):
            return MaBERTForSequenceClassification(config)
    import transformers

    transformers.logging.set_verbosity_error()  # no notes on how it pads
    family, sizes = TRANSFORMERS[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    # BigBird pads rows to whole blocks of 64, Longformer's positions begin at 2.
    positions = length + -length % 64 + 2 * (name == "Longformer")
    config.max_position_embeddings = max(config.max_position_embeddings, positions)
    with torch.device(device):
        return getattr(transformers, f"{family}ForSequenceClassification")(config)


class Contender:
    """A model under a setting, with the two runs that are timed."""

    def __init__(self, model, optimizer, setting: str, length: int, batch_size: int):
        self.model, self.optimizer, self.micro_batch_size = model, optimizer, batch_size
        self.flash, self.mode = SETTINGS[setting]
        self.call = torch.compile(model, mode=self.mode, dynamic=False) if self.mode else model
        self.rows = torch.randint(
            5, model.config.vocab_size, (batch_size, length), device=next(model.parameters()).device
        )

    def run(self, rows: torch.Tensor, **labels):
        """bf16 autocast on a GPU, float32 weights; their copies in bf16 are kept only where training needs them twice.
        The mask of ones is what a tokenizer gives; FlashAttention knows no mask. Without it, the paper's kernels."""
        mask, kind = None if self.flash else torch.ones_like(rows), rows.device.type
        half = torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=bool(labels))
        slow = kind == "cuda" and not self.flash
        with half, sdpa_kernel(PAPER_ATTENTION) if slow else contextlib.nullcontext():
            torch.compiler.cudagraph_mark_step_begin()
            return self.call(input_ids=rows, attention_mask=mask, **labels)

    @torch.no_grad()
    def latency(self):
        self.run(self.rows[:1])

    def training(self):
        """An optimizer step; where memory does not suffice for the batch, it is accumulated from now on."""
        while True:
            try:
                for rows in self.rows.split(self.micro_batch_size):
                    loss = self.run(rows, labels=rows.new_zeros(len(rows))).loss
                    (loss * len(rows) / len(self.rows)).backward()
                return self.optimizer.step()
            except torch.OutOfMemoryError:
                self.optimizer.state.clear()  # which may be half made
                if self.micro_batch_size == 1 or self.mode == "reduce-overhead":  # graphs cannot accumulate
                    raise
            finally:
                self.optimizer.zero_grad()
            self.micro_batch_size //= 2
            release()


def release():
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def forward_memory(name: str, length: int, device: str) -> float:
    """MiB that a model and one forward pass of it take at most, alone on the device."""
    build(name, length, "meta")  # imports what it needs
    tiny = MaBERTConfig(hidden_size=16, num_heads=2, intermediate_size=16, pattern="MT")
    with torch.device(device):
        MaBERTForSequenceClassification(tiny)(torch.zeros(1, 1, dtype=torch.long))  # takes what first calls take
    release()
    before = memory(device)
    contender = Contender(build(name, length, device).eval(), None, "plain", length, batch_size=1)
    contender.latency()
    forget_peak(device)
    contender.latency()
    return (memory(device, most=True) - before) / 2**20


def measured(length: int, args) -> list[dict]:
    """A cell for each model and measure: its value (of all settings, the fastest) or the reason why there is none."""
    found, failed, contenders = [], {}, {}

    def add(name: str, measure: str, value: float | str, **more):
        found.append(dict(model=name, length=length, measure=measure, value=value) | more)
        tqdm.write(f"{name}, {length} tokens, {measure}: {shown(value)}", file=sys.stderr)  # seen if the run is stopped

    def ready(name: str) -> dict:
        model = build(name, length, args.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        return {(name, s): Contender(model, optimizer, s, length, args.batch_size) for s in args.settings}

    for name in args.models:
        peak = None if args.fastest else attempt(alone, forward_memory, name, length, args.device)
        if not args.fastest:
            add(name, "memory", peak)
        made = peak if peak == "out of memory" else attempt(ready, name)
        if isinstance(made, str):
            failed |= {(name, setting): made for setting in args.settings}
        else:
            contenders |= made
    torch._dynamo.config.recompile_limit = 1000  # the models of one class share it
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for measure in ("latency", "training"):
        for contender in contenders.values():
            contender.model.train(measure == "training")
        calls = {key: getattr(contender, measure) for key, contender in contenders.items()}
        times = failed | in_turns(calls, args.rounds, args.seconds)
        for name in args.models:
            own = {setting: times[name, setting] for setting in args.settings}
            best = min(own, key=lambda setting: own[setting] if isinstance(own[setting], float) else math.inf)
            rows = contenders[name, best].micro_batch_size if (name, best) in contenders else None
            add(name, measure, own[best], setting=best, micro_batch_size=rows)
    torch.compiler.reset()
    return found


def layer_flops(letter: str, length: int) -> int:
    """Floating-point operations of a forward pass of one row through a layer of the base model: those that PyTorch
    counts, matrix products, convolution and attention; and 7 for each update of the scan's state: Δ A, its exponential,
    times Δ u and B, a fused multiply-add, another with C."""
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
    means = {"mean of the paper's baselines": BASELINES, "the same without DeBERTa-v3": BASELINES[:-1]}
    complete = {what: names for what, names in means.items() if all(name in found for name in names)}
    return found | {what: statistics.mean(found[name] for name in names) for what, names in complete.items()}


def shown(value: float | str, *notes: float | str | None) -> str:
    """A value of a table, in brackets notes to it."""
    if isinstance(value, str):
        return shown(math.nan, value, *notes).replace("nan", "–")
    notes = [shown(note) if isinstance(note, float) else note for note in notes if note]
    return (f"{value:.0f}" if value >= 100 else f"{value:.2f}") + f" ({'; '.join(notes)})" * bool(notes)


def efficiency_text(found: list[dict], parameters: dict[str, int], args) -> str:
    cells = {(cell["measure"], cell["model"], cell["length"]): cell for cell in found}
    lengths = sorted({length for _, _, length in cells})
    measures = [measure for measure in MEASURES if (measure, args.models[0], lengths[0]) in cells]
    runs = f"{args.rounds - max(2, args.rounds // 6)} runs, or fewer, at least 3, if those took over {args.seconds:g} s"
    how = "A measurement on a CPU: float32, PyTorch's fused attention"
    if args.device == "cuda":
        how = f"bf16 autocast, float32 weights; FlashAttention {'on' if args.fastest else 'off'}"
    text = f"""{header(args.device)}
{how}, {"each model's fastest setting" if args.fastest else "torch.compile off"}.
Medians of {runs}. The models take turns, so all of them and
their optimizers are in memory. In brackets the paper's figures, from an A100, 32 rows in an optimizer step; its MaBERT
has 205.3 M parameters. T12 and M12 are MaBERT with one type of layer (T12 is pre-LN, so not BERT).
"""
    for measure in measures:
        rows = {name: [name, f"{parameters[name] / 1e6:.1f}"] for name in args.models}
        for name, length in itertools.product(args.models, lengths):
            cell, paper = cells[measure, name, length], paper_value(name, measure, length)
            micro = cell.get("micro_batch_size") or args.batch_size
            accumulated = f"{math.ceil(args.batch_size / micro)} × {micro} rows" if micro < args.batch_size else None
            rows[name].append(shown(cell["value"], paper, accumulated, args.fastest and cell["setting"]))
        title = MEASURES[measure].replace("optimizer step", f"optimizer step, batch {args.batch_size}")
        text += f"\n{title}:\n\n{table(['model', 'parameters, M', *lengths], list(rows.values()))}\n"
    length, columns = 4096 if 4096 in lengths else lengths[-1], {}
    for over, measure in itertools.product(("MaBERT", "MaBERT-206M"), measures):
        if over in args.models:
            own = ratios({name: cells[measure, name, length]["value"] for name in args.models}, over)
            paper = ratios({name: paper_value(name, measure, length) for name in MODELS}, "MaBERT")
            columns[f"{measure} ÷ {over}"] = {name: shown(value, paper.get(name)) for name, value in own.items()}
    if columns:
        names = dict.fromkeys(itertools.chain(*columns.values()))
        rows = [[name, *(column.get(name, "–") for column in columns.values())] for name in names]
        text += f"\nRatios at {length} tokens; above 1, MaBERT takes less:\n\n{table(['model', *columns], rows)}\n"
    more = bisect.bisect(range(1, 2**16), False, key=lambda l: layer_flops("T", l) > layer_flops("M", l)) + 1
    return f"{text}\nFrom {more} tokens on, a T layer of the base model takes more operations than an M layer.\n"


PROTOCOL = {  # rounds: 100 after a warm-up of 20, as in the paper
    "cuda": dict(lengths=[*PAPER_LENGTHS, 8192, 16384], batch_size=32, rounds=120, seconds=600),
    "cpu": dict(lengths=[128, 512, 1024], batch_size=1, rounds=7, seconds=60),
}


def bench_efficiency(args):
    on_gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if on_gpu else "cpu")
    if args.device == "cuda" and not on_gpu:
        raise SystemExit("--device cuda: PyTorch sees no GPU here; --device cpu has a smaller measurement")
    check_out(args.out)
    defaults = PROTOCOL[args.device] | (dict(lengths=[512, 4096] if on_gpu else [512]) if args.fastest else {})
    vars(args).update({name: getattr(args, name, None) or value for name, value in defaults.items()})
    args.settings = FASTEST[args.device] if args.fastest else ["plain"]
    parameters = {name: sum(p.numel() for p in build(name, 512, "meta").parameters()) for name in args.models}
    need = 15 * sum(parameters.values())  # bytes: weights and Adam's two moments, gradients, some activations
    if args.device == "cpu" and need > (has := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        sizes = f"they need {need / 1e9:.0f} GB, of {has / 1e9:.0f} GB that there are"
        raise SystemExit(f"the models take turns, so all are in memory; {sizes}: name fewer --models")
    found, text = [], ""
    for length in tqdm(sorted(args.lengths), unit="length"):
        found += measured(length, args)
        release()
        text = efficiency_text(found, parameters, args)
        if args.out:  # after every length, so that a run that is stopped has what it measured
            settings = {key: value for key, value in vars(args).items() if key != "bench"}
            panels = {cell["measure"]: collections.defaultdict(dict) for cell in found}
            for cell in found:
                value = cell["value"] if isinstance(cell["value"], float) else math.nan
                panels[cell["measure"]][cell["model"]][cell["length"]] = value
            results = dict(settings=settings, parameters=parameters, cells=found)
            write_results(args.out, text, results, panels, columns=len(panels), x_label="tokens")
    print(text)


# ---- drift: what padding does to real tokens (the question of the paper's Figures 3 and 4) ----

PSM_FORMS = ((), ("post",), ("pre",), ("pre", "post"), ("scan",), ("pre", "scan"), ("pre", "scan", "post"))
ROWS = 100
DRIFTS = dict(
    tokens_l2="Relative L2 change of the final hidden states of real tokens",
    cls_cosine="Cosine distance of the final [CLS] (the paper's Figures 3a and 4)",
    mean_cosine="Cosine distance of the mean over real tokens (the paper's Figure 3b)",
)


def sentences(args, config: MaBERTConfig) -> list[torch.Tensor]:
    """Token ids of --sentences, or random ones, (rows, length) for each length; no pads."""
    if not args.sentences:
        return [torch.randint(5, config.vocab_size, (ROWS, 24))]
    try:
        lines = Path(args.sentences).read_bytes().decode("utf-8-sig").split("\n")
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
        rows = [[5 + zlib.crc32(word.encode()) % (config.vocab_size - 5) for word in text.split()] for text in texts]
    rows = sorted((row[: config.max_position] for row in rows), key=len)
    return [torch.tensor(list(alike)) for _, alike in itertools.groupby(rows, key=len)]


def distances(model: MaBERT, rows: list[torch.Tensor], unpadded: list[torch.Tensor], pads: int, side: str) -> dict:
    """How far the final hidden states of real tokens are from those without pads, as means over the rows.

    All rows are one batch, in which the longest has so many pads. The paper's measures are the cosine distances of the
    first token's state and of the mean over the tokens; beside them is the relative L2 change of all tokens.
    """
    total = collections.Counter()
    length = pads + max(ids.shape[1] for ids in rows)
    wheres = [(0, length - ids.shape[1]) if side == "right" else (length - ids.shape[1], 0) for ids in rows]
    ids = torch.cat([F.pad(ids, where, value=model.config.pad_token_id) for ids, where in zip(rows, wheres)])
    mask = torch.cat([F.pad(torch.ones_like(ids), where) for ids, where in zip(rows, wheres)])
    for x, y, (before, after) in zip(unpadded, model(ids, mask).split(list(map(len, rows))), wheres):
        y = y[:, before : length - after]
        total["tokens_l2"] += ((y - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).sum().item()
        for name, a, b in (("cls_cosine", x[:, 0], y[:, 0]), ("mean_cosine", x.mean(dim=1), y.mean(dim=1))):
            difference = F.normalize(b, dim=1) - F.normalize(a, dim=1)
            total[name] += difference.square().sum().item() / 2  # 1 - cosine, without cancellation
    return {name: value / len(ids) for name, value in total.items()}


@torch.no_grad()
def bench_drift(args):
    """Figures 3 and 4 of the paper, for every form of PSM, side of the pads and kind of convolution."""
    check_out(args.out)
    torch.manual_seed(0)
    sizes = dict(vocab_size=1000, hidden_size=64, num_heads=4, intermediate_size=256)
    try:
        base = MaBERT.from_pretrained(args.checkpoint) if args.checkpoint else MaBERT(MaBERTConfig(**sizes))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--checkpoint: {error}") from error
    rows = sentences(args, base.config)
    found = {measure: collections.defaultdict(lambda: collections.defaultdict(dict)) for measure in DRIFTS}
    for psm, conv in tqdm(list(itertools.product(PSM_FORMS, ("causal", "centred"))), unit="model"):
        model = MaBERT(dataclasses.replace(base.config, psm=psm, causal_conv=conv == "causal"))
        model.load_state_dict(base.state_dict())
        unpadded = list(map(model.double().eval(), rows))
        for side, pads in itertools.product(("right", "left"), args.pads):
            for measure, value in distances(model, rows, unpadded, pads, side).items():
                found[measure][f"{conv}, pads {side}"]["+".join(psm) or "none"][pads] = value
    what = "random weights (MMT four times, hidden size 64)"
    if args.checkpoint:
        conv, psm = "causal" if base.config.causal_conv else "centred", "+".join(base.config.psm) or "none"
        what = f"{args.checkpoint}, pretrained with PSM {psm} and a {conv} convolution"
    source = f"sentences of {args.sentences}" if args.sentences else "random rows of 24 tokens"
    what += f", {sum(map(len, rows))} {source}"
    text = f"{header()}\nWith {' / '.join(map(str, args.pads))} pads in the longest row, float64; {what}.\n"
    for measure, cases in found.items():
        lines = {"+".join(psm) or "none": [] for psm in PSM_FORMS}
        for forms, form in itertools.product(cases.values(), lines):
            lines[form].append(" / ".join(f"{x:.0e}" for x in forms[form].values()))
        rows = [[form, *cells] for form, cells in lines.items()]
        text += f"\n{DRIFTS[measure]}:\n\n{table(['PSM stages', *cases], rows)}\n"
    print(text)
    if args.out:
        panels = {f"{measure}, {case}": found[measure][case] for measure in found for case in found[measure]}
        results = dict(what=what, distances=found)
        write_results(args.out, text, results, panels, columns=4, x_label="pads of the longest row; zero is not drawn")


# ---- patterns: the paper's Table 1 in small ----

PATTERNS = [unit * (12 // len(unit)) for unit in ("M", "T", "MTT", "TM", "MT", "TMM", "MMT", "TTM")]
CENTRED = "MMT" * 4  # with a centred convolution, one more row
VOCAB_SIZE = "4096"
SMALL = """--hidden-size 64 --num-heads 4 --intermediate-size 256 --d-state 8 --dropout 0 --length-schedule 64:1
    --batch-size 32 --micro-batch-size 32 --bucket --lr 2e-3 --warmup-steps 100""".split()


def pretrain(args, name: str, flags: list[str], profile: bool = False) -> Path:
    """The folder --out/NAME, with model.pt and log.csv of train_mlm.py under these flags, or profile.txt. What is
    finished stays as it is, and a run that was stopped goes on. One of several --jobs has a process of its own."""
    out, printed = Path(args.out, name), io.StringIO()
    made, kept = out / "flags.txt", out / ("profile.txt" if profile else "model.pt")
    if kept.exists() and (not made.exists() or made.read_text(encoding="utf-8") != shlex.join(flags)):
        raise SystemExit(f"{out} was made with other flags than these, its flags.txt has them: give another --out")
    command = [*flags, "--out", str(out), *(["--profile", "10"] if profile else ["--resume"])]
    try:
        if kept.exists():
            return out
        if args.jobs == 1 or profile:
            with contextlib.redirect_stdout(printed):
                train_mlm.main(command)
        else:
            threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
            command = [sys.executable, train_mlm.__file__, *command]
            subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threads)
    except (SystemExit, subprocess.CalledProcessError) as error:
        said = printed.getvalue() if isinstance(error, SystemExit) else error.stderr  # of a signal it tells
        why = error.code if isinstance(getattr(error, "code", None), str) else said.strip().split("\n")[-1]
        raise SystemExit(f"{out}: train_mlm.py: {why}") from error
    out.mkdir(parents=True, exist_ok=True)
    write_whole(made, shlex.join(flags))
    if profile:
        write_whole(kept, printed.getvalue())
    return out


def pretrain_all(args, variants: dict[str, list[str]]) -> tuple[dict[str, list[float]], dict[str, list[Path]]]:
    """Of each named variant, which is flags of train_mlm.py: seconds a step, and folders, one for each seed. All share
    a tokenizer, that of a run of one step, since two trainings of one differ."""
    flags = [*SMALL, "--demo"]
    if args.data:
        flags = [*SMALL, "--sample-by", "paragraph", "--data", *(str(Path(path).resolve()) for path in args.data)]
    first = pretrain(args, "tokenizer", [*flags, "--vocab-size", VOCAB_SIZE, "--pattern", "T", "--steps", "1"])
    flags += ["--tokenizer", str(first / "tokenizer.json"), "--steps", str(args.steps), "--eval-every", str(args.steps)]
    runs = list(itertools.product(range(args.seeds), variants))

    def run(seed: int, name: str, profile: bool = False) -> Path:
        folder = f"{name.replace(', ', '-')}-seed{seed}"
        return pretrain(args, folder, [*flags, *variants[name], "--seed", str(seed)], profile)

    seconds, folders = {name: [] for name in variants}, {name: [] for name in variants}
    for seed, name in tqdm(runs, desc="step time", unit="run"):  # alone and in turns: a drifting clock hits all alike
        printed = (run(seed, name, profile=True) / "profile.txt").read_text(encoding="utf-8")
        seconds[name].append(float(re.search(r"tokens: ([\d.]+) s a step", printed)[1]))
    with ThreadPoolExecutor(args.jobs) as pool:
        made = (map if args.jobs == 1 else pool.map)(run, *zip(*runs))  # one job in this thread, which gets the signals
        for (_, name), folder in zip(runs, tqdm(made, desc="pretraining", unit="run", total=len(runs))):
            folders[name].append(folder)
    return seconds, folders


def held_out_loss(folder: Path) -> float:
    """In nats, at the end of a run."""
    with open(folder / "log.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["held_out_loss"])


def bench_patterns(args):
    try:
        variants = {MaBERTConfig(pattern=p).pattern: ["--pattern", p, "--causal-conv"] for p in args.patterns}
    except ValueError as error:
        raise SystemExit(f"--patterns: {error}") from error
    variants[f"{CENTRED}, centred"] = ["--pattern", CENTRED, "--no-causal-conv"]
    seconds, folders = pretrain_all(args, variants)
    rows = []
    for name in variants:
        losses = list(map(held_out_loss, folders[name]))
        loss = f"{statistics.mean(losses):.3f}" + (f" ± {statistics.stdev(losses):.3f}" if args.seeds > 1 else "")
        size = sum(p.numel() for p in MaBERTForMaskedLM.from_pretrained(folders[name][0]).parameters())
        rows.append([name, loss, f"{size / 1e6:.2f}", f"{1000 * min(seconds[name]):.0f}"])
    print(header(None))
    seeds = f"{args.seeds} seed{'s' * (args.seeds > 1)}"
    print(f"{args.steps} steps of masked language modelling, 32 rows of 64 tokens, hidden size 64, {seeds}.\n")
    print(table(["pattern", "held-out loss, nats", "parameters, M", f"ms a step, best of {args.seeds}"], rows))


positive = number(int, 1, 2**31)


def scan_size(text: str) -> tuple[int, ...]:
    size = tuple(positive(part) for part in text.split(","))
    if len(size) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not B,L,D,N")
    return size


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def subcommand(bench, help: str):
        command = commands.add_parser(bench.__name__.removeprefix("bench_"), help=help)
        command.set_defaults(bench=bench)
        return command.add_argument

    add = subcommand(bench_scan, "time and memory of the selective scan: on the GPU, or on one CPU thread")
    add("--sizes", type=scan_size, nargs="+", metavar="B,L,D,N", help="default: the base model's, at several lengths")
    add("--static", action="store_true", help="instead: what the kernels' machine code costs; needs no GPU")
    add = subcommand(bench_efficiency, "Tables B5 to B7 and Figure 5: MaBERT and its peers")
    add("--device", choices=["cuda", "cpu"], help="default: the GPU, if there is one; on a CPU 15 to 20 minutes")
    add("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    add("--lengths", type=positive, nargs="+", help="tokens; default: the paper's, 8192 and 16384; on a CPU 128, 512 "
        "and 1024; with --fastest less")  # fmt: skip
    add("--batch-size", type=positive, help="rows of an optimizer step; default: 32 (the paper's); on a CPU 1")
    add("--seconds", type=number(float, 1e-3), help="for all runs of a measure at a length: 100 after 20 as in the "
        "paper, on a CPU 5; fewer where they take longer, but three; default: 600; on a CPU 60")  # fmt: skip
    add("--fastest", action="store_true", help="times of every model at its fastest setting: FlashAttention, with and "
        "without torch.compile and CUDA graphs (on a CPU, with and without torch.compile)")  # fmt: skip
    add("--out", metavar="NAME", help="write NAME.md, NAME.json and NAME.png (needs matplotlib)")
    add = subcommand(bench_drift, "what padding does to real tokens, for each form of PSM")
    add("--pads", type=number(int, 0, 2**16), nargs="+", default=[0, 1, 8, 64, 512], help="of the longest row; shorter "
        "ones are padded to its length (%(default)s)")  # fmt: skip
    add("--checkpoint", help="a folder with a trained model, instead of random weights")
    add("--sentences", metavar="FILE", help=f"{ROWS} rows of CoLA's dev.tsv, or of a text file of lines, instead of "
        "random ones; without --checkpoint, a token a word")  # fmt: skip
    add("--out", metavar="NAME", help="write NAME.md, NAME.json and NAME.png (needs matplotlib)")
    add = subcommand(bench_patterns, "a short pretraining of each pattern of the paper's Table 1")
    add("--data", nargs="+", metavar="PATH", help="text, as train_mlm.py takes it; without, its demo's")
    add("--patterns", nargs="+", default=PATTERNS, help="the paper's eight, of 12 layers; MMT × 4, centred, comes last")
    add("--steps", type=positive, default=1200, help="of each run (%(default)s)")
    add("--seeds", type=positive, default=2, help="runs of each pattern (%(default)s)")
    add("--jobs", type=positive, default=1, help="runs at the same time, each on its share of the cores (%(default)s)")
    add("--out", default="out/patterns", help="a folder, where finished runs of the same flags are kept (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str]):
    args = parse_args(argv)
    try:
        args.bench(args)
    except ModuleNotFoundError as error:
        raise SystemExit(f'this needs the package {error.name}: pip install -e ".[bench]"') from error


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; patterns goes on when it is given again") from None
    except OSError as error:  # a full disk, a folder that may not be written
        raise SystemExit(f"cannot go on: {error}") from error
