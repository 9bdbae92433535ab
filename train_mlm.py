"""Pretrains MaBERT with masked language modelling.

    python train_mlm.py --demo                     # minutes on a laptop: no network, no GPU
    python train_mlm.py --steps 100000             # the paper's 10 % budget, on text from the hub
    python train_mlm.py --data texts/ --vocab-size 8192 --steps 5000 --hidden-size 256 ...
    python train_mlm.py --init out/mlm ...         # starts from a trained model, on other text
    python train_mlm.py ... --resume               # goes on after the newest checkpoint
    torchrun --nproc-per-node 8 train_mlm.py ...   # the same run, shared by eight GPUs

The way of the data, which is also the order of this file:

    text         files, the hub's corpora or the demo's texts, read a part at a time
    ids          all documents, tokenized once, one after the other in one file of --cache
    rows         [CLS], a window of one document, [SEP]; up to a twentieth of the text is held
                 out (at most 2^18 tokens)
    batches      --batch-size rows, padded and masked, in micro-batches
    steps        forward, backward and AdamW; now and then a line of log.csv and a held-out loss
    checkpoints  a folder each, and at the end the model itself

What is random in a step comes from generators whose seeds follow from --seed and the step. So there
is no random state to save, and a run that is stopped and resumed is the run that was not stopped:

    stream       its seed is                                      drawn in
    1 masking    --seed and the step                              Batches.masked_rows
    2 order      --seed, the first step of the phase, the epoch   Batches.row_indices
    3 dropout    --seed, the step, the micro-batch                train_step

The weights are drawn once, from --seed, or are those of --init. Held-out rows are masked with seed
0 in every run. Steps count from 0 where a batch, its seeds and its learning rate are looked up. In
the log, in names of checkpoints and in messages they count from 1: there a step is the number of
finished steps.

A run writes to its folder (--out) config.json, model.pt and tokenizer.json, which
`from_pretrained(out)` reads, beside log.csv, args.json and a folder for each of the last
checkpoints (step-0050000/), which `from_pretrained` reads too.
"""

import argparse
import ast
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

# OpenMP reads these when torch loads. By default its idle threads spin for milliseconds, which
# slows a run down many times over beside any other busy process. With no spinning at all, the many
# short operations of a small model would wait for threads to wake up.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from mabert import (
    PSM_STAGES,
    MaBERTConfig,
    MaBERTForMaskedLM,
    PretrainedModel,
    torch_load,
    torch_save,
)

# torchrun tells each of its processes which one it is
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

# ---- Arguments: the defaults are the paper's protocol; where the paper is silent, BERT's ----

# The text and the tokenizer of a run that names none
HUB_CORPUS = (("wikimedia/wikipedia", "20231101.en"), ("lucadiliello/bookcorpusopen", "default"))
HUB_TOKENIZER = "google-bert/bert-base-uncased"
WITHOUT_HUB = (
    "without the hub, pass --data PATH with --vocab-size N (trains a tokenizer) or --tokenizer FILE"
)
MAX_VOCAB = 65_535  # token ids are stored as uint16

# Flags that are fields of MaBERTConfig, of the same name and type
MODEL = ("pattern", "hidden_size", "num_heads", "intermediate_size", "d_state", "dropout")

# Flags that are refused beside --init, all but --dropout: the model and tokenizer are there already
SET_BY_INIT = ("demo", "tokenizer", "vocab_size", *MODEL, "psm", "causal_conv")

# The paper's model and protocol in small; the flags not named here keep their defaults
DEMO = dict(
    out="out/demo",
    # the model
    vocab_size=4096,
    pattern="MMT",
    hidden_size=128,
    num_heads=4,
    intermediate_size=512,
    d_state=8,
    dropout=0.0,
    # its rows
    length_schedule=[(64, 1.0)],
    batch_size=24,
    bucket=True,
    mask_rate=0.3,
    # its training
    steps=1000,
    lr=2e-3,
    warmup_steps=100,
    eval_every=200,
    log_every=25,
    compile=False,
)


def bounded(number_type: type, low: float, high: float = math.inf):
    """A type for argparse: an int or a float, finite, in [low, high)."""

    def parse(text: str):
        value = number_type(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} must be finite and in [{low}, {high})")
        return value

    parse.__name__ = number_type.__name__  # argparse's messages have it: invalid int value
    return parse


def path_name(text: str) -> str:
    """A type for argparse: a path. A ~ at its start becomes the home folder, also in quotes."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return os.path.expanduser(text)


def psm_stages(text: str) -> tuple[str, ...]:
    """A type for argparse: stages of padding-safe masking, joined by +, or none."""
    stages = () if text == "none" else tuple(text.split("+"))
    if not set(stages) <= set(PSM_STAGES):
        allowed = ", ".join(PSM_STAGES)
        raise argparse.ArgumentTypeError(f"{text!r} is not none, or any of {allowed} joined by +")
    return stages


def length_share(text: str) -> tuple[int, float]:
    """A type for argparse: the length of rows and a share of the steps, as in 128:0.9."""
    length, share = text.split(":")
    return bounded(int, 8, 2**16)(length), bounded(float, 1e-9, 1.01)(share)


def default_cache() -> str:
    """A folder of ours in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return str(Path(caches, "mabert"))


# fmt: off
def add_flags_of_the_run(parser: argparse.ArgumentParser):
    # its folder
    positive = bounded(int, 1)
    group = parser.add_argument_group("the run")
    group.add_argument("--out", type=path_name, default="out/mlm", help="the run's folder")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true",
        help="go on after the newest checkpoint in --out, if there is one")
    either.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    group.add_argument("--seed", type=bounded(int, 0, 2**64), default=0,
        help="of weights, order, masks and dropout")

    # how often something is written
    group.add_argument("--save-every", type=positive, default=1_000,
        help="steps between checkpoints; the last step gets one too")
    group.add_argument("--keep", type=positive, default=3,
        help="checkpoints to keep, the last ones")
    group.add_argument("--eval-every", type=positive, default=1_000,
        help="steps between held-out losses")
    group.add_argument("--log-every", type=positive, default=100,
        help="steps between lines of log.csv")


def add_flags_of_the_text(parser: argparse.ArgumentParser):
    # which text
    group = parser.add_argument_group("text")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--demo", action="store_true",
        help="a small model on text that every Python carries; replaces out/demo")
    either.add_argument("--data", nargs="+", type=path_name, metavar="PATH",
        help=".txt files, or .json, .jsonl, .parquet with a column 'text', or folders of them; "
        "without it English Wikipedia and BookCorpus from the hub")
    group.add_argument("--sample-by", choices=("document", "paragraph", "line"), default="document",
        help="what is one document in a .txt file: all of it, a block between blank lines, a line")

    # its tokens
    either = group.add_mutually_exclusive_group()
    either.add_argument("--tokenizer", type=path_name,
        help=f"a tokenizer.json or a name on the hub; without --vocab-size, {HUB_TOKENIZER}")
    either.add_argument("--vocab-size", type=bounded(int, 100, MAX_VOCAB + 1),
        help="train a tokenizer of so many pieces on the text")
    group.add_argument("--cache", type=path_name, default=default_cache(), metavar="FOLDER",
        help="where token ids are kept, two bytes each, for the next runs on the same text")


def add_flags_of_the_model(parser: argparse.ArgumentParser):
    defaults = MaBERTConfig()
    group = parser.add_argument_group("model")
    group.add_argument("--init", type=path_name, metavar="FOLDER",
        help="start from a trained model, or a step of a run: its fields, weights and tokenizer; "
        "positions are stretched to the longest row. Only --dropout may change a field")

    # fields that are flags as they are
    for name in MODEL:
        default = getattr(defaults, name)
        group.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default,
            help=f"see MaBERTConfig.{name}")

    # fields with a form of their own
    group.add_argument("--psm", type=psm_stages, default="+".join(defaults.psm), metavar="STAGES",
        help="stages of padding-safe masking, joined by +, or none")
    group.add_argument("--causal-conv", action=argparse.BooleanOptionalAction,
        default=defaults.causal_conv, help="causal convolution; --no-causal-conv centres it")


def add_flags_of_training(parser: argparse.ArgumentParser):
    # steps and rows
    positive = bounded(int, 1)
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive, default=1_000_000,
        help="the paper's budgets: 100000, 250000, 500000 and 1000000")
    group.add_argument("--length-schedule", nargs="+", type=length_share, metavar="TOKENS:SHARE",
        default=[(128, 0.9), (512, 0.1)],
        help="row lengths and the share of the steps each gets, in order")
    group.add_argument("--batch-size", type=positive, default=256, help="rows per optimizer step")
    group.add_argument("--micro-batch-size", type=positive, default=64,
        help="rows of the longest length per micro-batch; shorter rows: more of them, but no more "
        "tokens")

    # the optimizer and the task
    group.add_argument("--lr", type=bounded(float, 1e-30), default=1e-4, help="peak learning rate")
    group.add_argument("--warmup-steps", type=bounded(int, 0), default=10_000,
        help="linear warm-up, never over a tenth of the run")
    group.add_argument("--weight-decay", type=bounded(float, 0), default=0.01,
        help="on matrices; none on biases, norms, A_log and D")
    group.add_argument("--mask-rate", type=bounded(float, 1e-9, 1), default=0.15,
        help="share of the tokens to predict")

    # what changes the cost alone
    group.add_argument("--bucket", action="store_true",
        help="rows of like length together, from 32 batches at a time: less padding")
    group.add_argument("--activation-checkpointing", action="store_true",
        help="less memory, more time, the same weights")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="torch.compile the model, which takes minutes at first; by default on a GPU")
# fmt: on


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python train_mlm.py [--demo] [--data PATH ...] [--steps N] ...: --help lists more",
        description="Pretrain MaBERT with masked language modelling, by the paper's protocol.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_flags_of_the_run(parser)
    add_flags_of_the_text(parser)
    add_flags_of_the_model(parser)
    add_flags_of_training(parser)

    # the demo has other defaults
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)

    # With --init, parse again with None as the default of these flags: what is not None was given.
    if args.init:
        parser.set_defaults(**dict.fromkeys(SET_BY_INIT))
        args = parser.parse_args(argv)
        names = [name for name in SET_BY_INIT if getattr(args, name) is not None]
        flags = [f"--{name.replace('_', '-')}" for name in names if name != "dropout"]
        if flags:
            parser.error(
                f"not allowed with --init: {', '.join(flags)}. The model and its tokenizer are "
                "those of its folder"
            )

    # what depends on other flags
    if args.demo and args.tokenizer:
        args.vocab_size = None
    args.micro_batch_size = min(args.micro_batch_size, args.batch_size)

    # what no single flag can tell
    if args.batch_size % (args.micro_batch_size * PROCESSES):
        parser.error(
            f"--batch-size {args.batch_size} is no multiple of --micro-batch-size "
            f"{args.micro_batch_size} × {PROCESSES} process(es): change it, or lower "
            "--micro-batch-size"
        )
    if not math.isclose(sum(share for _, share in args.length_schedule), 1):
        parser.error("--length-schedule: the shares must sum to 1, as in 128:0.9 512:0.1")
    if not args.init:
        try:
            model_config(args, vocab_size=100, pad_token_id=0)
        except ValueError as error:
            parser.error(str(error))
    return args


def model_config(args: argparse.Namespace, vocab_size: int, pad_token_id: int) -> MaBERTConfig:
    """The config of the model that the flags describe, for a tokenizer of this size."""
    flags = {name: getattr(args, name) for name in (*MODEL, "psm", "causal_conv")}
    longest = max(length for length, _ in args.length_schedule)
    return MaBERTConfig(
        vocab_size=vocab_size, pad_token_id=pad_token_id, max_position=longest, **flags
    )


def progress(*args, **options) -> tqdm:
    """A progress bar on stderr; of torchrun's processes only the first shows one."""
    return tqdm(*args, disable=RANK > 0, **options)


# ---- Text: read a part at a time, so files may be larger than the memory, all but .json ----

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
PIECE = 20_000  # characters that are read and tokenized at once; a tokenizer takes 2 MB for them


class Part(NamedTuple):
    """Some of the text of a document."""

    text: str
    ends: bool  # whether the document ends here
    share: float  # of the source, 0 to 1: how much has been read by now


class Source(NamedTuple):
    """Something to read documents from: a file, a corpus of the hub, the texts of the demo."""

    key: str  # changes with the content and its format; --sample-by is not part of it
    size: int  # bytes
    read: Callable[[], Iterator[Part]]  # from the start, each time


def text_sources(args: argparse.Namespace) -> list[Source]:
    """The text that the flags ask for."""
    if args.demo:
        return [demo_source()]
    if args.data:
        return file_sources(find_files(args.data, args.out), args.sample_by)
    return hub_sources()


def parts_of(documents: Iterable[str | None], count: int) -> Iterator[Part]:
    """`count` documents, each in one part; None is an empty one."""
    for number, text in enumerate(documents, 1):
        yield Part(text or "", True, number / count)


def encodable(text: str) -> str:
    """The text without lone surrogates, which JSON and Python can spell but UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


# The demo's texts and the hub's


def demo_texts() -> list[str]:
    """English that every Python carries: the language reference, and docstrings of the library."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in the sources
        for file in progress(sorted(library.rglob("*.py")), unit="file", desc="docstrings"):
            if skipped & set(file.relative_to(library).parts):
                continue

            # modules are parsed, not imported; a few cannot be parsed, some of them on purpose
            with contextlib.suppress(SyntaxError, ValueError, OSError):
                for node in ast.walk(ast.parse(file.read_bytes())):
                    if isinstance(node, documented):
                        texts.append(ast.get_docstring(node) or "")
    return [encodable(text) for text in dict.fromkeys(texts)]  # each once


def demo_source() -> Source:
    """The demo's texts, with a digest as their key."""
    texts = demo_texts()
    content = "\0".join(texts).encode()
    key = f"demo {hashlib.blake2b(content).hexdigest()}"
    return Source(key, len(content), lambda: parts_of(texts, len(texts)))


def hub_sources() -> list[Source]:
    """The hub's corpora, downloaded by `datasets`. Their keys are their names and sizes."""
    import datasets  # here, since it takes seconds

    def read(corpus) -> Iterator[Part]:
        documents = (text for rows in corpus.iter(64) for text in rows["text"])
        return parts_of(documents, len(corpus))

    sources = []
    for name, config in HUB_CORPUS:
        try:
            corpus = datasets.load_dataset(name, config, split="train").select_columns("text")
        except Exception as error:  # of many kinds, most with the reason one level down
            error = error.__cause__ or error
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise error from None  # `explain` knows what to say
            raise SystemExit(f"cannot load {name}: {error!r}\n{WITHOUT_HUB}") from error
        size = corpus.data.nbytes
        key = f"{name} {config} {len(corpus)} {size}"
        sources.append(Source(key, size, functools.partial(read, corpus)))
    return sources


# Files


def find_files(paths: list[str], out: str) -> list[Path]:
    """The files that --data names, each once; SystemExit where a path has none."""
    files = {}  # real path -> path as given: a file may be named twice, or linked
    unread = 0
    for path in map(Path, paths):
        # all that is there, and what of that we read
        candidates = [path] if path.is_file() else sorted(files_below(path, out))
        readable = [file for file in candidates if is_readable(file)]
        unread += len(candidates) - len(readable)
        if not readable:
            suffixes = ", ".join(SUFFIXES)
            raise SystemExit(f"--data: {path} is or has no {suffixes} file that is not empty")

        # each once
        for file in readable:
            files.setdefault(file.resolve(), file)

    # say what is read, so that what is missing is noticed
    size = sum(file.stat().st_size for file in files) / 1e6
    others = f"; {unread} others there are not read" if unread else ""
    print(f"text: {len(files)} file(s), {size:.1f} MB{others}")
    return list(files.values())


def is_readable(file: Path) -> bool:
    """A file, not empty, that we can read; the links of a folder may lead nowhere."""
    return file.suffix.lower() in SUFFIXES and file.is_file() and file.stat().st_size > 0


def files_below(path: Path, out: str) -> Iterator[Path]:
    """All files of a folder and its sub-folders, linked ones too, but nothing that is hidden.

    The run's own folder, --out, is left out.
    """
    visited = set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        place = os.path.realpath(folder)
        is_out = place == os.path.realpath(out)
        if is_out:
            print(f"text: {folder} is not read, since it is --out")

        # a link may lead back to where we come from
        if is_out or place in visited:
            subfolders.clear()
            continue
        visited.add(place)

        # os.walk descends into what is left of the sub-folders
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def file_sources(files: list[Path], sample_by: str) -> list[Source]:
    """The files as sources. Their keys are digests of their content, so each is read once here."""
    stamps = [stamp_of(file) for file in files]
    total = sum(size for size, _ in stamps)
    bar = progress(total=total, unit="B", unit_scale=True, desc="looking at text", delay=2)
    sources = []
    for file, stamp in zip(files, stamps):
        # digest the content, a block at a time
        digest = hashlib.blake2b()
        with open(file, "rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
                bar.update(len(block))

        # the suffix says how the content is read
        key = f"{file.suffix.lower()} {digest.hexdigest()}"
        sources.append(Source(key, stamp[0], functools.partial(read_file, file, sample_by, stamp)))
    bar.close()
    return sources


def stamp_of(file: Path) -> tuple[int, int]:
    """(size in bytes, time of the last change): another one for a file that is written to."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def read_file(file: Path, sample_by: str, stamp: tuple[int, int]) -> Iterator[Part]:
    """The documents of a file; SystemExit says what is wrong with it, and where.

    The stamp is from before the file was digested: what is read must be what was digested.
    """
    suffix = file.suffix.lower()
    try:
        if suffix == ".txt":
            yield from read_txt(file, sample_by)
        elif suffix == ".parquet":
            yield from read_parquet(file)
        else:
            yield from read_json(file)
    except UnicodeDecodeError as error:
        where = "" if suffix == ".parquet" else f", line {first_line_not_utf8(file)}"
        raise SystemExit(f"{file}{where}: not UTF-8 ({error.reason}); convert it") from error
    if stamp_of(file) != stamp:
        raise SystemExit(f"--data: {file} was changed while it was read")


def first_line_not_utf8(file: Path) -> int | None:
    """The number of the first line that is not UTF-8, counted from one."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number


def read_txt(file: Path, sample_by: str) -> Iterator[Part]:
    """Plain text; --sample-by says where its documents end. A line of spaces is blank."""
    size = file.stat().st_size
    with open(file, encoding="utf-8-sig") as opened:
        # a line may be as long as the file, so it comes in parts too
        read = opened.read if sample_by == "document" else opened.readline
        is_blank = True  # the line, as far as it has been read
        while text := read(PIECE):
            line_ends = text.endswith("\n")
            is_blank = is_blank and text.isspace()
            document_ends = sample_by == "line" or (sample_by == "paragraph" and is_blank)
            yield Part(text, line_ends and document_ends, opened.buffer.tell() / size)
            is_blank = is_blank or line_ends
    yield Part("", True, 1.0)


def read_json(file: Path) -> Iterator[Part]:
    """An object a line, with a "text". A .json file may also be one object, or a list of them."""
    size = file.stat().st_size
    with open(file, encoding="utf-8-sig") as lines:
        # a single value: the whole file has to be in memory
        if file.suffix.lower() == ".json":
            with contextlib.suppress(json.JSONDecodeError):
                value = json.load(lines)
                values = value if isinstance(value, list) else [value]
                texts = (text_of(v, f"{file}, document {i}") for i, v in enumerate(values, 1))
                yield from parts_of(texts, len(values))
                return
            lines.seek(0)

        # an object a line
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            where = f"{file}, line {number}"
            try:
                text = text_of(json.loads(line), where)
            except json.JSONDecodeError as error:
                raise SystemExit(f"--data: {where}: not JSON ({error})") from error
            yield Part(text, True, lines.buffer.tell() / size)


def text_of(value: object, where: str) -> str:
    """The "text" of a JSON object, which may be null."""
    if not isinstance(value, dict) or "text" not in value:
        raise SystemExit(f"--data: {where} has no 'text'")
    text = value["text"]
    if not isinstance(text, str | None):
        shown = textwrap.shorten(repr(text), 50)
        raise SystemExit(f"--data: {where}: 'text' is no string: {shown}")
    return encodable(text or "")


def read_parquet(file: Path) -> Iterator[Part]:
    """The rows of the column "text"."""
    import pyarrow  # comes with `datasets`
    from pyarrow.parquet import ParquetFile

    try:
        # is there text?
        table = ParquetFile(file, buffer_size=2**20, pre_buffer=False)  # read some MB at a time
        column_types = {field.name: str(field.type) for field in table.schema_arrow}
        if column_types.get("text") not in ("string", "large_string", "string_view"):
            raise SystemExit(f"--data: {file} has no column 'text' of strings, but {column_types}")

        # a few documents at a time
        batches = table.iter_batches(64, columns=["text"])
        texts = (text for batch in batches for text in batch.column(0).to_pylist())
        yield from parts_of(texts, table.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise SystemExit(f"--data: cannot read {file}: {error}") from error


# ---- Tokenizer ----

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def choose_tokenizer(
    args: argparse.Namespace, sources: list[Source], checkpoint: Path | None
) -> Tokenizer:
    """The tokenizer that the flags ask for; a trained one is the checkpoint's, if there is one."""
    if not args.vocab_size:
        return load_tokenizer(args.tokenizer or HUB_TOKENIZER)
    if checkpoint:
        return load_tokenizer(str(checkpoint / "tokenizer.json"))
    return load_tokenizer(str(trained_tokenizer(args, sources)))


def trained_tokenizer(args: argparse.Namespace, sources: list[Source]) -> Path:
    """The file in --cache of a tokenizer for this text, which is trained if it is not there.

    A second training might differ in a few pieces, and the text would be tokenized anew.
    """
    keys = [source.key for source in sources]
    name = f"tokenizer-{digest_of(FORM, args.sample_by, args.vocab_size, keys)}"
    file = Path(args.cache, f"{name}.json")
    if file.exists():
        print(f"tokenizer: {file}, trained on this text before")
        return file

    # one process trains; another that wants the same tokenizer waits, and finds it written
    make_cache_folder(file.parent)
    with locked(file.with_suffix(".lock"), wait=True):
        if not file.exists():
            size = args.vocab_size
            print(f"training a tokenizer of {size} word pieces (minutes on a large text)")
            texts = (text for text, _ in pieces(sources, "text for the tokenizer"))
            write_atomically(file, train_tokenizer(texts, size).to_str(pretty=True))
    return file


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BERT's uncased WordPiece tokenizer, trained on other text.

    The trainer breaks ties between equally frequent pieces by chance, so two trainings may differ
    in a few of them.
    """
    # its form
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()

    # its pieces
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS))
    tokenizer.train_from_iterator(texts, trainer)

    # every character of the text is a piece, however few were asked for
    size = vocabulary_size(tokenizer)
    if size > vocab_size:
        print(f"the text has so many characters that the tokenizer has {size} pieces")
    return in_our_form(tokenizer)


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer.json, or a tokenizer of the hub, in our form."""
    # load it
    is_file = name.endswith(".json") or Path(name).exists()
    try:
        tokenizer = Tokenizer.from_file(name) if is_file else Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare Exceptions
        advice = "" if is_file else f"\n{WITHOUT_HUB}"
        raise SystemExit(f"cannot load the tokenizer {name}: {error}{advice}") from error

    # masked language modelling needs them
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise SystemExit(f"the tokenizer {name} has no {', '.join(missing)}")
    return in_our_form(tokenizer)


def in_our_form(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, set to make our rows, whatever its file says; SystemExit if it is too large.

    A row is [CLS] a [SEP], or [CLS] a [SEP] b [SEP], neither cut nor padded. The letters "[MASK]"
    in a text are text. A tokenizer.json does not hold that last setting: to whoever loads it
    without this function, as mabert.py does, "[MASK]" is a mask.
    """
    size = vocabulary_size(tokenizer)
    if size > MAX_VOCAB:
        raise SystemExit(f"the tokenizer has {size} tokens; {MAX_VOCAB} is the most")

    # the text, and the row around it
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; some tokenizers leave ids out."""
    return max(tokenizer.get_vocab().values()) + 1


# ---- Tokens: all documents of the text, one after the other in one file of ids ----

# The version of what --cache holds, ids, documents and trained tokenizers: raise it when the same
# text would be written differently
FORM = 1

CHARACTERS_AT_ONCE = 2**20  # in the pieces that the tokenizer shares between the cores

# One record per document: totals of the text up to its end
DOCUMENT = np.dtype([("tokens", np.int64), ("characters", np.int64), ("unknown", np.int64)])


def token_folder(args: argparse.Namespace, sources: list[Source], tokenizer: Tokenizer) -> Path:
    """The folder of --cache that has the ids of this text; they are written if they are not there.

    Its name is made of all that the ids depend on: replaced text is new text, whatever its name,
    size or time, and text that was moved is not.
    """
    keys = [source.key for source in sources]
    folder = Path(args.cache, digest_of(FORM, args.sample_by, tokenizer.to_str(), keys))
    if (folder / "ids").exists():
        return folder

    # one process writes; another that wants the same text waits, and finds it written
    make_cache_folder(folder)
    with locked(folder / ".lock", wait=True):
        if not (folder / "ids").exists():
            write_tokens(folder, sources, tokenizer)
    return folder


def make_cache_folder(folder: Path):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--cache: cannot make {folder}: {error.strerror}") from error


def digest_of(*values) -> str:
    """A short digest of the values: it names files of --cache, and tells tokenizers apart."""
    content = repr(values).encode("utf-8", "replace")
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def write_tokens(folder: Path, sources: list[Source], tokenizer: Tokenizer):
    """Writes all ids (file `ids`, uint16) and what is known of each document (file `documents`).

    An interrupted preparation goes on after its last finished document.
    """
    partial = folder / "ids.partial"
    with open(partial, "ab") as ids_file, open(folder / "documents", "ab") as documents_file:
        # what is there; a document's ids are written before what is known of it
        documents = np.fromfile(folder / "documents", DOCUMENT)
        documents = documents[documents["tokens"] <= partial.stat().st_size // 2]
        tokens, characters, unknown = documents[-1].tolist() if len(documents) else (0, 0, 0)
        ids_file.truncate(2 * tokens)
        documents_file.truncate(len(documents) * DOCUMENT.itemsize)

        # the rest, a group of pieces at a time
        for group in groups_of_pieces(pieces(sources, "tokens", skip=len(documents))):
            records = []
            encoded = encode([text for text, _ in group], tokenizer)
            for (text, document_ends), (ids, lost) in zip(group, encoded):
                ids_file.write(ids)
                tokens += len(ids)
                characters += count_characters(text)
                unknown += lost
                if document_ends:
                    records.append((tokens, characters, unknown))
            ids_file.flush()
            documents_file.write(np.array(records, DOCUMENT).tobytes())
            documents_file.flush()

        # all is on the disk before the name says so
        os.fsync(ids_file.fileno())
        os.fsync(documents_file.fileno())
    os.replace(partial, folder / "ids")


def pieces(sources: list[Source], label: str, skip: int = 0) -> Iterator[tuple[str, bool]]:
    """The text, without its first `skip` documents, in pieces of at most PIECE characters.

    Yields (text, whether a document ends with it). Pieces are cut at white space where there is
    some, so that cutting changes no token.
    """
    cut_at_space = re.compile(rf".{{1,{PIECE}}}(?!\S)|.{{1,{PIECE}}}", re.DOTALL)
    total = sum(source.size for source in sources)  # bytes
    before = 0  # bytes of the sources that have been read
    bar = progress(total=total, unit="B", unit_scale=True, desc=label)
    for source in sources:
        rest = ""
        for text, document_ends, share in source.read():
            bar.update(before + int(share * source.size) - bar.n)
            if skip:
                skip -= document_ends
                continue

            # gather enough to cut
            rest += text
            if not document_ends and len(rest) <= PIECE:
                continue

            # the last piece goes on with the next part, if the document does
            cut = cut_at_space.findall(rest)
            rest = "" if document_ends else cut.pop()
            for piece in cut[:-1]:
                yield piece, False
            yield cut[-1] if cut else "", document_ends
        before += source.size
    bar.close()


def groups_of_pieces(all_pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """The pieces in lists of CHARACTERS_AT_ONCE, or a few more."""
    group = []
    size = 0
    for piece in all_pieces:
        group.append(piece)
        size += 1 + len(piece[0])  # empty documents count too
        if size >= CHARACTERS_AT_ONCE:
            yield group
            group = []
            size = 0
    yield group


def encode(texts: list[str], tokenizer: Tokenizer) -> list[tuple[np.ndarray, int]]:
    """Of each text the ids, without special tokens, and how many characters became [UNK]."""
    # the ids
    unk = tokenizer.token_to_id("[UNK]")
    ids = [code.ids for code in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    # the fast encoding does not say where tokens are, so texts with an [UNK] are encoded again
    indices = [i for i, text_ids in enumerate(ids) if unk in text_ids]
    codes = tokenizer.encode_batch([texts[i] for i in indices], add_special_tokens=False)
    lost = [0] * len(texts)
    for i, code in zip(indices, codes):
        for token, (start, end) in zip(code.ids, code.offsets):
            if token == unk:
                lost[i] += count_characters(texts[i][start:end])
    return [(np.array(text_ids, np.uint16), count) for text_ids, count in zip(ids, lost)]


def count_characters(text: str) -> int:
    """How many there are, white space aside."""
    return sum(map(len, text.split()))


class Tokens(NamedTuple):
    """The tokens of a text."""

    ids: np.ndarray  # (tokens,) uint16, without special tokens; a memory map
    # (documents + 1,): document i is ids[offsets[i]:offsets[i + 1]]; empty ones are left out
    offsets: np.ndarray
    counts: np.ndarray  # (vocabulary,): how often each id occurs
    checksum: int  # of ids and offsets


def read_tokens(folder: Path, tokenizer: Tokenizer) -> Tokens:
    """The tokens in a folder of --cache; SystemExit where they are damaged or of no use."""
    # how many there are
    if not (folder / "ids").exists():
        raise SystemExit(f"process {RANK} does not see {folder}: all must share one --cache")
    documents = np.zeros(0, DOCUMENT)
    with contextlib.suppress(FileNotFoundError):  # which is damage, below
        documents = np.fromfile(folder / "documents", DOCUMENT)
    total, characters, unknown = documents[-1].tolist() if len(documents) else (0, 0, 0)
    if total == 0 and (folder / "ids").stat().st_size == 0:
        raise SystemExit("the corpus is empty: no text, or nothing that the tokenizer keeps")

    # np.memmap refuses a file without bytes, and one with half an id
    damaged = f"the tokens in {folder} are damaged: remove that folder"
    if (folder / "ids").stat().st_size != 2 * total:
        raise SystemExit(damaged)

    # count the ids, some at a time
    ids = np.memmap(folder / "ids", np.uint16, "r")
    counts = np.zeros(2**16, np.int64)
    checksum = 0
    for i in range(0, len(ids), 2**22):
        counts += np.bincount(ids[i : i + 2**22], minlength=2**16)
        checksum = zlib.crc32(ids[i : i + 2**22], checksum)

    # is anything else damaged?
    size = vocabulary_size(tokenizer)
    ends = documents["tokens"]
    if (np.diff(ends, prepend=0) < 0).any() or counts[size:].any():
        raise SystemExit(damaged)

    # how much of the text the tokenizer knows
    share = unknown / max(1, characters)
    print(f"{total} tokens of text; {share:.2%} of its characters are [UNK]")
    if share > 0.5:
        raise SystemExit(
            f"to the tokenizer {share:.0%} of the text is [UNK]: another language, or no "
            "pre-tokenizer?"
        )

    # a document without tokens ends where it begins: that place is named once
    offsets = np.unique(np.concatenate([[0], ends]))
    return Tokens(ids, offsets, counts[:size], zlib.crc32(offsets, checksum))


STRIPES = 64


def split_held_out(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) segments, each (segments, 2): where they start and end in the tokens.

    The text is divided into STRIPES of equal size, and the last 5 % of each are held out, at most
    2^18 tokens in all: so a text of one document is split like a text of many. Segments end where
    a document or a stripe does.
    """
    # sizes in tokens
    total = int(tokens.offsets[-1])
    stripe = max(1, total // STRIPES)
    held = min(stripe // 20, 2**18 // STRIPES)

    # cut where a document, a stripe or the held-out end of a stripe begins
    ends = np.arange(stripe, total + 1, stripe)
    cuts = np.unique(np.concatenate([tokens.offsets, ends, ends - held]))
    segments = np.stack([cuts[:-1], cuts[1:]], axis=1)

    # the tokens that follow the last stripe are for training
    starts = segments[:, 0]
    is_held = (starts < ends[-1]) & (starts % stripe >= stripe - held)
    return segments[~is_held], segments[is_held]


# ---- Rows and masking: functions of the seed and the step ----

IGNORED = -100  # the label of positions with nothing to predict
MASKING, ORDER, DROPOUT = 1, 2, 3  # the random streams: the table at the top of this file


class Vocabulary(NamedTuple):
    """The ids of special tokens, and which ids are special: those are never predicted."""

    pad: int
    cls: int
    sep: int
    mask: int
    is_special: np.ndarray  # (vocabulary,), bool


def special_ids(tokenizer: Tokenizer) -> Vocabulary:
    """The special ids of a tokenizer."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    is_special = np.isin(np.arange(vocabulary_size(tokenizer)), list(ids.values()))
    return Vocabulary(ids["[PAD]"], ids["[CLS]"], ids["[SEP]"], ids["[MASK]"], is_special)


class Rows:
    """The rows of one length that segments of the tokens give.

    A row is [CLS], a window of one segment, [SEP]. A segment longer than a row is cut into windows
    of equal size, so that none is a stump. Rows are made when they are asked for by their indices.
    """

    def __init__(self, tokens: Tokens, segments: np.ndarray, length: int, vocabulary: Vocabulary):
        self.tokens = tokens
        self.segments = segments  # (segments, 2): start and end
        self.length = length  # of the longest row, [CLS] and [SEP] included
        self.vocabulary = vocabulary

        # how many windows, and so rows, each segment has; how many it and those before it have
        sizes = segments[:, 1] - segments[:, 0]
        self.windows = -(-sizes // (length - 2))
        self.windows_so_far = np.cumsum(self.windows)
        self.count = int(self.windows.sum())

    def __len__(self) -> int:
        return self.count

    def spans(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the windows of these rows start and end in the tokens, each (rows,)."""
        # which segment, and which of its windows
        segment = np.searchsorted(self.windows_so_far, indices, side="right")  # (rows,)
        windows = self.windows[segment]
        window = indices - (self.windows_so_far[segment] - windows)

        # the windows of a segment differ by a token at most
        start, end = self.segments[segment].T
        size = end - start
        return start + size * window // windows, start + size * (window + 1) // windows

    def lengths(self) -> np.ndarray:
        """How many tokens of text each row has, (rows,) uint16."""
        lengths = np.empty(len(self), np.uint16)
        for i in range(0, len(self), 2**20):  # some at a time: there may be tens of millions
            indices = np.arange(i, min(i + 2**20, len(self)))
            starts, ends = self.spans(indices)
            lengths[indices] = ends - starts
        return lengths

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """These rows, padded to the longest: (ids int64, real bool), both (rows, length)."""
        starts, ends = self.spans(indices)  # (rows,)
        lengths = ends - starts + 2  # (rows,)

        # pads all over, and on them [CLS], the text, [SEP]
        ids = np.full((len(indices), lengths.max()), self.vocabulary.pad, dtype=np.int64)
        ids[:, 0] = self.vocabulary.cls
        for i, (start, end) in enumerate(zip(starts, ends)):
            ids[i, 1 : lengths[i] - 1] = self.tokens.ids[start:end]
        ids[np.arange(len(ids)), lengths - 1] = self.vocabulary.sep
        return ids, np.arange(ids.shape[1]) < lengths[:, None]


def mask_tokens(
    ids: np.ndarray, vocabulary: Vocabulary, mask_rate: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking: (input ids, labels), both (rows, length).

    Every token that is not special is to be predicted with probability mask_rate. Of those, 80 %
    become [MASK], 10 % a random token, 10 % stay. Labels are the original ids there and IGNORED
    elsewhere.
    """
    # which tokens are to be predicted
    chosen = (rng.random(ids.shape) < mask_rate) & ~vocabulary.is_special[ids]  # (rows, length)
    labels = np.where(chosen, ids, IGNORED)

    # what the model sees there
    fate = rng.random(ids.shape)
    random_ids = rng.choice(np.flatnonzero(~vocabulary.is_special), ids.shape)
    inputs = np.where(chosen & (fate < 0.8), vocabulary.mask, ids)  # 80 %
    inputs = np.where(chosen & (fate >= 0.9), random_ids, inputs)  # 10 %
    return inputs, labels


def shuffled_batches(
    count: int, size: int, rng: np.random.Generator, lengths: np.ndarray | None = None
) -> list[np.ndarray]:
    """The indices of `count` rows in batches, every row once, in random order.

    One batch may be smaller than `size`. With their lengths, rows of like length are together:
    those of 32 batches at a time are sorted, and then all batches are shuffled.
    """
    # the order of rows
    order = rng.permutation(count)
    if lengths is not None:
        for i in range(0, count, 32 * size):
            some = order[i : i + 32 * size]
            order[i : i + 32 * size] = some[np.argsort(lengths[some], kind="stable")]

    # the batches
    batches = [order[i : i + size] for i in range(0, count, size)]
    if lengths is not None:
        rng.shuffle(batches)
    return batches


class Batch(NamedTuple):
    """What a process trains on in a step: some of the micro-batches, and counts of all."""

    micro_batches: list[tuple[torch.Tensor, ...]]  # (input ids, real, labels), each (rows, length)
    labelled: int  # tokens to predict
    real: int  # tokens that are not pads
    padded: int  # tokens, pads included


class Phase(NamedTuple):
    """The steps with rows of one length."""

    first_step: int
    rows: Rows


class Batches(torch.utils.data.Dataset):
    """The batch of every step, a function of the seed and the step alone."""

    def __init__(self, phases: list[Phase], args: argparse.Namespace):
        self.phases = phases
        self.args = args
        self.epoch = None  # whose order is in hand: (first step of the phase, epoch)
        self.order = []  # the batches of that epoch, as indices of rows

    def phase(self, step: int) -> Phase:
        """The phase that this step is in."""
        begun = [Phase(first_step, rows) for first_step, rows in self.phases if first_step <= step]
        return begun[-1]

    def row_indices(self, step: int) -> np.ndarray:
        """Which rows a step reads. Rows of an epoch that fill no batch are left out."""
        # where in which epoch the step is
        first_step, rows = self.phase(step)
        size = self.args.batch_size
        epoch, place = divmod(step - first_step, len(rows) // size)

        # the order of the epoch, if it is another one than that of the last step
        if self.epoch != (first_step, epoch):
            rng = np.random.default_rng((self.args.seed, ORDER, first_step, epoch))
            lengths = rows.lengths() if self.args.bucket else None
            batches = shuffled_batches(len(rows), size, rng, lengths)
            self.order = [indices for indices in batches if len(indices) == size]
            self.epoch = (first_step, epoch)
        return self.order[place]

    def masked_rows(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The batch of all processes: (input ids, real, labels), each (batch, length)."""
        # the rows
        rows = self.phase(step).rows
        ids, real = rows.batch(self.row_indices(step))

        # their masks
        rng = np.random.default_rng((self.args.seed, MASKING, step))
        inputs, labels = mask_tokens(ids, rows.vocabulary, self.args.mask_rate, rng)
        return inputs, real, labels

    def __getitem__(self, step: int) -> Batch:
        """What this process trains on in a step."""
        inputs, real, labels = self.masked_rows(step)
        length = self.phase(step).rows.length
        parts = micro_batches((inputs, real, labels), rows_at_once(self.args, length))
        return Batch(
            micro_batches=parts[RANK::PROCESSES],  # every n-th for each of n processes
            labelled=max(1, int((labels != IGNORED).sum())),
            real=int(real.sum()),
            padded=sum(part[0].numel() for part in parts),
        )


def rows_at_once(args: argparse.Namespace, length: int) -> int:
    """How many rows of this length go through the model at once.

    Shorter rows come in multiples of --micro-batch-size, with no more tokens than the longest ones,
    since small micro-batches leave a GPU idle. A multiple must divide the batch evenly among the
    processes. So their number can change which rows share a micro-batch, and with it the dropout.
    """
    size = args.micro_batch_size
    longest = max(length for length, _ in args.length_schedule)

    # the largest of the multiples that fit
    multiples = range(1, longest // length + 1)
    fitting = [n for n in multiples if args.batch_size % (size * n * PROCESSES) == 0]
    return size * max(fitting)


def micro_batches(batch: tuple[np.ndarray, ...], size: int) -> list[tuple[torch.Tensor, ...]]:
    """(inputs, real, labels) of `size` rows each, cut to the longest of them.

    Its length is rounded up to a multiple of 32, unless the batch itself is narrower: the fewer
    different lengths there are, the more often a GPU finds memory and compiled kernels that fit.
    """
    parts = []
    for i in range(0, len(batch[0]), size):
        arrays = [array[i : i + size] for array in batch]

        # cut them
        longest = int(arrays[1].sum(axis=1).max())
        longest = 32 * math.ceil(longest / 32)
        arrays = [np.ascontiguousarray(array[:, :longest]) for array in arrays]
        parts.append(tuple(map(torch.from_numpy, arrays)))
    return parts


def batches_ahead(
    args: argparse.Namespace, phases: list[Phase], steps: range
) -> torch.utils.data.DataLoader:
    """The batches of these steps; beside a GPU two processes prepare them, in pinned memory."""

    def ignore_signals(_):  # those are for the process that trains
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)

    # on a CPU they would take from the cores that train
    on_gpu = torch.cuda.is_available()
    workers = {}
    if on_gpu:
        workers["num_workers"] = 2
        workers["multiprocessing_context"] = "fork"
        workers["worker_init_fn"] = ignore_signals
    return torch.utils.data.DataLoader(
        Batches(phases, args), batch_size=None, sampler=steps, pin_memory=on_gpu, **workers
    )


# ---- What training reads, and the held-out loss ----


class InitialModel(NamedTuple):
    """What a run with --init starts from."""

    model: MaBERTForMaskedLM
    tokenizer: Tokenizer
    digest: str  # of its model.pt, which is part of the run's identity


def load_initial_model(args: argparse.Namespace, checkpoint: Path | None) -> InitialModel | None:
    """The model of --init, with positions for the longest rows; None without --init.

    If that folder is gone, the checkpoint to resume from stands in for it: it has the same fields
    and tokenizer, the digest, and newer weights. SystemExit where the folder cannot be used.
    """
    if not args.init:
        return None

    # the folder to read
    folder = Path(args.init)
    digest = None
    if checkpoint and not folder.exists():
        _, training = read_checkpoint(checkpoint)
        digest = training["identity"].get("init")  # None: the run began without --init
        folder = checkpoint if digest else folder

    # the model
    overrides = {} if args.dropout is None else dict(dropout=args.dropout)
    try:
        model = PretrainedModel.from_pretrained(folder, **overrides).train()
    except (OSError, ValueError) as error:
        raise SystemExit(f"--init: {error}") from error
    if not isinstance(model, MaBERTForMaskedLM):
        raise SystemExit(
            f"--init: {folder} holds a {type(model).__name__}, which has no head to predict masked "
            "tokens: give the pretrained model that it was made from"
        )

    # its tokenizer
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    size = vocabulary_size(tokenizer)
    most = model.config.vocab_size
    if size > most:
        raise SystemExit(f"--init: {folder}'s tokenizer has {size} tokens, its model {most}")

    # positions for longer rows
    longest = max(length for length, _ in args.length_schedule)
    positions = model.config.max_position
    if longest > positions:
        model.encoder.resize_positions(longest)
        print(f"{folder}: its {positions} positions are stretched to {longest}")

    # the digest, unless the checkpoint had it
    if digest is None:
        content = (folder / "model.pt").read_bytes()
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    return InitialModel(model, tokenizer, digest)


class Data(NamedTuple):
    """What training reads."""

    initial: InitialModel | None  # with --init
    config: MaBERTConfig  # of the model
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    phases: list[Phase]  # one for each length of --length-schedule
    held_rows: Rows  # which training never sees
    held_out: tuple[np.ndarray, ...]  # some of them, masked once for all: (inputs, real, labels)
    baselines: tuple[float, float]  # see guessing_losses
    checksum: int  # of the tokens


def prepare(args: argparse.Namespace, checkpoint: Path | None = None) -> Data:
    """Everything that training reads; with a checkpoint, no tokenizer is trained again.

    The first process chooses or trains the tokenizer and writes the tokens; the others wait, and
    then read the same.
    """
    # tokenizer and tokens
    initial = load_initial_model(args, checkpoint)
    prepared = None
    if RANK == 0:
        sources = text_sources(args)
        if initial:
            tokenizer = initial.tokenizer
        else:
            tokenizer = choose_tokenizer(args, sources, checkpoint)
        prepared = tokenizer.to_str(), token_folder(args, sources, tokenizer)
    tokenizer_json, folder = gathered(prepared)[0]  # the others wait here for the first
    tokenizer = in_our_form(Tokenizer.from_str(tokenizer_json))
    tokens = read_tokens(folder, tokenizer)

    # the model's config
    vocabulary = special_ids(tokenizer)
    if initial:
        config = initial.model.config
    else:
        config = model_config(args, vocabulary_size(tokenizer), vocabulary.pad)

    # rows
    seen, held = split_held_out(tokens)
    phases = rows_of_phases(args, tokens, seen, vocabulary)
    held_rows = Rows(tokens, held, args.length_schedule[0][0], vocabulary)
    fewest = min(len(phase.rows) for phase in phases)
    if fewest < args.batch_size or not len(held_rows):
        raise SystemExit(
            f"the corpus is too short: {len(tokens.ids)} tokens give {fewest} training rows and "
            f"{len(held_rows)} held-out ones; a batch is {args.batch_size} rows. Add text or lower "
            "--batch-size"
        )

    # what the held-out loss is computed on
    held_out = mask_held_out(held_rows, args.mask_rate)
    baselines = guessing_losses(tokens, held, held_out[2], vocabulary)
    print(f"held-out loss on {len(held_out[0])} rows of {len(held_rows)}")
    return Data(
        initial=initial,
        config=config,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        phases=phases,
        held_rows=held_rows,
        held_out=held_out,
        baselines=baselines,
        checksum=tokens.checksum,
    )


def rows_of_phases(
    args: argparse.Namespace, tokens: Tokens, segments: np.ndarray, vocabulary: Vocabulary
) -> list[Phase]:
    """A phase for each length in --length-schedule."""
    phases = []
    begin = 0.0
    for length, share in args.length_schedule:
        # in a short run too, each length but the last gets a step at least
        first_step = max(round(begin), phases[-1].first_step + 1) if phases else 0
        phases.append(Phase(first_step, Rows(tokens, segments, length, vocabulary)))
        if first_step >= args.steps:
            print(f"rows of {length} tokens get none of the {args.steps} steps")
        begin += share * args.steps
    return phases


def mask_held_out(rows: Rows, mask_rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most 512 rows, spread evenly and masked alike in every run: (inputs, real, labels)."""
    indices = np.unique(np.linspace(0, len(rows) - 1, 512).astype(int))
    ids, real = rows.batch(indices)

    # the seed is fixed, so that runs of different seeds can be compared
    inputs, labels = mask_tokens(ids, rows.vocabulary, mask_rate, np.random.default_rng(0))
    if (labels == IGNORED).all():
        raise SystemExit("no held-out token is masked: add text or raise --mask-rate")
    return inputs, real, labels


def guessing_losses(
    tokens: Tokens, held: np.ndarray, labels: np.ndarray, vocabulary: Vocabulary
) -> tuple[float, float]:
    """(by frequency, by chance): losses to compare the held-out loss with, in nats.

    They are those of predicting masked tokens by their frequency in the training text, and
    uniformly.
    """
    # how often each id is in the training text, plus one, so that no id is impossible
    held_ids = np.concatenate([tokens.ids[start:end] for start, end in held])
    counts = tokens.counts + 1 - np.bincount(held_ids, minlength=len(tokens.counts))
    counts[vocabulary.is_special] = 0

    # the mean of -log(probability) over the masked tokens
    labels = labels[labels != IGNORED]  # (masked,)
    by_frequency = np.log(counts.sum()) - np.log(counts[labels]).mean()
    by_chance = math.log((~vocabulary.is_special).sum())
    return float(by_frequency), by_chance


# PyTorch's kernels for attention, in the order in which they are tried; one that does not take a
# mask is passed over
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@contextlib.contextmanager
def autocast(device: torch.device):
    """On a GPU bf16, and the first of the kernels above that can run; nothing elsewhere."""
    if device.type != "cuda":
        yield
        return
    with torch.autocast("cuda", dtype=torch.bfloat16), sdpa_kernel(ATTENTION, set_priority=True):
        yield


@torch.no_grad()
def held_out_loss(model: MaBERTForMaskedLM, data: Data, micro_batch_size: int) -> float:
    """The mean loss over the masked tokens, in nats; SystemExit where it is not finite."""
    device = model.decoder_bias.device
    parts = micro_batches(data.held_out, micro_batch_size)
    total = 0.0

    # sum over the micro-batches
    model.eval()
    for part in progress(parts, "held-out loss", leave=False, delay=5):
        inputs, real, labels = (tensor.to(device) for tensor in part)
        with autocast(device):
            total += model(inputs, real, labels=labels, reduction="sum").loss.item()
    model.train()

    # the mean, if it is finite
    if not math.isfinite(total):
        raise SystemExit(f"the held-out loss is {total}: a lower --lr or more --warmup-steps helps")
    return total / (data.held_out[2] != IGNORED).sum()


@torch.no_grad()
def show_guesses(model: MaBERTForMaskedLM, data: Data):
    """Prints up to five held-out texts, a word masked, and the model's five best guesses for it."""
    name = data.tokenizer.id_to_token
    shown = 0
    model.eval()
    for index in np.linspace(0, len(data.held_rows) - 1, 50).astype(int):
        # words that were not cut into pieces: tokens of letters that are followed by such a token
        ids, _ = data.held_rows.batch(np.array([index]))
        tokens = [name(i) for i in ids[0]]
        pairs = itertools.pairwise(tokens)
        words = [i for i, pair in enumerate(pairs) if pair[0].isalpha() and pair[1].isalpha()]
        if len(words) <= 5 or shown == 5:
            continue
        shown += 1

        # mask the one in the middle and ask
        place = words[len(words) // 2]
        ids[0, place] = data.vocabulary.mask
        logits = model(torch.from_numpy(ids).to(model.decoder_bias.device)).logits
        values, best = logits[0, place].softmax(dim=-1).topk(5)
        guesses = [f"{name(i)!r} {p:.2f}" for p, i in zip(values.tolist(), best.tolist())]

        # the text around it
        around = ids[0, max(1, place - 12) : place + 9].tolist()
        text = data.tokenizer.decode(around, skip_special_tokens=False)
        print(f"  ... {text} ...")
        print(f"      it was {tokens[place]!r}; guesses: {', '.join(guesses)}")


# ---- Files of a run ----

# The columns of log.csv
COLUMNS = (
    "step",  # how many are finished
    "loss",  # nats per masked token, the mean over steps since the last line with finite gradients
    "held_out_loss",  # nats per masked token, after this step
    "lr",  # of this step
    "tokens_per_s",  # without pads, since the last line; evaluating does not count, saving does
    "padding",  # share of the tokens that are pads, since the last line
    "skipped_steps",  # without finite gradients, since the start of the run
)

# The flags that a run is a function of, besides those of the model
IDENTITY = (
    "steps",
    "length_schedule",
    "batch_size",
    "micro_batch_size",
    "bucket",
    "lr",
    "warmup_steps",
    "weight_decay",
    "mask_rate",
    "seed",
)


def write_atomically(file: Path, text: str):
    """Writes a file that appears complete or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def identity_of(args: argparse.Namespace, data: Data) -> dict:
    """All that a run is a function of; a checkpoint of another run cannot be resumed."""
    # the model and its training
    identity = dataclasses.asdict(data.config)
    identity["init"] = data.initial and data.initial.digest
    identity |= {name: getattr(args, name) for name in IDENTITY}

    # the tokenizer and the text
    identity["trained_vocab_size"] = args.vocab_size  # None: the tokenizer was not trained
    identity["tokenizer"] = digest_of(data.tokenizer.to_str())
    identity["corpus"] = data.checksum
    return json.loads(json.dumps(identity))  # tuples become lists, as JSON has them


def save_checkpoint(
    out: Path, keep: int, model: MaBERTForMaskedLM, tokenizer: Tokenizer, training: dict
):
    """Writes out/step-…, which appears complete or not at all; removes all but the last `keep`."""
    # write it under another name, and rename it
    step = training["step"]
    folder = out / f"step-{step:07d}"
    partial = folder.with_suffix(".partial")
    try:
        model.save_pretrained(partial)
        write_atomically(partial / "tokenizer.json", tokenizer.to_str(pretty=True))
        torch_save(training, partial / "training.pt")
        remove(folder)  # a damaged one, if any
        os.replace(partial, folder)
    finally:
        # what an error leaves would fill the disk for nothing
        shutil.rmtree(partial, ignore_errors=True)

    # later checkpoints are damaged, or the run would not be here: they do not count
    written = [old for old in step_folders(out) if step_of(old) <= step]
    for old in written[:-keep]:
        remove(old)


def remove(path: Path):
    """Removes a folder, a file or a link, if it is there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def step_folders(out: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    folders = [path for path in out.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The number of finished steps that a checkpoint's name tells."""
    return int(folder.name.removeprefix("step-"))


def read_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(weights, training); exceptions of many kinds where a file is damaged or no file of ours."""
    # can all three be read, and are they of a model? The weights are read twice: from_pretrained
    # makes a new head where the file's does not fit, but load_state_dict refuses it
    Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights = torch_load(folder / "model.pt")
    training = torch_load(folder / "training.pt")
    MaBERTForMaskedLM.from_pretrained(folder).load_state_dict(weights)

    # is it a checkpoint of training?
    names = ("step", "identity", "log", "sums", "skipped_in_a_row", "optimizer")
    return weights, {name: training[name] for name in names}


def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that can be read; None where a young run has not saved any."""
    folders = step_folders(out)
    for folder in reversed(folders):
        try:
            read_checkpoint(folder)
            return folder
        except MemoryError:
            raise
        except Exception as error:
            print(f"the checkpoint {folder} is damaged: {textwrap.shorten(repr(error), 300)}")
    if folders:
        raise SystemExit(
            f"--resume: no checkpoint in {out} can be read; --overwrite starts the run anew"
        )

    # the checkpoints of a finished run were removed: it does not start again
    if (out / "model.pt").exists():
        raise SystemExit(
            f"--resume: {out} holds a model but no checkpoint; --overwrite starts the run anew"
        )
    return None


def write_log(out: Path, log: list[dict]):
    """log.csv; a line has only some of the columns."""
    lines = [",".join(COLUMNS)]
    for line in log:
        lines.append(",".join(str(line.get(name, "")) for name in COLUMNS))
    write_atomically(out / "log.csv", "\n".join(lines) + "\n")


def draw_curve(out: Path, log: list[dict]) -> Path:
    """Draws the losses as loss.png, if matplotlib is there; returns that file, or else log.csv."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return out / "log.csv"

    # a line for each loss
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("loss", "held_out_loss"):
        lines = [line for line in log if name in line]
        steps = [line["step"] for line in lines]
        losses = [float(line[name]) for line in lines]
        axes.plot(steps, losses, label=name)

    # labels and file
    axes.set(xlabel="step", ylabel="nats per masked token")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
    return out / "loss.png"


# ---- Training ----


def warmup_of(args: argparse.Namespace) -> int:
    """The steps of warm-up: at most a tenth, or a short run would never leave it."""
    return min(args.warmup_steps, args.steps // 10)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up from 0, then linear decay to 0; steps count from 0."""
    return peak * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with BERT's values. The learning rate is set before each step."""
    # weight decay on matrices alone
    decayed = []
    others = []
    for name, p in model.named_parameters():
        if p.dim() >= 2 and not name.endswith("A_log"):
            decayed.append(p)
        else:
            others.append(p)
    groups = [
        dict(params=decayed, weight_decay=weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6, fused=True)


def make_model(
    args: argparse.Namespace, data: Data
) -> tuple[MaBERTForMaskedLM, torch.nn.Module, torch.optim.Optimizer]:
    """(model, shared, optimizer).

    `shared` is what training calls: with several processes the model's DistributedDataParallel,
    by which they exchange their gradients; with one process the model itself.
    """
    # a GPU for each process, if there are any
    device = torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if LOCAL_RANK >= count:
            raise SystemExit(f"there are more processes than GPUs ({count}) on this machine")
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)

    # the same weights in every process
    torch.manual_seed(args.seed)
    model = data.initial.model if data.initial else MaBERTForMaskedLM(data.config)
    model = model.to(device)

    # what changes the cost alone
    if args.activation_checkpointing:
        for layer in model.encoder.layers:
            layer.forward = functools.partial(
                torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False
            )

    # say what will run
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{data.config.pattern}, {parameters / 1e6:.1f} M parameters, on {PROCESSES} × {device}")

    # compile and share it
    if args.compile:
        compile_model(model, args)
    shared = DistributedDataParallel(model) if PROCESSES > 1 else model
    return model, shared, make_optimizer(model, args.weight_decay)


def compile_model(model: MaBERTForMaskedLM, args: argparse.Namespace):
    """Compiles the encoder, and the head with its loss; where that fails, the model stays as it is.

    Batches of all sizes and lengths share a graph, but for those of a single row.
    """
    print("compiling the model takes minutes; --no-compile does without", flush=True)
    model.encoder.compile(dynamic=True)
    model.loss_and_logits = torch.compile(model.loss_and_logits, dynamic=True)

    # the first call compiles
    try:
        rehearse(model, args)
    except Exception as error:  # a compiler may lack anything, and fail in any way
        if is_out_of_memory(error):
            raise
        reason = textwrap.shorten(str(error), 300)
        print(f"compiling failed, so the model runs without it: {reason}")
        model.encoder.compile(disable=True)
        del model.loss_and_logits  # the class's method is back
        model.zero_grad()


def train_step(
    shared: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over the micro-batches of all processes.

    Returns the mean loss over the batch's labelled tokens, and whether a gradient was not finite
    (0. or 1.), in which case the weights and the optimizer stay as they are. Both stay on the
    device: reading them would make the CPU wait for a GPU.
    """
    device = next(shared.parameters()).device
    total = torch.zeros((), device=device)
    for i, (inputs, real, labels) in enumerate(batch.micro_batches):
        # labels stay on the CPU, where the model counts them without waiting for a GPU
        inputs = inputs.to(device, non_blocking=True)
        real = real.to(device, non_blocking=True)

        # of n processes, the r-th has every n-th micro-batch from the r-th on
        rng = np.random.default_rng((args.seed, DROPOUT, step, RANK + i * PROCESSES))
        torch.manual_seed(int(rng.integers(2**63)))

        # forward and backward; gradients are exchanged once, with the last micro-batch
        exchange = contextlib.nullcontext()
        if PROCESSES > 1 and i + 1 < len(batch.micro_batches):
            exchange = shared.no_sync()
        with exchange:
            with autocast(device):
                loss = shared(inputs, real, labels=labels, reduction="sum").loss / batch.labelled
            # DistributedDataParallel takes the mean over processes; the sum is meant
            (loss * PROCESSES).backward()
        total += loss.detach()
    if PROCESSES > 1:
        dist.all_reduce(total)

    # clip the gradient's norm to 1, as BERT does
    norm = clip_grad_norm_(shared.parameters(), 1.0)
    skipped = (~norm.isfinite()).float()

    # update; found_inf is how PyTorch's GradScaler tells a fused optimizer to leave all as it is
    optimizer.found_inf = skipped
    optimizer.step()
    optimizer.zero_grad()
    return total, skipped


def rehearse(model: MaBERTForMaskedLM, args: argparse.Namespace):
    """Forward and backward with the longest rows.

    So most shortages of memory show before the first step. AdamW's state comes on top of it.
    """
    # a micro-batch of the longest rows, without pads
    length = max(length for length, _ in args.length_schedule)
    size = (args.micro_batch_size, length)
    ids = torch.ones(size, dtype=torch.long, device=model.decoder_bias.device)
    labels = ids.masked_fill(torch.rand(size, device=ids.device) > args.mask_rate, IGNORED)

    # forward and backward
    with autocast(ids.device):
        loss = model(ids, torch.ones_like(ids).bool(), labels=labels, reduction="sum").loss
    loss.backward()
    model.zero_grad()


def zero_sums(device: torch.device) -> dict:
    """Sums since the last line of the log.

    Those of a step's results stay on the device: reading one makes the CPU wait for a GPU.
    """
    return dict(
        loss=torch.zeros((), dtype=torch.float64, device=device),  # of steps with finite gradients
        skipped=torch.zeros((), device=device),  # steps without
        real=0,  # tokens that are not pads
        padded=0,  # tokens, pads included
    )


def restore(
    checkpoint: Path | None, model: MaBERTForMaskedLM, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict], dict, torch.Tensor]:
    """Gives model and optimizer what a checkpoint holds.

    Returns the number of finished steps, the log, the sums since its last line, and how many steps
    without finite gradients there were in a row. Without a checkpoint all are zero or empty.
    """
    # from the start
    device = model.decoder_bias.device
    if checkpoint is None:
        return 0, [], zero_sums(device), torch.zeros((), device=device)

    # from a checkpoint
    weights, training = read_checkpoint(checkpoint)
    model.load_state_dict(weights)
    optimizer.load_state_dict(training["optimizer"])
    sums = training["sums"]
    for name in ("loss", "skipped"):
        sums[name] = sums[name].to(device)
    return training["step"], training["log"], sums, training["skipped_in_a_row"].to(device)


def log_line(step: int, sums: dict, last: dict, lr: float, tokens_per_s: float) -> dict:
    """A line of the log, from the sums since the last line."""
    skipped = int(sums["skipped"])
    finite = step - last["step"] - skipped
    return dict(
        step=step,
        loss=f"{sums['loss'].item() / max(1, finite):.4f}",
        lr=f"{lr:.2e}",
        tokens_per_s=f"{tokens_per_s:.0f}",
        padding=f"{1 - sums['real'] / sums['padded']:.3f}",
        skipped_steps=last["skipped_steps"] + skipped,
    )


def refuse_divergence(skipped_in_a_row: torch.Tensor, lr: float, out: Path):
    """Ends the run if at least the last ten steps had no finite gradient.

    Called when a line is logged and not in every step: reading the count waits for the GPU.
    """
    count = int(skipped_in_a_row)  # waits for a GPU to finish the steps
    if count >= 10:
        # the newest checkpoint, or the word none
        last = ["none", *step_folders(out)][-1]
        raise SystemExit(
            f"no gradient was finite in the last {count} steps, now at learning rate {lr:.2e}: "
            f"a lower --lr or more --warmup-steps helps; last checkpoint {last}"
        )


class Stop:
    """Makes SIGTERM and Ctrl-C wait for the end of a step.

    Several processes must end after the same step, so they have to ask each other. That takes time:
    they do so every 10 steps, or about once a second where steps are slow (after every step, where
    each takes longer), since torchrun kills its processes 30 seconds after a SIGTERM.
    """

    def __init__(self):
        self.received = 0  # the newest signal
        self.asked = None  # when the processes last asked each other: (step, time)
        self.ask_next = 0  # the step after which they ask again
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.receive)

    def receive(self, signum: int, _):
        self.received = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    def signal_after(self, step: int) -> int:
        """The signal that ends the run after this step, or 0."""
        if PROCESSES == 1:
            return self.received
        if step < self.ask_next:
            return 0

        # how long a step takes, on the whole since they have asked last
        now = perf_counter()
        seconds = 1.0
        if self.asked:
            last_step, last_time = self.asked
            seconds = (now - last_time) / (step - last_step)

        # all get the same answers, and so ask next after the same step
        signals, times = zip(*gathered((self.received, seconds)))
        self.asked = (step, now)
        self.ask_next = step + min(10, max(1, int(1 / max(times))))
        return max(signals)


def train(args: argparse.Namespace, data: Data, out: Path, identity: dict, checkpoint: Path | None):
    """Trains, from the checkpoint on if there is one; returns the model and the log."""
    model, shared, optimizer = make_model(args, data)
    device = model.decoder_bias.device

    # restore
    finished, log, sums, skipped_in_a_row = restore(checkpoint, model, optimizer)
    warmup = warmup_of(args)
    steps = f"{args.steps} steps of {args.batch_size} rows, {warmup} of them warm-up"
    print(f"from step {finished} on, of {steps}")

    # rehearse
    if torch.cuda.is_available():
        rehearse(model, args)

    # from here on --out counts as a run; before, it has just a tokenizer
    if RANK == 0:
        write_atomically(out / "args.json", json.dumps(vars(args), indent=2) + "\n")

    # the log begins with the loss before the first step
    if RANK == 0 and finished == 0:
        held_out = held_out_loss(model, data, args.micro_batch_size)
        log.append(dict(step=0, held_out_loss=f"{held_out:.4f}", skipped_steps=0))
        write_log(out, log)

    # the steps that are not finished
    stop = Stop()
    batches = batches_ahead(args, data.phases, range(finished, args.steps))
    bar = progress(batches, initial=finished, total=args.steps, unit="step")

    # tokens_per_s: since when, and how many tokens
    start = perf_counter()
    trained = 0
    for step, batch in enumerate(bar, finished + 1):
        # step; in the schedule and the seeds, steps count from 0
        lr = learning_rate(step - 1, args.steps, args.lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, skipped = train_step(shared, optimizer, batch, step - 1, args)

        # sum up
        sums["loss"] += loss.where(skipped == 0, 0)
        sums["skipped"] += skipped
        sums["real"] += batch.real
        sums["padded"] += batch.padded
        skipped_in_a_row = (skipped_in_a_row + 1) * skipped
        trained += batch.real

        # log and evaluate
        evaluates = step % args.eval_every == 0 or step == args.steps
        if evaluates or step % args.log_every == 0:
            # this waits for a GPU, so the time is that of finished steps
            refuse_divergence(skipped_in_a_row, lr, out)
            if RANK == 0:
                log.append(log_line(step, sums, log[-1], lr, trained / (perf_counter() - start)))
                if evaluates:
                    held_out = held_out_loss(model, data, args.micro_batch_size)
                    log[-1]["held_out_loss"] = f"{held_out:.4f}"
                write_log(out, log)
                bar.set_postfix(log[-1], refresh=False)
            sums = zero_sums(device)
            start = perf_counter()
            trained = 0

        # save
        signum = stop.signal_after(step)
        if RANK == 0 and (step % args.save_every == 0 or step == args.steps or signum):
            training = dict(
                step=step,
                identity=identity,
                log=log,
                sums=sums,
                skipped_in_a_row=skipped_in_a_row,
                optimizer=optimizer.state_dict(),
            )
            save_checkpoint(out, args.keep, model, data.tokenizer, training)
        if signum:
            name = signal.Signals(signum).name
            print(f"\nstopped by {name} after step {step}, which is saved; --resume goes on")
            raise SystemExit(128 + signum)  # as a shell expects it
    return model, log


def finish(
    args: argparse.Namespace, data: Data, out: Path, model: MaBERTForMaskedLM, log: list[dict]
):
    """Writes the model and says what came of the run."""
    model.save_pretrained(out)

    # the loss beside those of guessing
    loss = float(log[-1]["held_out_loss"])
    by_frequency, by_chance = data.baselines
    masked = (data.held_out[2] != IGNORED).sum()
    side = "below" if loss < by_frequency else "above"
    print(
        f"\nheld-out loss {loss:.3f} nats per masked token ({masked} of them); the training text's "
        f"word frequencies give {by_frequency:.3f}, chance {by_chance:.3f}\n"
        f"{abs(by_frequency - loss):.2f} nats {side} the word frequencies."
    )

    # what the model can do, and where it is
    print("Held-out text, a word masked:")
    with torch.compiler.set_stance("force_eager"):  # five texts are not worth compiling for
        show_guesses(model, data)
    curve = draw_curve(out, log)
    print(f"\nThe model is in {out}, its curve in {curve}. Try it:")
    print(f'  python mabert.py {out} "text with a [MASK]"')


# ---- The processes of a run, and what may stop them ----


def join_processes():
    """Connects the processes of torchrun: CPU tensors over gloo, GPU tensors over NCCL.

    They wait up to a day for each other, since the first prepares the text alone.
    """
    # torchrun's own store has the addresses from before a restart (pytorch issue 135712)
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False)
        store = dist.PrefixStore(f"restart {RESTARTS}", store)

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    day = datetime.timedelta(days=1)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=PROCESSES, timeout=day)


def gathered(value) -> list:
    """The values of all processes, in order.

    Also a barrier: no process returns before all have called it.
    """
    values = [value] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def locked(file: Path, wait: bool = False):
    """Inside of `with locked(file)`, this process alone has the lock of that (empty) file.

    The lock ends with the process too, however it ends. If another process has it: waits, or
    SystemExit.
    """
    with open(file, "a") as opened:
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl

            try:
                fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if not wait:
                    message = f"another run is writing to {file.parent}; choose another --out"
                    raise SystemExit(message) from None
                print("waiting for another process that prepares the same text", flush=True)
                fcntl.lockf(opened, fcntl.LOCK_EX)
        yield


def run(args: argparse.Namespace):
    """Checks and locks --out, and runs there; SystemExit where it holds another run."""
    # after a restart by torchrun the checkpoints of this very run are there: go on from them
    if RESTARTS:
        args.resume = True
        args.overwrite = False

    # the model that a run starts from is not removed by it
    out = Path(args.out)
    if args.init and args.overwrite and Path(args.init).resolve().is_relative_to(out.resolve()):
        raise SystemExit(
            f"--overwrite: {out} is or holds the folder of --init: choose another --out"
        )

    # all that a run writes, and --out holds already
    names = ("log.csv", "loss.png", "args.json", "config.json", "model.pt")
    old = [out / name for name in names if (out / name).exists()] + step_folders(out)
    is_demo = args.demo and args.out == DEMO["out"]
    if old and not (args.overwrite or args.resume or is_demo):
        raise SystemExit(
            f"{out} holds a run or a model already; choose another --out, --overwrite it, or "
            "--resume it"
        )

    # of several processes only the first writes
    lock = contextlib.nullcontext()
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        lock = locked(out / ".lock")
    with lock:
        run_in(out, args, replaced=[] if args.resume else old)


def run_in(out: Path, args: argparse.Namespace, replaced: list[Path]):
    """Prepares the text and trains; the files to be replaced are removed just before training."""
    # the checkpoint to go on from
    checkpoint = None
    if RANK == 0 and args.resume:
        checkpoint = newest_checkpoint(out)
    checkpoint = gathered(checkpoint)[0]

    # prepare; is it the same run?
    data = prepare(args, checkpoint)
    identity = identity_of(args, data)
    if checkpoint:
        refuse_another_run(checkpoint, identity)

    # everything is there: what an old run has left can go
    if RANK == 0:
        for path in [*replaced, *out.glob("step-[0-9]*.partial")]:
            remove(path)
        write_atomically(out / "tokenizer.json", data.tokenizer.to_str(pretty=True))

    # train
    model, log = train(args, data, out, identity, checkpoint)
    if RANK == 0:
        finish(args, data, out, model, log)


def refuse_another_run(checkpoint: Path, new: dict):
    """SystemExit with all that differs between a checkpoint's run and this one."""
    _, training = read_checkpoint(checkpoint)
    old = training["identity"]

    # name all that differs
    differ = [name for name in new if new[name] != old.get(name)]
    if differ:
        changes = (f"{name} was {old.get(name)} and is now {new[name]}" for name in differ)
        raise SystemExit(f"--resume: {checkpoint} belongs to another run: {'; '.join(changes)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice. A process that takes too much is killed by Linux."""
    reasons = "MemoryError|BrokenProcessPool|out of memory|allocate memory|ALLOC_FAILED"
    return re.search(reasons, f"{type(error).__name__} {error}") is not None


def explain(error: Exception, args: argparse.Namespace) -> str | None:
    """The error and what to do about it, or None where that is not known."""
    # memory
    message = str(error)
    if is_out_of_memory(error):
        return (
            f"out of memory: lower --micro-batch-size (now {args.micro_batch_size}; the batch "
            "stays) or the lengths of --length-schedule, or pass --activation-checkpointing"
            f"\n{message}"
        )

    # the disk
    if isinstance(error, OSError):
        return (
            f"{message}\nFinished checkpoints (in {args.out}) and prepared text (in {args.cache}) "
            "are kept; --resume goes on"
        )

    # the connection between processes
    if PROCESSES > 1 and "gloo" in message:
        return f"process {RANK} lost another, whose message says why\n{message}"
    return None


def main(argv: list[str]):
    """The command; SystemExit with a message where a user can help."""
    args = parse_args(argv)
    stdout = sys.stdout
    try:
        if PROCESSES > 1:
            join_processes()
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # the first process speaks for all
        run(args)
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; finished checkpoints and prepared text are kept, and --resume goes on"
        ) from None
    except (OSError, RuntimeError, MemoryError) as error:
        explanation = explain(error, args)
        if explanation is None:
            raise
        raise SystemExit(explanation) from error

    # leave no trace: a test or a notebook may call this function again
    finally:
        sys.stdout = stdout
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():
            dist.destroy_process_group()


def describe_machine(device: str | None = None) -> str:
    """One line: the device and the packages' versions. None: the GPU, if there is one."""
    # the device
    parts = []
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        parts += [torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}"]
        # not every container, and no AMD machine, has the program that knows the driver
        with contextlib.suppress(OSError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
            parts.append(f"driver {driver}")
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        parts += [model[1] if model else platform.machine(), f"{torch.get_num_threads()} thread(s)"]

    # packages, those that are installed
    packages = "torch triton datasets tokenizers transformers mamba-ssm mambapy"
    for package in packages.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(parts)


class Stdout(io.FileIO):
    """Standard output on which a failed write raises nothing, but is kept in `error`.

    A full disk, or a reader that has ended (`| head`), must not stop a training.
    """

    error = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            return len(data)


def run_program(main: Callable[[list[str]], None]):
    """Calls main with the command's arguments.

    Characters that the terminal lacks become question marks. If something could not be printed,
    SystemExit at the end says why.
    """
    if None in (sys.stdout, sys.stderr):  # closed
        return main(sys.argv[1:])
    raw = Stdout(os.dup(1), "w")
    options = dict(encoding=sys.stdout.encoding, errors="replace", line_buffering=True)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), **options)
    os.dup2(
        2, 1
    )  # `tokenizers` writes there by itself, and panics if that fails: let it use stderr
    main(sys.argv[1:])
    if raw.error:
        raise SystemExit(f"all is done, but not all of it could be printed: {raw.error}")


if __name__ == "__main__":
    run_program(main)
