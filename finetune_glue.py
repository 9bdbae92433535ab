"""Fine-tunes a pretrained MaBERT on GLUE, where it puts the paper's scores beside the measured
ones, or on labels of one's own.

    python finetune_glue.py --checkpoint out/mlm --tasks all --seeds 5   # data from the hub
    python finetune_glue.py --checkpoint out/mlm --tasks cola rte --data-dir glue/   # from a folder
    python finetune_glue.py --checkpoint out/mlm --ablation --padding-side left   # Table 3
    python finetune_glue.py --checkpoint out/mlm --poolings   # Table B4
    python finetune_glue.py --checkpoint out/mlm --tasks own --data-dir mine/ --save   # own labels

In order: arguments · tasks and metrics · the paper's scores · reading · one run · all runs.

A run fine-tunes one variant of the model (its padding-safe masking, its pooling) on one task, with
one seed. Its result is one JSON file in --out, and the file's name holds a digest of all that the
result depends on: the settings, the checkpoint, the sentences and labels. A run whose file exists
is not made again, so an interrupted sweep goes on where it stopped. For two GPUs, start two
commands with different --tasks.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import textwrap
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from train_mlm import (  # before torch, which reads train_mlm's settings for threads when it loads
    autocast,
    bounded,
    describe_machine,
    is_out_of_memory,
    learning_rate,
    load_tokenizer,
    make_optimizer,
    path_name,
    psm_stages,
    run_program,
    shuffled_batches,
    vocabulary_size,
    write_atomically,
)

# isort: split
import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mabert import POOLINGS, MaBERTConfig, torch_load
from mabert import MaBERTForSequenceClassification as Classifier

# ---- Arguments ----
#
# The defaults are BERT's protocol; our text of the paper has lost its values.

HUB_DATA = "nyu-mll/glue"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARMUP = 0.1  # share of the steps
WEIGHT_DECAY = 0.01


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python finetune_glue.py --checkpoint FOLDER [--tasks NAME ...] [--seeds N] ...: "
        "--help lists all flags",
        description="Fine-tune a pretrained MaBERT on GLUE, or on labels of your own. Defaults are "
        "BERT's protocol.",
        allow_abbrev=False,
    )

    # fmt: off
    # what is read, what is run, what is written
    positive = bounded(int, 1)
    add = parser.add_argument
    add("--checkpoint", type=path_name, required=True,
        help="a folder of train_mlm.py, with config.json, model.pt and tokenizer.json")
    add("--data-dir", type=path_name,
        help="a folder with the benchmark's own download (CoLA/train.tsv, ...) or a clone of "
        f"{HUB_DATA} with its README.md; if not given, {HUB_DATA} from the hub. With --tasks own: "
        "a folder with train.tsv and dev.tsv (and test.tsv for --predict), in which the first line "
        "names the columns: label, and one or two of text")
    add("--tasks", nargs="+", default=["all"], type=str.lower, choices=(*TASKS, "all", "own"),
        metavar="NAME", help=f"all, or any of {', '.join(TASKS)}; or own: labels of your own")
    add("--regression", action="store_true",
        help="own labels are numbers, not names of classes; they are learned best with a mean of 0 "
        "and a standard deviation of 1")
    add("--seeds", type=positive, default=5,
        help="runs per task, with the seeds 0, 1, ... (%(default)s)")
    add("--budget", choices=("10", "25", "50", "100"), default="10",
        help="per cent of the paper's pretraining: the row of its tables to compare with "
        "(%(default)s); --ablation and --poolings compare with those at 100")
    add("--out", type=path_name, default="out/glue", help="the folder of results (%(default)s)")
    add("--save", action="store_true", help="keep the fine-tuned models")
    add("--predict", action="store_true",
        help="write predictions for the test sets (the benchmark's submission files), with the "
        "models of the first seed and, of several variants, the first")

    # variants of the model
    variants = parser.add_argument_group("variants")
    variants.add_argument("--psm", type=psm_stages, metavar="STAGES",
        help="stages of padding-safe masking, joined by +, or none; if not given, the checkpoint's")
    variants.add_argument("--padding-side", choices=("right", "left"), default="right",
        help="where pads stand in a row (%(default)s)")
    poolings = variants.add_mutually_exclusive_group()
    poolings.add_argument("--pooling", choices=POOLINGS, help="map, if not given")
    poolings.add_argument("--ablation", action="store_true",
        help="the four variants of Table 3: with and without PSM, pooling map and cls")
    poolings.add_argument("--poolings", action="store_true", help="the four poolings of Table B4")

    # the training
    training = parser.add_argument_group("training")
    training.add_argument("--lr", type=bounded(float, 1e-30), default=2e-5,
        help="peak learning rate: linear warm-up, linear decay to 0 (%(default)s)")
    training.add_argument("--batch-size", type=positive, default=32,
        help="rows of a step (%(default)s)")
    training.add_argument("--epochs", type=positive, default=3,
        help="passes over the training set (%(default)s)")
    training.add_argument("--max-length", type=bounded(int, 8), default=128,
        help="tokens of a row; of a pair the longer sentence is cut first (%(default)s)")
    # fmt: on

    # what the parser cannot check
    args = parser.parse_args(argv)
    if args.ablation and args.psm is not None:
        parser.error("--ablation chooses the PSM")
    is_own = "own" in args.tasks
    if is_own and (args.tasks != ["own"] or not args.data_dir):
        parser.error("--tasks own stands alone and needs --data-dir")
    if args.regression and not is_own:
        parser.error("--regression is for --tasks own")
    if not is_own:
        args.tasks = [name for name in TASKS if name in args.tasks or "all" in args.tasks]
    return args


# ---- Tasks and the benchmark's metrics ----


# MNLI has two dev sets, from the sources of its training set ("matched") and from others, and two
# test sets; the benchmark's diagnostic set (AX) is a third for the same model.
SET_TITLES = {
    "dev_matched": "MNLI-m",
    "dev_mismatched": "MNLI-mm",
    "test_matched": "MNLI-m",
    "test_mismatched": "MNLI-mm",
    "test_ax": "AX",
}


class Task(NamedTuple):
    folder: str  # in the benchmark's download, and the name in tables
    sizes: dict[str, int]  # how many examples the benchmark has in each split; 0: any number
    sentences: tuple[str, ...] = ("sentence1", "sentence2")  # the columns that hold the text
    labels: tuple[str, ...] = ("0", "1")  # as the benchmark writes them, in the hub's order
    metrics: tuple[str, ...] = ("accuracy",)  # the first is the one that the paper has
    scores: tuple[float, float] = (0, 5)  # of a regression: the lowest and the highest

    def splits(self, kind: str) -> dict[str, str]:
        """The splits of a kind, "dev" or "test", by their titles in results and submissions."""
        splits = [split for split in self.sizes if split.startswith(kind)]
        return {SET_TITLES.get(split, self.folder): split for split in splits}


# fmt: off
TASKS = {
    # Is the sentence grammatical?
    "cola": Task(folder="CoLA", sentences=("sentence",), metrics=("matthews",),
                 sizes=dict(train=8551, dev=1043, test=1063)),
    # Does the sentence of a film review praise?
    "sst2": Task(folder="SST-2", sentences=("sentence",),
                 sizes=dict(train=67349, dev=872, test=1821)),
    # Do two sentences from the news mean the same?
    "mrpc": Task(folder="MRPC", metrics=("f1", "accuracy"),
                 sizes=dict(train=3668, dev=408, test=1725)),
    # Do two questions ask the same? (Two more rows of the training set lack a question.)
    "qqp": Task(folder="QQP", sentences=("question1", "question2"), metrics=("f1", "accuracy"),
                sizes=dict(train=363844, dev=40430, test=390965)),
    # How similar are two sentences? A score from 0 to 5, so there are no labels.
    "stsb": Task(folder="STS-B", labels=(), metrics=("pearson", "spearman"),
                 sizes=dict(train=5749, dev=1500, test=1379)),
    # Does the first sentence entail the second, contradict it, or neither?
    "mnli": Task(folder="MNLI", labels=("entailment", "neutral", "contradiction"),
                 sizes=dict(train=392702, dev_matched=9815, dev_mismatched=9832,
                            test_matched=9796, test_mismatched=9847, test_ax=1104)),
    # Does the sentence answer the question?
    "qnli": Task(folder="QNLI", sentences=("question", "sentence"),
                 labels=("entailment", "not_entailment"),
                 sizes=dict(train=104743, dev=5463, test=5463)),
    # Does the first sentence entail the second?
    "rte": Task(folder="RTE", labels=("entailment", "not_entailment"),
                sizes=dict(train=2490, dev=277, test=3000)),
    # The same, where the second sentence has a name in place of a pronoun of the first.
    "wnli": Task(folder="WNLI", sizes=dict(train=635, dev=71, test=146)),
}
# fmt: on


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Of class 1, where classes are 0 and 1; 0 where nothing is of class 1."""
    both = (predicted * labels).sum()
    return float(2 * both / max(1, predicted.sum() + labels.sum()))


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the classes, those that occur, of each one's F1."""
    classes = np.union1d(predicted, labels)
    return float(np.mean([f1(predicted == i, labels == i) for i in classes]))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of the two is constant."""
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The correlation of the ranks."""
    return pearson(ranks(predicted), ranks(labels))


def ranks(x: np.ndarray) -> np.ndarray:
    """The rank of each value, from 1 for the smallest; equal ones share the mean of their ranks."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    return (last_rank - (counts - 1) / 2)[place]


METRICS = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": pearson,  # Matthews' correlation is Pearson's of classes 0 and 1
    "pearson": pearson,
    "spearman": spearman,
}

# ---- The paper's scores: means over five seeds ----

# The paper's average is over these eight sets.
PAPER_SETS = ("CoLA", "SST-2", "MRPC", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE")
MABERT = "MMT" * 4

# By pattern, per cent of the pretraining, whether there is padding-safe masking, and pooling
# fmt: off
PAPER = {
    # Table 1: other patterns. MaBERT's row is that of Table B1 too.
    ("M" * 12, "10", True, "map"): (0.401, 0.878, 0.805, 0.831, 0.745, 0.740, 0.796, 0.561),
    ("T" * 12, "10", True, "map"): (0.428, 0.891, 0.834, 0.843, 0.796, 0.802, 0.864, 0.575),
    ("MTT" * 4, "10", True, "map"): (0.555, 0.913, 0.823, 0.855, 0.804, 0.806, 0.868, 0.586),
    ("TM" * 6, "10", True, "map"): (0.525, 0.896, 0.826, 0.862, 0.801, 0.802, 0.873, 0.587),
    ("MT" * 6, "10", True, "map"): (0.573, 0.897, 0.797, 0.861, 0.803, 0.804, 0.859, 0.582),
    ("TMM" * 4, "10", True, "map"): (0.528, 0.903, 0.832, 0.863, 0.803, 0.802, 0.870, 0.595),
    ("TTM" * 4, "10", True, "map"): (0.512, 0.902, 0.809, 0.859, 0.800, 0.805, 0.874, 0.580),
    (MABERT, "10", True, "map"): (0.574, 0.904, 0.837, 0.868, 0.809, 0.814, 0.867, 0.602),

    # Tables B2 and B3: more pretraining
    (MABERT, "25", True, "map"): (0.612, 0.917, 0.848, 0.873, 0.815, 0.816, 0.868, 0.612),
    (MABERT, "50", True, "map"): (0.634, 0.924, 0.863, 0.877, 0.825, 0.828, 0.886, 0.624),

    # Table 3: Full (which is in Tables 2 and B4 too), PSM only, MAP only, None
    (MABERT, "100", True, "map"): (0.676, 0.933, 0.869, 0.879, 0.835, 0.837, 0.893, 0.654),
    (MABERT, "100", True, "cls"): (0.641, 0.918, 0.849, 0.863, 0.816, 0.818, 0.874, 0.638),
    (MABERT, "100", False, "map"): (0.661, 0.922, 0.841, 0.860, 0.819, 0.820, 0.878, 0.597),
    (MABERT, "100", False, "cls"): (0.596, 0.903, 0.841, 0.847, 0.803, 0.805, 0.855, 0.614),

    # Table B4: other poolings
    (MABERT, "100", True, "attn"): (0.648, 0.924, 0.857, 0.861, 0.823, 0.818, 0.888, 0.639),
    (MABERT, "100", True, "mean"): (0.651, 0.924, 0.857, 0.866, 0.823, 0.817, 0.869, 0.631),
}
# fmt: on

# The variants of Tables 3 and B4, and which row of PAPER each is compared with: whether there is
# padding-safe masking, and the pooling
TABLE_3 = {
    "Full": (True, "map"),
    "PSM only": (True, "cls"),
    "MAP only": (False, "map"),
    "None": (False, "cls"),
}
TABLE_B4 = {
    "map": (True, "map"),
    "attn": (True, "attn"),
    "cls": (False, "map"),  # see REMARK
    "mean": (True, "mean"),
}
REMARK = f"""The paper's scores are those of {MABERT} at full budget. The means of "CLS" in its
Table B4 are those of "MAP only" in its Table 3, although CLS pooling with PSM is "PSM only"."""


class Variant(NamedTuple):
    """What differs between the runs of one command, besides task and seed."""

    name: str
    psm: tuple[str, ...]
    pooling: str
    paper: tuple[float, ...]  # in the order of PAPER_SETS; empty where the paper has no such row


def chosen_variants(args: argparse.Namespace, config: MaBERTConfig) -> list[Variant]:
    """The variant that the flags choose, or those of Table 3 or B4; config is the checkpoint's."""
    psm = config.psm if args.psm is None else args.psm

    # Table 3: a checkpoint without padding-safe masking gets all of its stages
    if args.ablation:
        stages = {True: psm or MaBERTConfig().psm, False: ()}
        return [
            Variant(name, stages[has_psm], pooling, PAPER[MABERT, "100", has_psm, pooling])
            for name, (has_psm, pooling) in TABLE_3.items()
        ]

    # Table B4
    if args.poolings:
        return [
            Variant(pooling, psm, pooling, PAPER[(MABERT, "100", *row)] if psm else ())
            for pooling, row in TABLE_B4.items()
        ]

    # one variant
    pooling = args.pooling or "map"
    name = f"{'+'.join(psm) or 'no'} PSM, {pooling}"
    paper = PAPER.get((config.pattern, args.budget, bool(psm), pooling), ())
    return [Variant(name, psm, pooling, paper)]


# ---- Reading ----
#
# A split of a task ("train", "dev_matched", "test_ax", …) is a .tsv file of the benchmark's own
# download or a table of the hub's data set. Either is read as lines of cells, names of columns
# first. Files with labels of one's own are read as the benchmark's.


class Examples(NamedTuple):
    """A split of a task, as text."""

    sentences: list[tuple[str, ...]]  # one or two of each example
    labels: np.ndarray  # (examples,): int64 classes or float32 scores; empty of a test set
    index: list[int]  # of a test set: the benchmark's numbers of the examples
    skipped: int  # how many malformed lines were left out


# Columns have other names in some tasks and on the hub: the left is read as the right.
SAME_COLUMN = {
    "#1 String": "sentence1",  # MRPC
    "#2 String": "sentence2",
    "Quality": "label",
    "is_duplicate": "label",  # QQP
    "score": "label",  # STS-B
    "gold_label": "label",  # MNLI
    "premise": "sentence1",  # MNLI on the hub
    "hypothesis": "sentence2",
    "idx": "index",  # every task on the hub
}
NO_TEXT = ("label", "index", "idx", "")  # with own labels; pandas calls its index ""
COLA_HEADER = ["source", "label", "mark", "sentence"]  # CoLA's train.tsv and dev.tsv lack one

Lines = Iterator[tuple[str, list]]  # of each line: its number as messages say it, and its cells


def open_split(name: str, split: str, data_dir: str | None) -> tuple[str, Lines]:
    """(where a split of a task is, its lines). The benchmark's own file comes before the hub's."""
    # own labels
    if name == "own":
        path = Path(data_dir, f"{split}.tsv")
        if not path.exists():
            raise SystemExit(f"--data-dir: there is no {path}")
        return f"{path}", tsv_lines(path, has_header=True)

    # its names in the benchmark's download and on the hub
    tsv = f"{TASKS[name].folder}/{split}.tsv"
    subset, hub_split = name, split.replace("dev", "validation")
    if split == "test_ax":
        tsv = "diagnostic/diagnostic.tsv"
        subset, hub_split = "ax", "test"

    # the hub
    if data_dir is None:
        return f"{HUB_DATA} {subset} {hub_split}", hub_lines(HUB_DATA, subset, hub_split)

    # the benchmark's download
    path = Path(data_dir, tsv)
    if path.exists():
        return f"{path}", tsv_lines(path, has_header=name != "cola" or split == "test")

    # a clone of the hub's data set, whose README.md tells `datasets` which files there are
    readme = Path(data_dir, "README.md")
    if readme.exists():
        return f"{data_dir} {subset} {hub_split}", hub_lines(data_dir, subset, hub_split)

    raise SystemExit(
        f"--data-dir: there is neither {path}, as in the benchmark's download, "
        f"nor {readme}, as in a clone of {HUB_DATA}"
    )


def tsv_lines(path: Path, has_header: bool) -> Lines:
    """The lines of a .tsv file.

    Cells are never quoted: a quotation mark is part of its sentence. Only a line feed ends a line,
    since sentences have characters at which `splitlines` would cut. MRPC's files begin with a
    byte-order mark, which utf-8-sig drops.
    """
    if not has_header:
        yield "header", COLA_HEADER
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise SystemExit(f"{path}, line {number}: {error}") from error
            yield f"line {number}", text.rstrip("\r\n").split("\t")


def hub_lines(source: str, subset: str, hub_split: str) -> Lines:
    """The lines of a table that `datasets` reads, from the hub or from the folder of a clone."""
    import datasets  # takes seconds

    # A clone is read from its files ("streaming"): the cache of `datasets` would take clones of one
    # folder name for the same. And by its whole path: "text" alone would be taken for a loader.
    is_clone = source != HUB_DATA
    name = str(Path(source).resolve()) if is_clone else source
    try:
        table = datasets.load_dataset(name, subset, split=hub_split, streaming=is_clone)
        yield "header", table.column_names or []
        lines = (cells for batch in table.iter(1000) for cells in zip(*batch.values()))
        for number, cells in enumerate(lines):
            yield f"row {number}", cells
    except Exception as error:  # of many kinds, some with the reason one level down
        raise SystemExit(
            f"cannot read {source} {subset} {hub_split}: {error.__cause__ or error}\n"
            f"pass --data-dir with the benchmark's own files, or with a clone of {HUB_DATA}"
        ) from error


def own_task(folder: str, is_regression: bool) -> Task:
    """The task of one's own labels: its columns and classes are those of the folder's train.tsv.

    SystemExit where they cannot be used. The other lines are checked by `read_examples`.
    """
    # the columns
    where, lines = open_split("own", "train", folder)
    _, header = next(lines, ("", []))
    texts = tuple(column for column in header if column not in NO_TEXT)
    if "label" not in header or len(texts) not in (1, 2) or len({*header}) < len(header):
        raise SystemExit(
            f"{where}, line 1: the columns are {', '.join(header)}; there must be one called "
            "label and one or two of text, of different names (index and idx are left aside)"
        )

    # the classes
    label_column = header.index("label")
    labels = {cells[label_column] for _, cells in lines if len(cells) == len(header)}
    labels = sorted(label for label in labels if label.strip())
    classes = () if is_regression else tuple(labels)
    listed = textwrap.shorten(", ".join(classes), 200, placeholder=" ...")
    if not is_regression and len(classes) < 2:
        raise SystemExit(f"{where} has too few different labels: {listed or 'none'}")

    # say how the folder was understood
    kinds = f"{len(classes)} classes: {listed}" if classes else "labels are numbers"
    print(f"{where}: text in {' and '.join(texts)}; {kinds}")

    return Task(
        folder=Path(folder).resolve().name,
        sizes=dict(train=0, dev=0, test=0),
        sentences=texts,
        labels=classes,
        metrics=("accuracy", "macro_f1") if classes else ("pearson", "spearman"),
        scores=(-math.inf, math.inf),
    )


def read_examples(name: str, split: str, data_dir: str | None) -> Examples:
    """The examples of a split of a task. SystemExit names the first line that cannot be used."""
    task = TASKS[name]
    is_test = split.startswith("test")
    where, lines = open_split(name, split, data_dir)

    # the columns
    header_line, header = next(lines, ("header", []))
    same = {} if name == "own" else SAME_COLUMN
    columns = [same.get(column, column) for column in header]
    needed = {*task.sentences} if is_test else {*task.sentences, "label"}
    if missing := ", ".join(sorted(needed - {*columns})):
        raise SystemExit(f"{where}, {header_line}: no column {missing}, only {', '.join(header)}")

    # the lines. QQP is known for malformed ones: those to learn from are left out, and in those
    # to be predicted a question may be empty.
    may_skip = name == "qqp" and not is_test
    may_be_empty = name == "qqp" and is_test
    sentences = []
    labels = []
    index = []
    skipped = 0
    for number, (place, cells) in enumerate(lines):
        try:
            if len(cells) != len(columns):
                raise ValueError(f"{len(cells)} columns instead of {len(columns)}")
            example = dict(zip(columns, cells))
            texts = parse_sentences(task, example, may_be_empty)

            # its label, or in a test set its number
            if is_test:
                index.append(number if name == "own" else int(example.get("index", number)))
            else:
                labels.append(parse_label(task, example["label"]))
            sentences.append(texts)
        except ValueError as error:
            if not may_skip:
                raise SystemExit(f"{where}, {place}: {error}") from error
            skipped += 1

    if not sentences:
        raise SystemExit(f"{where} has no rows")
    dtype = np.int64 if task.labels else np.float32
    return Examples(sentences, np.array(labels, dtype), index, skipped)


def parse_sentences(task: Task, example: dict, may_be_empty: bool) -> tuple[str, ...]:
    """The sentences of an example, which is given as its cells by column."""
    texts = tuple(example[column] for column in task.sentences)
    for column, text in zip(task.sentences, texts):
        if not isinstance(text, str) or not (text.strip() or may_be_empty):
            raise ValueError(f"{column} is {text!r}, no sentence")
    return texts


def parse_label(task: Task, label) -> int | float:
    """The number of a class, for which the benchmark writes its name; or a score."""
    if task.labels:
        if label in task.labels:
            return task.labels.index(label)
        if label in range(len(task.labels)):  # on the hub
            return label
        expected = textwrap.shorten(", ".join(task.labels), 200, placeholder=" ...")
    else:
        low, high = task.scores
        with suppress(TypeError, ValueError):
            if low <= float(label) <= high and math.isfinite(float(label)):
                return float(label)
        expected = f"a number from {low} to {high}" if math.isfinite(high) else "a number"
    raise ValueError(f"label {label!r}; expected {expected}")


def digests_of_data(args: argparse.Namespace) -> dict[str, str]:
    """A digest of the sentences and labels of each task's training and dev sets.

    Reads all splits that the runs need, so that a missing or damaged one is named now and not after
    hours. Keeps none, since there may be a million examples: `sweep` reads a task's again in turn.
    """
    digests = {}
    for name in tqdm(args.tasks, desc="reading", unit="task", leave=False, delay=5):
        task = TASKS[name]
        digest = hashlib.sha256()
        quoted = 0  # texts that begin and end with a quotation mark
        if name == "own":
            # results and saved models have the names of the folder and the classes
            digest.update(repr((task.folder, task.labels)).encode())

        for split, expected in task.sizes.items():
            is_test = split.startswith("test")
            if is_test and not args.predict:
                continue
            examples = read_examples(name, split, args.data_dir)

            # say what is unusual
            count = len(examples.sentences)
            if examples.skipped:
                tqdm.write(f"{name} {split}: {examples.skipped} malformed rows skipped")
            if expected and count != expected:
                tqdm.write(f"{name} {split} has {count} rows; the benchmark has {expected}")
            if name == "own":
                quoted += sum(is_quoted(text) for text in itertools.chain(*examples.sentences))

            # digest what results depend on
            if not is_test:
                digest.update(split.encode())
                for example in zip(examples.sentences, examples.labels.tolist()):
                    digest.update(repr(example).encode())
        digests[name] = digest.hexdigest()[:16]

        # marks of texts that were quoted when they were written would be read as text
        if quoted:
            tqdm.write(
                f"{args.data_dir}: {quoted} texts begin and end with a quotation mark, which is "
                "read as text. README says how to write cells that are not quoted"
            )
    return digests


def is_quoted(text: str) -> bool:
    return text.startswith('"') and text.endswith('"')


# ---- One run ----


def load_model(folder: str | Path, **changes) -> Classifier:
    """A model with a head for classes or scores; `changes` replace fields of its config."""
    logging.getLogger("mabert").setLevel(logging.ERROR)  # that the head is new goes without saying
    try:
        return Classifier.from_pretrained(folder, **changes).to(DEVICE)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot load {folder}: {error}") from error


def truncating_tokenizer(args: argparse.Namespace, config: MaBERTConfig) -> Tokenizer:
    """The checkpoint's tokenizer, which cuts rows to --max-length: the longer sentence first."""
    file = Path(args.checkpoint, "tokenizer.json")
    tokenizer = load_tokenizer(str(file))

    # does it fit the model?
    size = vocabulary_size(tokenizer)
    if size > config.vocab_size:
        raise SystemExit(f"{file} has {size} tokens, more than the model's {config.vocab_size}")
    longest = config.max_position
    if args.max_length > longest:
        raise SystemExit(
            f"the checkpoint has {longest} positions, not {args.max_length}: "
            f"pass --max-length {longest}"
        )

    tokenizer.enable_truncation(args.max_length, strategy="longest_first")
    tokenizer.encode_special_tokens = True  # a sentence's "[SEP]" is text, as in pretraining
    return tokenizer


class Encoded(NamedTuple):
    """A split of a task, as tokens."""

    # Of each example (3, l) uint16: ids; ones, which become the mask when padding puts zeros beside
    # them; and which sentence, 0 or 1.
    tokens: list[np.ndarray]
    labels: np.ndarray  # as in Examples


def encode_examples(examples: Examples, tokenizer: Tokenizer) -> Encoded:
    # 10,000 at a time, since the tokenizer's results are large
    tokens = []
    for i in range(0, len(examples.sentences), 10_000):
        texts = [pair if len(pair) == 2 else pair[0] for pair in examples.sentences[i : i + 10_000]]
        for row in tokenizer.encode_batch_fast(texts):
            tokens.append(np.array([row.ids, row.attention_mask, row.type_ids], np.uint16))
    return Encoded(tokens, examples.labels)


def batches_of_like_length(data: Encoded, size: int, *seed: int) -> list[np.ndarray]:
    """The indices of the examples in batches, in an order that the seed chooses."""
    lengths = np.array([row.shape[1] for row in data.tokens])
    return shuffled_batches(len(lengths), size, np.random.default_rng(seed), lengths)


def padded_batch(
    data: Encoded, indices: np.ndarray, pad: int, side: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of the examples with these indices: (ids, mask, token types), each (b, l).

    Rows are padded to the longest of them, at the side "left" or "right".
    """
    rows = [torch.from_numpy(data.tokens[i].T.astype(np.int64)) for i in indices]  # each (l, 3)
    batch = pad_sequence(rows, batch_first=True, padding_side=side).to(DEVICE)  # (b, l, 3)
    ids, mask, types = batch.unbind(dim=2)
    return ids.masked_fill(mask == 0, pad), mask, types


def fit(model: Classifier, data: Encoded, seed: int, args: argparse.Namespace):
    """Trains the model in place.

    FloatingPointError if a loss that is looked at, every 50th, is not finite; `predict` finds the
    rest.
    """
    optimizer = make_optimizer(model, WEIGHT_DECAY)
    pad = model.config.pad_token_id
    order = []
    for epoch in range(args.epochs):
        order += batches_of_like_length(data, args.batch_size, seed, epoch)

    model.train()
    progress = tqdm(order, unit="step", leave=False)
    for step, indices in enumerate(progress):
        # linear warm-up, then linear decay
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(order), args.lr, round(WARMUP * len(order)))

        # forward
        inputs = padded_batch(data, indices, pad, args.padding_side)
        labels = torch.from_numpy(data.labels[indices]).to(DEVICE)
        with autocast(DEVICE):
            loss = model(*inputs, labels=labels).loss

        # backward, clip, update
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        # now and then a look at the loss, which makes the CPU wait for the GPU
        if step % 50 == 49:
            progress.set_postfix(loss=f"{loss.item():.4f}")
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}")


@torch.no_grad()
def predict(model: Classifier, data: Encoded, args: argparse.Namespace) -> np.ndarray:
    """Classes or scores, (examples,). FloatingPointError where one is not finite."""
    model.eval()
    pad = model.config.pad_token_id

    # scores in float32: in bf16 many would be equal, which changes Spearman's correlation
    is_regression = model.config.num_labels == 1
    precision = nullcontext() if is_regression else autocast(DEVICE)

    logits = np.zeros((len(data.tokens), model.config.num_labels), dtype=np.float32)
    batches = batches_of_like_length(data, 4 * args.batch_size, 0)
    for indices in tqdm(batches, desc="predicting", leave=False, delay=5):
        with precision:
            output = model(*padded_batch(data, indices, pad, args.padding_side))
        logits[indices] = output.logits.float().cpu().numpy()

    if not np.isfinite(logits).all():
        raise FloatingPointError("its predictions are not finite")
    return logits[:, 0] if is_regression else logits.argmax(axis=1)


def finetune(
    name: str, seed: int, variant: Variant, data: dict[str, Encoded], args: argparse.Namespace
) -> tuple[dict, Classifier]:
    """(the result of one run, its model). data: the task's training set and dev sets.

    FloatingPointError where the run diverges.
    """
    task = TASKS[name]
    start = time.perf_counter()

    # train
    torch.manual_seed(seed)  # the head's initialisation, dropout
    model = load_model(
        args.checkpoint,
        num_labels=max(1, len(task.labels)),
        psm=variant.psm,
        pooling=variant.pooling,
    )
    fit(model, data["train"], seed, args)

    # measure
    scores = {}
    for title, split in task.splits("dev").items():
        predicted = predict(model, data[split], args)
        labels = data[split].labels
        scores[title] = {metric: METRICS[metric](predicted, labels) for metric in task.metrics}

    result = dict(
        task=name,
        seed=seed,
        scores=scores,
        rows={split: len(encoded.tokens) for split, encoded in data.items()},
        seconds=round(time.perf_counter() - start, 1),
        config=dataclasses.asdict(model.config),
    )
    return result, model


# ---- All runs ----


def sweep(
    args: argparse.Namespace, tokenizer: Tokenizer, chosen: list[Variant], digests: dict[str, str]
) -> dict[Variant, list[dict]]:
    """The results of all runs, by variant; those that --out does not have yet are made.

    digests: of each task's data. A run that diverges stops no other; at last SystemExit names it.
    """
    results = {variant: [] for variant in chosen}
    diverged = []
    machine = describe_machine()
    checkpoint = digest_files(args.checkpoint, ("config.json", "model.pt", "tokenizer.json"))
    data = {}  # of one task at a time

    todo = list(itertools.product(args.tasks, chosen, range(args.seeds)))
    progress = tqdm(todo, unit="run")
    for name, variant, seed in progress:
        title = f"{name}, {variant.name}, seed {seed}"
        progress.set_description(title)

        # its files
        settings = run_settings(name, variant, args)
        settings |= dict(data=digests[name], checkpoint=checkpoint)
        folder = run_folder(args.out, settings, seed)
        file = folder.with_name(f"{folder.name}.json")

        # is its result there, and its model, if that is asked for?
        result = read_result(file, settings, seed)
        submits = args.predict and seed == 0 and variant is chosen[0]
        needs_model = args.save or submits
        is_saved = (folder / "tokenizer.json").exists()  # the last file that save_model writes
        try:
            if result is None or (needs_model and not is_saved):
                # read the task's data, unless the run before this one did
                if name not in data:
                    data = {name: encode_task(name, tokenizer, args)}

                # run, and write the result last: where it is, the model is
                result, model = finetune(name, seed, variant, data[name], args)
                if needs_model:
                    save_model(folder, model, TASKS[name].labels, args)
                result |= dict(settings=settings, machine=machine)
                write_atomically(file, json.dumps(result, indent=2) + "\n")

            results[variant].append(result)
            if submits:
                write_submission(name, load_model(folder), tokenizer, args)
        except FloatingPointError as error:
            diverged.append(f"{title}: {error}; a lower --lr helps")

    if diverged:
        raise SystemExit("\n".join(diverged))
    return results


def run_settings(name: str, variant: Variant, args: argparse.Namespace) -> dict:
    """What the flags say that a result depends on, but for the seed."""
    flags = ("padding_side", "lr", "batch_size", "epochs", "max_length")
    settings = dict(task=name, psm="+".join(variant.psm) or "none", pooling=variant.pooling)
    return settings | {flag: getattr(args, flag) for flag in flags}


def run_folder(out: str, settings: dict, seed: int) -> Path:
    """Where a run's model is saved. Its result lies beside the folder, under the same name."""
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    variant = f"{settings['pooling']}-{settings['psm']}"
    return Path(out, f"{settings['task']}-{variant}-{digest}-seed{seed}")


def digest_files(folder: str, names: tuple[str, ...]) -> str:
    """Of the content of these files in a folder, in 16 hexadecimal digits."""
    digests = [hashlib.sha256(Path(folder, name).read_bytes()).hexdigest() for name in names]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def read_result(file: Path, settings: dict, seed: int) -> dict | None:
    """The result of the run of these settings and this seed; None where there is none.

    A file that is damaged, or that holds something else, is named and counts as none.
    """
    task = settings["task"]
    needed = ("task", "seed", "scores", "rows", "seconds", "config", "settings", "machine")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if missing := [key for key in needed if key not in result]:
            raise ValueError(f"it has no {', '.join(missing)}")

        # a file may have been renamed or edited
        if (result["task"], result["seed"], result["settings"]) != (task, seed, settings):
            raise ValueError("it is of another run")
        for title, metric in itertools.product(TASKS[task].splits("dev"), TASKS[task].metrics):
            score = result["scores"][title][metric]
            if not -1 <= score <= 1:
                raise ValueError(f"its {metric} is {score}")
        return result
    except FileNotFoundError:
        return None
    except (LookupError, TypeError, ValueError) as error:
        tqdm.write(f"{file} is damaged ({error!r}): that run is made again")
        return None


def encode_task(name: str, tokenizer: Tokenizer, args: argparse.Namespace) -> dict[str, Encoded]:
    """A task's training set and dev sets, by split."""
    data = {}
    for split in ("train", *TASKS[name].splits("dev").values()):
        data[split] = encode_examples(read_examples(name, split, args.data_dir), tokenizer)
    return data


def save_model(folder: Path, model: Classifier, labels: tuple[str, ...], args: argparse.Namespace):
    """Writes a model, its classes' names and its tokenizer, as `python mabert.py` takes them."""
    model.save_pretrained(folder)
    if labels:
        write_atomically(folder / "labels.json", json.dumps(labels, ensure_ascii=False) + "\n")
    tokenizer = load_tokenizer(str(Path(args.checkpoint, "tokenizer.json")))  # which cuts nothing
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True))


def write_submission(name: str, model: Classifier, tokenizer: Tokenizer, args: argparse.Namespace):
    """Writes the predictions for a task's test sets: labels by their names, or scores."""
    task = TASKS[name]
    folder = predictions_folder(args)
    folder.mkdir(exist_ok=True)
    for title, split in task.splits("test").items():
        # predict
        examples = read_examples(name, split, args.data_dir)
        predicted = predict(model, encode_examples(examples, tokenizer), args)

        # write
        lines = ["index\tprediction\n"]
        for index, value in zip(examples.index, predicted):
            cell = task.labels[value] if task.labels else value.clip(*task.scores)
            lines.append(f"{index}\t{cell}\n")
        write_atomically(folder / f"{title}.tsv", "".join(lines))


def predictions_folder(args: argparse.Namespace) -> Path:
    return Path(args.out, "predictions" if args.tasks == ["own"] else "submission")


def score_lines(args: argparse.Namespace, results: dict[Variant, list[dict]]) -> list[dict]:
    """The scores of all seeds beside the paper's: a dict per dev set, metric and variant."""
    # the scores; for own labels the paper has none
    lines = []
    for name in args.tasks:
        task = TASKS[name]
        for title, metric in itertools.product(task.splits("dev"), task.metrics):
            for variant, runs in results.items():
                line = dict(task=title, metric=metric, variant=variant.name, paper=None)
                line["scores"] = [r["scores"][title][metric] for r in runs if r["task"] == name]
                if metric == task.metrics[0] and name != "own":
                    line["paper"] = dict(zip(PAPER_SETS, variant.paper)).get(title)
                lines.append(line)

    # the average over the paper's sets, where all of them were measured
    for variant in results:
        of_variant = [line for line in lines if line["variant"] == variant.name]
        compared = [line for line in of_variant if line["paper"] is not None]
        if len(compared) == len(PAPER_SETS):
            average = dict(task="average", metric="of these 8", variant=variant.name)
            average["paper"] = float(np.mean([line["paper"] for line in compared]))
            average["scores"] = np.mean([line["scores"] for line in compared], axis=0).tolist()
            lines.append(average)

    # mean and standard deviation over the seeds
    for line in lines:
        line["mean"] = float(np.mean(line["scores"]))
        line["sd"] = float(np.std(line["scores"], ddof=1)) if args.seeds > 1 else None
    return lines


def results_table(args: argparse.Namespace, lines: list[dict]) -> str:
    """What `score_lines` returns, as a Markdown table."""
    budget = "100" if args.ablation or args.poolings else args.budget
    seeds = f"measured, seeds: {args.seeds}"
    text = [f"| task | metric | variant | {seeds} | paper, {budget} % | difference |"]
    text.append("| --- " * 6 + "|")
    for line in lines:
        # mean and deviation
        measured = f"{line['mean']:.3f}"
        if line["sd"] is not None:
            measured += f" ± {line['sd']:.3f}"

        # beside the paper's score, if it has one
        paper = difference = "–"
        if line["paper"] is not None:
            paper = f"{line['paper']:.3f}"
            difference = f"{line['mean'] - line['paper']:+.3f}"

        cells = (line["task"], line["metric"], line["variant"], measured, paper, difference)
        text.append(f"| {' | '.join(cells)} |")

    if args.ablation or args.poolings:
        text += ["", REMARK]
    return "\n".join(text)


def psm_changes_nothing(config: MaBERTConfig, padding_side: str) -> bool:
    """Whether no token of this model looks to where the pads are, with masking or without.

    Pads on the right stand after all real tokens. There only a W layer, which reads from right to
    left, and a centred convolution look.
    """
    sees_later_tokens = "W" in config.pattern or not config.causal_conv
    return padding_side == "right" and not sees_later_tokens


def run_all(args: argparse.Namespace, command: str):
    """Makes the runs that the arguments ask for, and writes and prints their tables."""
    # the checkpoint, and what to make of it
    config = load_model(args.checkpoint).config
    if "classifier.weight" in torch_load(Path(args.checkpoint, "model.pt")):
        print(f"{args.checkpoint} is a classifier: its head is kept for tasks with as many classes")
    tokenizer = truncating_tokenizer(args, config)
    chosen = chosen_variants(args, config)

    # the data; own labels are one more task
    if args.tasks == ["own"]:
        TASKS["own"] = own_task(args.data_dir, args.regression)
    digests = digests_of_data(args)
    if args.ablation and psm_changes_nothing(config, args.padding_side):
        print(
            "with a causal convolution and pads on the right no pad stands before a real token: "
            "PSM or none is the same function, and the scores will say so. "
            "It matters with --padding-side left"
        )

    # all runs
    Path(args.out).mkdir(parents=True, exist_ok=True)
    results = sweep(args, tokenizer, chosen, digests)
    lines = score_lines(args, results)
    table = results_table(args, lines)

    # write them
    name = "ablation" if args.ablation else "poolings" if args.poolings else "results"
    out = Path(args.out, name)
    runs = list(itertools.chain(*results.values()))
    everything = dict(command=command, rows=lines, runs=runs)
    write_atomically(out.with_suffix(".json"), json.dumps(everything, indent=2) + "\n")
    page = f"{table}\n\n`{command}`, {runs[0]['machine']}\n"
    write_atomically(out.with_suffix(".md"), page)

    # where they are
    beside = "result and model" if args.save else "result"
    print(f"\n{table}\n\nin {out}.md and .json; each run's {beside} beside them")
    if args.predict:
        print(f"predictions: {predictions_folder(args)}")
    if args.save:
        last = runs[-1]
        folder = run_folder(args.out, last["settings"], last["seed"])
        texts = " ".join(f'"{column}"' for column in TASKS[last["task"]].sentences)
        print(f"try the last model: python mabert.py {folder} {texts}")


def main(argv: list[str]):
    args = parse_args(argv)
    try:
        run_all(args, " ".join(["python finetune_glue.py", *argv]))
    except KeyboardInterrupt:
        message = "interrupted; finished runs are kept, and the same command goes on"
        raise SystemExit(message) from None
    except OSError as error:  # a full disk, a folder that may not be written
        raise SystemExit(f"cannot go on: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(f"out of memory: lower --batch-size or --max-length\n{error}") from error


if __name__ == "__main__":
    run_program(main)
