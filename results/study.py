"""What one choice is worth: short pretrainings that differ in it alone, as a table and a figure.

    python results/study.py psm --data texts/ --seeds 2   # forms of padding-safe masking
    python results/study.py budgets --data texts/         # 400 to 4,000 steps of T, MMT and MWT
    python results/study.py sizes --data texts/           # hidden sizes 32 to 128 of five patterns

Runs and their table are those of results/patterns.py: the same command goes on after it was
stopped. The page and the figure are in --out beside the runs, as NAME.md and NAME.png.
"""

import contextlib
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import patterns  # beside this file; it finds bench.py and the others, and comes before torch
import torch
import torch.nn.functional as F
from patterns import mean_and_deviation, twelve_layers
from tqdm import tqdm

import bench
import train_mlm
from mabert import MaBERTForMaskedLM

LENGTH = 64  # tokens of a row


# ---- The studies ----


class Study(NamedTuple):
    """Short pretrainings that differ in a pattern and in one other choice."""

    variants: dict[tuple[str, str], list[str]]  # flags of train_mlm.py by (pattern, choice)
    varying: str  # what all have in common, and in what they differ
    costs: tuple[str, ...] = ()  # names of COSTS: the x axes of the figure's panels


def psm_study() -> Study:
    """Stages of padding-safe masking. Paragraphs are documents, so that there are pads."""
    variants = {}
    for pattern in ("MMTMMT", "MWTMWT"):
        for form in ("none", "pre", "post", "pre+post", "pre+scan+post"):
            flags = f"--pattern {pattern} --psm {form} --sample-by paragraph"
            variants[pattern, form] = flags.split()
    sizes = f"{patterns.STEPS} steps, six layers, hidden size 64"
    return Study(variants, f"{sizes}; the pattern and the form of PSM vary")


def budgets_study() -> Study:
    """10, 25, 50 and 100 % of a budget, as the paper's."""
    variants = {}
    for unit in ("T", "MMT", "MWT"):
        for steps in (400, 1000, 2000, 4000):
            flags = f"--pattern {twelve_layers(unit)} --steps {steps}"
            variants[unit, f"{steps} steps"] = flags.split()
    varying = "12 layers, hidden size 64; the pattern and the number of steps vary"
    return Study(variants, varying, costs=("steps", "seconds"))


def sizes_study() -> Study:
    """Three hidden sizes."""
    variants = {}
    for unit in ("T", "M", "MMT", "MWT", "H"):
        for hidden in (32, 64, 128):
            flags = f"--pattern {twelve_layers(unit)}"
            flags += f" --hidden-size {hidden} --intermediate-size {4 * hidden}"
            variants[unit, f"hidden {hidden}"] = flags.split()
    varying = f"{patterns.STEPS} steps, 12 layers; the pattern and the hidden size vary"
    return Study(variants, varying, costs=("TFLOP", "seconds"))


# each is made when it is asked for
STUDIES = {"psm": psm_study, "budgets": budgets_study, "sizes": sizes_study}


# ---- psm: the held-out loss with other pads ----

PADDINGS = {  # of held-out rows: how many at once, pads beside those of training, their side
    "as in training": (32, 1, "right"),
    "left": (32, 1, "left"),
    "4 times": (32, 4, "right"),
    "none": (1, 0, "right"),
}


def repad(batch: tuple, times: int, side: str, pad_token_id: int) -> list[torch.Tensor]:
    """(ids, real, labels) of rows padded on the right, with `times` as many pads, on this side."""

    # So many more pads on the right, without labels. With times 0 the width is negative, and F.pad
    # cuts: that leaves the tokens of a single row, but would cut into the longest of several.
    lengths = batch[1].sum(1)
    padded_length = batch[1].shape[1]
    more = round((times - 1) * (padded_length - lengths.double().mean().item()))
    fill = (pad_token_id, False, train_mlm.IGNORED)
    batch = [F.pad(tensor, (0, more), value=value) for tensor, value in zip(batch, fill)]

    # all pads go round to the left
    if side == "left":
        pads = (padded_length + more - lengths).tolist()
        batch = [torch.stack([row.roll(n) for row, n in zip(tensor, pads)]) for tensor in batch]
    return batch


@torch.no_grad()
def losses_by_padding(folder: Path, held_out: tuple) -> list[float]:
    """The loss of a run's model on held-out rows, in nats, for each of PADDINGS."""
    model = MaBERTForMaskedLM.from_pretrained(folder)  # for use, so without dropout
    labelled = (held_out[2] != train_mlm.IGNORED).sum()

    # the sum over micro-batches, by labelled token
    losses = []
    for rows_at_once, times, side in PADDINGS.values():
        total = 0.0
        for batch in train_mlm.micro_batches(held_out, rows_at_once):
            ids, real, labels = repad(batch, times, side, model.config.pad_token_id)
            total += model(ids, real, labels=labels, reduction="sum").loss.item()
        losses.append(total / labelled)
    return losses


def compare_paddings(results: dict[tuple[str, str], patterns.Result]) -> tuple[str, dict]:
    """(a table of the losses with other pads, {pattern: {form: {padding: loss}}})."""

    # the held-out rows of the first run, which are those of all
    first = next(iter(results.values())).folders[0]
    with contextlib.redirect_stdout(sys.stderr):
        held_out = train_mlm.prepare(patterns.read_settings(first), None).held_out

    # a line of the table and a line of the figure for each variant
    body = []
    panels = {}
    for (pattern, form), result in results.items():
        variant = f"{pattern}, {form}"
        by_seed = [losses_by_padding(folder, held_out) for folder in tqdm(result.folders, variant)]
        by_padding = list(zip(*by_seed))
        body.append([variant, *map(mean_and_deviation, by_padding)])
        losses = dict(zip(PADDINGS, map(statistics.mean, by_padding)))
        panels.setdefault(pattern, {})[form] = losses

    # below the other table
    title = "The held-out loss with other pads"
    return f"\n\n{title}:\n\n{bench.table(['', *PADDINGS], body)}", panels


# ---- The page and the figure ----

COSTS = {  # what a run costs, as the label of an axis
    "steps": "steps of the run",
    "TFLOP": "TFLOP without the scan (hidden sizes 32, 64, 128)",
    "seconds": "seconds of the run's steps",
}


def losses_by_cost(results: dict, cost: str) -> dict[str, dict[float, float]]:
    """{pattern: {cost of a run: held-out loss}} of {(pattern, choice): result}."""
    lines = {}
    for (pattern, _), result in results.items():
        run = dict(steps=result.steps, TFLOP=result.tflop, seconds=result.steps * result.seconds)
        lines.setdefault(pattern, {})[run[cost]] = statistics.mean(result.losses)
    return lines


def run_study(args):
    """The runs, the page and the figure."""
    study = STUDIES[args.study]()
    name = str(Path(args.out, args.study))
    bench.check_out(name)

    # the table of the runs
    variants = {", ".join(key): flags for key, flags in study.variants.items()}
    page, by_name = patterns.compare_variants(args, variants, LENGTH, patterns.STEPS, study.varying)
    results = dict(zip(study.variants, by_name.values()))

    # the panels of the figure; of psm also the table of other pads
    panels = {f"by {cost}": losses_by_cost(results, cost) for cost in study.costs}
    x_labels = [COSTS[cost] for cost in study.costs]
    strong = "MMT"
    if args.study == "psm":
        paddings, panels = compare_paddings(results)
        page += paddings
        x_labels = ["pads of the held-out rows"] * len(panels)
        strong = "pre+scan+post"

    # write them
    print(page)
    train_mlm.write_atomically(Path(f"{name}.md"), page + "\n")
    bench.draw_panels(f"{name}.png", panels, x_labels, "held-out loss, nats", strong)


def main(argv: list[str]):
    parser = patterns.new_parser(__doc__, seeds=1, out="out/study")
    parser.add_argument("study", choices=STUDIES, help="what varies")
    patterns.add_data(parser)
    args = parser.parse_args(argv)
    with bench.errors_in_one_line():
        run_study(args)


if __name__ == "__main__":
    main(sys.argv[1:])
