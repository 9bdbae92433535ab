"""Which layers find the value of a key: among how many pairs, and how far away.

    python results/recall.py --seeds 2 --jobs 2

A row is made of tokens without meaning: pairs of a key and its value, fillers, and at its end the
keys again, each before a [MASK] whose value the model is to find. Attention can look it up; a state
of fixed size must have kept it. The page and the figure, recall.md and recall.png, are in --out,
beside a file of each finished run, which the same command only reads.
"""

import itertools
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import patterns  # beside this file; it finds bench.py and the others, and comes before torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import bench
import train_mlm
from mabert import MaBERTConfig, MaBERTForMaskedLM

PATTERNS = ("TTT", "MMM", "MWM", "MMT", "HHH")
PAIRS = (1, 2, 4, 8, 12, 16)  # of a row, where accuracy is measured
MOST_PAIRS = 12  # of a row in training
LENGTHS = (64, 128, 256)  # tokens of a row; the first is trained

# token ids
MASK = 1
KEYS = range(2, 34)
VALUES = range(34, 66)
FILLERS = range(66, 82)


# ---- The rows ----


def recall_rows(count: int, length: int, pairs: int, rng: torch.Generator):
    """(ids, labels), (count, length) each. With pairs k v and fillers f, a row may be

        f2 f2  k7 v3  f4 f4  [MASK] f1  k2 v9  f5 v8 ...  k2 [MASK]  k7 [MASK]

    A filler is one token twice. A quarter of the fillers have the first of the two hidden, a
    quarter the second, half behind [MASK] and half behind any token: as in text, what is hidden
    follows from its neighbour, and this is what a model learns first.

        pair_items, filler_items  two tokens each, before anything is hidden
        items                     both, first in this order, then in random order
        hidden                    which of their tokens the model is to find
        shown_instead             what stands in the places of those
    """

    def permutations(size: int) -> torch.Tensor:
        return torch.rand(count, size, generator=rng).argsort(1)  # (count, size)

    def any_of(ids: range, *shape: int) -> torch.Tensor:
        return torch.randint(ids.start, ids.stop, (count, *shape), generator=rng)

    def reorder(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return x[torch.arange(count)[:, None], order]

    # the items of a row, two tokens each: pairs of different keys, and fillers
    fillers = length // 2 - 2 * pairs
    keys = KEYS.start + permutations(len(KEYS))[:, :pairs]  # (count, pairs)
    pair_items = torch.stack([keys, any_of(VALUES, pairs)], 2)  # (count, pairs, 2)
    filler_items = any_of(FILLERS, fillers, 1).expand(-1, -1, 2)  # (count, fillers, 2)
    items = torch.cat([pair_items, filler_items], 1)

    # of a filler 0: the first token is hidden, 1: the second, 2 and 3: none; of a pair none
    which_hidden = any_of(range(4), fillers)
    hidden = F.pad(F.one_hot(which_hidden, 4)[..., :2].bool(), (0, 0, pairs, 0))

    # shown instead of it: [MASK] or any token
    shown_instead = any_of(range(KEYS.start, FILLERS.stop), *items.shape[1:])
    shows_mask = torch.rand(items.shape, generator=rng) < 0.5
    shown_instead = torch.where(shows_mask, MASK, shown_instead)

    # all in random order; then the keys in another, with their values hidden behind [MASK]
    order = permutations(items.shape[1])
    asked = reorder(pair_items, permutations(pairs))  # (count, pairs, 2)
    asked_hidden = torch.tensor([False, True]).expand_as(asked)
    items = torch.cat([reorder(items, order), asked], 1)
    hidden = torch.cat([reorder(hidden, order), asked_hidden], 1)
    shown_instead = torch.cat([reorder(shown_instead, order), torch.full_like(asked, MASK)], 1)

    # (count, items, 2) becomes (count, length)
    ids = torch.where(hidden, shown_instead, items).flatten(1)
    labels = torch.where(hidden, items, train_mlm.IGNORED).flatten(1)
    return ids, labels


# ---- A run ----


def make_recall_model(pattern: str) -> MaBERTForMaskedLM:
    """A small model. With BERT's weights of deviation 0.02 and its random positions, so small a
    model learns nothing for long; so both begin otherwise."""
    sizes = dict(hidden_size=64, num_heads=2, intermediate_size=256, d_state=8, dropout=0.0)
    positions = LENGTHS[0]
    model = MaBERTForMaskedLM(
        MaBERTConfig(FILLERS.stop, pattern=pattern, max_position=positions, **sizes)
    )

    # weights of deviation 1 / √inputs: all but the projection of Δ, whose initialisation is Mamba's
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer.in_features >= 64:
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    # positions as sinusoids, small beside the tokens' embeddings
    frequencies = (2 * positions) ** -torch.linspace(0, 1, 32)
    angles = torch.arange(positions)[:, None] * frequencies
    sinusoids = torch.cat([angles.sin(), angles.cos()], 1)
    model.encoder.position_embeddings.weight.data = 0.03 * sinusoids
    return model


def train_recall(pattern: str, seed: int, steps: int) -> MaBERTForMaskedLM:
    """A model trained on rows of LENGTHS[0] tokens with 1 to MOST_PAIRS pairs, 64 in a step."""
    # a model and the rows it sees are functions of the seed
    torch.manual_seed(seed)
    model = make_recall_model(pattern)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    rng = torch.Generator().manual_seed(seed)

    for step in tqdm(range(steps), f"{pattern}, seed {seed}", unit="step", mininterval=10):
        # the learning rate of train_mlm.py
        warmup = min(200, steps // 10)
        lr = train_mlm.learning_rate(step, steps, 2e-3, warmup)
        optimizer.param_groups[0]["lr"] = lr

        # forward, backward, update
        pairs = int(torch.randint(1, MOST_PAIRS + 1, (), generator=rng))
        ids, labels = recall_rows(64, LENGTHS[0], pairs, rng)
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def accuracies(model: MaBERTForMaskedLM) -> dict[str, dict[str, float]]:
    """{length: {pairs: share of the values found}} in 512 rows. Positions are stretched."""
    found = {}
    trained_positions = model.encoder.position_embeddings
    for length, pairs in itertools.product(LENGTHS, PAIRS):
        model.encoder.position_embeddings = trained_positions
        model.encoder.resize_positions(length)  # always from those that were trained

        # the keys at the end alone, not the fillers
        ids, labels = recall_rows(512, length, pairs, torch.Generator().manual_seed(2**31))
        labels[:, : -2 * pairs] = train_mlm.IGNORED
        guesses = model(ids, labels=labels).logits.argmax(1)
        right = guesses == labels[labels != train_mlm.IGNORED]
        found.setdefault(str(length), {})[str(pairs)] = right.double().mean().item()
    return found


def run_recall(pattern: str, seed: int, steps: int, out: str, threads: int | None) -> dict:
    """The accuracies of a run, read from its file in `out` if it is finished."""
    file = Path(out, f"{pattern}-{steps}-steps-seed{seed}.json")
    if not file.exists():
        if threads:
            torch.set_num_threads(threads)
        result = accuracies(train_recall(pattern, seed, steps))
        train_mlm.write_atomically(file, json.dumps(result) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


def run_all(args) -> dict[tuple[str, int], dict]:
    """{(pattern, seed): accuracies}, of --jobs runs at a time."""
    runs = list(itertools.product(args.patterns, range(args.seeds)))
    threads = patterns.threads_of_a_run(args.jobs)

    # each in a process, whose results are taken in the order of the runs
    with ProcessPoolExecutor(args.jobs, torch.multiprocessing.get_context("spawn")) as pool:
        futures = {}
        for pattern, seed in runs:
            run = (pattern, seed, args.steps, args.out, threads)
            futures[pattern, seed] = pool.submit(run_recall, *run)
        return {run: future.result() for run, future in futures.items()}


# ---- The page and the figure ----


def recall_page(args, results: dict[tuple[str, int], dict]) -> tuple[str, dict]:
    """(a page with a table for each length, {title: {pattern: {pairs: mean accuracy}}})."""
    trained = f"{args.steps} steps of 64 rows of {LENGTHS[0]} tokens with 1 to {MOST_PAIRS} pairs"

    # what was done
    page = f"""{bench.title_line()}
Accuracy of the value of a key, of {len(VALUES)} values, after {trained}.
Hidden size 64; weights begin with deviation 1/√inputs, positions as sinusoids. Seeds: {args.seeds}.
Longer rows have more fillers and stretched positions.
"""

    # a table and a panel for each length
    panels = {}
    for length in LENGTHS:
        body = []
        panels[f"{length} tokens"] = lines = {}
        for pattern in args.patterns:
            # the mean over the seeds for each number of pairs
            runs = [results[pattern, seed][str(length)] for seed in range(args.seeds)]
            texts = []
            lines[pattern] = {}
            for pairs in PAIRS:
                by_seed = [run[str(pairs)] for run in runs]
                texts.append(patterns.mean_and_deviation(by_seed))
                lines[pattern][pairs] = statistics.mean(by_seed)
            body.append([pattern, *texts])
        page += f"\n{length} tokens:\n\n{bench.table(['pairs', *PAIRS], body)}\n"
    return page, panels


def main(argv: list[str]):
    parser = patterns.new_parser(__doc__, seeds=1, out="out/recall")
    # fmt: off
    parser.add_argument("--patterns", type=patterns.valid_pattern, nargs="+", default=PATTERNS,
        help=f"default: {' '.join(PATTERNS)}")
    parser.add_argument("--steps", type=bench.positive, default=4000,
        help="of each run (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)

    # the runs, the page and the figure
    with bench.errors_in_one_line():
        name = str(Path(args.out, "recall"))
        bench.check_out(name)
        page, panels = recall_page(args, run_all(args))
        print(page)
        train_mlm.write_atomically(Path(f"{name}.md"), page)
        x_labels = ["pairs"] * len(panels)
        bench.draw_panels(f"{name}.png", panels, x_labels, "accuracy", strong="MMT")


if __name__ == "__main__":
    main(sys.argv[1:])
