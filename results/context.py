"""What longer rows are worth: small models, trained with rows of 128 or 1,024 tokens, read two
whole books that they have not seen, in rows of 64 to 2,048 tokens.

    python results/context.py --data books/ --held-out books/sherlock.txt books/tom_sawyer.txt

The same tokens are masked in rows of every length, so a difference is the context's and not the
sample's. Each model and seed is a run of `train_mlm.py ... --resume` in a folder of its own in
--out. So the same command goes on after it was stopped, and refuses runs of another text or of
other flags. The page and the figure, context.md and context.png, are in --out too.
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
TOKENS = 2048  # of a step, where its rows are of one length
STEPS = 3000

# The rows that the trained models read: of at most so many tokens, and the window of text in each,
# half as long as the next one
LENGTHS = (64, 128, 256, 512, 1024, 2048)
WINDOWS = {length: 31 * length // 32 for length in LENGTHS}  # 62 to 1,984 tokens
MASK_RATE = 0.15


# ---- The runs ----


class Training(NamedTuple):
    """A way to train, and to read longer rows afterwards."""

    units: tuple[str, ...]  # the patterns, each repeated to twelve layers
    flags: str  # of train_mlm.py
    goes_on_from: str | None = None  # the training whose models are trained further
    seeds: int | None = None  # at most; None: as many as --seeds says
    positions: tuple[str, ...] = (
        "stretched",
    )  # how `lengthen_positions` gets those of longer rows


def one_length(length: int, steps: int) -> str:
    """Flags for rows of one length, TOKENS a step."""
    rows = TOKENS // length
    batch = f"--batch-size {rows} --micro-batch-size {rows}"
    return f"--length-schedule {length}:1 {batch} --steps {steps}"


ALL = ("T", "MMT", "MW", "H")
TWO = ("MMT", "T")

# The paper's schedule keeps the number of rows, so the last tenth of its steps has eight times as
# many tokens a step: 1,588 · 2,048 + 177 · 16,384 are as many as 3,000 · 2,048
SCHEDULE_STEPS = 1765
SCHEDULE = f"""--length-schedule {SHORT}:0.9 {LONG}:0.1 --steps {SCHEDULE_STEPS}
    --batch-size {TOKENS // SHORT} --micro-batch-size {TOKENS // LONG}"""

# A tenth more steps, with a warm-up and a decay of their own
FURTHER_STEPS = STEPS // 10
FURTHER_LR = " --lr 2e-3 --warmup-steps 30"

TRAININGS = {
    "128": Training(ALL, one_length(SHORT, STEPS), positions=("stretched", "repeated", "clamped")),
    "128, 16,000 steps": Training(TWO, one_length(SHORT, 16_000), seeds=1),
    "128 then 1,024": Training(TWO, SCHEDULE, seeds=1),
    "1,024": Training(TWO, one_length(LONG, STEPS), seeds=1),
    # these go on from models of the first
    "128 + 300 steps of 1,024": Training(ALL, one_length(LONG, FURTHER_STEPS) + FURTHER_LR, "128"),
    "128 + 300 steps of 128": Training(ALL, one_length(SHORT, FURTHER_STEPS) + FURTHER_LR, "128"),
}
EQUAL_TOKENS = ("128", "128 then 1,024", "1,024")  # these are compared by their times too


def folder_of(out: str, unit: str, how: str, seed: int) -> Path:
    """Where the run of this pattern, training and seed is."""
    words = how.replace(",", "").replace("+", "and").replace(" ", "-")
    return Path(out, f"{unit}-{words}-seed{seed}")


class Run(NamedTuple):
    """A model that is trained."""

    name: str  # its pattern and its training: what runs of several seeds have in common
    folder: Path
    flags: list[str]  # of train_mlm.py
    goes_on: bool  # from the model of another run
    positions: tuple[str, ...]  # those of its training


def books_to_train_on(args) -> list[str]:
    """Flags of train_mlm.py: the books that are not held out."""
    held_out = {Path(file).resolve(strict=True) for file in args.held_out}  # or an error
    with contextlib.redirect_stdout(sys.stderr):
        files = train_mlm.find_files(args.data, args.out)
    return ["--data", *(str(file) for file in files if file.resolve() not in held_out)]


def tokenizer_file(args) -> Path:
    """That of one tokenizer for all runs, since two trainings of a tokenizer differ."""
    return Path(args.out, "tokenizer", "tokenizer.json")


def list_runs(args, data: list[str]) -> list[Run]:
    """All runs, seed by seed; data: flags of the text."""
    new_model = [*patterns.SMALL, "--tokenizer", str(tokenizer_file(args))]
    runs = []
    for seed, (how, training) in itertools.product(range(args.seeds), TRAININGS.items()):
        if training.seeds and seed >= training.seeds:
            continue
        for unit in training.units:
            # a model of its own, or another run's
            model = [*new_model, "--pattern", twelve_layers(unit)]
            if training.goes_on_from:
                model = ["--init", str(folder_of(args.out, unit, training.goes_on_from, seed))]

            # how it is trained, and where
            flags = [*data, *model, *training.flags.split(), "--seed", str(seed)]
            folder = folder_of(args.out, unit, how, seed)
            goes_on = bool(training.goes_on_from)
            runs.append(Run(f"{unit}, {how}", folder, flags, goes_on, training.positions))
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

    # those that go on from another's model come last
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(desc="pretraining", total=len(runs)) as bar:
        for goes_on in (False, True):
            for _ in pool.map(train, [run for run in runs if run.goes_on == goes_on]):
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
    labels: np.ndarray  # the same; IGNORED where nothing is masked
    vocabulary: train_mlm.Vocabulary


def mask_books(files: list[str], tokenizer: Tokenizer) -> Book:
    """The books in blocks. What follows the last whole block of each is left out."""
    size = WINDOWS[LENGTHS[-1]]
    blocks = []
    for file in files:
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


def lengthen_positions(encoder: MaBERT, trained: torch.nn.Embedding, length: int, how: str):
    """Gives the encoder positions for rows of `length` tokens, from its trained table of n.

    stretched: by linear interpolation
    repeated:  0, 1, …, n − 1, and again from 0
    clamped:   0, 1, …, n − 1, and then always n − 1
    A table that is long enough stays as it is.
    """
    encoder.position_embeddings = trained
    n = trained.num_embeddings
    if length <= n:
        return
    if how == "stretched":
        encoder.resize_positions(length)
        return

    # which of the trained positions a place gets
    places = torch.arange(length)
    places = places % n if how == "repeated" else places.clamp(max=n - 1)
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


def read_books(run: Run, book: Book) -> dict[tuple[str, int], torch.Tensor]:
    """{(how positions are lengthened, length): token_losses} of a run, kept in its folder."""
    file = run.folder / "book_losses.pt"
    if not file.exists():
        model = MaBERTForMaskedLM.from_pretrained(run.folder)
        trained = model.encoder.position_embeddings
        losses = {}
        for how, length in itertools.product(run.positions, LENGTHS):
            # all three are the same in rows as short as those of training
            if how == "stretched" or length > trained.num_embeddings:
                lengthen_positions(model.encoder, trained, WINDOWS[length] + 2, how)
                losses[how, length] = token_losses(model, book, length)

        # the file appears complete or not at all
        partial = file.with_suffix(".partial")
        torch.save(losses, partial)
        os.replace(partial, file)
    return torch_load(file)


# ---- What longer rows cost ----

COST_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
COST_UNITS = ("T", "MMT", "MW")
PASSES = ("forward pass", "training step")


def measure_cost(folder: Path, length: int, name: str) -> tuple[float, float]:
    """What one row of `length` tokens takes on one core: (seconds, MiB).

    folder: of a trained model, whose size counts, not what it has learned
    name: one of PASSES
    The memory is what comes on top of the model and its optimizer.
    """
    torch.set_num_threads(1)
    model = MaBERTForMaskedLM.from_pretrained(folder)
    model.encoder.resize_positions(length)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    # a row of words, a share of them to be predicted
    ids = torch.randint(5, model.config.vocab_size, (1, length))
    labels = ids.where(torch.rand(1, length) < MASK_RATE, train_mlm.IGNORED)

    def run(tokens: int):
        with torch.set_grad_enabled(name == "training step"):
            loss = model(ids[:, :tokens], labels=labels[:, :tokens]).loss
        if name == "training step":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    run(SHORT)  # what a first call loads does not count
    mebibytes = bench.peak_memory(lambda: run(length), "cpu") / 2**20
    return statistics.median(bench.wall_ms(run, length) / 1e3 for _ in range(3)), mebibytes


def measure_costs(args) -> dict[str, list | str]:
    """{"T, forward pass, 512": measure_cost or why it failed}, …, kept in a file in --out."""
    file = Path(args.out, "cost.json")
    costs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    keys = list(itertools.product(COST_LENGTHS, COST_UNITS, PASSES))
    for length, unit, name in tqdm(keys, desc="cost"):
        key = f"{unit}, {name}, {length}"
        if key not in costs:
            folder = folder_of(args.out, unit, "128", seed=0)
            costs[key] = bench.measured_alone("cpu", measure_cost, folder, length, name)
            train_mlm.write_atomically(file, json.dumps(costs, indent=1))
    return costs


# ---- The page and the figure ----


def minutes_of(folder: Path) -> float:
    """How long a run takes by the time of its steps, which bench.py measured alone."""
    settings = patterns.read_settings(folder)
    page = (folder / "step.md").read_text(encoding="utf-8")
    minutes = 0.0
    for length, share in settings.length_schedule:
        seconds = float(re.search(rf"rows of {length} tokens: ([\d.]+) s a step", page)[1])
        minutes += share * settings.steps * seconds / 60
    return minutes


def length_table(results: dict[str, list[dict]], how: str, lengths: tuple[int, ...]) -> str:
    """A line for each name of {name: the losses of its runs}, the loss at each of the lengths."""
    body = []
    for name, by_seed in results.items():
        cells = []
        for length in lengths:
            losses = [run[how, length].double().mean().item() for run in by_seed]
            cells.append(mean_and_deviation(losses))
        body.append([name, *cells])
    return bench.table(["rows of", *lengths], body)


def mean_over_seeds(by_seed: list[dict], how: str, length: int) -> np.ndarray:
    """The loss of each masked token, as the mean over runs: (masked tokens,)."""
    return np.mean([run[how, length].double().numpy() for run in by_seed], axis=0)


def change_table(results: dict[str, list[dict]], book: Book) -> str:
    """By how much the loss of the same tokens differs from that in rows of SHORT tokens.

    Tokens near each other are not independent; the standard error is that of blocks.
    """
    block, _ = np.nonzero(book.labels != train_mlm.IGNORED)
    lengths = [length for length in LENGTHS if length != SHORT]
    body = []
    for name, by_seed in results.items():
        cells = []
        for length in lengths:
            losses = mean_over_seeds(by_seed, "stretched", length)
            change = losses - mean_over_seeds(by_seed, "stretched", SHORT)  # (masked tokens,)
            by_block = np.bincount(block, change) / np.bincount(block)
            error = by_block.std(ddof=1) / len(by_block) ** 0.5
            cells.append(f"{change.mean():+.3f} ± {error:.3f}")
        body.append([name, *cells])
    return bench.table(["rows of", *lengths], body)


# How many tokens of context: from one of these to below the next
CONTEXT = (0, 1, 2, 4, 8, 16, 32, 62)


def context_table(results: dict[str, list[dict]], book: Book) -> str:
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
        short, long = (mean_over_seeds(by_seed, "stretched", length) for length in LENGTHS[:2])
        for side, (is_in_half, context) in sides.items():
            cells = []
            for low, high in itertools.pairwise(CONTEXT):
                chosen = is_in_half & (low <= context) & (context < high)
                cells.append(f"{short[chosen].mean():.2f} → {long[chosen].mean():.2f}")
            body.append([f"{name}, {side}", *cells])

    ranges = [f"{low} to {high - 1}" for low, high in itertools.pairwise(CONTEXT)]
    ranges = [text.replace("0 to 0", "0").replace("1 to 1", "1") for text in ranges]
    return bench.table(["tokens on that side", *ranges], body)


def held_out_by_step(folder: Path) -> dict[int, float]:
    """{step: the held-out loss of train_mlm.py}, of the steps after which it was computed."""
    with open(folder / "log.csv", newline="") as file:
        _, *lines = csv.DictReader(file)  # without that of before the first step
    evaluated = [line for line in lines if line["held_out_loss"]]
    return {int(line["step"]): float(line["held_out_loss"]) for line in evaluated}


def steps_table(folders: dict[str, list[Path]]) -> str:
    """The held-out loss of train_mlm.py in the long training, by step."""
    how = "128, 16,000 steps"
    by_unit = {}
    for unit in TRAININGS[how].units:
        by_unit[unit] = held_out_by_step(folders[f"{unit}, {how}"][0])

    # a line for each evaluation
    units = list(by_unit)
    steps = by_unit[units[0]]
    body = [[step, *(f"{by_unit[unit][step]:.3f}" for unit in units)] for step in steps]
    return bench.table(["step", *units], body)


def minutes_table(folders: dict[str, list[Path]]) -> str:
    """The time of the trainings on equally many tokens."""
    body = []
    for unit in TWO:
        minutes = [minutes_of(folders[f"{unit}, {how}"][0]) for how in EQUAL_TOKENS]
        body.append([unit, *(f"{value:.1f}" for value in minutes)])
    return bench.table(["trained with rows of", *EQUAL_TOKENS], body)


def cost_table(costs: dict[str, list | str], name: str) -> str:
    """Time and memory of one of PASSES, by the length of a row."""
    body = []
    for unit in COST_UNITS:
        cells = []
        for length in COST_LENGTHS:
            cost = costs[f"{unit}, {name}, {length}"]
            if not isinstance(cost, str):
                seconds, mebibytes = cost
                cost = f"{seconds:.2f} s, {mebibytes:.0f} MiB"
            cells.append(cost)
        body.append([unit, *cells])
    return bench.table([name, *COST_LENGTHS], body)


def context_page(
    results: dict[str, list[dict]],
    folders: dict[str, list[Path]],
    costs: dict[str, list | str],
    book: Book,
) -> str:
    """The page with its tables."""
    masked = int((book.labels != train_mlm.IGNORED).sum())

    # the models whose rows of 256 have new positions
    longer = LENGTHS[LENGTHS.index(SHORT) + 1 :]
    stretched = {name: runs for name, runs in results.items() if ("clamped", longer[0]) in runs[0]}

    forward, step = (cost_table(costs, name) for name in PASSES)

    return f"""{bench.title_line()}
The loss of {masked} masked tokens of {book.ids.size}, in nats, the same in rows of every length.
Positions are stretched where a model has too few:

{length_table(results, "stretched", LENGTHS)}

The change from rows of {SHORT}, with the standard error over {len(book.ids)} blocks of text:

{change_table(results, book)}

Positions repeated:

{length_table(stretched, "repeated", longer)}

Positions clamped:

{length_table(stretched, "clamped", longer)}

The loss by how many tokens of a row of 64 stand on one side, and with 62 more on that side:

{context_table(stretched, book)}

Minutes of training on one core, by the time of a step:

{minutes_table(folders)}

The held-out loss of the longer training, in rows of {SHORT}:

{steps_table(folders)}

What one row takes on one core, by its tokens; memory on top of the model's and its optimizer's:

{forward}

{step}
"""


def draw_context(file: str, results: dict[str, list[dict]], folders: dict[str, list[Path]]):
    """The loss by the length of rows after two trainings, and by steps in a longer one."""
    panels = {}
    titles = {"128": "trained with rows of 128", "128 + 300 steps of 1,024": "300 more of 1,024"}
    for how, title in titles.items():
        panels[title] = {}
        for unit in TRAININGS[how].units:
            runs = results[f"{unit}, {how}"]
            lines = {}
            for length in LENGTHS:
                losses = [run["stretched", length].mean().item() for run in runs]
                lines[length] = statistics.mean(losses)
            panels[title][unit] = lines

    # the held-out loss of training
    how = "128, 16,000 steps"
    title = "trained for longer with rows of 128"
    panels[title] = {}
    for unit in TRAININGS[how].units:
        panels[title][unit] = held_out_by_step(folders[f"{unit}, {how}"][0])
    x_labels = ["tokens of a row", "tokens of a row", "steps"]
    bench.draw_panels(file, panels, x_labels, "loss, nats", strong="MMT")


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
        name = str(Path(args.out, "context"))
        bench.check_out(name)
        data = books_to_train_on(args)
        runs = list_runs(args, data)
        timed = [f"{unit}, {how}" for unit, how in itertools.product(TWO, EQUAL_TOKENS)]
        pretrain(args, data, runs)
        measure_steps([run for run in runs if run.name in timed])
        costs = measure_costs(args)

        # their models read the books
        tokenizer = train_mlm.load_tokenizer(str(Path(args.out, "tokenizer", "tokenizer.json")))
        book = mask_books(args.held_out, tokenizer)
        results = {}
        folders = {}
        for run in tqdm(runs, desc="reading", unit="run"):
            results.setdefault(run.name, []).append(read_books(run, book))
            folders.setdefault(run.name, []).append(run.folder)

        # the page and the figure
        page = context_page(results, folders, costs, book)
        print(page)
        train_mlm.write_atomically(Path(f"{name}.md"), page)
        draw_context(f"{name}.png", results, folders)


if __name__ == "__main__":
    main(sys.argv[1:])
