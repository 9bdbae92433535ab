"""Four measurements. Each prints Markdown under the command and the machine that made it.

    python bench.py efficiency       # memory, latency and training time of MaBERT and its peers
    python bench.py scan             # the masked selective scan beside other ways to compute it
    python bench.py scan --static    # its kernels compiled for an H100, which need not be there:
                                     # registers, and instructions for each update of a state
    python bench.py drift            # what padding does to real tokens, for each form of
                                     # padding-safe masking
    python bench.py step --demo      # where the time of a training step goes: takes every flag of
                                     # train_mlm.py, and runs under torchrun

To keep a table, redirect it: python bench.py scan > results/scan.md. With --out NAME, efficiency
and drift write NAME.md and a figure, NAME.png.

In order: tables and figures · measuring · efficiency · scan · machine code · drift · step · the
command line.
"""

import argparse
import bisect
import collections
import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import train_mlm  # before torch, which reads OpenMP's settings when it loads
from train_mlm import (
    bounded,
    describe_machine,
    is_out_of_memory,
    load_tokenizer,
    path_name,
    run_program,
    write_atomically,
)

# isort: split
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import mabert
from mabert import MaBERT, MaBERTConfig, MaBERTForSequenceClassification, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of scan and step; efficiency has a flag

# ---- Tables and figures ----

STRONG = "#c1121f"  # the colour of MaBERT, or of the form that MaBERT has
MUTED = """#7088a0 #b08d57 #76976f #9678a3 #a8705f #5f9494 #8f8f4f #8c8c8c #7d83bd #b07a99
    #3d4f60 #c9a9a6""".split()  # of up to twelve others


def title_line(device: str = "cpu") -> str:
    """The first line of every result: the command as it was typed, and the machine."""
    return f"`{shlex.join(['python', *sys.argv])}` on {describe_machine(device)}\n"


def table(head: list, body: list[list]) -> str:
    """A Markdown table of these cells."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def check_out(name: str | None):
    """SystemExit, before any work is done, if NAME.md and NAME.png cannot be written."""
    if not name:
        return
    import matplotlib  # noqa: F401  # if it is missing, `errors_in_one_line` says so

    # NAME is the beginning of two files in a folder that can be made or written
    if name.endswith("/"):
        raise SystemExit(f"--out: {name} is a folder; it must be the beginning of file names")
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(name).parent).close()
    except OSError as error:
        raise SystemExit(f"--out: cannot write {name}.md: {error.strerror}") from error


def new_figure(titles: list[str], x_labels: list[str], y_label: str):
    """(a figure, its panels side by side, one for each title, with one y axis)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")  # inches
    panels = figure.subplots(1, len(titles), squeeze=False, sharey=True)[0]

    # small letters, no box, faint lines to read y by
    for axes, title, x_label in zip(panels, titles, x_labels):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x_label, fontsize=9)
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.margins(x=0.08)
    panels[0].set_ylabel(y_label, fontsize=9)
    return figure, panels


def draw_lines(axes, lines: dict[str, dict], strong: str):
    """A line for each {name: {x: y}}, that of the name `strong` in the strong colour.

    Where x is text, the texts stand side by side; numbers lie on a logarithmic axis.
    """
    # thin lines in muted colours, below them a thick one
    for (name, points), colour in zip(lines.items(), itertools.cycle(MUTED)):
        style = dict(color=colour, linewidth=1.3, markersize=3.5, zorder=3)
        if name == strong:
            style = dict(color=STRONG, linewidth=3, markersize=6, zorder=2)
        axes.plot(list(points), list(points.values()), marker="o", label=name, **style)

    # all lines have the same kind of x
    if isinstance(next(iter(points)), str):
        return
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")

    # where all lines have the same x, their ticks
    places = {tuple(points) for points in lines.values()}
    if len(places) == 1:
        axes.set_xticks(*places)
        axes.minorticks_off()


def draw_panels(file: str, panels: dict[str, dict], x_labels: list[str], y_label: str, strong: str):
    """A figure with a panel for each {title: {name of a line: {x: y}}}."""
    figure, all_axes = new_figure(list(panels), x_labels, y_label)
    for axes, lines in zip(all_axes, panels.values()):
        draw_lines(axes, lines, strong)
    save_figure(figure, file)


def dash_covering_lines(axes):
    """Dashes each thin line that lies upon another, so that both are seen."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    lines.sort(key=lambda line: line.get_zorder())  # those below first
    below = []  # the points of lines, in pixels
    for line in lines:
        points = axes.transData.transform(line.get_xydata())
        covers = [x for x in below if x.shape == points.shape and abs(x - points).max() < 4]
        if covers:
            line.set_linestyle((5 * len(covers), (5, 5)))  # the dashes of one fill another's gaps
        below.append(points)


def name_lines(axes, gap: float = 0.068):
    """Writes the name of each line at its right end; names closer than `gap` are moved apart."""

    # the last point of each line that has a name, from the bottom up
    ends = []
    for line in axes.get_lines():
        points = [point for point in line.get_xydata() if math.isfinite(point[1])]
        if points and not line.get_label().startswith("_"):
            ends.append((points[-1], line))
    ends.sort(key=lambda end: end[0][1])

    # Places, as shares of the panel's sides. Neighbours that are too close push each other apart,
    # the lowest not below the panel.
    to_panel = axes.transData + axes.transAxes.inverted()
    places = [to_panel.transform(point) for point, _ in ends]
    heights = [height for _, height in places]
    for _ in range(100):
        if heights:
            heights[0] = max(0, heights[0])
        for i in range(1, len(heights)):
            overlap = max(0, heights[i - 1] + gap - heights[i])
            heights[i - 1] -= overlap / 2
            heights[i] += overlap / 2

    # the name beside the panel, or beside a line that ends early, and dots that lead to it
    for (across, _), height, (point, line) in zip(places, heights, ends):
        start = across + 0.05 if across < 0.8 else 1.04
        place = dict(xytext=(start, height), textcoords="axes fraction")
        dots = dict(arrowstyle="-", color="0.6", linewidth=0.8, linestyle=":", relpos=(0, 0.5))
        font = dict(color=line.get_color(), fontsize=9, verticalalignment="center")
        font["weight"] = "bold" if line.get_color() == STRONG else "normal"
        axes.annotate(line.get_label(), point, arrowprops=dots, **place, **font)


def save_figure(figure, file: str):
    """Writes a figure, once its lines have their names."""
    for axes in figure.axes:
        axes.autoscale_view()  # the limits are stale until they are asked for
        dash_covering_lines(axes)
        name_lines(axes)
    figure.savefig(file, dpi=120)


# ---- Measuring: a number, or as text the reason why there is none ----

OUT_OF_MEMORY = "out of memory"


def value_or_reason(function, *args):
    """The function's result; or, if it fails, what a table's cell says of the failure."""
    try:
        return function(*args)
    except Exception as error:
        if is_out_of_memory(error):
            return OUT_OF_MEMORY
        # the first line of the message; of an error without one, its kind
        message = str(error).strip() or type(error).__name__
        return message.split("\n")[0]


def measured_alone(device: str, function, *args):
    """value_or_reason(function, *args); on a CPU in a process that has done nothing before."""
    if device == "cuda":
        return value_or_reason(function, *args)
    # a spawned process begins without the memory of this one
    with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
        return value_or_reason(pool.submit(function, *args).result)


def wall_ms(call, *args) -> float:
    """Milliseconds that call(*args) takes."""
    start = timer()  # waits for a GPU
    call(*args)
    return (timer() - start) * 1e3


def rounds_that_do_not_count(rounds: int) -> int:
    """How many of the rounds, the first, compile and find how many rows fit: a sixth."""
    return max(2, rounds // 6)


def interleaved_medians(calls: dict, rounds: int, seconds: float) -> dict:
    """For each call, which returns milliseconds, their median or the reason why it failed.

    In a round each call has its turn, so that a clock that drifts hits all alike. Once the seconds
    are over, five rounds are enough.
    """
    times = {key: [] for key in calls}
    reasons = {}  # why a call failed
    end = timer() + seconds

    for completed in range(1, rounds + 1):
        # a turn of each call that has not failed
        for key in [key for key in calls if key not in reasons]:
            value = value_or_reason(calls[key])
            if isinstance(value, str):
                reasons[key] = value
                tqdm.write(f"{', '.join(map(str, key))}: {value}", file=sys.stderr)
            else:
                times[key].append(value)

        if completed >= 5 and timer() > end:
            break

    # of the rounds that count
    first = rounds_that_do_not_count(completed)
    timed = [key for key in calls if key not in reasons]
    return reasons | {key: statistics.median(times[key][first:]) for key in timed}


def peak_memory(call, device: str) -> int:
    """Bytes that call() takes at most: of tensors on a GPU, else of this process (on Linux)."""

    def peak() -> int:
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])

    # let the peak begin at what is in use now
    free_memory()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")

    # what the call adds
    before = peak()
    call()
    return peak() - before


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


# ---- Efficiency: the paper's Tables B5 to B7 and Figure 5 ----

MEASURES = {
    "memory": "Table B5: peak memory, MiB (one forward pass at batch 1, weights included)",
    "training": "Table B6: training time, ms (one optimizer step)",
    "latency": "Table B7: latency, ms (one forward pass at batch 1)",
}
PAPER_LENGTHS = (128, 512, 1024, 2048, 4096)
PAPER_EFFICIENCY = {  # at these lengths, on an A100
    # full attention
    ("BERT", "memory"): (441.364, 454.748, 471.274, 507.313, 579.392),
    ("BERT", "training"): (42.372, 189.501, 487.204, 1451.200, 4894.397),
    ("BERT", "latency"): (5.220, 5.331, 5.702, 15.122, 43.424),
    # layers that share their weights
    ("ALBERT", "memory"): (70.649, 90.971, 117.992, 173.382, 283.109),
    ("ALBERT", "training"): (50.941, 225.783, 545.223, 1491.872, 4662.279),
    ("ALBERT", "latency"): (6.140, 6.217, 6.692, 17.994, 48.749),
    # sparse attention
    ("Longformer", "memory"): (602.629, 652.634, 709.375, 828.660, 1066.699),
    ("Longformer", "training"): (834.994, 838.428, 1709.029, 3466.178, 6985.296),
    ("Longformer", "latency"): (36.794, 36.866, 38.420, 42.468, 55.676),
    ("BigBird", "memory"): (507.797, 551.183, 662.196, 1115.224, 2885.278),
    ("BigBird", "training"): (60.710, 263.221, 658.337, 1993.710, 6430.660),
    ("BigBird", "latency"): (7.921, 7.948, 8.059, 23.378, 67.887),
    # attention by relative positions
    ("DeBERTa-v3", "memory"): (742.110, 825.994, 1047.506, 1908.529, 5262.076),
    ("DeBERTa-v3", "training"): (74.079, 371.969, 1151.794, 4251.722, 16136.670),
    ("DeBERTa-v3", "latency"): (13.737, 14.038, 17.456, 57.592, 206.592),
    # the paper's own
    ("MaBERT", "memory"): (808.787, 841.846, 923.875, 1238.917, 2445.003),
    ("MaBERT", "training"): (64.117, 240.334, 516.242, 1240.849, 3319.429),
    ("MaBERT", "latency"): (9.160, 9.193, 9.263, 13.914, 34.703),
}

# The peers: (prefix of their classes in transformers, fields of their published config that differ
# from its defaults)
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
LONGFORMER = dict(vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1)
DEBERTA = dict(
    vocab_size=128100,
    type_vocab_size=0,
    layer_norm_eps=1e-7,
    # attention by relative positions, in both directions
    relative_attention=True,
    position_buckets=256,
    position_biased_input=False,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    # the classifier's head
    pooler_dropout=0,
    pooler_hidden_act="gelu",
    pooler_hidden_size=768,
)
TRANSFORMERS = {
    "BERT": ("Bert", {}),
    "ALBERT": ("Albert", BASE),
    "Longformer": ("Longformer", LONGFORMER),
    "BigBird": ("BigBird", {}),
    "DeBERTa-v3": ("DebertaV2", BASE | DEBERTA),
    "ModernBERT": ("ModernBert", dict(reference_compile=False, attn_implementation="sdpa")),
}
BASELINES = ("BERT", "ALBERT", "Longformer", "BigBird", "DeBERTa-v3")  # the paper's

# MaBERT and others of its kind: fields of MaBERTConfig
MABERTS = {
    "MaBERT": {},
    # close to the paper's 205.3 M; the paper, too, has its further parameters in the state-space
    # cores
    "MaBERT-211M": dict(expand=8),
    "T12": dict(pattern="T" * 12),  # with pre-LN, so not BERT
    "M12": dict(pattern="M" * 12),
    "MW6": dict(pattern="MW" * 6),
    "H12": dict(pattern="H" * 12),
}
MODELS = [*TRANSFORMERS, *MABERTS]

SETTINGS = {  # the mode of torch.compile
    "plain": None,
    "compiled": "default",
    "CUDA graphs": "reduce-overhead",
}
PAPER_ATTENTION = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]  # not FlashAttention


class Protocol(NamedTuple):
    lengths: list[int]  # tokens of a row
    batch_size: int  # rows of an optimizer step
    rounds: int  # the paper has 20 that do not count, and 100
    seconds: float  # for the rounds of a measure at a length


PROTOCOLS = {
    "cuda": Protocol([*PAPER_LENGTHS, 8192, 16384], batch_size=32, rounds=120, seconds=600),
    "cpu": Protocol([128, 512, 1024], batch_size=1, rounds=7, seconds=60),
}


def make_classifier(name: str, length: int, device: str = "cpu") -> torch.nn.Module:
    """A two-label classifier with random weights, for rows of up to `length` tokens."""

    # ours
    if name in MABERTS:
        config = MaBERTConfig(**MABERTS[name])
        config.max_position = max(config.max_position, length)
        with torch.device(device):
            return MaBERTForSequenceClassification(config)

    # a peer
    import transformers

    transformers.logging.set_verbosity_error()  # no notes on how a model pads its rows
    family, changes = TRANSFORMERS[name]
    config = getattr(transformers, f"{family}Config")(**changes)

    # BigBird takes whole blocks of 64 tokens; Longformer counts positions from 2 on
    positions = length + -length % 64 + 2 * (name == "Longformer")
    config.max_position_embeddings = max(config.max_position_embeddings, positions)
    with torch.device(device):
        return getattr(transformers, f"{family}ForSequenceClassification")(config)


class Contender:
    """A model with its optimizer and a batch, and the two things that are timed.

    Each setting, a name of SETTINGS, calls the model in its own way.
    """

    def __init__(self, name, length, device, batch_size=1, settings=("plain",), flash=False):
        self.flash = flash  # whether FlashAttention is allowed
        self.model = make_classifier(name, length, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        vocab_size = self.model.config.vocab_size
        self.rows = torch.randint(5, vocab_size, (batch_size, length), device=device)

        # For each setting, how many rows go through at once, fewer once memory does not suffice;
        # and the model to call.
        self.rows_at_once = dict.fromkeys(settings, batch_size)
        self.calls = {}
        for setting in settings:
            self.calls[setting] = self.model
            if mode := SETTINGS[setting]:
                self.calls[setting] = torch.compile(self.model, dynamic=False, mode=mode)

    def forward(self, setting: str, rows: torch.Tensor, labels: torch.Tensor | None = None):
        """The model's output; with labels, in training."""

        # the mode, and where a CUDA graph's step begins
        training = labels is not None
        if self.model.training != training:
            self.model.train(training)
        if setting == "CUDA graphs":
            torch.compiler.cudagraph_mark_step_begin()

        # a tokenizer gives a mask of ones, which FlashAttention does not take
        mask = None if self.flash else torch.ones_like(rows)
        kernels = contextlib.nullcontext()
        if rows.is_cuda and not self.flash:
            kernels = sdpa_kernel(PAPER_ATTENTION)

        # bf16 on a GPU; its copies of the weights are kept where the backward pass needs them
        bf16 = dict(dtype=torch.bfloat16, enabled=rows.is_cuda, cache_enabled=training)
        with torch.autocast(rows.device.type, **bf16), kernels:
            return self.calls[setting](input_ids=rows, attention_mask=mask, labels=labels)

    @torch.no_grad()
    def forward_pass(self, setting: str):
        """A forward pass of one row."""
        self.forward(setting, self.rows[:1])

    def optimizer_step(self, setting: str):
        """An optimizer step. Once memory does not suffice, the batch goes through in parts."""
        try:
            # forward and backward over the parts, one optimizer step
            for rows in self.rows.split(self.rows_at_once[setting]):
                labels = rows.new_zeros(len(rows))
                share = len(rows) / len(self.rows)
                # the loss has no name, so that its graph is freed before the next part
                (self.forward(setting, rows, labels).loss * share).backward()
            self.optimizer.step()
            return
        except torch.OutOfMemoryError:
            self.optimizer.state.clear()  # half of it may have been made
            if self.rows_at_once[setting] == 1 or setting == "CUDA graphs":  # cannot accumulate
                raise
        finally:
            self.optimizer.zero_grad()

        # again, in parts half as large
        self.rows_at_once[setting] //= 2
        free_memory()
        self.optimizer_step(setting)


TIMED = {"latency": Contender.forward_pass, "training": Contender.optimizer_step}


def forward_memory(name: str, length: int, device: str) -> float:
    """MiB that a model and a forward pass of it take at most, alone on the device."""

    # what first calls load does not count: the model's modules, PyTorch's kernels
    make_classifier(name, length, "meta")
    tiny = MaBERTConfig(hidden_size=16, num_heads=2, intermediate_size=16, pattern="MT")
    with torch.device(device):
        MaBERTForSequenceClassification(tiny)(torch.zeros(1, 1, dtype=torch.long))

    # the model itself counts
    call = lambda: Contender(name, length, device).forward_pass("plain")  # noqa: E731
    return peak_memory(call, device) / 2**20


class Measurement(NamedTuple):
    """What was measured of a model at a length."""

    value: float | str  # or the reason why there is no number
    notes: tuple[str, ...] = ()  # the best setting; the parts of the batch


Measurements = dict[tuple[str, str, int], Measurement]  # by (measure, model, length)


def measure_length(length: int, args) -> Measurements:
    """All measures of all models at a length; with --fastest no memory, and the best setting."""
    measured = {}
    fitting = args.models

    # memory: each model alone on the device; one that does not fit is not timed
    if not args.fastest:
        fitting = []
        for name in args.models:
            value = measured_alone(args.device, forward_memory, name, length, args.device)
            measured["memory", name, length] = Measurement(value)
            if value != OUT_OF_MEMORY:
                fitting.append(name)

    # a compiled model never falls back to one that is not; models of one class share the limit
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    @functools.cache  # a model is made when it has its first turn
    def contender(name: str) -> Contender:
        flash = args.fastest and args.device == "cuda"
        return Contender(name, length, args.device, args.batch_size, args.settings, flash)

    def run_ms(measure: str, name: str, setting: str) -> float:
        return wall_ms(TIMED[measure], contender(name), setting)

    # time: interleaved, all models in all settings
    for measure in TIMED:
        keys = itertools.product(fitting, args.settings)
        calls = {key: functools.partial(run_ms, measure, *key) for key in keys}
        times = interleaved_medians(calls, args.rounds, args.seconds)

        for name in args.models:
            measured[measure, name, length] = Measurement(OUT_OF_MEMORY)
        for name in fitting:
            # the best setting; one without a number, if there is no other
            by_setting = {setting: times[name, setting] for setting in args.settings}
            numbers = {key: ms for key, ms in by_setting.items() if isinstance(ms, float)}
            best = min(numbers, key=numbers.get, default=args.settings[0])
            notes = [best] if args.fastest else []

            # into how many parts the batch was split
            if best in numbers and (rows := contender(name).rows_at_once[best]) < args.batch_size:
                notes.append(f"{math.ceil(args.batch_size / rows)} × {rows} rows")
            measured[measure, name, length] = Measurement(by_setting[best], tuple(notes))

    torch.compiler.reset()
    return measured


def measured_keys(measured: Measurements) -> tuple[list[str], list[str], list[int]]:
    """(measures, models, lengths) that were measured: measures in the paper's order."""
    measures, models, lengths = (list(dict.fromkeys(part)) for part in zip(*measured))
    return [measure for measure in MEASURES if measure in measures], models, lengths


def layer_flops(letter: str, length: int) -> int:
    """Floating-point operations of a layer of the base model: a forward pass of one row.

    To what PyTorch counts, the scan adds 7 for each update of a state: Δ A, its exponential, Δ u
    times B, and two fused multiply-adds, one for the state and one with C. They count here, where
    M and T layers are compared; `flops_per_token` leaves them out, since TFLOP/s are compared with
    what a GPU reaches in matrix products.
    """
    config = MaBERTConfig()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        mabert.LAYERS[letter](config)(torch.zeros(1, length, config.hidden_size))
    updates = length * config.expand * config.hidden_size * config.d_state
    return counter.get_total_flops() + 7 * updates * (letter == "M")


@functools.cache
def crossover() -> int:
    """The row length from which on a T layer takes more operations than an M layer."""
    # attention grows with the square of the length: from there on it always takes more
    lengths = range(1, 2**16)
    t_takes_more = lambda length: layer_flops("T", length) > layer_flops("M", length)  # noqa: E731
    return lengths[bisect.bisect(lengths, False, key=t_takes_more)]


def paper_value(model: str, measure: str, length: int) -> float | None:
    """A number of the paper's tables, if they have it."""
    values = PAPER_EFFICIENCY.get((model, measure), ())
    return dict(zip(PAPER_LENGTHS, values)).get(length)


def ratios_to(reference: str, values: dict[str, float | str | None]) -> dict[str, float]:
    """Each model's value over that of the reference, where both are numbers.

    With them the means over the paper's baselines, its headline, if each of them has a ratio.
    """
    # each model
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    if reference not in numbers:
        return {}
    ratios = {name: value / numbers[reference] for name, value in numbers.items()}

    # the headline
    means = {
        "mean of the paper's baselines": BASELINES,
        "the same without DeBERTa-v3": [name for name in BASELINES if name != "DeBERTa-v3"],
    }
    for title, names in means.items():
        if ratios.keys() >= set(names):
            ratios[title] = statistics.mean(ratios[name] for name in names)
    return ratios


def cell_text(value: float | str, *notes: float | str | None) -> str:
    """A value, or a dash and the reason why there is none; in brackets the notes, if any."""
    if isinstance(value, str):
        notes = (value, *notes)
        value = "–"
    # numbers with as many digits as can be read
    texts = []
    for part in (value, *notes):
        if isinstance(part, float):
            part = f"{part:.0f}" if part >= 100 else f"{part:.2f}"
        if part is not None:
            texts.append(part)
    first, *others = texts
    return f"{first} ({'; '.join(others)})" if others else first


def ratio_table(measured: Measurements, length: int) -> str:
    """What each model takes over what MaBERT takes, the paper's in brackets; "" without MaBERT."""
    measures, models, _ = measured_keys(measured)
    columns = {}
    for measure in measures:
        # measured, and the paper's
        values = {name: measured[measure, name, length].value for name in models}
        paper = ratios_to("MaBERT", {name: paper_value(name, measure, length) for name in MODELS})

        # a column for each MaBERT
        for reference in models:
            if reference.startswith("MaBERT"):
                ratios = ratios_to(reference, values)
                texts = {name: cell_text(ratio, paper.get(name)) for name, ratio in ratios.items()}
                columns[f"{measure} ÷ {reference}"] = texts

    # a line for each model and mean that has a ratio in some column
    names = dict.fromkeys(itertools.chain(*columns.values()))
    if not names:
        return ""
    body = [[name, *(column.get(name, "–") for column in columns.values())] for name in names]
    text = table(["model", *columns], body)
    return f"\nRatios at {length} tokens; above 1, MaBERT takes less:\n\n{text}\n"


def efficiency_text(measured: Measurements, parameters: dict[str, int], args) -> str:
    """The page: a table for each measure, and the ratios. parameters: of each model."""
    measures, models, lengths = measured_keys(measured)

    # what was done
    precision = "float32 on a CPU, PyTorch's fused attention"
    if args.device == "cuda":
        precision = "bf16 autocast, float32 weights"
    setting = "neither torch.compile nor, on a GPU, FlashAttention"
    if args.fastest:
        setting = "each model's fastest setting"
    counted = args.rounds - rounds_that_do_not_count(args.rounds)
    text = f"""{title_line(args.device)}
{precision}; {setting}.
Medians of {counted} runs in turns, or at least 3, if those took over {args.seconds:g} s.
For the times all models of a length are in memory together; with more of them, a batch may have to
be split into more parts.
In brackets the paper's figures, from an A100, 32 rows in an optimizer step; its MaBERT has 205.3 M
parameters. T12, M12, MW6 and H12 are MaBERT with other patterns (T12 is pre-LN, so not BERT).
"""

    # a table for each measure
    for measure in measures:
        body = []
        for name in models:
            texts = []
            for length in lengths:
                value, notes = measured[measure, name, length]
                texts.append(cell_text(value, paper_value(name, measure, length), *notes))
            body.append([name, f"{parameters[name] / 1e6:.1f}", *texts])
        step = f"optimizer step, batch {args.batch_size}"
        title = MEASURES[measure].replace("optimizer step", step)
        text += f"\n{title}:\n\n{table(['model', 'parameters, M', *lengths], body)}\n"

    # the ratios, and what operations alone would say
    text += ratio_table(measured, 4096 if 4096 in lengths else max(lengths))
    operations = f"From {crossover()} tokens on, a T layer of the base model takes more operations"
    return f"{text}\n{operations} than an M layer.\n"


def draw_efficiency(file: str, title: str, measured: Measurements):
    """A figure with a panel for each measure: ratios to MaBERT.

    A ring is the paper's ratio, in the colour of its model.
    """
    measures, models, lengths = measured_keys(measured)
    titles = dict(memory="peak memory", training="training step", latency="latency")
    titles = [titles[measure] for measure in measures]
    x_labels = ["tokens of a row"] * len(measures)
    figure, panels = new_figure(titles, x_labels, "ratio to MaBERT")
    rings = "Rings: the paper's ratios to its MaBERT of 205 M parameters, on an A100"
    figure.suptitle(f"{title}\nAbove 1, MaBERT takes less. {rings}", fontsize=9)

    for axes, measure in zip(panels, measures):
        # {model: {length: ratio}}, of what was measured and of the paper's
        lines = {name: {} for name in models}
        paper = {name: {} for name in models}
        for length in lengths:
            here = {name: measured[measure, name, length].value for name in models}
            there = {name: paper_value(name, measure, length) for name in models}
            for name in models:
                lines[name][length] = ratios_to("MaBERT", here).get(name, math.nan)
                paper[name][length] = ratios_to("MaBERT", there).get(name, math.nan)

        # lines, and rings in their colours
        draw_lines(axes, lines, strong="MaBERT")
        for line, by_length in zip(axes.get_lines(), paper.values()):
            ring = dict(marker="o", markersize=7, linestyle="", markerfacecolor="none")
            axes.plot(lengths, list(by_length.values()), color=line.get_color(), label="_", **ring)

        # y is logarithmic too
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    save_figure(figure, file)


def bench_efficiency(args):
    if args.device == "cuda" and DEVICE == "cpu":
        message = "--device cuda: PyTorch sees no GPU here; --device cpu has a smaller measurement"
        raise SystemExit(message)
    check_out(args.out)

    # the protocol of the device, where the flags say nothing else
    protocol = PROTOCOLS[args.device]
    args.batch_size = protocol.batch_size
    args.rounds = protocol.rounds
    args.seconds = args.seconds or protocol.seconds

    # with --fastest fewer lengths, and all settings
    lengths = protocol.lengths
    args.settings = ["plain"]
    if args.fastest:
        lengths = [length for length in lengths if length in (512, 4096)]
        args.settings = list(SETTINGS) if args.device == "cuda" else ["plain", "compiled"]
    lengths = sorted(args.lengths or lengths)

    # sizes, without memory for the weights
    parameters = {}
    for name in args.models:
        model = make_classifier(name, 512, "meta")
        parameters[name] = sum(weight.numel() for weight in model.parameters())

    # a length at a time
    measured = {}
    for length in tqdm(lengths, unit="length"):
        measured |= measure_length(length, args)
        free_memory()

        # written after each length, so that a run that is stopped leaves what it has measured
        text = efficiency_text(measured, parameters, args)
        if args.out:
            write_atomically(Path(f"{args.out}.md"), text)
        if args.out and "MaBERT" in args.models:
            machine = describe_machine(args.device).split(",")[0]
            title = f"{machine}, {args.batch_size} row(s) in a training step"
            draw_efficiency(f"{args.out}.png", title, measured)
    print(text)


# ---- Scan: time and memory of the selective scan ----


def mamba_ssm_scan(u, delta, A, B, C, D, z, bias):
    """mamba-ssm's CUDA kernel. It wants channels first; `scan_inputs` lays memory out like that,
    so that nothing is copied here."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))  # (b, d or n, l)
    return selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True).transpose(1, 2)


def mambapy_scan(u, delta, A, B, C, D, z, bias):
    """mambapy's parallel scan, called as its Mamba block does."""
    from mambapy.pscan import pscan

    delta = F.softplus(delta + bias)
    a = torch.exp(delta[..., None] * A)  # (b, l, d, n)
    x = delta[..., None] * B[:, :, None] * u[..., None]  # (b, l, d, n)
    h = pscan(a, x)  # (b, l, d, n)
    y = (h @ C.to(x.dtype)[..., None]).squeeze(3)  # (b, l, d)
    return (y + D * u) * F.silu(z)


SCANS = {  # each (u, delta, A, B, C, D, z, delta_bias) -> y, as the model calls it
    "kernels": functools.partial(mabert.selective_scan, delta_softplus=True, backend="triton"),
    "loop": functools.partial(mabert.selective_scan, delta_softplus=True, backend="loop"),
    "reference": functools.partial(mabert.reference_scan, delta_softplus=True),
    "mamba_ssm": mamba_ssm_scan,
    "pscan": mambapy_scan,
}
PASSES = ("forward", "forward + backward")


def run_scan(name: str, tensors: list, dy: torch.Tensor | None = None) -> list[torch.Tensor]:
    """[y]; and, if dy is the gradient of y, the gradients of the tensors that the scan takes."""
    with torch.set_grad_enabled(dy is not None):
        y = SCANS[name](*tensors)
        if dy is None:
            return [y]
        return [y, *torch.autograd.grad(y, tensors, dy)]


def scan_inputs(name: str, size: tuple, device: str) -> tuple[list, torch.Tensor]:
    """(the tensors that a scan takes, a gradient of y): bf16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    b, l, d, n = size
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    # (b, l, width) each; for mamba-ssm with channels first in memory
    widths = (d, d, d, d, n, n)
    tensors = [torch.randn(b, l, width, device=device).to(dtype) for width in widths]
    if name == "mamba_ssm":
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    u, delta, z, dy, B, C = tensors

    # parameters of a layer
    A = -torch.arange(1.0, n + 1, device=device).expand(d, n).clone()  # (d, n)
    D = torch.randn(d, device=device)  # (d,)
    bias = torch.full((d,), -4.0, device=device)  # (d,)
    return [x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias)], dy


ERROR_SIZE = (2, 300, 1536, 16)  # b, l, d, n


def scan_error(name: str, device: str) -> str:
    """The largest relative error of y and the gradients, beside the formula in float64."""

    # the same inputs for both
    tensors, dy = scan_inputs(name, ERROR_SIZE, device)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    pairs = zip(run_scan(name, tensors, dy), run_scan("reference", exact, dy.double()))
    errors = [(result - expected).norm() / expected.norm() for result, expected in pairs]
    return f"{torch.stack(errors).max():.0e}"


def scan_memory(name: str, size: tuple, device: str) -> int:
    """MB that forward and backward need beyond the tensors that the scan takes."""
    torch.set_num_threads(1)
    tensors, dy = scan_inputs(name, (1, 4, 8, 2), device)
    run_scan(name, tensors, dy)  # loads what first calls load

    tensors, dy = scan_inputs(name, size, device)
    return round(peak_memory(lambda: run_scan(name, tensors, dy), device) / 1e6)


def scan_times(names: list[str], size: tuple, device: str) -> dict[tuple, float | str]:
    """{(name, pass): median of milliseconds, or the reason why there is none}."""
    cached_inputs = functools.cache(scan_inputs)  # made at the first turn

    def run_ms(name: str, passes: str) -> float:
        tensors, dy = cached_inputs(name, size, device)
        call = lambda: run_scan(name, tensors, dy if "backward" in passes else None)  # noqa: E731
        if device == "cuda":
            return triton.testing.do_bench_cudagraph(call, return_mode="median")
        return wall_ms(call)

    # interleaved, all scans and passes
    calls = {key: functools.partial(run_ms, *key) for key in itertools.product(names, PASSES)}
    return interleaved_medians(calls, rounds=7, seconds=5 if device == "cuda" else 60)


def gpu_bounds(b: int, l: int, d: int, n: int) -> list[list]:
    """Two lines of the table: the least time, if one thing alone kept the GPU busy.

    Exponentials: one for each update of a state forward, two more backward; a multiprocessor makes
    16 in a cycle. Memory traffic, in bf16: u, delta, z and y forward; backward also dy, the first
    three again and their gradients.
    """
    gpu = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    exponentials_a_ms = 16 * gpu["multiprocessor_count"] * gpu["sm_clock_rate"]  # clock in kHz
    bytes_a_ms = triton.testing.get_dram_gbps() * 1e6

    # ms for the exponentials of a forward pass, and for one tensor (b, l, d)
    exponentials = b * l * d * n / exponentials_a_ms
    tensor = 2 * b * l * d / bytes_a_ms
    return [
        ["exponentials alone", "", f"{exponentials:.3g}", f"{3 * exponentials:.3g}", ""],
        ["memory traffic alone", "", f"{4 * tensor:.3g}", f"{11 * tensor:.3g}", ""],
    ]


def time_text(ms: float | str, first_ms: float | str) -> str:
    """Milliseconds, and in brackets their ratio to those of the first scan."""
    if isinstance(ms, str):
        return ms
    if isinstance(first_ms, str):
        return f"{ms:.3g}"
    return f"{ms:.3g} ({ms / first_ms:.2f}×)"


def bench_scan(args):
    if args.static or args.all:
        return bench_static(args)

    # which scans, at which (b, l) of the base model
    torch.set_num_threads(1)
    names = ["loop", "reference", "pscan"]
    shapes = [(8, 128), (1, 1024)]
    if DEVICE == "cuda":
        names = ["kernels", "mamba_ssm", "pscan"]
        shapes = [(32, 128), (32, 512), (32, 4096), (8, 512), (1, 512), (1, 4096), (1, 16384)]
    sizes = args.sizes or [(b, l, 1536, 16) for b, l in shapes]
    print(f"""{title_line(DEVICE)}
Error: the largest of y and the gradients, relative to the formula in float64, at the size
{ERROR_SIZE} whatever the table's. Times: medians, in turns, of float32 on a CPU and bf16 on a GPU,
there of a CUDA graph's replays, without the gaps between launches; in brackets the ratio to
`{names[0]}`. Forward: without gradients. Peak memory: of forward and backward, beyond the
inputs.""")

    # a table for each size
    errors = {name: value_or_reason(scan_error, name, DEVICE) for name in names}
    for size in tqdm(sizes, unit="size"):
        times = scan_times(names, size, DEVICE)  # interleaved
        body = []
        for name in names:
            texts = [time_text(times[name, passes], times[names[0], passes]) for passes in PASSES]
            memory = measured_alone(DEVICE, scan_memory, name, size, DEVICE)
            body.append([name, errors[name], *texts, memory])
        if DEVICE == "cuda":
            body += gpu_bounds(*size)

        # the first cell says the size
        milliseconds = [f"{passes}, ms" for passes in PASSES]
        head = [f"(b, l, d, n) = {size}", "error", *milliseconds, "peak memory, MB"]
        tqdm.write(f"\n{table(head, body)}", sys.stdout)


# ---- Machine code: what the compiler makes of the kernels, without a GPU ----

# What is constant in all kernels, as the base model calls them: d 1536, n 16, softplus, z
STATIC_CONSTANTS = dict(
    d=1536,
    n=16,
    N=16,
    SOFTPLUS=True,
    BACKWARD=False,
    CHUNK=mabert._chunk_length(16),
    # elements from one token to the next; z is a half of what the first projection makes
    u_stride=1536,
    dy_stride=1536,
    delta_stride=1536,
    z_stride=3072,
)
STATIC_CASES = {  # a kernel, and what else is constant
    "_pack": dict(TILE=mabert.FORWARD_TILE),
    "_state_ends": dict(TILE=mabert.FORWARD_TILE),
    "_gradient_ends": dict(TILE=mabert.BACKWARD_TILE),
    "_segment_starts": dict(TILE=8),
    "_outputs": dict(TILE=mabert.FORWARD_TILE),  # from start states, keeping those of the chunks
    "_gradients": dict(TILE=mabert.BACKWARD_TILE),
}
INPUT_POINTERS = {  # of tensors in the dtype of the inputs; the others are float32
    *("u_ptr", "delta_ptr", "z_ptr", "y_ptr", "B_ptr", "C_ptr"),
    *("dy_ptr", "du_ptr", "ddelta_ptr", "dz_ptr"),
}
TARGETS = list(itertools.product(("sm_80", "sm_90"), ("bf16", "fp32")))  # A100, H100


def compile_kernel(name: str, arch: str, dtype: str) -> bytes:
    """The machine code (a cubin) of a kernel of STATIC_CASES."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # the constants that this kernel has
    kernel = getattr(mabert, name)
    values = STATIC_CONSTANTS | STATIC_CASES[name]
    constants = {key: values[key] for key in kernel.arg_names if key in values}

    # the kinds of the arguments
    signature = {}
    attributes = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif "_ptr" in argument:
            signature[argument] = f"*{dtype if argument in INPUT_POINTERS else 'fp32'}"
            attributes[(i,)] = [["tt.divisibility", 16]]  # as tensors of PyTorch begin
        else:
            signature[argument] = "i32"

    # compile, not for the GPU of this machine
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=mabert.ONE_WARP).asm["cubin"]


def disassemble(cubin: bytes) -> str:
    """The listing of NVIDIA's cuobjdump, which comes with Triton."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(cubin)
        program = triton.knobs.nvidia.cuobjdump.path
        command = [program, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)


def innermost_loops(listing: str) -> list[list[str]]:
    """For each innermost loop of a listing, the names of its instructions."""

    # a line is /*address*/, perhaps @predicate, the name, operands up to a semicolon
    line = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);"
    code = [(int(at, 16), name, operands) for at, name, operands in re.findall(line, listing)]

    # a loop is a branch back to an earlier address
    loops = []
    for at, name, operands in code:
        if name == "BRA":
            target = int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)
            if target < at:
                loops.append((target, at))

    # it is innermost if no other loop ends inside
    ends = [end for _, end in loops]
    innermost = []
    for start, end in loops:
        if not any(start < other < end for other in ends):
            innermost.append([name for at, name, _ in code if start <= at <= end])
    return innermost


def static_cells(case: tuple[str, str, str]) -> list:
    """A line of the table for (kernel, architecture, dtype of the inputs).

    Registers and bytes of stack; then instructions of the time loops per update of a state and
    lane: all of them, those of the pipe for exponentials (MUFU), shuffles (SHFL).
    """
    kernel = case[0]
    listing = disassemble(compile_kernel(*case))
    registers, stack = (re.search(rf"{key}:(\d+)", listing)[1] for key in ("REG", "STACK"))

    # in an iteration a lane updates 16 states for each step of a tile; in _segment_starts one
    states = 1 if kernel == "_segment_starts" else 16
    updates = STATIC_CASES[kernel]["TILE"] * states

    # the sum over the loops; of all instructions also that of each loop
    loops = innermost_loops(listing)
    texts = []
    for prefix in ("", "MUFU", "SHFL"):
        counts = [sum(name.startswith(prefix) for name in loop) / updates for loop in loops]
        texts.append(f"{sum(counts):.2f}")
        if len(counts) > 1 and not prefix:
            terms = " + ".join(f"{count:.2f}" for count in counts)
            texts[-1] = f"{terms} = {texts[-1]}"
    return [*case, registers, stack, *texts]


def bench_static(args):
    if not triton or mabert.INTERPRETED:
        needed = "the package triton (on Linux), and no TRITON_INTERPRET in the environment"
        raise SystemExit(f"--static needs {needed}")

    # the two main kernels for an H100 and bf16, or all there is
    cases = [("_outputs", "sm_90", "bf16"), ("_gradients", "sm_90", "bf16")]
    if args.all:
        cases = [(kernel, *target) for kernel in STATIC_CASES for target in TARGETS]

    # a compiler on each core
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        body = list(tqdm(pool.map(static_cells, cases), total=len(cases)))

    print(title_line())
    print("""\
Compiled, not run: d 1536, n 16, softplus, D, z. Instructions of the time loops per state update and
lane; _outputs keeps states for the backward pass, _gradients has two loops, replay and reverse.
""")
    head = ["kernel", "architecture", "inputs", "registers", "stack bytes"]
    print(table([*head, "instructions", "exponential pipe", "shuffles"], body))


# ---- Drift: what padding does to real tokens (the question of the paper's Figures 3 and 4) ----

PSM_FORMS = ("none", "post", "pre", "pre+post", "scan", "pre+scan", "pre+scan+post")
CONVOLUTIONS = ("causal", "centred")
SIDES = ("right", "left")  # where the pads are
SENTENCES = 100
DRIFTS = {
    # how far apart are states with and without pads
    "tokens_l2": "Relative L2 change of the final hidden states of real tokens",
    "cls_cosine": "Cosine distance of the final [CLS] (the paper's Figures 3a and 4)",
    "mean_cosine": "Cosine distance of the mean over real tokens (the paper's Figure 3b)",
}


def read_sentences(args, config: MaBERTConfig) -> list[torch.Tensor]:
    """Token ids of --sentences, or random ones: a row each, without pads, the shortest first."""
    if not args.sentences:
        return list(torch.randint(5, config.vocab_size, (SENTENCES, 24)))

    # lines of a text, or the last column of a table, as in CoLA's dev.tsv
    try:
        lines = Path(args.sentences).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--sentences: cannot read {args.sentences}: {error}") from error
    texts = [line.split("\t")[-1].strip() for line in lines]
    texts = [text for text in texts if text][:SENTENCES]
    if not texts:
        raise SystemExit(f"--sentences: {args.sentences} has no text")

    # the checkpoint's tokens; without one a word is a token, whose id is made of its letters
    if args.checkpoint:
        tokenizer = load_tokenizer(str(Path(args.checkpoint, "tokenizer.json")))
        rows = [tokenizer.encode(text).ids for text in texts]
    else:
        hashes = [[zlib.crc32(word.encode()) for word in text.split()] for text in texts]
        rows = [[5 + x % (config.vocab_size - 5) for x in row] for row in hashes]
    return [torch.tensor(row[: config.max_position]) for row in sorted(rows, key=len)]


def unpadded_states(model: MaBERT, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The final hidden states (l, h) of each row; rows of one length are a batch without pads."""
    states = []
    for _, same_length in itertools.groupby(rows, len):
        states += model(torch.stack(list(same_length)))  # (b, l, h)
    return states


def padded_states(model: MaBERT, rows: list[torch.Tensor], pads: int, side: str):
    """The final hidden states (l, h) of each row, computed in one batch; `pads` pads stand beside
    the longest row."""

    # where the real tokens are, on either side
    lengths = [len(row) for row in rows]
    mask = torch.arange(max(lengths) + pads) < torch.tensor(lengths)[:, None]  # (b, l)
    if side == "left":
        mask = mask.flip(1)

    # their states, row by row
    ids = torch.full(mask.shape, model.config.pad_token_id).masked_scatter(mask, torch.cat(rows))
    return model(ids, mask)[mask].split(lengths)


def cosine_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 − cos(x, y), without the cancellation of that difference."""
    return (F.normalize(x, dim=0) - F.normalize(y, dim=0)).square().sum() / 2


def mean_drifts(unpadded, padded) -> dict[str, float]:
    """{a name of DRIFTS: mean over the rows}, of the states (l, h) of each row."""
    drifts = {measure: [] for measure in DRIFTS}
    for x, y in zip(unpadded, padded):
        drifts["tokens_l2"].append((y - x).norm() / x.norm())
        drifts["cls_cosine"].append(cosine_distance(x[0], y[0]))
        drifts["mean_cosine"].append(cosine_distance(x.mean(0), y.mean(0)))
    return {measure: torch.stack(values).mean().item() for measure, values in drifts.items()}


@torch.no_grad()
def measure_drifts(base: MaBERT, rows: list[torch.Tensor], numbers_of_pads: list[int]) -> dict:
    """{measure: {(convolution, side): {form: {pads: value}}}}, for the weights of one model."""
    cases = list(itertools.product(CONVOLUTIONS, SIDES))
    drifts = {m: {case: {form: {} for form in PSM_FORMS} for case in cases} for m in DRIFTS}
    models = list(itertools.product(PSM_FORMS, CONVOLUTIONS))
    for form, convolution in tqdm(models, unit="model"):
        # the weights under this form of PSM, with this convolution
        stages = train_mlm.psm_stages(form)
        causal = convolution == "causal"
        model = MaBERT(dataclasses.replace(base.config, psm=stages, causal_conv=causal))
        model.load_state_dict(base.state_dict())
        model.double().eval()

        # every number of pads, on both sides
        unpadded = unpadded_states(model, rows)
        for side, pads in itertools.product(SIDES, numbers_of_pads):
            padded = padded_states(model, rows, pads, side)
            for measure, value in mean_drifts(unpadded, padded).items():
                drifts[measure][convolution, side][form][pads] = value
    return drifts


def drift_text(args, base: MaBERT, rows: list, drifts: dict) -> str:
    """The page of {measure: {(convolution, side): {form: {pads: value}}}}."""

    # what was done
    weights = "random weights (MMT four times, hidden size 64)"
    if args.checkpoint:
        convolution = "causal" if base.config.causal_conv else "centred"
        training = f"PSM {'+'.join(base.config.psm) or 'none'} and a {convolution} convolution"
        weights = f"{args.checkpoint}, {base.config.pattern} pretrained with {training}"
    source = f"sentences of {args.sentences}" if args.sentences else "random rows of 24 tokens"
    pads = " / ".join(map(str, args.pads))
    text = f"{title_line()}\nWith {pads} pads in the longest row, float64; "
    text += f"{weights}, {len(rows)} {source}.\n"

    # a table for each measure, with a line for each form of PSM
    for measure, title in DRIFTS.items():
        cases = drifts[measure]
        body = []
        for form in PSM_FORMS:  # all numbers of pads in a cell
            cells = [" / ".join(f"{x:.0e}" for x in case[form].values()) for case in cases.values()]
            body.append([form, *cells])
        head = ["PSM stages", *(f"{convolution}, pads {side}" for convolution, side in cases)]
        text += f"\n{title}:\n\n{table(head, body)}\n"
    return text


def draw_drift(file: str, cases: dict):
    """The relative L2 change with a centred convolution, {(convolution, side): {form: {pads: x}}}.

    What is zero but for rounding lies on one line at the bottom, called exact.
    """
    titles = [f"pads on the {side}" for side in SIDES]
    x_labels = ["pads in the longest row (shorter rows have more)"] * 2
    figure, panels = new_figure(titles, x_labels, "relative L2 change")
    title = "Change of real tokens under padding, for each form of padding-safe masking"
    figure.suptitle(f"{title}; centred convolution", fontsize=9)

    # exact is a power of ten below all that is not
    rounding = 1e-12
    centred = [form for side in SIDES for form in cases["centred", side].values()]
    changes = [x for form in centred for x in form.values() if x > rounding]
    lowest = math.floor(math.log10(min(changes, default=1e-3))) - 1
    ticks = {10.0**power: f"{10.0**power:g}" for power in range(lowest + 1, 1)}
    ticks[10.0**lowest] = "exact"

    # the panels
    for axes, side in zip(panels, SIDES):
        lines = {}
        for form, by_pads in cases["centred", side].items():
            lines[form] = {str(n): max(x, 10.0**lowest) for n, x in by_pads.items()}
        draw_lines(axes, lines, strong="pre+scan+post")
        axes.set_yscale("log")
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.set_ylim(bottom=10.0**lowest / 1.6)
        axes.minorticks_off()
    save_figure(figure, file)


def bench_drift(args):
    check_out(args.out)

    # the weights, and the rows
    torch.manual_seed(0)
    small = dict(vocab_size=1000, hidden_size=64, num_heads=4, intermediate_size=256)
    try:
        if args.checkpoint:
            base = MaBERT.from_pretrained(args.checkpoint)
        else:
            base = MaBERT(MaBERTConfig(**small))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--checkpoint: {error}") from error
    rows = read_sentences(args, base.config)

    # the page and the figure
    drifts = measure_drifts(base, rows, args.pads)
    text = drift_text(args, base, rows, drifts)
    print(text)
    if args.out:
        write_atomically(Path(f"{args.out}.md"), text)
        draw_drift(f"{args.out}.png", drifts["tokens_l2"])


# ---- Step: where the time of a training step goes ----

WARM_UP = 2  # steps of each row length that do not count
WAITING = "waiting for data"
PEAKS = {  # part of a GPU's name: TFLOP/s of dense bf16 products, by NVIDIA's data sheets
    "H100 80GB HBM3$": 989,
    "H200$": 989,
    "A100": 312,
    "RTX 4090$": 165,
}


def share_of_peak(tflops: float, gpu: str) -> str:
    """How much of what a GPU of this name can do at most, in words; empty if that is not known."""
    for name, peak in PEAKS.items():
        if re.search(name, gpu):
            return f" ({tflops / peak:.0%} of its peak)"
    return ""


def flops_per_token(config: MaBERTConfig, length: int, mask_rate: float) -> float:
    """Operations of matrix products and convolutions for a token, forward and backward.

    The scan is left out; `layer_flops` counts it.
    """
    # the encoder, and the head at the tokens that are predicted
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        MaBERT(config)(torch.zeros(1, length, dtype=torch.long))
    head = 2 * config.hidden_size * (config.hidden_size + config.vocab_size) * mask_rate
    return 3 * (counter.get_total_flops() / length + head)  # backward is twice forward


class Stopwatch:
    """The time between marks, each of which names what has just ended.

    On a GPU by its own clock, without waiting for it.
    """

    def __init__(self):
        self.marks = []  # (name, time)

    def mark(self, name: str):
        now = perf_counter()
        if DEVICE == "cuda":  # when the GPU has come this far
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((name, now))

    def restart(self):
        """Forgets all but the last mark, from which time goes on."""
        del self.marks[:-1]

    def seconds(self) -> dict[str, float]:
        """{name: seconds}, in the order in which the names came."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        # from each mark to the next, which names what lies between
        totals = collections.defaultdict(float)
        for (_, begin), (name, end) in itertools.pairwise(self.marks):
            totals[name] += begin.elapsed_time(end) / 1000 if DEVICE == "cuda" else end - begin
        return dict(totals)


def hook_stopwatch(watch: Stopwatch, model, optimizer, layers: bool):
    """Marks the parts of a training step by hooks on the model, its layers and the optimizer.

    What is outside the layers is "rest": forward, the copy to the device, embeddings, head and
    loss; backward, these again, the exchange between processes and the clipping of gradients.
    """

    def marks(name: str):
        return lambda *_: watch.mark(name)

    def before_forward(*_):
        # the first micro-batch of a step follows the wait for data, others a backward pass
        if watch.marks[-1][0] != WAITING:
            watch.mark("backward, rest")

    # the model and the optimizer
    model.register_forward_pre_hook(before_forward)
    model.register_forward_hook(marks("forward, rest"))
    optimizer.register_step_pre_hook(marks("backward, rest"))

    # each layer
    for letter, layer in zip(model.config.pattern, model.encoder.layers if layers else ()):
        layer.register_forward_pre_hook(marks("forward, rest"))
        layer.register_forward_hook(marks(f"forward, {letter} layers"))
        layer.register_full_backward_pre_hook(marks("backward, rest"))
        layer.register_full_backward_hook(marks(f"backward, {letter} layers"))


def measure_steps(args, steps: int):
    """Prints where the time of training steps goes, for each row length of train_mlm.py's args.

    Then how long 100,000 of them, the paper's smallest budget, would take.
    """

    # all that training needs
    data = train_mlm.prepare(args, None)
    model, shared, optimizer = train_mlm.make_model(args, data)
    watch = Stopwatch()
    hook_stopwatch(watch, model, optimizer, layers=not args.compile)  # hooks would cut the graph

    mean_seconds = 0.0  # of a step, over the whole schedule
    for (_, rows), (_, share) in zip(data.phases, args.length_schedule):
        # tokens of all processes, without and with pads
        real = padded = 0

        batches = train_mlm.batches_ahead(args, [(0, rows)], range(WARM_UP + steps))
        for step, batch in enumerate(batches):
            # the first steps do not count
            if step == WARM_UP:
                watch.restart()
                real = padded = 0
                if DEVICE == "cuda":
                    torch.cuda.reset_peak_memory_stats()

            # a step
            watch.mark(WAITING)
            train_mlm.train_step(shared, optimizer, batch, step, args)
            watch.mark("optimizer")
            real += batch.real
            padded += batch.padded

        # all steps
        parts = watch.seconds()
        seconds = sum(parts.values())
        flops = real * flops_per_token(model.config, rows.length, args.mask_rate)
        tflops = flops / seconds / train_mlm.PROCESSES / 1e12
        mean_seconds += share * seconds / steps

        # in one line
        words = f"rows of {rows.length} tokens: {seconds / steps:.3f} s a step, "
        words += f"{real / seconds:.0f} tokens/s, {1 - real / padded:.1%} padding, "
        words += f"{tflops:.3g} TFLOP/s a device without the scan"
        if DEVICE == "cuda":
            words += share_of_peak(tflops, torch.cuda.get_device_name())
            words += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"

        # the parts of a step
        body = []
        for name, part in parts.items():
            body.append([name, f"{1000 * part / steps:.1f}", f"{part / seconds:.1%}"])
        print(f"\n{words}\n\n{table(['part of a step', 'ms', 'share'], body)}")

    hours = 100_000 * mean_seconds / 3600
    print(f"\n100,000 steps of this schedule of lengths would take {hours:.1f} hours.")


def bench_step(args):
    # of torchrun's processes the first speaks
    if train_mlm.PROCESSES > 1:
        train_mlm.join_processes()
    if train_mlm.RANK > 0:
        sys.stdout = open(os.devnull, "w")

    # too little memory is what a user may try out here
    try:
        print(title_line(DEVICE))
        measure_steps(args.training, args.measure)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "lower --micro-batch-size, or pass --activation-checkpointing"
        first_line = str(error).split("\n")[0]
        raise SystemExit(f"out of memory: {advice} ({first_line})") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- The command line ----

positive = bounded(int, 1, 2**31)


def scan_size(text: str) -> tuple[int, ...]:
    """A type for argparse: B,L,D,N."""
    size = tuple(positive(part) for part in text.split(","))
    if len(size) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not B,L,D,N")
    return size


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    # fmt: off

    # efficiency
    title = "Tables B5 to B7 and Figure 5: MaBERT and its peers"
    efficiency = commands.add_parser("efficiency", help=title, description=title)
    efficiency.set_defaults(bench=bench_efficiency)
    efficiency.add_argument("--device", choices=["cuda", "cpu"], default=DEVICE,
        help="default: the GPU, if there is one; on a CPU less is measured")
    efficiency.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL",
        help=f"of {', '.join(MODELS)}")
    efficiency.add_argument("--lengths", nargs="+", type=positive, metavar="TOKENS",
        help="default: the paper's and up to 16384; on a CPU, and with --fastest, fewer")
    efficiency.add_argument("--seconds", type=bounded(float, 1e-3),
        help="for the runs of a measure at a length (default: 600; on a CPU 60)")
    efficiency.add_argument("--fastest", action="store_true",
        help="the best of torch.compile, CUDA graphs and neither, with FlashAttention")
    efficiency.add_argument("--out", type=path_name, metavar="NAME",
        help="write NAME.md and, if MaBERT is among the models, NAME.png (needs matplotlib)")

    # scan
    title = "time and memory of the selective scan, on the GPU or on one thread of the CPU"
    scan = commands.add_parser("scan", help=title, description=title)
    scan.set_defaults(bench=bench_scan)
    scan.add_argument("--sizes", nargs="+", type=scan_size, metavar="B,L,D,N",
        help="default: the base model's, at several lengths")
    scan.add_argument("--static", action="store_true",
        help="instead: the machine code of the two main kernels for an H100, without a GPU")
    scan.add_argument("--all", action="store_true",
        help="the same of all kernels of the scan, for an A100 and float32 as well")

    # drift
    title = "what padding does to real tokens, for each form of padding-safe masking (PSM)"
    drift = commands.add_parser("drift", help=title, description=title)
    drift.set_defaults(bench=bench_drift)
    drift.add_argument("--pads", nargs="+", type=bounded(int, 0, 2**16), default=[0, 1, 8, 64, 512],
        help="of the longest row; shorter ones are padded to its length (%(default)s)")
    drift.add_argument("--checkpoint", type=path_name, metavar="FOLDER",
        help="a trained model, instead of random weights")
    drift.add_argument("--sentences", type=path_name, metavar="FILE",
        help=f"{SENTENCES} rows of CoLA's dev.tsv or of a text file, instead of random ones")
    drift.add_argument("--out", type=path_name, metavar="NAME",
        help="write NAME.md and NAME.png (needs matplotlib)")

    # step
    title = "where the time of a training step goes"
    step = commands.add_parser("step", help=title, allow_abbrev=False,
        usage="python bench.py step [--measure STEPS] [any flags of train_mlm.py]",
        description=f"Prints {title}, for each row length. Nothing is written but, as in training, "
        "the ids of the text's tokens in --cache.")
    step.set_defaults(bench=bench_step)
    step.add_argument("--measure", type=positive, default=20, metavar="STEPS",
        help="steps of each row length, after two that do not count (%(default)s)")
    # fmt: on

    # of step, what is left over is for train_mlm.py
    args, others = parser.parse_known_args(argv)
    if args.bench == bench_step:
        args.training = train_mlm.parse_args(others)
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return args


@contextlib.contextmanager
def errors_in_one_line():
    """Ends a program with one line, not with a traceback, for what is no fault of the program."""
    try:
        yield
    except ModuleNotFoundError as error:  # one of the extra "bench"
        message = f'this needs the package {error.name}: pip install -e ".[bench]"'
        raise SystemExit(message) from error
    except OSError as error:  # a full disk, a folder that may not be written
        raise SystemExit(f"cannot go on: {error}") from error
    except KeyboardInterrupt:  # Ctrl-C
        raise SystemExit("\ninterrupted") from None


def main(argv: list[str]):
    args = parse_args(argv)
    with errors_in_one_line():
        args.bench(args)


if __name__ == "__main__":
    run_program(main)
