"""Pretrains MaBERT with masked language modelling.

    python train_mlm.py --demo                          # minutes on a laptop: no network, no GPU
    python train_mlm.py --steps 100000                  # the paper's 10 % budget: Wikipedia + BookCorpus from the hub
    python train_mlm.py --data texts/ --vocab-size 8192 --steps 5000 --hidden-size 256 --num-heads 4 ...
    python train_mlm.py ... --resume                    # goes on after the newest checkpoint of a stopped run
    torchrun --nproc-per-node 8 train_mlm.py ...        # the same run, shared by eight GPUs
    python train_mlm.py ... --profile 20                # where the time of a step goes

In order: arguments · text · tokens · rows and masking · what training reads · files of a run · training · the processes
of a run · where the time goes.

Everything random is a function of the seed, the step and the micro-batch: which rows a step reads, where they are
masked, dropout. So there is no random state to keep, and resuming changes nothing. The number of processes changes at
most dropout, where it changes how many of the shorter rows go at once (rows_at_once).
The run's folder (--out) ends with config.json, model.pt and tokenizer.json, which `from_pretrained(out)` reads, beside
log.csv, args.json and a folder for each of the last checkpoints (step-0050000/), which `from_pretrained` reads too.
"""

import argparse
import ast
import contextlib
import dataclasses
import datetime
import errno
import functools
import glob
import hashlib
import importlib.metadata
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
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

# Idle OpenMP threads spin for milliseconds by default: beside any other busy process that slows a run down many times
# over. Without any spinning a small model's many short operations wait for threads to wake up. Read when torch loads.
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
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mabert import PSM_STAGES, MaBERT, MaBERTConfig, MaBERTForMaskedLM, torch_load

RANK, LOCAL_RANK, PROCESSES, RESTARTS = (
    int(os.environ.get(name, n))
    for name, n in (
        ("RANK", 0),
        ("LOCAL_RANK", 0),
        ("WORLD_SIZE", 1),
        ("TORCHELASTIC_RESTART_COUNT", 0),
    )
)
tqdm = functools.partial(tqdm, disable=RANK > 0)  # of torchrun's processes the first speaks

# ---- Arguments: the defaults are the paper's protocol, where our copy of it has the value, else BERT's ----

HUB_CORPUS = (("wikimedia/wikipedia", "20231101.en"), ("lucadiliello/bookcorpusopen", "default"))
HUB_TOKENIZER = "google-bert/bert-base-uncased"
WITHOUT_HUB = "without the hub, pass --data PATH, and --tokenizer a tokenizer.json or --vocab-size N to train one"
MAX_VOCAB = 65_535  # token ids are kept as uint16
MODEL = (
    "pattern",
    "hidden_size",
    "num_heads",
    "intermediate_size",
    "d_state",
    "dropout",
)  # fields of MaBERTConfig
DEMO = dict(
    out="out/demo",
    vocab_size=4096,
    pattern="MWT",
    hidden_size=128,
    num_heads=4,
    intermediate_size=512,
)
DEMO |= dict(
    d_state=8,
    dropout=0.0,
    steps=1000,
    length_schedule=[(64, 1.0)],
    batch_size=24,
    bucket=True,
    lr=2e-3,
)
DEMO |= dict(warmup_steps=100, mask_rate=0.3, eval_every=200, log_every=25)


def bounded(kind: type, low: float, high: float = math.inf):
    """A type for argparse: an int or a float, finite, in [low, high)."""

    def parse(text: str):
        if not low <= (value := kind(text)) < high:
            raise argparse.ArgumentTypeError(f"{text} must be finite and in [{low}, {high})")
        return value

    parse.__name__ = kind.__name__  # which argparse says: invalid int value
    return parse


def psm_stages(text: str) -> tuple[str, ...]:
    """A type for argparse: stages of padding-safe masking, joined by +, or none."""
    stages = () if text == "none" else tuple(text.split("+"))
    if not set(stages) <= set(PSM_STAGES):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not none, or any of {', '.join(PSM_STAGES)} joined by +"
        )
    return stages


def length_share(text: str) -> tuple[int, float]:
    length, share = text.split(":")
    return bounded(int, 8, 2**16)(length), bounded(float, 1e-9, 1.01)(share)


def parse_args(argv: list[str]) -> argparse.Namespace:
    base, positive, about = MaBERTConfig(), bounded(int, 1), argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        usage="python train_mlm.py [--demo] [--data PATH ...] [--steps N] ...: --help lists all flags",
        description="Pretrain MaBERT with masked language modelling. Defaults are the paper's protocol.",
        formatter_class=about,
        allow_abbrev=False,
    )
    # fmt: off
    group = parser.add_argument_group("the run")
    add, one_of = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--out", default="out/mlm", help="the run's folder")
    one_of("--resume", action="store_true", help="go on after the newest checkpoint in --out, if there is one")
    one_of("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--seed", type=bounded(int, 0), default=0, help="of all that is random")
    add("--save-every", type=positive, default=1_000, help="steps between checkpoints; the last step gets one too")
    add("--keep", type=positive, default=3, help="checkpoints to keep, the last ones")
    add("--eval-every", type=positive, default=1_000, help="steps between held-out losses")
    add("--log-every", type=positive, default=100, help="steps between lines of log.csv")
    add("--profile", type=positive, metavar="STEPS", help="say where the time of so many steps of each length goes")
    group = parser.add_argument_group("text")
    add, one_of = group.add_argument, group.add_mutually_exclusive_group().add_argument
    one_of("--demo", action="store_true", help="a small model on text that every Python carries; replaces out/demo")
    one_of("--data", nargs="+", metavar="PATH", help=".txt, .json, .jsonl or .parquet files, or folders of them, with "
           "a column 'text', instead of English Wikipedia and BookCorpus from the hub")
    add("--sample-by", choices=("document", "paragraph", "line"), default="document", help="what is one document in a "
        ".txt file: all of it, a block between blank lines, a line")
    one_of = group.add_mutually_exclusive_group().add_argument
    one_of("--tokenizer", help=f"a tokenizer.json or a name on the hub; without --vocab-size, {HUB_TOKENIZER}")
    one_of("--vocab-size", type=bounded(int, 100, MAX_VOCAB + 1), help="train a tokenizer of so many pieces on the text")
    add = parser.add_argument_group("model").add_argument
    for name in MODEL:
        default = getattr(base, name)
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"see MaBERTConfig.{name}")
    add("--psm", type=psm_stages, default="+".join(base.psm), metavar="STAGES", help="stages of padding-safe masking, or none")
    add("--causal-conv", action=argparse.BooleanOptionalAction, default=base.causal_conv, help="or one that is centred")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, default=1_000_000, help="the paper's budgets: 100000, 250000, 500000 and 1000000")
    add("--length-schedule", nargs="+", type=length_share, default=[(128, 0.9), (512, 0.1)], metavar="TOKENS:SHARE",
        help="row lengths and the share of the steps each gets, in order")
    add("--batch-size", type=positive, default=256, help="rows per optimizer step")
    add("--micro-batch-size", type=positive, default=64, help="rows of the longest length that go through the "
        "model at once; of shorter ones more, at most as many tokens")
    add("--lr", type=bounded(float, 1e-30), default=1e-4, help="peak learning rate")
    add("--warmup-steps", type=bounded(int, 0), default=10_000, help="linear warm-up, never over a tenth of the run")
    add("--weight-decay", type=bounded(float, 0), default=0.01, help="on matrices; none on biases, norms, A_log and D")
    add("--mask-rate", type=bounded(float, 1e-9, 1), default=0.15, help="share of the tokens to predict")
    add("--bucket", action="store_true", help="rows of like length together, from 32 batches at a time: less padding")
    add("--activation-checkpointing", action="store_true", help="less memory, more time, the same weights")
    add("--compile", action="store_true", help="torch.compile the encoder")
    # fmt: on
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if args.demo and args.tokenizer:
        args.vocab_size = None
    args.micro_batch_size = min(args.micro_batch_size, args.batch_size)
    if args.batch_size % (args.micro_batch_size * PROCESSES):
        parser.error(f"--batch-size {args.batch_size} is no multiple of --micro-batch-size {args.micro_batch_size} × "
                     f"{PROCESSES} process(es): change it, or lower --micro-batch-size")  # fmt: skip
    if not math.isclose(sum(share for _, share in args.length_schedule), 1):
        parser.error("--length-schedule: the shares must sum to 1, as in 128:0.9 512:0.1")
    try:
        model_config(args, vocab_size=100, pad_token_id=0)
    except ValueError as error:
        parser.error(str(error))
    return args


def model_config(args: argparse.Namespace, vocab_size: int, pad_token_id: int) -> MaBERTConfig:
    sizes = dict(vocab_size=vocab_size, pad_token_id=pad_token_id)
    sizes["max_position"] = max(length for length, _ in args.length_schedule)
    return MaBERTConfig(
        **sizes, **{name: getattr(args, name) for name in (*MODEL, "psm", "causal_conv")}
    )


# ---- Text: a list of corpora, each a Dataset of `datasets` with a column "text", a document a row ----


def demo_texts() -> list[str]:
    """English that every Python carries: its language reference, and docstrings of modules that are not imported."""
    from pydoc_data.topics import topics

    texts, library = list(topics.values()), Path(sysconfig.get_path("stdlib"))
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in the sources
        for file in tqdm(sorted(library.rglob("*.py")), unit="file", desc="reading docstrings"):
            if {"site-packages", "dist-packages", "test", "tests"} & set(
                file.relative_to(library).parts
            ):
                continue
            with contextlib.suppress(
                SyntaxError, ValueError, OSError
            ):  # some files are broken, a few on purpose
                nodes = ast.walk(ast.parse(file.read_bytes()))
                texts += [
                    ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)
                ]
    return [text.encode("utf-8", "replace").decode() for text in dict.fromkeys(texts)]  # each once


def local_files(paths: list[str]) -> dict[str, list[str]]:
    """The files that --data names, each once, by the builder of `datasets` that reads them."""
    builders, files = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}, {}
    for path in map(Path, paths):
        found = [path] if path.is_file() else path.rglob("*")
        found = [
            file
            for file in found
            if file.suffix.lower() in builders and file.is_file() and file.stat().st_size
        ]
        if not found:
            raise SystemExit(
                f"--data: {path} is or has no {', '.join(builders)} file that is not empty"
            )
        for file in found:
            files.setdefault(builders[file.suffix.lower()], set()).add(str(file.resolve()))
    return {builder: sorted(names) for builder, names in files.items()}


def load_corpora(args: argparse.Namespace) -> list:
    import datasets  # takes seconds

    if RANK > 0:
        datasets.disable_progress_bars()
    if args.demo:
        return [datasets.Dataset.from_dict(dict(text=demo_texts()))]
    files, corpora = local_files(args.data or []), []
    for name, config in [(kind, None) for kind in files] or HUB_CORPUS:
        options = dict(sample_by=args.sample_by) if name == "text" else {}
        options["data_files"] = (
            list(map(glob.escape, files.get(name, []))) or None
        )  # names, not patterns
        try:
            corpus = datasets.load_dataset(name, config, split="train", **options).select_columns(
                "text"
            )
            if "string" not in (kind := corpus.features["text"].dtype):
                raise ValueError(f"the column 'text' holds {kind}")
        except (
            Exception
        ) as error:  # datasets raises many kinds, most of them with the reason one level down
            refuse_not_utf8(files)
            error = error.__cause__ or error
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise error from None
            said = f"cannot load {' '.join(files.get(name, [name]))}: {error!r}"
            advice = "a file needs a column 'text' of strings, and a row" if files else WITHOUT_HUB
            raise SystemExit(f"{said}\n{advice}") from error
        corpora.append(corpus)
    return corpora


def refuse_not_utf8(files: dict[str, list[str]]):
    """SystemExit with the first line of the text and JSON files that is not UTF-8, if there is one."""
    for file in files.get("text", []) + files.get("json", []):
        for i, line in enumerate(open(file, "rb"), 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise SystemExit(
                    f"{file}, line {i}: not UTF-8 ({error.reason}); convert it"
                ) from error


# ---- Tokens ----

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PART = (
    2**28
)  # bytes of text that are tokenized and kept together: an interrupted preparation loses no more


def pieces(text: str | None) -> list[str]:
    """A document cut at white space: a tokenizer takes 100 bytes a character, and shares pieces between the cores."""
    return re.findall(r".{1,20000}(?!\S)|.{1,20000}", text or "", re.DOTALL)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BERT's uncased WordPiece tokenizer, trained on other text.

    The trainer breaks ties between equally frequent pieces by chance, so two trainings may differ in a few of them.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = list(SPECIAL_TOKENS)
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special)
    )
    return in_our_form(tokenizer)


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer.json, or a tokenizer of the hub, in our form; SystemExit says what is wrong with it."""
    local = name.endswith(".json") or Path(name).exists()
    try:
        tokenizer = Tokenizer.from_file(name) if local else Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise SystemExit(
            f"cannot load the tokenizer {name}: {error}" + f"\n{WITHOUT_HUB}" * (not local)
        ) from error
    if missing := [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]:
        raise SystemExit(
            f"the tokenizer {name} has no {', '.join(missing)}; masked language modelling needs them"
        )
    if vocabulary_size(tokenizer) > MAX_VOCAB:
        raise SystemExit(
            f"the tokenizer {name} has {vocabulary_size(tokenizer)} tokens; {MAX_VOCAB} is the most"
        )
    return in_our_form(tokenizer)


def in_our_form(tokenizer: Tokenizer) -> Tokenizer:
    """The form of our rows, whatever a file says: [CLS] a [SEP], or [CLS] a [SEP] b [SEP]; neither cut nor padded."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=special
    )
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; some tokenizers leave ids out."""
    return max(tokenizer.get_vocab().values()) + 1


class Tokens(NamedTuple):
    chunks: list[
        np.ndarray
    ]  # token ids (uint16) without special tokens, in memory maps of whole documents
    starts: np.ndarray  # (chunks + 1,): where they begin
    offsets: np.ndarray  # (documents + 1,): where documents begin, those that are not empty
    counts: np.ndarray  # (vocabulary,): how often each id occurs
    checksum: int

    def span(self, start: int, end: int) -> np.ndarray:
        """The ids of a span within one document."""
        i = np.searchsorted(self.starts, start, side="right") - 1
        return self.chunks[i][start - self.starts[i] : end - self.starts[i]]


def encode(corpus, tokenizer: Tokenizer):
    """Yields (token ids, lengths of documents). Of files `datasets` keeps each finished part, for other runs too."""
    import datasets
    from datasets.fingerprint import Hasher

    def batch_ids(batch: dict) -> dict:
        parts = list(map(pieces, batch["text"]))
        texts, ids = [text for part in parts for text in part], []
        for i in range(0, len(texts), 100):
            encodings = tokenizer.encode_batch_fast(texts[i : i + 100], add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]
        ids, none = iter(ids), np.zeros(0, np.uint16)
        return dict(ids=[np.concatenate([none, *(next(ids) for _ in part)]) for part in parts])

    features = datasets.Features(ids=datasets.List(datasets.Value("uint16")))
    options = dict(batched=True, batch_size=100, remove_columns="text", features=features)
    count = min(len(corpus), 1 + corpus.data.nbytes // PART)
    for i in range(count):
        part = corpus.shard(count, i, contiguous=True)
        key = Hasher.hash(
            (part._fingerprint, tokenizer.to_str(), "1")
        )  # of text and tokenizer, not of code
        done = part.map(
            batch_ids, desc=f"tokens, part {i + 1}/{count}", new_fingerprint=key, **options
        )
        if len(done) != len(part):
            raise ValueError(f"{len(done)} documents instead of {len(part)}")
        for documents in done.data.column("ids").chunks:
            yield documents.flatten().to_numpy(), np.diff(documents.offsets.to_numpy())


def tokenize(corpora: list, tokenizer: Tokenizer) -> Tokens:
    """The text as token ids; SystemExit where there are none to learn from."""
    chunks, lengths, counts, checksum = (
        [],
        [],
        np.zeros(vocabulary_size(tokenizer), dtype=np.int64),
        0,
    )
    try:
        for ids, sizes in itertools.chain(*(encode(corpus, tokenizer) for corpus in corpora)):
            chunks.append(ids)
            lengths.append(sizes)
            checksum = zlib.crc32(ids, checksum)
            for i in range(0, len(ids), 2**22):
                found = np.bincount(ids[i : i + 2**22], minlength=len(counts))
                if len(found) > len(counts):
                    raise ValueError(f"it has token {len(found) - 1}")
                counts += found
            if (sizes < 0).any() or sizes.sum() != len(ids):
                raise ValueError("documents have other lengths")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError) or getattr(
            error, "errno", None
        ):  # the text, a full disk
            raise
        raise SystemExit(f"the cache of `datasets` is damaged ({error}); remove it") from error
    lengths = np.concatenate(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0], dtype=np.int64)])
    if offsets[-1] == 0:
        raise SystemExit("the corpus is empty: no text, or nothing that the tokenizer keeps")
    if counts[tokenizer.token_to_id("[UNK]")] > offsets[-1] / 2:
        raise SystemExit(
            "to the tokenizer most of the text is [UNK]: another language, or no pre-tokenizer?"
        )
    return Tokens(chunks, np.cumsum([0, *map(len, chunks)]), offsets, counts, checksum)


def split_held_out(tokens: Tokens, stripes: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) segments, each (segments, 2) of start and end in the tokens.

    Held out are 5 % of the tokens, at most 2^18, in stripes spread over the corpus so that it is one big document or
    many small ones alike. Segments end where a document or a stripe does.
    """
    total = int(tokens.offsets[-1])
    stripe = max(1, total // stripes)
    held = min(stripe // 20, 2**18 // stripes)
    ends = np.arange(stripe, total + 1, stripe)
    cuts = np.unique(np.concatenate([tokens.offsets, ends, ends - held]))
    segments = np.stack([cuts[:-1], cuts[1:]], axis=1)
    is_held = (segments[:, 0] < ends[-1]) & (segments[:, 0] % stripe >= stripe - held)
    return segments[~is_held], segments[is_held]


# ---- Rows and masking: functions of the seed and the step ----

IGNORED = -100  # the label of positions with nothing to predict


class Vocabulary(NamedTuple):
    """The ids of a tokenizer's special tokens, and a table of all ids that are special: those are never predicted."""

    pad: int
    cls: int
    sep: int
    mask: int
    is_special: np.ndarray  # (vocabulary,) bool

    @classmethod
    def of(cls, tokenizer: Tokenizer):
        ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        is_special = np.isin(np.arange(vocabulary_size(tokenizer)), list(ids.values()))
        return cls(ids["[PAD]"], ids["[CLS]"], ids["[SEP]"], ids["[MASK]"], is_special)


class Rows:
    """The rows of one length that segments of the tokens give: [CLS], a window of one segment, [SEP].

    A segment longer than a row is cut into windows of equal size, so that none is a stump.
    """

    def __init__(self, tokens: Tokens, segments: np.ndarray, length: int, vocabulary: Vocabulary):
        self.tokens, self.segments, self.length, self.vocabulary = (
            tokens,
            segments,
            length,
            vocabulary,
        )
        self.windows = -(-(segments[:, 1] - segments[:, 0]) // (length - 2))  # of each segment
        self.ends = np.cumsum(self.windows)

    def __len__(self) -> int:
        return int(self.windows.sum())

    def spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of these numbers start and end in the tokens."""
        segment = np.searchsorted(self.ends, numbers, side="right")
        (start, end), windows = self.segments[segment].T, self.windows[segment]
        window = numbers - (self.ends[segment] - windows)
        return start + (end - start) * window // windows, start + (end - start) * (
            window + 1
        ) // windows

    def lengths(self) -> np.ndarray:
        """Of all rows, in tokens, (rows,) uint16; some at a time, since there may be tens of millions."""
        blocks = (np.arange(i, min(i + 2**20, len(self))) for i in range(0, len(self), 2**20))
        return np.concatenate(
            [np.subtract(*self.spans(block)[::-1]).astype(np.uint16) for block in blocks]
        )

    def batch(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of these numbers, padded to the longest: (ids int64, real bool), both (rows, length)."""
        starts, ends = self.spans(numbers)
        lengths = ends - starts + 2
        ids = np.full((len(numbers), lengths.max()), self.vocabulary.pad, dtype=np.int64)
        ids[:, 0] = self.vocabulary.cls
        for i, (start, end) in enumerate(zip(starts, ends)):
            ids[i, 1 : lengths[i] - 1] = self.tokens.span(start, end)
        ids[np.arange(len(ids)), lengths - 1] = self.vocabulary.sep
        return ids, np.arange(ids.shape[1]) < lengths[:, None]


def mask_tokens(
    ids: np.ndarray, vocabulary: Vocabulary, mask_rate: float, rng: np.random.Generator
) -> tuple:
    """BERT's masking: (input ids, labels), both (rows, length).

    Every token that is not special is to be predicted with probability mask_rate. Of those, 80 % become [MASK], 10 % a
    random token, 10 % stay. Labels are the original ids there and IGNORED elsewhere.
    """
    chosen = (rng.random(ids.shape) < mask_rate) & ~vocabulary.is_special[ids]
    labels = np.where(chosen, ids, IGNORED)
    fate = rng.random(ids.shape)
    random_ids = rng.choice(np.flatnonzero(~vocabulary.is_special), ids.shape)
    inputs = np.where(chosen & (fate < 0.8), vocabulary.mask, ids)
    return np.where(chosen & (fate >= 0.9), random_ids, inputs), labels


def shuffled_batches(
    count: int, size: int, rng: np.random.Generator, lengths: np.ndarray | None = None
) -> list[np.ndarray]:
    """The numbers of so many rows in batches, every row once, in random order; a batch may be smaller than the others.

    With their lengths, rows of like length are together: those of 32 batches at a time are sorted.
    """
    order = rng.permutation(count)
    if lengths is not None:
        for rows in (order[i : i + 32 * size] for i in range(0, count, 32 * size)):
            rows[:] = rows[np.argsort(lengths[rows], kind="stable")]
    found = [order[i : i + size] for i in range(0, count, size)]
    if lengths is not None:
        rng.shuffle(found)
    return found


class Batch(NamedTuple):
    """What a process trains on in a step: some of the micro-batches, and counts of them all."""

    micro_batches: list[
        tuple[torch.Tensor, ...]
    ]  # (input ids, real, labels), each (micro-batch, length)
    labelled: int  # labelled tokens
    real: int  # tokens that are not pads
    padded: int  # tokens, pads included


class Batches(torch.utils.data.Dataset):
    """The batch of every step, a function of the seed and the step alone."""

    def __init__(self, phases: list[tuple[int, Rows]], args: argparse.Namespace):
        self.phases, self.args, self.epoch, self.order = phases, args, None, []

    def phase(self, step: int) -> tuple[int, Rows]:
        return [phase for phase in self.phases if phase[0] <= step][-1]

    def numbers(self, step: int, first: int, rows: Rows) -> np.ndarray:
        """The rows of a step in a phase that began with step `first`. Those of an epoch that fill no batch stay out."""
        size = self.args.batch_size
        epoch, place = divmod(step - first, len(rows) // size)
        if self.epoch != (first, epoch):
            rng = np.random.default_rng((self.args.seed, 2, first, epoch))
            found = shuffled_batches(
                len(rows), size, rng, rows.lengths() if self.args.bucket else None
            )
            self.epoch, self.order = (
                (first, epoch),
                [numbers for numbers in found if len(numbers) == size],
            )
        return self.order[place]

    def whole(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input ids, real, labels), each (batch, length)."""
        first, rows = self.phase(step)
        ids, real = rows.batch(self.numbers(step, first, rows))
        rng = np.random.default_rng((self.args.seed, 1, step))
        inputs, labels = mask_tokens(ids, rows.vocabulary, self.args.mask_rate, rng)
        return inputs, real, labels

    def __getitem__(self, step: int) -> Batch:
        batch, size = self.whole(step), rows_at_once(self.args, self.phase(step)[1].length)
        parts, real, labelled = micro_batches(batch, size), batch[1].sum(), batch[2] != IGNORED
        padded = sum(part[0].numel() for part in parts)
        return Batch(parts[RANK::PROCESSES], max(1, int(labelled.sum())), int(real), padded)


def rows_at_once(args: argparse.Namespace, length: int) -> int:
    """The rows of a micro-batch: --micro-batch-size of the longest, of shorter ones a multiple with no more tokens, as
    a GPU would wait for the launches of smaller ones. Every process has the same share of the batch."""
    longest, size = max(length for length, _ in args.length_schedule), args.micro_batch_size
    return max(
        size * n
        for n in range(1, longest // length + 1)
        if args.batch_size % (size * n * PROCESSES) == 0
    )


def micro_batches(batch: tuple[np.ndarray, ...], size: int) -> list[tuple[torch.Tensor, ...]]:
    """(inputs, real, labels) of `size` rows each, cut to the longest rounded up to 32 tokens."""
    parts = []
    for rows in (slice(i, i + size) for i in range(0, len(batch[0]), size)):
        longest = 32 * -(-int(batch[1][rows].sum(axis=1).max()) // 32)
        parts.append(
            tuple(torch.from_numpy(np.ascontiguousarray(part[rows, :longest])) for part in batch)
        )
    return parts


def batches_ahead(
    args: argparse.Namespace, phases: list, steps: range
) -> torch.utils.data.DataLoader:
    """The batches of these steps; beside a GPU two processes prepare them, in pinned memory."""
    on_gpu = torch.cuda.is_available()

    def ignore_signals(_):  # those are for the process that trains
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)

    workers = (
        dict(num_workers=2, multiprocessing_context="fork", worker_init_fn=ignore_signals)
        if on_gpu
        else {}
    )
    return torch.utils.data.DataLoader(
        Batches(phases, args), batch_size=None, sampler=steps, pin_memory=on_gpu, **workers
    )


# ---- What training reads, and the held-out loss ----


class Data(NamedTuple):
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    phases: list[tuple[int, Rows]]  # the first step and the rows of each length
    held_rows: Rows
    held_out: tuple[
        np.ndarray, ...
    ]  # (inputs, real, labels): rows that training never sees, masked once and for all
    baselines: tuple[
        float, float
    ]  # held-out loss of guessing by the training text's frequencies, and by chance
    checksum: int  # of the tokens


def prepare(args: argparse.Namespace, kept: Path) -> Data:
    """Everything that training reads. A tokenizer that is trained on the text is kept in a file, for --resume. The
    first process goes first: the others take over its tokenizer, and what it leaves in the cache of `datasets`."""
    if RANK > 0:
        tokenizer = Tokenizer.from_str(gathered(None)[0])
    corpora = load_corpora(args)
    if RANK == 0 and args.vocab_size and not (args.resume and kept.exists()):
        print(
            f"training a tokenizer of {args.vocab_size} word pieces (words of megabytes take minutes)"
        )
        batches = (batch["text"] for corpus in corpora for batch in corpus.iter(100))
        texts = (piece for batch in batches for text in batch for piece in pieces(text))
        tokenizer = train_tokenizer(texts, args.vocab_size)
        if not args.profile and not kept.exists():
            write_atomically(kept, tokenizer.to_str(pretty=True))
    elif RANK == 0:
        tokenizer = load_tokenizer(
            str(kept) if args.vocab_size else args.tokenizer or HUB_TOKENIZER
        )
    tokens = tokenize(corpora, tokenizer)
    if RANK == 0:
        gathered(tokenizer.to_str())
    vocabulary = Vocabulary.of(tokenizer)
    seen, held = split_held_out(tokens)
    phases, first = [], 0.0
    for length, share in args.length_schedule:
        begins = (
            max(round(first), phases[-1][0] + 1) if phases else 0
        )  # each length but the last gets a step at least
        phases.append((begins, Rows(tokens, seen, length, vocabulary)))
        first += share * args.steps
    held_rows, fewest = (
        Rows(tokens, held, args.length_schedule[0][0], vocabulary),
        min(len(rows) for _, rows in phases),
    )
    if fewest < args.batch_size or not len(held_rows):
        raise SystemExit(
            f"the corpus is too short: {tokens.offsets[-1]} tokens give {fewest} training rows and {len(held_rows)} "
            f"held-out ones; a batch is {args.batch_size} rows. Add text or lower --batch-size"
        )
    ids, real = held_rows.batch(np.unique(np.linspace(0, len(held_rows) - 1, 512).astype(int)))
    inputs, labels = mask_tokens(
        ids, vocabulary, args.mask_rate, np.random.default_rng(0)
    )  # the same for every seed
    if (labels == IGNORED).all():
        raise SystemExit("no held-out token is masked: add text or raise --mask-rate")
    print(
        f"{tokens.offsets[-1]} tokens of text; held-out loss on {len(ids)} rows of {len(held_rows)}"
    )
    held_tokens = np.concatenate([tokens.span(start, end) for start, end in held])
    counts = tokens.counts + 1 - np.bincount(held_tokens, minlength=len(tokens.counts))
    counts[vocabulary.is_special] = 0
    unigram = np.log(counts.sum()) - np.log(counts[labels[labels != IGNORED]]).mean()
    baselines = float(unigram), math.log((~vocabulary.is_special).sum())
    checksum = zlib.crc32(tokens.offsets.tobytes(), tokens.checksum)
    return Data(
        tokenizer, vocabulary, phases, held_rows, (inputs, real, labels), baselines, checksum
    )


def autocast(device: torch.device):
    """bf16 on a GPU, nothing elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def held_out_loss(model: MaBERTForMaskedLM, data: Data, micro_batch_size: int) -> float:
    """The mean masked-token loss in nats; SystemExit where it is not finite."""
    model.eval()
    total, device = 0.0, model.decoder_bias.device
    for part in tqdm(
        micro_batches(data.held_out, micro_batch_size), "held-out loss", leave=False, delay=5
    ):
        inputs, real, labels = (tensor.to(device) for tensor in part)
        with autocast(device):
            total += model(inputs, real, labels=labels, reduction="sum").loss.item()
    model.train()
    if not math.isfinite(total):
        raise SystemExit(f"the held-out loss is {total}: a lower --lr or more --warmup-steps helps")
    return total / (data.held_out[2] != IGNORED).sum()


@torch.no_grad()
def show_guesses(model: MaBERTForMaskedLM, data: Data, count: int = 5):
    """Prints held-out text with one word masked, and the model's five best guesses for it."""
    model.eval()
    name = data.tokenizer.id_to_token
    for row in np.linspace(0, len(data.held_rows) - 1, 10 * count).astype(int):
        ids = torch.from_numpy(data.held_rows.batch(np.array([row]))[0])
        words = [
            i
            for i in range(1, ids.shape[1] - 1)
            if name(ids[0, i]).isalpha() and name(ids[0, i + 1]).isalpha()
        ]
        if len(words) > 5 and count > 0:
            place, count = words[len(words) // 2], count - 1
            word, ids[0, place] = name(ids[0, place]), data.vocabulary.mask
            best = model(ids.to(model.decoder_bias.device)).logits[0, place].softmax(dim=-1).topk(5)
            guesses = ", ".join(
                f"{name(i)!r} {p:.2f}" for p, i in zip(*(part.tolist() for part in best))
            )
            text = data.tokenizer.decode(
                ids[0, max(1, place - 12) : place + 9].tolist(), skip_special_tokens=False
            )
            print(f"  ... {text} ...\n      it was {word!r}; guesses: {guesses}")


# ---- Files of a run ----

STEP_FOLDER = "step-" + "[0-9]" * 7
IDENTITY = "vocab_size steps length_schedule batch_size micro_batch_size bucket lr warmup_steps weight_decay mask_rate "
IDENTITY += "seed"


def write_atomically(file: Path, text: str):
    """The file appears whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def identity_of(args: argparse.Namespace, data: Data) -> dict:
    """What a run is a function of; a checkpoint of another cannot be resumed."""
    config = model_config(args, vocabulary_size(data.tokenizer), data.vocabulary.pad)
    tokenizer = hashlib.sha256(data.tokenizer.to_str().encode("utf-8", "replace")).hexdigest()[:16]
    own = dict(tokenizer=tokenizer, corpus=data.checksum) | {
        name: getattr(args, name) for name in IDENTITY.split()
    }
    return json.loads(
        json.dumps(dataclasses.asdict(config) | own)
    )  # tuples become lists, as in older checkpoints


def save_checkpoint(
    out: Path, keep: int, model: MaBERTForMaskedLM, tokenizer: Tokenizer, training: dict
):
    """Writes out/step-…, which appears whole or not at all, and then removes all but the last `keep`."""
    folder = out / f"step-{training['step']:07d}"
    partial = folder.with_suffix(".partial")
    try:
        model.save_pretrained(partial)
        write_atomically(partial / "tokenizer.json", tokenizer.to_str(pretty=True))
        torch.save(training, partial / "training.pt")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one, if any
        os.replace(partial, folder)
    finally:
        shutil.rmtree(
            partial, ignore_errors=True
        )  # after an error it would fill the disk for nothing
    upto = [
        old for old in sorted(out.glob(STEP_FOLDER)) if old <= folder
    ]  # later ones are damaged: not counted
    for old in upto[:-keep]:
        shutil.rmtree(old)


def read_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(weights, training); an Exception of many kinds where a file is damaged or not of this program."""
    Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights, training = (torch_load(folder / name) for name in ("model.pt", "training.pt"))
    MaBERTForMaskedLM.from_pretrained(folder).load_state_dict(weights)
    return weights, {
        name: training[name] for name in ("step", "identity", "log", "totals", "optimizer")
    }


def newest_checkpoint(out: Path) -> tuple[Path | None, dict | None]:
    """The newest checkpoint that is whole, and the identity of its run; None where there is none at all."""
    for folder in sorted(out.glob(STEP_FOLDER), reverse=True):
        try:
            return folder, read_checkpoint(folder)[1]["identity"]
        except MemoryError:
            raise
        except Exception as error:
            print(f"the checkpoint {folder} is damaged: {textwrap.shorten(repr(error), 300)}")
    if any(out.glob(STEP_FOLDER)):
        raise SystemExit(
            f"--resume: no checkpoint in {out} is whole; --overwrite starts the run anew"
        )
    return None, None


def write_log(out: Path, rows: list[dict]):
    columns = "step loss held_out_loss lr tokens_per_s padding skipped_steps".split()
    lines = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    write_atomically(out / "log.csv", "".join(",".join(cells) + "\n" for cells in lines))


def draw_curve(out: Path, rows: list[dict]) -> Path:
    """The loss curves as loss.png, where matplotlib is there; returns the file to look at."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return out / "log.csv"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("loss", "held_out_loss"):
        axes.plot(
            *zip(*((row["step"], float(row[name])) for row in rows if name in row)), label=name
        )
    axes.set(xlabel="step", ylabel="nats per masked token")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
    return out / "loss.png"


# ---- Training ----


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up from 0, then linear decay to 0; steps count from 0."""
    return peak * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with BERT's values. The learning rate is set before each step."""
    decays = {
        name: p.dim() >= 2 and not name.endswith("A_log") for name, p in model.named_parameters()
    }
    groups = [
        dict(
            params=[p for name, p in model.named_parameters() if decays[name] == flag],
            weight_decay=decay,
        )
        for flag, decay in ((True, weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6, fused=True)


def make_model(
    args: argparse.Namespace, data: Data
) -> tuple[MaBERTForMaskedLM, torch.nn.Module, torch.optim.Optimizer]:
    """(model, the same or its DistributedDataParallel, optimizer)."""
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            raise SystemExit(
                f"there are more processes than GPUs ({torch.cuda.device_count()}) on this machine"
            )
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    model = MaBERTForMaskedLM(
        model_config(args, vocabulary_size(data.tokenizer), data.vocabulary.pad)
    ).to(device)
    if args.activation_checkpointing:
        for layer in model.encoder.layers:
            layer.forward = functools.partial(
                torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False
            )
    if args.compile:
        model.encoder.compile()
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    print(
        f"{args.pattern}, {size}, on {PROCESSES} × {device}; {args.steps} steps of {args.batch_size} rows"
    )
    return (
        model,
        DistributedDataParallel(model) if PROCESSES > 1 else model,
        make_optimizer(model, args.weight_decay),
    )


def train_step(
    model, optimizer, batch: Batch, step: int, args: argparse.Namespace, mark=lambda name: None
) -> tuple:
    """One optimizer step over all micro-batches of all processes, on the device, where nothing is read back.

    Returns the mean loss over the batch's labelled tokens, and whether a gradient was not finite (0. or 1.), in which
    case the weights and the optimizer stay as they are. Of n processes, the r-th takes every n-th micro-batch from the
    r-th on; gradients are exchanged once, with the last. `mark` is told what has just ended.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for i, (inputs, real, labels) in enumerate(batch.micro_batches):
        inputs, real = (tensor.to(device, non_blocking=True) for tensor in (inputs, real))
        rng = np.random.default_rng((args.seed, 3, step, RANK + i * PROCESSES))
        torch.manual_seed(int(rng.integers(2**63)))  # for dropout
        last = i + 1 == len(batch.micro_batches)
        with contextlib.nullcontext() if PROCESSES == 1 or last else model.no_sync():
            with autocast(
                device
            ):  # labels stay on the CPU, where the model counts them without waiting for a GPU
                loss = model(inputs, real, labels=labels, reduction="sum").loss / batch.labelled
            mark("forward, rest")
            (
                loss * PROCESSES
            ).backward()  # DistributedDataParallel takes the mean over processes; the sum is meant
            mark("backward, rest")
        total += loss.detach()
    if PROCESSES > 1:
        dist.all_reduce(total)
    not_finite = (~clip_grad_norm_(model.parameters(), 1.0).isfinite()).float()
    optimizer.found_inf = not_finite  # a fused optimizer then does nothing
    optimizer.step()
    optimizer.zero_grad()
    mark("optimizer")
    return total, not_finite


def rehearse(model: MaBERTForMaskedLM, args: argparse.Namespace):
    """A micro-batch of the longest rows, forward and backward: too little memory shows now, not in the last phase."""
    length = max(length for length, _ in args.length_schedule)
    ids = torch.ones(
        args.micro_batch_size, length, dtype=torch.long, device=model.decoder_bias.device
    )
    labels = ids.masked_fill(torch.rand(ids.shape, device=ids.device) > args.mask_rate, IGNORED)
    with autocast(ids.device):
        loss = model(ids, labels=labels).loss
    loss.backward()
    model.zero_grad()


def train(args: argparse.Namespace, data: Data, out: Path, identity: dict, folder: Path | None):
    """The run, from the checkpoint in `folder` if there is one."""
    model, shared, optimizer = make_model(args, data)
    device, first, log, warmup = (
        model.decoder_bias.device,
        0,
        [],
        min(args.warmup_steps, args.steps // 10),
    )
    # since the last line of the log: losses of finite steps; other steps; tokens; tokens and pads. Then, since the last
    # finite step: steps
    totals = torch.zeros(5, dtype=torch.float64, device=device)
    if folder:
        weights, training = read_checkpoint(folder)
        model.load_state_dict(weights)
        optimizer.load_state_dict(training["optimizer"])
        first, log, totals = training["step"], training["log"], training["totals"].to(device)
        del weights, training
    print(
        f"from step {first} on; warm-up {warmup} steps"
        + ", a tenth of the run" * (warmup < args.warmup_steps)
    )
    if device.type == "cuda":
        rehearse(model, args)
    if RANK == 0:
        write_atomically(out / "args.json", json.dumps(vars(args), indent=2) + "\n")
        if first == 0:
            loss = held_out_loss(model, data, args.micro_batch_size)
            log = [dict(step=0, held_out_loss=f"{loss:.4f}", skipped_steps=0)]
            write_log(out, log)
    tokens = np.zeros(args.steps, dtype=np.int64)  # of each step, pads included
    for begins, rows in data.phases:
        tokens[begins:] = args.batch_size * rows.length
    received = 0  # the signal to end after the step

    def note(number, _):
        nonlocal received
        received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends now

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    with tqdm(
        total=tokens.sum(), initial=tokens[:first].sum(), unit="token", unit_scale=True
    ) as progress:
        start, before = perf_counter(), totals[2].item()
        for step, batch in enumerate(
            batches_ahead(args, data.phases, range(first, args.steps)), first + 1
        ):
            lr = learning_rate(step - 1, args.steps, args.lr, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, skipped = train_step(shared, optimizer, batch, step - 1, args)
            totals[:2] += torch.stack([loss.where(skipped == 0, 0), skipped])
            totals[2] += batch.real
            totals[3] += batch.padded
            totals[4] = (totals[4] + 1) * skipped
            progress.update(tokens[step - 1])
            stopped_by = max(gathered(received))
            evaluates = step % args.eval_every == 0 or step == args.steps
            if evaluates or step % args.log_every == 0:
                losses, not_finite, real, padded, in_a_row = totals.tolist()
                if in_a_row >= 10:
                    last = max(out.glob(STEP_FOLDER), default="none")
                    raise SystemExit(f"no gradient was finite in the last {in_a_row:.0f} steps, now at learning rate "
                        f"{lr:.2e}: a lower --lr or more --warmup-steps helps; last checkpoint {last}")  # fmt: skip
                if RANK == 0:
                    last, seconds = log[-1], perf_counter() - start
                    mean = losses / max(1, step - last["step"] - not_finite)
                    row = dict(
                        step=step,
                        loss=f"{mean:.4f}",
                        lr=f"{lr:.2e}",
                        padding=f"{1 - real / padded:.3f}",
                    )
                    row["tokens_per_s"] = f"{(real - before) / seconds:.0f}"
                    row["skipped_steps"] = last["skipped_steps"] + int(not_finite)
                    if evaluates:
                        row["held_out_loss"] = (
                            f"{held_out_loss(model, data, args.micro_batch_size):.4f}"
                        )
                    log.append(row)
                    write_log(out, log)
                    progress.set_postfix(row)
                totals[:4] = 0
                start, before = perf_counter(), 0
            if RANK == 0 and (step % args.save_every == 0 or step == args.steps or stopped_by):
                training = dict(
                    step=step,
                    identity=identity,
                    log=log,
                    totals=totals,
                    optimizer=optimizer.state_dict(),
                )
                save_checkpoint(out, args.keep, model, data.tokenizer, training)
            if stopped_by:
                name = signal.Signals(stopped_by).name
                print(f"\nstopped by {name} after step {step}, which is saved; --resume goes on")
                raise SystemExit(128 + stopped_by)
    if RANK == 0:
        finish(args, data, out, model, log)


def finish(
    args: argparse.Namespace, data: Data, out: Path, model: MaBERTForMaskedLM, log: list[dict]
):
    """Writes the model and says what came of the run."""
    loss, (unigram, uniform) = float(log[-1]["held_out_loss"]), data.baselines
    model.save_pretrained(out)
    print(f"\nheld-out loss {loss:.3f} nats per masked token ({(data.held_out[2] != IGNORED).sum()} of them); the "
          f"training text's word frequencies give {unigram:.3f}, chance {uniform:.3f}\n{abs(unigram - loss):.2f} nats "
          f"{'below' if loss < unigram else 'above'} the word frequencies. Held-out text, a word masked:")  # fmt: skip
    show_guesses(model, data)
    print(f"\nThe model is in {out}, its curve in {draw_curve(out, log)}. Try it:")
    print(f'  python mabert.py {out} "text with a [MASK]"')


# ---- The processes of a run, and what may stop them ----


def join_processes():
    """They talk over gloo, GPUs over NCCL, and wait while the first prepares the text."""
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store keeps the addresses of the processes before a restart (pytorch issue 135712)
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        store = dist.PrefixStore(f"restart {RESTARTS}", store)
    backend, day = (
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        datetime.timedelta(days=1),
    )
    dist.init_process_group(backend, store=store, rank=RANK, world_size=PROCESSES, timeout=day)


def gathered(value) -> list:
    """The values of all processes, in order; and all have come this far."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


def lock(out: Path):
    """Keeps other runs out of the folder until this process ends, however it ends."""
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    with contextlib.suppress(ImportError):  # Windows has no such locks
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise SystemExit(f"another run is writing to {out}; choose another --out") from None


def run(args: argparse.Namespace):
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if (
        RESTARTS
    ):  # by torchrun: what there is by now is worth more than what the command said at first
        args.resume, args.overwrite = True, False
    out, names = (
        Path(args.out),
        ("log.csv", "loss.png", "args.json", "config.json", "model.pt", STEP_FOLDER),
    )
    old = [path for name in names for path in out.glob(name)]  # all that a run writes
    if old and not (
        args.profile or args.overwrite or args.resume or (args.demo and args.out == DEMO["out"])
    ):
        raise SystemExit(
            f"{out} holds a run or a model already; choose another --out, --overwrite it, or --resume it"
        )
    folder = made_by = None
    if RANK == 0 and not args.profile:
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        folder, made_by = newest_checkpoint(out) if args.resume else (None, None)
    folder, made_by = gathered((folder, made_by))[0]
    data = prepare(args, (folder or out) / "tokenizer.json")
    identity = identity_of(args, data)
    if any(other != identity for other in gathered(identity)):
        raise SystemExit(
            "the processes see different text; let them share --data and the cache of `datasets`"
        )
    if folder and (differ := [name for name in identity if identity[name] != made_by.get(name)]):
        said = "; ".join(
            f"{name} was {made_by.get(name)} and is now {identity[name]}" for name in differ
        )
        raise SystemExit(f"--resume: {folder} belongs to another run: {said}")
    if args.profile:
        profile(args, data)
        return
    if RANK == 0:
        for path in [*([] if args.resume else old), *out.glob(STEP_FOLDER + ".partial")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_atomically(out / "tokenizer.json", data.tokenizer.to_str(pretty=True))
    train(args, data, out, identity, folder)


def main(argv: list[str]):
    args = parse_args(argv)
    try:
        if PROCESSES > 1:
            join_processes()
        run(args)
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; what is whole of tokens and checkpoints is kept, and --resume goes on"
        ) from None
    except (
        UnicodeDecodeError
    ) as error:  # strings of JSON and parquet are looked at when they are read
        refuse_not_utf8(local_files(args.data or []))
        raise SystemExit(f"--data: a document of a .parquet file is not UTF-8: {error}") from error
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search(
            "out of memory|ALLOC_FAILED|allocate", str(error)
        ):
            advice = (f"out of memory: lower --micro-batch-size (now {args.micro_batch_size}; the batch stays) "
                      "or the lengths of --length-schedule; or pass --activation-checkpointing")  # fmt: skip
        elif isinstance(error, OSError) or re.search(
            "iostream|StreamWriter|inline_container", str(error)
        ):
            advice = "cannot read or write: is the disk full? What is whole of tokens and checkpoints is kept"
        elif PROCESSES > 1 and "gloo" in str(error):
            advice = f"process {RANK} lost another, whose message says why"
        else:
            raise
        raise SystemExit(f"{advice}\n{error}") from error
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- Where the time goes ----


def flops_per_token(config: MaBERTConfig, length: int, mask_rate: float) -> float:
    """Floating-point operations of matrix products and convolutions, forward and backward, for one token of a row."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        MaBERT(config)(torch.zeros(1, length, dtype=torch.long))
    head = 2 * config.hidden_size * (config.hidden_size + config.vocab_size) * mask_rate
    return 3 * (counter.get_total_flops() / length + head)


def profile(args: argparse.Namespace, data: Data, warm_up: int = 2):
    """Prints, for each row length, where the time of args.profile training steps goes. Writes nothing."""
    model, shared, optimizer = make_model(args, data)
    on_gpu, marks = torch.cuda.is_available(), []

    def mark(name):  # on a GPU by its own clock, without waiting
        now = torch.cuda.Event(enable_timing=True) if on_gpu else perf_counter()
        if on_gpu:
            now.record()
        marks.append((name, now))

    for kind, layer in zip(args.pattern, model.encoder.layers):
        if not args.compile:  # hooks would cut the graph
            layer.register_forward_pre_hook(lambda *_: mark("forward, rest"))
            layer.register_forward_hook(lambda *_, kind=kind: mark(f"forward, {kind} layers"))
            layer.register_full_backward_pre_hook(lambda *_: mark("backward, rest"))
            layer.register_full_backward_hook(
                lambda *_, kind=kind: mark(f"backward, {kind} layers")
            )
    for _, rows in data.phases:
        memory, parts, real, padded = "", {}, 0, 0
        for i, batch in enumerate(batches_ahead(args, [(0, rows)], range(warm_up + args.profile))):
            if i == warm_up:
                del marks[:-1]
                real = padded = 0
                torch.cuda.reset_peak_memory_stats() if on_gpu else None
            mark("waiting for data")
            train_step(shared, optimizer, batch, i, args, mark)
            real, padded = real + batch.real, padded + batch.padded
        if on_gpu:
            torch.cuda.synchronize()
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"
        for (_, begin), (name, end) in itertools.pairwise(marks):
            parts[name] = parts.get(name, 0) + (
                begin.elapsed_time(end) / 1000 if on_gpu else end - begin
            )
        seconds = sum(parts.values())
        tflops = (
            flops_per_token(model.config, rows.length, args.mask_rate)
            * real
            / seconds
            / PROCESSES
            / 1e12
        )
        print(f"\nrows of {rows.length} tokens: {seconds / args.profile:.3f} s a step, {real / seconds:.0f} tokens/s, "
              f"{1 - real / padded:.1%} padding, {tflops:.3g} TFLOP/s a device{memory}")  # fmt: skip
        for name, part in parts.items():
            print(f"  {name:20}{1000 * part / args.profile:10.1f} ms a step{part / seconds:8.1%}")


def describe_machine(device: str | None = None) -> str:
    """One line: the device ("cuda" or "cpu"; the GPU, if there is one), its driver, and the packages' versions."""
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        found = [torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}", f"driver {driver}"]
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        found = [model[1] if model else platform.machine(), f"{torch.get_num_threads()} thread(s)"]
    for package in (
        "torch",
        "triton",
        "datasets",
        "tokenizers",
        "transformers",
        "mamba-ssm",
        "mambapy",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


if __name__ == "__main__":
    main(sys.argv[1:])
