"""Tests of MaBERT, padding invariance first.

`pytest` runs all of them on a CPU; those marked gpu need CUDA, and are skipped without it.
"""

import argparse
import contextlib
import csv
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch._dynamo.testing import CompileCounter

import bench
import finetune_glue
import mabert
import train_mlm
from mabert import (
    MaBERT,
    MaBERTConfig,
    MaBERTForMaskedLM,
    MambaMixer,
    Pooling,
    reference_scan,
    selective_scan,
)
from mabert import MaBERTForSequenceClassification as Classifier

ROOT = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # the models are tiny: more threads would wait for each other
cannot_run = not mabert.triton or (DEVICE == "cpu" and not mabert.INTERPRETED)
interpreted = pytest.mark.skipif(cannot_run, reason="test_the_kernels_in_the_interpreter runs it")
if mabert.INTERPRETED:
    # Triton's interpreter prepares its language anew in each call of a function: half of the time
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = cache(interpreter._patch_lang)
        interpreter._LangPatchScope.restore = lambda scope: None


def tiny(pattern="MMT", **changes) -> MaBERTConfig:
    sizes = dict(vocab_size=60, hidden_size=16, num_heads=2, intermediate_size=32)
    sizes |= dict(d_state=4, max_position=32)
    return MaBERTConfig(pattern=pattern, dropout=0.0, **sizes | changes)


def build(model_class, config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return model_class(config).to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def deviation(results) -> float:
    """The largest relative difference between the tensors of a result and those of the first."""
    first, *others = results
    changes = [relative(x, exact) for result in others for x, exact in zip(result, first)]
    return torch.tensor(changes).max().item()  # NaN, if there is one


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# ---- Padding changes nothing ----
#
# Losses, logits, hidden states of real tokens and gradients are computed without pads and with
# them, and compared. Where masking is complete they are equal; where it is not, the same comparison
# must find a change. README runs this section by the names of its tests: they begin with
# "test_padding", and no others do.

PADS = {  # on the left and on the right of each row, and the shift of `padded`
    "pads-left": (4, 0, 0),
    "pads-right": (0, 9, 0),
    "pads-around": (1, 2, 3),
}
EXACT = 1e-12  # the most that rounding changes in float64
PATTERNS = ("M", "T", "MTT", "TM", "MT", "TMM", "MMT", "TTM", "W", "MW", "MWT", "H", "WHTM")
STAGES = {  # names of the forms of masking
    "none": (),
    "pre": ("pre",),
    "post": ("post",),
    "scan": ("scan",),
    "pre+post": ("pre", "post"),  # the paper's
    "pre+scan": ("pre", "scan"),
}


def padded(rows, left, right, shift=0, value=0):
    """Rows with pads on both sides: `left`, then the row, then `right`. With a shift, each row has
    this many more on the left, and fewer on the right, than the one above it."""
    results = []
    for i, row in enumerate(rows):
        below = len(rows) - 1 - i
        sides = (left + i * shift, right + below * shift)
        results.append(F.pad(row, sides, value=value))
    return torch.stack(results)


def model_with_large_weights(model_class, config, dtype):
    """A model far from its initialisation, so that a leak is as large as a trained model's."""
    model = build(model_class, config, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def drift(config, pads: str, dtype=torch.float64) -> float:
    """The largest relative change that pads make to what the two models compute."""
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (3, 11))
    token_labels = torch.randint(0, 60, (3, 11))
    token_labels[torch.rand(3, 11) < 0.5] = -100

    changes = []
    for model_class in (MaBERTForMaskedLM, Classifier):
        model = model_with_large_weights(model_class, config, dtype)
        results = []
        for sides in ((0, 0, 0), PADS[pads]):
            labels = torch.tensor([0, 1, 1])
            if model_class is MaBERTForMaskedLM:
                labels = padded(token_labels, *sides, value=-100)
            mask = padded(torch.ones(3, 11), *sides)
            inputs = padded(ids, *sides, value=7), mask
            output = model(*inputs, labels=labels)
            hidden = model.encoder(*inputs)[mask == 1]
            results.append([*output, hidden, gradient(output.loss, model)])
        changes.append(deviation(results))
    return torch.tensor(changes).max().item()


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_changes_nothing(pattern, pads):
    assert drift(tiny(pattern), pads) < EXACT


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_changes_nothing_in_float32(pattern):
    assert drift(tiny(pattern), "pads-around", torch.float32) < 1e-5


VARIANTS = {  # of the config; the pooling "attn" is left out, since it sees pads by definition
    "causal": dict(causal_conv=True),
    "cls": dict(pooling="cls"),
    "mean": dict(pooling="mean"),
    "pre+scan": dict(psm=("pre", "scan")),
    "pre+scan-causal": dict(psm=("pre", "scan"), causal_conv=True),
}


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing_in_variants(variant, pads):
    assert drift(tiny("MWHT", **VARIANTS[variant]), pads) < EXACT


@interpreted
def test_padding_changes_nothing_with_the_kernels_in_float32():
    """Each channel has one state, since Triton's interpreter takes its time for each."""
    with torch.device(DEVICE):
        config = tiny("MWT", d_state=1, scan_backend="triton")
        assert drift(config, "pads-around", torch.float32) < 1e-5


HARMLESS = [  # pattern, pads, the convolution, and a form of masking under which none leaks
    # the scan meets these pads after the real tokens, and a causal convolution brings none in
    *((pattern, pads, "causal", form)
      for pattern, pads in (("MMT", "pads-right"), ("H", "pads-right"), ("W", "pads-left"))
      for form in ("none", "pre+post")),
    # a centred one sees them, or the zeros of stage pre
    *((pattern, pads, "centred", form)
      for pattern, pads in (("MMT", "pads-right"), ("H", "pads-right"), ("W", "pads-left"))
      for form in ("pre", "pre+post")),
    # attention needs no stage
    ("TT", "pads-left", "centred", "none"),
    ("TT", "pads-right", "centred", "none"),
]  # fmt: skip


@pytest.mark.parametrize("pattern, pads, convolution, form", HARMLESS)
def test_padding_changes_nothing_where_fewer_stages_suffice(pattern, pads, convolution, form):
    config = tiny(pattern, psm=STAGES[form], causal_conv=convolution == "causal")
    assert drift(config, pads) < EXACT


LEAKS = [  # the same, where pads leak
    # the scan meets these pads before the real tokens; under the paper's two stages the
    # convolution's bias still moves the state
    *((pattern, pads, convolution, form)
      for pattern, pads in (("M", "pads-left"), ("W", "pads-right"), ("H", "pads-left"),
                            ("MMT", "pads-left"), ("WHTM", "pads-left"), ("WHTM", "pads-right"))
      for convolution, form in (("centred", "none"), ("causal", "none"), ("centred", "pre+post"))),
    # it meets these after the real tokens; the centred convolution brings them in
    *((pattern, pads, "centred", "none")
      for pattern, pads in (("M", "pads-right"), ("W", "pads-left"), ("H", "pads-right"),
                            ("MMT", "pads-right"))),
    # pre or scan alone, or post
    ("M", "pads-left", "centred", "pre"),
    ("M", "pads-left", "centred", "scan"),
    ("M", "pads-right", "centred", "scan"),
    ("M", "pads-right", "centred", "post"),
]  # fmt: skip


@pytest.mark.parametrize("pattern, pads, convolution, form", LEAKS)
def test_padding_leaks_where_a_stage_is_missing(pattern, pads, convolution, form):
    config = tiny(pattern, psm=STAGES[form], causal_conv=convolution == "causal")
    assert 1e-3 < drift(config, pads) < math.inf


@pytest.mark.parametrize("causal_conv", [True, False])
def test_padding_and_tokens_are_flipped_for_a_mirrored_layer(causal_conv):
    layer, mirrored = (build(mabert.LAYERS[name], tiny(causal_conv=causal_conv)) for name in "MW")
    mirrored.load_state_dict(layer.state_dict())
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    mask = torch.rand(2, 12) < 0.7
    for flipped, mask_ in ((mask.flip(1), mask), (None, None)):
        assert relative(mirrored(x, mask_), layer(x.flip(1), flipped).flip(1)) < 1e-12

    # what is on the left does not reach a mirrored layer's tokens, but by the centred convolution
    changed = x.clone()
    changed[:, 0] += torch.randn(2, 16, dtype=torch.float64)
    seen = (mirrored(changed) - mirrored(x)).abs().amax(dim=(0, 2)) > 0
    assert seen[0] and not seen[1 + (0 if causal_conv else 2) :].any()


@pytest.mark.parametrize("psm, is_zero", [(("post",), True), (("pre", "scan"), False)])
def test_padding_is_zero_in_the_output_with_post_alone(psm, is_zero):
    layer = build(mabert.LAYERS["M"], tiny(psm=psm))
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    mask = masks(6)[1:3].cpu()
    assert layer(x, mask)[~mask].eq(0).all() == is_zero


@pytest.mark.parametrize("causal_conv", [True, False])
def test_padding_in_holes_may_hold_any_ids(causal_conv):
    """More is not promised of a mask with holes: with the holes closed up, the convolution would
    see other neighbours."""
    model = build(MaBERTForMaskedLM, tiny("MMTM", causal_conv=causal_conv))
    ids = torch.randint(1, 60, (6, 12))
    real = masks(12).cpu()
    results = []
    for other in (0, 9, ids):
        output = model(ids.where(real, other), real, labels=ids.where(real, -100))
        results.append([output.logits, gradient(output.loss, model)])
    assert deviation(results) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pooling", mabert.POOLINGS)
def test_padding_of_whole_rows_stays_finite(pooling, dtype):
    ids = torch.randint(1, 60, (3, 7))
    mask = torch.tensor([[1] * 7, [0] * 7, [0] * 3 + [1] * 4])
    for psm in ((), mabert.PSM_STAGES):
        model = build(Classifier, tiny("MTM", psm=psm, pooling=pooling), dtype)
        hidden = model.encoder(ids, mask)
        assert hidden.isfinite().all()
        if psm:
            assert hidden[mask == 0].eq(0).all()  # stage post
        assert model.pooling(hidden, mask)[1].eq(0).all()
        loss = model(ids, mask, labels=torch.tensor([0, 1, 0])).loss
        assert gradient(loss, model).isfinite().all()


# ---- Helpers of all sections below ----


def refused(call, *args, said, error=SystemExit) -> str:
    """The error that a call raises, which says this: itself or, as argparse does, on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(error) as caught:
        call(*args)
    message = f"{caught.value} {stderr.getvalue()}"
    assert re.search(said, message, re.DOTALL), message
    return str(caught.value)


def put(file, contents):
    """Writes bytes, a text or an object into a file; with None, deletes the file."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).unlink(missing_ok=True)
    if isinstance(contents, (bytes, str)):
        Path(file).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    elif contents is not None:
        torch.save(contents, file)


# What every test finds in a folder of its own

MODEL = "model/tokenizer.json"
WEIGHTS = "model/model.pt"
WORDS = """the a cat dog bird sees likes hears red green small big house tree and or not quickly
    slowly today""".split()
WORDLIST = [f"w{i}" for i in range(40)]


def words_tokenizer(words):
    vocabulary = {word: i for i, word in enumerate([*train_mlm.SPECIAL_TOKENS, *words])}
    tokenizer = train_mlm.Tokenizer(train_mlm.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(train_mlm.SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = train_mlm.pre_tokenizers.BertPreTokenizer()
    return train_mlm.in_our_form(tokenizer)


def save_model(folder, model_class=MaBERTForMaskedLM, **changes):
    """A small random model, with a tokenizer for which each word is a token, and which adds no
    [CLS] by itself."""
    build(
        model_class, tiny(**dict(pattern="WH", vocab_size=45) | changes), torch.float32
    ).save_pretrained(folder)
    tokenizer = json.loads(words_tokenizer(WORDLIST).to_str()) | dict(post_processor=None)
    put(Path(folder, "tokenizer.json"), json.dumps(tokenizer))


def put_glue(folder, task: str, split: str, contents: str | bytes) -> Path:
    """A split of a task, where the benchmark's download has it."""
    name = f"{finetune_glue.TASKS[task].folder}/{split}.tsv"
    if split == "test_ax":
        name = "diagnostic/diagnostic.tsv"
    path = Path(folder, name)
    put(path, contents)
    return path


def write_glue(**sizes):
    """CoLA, MRPC and STS-B in the benchmark's layout, where the label depends on one word. sizes:
    how many examples each split has."""
    rng = np.random.default_rng(0)
    for split, size in sizes.items():
        is_test = split == "test"
        cola = "index\tsentence\n" if is_test else ""
        mrpc = "Quality\t#1 String\t#2 String\n"
        stsb = STSB
        for i in range(size):
            # the words w0 and w1 tell the label; other words stand around them
            words = list(rng.choice(WORDLIST[2:], rng.integers(3, 12)))
            label = int(rng.integers(2))
            words.insert(rng.integers(len(words)), WORDLIST[label])
            text = " ".join(words)
            other = " ".join(rng.choice(WORDLIST[2:], 3))

            cola += f"{i}\t{text}\n" if is_test else f"x\t{label}\t\t{text}\n"
            mrpc += f"{label}\t{text}\t{other}\n"
            stsb += f"{text}\t{other}\t{4.5 * label}\n"
        put_glue("glue", "cola", split, cola)
        put_glue("glue", "mrpc", split, mrpc)
        put_glue("glue", "stsb", split, stsb)


def corpus_lines() -> list[str]:
    """Lines of words in the order of WORDS, so that context tells which word is masked."""
    rng = np.random.default_rng(0)
    starts = rng.integers(len(WORDS), size=1500)
    lengths = rng.integers(4, 40, size=1500)
    lines = []
    for start, length in zip(starts, lengths):
        words = [WORDS[(start + i) % len(WORDS)] for i in range(length)]
        lines.append(" ".join(words))
    return lines


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a text, its tokenizer, a model and GLUE, and caches that are not the user's."""
    import datasets

    caches = tmp_path_factory.mktemp("caches")
    variables = dict(
        XDG_CACHE_HOME=caches,  # of train_mlm.py
        HF_DATASETS_CACHE=caches / "datasets",
        OMP_NUM_THREADS=1,
        PYTHONPATH=ROOT,  # where processes find the modules
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", caches / "datasets")
        for name, value in variables.items():
            patch.setenv(name, str(value))
        patch.chdir(tmp_path_factory.mktemp("given"))
        put("corpus.txt", "\n".join(corpus_lines()))
        words_tokenizer(WORDS).save("words.json")
        save_model("model")
        write_glue(train=256, dev=64, test=16)
        yield Path.cwd()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(request, given, tmp_path, monkeypatch):
    if DEVICE == "cpu" and request.node.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA device")
    shutil.copytree(given, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.setattr(finetune_glue, "TASKS", dict(finetune_glue.TASKS))  # --tasks own adds one
    monkeypatch.chdir(tmp_path)


SMALL_RUN = """--out run --no-compile --sample-by line --pattern MWHT --hidden-size 32 --num-heads 2
    --intermediate-size 64 --d-state 4 --dropout 0 --steps 150 --length-schedule 16:0.75 32:0.25
    --batch-size 32 --micro-batch-size 16 --lr 5e-3 --eval-every 75 --log-every 25
    --save-every 50"""


def arguments(flags="") -> list[str]:
    """A small run on the corpus, with its tokenizer, unless flags say otherwise."""
    defaults = SMALL_RUN
    if "--data" not in flags:
        defaults += " --data corpus.txt"
    if "--vocab-size" not in flags and "--tokenizer" not in flags:
        defaults += " --tokenizer words.json"
    return f"{defaults} {flags}".split()


needs_triton = pytest.mark.skipif(not mabert.triton, reason="there is no triton")


class Stub:
    """Stands for a kernel: it notes its name when it is launched, and runs nothing."""

    def __init__(self, name: str, launches: list):
        self.launch = lambda *_, **__: launches.append(name)

    def __getitem__(self, grid):
        return self.launch


def stub_kernels(monkeypatch) -> list[str]:
    """The names of the kernels that are launched from now on, on any device."""
    launches = []
    for name, kernel in list(vars(mabert).items()):
        if isinstance(kernel, mabert.triton.JITFunction):
            monkeypatch.setattr(mabert, name, Stub(name, launches))
    monkeypatch.setattr(mabert, "INTERPRETED", True)
    return launches


# ---- The masked selective scan ----
#
# A loop, and Triton kernels. Without a GPU the tests of the kernels, whose names have "kernels_in",
# run in Triton's interpreter, in a process of their own.

loop = partial(selective_scan, backend="loop")
kernels = partial(selective_scan, backend="triton")
HALF = {torch.bfloat16: 8e-3, torch.float16: 7e-4}  # one rounding (the interpreter cuts bf16)


def scan_inputs(b=2, l=9, d=5, n=3) -> dict:
    torch.manual_seed(0)
    rows, states = (b, l, d), (b, l, n)
    shapes = dict(u=rows, delta=rows, A=(d, n), B=states, C=states, D=(d,), z=rows, delta_bias=(d,))
    inputs = {}
    for name, shape in shapes.items():
        inputs[name] = torch.randn(shape, dtype=torch.float64).to(DEVICE)
    return inputs | dict(A=-inputs["A"].abs())


def each(change, inputs: dict) -> dict:
    return {name: change(x) for name, x in inputs.items()}


def strided(x):
    """The same numbers, with the first dimension innermost in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def masks(l):
    """(6, l): all real, pads left, right, on both sides, anywhere, everywhere."""
    t = torch.arange(l)
    anywhere = torch.rand(l, generator=torch.Generator().manual_seed(0)) > 0.4
    middle = (t >= l // 4) & (t < l - l // 4)
    rows = [t >= 0, t >= l // 3, t <= l // 2, middle, anywhere, t < 0]
    return torch.stack(rows).to(DEVICE)


def y_and_gradients(function, inputs, dy=None, mask=None, **options) -> dict:
    # forward and backward
    inputs = each(lambda x: x.detach().requires_grad_(), inputs)
    copies = each(torch.clone, inputs)
    y = function(**inputs, mask=mask, **dict(delta_softplus=True) | options)
    if dy is None:
        torch.manual_seed(1)
        dy = (2 * torch.randint(-8, 8, y.shape) + 1).to(y) / 16  # exact in all dtypes
    dy_copy = dy.clone()
    results = dict(y=y) | dict(zip(inputs, torch.autograd.grad(y, inputs.values(), dy)))

    # no input was written to
    assert torch.equal(dy, dy_copy)
    for name, x in inputs.items():
        assert torch.equal(x, copies[name]), name

    # pads have no output and get no gradient
    if mask is not None:
        for name in results.keys() & {"y", "u", "delta", "B", "C", "z"}:
            assert results[name][~mask].eq(0).all(), name
    return results


def compare_with_the_reference(function, inputs, dtype=torch.float32, tolerance=1e-5, **options):
    """y and gradients of a function on inputs in the dtype, and of the reference on the same
    numbers in float64."""
    inputs = each(lambda x: x.to(dtype), inputs)
    results = y_and_gradients(function, inputs, **options)
    exact = y_and_gradients(reference_scan, each(torch.Tensor.double, inputs), **options)
    for name, x in exact.items():
        assert results[name].dtype == dtype and results[name].shape == x.shape
        assert (results[name].double() - x).norm() <= tolerance * x.norm(), name


OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "mask")


@pytest.mark.parametrize("without", [(), *([option] for option in OPTIONS), OPTIONS])
def test_scan_in_closed_form(without):
    """s_t = Σ_{τ ≤ t} exp(A (Δ_{τ+1} + … + Δ_t)) Δ_τ u_τ B_τ; an option that is left out does
    as one that has no effect."""
    inputs = scan_inputs() | dict(delta_softplus=True, mask=masks(9)[3:5])
    inputs = {name: x for name, x in inputs.items() if name not in without}
    no_effect = dict(D=0, delta_bias=0, delta_softplus=False, mask=torch.ones(2, 9).to(DEVICE))
    no_effect |= dict(z=torch.tensor(1.2784645427610738, dtype=torch.float64))  # SiLU(z) = 1
    x = types.SimpleNamespace(**no_effect | inputs)

    # Δ, and how much of step τ is left at step t
    delta = x.delta + x.delta_bias
    delta = F.softplus(delta) if x.delta_softplus else delta
    delta = delta * x.mask[..., None]
    sums = delta.cumsum(1)
    decay = torch.exp((sums[:, :, None] - sums[:, None])[..., None] * x.A)  # (b, t, τ, d, n)

    # the output
    past = torch.ones(9, 9).to(x.u).tril()  # τ ≤ t
    v = torch.einsum("tp,btpdn,bpd,bpn,btn->btd", past, decay, delta * x.u, x.B, x.C)
    y = x.mask[..., None] * F.silu(x.z) * (v + x.D * x.u)
    for function in (reference_scan, loop):
        torch.testing.assert_close(function(**inputs), y, rtol=1e-12, atol=1e-12)


PRECISIONS = [(torch.float64, 1e-13), (torch.float32, 2e-6), *HALF.items()]
AROUND_CHUNKS = [1, 2, 15, 16, 17, 32, 40]  # a chunk of the loop is 16 steps


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("rows, layout", [(1, torch.Tensor.contiguous), (4, strided)])
@pytest.mark.parametrize("l", AROUND_CHUNKS)
def test_scan_equals_the_reference_in_any_precision(l, rows, layout, dtype, tolerance, monkeypatch):
    """The loop takes this number of the six rows at a time; inside all is float32 at least."""
    inputs = each(layout, scan_inputs(6, l))
    numbers = rows * 16 * inputs["A"].numel()
    monkeypatch.setattr(mabert, "LOOP_BUFFER", -(-numbers // torch.get_num_threads()))
    for function, autocast in ((loop, False), (loop, True), (reference_scan, True)):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            compare_with_the_reference(function, inputs, dtype, tolerance, mask=masks(l))


EACH_SCAN = pytest.mark.parametrize(
    "function", [loop, pytest.param(kernels, marks=interpreted, id="kernels_in")]
)


@EACH_SCAN
def test_scan_of_half_precision_sums_the_gradients_of_float32_parameters_in_float32(function):
    inputs = scan_inputs(2, 20, 5, 2)
    inputs = each(lambda x: x.bfloat16() if x.dim() == 3 else x.float(), inputs)
    results = y_and_gradients(function, inputs)
    exact = y_and_gradients(reference_scan, each(torch.Tensor.double, inputs))
    for name in ("A", "D", "delta_bias"):
        assert relative(exact[name], results[name].double()) < 1e-5


@EACH_SCAN
def test_scan_keeps_inputs_and_a_state_for_each_chunk(function):
    """50 steps are four chunks; the states of all steps would be 51,200 bytes."""
    inputs = each(lambda x: x.bfloat16().requires_grad_(), scan_inputs(1, 50, 16, 16))
    kept = {}

    def keep(x):
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function(**inputs, delta_softplus=True)
    for x in inputs.values():
        kept.pop(x.data_ptr(), None)
    assert sum(kept.values()) <= 4 * 16 * 16 * 4


@pytest.mark.skipif(DEVICE == "cuda" or not mabert.triton, reason="there is a GPU, or no triton")
@pytest.mark.skipif(mabert.INTERPRETED, reason="this is that process")
def test_the_kernels_in_the_interpreter():
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "kernels_in"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    counts = re.search(r"(\d+) passed, 1 skipped", result.stdout)  # this test itself is skipped
    assert result.returncode == 0 and counts and int(counts[1]) > 40, result.stdout + result.stderr


KERNEL_CASES = [  # b, l, d, n; rows of masks(l); chunks in a segment (None: one segment); dtype
    # about the edges of tiles of 4 and of 8 steps, and of chunks of 16
    *((1, l, 5, 1, None, None, torch.float32) for l in (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33)),
    # all masks
    (6, 9, 3, 2, slice(6), None, torch.float32),
    (6, 17, 3, 1, slice(6), None, torch.float32),
    # several segments; those of 150 steps are more than the 8 of a tile in the second phase
    *((1, l, d, 2, None, 1, torch.float32) for l, d in ((16, 3), (17, 3), (50, 33), (150, 3))),
    (1, 70, 3, 2, None, 2, torch.float32),
    (2, 50, 3, 1, slice(3, 5), 1, torch.float32),
    # no rows; several blocks of channels; a full block; three groups of states, of 16, 16 and 8
    (0, 20, 3, 2, None, None, torch.float32),
    (2, 5, 33, 3, None, None, torch.float32),
    (1, 18, 32, 16, None, None, torch.float32),
    (1, 6, 3, 40, None, None, torch.float32),
    # half precision
    *((1, 20, 5, 2, slice(3, 4), None, dtype) for dtype in HALF),
    *((1, 6, 5, 17, None, None, dtype) for dtype in HALF),
]


@interpreted
@pytest.mark.parametrize("b, l, d, n, rows, chunks, dtype", KERNEL_CASES)
def test_kernels_in_all_cases_equal_the_reference(b, l, d, n, rows, chunks, dtype, monkeypatch):
    def segment_length(l, programs, enough, chunk, device):
        # the passes pick their own segments: forward as many chunks as the case says, backward one
        return chunk * (chunks if enough == 4 else 1)

    if chunks:
        monkeypatch.setattr(mabert, "_segment_length", segment_length)
    mask = None if rows is None else masks(l)[rows]
    inputs = scan_inputs(b, l, d, n)
    compare_with_the_reference(kernels, inputs, dtype, HALF.get(dtype, 1e-5), mask=mask)


CONVOLUTIONS = [  # b, l, d, k, left
    (2, 37, 70, 4, 1),
    (1, 1, 1, 4, 3),
    (1, 64, 64, 2, 0),
    (0, 3, 8, 5, 2),
    (2, 33, 8, 1, 0),
]


@interpreted
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), *HALF.items()])
@pytest.mark.parametrize("b, l, d, k, left", CONVOLUTIONS)
def test_kernels_in_the_convolution_equal_pytorch(b, l, d, k, left, dtype, tolerance):
    inputs = dict(u=torch.randn(b, l, d), weight=torch.randn(d, k), bias=torch.randn(d))
    inputs = each(lambda x: strided(x.to(DEVICE, dtype)).requires_grad_(), inputs)
    in_float64 = each(lambda x: x.detach().double().requires_grad_(), inputs)
    dy = strided(torch.randn(b, l, d, device=DEVICE, dtype=dtype))
    results = []
    for tensors, backend in ((inputs, "triton"), (in_float64, "loop")):
        y = mabert.short_convolution(*tensors.values(), left, backend)
        results.append([y, *torch.autograd.grad(y, tensors.values(), dy.to(y))])
    for x, exact in zip(*results):
        assert x.dtype == dtype
        assert (x.double() - exact).norm() <= 2 * tolerance * exact.norm()
    torch.library.opcheck(mabert._conv_triton, (*inputs.values(), left))


WITHOUT = (
    ["D", "z"],
    ["z", "delta_bias"],
    ["D", "delta_bias"],
    ["D", "z", "delta_bias", "softplus"],
)


@EACH_SCAN
def test_scan_in_calls_without_the_options(function):
    inputs = scan_inputs(1, 9, 3, 2)
    inputs["delta"].abs_()
    for without in WITHOUT:
        given_inputs = {name: x for name, x in inputs.items() if name not in without}
        for mask in (None, masks(9)[4:5]):
            options = dict(delta_softplus="softplus" not in without, mask=mask)
            compare_with_the_reference(function, given_inputs, **options)
    if function is kernels:
        refused(lambda: kernels(**inputs), said="u is float64", error=RuntimeError)


@EACH_SCAN
def test_scan_in_softplus_is_accurate_at_both_ends(function):
    one = torch.ones(1, 1, 1, device=DEVICE)
    for value in (-80.0, -30.0, -12.0, -3.0, 0.0, 3.0, 30.0, 1e4):
        delta = torch.full_like(one, value).requires_grad_()
        y = function(one, delta, -one[0], one, one, delta_softplus=True)  # Δ, from a state of zero
        y.backward()
        exact = torch.tensor(value, dtype=torch.float64)
        assert y.item() == pytest.approx(F.softplus(exact).item(), rel=1e-5, abs=0)
        assert delta.grad.item() == pytest.approx(exact.sigmoid().item(), rel=1e-5, abs=0)


@interpreted
def test_kernels_in_strided_memory_checkpoints_and_repeated_calls_give_the_same_bits():
    b, l, d, n = (2, 300, 1536, 16) if DEVICE == "cuda" else (2, 9, 33, 1)
    inputs = each(torch.Tensor.float, scan_inputs(b, l, d, n))
    slices = each(lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]], inputs)
    checkpointed = partial(torch.utils.checkpoint.checkpoint, kernels, use_reentrant=False)
    dy = torch.ones((), device=DEVICE).expand(b, l, d)
    mask = masks(l)[3:5]
    first = y_and_gradients(kernels, inputs, dy.contiguous(), mask)
    for function, tensors in (
        (kernels, inputs),
        (kernels, each(strided, inputs)),
        (kernels, slices),
        (checkpointed, inputs),
    ):
        results = y_and_gradients(function, tensors, dy, mask)
        assert all(torch.equal(results[name], first[name]) for name in first)


@interpreted
def test_kernels_in_memory_beyond_32_bits():
    """Steps lie 2 GiB apart, in 4 GiB of which a few pages are touched."""
    inputs = each(torch.Tensor.bfloat16, scan_inputs(1, 3, 4, 2))
    near = y_and_gradients(kernels, inputs)
    memory = torch.empty(2**31 + 4, dtype=torch.bfloat16, device=DEVICE)
    for name in ("u", "delta", "B", "C", "z"):
        far = memory.as_strided(inputs[name].shape, (1, 2**30, 1)).copy_(inputs[name])
        results = y_and_gradients(kernels, inputs | {name: far})
        assert all(torch.equal(near[x], results[x]) for x in near)


EACH_OP = pytest.mark.parametrize(
    "op", [mabert._scan_loop, pytest.param(mabert._scan_triton, marks=interpreted, id="kernels_in")]
)


@EACH_OP
def test_scan_ops_are_registered_soundly(op):
    inputs = each(lambda x: x.float().requires_grad_(), scan_inputs(1, 17, 3, 1))
    halves = each(lambda x: strided(x.detach().bfloat16()).requires_grad_(), inputs)
    no_gradients = each(torch.Tensor.detach, halves)
    mask = masks(17)[3:4]
    for tensors, mask_, softplus, keep, dtype in (
        (inputs, mask, True, True, torch.float32),
        (inputs | dict(z=None), None, False, True, torch.float32),
        (halves, mask, False, True, torch.float32),
        (no_gradients, mask, True, False, torch.bfloat16),
    ):
        torch.library.opcheck(op, (*tensors.values(), mask_, softplus, 16, keep, dtype))


def test_a_changed_copy_of_the_file_leaves_this_one_as_it_is(tmp_path, monkeypatch):
    """Names of custom ops are shared by the process: a copy must not take those of this file."""
    source = (ROOT / "mabert.py").read_text()
    without_D = source.replace("v.addcmul_(u_, D)", "pass")
    (tmp_path / "a-copy.py").write_text(without_D)
    monkeypatch.syspath_prepend(tmp_path)
    a_copy = importlib.import_module("a-copy")

    inputs = scan_inputs()
    exact = reference_scan(**inputs)
    assert relative(loop(**inputs), exact) < 1e-12
    assert relative(a_copy.selective_scan(**inputs, backend="loop"), exact) > 1e-3
    del sys.modules["a-copy"]


@interpreted
def test_every_launch_of_the_kernels_in_a_layer_fuses_multiplications(monkeypatch):
    """Triton 3.10 fuses multiplications and additions only where it is told to."""
    launches = []
    kernel_class = type(mabert._outputs)
    run = kernel_class.run

    def recorded(kernel, *args, **options):
        launches.append((kernel.__name__, options.get("enable_fp_fusion")))
        return run(kernel, *args, **options)

    monkeypatch.setattr(kernel_class, "run", recorded)
    monkeypatch.setattr(mabert, "_segment_length", lambda *_: 16)  # all phases of the scan
    mixer = MambaMixer(tiny("M", scan_backend="triton")).to(DEVICE)
    mixer(torch.randn(1, 33, 16, device=DEVICE)).sum().backward()
    names = {name for name, _ in launches}
    assert {"_pack", "_segment_starts", "_convolution", "_gradients"} <= names
    assert all(fused for _, fused in launches)


ROWS_AND_LENGTHS = [
    (1, 1),
    (1, 512),
    (1, 4096),
    (1, 16384),
    (3, 99),
    (11, 4096),
    (20, 999),
    (32, 128),
]


@pytest.mark.parametrize("b, l", ROWS_AND_LENGTHS)
def test_segments_fill_a_gpu_and_are_whole_chunks(b, l, monkeypatch):
    # segments, of a GPU with 132 multiprocessors and rows of 48 blocks of channels
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    programs = b * 48
    chunk = mabert._chunk_length(16)
    for enough in (4, 6):
        segment = mabert._segment_length(l, programs, enough, chunk, torch.device("cuda"))
        assert segment == l or (segment % chunk == 0 and programs < enough * 132)
        if segment not in (l, chunk):
            assert 6 * 132 <= programs * -(-l // segment) <= 12 * 132

    # bytes a channel: kept states take no more than u and delta in half precision, but for one
    for n in (1, 16, 64, 128):
        assert (l - 1) // mabert._chunk_length(n) * n * 4 <= 2 * 2 * l


WITHOUT_TRITON = """import sys, torch; sys.modules["triton"] = None
from mabert import selective_scan
x, A = torch.ones(1, 3, 2), -torch.ones(2, 2)
print(selective_scan(x, x, A, x, x).shape)
selective_scan(x, x, A, x, x, backend="triton")"""


def test_backends_that_cannot_run_are_refused(monkeypatch):
    cannot = r"backend='triton' cannot run here.*: "

    # without the package
    command = [sys.executable, "-c", WITHOUT_TRITON]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "torch.Size([1, 3, 2])\n"
    assert re.search(f"RuntimeError: {cannot}the package triton is not installed", result.stderr)

    # without a GPU
    monkeypatch.setattr(mabert, "INTERPRETED", False)
    inputs = each(lambda x: x.float().cpu(), scan_inputs())
    reason = "it needs a GPU" if mabert.triton else "the package"
    refused(lambda: kernels(**inputs), said=cannot + reason, error=RuntimeError)


MACHINE_CODE = {  # the most instructions a state update; of _gradients the sum of its two loops
    "_pack": 0,
    "_state_ends": 6.5,
    "_gradient_ends": 7.7,
    "_segment_starts": 12,
    "_outputs": 8.9,
    "_gradients": 35.3,
}


@pytest.mark.skipif(mabert.INTERPRETED or not mabert.triton, reason="needs Triton's compiler")
def test_machine_code_of_the_kernels_stays_within_its_budget():
    """For sm_80 with float32 and sm_90 with bf16, in a process of its own: its forks and our
    threads do not mix."""
    code = "import bench; bench.TARGETS = bench.TARGETS[1:3]; "
    code += "bench.main('scan --static --all'.split())"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith("| _")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    targets = [("sm_80", "fp32"), ("sm_90", "bf16")]
    assert [tuple(row[1:3]) for row in rows] == targets * len(MACHINE_CODE)
    for kernel, _, _, registers, stack, instructions, exponentials, shuffles in rows:
        assert float(instructions.split()[-1]) <= MACHINE_CODE[kernel]
        assert int(stack) == 0 and int(registers) <= 170
        assert float(exponentials) <= (2.7 if kernel == "_gradients" else 1.3)
        assert kernel == "_gradients" or float(shuffles) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("b, l", [(1, 3000), (4, 700)])
def test_kernels_on_a_gpu_at_the_size_of_the_base_model(b, l):
    inputs = scan_inputs(b, l, 1536, 16)
    inputs["A"] = -torch.arange(1.0, 17).expand(1536, 16).to(DEVICE)  # as the model's at first
    mask = (torch.rand(b, l) > 0.2).to(DEVICE)
    compare_with_the_reference(kernels, inputs, mask=mask)
    compare_with_the_reference(kernels, inputs, torch.bfloat16, 8e-3, mask=mask)


@pytest.mark.gpu
def test_kernels_on_a_gpu_in_a_cuda_graph():
    inputs = each(torch.Tensor.float, scan_inputs(2, 24))
    dy = torch.ones(2, 24, 5, device="cuda")
    expected = y_and_gradients(selective_scan, inputs, dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = y_and_gradients(selective_scan, inputs, dy)
    graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


# ---- The model ----

IDS = torch.arange(1, 13).view(2, 6)
REFUSED_FIELDS = dict(
    vocab_size=[0],
    hidden_size=[100, 16.0],  # no multiple of num_heads, no integer
    pattern=["MXT", ""],
    num_heads=[True],
    dt_rank=[0],
    causal_conv=[1],
    dropout=[1.0],
    layer_norm_eps=[0.0, math.inf],
    pad_token_id=[40000],
    psm=[("pre", "mid"), "pre"],
    pooling=["max"],
    scan_backend=["cuda"],
)
HALVED = dict(pattern="MH", hidden_size=12)
REFUSED = [  # who is called, with which arguments that do not fit, what the error says
    *((MaBERTConfig, {field: value}, rf"MaBERTConfig\.{field} is .*it must be")
      for field, values in REFUSED_FIELDS.items() for value in values),
    (MaBERTConfig, HALVED | dict(num_heads=3), r"num_heads is 3; it must be even, since a layer H"),
    (MaBERTConfig, HALVED | dict(expand=1), r"expand is 1; it must be even, since a layer H"),
    (MaBERT, dict(input_ids=IDS.tolist()),
     r"input_ids is of type list; .* tensor of shape \(batch, length\), int64"),
    (MaBERT, dict(input_ids=IDS.float()), r"input_ids is torch.float32 of shape \(2, 6\)"),
    (MaBERT, dict(input_ids=IDS[:, :0]), "it is empty"),
    (MaBERT, dict(input_ids=IDS + 50), "input_ids has the value 6[0-2]; .* numbers from 0 to 59"),
    (MaBERT, dict(input_ids=torch.ones(1, 33).long()), "33 real tokens; max_position is 32"),
    (MaBERT, dict(attention_mask=IDS[:, :5]), r"attention_mask .*\(2, 5\).*\(2, 6\)"),
    (MaBERT, dict(attention_mask=torch.full((2, 6), 0.5)), "attention_mask has the value 0.5"),
    (MaBERT, dict(token_type_ids=IDS[:1]), r"token_type_ids is .*\(1, 6\)"),
    (MaBERT, dict(token_type_ids=-IDS), "token_type_ids has the value -1; .* from 0 to 1"),
    (Pooling, dict(x=IDS), "x is torch.int64"),
    (Pooling, dict(mask=[1]), "mask is of type list"),
    (MaBERTForMaskedLM, dict(reduction="none"), "reduction is 'none'"),
    (MaBERTForMaskedLM, dict(labels=IDS[:, 1:]), r"labels is .*\(2, 5\)"),
    (MaBERTForMaskedLM, dict(labels=IDS.double()), "labels is torch.float64"),
    (MaBERTForMaskedLM, dict(labels=IDS * 5), "labels has the value 60; .* from 0 to 59 or -100"),
    (Classifier, dict(labels=torch.tensor([0.9, 1])), "labels is torch.float32"),
    (Classifier, dict(labels=torch.tensor([0, 2])), "labels has the value 2"),
    (Classifier, dict(labels=torch.tensor([0])), r"labels is .*\(1,\).*\(2,\)"),
    *((function, dict(u=torch.ones(9, 5)), r"u is torch.float32 of shape \(9, 5\)")
      for function in (reference_scan, selective_scan)),
    (selective_scan, dict(u=torch.ones(2, 9, 5).long()), "u is torch.int64"),
    (selective_scan, dict(delta=np.ones((2, 9, 5))), "delta is of type ndarray"),
    (selective_scan, dict(A=torch.ones(5)), r"A is torch.float32 of shape \(5,\)"),
    (selective_scan, dict(B=torch.ones(2, 8, 3)), r"B is .* \(2, 8, 3\); .*\(2, 9, 3\)"),
    (selective_scan, dict(C=None), "C is of type NoneType"),
    *((selective_scan, {name: torch.ones(4)}, f"{name} is")
      for name in ("D", "z", "delta_bias", "mask")),
    *((selective_scan, scan_inputs(**{x: 0}), "length, d and n must be at least 1") for x in "ldn"),
    (selective_scan, dict(backend="cuda"), "backend is 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize("called, arguments, message", REFUSED)
def test_arguments_are_refused_by_name(called, arguments, message):
    if called is MaBERTConfig:
        fitting = {}
    elif called is Pooling:
        fitting = dict(x=torch.ones(2, 6, 16))
    elif called in (reference_scan, selective_scan):
        fitting = scan_inputs()
    else:
        fitting = dict(input_ids=IDS)
    function = build(called, tiny()) if hasattr(called, "forward") else called
    error = refused(lambda: function(**fitting | arguments), said=message, error=ValueError)
    assert "\n" not in error


def test_initialisation_is_berts_and_mambas():
    config = tiny("MMT", hidden_size=64, d_state=16)
    model = build(MaBERTForMaskedLM, config, torch.float32)

    # parameters by kind
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            torch.testing.assert_close(p, torch.arange(1.0, 17).log().expand(128, 16))
        elif name.endswith("dt_proj.bias"):
            delta = F.softplus(p)
            assert 0.99e-3 < delta.min() < 2e-3 and 0.07 < delta.max() < 0.101
        elif re.search("conv1d|dt_proj.weight", name):
            # PyTorch's: uniform ±1/√4, of four taps and of rank 4
            assert 0.26 < p.std() < 0.32 and 0.45 < p.abs().max() <= 0.5
        elif p.dim() == 1:  # biases, D, weights of LayerNorm
            assert p.eq(0 if "bias" in name else 1).all()
        else:
            assert 0.018 < p.std() < 0.022

    # the decoder is the word embedding, whose pad is zero
    tied = [name for name, p in model.named_parameters() if 60 in p.shape]
    assert tied == ["decoder_bias", "encoder.word_embeddings.weight"]
    assert model.encoder.word_embeddings.weight[0].eq(0).all()

    # layers differ; A < 0, so that the state decays; the centred convolution
    first, second = (layer.mixer for layer in model.encoder.layers[:2])
    assert not torch.equal(first.dt_proj.bias, second.dt_proj.bias)
    assert first(torch.ones(1, 2000, 64)).isfinite().all()
    assert MambaMixer(replace(config, causal_conv=False)).conv_left == 1
    refused(MaBERT, "base", said="config is 'base'; it must be a MaBERTConfig", error=ValueError)


def test_a_hybrid_layer_has_half_of_the_heads_and_half_of_the_inner_width():
    for expand in (2, 8):
        layer = mabert.LAYERS["H"](tiny("H", expand=expand))
        assert layer.mixer.D.shape == (expand // 2 * 16,) and layer.attention.heads == 1


def test_a_hybrid_layer_is_the_mean_of_its_normalised_halves():
    layer = build(mabert.LAYERS["H"], tiny("H"))
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    halves = layer.norms[0](layer.attention(x)) + layer.norms[1](layer.mixer(x))
    torch.testing.assert_close(layer.mix(x, None), halves / 2)
    for norm in layer.norms:
        assert norm.weight.sub(0.1).abs().max() < 1e-6


def test_attention_and_the_classifier_have_dropout():
    config = replace(tiny(), dropout=0.5)
    attention = build(mabert.SelfAttention, config)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    assert not torch.equal(attention(x), attention(x))
    classifier = build(Classifier, config)
    classifier.encoder.eval()
    assert not torch.equal(classifier(IDS).logits, classifier(IDS).logits)


def test_masks_and_ids_of_any_kind_and_token_types():
    model = build(MaBERT, tiny())
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    for dtype in (torch.bool, torch.float32, torch.float16):
        assert torch.equal(model(IDS.int(), mask.to(dtype)), model(IDS, mask))
    assert relative(model(IDS), model(IDS, torch.ones(2, 6))) < 1e-14
    assert torch.equal(model(IDS), model(IDS, token_type_ids=torch.zeros_like(IDS)))
    assert relative(model(IDS, token_type_ids=torch.ones_like(IDS)), model(IDS)) > 1e-3


def test_max_position_counts_real_tokens_and_can_be_stretched():
    config = tiny(max_position=5)
    model = build(MaBERT, config)

    # five real tokens fit, in a row of nine
    ids = torch.randint(1, 60, (2, 9))
    mask = torch.tensor([[0] * 4 + [1] * 5] * 2)
    model(ids, mask)
    mask[0, 0] = 1
    refused(model, ids, mask, said="a row has 6 real tokens; max_position is 5", error=ValueError)

    # nine rows of the table, each second one between two old ones
    refused(model.resize_positions, 0, said="max_position is 0", error=ValueError)
    old = model.position_embeddings.weight.detach().clone()
    model.resize_positions(9)
    new = model.position_embeddings.weight
    torch.testing.assert_close(new[::2], old)
    torch.testing.assert_close(new[1::2], (old[1:] + old[:-1]) / 2)
    assert model.config.max_position == 9 and config.max_position == 5 and new.requires_grad
    model(ids)

    # a frozen table stays frozen
    new.requires_grad_(False)
    model.resize_positions(11)
    assert not model.position_embeddings.weight.requires_grad


def test_poolings_weigh_real_tokens_and_attn_pads_too():
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    mask = torch.tensor([[1] * 6, [0, 1, 1, 0, 0, 0], [0] * 5 + [1]])
    real = [row[m == 1] for row, m in zip(x, mask)]
    score = build(Pooling, tiny()).score

    def attended(row):
        return score(row).softmax(0).T[0] @ row

    expected = dict(
        map=[attended(row) for row in real],
        attn=[attended(row) for row in x],  # which has no mask, by definition
        cls=[row[0] for row in real],
        mean=[row.mean(0) for row in real],
    )
    assert expected.keys() == set(mabert.POOLINGS)
    for kind, rows in expected.items():
        pooled = build(Pooling, tiny(pooling=kind))(x, mask)
        torch.testing.assert_close(pooled, torch.stack(rows))


FEW = torch.tensor([[-100] * 4 + [7, -100], [-100, 8, -100, -100, -100, 9]])
NUMBERS = torch.tensor([0.5, 3])
LABELS = [  # of which model, with how many labels
    *((MaBERTForMaskedLM, 2, labels) for labels in (FEW, FEW.int(), torch.full((2, 6), -100))),
    *((Classifier, 4, torch.tensor(labels)) for labels in ([3, 1], [-100, 1], [-100, -100])),
    *((Classifier, 1, NUMBERS.to(dtype)) for dtype in (torch.float32, torch.float16, torch.int64)),
]


@pytest.mark.parametrize("model_class, num_labels, labels", LABELS)
def test_losses_are_means_over_the_labels_that_count(model_class, num_labels, labels):
    model = build(model_class, tiny(num_labels=num_labels))
    is_lm = model_class is MaBERTForMaskedLM
    counts = labels != -100
    full = model(IDS)
    output = model(IDS, labels=labels)

    # logits: with labels, a language model has those of the labelled positions only
    assert full.loss is None
    assert full.logits.shape == (*labels.shape, 60 if is_lm else num_labels)
    logits = full.logits[counts] if is_lm else full.logits
    torch.testing.assert_close(output.logits, logits)

    # losses; where no label counts, zero
    if num_labels == 1:
        loss = (logits[:, 0] - labels).square().sum()
    else:
        loss = F.cross_entropy(full.logits[counts], labels[counts].long(), reduction="sum")
    torch.testing.assert_close(output.loss, loss / max(1, counts.sum()))
    assert gradient(output.loss, model).isfinite().all()
    if is_lm:
        torch.testing.assert_close(model(IDS, labels=labels, reduction="sum").loss, loss)


def test_zeros_round_the_vocabulary_up_to_a_multiple_of_64_and_change_nothing(monkeypatch):
    monkeypatch.setitem(mabert.VOCAB_MULTIPLE, "cpu", mabert.VOCAB_MULTIPLE["cuda"])
    model = build(MaBERTForMaskedLM, tiny(vocab_size=70))
    torch.nn.init.normal_(model.decoder_bias)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    words = model.encoder.word_embeddings.weight
    results = []
    for logits in (F.linear(model.transform(x), words, model.decoder_bias), model.predict(x)):
        gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), [words, model.decoder_bias])
        results.append([logits, *gradients])
    assert deviation(results) < EXACT
    assert logits.shape == (2, 5, 70) and logits.stride(1) == 128  # the rows of the product


LAUNCHES = {  # of a layer with a mask, at most; on a GPU a single row takes two more in M
    # products 6, norms 2, GELU 1, sums 2, masks 2; of A 3, taps 1, _convolution, _pack, _outputs
    "M": 20,
    # products 4, norms 2, GELU 1, sums 2; of the mask 5, attention 1
    "T": 15,
}


@needs_triton
@pytest.mark.parametrize("letter", LAUNCHES)
def test_a_layer_launches_no_more_than_it_must(letter, monkeypatch):
    """With one row of tokens a forward pass takes as long as its launches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    launches = stub_kernels(monkeypatch)
    monkeypatch.setattr(mabert, "check", lambda *_, **__: None)  # of values, on a CPU only

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            assert op.namespace == "aten"  # a custom op would hide what it launches
            launches_nothing = op.is_view or re.match("(new_)?empty|_unsafe_view", op.__name__)
            if not launches_nothing:
                launches.append(op.__name__)
            return op(*args, **(kwargs or {}))

    layer = build(mabert.LAYERS[letter], tiny(scan_backend="triton"), torch.float32).eval()
    inputs = (torch.randn(2, 20, 16), masks(20)[1:3].cpu())
    with torch.no_grad(), Count():
        layer(*inputs)
    assert len(launches) <= LAUNCHES[letter], launches


def test_bf16_autocast_stays_close():
    with torch.device(DEVICE):  # on a GPU with the kernels
        model = build(MaBERTForMaskedLM, tiny("MMT"), torch.float32)
        ids = torch.randint(1, 60, (2, 20))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    assert relative(output.logits.float(), model(ids, labels=ids).logits) < 2e-2
    assert gradient(output.loss, model).isfinite().all()


def test_one_graph_serves_all_lengths():
    model = build(MaBERT, tiny("WHT"))
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (10, 16, 17, 25, 30, 32):
        ids = torch.randint(1, 60, (2, length))
        mask = torch.ones(2, length)
        assert relative(compiled(ids, mask), model(ids, mask)) < 1e-12
    assert counter.frame_count <= 2  # the first length, then any


def test_an_exported_model_takes_batches_of_any_size():
    model = build(MaBERT, tiny("WHT")).eval()
    ids = torch.randint(1, 60, (3, 10))
    rows = torch.export.Dim("rows")
    exported = torch.export.export(model, (ids, ids > 9), dynamic_shapes=({0: rows}, {0: rows}))
    ids = torch.randint(1, 60, (5, 10))
    assert relative(exported.module()(ids, ids > 9), model(ids, ids > 9)) < 1e-12


needs_a_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
COMPILERS = [
    pytest.param("loop", "inductor", marks=needs_a_compiler),
    pytest.param(
        "triton",
        "inductor" if DEVICE == "cuda" else "aot_eager",
        marks=interpreted,
        id="kernels_in",
    ),
]


@pytest.mark.parametrize("scan_backend, compiler", COMPILERS)
def test_compiled_models_compute_the_same(scan_backend, compiler):
    with torch.device(DEVICE):
        model = build(Classifier, tiny("H", scan_backend=scan_backend), torch.float32)
        inputs = dict(input_ids=torch.randint(1, 60, (2, 7)), labels=torch.tensor([0, 1]))
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend=compiler)):
        output = call(**inputs, attention_mask=masks(7)[1:3])
        results.append([output.logits, *torch.autograd.grad(output.loss, [*model.parameters()])])
    assert deviation(results) < 1e-5


# ---- Saving and loading, and the command ----


@pytest.mark.parametrize("model_class", [MaBERT, MaBERTForMaskedLM, Classifier])
def test_a_saved_model_computes_the_same_and_a_failed_save_changes_nothing(
    model_class, monkeypatch
):
    def full_disk(state, path):
        put(path, b"half")
        raise RuntimeError("unexpected pos 64 vs 0")  # torch.save's words for it

    def killed(state, path):
        os.kill(os.getpid(), signal.SIGKILL)

    # save, after a save that was killed; then fail to save another
    config = tiny("MTM", psm=("scan",), causal_conv=True, pooling="attn", num_labels=3)
    model = build(model_class, replace(config, dropout=0.5), torch.float32).eval()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        assert forked(model.save_pretrained, "saved") == -signal.SIGKILL
    model.save_pretrained("saved")
    monkeypatch.setattr(torch, "save", full_disk)
    other = build(model_class, config, seed=1)
    said = "cannot write saved/.*model.pt: is the disk full"
    refused(other.save_pretrained, "saved", said=said, error=OSError)
    assert sorted(os.listdir("saved")) == ["config.json", "model.pt"]

    # load
    loaded = model_class.from_pretrained("saved")
    assert loaded.config == model.config and not loaded.training and type(loaded) is model_class
    outputs = [model(IDS), loaded(IDS)]
    if model_class is not MaBERT:
        outputs = [output.logits for output in outputs]
    assert torch.equal(*outputs)


def test_the_encoder_travels_between_heads(caplog):
    # from a language model to a classifier, whose head is new
    mlm = MaBERTForMaskedLM.from_pretrained("model")
    changes = dict(num_labels=5, psm=("pre", "post"), dropout=0.3)
    classifier = Classifier.from_pretrained("model", **changes)
    assert "new and untrained: classifier.bias, classifier.weight" in caplog.text
    assert "not used: decoder_bias, transform.0.bias" in caplog.text
    assert classifier.config == replace(mlm.config, **changes)
    assert classifier.encoder.layers[0].dropout.p == 0.3

    # to and from a bare encoder
    classifier.save_pretrained("classifier")
    MaBERT.from_pretrained("classifier").save_pretrained("bare")
    encoders = [MaBERT.from_pretrained(folder) for folder in ("model", "classifier", "bare")]
    encoders += [classifier.encoder, MaBERTForMaskedLM.from_pretrained("bare").encoder]
    for encoder in encoders:
        assert torch.equal(encoder(IDS), mlm.encoder(IDS))

    # a head that fits comes along, and nothing is said; another shape is new
    caplog.clear()
    loaded = Classifier.from_pretrained("classifier")
    assert not caplog.text and torch.equal(loaded.classifier.weight, classifier.classifier.weight)
    other = Classifier.from_pretrained("classifier", num_labels=2)
    assert other.classifier.out_features == 2 and "new and untrained: classifier" in caplog.text
    assert "not used: classifier.bias, classifier.weight" in caplog.text


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("sprung",))


def weights(change):
    """Changed weights of model/model.pt, whose bytes are not looked at."""
    return lambda _: {name: change(w) for name, w in torch.load("model/model.pt").items()}


def one_becomes_two(file: bytes) -> bytes:
    return file.replace(np.float32(1).tobytes(), np.float32(2).tobytes())


DAMAGED = [  # file, its contents or what they come from, overrides, the message
    *((file, None, {}, f"{file} is missing") for file in ("config.json", "model.pt")),
    *(("config.json", text, {}, "config.json .*is no valid config")
      for text in (b"{", b"[]", b"\xff{}", b"null",
                   b'{"hidden_size": "16"}', b'{"colour": 1}')),
    *(("config.json", bytes, overrides, message) for overrides, message in (
        (dict(colour="red"), "'colour'"),
        (dict(pooling="max"), "MaBERTConfig.pooling"),
        (dict(hidden_size=32), "does not fit.*size mismatch .*16.*32"),
        (dict(pattern="M"), "does not fit.*Unexpected key.*layers.1"),
        (dict(pattern="MTM"), "does not fit.*Missing key.*layers.2"))),
    *(("model.pt", contents, {}, "model.pt is damaged") for contents in (
        lambda file: file[: len(file) // 2], b"", b"no checkpoint", one_becomes_two,
        [1, 2], [torch.ones(3)], {0: torch.ones(3)}, {"model": {}, "step": 5}, {"x": Trap()},
        weights(torch.Tensor.int), weights(lambda w: w + 0j))),
    ("model.pt", weights(lambda w: w * math.nan), {}, "model.pt has weights that are not finite"),
]  # fmt: skip


@pytest.mark.parametrize("name, contents, overrides, message", DAMAGED)
def test_loading_refuses_what_does_not_fit_and_executes_nothing(name, contents, overrides, message):
    file = Path("model", name)
    put(file, contents(file.read_bytes()) if callable(contents) else contents)
    error = FileNotFoundError if contents is None else ValueError
    load = partial(MaBERTForMaskedLM.from_pretrained, "model", **overrides)
    assert "\n" not in refused(load, said=message, error=error)
    assert not Path("sprung").exists()


def embedding(model, ids):
    x = getattr(model, "encoder", model)(ids)[0].mean(dim=0)
    return torch.cat([x.norm()[None], x[:5]])


def best_five(model, ids):
    return model(ids).logits[0, 2].softmax(0).topk(5).values


COMMANDS = [  # whose folder, a text, the numbers that are printed
    (MaBERTForMaskedLM, {}, "w1 [MASK] w3", best_five),
    (MaBERTForMaskedLM, {}, "w1 w2 w3", embedding),
    (MaBERT, {}, "w1 [MASK] w3", embedding),
    (MaBERT, {}, "w1 \udcff w3", embedding),  # a byte that is not UTF-8, as Python has it
    (Classifier, dict(num_labels=3), "w1 w2 w3", lambda m, ids: m(ids).logits[0].softmax(0)),
    (Classifier, dict(num_labels=1), "w1 w2 w3", lambda m, ids: m(ids).logits[0]),
]


@pytest.mark.parametrize("model_class, changes, text, numbers", COMMANDS)
def test_the_command_answers(model_class, changes, text, numbers, capsys):
    save_model("asked", model_class, **changes)
    tokenizer = train_mlm.Tokenizer.from_file("asked/tokenizer.json")
    tokenizer.enable_padding(length=9)  # which must not matter
    tokenizer.enable_truncation(2)
    tokenizer.save("asked/tokenizer.json")
    mabert.main(["asked", text])
    printed = capsys.readouterr().out

    # the numbers are the model's
    model = model_class.from_pretrained("asked")
    second = {"[MASK]": 4, "w2": 7, "\udcff": 1}[text.split()[1]]
    ids = torch.tensor([[2, 6, second, 8, 3]])
    expected = [f"{number:.4f}" for number in numbers(model, ids).tolist()]
    assert re.findall(r"-?\d+\.\d{4}", printed) == expected

    # so are the words, and a process prints the same, but for letters that its terminal lacks
    if numbers is best_five:
        best = model(ids).logits[0, 2].topk(5).indices.tolist()
        vocabulary = [*train_mlm.SPECIAL_TOKENS, *WORDLIST]
        assert re.findall(r"(\S+) 0\.", printed) == [vocabulary[i] for i in best]
        put("asked/tokenizer.json", tokenizer.to_str().replace('"w', '"é').replace("éord", "word"))
        command = [sys.executable, str(ROOT / "mabert.py"), "asked", text.replace("w", "é")]
        terminal = os.environ | dict(PYTHONIOENCODING="ascii")
        said = subprocess.check_output(command, text=True, env=terminal)
        assert said == printed.replace("w", "?")


def test_a_guess_that_the_tokenizer_lacks_is_printed_by_its_id(capsys):
    words_tokenizer(WORDS).save(MODEL)  # fewer tokens than the model has
    model = MaBERTForMaskedLM.from_pretrained("model")
    model.decoder_bias.data[40] = 100
    model.save_pretrained("model")
    mabert.main(["model", "the [MASK] sees"])
    assert "[MASK]: id 40 1.0000, " in capsys.readouterr().out


def test_the_command_reads_a_pair_of_texts_as_fine_tuning_does(capsys):
    save_model("asked", Classifier, num_labels=3)
    mabert.main(["asked", "w1 w2", "w3"])
    printed = capsys.readouterr().out

    pair = train_mlm.load_tokenizer("asked/tokenizer.json").encode("w1 w2", "w3")
    ids, types = torch.tensor([pair.ids]), torch.tensor([pair.type_ids])
    logits = Classifier.from_pretrained("asked")(ids, token_type_ids=types).logits[0]
    expected = [f"{probability:.4f}" for probability in logits.softmax(0).tolist()]
    assert re.findall(r"\d\.\d{4}", printed) == expected
    assert types.sum() == 2  # w3 [SEP]


# ---- Models for transformers ----


HF_MODELS = {  # its class in transformers: ours, and fields that are not the default
    "AutoModel": (MaBERT, dict(pattern="MT", psm=("scan",), d_conv=3)),
    # more tokens than the tokenizer's 45
    "AutoModelForMaskedLM": (MaBERTForMaskedLM, dict(vocab_size=64)),
    "AutoModelForSequenceClassification": (Classifier, dict(num_labels=3, pooling="attn")),
}


@pytest.fixture(scope="module")
def to_transformers(tmp_path_factory):
    """The script, in a process where transformers copies no code into the user's cache."""
    pytest.importorskip("transformers")
    import transformers.dynamic_module_utils

    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path, str(ROOT / "extras"), cache])
        yield importlib.import_module("to_transformers")


def save_for_transformers(to_transformers, auto_class, **changes) -> mabert.PretrainedModel:
    """Our model of this kind, which lies in "ours" and, as transformers reads it, in "the-copy"."""
    model_class, fields = HF_MODELS[auto_class]
    save_model("ours", model_class, **fields | changes)
    to_transformers.main(["ours", "the-copy"])
    return model_class.from_pretrained("ours")


def read_by_transformers(class_name, folder="the-copy", **options):
    import transformers

    reader = getattr(transformers, class_name)
    return reader.from_pretrained(folder, trust_remote_code=True, **options)


def trainer(model, rows, collator=None, **options):
    import transformers

    fixed = dict(output_dir="trainer", use_cpu=True, report_to=[], save_strategy="no")
    args = transformers.TrainingArguments(**fixed, disable_tqdm=True, **options)
    return transformers.Trainer(model, args, collator, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("auto_class", HF_MODELS)
def test_transformers_compute_the_same_bits(auto_class, padding_side, to_transformers):
    ours = save_for_transformers(to_transformers, auto_class)
    theirs = read_by_transformers(auto_class)
    assert vars(theirs.config.as_ours()) == vars(ours.config) and not theirs.training

    # pairs of texts, of which the first is shorter
    tokenizer = read_by_transformers("AutoTokenizer", padding_side=padding_side)
    batch = tokenizer(["w1", "w2 [MASK] w3"], ["w4 w5", "w6 w7"], padding=True, return_tensors="pt")
    pads = [0, 0]
    first_row = [2, 6, 3, 9, 10, 3]
    assert batch.input_ids[0].tolist() == [
        *(pads if padding_side == "left" else []),
        *first_row,
        *(pads if padding_side == "right" else []),
    ]
    assert tokenizer.model_max_length == 32

    # the output
    expected = ours(batch.input_ids, batch.attention_mask, batch.token_type_ids)
    expected = getattr(expected, "logits", expected)
    assert torch.equal(theirs(**batch)[0], expected)
    assert not torch.equal(theirs(batch.input_ids, batch.attention_mask)[0], expected)
    as_tuple = theirs(**batch, return_dict=False)
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], expected)
    refused(
        partial(theirs, inputs_embeds=1), IDS, said="no argument inputs_embeds", error=ValueError
    )


def test_transformers_get_the_same_loss_and_logits_of_all_positions(to_transformers):
    ours = save_for_transformers(to_transformers, "AutoModelForMaskedLM")
    theirs = read_by_transformers("AutoModelForMaskedLM")
    labels = torch.where(IDS % 2 == 0, IDS, -100)
    output = theirs(IDS, labels=labels)
    assert output.loss.item() == pytest.approx(ours(IDS, labels=labels).loss.item(), rel=1e-6)
    assert torch.equal(output.logits, ours(IDS).logits)
    assert theirs(IDS, labels=labels.fill_(-100)).loss == 0


def test_transformers_save_a_model_with_its_code(to_transformers):
    save_for_transformers(to_transformers, "AutoModelForSequenceClassification")
    model = read_by_transformers("AutoModelForSequenceClassification")
    model.classifier.bias.data += 1
    model.save_pretrained("again")
    shutil.rmtree("the-copy")
    again = read_by_transformers("AutoModelForSequenceClassification", "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert vars(again.config.as_ours()) == vars(model.config.as_ours())


def test_transformers_begin_a_new_head_or_model_as_we_do(to_transformers):
    ours = save_for_transformers(to_transformers, "AutoModelForMaskedLM", hidden_size=256)

    # a head that is not in the folder
    new = read_by_transformers("AutoModelForSequenceClassification", num_labels=50)
    assert torch.equal(new.encoder(IDS), ours.encoder(IDS))
    for weight in (new.classifier.weight, new.pooling.score.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not new.classifier.bias.any()
    new.save_pretrained("classifier")
    bias = read_by_transformers("AutoModelForMaskedLM", "classifier").decoder_bias
    assert len(bias) == 64 and not bias.any()

    # a whole model
    import transformers

    torch.manual_seed(0)
    config = read_by_transformers("AutoConfig")
    model = transformers.AutoModelForMaskedLM.from_config(config, trust_remote_code=True)
    torch.manual_seed(0)
    expected = MaBERTForMaskedLM(ours.config)
    assert torch.equal(model.encoder(IDS), expected.encoder(IDS))
    assert not model.decoder_bias.any()


def test_pipelines_answer_as_the_command_does(to_transformers):
    import transformers

    def answers(task, **options):
        pipeline = transformers.pipeline(task, "the-copy", trust_remote_code=True)
        return pipeline("w1 [MASK] w3", **options)

    # guesses for a mask, all of them
    ours = save_for_transformers(to_transformers, "AutoModelForMaskedLM")
    ids = torch.tensor([[2, 6, 4, 8, 3]])
    expected = ours(ids).logits[0, 2].softmax(dim=0).topk(64)
    guesses = answers("fill-mask", top_k=64)
    assert [guess["token"] for guess in guesses] == expected.indices.tolist()
    scores = [guess["score"] for guess in guesses]
    assert scores == pytest.approx(expected.values.tolist(), rel=1e-5)

    # the value of a regression; classes with their names
    for num_labels in (1, 3):
        shutil.rmtree("the-copy")
        put("ours/labels.json", json.dumps(["no", "maybe", "yes"][:num_labels]))
        ours = save_for_transformers(
            to_transformers, "AutoModelForSequenceClassification", num_labels=num_labels
        )
        expected = ours(ids).logits[0]
        if num_labels == 3:
            expected = expected.softmax(dim=0)
        names = dict(zip(["no", "maybe", "yes"], expected.tolist()))
        for answer in answers("text-classification", top_k=None):
            assert answer["score"] == pytest.approx(names.pop(answer["label"]), rel=1e-5)
        assert not names


def test_trainer_lowers_the_loss(to_transformers):
    pytest.importorskip("accelerate")
    import transformers

    # eight texts, whose words follow each other in one order
    save_for_transformers(to_transformers, "AutoModelForMaskedLM")
    model = read_by_transformers("AutoModelForMaskedLM")
    tokenizer = read_by_transformers("AutoTokenizer")
    texts = [" ".join(WORDLIST[i : i + 3 + i % 5]) for i in range(8)]
    rows = [dict(tokenizer(text)) for text in texts]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    run = trainer(model, rows, collator, max_steps=40, learning_rate=2e-2)

    # metrics get the logits of all positions
    shapes = []
    run.compute_metrics = lambda given: shapes.append(given.predictions.shape) or {}

    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()["eval_loss"]
    assert after < before - 1
    assert shapes == [(8, 9, 64)] * 2


def test_trainer_steps_alike_with_accumulated_gradients(to_transformers):
    pytest.importorskip("accelerate")
    save_for_transformers(to_transformers, "AutoModelForSequenceClassification")
    rows = [dict(input_ids=[2, 5 + i, 3], labels=i % 3) for i in range(8)]
    plain = dict(optim="sgd", learning_rate=1.0, max_grad_norm=0, max_steps=1)
    weights = []
    for accumulated in (1, 4):
        model = read_by_transformers("AutoModelForSequenceClassification")
        sizes = dict(
            per_device_train_batch_size=8 // accumulated, gradient_accumulation_steps=accumulated
        )
        trainer(model, rows, **plain, **sizes).train()
        weights.append(model.classifier.weight)
    assert relative(*weights) < 1e-5


REFUSED_CONVERSIONS = [  # arguments, the message, a file and what it then has
    ("model model", "^model is there already", WEIGHTS, bytes),
    ("nowhere out", "^nowhere/config.json is missing: give a local folder", WEIGHTS, bytes),
    ("model out", "model/model.pt is damaged", WEIGHTS, lambda file: file[:-1]),
    ("model out", "cannot load the tokenizer model/tokenizer.json", MODEL, lambda _: None),
    ("model out", "labels.json: it must be a list of 2 names", "model/labels.json", "[1, 2, 3]"),
]


@pytest.mark.parametrize("flags, said, file, contents", REFUSED_CONVERSIONS)
def test_a_folder_that_transformers_could_not_read_is_not_begun(
    flags, said, file, contents, to_transformers
):
    put(file, contents(Path(file).read_bytes()) if callable(contents) else contents)
    before = sorted(os.listdir("model"))
    refused(to_transformers.main, flags.split(), said=said)
    assert sorted(os.listdir("model")) == before and not Path("out").exists()


NOT_SHARED = "[.as]*"  # what README excludes from an upload


def test_an_upload_of_a_run_leaves_out_checkpoints_and_paths():
    from huggingface_hub.utils import filter_repo_objects

    pretrain("--steps 4 --save-every 2 --eval-every 2")
    files = [str(file.relative_to("run")) for file in Path("run").rglob("*") if file.is_file()]
    shared = set(filter_repo_objects(files, ignore_patterns=[NOT_SHARED]))
    assert shared - {"loss.png"} == {"config.json", "model.pt", "tokenizer.json", "log.csv"}
    others = set(files) - shared
    assert {".lock", "args.json", "step-0000004/model.pt"} <= others


# ---- Pretraining ----


def pretrain(flags=""):
    train_mlm.main(arguments(flags))


def prepared(flags=""):
    """The arguments of a run, and what it reads."""
    args = train_mlm.parse_args(arguments(flags))
    return args, train_mlm.prepare(args, None)


def trained(folder="run"):
    """The weights as one vector, and the log without its speeds."""
    weights = MaBERTForMaskedLM.from_pretrained(folder).state_dict().values()
    with open(Path(folder, "log.csv")) as file:
        log = [line | {"tokens_per_s": ""} for line in csv.DictReader(file)]
    return torch.cat([weight.flatten() for weight in weights]), log


def checkpoints(folder="run") -> list[str]:
    """The steps of a run's checkpoints."""
    return [path.name.removeprefix("step-") for path in sorted(Path(folder).glob("step-*"))]


def raising(error):
    def call(*_, **__):
        raise error

    return call


def forked(call, *args, **options) -> int:
    """The exit status of another process that makes this call."""
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=call, args=args, kwargs=options)
    process.start()
    process.join()
    return process.exitcode


def test_a_short_run_learns_and_can_be_used(capsys):
    pretrain("--vocab-size 100 --batch-size 16")
    printed = capsys.readouterr().out
    _, log = trained()

    # it learns from context, and not just how frequent words are
    assert [int(line["step"]) for line in log] == [0, 25, 50, 75, 100, 125, 150]
    first, _, last = [float(line["held_out_loss"]) for line in log if line["held_out_loss"]]
    by_frequency = float(printed.split("word frequencies give ")[1].split(",")[0])
    assert last < by_frequency - 1

    # its folder and the checkpoints can be loaded
    for folder in ("run", "run/step-0000050", "run/step-0000150"):
        size = train_mlm.load_tokenizer(f"{folder}/tokenizer.json").get_vocab_size()
        config = MaBERTForMaskedLM.from_pretrained(folder).config
        assert config.max_position == 32
        assert config.vocab_size == size
        assert abs(first - math.log(size)) < 0.5

    # what it says and draws
    assert "of 150 steps of 16 rows, 15 of them warm-up" in printed
    assert printed.count("it was") == 5  # the masked words of five texts, beside the guesses
    assert json.loads(Path("run/args.json").read_text())["seed"] == 0
    assert Path("run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_after_twenty_steps_is_known():
    """It changes with what a run computes: rows, masks, initialization, gradients, schedule."""
    pretrain("--steps 20 --log-every 5 --dropout 0.1")
    _, log = trained()
    rates = [float(line["lr"]) for line in log[1:]]
    assert (rates[0], rates[-1]) == pytest.approx((5e-3 * 16 / 18, 5e-3 / 18), rel=0.01)
    losses = [float(line["loss"]) for line in log[1:]]
    assert losses == pytest.approx([3.2016, 3.1209, 3.0864, 3.0636], abs=5e-3)


def test_runs_repeat_and_these_flags_change_nothing_but_cost(monkeypatch):
    # count the layers' forward passes, and what is compiled
    calls, compiled = [], []
    forward = mabert.MambaLayer.forward
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled.append(1) or call)
    monkeypatch.setattr(mabert.MambaLayer, "forward", lambda *x: calls.append(1) or forward(*x))

    def run(flags):
        calls.clear()
        compiled.clear()
        pretrain(f"--overwrite --steps 3 --length-schedule 16:1 {flags}")
        weights, _ = trained()
        return weights, len(calls), len(compiled)

    # with dropout: a run repeats, also where layers run twice (3 steps, 2 micro-batches; M, W, H)
    weights, count, _ = run("--dropout 0.1")
    again, _, _ = run("--dropout 0.1")
    assert torch.equal(weights, again)
    checkpointed, larger_count, _ = run("--dropout 0.1 --activation-checkpointing")
    assert torch.equal(weights, checkpointed)
    assert larger_count == count + 3 * 2 * 3

    # without: other micro-batches, and a compiled encoder and head, give the same to rounding
    weights, _, none = run("")
    smaller, _, _ = run("--micro-batch-size 8")
    assert relative(smaller, weights) < 1e-4
    by_compiler, _, two = run("--compile")
    assert relative(by_compiler, weights) < 1e-4
    assert (none, two) == (0, 2)


def test_a_run_compiles_by_default_where_there_is_a_gpu(monkeypatch):
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert train_mlm.parse_args(["--steps", "1"]).compile == gpu
        assert not train_mlm.parse_args(["--no-compile"]).compile
        assert not train_mlm.parse_args(["--demo"]).compile


def test_a_run_goes_on_where_compiling_fails(monkeypatch, capsys):
    pretrain("--steps 3")
    weights, _ = trained()
    failing = raising(RuntimeError("no C compiler\nand more"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=failing))
    pretrain("--overwrite --steps 3 --compile")
    assert re.search("compiling failed, .*: .*no C compiler", capsys.readouterr().out)
    assert torch.equal(trained()[0], weights)


@needs_triton
@pytest.mark.parametrize("masked", [True, False])
def test_few_graphs_serve_all_batches_of_a_run(masked, monkeypatch):
    """Beyond eight graphs torch.compile would run the model eagerly, and hardly say so."""
    from torch._dynamo.utils import counters

    # the encoder and the head of a model whose kernels run nothing
    stub_kernels(monkeypatch)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = tiny("MT", max_position=512, scan_backend="triton")
    model = build(MaBERTForMaskedLM, config, torch.float32)
    args = argparse.Namespace(micro_batch_size=16, length_schedule=[(512, 1)], mask_rate=0.15)
    torch.compiler.reset()
    counters.clear()
    train_mlm.compile_model(model, args)
    assert counters["stats"]["unique_graphs"] == 2

    # batches of all sizes and lengths
    lengths = range(32, 513, 32)
    for size, length, training in itertools.product((16, 8, 4, 1), lengths, (True, False)):
        ids = torch.ones(size, length, dtype=torch.long)
        model.train(training)
        with torch.set_grad_enabled(training):
            x = model.encoder(ids, ids.bool() if masked else None)
        if training:
            x.sum().backward()
    assert counters["stats"]["unique_graphs"] <= 1 + 5  # the head's, and the encoder's
    assert counters["frames"]["ok"] == counters["frames"]["total"]


def test_a_compiled_head_keeps_no_logits_in_float32():
    """The logits are the largest tensor of a training step."""
    model = build(MaBERTForMaskedLM, tiny(vocab_size=500), torch.float32)
    backend = "aot_eager_decomp_partition"  # keeps what inductor keeps, and compiles nothing
    head = torch.compile(model.loss_and_logits, dynamic=True, backend=backend)
    x = torch.randn(33, 16, requires_grad=True)
    labels = torch.randint(500, (33,))

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = head(x, labels).loss
    assert [x.dtype for x in kept if x.shape in ((33, 500), (33, 512))] == [torch.bfloat16]
    assert relative(loss, model.loss_and_logits(x, labels).loss) < 1e-2


def test_steps_that_are_not_finite_are_skipped_and_counted(monkeypatch):
    def skipped_steps(bad, flags=""):
        """The log's counts for a run in which the gradients of these steps are not finite."""
        calls, clip = [], torch.nn.utils.clip_grad_norm_

        def sometimes_nan(*inputs):
            calls.append(clip(*inputs))
            return calls[-1] * (math.nan if len(calls) in bad else 1)

        monkeypatch.setattr(train_mlm, "clip_grad_norm_", sometimes_nan)
        pretrain(f"--overwrite --steps 20 --log-every 5 --save-every 4 {flags}")
        return [int(line["skipped_steps"]) for line in trained()[1]]

    assert skipped_steps((3, 4, 12, 17, 18, 19, 20)) == [0, 2, 2, 3, 7]

    # the last four steps changed neither weights nor optimizer
    weights, before = train_mlm.read_checkpoint(Path("run/step-0000016"))
    others, after = train_mlm.read_checkpoint(Path("run/step-0000020"))
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    states = [training["optimizer"]["state"].values() for training in (before, after)]
    for state, other in zip(*states, strict=True):
        assert all(torch.equal(state[name], other[name]) for name in state)

    # a loss that is not finite is not logged; ten steps are too many only in a row
    skipped_steps((3,), "--log-every 1")
    assert trained()[1][3]["loss"] == "0.0000"
    assert skipped_steps(range(1, 20, 2))[-1] == 10

    # a run that does not recover ends, and leaves no model
    said = "no gradient was finite in the last 12 steps.*last checkpoint .*step-0000016"
    refused(skipped_steps, range(9, 21), said=said)
    refused(skipped_steps, (), "--lr 1e30 --steps 5", said="held-out loss is nan: a lower --lr")
    assert not Path("run/model.pt").exists()


def step_of_a_small_model(step=0, seed=0, labelled=100):
    """Of one step: its loss, the norm of the gradients, the names of parameters, the optimizer."""
    model = build(MaBERTForMaskedLM, replace(tiny("MT"), dropout=0.5), torch.float32)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = train_mlm.make_optimizer(model, 0.01)
    squares = []
    optimizer.register_step_pre_hook(
        lambda *_: squares.extend(p.grad.square().sum() for p in names)
    )

    # the step
    ids = torch.randint(5, 60, (32, 12), generator=torch.Generator().manual_seed(0))
    args = train_mlm.parse_args(arguments(f"--seed {seed}"))
    batch = train_mlm.Batch([(ids, ids > 0, ids)], labelled, ids.numel(), ids.numel())
    loss, _ = train_mlm.train_step(model, optimizer, batch, step, args)
    return loss.item(), torch.stack(squares).sum().sqrt(), names, optimizer


def test_a_step_clips_decays_and_drops_out_by_seed_and_step():
    # dropout
    losses = [step_of_a_small_model(*key)[0] for key in ((5, 0), (6, 0), (5, 1))]
    assert step_of_a_small_model(5, 0)[0] == losses[0]
    assert len(set(losses)) == 3

    # clipping: the loss is large with a single label
    _, norm, names, optimizer = step_of_a_small_model(labelled=1)
    assert norm == pytest.approx(1, abs=1e-3)

    # weight decay on matrices alone
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for group, decay in zip(optimizer.param_groups, (0.01, 0.0), strict=True):
        assert (group["weight_decay"], group["betas"], group["eps"]) == (decay, (0.9, 0.999), 1e-6)
        for p in group["params"]:
            assert (p.dim() > 1 and not names[p].endswith("A_log")) == (decay > 0)

    # the schedule
    rates = [train_mlm.learning_rate(step, 100, 1e-3, 10) for step in (0, 9, 10, 55, 99)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-3, 5e-4, 1e-3 / 90])


def test_the_rehearsal_has_the_longest_rows_and_leaves_no_gradients():
    args, data = prepared()
    model, _, _ = train_mlm.make_model(args, data)
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append([x.shape for x in inputs]))
    train_mlm.rehearse(model, args)
    assert shapes == [[(16, 32), (16, 32)]]  # ids and mask
    assert all(p.grad is None for p in model.parameters())


# Rows


def test_batches_come_in_order_whoever_prepares_them(monkeypatch):
    args, data = prepared("--micro-batch-size 32 --steps 40")
    steps = range(27, 33)
    alone = train_mlm.batches_ahead(args, data.phases, steps)

    # as beside a GPU, but for the pinned memory
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        by_workers = train_mlm.batches_ahead(args, data.phases, steps)
    assert by_workers.num_workers == 2
    assert by_workers.pin_memory
    by_workers.pin_memory = False

    batches = train_mlm.Batches(data.phases, args)
    for ahead in (alone, by_workers):
        for step, batch in zip(steps, ahead, strict=True):
            inputs, real, labels = batches.masked_rows(step)
            length = inputs.shape[1]
            assert (length > 16) == (step >= 30)  # the second phase of the schedule
            assert batch.labelled == (labels != train_mlm.IGNORED).sum()
            assert batch.real == real.sum() < batch.padded
            ((own_inputs, own_real, _),) = batch.micro_batches
            assert np.array_equal(own_inputs[:, :length], inputs)
            assert not own_real[:, length:].any()


@pytest.mark.parametrize(
    ("size", "micro", "processes", "rows"),
    [(256, 64, 1, 256), (256, 32, 8, 32), (192, 32, 1, 96), (128, 8, 2, 32)],
)
def test_shorter_rows_go_together_if_processes_can_share_them(
    size, micro, processes, rows, monkeypatch
):
    monkeypatch.setattr(train_mlm, "PROCESSES", processes)
    schedule = [(128, 0.9), (512, 0.1)]
    args = argparse.Namespace(length_schedule=schedule, batch_size=size, micro_batch_size=micro)
    assert train_mlm.rows_at_once(args, 128) == rows
    assert train_mlm.rows_at_once(args, 512) == micro


def test_order_and_masks_are_functions_of_seed_and_step(monkeypatch):
    args, data = prepared()

    def seeded(seed):
        changed = argparse.Namespace(**vars(args) | dict(seed=seed))
        return train_mlm.Batches(data.phases, changed)

    # another order in another epoch too: the last key is the same place in the next one
    epoch = len(data.phases[0][1]) // args.batch_size
    keys = ((5, 0), (6, 0), (5, 1), (5 + epoch, 0))
    orders = [seeded(seed).row_indices(step) for step, seed in keys]
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(seeded(0).row_indices(5), orders[0])

    # masks of the same rows
    monkeypatch.setattr(train_mlm.Batches, "row_indices", lambda *_: np.arange(32))
    labels = [seeded(seed).masked_rows(step)[2] for step, seed in keys[:3]]
    assert len({x.tobytes() for x in labels}) == 3
    assert np.array_equal(seeded(0).masked_rows(5)[2], labels[0])


def test_of_a_large_text_no_more_than_2_to_the_18_tokens_are_held_out():
    _, held = train_mlm.split_held_out(types.SimpleNamespace(offsets=np.array([0, 2**24])))
    assert np.diff(held).sum() == 2**18


@pytest.mark.parametrize("bucket", ["", "--bucket"])
def test_an_epoch_has_every_row_once_in_random_order(bucket):
    args, data = prepared(f"--batch-size 7 --micro-batch-size 7 --length-schedule 16:1 {bucket}")
    _, rows = data.phases[0]
    batches = train_mlm.Batches(data.phases, args)
    epoch = [batches.row_indices(step) for step in range(len(rows) // 7)]
    order = np.concatenate(epoch)

    # but for the rows that fill no batch
    assert len(rows) - 7 < len(order) < len(rows)
    assert len(order) == len(np.unique(order))

    # in random order; with --bucket rows of like length are together, and nearly no pads
    lengths = rows.lengths()
    longest = [lengths[indices].max() for indices in epoch]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.1
    assert longest[:32] != sorted(longest[:32])
    assert (lengths[order].sum() / (7 * sum(longest)) > 0.95) == bool(bucket)


def test_rows_have_every_training_token_once_and_no_held_out_one():
    _, data = prepared()
    _, rows = data.phases[0]
    vocabulary = data.vocabulary
    text = rows.tokens.ids

    # the form of a row
    ids, real = rows.batch(np.arange(len(rows)))
    ends = real.sum(axis=1) - 1
    assert np.array_equal(rows.lengths(), ends - 1)
    assert (ids[:, 0] == vocabulary.cls).all()
    assert (ids[np.arange(len(ids)), ends] == vocabulary.sep).all()
    assert (ids[~real] == vocabulary.pad).all()

    # all the text of training
    words = ids[real & ~vocabulary.is_special[ids]]
    assert np.array_equal(words, np.concatenate([text[a:b] for a, b in rows.segments]))

    # segments of training and held-out ones have each token once, and each is of one document
    held = data.held_rows.segments
    assert 0.02 < np.diff(held).sum() / len(text) < 0.06
    starts, ends = np.concatenate([rows.segments, held]).T
    places = np.concatenate(list(map(np.arange, starts, ends)))
    assert np.array_equal(np.sort(places), np.arange(len(text)))
    offsets = rows.tokens.offsets
    documents = [np.searchsorted(offsets, x, side="right") for x in (starts, ends - 1)]
    assert np.array_equal(*documents)

    # guessing by how frequent words are in training, and by chance
    counts = 1 + np.bincount(words)[5:]
    labels = data.held_out[2]
    guessed = counts[labels[labels != train_mlm.IGNORED] - 5]
    by_frequency = np.log(counts.sum() / guessed).mean()
    assert data.baselines == pytest.approx((by_frequency, math.log(len(WORDS))))


def test_15_percent_of_the_words_are_chosen_and_of_them_80_masked_10_random_10_as_they_were():
    is_special = np.arange(1000) < 5
    vocabulary = train_mlm.Vocabulary(pad=0, cls=2, sep=3, mask=4, is_special=is_special)
    ids = np.random.default_rng(0).integers(0, 1000, (400, 500))
    inputs, labels = train_mlm.mask_tokens(ids, vocabulary, 0.15, np.random.default_rng(1))

    # labels are the original ids, and all else is as it was
    chosen = labels != train_mlm.IGNORED
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])

    # no special token is chosen, 15 % of the others: 80 % of them masked, 10 % as they were
    assert not chosen[is_special[ids]].any()
    masked = inputs[chosen] == 4
    same = inputs[chosen] == ids[chosen]
    rates = (chosen[~is_special[ids]].mean(), masked.mean(), same.mean())
    assert rates == pytest.approx((0.15, 0.8, 0.1), abs=0.006)

    # 10 % any other word
    others = inputs[chosen][~masked & ~same]
    assert not is_special[others].any()
    assert len(np.unique(others)) > 900


# Text


def parquet(**columns) -> bytes:
    """A .parquet file with these columns."""
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def documents(flags: str) -> list[str]:
    """The documents of a text, from its tokens: words of the tokenizer, a space between them."""
    tokenizer = words_tokenizer("one two three four five MASK mask [ ]".split())
    args = train_mlm.parse_args(shlex.split(flags))
    folder = train_mlm.token_folder(args, train_mlm.text_sources(args), tokenizer)
    tokens = train_mlm.read_tokens(folder, tokenizer)
    spans = itertools.pairwise(tokens.offsets)
    return [" ".join(map(tokenizer.id_to_token, tokens.ids[a:b])) for a, b in spans]


LINES = "one two\n\nthree\n         \nfour\nfive"  # a blank line that is longer than a piece
OBJECT = '{"text": "one two"}'
NAMES = ("[ab]", "*", "'quo\"te", "ünï", "-dash")
TEXTS = [  # files below texts/, flags, the documents
    ({"a.txt": LINES}, "--sample-by document", ["one two three four five"]),
    # a line of spaces is blank
    ({"a.txt": LINES}, "--sample-by paragraph", ["one two", "three", "four five"]),
    ({"a.txt": LINES}, "--sample-by line", ["one two", "three", "four", "five"]),
    ({"A.TXT": b"\xef\xbb\xbfone\r\n\r\ntwo\r\n"}, "--sample-by paragraph", ["one", "two"]),
    # special tokens in a text are text
    ({"a.txt": "one [MASK] [mask]"}, "", ["one [ MASK ] [ mask ]"]),
    # other columns do not matter, nor do null, blank lines and halves of characters
    ({"a.jsonl": '{"n": 1, "text": "one"}\n{"text": "two", "n": "x"}'}, "", ["one", "two"]),
    ({"a.jsonl": '{"n": 1, "text": "one"}', "b.jsonl": '{"text": "two"}'}, "", ["one", "two"]),
    ({"a.jsonl": f'\n{OBJECT}\n\n{{"text": null}}\n{{"text": ""}}\n{OBJECT}'}, "", ["one two"] * 2),
    ({"a.jsonl": '{"text": "one \\udc80 two"}'}, "", ["one [UNK] two"]),
    ({"a.json": f"[{OBJECT},\n {OBJECT}]"}, "", ["one two"] * 2),
    ({"a.json": OBJECT}, "", ["one two"]),
    ({"a.json": f"{OBJECT}\n{OBJECT}\n"}, "", ["one two"] * 2),
    ({"a.parquet": parquet(n=[1, 2, 3], text=["one", None, "two"])}, "", ["one", "two"]),
    # folders are read with their sub-folders, but for what is hidden, and every file once
    ({"a.txt": "one", "b/a.txt": "two", ".b/a.txt": "three", ".a.txt": "four"}, "", ["one", "two"]),
    ({"b.txt": "one", "a.txt": "two"}, "--data texts/b.txt texts texts/b.txt", ["one", "two"]),
    # links are followed, also to folders; they may lead back, or nowhere
    ({"../all/a.txt": "one", "b": Path("../all"), "c.txt": Path("../d")}, "", ["one"]),
    ({"../d": "one", "c.txt": Path("../d")}, "", ["one"]),
    ({"a.txt": "one", "b/a.txt": "two", "b/loop": Path("..")}, "", ["one", "two"]),
    # the run's folder is left out, but for texts in it that are named
    ({"a.txt": "one", "b/run/c.txt": "two"}, "--out texts/b/run", ["one"]),
    ({"a.txt": "one", "b": Path("../run"), "../run/c.txt": "two"}, "--out run", ["one"]),
    ({"a.txt": "one", "b/c.txt": "two"}, "--out texts --data texts/b texts/a.txt", ["two", "one"]),
    # any name of a file
    *(({f"{x}.txt": "one"}, f"--data {shlex.quote(f'texts/{x}.txt')}", ["one"]) for x in NAMES),
]  # fmt: skip


@pytest.mark.parametrize(("files", "flags", "expected"), TEXTS)
@pytest.mark.parametrize("piece", [7, 20_000])
def test_documents_of_every_kind_of_file_whatever_its_name(
    files, flags, expected, piece, monkeypatch
):
    """Also if pieces are as small as the longest words, as a large file is cut into pieces."""
    for name, contents in files.items():
        file = Path("texts", name)
        put(file, None if isinstance(contents, Path) else contents)
        if isinstance(contents, Path):
            file.symlink_to(contents)
    monkeypatch.setattr(train_mlm, "PIECE", piece)
    monkeypatch.setattr(train_mlm, "CHARACTERS_AT_ONCE", piece)
    data = "" if "--data" in flags else "--data texts"
    assert documents(f"{data} {flags} --cache cache") == expected


@pytest.mark.parametrize("sample_by", ["document", "paragraph", "line"])
def test_a_file_of_one_long_line_is_read_in_parts(sample_by, monkeypatch):
    """So a file may be larger than the memory; the limit is smaller here."""
    monkeypatch.setattr(train_mlm, "PIECE", 100)
    put("a.txt", "one two  " * 1000)
    parts = list(train_mlm.read_txt(Path("a.txt"), sample_by))
    assert max(len(part.text) for part in parts) == 100
    assert "".join(part.text for part in parts) == "one two  " * 1000
    assert [part.ends for part in parts] == [False] * 90 + [True]
    shares = [part.share for part in parts]
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize("name", ["string", "large_string", "string_view"])
def test_all_types_of_strings_in_a_table_are_read(name):
    import pyarrow

    put("a.parquet", parquet(text=pyarrow.array(["one", None], getattr(pyarrow, name)())))
    assert [part.text for part in train_mlm.read_parquet(Path("a.parquet"))] == ["one", ""]


def test_a_large_table_of_parquet_is_read_in_parts():
    """What pyarrow holds after the first document is a fraction of the file, which is one group."""
    import pyarrow

    rng = np.random.default_rng(0)
    texts = [rng.bytes(2**9).hex() for _ in range(2**14)]
    put("a.parquet", parquet(text=texts))
    before = pyarrow.total_allocated_bytes()
    parts = train_mlm.read_parquet(Path("a.parquet"))
    assert next(parts).text == texts[0]
    assert pyarrow.total_allocated_bytes() - before < Path("a.parquet").stat().st_size / 2
    assert [part.text for part in parts] == texts[1:]


def test_the_hubs_corpora_are_read_like_files(monkeypatch):
    """A folder stands in for the hub."""
    contents = parquet(title=["a"] * 4, text=["one", None, "", "two three"])
    put("hub/data/train-00000-of-00001.parquet", contents)
    monkeypatch.setattr(train_mlm, "HUB_CORPUS", [(str(Path("hub").resolve()), "default")] * 2)
    assert documents("--cache cache") == ["one", "two three"] * 2


def test_the_demo_text_is_what_every_python_carries(monkeypatch):
    from pydoc_data.topics import topics

    docstrings = (
        '"""A module."""\nclass B:\n    """A class."""\n    def c(self):\n        r"""\\udc80"""\n'
    )
    put("lib/a.py", docstrings)
    put("lib/b.py", '"""A module."""\nasync def d():\n    """A surrogate: \\udc80"""\n')
    put("lib/test/c.py", '"""A test of the library."""')
    put("lib/site-packages/d.py", '"""Of another package."""')
    put("lib/broken.py", "def (")
    monkeypatch.setattr(train_mlm.sysconfig, "get_path", lambda name: "lib")
    own = ["A module.", "A class.", r"\udc80", "A surrogate: ?"]
    assert train_mlm.demo_texts() == [*dict.fromkeys(topics.values()), *own]

    # and read like files
    monkeypatch.setattr(train_mlm, "demo_texts", lambda: ["one two", "", "three"])
    assert documents("--demo --cache cache") == ["one two", "three"]


def test_what_lies_there_unread_is_said(capsys):
    for name in ("a.txt", "b.jsonl.gz", "c.md", "d.txt"):
        put(f"texts/{name}", "one" if name != "d.txt" else "")
    Path("texts/loop").symlink_to(".")  # whose files are not others
    documents("--data texts --cache cache")
    said = capsys.readouterr().out
    assert "text: 1 file(s), 0.0 MB; 3 others there are not read" in said
    documents("--data texts/a.txt --cache cache")
    assert "text: 1 file(s), 0.0 MB\n" in capsys.readouterr().out
    put("texts/run/args.json", "{}")
    documents("--data texts --out texts/run --cache cache")
    assert "text: texts/run is not read, since it is --out\n" in capsys.readouterr().out


# Tokens


def test_a_trained_tokenizer_encodes_pairs_and_long_texts():
    tokenizer = train_mlm.train_tokenizer(["the function returns a list of lists"] * 5, 200)
    assert [tokenizer.token_to_id(token) for token in train_mlm.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]

    # a file that says less of the form gets ours
    bare = json.loads(tokenizer.to_str()) | dict(post_processor=None, truncation=None)
    put("bare.json", json.dumps(bare))
    for either in (tokenizer, train_mlm.load_tokenizer("bare.json")):
        encoding = either.encode("The function", "a list")
        assert encoding.tokens == ["[CLS]", "the", "function", "[SEP]", "a", "list", "[SEP]"]
        assert encoding.type_ids == [0, 0, 0, 0, 1, 1, 1]
        assert either.decode(encoding.ids) == "the function a list"

    # a long text is cut where no token is
    texts = ["a list", "", "the function returns a list " * 20_000, "list " * 5]
    put("a.jsonl", "\n".join(json.dumps(dict(text=text)) for text in texts))
    args = train_mlm.parse_args("--data a.jsonl --cache cache".split())
    sources = train_mlm.text_sources(args)
    cut = [text for text, _ in train_mlm.pieces(sources, "")]
    assert max(map(len, cut)) <= 20_000
    assert "".join(cut) == "".join(texts)
    tokens = train_mlm.read_tokens(train_mlm.token_folder(args, sources, tokenizer), tokenizer)
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts if text]
    assert np.array_equal(tokens.ids, np.concatenate(expected))
    assert np.array_equal(np.diff(tokens.offsets), list(map(len, expected)))


def test_special_tokens_in_a_text_are_text_but_for_whoever_loads_the_file_alone():
    """Pretraining and GLUE load tokenizers by load_tokenizer, mabert.py without it."""
    words_tokenizer(["MASK", "[", "]"]).save("own.json")
    loaded = train_mlm.load_tokenizer("own.json")
    assert loaded.encode("[MASK]").tokens == ["[CLS]", "[", "MASK", "]", "[SEP]"]
    loaded.save("again.json")
    assert train_mlm.Tokenizer.from_file("again.json").encode("[MASK]").tokens[1] == "[MASK]"


def test_a_text_of_many_characters_makes_more_pieces_than_asked_for(monkeypatch, capsys):
    """Chinese has more characters than a small vocabulary, and two bytes hold 65,535 ids."""
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))]
    assert train_mlm.train_tokenizer(texts, 400).get_vocab_size() <= 400
    assert "characters" not in capsys.readouterr().out
    train_mlm.train_tokenizer(texts, 200)
    assert "so many characters that the tokenizer has 305 pieces" in capsys.readouterr().out
    monkeypatch.setattr(train_mlm, "MAX_VOCAB", 304)
    refused(train_mlm.train_tokenizer, texts, 200, said="has 305 tokens; 304 is the most")


UNKNOWN = [  # a text, the share of its characters that the tokenizer does not know
    ("one two three\n", "0.00%"),
    ("one two zwei\n", "40.00%"),  # white space does not count
    (f"{'one ' * 90}{'x' * 120}\n", "30.77%"),  # a word of over 100 letters is lost as one token
    ("one 漢 字\n", "40.00%"),
    ("one [UNK] [CLS]\n", "46.15%"),  # UNK and CLS are unknown words, brackets are known
]


@pytest.mark.parametrize(("text", "share"), UNKNOWN)
def test_the_share_of_unknown_characters_is_said_whenever_the_text_is_read(text, share, capsys):
    put("a.txt", text * 20)
    for _ in range(2):
        documents("--data a.txt --cache cache")
        assert f"{share} of its characters are [UNK]" in capsys.readouterr().out


def test_replaced_text_is_new_text_and_moved_text_is_not():
    put("a.txt", "one two")
    assert documents("--data a.txt --cache cache") == ["one two"]

    # of the same name, size and time
    time = Path("a.txt").stat().st_mtime_ns
    put("a.txt", "two one")
    os.utime("a.txt", ns=(time, time))
    assert documents("--data a.txt --cache cache") == ["two one"]

    # moved, or read anew
    count = len(list(Path("cache").iterdir()))
    os.utime("a.txt", ns=(1, 1))
    shutil.copy("a.txt", "moved.txt")
    assert documents("--data moved.txt --cache cache") == ["two one"]
    assert len(list(Path("cache").iterdir())) == count == 2

    # other files, in another order, of another kind
    put("b.txt", "one")
    assert documents("--data a.txt b.txt --cache cache") == ["two one", "one"]
    assert documents("--data b.txt a.txt --cache cache") == ["one", "two one"]
    put("b.json", '{"text": "one"}')
    shutil.copy("b.json", "b.jsonl")
    sources = train_mlm.file_sources([Path("b.json"), Path("b.jsonl")], "document")
    assert sources[0].key != sources[1].key


def killed_at(call: int):
    """The function `encode` that counts its texts, and a kill -9 in one of its calls."""
    encode, texts, calls = train_mlm.encode, [], []

    def counting(batch, tokenizer):
        calls.append(1)
        texts.extend(batch)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(batch, tokenizer)

    return counting, texts


def test_tokens_are_made_once_and_go_on_after_a_kill(monkeypatch, capsys):
    text = Path("corpus.txt").read_text()
    expected = [[5 + WORDS.index(word) for word in line.split()] for line in text.split("\n")]
    monkeypatch.setattr(train_mlm, "CHARACTERS_AT_ONCE", 10_000)
    flags = "--tokenizer words.json --sample-by line --cache cache"

    # killed half-way, with some ids of a batch that is not finished
    counting, _ = killed_at(call=10)
    with monkeypatch.context() as patch:
        patch.setattr(train_mlm, "encode", counting)
        assert forked(prepared, flags) == -signal.SIGKILL
    (partial,) = Path("cache").glob("*/ids.partial")
    with open(partial, "ab") as file:
        file.write(b"\1\2\3")
    with open(partial.with_name("documents"), "ab") as file:
        file.write(b"\1\2\3")

    # another process goes on after the last finished document
    counting, texts = killed_at(call=None)
    monkeypatch.setattr(train_mlm, "encode", counting)
    tokens = prepared(flags)[1].phases[0][1].tokens
    assert 500 < len(texts) < 1000  # of 1500 documents
    assert np.array_equal(tokens.ids, np.concatenate(expected))
    assert np.array_equal(np.diff(tokens.offsets), list(map(len, expected)))

    # a third finds all, and says the same
    texts.clear()
    said = capsys.readouterr().out.splitlines()
    again = prepared(flags)[1].phases[0][1].tokens
    assert not texts
    assert again.checksum == tokens.checksum
    assert capsys.readouterr().out.splitlines() == said


def test_what_is_known_of_a_document_survives_a_kill(monkeypatch, capsys):
    put("a.txt", "one two zwei\n" * 100)
    monkeypatch.setattr(train_mlm, "CHARACTERS_AT_ONCE", 100)
    counting, _ = killed_at(call=5)
    with monkeypatch.context() as patch:
        patch.setattr(train_mlm, "encode", counting)
        assert forked(documents, "--data a.txt --sample-by line --cache cache") == -signal.SIGKILL
    assert len(documents("--data a.txt --sample-by line --cache cache")) == 100
    assert "40.00% of its characters are [UNK]" in capsys.readouterr().out


def test_damaged_tokens_are_refused():
    flags = "--sample-by line --cache cache"
    prepared(flags)
    (folder,) = Path("cache").iterdir()
    ids = (folder / "ids").read_bytes()
    known = (folder / "documents").read_bytes()
    for file, damaged in (
        ("ids", ids[: len(ids) // 4 * 2]),
        ("ids", b""),
        ("ids", ids[:-1]),
        ("ids", ids[:-2] + b"\xff\xff"),  # no id of the vocabulary
        ("documents", known[: len(known) // 48 * 24]),
        ("documents", known[:24] + b"\xff\xff\xff\x7f" + known[28:]),  # ends after the next one
    ):
        put(folder / "ids", ids)
        put(folder / "documents", known)
        put(folder / file, damaged)
        refused(prepared, flags, said="the tokens in cache/.* are damaged: remove that folder")


def test_text_that_changes_while_it_is_read_is_refused():
    text = Path("corpus.txt").read_text()
    for other in ("other text\n", text.upper()):  # of another size, of the same size
        put("corpus.txt", text)
        os.utime("corpus.txt", ns=(1, 1))
        (source,) = train_mlm.file_sources([Path("corpus.txt")], "line")
        put("corpus.txt", other)
        refused(list, source.read(), said="corpus.txt was changed while it was read")


def test_documents_that_are_skipped_are_skipped_whole(monkeypatch):
    monkeypatch.setattr(train_mlm, "PIECE", 100)
    put("a.txt", "one two " * 100)
    put("b.txt", "three")
    sources = train_mlm.file_sources([Path("a.txt"), Path("b.txt")], "document")
    assert [text for text, _ in train_mlm.pieces(sources, "", skip=1)] == ["three"]


def test_tokens_without_their_documents_are_damaged_and_a_cache_is_named_that_cannot_be_made():
    prepared("--cache cache")
    (documents,) = Path("cache").glob("*/documents")
    documents.unlink()
    refused(
        prepared, "--cache cache", said="the tokens in cache/.* are damaged: remove that folder"
    )
    refused(
        prepared, "--cache corpus.txt/a", said="--cache: cannot make corpus.txt/a/.*: Not a dir"
    )


def test_of_two_preparations_at_once_the_second_waits_and_reads(monkeypatch):
    import multiprocessing

    encode = train_mlm.encode
    context = multiprocessing.get_context("fork")
    inside, go_on = context.Event(), context.Event()

    def slowly(batch, tokenizer):
        inside.set()
        assert go_on.wait(60)
        return encode(batch, tokenizer)

    def prepare(name, encode):
        with open(name, "w", buffering=1) as file, contextlib.redirect_stdout(file):
            train_mlm.encode = encode
            prepared("--sample-by line --cache cache")

    # the first is held in the middle; the second would fail if it encoded anything
    put("second", "")
    first = context.Process(target=prepare, args=("first", slowly))
    first.start()
    assert inside.wait(60)
    second = context.Process(target=prepare, args=("second", None))
    second.start()
    while second.is_alive() and "waiting for another process" not in Path("second").read_text():
        second.join(0.05)
    go_on.set()
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert len(list(Path("cache").glob("*/ids"))) == 1
    said = [Path(name).read_text().splitlines()[-2:] for name in ("first", "second")]
    assert said[0] == said[1]


def test_defaults_are_the_papers_and_flags_override_the_demo():
    # the paper's protocol, and its model
    protocol = dict(batch_size=256, lr=1e-4, warmup_steps=10_000, weight_decay=0.01)
    protocol |= dict(mask_rate=0.15, dropout=0.1, length_schedule=[(128, 0.9), (512, 0.1)])
    args = train_mlm.parse_args([])
    assert protocol.items() <= vars(args).items()
    assert train_mlm.model_config(args, 30522, 0) == MaBERTConfig()

    # another model
    flags = "--psm pre+post --causal-conv --pattern TM --d-state 8 --dropout 0.2"
    changes = dict(psm=("pre", "post"), causal_conv=True, pattern="TM", d_state=8, dropout=0.2)
    variant = train_mlm.parse_args(flags.split())
    assert train_mlm.model_config(variant, 30522, 0) == MaBERTConfig(**changes)
    assert train_mlm.parse_args(["--psm", "none"]).psm == ()

    # the demo
    demo = train_mlm.parse_args("--demo --steps 7 --tokenizer x.json".split())
    assert (demo.pattern, demo.hidden_size, demo.out) == ("MMT", 128, "out/demo")
    assert (demo.steps, demo.vocab_size) == (7, None)

    # fine-tuning
    protocol = dict(seeds=5, lr=2e-5, batch_size=32, epochs=3, max_length=128, padding_side="right")
    protocol |= dict(psm=None)
    assert protocol.items() <= vars(finetune_glue.parse_args(["--checkpoint", "x"])).items()


def test_tokens_are_kept_in_the_users_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert train_mlm.parse_args([]).cache == "/caches/mabert"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert train_mlm.parse_args([]).cache == "/home/someone/.cache/mabert"


NAMES_OF_FILES = [  # a script's parser, what it needs besides, its flags
    (train_mlm, "", "--out --data --tokenizer --cache"),
    (finetune_glue, "--checkpoint x", "--checkpoint --data-dir --out"),
    (bench, "drift", "--checkpoint --sentences --out"),
    (bench, "efficiency", "--out"),
]


@pytest.mark.parametrize(("script", "needed", "flags"), NAMES_OF_FILES)
def test_names_of_files_are_not_empty_and_may_begin_with_a_tilde(
    script, needed, flags, monkeypatch
):
    monkeypatch.setenv("HOME", "/home/someone")
    for flag in flags.split():
        argv = [*needed.split(), flag]
        value = vars(script.parse_args([*argv, "~/x"]))[flag[2:].replace("-", "_")]
        assert value in ("/home/someone/x", ["/home/someone/x"])
        refused(script.parse_args, [*argv, ""], said=f"argument {flag}: the name is empty")


def test_a_batch_that_two_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(train_mlm, "PROCESSES", 2)
    said = "no multiple of --micro-batch-size 32 × 2 process"
    refused(pretrain, "--micro-batch-size 32", said=said)


# How a run stops, and goes on

SHORT = "--steps 6 --save-every 2 --log-every 2"
LONGER = """--steps 40 --save-every 10 --log-every 7 --eval-every 20 --micro-batch-size 8
    --dropout 0.1 --bucket --resume"""


def test_a_run_of_one_step_may_have_more_lengths_than_steps(capsys):
    pretrain("--steps 1 --save-every 5 --length-schedule 16:0.3 24:0.3 32:0.4")
    unused = re.findall("rows of (.*) tokens get none of the 1 steps", capsys.readouterr().out)
    assert unused == ["24", "32"]
    assert trained()[1][-1]["step"] == "1"
    assert Path("run/step-0000001").exists()


def test_a_run_is_not_lost_to_one_that_must_not_or_cannot_take_its_place():
    pretrain("--steps 1")
    log = Path("run/log.csv").read_text()
    refused(pretrain, SHORT, said="holds a run or a model already")
    refused(pretrain, f"{SHORT} --overwrite --batch-size 2048", said="too short")
    assert Path("run/log.csv").read_text() == log
    assert MaBERTForMaskedLM.from_pretrained("run")


def test_a_model_or_a_run_that_is_alive_is_not_overwritten():
    refused(pretrain, "--out model", said="holds a run or a model already")
    flags = "--out model --overwrite"
    with train_mlm.locked(Path("model/.lock")):
        assert forked(refused, pretrain, flags, said="another run is writing to model") == 0


def test_of_a_run_that_is_overwritten_nothing_is_left(monkeypatch):
    pretrain("--steps 1")
    Path("run/step-by-step-notes").mkdir()  # the user's, though it looks like a checkpoint
    monkeypatch.setattr(train_mlm, "train", raising(KeyboardInterrupt))
    refused(pretrain, f"{SHORT} --overwrite", said="interrupted")
    left = {"step-by-step-notes", "tokenizer.json", ".lock"}
    assert {file.name for file in Path("run").iterdir()} == left


FULL_DISKS = [  # who writes, the bytes that fit into a file, what is said
    ("write_tokens", 20_000, r"\[Errno 27\] File too large"),
    # the weights fit, the optimizer's state does not
    ("save_checkpoint", 300_000, "cannot write run/step-0000006.partial/training.pt: is the disk"),
]


@pytest.mark.parametrize(("writer", "fits", "said"), FULL_DISKS)
def test_a_full_disk_is_explained_and_leaves_what_was_whole(writer, fits, said, monkeypatch):
    """A limit on the size of files stands in for a full disk."""
    import resource

    pretrain(SHORT)
    shutil.rmtree("run/step-0000006")

    # the run goes on, but cannot write
    write = getattr(train_mlm, writer)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*inputs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (fits, most))
        try:
            return write(*inputs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    monkeypatch.setattr(train_mlm, writer, limited)
    said = rf"^{said}.*\nFinished checkpoints \(in run\) and prepared text \(in cache\) are kept"
    refused(pretrain, f"{SHORT} --resume --cache cache", said=said)

    # its checkpoints are as they were
    assert checkpoints() == ["0000002", "0000004"]
    assert train_mlm.newest_checkpoint(Path("run")).name == "step-0000004"


@pytest.fixture(scope="module")
def longer(given):
    """What comes of the run that is not stopped: it leaves nothing where all tests start from."""
    pretrain(LONGER)
    weights, log = trained()
    shutil.rmtree("run")
    return weights, log


def test_a_stopped_run_goes_on_bit_by_bit(longer, monkeypatch, capsys):
    flags = f"{LONGER} --out stopped"
    step = train_mlm.train_step
    signals = {32: signal.SIGTERM, 36: signal.SIGINT}  # by step, counted from zero

    def signalled(*inputs):
        if signum := signals.pop(inputs[3], None):
            os.kill(os.getpid(), signum)
        return step(*inputs)

    # SIGTERM
    monkeypatch.setattr(train_mlm, "train_step", signalled)
    refused(pretrain, flags, said="^143 ")
    assert "stopped by SIGTERM after step 33, which is saved" in capsys.readouterr().out
    assert checkpoints("stopped") == ["0000020", "0000030", "0000033"]  # --keep

    # Ctrl-C, and to the end; the log is written anew
    put("stopped/log.csv", b"\xff is not read")
    refused(pretrain, flags, said="^130 ")
    pretrain(flags)
    weights, log = trained("stopped")
    assert torch.equal(weights, longer[0])
    assert log == longer[1]

    # once more, with nothing left to do
    pretrain(flags)
    printed = re.findall(r"held-out loss (\S+) nats", capsys.readouterr().out)
    assert printed == 2 * [f"{float(log[-1]['held_out_loss']):.3f}"]


TWO = """
import os, signal, sys
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import train_mlm

counts = dict(exchanges=0, messages=0)

class Counting(train_mlm.DistributedDataParallel):
    def __init__(self, model):
        super().__init__(model)
        self.register_comm_hook(None, self.exchange)

    @staticmethod
    def exchange(_, bucket):
        counts["exchanges"] += 1
        return allreduce_hook(None, bucket)

def gathered(value, call=train_mlm.gathered):
    counts["messages"] += 1
    return call(value)

# SIGTERM for the second process
def train_step(*inputs, call=train_mlm.train_step):
    if train_mlm.RANK == 1 and train_mlm.RESTARTS == 0 and inputs[3] == 12:
        os.kill(os.getpid(), signal.SIGTERM)
    return call(*inputs)

# kill -9 for the first, when all of a checkpoint is written but its name
def replace(old, new, call=os.replace):
    if str(old).endswith("step-0000030.partial"):
        os.kill(os.getpid(), signal.SIGKILL)
    call(old, new)

train_mlm.DistributedDataParallel = Counting
train_mlm.gathered = gathered
train_mlm.train_step = train_step
os.replace = replace

# only the first process may read text and write
if train_mlm.RANK == 1:
    train_mlm.text_sources = train_mlm.save_checkpoint = train_mlm.write_atomically = None
try:
    train_mlm.main(sys.argv[1:])
finally:
    if train_mlm.RANK == 0:
        print(counts, flush=True)
"""


def test_two_processes_train_the_same_model_are_started_again_and_may_be_killed(longer):
    """The second gets SIGTERM; they go on; kill -9 ends the first as it saves; one goes on."""
    put("two.py", TWO)
    launcher = "-m torch.distributed.run --nproc-per-node 2 --max-restarts 1 two.py"
    flags = f"{LONGER} --save-every 15 --out two --cache cache"
    command = [sys.executable, *launcher.split(), *arguments(flags)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = done.stdout
    assert done.returncode != 0, said

    # both stop after the same step, one that they ask each other at, and are started again there
    stopped = re.search(r"stopped by SIGTERM after step (\d+)", said)
    assert stopped and 13 <= int(stopped[1]) <= 23, said
    assert f"from step {stopped[1]} on" in said, said
    assert said.count("on 2 × cpu") == 2, said
    assert set(checkpoints("two")) == {"0000015", f"{int(stopped[1]):07d}", "0000030.partial"}

    # gradients are exchanged once a step, messages are fewer
    counts = re.search(r"\{'exchanges': (\d+), 'messages': (\d+)\}", said)
    assert counts and counts[1] == stopped[1] and int(counts[2]) < int(counts[1]), said

    # one process goes on and ends where a run of one process does
    pretrain(f"{LONGER} --save-every 15 --out two --cache cache")
    weights, log = trained("two")
    assert relative(weights, longer[0]) < 1e-5
    losses = [[float(line["loss"] or 0) for line in lines] for lines in (log, longer[1])]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.mark.parametrize(
    "seconds, steps", [(4.0, [1, 2, 3, 4]), (0.3, [1, 2, 5, 8]), (1e-3, [1, 2, 12, 22])]
)
def test_processes_ask_each_other_for_signals_every_ten_steps_or_once_a_second(
    seconds, steps, monkeypatch
):
    asked = []
    clock = types.SimpleNamespace(step=0)

    def gathered(answer):
        asked.append(clock.step)
        return [answer, (signal.SIGTERM if clock.step >= steps[-1] else 0, seconds)]

    monkeypatch.setattr(train_mlm, "PROCESSES", 2)
    monkeypatch.setattr(train_mlm, "gathered", gathered)
    monkeypatch.setattr(train_mlm, "perf_counter", lambda: clock.step * seconds)
    monkeypatch.setattr(train_mlm.signal, "signal", lambda *_: None)
    stop = train_mlm.Stop()
    for clock.step in range(1, 50):
        if stop.signal_after(clock.step):
            break
    assert asked == steps and clock.step == steps[-1]


@pytest.mark.parametrize("reader_stays", [True, False])
def test_what_cannot_be_printed_ends_no_training(reader_stays):
    """The terminal lacks a character, here ×; or the reader of a pipe has left (a full disk is as
    good). The tokenizer's training prints by itself."""
    reader, output = os.pipe()
    if not reader_stays:
        os.close(reader)
    flags = arguments("--vocab-size 100 --cache cache --steps 1")
    command = [sys.executable, str(ROOT / "train_mlm.py"), *flags]
    terminal = os.environ | dict(PYTHONIOENCODING="ascii")
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, env=terminal, text=True)
    os.close(output)

    assert MaBERTForMaskedLM.from_pretrained("run")
    if reader_stays:
        assert done.returncode == 0, done.stderr
        assert "M parameters, on 1 ? " in open(reader).read()
    else:
        assert done.stderr.endswith("not all of it could be printed: [Errno 32] Broken pipe\n")
        assert done.returncode == 1


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    handlers = {}
    monkeypatch.setattr(train_mlm.signal, "signal", handlers.__setitem__)
    stop = train_mlm.Stop()
    assert handlers[signal.SIGINT] == handlers[signal.SIGTERM] == stop.receive
    stop.receive(signal.SIGINT, None)
    assert handlers[signal.SIGINT] is signal.default_int_handler
    assert stop.signal_after(1) == signal.SIGINT


def test_a_model_that_does_not_fit_leaves_its_folder_free(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_mlm, "make_model", raising(MemoryError("too large")))
        refused(pretrain, SHORT, said="out of memory: lower --micro-batch-size")
    pretrain(SHORT)


def test_runs_on_the_same_text_share_a_trained_tokenizer_and_its_tokens(monkeypatch, capsys):
    flags = f"--vocab-size 100 --cache cache {SHORT}"
    put("run/tokenizer.json", "left by another run")
    pretrain(flags)
    trained_one = Path("run/tokenizer.json").read_text()
    assert Path("run/step-0000006/tokenizer.json").read_text() == trained_one
    assert "trained on this text before" not in capsys.readouterr().out

    # another training might differ in a few pieces, and so in the tokens
    with monkeypatch.context() as patch:
        patch.setattr(train_mlm, "train_tokenizer", None)
        patch.setattr(train_mlm, "write_tokens", None)
        patch.setattr(train_mlm, "make_cache_folder", None)  # the cache may be read-only
        pretrain(f"{flags} --out second")
    assert Path("second/tokenizer.json").read_text() == trained_one
    assert "trained on this text before" in capsys.readouterr().out

    # of another size, or for another text, it is another one
    put("other.txt", Path("corpus.txt").read_text() + "\na cat")
    for change in ("--vocab-size 101", "--sample-by document", "--data other.txt"):
        pretrain(f"{flags} --out second --overwrite {change}")
        assert "trained on this text before" not in capsys.readouterr().out
    assert len(list(Path("cache").glob("tokenizer-*.json"))) == 4


def test_a_resumed_run_has_the_tokenizer_of_its_checkpoint(monkeypatch):
    flags = f"--vocab-size 100 {SHORT}"
    pretrain(flags)
    trained_one = Path("run/tokenizer.json").read_text()

    # whatever lies beside it, and without the cache
    shutil.rmtree("run/step-0000006")
    put("run/tokenizer.json", "damaged")
    monkeypatch.setattr(train_mlm, "train_tokenizer", None)
    pretrain(f"{flags} --resume --cache another")
    assert Path("run/tokenizer.json").read_text() == trained_one


def reversed_in_a_tensor(whole: bytes) -> bytes:
    return whole[:70_000] + whole[70_000:70_100][::-1] + whole[70_100:]


DAMAGED_CHECKPOINTS = [  # a file, its contents: bytes, text, an object to save, None for no file
    ("training.pt", reversed_in_a_tensor),
    ("training.pt", lambda whole: None),
    ("training.pt", lambda whole: {"step": 5}),
    ("model.pt", lambda whole: {"x": torch.ones(3)}),
    ("tokenizer.json", lambda whole: "{"),
]


def test_a_run_goes_on_after_the_newest_checkpoint_that_can_be_read(capsys):
    pretrain(SHORT)
    weights, log = trained()

    # the last checkpoint is lost, and those behind it are damaged
    run = Path("run")
    damaged = []
    for step, (name, change) in enumerate(DAMAGED_CHECKPOINTS, 7):
        damaged.append(shutil.copytree(run / "step-0000006", run / f"step-{step:07d}"))
        put(damaged[-1] / name, change((damaged[-1] / name).read_bytes()))
    shutil.rmtree(run / "step-0000006")
    put(run / "step-0000003.partial/model.pt", "half of it")

    # it goes on, and damaged ones do not count as checkpoints to keep
    pretrain(f"{SHORT} --resume")
    said = capsys.readouterr().out
    assert all(f"{folder} is damaged" in said for folder in damaged)
    assert "from step 4 on" in said
    again, log_again = trained()
    assert torch.equal(again, weights)
    assert log_again == log
    assert checkpoints()[:3] == ["0000002", "0000004", "0000006"]

    # none can be read, none is left
    for folder in run.glob("step-*"):
        (folder / "training.pt").unlink(missing_ok=True)
    refused(pretrain, f"{SHORT} --resume", said="no checkpoint in .* can be read")
    for folder in run.glob("step-*"):
        shutil.rmtree(folder)
    refused(pretrain, f"{SHORT} --resume", said="run holds a model but no checkpoint")
    assert trained()[1] == log


def test_a_young_run_that_was_stopped_starts_again(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train_mlm, "train_step", raising(KeyboardInterrupt))
        refused(pretrain, SHORT, said="interrupted")
    assert Path("run/log.csv").exists()
    pretrain(f"{SHORT} --resume")
    assert "from step 0 on" in capsys.readouterr().out


def test_links_to_checkpoints_are_removed_like_checkpoints():
    pretrain(SHORT)
    run = Path("run")
    shutil.rmtree(run / "step-0000006")
    (run / "step-0000002").rename("elsewhere")
    (run / "step-0000002").symlink_to(Path("elsewhere").absolute())
    (run / "step-0000006").symlink_to("nowhere")

    # beyond --keep, and in the place of a new one
    pretrain(f"{SHORT} --resume --keep 2")
    assert checkpoints() == ["0000004", "0000006"]
    assert not (run / "step-0000006").is_symlink()
    assert Path("elsewhere/model.pt").exists()

    # by --overwrite
    (run / "step-0000002").symlink_to(Path("elsewhere").absolute())
    pretrain("--steps 1 --overwrite")
    assert checkpoints() == ["0000001"]
    assert Path("elsewhere/model.pt").exists()


def test_checkpoints_are_found_and_sorted_by_number():
    for name in ("step-9999999", "step-0000002", "step-10000001", "step-10000000.partial"):
        Path("run", name).mkdir(parents=True)
    folders = train_mlm.step_folders(Path("run"))
    assert list(map(train_mlm.step_of, folders)) == [2, 9_999_999, 10_000_001]


OTHER_RUNS = """--lr 0.5|--steps 5|--seed 1|--batch-size 16|--micro-batch-size 8|--bucket
    |--warmup-steps 1|--weight-decay 0|--mask-rate 0.3|--length-schedule 16:1|--vocab-size 100
    |--tokenizer other.json|--pattern TM|--d-state 8|--psm none|--causal-conv|--dropout 0.1
    |--data turned.txt|--sample-by document"""


def test_another_run_is_not_resumed():
    pretrain(SHORT)
    before = Path("run/log.csv").read_text()
    text = Path("corpus.txt").read_text()
    words_tokenizer(WORDS[::-1]).save("other.json")
    turned = [" ".join(reversed(line.split())) for line in text.splitlines()]  # of the same lengths
    put("turned.txt", "\n".join(turned))

    # every difference is named
    for change in re.split(r"\s*\|", OTHER_RUNS):
        flag = re.match(r"--(\S+)", change)[1].replace("-", "_")
        name = "corpus" if flag in ("data", "sample_by") else flag
        said = f"belongs to another run: .*{name} was .* and is now "
        refused(pretrain, f"{SHORT} {change} --resume", said=said)
    assert Path("run/log.csv").read_text() == before

    # the same text elsewhere is no difference
    put("moved.txt", text)
    pretrain(f"{SHORT} --data moved.txt --resume")


# A run that starts from a trained model

ADAPTED = """--init start --out run --data corpus.txt --sample-by line --length-schedule 16:1
    --steps 6 --batch-size 32 --micro-batch-size 16 --lr 5e-3 --log-every 2 --save-every 2"""


def save_start(seed=5, model_class=MaBERTForMaskedLM, **changes) -> MaBERTConfig:
    """A model of 32 positions for the words of the corpus, in the folder "start"; its config.

    Some of its fields have no flag, and its vocabulary is larger than its tokenizer's.
    """
    variant = dict(d_conv=3, expand=1, psm=("pre",), causal_conv=True)
    config = replace(tiny("MT", **variant | changes), dropout=0.2)
    build(model_class, config, torch.float32, seed).save_pretrained("start")
    tokenizer = json.loads(words_tokenizer(WORDS).to_str()) | dict(post_processor=None)
    put("start/tokenizer.json", json.dumps(tokenizer))
    return config


def adapt(flags=""):
    train_mlm.main(f"{ADAPTED} {flags}".split())


@pytest.mark.parametrize("schedule, positions", [("16:1", 32), ("16:0.5 48:0.5", 48)])
def test_a_run_starts_from_the_model_of_init_and_its_loss(schedule, positions, capsys):
    config = save_start()
    flags = f"--length-schedule {schedule} --dropout 0.1"
    adapt(flags)
    assert ("its 32 positions are stretched to 48" in capsys.readouterr().out) == (positions > 32)

    # its fields and its tokenizer
    model = MaBERTForMaskedLM.from_pretrained("run")
    assert model.config == replace(config, max_position=positions, dropout=0.1)
    tokenizers = [train_mlm.load_tokenizer(f"{name}/tokenizer.json") for name in ("start", "run")]
    assert tokenizers[0].to_str() == tokenizers[1].to_str()

    # the loss before the first step is that of the model on the same rows; then it falls
    start = MaBERTForMaskedLM.from_pretrained("start")
    start.encoder.resize_positions(positions)
    data = train_mlm.prepare(train_mlm.parse_args(f"{ADAPTED} {flags}".split()))
    inputs, real, labels = map(torch.from_numpy, data.held_out)
    with torch.no_grad():
        loss = start(inputs, real, labels=labels).loss.item()
    losses = [float(line["held_out_loss"] or "nan") for line in trained()[1]]
    assert losses[0] == pytest.approx(loss, abs=1e-4)
    assert losses[-1] < loss - 0.2


def test_a_step_of_a_run_can_be_the_start_of_another():
    save_start()
    adapt()
    adapt("--init run/step-0000002 --out second --steps 1 --lr 1e-30")
    weights, _ = trained("second")
    of_the_step = MaBERTForMaskedLM.from_pretrained("run/step-0000002").state_dict().values()
    assert torch.equal(weights, torch.cat([weight.flatten() for weight in of_the_step]))


def test_a_run_goes_on_without_the_folder_of_init_but_not_with_another():
    save_start()
    adapt()
    weights, log = trained()

    # with dropout, bit by bit
    shutil.move("start", "moved")
    for step in ("0000004", "0000006"):
        shutil.rmtree(f"run/step-{step}")
    adapt("--resume")
    weights_again, log_again = trained()
    assert torch.equal(weights_again, weights)
    assert log_again == log

    # a copy is no difference, but other weights are, and so are none
    adapt("--resume --init moved")
    save_start(seed=6)
    refused(adapt, "--resume", said="another run: init was .* and is now ")
    refused(pretrain, "--resume", said="another run: .*init was .* and is now None")

    # without a checkpoint, or with that of a run without --init, the folder is needed
    missing = "^--init: nowhere/config.json is missing"
    refused(adapt, "--init nowhere --out second --resume", said=missing)
    pretrain("--steps 1 --out third")
    refused(adapt, "--init nowhere --out third --resume", said=missing)


FLAGS_REFUSED_BESIDE_INIT = """--pattern=MT|--hidden-size 32|--num-heads 2|--intermediate-size 64
    |--d-state 4|--psm none|--causal-conv|--no-causal-conv|--tokenizer words.json|--vocab-size 100
    |--demo"""


def test_flags_of_the_model_and_its_tokenizer_are_refused_beside_init():
    for flags in re.split(r"\s*\|", FLAGS_REFUSED_BESIDE_INIT):
        name = re.match(r"--(?:no-)?([a-z-]+)", flags)[1]
        said = rf"not allowed with --init: --{name}\. "
        refused(train_mlm.parse_args, ["--init", "start", *flags.split()], said=said)


def test_a_folder_without_a_pretrained_model_and_its_tokenizer_is_refused():
    save_start(model_class=Classifier)
    refused(adapt, said="^--init: start holds a MaBERTForSequenceClassification, which has no head")
    save_start(vocab_size=20)
    refused(adapt, said="^--init: start's tokenizer has 25 tokens, its model 20")
    save_start()
    refused(adapt, "--dropout inf", said="^--init: .*MaBERTConfig.dropout is inf")

    # a file is missing
    for file, said in {
        "tokenizer.json": "cannot load the tokenizer start/tokenizer.json",
        "model.pt": "^--init: start/model.pt is missing",
        "config.json": "^--init: start/config.json is missing",
    }.items():
        Path("start", file).unlink()
        refused(adapt, said=said)


def test_a_run_does_not_replace_the_folder_that_it_starts_from():
    save_start()
    Path("link").symlink_to("start")
    before = Path("start/model.pt").read_bytes()
    refused(adapt, "--out start", said="start holds a run or a model already")
    for flags in ("--out start", "--out link", "--out start --init link", "--out ."):
        refused(adapt, f"{flags} --overwrite", said="^--overwrite: .* is or holds the folder")
    assert Path("start/model.pt").read_bytes() == before


# ---- Fine-tuning on GLUE ----

GLUE_METRICS = [  # name, what it equals, how many values labels have
    ("accuracy", "sklearn.metrics.accuracy_score", 2),
    ("f1", "sklearn.metrics.f1_score", 2),
    ("matthews", "sklearn.metrics.matthews_corrcoef", 2),
    ("pearson", "scipy.stats.pearsonr", 12),
    ("spearman", "scipy.stats.spearmanr", 12),  # with ties
]


@pytest.mark.parametrize("name, reference, values", GLUE_METRICS)
def test_glue_metrics_equal_those_of_scikit_learn_and_scipy(name, reference, values):
    module, function = reference.rsplit(".", 1)
    reference = getattr(importlib.import_module(module), function)
    metric = finetune_glue.METRICS[name]
    for labels, predicted in np.random.default_rng(0).integers(values, size=(4, 2, 50)):
        expected = reference(labels, predicted)
        if module == "scipy.stats":
            expected = expected.statistic
        assert metric(predicted, labels) == pytest.approx(expected)

        # a constant guess, which the references refuse or warn of
        assert name == "accuracy" or metric(np.zeros(50), labels) == 0


def test_macro_f1_equals_that_of_scikit_learn():
    from sklearn.metrics import f1_score

    # the second and third: a class is never predicted; one is only predicted
    rng = np.random.default_rng(0)
    for classes, predictable in ((2, 2), (4, 3), (3, 4)):
        labels = rng.integers(classes, size=50)
        predicted = rng.integers(predictable, size=50)
        expected = f1_score(labels, predicted, average="macro")
        assert finetune_glue.macro_f1(predicted, labels) == pytest.approx(expected)


RTE = "index\tsentence1\tsentence2\tlabel\n"
STSB = "sentence1\tsentence2\tscore\n"
SST2 = "sentence\tlabel\n"
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
QQP_TEST = "id\tquestion1\tquestion2\n"
MNLI = "index\tsentence1\tsentence2\tx\tgold_label\n"
QNLI = "index\tquestion\tsentence\tlabel\n"
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
PAIRS = "index\tsentence1\tsentence2\n"
HUB_MNLI = dict(premise=["p"], hypothesis=["h"], label=[2], idx=[5])

# task, split, its contents (the benchmark's text, or the columns of the hub's table); then what is
# read: the sentences, and the labels or, of a test set, the benchmark's numbers
GLUE_FILES = [
    # CoLA has no header, but its test set has; a quotation mark is text; a line feed ends a line
    ("cola", "train", 'a\t1\t\tIt "rained.\na\t0\t*\tMe\u2028went\x85 there.\n',
     [('It "rained.',), ("Me\u2028went\x85 there.",)], [1, 0]),
    ("cola", "test", "index\tsentence\r\n0\tWe go.\r\n1\tThey go.\r\n",
     [("We go.",), ("They go.",)], [0, 1]),
    # a byte-order mark, columns of other names, no line feed in the end
    ("mrpc", "train", "\ufeff" + MRPC + '1\t7\t8\t" He .\tHe\n0\t9\t1\tThat "\tThis',
     [('" He .', "He"), ('That "', "This")], [1, 0]),
    ("stsb", "train", STSB + "p\tq\t3.25\n", [("p", "q")], [3.25]),
    # labels that are words
    ("rte", "dev", RTE + "0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n",
     [("a", "b"), ("c", "d")], [1, 0]),
    ("qnli", "dev", QNLI + "0\ta\tb\tnot_entailment\n", [("a", "b")], [1]),
    ("mnli", "train", MNLI + "0\tp\th\tneutral\tcontradiction\n", [("p", "h")], [2]),
    # QQP has malformed lines: those to learn from are left out, three here; the others are kept
    ("qqp", "train", QQP + "1\t2\t3\tA\tB\t0\n4\t5\t6\tC\n7\t8\t9\tD\tE\t1\n"
     "1\t2\t3\ta\tb\t\n1\t2\t3\ta\t\t1\n", [("A", "B"), ("D", "E")], [0, 1]),
    ("qqp", "test", QQP_TEST + "0\tA\t\n1\tB\tC\n", [("A", ""), ("B", "C")], [0, 1]),
    # the rows of a test set are numbered by its column index, if there is one
    ("mnli", "test_ax", PAIRS + "7\tp\th\n3\tq\ti\n", [("p", "h"), ("q", "i")], [7, 3]),
    ("rte", "test", "sentence1\tsentence2\np\th\nq\ti\n", [("p", "h"), ("q", "i")], [0, 1]),
    # the hub
    ("mnli", "dev_mismatched", HUB_MNLI, [("p", "h")], [2]),
    ("mnli", "test_ax", HUB_MNLI, [("p", "h")], [5]),
]  # fmt: skip

# task, split, its contents, what is said after its name
DAMAGED_GLUE_FILES = [
    ("cola", "train", "a\t1\t\tb\na\t1\tb", ", line 2: 3 columns instead of 4"),
    ("cola", "train", "a\t1\t\tb\na\t1\t\t \n", ", line 2: sentence is ' ', no sentence"),
    ("cola", "dev", b"a\t1\t\tb\na\t1\t\t\xff\n", ", line 2: 'utf-8' codec can't decode byte 0xff"),
    ("cola", "test", "index\tsentence\none\tWe go.\n", ", line 2: .*'one'"),
    ("rte", "train", RTE + "0\ta\tb\tentailment\n1\ta\tb\tyes\n",
     ", line 3: label 'yes'; expected entailment, not_"),
    ("rte", "train", PAIRS + "0\ta\tb\n", ", line 1: no column label, only index, sentence1, sent"),
    ("stsb", "train", STSB + "a\tb\tx\n", ", line 2: label 'x'; expected a number from 0 to 5"),
    ("stsb", "train", STSB + "a\tb\t9\n", ", line 2: label '9'; expected"),
    ("sst2", "train", SST2, " has no rows"),
    ("sst2", "train", "", ", header: no column label, sentence"),
    ("qqp", "train", QQP.encode() + b"1\t2\t3\t\xff\tb\t1\n", ", line 2: 'utf-8' codec"),
    ("qqp", "test", QQP_TEST + "0\tA\n", ", line 2: 2 columns instead of 3"),
    ("mnli", "train", HUB_MNLI | dict(label=[3]), ", row 0: label 3; expected entailment"),
    ("mnli", "train", HUB_MNLI | dict(premise=[None]), ", row 0: sentence1 is None, no sentence"),
]  # fmt: skip


def read_glue(task, split, contents, monkeypatch):
    """(a call that reads a split with these contents, what messages call it)"""
    import datasets

    if not isinstance(contents, dict):
        path = put_glue("data", task, split, contents)
        return partial(finetune_glue.read_examples, task, split, "data"), f"{path}"

    # the hub's table
    names = ("ax", "test") if split == "test_ax" else (task, split.replace("dev", "validation"))

    def load_dataset(source, subset, split, streaming):
        assert (source, subset, split, streaming) == ("nyu-mll/glue", *names, False)
        return datasets.Dataset.from_dict(contents)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = partial(finetune_glue.read_examples, task, split, None)
    return read, " ".join(("nyu-mll/glue", *names))


@pytest.mark.parametrize("task, split, contents, sentences, labels_or_index", GLUE_FILES)
def test_glue_files_are_read_with_their_quirks(
    task, split, contents, sentences, labels_or_index, monkeypatch
):
    read, _ = read_glue(task, split, contents, monkeypatch)
    examples = read()
    assert examples.sentences == sentences
    assert examples.skipped == (3 if (task, split) == ("qqp", "train") else 0)
    if "test" in split:
        assert examples.index == labels_or_index and len(examples.labels) == 0
    else:
        assert examples.labels.tolist() == labels_or_index
        assert examples.labels.dtype == (np.float32 if task == "stsb" else np.int64)


@pytest.mark.parametrize("task, split, contents, expected", DAMAGED_GLUE_FILES)
def test_a_damaged_glue_file_is_named_with_its_line(task, split, contents, expected, monkeypatch):
    read, name = read_glue(task, split, contents, monkeypatch)
    refused(read, said=re.escape(name) + expected)


def put_glue_clone(folder, tables: dict[str, dict]):
    """A clone of the hub's data set: parquet files, {"task/split": columns}, and a README that says
    where they are."""
    import pyarrow.parquet

    splits = {}
    for name, columns in tables.items():
        path = Path(folder, f"{name}-00000-of-00001.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        task, split = name.split("/")
        splits.setdefault(task, []).append(dict(split=split, path=f"{name}-*"))
    configs = [dict(config_name=task, data_files=files) for task, files in splits.items()]
    put(Path(folder, "README.md"), f"---\nconfigs: {json.dumps(configs)}\n---\n# GLUE\n")


def test_a_clone_of_the_hubs_data_set_is_read_without_a_network(monkeypatch):
    no_network = raising(OSError("no network"))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    folder = "text"  # also the name of one of the loaders of `datasets`
    train = dict(sentence=["It rained.", "We go."], label=[1, 0], idx=[0, 1])
    put_glue_clone(folder, {"cola/train": train, "ax/test": HUB_MNLI | dict(label=[-1])})
    train = finetune_glue.read_examples("cola", "train", folder)
    assert train.sentences == [("It rained.",), ("We go.",)] and train.labels.tolist() == [1, 0]
    assert finetune_glue.read_examples("mnli", "test_ax", folder).index == [5]

    # another clone of the same name is not taken for it
    other = dict(sentence=["We went."], label=[0], idx=[0])
    put_glue_clone("other/text", {"cola/train": other})
    assert finetune_glue.read_examples("cola", "train", "other/text").sentences == [("We went.",)]

    # what it lacks is named
    said = "cannot read text rte train: .*'rte' not found.*\npass --data-dir with the benchmark's"
    refused(finetune_glue.read_examples, "rte", "train", folder, said=said)

    # the benchmark's own file comes first
    put_glue(folder, "cola", "train", "a\t0\t\tMine.\n")
    assert finetune_glue.read_examples("cola", "train", folder).sentences == [("Mine.",)]


def test_the_reason_that_datasets_gives_one_level_down_is_said(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise RuntimeError("while generating the dataset") from OSError("No space left")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = "cannot read nyu-mll/glue cola train: No space left\npass --data-dir"
    refused(finetune_glue.read_examples, "cola", "train", None, said=said)


def glue_arguments(flags="") -> list[str]:
    usual = "--checkpoint model --data-dir glue --out out --max-length 32 --tasks cola --seeds 2"
    return f"{usual} --lr 2e-2 --epochs 4 {flags}".split()


def finetune(flags=""):
    finetune_glue.main(glue_arguments(flags))


def glue_run(task, flags=""):
    """What a run is made of: arguments, tokenizer, variant, and data."""
    args = finetune_glue.parse_args(glue_arguments(flags))
    config = finetune_glue.load_model("model").config
    tokenizer = finetune_glue.truncating_tokenizer(args, config)
    (variant,) = finetune_glue.chosen_variants(args, config)
    return args, tokenizer, variant, finetune_glue.encode_task(task, tokenizer, args)


def test_what_is_unusual_about_the_data_is_said_once(capsys):
    put_glue("glue", "qqp", "train", QQP + "1\t2\t3\tw1\tw2\t0\n4\t5\t6\tw3\n")
    put_glue("glue", "qqp", "dev", QQP + "1\t2\t3\tw1\tw2\t1\n")
    finetune("--tasks qqp --seeds 1 --epochs 1")
    printed = capsys.readouterr().out
    for said in (
        "qqp train: 1 malformed rows skipped\n",
        "qqp train has 1 rows; the benchmark has 363844\n",
        "qqp dev has 1 rows; the benchmark has 40430\n",
    ):
        assert printed.count(said) == 1
    assert printed.count("rows") == 3


def test_a_learnable_task_is_learned_from_end_to_end(capsys):
    finetune("--tasks cola mrpc stsb --save --predict")
    printed = capsys.readouterr().out
    out = Path("out")
    results = json.loads((out / "results.json").read_text())

    # the scores
    rows = results["rows"]
    assert [row["metric"] for row in rows] == ["matthews", "f1", "accuracy", "pearson", "spearman"]
    assert min(row["mean"] for row in rows) > 0.8 and rows[0]["mean"] > 0.9

    # their table, printed and in a file
    score = f"{rows[0]['mean']:.3f} ± {rows[0]['sd']:.3f}"
    line = f"| CoLA | matthews | pre+scan+post PSM, map | {score} | – | – |"
    assert line in printed and line in (out / "results.md").read_text()

    # what is known of each run
    tasks = [run["settings"]["task"] for run in results["runs"]]
    assert tasks == ["cola", "cola", "mrpc", "mrpc", "stsb", "stsb"]
    for run in results["runs"]:
        assert run["rows"] == dict(train=256, dev=64)
        assert run["config"]["pattern"] == "WH"
        assert run["seconds"] > 0
        assert "torch " + torch.__version__.split("+")[0] in run["machine"]  # without +cpu, +cu130

    # the submissions: of classes, nearly all right; of scores, all different, so not in bf16
    cells = [line.split("\t")[1] for line in (out / "submission/CoLA.tsv").read_text().splitlines()]
    sentences = finetune_glue.read_examples("cola", "test", "glue").sentences
    right = [(cell == "1") == ("w1" in text.split()) for cell, (text,) in zip(cells[1:], sentences)]
    assert len(right) == 16 and sum(right) >= 15
    assert len(set((out / "submission/STS-B.tsv").read_text().splitlines())) == 17

    # the saved model answers, and its tokenizer neither cuts nor takes [MASK] for text
    (folder,) = (path for path in out.glob("cola-*-seed0") if path.is_dir())
    model = Classifier.from_pretrained(folder)
    tokenizer = train_mlm.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, label in (("w7 w1 w9", 1), ("w12 w0", 0)):
        assert model(torch.tensor([tokenizer.encode(text).ids])).logits.argmax() == label
    assert tokenizer.truncation is None
    assert tokenizer.encode("w7 [MASK]").tokens == ["[CLS]", "w7", "[MASK]", "[SEP]"]


def test_each_epoch_has_an_order_of_its_own(monkeypatch):
    args, _, _, data = glue_run("cola", "--batch-size 8 --epochs 2")
    padded_batch = finetune_glue.padded_batch
    batches = []

    def recorded(encoded, indices, *options):
        batches.append(list(indices))
        return padded_batch(encoded, indices, *options)

    monkeypatch.setattr(finetune_glue, "padded_batch", recorded)
    finetune_glue.fit(finetune_glue.load_model("model"), data["train"], 0, args)
    assert len(batches) == 64 and batches[:32] != batches[32:]


def test_a_run_repeats_by_seed_and_depends_on_variant_and_side():
    write_glue(train=96, dev=64)

    def logits(seed=0, side="left", lr=2e-2, **changes):
        args, _, variant, data = glue_run("cola", f"--padding-side {side} --epochs 1 --lr {lr}")
        _, model = finetune_glue.finetune("cola", seed, variant._replace(**changes), data, args)
        batch = finetune_glue.padded_batch(data["dev"], np.arange(64), 0, side)
        return model(*batch).logits.detach()

    # the same
    expected = logits()
    assert torch.equal(expected, logits())

    # another seed, PSM, pooling
    poolings = [dict(pooling=pooling) for pooling in ("cls", "mean", "attn")]
    for changes in (dict(seed=1), dict(psm=()), *poolings):
        assert (expected - logits(**changes)).abs().max() > 2e-5, changes

    # each seed has its own head
    assert (logits(lr=1e-30) - logits(seed=1, lr=1e-30)).abs().max() > 1e-3

    # the side of the pads changes nothing with PSM; without, the convolution looks to both sides
    assert (expected - logits(side="right")).abs().max() < 2e-6
    assert (expected - logits(side="right", psm=())).abs().max() > 2e-5


def test_training_warms_up_then_decays_and_clips_gradients(monkeypatch):
    args, _, _, data = glue_run("cola", "--batch-size 8 --epochs 1")
    original, rates, norms = finetune_glue.make_optimizer, [], []

    def recording(model, weight_decay):
        optimizer = original(model, weight_decay)
        update = optimizer.step

        def step():
            rates.append({group["lr"] for group in optimizer.param_groups})
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
            update()

        optimizer.step = step
        return optimizer

    monkeypatch.setattr(finetune_glue, "make_optimizer", recording)
    finetune_glue.fit(finetune_glue.load_model("model"), data["train"], 0, args)

    # 32 steps: three up to the peak, 29 down to zero
    up = [2e-2 * (step + 1) / 3 for step in range(3)]
    down = [2e-2 * (32 - step) / 29 for step in range(3, 32)]
    assert [rate for (rate,) in rates] == pytest.approx([*up, *down])
    assert max(norms) == pytest.approx(1, abs=1e-3)


@pytest.fixture
def runs_of(monkeypatch):
    """Fine-tunes on a few rows with these flags, and returns the seeds of the runs that were made
    and not read from files. What `runs_of.stops` has for a seed is raised instead of its run."""
    write_glue(train=24, dev=8, test=4)
    original, calls, stops = finetune_glue.finetune, [], {}

    def counted(name, seed, *rest):
        calls.append(seed)
        if seed in stops:
            raise stops[seed]
        return original(name, seed, *rest)

    def runs_of(flags="") -> list[int]:
        calls.clear()
        finetune(f"--epochs 1 {flags}")
        return list(calls)

    monkeypatch.setattr(finetune_glue, "finetune", counted)
    runs_of.calls, runs_of.stops = calls, stops
    return runs_of


def test_an_interrupted_sweep_goes_on_where_it_stopped(runs_of):
    runs_of.stops[1] = KeyboardInterrupt()
    refused(runs_of, said="interrupted; finished runs are kept, and the same command goes on")
    (first,) = Path("out").glob("cola-*-seed?.json")
    before = first.read_bytes()

    # the missing run, and then none
    runs_of.stops.clear()
    assert runs_of() == [1] and first.read_bytes() == before
    assert runs_of() == []

    # what is read from files is all that was measured
    runs = json.loads(Path("out/results.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1] and runs[0] == json.loads(before)


OTHER_RESULTS = [  # what a result file says instead
    dict(task="mrpc"),
    dict(seed=1),
    dict(settings={}),
    dict(scores={}),
    *(dict(scores=dict(CoLA=dict(matthews=score))) for score in (7, -7, math.nan, "0.5")),
]


def test_a_damaged_result_is_named_and_its_run_made_again(runs_of, capsys):
    assert runs_of("--seeds 1") == [0]
    (file,) = Path("out").glob("cola-*-seed0.json")
    before = file.read_bytes()
    others = [json.dumps(json.loads(before) | other).encode() for other in OTHER_RESULTS]
    for damage in (before[:100], b"{}", b"[]", b"\xff", *others):
        file.write_bytes(damage)
        assert runs_of("--seeds 1") == [0]
        assert f"{file} is damaged" in capsys.readouterr().out
        assert json.loads(file.read_text())["scores"] == json.loads(before)["scores"]


def test_a_classifier_that_is_fine_tuned_again_is_named(runs_of, capsys):
    save_model("classifier", Classifier)
    for checkpoint, count in (("model", 0), ("classifier", 1)):
        runs_of(f"--seeds 1 --checkpoint {checkpoint}")
        assert capsys.readouterr().out.count("is a classifier: its head is kept") == count


def test_a_full_disk_ends_a_sweep_in_one_line(runs_of, monkeypatch):
    monkeypatch.setattr(torch, "save", raising(RuntimeError("unexpected pos 64 vs 0")))
    refused(runs_of, "--save", said="^cannot go on: cannot write out/.*model.pt: is the disk full")


def test_a_run_is_made_again_where_its_model_is_needed_and_was_not_saved(runs_of):
    assert runs_of() == [0, 1]

    # submissions are made by the first seed's model, which then is there
    assert runs_of("--predict") == [0]
    put_glue("glue", "cola", "test", "index\tsentence\n5\tw1\n")
    assert runs_of("--predict") == []
    assert Path("out/submission/CoLA.tsv").read_text() in {
        f"index\tprediction\n5\t{label}\n" for label in (0, 1)
    }

    # all models
    assert runs_of("--save") == [1]
    assert runs_of("--save") == []


OTHER_GLUE_RUNS = [  # a file, what is replaced in it
    ("glue/CoLA/train.tsv", r"\t1\t", r"\t0\t"),
    ("glue/CoLA/train.tsv", r" w5", r" w6"),
    ("glue/CoLA/train.tsv", r"(?s)\A(.*?\n)(.*)", r"\2\1"),  # the first row goes to the end
    ("glue/CoLA/dev.tsv", r"\t1\t", r"\t0\t"),
    ("model/config.json", r'"dropout": 0.0', r'"dropout": 0.1'),
]


def test_other_settings_rows_or_weights_are_other_runs(runs_of):
    assert runs_of("--seeds 1") == [0]
    assert runs_of("--seeds 1 --lr 1e-2") == [0]
    for file, old, new in OTHER_GLUE_RUNS:  # which keep the size of the file
        before = Path(file).read_text()
        put(file, re.sub(old, new, before))
        assert runs_of("--seeds 1") == [0]
        assert runs_of("--seeds 1") == []

    # a row that goes from the training to the dev set
    *train, last = Path("glue/CoLA/train.tsv").read_text().splitlines(keepends=True)
    put("glue/CoLA/train.tsv", "".join(train))
    put("glue/CoLA/dev.tsv", last + Path("glue/CoLA/dev.tsv").read_text())
    assert runs_of("--seeds 1") == [0]


def test_the_same_rows_are_the_same_run_wherever_they_are_read_from(runs_of):
    assert runs_of() == [0, 1]

    # another folder, another time
    shutil.copytree("glue", "copy")
    os.utime("copy/CoLA/train.tsv", (0, 0))
    assert runs_of("--data-dir copy") == []

    # a clone of the hub's data set
    tables = {}
    for split, table in (("train", "cola/train"), ("dev", "cola/validation")):
        examples = finetune_glue.read_examples("cola", split, "glue")
        sentences = [sentence for (sentence,) in examples.sentences]
        tables[table] = dict(sentence=sentences, label=examples.labels.tolist())
    put_glue_clone("clone", tables)
    assert runs_of("--data-dir clone") == []


def test_a_run_that_diverges_stops_no_other(runs_of):
    runs_of.stops[0] = FloatingPointError("too fast")
    said = r"cola, pre\+scan\+post PSM, map, seed 0: too fast; a lower --lr helps"
    refused(runs_of, said=said)
    assert runs_of.calls == [0, 1]
    assert len(list(Path("out").glob("cola-*-seed1.json"))) == 1


def test_pairs_are_cut_at_the_longer_and_have_token_types():
    _, tokenizer, _, _ = glue_run("cola", "--max-length 16")
    long, short = " ".join(WORDLIST[:20]), " ".join(WORDLIST[20:24])
    sentences = [(long, short), (short, long), (long,), (short,), ("w1 [SEP]", "[MASK]")]
    examples = finetune_glue.Examples(sentences, np.zeros(5), [], 0)
    data = finetune_glue.encode_examples(examples, tokenizer)

    for side, left, right in (("right", 0, 1), ("left", 1, 0)):
        ids, mask, types = finetune_glue.padded_batch(data, np.arange(5), 0, side)
        written = 3 * "[UNK] "  # this tokenizer knows neither brackets nor "mask"
        assert [" ".join(map(tokenizer.id_to_token, row)) for row in ids.tolist()] == [
            f"[CLS] {' '.join(WORDLIST[:9])} [SEP] {short} [SEP]",
            f"[CLS] {short} [SEP] {' '.join(WORDLIST[:9])} [SEP]",
            f"[CLS] {' '.join(WORDLIST[:14])} [SEP]",
            10 * left * "[PAD] " + f"[CLS] {short} [SEP]" + 10 * right * " [PAD]",
            6 * left * "[PAD] " + f"[CLS] w1 {written}[SEP] {written}[SEP]" + 6 * right * " [PAD]",
        ]
        assert types[:2].tolist() == [[0] * 11 + [1] * 5, [0] * 6 + [1] * 10]
        assert types[2:4].sum() == 0
        assert types[4].tolist() == 6 * left * [0] + [0] * 6 + [1] * 4 + 6 * right * [0]
        assert torch.equal(mask.bool(), ids != tokenizer.token_to_id("[PAD]"))


def test_batches_of_like_length_give_what_single_rows_give():
    args, _, _, data = glue_run("mrpc", "--padding-side left")
    model = Classifier.from_pretrained("model", num_labels=1)
    data, indices = data["dev"], np.arange(64)

    # the same values
    rows = [finetune_glue.padded_batch(data, [i], 0, "left") for i in indices]
    singly = [model(*row).logits.item() for row in rows]
    assert finetune_glue.predict(model, data, args) == pytest.approx(singly, rel=1e-4)

    # every row once
    batches = finetune_glue.batches_of_like_length(data, 4, 0)
    assert sorted(np.concatenate(batches)) == list(indices)

    # less than half of the pads
    def pads(batches):
        masks = [finetune_glue.padded_batch(data, batch, 0, "left")[1] for batch in batches]
        return sum((mask == 0).sum() for mask in masks)

    assert pads(batches) < pads(indices.reshape(-1, 4)) / 2


SUBMISSIONS = [  # task, what is predicted, what is written, in which files
    ("mnli", [1, 0, 2], ["neutral", "entailment", "contradiction"], ("MNLI-m", "MNLI-mm", "AX")),
    ("stsb", [-1.0, 2.5, 7.0], ["0.0", "2.5", "5.0"], ("STS-B",)),
]


@pytest.mark.parametrize("task, predicted, cells, names", SUBMISSIONS)
def test_submissions_are_written_as_the_benchmark_wants_them(
    task, predicted, cells, names, monkeypatch
):
    for split in finetune_glue.TASKS[task].splits("test").values():
        put_glue("glue", task, split, PAIRS + "0\ta\tb\n1\ta\tb\n5\ta\tb\n")
    args, tokenizer, _, _ = glue_run("cola")
    Path("out").mkdir()
    monkeypatch.setattr(finetune_glue, "predict", lambda *_: np.array(predicted))
    finetune_glue.write_submission(task, None, tokenizer, args)

    expected = f"index\tprediction\n0\t{cells[0]}\n1\t{cells[1]}\n5\t{cells[2]}\n"
    assert {path.stem for path in Path("out/submission").iterdir()} == set(names)
    for name in names:
        assert Path(f"out/submission/{name}.tsv").read_text() == expected


ALL_STAGES = "pre+scan+post"
ABLATION = {"Full": 0.837, "PSM only": 0.818, "MAP only": 0.820, "None": 0.805}
TABLES_OF_VARIANTS = [  # flags, name, the paper's score of each variant on MNLI-mm, PSM of each
    ("--ablation", "ablation", ABLATION, [ALL_STAGES, ALL_STAGES, "none", "none"]),
    ("--poolings --padding-side left", "poolings",
     dict(map=0.837, attn=0.818, cls=0.820, mean=0.817), 4 * [ALL_STAGES]),
]  # fmt: skip


@pytest.mark.parametrize(
    "flags, name, paper, psm", TABLES_OF_VARIANTS, ids=["ablation", "poolings"]
)
def test_each_variant_stands_beside_the_papers_score_of_it(flags, name, paper, psm, capsys):
    for split in ("train", "dev_matched", "dev_mismatched"):
        examples = "0\tw1\tw2\tx\tneutral\n1\tw3\tw4\tx\tentailment\n"
        put_glue("glue", "mnli", split, MNLI + examples)
    save_model("model", pattern="MT", causal_conv=True)
    finetune(f"--tasks mnli --seeds 1 --epochs 1 {flags}")
    printed = capsys.readouterr().out

    # the runs
    runs = json.loads(Path(f"out/{name}.json").read_text())["runs"]
    assert [run["settings"]["psm"] for run in runs] == psm

    # the table
    line = r"^\| MNLI-mm \| accuracy \| (.*?) \| \d\.\d+ \| (\d\.\d+) \|"
    lines = re.findall(line, printed, re.MULTILINE)
    assert {variant: float(score) for variant, score in lines} == paper
    assert printed.count("| MNLI-m |") == 4
    assert "paper, 100 %" in printed
    assert "average" not in printed  # of two sets

    # the remarks
    assert 'those of "MAP only" in its Table 3' in printed
    assert ("PSM or none is the same function" in printed) == (name == "ablation")


def test_masking_changes_nothing_where_no_token_looks_to_the_pads():
    ids = torch.randint(5, 60, (1, 9))
    real = torch.arange(9)[None] < 6
    for pattern, causal, side, idle in (
        ("MT", True, "right", True),
        ("MT", True, "left", False),
        ("MT", False, "right", False),
        ("WT", True, "right", False),
    ):
        config = tiny(pattern, causal_conv=causal)
        assert finetune_glue.psm_changes_nothing(config, side) == idle

        # which is so
        mask = real if side == "right" else real.flip(1)
        models = [build(MaBERT, replace(config, psm=psm)) for psm in (config.psm, ())]
        with_psm, without = (model(ids, mask)[mask] for model in models)
        assert (relative(without, with_psm) < 1e-12) == idle


PAPER = "MMT" * 4
PAPERS_ROWS = [  # flags, the checkpoint's pattern, the paper's score on CoLA
    ("", PAPER, 0.574),
    ("--budget 25", PAPER, 0.612),
    ("--budget 100 --pooling attn", PAPER, 0.648),
    ("--budget 100 --psm none --pooling cls", PAPER, 0.596),
    ("", "T" * 12, 0.428),
    # the paper has no such row
    ("", "MMT", None),
    ("--budget 25", "T" * 12, None),
    ("--pooling cls", PAPER, None),
    ("--poolings --psm none", PAPER, None),
]


def papers_variant(flags, pattern=PAPER):
    args = finetune_glue.parse_args(["--checkpoint", "x", "--seeds", "2", *flags.split()])
    return args, finetune_glue.chosen_variants(args, MaBERTConfig(pattern=pattern))[0]


@pytest.mark.parametrize("flags, pattern, cola", PAPERS_ROWS)
def test_the_papers_row_is_of_the_same_model(flags, pattern, cola):
    _, variant = papers_variant(flags, pattern)
    if cola is None:
        assert variant.paper == ()
    else:
        assert variant.paper[0] == cola and len(variant.paper) == 8


def test_the_average_is_over_the_papers_columns():
    args, variant = papers_variant("")
    runs = []
    for name, task in finetune_glue.TASKS.items():
        for score in (0.5, 1.5):
            scores = {column: dict.fromkeys(task.metrics, score) for column in task.splits("dev")}
            runs.append(dict(task=name, scores=scores))
    rows = finetune_glue.score_lines(args, {variant: runs})
    table = finetune_glue.results_table(args, rows)

    paper = np.mean(variant.paper)
    average = f"1.000 ± 0.707 | {paper:.3f} | {1 - paper:+.3f} |"
    assert table.endswith(f"\n| average | of these 8 | pre+scan+post PSM, map | {average}")
    assert len(table.splitlines()) == 2 + 13 + 1


# With own labels: train.tsv, flags, and what is read: sentences, labels, the classes
OWN_FILES = [
    # classes are sorted; a line ends as it does under Windows
    ("text\tlabel\r\na b\tlost\r\nc\tlate\r\n", "", [("a b",), ("c",)], [1, 0], ("late", "lost")),
    # two texts, in the order of the header; pandas' index has no name; quotation marks are text
    ('\ufeffidx\t\tq\tlabel\tindex\ta\n0\t7\tq1\t10\tx\t"a1\n1\t8\t"q2"\t9\ty\ta2\n', "",
     [("q1", '"a1'), ('"q2"', "a2")], [0, 1], ("10", "9")),
    # names that have a meaning in the benchmark have none here
    ("score\tpremise\tlabel\na\tb\tno\nc\td\tyes\n", "",
     [("a", "b"), ("c", "d")], [0, 1], ("no", "yes")),
    # numbers of any size
    ("label\ttext\n-70\ta\n1e4\tb\n0.25\tc\n", "--regression",
     [("a",), ("b",), ("c",)], [-70, 1e4, 0.25], ()),
]  # fmt: skip


def own_arguments(flags="") -> argparse.Namespace:
    return finetune_glue.parse_args(glue_arguments(f"--tasks own --data-dir own {flags}"))


@pytest.mark.parametrize("contents, flags, sentences, labels, classes", OWN_FILES)
def test_own_labels_are_read_as_the_header_says(contents, flags, sentences, labels, classes):
    put("own/train.tsv", contents)
    task = finetune_glue.own_task("own", own_arguments(flags).regression)
    finetune_glue.TASKS["own"] = task
    examples = finetune_glue.read_examples("own", "train", "own")
    assert examples.sentences == sentences and examples.labels.tolist() == labels
    assert task.labels == classes

    # a test set needs no labels, and its rows are counted
    put("own/test.tsv", contents.replace("label", "other"))
    examples = finetune_glue.read_examples("own", "test", "own")
    assert examples.sentences == sentences and examples.index == list(range(len(sentences)))


def test_own_labels_may_come_from_pandas():
    import pandas

    # as README says
    texts = ['He said "no", twice.', '"Yes"\tand\nno', "a,b;c\\ d"]
    table = pandas.DataFrame(dict(text=texts, label=["x", "y", "x"]))
    table = table.replace(r"\s+", " ", regex=True)
    Path("own").mkdir()
    table.to_csv("own/train.tsv", sep="\t", index=False, quoting=csv.QUOTE_NONE)

    finetune_glue.TASKS["own"] = finetune_glue.own_task("own", False)
    examples = finetune_glue.read_examples("own", "train", "own")
    assert [text for (text,) in examples.sentences] == [texts[0], '"Yes" and no', texts[2]]


OWN = "text\tlabel\nw1\tlate\nw2\tlost\n"
OWN_REFUSALS = [  # a file of own/, its contents, flags, what is said
    ("train", None, "", "^--data-dir: there is no own/train.tsv"),
    ("dev", None, "", "^--data-dir: there is no own/dev.tsv"),
    ("test", None, "--predict", "^--data-dir: there is no own/test.tsv"),
    ("train", "", "", "own/train.tsv, line 1: the columns are ; there must be one called label"),
    ("train", "w1\tlate\nw2\tlost\n", "", "own/train.tsv, line 1: the columns are w1, late; there"),
    ("train", "label\tidx\nlate\t0\n", "", "own/train.tsv, line 1: .* one or two of text"),
    ("train", "a\tb\tc\tlabel\n1\t2\t3\tlate\n", "", "train.tsv, line 1: .* are a, b, c, label"),
    ("train", "text\tlabel\tlabel\n", "", "train.tsv, line 1: .* text, label, label; .* different"),
    ("train", OWN[:18], "", "own/train.tsv has too few different labels: late"),
    ("train", "text\tlabel\nw1\t \n", "", "own/train.tsv has too few different labels: none"),
    ("train", OWN + "w3\t \n", "", "own/train.tsv, line 4: label ' '; expected late, lost "),
    ("train", OWN + " \tlate\n", "", "own/train.tsv, line 4: text is ' ', no sentence"),
    ("train", OWN + "w3\tw4\tlate\n", "", "own/train.tsv, line 4: 3 columns instead of 2"),
    ("dev", "w1\tlate\n", "", "own/dev.tsv, line 1: no column label, text, only w1, late"),
    ("dev", OWN + "w1\tbroken\n", "", "own/dev.tsv, line 4: label 'broken'; expected late, lost "),
    ("dev", OWN + "\n", "", "own/dev.tsv, line 4: 1 columns instead of 2"),
    ("test", "text\n\n", "--predict", "own/test.tsv, line 2: text is '', no sentence"),
    ("dev", OWN, "--regression", "own/train.tsv, line 2: label 'late'; expected a number"),
    ("train", "text\tlabel\nw1\tinf\n", "--regression", "own/train.tsv, line 2: label 'inf'; exp"),
]  # fmt: skip


@pytest.mark.parametrize("split, contents, flags, said", OWN_REFUSALS)
def test_own_labels_are_refused_by_file_and_line(split, contents, flags, said):
    for name in ("train", "dev", "test"):
        put(f"own/{name}.tsv", OWN)
    put(f"own/{split}.tsv", contents)
    put("own/README.md", "about this folder")  # which is no clone of the hub's data set
    refused(finetune, f"--tasks own --data-dir own {flags}", said=said)
    assert not Path("out").exists()


def test_own_labels_that_are_the_benchmarks_give_its_run():
    rng = np.random.default_rng(0)
    for split, size in (("train", 48), ("dev", 24)):
        lines = [RTE]
        for i in range(size):
            first, second = (" ".join(rng.choice(WORDLIST, 4)) for _ in range(2))
            label = "not_entailment" if "w1" in first else "entailment"
            lines.append(f"{i}\t{first} w{i % 3}\t{second}\t{label}\n")
        put_glue("glue", "rte", split, "".join(lines))
    finetune("--tasks rte --seeds 1 --epochs 1 --save")
    finetune("--tasks own --data-dir glue/RTE --seeds 1 --epochs 1 --save")

    results, models = [], []
    for task in ("rte", "own"):
        [file] = Path("out").glob(f"{task}-*-seed0.json")
        results.append(json.loads(file.read_text())["scores"]["RTE"])
        models.append(torch.load(file.with_suffix("") / "model.pt"))
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert list(results[1]) == ["accuracy", "macro_f1"]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())

    # but it is not compared with the paper
    args, variant = papers_variant("--tasks own --data-dir glue/RTE")
    runs = [dict(task="own", scores={"RTE": results[1]})] * 2
    rows = finetune_glue.score_lines(args, {variant: runs})
    assert variant.paper and [row["paper"] for row in rows] == [None, None]


def write_own(**sizes):
    """A folder of texts, in which one word tells which of three labels is right."""
    rng = np.random.default_rng(0)
    for split, size in sizes.items():
        lines = ["text\tlabel\n"]
        for i in range(size):
            words = [f"w{i % 3}", *rng.choice(WORDLIST[3:], rng.integers(3, 12))]
            label = ("parcel late", "müde", "7")[i % 3]
            lines.append(f"{' '.join(rng.permutation(words))}\t{label}\n")
        put(f"own/{split}.tsv", "".join(lines))


def test_own_labels_are_learned_from_end_to_end(capsys):
    write_own(train=256, dev=64, test=15)
    finetune("--tasks own --data-dir own --save --predict")
    printed = capsys.readouterr().out
    assert "own/train.tsv: text in text; 3 classes: 7, müde, parcel late\n" in printed
    assert "quotation" not in printed and "the benchmark has" not in printed

    # the scores
    accuracy, macro_f1 = json.loads(Path("out/results.json").read_text())["rows"]
    assert min(accuracy["scores"] + macro_f1["scores"]) > 0.9
    for row, metric in ((accuracy, "accuracy"), (macro_f1, "macro_f1")):
        score = f"{row['mean']:.3f} ± {row['sd']:.3f}"
        line = f"| own | {metric} | pre+scan+post PSM, map | {score} | – | – |"
        assert line in printed and line in Path("out/results.md").read_text()

    # the predictions have the labels' names
    header, *lines = Path("out/predictions/own.tsv").read_text("utf-8").splitlines()
    expected = [f"{i}\t{('parcel late', 'müde', '7')[i % 3]}" for i in range(15)]
    right = sum(line == other for line, other in zip(lines, expected, strict=True))
    assert header == "index\tprediction" and right >= 14

    # so does what the saved model answers
    [folder] = re.findall('(?m)^try the last model: python mabert.py (.*) "text"$', printed)
    mabert.main([folder, "w7 w1 w9"])
    answer = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(answer) == ["7", "müde", "parcel late"] and max(answer, key=answer.get) == "müde"


def test_own_labels_that_are_numbers_are_not_cut_to_the_benchmarks(capsys):
    for split in ("train", "dev", "test"):
        lines = [f"w{i % 2} w{5 + i % 7}\t{-12 if i % 2 else 9}\n" for i in range(64)]
        put(f"own/{split}.tsv", "text\tlabel\n" + "".join(lines))
    finetune("--tasks own --regression --data-dir own --seeds 1 --batch-size 4 --save --predict")
    rows = json.loads(Path("out/results.json").read_text())["rows"]
    assert [row["metric"] for row in rows] == ["pearson", "spearman"]
    assert min(row["mean"] for row in rows) > 0.8

    _, *lines = Path("out/predictions/own.tsv").read_text().splitlines()
    values = [float(line.split("\t")[1]) for line in lines]
    assert min(values) < -5 and max(values) > 5.5
    assert not list(Path("out").glob("*/labels.json"))


def test_own_labels_with_quoted_texts_are_warned_about_once(capsys):
    for split in ("train", "dev"):
        put(f"own/{split}.tsv", OWN + '"w1 w2"\tlate\n"w3\tlost\n"\tlost\n')
    finetune("--tasks own --data-dir own --epochs 1")
    printed = capsys.readouterr().out
    assert printed.count(": 4 texts begin and end with a quotation mark") == 1


def test_own_labels_of_other_names_are_another_run(runs_of):
    write_own(train=12, dev=6)
    flags = "--tasks own --seeds 1 --data-dir"
    assert runs_of(f"{flags} own") == [0]

    # the same folder elsewhere; of another name; a class of another name
    shutil.copytree("own", "elsewhere/own")
    assert runs_of(f"{flags} elsewhere/own") == []
    shutil.copytree("own", "mine")
    assert runs_of(f"{flags} mine") == [0]
    for split in ("train", "dev"):
        put(f"own/{split}.tsv", Path(f"own/{split}.tsv").read_text("utf-8").replace("late", "lost"))
    assert runs_of(f"{flags} own") == [0]
    assert runs_of(f"{flags} own") == []


# ---- Benchmarks ----


def numbers_of_the_table(text, title):
    """{first cell of a line: the lists of numbers in its other cells} of the table with a title."""
    numbers = {}
    for line in text.split(title)[1].split("\n\n")[1].splitlines()[2:]:
        first, *cells = line.strip("| ").split(" | ")
        numbers[first] = [[float(x) for x in cell.split(" / ")] for cell in cells]
    return numbers


def is_png(file):
    return Path(file).read_bytes().startswith(b"\x89PNG")


def test_a_gpu_is_described_where_nothing_knows_its_driver(monkeypatch):
    """nvidia-smi is missing beside AMD's GPUs, and in some containers."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setenv("PATH", "")
    assert train_mlm.describe_machine("cuda").startswith("A GPU, CUDA ")


def test_calls_take_turns_and_say_why_they_fail():
    order, times = [], [1000.0, 1000.0, 1.0, 2.0, 9.0]  # the first two do not count

    def call(name):
        order.append(name)
        if name == "c" and order.count(name) == 2:
            raise RuntimeError("twice")
        return times[order.count(name) - 1]

    calls = {name: partial(call, name) for name in "abc"}
    medians = bench.interleaved_medians(calls, rounds=20, seconds=0)
    assert "".join(order) == "abcabc" + "ab" * 3
    assert medians == {"a": 2.0, "b": 2.0, "c": "twice"}


@pytest.mark.parametrize("error, reason", [
    (torch.OutOfMemoryError(), "out of memory"),
    (RuntimeError("can't allocate memory: x"), "out of memory"),
    (BrokenProcessPool("x"), "out of memory"),
    (ValueError(), "ValueError"),
    (RuntimeError("a\nb"), "a"),
], ids=repr)  # fmt: skip
def test_a_failure_becomes_the_text_of_a_cell(error, reason):
    assert bench.value_or_reason(raising(error)) == reason
    assert bench.cell_text(reason, 5.0) == f"– ({reason}; 5.00)"


def test_names_at_the_ends_of_lines_do_not_overlap():
    pytest.importorskip("matplotlib")
    figure, (axes,) = bench.new_figure(["a panel"], ["x"], "y")
    ends = {"MaBERT": 1.0, "BERT": 1.01, "ALBERT": 1.5, "far away": 9.0}
    bench.draw_lines(axes, {name: {1: 1.0, 2: y} for name, y in ends.items()}, strong="MaBERT")
    bench.save_figure(figure, "figure.png")

    # in the order of the lines' ends, a gap apart, far from each other only where the lines are
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert sorted(heights, key=heights.get) == list(ends)
    assert np.diff(sorted(heights.values())).min() > 0.067
    assert heights["far away"] - heights["ALBERT"] > 0.5

    # what is strong is so in its line and in its name
    strong = [line.get_label() for line in axes.get_lines() if line.get_linewidth() > 2]
    bold = [text.get_text() for text in axes.texts if text.get_weight() == "bold"]
    assert strong == bold == ["MaBERT"] and is_png("figure.png")

    # a line that would hide another is dashed
    dashed = [line.get_label() for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert dashed == ["BERT"]


def test_scan_measures_what_it_can_and_says_why_it_cannot(capsys, monkeypatch):
    here = lambda device, *call: bench.value_or_reason(*call)  # noqa: E731
    monkeypatch.setattr(bench, "measured_alone", here)
    monkeypatch.setitem(sys.modules, "mambapy.pscan", None)
    bench.main(["scan", "--sizes", "1,30,8,4", "1,2147483647,1536,16"])
    small, large = capsys.readouterr().out.split("| (b, l, d, n) = ")[1:]

    # error, times with their ratio to the first scan, memory
    assert small.startswith("(1, 30, 8, 4)") and large.startswith("(1, 2147483647, ")
    assert re.search(r"\| loop \| \de-07 (\| [\d.e+]+ \(1.00×\) ){2}\| \d+ \|", small)
    assert re.search(r"\| reference \| \de-07 (\| [\d.e+]+ \([\d.]+×\) ){2}\| \d+ \|", small)

    # what is missing, what is too large
    assert "| pscan | import of mambapy.pscan halted" in small
    assert re.search(r"\| loop \| \de-07 (\| out of memory ){3}\|", large)


def test_drift_vanishes_with_all_stages_alone():
    torch.manual_seed(0)
    rows = bench.read_sentences(argparse.Namespace(sentences=None), tiny())[:8]
    base = build(MaBERT, tiny(), torch.float32)
    drifts = bench.measure_drifts(base, rows, [0, 5])
    for measure, rounding in zip(bench.DRIFTS, (1e-12, 1e-24, 1e-24)):
        forms = list(drifts[measure].values())
        assert list(drifts[measure]) == [(c, s) for c in ("causal", "centred") for s in bench.SIDES]
        assert all(len(form) == 7 for form in forms)

        # nothing to see without pads, nor with all stages
        assert all(pads[0] == 0 for form in forms for pads in form.values())
        assert all(form["pre+scan+post"][5] < rounding for form in forms)

        # without any, only a causal layer that never looks at the pads on its right is safe
        assert [form["none"][5] > rounding for form in forms] == [False, True, True, True]

    # the two distances are of one size
    l2 = drifts["tokens_l2"]["centred", "left"]["none"][5]
    cosine = drifts["mean_cosine"]["centred", "left"]["none"][5]
    assert 0 < cosine < 2 * l2**2


def test_drift_writes_its_page_and_its_figure_where_it_is_told(monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "SENTENCES", 8)
    bench.main("drift --pads 0 5 --out new/drift".split())
    page = Path("new/drift.md").read_text()
    assert page.strip() in capsys.readouterr().out and is_png("new/drift.png")

    table = numbers_of_the_table(page, bench.DRIFTS["tokens_l2"])
    assert list(table) == list(bench.PSM_FORMS)
    assert all(0 < pads[1] < 1 and pads[0] == 0 for pads in table["none"][1:])


def test_drift_reads_sentences_with_a_tokenizer_or_without(capsys):
    put("dev.tsv", "gj04\t1\t\tw1 w2 w3\ngj04\t0\t*\tw1 w2\n\n")
    for checkpoint, lengths in ((None, [2, 3]), ("model", [4, 5])):  # [CLS] and [SEP] too
        args = argparse.Namespace(sentences="dev.tsv", checkpoint=checkpoint)
        assert list(map(len, bench.read_sentences(args, tiny()))) == lengths
    bench.main("drift --pads 3 --sentences dev.tsv --checkpoint model".split())
    assert "WH pretrained with PSM pre+scan+post" in (printed := capsys.readouterr().out)
    assert "2 sentences of dev.tsv" in printed


@pytest.mark.parametrize("tokenizer", ["--tokenizer words.json", "--vocab-size 100"])
def test_step_covers_all_of_a_training_step_and_writes_nothing_here(tokenizer, capsys):
    before = sorted(Path.cwd().rglob("*"))
    bench.main(["step", "--measure", "2", *arguments(tokenizer)])
    assert sorted(Path.cwd().rglob("*")) == before

    # a section for each row length
    printed = capsys.readouterr().out
    sections = printed.split("\nrows of ")[1:]
    assert [section.split()[0] for section in sections] == ["16", "32"]
    kinds = ("M layers", "W layers", "H layers", "T layers", "rest")
    kinds = {f"{way}, {kind}" for way in ("forward", "backward") for kind in kinds}
    for section in sections:
        assert re.match(r"\d+ tokens: [\d.]+ s a step, \d+ tokens/s, [\d.]+% padding, ", section)

        # whose parts add up
        parts = re.findall(r"^\| (\S.*?) \| [\d.]+ \| ([\d.]+)% \|$", section, re.MULTILINE)
        parts = {name: float(share) for name, share in parts}
        assert parts.keys() == kinds | {"waiting for data", "optimizer"}
        assert sum(parts.values()) == pytest.approx(100, abs=0.7)
        assert parts["forward, M layers"] > 1

    # steps of 16 tokens, then of 32, as the schedule has them
    first, second = (float(x) for x in re.findall(r"tokens: ([\d.]+) s a step", printed))
    hours = float(re.search(r"100,000 steps .* take ([\d.]+) hours", printed)[1])
    assert hours * 3600 == pytest.approx(1e5 * (0.75 * first + 0.25 * second), abs=300)


@pytest.mark.parametrize("gpu, said", [
    ("NVIDIA H100 80GB HBM3", " (20% of its peak)"),
    ("NVIDIA H100 PCIe", ""),  # slower
    ("NVIDIA H200", " (20% of its peak)"),
    ("NVIDIA A100-SXM4-80GB", " (63% of its peak)"),
    ("NVIDIA GeForce RTX 4090", " (120% of its peak)"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", ""),
])  # fmt: skip
def test_a_known_gpu_has_a_peak(gpu, said):
    assert bench.share_of_peak(198, gpu) == said


def test_the_marks_of_a_step_follow_its_micro_batches():
    class Model(torch.nn.Module):
        config = argparse.Namespace(pattern="T")
        encoder = argparse.Namespace(layers=[torch.nn.Linear(2, 2)])

        def forward(self, x):
            return self.encoder.layers[0](x * 1)

    model, watch = Model(), bench.Stopwatch()
    optimizer = torch.optim.SGD(model.encoder.layers[0].parameters())
    bench.hook_stopwatch(watch, model, optimizer, layers=True)
    watch.mark(bench.WAITING)
    for _ in range(2):
        model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    optimizer.step()

    forward = ["forward, rest", "forward, T layers", "forward, rest"]
    backward = ["backward, rest", "backward, T layers", "backward, rest"]
    names = [name for name, _ in watch.marks]
    assert names == ["waiting for data", *forward, *backward, *forward, *backward]


def test_the_baselines_have_the_parameters_of_the_papers_table():
    pytest.importorskip("transformers")
    sizes = {}
    for name in bench.MODELS:
        model = bench.make_classifier(name, 512, "meta")
        sizes[name] = sum(weight.numel() for weight in model.parameters())
    assert sizes.pop("MaBERT-211M") == pytest.approx(205.322e6, rel=0.03)  # the paper's
    assert sizes == {
        "BERT": 109_483_778,
        "ALBERT": 11_685_122,
        "Longformer": 148_660_994,
        "BigBird": 128_060_930,
        "DeBERTa-v3": 184_423_682,
        "ModernBERT": 149_606_402,
        "MaBERT": 120_163_586,
        "T12": 108_895_490,
        "M12": 125_797_634,
        "MW6": 125_797_634,
        "H12": 117_388_034,
    }


def test_operations_of_a_layer_and_of_a_step():
    """By hand: h 768, d 1536, r 48, n 16, k 4, feed-forward 3072."""
    mixer = 768 * 3072 + 1536 * (48 + 32) + 48 * 1536 + 1536 * 768 + 4 * 1536
    m = mixer + 2 * 768 * 3072
    head = 768 * (768 + 30522)
    for length in (1, 128, 512):
        t = 4 * 768**2 + 2 * 768 * 3072 + 2 * length * 768
        assert bench.layer_flops("M", length) == length * (2 * m + 7 * 1536 * 16)
        assert bench.layer_flops("T", length) == length * 2 * t
        step = bench.flops_per_token(MaBERTConfig(), length, 0.15)
        assert step == pytest.approx(3 * 2 * (8 * m + 4 * t + 0.15 * head))


def test_headline_ratios_of_the_papers_own_figures():
    mean, less = "mean of the paper's baselines", "the same without DeBERTa-v3"
    for measure, headlines in (
        ("training", {mean: 2.36, less: 1.73}),
        ("latency", {mean: 2.43, less: 1.55}),
    ):
        values = {name: bench.paper_value(name, measure, 4096) for name in bench.MODELS}
        ratios = bench.ratios_to("MaBERT", values)
        assert {title: ratios[title] for title in headlines} == pytest.approx(headlines, abs=0.005)
        assert mean not in bench.ratios_to("MaBERT", values | {"ALBERT": "out of memory"})
        assert bench.ratios_to("MaBERT", values | {"MaBERT": "out of memory"}) == {}
    assert bench.paper_value("BERT", "latency", 100) is None


@pytest.fixture
def small_peers(monkeypatch):
    """The models of bench.py efficiency in small."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(vocab_size=60, max_position_embeddings=32)
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1)
    changes = {
        "ALBERT": dict(embedding_size=8),
        "BigBird": dict(block_size=8),
        "Longformer": dict(max_position_embeddings=34, attention_window=8, pad_token_id=1),
        "DeBERTa-v3": bench.DEBERTA
        | dict(position_buckets=8, pooler_hidden_size=16, vocab_size=60),
    }
    peers = {}
    for name, (family, _) in bench.TRANSFORMERS.items():
        peers[name] = (family, sizes | changes.get(name, {}))
    patterns = dict(MaBERT="MMT", T12="TT", M12="MM", MW6="MW", H12="HH")
    maberts = {name: vars(tiny(pattern)) for name, pattern in patterns.items()}

    # memory is measured in this process, where it may be none
    def measured_here(device, function, *args):
        return bench.value_or_reason(lambda: 1.0 + function(*args))

    monkeypatch.setattr(bench, "measured_alone", measured_here)
    monkeypatch.setattr(bench, "free_memory", lambda: None)
    monkeypatch.setattr(bench, "TRANSFORMERS", peers)
    monkeypatch.setattr(bench, "MABERTS", maberts)
    monkeypatch.setattr(bench, "MODELS", [*peers, *maberts])
    protocol = bench.Protocol(lengths=[], batch_size=8, rounds=7, seconds=0.1)
    monkeypatch.setitem(bench.PROTOCOLS, "cpu", protocol)


def efficiency(flags, models):
    bench.main(["efficiency", *flags.split(), "--models", *models])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_efficiency_measures_all_models_beside_the_papers(device, small_peers, capsys, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    drawn, draw = [], bench.draw_efficiency
    monkeypatch.setattr(bench, "draw_efficiency", lambda *args: drawn.append(args) or draw(*args))
    efficiency(f"--device {device} --lengths 16 128 --seconds 0.1 --out efficiency", bench.MODELS)

    # the page and the figure, with a number in each cell
    text = capsys.readouterr().out
    assert Path("efficiency.md").read_text().strip() == text.strip() and is_png("efficiency.png")
    assert re.findall(r"Table (B\d):", text) == ["B5", "B6", "B7"] and "–" not in text
    file, _, measured = drawn[-1]
    expected = [list(bench.MEASURES), bench.MODELS, [16, 128]]
    assert file == "efficiency.png" and set(measured) == set(itertools.product(*expected))

    # values and ratios, the paper's in brackets
    bert, mabert = (measured["latency", name, 128].value for name in ("BERT", "MaBERT"))
    assert f"| {bench.cell_text(bert, '5.22')} |" in text
    assert "Ratios at 128 tokens" in text
    assert f"| {bench.cell_text(bert / mabert, 5.220 / 9.160)} |" in text
    assert "From 957 tokens on" in text

    if device == "cuda":
        efficiency("--lengths 128 --fastest", bench.MODELS)
        assert "–" not in capsys.readouterr().out


def test_efficiency_accumulates_what_does_not_fit_and_goes_on(small_peers, monkeypatch, capsys):
    forward, most = bench.Contender.forward, {"MMT": 4, "TT": 8, "MM": 0}  # rows

    def scarce(self, setting, rows, labels=None):
        if len(rows) > most[self.model.config.pattern]:
            raise torch.OutOfMemoryError
        return forward(self, setting, rows, labels)

    monkeypatch.setattr(bench.Contender, "forward", scarce)
    efficiency("--device cpu --lengths 8 2147483647", ["MaBERT", "T12", "M12"])
    text, none = capsys.readouterr().out, r"– \(out of memory\) \|\n"
    assert re.search(rf"\| MaBERT \| \S+ \| [\d.]+ \(2 × 4 rows\) \| {none}", text)
    assert len(re.findall(rf"\| T12 \| \S+ \| [\d.]+ \| {none}", text)) == 3
    assert len(re.findall(rf"\| M12 \| \S+ \| – \(out of memory\) \| {none}", text)) == 3

    # accumulation changes nothing but the time
    torch.manual_seed(0)
    contender, gradients = bench.Contender("MaBERT", 8, "cpu", batch_size=8), []
    step = lambda: gradients.append([p.grad for p in contender.model.parameters()])  # noqa: E731
    monkeypatch.setattr(contender.optimizer, "step", step)
    for most["MMT"] in (8, 2):
        contender.optimizer_step("plain")
    assert contender.rows_at_once["plain"] == 2
    torch.testing.assert_close(*gradients)


def test_efficiency_takes_the_fastest_setting(small_peers, monkeypatch, capsys):
    def compiled(model, **options):
        if options["mode"] == "default" and model.config.pattern == "TT":
            return raising(RuntimeError("no such graph\nand more"))
        return lambda input_ids, **inputs: model(input_ids[:, :1], labels=inputs.get("labels"))

    monkeypatch.setattr(torch, "compile", compiled)
    efficiency("--device cpu --lengths 256 --fastest", ["MaBERT", "T12"])
    out, told = capsys.readouterr()
    assert len(re.findall(r"\| MaBERT \| \S+ \| [\d.]+ \(compiled\) \|\n", out)) == 2
    assert len(re.findall(r"\| T12 \| \S+ \| [\d.]+ \(plain\) \|\n", out)) == 2
    assert "B5" not in out and "T12, compiled: no such graph\n" in told


def test_efficiency_compiles_every_model_and_never_falls_back(small_peers, monkeypatch):
    compile, graphs = torch.compile, []

    def compiled(model, **options):
        def keep_graph(graph, inputs):  # one for each call, or the second would find the first's
            graphs.append(graph)
            return graph

        return compile(model, backend=keep_graph, dynamic=False)

    patterns = ("M", "H", "T", "TT", "TTT")
    monkeypatch.setattr(bench, "MABERTS", {pattern: vars(tiny(pattern)) for pattern in patterns})
    monkeypatch.setattr(torch, "compile", compiled)
    args = argparse.Namespace(models=patterns, settings=["compiled", "CUDA graphs"], fastest=True)
    vars(args).update(device="cpu", batch_size=2, rounds=5, seconds=0)
    measured = bench.measure_length(8, args)
    assert set(measured) == set(itertools.product(("latency", "training"), patterns, [8]))
    assert all(isinstance(value, float) for value, _ in measured.values())
    assert len(graphs) == 5 * 2 * 2  # models of one class, settings, measures


# The scripts in results/


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    import context
    import patterns
    import recall
    import study

    return types.SimpleNamespace(context=context, patterns=patterns, recall=recall, study=study)


@pytest.fixture
def small_pretrainings(scripts, monkeypatch):
    """Those of results/patterns.py in small, in this process, one at a time."""
    mains = {"train_mlm.py": train_mlm.main, "bench.py": bench.main}

    def run_here(command, **options):
        _, script, *flags = command
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            mains[Path(script).name](flags)
        return subprocess.CompletedProcess(command, 0, printed.getvalue(), "")

    lines = (f"w{i} w{i + 1} w{i + 2} " * (1 + i % 15) for i in range(300))
    put("text.txt", "\n\n".join(lines))
    small = "--hidden-size 16 --num-heads 2 --intermediate-size 16 --d-state 2 --lr 3e-2".split()
    changes = dict(SMALL=small, VOCAB_SIZE="100", STEPS=40, TOKENS=512, CAUSAL_TOO=["MT"])
    for name, value in changes.items():
        monkeypatch.setattr(scripts.patterns, name, value)
    # of this script alone: matplotlib runs programs of its own
    run_alone = types.SimpleNamespace(run=run_here)
    monkeypatch.setattr(scripts.patterns, "subprocess", run_alone)
    for script in (scripts.patterns, scripts.context):
        monkeypatch.setattr(script, "ThreadPoolExecutor", lambda jobs: ThreadPoolExecutor(1))
    monkeypatch.setattr(train_mlm.signal, "signal", lambda *_: None)  # not of a thread's concern


def test_the_scripts_in_results_find_the_programs_beside_their_folder():
    command = [sys.executable, str(ROOT / "results" / "study.py"), "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert "python results/study.py psm --data texts/" in printed.stdout


def test_patterns_are_pretrained_alike_and_finished_runs_only_read(
    scripts, small_pretrainings, capsys, monkeypatch
):
    flags = "--data text.txt --patterns T MT --length 16 --steps 3 --seeds 1 --jobs 2 --out runs"
    scripts.patterns.main(flags.split())
    page = capsys.readouterr().out
    cells = r"^\| (\S.*?) \| \d\.\d+ \| \d\.\d+ \| \d+ \| \S+ \|$"
    assert re.findall(cells, page, re.MULTILINE) == ["T", "MT", "MT, causal"]
    assert "a step of 32 rows of 16 tokens; 3 steps" in page

    # one tokenizer for all; what varies, and the batch
    names = ("tokenizer", "T-seed0", "MT-causal-seed0")
    assert len({Path(f"runs/{name}/tokenizer.json").read_bytes() for name in names}) == 1
    for folder, causal in (("runs/MT-seed0", False), ("runs/MT-causal-seed0", True)):
        settings = scripts.patterns.read_settings(Path(folder))
        assert (settings.causal_conv, settings.batch_size) == (causal, 32)

    # again, without a step, and refused with other flags or another text
    monkeypatch.setattr(train_mlm, "train_step", None)
    scripts.patterns.main(flags.split())
    assert capsys.readouterr().out == page
    put("other.txt", Path("text.txt").read_text() + "\n\nw1 w2 w3")
    for change, differs in (("--steps 4", "steps was 3 and"), ("--data other.txt", "corpus was")):
        command = f"{flags} {change}".split()
        refused(scripts.patterns.main, command, said=f"belongs to another run: {differs}")


def test_patterns_say_what_their_runs_complain_of(scripts):
    for script in ("patterns", "recall"):
        said = "'mt'; it must be letters of M, W, H, T"
        refused(getattr(scripts, script).main, ["--patterns", "MT", "mt"], said=said)
    said = "^train_mlm.py --out runs/tokenizer: .*--data: "
    refused(scripts.patterns.main, "--data nowhere.txt --out runs".split(), said=said)
    said = "--length 60 does not divide 2048"
    refused(scripts.patterns.main, ["--length", "60"], said=said)


VARYING = {  # the arguments in which the runs of a study differ
    "psm": {"pattern", "psm"},
    "budgets": {"pattern", "steps"},
    "sizes": {"pattern", "hidden_size", "intermediate_size"},
}


@pytest.mark.parametrize("study", VARYING)
def test_the_runs_of_a_study_differ_in_what_it_says(study, scripts):
    variants = scripts.study.STUDIES[study]().variants
    small = scripts.patterns.SMALL
    runs = [vars(train_mlm.parse_args([*small, *flags])) for flags in variants.values()]
    differ = {name for name in runs[0] if len({repr(run[name]) for run in runs}) > 1}
    assert differ == VARYING[study]


def test_study_psm_measures_the_loss_with_other_pads(
    scripts, small_pretrainings, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    variants = {}
    for form in ("none", "pre+scan+post"):
        flags = f"--pattern WM --psm {form} --sample-by paragraph"
        variants["WM", form] = flags.split()
    study = scripts.study.Study(variants, varying="the form of PSM varies")
    monkeypatch.setitem(scripts.study.STUDIES, "psm", lambda: study)
    scripts.study.main("psm --data text.txt --seeds 2 --out runs".split())
    page = Path("runs/psm.md").read_text()
    assert page == capsys.readouterr().out and is_png("runs/psm.png")

    settings = scripts.patterns.read_settings(Path("runs/WM-none-seed0"))
    held_out = train_mlm.prepare(settings, None).held_out
    for form in ("none", "pre+scan+post"):
        folders = [Path(f"runs/WM-{form}-seed{seed}") for seed in (0, 1)]
        logged = [scripts.patterns.last_held_out_loss(folder) for folder in folders]
        losses = [scripts.study.losses_by_padding(folder, held_out) for folder in folders]

        # under the padding of training as it was logged
        assert losses[0][0] == pytest.approx(logged[0], abs=1e-4)

        # with all stages the same under every other, without any not
        same = losses[0] == pytest.approx([losses[0][0]] * 4)
        assert same == (form == "pre+scan+post")
        assert same or len(set(losses[0])) == 4

        # in both tables the mean over the seeds
        cells = map(scripts.patterns.mean_and_deviation, zip(*losses))
        assert f"| WM, {form} | {scripts.patterns.mean_and_deviation(logged)} |" in page
        assert f"| WM, {form} | {' | '.join(cells)} |" in page


def test_study_sizes_draws_the_loss_by_what_a_run_costs(scripts, small_pretrainings, monkeypatch):
    pytest.importorskip("matplotlib")
    variants = {}
    for hidden in (8, 16):
        flags = f"--pattern M --hidden-size {hidden} --steps {hidden}"
        variants["M", f"hidden {hidden}"] = flags.split()
    study = scripts.study.Study(variants, varying="the size varies", costs=("TFLOP", "steps"))
    monkeypatch.setitem(scripts.study.STUDIES, "sizes", lambda: study)
    drawn = []
    monkeypatch.setattr(bench, "draw_panels", lambda *args: drawn.append(args))
    scripts.study.main("sizes --data text.txt --out runs".split())

    # a point of each panel for each run
    ((_, panels, x_labels, _, strong),) = drawn
    folders = [Path(f"runs/M-hidden-{hidden}-seed0") for hidden in (8, 16)]
    losses = [scripts.patterns.last_held_out_loss(folder) for folder in folders]
    assert panels["by steps"] == {"M": dict(zip((8, 16), losses))}
    small, large = panels["by TFLOP"]["M"]
    assert 2 < large / small < 8  # twice the steps, of a larger model
    assert len(x_labels) == 2 and strong == "MMT"


@pytest.mark.parametrize("pairs", [1, 12, 16])
def test_rows_of_recall_ask_for_each_value_once(pairs, scripts):
    recall = scripts.recall
    ids, labels = recall.recall_rows(50, 64, pairs, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (50, 64)

    # at the end, keys with a [MASK] each; the labels there are the values
    items = ids[:, : -2 * pairs].unflatten(1, (-1, 2))
    questions, answers = ids[:, -2 * pairs :], labels[:, -2 * pairs :]
    assert questions[:, 1::2].eq(recall.MASK).all()
    assert answers[:, ::2].eq(train_mlm.IGNORED).all()

    # before them the same keys with these values, among fillers
    is_pair = (items[..., 0] < recall.VALUES.start) & (items[..., 1] < recall.FILLERS.start)
    for row in range(50):
        known = items[row][is_pair[row]].tolist()
        asked = zip(questions[row, ::2].tolist(), answers[row, 1::2].tolist())
        assert len(known) == pairs and dict(known) == dict(asked)


def test_deviations_are_those_of_a_sample(scripts):
    assert scripts.patterns.mean_and_deviation([1.0, 3.0]) == "2.000 ± 1.414"


def test_recall_measures_how_often_a_value_is_found(scripts):
    recall = scripts.recall
    encoder = types.SimpleNamespace(position_embeddings=None, resize_positions=lambda length: None)

    def look_up(ids, labels):
        """Finds the keys that are asked for among the pairs of their row, but no key above 9."""
        values = []
        for row, answers in zip(ids.tolist(), labels.tolist()):
            pairs = {key: x for key, x in zip(row[::2], row[1::2]) if x in recall.VALUES}
            keys = [row[i - 1] for i, x in enumerate(answers) if x != train_mlm.IGNORED]
            values += [pairs[key] if key < 10 else 0 for key in keys]
        return types.SimpleNamespace(logits=F.one_hot(torch.tensor(values), recall.FILLERS.stop))

    # of 32 keys the eight from 2 to 9 are found
    look_up.encoder = encoder
    found = recall.accuracies(look_up)
    assert list(found) == ["64", "128", "256"]
    for shares in found.values():
        assert list(shares.values()) == pytest.approx([0.25] * len(recall.PAIRS), abs=0.08)


def test_recall_reads_finished_runs_and_draws_their_means(scripts, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    changes = dict(PAIRS=(1, 3), MOST_PAIRS=3, LENGTHS=(16, 32))
    changes["ProcessPoolExecutor"] = lambda jobs, context: ThreadPoolExecutor(jobs)
    for name, value in changes.items():
        monkeypatch.setattr(scripts.recall, name, value)
    command = "--patterns T MT --steps 4 --seeds 2 --out runs".split()
    scripts.recall.main(command)
    page = capsys.readouterr().out
    assert Path("runs/recall.md").read_text() + "\n" == page and is_png("runs/recall.png")

    # a table for each length, with what the files of the runs say
    for length, pattern in itertools.product(("16", "32"), ("T", "MT")):
        files = [Path(f"runs/{pattern}-4-steps-seed{seed}.json") for seed in (0, 1)]
        runs = [json.loads(file.read_text())[length] for file in files]
        cells = [scripts.patterns.mean_and_deviation([run[n] for run in runs]) for n in ("1", "3")]
        section = page.split(f"\n{length} tokens:\n")[1]
        assert f"| {pattern} | {' | '.join(cells)} |" in section

    # again, without training
    monkeypatch.setattr(scripts.recall, "train_recall", None)
    scripts.recall.main(command)
    assert capsys.readouterr().out == page


@pytest.fixture
def context(scripts, monkeypatch):
    """results/context.py with short rows."""
    lengths = (32, 64, 128)
    windows = {length: 31 * length // 32 for length in lengths}
    changes = dict(SHORT=64, LONG=128, LENGTHS=lengths, WINDOWS=windows, CONTEXT=(0, 1, 31))
    for name, value in changes.items():
        monkeypatch.setattr(scripts.context, name, value)
    return scripts.context


def test_rows_of_all_lengths_have_the_same_tokens_masked(context):
    texts = ["".join(f"w{i % n} " for i in range(700)) for n in (7, 11)]
    tokenizer = train_mlm.train_tokenizer(iter(texts), 100)
    for name, text in zip("ab", texts):
        put(f"{name}.txt", text)
    book = context.mask_books(["a.txt", "b.txt"], tokenizer)
    assert 0.1 < (book.labels != train_mlm.IGNORED).mean() < 0.2

    # below the masks is the text, in blocks of a book each
    blocks = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        blocks += [ids[i : i + 124] for i in range(0, len(ids) - 123, 124)]
    unmasked = np.where(book.labels == train_mlm.IGNORED, book.ids, book.labels)
    assert unmasked.tolist() == blocks

    # rows of every length have the same tokens between [CLS] and [SEP]
    for block, (length, window) in itertools.product(range(len(blocks)), context.WINDOWS.items()):
        ids, labels = context.cut_block(book, block, window)
        assert ids.shape == labels.shape == (128 // length, window + 2)
        assert ids[:, 1:-1].flatten().tolist() == book.ids[block].tolist()
        assert labels[:, 1:-1].flatten().tolist() == book.labels[block].tolist()
        assert ids[:, 0].eq(book.vocabulary.cls).all() and ids[:, -1].eq(book.vocabulary.sep).all()
        assert labels[:, [0, -1]].eq(train_mlm.IGNORED).all()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("stretched", [0, 0.4, 0.8, 1.2, 1.6, 2]),
        ("repeated", [0, 1, 2, 0, 1, 2]),
        ("clamped", [0, 1, 2, 2, 2, 2]),
    ],
)
def test_positions_are_lengthened_from_those_that_were_trained(how, expected, context):
    encoder = MaBERT(tiny("T", max_position=3))
    trained = encoder.position_embeddings
    trained.weight.data = torch.arange(3.0)[:, None].repeat(1, 16)
    for length in (9, 6):
        context.lengthen_positions(encoder, trained, length, how)
    assert encoder.position_embeddings.weight[:, 0].tolist() == pytest.approx(expected)
    encoder(torch.ones(1, 6, dtype=torch.long))  # rows of six are allowed now

    # shorter rows are read as in training
    context.lengthen_positions(encoder, trained, 2, how)
    assert encoder.position_embeddings is trained


def test_context_is_counted_within_the_short_row(context):
    labels = np.zeros((2, 124), int)  # all are masked
    book = context.Book(labels, labels, None)
    places = torch.arange(124).repeat(2)

    # the loss is the context on the side on which a longer row has more of it
    is_right_half = places // 31 % 2 == 1
    short = torch.where(is_right_half, places % 31, 30 - places % 31)
    losses = {("stretched", 32): short, ("stretched", 64): short + 1}
    table = context.context_table({"T": [losses, losses]}, book)
    assert table.split("\n")[0] == "| tokens on that side | 0 to 0 | 1 to 30 |"
    for side in ("left", "right"):
        assert f"| T, {side} | 0.00 → 1.00 | 15.50 → 16.50 |" in table  # the mean of 1 to 30


def test_context_refuses_a_book_that_is_not_of_the_text(context, capsys):
    for file in ("texts/a.txt", "texts/b.txt", "c.txt"):
        put(file, "w1 w2")
    for file in ("c.txt", "texts"):
        with pytest.raises(SystemExit) as caught:
            context.main(["--data", "texts", "--held-out", file])
        assert caught.value.code == "--held-out: must be files of --data"


def test_context_reads_a_book_that_was_not_trained_on(
    context, small_pretrainings, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    trainings = {}
    for name in ("128", "128, 16,000 steps", "128 + 300 steps of 1,024"):
        flags = f"--length-schedule {64 if name == '128' else 128}:1 --batch-size 4 --steps 5"
        trainings[name] = context.TRAININGS[name]._replace(units=("MT",), flags=flags)
    patches = dict(TRAININGS=trainings, twelve_layers=lambda unit: unit, STEPS_SHOWN=(5,))
    patches |= dict(TWO=("MT",), EQUAL_TOKENS=("128",), COST_UNITS=("MT",), COST_LENGTHS=(64, 256))
    for name, value in patches.items():
        monkeypatch.setattr(context, name, value)
    monkeypatch.setattr(bench, "measured_alone", lambda device, function, *args: function(*args))
    put("texts/a.txt", Path("text.txt").read_bytes())
    put("texts/b.txt", "w1 w2 w3 w4 " * 200)
    put("runs/MT-128-seed0/step.md", "rows of 64 tokens: 30.000 s a step")  # as if measured before
    command = "--data texts --held-out texts/b.txt --seeds 2 --out runs".split()
    context.main(command)
    page = capsys.readouterr().out
    assert Path("runs/context.md").read_text() + "\n" == page
    assert is_png("runs/context.png") and is_png("runs/context_steps.png")

    # what the runs have read, and what those that go on began with
    settings = context.patterns.read_settings(Path("runs/MT-128-and-300-steps-of-1024-seed1"))
    assert settings.data == ["texts/a.txt"]
    assert (settings.init, settings.seed) == ("runs/MT-128-seed1", 1)
    assert len(list(Path("runs").glob("*-seed1"))) == 2  # the long training has one seed

    # the losses are those of the models
    tokenizer = train_mlm.load_tokenizer("runs/tokenizer/tokenizer.json")
    book = context.mask_books(["texts/b.txt"], tokenizer)
    losses = []
    for seed in (0, 1):
        model = MaBERTForMaskedLM.from_pretrained(f"runs/MT-128-seed{seed}")
        model.encoder.resize_positions(126)
        rows = [context.cut_block(book, block, 124) for block in range(len(book.ids))]
        ids, labels = map(torch.cat, zip(*rows))
        losses.append(model(ids, labels=labels).loss.item())
    line, change_line, *_ = (line for line in page.split("\n") if line.startswith("| MT, 128 |"))
    assert line.endswith(f"| {context.mean_and_deviation(losses)} |")

    # and so is the change in longer rows, with the error of blocks
    runs = [torch.load(f"runs/MT-128-seed{seed}/book_losses.pt") for seed in (0, 1)]
    change = sum(run["stretched", 128] - run["stretched", 64] for run in runs) / 2
    masked_in_block = (book.labels != train_mlm.IGNORED).sum(1).tolist()
    by_block = [part.mean().item() for part in change.split(masked_in_block)]
    error = np.std(by_block, ddof=1) / len(by_block) ** 0.5
    assert change_line.endswith(f"| {change.mean():+.3f} ± {error:.3f} |")

    # and between the seeds, where it differs most
    differences = []
    for name, length in itertools.product(("128", "128-and-300-steps-of-1024"), (32, 128)):
        changes = []
        for seed in (0, 1):
            run = torch.load(f"runs/MT-{name}-seed{seed}/book_losses.pt")
            changes.append((run["stretched", length] - run["stretched", 64]).double().mean().item())
        differences.append(abs(changes[0] - changes[1]))
    assert f"differ by {max(differences):.3f} at most" in page.replace("\n", " ")

    # the first models alone read with positions that are not stretched
    further = torch.load("runs/MT-128-and-300-steps-of-1024-seed0/book_losses.pt")
    assert {positions for positions, _ in runs[0]} == {"stretched", "repeated", "clamped"}
    assert {positions for positions, _ in further} == {"stretched"}

    # the costs are those that were kept, the minutes those of 5 steps
    costs = json.loads(Path("runs/cost.json").read_text())
    for name in context.PASSES:
        cells = [costs[f"MT, {name}, {length}"] for length in (64, 256)]
        cells = [f"{1000 * seconds:.0f} ms, {mebibytes:.0f} MiB" for seconds, mebibytes in cells]
        assert f"| {name} | 64 | 256 |\n| --- | --- | --- |\n| MT | {' | '.join(cells)} |" in page
    assert "| MT, minutes | 2.5 |" in page
    assert f"| MT, rows of 128 | {losses[0]:.3f} |" in page

    # again, without a step
    monkeypatch.setattr(train_mlm, "train_step", None)
    monkeypatch.setattr(bench, "measured_alone", None)
    monkeypatch.setattr(context, "token_losses", None)
    context.main(command)
    assert capsys.readouterr().out == page


# ---- What the scripts refuse, and with which words ----


WORDS_FILE = "train --tokenizer words.json"
SENTENCES = "--sentences text.txt"
OUT_OF_MEMORY = torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
# script and flags; the message; an error, or {file: contents, or None, or what makes them}
REFUSALS = [
    ("mabert model w1", r"^mabert.py: .*config.json is missing[^\n]*$",
     {"model/config.json": None}),
    ("mabert USER/NAME w1", "USER/NAME/config.json is missing: give a local folder"),
    ("mabert model w1", r"^mabert.py: .*tokenizer.json is missing or damaged: [^\n]*$",
     {MODEL: "{"}),
    ("mabert model w1", "^mabert.py: model/labels.json: it must be a list of 2 names",
     {"model/labels.json": '["late"]'}),
    ("mabert model w1", "^mabert.py: model/labels.json: Expecting",
     {"model/labels.json": '["late" "lost"]'}),
    (f"mabert model '{'w1 ' * 31}'",
     r"^mabert.py: a row has 33 real tokens; max_position is 32[^\n]*$"),
    ("mabert model w1", r"^mabert.py: backend='triton' cannot run here [^\n]*$",
     {"model/config.json": lambda x: x.replace(b'backend": null', b'backend": "triton"')}),
    ("train --seed 18446744073709551616", "--seed: 18446744073709551616 must be"),
    ("train --length-schedule 128:0.9 512:0.2", "sum to 1"),
    ("train --length-schedule 4:1", "4 must be finite and in"),
    ("train --length-schedule 128", "invalid length_share value: '128'"),
    ("train --mask-rate 1.5", "--mask-rate: 1.5 must be"),
    ("train --lr nan", "--lr: nan must be"),
    ("train --vocab-size 65536", r"65536 must be finite and in \[100, 65536"),
    ("train --batch-size 10 --micro-batch-size 4",
     "--batch-size 10 is no multiple of --micro-batch-size 4"),
    ("train --vocab-size 500 --tokenizer x", "not allowed with"),
    ("train --resume --overwrite", "not allowed with"),
    ("train --pattern MXT", "MaBERTConfig.pattern"),
    ("train --dropout inf", "MaBERTConfig.dropout"),
    ("train --psm pre,post", "'pre,post' is not none, or any of"),
    ("train --out corpus.txt",
     r"^\[Errno 17\] File exists: 'corpus.txt'\nFinished checkpoints .* are kept"),
    ("train --cache corpus.txt", "--cache: cannot make corpus.txt/.*: Not a directory"),
    ("train --data a", r"is or has no \.txt, .* file that is not empty", {"a/a.txt": ""}),
    ("train --data nowhere", "nowhere is or has no"),
    ("train --data a.md", r"a.md is or has no", {"a.md": "one"}),
    ("train --data .a", "is or has no", {".a/.b/c.txt": "one"}),
    ("train --data a --out a", "a is or has no", {"a/a.txt": "one"}),
    ("train --data a.txt", r"too short: 100 tokens give \d+ training rows",
     {"a.txt": "the cat sees a dog\n" * 20}),
    ("train --data a.txt", "the corpus is empty", {"a.txt": "\n \n"}),
    ("train --data a.json", "the corpus is empty", {"a.json": "[]"}),
    ("train --data a.txt", r"a.txt, line 2: not UTF-8 \(invalid start byte\)",
     {"a.txt": b"good\nthe \xff cat"}),
    ("train --data a.jsonl", "a.jsonl, line 2: not UTF-8",
     {"a.jsonl": b'{"text": "good"}\n{"text": "not \xc3("}\n'}),
    ("train --data a.jsonl", "a.jsonl, line 2 has no 'text'",
     {"a.jsonl": '{"text": ""}\n{"title": ""}\n'}),
    ("train --data a.jsonl", "a.jsonl, line 1 has no 'text'", {"a.jsonl": "5\n"}),
    ("train --data a.jsonl", "a.jsonl, line 1: 'text' is no string: 5",
     {"a.jsonl": '{"text": 5}\n'}),
    ("train --data a.jsonl", "a.jsonl, line 2: not JSON",
     {"a.jsonl": '{"text": "good"}\n{"text": "good"\n'}),
    ("train --data a.json", r"a.json, document 2: 'text' is no string: \[\]",
     {"a.json": '[{"text": ""}, {"text": []}]'}),
    ("train --data a.parquet", "cannot read a.parquet: Parquet magic bytes",
     {"a.parquet": b"PAR1 and so on"}),
    ("train --data a.parquet", "a.parquet has no column 'text' of strings, but {'text': 'list<",
     {"a.parquet": parquet(text=[["a string in a list"]])}),
    ("train --data a.parquet", "a.parquet has no column 'text' of strings, but {'title'",
     {"a.parquet": parquet(title=["a"])}),
    ("train --data a.parquet", "a.parquet: not UTF-8",
     {"a.parquet": parquet(text=["b\xc3d"]).replace("\xc3".encode(), b"\xff\xff")}),
    ("train --data a.txt", r"to the tokenizer 100% of the text is \[UNK\]",
     {"a.txt": "hund und katze\n" * 200}),
    ("train --data a.txt", r"to the tokenizer 60% of the text is \[UNK\]",
     {"a.txt": f"{'a ' * 80}{'x' * 120}\n" * 20}),
    (WORDS_FILE, "cannot load the tokenizer .*words.json", {"words.json": None}),
    (WORDS_FILE, "the tokenizer has 70001 tokens; 65535 is the most",
     {"words.json": lambda x: x.replace(b": 24", b": 70000")}),
    (WORDS_FILE, r"has no \[MASK\]", {"words.json": lambda x: x.replace(b"[MASK]", b"[MARK]")}),
    (WORDS_FILE, r"100% of the text .*no pre-tokenizer\?",
     {"words.json": lambda x: json.dumps(json.loads(x) | dict(pre_tokenizer=None))}),
    ("glue --tasks colla", "invalid choice: 'colla'.*cola"),
    ("glue --checkpoint nowhere", "nowhere.config.json"),
    ("glue --tasks own cola", "--tasks own stands alone and needs --data-dir"),
    ("glue --tasks own all", "--tasks own stands alone"),
    ("glue --regression", "--regression is for --tasks own"),
    ("glue --ablation --psm none", "--ablation chooses the PSM"),
    ("glue --ablation --pooling cls", "--pooling: not allowed with argument --ablation"),
    ("glue --max-length 64", "has 32 positions, not 64: pass --max-length 32"),
    ("glue --data-dir nowhere",
     r"is neither nowhere/CoLA/train.tsv, .*, nor nowhere/README.md, as"),
    ("glue --tasks cola rte", r"neither glue/RTE/train.tsv, "),  # before anything is trained
    ("glue --predict", r"neither glue/CoLA/test.tsv, ", {"glue/CoLA/test.tsv": None}),
    ("glue --tasks cola mrpc", r"MRPC/dev.tsv, line 1: no column", {"glue/MRPC/dev.tsv": "a\tb\n"}),
    ("glue --lr 1e30 --epochs 1",
     r"seed 0: its predictions are not finite; a lower --lr.*\ncola.* seed 1: its"),
    ("glue --lr 1e30 --epochs 2 --batch-size 8",
     r"seed 0: the loss is nan at step 50; a lower --lr.*\n.* seed 1: the loss"),
    ("glue", "cannot load the tokenizer .*tokenizer.json", {MODEL: "{"}),
    ("glue", "cannot load .*config.json", {"model/config.json": "{"}),
    ("glue", "has 5001 tokens, more than the model's",
     {MODEL: lambda x: x.replace(b'"w39": 44', b'"w39": 5000')}),
    ("glue", "has weights that are not finite: .* a lower --lr helps",
     {WEIGHTS: weights(lambda w: w * math.nan)}),
    ("bench drift --pads -1", r"-1 must be finite and in \[0,"),
    ("bench drift --checkpoint nowhere", "--checkpoint: "),
    ("bench drift --sentences nowhere", "--sentences: cannot read nowhere"),
    (f"bench drift {SENTENCES}", "text.txt has no text", {"text.txt": "\n"}),
    (f"bench drift --checkpoint model {SENTENCES}",
     "cannot load the tokenizer model/tokenizer.json",
     {"text.txt": "a few words", MODEL: None}),
    ("bench drift --out model/model.pt/drift", "--out: cannot write model/model.pt/drift.md: "),
    ("bench scan --sizes 1,2,3", "1,2,3 is not B,L,D,N"),
    ("bench scan --pads 3", "unrecognized arguments: --pads 3"),
    ("bench step --steps 0", "--steps: 0 must be"),
    (f"bench step {' '.join(arguments())}", "out of memory: lower --micro-batch", OUT_OF_MEMORY),
    ("bench efficiency --models GPT", "invalid choice: 'GPT'"),
    ("bench efficiency --device cuda", "sees no GPU"),
    ("bench efficiency --out results/ --device cpu", "it must be the beginning of file names"),
    ("bench efficiency --out /proc/efficiency --device cpu", "--out: cannot write /proc/effic"),
    ("bench efficiency --device cpu --out efficiency", "this needs the package matplotlib: pip"),
    ("bench efficiency --device cpu --models BERT", "this needs the package transformers: pip"),
    ("train --out stopped", r"out of memory: lower --micro-batch-size \(now 16", OUT_OF_MEMORY),
    ("glue", "out of memory: lower --batch-size or --max-length", OUT_OF_MEMORY),
    ("glue", "out of memory: lower --batch-size",
     RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    ("glue", "the same command goes on", KeyboardInterrupt()),
    ("glue", "cannot go on: .*No space left", OSError(28, "No space left")),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row[0])
def test_scripts_refuse_what_does_not_fit_and_leave_nothing(row, monkeypatch):
    command, said, changes = (*row, {})[:3]
    if said == "sees no GPU" and DEVICE == "cuda":
        pytest.skip("there is one")
    if isinstance(changes, BaseException):
        monkeypatch.setattr(MaBERT, "forward", raising(changes))
        changes = {}
    for file, contents in changes.items():
        put(file, contents(Path(file).read_bytes()) if callable(contents) else contents)
    if package := re.search("package (\\w+)", said):
        monkeypatch.setitem(sys.modules, package[1], None)
    script, _, flags = command.partition(" ")
    main = dict(mabert=mabert.main, bench=bench.main, train=pretrain, glue=finetune)[script]
    message = refused(main, flags if script in ("train", "glue") else shlex.split(flags), said=said)
    assert script in ("train", "glue") or "\n" not in message
    assert not list(Path("run").glob("[!.]*")) and not list(Path("out").glob("*.json"))


def test_an_unreachable_hub_is_explained(monkeypatch):
    import datasets
    import huggingface_hub

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "none")
    advice = "without the hub, pass --data PATH with --vocab-size N .* or --tokenizer FILE"
    refused(train_mlm.main, [], said=f"cannot load wikimedia/wikipedia: .*\n{advice}")
    refused(
        train_mlm.main,
        ["--data", "corpus.txt"],
        said=f"cannot load the tokenizer google-bert/.*\n{advice}",
    )


# ---- README's examples ----

PAGES = [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", page.read_text("utf-8"))


def shell_commands(page: Path):
    """The commands of a page's sh blocks, each as its words, without comments and redirections."""
    for line in "".join(code_blocks(page, "sh")).replace("\\\n", "").splitlines():
        words = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words[: words.index(">")] if ">" in words else words
                words = []


def save_a_demo():
    """A tiny model in out/demo, in the form that `train_mlm.py --demo` leaves."""
    text = "return the function of a list of strings that opens"
    tokenizer = train_mlm.train_tokenizer([text] * 3, 200)
    vocabulary = train_mlm.vocabulary_size(tokenizer)
    config = tiny("MT", hidden_size=128, vocab_size=vocabulary)
    build(MaBERTForMaskedLM, config, torch.float32).save_pretrained("out/demo")
    tokenizer.save("out/demo/tokenizer.json")


class Parsed(Exception):
    """Raised in the place of what a script of a folder does once its arguments are parsed."""


def parse(script: str, words: list[str], monkeypatch):
    """Lets a program of the project parse its arguments; SystemExit where it refuses them."""
    programs = {"train_mlm.py": train_mlm, "finetune_glue.py": finetune_glue, "bench.py": bench}
    if script in programs:
        programs[script].parse_args(words)
        return

    from importlib import import_module

    folder = Path(script).parent.name
    assert (ROOT / script).is_file() and folder in ("results", "extras"), f"no program: {script}"
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, argv):
        parse_args(parser, argv)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.syspath_prepend(ROOT / folder)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        import_module(Path(script).stem).main(words)


def test_the_readmes_python_examples_run(monkeypatch, capsys):
    monkeypatch.setattr(mabert, "LAYERS", dict(mabert.LAYERS))  # an example adds a letter
    save_a_demo()
    guesses, own_layer, own_head = code_blocks(ROOT / "README.md", "python")

    # five guesses for a mask, and two embeddings
    exec(guesses, {})
    printed = capsys.readouterr().out
    assert printed.startswith("['") and printed.endswith("'] (2, 128)\n")

    # a layer of one's own
    names = {}
    exec(own_layer, names)
    model = names["model"]
    kinds = [type(layer).__name__ for layer in model.encoder.layers]
    assert kinds == ["MambaLayer", "MambaLayer", "PostNormLayer"] * 2
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, model.config.vocab_size)

    # a head of one's own
    exec(own_head, names)
    assert names["model"](torch.tensor([[5, 6, 7]])).shape == (1, 3, 9)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_the_pages_are_run_or_parsed(page, monkeypatch, capsys):
    from torch.distributed.run import parse_args as torchrun_args

    for words in shell_commands(page):
        if words[:2] == ["python", "mabert.py"]:
            save_a_demo()
            save_model("out/authors/own-*-seed0", Classifier)  # a shell would expand the star
            shutil.copytree("out/demo", "out/theirs", dirs_exist_ok=True)  # what a user downloads
            mabert.main(words[2:])
            is_masked = "[MASK]" in words[3]
            assert ("[MASK]: " if is_masked else "class 1: ") in capsys.readouterr().out
        elif words[:2] == ["python", "-c"]:
            exec(words[2], {})
            assert capsys.readouterr().out == "120163586\n"
        elif words[0] == "python":
            parse(words[1], words[2:], monkeypatch)
        elif words[0] == "torchrun":
            args = torchrun_args(words[1:])
            parse(args.training_script, args.training_script_args, monkeypatch)
        elif words[:3] == ["pip", "install", "-e"]:
            for extra in re.findall(r"\[(\w+)\]", words[3]):
                assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text("utf-8")
        elif words[:2] == ["hf", "upload"]:
            assert words[4:] == ["--exclude", NOT_SHARED]
        else:
            known = words[0] == "pytest" or words[:2] == ["hf", "download"]
            assert known, f"not recognised: {shlex.join(words)}"

    # no command hides where the lines above do not look
    elsewhere = re.sub(r"(?ms)^```sh\n.*?^```", "", page.read_text("utf-8"))
    assert not re.findall(r"(?m)^ *(?:python|torchrun) .*", elsewhere)


def test_the_tests_that_the_readme_picks_are_those_of_the_first_section():
    [command] = [words for words in shell_commands(ROOT / "README.md") if words[0] == "pytest"]
    _, flag, selected = command
    assert flag == "-k"
    for section in Path(__file__).read_text("utf-8").split("\n# ---- "):
        names = re.findall(r"(?m)^def (test_\w+)", section)
        is_padding = section.startswith("Padding changes nothing")
        assert all((selected in name) == is_padding for name in names), section[:40]
        assert names or not is_padding


def test_the_flags_that_the_readme_names_exist(monkeypatch, capsys):
    text = (ROOT / "README.md").read_text("utf-8")
    for script, *words in (["train_mlm.py"], ["finetune_glue.py"], ["bench.py", "efficiency"]):
        with pytest.raises(SystemExit):
            parse(script, [*words, "--help"], monkeypatch)
    options = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= options


def test_the_links_of_the_pages_lead_somewhere_and_the_index_is_complete():
    for page in PAGES:
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text("utf-8")):
            target = page.parent / path
            assert target.exists(), f"{page.name}: {path}"
            if anchor:
                headings = re.findall(r"(?m)^#+ (.*)", target.read_text("utf-8"))
                assert anchor in [heading.lower().replace(" ", "-") for heading in headings]

    index = (ROOT / "results" / "README.md").read_text("utf-8")
    kinds = (".md", ".png", ".csv", ".py")
    names = [file.name for file in (ROOT / "results").iterdir() if file.suffix in kinds]
    assert not [name for name in names if name not in index]
