"""Fine-tunes a pretrained MaBERT on GLUE, and puts the paper's scores beside the measured ones.

    python finetune_glue.py --checkpoint out/mlm --tasks all --seeds 5               # data from the Hugging Face hub
    python finetune_glue.py --checkpoint out/mlm --tasks cola rte --data-dir glue/   # or from a folder
    python finetune_glue.py --checkpoint out/mlm --ablation --padding-side left      # Table 3; --poolings for Table B4

In order: arguments · tasks · the paper's scores · metrics · reading · batches · one run · all runs · tables.

A run is a task, a seed and the settings of the model and the training. Its result is one file in --out, named by all of
them: a run whose file exists is not run again, so an interrupted sweep goes on, and several processes may share --out.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Idle OpenMP threads spin for milliseconds by default, which slows down whatever else runs. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from mabert import PSM_STAGES, MaBERTConfig, MaBERTForSequenceClassification

try:
    import fcntl
except ImportError:  # Windows: one process at a time in a folder of results
    fcntl = None

# ----------------------------------------------------------------------------------------------------------------------
# Arguments: the defaults are BERT's protocol; the paper gives none
# ----------------------------------------------------------------------------------------------------------------------

HUB_DATA = "nyu-mll/glue"


def parse_args(argv: list[str]) -> argparse.Namespace:
    def psm(text):
        stages = () if text == "none" else tuple(text.split("+"))
        if not set(stages) <= set(PSM_STAGES):
            raise argparse.ArgumentTypeError(f"{text!r} is not none, or any of {', '.join(PSM_STAGES)} joined by +")
        return stages

    parser = argparse.ArgumentParser(
        usage="python finetune_glue.py --checkpoint FOLDER [--tasks NAME ...] [--seeds N] ...: --help lists all flags",
        description="Fine-tune a pretrained MaBERT on GLUE. Defaults are BERT's protocol.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a folder of train_mlm.py, with config.json, model.pt and tokenizer.json")
    add(
        "--tasks", nargs="+", default=["all"], type=str.lower, metavar="NAME", help=f"all, or any of {', '.join(TASKS)}"
    )
    add("--seeds", type=int, default=5, help="runs per task, of seeds 0, 1, ...")
    add("--data-dir", help="a folder with the benchmark's own download (CoLA/train.tsv, ...) or the hub's parquet "
        f"files (cola/train-00000-of-00001.parquet, ...), instead of {HUB_DATA} from the hub")  # fmt: skip
    add("--out", default="out/glue", help="the folder of results")
    add("--budget", choices=("10", "25", "50", "100"), default="10", help="per cent of the paper's pretraining: the "
        "row to compare with")  # fmt: skip
    group = parser.add_argument_group("variants")
    add = group.add_argument
    add("--pooling", choices=("map", "attn", "cls", "mean"), help="map, if not given")
    add("--psm", type=psm, metavar="STAGES", help="stages of padding-safe masking, joined by +, or none; the "
        "checkpoint's, if not given")  # fmt: skip
    add("--padding-side", choices=("right", "left"), default="right")
    add("--ablation", action="store_true", help="the four variants of Table 3: PSM or none, map or cls")
    add("--poolings", action="store_true", help="the four poolings of Table B4")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--lr", type=float, default=2e-5, help="peak learning rate")
    add("--batch-size", type=int, default=32, help="rows")
    add("--epochs", type=int, default=3)
    add("--warmup", type=float, default=0.1, help="share of the steps, linear; then linear decay to 0")
    add("--weight-decay", type=float, default=0.01, help="on matrices; none on biases, norms, A_log and D")
    add("--max-length", type=int, default=128, help="tokens of a row; of a pair the longer is cut first")
    add("--smart-batches", action=argparse.BooleanOptionalAction, default=True, help="rows of like length together; "
        "without, rows as they come, padded to --max-length")  # fmt: skip
    group = parser.add_argument_group("what to keep")
    add = group.add_argument
    add("--predict", action="store_true", help="write the benchmark's submission files, of the first seed")
    add("--save", action="store_true", help="keep the fine-tuned models")

    args = parser.parse_args(argv)

    def require(ok, message):
        if not ok:
            parser.error(message)

    unknown = [name for name in args.tasks if name not in (*TASKS, "all")]
    require(not unknown, f"--tasks: {', '.join(unknown)} unknown; there are all, {', '.join(TASKS)}")
    args.tasks = [name for name in TASKS if name in args.tasks or "all" in args.tasks]
    for name in ("seeds", "batch_size", "epochs"):
        require(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be positive")
    require(args.lr > 0, "--lr must be positive")
    require(args.weight_decay >= 0, "--weight-decay must not be negative")
    require(0 <= args.warmup < 1, "--warmup must be in [0, 1)")
    require(args.max_length >= 8, "--max-length must be at least 8")
    require(not (args.ablation and args.poolings), "--ablation and --poolings exclude each other")
    require(not (args.pooling and (args.ablation or args.poolings)), "--ablation and --poolings choose the pooling")
    require(args.psm is None or not args.ablation, "--ablation chooses the PSM")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Tasks
# ----------------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    folder: str  # of the benchmark's download
    labels: tuple[str, ...]  # in the hub's order, as the benchmark writes them; none for regression
    sentences: tuple[str, ...]  # columns of the .tsv files
    label: str  # column of the .tsv files
    hub_sentences: tuple[str, ...]  # columns of the parquet files
    metrics: tuple[str, ...]  # the first is the one compared with the paper
    sizes: tuple[int, ...]  # rows of the benchmark: training, then each dev set, then each test set
    splits: tuple[str, ...] = ("",)  # suffixes of dev and test
    columns: tuple[str, ...] = ()  # of the results: one per dev set

    @property
    def expected(self) -> str:
        return f"{', '.join(self.labels)} (0 to {len(self.labels) - 1})" if self.labels else "a number from 0 to 5"

    @property
    def files(self) -> list[str]:
        return ["train", *("dev" + split for split in self.splits), *("test" + split for split in self.splits)]


PAIR, ENTAILS = ("sentence1", "sentence2"), ("entailment", "not_entailment")
QUESTIONS = ("question1", "question2")
# fmt: off
TASKS = {
    "cola": Task("CoLA", ("0", "1"), ("sentence",), "label", ("sentence",), ("matthews",), (8551, 1043, 1063)),
    "sst2": Task("SST-2", ("0", "1"), ("sentence",), "label", ("sentence",), ("accuracy",), (67349, 872, 1821)),
    "mrpc": Task("MRPC", ("0", "1"), ("#1 String", "#2 String"), "Quality", PAIR, ("f1", "accuracy"),
                 (3668, 408, 1725)),
    "qqp": Task("QQP", ("0", "1"), QUESTIONS, "is_duplicate", QUESTIONS, ("f1", "accuracy"), (363846, 40430, 390965)),
    "stsb": Task("STS-B", (), PAIR, "score", PAIR, ("pearson", "spearman"), (5749, 1500, 1379)),
    "mnli": Task("MNLI", ("entailment", "neutral", "contradiction"), PAIR, "gold_label", ("premise", "hypothesis"),
                 ("accuracy",), (392702, 9815, 9832, 9796, 9847), ("_matched", "_mismatched"), ("MNLI-m", "MNLI-mm")),
    "qnli": Task("QNLI", ENTAILS, ("question", "sentence"), "label", ("question", "sentence"), ("accuracy",),
                 (104743, 5463, 5463)),
    "rte": Task("RTE", ENTAILS, PAIR, "label", PAIR, ("accuracy",), (2490, 277, 3000)),
    "wnli": Task("WNLI", ("0", "1"), PAIR, "label", PAIR, ("accuracy",), (635, 71, 146)),
}
# fmt: on
TASKS = {name: task._replace(columns=task.columns or (task.folder,)) for name, task in TASKS.items()}

# ----------------------------------------------------------------------------------------------------------------------
# The paper's scores
# ----------------------------------------------------------------------------------------------------------------------

PAPER_COLUMNS = ("CoLA", "SST-2", "MRPC", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE")  # its average is over these
TABLE_1 = {  # per pattern, 10 % of the pretraining
    "M" * 12: (0.401, 0.878, 0.805, 0.831, 0.745, 0.740, 0.796, 0.561),
    "T" * 12: (0.428, 0.891, 0.834, 0.843, 0.796, 0.802, 0.864, 0.575),
    "MTT" * 4: (0.555, 0.913, 0.823, 0.855, 0.804, 0.806, 0.868, 0.586),
    "TM" * 6: (0.525, 0.896, 0.826, 0.862, 0.801, 0.802, 0.873, 0.587),
    "MT" * 6: (0.573, 0.897, 0.797, 0.861, 0.803, 0.804, 0.859, 0.582),
    "TMM" * 4: (0.528, 0.903, 0.832, 0.863, 0.803, 0.802, 0.870, 0.595),
    "MMT" * 4: (0.574, 0.904, 0.837, 0.868, 0.809, 0.814, 0.867, 0.602),
    "TTM" * 4: (0.512, 0.902, 0.809, 0.859, 0.800, 0.805, 0.874, 0.580),
}
FULL = (0.676, 0.933, 0.869, 0.879, 0.835, 0.837, 0.893, 0.654)
PAPER_BUDGETS = {  # MMT four times: Tables B1–B3 and 2
    "10": TABLE_1["MMT" * 4],
    "25": (0.612, 0.917, 0.848, 0.873, 0.815, 0.816, 0.868, 0.612),
    "50": (0.634, 0.924, 0.863, 0.877, 0.825, 0.828, 0.886, 0.624),
    "100": FULL,
}
ABLATION = {  # Table 3: whether there is PSM, the pooling, the scores
    "Full": (True, "map", FULL),
    "PSM only": (True, "cls", (0.641, 0.918, 0.849, 0.863, 0.816, 0.818, 0.874, 0.638)),
    "MAP only": (False, "map", (0.661, 0.922, 0.841, 0.860, 0.819, 0.820, 0.878, 0.597)),
    "None": (False, "cls", (0.596, 0.903, 0.841, 0.847, 0.803, 0.805, 0.855, 0.614)),
}
POOLINGS = {  # Table B4
    "map": FULL,
    "attn": (0.648, 0.924, 0.857, 0.861, 0.823, 0.818, 0.888, 0.639),
    "cls": (0.661, 0.922, 0.841, 0.860, 0.819, 0.820, 0.878, 0.597),
    "mean": (0.651, 0.924, 0.857, 0.866, 0.823, 0.817, 0.869, 0.631),
}


class Variant(NamedTuple):
    name: str
    psm: tuple[str, ...]
    pooling: str
    paper: tuple[float, ...]  # in the order of PAPER_COLUMNS; empty where the paper has no such row


def variants(args: argparse.Namespace, config: MaBERTConfig) -> list[Variant]:
    """What to run: the chosen variant, or those of Table 3 or B4."""
    psm, pooling = config.psm if args.psm is None else args.psm, args.pooling or "map"
    if args.poolings:
        return [Variant(pooling, psm, pooling, paper) for pooling, paper in POOLINGS.items()]
    if args.ablation:
        on = config.psm or MaBERTConfig().psm
        return [
            Variant(name, on if masks else (), pooling, paper) for name, (masks, pooling, paper) in ABLATION.items()
        ]
    paper = ()
    if config.pattern == "MMT" * 4 and args.budget == "100" and (psm or pooling in ("map", "cls")):
        paper = POOLINGS[pooling] if psm else ABLATION["MAP only" if pooling == "map" else "None"][2]
    elif psm and pooling == "map":
        paper = TABLE_1.get(config.pattern, ()) if args.budget == "10" else ()
        paper = PAPER_BUDGETS[args.budget] if config.pattern == "MMT" * 4 else paper
    return [Variant(f"{'+'.join(psm) or 'no'} PSM, {pooling}", psm, pooling, paper)]


# ----------------------------------------------------------------------------------------------------------------------
# Metrics: the benchmark's
# ----------------------------------------------------------------------------------------------------------------------


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Of class 1."""
    both, either = ((predicted == 1) & (labels == 1)).sum(), (predicted == 1).sum() + (labels == 1).sum()
    return float(2 * both / either) if either else 0.0


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """0 where one of them is constant."""
    x, y = predicted - predicted.mean(), labels - labels.mean()
    scale = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale else 0.0


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    def ranks(x):
        _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal values share the mean of their ranks

    return pearson(ranks(predicted), ranks(labels))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": pearson,  # of two classes, as 0 and 1, it is the same
    "pearson": pearson,
    "spearman": spearman,
}

# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    sentences: list[tuple[str, ...]]  # one or two of each row
    labels: np.ndarray | None  # (rows,) int64, or float32 for regression; none of a test set
    index: list[int]  # what the benchmark calls the rows


def sources(name: str, file: str, data_dir: str | None) -> list[Path]:
    """Where one of task.files, or of the diagnostic set ("ax", "test"), lies; empty for the hub."""
    if data_dir is None:
        return []
    tsv = Path(data_dir, "diagnostic/diagnostic.tsv" if name == "ax" else f"{TASKS[name].folder}/{file}.tsv")
    if tsv.exists():
        return [tsv]
    split = file.replace("dev", "validation")
    if parquet := sorted(Path(data_dir, name).glob(f"{split}-*.parquet")):
        return parquet
    raise SystemExit(f"--data-dir: neither {tsv} nor {Path(data_dir, name, split)}-*.parquet exists")


def read(task: Task, name: str, file: str, data_dir: str | None) -> Rows:
    files, is_test = sources(name, file, data_dir), file.startswith("test")
    if not files:
        return read_hub(task, name, file)
    if files[0].suffix == ".tsv":
        return read_tsv(task, files[0], is_test)
    import pyarrow.parquet

    try:
        columns = pyarrow.concat_tables(map(pyarrow.parquet.read_table, files)).to_pydict()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise SystemExit(f"cannot read {files[0]}: {error}") from error
    return from_columns(task, columns, str(files[0]), is_test)


def read_hub(task: Task, name: str, file: str) -> Rows:
    import datasets  # takes seconds

    try:
        table = datasets.load_dataset(HUB_DATA, name, split=file.replace("dev", "validation"))
    except Exception as error:  # datasets raises many kinds
        advice = "without the hub, pass --data-dir with the benchmark's files"
        raise SystemExit(f"cannot load {HUB_DATA} {name}: {type(error).__name__}: {error}\n{advice}") from error
    return from_columns(task, table[:], f"{HUB_DATA} {name}", is_test=file.startswith("test"))


def from_columns(task: Task, columns: dict[str, list], source: str, is_test: bool) -> Rows:
    wanted = (*task.hub_sentences, "idx", *(() if is_test else ("label",)))
    if missing := [column for column in wanted if column not in columns]:
        raise SystemExit(f"{source} has no column {', '.join(missing)}, only {', '.join(columns)}")
    sentences, labels = list(zip(*(columns[column] for column in task.hub_sentences))), None
    for number, row in enumerate(sentences):
        if None in row:
            raise SystemExit(f"{source}, row {number}: an empty sentence")
    if not sentences:
        raise SystemExit(f"{source} has no rows")
    if not is_test:
        known = range(len(task.labels))
        for number, label in enumerate(columns["label"]):
            if label not in known if task.labels else not (isinstance(label, float) and 0 <= label <= 5):
                raise SystemExit(f"{source}, row {number}: label {label!r}; expected {task.expected}")
        labels = np.array(columns["label"], dtype=np.int64 if task.labels else np.float32)
    return Rows(sentences, labels, columns["idx"])


def read_tsv(task: Task, file: Path, is_test: bool) -> Rows:
    """A file of the benchmark's download: tabs between columns, no quoting, a byte-order mark in some."""
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")  # some sentences contain other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"cannot read {file}: {error}") from error
    if lines[-1] == "":
        lines.pop()
    has_header = is_test or task.folder != "CoLA"
    if len(lines) <= has_header:
        raise SystemExit(f"{file} has no rows")
    header = lines[0].rstrip("\r").split("\t") if has_header else ["source", "label", "mark", "sentence"]
    wanted = (*task.sentences, *(() if is_test else (task.label,)))
    if missing := [column for column in wanted if column not in header]:
        raise SystemExit(f"{file}, line 1: no column {', '.join(missing)}, only {', '.join(header)}")
    places = [header.index(column) for column in wanted]
    sentences, labels, index, skipped = [], [], [], 0
    for number, line in enumerate(lines[has_header:], 1 + has_header):
        cells = line.rstrip("\r").split("\t")
        if task.folder == "QQP" and not is_test and (len(cells) != len(header) or cells[places[-1]] == ""):
            skipped += 1  # some of its rows are known to lack columns
            continue
        if len(cells) != len(header):
            raise SystemExit(f"{file}, line {number}: {len(cells)} columns instead of {len(header)}")
        if not is_test:
            labels.append(parse_label(task, cells[places[-1]], f"{file}, line {number}"))
        sentences.append(tuple(cells[place] for place in places[: len(task.sentences)]))
        index.append(number - 1 - has_header)
    if skipped:
        tqdm.write(f"{file}: {skipped} malformed rows skipped")
    return Rows(sentences, None if is_test else np.array(labels, dtype=np.int64 if task.labels else np.float32), index)


def parse_label(task: Task, text: str, place: str) -> int | float:
    if text in task.labels:
        return task.labels.index(text)
    with contextlib.suppress(ValueError):
        if not task.labels and 0 <= float(text) <= 5:
            return float(text)
    raise SystemExit(f"{place}: label {text!r}; expected {task.expected}")


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    ids: list[np.ndarray]  # int32 each
    types: list[np.ndarray]  # uint8 each: 0 in the first sentence, 1 in the second
    labels: torch.Tensor | None
    index: list[int]


def encode(rows: Rows, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """[CLS] first [SEP], or [CLS] first [SEP] second [SEP], cut to max_length; of a pair the longer is cut first."""
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    ids, types = [], []
    for start in range(0, len(rows.sentences), 10_000):
        some = rows.sentences[start : start + 10_000]
        encodings = tokenizer.encode_batch_fast([row if len(row) == 2 else row[0] for row in some])
        ids += [np.array(row.ids, dtype=np.int32) for row in encodings]
        types += [np.array(row.type_ids, dtype=np.uint8) for row in encodings]
    return Encoded(ids, types, None if rows.labels is None else torch.from_numpy(rows.labels), rows.index)


def batches(lengths: list[int], size: int, smart: bool, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Row numbers by batches, every row once, shuffled by rng if there is one.

    Smart batches hold rows of like length: sorted over 50 batches at a time where shuffled, else over all rows.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    if not smart:
        return [order[i : i + size] for i in range(0, len(order), size)]
    pool, found = len(order) if rng is None else 50 * size, []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(np.array(lengths)[rows], kind="stable")]
        found += [rows[i : i + size] for i in range(0, len(rows), size)]
    if rng is not None:
        rng.shuffle(found)
    return found


def collate(
    data: Encoded, rows: np.ndarray, pad: int, side: str, length: int | None = None
) -> tuple[torch.Tensor, ...]:
    """(input ids, mask, token types), each (rows, length), padded to the longest row if no length is given."""
    length = length or max(len(data.ids[row]) for row in rows)
    ids, types = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(data.ids[row])
        place = slice(0, n) if side == "right" else slice(length - n, length)
        ids[i, place], types[i, place] = torch.from_numpy(data.ids[row]), torch.from_numpy(data.types[row])
        mask[i, place] = True
    return ids, mask, types


# ----------------------------------------------------------------------------------------------------------------------
# One run
# ----------------------------------------------------------------------------------------------------------------------


def autocast(device: torch.device):
    """bf16 on a GPU, nothing elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def predict(model: MaBERTForSequenceClassification, data: Encoded, pad: int, args: argparse.Namespace) -> np.ndarray:
    """Logits (rows, labels), in the order of the rows."""
    model.eval()
    device = next(model.parameters()).device
    logits = np.zeros((len(data.ids), model.config.num_labels), dtype=np.float32)
    length = None if args.smart_batches else args.max_length
    is_regression = model.config.num_labels == 1  # whose scores bf16 would round to ties
    parts = batches(list(map(len, data.ids)), 4 * args.batch_size, args.smart_batches)
    for rows in tqdm(parts, desc="predicting", leave=False, delay=5):
        inputs = (part.to(device) for part in collate(data, rows, pad, args.padding_side, length))
        with contextlib.nullcontext() if is_regression else autocast(device):
            logits[rows] = model(*inputs).logits.float().cpu().numpy()
    return logits


class Diverged(Exception):
    pass


def fit(
    model: MaBERTForSequenceClassification, data: Encoded, pad: int, seed: int, args: argparse.Namespace, name: str
):
    """Trains the model in place: linear warm-up and decay, AdamW, gradients clipped at 1.0."""
    device = next(model.parameters()).device
    decays = {name: p.dim() >= 2 and not name.endswith("A_log") for name, p in model.named_parameters()}
    groups = [
        dict(params=[p for name, p in model.named_parameters() if decays[name] == flag], weight_decay=decay)
        for flag, decay in ((True, args.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-6, fused=True)
    lengths, length = list(map(len, data.ids)), None if args.smart_batches else args.max_length
    steps = args.epochs * -(-len(lengths) // args.batch_size)
    warmup = max(1, round(args.warmup * steps))
    model.train()
    losses, step = torch.zeros((), device=device), 0
    with tqdm(total=steps, desc=name, unit="step", leave=False) as progress:
        for epoch in range(args.epochs):
            rng = np.random.default_rng((seed, epoch))
            for rows in batches(lengths, args.batch_size, args.smart_batches, rng):
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
                inputs = (part.to(device) for part in collate(data, rows, pad, args.padding_side, length))
                with autocast(device):
                    loss = model(*inputs, labels=data.labels[rows].to(device)).loss
                loss.backward()
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses, step = losses + loss.detach(), step + 1
                progress.update()
                if step % 50 == 0 or step == steps:
                    if not losses.isfinite():
                        raise Diverged(f"{name}: the loss is {losses.item()} by step {step}; a lower --lr helps")
                    progress.set_postfix(loss=f"{losses.item() / (step % 50 or 50):.4f}")
                    losses = torch.zeros((), device=device)


class Data(NamedTuple):
    """A task's files, encoded. One task at a time is kept."""

    train: Encoded
    dev: list[Encoded]
    test: dict[str, Encoded]  # by the name of the submission file; only for --predict


def load(name: str, args: argparse.Namespace, tokenizer: Tokenizer) -> Data:
    task, found = TASKS[name], {}
    for file in tqdm(task.files, desc=f"reading {name}", leave=False, delay=1):
        if file.startswith("test") and not args.predict:
            continue
        rows = read(task, name, file, args.data_dir)
        expected = task.sizes[task.files.index(file)]
        if len(rows.sentences) != expected:
            tqdm.write(f"{name} {file} has {len(rows.sentences)} rows; the hub's copy of the benchmark has {expected}")
        found[file] = encode(rows, tokenizer, args.max_length)
    tests = {column: found["test" + split] for column, split in zip(task.columns, task.splits) if args.predict}
    if args.predict and name == "mnli":
        tests["AX"] = encode(read(task, "ax", "test", args.data_dir), tokenizer, args.max_length)
    return Data(found["train"], [found["dev" + split] for split in task.splits], tests)


def decide(task: Task, logits: np.ndarray) -> np.ndarray:
    return logits.argmax(axis=1) if task.labels else logits[:, 0]


def submission(task: Task, data: Encoded, logits: np.ndarray) -> str:
    """A file as the benchmark wants it: scores from 0 to 5, or labels as it writes them."""
    decided = decide(task, logits)
    cells = [task.labels[i] for i in decided] if task.labels else [f"{x:.3f}" for x in decided.clip(0, 5)]
    return "".join(f"{index}\t{cell}\n" for index, cell in [("index", "prediction"), *zip(data.index, cells)])


def run(
    name: str, seed: int, variant: Variant, data: Data, tokenizer: Tokenizer, args: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], MaBERTForSequenceClassification]:
    """Fine-tunes once: (scores by column and metric, model)."""
    task, device = TASKS[name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)  # the head's initialisation, dropout
    model = load_model(args, variant, max(1, len(task.labels))).to(device)
    pad = tokenizer.token_to_id("[PAD]")
    fit(model, data.train, pad, seed, args, f"{name} {variant.name} seed {seed}")
    scores = {}
    for column, dev in zip(task.columns, data.dev):
        decided = decide(task, predict(model, dev, pad, args))
        scores[column] = {metric: METRICS[metric](decided, dev.labels.numpy()) for metric in task.metrics}
    return scores, model


def load_model(args: argparse.Namespace, variant: Variant, num_labels: int) -> MaBERTForSequenceClassification:
    options = dict(num_labels=num_labels, psm=variant.psm, pooling=variant.pooling)
    logging.getLogger("mabert").setLevel(logging.ERROR)  # that the head is new goes without saying
    try:
        model = MaBERTForSequenceClassification.from_pretrained(args.checkpoint, **options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--checkpoint: {error}") from error
    return model


# ----------------------------------------------------------------------------------------------------------------------
# All runs
# ----------------------------------------------------------------------------------------------------------------------


def settings(args: argparse.Namespace, name: str, variant: Variant, checkpoint: str) -> dict:
    """What a run's result depends on, beside the seed."""
    names = "padding_side lr batch_size epochs warmup weight_decay max_length smart_batches".split()
    own = {option: getattr(args, option) for option in names} | dict(task=name, checkpoint=checkpoint)
    files = [source for file in TASKS[name].files[:-1] for source in sources(name, file, args.data_dir)]
    data = [(file.name, file.stat().st_size) for file in files if "test" not in file.name] or HUB_DATA
    return own | dict(psm="+".join(variant.psm) or "none", pooling=variant.pooling, data=data)


def result_file(args: argparse.Namespace, name: str, seed: int, variant: Variant, checkpoint: str) -> Path:
    identity = hashlib.sha256(json.dumps(settings(args, name, variant, checkpoint)).encode()).hexdigest()[:8]
    return Path(args.out, f"{name}-{variant.pooling}-{'+'.join(variant.psm) or 'none'}-{identity}-seed{seed}.json")


def write(file: Path, text: str):
    """The whole file or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(file: Path, wait: bool) -> Iterator[bool]:
    """Whether this process alone may make the file. A process that dies gives its claims up."""
    if fcntl is None:
        yield True
        return
    lock_file = file.parent / ".locks" / file.name
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def sweep(args: argparse.Namespace, tokenizer: Tokenizer, chosen: list[Variant], checkpoint: str):
    """Makes all result files that are missing; those that another process is making come last."""
    todo = [(name, seed, variant) for name in args.tasks for variant in chosen for seed in range(args.seeds)]
    loaded, data, diverged = None, None, []
    with tqdm(total=len(todo), desc="runs", unit="run") as progress:
        for wait in (False, True):
            later = []
            for name, seed, variant in todo:
                file = result_file(args, name, seed, variant, checkpoint)
                folder = file.with_suffix("")
                predicts = args.predict and seed == 0 and variant is chosen[0]
                with claimed(file, wait) as free:
                    if not free:
                        later.append((name, seed, variant))
                        continue
                    wanted = [file] + [folder / f"{test}.tsv" for test in submissions(name) if predicts]
                    wanted += [folder / "tokenizer.json"] if args.save else []
                    if not all(path.exists() for path in wanted):
                        if loaded != name:
                            loaded, data = name, load(name, args, tokenizer)
                        start = time.perf_counter()
                        try:
                            scores, model = run(name, seed, variant, data, tokenizer, args)
                        except Diverged as error:
                            diverged.append(str(error))
                            continue
                        result = dict(task=name, seed=seed, scores=scores, seconds=time.perf_counter() - start)
                        result |= dict(rows=[len(part.ids) for part in (data.train, *data.dev)], device=device_name())
                        result |= dict(settings=settings(args, name, variant, checkpoint), versions=versions())
                        if predicts:
                            for test, rows in data.test.items():
                                logits = predict(model, rows, tokenizer.token_to_id("[PAD]"), args)
                                write(folder / f"{test}.tsv", submission(TASKS[name], rows, logits))
                        if args.save:
                            model.save_pretrained(folder)
                            tokenizer.no_truncation()
                            write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
                        if not file.exists():
                            result["config"] = dataclasses.asdict(model.config)
                            write(file, json.dumps(result, indent=2) + "\n")
                progress.update()
            todo = later
    if diverged:
        raise SystemExit("\n".join(diverged))


def submissions(name: str) -> list[str]:
    """The names of a task's files in the benchmark's submission."""
    return [*TASKS[name].columns, *(("AX",) if name == "mnli" else ())]


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} thread(s)"


def versions() -> dict[str, str]:
    packages = (torch, np, tokenizers)
    return dict(python=platform.python_version()) | {package.__name__: package.__version__ for package in packages}


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def collect(args: argparse.Namespace, variant: Variant, checkpoint: str) -> dict:
    """A variant's scores, of all seeds, by column and metric, with the paper's and what made them."""
    scores, runs = {}, []
    for name in args.tasks:
        for seed in range(args.seeds):
            runs.append(json.loads(result_file(args, name, seed, variant, checkpoint).read_text(encoding="utf-8")))
            for column, found in runs[-1]["scores"].items():
                for metric, score in found.items():
                    scores.setdefault(column, {}).setdefault(metric, []).append(score)
    paper = dict(zip(PAPER_COLUMNS, variant.paper))
    rows = []
    for column, found in scores.items():
        for i, (metric, values) in enumerate(found.items()):
            known = paper.get(column) if i == 0 else None
            row = dict(
                column=column, metric=metric, first=i == 0, scores=values, mean=float(np.mean(values)), paper=known
            )
            rows.append(row | dict(sd=float(np.std(values, ddof=1)) if len(values) > 1 else None))
    made = {key: runs[0][key] for key in ("config", "device", "versions")}
    seconds = round(sum(run["seconds"] for run in runs), 1)
    return dict(name=variant.name, rows=rows, seeds=args.seeds, seconds=seconds) | made | dict(settings=[
        settings(args, name, variant, checkpoint) for name in args.tasks
    ])  # fmt: skip


def one_table(args: argparse.Namespace, found: dict) -> str:
    """A line per task and metric, with the paper's score."""
    lines = [
        f"| task | metric | measured, seeds: {args.seeds} | paper, {args.budget} % | difference |",
        "| --- " * 5 + "|",
    ]
    for row in found["rows"]:
        beside = "– | –" if row["paper"] is None else f"{row['paper']:.3f} | {row['mean'] - row['paper']:+.3f}"
        lines.append(f"| {row['column']} | {row['metric']} | {spread(row['scores'])} | {beside} |")
    compared = [row for row in found["rows"] if row["paper"] is not None]
    if len(compared) == len(PAPER_COLUMNS):
        mean, paper = (np.mean([row[key] for row in compared]) for key in ("mean", "paper"))
        lines.append(f"| average | of these {len(compared)} | {mean:.3f} | {paper:.3f} | {mean - paper:+.3f} |")
    return "\n".join(lines)


def variants_table(args: argparse.Namespace, found: list[dict]) -> str:
    """A line per variant, a column per task: measured (the paper's, full budget)."""
    heads = [row["column"] for row in found[0]["rows"] if row["first"]]
    lines = [f"| variant | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    for variant in found:
        cells = [
            spread(row["scores"]) + (f" ({row['paper']:.3f})" if row["paper"] else "")
            for row in variant["rows"]
            if row["first"]
        ]
        lines.append(f"| {variant['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nMean ± standard deviation, seeds: {args.seeds} (the paper's, full budget)."


def read_checkpoint(folder: Path, args: argparse.Namespace) -> tuple[Tokenizer, MaBERTConfig, str]:
    """(tokenizer, config, a digest of all that lies there)."""
    digest = hashlib.sha256()
    for file in ("config.json", "model.pt", "tokenizer.json"):
        if not (folder / file).is_file():
            raise SystemExit(f"--checkpoint: {folder / file} does not exist; train_mlm.py writes such a folder")
        digest.update((folder / file).read_bytes())
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = MaBERTConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise SystemExit(f"--checkpoint: {folder}: {error}") from error
    tokenizer.no_padding()
    if missing := [token for token in ("[PAD]", "[CLS]", "[SEP]") if tokenizer.token_to_id(token) is None]:
        raise SystemExit(f"--checkpoint: {folder / 'tokenizer.json'} has no {', '.join(missing)}")
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise SystemExit(f"--checkpoint: the tokenizer has more tokens than the model's {config.vocab_size}")
    if args.max_length > config.max_position:
        raise SystemExit(
            f"--max-length {args.max_length}: the checkpoint has {config.max_position} positions; "
            f"pass --max-length {config.max_position}"
        )
    return tokenizer, config, digest.hexdigest()[:16]


def main(argv: list[str]):
    args = parse_args(argv)
    tokenizer, config, checkpoint = read_checkpoint(Path(args.checkpoint), args)
    for name in args.tasks:  # a missing file now, not after hours
        files = [(name, file) for file in TASKS[name].files if args.predict or not file.startswith("test")]
        for source in [*files, *([("ax", "test")] if args.predict and name == "mnli" else [])]:
            sources(*source, args.data_dir)
    chosen = variants(args, config)
    if len({bool(variant.psm) for variant in chosen}) > 1 and config.causal_conv and args.padding_side == "right":
        print("with a causal convolution and pads on the right no pad stands before a real token: PSM or none is the "
              "same function, and the scores will say so. It matters with --padding-side left")  # fmt: skip
    sweep(args, tokenizer, chosen, checkpoint)

    found = [collect(args, variant, checkpoint) for variant in chosen]
    table = one_table(args, found[0]) if len(chosen) == 1 else variants_table(args, found)
    out = Path(args.out, "ablation" if args.ablation else "poolings" if args.poolings else "results")
    command = " ".join(["python finetune_glue.py", *argv])
    write(out.with_suffix(".json"), json.dumps(dict(command=command, variants=found), indent=2) + "\n")
    write(out.with_suffix(".md"), f"{table}\n\n`{command}`, {found[0]['device']}\n")
    print(f"\n{table}\n\nin {out}.md and .json; a file for each run beside them")
    if args.predict:
        for name in args.tasks:
            folder = result_file(args, name, 0, chosen[0], checkpoint).with_suffix("")
            for test in submissions(name):
                write(out.parent / "submission" / f"{test}.tsv", (folder / f"{test}.tsv").read_text(encoding="utf-8"))
        print(f"for the benchmark: {out.parent / 'submission'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit("interrupted; finished runs are kept, and the same command goes on") from None
    except OSError as error:  # a full disk, a folder that may not be written
        raise SystemExit(f"cannot go on: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"out of memory: lower --batch-size or --max-length\n{error}") from error
