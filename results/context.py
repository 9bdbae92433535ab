"""What longer rows are worth: small models, trained with rows of 128 or 1,024 tokens, read two
whole books that they have not seen, in rows of 64 to 2,048 tokens.

    python results/context.py --data books/ --held-out books/sherlock.txt books/tom_sawyer.txt

The same tokens are masked in rows of every length, so a difference is not the sample's: it comes
from more context, and from positions that are new to the model. Each model and seed is a run of
`train_mlm.py ... --resume` in a folder of its own in --out. So the same command resumes after it
was stopped, and refuses runs of other books or of other flags. With two seeds it takes about
eleven hours on one core. The page and its figures are in --out too: context.md, context.png and
context_steps.png.
"""

import contextlib
import csv
import itertools
import json
import os
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import patterns  # beside this file; it finds bench.py and the others, and comes before torch
import torch
import torch.nn.functional as F
from patterns import mean_and_deviation, twelve_layers
from tokenizers import Tokenizer
from tqdm import tqdm

import bench
import train_mlm
from mabert import MaBERT, MaBERTForMaskedLM, torch_load

SHORT = 128  # tokens of a row in training
LONG = 1024
TOKENS = 2048  # of a step, except in the paper's schedule
STEPS = 3000

# The rows that the trained models read are [CLS], a window of text, [SEP]. A window is half as long
# as the next one, so a row is a little shorter than its length says: 64 to 1,986 tokens.
LENGTHS = (64, 128, 256, 512, 1024, 2048)
WINDOWS = {length: 31 * length // 32 for length in LENGTHS}
MASK_RATE = 0.15

# What `lengthen_positions` can do where rows are longer than those of training
POSITIONS = ("stretched", "repeated", "clamped")


# ---- The runs ----


class Training(NamedTuple):
    """A way to train."""

    units: tuple[str, ...]  # the patterns, each repeated to twelve layers
    flags: str  # of train_mlm.py
    begins_from: str | None = None  # the training whose models are trained further here
    seeds: int | None = None  # at most; None: as many as --seeds says


def one_length(length: int, steps: int) -> str:
    """Flags for rows of one length, TOKENS a step."""
    rows = TOKENS // length
    batch = f"--batch-size {rows} --micro-batch-size {rows}"
    return f"--length-schedule {length}:1 {batch} --steps {steps}"


ALL = ("T", "MMT", "MW", "H")
TWO = ("T", "MMT")

# The paper's schedule keeps the number of rows, so the last tenth of its steps has eight times as
# many tokens a step: 1,588 · 2,048 + 177 · 16,384 are about as many as 3,000 · 2,048
SCHEDULE = f"""--length-schedule {SHORT}:0.9 {LONG}:0.1 --steps 1765
    --batch-size {TOKENS // SHORT} --micro-batch-size {TOKENS // LONG}"""

# A tenth more steps, with a warm-up and a decay of their own
FURTHER = " --lr 2e-3 --warmup-steps 30 --no-compile"

# The first training's models read longer rows in all POSITIONS, others stretched
FIRST = "128"
LONGEST = "128, 16,000 steps"
LENGTHENED = "128 + 300 steps of 1,024"
TRAININGS = {
    FIRST: Training(ALL, one_length(SHORT, STEPS)),
    LONGEST: Training(TWO, one_length(SHORT, 16_000), seeds=1),
    "128 then 1,024": Training(TWO, SCHEDULE, seeds=1),
    "1,024": Training(TWO, one_length(LONG, STEPS), seeds=1),
    LENGTHENED: Training(ALL, one_length(LONG, 300) + FURTHER, FIRST),
    "128 + 300 steps of 128": Training(("MMT",), one_length(SHORT, 300) + FURTHER, FIRST),
}
EQUAL_TOKENS = (FIRST, "128 then 1,024", "1,024")  # these have a table of their own


def folder_of(out: str, unit: str, training: str, seed: int) -> Path:
    """Where the run of this pattern, training and seed is."""
    words = training.replace(",", "").replace("+", "and").replace(" ", "-")
    return Path(out, f"{unit}-{words}-seed{seed}")


class Run(NamedTuple):
    """A model that is trained."""

    name: str  # its pattern and its training: what runs of several seeds have in common
    folder: Path
    flags: list[str]  # of train_mlm.py
    positions: tuple[str, ...]  # in which it reads longer rows


def books_to_train_on(args) -> list[str]:
    """Flags of train_mlm.py: the books that are not held out."""
    with contextlib.redirect_stdout(sys.stderr):  # what this prints is not of the page
        files = train_mlm.find_files(args.data, args.out)
    held_out = {Path(file).resolve() for file in args.held_out}
    if not held_out <= {file.resolve() for file in files}:
        raise SystemExit("--held-out: must be files of --data")
    return ["--data", *(str(file) for file in files if file.resolve() not in held_out)]


def tokenizer_file(args) -> Path:
    """The tokenizer of all runs: two trainings of one would differ."""
    return Path(args.out, "tokenizer", "tokenizer.json")


def list_runs(args, data: list[str]) -> list[Run]:
    """All runs, seed by seed; data: flags of the text."""
    new_model = [*patterns.SMALL, "--tokenizer", str(tokenizer_file(args))]
    runs = []
    for seed, (name, training) in itertools.product(range(args.seeds), TRAININGS.items()):
        if training.seeds and seed >= training.seeds:
            continue
        for unit in training.units:
            # a model of its own, or another run's
            model = [*new_model, "--pattern", twelve_layers(unit)]
            if training.begins_from:
                model = ["--init", str(folder_of(args.out, unit, training.begins_from, seed))]

            # how it is trained, and where
            flags = [*data, *model, *training.flags.split(), "--seed", str(seed)]
            folder = folder_of(args.out, unit, name, seed)
            positions = POSITIONS if name == FIRST else POSITIONS[:1]
            runs.append(Run(f"{unit}, {name}", folder, flags, positions))
    return runs


def pretrain(args, data: list[str], runs: list[Run]):
    """Trains the tokenizer and all models, --jobs at a time; data: flags of the text."""

    # the tokenizer, of a run of one step on the same text
    flags = [*data, *patterns.SMALL, "--vocab-size", patterns.VOCAB_SIZE]
    flags += ["--pattern", "T", "--batch-size", "1", "--steps", "1"]
    folder = tokenizer_file(args).parent
    patterns.run_script("train_mlm.py", [*flags, "--resume", "--out", str(folder)])

    # the models
    threads = patterns.threads_of_a_run(args.jobs)

    def train(run: Run):
        flags = [*run.flags, "--resume", "--eval-every", "500", "--save-every", "200"]
        patterns.run_script("train_mlm.py", [*flags, "--out", str(run.folder)], threads)

    # those that train another's model further come last
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(desc="pretraining", total=len(runs)) as bar:
        for further in (False, True):
            for _ in pool.map(train, [run for run in runs if ("--init" in run.flags) == further]):
                bar.update()  # or raises what failed


def measure_steps(runs: list[Run]):
    """The times of their steps on one core, one run after the other, each kept in its folder."""
    for run in tqdm(runs, desc="step time", unit="run"):
        if not (run.folder / "step.md").exists():
            printed = patterns.run_script("bench.py", ["step", *run.flags], threads=1)
            train_mlm.write_atomically(run.folder / "step.md", printed)


# ---- Trained models read the books ----


class Book(NamedTuple):
    """The held-out text, masked once for rows of all lengths."""

    ids: np.ndarray  # (blocks, tokens of the longest window), as the model sees them
    labels: np.ndarray  # the true ids of the masked tokens, elsewhere IGNORED; the same shape
    vocabulary: train_mlm.Vocabulary


def mask_books(files: list[str], tokenizer: Tokenizer) -> Book:
    """The books, by name, in blocks. What follows the last whole block of each is left out."""
    size = WINDOWS[LENGTHS[-1]]
    blocks = []
    for file in sorted(files):  # so that losses kept earlier are of the same tokens
        text = Path(file).read_text(encoding="utf-8-sig")
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
        blocks.append(ids[: len(ids) // size * size].reshape(-1, size))

    vocabulary = train_mlm.special_ids(tokenizer)
    rng = np.random.default_rng(0)
    ids, labels = train_mlm.mask_tokens(np.concatenate(blocks), vocabulary, MASK_RATE, rng)
    return Book(ids, labels, vocabulary)


def cut_block(book: Book, block: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block as rows of [CLS], a window, [SEP]: (ids, labels), both (rows, window + 2)."""
    ids = book.ids[block].reshape(-1, window)
    labels = book.labels[block].reshape(-1, window)

    # a column more on both sides
    ids = np.pad(ids, ((0, 0), (1, 1)))
    ids[:, 0] = book.vocabulary.cls
    ids[:, -1] = book.vocabulary.sep
    labels = np.pad(labels, ((0, 0), (1, 1)), constant_values=train_mlm.IGNORED)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def lengthen_positions(encoder: MaBERT, trained: torch.nn.Embedding, length: int, positions: str):
    """Gives the encoder positions for rows of `length` tokens.

    trained: the table of n positions that the model came with, whatever it has had since
    positions: what to do where n are not enough, one of POSITIONS
        stretched: linear interpolation
        repeated:  0, 1, …, n − 1, and again from 0
        clamped:   0, 1, …, n − 1, and then always n − 1
    """
    encoder.position_embeddings = trained
    n = trained.num_embeddings
    if length <= n:
        return
    if positions == "stretched":
        encoder.resize_positions(length)
        return

    # which of the trained positions a place gets
    places = torch.arange(length)
    places = places % n if positions == "repeated" else places.clamp(max=n - 1)
    encoder.position_embeddings = torch.nn.Embedding.from_pretrained(trained.weight[places])
    encoder.config.max_position = length


@torch.no_grad()
def token_losses(model: MaBERTForMaskedLM, book: Book, length: int) -> torch.Tensor:
    """The loss of each masked token in rows of this length, in nats.

    The tokens are in the order of the text, whatever the length: (masked tokens,).
    """
    losses = []
    for block in range(len(book.ids)):
        ids, labels = cut_block(book, block, WINDOWS[length])
        logits = model(ids, labels=labels).logits  # (masked tokens of the block, vocabulary)
        answers = labels[labels != train_mlm.IGNORED]
        losses.append(F.cross_entropy(logits, answers, reduction="none"))
    return torch.cat(losses)


Losses = dict[tuple[str, int], torch.Tensor]  # by (positions, length): those of `token_losses`


def read_books(run: Run, book: Book) -> Losses:
    """What a run's model loses at all lengths, kept in its folder."""
    file = run.folder / "book_losses.pt"
    if not file.exists():
        model = MaBERTForMaskedLM.from_pretrained(run.folder)
        trained = model.encoder.position_embeddings
        losses = {}
        for positions, length in itertools.product(run.positions, LENGTHS):
            # in rows as short as those of training, positions are always the same
            if positions == "stretched" or length > trained.num_embeddings:
                lengthen_positions(model.encoder, trained, WINDOWS[length] + 2, positions)
                losses[positions, length] = token_losses(model, book, length)

        # the file appears complete or not at all
        partial = file.with_suffix(".partial")
        torch.save(losses, partial)
        os.replace(partial, file)
    return torch_load(file)


# ---- What longer rows cost ----

COST_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
COST_UNITS = ("T", "MMT", "MW")
PASSES = ("forward pass", "training step")


def measure_cost(folder: Path, length: int, which: str) -> tuple[float, float]:
    """What one row of `length` tokens takes on one core: (seconds, MiB).

    folder: of a model of the pattern; its weights do not matter
    which: one of PASSES
    The memory is what comes on top of the model's and its optimizer's, of a process that has had
    one short row before.
    """
    torch.set_num_threads(1)
    model = MaBERTForMaskedLM.from_pretrained(folder)
    model.encoder.resize_positions(length)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    trains = which == "training step"

    # a row of words, some of which are to be predicted
    ids = torch.randint(len(train_mlm.SPECIAL_TOKENS), model.config.vocab_size, (1, length))
    labels = ids.where(torch.rand(1, length) < MASK_RATE, train_mlm.IGNORED)

    def call(tokens: int):
        with torch.set_grad_enabled(trains):
            loss = model(ids[:, :tokens], labels=labels[:, :tokens]).loss
        if trains:
            loss.backward()
            optimizer.step()

    # what a first call loads does not count, nor do gradients and the optimizer's state
    call(SHORT)
    mebibytes = bench.peak_memory(lambda: call(length), "cpu") / 2**20
    return statistics.median(bench.wall_ms(call, length) / 1e3 for _ in range(3)), mebibytes


Costs = dict[tuple[str, str, int], list | str]  # by (unit, pass, length); or why there is none


def measure_costs(args) -> Costs:
    """What rows of all COST_LENGTHS take. Numbers are kept in a file in --out, failures are not."""
    file = Path(args.out, "cost.json")
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    costs = {}
    keys = list(itertools.product(COST_LENGTHS, COST_UNITS, PASSES))
    for length, unit, which in tqdm(keys, desc="cost"):
        name = f"{unit}, {which}, {length}"
        cost = kept.get(name)
        if not cost:
            folder = folder_of(args.out, unit, FIRST, seed=0)
            cost = bench.measured_alone("cpu", measure_cost, folder, length, which)
            if not isinstance(cost, str):
                kept[name] = cost
                train_mlm.write_atomically(file, json.dumps(kept, indent=1))
        costs[unit, which, length] = cost
    return costs


# ---- The tables ----

Results = dict[str, list[Losses]]  # by the name of a run: the losses of its seeds
Folders = dict[str, list[Path]]  # in the same order


def mean_losses(by_seed: list[Losses], positions: str, length: int) -> list[float]:
    """The mean loss of each seed."""
    return [losses[positions, length].double().mean().item() for losses in by_seed]


def length_table(results: Results, positions: str, lengths: tuple[int, ...]) -> str:
    """A line for each name, with the loss at each of the lengths."""
    body = []
    for name, by_seed in results.items():
        values = [mean_losses(by_seed, positions, length) for length in lengths]
        body.append([name, *map(mean_and_deviation, values)])
    return bench.table(["rows of", *lengths], body)


def mean_over_seeds(by_seed: list[Losses], length: int) -> np.ndarray:
    """The loss of each masked token, positions stretched: (masked tokens,)."""
    return np.mean([losses["stretched", length].double().numpy() for losses in by_seed], axis=0)


def change_table(results: Results, book: Book) -> str:
    """By how much the loss of the same tokens differs from that in rows of SHORT tokens.

    Tokens near each other are not independent; the standard error is that of blocks.
    """
    block, _ = np.nonzero(book.labels != train_mlm.IGNORED)
    lengths = [length for length in LENGTHS if length != SHORT]
    body = []
    for name, by_seed in results.items():
        cells = []
        for length in lengths:
            change = mean_over_seeds(by_seed, length) - mean_over_seeds(by_seed, SHORT)
            by_block = np.bincount(block, change) / np.bincount(block)
            error = by_block.std(ddof=1) / len(by_block) ** 0.5
            cells.append(f"{change.mean():+.3f} ± {error:.3f}")
        body.append([name, *cells])
    return bench.table(["rows of", *lengths], body)


def seeds_differ_by(results: Results) -> float:
    """By how much a change of `change_table` differs between the seeds of its line, at most."""
    differences = []
    for by_seed in results.values():
        short = np.array(mean_losses(by_seed, "stretched", SHORT))
        for length in LENGTHS:
            changes = np.array(mean_losses(by_seed, "stretched", length)) - short
            differences.append(np.ptp(changes))
    return max(differences)


# How many tokens of context: from one of these to below the next
CONTEXT = (0, 4, 8, 16, 32, 62)


def context_table(results: Results, book: Book) -> str:
    """The loss of tokens near an end of a row of 64, and what the context beyond it is worth.

    Two rows of 64 tokens are one of 128. In it the tokens of the left half get 62 tokens more on
    their right, those of the right half 62 tokens more on their left, and no position is new.
    """
    # where the masked tokens stand in their window, and on which half of the longer one
    window = WINDOWS[LENGTHS[0]]
    _, place = np.nonzero(book.labels != train_mlm.IGNORED)
    half, place = divmod(place % (2 * window), window)
    sides = {"left": (half == 1, place), "right": (half == 0, window - 1 - place)}

    # a line for each model and side: the mean over all seeds
    body = []
    for name, by_seed in results.items():
        short, long = (mean_over_seeds(by_seed, length) for length in LENGTHS[:2])
        for side, (is_in_half, context) in sides.items():
            cells = []
            for low, high in itertools.pairwise(CONTEXT):
                chosen = is_in_half & (low <= context) & (context < high)
                cells.append(f"{short[chosen].mean():.2f} → {long[chosen].mean():.2f}")
            body.append([f"{name}, {side}", *cells])

    ranges = [f"{low} to {high - 1}" for low, high in itertools.pairwise(CONTEXT)]
    return bench.table(["tokens on that side", *ranges], body)


def minutes_of(folder: Path) -> float:
    """How long a run takes by the time of its steps, which bench.py measured alone."""
    settings = patterns.read_settings(folder)
    page = (folder / "step.md").read_text(encoding="utf-8")
    minutes = 0.0
    for length, share in settings.length_schedule:
        seconds = float(re.search(rf"rows of {length} tokens: ([\d.]+) s a step", page)[1])
        minutes += share * settings.steps * seconds / 60
    return minutes


def schedule_table(results: Results, folders: Folders) -> str:
    """What trainings on equally many tokens take and reach: the first seed of each."""
    body = []
    for unit in TWO:
        names = [f"{unit}, {training}" for training in EQUAL_TOKENS]
        minutes = [minutes_of(folders[name][0]) for name in names]
        body.append([f"{unit}, minutes", *(f"{value:.1f}" for value in minutes)])
        for length in (SHORT, LONG):
            losses = [mean_losses(results[name], "stretched", length)[0] for name in names]
            body.append([f"{unit}, rows of {length:,}", *(f"{loss:.3f}" for loss in losses)])
    return bench.table(["trained with rows of", *EQUAL_TOKENS], body)


STEPS_SHOWN = (500, 1000, 2000, 4000, 8000, 16000)


def losses_by_step(folders: Folders) -> dict[str, dict[int, float]]:
    """{pattern: {step: loss}} of the longest training, on what train_mlm.py has held out."""
    losses = {}
    for unit in TRAININGS[LONGEST].units:
        with open(folders[f"{unit}, {LONGEST}"][0] / "log.csv", newline="") as file:
            lines = {int(line["step"]): line for line in csv.DictReader(file)}
        losses[unit] = {step: float(lines[step]["held_out_loss"]) for step in STEPS_SHOWN}
    return losses


def steps_table(folders: Folders) -> str:
    """The losses in the longest training."""
    body = []
    for unit, by_step in losses_by_step(folders).items():
        body.append([unit, *(f"{loss:.3f}" for loss in by_step.values())])
    return bench.table(["steps", *STEPS_SHOWN], body)


def cost_table(costs: Costs, which: str) -> str:
    """Time and memory of one of PASSES."""
    body = []
    for unit in COST_UNITS:
        cells = []
        for length in COST_LENGTHS:
            cost = costs[unit, which, length]
            if not isinstance(cost, str):
                seconds, mebibytes = cost
                cost = f"{1000 * seconds:.0f} ms, {mebibytes:.0f} MiB"
            cells.append(cost)
        body.append([unit, *cells])
    return bench.table([which, *COST_LENGTHS], body)


# ---- The page and its figures ----


def context_page(results: Results, folders: Folders, costs: Costs, book: Book) -> str:
    """The page with its tables."""
    masked = int((book.labels != train_mlm.IGNORED).sum())
    plain = {f"{unit}, {FIRST}": results[f"{unit}, {FIRST}"] for unit in TRAININGS[FIRST].units}
    longer = LENGTHS[LENGTHS.index(SHORT) + 1 :]
    forward, step = (cost_table(costs, which) for which in PASSES)

    return f"""{bench.title_line()}
A line is a pattern, repeated to twelve layers, and how it was trained: with rows of how many
tokens, {STEPS:,} steps of {TOKENS:,} tokens if nothing else is said.

## Rows of other lengths

Nats per masked token of the two books. The same {masked:,} of {book.ids.size:,} tokens are masked
in rows of every length. ± is the standard deviation over seeds; a line without it has the first
seed alone.

{length_table(results, "stretched", LENGTHS)}

The change from rows of {SHORT}; below zero is better. Here ± is the standard error over
{len(book.ids)} blocks of these books: it says nothing of other seeds or books. The seeds of a
line differ by {seeds_differ_by(results):.3f} at most.

{change_table(results, book)}

## Positions

In the tables above they are stretched. Repeated:

{length_table(plain, "repeated", longer)}

Clamped:

{length_table(plain, "clamped", longer)}

## Context

Tokens with so many tokens of text on their left (or right) in a row of {LENGTHS[0]}, and their loss
there → in a row of {LENGTHS[1]}, where that side has {WINDOWS[LENGTHS[0]]} more.

{context_table(plain, book)}

## Equally many tokens

The minutes of training on one core, from the time of a step, and the losses in rows of {SHORT} and
{LONG:,}. All are of the first seed.

{schedule_table(results, folders)}

## Steps

The loss of train_mlm.py in rows of {SHORT}, on what it holds out of the other books. The learning
rate falls until the last step, so these are not the losses of shorter trainings.

{steps_table(folders)}

## Costs

What one row takes on one core: the time, and the memory that comes on top of the model's, its
gradients' and its optimizer's.

{forward}

{step}
"""


def draw_context(file: str, results: Results):
    """A figure of how the loss changes from that in rows of SHORT tokens, after two trainings."""
    panels = {}
    titles = {FIRST: f"trained with rows of {SHORT}", LENGTHENED: "then 300 steps of 1,024"}
    for training, title in titles.items():
        panels[title] = {}
        for unit in TRAININGS[training].units:
            by_seed = results[f"{unit}, {training}"]
            short = statistics.mean(mean_losses(by_seed, "stretched", SHORT))
            changes = {}
            for length in LENGTHS:
                changes[length] = statistics.mean(mean_losses(by_seed, "stretched", length)) - short
            panels[title][unit] = changes
    x_labels = ["tokens of a row"] * len(panels)
    bench.draw_panels(file, panels, x_labels, "change of the loss, nats", strong="MMT")


def draw_steps(file: str, folders: Folders):
    """A figure of the longest training."""
    panels = {f"trained with rows of {SHORT}": losses_by_step(folders)}
    bench.draw_panels(file, panels, ["steps"], "loss, nats", strong="MMT")


def main(argv: list[str]):
    parser = patterns.new_parser(__doc__, seeds=2, out="out/context")
    # fmt: off
    parser.add_argument("--data", nargs="+", metavar="PATH", required=True,
        help="books to train on, as train_mlm.py takes them")
    parser.add_argument("--held-out", nargs="+", metavar="FILE", required=True,
        help="those of them that only the trained models read")
    # fmt: on
    args = parser.parse_args(argv)

    with bench.errors_in_one_line():
        # the runs
        stem = str(Path(args.out, "context"))
        bench.check_out(stem)
        data = books_to_train_on(args)
        runs = list_runs(args, data)
        pretrain(args, data, runs)
        folders = {}
        for run in runs:
            folders.setdefault(run.name, []).append(run.folder)

        # what steps and rows cost
        pairs = itertools.product(TWO, EQUAL_TOKENS)
        timed = {folder_of(args.out, unit, training, seed=0) for unit, training in pairs}
        measure_steps([run for run in runs if run.folder in timed])
        costs = measure_costs(args)

        # the models read the books
        tokenizer = train_mlm.load_tokenizer(str(tokenizer_file(args)))
        book = mask_books(args.held_out, tokenizer)
        results = {}
        for run in tqdm(runs, desc="reading", unit="run"):
            results.setdefault(run.name, []).append(read_books(run, book))

        # the page and its figures
        page = context_page(results, folders, costs, book)
        print(page)
        train_mlm.write_atomically(Path(f"{stem}.md"), page)
        draw_context(f"{stem}.png", results)
        draw_steps(f"{stem}_steps.png", folders)


if __name__ == "__main__":
    main(sys.argv[1:])
