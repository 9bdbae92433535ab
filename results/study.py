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

import patterns  # beside this file; it finds bench.py and the others, and comes before torch
import torch
import torch.nn.functional as F
from patterns import spread
from tqdm import tqdm

import bench
import train_mlm
from mabert import MaBERTForMaskedLM

# {study: {variant, whose name begins with its pattern: flags of train_mlm.py}}
STUDIES = {"psm": {}, "budgets": {}, "sizes": {}}

# stages of padding-safe masking, six layers, paragraphs as documents, so that there are pads
for pattern in ("MMTMMT", "MWTMWT"):
    for form in ("none", "pre", "post", "pre+post", "pre+scan+post"):
        flags = f"--pattern {pattern} --psm {form} --sample-by paragraph"
        STUDIES["psm"][f"{pattern}, {form}"] = flags.split()

# 10, 25, 50 and 100 % of a budget, as the paper's; twelve layers
for unit in ("T", "MMT", "MWT"):
    for steps in (400, 1000, 2000, 4000):
        flags = f"--pattern {unit * (12 // len(unit))} --steps {steps}"
        STUDIES["budgets"][f"{unit}, {steps} steps"] = flags.split()

# hidden sizes; twelve layers
for unit in ("T", "M", "MMT", "MWT", "H"):
    for hidden in (32, 64, 128):
        flags = f"--pattern {unit * (12 // len(unit))}"
        flags += f" --hidden-size {hidden} --intermediate-size {4 * hidden}"
        STUDIES["sizes"][f"{unit}, hidden {hidden}"] = flags.split()

LENGTH = 64  # tokens of a row
STEPS = patterns.STEPS
VARYING = {  # what a study's runs have in common, and in what they differ
    "psm": f"{STEPS} steps, six layers, hidden size 64; the pattern and the form of PSM vary",
    "budgets": "12 layers, hidden size 64; the pattern and the number of steps vary",
    "sizes": f"{STEPS} steps, 12 layers; the pattern and the hidden size vary",
}
COSTS = {"budgets": ("steps", "seconds"), "sizes": ("TFLOP", "seconds")}  # x axes of the figures
PADDINGS = {  # of held-out rows: how many at once, pads beside those of training, their side
    "as in training": (32, 1, "right"),
    "left": (32, 1, "left"),
    "4 times": (32, 4, "right"),
    "none": (1, 0, "right"),
}


# ---- psm: the held-out loss under other paddings ----


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
    model = MaBERTForMaskedLM.from_pretrained(folder)
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


def compare_paddings(results: dict) -> tuple[str, dict]:
    """(a table of the losses under other paddings, panels of them for the figure)."""

    # the held-out rows of the first run, which are those of all
    first = next(iter(results.values())).folders[0]
    with contextlib.redirect_stdout(sys.stderr):
        held_out = train_mlm.prepare(patterns.read_settings(first), None).held_out

    # a line of the table and a line of the figure for each variant
    body = []
    panels = {}
    for variant, result in results.items():
        by_seed = [losses_by_padding(folder, held_out) for folder in tqdm(result.folders, variant)]
        by_padding = list(zip(*by_seed))
        body.append([variant, *map(spread, by_padding)])
        pattern, form = variant.split(", ")
        points = dict(zip(PADDINGS, map(statistics.mean, by_padding)))
        panels.setdefault(pattern, {})[form] = points

    # below the other table
    title = "The held-out loss with other pads"
    return f"\n\n{title}:\n\n{bench.table(['', *PADDINGS], body)}", panels


# ---- The figure ----


def loss_panels(results: dict, costs: tuple[str, ...]) -> dict[str, dict[str, dict[float, float]]]:
    """{title of a panel, by a cost: {pattern: {cost of a run: loss}}}."""
    panels = {f"by {cost}": {} for cost in costs}

    # each result is a point in each panel
    for variant, result in results.items():
        pattern = variant.split(", ")[0]
        run = dict(steps=result.steps, TFLOP=result.tflop, seconds=result.steps * result.seconds)
        for cost in costs:
            line = panels[f"by {cost}"].setdefault(pattern, {})
            line[run[cost]] = statistics.mean(result.losses)
    return panels


def draw_study(file: str, panels: dict, x_label: str, strong: str):
    """A panel for each {title: {name of a line: {x: held-out loss}}}."""
    figure, axes = bench.new_figure(list(panels), x_label, "held-out loss, nats")
    for part, lines in zip(axes, panels.values()):
        bench.draw_lines(part, lines, strong)
    bench.save_figure(figure, file)


def run_study(args):
    """The runs, the page and the figure."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    name = str(Path(args.out, args.study))
    bench.check_out(name)

    # the table of the runs; of psm also that of other paddings
    variants = STUDIES[args.study]
    page, results = patterns.compare_variants(args, variants, VARYING[args.study])
    if args.study == "psm":
        paddings, panels = compare_paddings(results)
        page += paddings
    print(page)
    train_mlm.write_atomically(Path(f"{name}.md"), page + "\n")

    # the figure, where what the paper has is strong
    if args.study == "psm":
        draw_study(f"{name}.png", panels, "pads of the held-out rows", strong="pre+scan+post")
    else:
        draw_study(f"{name}.png", loss_panels(results, COSTS[args.study]), "", strong="MMT")


def main(argv: list[str]):
    parser = patterns.new_parser(__doc__, seeds=1, out="out/study")
    parser.add_argument("study", choices=STUDIES, help="what varies")
    patterns.add_data(parser)
    args = parser.parse_args(argv)
    args.length = LENGTH
    args.steps = STEPS
    with bench.errors_in_one_line():
        run_study(args)


if __name__ == "__main__":
    main(sys.argv[1:])
