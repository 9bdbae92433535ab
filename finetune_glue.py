"""Fine-tunes a pretrained MaBERT on GLUE, and puts the paper's scores beside the measured ones.

    python finetune_glue.py --checkpoint out/mlm --tasks all --seeds 5               # data from the Hugging Face hub
    python finetune_glue.py --checkpoint out/mlm --tasks cola rte --data-dir glue/   # or from a folder
    python finetune_glue.py --checkpoint out/mlm --ablation --padding-side left      # Table 3; --poolings for Table B4

In order: arguments · tasks and metrics · the paper's scores · reading · one run · all runs.

A run is a task, a seed, the settings of the model and the training, and the content of the checkpoint and of the data.
Its result is one file in --out, named by all of them: a run whose file exists is not run again, so an interrupted sweep
goes on. Two GPUs: two commands with different --tasks.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import train_mlm  # before torch: it says how idle threads wait, which torch reads when it loads

# isort: split
import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mabert import POOLINGS, MaBERTConfig, MaBERTForSequenceClassification
from train_mlm import (
    autocast,
    bounded,
    learning_rate,
    make_optimizer,
    shuffled_batches,
    write_atomically,
)

# ---- Arguments: the defaults are BERT's protocol; the paper's values are absent from our copy ----

HUB_DATA = "nyu-mll/glue"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARMUP = 0.1  # share of the steps
WEIGHT_DECAY = 0.01


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python finetune_glue.py --checkpoint FOLDER [--tasks NAME ...] [--seeds N] ...: --help lists all flags",
        description="Fine-tune a pretrained MaBERT on GLUE. Defaults are BERT's protocol.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        help="a folder of train_mlm.py, with config.json, model.pt and tokenizer.json",
    )
    add("--tasks", nargs="+", default=["all"], type=str.lower, choices=(*TASKS, "all"), metavar="NAME",
        help=f"all, or any of {', '.join(TASKS)}")  # fmt: skip
    add("--seeds", type=bounded(int, 1), default=5, help="runs per task, of seeds 0, 1, ...")
    add("--data-dir", help="a folder with the benchmark's own download (CoLA/train.tsv, ...) or the hub's parquet "
        f"files (cola/train-00000-of-00001.parquet, ...), instead of {HUB_DATA} from the hub")  # fmt: skip
    add("--out", default="out/glue", help="the folder of results")
    add("--budget", choices=("10", "25", "50", "100"), default="10", help="per cent of the paper's pretraining: the "
        "row to compare with")  # fmt: skip
    add(
        "--predict",
        action="store_true",
        help="write the benchmark's submission files, of the first seed",
    )
    add("--save", action="store_true", help="keep the fine-tuned models")
    group = parser.add_argument_group("variants")
    add = group.add_argument
    add("--psm", type=train_mlm.psm_stages, metavar="STAGES", help="stages of padding-safe masking, joined by +, or none; the "
        "checkpoint's, if not given")  # fmt: skip
    add("--padding-side", choices=("right", "left"), default="right")
    add = group.add_mutually_exclusive_group().add_argument
    add("--pooling", choices=POOLINGS, help="map, if not given")
    add(
        "--ablation",
        action="store_true",
        help="the four variants of Table 3: PSM or none, map or cls",
    )
    add("--poolings", action="store_true", help="the four poolings of Table B4")
    add = parser.add_argument_group("training").add_argument
    add(
        "--lr",
        type=bounded(float, 1e-30),
        default=2e-5,
        help="peak learning rate: linear warm-up, linear decay to 0",
    )
    add("--batch-size", type=bounded(int, 1), default=32, help="rows")
    add("--epochs", type=bounded(int, 1), default=3)
    add(
        "--max-length",
        type=bounded(int, 8),
        default=128,
        help="tokens of a row; of a pair the longer is cut first",
    )

    args = parser.parse_args(argv)
    if args.ablation and args.psm is not None:
        parser.error("--ablation chooses the PSM")
    args.tasks = [name for name in TASKS if name in args.tasks or "all" in args.tasks]
    return args


# ---- Tasks and the benchmark's metrics ----


class Task(NamedTuple):
    folder: str  # of the benchmark's download
    labels: tuple[str, ...]  # as the benchmark writes them, in the hub's order; none for regression
    sentences: tuple[str, ...]  # columns of the .tsv files
    label: str  # column of the .tsv files
    hub_sentences: tuple[str, ...]  # columns of the parquet files
    metrics: tuple[str, ...]  # the first is the one compared with the paper
    rows: dict[str, int]  # the benchmark's files, and the rows of each

    def files(self, kind: str) -> dict[str, str]:
        """The files of a kind, "dev" or "test", by the column of the results or the submission file they make."""
        columns = {
            kind: self.folder,
            f"{kind}_matched": "MNLI-m",
            f"{kind}_mismatched": "MNLI-mm",
            "test_ax": "AX",
        }
        return {columns[file]: file for file in self.rows if file.startswith(kind)}


CLASSES, ENTAILS, PAIR = ("0", "1"), ("entailment", "not_entailment"), ("sentence1", "sentence2")
SENTENCE, QUESTIONS = ("sentence",), ("question1", "question2")
THREE, MATCHED = ("entailment", "neutral", "contradiction"), ("premise", "hypothesis")
# QQP's training set is two rows larger: those two lack a question. test_ax is the diagnostic set, which MNLI predicts.
# fmt: off
TASKS = {
    "cola": Task("CoLA", CLASSES, SENTENCE, "label", SENTENCE, ("matthews",), dict(train=8551, dev=1043, test=1063)),
    "sst2": Task("SST-2", CLASSES, SENTENCE, "label", SENTENCE, ("accuracy",), dict(train=67349, dev=872, test=1821)),
    "mrpc": Task("MRPC", CLASSES, ("#1 String", "#2 String"), "Quality", PAIR, ("f1", "accuracy"),
                 dict(train=3668, dev=408, test=1725)),
    "qqp": Task("QQP", CLASSES, QUESTIONS, "is_duplicate", QUESTIONS, ("f1", "accuracy"),
                dict(train=363844, dev=40430, test=390965)),
    "stsb": Task("STS-B", (), PAIR, "score", PAIR, ("pearson", "spearman"), dict(train=5749, dev=1500, test=1379)),
    "mnli": Task("MNLI", THREE, PAIR, "gold_label", MATCHED, ("accuracy",), dict(
                 train=392702, dev_matched=9815, dev_mismatched=9832, test_matched=9796, test_mismatched=9847,
                 test_ax=1104)),
    "qnli": Task("QNLI", ENTAILS, ("question", "sentence"), "label", ("question", "sentence"), ("accuracy",),
                 dict(train=104743, dev=5463, test=5463)),
    "rte": Task("RTE", ENTAILS, PAIR, "label", PAIR, ("accuracy",), dict(train=2490, dev=277, test=3000)),
    "wnli": Task("WNLI", CLASSES, PAIR, "label", PAIR, ("accuracy",), dict(train=635, dev=71, test=146)),
}
# fmt: on


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """0 where one of them is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0


def ranks(x: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their ranks."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


METRICS = {
    "accuracy": lambda x, y: float((x == y).mean()),
    "f1": lambda x, y: float(
        2 * (x * y).sum() / max(1, x.sum() + y.sum())
    ),  # of class 1, out of 0 and 1
    "matthews": pearson,  # of two classes, as 0 and 1, it is the same
    "pearson": pearson,
    "spearman": lambda x, y: pearson(ranks(x), ranks(y)),
}

# ---- The paper's scores: means over five seeds ----

PAPER_COLUMNS = (
    "CoLA",
    "SST-2",
    "MRPC",
    "QQP",
    "MNLI-m",
    "MNLI-mm",
    "QNLI",
    "RTE",
)  # its average is over these
MABERT = "MMT" * 4
PAPER = {  # by pattern, per cent of the pretraining, whether there is PSM, pooling
    ("M" * 12, "10", True, "map"): (
        0.401,
        0.878,
        0.805,
        0.831,
        0.745,
        0.740,
        0.796,
        0.561,
    ),  # Table 1
    ("T" * 12, "10", True, "map"): (0.428, 0.891, 0.834, 0.843, 0.796, 0.802, 0.864, 0.575),
    ("MTT" * 4, "10", True, "map"): (0.555, 0.913, 0.823, 0.855, 0.804, 0.806, 0.868, 0.586),
    ("TM" * 6, "10", True, "map"): (0.525, 0.896, 0.826, 0.862, 0.801, 0.802, 0.873, 0.587),
    ("MT" * 6, "10", True, "map"): (0.573, 0.897, 0.797, 0.861, 0.803, 0.804, 0.859, 0.582),
    ("TMM" * 4, "10", True, "map"): (0.528, 0.903, 0.832, 0.863, 0.803, 0.802, 0.870, 0.595),
    ("TTM" * 4, "10", True, "map"): (0.512, 0.902, 0.809, 0.859, 0.800, 0.805, 0.874, 0.580),
    (MABERT, "10", True, "map"): (
        0.574,
        0.904,
        0.837,
        0.868,
        0.809,
        0.814,
        0.867,
        0.602,
    ),  # and Table B1
    (MABERT, "25", True, "map"): (
        0.612,
        0.917,
        0.848,
        0.873,
        0.815,
        0.816,
        0.868,
        0.612,
    ),  # Table B2
    (MABERT, "50", True, "map"): (
        0.634,
        0.924,
        0.863,
        0.877,
        0.825,
        0.828,
        0.886,
        0.624,
    ),  # Table B3
    (MABERT, "100", True, "map"): (
        0.676,
        0.933,
        0.869,
        0.879,
        0.835,
        0.837,
        0.893,
        0.654,
    ),  # Tables 2, 3 and B4
    (MABERT, "100", True, "cls"): (
        0.641,
        0.918,
        0.849,
        0.863,
        0.816,
        0.818,
        0.874,
        0.638,
    ),  # Table 3: PSM only
    (MABERT, "100", False, "map"): (
        0.661,
        0.922,
        0.841,
        0.860,
        0.819,
        0.820,
        0.878,
        0.597,
    ),  # Table 3: MAP only
    (MABERT, "100", False, "cls"): (
        0.596,
        0.903,
        0.841,
        0.847,
        0.803,
        0.805,
        0.855,
        0.614,
    ),  # Table 3: None
    (MABERT, "100", True, "attn"): (
        0.648,
        0.924,
        0.857,
        0.861,
        0.823,
        0.818,
        0.888,
        0.639,
    ),  # Table B4
    (MABERT, "100", True, "mean"): (
        0.651,
        0.924,
        0.857,
        0.866,
        0.823,
        0.817,
        0.869,
        0.631,
    ),  # Table B4
}
ABLATION = (
    ("Full", True, "map"),
    ("PSM only", True, "cls"),
    ("MAP only", False, "map"),
    ("None", False, "cls"),
)
REMARK = f"""The paper's scores are those of {MABERT} at full budget. The means of "CLS" in its Table B4 are those of
"MAP only" in its Table 3, although CLS pooling with PSM is "PSM only"."""


class Variant(NamedTuple):
    name: str
    psm: tuple[str, ...]
    pooling: str
    paper: tuple[float, ...]  # in the order of PAPER_COLUMNS; empty where the paper has no such row


def variants(args: argparse.Namespace, config: MaBERTConfig) -> list[Variant]:
    """What to run: the chosen variant, or those of Table 3 or B4."""
    psm, pooling = config.psm if args.psm is None else args.psm, args.pooling or "map"
    if args.ablation:
        stages = {True: psm or MaBERTConfig().psm, False: ()}
        return [
            Variant(name, stages[on], kind, PAPER[MABERT, "100", on, kind])
            for name, on, kind in ABLATION
        ]
    if args.poolings:  # Table B4: its CLS has the means of MAP only
        rows = ((kind, (False, "map") if kind == "cls" else (True, kind)) for kind in POOLINGS)
        return [
            Variant(kind, psm, kind, PAPER[(MABERT, "100", *row)] if psm else ())
            for kind, row in rows
        ]
    paper = PAPER.get((config.pattern, args.budget, bool(psm), pooling), ())
    return [Variant(f"{'+'.join(psm) or 'no'} PSM, {pooling}", psm, pooling, paper)]


# ---- Reading ----


class Rows(NamedTuple):
    inputs: list  # of each row one or two sentences, or what encode makes of them
    labels: np.ndarray | None  # (rows,) int64, or float32 for regression; none of a test set
    index: list[int]  # what the benchmark calls the rows


def sources(name: str, file: str, data_dir: str | None) -> tuple[list[Path], str, str]:
    """Where a file of a task lies: (a .tsv or some .parquet; nothing for the hub, the hub's name of task and file)."""
    config, split = (
        ("ax", "test") if file == "test_ax" else (name, file.replace("dev", "validation"))
    )
    if data_dir is None:
        return [], config, split
    tsv = Path(
        data_dir,
        "diagnostic/diagnostic.tsv" if config == "ax" else f"{TASKS[name].folder}/{file}.tsv",
    )
    if (
        paths := [tsv]
        if tsv.exists()
        else sorted(Path(data_dir, config).glob(f"{split}-*.parquet"))
    ):
        return paths, config, split
    raise SystemExit(
        f"--data-dir: neither {tsv} nor {Path(data_dir, config, split)}-*.parquet exists"
    )


def read(name: str, file: str, data_dir: str | None) -> Rows:
    """A file of a task. The malformed rows that QQP's training and dev set are known for are left out and counted;
    whatever else is wrong is a SystemExit that names the file and the line."""
    task, is_test, (paths, config, split) = (
        TASKS[name],
        file.startswith("test"),
        sources(name, file, data_dir),
    )
    is_tsv, has_header = bool(paths) and paths[0].suffix == ".tsv", name != "cola" or is_test
    where = str(paths[0]) if paths else f"{HUB_DATA} {config} {split}"
    try:
        header, *rows = (
            read_tsv(paths[0], has_header) if is_tsv else read_table(paths, config, split)
        )
    except Exception as error:  # datasets and pyarrow raise many kinds
        advice = "" if paths else "\nwithout the hub, pass --data-dir with the benchmark's files"
        raise SystemExit(f"cannot read {where}: {error}{advice}") from error
    columns, label = (task.sentences, task.label) if is_tsv else (task.hub_sentences, "label")
    if missing := {*columns, *([] if is_test else [label])} - {*header}:
        raise SystemExit(
            f"{where} has no column {', '.join(sorted(missing))}, only {', '.join(header)}"
        )
    sentences, labels, index, skipped = [], [], [], 0
    for i, cells in enumerate(rows):
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} columns instead of {len(header)}")
            row = dict(zip(header, cells))
            for column in columns:
                if not isinstance(row[column], str) or not (
                    row[column].strip() or (is_test and name == "qqp")
                ):
                    raise ValueError(f"{column} is {row[column]!r}, no sentence")
            labels.append(None if is_test else parse_label(task, row[label]))
            sentences.append(tuple(row[column] for column in columns))
            index.append(row.get("idx", i))
        except ValueError as error:
            if name != "qqp" or is_test:
                place = f"line {i + 1 + has_header}" if is_tsv else f"row {i}"
                raise SystemExit(f"{where}, {place}: {error}") from error
            skipped += 1
    if skipped:
        tqdm.write(f"{where}: {skipped} malformed rows skipped")
    if not sentences:
        raise SystemExit(f"{where} has no rows")
    if len(sentences) != task.rows[file]:
        tqdm.write(f"{where} has {len(sentences)} rows; the benchmark has {task.rows[file]}")
    return Rows(
        sentences,
        None if is_test else np.array(labels, np.int64 if task.labels else np.float32),
        index,
    )


def read_tsv(path: Path, has_header: bool) -> list[list[str]]:
    """The names of the columns, then rows of cells, which are never quoted. Without a header, the file is CoLA's."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"line {1 + error.object.count(bytes([10]), 0, error.start)}: {error}"
        ) from error
    rows = [
        line.rstrip("\r").split("\t") for line in text.removesuffix("\n").split("\n")
    ]  # sentences have other ends
    return rows if has_header else [["source", "label", "mark", "sentence"], *rows]


def read_table(paths: list[Path], config: str, split: str) -> list:
    """The names of the columns, then rows of cells."""
    import datasets  # takes seconds
    import pyarrow.parquet

    if paths:
        columns = pyarrow.concat_tables(map(pyarrow.parquet.read_table, paths)).to_pydict()
    else:
        columns = datasets.load_dataset(HUB_DATA, config, split=split)[:]
    return [list(columns), *zip(*columns.values())]


def parse_label(task: Task, label) -> int | float:
    """A label as the benchmark or the hub writes it."""
    with suppress(TypeError, ValueError):
        if task.labels:
            return (task.labels if isinstance(label, str) else range(len(task.labels))).index(label)
        if 0 <= float(label) <= 5:
            return float(label)
    expected = (
        f"{', '.join(task.labels)} (0 to {len(task.labels) - 1})"
        if task.labels
        else "a number from 0 to 5"
    )
    raise ValueError(f"label {label!r}; expected {expected}")


# ---- One run ----


def load_model(folder: str | Path, **changes) -> MaBERTForSequenceClassification:
    logging.getLogger("mabert").setLevel(logging.ERROR)  # that the head is new goes without saying
    try:
        model = MaBERTForSequenceClassification.from_pretrained(folder, **changes).to(DEVICE)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot load {folder}: {error}") from error
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise SystemExit(f"{folder} has weights that are not finite: the training that made it "
                         "diverged, and a lower --lr helps there")  # fmt: skip
    return model


def read_tokenizer(args: argparse.Namespace, config: MaBERTConfig) -> Tokenizer:
    """The checkpoint's, which cuts to --max-length, of a pair the longer first."""
    file, most = Path(args.checkpoint, "tokenizer.json"), config.max_position
    tokenizer = train_mlm.load_tokenizer(str(file))
    if (size := train_mlm.vocabulary_size(tokenizer)) > config.vocab_size:
        raise SystemExit(f"{file} has {size} tokens, more than the model's {config.vocab_size}")
    if args.max_length > most:
        raise SystemExit(
            f"the checkpoint has {most} positions, not {args.max_length}: pass --max-length {most}"
        )
    tokenizer.enable_truncation(args.max_length, strategy="longest_first")
    return tokenizer


def encode(rows: Rows, tokenizer: Tokenizer) -> Rows:
    """With (3, l) uint16 instead of sentences: ids, ones, and 0 in the first sentence, 1 in the second."""
    tokens = []
    for i in range(
        0, len(rows.inputs), 10_000
    ):  # some at a time, since tokenizers' objects are large
        found = tokenizer.encode_batch_fast(
            [row if len(row) == 2 else row[0] for row in rows.inputs[i : i + 10_000]]
        )
        tokens += [
            np.array([row.ids, row.attention_mask, row.type_ids], np.uint16) for row in found
        ]
    return rows._replace(inputs=tokens)


def batches(data: Rows, size: int, *seed: int) -> list[np.ndarray]:
    """The numbers of the rows in batches of like length, in an order by the seed."""
    lengths = np.array([row.shape[1] for row in data.inputs])
    return shuffled_batches(len(lengths), size, np.random.default_rng(seed), lengths)


def collate(
    data: Rows, rows: np.ndarray, pad: int, side: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and token types, (b, l), padded to the longest row."""
    tokens = [torch.from_numpy(data.inputs[row].T.astype(np.int64)) for row in rows]  # each (l, 3)
    ids, mask, types = (
        pad_sequence(tokens, batch_first=True, padding_side=side).to(DEVICE).unbind(dim=2)
    )
    return ids.masked_fill(mask == 0, pad), mask, types


def fit(model: torch.nn.Module, data: Rows, pad: int, seed: int, args: argparse.Namespace):
    """Trains the model in place: AdamW, linear warm-up and decay, gradients clipped at 1.0."""
    optimizer = make_optimizer(model, WEIGHT_DECAY)
    order = [
        rows for epoch in range(args.epochs) for rows in batches(data, args.batch_size, seed, epoch)
    ]
    model.train()
    progress = tqdm(order, unit="step", leave=False)
    for step, rows in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(order), args.lr, round(WARMUP * len(order)))
        with autocast(DEVICE):
            labels = torch.from_numpy(data.labels[rows]).to(DEVICE)
            loss = model(*collate(data, rows, pad, args.padding_side), labels=labels).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            progress.set_postfix(loss=f"{loss.item():.4f}")
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}")


@torch.no_grad()
def predict(model: torch.nn.Module, data: Rows, pad: int, args: argparse.Namespace) -> np.ndarray:
    """Classes or scores, (rows,), in the order of the rows. FloatingPointError where they are not finite."""
    model.eval()
    logits = np.zeros((len(data.inputs), model.config.num_labels), dtype=np.float32)
    for rows in tqdm(
        batches(data, 4 * args.batch_size, 0), desc="predicting", leave=False, delay=5
    ):
        with (
            nullcontext() if model.config.num_labels == 1 else autocast(DEVICE)
        ):  # bf16 would round scores to ties
            logits[rows] = (
                model(*collate(data, rows, pad, args.padding_side)).logits.float().cpu().numpy()
            )
    if not np.isfinite(logits).all():
        raise FloatingPointError("its predictions are not finite")
    return logits.argmax(axis=1) if model.config.num_labels > 1 else logits[:, 0]


def run(
    name: str,
    seed: int,
    variant: Variant,
    data: dict[str, Rows],
    pad: int,
    args: argparse.Namespace,
):
    """Fine-tunes once: (result, model). FloatingPointError where it diverges."""
    task, start = TASKS[name], time.perf_counter()
    torch.manual_seed(seed)  # the head's initialisation, dropout
    options = dict(num_labels=max(1, len(task.labels)), psm=variant.psm, pooling=variant.pooling)
    model = load_model(args.checkpoint, **options)
    fit(model, data["train"], pad, seed, args)
    scores, rows = {}, {file: len(part.inputs) for file, part in data.items()}
    for column, file in task.files("dev").items():
        predicted = predict(model, data[file], pad, args)
        scores[column] = {
            metric: METRICS[metric](predicted, data[file].labels) for metric in task.metrics
        }
    result = dict(
        task=name,
        seed=seed,
        scores=scores,
        rows=rows,
        seconds=round(time.perf_counter() - start, 1),
    )
    return result | dict(config=dataclasses.asdict(model.config)), model


# ---- All runs ----


def digest(paths: Iterable[Path]) -> str:
    """Of the content of files."""
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def finished(file: Path) -> dict | None:
    """A run's result, or None. One that is damaged is named and not used."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        return {
            key: result[key]
            for key in ("task", "scores", "rows", "seconds", "config", "settings", "machine")
        }
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        tqdm.write(f"{file} is damaged ({error!r}): that run is made again")


def sweep(
    args: argparse.Namespace, tokenizer: Tokenizer, chosen: list[Variant], identity: dict[str, dict]
):
    """The results of all runs, by variant; those that are missing are made. identity: what a task's depend on, beside
    the seed and the variant. A run that diverges stops no other; SystemExit names it at the end."""
    results, diverged, loaded, data = {variant: [] for variant in chosen}, [], None, {}
    out, machine, pad = Path(args.out), train_mlm.describe_machine(), tokenizer.token_to_id("[PAD]")
    todo = [
        (name, variant, seed)
        for name in args.tasks
        for variant in chosen
        for seed in range(args.seeds)
    ]
    for name, variant, seed in (progress := tqdm(todo, unit="run")):
        title = f"{name}, {variant.name}, seed {seed}"
        progress.set_description(title)
        settings = identity[name] | dict(
            psm="+".join(variant.psm) or "none", pooling=variant.pooling
        )
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        folder = out / f"{name}-{variant.pooling}-{settings['psm']}-{key}-seed{seed}"
        file, last = out / f"{folder.name}.json", folder / "tokenizer.json"
        submits = args.predict and seed == 0 and variant is chosen[0]
        result, keeps = finished(file), args.save or submits
        try:
            if result is None or (keeps and not last.exists()):
                if loaded != name:
                    files = ["train", *TASKS[name].files("dev").values()]
                    loaded, data = (
                        name,
                        {
                            part: encode(read(name, part, args.data_dir), tokenizer)
                            for part in files
                        },
                    )
                result, model = run(name, seed, variant, data, pad, args)
                if keeps:
                    model.save_pretrained(folder)
                    whole = train_mlm.load_tokenizer(
                        str(Path(args.checkpoint, last.name))
                    )  # which cuts nothing
                    write_atomically(last, whole.to_str(pretty=True))
                result |= dict(settings=settings, machine=machine)
                write_atomically(file, json.dumps(result, indent=2) + "\n")
            results[variant].append(result)
            if submits:
                submit(name, load_model(folder), tokenizer, args)
        except FloatingPointError as error:
            diverged.append(f"{title}: {error}; a lower --lr helps")
    if diverged:
        raise SystemExit("\n".join(diverged))
    return results


def submit(name: str, model: torch.nn.Module, tokenizer: Tokenizer, args: argparse.Namespace):
    """Writes a task's files for the benchmark: labels as it writes them, or scores from 0 to 5."""
    Path(args.out, "submission").mkdir(exist_ok=True)
    for column, file in TASKS[name].files("test").items():
        data, labels = encode(read(name, file, args.data_dir), tokenizer), TASKS[name].labels
        predicted = predict(model, data, tokenizer.token_to_id("[PAD]"), args)
        cells = (
            [labels[i] for i in predicted] if labels else [f"{x:.3f}" for x in predicted.clip(0, 5)]
        )
        lines = [
            f"{index}\t{cell}\n"
            for index, cell in [("index", "prediction"), *zip(data.index, cells)]
        ]
        write_atomically(Path(args.out, "submission", f"{column}.tsv"), "".join(lines))


def compare(args: argparse.Namespace, results: dict[Variant, list[dict]]) -> tuple[list[dict], str]:
    """(the scores of all seeds beside the paper's, a row per task, metric and variant; those rows as a table)"""
    rows, budget = [], "100" if args.ablation or args.poolings else args.budget
    for name in args.tasks:
        for column, metric in itertools.product(TASKS[name].files("dev"), TASKS[name].metrics):
            for variant, found in results.items():
                scores = [
                    result["scores"][column][metric] for result in found if result["task"] == name
                ]
                paper = (
                    dict(zip(PAPER_COLUMNS, variant.paper))
                    if metric == TASKS[name].metrics[0]
                    else {}
                )
                row = dict(
                    task=column,
                    metric=metric,
                    variant=variant.name,
                    paper=paper.get(column),
                    scores=scores,
                )
                rows.append(row)
    for variant in results:
        some = [row for row in rows if row["variant"] == variant.name and row["paper"] is not None]
        if len(some) == len(PAPER_COLUMNS):
            scores, paper = (
                np.mean([row[key] for row in some], axis=0).tolist() for key in ("scores", "paper")
            )
            rows.append(
                dict(
                    task="average",
                    metric="of these 8",
                    variant=variant.name,
                    scores=scores,
                    paper=paper,
                )
            )
    lines = [
        f"| task | metric | variant | measured, seeds: {args.seeds} | paper, {budget} % | difference |"
    ]
    lines.append("| --- " * 6 + "|")
    for row in rows:
        row["mean"] = mean = float(np.mean(row["scores"]))
        row["sd"] = sd = float(np.std(row["scores"], ddof=1)) if args.seeds > 1 else None
        measured = f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"
        beside = (
            "– | –" if row["paper"] is None else f"{row['paper']:.3f} | {mean - row['paper']:+.3f}"
        )
        lines.append(
            f"| {row['task']} | {row['metric']} | {row['variant']} | {measured} | {beside} |"
        )
    return rows, "\n".join(lines) + (f"\n\n{REMARK}" if args.ablation or args.poolings else "")


def main(argv: list[str]):
    args = parse_args(argv)
    config = load_model(args.checkpoint).config
    tokenizer, chosen, identity = read_tokenizer(args, config), variants(args, config), {}
    settings = {
        name: getattr(args, name)
        for name in ("padding_side", "lr", "batch_size", "epochs", "max_length")
    }
    settings["checkpoint"] = digest(
        Path(args.checkpoint, f) for f in ("config.json", "model.pt", "tokenizer.json")
    )
    for name in args.tasks:  # a missing file now, not after hours
        files = [file for file in TASKS[name].rows if args.predict or "test" not in file]
        paths = {file: sources(name, file, args.data_dir)[0] for file in files}
        data = digest(path for file in files if "test" not in file for path in paths[file])
        identity[name] = dict(task=name, data=data if args.data_dir else HUB_DATA) | settings
    looks_right = "W" in config.pattern or not config.causal_conv
    if (
        len({bool(variant.psm) for variant in chosen}) > 1
        and args.padding_side == "right"
        and not looks_right
    ):
        print("with a causal convolution and pads on the right no pad stands before a real token: PSM or none is the "
              "same function, and the scores will say so. It matters with --padding-side left")  # fmt: skip
    Path(args.out).mkdir(parents=True, exist_ok=True)
    results = sweep(args, tokenizer, chosen, identity)

    rows, table = compare(args, results)
    runs, command = (
        [run for found in results.values() for run in found],
        " ".join(["python finetune_glue.py", *argv]),
    )
    out = Path(
        args.out, "ablation" if args.ablation else "poolings" if args.poolings else "results"
    )
    write_atomically(
        out.with_suffix(".json"),
        json.dumps(dict(command=command, rows=rows, runs=runs), indent=2) + "\n",
    )
    write_atomically(out.with_suffix(".md"), f"{table}\n\n`{command}`, {runs[0]['machine']}\n")
    print(
        f"\n{table}\n\nin {out}.md and .json; each run's file{' and model' * args.save} beside them"
    )
    if args.predict:
        print(f"for the benchmark: {out.parent / 'submission'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; finished runs are kept, and the same command goes on"
        ) from None
    except OSError as error:  # a full disk, a folder that may not be written
        raise SystemExit(f"cannot go on: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error).lower():
            raise
        raise SystemExit(f"out of memory: lower --batch-size or --max-length\n{error}") from error
