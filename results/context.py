"""What longer rows are worth: small models, trained with rows of 128 or 1,024 tokens.

    python results/context.py --data books/ --held-out books/sherlock.txt books/tom_sawyer.txt

Each model and seed is a run of `train_mlm.py ... --resume` in a folder of its own in --out. So the
same command goes on after it was stopped, and refuses runs of another text or of other flags.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import patterns  # beside this file; it finds bench.py and the others, and comes before torch
from patterns import twelve_layers
from tqdm import tqdm

import bench
import train_mlm

SHORT = 128  # tokens of a row in training
LONG = 1024
TOKENS = 2048  # of a step, where its rows are of one length
STEPS = 3000


# ---- The runs ----


class Training(NamedTuple):
    """A way to train."""

    units: tuple[str, ...]  # the patterns, each repeated to twelve layers
    seeds: int  # at most
    flags: str  # of train_mlm.py


def one_length(length: int, steps: int) -> str:
    """Flags for rows of one length, TOKENS a step."""
    rows = TOKENS // length
    batch = f"--batch-size {rows} --micro-batch-size {rows}"
    return f"--length-schedule {length}:1 {batch} --steps {steps}"


# The paper's schedule keeps the number of rows, so its last tenth of the steps has eight times as
# many tokens: 1,588 · 2,048 + 177 · 16,384 are as many as 3,000 · 2,048
SCHEDULE_STEPS = 1765
SCHEDULE = f"""--length-schedule {SHORT}:0.9 {LONG}:0.1 --steps {SCHEDULE_STEPS}
    --batch-size {TOKENS // SHORT} --micro-batch-size {TOKENS // LONG}"""

TRAININGS = {  # in the order in which they run
    "128": Training(("T", "MMT", "MW", "H"), 9, one_length(SHORT, STEPS)),
    "128-16000-steps": Training(("MMT", "T"), 1, one_length(SHORT, 16_000)),
    "128-then-1024": Training(("MMT", "T"), 9, SCHEDULE),
    "1024": Training(("MMT", "T"), 9, one_length(LONG, STEPS)),
    "128-1765-steps": Training(("MMT", "T"), 9, one_length(SHORT, SCHEDULE_STEPS)),
}


def pretrain(args):
    """Trains all models, --jobs at a time, each in a folder of its own."""

    # the text without the held-out books, and one tokenizer for all, of a run of one step
    held_out = {file.resolve() for file in map(Path, args.held_out)}
    files = [file for file in train_mlm.find_files(args.data) if file.resolve() not in held_out]
    shared = [*patterns.SMALL, "--data", *map(str, files)]
    tokenizer = Path(args.out, "tokenizer")
    flags = [*shared, "--vocab-size", patterns.VOCAB_SIZE, "--pattern", "T", "--steps", "1"]
    flags += ["--batch-size", "1", "--resume", "--out", str(tokenizer)]
    patterns.run_script("train_mlm.py", flags)
    shared += ["--tokenizer", str(tokenizer / "tokenizer.json"), "--resume"]
    shared += ["--eval-every", "500", "--save-every", "200"]

    # a folder and flags for each run
    runs = []
    for seed in range(args.seeds):
        for name, training in TRAININGS.items():
            for unit in training.units if seed < training.seeds else ():
                folder = Path(args.out, f"{unit}-{name}-seed{seed}")
                flags = [*shared, "--pattern", twelve_layers(unit), *training.flags.split()]
                runs.append([*flags, "--seed", str(seed), "--out", str(folder)])

    def train(flags: list[str]):
        patterns.run_script("train_mlm.py", flags, patterns.threads_of_a_run(args.jobs))

    with ThreadPoolExecutor(args.jobs) as pool:
        trained = pool.map(train, runs)
        list(tqdm(trained, desc="pretraining", unit="run", total=len(runs)))  # raises what failed


def main(argv: list[str]):
    parser = patterns.new_parser(__doc__, seeds=2, out="out/context")
    # fmt: off
    parser.add_argument("--data", nargs="+", metavar="PATH", required=True,
        help="books to train on, as train_mlm.py takes them")
    parser.add_argument("--held-out", nargs="+", metavar="FILE", required=True,
        help="those that are not trained on, but read by the trained models")
    # fmt: on
    args = parser.parse_args(argv)
    with bench.errors_in_one_line():
        pretrain(args)


if __name__ == "__main__":
    main(sys.argv[1:])
