"""Pretrains MaBERT with masked language modelling.

    python train_mlm.py --demo                          # minutes on a laptop: no network, no GPU
    python train_mlm.py --steps 100000                  # the paper's 10 % budget: Wikipedia + BookCorpus from the hub
    python train_mlm.py --data texts/ --vocab-size 8192 --steps 5000 --hidden-size 256 --num-heads 4 ...
    python train_mlm.py ... --resume                    # goes on after the newest checkpoint of a stopped run
    torchrun --nproc-per-node 8 train_mlm.py ...        # the same run, shared by eight GPUs
    python train_mlm.py ... --profile 20                # where the time of a step goes

In order: arguments · text · tokenizer · tokens on disk · rows and masking · evaluation · what training reads ·
checkpoints · training · where the time goes.

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
import itertools
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
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Idle OpenMP threads spin for milliseconds by default: beside any other busy process that slows a run down many times
# over. Without any spinning a small model's many short operations wait for threads to wake up. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mabert import PSM_STAGES, MaBERT, MaBERTConfig, MaBERTForMaskedLM

RANK, LOCAL_RANK, PROCESSES = (
    int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
RESTARTED = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
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
    add("--replace-invalid-utf8", action="store_true", help="put U+FFFD where text is not UTF-8 instead of stopping")
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
    add("--bucket", action="store_true", help="gather rows of like length from 32 batches at a time: less padding, the "
        "same rows in an epoch")  # fmt: skip
    add("--activation-checkpointing", action="store_true", help="keep only the layers' inputs for the backward pass, "
        "and compute the rest again: less memory, more time")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=1_000, help="steps between checkpoints")
    add("--keep", type=int, default=3, help="checkpoints to keep, the last ones")
    add("--eval-every", type=int, default=1_000, help="steps between held-out losses")
    add("--log-every", type=int, default=100, help="steps between lines of log.csv")
    add("--compile", action="store_true", help="torch.compile the encoder")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard too, into a folder of --out")
    add("--profile", type=int, metavar="STEPS", help="instead of training, say where the time of so many steps of each "
        "row length goes")  # fmt: skip

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
    require(0 < args.lr < math.inf, "--lr must be positive and finite")
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
    require(args.profile is None or args.profile > 0, "--profile must be positive")
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            parser.error(f"--tensorboard needs the package tensorboard: pip install tensorboard ({error})")
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
    batches: Callable[[int], Iterator[list[str]]]  # the documents from the given one on, some at a time


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
    return Corpus(identity, len(texts), lambda first: iter([texts[first:]]))


def local_corpus(paths: list[str], sample_by: str, utf8_errors: str = "strict") -> Corpus:
    builders = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise SystemExit(f"--data: {path} does not exist")
        found = [path] if path.is_file() else path.rglob("*")
        found = [file for file in found if file.suffix.lower() in builders and file.is_file() and file.stat().st_size]
        if not found:
            raise SystemExit(f"--data: {path} is or has no {', '.join(builders)} file that is not empty")
        files += [file.resolve() for file in found]
    files, calls = sorted(set(files)), []
    for builder in ("text", "json", "parquet"):
        data_files = [str(file) for file in files if builders[file.suffix.lower()] == builder]
        if not data_files:
            continue
        of_text = dict(sample_by=sample_by, encoding_errors=utf8_errors) if builder == "text" else {}
        calls.append((builder, dict(data_files=data_files) | of_text))
    identity = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = f"{identity} {sample_by} {utf8_errors}"
    return dataset_corpus(calls, identity, "check the files that --data names", utf8_errors)


def hub_corpus() -> Corpus:
    calls = [(name, dict(name=config)) for name, config in HUB_CORPUS]
    return dataset_corpus(calls, f"{HUB_CORPUS}", WITHOUT_HUB)


def dataset_corpus(calls: list[tuple[str, dict]], identity: str, advice: str, utf8_errors: str = "strict") -> Corpus:
    """A corpus from calls of datasets.load_dataset."""
    import datasets  # takes seconds, and --demo needs none
    import pyarrow

    files = [file for builder, options in calls if builder != "parquet" for file in options.get("data_files", ())]
    parts = []
    for builder, options in calls:
        try:
            part = datasets.load_dataset(builder, split="train", **options)
            if "text" in part.column_names:
                part = part.select_columns("text")
                if getattr(part.features["text"], "dtype", None) not in ("string", "large_string"):
                    part = part.cast_column("text", datasets.Value("string"))
        except Exception as error:  # datasets raises many kinds, most of them with the reason one level down
            reason = error.__cause__ or error
            if isinstance(reason, UnicodeDecodeError):
                raise not_utf8(files, builder) from error
            raise SystemExit(f"cannot load {builder} {options}: {type(reason).__name__}: {reason}\n{advice}") from error
        if "text" not in part.column_names:
            raise SystemExit(f"{builder} {options} has no column 'text', only {part.column_names}")
        parts.append(part)
    corpus = datasets.concatenate_datasets(parts).with_format("arrow")

    def batches(first: int, size: int = 100) -> Iterator[list[str]]:
        for start in range(first, len(corpus), size):
            texts = corpus[start : start + size]["text"].cast(pyarrow.large_binary()).to_pylist()
            try:
                yield [(text or b"").decode(errors=utf8_errors) for text in texts]
            except UnicodeDecodeError as error:
                raise not_utf8(files, f"one of the documents {start} to {start + size - 1}") from error

    return Corpus(identity, len(corpus), batches)


def not_utf8(files: list[str], elsewhere: str) -> SystemExit:
    """The error that names the first of the files, and the place in it, that is not UTF-8."""
    for file in files:
        position = 0
        with open(file, "rb") as lines:
            for line in lines:
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    place = f"{file}, byte {position + error.start}"
                    return SystemExit(
                        f"{place}: not UTF-8 ({error.reason}); convert it, or pass --replace-invalid-utf8"
                    )
                position += len(line)
    return SystemExit(f"{elsewhere}: not UTF-8; convert it, or pass --replace-invalid-utf8")


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
        tokenizer = train_tokenizer((text for texts in corpus.batches(0) for text in texts), size)
        file.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(f"{file}.partial")
        os.replace(f"{file}.partial", file)
    return load_tokenizer(str(file))


# ----------------------------------------------------------------------------------------------------------------------
# Tokens on disk
# ----------------------------------------------------------------------------------------------------------------------


SHARD = 2**25  # tokens; an interrupted preparation loses what followed the last whole shard


class Shards:
    """Token ids in several memory maps (uint16), one after another."""

    def __init__(self, ids: list[np.ndarray]):
        self.ids, self.starts = ids, np.cumsum([0, *map(len, ids)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        """The ids of a span within one document; no document goes over the end of a shard."""
        i = np.searchsorted(self.starts, span.start, side="right") - 1
        return self.ids[i][span.start - self.starts[i] : span.stop - self.starts[i]]


class Tokens(NamedTuple):
    ids: Shards  # the documents one after another, without special tokens
    offsets: np.ndarray  # (documents + 1,) int64, of documents that are not empty
    counts: np.ndarray  # (vocabulary,) int64: how often each id occurs
    checksums: list[int]  # of the shards


def tokenize(corpus: Corpus, tokenizer: Tokenizer, cache_dir: str | os.PathLike) -> Tokens:
    """The corpus as token ids, from the cache as far as the same corpus and tokenizer have been seen before.

    Memory does not grow with the corpus. A shard is written under a temporary name and renamed when whole, so that an
    interrupted preparation goes on where the last whole one ends.
    """
    key = hashlib.sha256(f"{corpus.identity} {tokenizer.to_str()} shards".encode("utf-8", "replace")).hexdigest()[:16]
    folder = Path(cache_dir) / key
    folder.mkdir(parents=True, exist_ok=True)
    ids, lengths, checksums, document = [], [], [], 0
    counts = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    with tqdm(total=corpus.num_documents, unit="doc", desc="tokenizing", delay=1) as progress:
        while document < corpus.num_documents:
            shard = folder / f"shard-{len(ids):05d}"
            if not shard.exists():
                write_shard(shard, corpus.batches(document), tokenizer, progress)
            try:
                shard_ids, shard_lengths = (
                    np.load(shard / f"{name}.npy", mmap_mode="r") for name in ("ids", "lengths")
                )
                if len(shard_ids) != shard_lengths.sum() or not len(shard_lengths):
                    raise ValueError("wrong size")
                counts += np.load(shard / "counts.npy")
                checksums.append(int(np.load(shard / "checksum.npy")))
            except (OSError, ValueError, EOFError) as error:
                raise SystemExit(
                    f"the token cache {shard} is damaged ({error}); remove that folder and run again"
                ) from error
            ids.append(shard_ids)
            lengths.append(shard_lengths)
            document += len(shard_lengths)
            progress.update(document - progress.n)
    for partial in folder.glob("*.partial"):  # left by a killed run
        if time.time() - partial.stat().st_mtime > 3600:
            shutil.rmtree(partial, ignore_errors=True)
    lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
    offsets = np.cumsum([0, *lengths[lengths > 0]], dtype=np.int64)
    if offsets[-1] == 0:
        raise SystemExit("the corpus is empty: no text, or nothing that the tokenizer keeps")
    return Tokens(Shards(ids), offsets, counts, checksums)


def write_shard(shard: Path, batches: Iterator[list[str]], tokenizer: Tokenizer, progress: tqdm):
    """Tokenizes documents, on all cores, until they make a shard."""
    ids, lengths, total, replaced, start = [], [], 0, 0, time.perf_counter()
    for texts in batches:
        lengths.append(np.zeros(len(texts), dtype=np.int64))
        for pieces in _pieces(texts):
            encodings = tokenizer.encode_batch_fast([text for _, text in pieces], add_special_tokens=False)
            ids.append(np.fromiter(itertools.chain.from_iterable(e.ids for e in encodings), dtype=np.uint16))
            np.add.at(lengths[-1], [document for document, _ in pieces], [len(e) for e in encodings])
            total += len(ids[-1])
            progress.set_postfix_str(f"{total / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
        replaced += sum(text.count("\N{REPLACEMENT CHARACTER}") for text in texts)
        progress.update(len(texts))
        if total >= SHARD:
            break
    if replaced:
        progress.write(f"{replaced} characters of {shard.name} are U+FFFD: text that was not UTF-8, here or before")
    ids = np.concatenate([np.zeros(0, dtype=np.uint16), *ids])
    arrays = dict(ids=ids, lengths=np.concatenate(lengths), counts=np.bincount(ids, minlength=vocab_size(tokenizer)))
    arrays["checksum"] = np.array(zlib.crc32(ids))
    partial = shard.with_name(f"{shard.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        os.replace(partial, shard)
    except OSError as error:
        if shard.exists():  # another run was faster
            return
        raise SystemExit(
            f"cannot write {partial}: {error}\nis the disk full? whole shards are kept, to go on from"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _pieces(texts: list[str], longest: int = 20_000, together: int = 2_000_000) -> Iterator[list[tuple[int, str]]]:
    """(document, text) some at a time, long documents cut at spaces: a tokenizer takes 100 bytes per character, and
    shares the pieces between all cores."""
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
        self.ids, self.segments, self.length, self.vocabulary = tokens.ids, segments, length, vocabulary
        self.windows = -(-(segments[:, 1] - segments[:, 0]) // (length - 2))  # of each segment
        self.ends = np.cumsum(self.windows)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of these numbers start and end in the tokens."""
        segment = np.searchsorted(self.ends, numbers, side="right")
        (start, end), windows = self.segments[segment].T, self.windows[segment]
        window = numbers - (self.ends[segment] - windows)
        return start + (end - start) * window // windows, start + (end - start) * (window + 1) // windows

    def batch(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of these numbers, padded to the longest: (ids int64, real bool), both (rows, length)."""
        starts, ends = self.spans(numbers)
        lengths = ends - starts + 2
        ids = np.full((len(numbers), lengths.max()), self.vocabulary.pad, dtype=np.int64)
        ids[:, 0] = self.vocabulary.cls
        for i, (start, end) in enumerate(zip(starts, ends)):
            ids[i, 1 : lengths[i] - 1] = self.ids[start:end]
        ids[np.arange(len(ids)), lengths - 1] = self.vocabulary.sep
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


def shuffled(places: np.ndarray, n: int, *key: int) -> np.ndarray:
    """The numbers at these places (int64) of a random order of range(n), of which nothing else is computed or kept.

    A Feistel network permutes range(4^k), the next that holds n. What falls outside range(n) goes through again until
    it is inside (cycle walking), which permutes range(n).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = rng(*key).integers(2**64, size=6, dtype=np.uint64)

    def permute(x):
        left, right = x >> half, x & low
        for k in keys:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)  # an odd number: 2^64 over the golden ratio
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
            left, right = right, left ^ (mixed >> np.uint64(32) & low)
        return left << half | right

    numbers = permute(places.astype(np.uint64))
    while (outside := numbers >= n).any():
        numbers[outside] = permute(numbers[outside])
    return numbers.astype(np.int64)


class Batch(NamedTuple):
    """What a process trains on in a step: some of the micro-batches, and counts of them all."""

    micro_batches: list[tuple[torch.Tensor, ...]]  # (input ids, real, labels), each (micro-batch, length)
    labelled: int  # labelled tokens
    real: int  # tokens that are not pads
    padded: int  # tokens, pads included


POOL = 32  # batches that --bucket sorts together


class Batches(torch.utils.data.Dataset):
    """The batch of every step, a function of the seed and the step alone."""

    def __init__(self, phases: list[tuple[int, Rows]], args: argparse.Namespace):
        self.phases, self.args, self.sorted = phases, args, {}

    def numbers(self, step: int, first: int, rows: Rows) -> np.ndarray:
        """The rows of a step, in a phase that began with step `first`: epoch after epoch, each shuffled."""
        size, seed = self.args.batch_size, self.args.seed

        def in_order(start, count):
            epochs, places = np.divmod(np.arange(start, start + count), len(rows))
            parts = [shuffled(places[epochs == e], len(rows), seed, 2, first, e) for e in np.unique(epochs)]
            return np.concatenate(parts)

        if not self.args.bucket:
            return in_order((step - first) * size, size)
        batches = max(1, min(POOL, len(rows) // (4 * size)))  # few of a small epoch: near its end, rows come again
        pool, place = divmod(step - first, batches)
        if (first, pool) not in self.sorted:
            numbers = in_order(pool * batches * size, batches * size)
            starts, ends = rows.spans(numbers)
            numbers = numbers[np.argsort(ends - starts, kind="stable")].reshape(batches, size)
            self.sorted = {(first, pool): rng(seed, 4, first, pool).permutation(numbers)}
        return self.sorted[first, pool][place]

    def whole(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input ids, real, labels), each (batch, length)."""
        first, rows = [phase for phase in self.phases if phase[0] <= step][-1]
        ids, real = rows.batch(self.numbers(step, first, rows))
        inputs, labels = mask_tokens(ids, rows.vocabulary, self.args.mask_rate, rng(self.args.seed, 1, step))
        return inputs, real, labels

    def __getitem__(self, step: int) -> Batch:
        inputs, real, labels = self.whole(step)
        parts = micro_batches((inputs, real, labels), self.args.micro_batch_size)
        padded = sum(part[0].numel() for part in parts)
        return Batch(parts[RANK::PROCESSES], max(1, int((labels != IGNORED).sum())), int(real.sum()), padded)


def micro_batches(batch: tuple[np.ndarray, ...], size: int) -> list[tuple[torch.Tensor, ...]]:
    """(inputs, real, labels) of `size` rows each, cut to the longest rounded up to 32 tokens."""
    parts = []
    for start in range(0, len(batch[0]), size):
        rows = slice(start, start + size)
        longest = 32 * -(-int(batch[1][rows].sum(axis=1).max()) // 32)
        parts.append(tuple(torch.from_numpy(np.ascontiguousarray(part[rows, :longest])) for part in batch))
    return parts


def load(batches: Batches, steps: range, workers: int, pin: bool) -> torch.utils.data.DataLoader:
    """The batches of these steps, prepared ahead of time by so many processes; with none, when they are asked for."""

    def ignore_signals(_):  # those are for the process that trains
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    return torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if workers else None,  # others would copy the corpus
    )


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
        for part in tqdm(micro_batches(self, micro_batch_size), "held-out loss", leave=False, delay=5):
            inputs, real, labels = (tensor.to(device) for tensor in part)
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
    if not args.vocab_size:
        tokenizer = load_tokenizer(args.tokenizer or HUB_TOKENIZER)
    if args.demo:
        corpus = demo_corpus()
    elif args.data:
        corpus = local_corpus(args.data, args.sample_by, "replace" if args.replace_invalid_utf8 else "strict")
    else:
        corpus = hub_corpus()
    if args.vocab_size:
        own = min(Path(args.out).glob(f"{STEP_FOLDER}/tokenizer.json"), default=None) if args.resume else None
        tokenizer = load_tokenizer(str(own)) if own else trained_tokenizer(corpus, args.vocab_size, args.cache_dir)
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
    corpus_digest = digest(tokens.offsets.tobytes(), repr(tokens.checksums).encode())
    baselines = held_out.baselines(tokens, held, vocabulary)
    return Data(tokenizer, vocabulary, phases, held_rows, held_out, baselines, corpus_digest)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

STEP_FOLDER = "step-" + "[0-9]" * 7


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


IDENTITY = (
    "steps length_schedule batch_size micro_batch_size bucket lr warmup_steps weight_decay mask_rate seed".split()
)


def identity_of(args: argparse.Namespace, data: Data) -> dict:
    """What a run is a function of; a checkpoint of another cannot be resumed."""
    config = model_config(args, vocab_size(data.tokenizer), data.vocabulary.pad)
    tokenizer = digest(data.tokenizer.to_str().encode("utf-8", "replace"))
    own = {"--vocab-size": args.vocab_size, "tokenizer": tokenizer, "corpus": data.corpus_digest}
    own |= {name: getattr(args, name) for name in IDENTITY}
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
    upto = [old for old in sorted(out.glob(STEP_FOLDER)) if old <= folder]  # later ones are damaged: not counted
    for old in upto[:-keep]:
        shutil.rmtree(old)


def read_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(weights, training); ValueError where it is damaged."""
    files = folder / "model.pt", folder / "training.pt"
    try:
        for file in files:
            with zipfile.ZipFile(file) as parts:  # torch.save's format; torch.load does not look at the checksums
                if broken := parts.testzip():
                    raise ValueError(f"wrong checksum of {broken} in {file.name}")
        return tuple(torch.load(file, map_location="cpu", weights_only=True) for file in files)
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(str(error)) from error


def newest_checkpoint(out: Path, identity: dict) -> Path | None:
    """The folder of the newest checkpoint that is whole, or None where there is none at all."""
    folders = sorted(out.glob(STEP_FOLDER), reverse=True)
    for folder in folders:
        try:
            _, training = read_checkpoint(folder)
        except ValueError as error:
            print(f"the checkpoint {folder} is damaged ({error})")
            continue
        old = training["identity"]
        differ = [
            f"{name} was {old.get(name)} and is now {new}" for name, new in identity.items() if old.get(name) != new
        ]
        if differ:
            raise SystemExit(f"--resume: {folder} belongs to another run: {'; '.join(differ)}")
        return folder
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
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    args: argparse.Namespace,
    mark: Callable[[str], None] = lambda name: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over all micro-batches of all processes, on the device, where nothing is read back.

    Returns this process's part of the mean loss over the batch's labelled tokens, and whether a gradient was not finite
    (0. or 1.), in which case the weights and the optimizer stay as they are. Of n processes, the r-th takes every n-th
    micro-batch from the r-th on; gradients are exchanged once, with the last. `mark` is told what has just ended.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for i, micro_batch in enumerate(batch.micro_batches):
        inputs, real = (tensor.to(device, non_blocking=True) for tensor in micro_batch[:2])
        labels = micro_batch[2]  # on the CPU, where the model can count them without waiting for a GPU
        seed = rng(args.seed, 3, step, RANK + i * PROCESSES).integers(2**63)
        torch.manual_seed(int(seed))  # for dropout
        last = i + 1 == len(batch.micro_batches)
        with contextlib.nullcontext() if PROCESSES == 1 or last else model.no_sync():
            with autocast(model):
                loss = model(inputs, real, labels=labels, reduction="sum").loss / batch.labelled
            mark("forward, rest")
            (loss * PROCESSES).backward()  # DistributedDataParallel takes the mean over processes; the sum is meant
            mark("backward, rest")
        total += loss.detach()
    not_finite = (~clip_grad_norm_(model.parameters(), 1.0).isfinite()).float()
    optimizer.found_inf = not_finite  # a fused optimizer then does nothing
    optimizer.step()
    optimizer.zero_grad()
    mark("optimizer")
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
            "lengths of --length-schedule; or, in a run that is resumed too, pass --activation-checkpointing\n"
            f"{error}"
        ) from error


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """A list that gets the numbers of SIGTERM and SIGINT (Ctrl-C), to end after the step. A second Ctrl-C ends now."""
    received = []

    def note(number, _):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def joined_processes():
    """The processes talk over gloo, and wait while the first prepares the corpus; torchrun ends all when one dies."""
    if PROCESSES == 1:
        yield
        return
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store keeps the addresses of the processes before a restart (pytorch issue 135712)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=PROCESSES, timeout=datetime.timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def gathered(value) -> list:
    """The values of all processes, in order; and all have come this far."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


def over_processes(value: float, reduction: str = "sum") -> float:
    """The sum of a number over all processes, or its "max"."""
    if PROCESSES == 1:
        return value
    value = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM)
    return value.item()


class Log:
    """log.csv, and the same for TensorBoard. Lines beyond `step`, where a resumed run begins, are written again."""

    columns = "step", "loss", "held_out_loss", "lr", "tokens_per_s", "padding", "skipped_steps"

    def __init__(self, out: Path, step: int, tensorboard: bool):
        self.files = contextlib.ExitStack()
        file, kept, self.board = out / "log.csv", [], None
        if step and file.exists():
            with open(file, newline="", encoding="utf-8") as old:
                rows = [row for row in csv.reader(old) if len(row) == len(self.columns)]
            kept = [row for row in rows if row[0].isdigit() and int(row[0]) <= step]
        partial = file.with_suffix(".partial")
        with open(partial, "w", newline="", encoding="utf-8") as new:
            csv.writer(new).writerows([self.columns, *kept])
        os.replace(partial, file)
        self.csv = self.files.enter_context(open(file, "a", newline="", encoding="utf-8"))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = self.files.enter_context(SummaryWriter(str(out / "tensorboard"), purge_step=step + 1))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.files.close()

    def write(self, step: int, values: dict):
        row = dict(step=step) | values
        csv.writer(self.csv).writerow([row.get(column, "") for column in self.columns])
        self.csv.flush()
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, float(value), step)


def draw_curve(out: Path) -> Path:
    """The loss curves of log.csv as loss.png, where matplotlib is there; returns the file to look at."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return out / "log.csv"
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("held_out_loss", "held out")):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        axes.plot(*zip(*points), label=label)
    axes.set(xlabel="step", ylabel="nats per masked token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
    return out / "loss.png"


def main(argv: list[str]):
    args = parse_args(argv)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if RESTARTED:  # by torchrun: what there is by now is worth more than what the command said at first
        args.resume, args.overwrite = True, False
    out = Path(args.out)
    names = "log.csv loss.png tensorboard args.json config.json model.pt tokenizer.json".split()
    old = [path for name in (*names, STEP_FOLDER + "*") for path in out.glob(name)]  # all that a run writes
    if old and not (args.profile or args.overwrite or args.resume or (args.demo and out == Path("out/demo"))):
        raise SystemExit(f"{out} holds a run or a model already; choose another --out, --overwrite it, or --resume it")
    if not args.profile:
        out.mkdir(parents=True, exist_ok=True)
    with joined_processes():
        for turn in (RANK == 0, RANK > 0):
            if turn:
                data = prepare(args)
            gathered(None)
        identity = identity_of(args, data)
        if any(other != identity for other in gathered(identity)):
            raise SystemExit("the processes see different corpora or tokenizers; let them share --cache-dir and --data")
        with explained_out_of_memory(args):
            if args.profile:
                profile(args, data)
                return
            if RANK == 0:
                if not args.resume:
                    for path in old:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                for path in out.glob(STEP_FOLDER + ".partial"):
                    shutil.rmtree(path)
            folder = newest_checkpoint(out, identity) if args.resume and RANK == 0 else None
            train(args, data, out, identity, gathered(folder)[0])


def build(args: argparse.Namespace, data: Data) -> tuple[MaBERTForMaskedLM, torch.nn.Module, torch.optim.Optimizer]:
    """(model, the same or its DistributedDataParallel, optimizer)."""
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            raise SystemExit(f"there are more processes than GPUs ({torch.cuda.device_count()}) on this machine")
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    model = MaBERTForMaskedLM(model_config(args, vocab_size(data.tokenizer), data.vocabulary.pad)).to(device)
    if args.activation_checkpointing:
        for layer in model.encoder.layers:
            layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    if args.compile:
        model.encoder.compile()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.pattern}, {size:.1f} M parameters, on {device}; {args.steps} steps of {args.batch_size} rows", end="")
    print(f", shared by {PROCESSES} processes" if PROCESSES > 1 else "")
    shared = model
    if PROCESSES > 1:
        minutes = datetime.timedelta(minutes=10)
        group = dist.new_group(backend="nccl", timeout=minutes) if device.type == "cuda" else None
        shared = DistributedDataParallel(model, process_group=group)
    return model, shared, make_optimizer(model, args.weight_decay)


def batches_ahead(
    args: argparse.Namespace, phases: list[tuple[int, Rows]], steps: range
) -> torch.utils.data.DataLoader:
    """Beside a GPU, two processes prepare batches, in pinned memory; a CPU has no core to spare for them."""
    on_gpu = torch.cuda.is_available()
    can_fork = "fork" in torch.multiprocessing.get_all_start_methods()
    return load(Batches(phases, args), steps, workers=2 * (on_gpu and can_fork), pin=on_gpu)


def rehearse(model: MaBERTForMaskedLM, args: argparse.Namespace):
    """A micro-batch of the longest rows, forward and backward: too little memory shows now, not in the last phase."""
    length = max(length for length, _ in args.length_schedule)
    ids = torch.ones(args.micro_batch_size, length, dtype=torch.long, device=model.decoder_bias.device)
    labels = ids.masked_fill(torch.rand(ids.shape, device=ids.device) > args.mask_rate, IGNORED)
    with autocast(model):
        loss = model(ids, labels=labels).loss
    loss.backward()
    model.zero_grad()


def planned_tokens(args: argparse.Namespace, phases: list[tuple[int, Rows]], first: int, last: int) -> int:
    """The tokens of steps first to last - 1 if all rows were full: their time is about in proportion."""
    ends = [begins for begins, _ in phases[1:]] + [args.steps]
    steps = (max(0, min(last, end) - max(first, begins)) for (begins, _), end in zip(phases, ends))
    return args.batch_size * sum(rows.length * n for (_, rows), n in zip(phases, steps))


@dataclasses.dataclass
class Sums:
    """What checkpoints keep beside the model and the optimizer. Tensors stay on the device until the log is written."""

    losses: torch.Tensor  # of finite steps since the last line of the log; this process's part
    skipped: torch.Tensor  # steps since then whose gradients were not finite
    in_a_row: torch.Tensor  # of those, the last without a pause
    failed_at: torch.Tensor  # the step when ten came in a row, else 0
    line: int = 0  # the step of the last line of the log
    real: int = 0  # tokens since then that were not pads
    padded: int = 0  # tokens since then
    skipped_before: int = 0  # steps

    def add(self, step: int, batch: Batch, loss: torch.Tensor, not_finite: torch.Tensor):
        self.losses += loss.where(not_finite == 0, 0)
        self.skipped += not_finite
        self.in_a_row = (self.in_a_row + 1) * not_finite
        self.failed_at = self.failed_at.where((self.failed_at > 0) | (self.in_a_row < 10), step)
        self.real += batch.real
        self.padded += batch.padded

    def state(self) -> dict[str, float]:
        """Numbers, the same in all processes."""
        state = {name: getattr(self, name) for name in vars(self)}
        state = {name: value.item() if torch.is_tensor(value) else value for name, value in state.items()}
        return state | dict(losses=over_processes(state["losses"]))

    def start_line(self, step: int):
        self.skipped_before += int(self.skipped)
        self.losses, self.skipped = torch.zeros_like(self.losses), torch.zeros_like(self.skipped)
        self.line, self.real, self.padded = step, 0, 0


def train(args: argparse.Namespace, data: Data, out: Path, identity: dict, folder: Path | None):
    """The run, from the checkpoint in `folder` if there is one."""
    model, shared, optimizer = build(args, data)
    zero, first = torch.zeros((), device=model.decoder_bias.device), 0
    sums = Sums(*(zero.clone() for _ in range(4)))
    if folder:
        weights, training = read_checkpoint(folder)
        first = training["step"]
        model.load_state_dict(weights)
        optimizer.load_state_dict(training["optimizer"])
        for name, value in training["sums"].items():
            setattr(sums, name, zero + value if torch.is_tensor(getattr(sums, name)) else value)
        if RANK > 0:
            sums.losses = zero.clone()
        del weights, training
        print(f"resuming {folder}")
    elif args.resume:
        print(f"{out} has no checkpoint; starting at step 0")
    warmup = min(args.warmup_steps, args.steps // 10)
    if warmup < args.warmup_steps:
        print(f"warm-up shortened from {args.warmup_steps} to {warmup} steps, a tenth of the run")
    if zero.is_cuda:
        rehearse(model, args)

    held_out_loss, log = math.nan, contextlib.nullcontext()
    if RANK == 0:
        (out / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n", encoding="utf-8")
        log = Log(out, first, args.tensorboard)
    with signals() as received, log:
        if first == 0 and RANK == 0:
            held_out_loss = data.held_out.loss(model, args.micro_batch_size)
            log.write(0, dict(held_out_loss=f"{held_out_loss:.4f}", skipped_steps=0))
        timed_from, start = first, time.perf_counter()
        batches = batches_ahead(args, data.phases, range(first, args.steps))
        shown = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
        progress = tqdm(batches, "training", args.steps, unit="step", initial=first, bar_format=shown)
        for step, batch in enumerate(progress, first + 1):
            lr = learning_rate(step - 1, args.steps, args.lr, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums.add(step, batch, *train_step(shared, optimizer, batch, step - 1, args))

            stopped_by = int(over_processes(received[0] if received else 0, "max"))
            saves = step % args.save_every == 0 or stopped_by
            evaluates = step % args.eval_every == 0 or step == args.steps
            if evaluates or step % args.log_every == 0:
                now = sums.state()
                if failed_at := int(now["failed_at"]):
                    lr = learning_rate(failed_at - 1, args.steps, args.lr, warmup)
                    last = max(out.glob(STEP_FOLDER), default="none")
                    raise SystemExit(
                        f"gradients were not finite in ten steps in a row, up to step {failed_at}, at learning rate "
                        f"{lr:.2e}: a lower --lr or more --warmup-steps helps; last checkpoint {last}"
                    )
                finite, seconds = step - now["line"] - now["skipped"], time.perf_counter() - start
                tokens_per_s = now["real"] / (step - now["line"]) * (step - timed_from) / seconds
                planned = (
                    planned_tokens(args, data.phases, *span) for span in ((step, args.steps), (timed_from, step))
                )
                left = datetime.timedelta(seconds=round(next(planned) * seconds / next(planned)))
                row = dict(
                    loss=f"{now['losses'] / max(1, finite):.4f}", lr=f"{lr:.2e}", tokens_per_s=f"{tokens_per_s:.0f}"
                )
                row["padding"] = f"{1 - now['real'] / now['padded']:.3f}"
                row["skipped_steps"] = int(now["skipped_before"] + now["skipped"])
                if RANK == 0:
                    if evaluates:
                        held_out_loss = data.held_out.loss(model, args.micro_batch_size)
                        row["held_out_loss"] = f"{held_out_loss:.4f}"
                    log.write(step, row)
                    progress.set_postfix(row | dict(held_out_loss=f"{held_out_loss:.4f}", left=left))
                sums.start_line(step)
                timed_from, start = step, time.perf_counter()
            if saves:
                now = sums.state()
                if RANK == 0:
                    training = dict(step=step, optimizer=optimizer.state_dict(), identity=identity, sums=now)
                    save_checkpoint(out, step, args.keep, model, data.tokenizer, training)
            if stopped_by:
                name = signal.Signals(stopped_by).name
                print(f"\nstopped by {name} after step {step}, which is saved; --resume goes on")
                raise SystemExit(128 + stopped_by)
    if RANK > 0:
        return
    if math.isnan(held_out_loss):  # resumed after the last step
        held_out_loss = data.held_out.loss(model, args.micro_batch_size)
    save(out, model, data.tokenizer)
    curve = draw_curve(out)

    # What came of it
    unigram, uniform = data.baselines
    predicted = (data.held_out.labels != IGNORED).sum()
    print(f"\nheld-out loss {held_out_loss:.3f} nats per masked token ({predicted} of them);", end=" ")
    print(f"the training text's word frequencies give {unigram:.3f}, chance {uniform:.3f}")
    side = "below" if held_out_loss < unigram else "above"
    print(f"{abs(unigram - held_out_loss):.2f} nats {side} the word frequencies. Held-out text with one word masked:")
    show_guesses(model, data.tokenizer, data.held_rows)
    print(f"\nThe model is in {out}, its curve in {curve}. In Python:")
    print(f"  model = MaBERTForMaskedLM.from_pretrained({str(out)!r})  # from mabert import MaBERTForMaskedLM")
    print(f"  tokenizer = Tokenizer.from_file({str(out / 'tokenizer.json')!r})  # from tokenizers import Tokenizer")


# ----------------------------------------------------------------------------------------------------------------------
# Where the time goes
# ----------------------------------------------------------------------------------------------------------------------

# Dense bf16, from NVIDIA's data sheets; the first name that fits counts
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989}


class Stopwatch:
    """Sums time by the names that the ends of the intervals are given; on a GPU, by its own clock, without waiting."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.marks = device.type == "cuda", []

    def __call__(self, name: str):
        now = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            now.record()
        self.marks.append((name, now))

    def seconds(self) -> dict[str, float]:
        if self.on_gpu:
            torch.cuda.synchronize()
        total = {}
        for (_, begin), (name, end) in zip(self.marks, self.marks[1:]):
            total[name] = total.get(name, 0) + (begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin)
        return total


def flops_per_token(config: MaBERTConfig, length: int, mask_rate: float) -> float:
    """Floating-point operations of matrix products and convolutions, forward and backward, for one token of a row."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        MaBERT(config)(torch.zeros(1, length, dtype=torch.long))
    head = 2 * config.hidden_size * (config.hidden_size + config.vocab_size) * mask_rate
    return 3 * (counter.get_total_flops() / length + head)


def profile(args: argparse.Namespace, data: Data, warm_up: int = 2):
    """Prints, for each row length, where the time of args.profile training steps goes. Writes nothing."""
    model, shared, optimizer = build(args, data)
    device = model.decoder_bias.device
    watch = Stopwatch(device)
    for kind, layer in zip(args.pattern, model.encoder.layers):
        if not args.compile:  # hooks would cut the graph
            layer.register_forward_pre_hook(lambda *_: watch("forward, rest"))
            layer.register_forward_hook(lambda *_, kind=kind: watch(f"forward, {kind} layers"))
            layer.register_full_backward_pre_hook(lambda *_: watch("backward, rest"))
            layer.register_full_backward_hook(lambda *_, kind=kind: watch(f"backward, {kind} layers"))
    for _, rows in data.phases:
        real = padded = 0
        for i, batch in enumerate(batches_ahead(args, [(0, rows)], range(warm_up + args.profile))):
            watch("waiting for data")
            train_step(shared, optimizer, batch, i, args, watch)
            if i < warm_up:
                watch.marks = watch.marks[-1:]
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            else:
                real, padded = real + batch.real, padded + batch.padded
        parts = watch.seconds()
        seconds = sum(parts.values())
        tflops = flops_per_token(model.config, rows.length, args.mask_rate) * real / seconds / PROCESSES / 1e12
        print(
            f"\nrows of {rows.length} tokens: {seconds / args.profile:.3f} s a step, {real / seconds:.0f} tokens/s, ",
            end="",
        )
        print(f"{1 - real / padded:.1%} padding, {tflops:.3g} TFLOP/s a device", end="")
        if device.type == "cuda":
            name = torch.cuda.get_device_name()
            if peak := next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None):
                print(f" ({tflops / peak:.1%} of the {name}'s {peak})", end="")
            print(f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most", end="")
        print()
        for name, part in parts.items():
            print(f"  {name:20}{1000 * part / args.profile:10.1f} ms a step{part / seconds:8.1%}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; whole shards of the corpus and checkpoints are kept, and --resume goes on from them"
        ) from None
    except OSError as error:  # a full disk, a folder that may not be written
        raise SystemExit(f"cannot go on: {error}") from error
    except RuntimeError as error:
        if PROCESSES == 1 or "gloo" not in str(error):
            raise
        raise SystemExit(f"process {RANK} lost another, whose message says why ({error})") from error
