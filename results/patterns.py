"""Does interleaving help? A short pretraining of each pattern of the paper's Table 1, and of
MMMTMM, W, H, MWT and MW, each repeated to twelve layers.

    python results/patterns.py --data texts/ --jobs 2
    python results/patterns.py --data texts/ --length 256 --seeds 1 --out out/patterns256

Each variant and seed is a run of `train_mlm.py ... --resume` in a folder of its own in --out. So
the same command goes on after it was stopped, and refuses runs of another text or of other flags.
The milliseconds of a step come from `bench.py step`, once for each run, before the runs.
"""

import argparse
import csv
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # train_mlm.py, bench.py, mabert.py

from tqdm import tqdm

import bench
import train_mlm
from mabert import MaBERTConfig, MaBERTForMaskedLM


def twelve_layers(unit: str) -> str:
    """A unit such as MMT, repeated to twelve letters."""
    return unit * (12 // len(unit))  # a unit has one, two, three or six


TABLE_1 = "M T MTT TM MT TMM TTM MMT".split()  # the paper's units
OTHERS = "MMMTMM W H MWT MW".split()
PATTERNS = [twelve_layers(unit) for unit in TABLE_1 + OTHERS]
# also with a causal convolution; the others with a centred one only
CAUSAL_TOO = [twelve_layers(unit) for unit in ("MMT", "MWT", "MW")]

STEPS = 1200
TOKENS = 2048  # of a step, in rows of --length

# flags of all models
VOCAB_SIZE = "4096"
SMALL = """--hidden-size 64 --num-heads 4 --intermediate-size 256 --d-state 8 --dropout 0 --lr 2e-3
    --warmup-steps 100 --no-compile""".split()


# ---- The runs ----


def run_script(script: str, flags: list[str], threads: int | None = None) -> str:
    """What a script of the project prints; SystemExit with its last words if it fails."""
    # in a process of its own, on its share of the cores
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, str(Path(bench.__file__).with_name(script)), *flags]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)

    # the last two lines say why
    if process.returncode:
        words = process.stderr.strip().splitlines() or [f"ended with {process.returncode}"]
        raise SystemExit(f"{script} {' '.join(flags[-2:])}: {' '.join(words[-2:])}")
    return process.stdout


def threads_of_a_run(jobs: int) -> int | None:
    """A share of the cores for each of several runs at a time; None, all there are, for one."""
    return max(1, os.cpu_count() // jobs) if jobs > 1 else None


def pretrain(args, variants: dict[str, list[str]], length: int, steps: int):
    """{name: its runs' folders, one for each seed} of {name: its flags of train_mlm.py}.

    length: tokens of a row; steps: of a run whose flags do not say otherwise.
    """

    # text, sizes and batch of all runs
    text = ["--data", *args.data] if args.data else ["--demo"]
    rows = str(TOKENS // length)
    shared = [*SMALL, *text, "--length-schedule", f"{length}:1"]
    shared += ["--batch-size", rows, "--micro-batch-size", rows]

    # their tokenizer, of a run of one step, since two trainings of a tokenizer differ
    tokenizer = Path(args.out, "tokenizer")
    flags = [*shared, "--vocab-size", VOCAB_SIZE, "--pattern", "T", "--steps", "1"]
    run_script("train_mlm.py", [*flags, "--resume", "--out", str(tokenizer)])
    shared += ["--tokenizer", str(tokenizer / "tokenizer.json")]
    shared += ["--steps", str(steps), "--eval-every", str(steps)]

    # a folder and flags for each run
    folders = {name: [] for name in variants}
    runs = []
    for seed, name in itertools.product(range(args.seeds), variants):
        folder = Path(args.out, f"{re.sub('[, ]+', '-', name)}-seed{seed}")
        folders[name].append(folder)
        runs.append((folder, [*shared, *variants[name], "--seed", str(seed)]))

    # the times of steps: one run after the other, variants in turns, as a machine's clock drifts
    for folder, flags in tqdm(runs, desc="step time", unit="run"):
        if not (folder / "step.md").exists():
            printed = run_script("bench.py", ["step", "--measure", "10", *flags])
            folder.mkdir(parents=True, exist_ok=True)
            train_mlm.write_atomically(folder / "step.md", printed)

    # the training
    threads = threads_of_a_run(args.jobs)

    def train(run: tuple[Path, list[str]]):
        folder, flags = run
        run_script("train_mlm.py", [*flags, "--resume", "--out", str(folder)], threads)

    with ThreadPoolExecutor(args.jobs) as pool:
        trained = pool.map(train, runs)
        list(tqdm(trained, desc="pretraining", unit="run", total=len(runs)))  # raises what failed
    return folders


# ---- The table ----


class Result(NamedTuple):
    """What a variant reaches, and what it costs."""

    folders: list[Path]  # of its runs, one for each seed
    losses: list[float]  # held out, in nats, at their ends
    steps: int
    seconds: float  # of a step, the least of the runs
    parameters: int
    tflop: float  # of a run, by PyTorch's count, which leaves out the scan


def read_settings(folder: Path) -> argparse.Namespace:
    """The arguments of train_mlm.py that made a run."""
    return argparse.Namespace(**json.loads((folder / "args.json").read_text(encoding="utf-8")))


def last_held_out_loss(folder: Path) -> float:
    """In nats, at the end of a run."""
    with open(folder / "log.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    return float(last["held_out_loss"])


def read_result(folders: list[Path], length: int) -> Result:
    """The result of the runs of a variant, whose rows have this length."""
    # what was measured
    pages = [(folder / "step.md").read_text(encoding="utf-8") for folder in folders]
    seconds = [float(re.search(r"tokens: ([\d.]+) s a step", page)[1]) for page in pages]

    # what the model costs
    settings = read_settings(folders[0])
    model = MaBERTForMaskedLM.from_pretrained(folders[0])
    flops = bench.flops_per_token(model.config, length, settings.mask_rate)
    return Result(
        folders=folders,
        losses=[last_held_out_loss(folder) for folder in folders],
        steps=settings.steps,
        seconds=min(seconds),
        parameters=sum(weight.numel() for weight in model.parameters()),
        tflop=settings.steps * TOKENS * flops / 1e12,
    )


def mean_and_deviation(values: list[float]) -> str:
    """The mean, and of several values the standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def compare_variants(
    args, variants: dict[str, list[str]], length: int, steps: int, varying: str
) -> tuple[str, dict[str, Result]]:
    """Trains all variants, as `pretrain` takes them: (a page with their table, {name: result}).

    varying says what the variants have in common, and in what they differ.
    """
    # all runs
    folders = pretrain(args, variants, length, steps)
    results = {name: read_result(runs, length) for name, runs in folders.items()}

    # a line for each variant
    body = []
    for name, result in results.items():
        loss = mean_and_deviation(result.losses)
        size = f"{result.parameters / 1e6:.2f}"
        milliseconds = f"{1000 * result.seconds:.0f}"
        body.append([name, loss, size, milliseconds, f"{result.tflop:.3g}"])
    head = ["", "held-out loss, nats", "parameters, M"]
    head += [f"ms a step, best of {args.seeds}", "TFLOP of the run"]

    # below what was done
    step = f"a step of {TOKENS // length} rows of {length} tokens"
    page = f"""{bench.title_line(bench.DEVICE)}
Masked language modelling, {step}; {varying}.
Seeds: {args.seeds}. TFLOP: PyTorch's count, without the scan.

{bench.table(head, body)}"""
    return page, results


# ---- The command line ----


def valid_pattern(text: str) -> str:
    """A type for argparse: letters of layers."""
    try:
        return MaBERTConfig(pattern=text).pattern
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from error


def new_parser(description: str, seeds: int, out: str) -> argparse.ArgumentParser:
    """A parser with the flags that every script here has. seeds, out: defaults of two of them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--seeds", type=bench.positive, default=seeds,
        help="runs of each variant (%(default)s)")
    parser.add_argument("--jobs", type=bench.positive, default=1,
        help="runs at the same time, each on its share of the cores (%(default)s)")
    parser.add_argument("--out", default=out, metavar="FOLDER",
        help="keeps the runs, so that the same command goes on (%(default)s)")
    # fmt: on
    return parser


def add_data(parser: argparse.ArgumentParser):
    """The flag of the scripts that pretrain on text."""
    text = "text, as train_mlm.py takes it; without, the text of its demo"
    parser.add_argument("--data", nargs="+", metavar="PATH", help=text)


def main(argv: list[str]):
    parser = new_parser(__doc__, seeds=2, out="out/patterns")
    add_data(parser)
    # fmt: off
    parser.add_argument("--patterns", type=valid_pattern, nargs="+", default=PATTERNS,
        help="default: the paper's eight and others, of 12 layers; "
        f"{', '.join(CAUSAL_TOO)} also with a causal convolution")
    parser.add_argument("--length", type=bench.bounded(int, 8, TOKENS + 1), default=64,
        help=f"tokens of a row, which divide the {TOKENS} of a step (%(default)s)")
    parser.add_argument("--steps", type=bench.positive, default=STEPS,
        help="of each run (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if TOKENS % args.length:
        parser.error(f"--length {args.length} does not divide {TOKENS}, the tokens of a step")

    # with a centred convolution, then with a causal one
    variants = {}
    for pattern in args.patterns:
        variants[pattern] = ["--pattern", pattern, "--no-causal-conv"]
    for pattern in args.patterns:
        if pattern in CAUSAL_TOO:
            variants[f"{pattern}, causal"] = ["--pattern", pattern, "--causal-conv"]
    varying = f"{args.steps} steps, hidden size 64, a centred convolution if not called causal"

    # the runs and their table
    with bench.errors_in_one_line():
        page, _ = compare_variants(args, variants, args.length, args.steps, varying)
        print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
