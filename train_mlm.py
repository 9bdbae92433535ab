"""Pretrains MaBERT with masked language modelling.

    python train_mlm.py --demo                          # minutes on a laptop: no network, no GPU
    python train_mlm.py --steps 100000                  # the paper's 10 % budget: Wikipedia + BookCorpus from the hub
    python train_mlm.py --data texts/ --vocab-size 8192 --steps 5000 --hidden-size 256 --num-heads 4 ...
    python train_mlm.py ... --resume                    # goes on after the newest checkpoint of a stopped run
    torchrun --nproc-per-node 8 train_mlm.py ...        # the same run, shared by eight GPUs

In order: arguments · text · tokenizer · tokens on disk · rows and masking · evaluation · checkpoints · training.

Everything random is a function of the seed, the step and the micro-batch: which rows a step reads, where they are
masked, dropout. So there is no random state to keep, and neither resuming nor the number of processes changes a run.
The run's folder (--out) ends with config.json, model.pt and tokenizer.json, which `from_pretrained(out)` reads, beside
log.csv, args.json and a folder for each of the last checkpoints (step-0050000/), which `from_pretrained` reads too.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import sysconfig
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

# Idle OpenMP threads spin for milliseconds by default: beside any other busy process that slows a run down many times
# over. Without any spinning a small model's many short operations wait for threads to wake up. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from mabert import PSM_STAGES, MaBERTConfig, MaBERTForMaskedLM

RANK, LOCAL_RANK, PROCESSES = (
    int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
if RANK > 0:  # of torchrun's processes the first speaks
    tqdm = functools.partial(tqdm, disable=True)

# ----------------------------------------------------------------------------------------------------------------------
# Arguments: the defaults are the paper's protocol, where it gives one, else BERT's
# ----------------------------------------------------------------------------------------------------------------------

HUB_CORPUS = (("wikimedia/wikipedia", "20231101.en"), ("lucadiliello/bookcorpusopen", "default"))
HUB_TOKENIZER = "google-bert/bert-base-uncased"
WITHOUT_HUB = "without the hub, pass --data PATH, and --tokenizer a tokenizer.json or --vocab-size N to train one"
DEMO = """--out out/demo --vocab-size 4096 --pattern MMT --hidden-size 128 --num-heads 4 --intermediate-size 512
    --d-state 8 --dropout 0 --steps 900 --length-schedule 64:1 --batch-size 32 --micro-batch-size 32 --lr 2e-3
    --warmup-steps 90 --mask-rate 0.3 --eval-every 150 --log-every 25""".split()


def parse_args(argv: list[str]) -> argparse.Namespace:
    def psm(text):
        stages = () if text == "none" else tuple(text.split("+"))
        if not set(stages) <= set(PSM_STAGES):
            raise argparse.ArgumentTypeError(f"{text!r} is not none, or any of {', '.join(PSM_STAGES)} joined by +")
        return stages

    base = MaBERTConfig()
    parser = argparse.ArgumentParser(
        usage="python train_mlm.py [--demo] [--data PATH ...] [--steps N] ...: --help lists all flags",
        description="Pretrain MaBERT with masked language modelling. Defaults are the paper's protocol.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="a small model on text that every Python carries; replaces out/demo; other "
        "flags override its own")  # fmt: skip
    add("--out", default="out/mlm", help="the run's folder")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", action="store_true", help="go on after the newest checkpoint in --out, or from the start where "
        "there is none")  # fmt: skip
    group = parser.add_argument_group("text")
    add = group.add_argument
    add("--data", nargs="+", metavar="PATH", help=".txt, .json, .jsonl or .parquet files, or folders of them (with a "
        "column 'text'), instead of English Wikipedia and BookCorpus from the hub")  # fmt: skip
    add("--sample-by", choices=("document", "paragraph", "line"), default="document", help="what is one document in a "
        ".txt file: all of it, a block between blank lines, a line")  # fmt: skip
    add("--tokenizer", help=f"a tokenizer.json or a name on the hub; without --vocab-size, {HUB_TOKENIZER}")
    add("--vocab-size", type=int, help="train a WordPiece tokenizer of this size on the corpus instead")
    add("--cache-dir", default="out/tokens", help="where text becomes token ids, once for all runs")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pattern", default=base.pattern, help="one letter per layer: M (Mamba) or T (Transformer)")
    add("--hidden-size", type=int, default=base.hidden_size)
    add("--num-heads", type=int, default=base.num_heads, help="attention heads")
    add("--intermediate-size", type=int, default=base.intermediate_size, help="inner width of the feed-forward")
    add("--d-state", type=int, default=base.d_state, help="states per channel of the scan")
    add("--psm", type=psm, default="+".join(base.psm), metavar="STAGES", help="stages of padding-safe masking, joined "
        "by +, or none")  # fmt: skip
    add("--causal-conv", action=argparse.BooleanOptionalAction, default=base.causal_conv, help="--no-causal-conv "
        "centres the convolution")  # fmt: skip
    add("--dropout", type=float, default=base.dropout, help="probability")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--steps", type=int, default=1_000_000, help="optimizer steps; the paper's budgets are separate runs of "
        "100000, 250000, 500000 and 1000000")  # fmt: skip
    add("--length-schedule", nargs="+", default=["128:0.9", "512:0.1"], metavar="TOKENS:SHARE",
        help="row lengths and the share of the steps each gets, in order")  # fmt: skip
    add("--batch-size", type=int, default=256, help="rows per optimizer step")
    add("--micro-batch-size", type=int, default=64, help="rows that go through the model at once")
    add("--lr", type=float, default=1e-4, help="peak learning rate")
    add("--warmup-steps", type=int, default=10_000, help="linear warm-up, never more than a tenth of the run")
    add("--weight-decay", type=float, default=0.01, help="on matrices; none on biases, norms, A_log and D")
    add("--mask-rate", type=float, default=0.15, help="share of the tokens to predict")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=1_000, help="steps between checkpoints")
    add("--keep", type=int, default=3, help="checkpoints to keep, the last ones")
    add("--eval-every", type=int, default=1_000, help="steps between held-out losses")
    add("--log-every", type=int, default=100, help="steps between lines of log.csv")
    add("--compile", action="store_true", help="torch.compile the encoder")

    args = parser.parse_args([*DEMO, *argv] if "--demo" in argv else argv)

    def require(ok, message):
        if not ok:
            parser.error(message)

    if args.demo and args.tokenizer:
        args.vocab_size = None
    try:
        pairs = [pair.split(":") for pair in args.length_schedule]
        args.length_schedule = [(int(length), float(share)) for length, share in pairs]
    except ValueError:
        parser.error(f"--length-schedule takes TOKENS:SHARE ..., as in 128:0.9 512:0.1, not {args.length_schedule}")
    args.micro_batch_size = min(args.micro_batch_size, args.batch_size)
    for name in ("steps", "batch_size", "micro_batch_size", "save_every", "keep", "eval_every", "log_every"):
        require(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be positive")
    require(args.batch_size % args.micro_batch_size == 0, f"--batch-size ({args.batch_size}) must be a multiple of "
            f"--micro-batch-size ({args.micro_batch_size})")  # fmt: skip
    micro_batches = args.batch_size // args.micro_batch_size
    require(micro_batches % PROCESSES == 0, f"{PROCESSES} processes cannot share the {micro_batches} micro-batches of "
            f"a step evenly; with --micro-batch-size {max(1, args.batch_size // PROCESSES)} each has one")  # fmt: skip
    require(0 < args.mask_rate < 1, "--mask-rate must be between 0 and 1")
    require(args.lr > 0, "--lr must be positive")
    for name in ("warmup_steps", "weight_decay", "seed"):
        require(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must not be negative")
    lengths, shares = zip(*args.length_schedule)
    require(min(lengths) >= 8, f"--length-schedule: rows of {min(lengths)} tokens are too short; 8 is the least")
    shares_fit = min(shares) > 0 and math.isclose(sum(shares), 1)
    require(shares_fit, f"--length-schedule: the shares {shares} must be positive and sum to 1, as in 128:0.9 512:0.1")
    require(not (args.tokenizer and args.vocab_size), "--tokenizer and --vocab-size exclude each other")
    vocab_fits = args.vocab_size is None or 100 <= args.vocab_size <= MAX_VOCAB
    require(vocab_fits, f"--vocab-size must be in [100, {MAX_VOCAB}]")
    require(not (args.demo and args.data), "--demo brings its own text; leave out --demo or --data")
    require(not (args.resume and args.overwrite), "--resume and --overwrite exclude each other")
    try:
        model_config(args, vocab_size=100, pad_token_id=0)
    except ValueError as error:
        parser.error(str(error))
    return args


def model_config(args: argparse.Namespace, vocab_size: int, pad_token_id: int) -> MaBERTConfig:
    names = "pattern", "hidden_size", "num_heads", "intermediate_size", "d_state", "psm", "causal_conv", "dropout"
    return MaBERTConfig(
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        max_position=max(length for length, _ in args.length_schedule),
        **{name: getattr(args, name) for name in names},
    )


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    identity: str  # changes when the text does
    num_documents: int
    batches: Callable[[], Iterator[list[str]]]  # all documents, some at a time


def demo_corpus() -> Corpus:
    """English that every Python carries: its language reference, and docstrings of modules that are not imported."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in the sources
        for file in tqdm(sorted(library.rglob("*.py")), unit="file", desc="reading docstrings"):
            if {"site-packages", "dist-packages", "test", "tests"} & set(file.relative_to(library).parts):
                continue
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError, OSError):  # the library carries files that are broken, some on purpose
                continue
            kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
            texts += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    texts = [text.encode("utf-8", "replace").decode() for text in dict.fromkeys(texts)]  # many stand in several places
    identity = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Corpus(identity, len(texts), lambda: iter([texts]))


def local_corpus(paths: list[str], sample_by: str) -> Corpus:
    builders = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise SystemExit(f"--data: {path} does not exist")
        found = [path] if path.is_file() else path.rglob("*")
        found = [file for file in found if file.suffix.lower() in builders and file.is_file()]
        if not found:
            raise SystemExit(f"--data: {path} is or has no {', '.join(builders)} file")
        files += [file.resolve() for file in found]
    files, calls = sorted(set(files)), []
    for builder in ("text", "json", "parquet"):
        data_files = [str(file) for file in files if builders[file.suffix.lower()] == builder]
        if not data_files:
            continue
        calls.append((builder, dict(data_files=data_files) | (dict(sample_by=sample_by) if builder == "text" else {})))
    identity = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return dataset_corpus(calls, f"{identity} {sample_by}", "check the files that --data names")


def hub_corpus() -> Corpus:
    calls = [(name, dict(name=config)) for name, config in HUB_CORPUS]
    return dataset_corpus(calls, f"{HUB_CORPUS}", WITHOUT_HUB)


def dataset_corpus(calls: list[tuple[str, dict]], identity: str, advice: str) -> Corpus:
    """A corpus from calls of datasets.load_dataset."""
    import datasets  # takes seconds, and --demo needs none

    parts = []
    for builder, options in calls:
        try:
            part = datasets.load_dataset(builder, split="train", **options)
            if "text" in part.column_names:
                part = part.select_columns("text").cast_column("text", datasets.Value("string"))
        except Exception as error:  # datasets raises many kinds, most of them with the reason one level down
            reason = error.__cause__ or error
            raise SystemExit(f"cannot load {builder} {options}: {type(reason).__name__}: {reason}\n{advice}") from error
        if "text" not in part.column_names:
            raise SystemExit(f"{builder} {options} has no column 'text', only {part.column_names}")
        parts.append(part)
    corpus = datasets.concatenate_datasets(parts)
    batches = lambda: ([text or "" for text in batch["text"]] for batch in corpus.iter(batch_size=100))  # noqa: E731
    return Corpus(identity, len(corpus), batches)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_VOCAB = 65_535  # token ids are kept as uint16


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """BERT's uncased WordPiece tokenizer, trained on other text.

    The trainer breaks ties between equally frequent pieces by chance, so two trainings may differ in a few of them.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = list(SPECIAL_TOKENS)
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer.json, or a tokenizer of the hub."""
    local = name.endswith(".json") or Path(name).exists()
    try:
        tokenizer = Tokenizer.from_file(name) if local else Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare Exceptions
        advice = "" if local else f"\n{WITHOUT_HUB}"
        raise SystemExit(f"cannot load the tokenizer {name}: {error}{advice}") from error
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise SystemExit(f"the tokenizer {name} has no {', '.join(missing)}; masked language modelling needs them")
    if vocab_size(tokenizer) > MAX_VOCAB:
        raise SystemExit(f"the tokenizer {name} has {vocab_size(tokenizer)} tokens; {MAX_VOCAB} is the most")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; some tokenizers leave ids out."""
    return max(tokenizer.get_vocab().values()) + 1


def trained_tokenizer(corpus: Corpus, size: int, cache_dir: str | os.PathLike) -> Tokenizer:
    """A tokenizer trained on the corpus, its held-out part too, and kept in the cache."""
    identity = hashlib.sha256(f"{corpus.identity} {size}".encode()).hexdigest()[:16]
    file = Path(cache_dir) / f"tokenizer-{identity}.json"
    if not file.exists():
        print(f"training a tokenizer of {size} word pieces")
        tokenizer = train_tokenizer((text for texts in corpus.batches() for text in texts), size)
        file.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(f"{file}.partial")
        os.replace(f"{file}.partial", file)
    return load_tokenizer(str(file))


# ----------------------------------------------------------------------------------------------------------------------
# Tokens on disk
# ----------------------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    ids: np.ndarray  # (tokens,) uint16, a memory map: the documents one after another, without special tokens
    offsets: np.ndarray  # (documents + 1,) int64
    counts: np.ndarray  # (vocabulary,) int64: how often each id occurs


def tokenize(corpus: Corpus, tokenizer: Tokenizer, cache_dir: str | os.PathLike) -> Tokens:
    """The corpus as token ids, from the cache where the same corpus and tokenizer have been seen before.

    They are written under a temporary name and renamed when whole, so that an interrupted run leaves no half cache.
    """
    key = hashlib.sha256(f"{corpus.identity} {tokenizer.to_str()}".encode("utf-8", "replace")).hexdigest()[:16]
    folder, partial = Path(cache_dir) / key, Path(cache_dir) / f"{key}.{os.getpid()}.partial"
    if not folder.exists():
        try:
            _write_tokens(corpus, tokenizer, partial)
            if not folder.exists():  # another run may have been faster
                os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    try:
        offsets, counts = np.load(folder / "offsets.npy"), np.load(folder / "counts.npy")
        size = (folder / "ids.bin").stat().st_size
    except (OSError, ValueError, EOFError) as error:
        raise SystemExit(f"the token cache {folder} is damaged ({error}); remove that folder and run again") from error
    if size != 2 * offsets[-1]:
        raise SystemExit(f"the token cache {folder} is damaged (wrong size); remove that folder and run again")
    if size == 0:
        raise SystemExit("the corpus is empty: no text, or nothing that the tokenizer keeps")
    return Tokens(np.memmap(folder / "ids.bin", dtype=np.uint16, mode="r"), offsets, counts)


def _write_tokens(corpus: Corpus, tokenizer: Tokenizer, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    lengths, counts = [], np.zeros(vocab_size(tokenizer), dtype=np.int64)
    progress = tqdm(total=corpus.num_documents, unit="doc", desc="tokenizing")
    with open(folder / "ids.bin", "wb") as file, progress:
        for texts in corpus.batches():
            tokens_of = np.zeros(len(texts), dtype=np.int64)
            for pieces in _pieces(texts):
                encodings = tokenizer.encode_batch_fast([text for _, text in pieces], add_special_tokens=False)
                for (document, _), encoding in zip(pieces, encodings):
                    ids = np.array(encoding.ids, dtype=np.uint16)
                    file.write(ids.tobytes())
                    tokens_of[document] += len(ids)
                    np.add.at(counts, ids, 1)
            lengths += tokens_of[tokens_of > 0].tolist()
            progress.update(len(texts))
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(folder / "counts.npy", counts)


def _pieces(texts: list[str], longest: int = 100_000, together: int = 1_000_000) -> Iterator[list[tuple[int, str]]]:
    """(document, text) some at a time, long documents cut at spaces: a tokenizer takes 100 bytes per character."""
    pieces, size = [], 0
    for document, text in enumerate(texts):
        start = 0
        while start < len(text):
            end = min(start + longest, len(text))
            if end < len(text):
                end = text.rfind(" ", start, end) + 1 or end
            pieces.append((document, text[start:end]))
            size, start = size + end - start, end
            if size >= together:
                yield pieces
                pieces, size = [], 0
    if pieces:
        yield pieces


def split_held_out(tokens: Tokens, stripes: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) segments, each (segments, 2) of start and end in tokens.ids.

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


# ----------------------------------------------------------------------------------------------------------------------
# Rows and masking: functions of the seed and the step
# ----------------------------------------------------------------------------------------------------------------------

IGNORED = -100  # the label of positions with nothing to predict


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


class Vocabulary(NamedTuple):
    """The ids of a tokenizer's special tokens, and a table of all ids that are special: those are never predicted."""

    pad: int
    cls: int
    sep: int
    mask: int
    is_special: np.ndarray  # (vocabulary,) bool


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    is_special = np.zeros(vocab_size(tokenizer), dtype=bool)
    is_special[list(ids.values())] = True
    return Vocabulary(ids["[PAD]"], ids["[CLS]"], ids["[SEP]"], ids["[MASK]"], is_special)


class Rows:
    """The rows of one length that segments of the tokens give: [CLS], a window of one segment, [SEP].

    A segment longer than a row is cut into windows of equal size, so that none is a stump.
    """

    def __init__(self, tokens: Tokens, segments: np.ndarray, length: int, vocabulary: Vocabulary):
        self.ids, self.segments, self.vocabulary = tokens.ids, segments, vocabulary
        self.windows = -(-(segments[:, 1] - segments[:, 0]) // (length - 2))  # of each segment
        self.ends = np.cumsum(self.windows)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def batch(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of these numbers, padded to the longest: (ids int64, real bool), both (rows, length)."""
        rows = []
        for number in numbers:
            segment = np.searchsorted(self.ends, number, side="right")
            (start, end), windows = self.segments[segment], self.windows[segment]
            window = number - (self.ends[segment] - windows)
            first, last = ((end - start) * place // windows for place in (window, window + 1))
            rows.append(self.ids[start + first : start + last])
        lengths = np.array([len(row) + 2 for row in rows])
        ids = np.full((len(rows), lengths.max()), self.vocabulary.pad, dtype=np.int64)
        ids[:, 0] = self.vocabulary.cls
        for i, row in enumerate(rows):
            ids[i, 1 : len(row) + 1] = row
            ids[i, len(row) + 1] = self.vocabulary.sep
        return ids, np.arange(ids.shape[1]) < lengths[:, None]


def mask_tokens(
    ids: np.ndarray, vocabulary: Vocabulary, mask_rate: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
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


def batch_of_step(
    step: int, phases: list[tuple[int, Rows]], vocabulary: Vocabulary, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(input ids, real, labels) of a step, (batch, length) each. phases: the first step and the rows of each length."""
    first, rows = [phase for phase in phases if phase[0] <= step][-1]
    epoch, place = np.divmod((step - first) * args.batch_size + np.arange(args.batch_size), len(rows))
    numbers = np.concatenate([_shuffled(args.seed, first, e, len(rows))[place[epoch == e]] for e in np.unique(epoch)])
    ids, real = rows.batch(numbers)
    inputs, labels = mask_tokens(ids, vocabulary, args.mask_rate, rng(args.seed, 1, step))
    return inputs, real, labels


@functools.lru_cache(maxsize=2)
def _shuffled(seed: int, phase: int, epoch: int, n: int) -> np.ndarray:
    return rng(seed, 2, phase, epoch).permutation(n)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """Rows that training never sees, masked once and for all: the same for every seed."""

    inputs: np.ndarray
    real: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, rows: Rows, mask_rate: float, most: int = 512):
        ids, real = rows.batch(np.unique(np.linspace(0, len(rows) - 1, most).astype(int)))
        inputs, labels = mask_tokens(ids, rows.vocabulary, mask_rate, rng(0))
        return cls(inputs, real, labels)

    @torch.no_grad()
    def loss(self, model: MaBERTForMaskedLM, micro_batch_size: int) -> float:
        """The mean masked-token loss in nats."""
        model.eval()
        total = 0.0
        device = model.decoder_bias.device
        for i in tqdm(range(-(-len(self.inputs) // micro_batch_size)), "held-out loss", leave=False, delay=5):
            inputs, real, labels = micro_batch(self, i, micro_batch_size, device)
            with autocast(model):
                total += model(inputs, real, labels=labels, reduction="sum").loss.item()
        model.train()
        return total / (self.labels != IGNORED).sum()

    def baselines(self, tokens: Tokens, held: np.ndarray, vocabulary: Vocabulary) -> tuple[float, float]:
        """(unigram, uniform): the loss of guessing by the training text's frequencies, plus one, and by chance."""
        counts = tokens.counts + 1
        for start, end in held:
            counts -= np.bincount(tokens.ids[start:end], minlength=len(counts))
        counts[vocabulary.is_special] = 0
        labels = self.labels[self.labels != IGNORED]
        return float(np.log(counts.sum()) - np.log(counts[labels]).mean()), math.log((~vocabulary.is_special).sum())


def autocast(model: torch.nn.Module):
    """bf16 on a GPU, nothing elsewhere."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def micro_batch(batch: tuple[np.ndarray, ...], i: int, size: int, device: torch.device) -> list[torch.Tensor]:
    """(inputs, real, labels) of the i-th `size` rows on the device, cut to the longest rounded up to 32 tokens."""
    rows = slice(i * size, (i + 1) * size)
    longest = 32 * -(-int(batch[1][rows].sum(axis=1).max()) // 32)
    return [torch.from_numpy(part[rows, :longest]).to(device) for part in batch]


@torch.no_grad()
def show_guesses(model: MaBERTForMaskedLM, tokenizer: Tokenizer, rows: Rows, count: int = 5):
    """Prints held-out sentences with one word masked, and the model's five best guesses for it."""
    model.eval()
    shown = 0
    for number in np.linspace(0, len(rows) - 1, 10 * count).astype(int):
        ids, _ = rows.batch(np.array([number]))
        pieces = [tokenizer.id_to_token(token) for token in ids[0]]
        followed = [piece.startswith("##") for piece in pieces[1:]]
        words = [i for i in range(1, len(pieces) - 1) if pieces[i].isalpha() and not followed[i]]
        if len(words) < 15:
            continue
        place = words[len(words) // 2]
        ids[0, place] = rows.vocabulary.mask
        logits = model(torch.from_numpy(ids).to(model.decoder_bias.device)).logits[0, place]
        best = zip(*(part.tolist() for part in logits.softmax(dim=-1).topk(5)))
        guesses = ", ".join(f"{tokenizer.id_to_token(token)!r} {p:.2f}" for p, token in best)
        left, right = (tokenizer.decode(ids[0, a:b]) for a, b in ((max(1, place - 12), place), (place + 1, place + 9)))
        print(f"  ... {left} [MASK] {right} ...\n      it was {pieces[place]!r}; guesses: {guesses}")
        shown += 1
        if shown == count:
            break


# ----------------------------------------------------------------------------------------------------------------------
# All that training reads
# ----------------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    phases: list[tuple[int, Rows]]  # the first step and the rows of each length
    held_rows: Rows
    held_out: HeldOut
    baselines: tuple[float, float]
    corpus_digest: str


def prepare(args: argparse.Namespace) -> Data:
    """Everything that training reads."""
    tokenizer = None if args.vocab_size else load_tokenizer(args.tokenizer or HUB_TOKENIZER)
    corpus = demo_corpus() if args.demo else local_corpus(args.data, args.sample_by) if args.data else hub_corpus()
    tokenizer = tokenizer or trained_tokenizer(corpus, args.vocab_size, args.cache_dir)
    tokens = tokenize(corpus, tokenizer, args.cache_dir)
    vocabulary = vocabulary_of(tokenizer)
    seen, held = split_held_out(tokens)
    phases, first = [], 0.0
    for length, share in args.length_schedule:
        begins = max(round(first), phases[-1][0] + 1) if phases else 0  # each length but the last gets a step at least
        phases.append((begins, Rows(tokens, seen, length, vocabulary)))
        first += share * args.steps
    held_rows = Rows(tokens, held, args.length_schedule[0][0], vocabulary)
    fewest = min(len(rows) for _, rows in phases)
    if fewest < args.batch_size or not len(held_rows):
        raise SystemExit(
            f"the corpus is too short: {tokens.offsets[-1]} tokens give {fewest} training rows and {len(held_rows)} "
            f"held-out ones; a batch is {args.batch_size} rows. Add text or lower --batch-size"
        )
    held_out = HeldOut.of(held_rows, args.mask_rate)
    if (held_out.labels == IGNORED).all():
        raise SystemExit("the corpus is too short, or --mask-rate too low: no held-out token is masked")
    print(f"{tokens.offsets[-1]} tokens of text; held-out loss on {len(held_out.inputs)} rows of {len(held_rows)}")
    corpus_digest = digest(tokens.offsets.tobytes(), tokens.counts.tobytes())
    baselines = held_out.baselines(tokens, held, vocabulary)
    return Data(tokenizer, vocabulary, phases, held_rows, held_out, baselines, corpus_digest)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

STEP_FOLDER = "step-" + "[0-9]" * 7


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def identity_of(args: argparse.Namespace, data: Data) -> dict:
    """What a run is a function of; a checkpoint of another cannot be resumed."""
    names = "steps length_schedule batch_size micro_batch_size lr warmup_steps weight_decay mask_rate seed".split()
    config = model_config(args, vocab_size(data.tokenizer), data.vocabulary.pad)
    tokenizer = digest(data.tokenizer.to_str().encode("utf-8", "replace"))
    own = {name: getattr(args, name) for name in names} | dict(tokenizer=tokenizer, corpus=data.corpus_digest)
    return json.loads(json.dumps(dataclasses.asdict(config) | own))  # tuples become lists, as they are when read back


def save(folder: Path, model: MaBERTForMaskedLM, tokenizer: Tokenizer, training: dict | None = None):
    """Writes a folder for from_pretrained, and what resuming needs beside it."""
    try:
        model.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        if training:
            torch.save(training, folder / "training.pt")
    except Exception as error:  # a full disk: OSError, RuntimeError from torch, or Exception from tokenizers
        if folder.suffix == ".partial":
            shutil.rmtree(folder, ignore_errors=True)  # it fills the disk for nothing
        raise SystemExit(f"cannot write {folder}: {error}\nearlier checkpoints are untouched") from error


def save_checkpoint(out: Path, step: int, keep: int, *contents):
    """Writes out/step-{step}, which appears whole or not at all, and then removes all but the last `keep`."""
    folder = out / f"step-{step:07d}"
    partial = folder.with_suffix(".partial")
    save(partial, *contents)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one, if any
    os.replace(partial, folder)
    for old in sorted(out.glob(STEP_FOLDER))[:-keep]:
        shutil.rmtree(old)


def newest_checkpoint(out: Path, identity: dict) -> tuple[Path, dict, dict] | None:
    """(folder, weights, training) of the newest checkpoint that is whole, or None where there is none at all."""
    folders = sorted(out.glob(STEP_FOLDER), reverse=True)
    for folder in folders:
        try:
            files = folder / "model.pt", folder / "training.pt"
            for file in files:
                with zipfile.ZipFile(
                    file
                ) as parts:  # what torch.save writes; torch.load does not look at the checksums
                    if broken := parts.testzip():
                        raise ValueError(f"wrong checksum of {broken} in {file.name}")
            weights, training = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
        except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            print(f"the checkpoint {folder} is damaged ({error})")
            continue
        differ = [name for name in identity if training["identity"].get(name) != identity[name]]
        if differ:
            told = "; ".join(
                f"{name} was {training['identity'].get(name)} and is now {identity[name]}" for name in differ
            )
            raise SystemExit(f"--resume: {folder} belongs to another run: {told}")
        return folder, weights, training
    if folders:
        raise SystemExit(f"--resume: no checkpoint in {out} is whole; --overwrite starts the run anew")
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up from 0, then linear decay to 0; steps count from 0."""
    return peak * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    decays = {name: p.dim() >= 2 and not name.endswith("A_log") for name, p in model.named_parameters()}
    groups = [
        dict(params=[p for name, p in model.named_parameters() if decays[name] == flag], weight_decay=decay)
        for flag, decay in ((True, weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6, fused=True)


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: tuple, step: int, args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over all micro-batches of all processes, on the device, where nothing is read back.

    Returns this process's part of the mean loss over the batch's labelled tokens, and whether a gradient was not finite
    (0. or 1.), in which case the weights and the optimizer stay as they are. Of n processes, the r-th takes every n-th
    micro-batch from the r-th on; gradients are exchanged once, with the last.
    """
    labelled = max(1, int((batch[2] != IGNORED).sum()))
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    own = range(RANK, args.batch_size // args.micro_batch_size, PROCESSES)
    for i in own:
        inputs, real, labels = micro_batch(batch, i, args.micro_batch_size, device)
        torch.manual_seed(int(rng(args.seed, 3, step, i).integers(2**63)))  # for dropout
        with contextlib.nullcontext() if PROCESSES == 1 or i == own[-1] else model.no_sync():
            with autocast(model):
                loss = model(inputs, real, labels=labels, reduction="sum").loss / labelled
            (loss * PROCESSES).backward()  # DistributedDataParallel takes the mean over processes; the sum is meant
        total += loss.detach()
    not_finite = (~clip_grad_norm_(model.parameters(), 1.0).isfinite()).float()
    optimizer.found_inf = not_finite  # a fused optimizer then does nothing
    optimizer.step()
    optimizer.zero_grad()
    return total, not_finite


@contextlib.contextmanager
def explained_out_of_memory(args: argparse.Namespace):
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # CUDA's, cuBLAS's, the CPU allocator's, NumPy's
        said = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "Unable to allocate")
        if not any(words in str(error) for words in said):
            raise
        raise SystemExit(
            f"out of memory: lower --micro-batch-size (now {args.micro_batch_size}; the batch stays the same) or the "
            f"lengths of --length-schedule\n{error}"
        ) from error


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """A list that gets the number of the first SIGTERM or SIGINT (Ctrl-C), to end after the step; a second ends now."""
    received = []

    def note(number, _):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def over_processes(value: float, reduction: str = "sum") -> float:
    """The sum of a number over all processes, or its "max"."""
    if PROCESSES == 1:
        return value
    value = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM)
    return value.item()


LOG = "step", "loss", "held_out_loss", "lr", "tokens_per_s", "skipped_steps"


def open_log(file: Path, step: int) -> TextIO:
    """log.csv to write on, with its lines up to this step; those beyond are written again by a resumed run."""
    if RANK > 0:
        return open(os.devnull, "w")
    kept = []
    if step and file.exists():
        with open(file, newline="", encoding="utf-8") as old:
            kept = [row for row in csv.reader(old) if len(row) == len(LOG) and row[0].isdigit() and int(row[0]) <= step]
    new = open(file, "w", newline="", encoding="utf-8")
    csv.writer(new).writerows([LOG, *kept])
    return new


def main(argv: list[str]):
    args = parse_args(argv)
    out = Path(args.out)
    names = "log.csv", "args.json", "config.json", "model.pt", "tokenizer.json", STEP_FOLDER + "*"
    old = [path for name in names for path in out.glob(name)]  # all that a run writes
    if old and not (args.overwrite or args.resume or (args.demo and out == Path("out/demo"))):
        raise SystemExit(f"{out} holds a run or a model already; choose another --out, --overwrite it, or --resume it")
    out.mkdir(parents=True, exist_ok=True)
    if PROCESSES > 1:
        # the others wait while the first prepares the corpus; torchrun ends all when one dies
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=7))
    for turn in (LOCAL_RANK == 0, LOCAL_RANK > 0):
        if turn:
            data = prepare(args)
        if PROCESSES > 1:
            over_processes(0)
    identity = identity_of(args, data)
    if PROCESSES > 1:
        identities = [None] * PROCESSES
        dist.all_gather_object(identities, identity)
        if any(other != identities[0] for other in identities):
            raise SystemExit("the processes see different corpora or tokenizers; let them share --cache-dir and --data")
    checkpoint = newest_checkpoint(out, identity) if args.resume else None
    if RANK == 0:
        if not args.resume:
            for path in old:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in out.glob(STEP_FOLDER + ".partial"):
            shutil.rmtree(path)
    with explained_out_of_memory(args):
        train(args, data, out, identity, checkpoint)
    if PROCESSES > 1:
        dist.destroy_process_group()


def train(args: argparse.Namespace, data: Data, out: Path, identity: dict, checkpoint: tuple[Path, dict, dict] | None):
    # Model, optimizer, schedule
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    model = MaBERTForMaskedLM(model_config(args, vocab_size(data.tokenizer), data.vocabulary.pad)).to(device)
    if args.compile:
        model.encoder.compile()
    optimizer = make_optimizer(model, args.weight_decay)
    first = 0
    if checkpoint:
        folder, weights, training = checkpoint
        first = training["step"]
        model.load_state_dict(weights)
        optimizer.load_state_dict(training["optimizer"])
        print(f"resuming {folder}")
    elif args.resume:
        print(f"{out} has no checkpoint; starting at step 0")
    shared = model if PROCESSES == 1 else DistributedDataParallel(model)
    warmup = min(args.warmup_steps, args.steps // 10)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.pattern}, {size:.1f} M parameters, on {device}; {args.steps} steps of {args.batch_size} rows", end="")
    print(f", shared by {PROCESSES} processes" if PROCESSES > 1 else "")
    if warmup < args.warmup_steps:
        print(f"warm-up shortened from {args.warmup_steps} to {warmup} steps, a tenth of the run")

    # The loop; sums since the last line of the log stay on the device until the next
    losses, skipped, in_a_row, most_in_a_row = torch.zeros(4, device=device)
    skipped_before, since = 0, first
    if checkpoint:
        since, skipped_before = training["since"], training["skipped"]
        if RANK == 0:
            losses += training["losses"]
    held_out, held_out_loss = data.held_out, math.nan
    if RANK == 0:
        (out / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n", encoding="utf-8")
    with signals() as received, open_log(out / "log.csv", first) as log_file:
        log = csv.writer(log_file)
        if first == 0:
            held_out_loss = held_out.loss(model, args.micro_batch_size) if RANK == 0 else math.nan
            log.writerow([0, "", f"{held_out_loss:.4f}", "", "", 0])
        real_tokens, start = 0, time.perf_counter()
        progress = tqdm(range(first + 1, args.steps + 1), unit="step", desc="training", initial=first, total=args.steps)
        for step in progress:
            lr = learning_rate(step - 1, args.steps, args.lr, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = batch_of_step(step - 1, data.phases, data.vocabulary, args)
            loss, not_finite = train_step(shared, optimizer, batch, step - 1, args)
            losses += loss.where(not_finite == 0, 0)
            skipped += not_finite
            in_a_row += 1
            in_a_row *= not_finite
            most_in_a_row.copy_(torch.maximum(most_in_a_row, in_a_row))
            real_tokens += int(batch[1].sum())

            stopped_by = int(over_processes(received[0] if received else 0, "max"))
            saves = step % args.save_every == 0 or stopped_by
            evaluates = step % args.eval_every == 0 or step == args.steps
            logs = evaluates or step % args.log_every == 0
            if logs or saves:
                loss, new_skipped = over_processes(losses.item()), int(skipped.item())
            if logs:
                if most_in_a_row.item() >= 10:
                    last = max(out.glob(STEP_FOLDER), default="none")
                    raise SystemExit(
                        f"gradients were not finite in {int(most_in_a_row.item())} steps in a row, by step {step}, at "
                        f"learning rate {lr:.2e}: a lower --lr or more --warmup-steps helps; last checkpoint {last}"
                    )
                loss /= max(1, step - since - new_skipped)
                skipped_before += new_skipped
                speed = real_tokens / (time.perf_counter() - start)
                row = dict(
                    loss=f"{loss:.4f}", held_out="", lr=f"{lr:.2e}", tok_s=f"{speed:.0f}", skipped=skipped_before
                )
                if evaluates and RANK == 0:
                    held_out_loss = held_out.loss(model, args.micro_batch_size)
                    row["held_out"] = f"{held_out_loss:.4f}"
                log.writerow([step, *row.values()])
                log_file.flush()
                progress.set_postfix(row | dict(held_out=f"{held_out_loss:.4f}"))
                for total in (losses, skipped, most_in_a_row):
                    total.zero_()
                loss, new_skipped, real_tokens, since, start = 0.0, 0, 0, step, time.perf_counter()
            if saves and RANK == 0:
                training = dict(step=step, since=since, losses=loss, skipped=skipped_before + new_skipped)
                training |= dict(optimizer=optimizer.state_dict(), identity=identity)
                save_checkpoint(out, step, args.keep, model, data.tokenizer, training)
            if stopped_by:
                name = signal.Signals(stopped_by).name
                print(f"\nstopped by {name} after step {step}, which is saved; --resume goes on")
                raise SystemExit(128 + stopped_by)
    if RANK > 0:
        return
    save(out, model, data.tokenizer)

    # What came of it
    unigram, uniform = data.baselines
    predicted = (held_out.labels != IGNORED).sum()
    print(f"\nheld-out loss {held_out_loss:.3f} nats per masked token ({predicted} of them);", end=" ")
    print(f"the training text's word frequencies give {unigram:.3f}, chance {uniform:.3f}")
    side = "below" if held_out_loss < unigram else "above"
    print(f"{abs(unigram - held_out_loss):.2f} nats {side} the word frequencies. Held-out text with one word masked:")
    show_guesses(model, data.tokenizer, data.held_rows)
    print(f"\nThe model is in {out}, its curve in {out / 'log.csv'}. In Python:")
    print(f"  model = MaBERTForMaskedLM.from_pretrained({str(out)!r})  # from mabert import MaBERTForMaskedLM")
    print(f"  tokenizer = Tokenizer.from_file({str(out / 'tokenizer.json')!r})  # from tokenizers import Tokenizer")


if __name__ == "__main__":
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; what was saved is in the step-* folders under --out, and --resume goes on"
        ) from None
    except OSError as error:  # a full disk, a folder that may not be written
        raise SystemExit(f"cannot go on: {error}") from error
