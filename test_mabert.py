"""Tests of MaBERT, padding invariance first. `pytest` runs all of them on a CPU; those marked gpu need CUDA."""

import argparse
import contextlib
import csv
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench
import finetune_glue
import mabert
import train_mlm
from mabert import (
    MaBERT,
    MaBERTConfig,
    MaBERTForMaskedLM,
    MaBERTForSequenceClassification,
    MambaMixer,
    Pooling,
    selective_scan,
)

PATTERNS = (  # the paper's Table 1
    *("MMMMMMMMMMMM", "TTTTTTTTTTTT", "MTTMTTMTTMTT", "TMTMTMTMTMTM"),
    *("MTMTMTMTMTMT", "TMMTMMTMMTMM", "MMTMMTMMTMMT", "TTMTTMTTMTTM"),
)
ROOT = Path(__file__).parent
torch.set_num_threads(1)  # the models are tiny: more threads would wait for each other


def tiny(pattern="MMT", **changes) -> MaBERTConfig:
    sizes = dict(vocab_size=60, hidden_size=16, num_heads=2, intermediate_size=32, d_state=4, max_position=32)
    return MaBERTConfig(pattern=pattern, dropout=0.0, **sizes | changes)


def build(model_class, config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return model_class(config).to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ----------------------------------------------------------------------------------------------------------------------
# Padding changes nothing
# ----------------------------------------------------------------------------------------------------------------------

PADDINGS = {"left": [(1, 0), (9, 0)], "right": [(0, 1), (0, 9)], "both": [(3, 5)]}  # (pads before, pads after)


def pad(x, before, after, value=0):
    return F.pad(x, (before, after), value=value)


def drift(config, before, after, dtype=torch.float64) -> float:
    """The largest relative change that padding makes to anything the models compute about real tokens."""
    torch.manual_seed(1)
    b, l = 3, 11
    ids, labels, classes = torch.randint(1, 60, (b, l)), torch.randint(0, 60, (b, l)), torch.tensor([0, 1, 1])
    labels[torch.rand(b, l) < 0.5] = -100
    padded, mask = pad(ids, before, after, value=7), pad(torch.ones(b, l), before, after)
    real = slice(before, before + l)

    mlm = build(MaBERTForMaskedLM, config, dtype)
    changes = [relative(mlm.encoder(padded, mask)[:, real], mlm.encoder(ids))]
    changes += [relative(mlm(padded, mask).logits[:, real], mlm(ids).logits)]
    runs = [(mlm, mlm(padded, mask, labels=pad(labels, before, after, -100)), mlm(ids, labels=labels))]
    for pooling in ("map", "mean", "cls"):
        model = build(MaBERTForSequenceClassification, MaBERTConfig(**vars(config) | dict(pooling=pooling)), dtype)
        runs.append((model, model(padded, mask, labels=classes), model(ids, labels=classes)))
    for model, with_pads, without in runs:
        changes += [relative(with_pads.logits, without.logits), relative(with_pads.loss, without.loss)]
        parameters = list(model.parameters())
        gradients = [torch.autograd.grad(run.loss, parameters) for run in (with_pads, without)]
        changes.append(relative(*(torch.cat([g.flatten() for g in gradient]) for gradient in gradients)))
    return max(changes)


@pytest.mark.parametrize("side", PADDINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_changes_nothing(pattern, side):
    for before, after in PADDINGS[side]:
        assert drift(tiny(pattern), before, after) < 1e-12
        assert drift(tiny(pattern), before, after, torch.float32) < 1e-5


@pytest.mark.parametrize("side", PADDINGS)
def test_padding_changes_nothing_with_a_centred_convolution(side):
    for before, after in PADDINGS[side]:
        assert drift(tiny("MMT", causal_conv=False), before, after) < 1e-12


def test_a_row_does_not_depend_on_its_batch():
    model = build(MaBERTForMaskedLM, tiny("MMTMMT"))
    rows = [torch.randint(1, 60, (1, length)) for length in (3, 14, 1, 8)]
    ids = torch.cat([pad(row, 0, 14 - row.shape[1]) for row in rows])
    mask = torch.cat([pad(torch.ones_like(row), 0, 14 - row.shape[1]) for row in rows])
    batch = model(ids, mask).logits
    for row, logits in zip(rows, batch):
        assert relative(logits[: row.shape[1]], model(row).logits[0]) < 1e-12


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if "M" in pattern])
def test_padding_leaks_where_masking_is_incomplete(pattern):
    """The checks above can fail: each of these is known to leak."""
    assert drift(tiny(pattern, psm=()), 9, 0) > 1e-6
    assert drift(tiny(pattern, psm=(), causal_conv=False), 0, 9) > 1e-6
    assert drift(tiny(pattern, psm=("pre", "post")), 9, 0) > 1e-9  # the paper's two stages: the convolution's bias


@pytest.mark.parametrize("psm", [(), ("pre",), ("post",), ("pre", "post"), ("scan",)])
def test_where_padding_cannot_leak_masking_changes_nothing(psm):
    """Right padding with a causal convolution: no pad comes before a real token. Attention masks its pads anyway."""
    assert drift(tiny("MMT", psm=psm), 0, 9) < 1e-12
    assert drift(tiny("TT", psm=psm), 9, 0) < 1e-12


@pytest.mark.parametrize("causal_conv", [True, False])
@pytest.mark.parametrize("psm", [("pre", "scan"), ("pre", "scan", "post")])
def test_pre_and_scan_make_masking_exact(psm, causal_conv):
    assert drift(tiny("MMT", psm=psm, causal_conv=causal_conv), 9, 4) < 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_padding_changes_nothing_on_a_gpu():
    with torch.device("cuda"):
        assert drift(tiny("MMTMMT"), 9, 4, torch.float32) < 1e-5


@pytest.mark.parametrize("pooling", mabert.POOLINGS)
def test_rows_of_padding_stay_finite(pooling):
    ids, mask = torch.randint(1, 60, (3, 7)), torch.tensor([[1] * 7, [0] * 7, [0] * 3 + [1] * 4])
    for psm in ((), mabert.PSM_STAGES):
        model = build(MaBERTForSequenceClassification, tiny("MMT", psm=psm, pooling=pooling), torch.float32)
        hidden = model.encoder(ids, mask)
        assert hidden.isfinite().all()
        assert model.pooling(hidden, mask)[1].eq(0).all()
        model(ids, mask, labels=torch.tensor([0, 1, 0])).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ----------------------------------------------------------------------------------------------------------------------
# The masked selective scan
# ----------------------------------------------------------------------------------------------------------------------


def naive_scan(u, delta, A, B, C, D, z, delta_bias, mask, reverse):
    """The formula, a step at a time, with softplus."""
    delta = F.softplus(delta + delta_bias) * mask[..., None]
    h, y = u.new_zeros(u.shape[0], *A.shape), [None] * u.shape[1]
    for t in sorted(range(u.shape[1]), reverse=reverse):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        y[t] = (h * C[:, t, None]).sum(-1) + D * u[:, t]
    return torch.stack(y, 1) * F.silu(z) * mask[..., None]


def scan_inputs(b=2, l=9, d=5, n=3, seed=0):
    torch.manual_seed(seed)
    shapes = ((b, l, d), (b, l, d), (d, n), (b, l, n), (b, l, n), (d,), (b, l, d), (d,))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[2] = -tensors[2].abs()
    return [tensor.requires_grad_() for tensor in tensors]


def scan(*inputs, **options):
    return selective_scan(*inputs[:7], delta_bias=inputs[7], delta_softplus=True, **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("l", [1, 2, 15, 16, 17, 32, 40])  # about the edges of chunks of 16 steps
def test_scan_equals_the_formula(l, reverse):
    inputs = scan_inputs(l=l)
    masks = [torch.ones(2, l), torch.rand(2, l) > 0.4, torch.zeros(2, l, dtype=torch.int64)]
    masks += [(torch.arange(l) >= l // 3).expand(2, l), (torch.arange(l) <= l // 2).expand(2, l)]
    for mask in masks:
        y, expected = scan(*inputs, mask=mask, reverse=reverse), naive_scan(*inputs, mask, reverse)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        dy = torch.randn_like(y)
        for gradient, other in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)):
            torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_gradcheck(reverse):
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda *x: scan(*x, mask=mask, reverse=reverse), scan_inputs(l=5, d=2, n=2))


def test_scan_without_its_options():
    u, delta, A, B, C, D, z, _ = scan_inputs()
    ones, zeros = torch.ones(2, 9), torch.zeros_like(D)
    positive = F.softplus(delta)
    plain = selective_scan(u, positive, A, B, C)
    z_one = torch.full_like(z, 1.2784645427610738)  # SiLU(z) = 1
    torch.testing.assert_close(plain, naive_scan(u, delta, A, B, C, zeros, z_one, zeros, ones, False))
    torch.testing.assert_close(selective_scan(u, positive, A, B, C, D), plain + D * u)
    torch.testing.assert_close(selective_scan(u, positive, A, B, C, z=z), plain * F.silu(z))
    flipped = selective_scan(u.flip(1), positive.flip(1), A, B.flip(1), C.flip(1)).flip(1)
    torch.testing.assert_close(selective_scan(u, positive, A, B, C, reverse=True), flipped)


def test_scan_takes_strided_inputs_and_gives_zero_at_pads():
    inputs, mask = scan_inputs(l=10), torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0, 0]] * 2)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    y, other = scan(*strided, mask=mask), scan(*inputs, mask=mask)
    assert torch.equal(y, other)
    assert y[mask == 0].eq(0).all()
    gradients = torch.autograd.grad(y.square().sum(), strided)
    for i in (0, 1, 3, 4, 6):  # u, delta, B, C, z
        assert gradients[i][mask == 0].eq(0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_scan_in_lower_precision(dtype, tolerance):
    inputs = [x.detach().to(dtype) for x in scan_inputs(l=50)]
    y, exact = scan(*inputs), scan(*(x.double() for x in inputs))
    assert y.dtype == dtype
    assert relative(y.double(), exact) < tolerance  # the state is float32: only rounding of y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scan(*inputs), y)


def test_scan_keeps_only_inputs_and_chunk_states_for_backward():
    b, l, d, n = 2, 100, 16, 16
    inputs, sizes = scan_inputs(b, l, d, n), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        scan(*inputs).sum().backward()
    chunks = -(-l // mabert.LOOP_CHUNK)
    assert max(sizes) == b * chunks * d * n < b * l * d * n / 10


def test_scan_op_is_registered_soundly():
    u, delta, A, B, C, *_ = scan_inputs(l=7)
    torch.library.opcheck(mabert._scan_loop, (delta, u, A, B, C))


def test_scan_refuses_what_it_cannot_take():
    inputs = scan_inputs()
    with pytest.raises(ValueError, match=r"B has shape \(2, 8, 3\)"):
        scan(*(x[:, :-1] if i == 3 else x for i, x in enumerate(inputs)))
    with pytest.raises(ValueError, match="delta_bias"):
        selective_scan(*inputs[:5], delta_bias=inputs[5][:-1])
    with pytest.raises(ValueError, match="mask has shape"):
        scan(*inputs, mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="other than 0"):
        scan(*inputs, mask=torch.full((2, 9), 0.5))
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        scan(*inputs, backend="cuda")
    with pytest.raises(RuntimeError, match="cannot run here"):
        scan(*inputs, backend="triton")
    with pytest.raises(ValueError, match="length of at least 1"):
        scan(*scan_inputs(l=0))
    with pytest.raises(ValueError, match=r"u has shape \(9, 5\)"):
        scan(*(x[0] if x.dim() == 3 else x for x in inputs))


# ----------------------------------------------------------------------------------------------------------------------
# The Triton kernels: interpreted on a CPU in a process of their own, compiled where there is a GPU
# ----------------------------------------------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
interpreted = pytest.mark.skipif(
    not mabert.triton or (DEVICE == "cpu" and not mabert.INTERPRETED),
    reason="test_the_kernels_in_the_interpreter runs it",
)


@pytest.mark.skipif(DEVICE == "cuda" or not mabert.triton, reason="there is a GPU for the kernels, or no triton")
@pytest.mark.skipif(mabert.INTERPRETED, reason="this is that process")
def test_the_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "kernels_in"]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    counts = re.search(r"(\d+) passed, 1 skipped", result.stdout)  # itself
    assert result.returncode == 0 and counts and int(counts[1]) > 40, result.stdout + result.stderr


def masks(l):
    """None, all real, pads left, right, on both sides, anywhere, everywhere."""
    t, generator = torch.arange(l), torch.Generator().manual_seed(0)
    some = torch.rand(l, generator=generator) > 0.4
    return torch.stack([t >= 0, t >= l // 3, t <= l // 2, (t >= l // 4) & (t < l - l // 4), some, t < 0])


def compare_with_the_loop(inputs, dtype=torch.float32, tolerance=1e-5, **options):
    """Values and gradients of the kernels on inputs in dtype, and of the loop on the same in float64."""
    inputs = [x if x is None else x.detach().to(DEVICE, dtype) for x in inputs]
    options = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    results = []
    for backend, type_ in (("triton", dtype), ("loop", torch.float64)):
        leaves = [x if x is None else x.to(type_).requires_grad_() for x in inputs]
        y = scan(*leaves, backend=backend, **options)
        torch.manual_seed(1)
        dy = torch.randn(y.shape, dtype=torch.float64, device=DEVICE).to(dtype).to(type_)
        results.append([y, *torch.autograd.grad(y, [x for x in leaves if x is not None], dy)])
    for ours, exact in zip(*results):
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("l", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33])  # tiles of 4 and 8 steps, chunks of 16
def test_kernels_in_float32_equal_the_loop(l, reverse):
    compare_with_the_loop(scan_inputs(1, l, 5, 2), reverse=reverse)
    if l in (9, 17):
        compare_with_the_loop(scan_inputs(6, l, 3, 1), mask=masks(l), reverse=reverse)


@interpreted
@pytest.mark.parametrize("b, l, d, n", [(1, 18, 64, 16), (2, 5, 33, 3), (1, 9, 3, 64), (1, 2, 1, 100)])
def test_kernels_in_all_sizes_equal_the_loop(b, l, d, n):
    compare_with_the_loop(scan_inputs(b, l, d, n))


@interpreted
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 7e-4)]
)  # the interpreter cuts bf16
def test_kernels_in_lower_precision_are_exact_to_rounding(dtype, tolerance):
    compare_with_the_loop(scan_inputs(1, 20, 5, 2), dtype, tolerance, mask=masks(20)[3:4])
    compare_with_the_loop(scan_inputs(1, 5, 2, 32), dtype, tolerance)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "l, chunks", [(16, 1), (17, 1), (50, 1), (70, 2), (150, 1)]
)  # 150: more segments than _carry's tile
def test_kernels_in_parallel_over_time_equal_the_loop(l, chunks, reverse, monkeypatch):
    monkeypatch.setattr(mabert, "_segment", lambda b, l, blocks, chunk, device: chunks * chunk)
    compare_with_the_loop(scan_inputs(1, l, 33 if l == 50 else 3, 2), reverse=reverse)
    if l == 50:
        compare_with_the_loop(scan_inputs(2, l, 3, 1), mask=masks(l)[3:5], reverse=reverse)


@interpreted
def test_kernels_in_calls_without_the_options():
    *inputs, D, z, bias = scan_inputs(1, 9, 3, 2)
    for options in ((None, None, None), (D, None, None), (None, z, None), (None, None, bias)):
        compare_with_the_loop([*inputs, *options])
    u, delta, A, B, C = (x.detach().float().to(DEVICE) for x in inputs)
    y, exact = (selective_scan(u, delta.abs(), A, B, C, backend=backend) for backend in ("triton", "loop"))
    assert relative(y, exact) < 1e-6


@interpreted
def test_kernels_in_softplus_are_accurate_at_both_ends():
    one = torch.ones(1, 1, 1, device=DEVICE)
    for rho in (-80.0, -30.0, -12.0, -3.0, 0.0, 3.0, 30.0, 1e4):  # y = Δ, as h starts from zero
        y = selective_scan(one, rho * one, -one[0], one, one, delta_softplus=True, backend="triton")
        exact = F.softplus(torch.tensor(rho, dtype=torch.float64)).item()
        assert y.item() == pytest.approx(exact, rel=1e-5, abs=0)


@interpreted
def test_kernels_in_strided_memory():
    inputs, mask = [x.detach().float().to(DEVICE) for x in scan_inputs(l=10)], masks(10)[3:5].to(DEVICE)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    slices = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in inputs]
    expanded = torch.ones((), device=DEVICE).expand(2, 10, 5)
    results = []
    for tensors in (inputs, strided, slices):
        leaves = [x.detach().requires_grad_() for x in tensors]
        y = scan(*leaves, mask=mask, backend="triton")
        assert y[~mask].eq(0).all()
        gradients = torch.autograd.grad(y, leaves, expanded)
        assert all(gradients[i][~mask].eq(0).all() for i in (0, 1, 3, 4, 6))  # u, delta, B, C, z
        results.append([y, *gradients])
    for other in results[1:]:
        assert all(torch.equal(x, x2) for x, x2 in zip(results[0], other))


@interpreted
def test_kernels_in_memory_beyond_32_bits():
    inputs = [x.detach().bfloat16().to(DEVICE) for x in scan_inputs(1, 3, 4, 2)]
    far = torch.empty(2**31 + 4, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB, of which a few pages are touched
    for i in (0, 1, 6):  # u, delta, z, a row every 2 GiB
        view = far.as_strided((1, 3, 4), (1, 2**30, 1))
        near, inputs[i] = inputs[i], view.copy_(inputs[i])
        for reverse in (False, True):
            leaves = [x.requires_grad_() for x in inputs]
            y = scan(*leaves, reverse=reverse, backend="triton")
            got = [y, *torch.autograd.grad(y.float().sum(), leaves)]
            inputs = [x.detach() for x in inputs]
            others = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
            y = scan(*others, reverse=reverse, backend="triton")
            assert all(map(torch.equal, got, [y, *torch.autograd.grad(y.float().sum(), others)]))
        inputs[i] = near


@interpreted
def test_kernels_in_repeated_calls_give_the_same_bits():
    size = (4, 300, 1536, 16) if DEVICE == "cuda" else (2, 18, 33, 2)
    inputs = [x.detach().float().to(DEVICE).requires_grad_() for x in scan_inputs(*size)]
    runs = []
    for _ in range(2):
        y = scan(*inputs, backend="triton")
        runs.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(map(torch.equal, *runs))


@interpreted
def test_kernels_in_the_backward_pass_need_only_inputs_and_chunk_states():
    b, l, d, n = 1, 50, 4, 16
    inputs, kept = [x.detach().to(DEVICE, torch.bfloat16).requires_grad_() for x in scan_inputs(b, l, d, n)], {}

    def keep(x):
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        scan(*inputs, backend="triton")
    states = sum(size for address, size in kept.items() if address not in {x.data_ptr() for x in inputs})
    assert states == b * 3 * n * d * 4 <= sum(x.numel() * x.element_size() for x in inputs)
    for d_state in (1, 16, 64, 128):  # and for any size
        for length in (1, 128, 512, 4096):
            chunk = mabert._chunk(32, length, 1536, d_state)
            assert (length - 1) // chunk * d_state * 4 <= 2 * 2 * length  # bytes a channel: states, and u and delta


@interpreted
def test_kernels_in_custom_ops_are_registered_soundly():
    inputs = [x.detach().float().to(DEVICE).requires_grad_() for x in scan_inputs(1, 20, 3, 2)]
    strided = [x.detach().bfloat16().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    mask, without_z = masks(20)[3:4].to(DEVICE), [*inputs[:6], None, inputs[7]]
    for tensors, mask_, flag in ((inputs, mask, True), (without_z, None, False), (strided, mask, False)):
        torch.library.opcheck(mabert._scan_triton, (*tensors, mask_, flag, flag, 16, True, torch.float32))


@interpreted
def test_kernels_in_checkpoints_and_with_an_empty_batch():
    inputs = [x.detach().float().to(DEVICE).requires_grad_() for x in scan_inputs(1, 20, 3, 2)]
    checkpointed = torch.utils.checkpoint.checkpoint(scan, *inputs, backend="triton", use_reentrant=False)
    gradients = (torch.autograd.grad(y.sum(), inputs) for y in (checkpointed, scan(*inputs, backend="triton")))
    assert all(map(torch.equal, *gradients))
    empty = [x[:0] if x.dim() == 3 else x for x in inputs]
    y = scan(*empty, backend="triton")
    assert y.shape == (0, 20, 3)
    shapes = [gradient.shape for gradient in torch.autograd.grad(y.sum(), empty)]
    assert shapes == [x.shape for x in empty]


@interpreted
def test_kernels_in_a_model_are_safe_from_padding():
    with torch.device(DEVICE):
        assert drift(tiny("MT", d_state=2, scan_backend="triton"), 9, 4, torch.float32) < 1e-5


@interpreted
@pytest.mark.parametrize("model_class", [MaBERT, MaBERTForSequenceClassification])
def test_kernels_in_a_compiled_model(model_class):
    with torch.device(DEVICE):
        model = build(model_class, tiny("MT", scan_backend="triton"), torch.float32)
        ids, mask = torch.randint(1, 60, (2, 7)), masks(7)[2:4].to(DEVICE)
    outputs = []
    for call in (torch.compile(model, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager"), model):
        y = call(ids, mask)
        y = y if model_class is MaBERT else y.logits
        direction = torch.linspace(-1, 2, y.numel(), device=DEVICE).view_as(y)
        outputs.append([y, *torch.autograd.grad((y * direction).sum(), [*model.parameters()], allow_unused=True)])
    for compiled, eager in zip(*outputs):
        assert compiled is eager is None or relative(compiled, eager) < 1e-5


@pytest.mark.parametrize("b, l", [(1, 1), (1, 512), (1, 4096), (1, 16384), (3, 1000), (11, 4096), (32, 128)])
def test_segments_fill_a_gpu_and_are_whole_chunks(b, l, monkeypatch):
    processors, blocks, chunk = 132, 48, mabert._chunk(b, l, 1536, 16)
    properties = types.SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    segment = mabert._segment(b, l, blocks, chunk, torch.device("cuda"))
    assert segment == l or segment % chunk == 0
    warps = b * blocks * -(-l // segment)
    assert segment in (l, chunk) or processors * 6 <= warps <= processors * 12
    assert segment == l or b * blocks < 4 * processors


@pytest.mark.parametrize("without_triton", [False, True])
def test_backends_that_cannot_run_are_refused(without_triton):
    code = (
        f"import sys; sys.modules.update({{'triton': None}} if {without_triton} else {{}})\n"
        "import torch; from mabert import selective_scan\n"
        "x, A = torch.ones(1, 3, 2), -torch.ones(2, 2)\n"
        "print(selective_scan(x, x, A, x, x).shape); selective_scan(x, x, A, x, x, backend='triton')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "torch.Size([1, 3, 2])\n"
    reason = "the package triton is not installed" if without_triton or not mabert.triton else "it needs a GPU"
    assert f"RuntimeError: backend='triton' cannot run here: {reason}" in result.stderr


@interpreted
def test_kernels_in_no_place_where_they_cannot_run():
    with pytest.raises(RuntimeError, match="u is float64"):
        scan(*[x.to(DEVICE) for x in scan_inputs()], backend="triton")


@pytest.mark.skipif(mabert.INTERPRETED or not mabert.triton, reason="needs Triton's compiler")
def test_machine_code_of_the_kernels(tmp_path):
    command = [sys.executable, str(ROOT / "bench.py"), "scan", "--static"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path).stdout
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| _")]
    most = {"_pack": 0, "_ends": 6.5, "_ends (adjoint)": 7.5, "_carry": 12, "_outputs": 9.0, "_gradients": 36.0}
    assert len(rows) == 4 * len(most)
    for kernel, _, _, registers, stack, instructions, exponentials, shuffles in rows:
        assert float(instructions.split()[-1]) <= most[kernel]  # of _gradients the sum
        assert int(stack) == 0 and int(registers) <= 170
        assert float(exponentials) <= (2.6 if kernel == "_gradients" else 1.3)
        assert kernel == "_gradients" or float(shuffles) == 0


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("b, l", [(1, 3000), (4, 700)])
def test_kernels_on_a_gpu_at_the_size_of_the_base_model(b, l):
    inputs, mask = scan_inputs(b, l, 1536, 16), torch.rand(b, l) > 0.2
    inputs[2] = -torch.arange(1.0, 17).expand(1536, 16)  # the model's A: states that remember 1000 steps add up errors
    compare_with_the_loop(inputs, mask=mask)
    compare_with_the_loop(inputs, torch.bfloat16, 8e-3, mask=mask, reverse=True)


@pytest.mark.gpu
@gpu
def test_kernels_on_a_gpu_beyond_32_bits(monkeypatch):
    monkeypatch.setattr(mabert, "_segment", lambda b, l, *_: l)  # the same order of steps for one row as for many
    b, l, d = 180, 8192, 1536  # 2.3 · 10⁹ elements, 4.5 GB a tensor
    u = torch.randn(b, l, d, device="cuda", dtype=torch.bfloat16)
    B, A = torch.randn(b, l, 1, device="cuda", dtype=torch.bfloat16), -torch.ones(d, 1, device="cuda")
    results = []
    for rows in (slice(None), slice(b - 1, b)):
        part = u[rows].detach().requires_grad_()
        y = selective_scan(part, part, A, B[rows], B[rows], delta_softplus=True, backend="triton")
        results.append((y[-1:].detach(), torch.autograd.grad(y.sum(), part)[0][-1:]))
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("model_class", [MaBERT, MaBERTForSequenceClassification])
def test_kernels_on_a_gpu_under_autocast_and_in_a_cuda_graph(model_class):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = model_class(tiny("MMT"))
        ids = torch.randint(1, 60, (2, 24))
        mask = torch.arange(24) < torch.tensor([[24], [10]])
    parameters = list(model.parameters())
    assert model.config.scan_backend is None  # the kernels are what runs on a GPU

    def run(autocast=True):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
            y = model(ids, mask)
        y = (y if model_class is MaBERT else y.logits).float()
        direction = torch.linspace(-1, 2, y.numel(), device="cuda").view_as(y)
        return y, *torch.autograd.grad((y * direction).sum(), parameters, allow_unused=True)

    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(x is x2 is None or relative(x, x2) < 1e-3 for x, x2 in zip(captured, expected))
    assert relative(expected[0], run(autocast=False)[0]) < 0.05


# ----------------------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("vocab_size", 0),
        ("hidden_size", 100),
        ("hidden_size", 16.0),
        ("pattern", "MXT"),
        ("pattern", ""),
        ("num_heads", True),
        ("d_state", -1),
        ("dt_rank", 0),
        ("causal_conv", 1),
        ("dropout", 1.0),
        ("layer_norm_eps", 0.0),
        ("pad_token_id", 40000),
        ("pad_token_id", 0.5),
        ("psm", ("pre", "mid")),
        ("psm", [["pre"]]),
        ("psm", "pre"),
        ("pooling", "max"),
        ("num_labels", 0),
        ("scan_backend", "cuda"),
    ],
)
def test_config_refuses_by_name(field, value):
    with pytest.raises(ValueError, match=rf"MaBERTConfig\.{field} is .*it must be"):
        MaBERTConfig(**{field: value})


def test_parameter_count_of_the_default_classifier():
    with torch.device("meta"):
        model = MaBERTForSequenceClassification(MaBERTConfig())
    assert sum(p.numel() for p in model.parameters()) == 120_163_586  # README says so


def test_initialisation():
    model = build(MaBERTForMaskedLM, tiny("MMT", hidden_size=64, d_state=16), torch.float32)
    mixers = [module for module in model.modules() if isinstance(module, MambaMixer)]
    for mixer in mixers:
        torch.testing.assert_close(mixer.A_log, torch.arange(1.0, 17).log().expand(128, 16))
        assert mixer.D.eq(1).all()
        delta = F.softplus(mixer.dt_proj.bias)
        assert 0.99e-3 < delta.min() < 2e-3 and 0.07 < delta.max() < 0.101
        bound = mixer.dt_proj.in_features**-0.5
        assert 0.9 * bound < mixer.dt_proj.weight.abs().max() <= bound
        for p in mixer.conv1d.parameters():  # PyTorch's: uniform ±1/√k
            assert 0.26 < p.std() < 0.32 and 0.45 < p.abs().max() <= 0.5
        assert 0.018 < mixer.in_proj.weight.std() < 0.022
    assert len(mixers) == 2 and not torch.equal(mixers[0].dt_proj.bias, mixers[1].dt_proj.bias)
    assert 0.018 < model.encoder.layers[2].attention.qkv.weight.std() < 0.022
    assert model.encoder.layers[2].attention.qkv.bias.eq(0).all()
    assert model.encoder.word_embeddings.weight[0].eq(0).all()


def test_masks_and_ids_are_checked():
    model, ids = build(MaBERT, tiny()), torch.randint(1, 60, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    outputs = [model(ids, mask.to(dtype)) for dtype in (torch.bool, torch.int64, torch.float32)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert relative(model(ids), model(ids, torch.ones(2, 6))) < 1e-14
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 6\)"):
        model(ids, mask[:, :5])
    with pytest.raises(ValueError, match="other than 0"):
        model(ids, mask * 2)
    with pytest.raises(ValueError, match=r"input_ids reach from 6\d to .*\[0, 60\)"):
        model(ids + 60, mask)
    with pytest.raises(ValueError, match=r"token_type_ids reach from 2 to 2"):
        model(ids, mask, torch.full_like(ids, 2))
    with pytest.raises(ValueError, match="nothing in it"):
        model(ids[:, :0])
    for bad in (ids[0], ids.float()):
        with pytest.raises(ValueError, match="must be integer"):
            model(bad)
    with pytest.raises(ValueError, match="token_type_ids"):
        model(ids, mask, mask[:1])


def test_token_types_matter():
    model, ids = build(MaBERT, tiny()), torch.randint(1, 60, (2, 6))
    assert torch.equal(model(ids), model(ids, token_type_ids=torch.zeros_like(ids)))
    assert relative(model(ids, token_type_ids=torch.ones_like(ids)), model(ids)) > 1e-3


def test_max_position_counts_real_tokens():
    model, ids = build(MaBERT, tiny(max_position=8)), torch.randint(1, 60, (2, 12))
    mask = torch.ones(2, 12)
    mask[:, :4] = 0
    assert relative(model(ids, mask)[:, 4:], model(ids[:, 4:])) < 1e-12
    mask[0, 0] = 1
    for given in (mask, None):
        with pytest.raises(ValueError, match="max_position is 8"):
            model(ids, given)


def test_resize_positions_interpolates():
    config = tiny(max_position=5)
    model = build(MaBERTForMaskedLM, config)
    old = model.encoder.position_embeddings.weight.detach().clone()
    model.encoder.resize_positions(9)
    new = model.encoder.position_embeddings.weight
    torch.testing.assert_close(new[::2], old)
    torch.testing.assert_close(new[1::2], (old[1:] + old[:-1]) / 2)
    assert model.config.max_position == 9 and config.max_position == 5 and new.requires_grad
    model(torch.randint(1, 60, (1, 9)))
    with pytest.raises(ValueError, match="max_position is 0"):
        model.encoder.resize_positions(0)


def test_map_weights():
    pooling = build(Pooling, tiny(pooling="map"))
    x, mask = (
        torch.randn(3, 6, 16, dtype=torch.float64),
        torch.tensor([[1] * 6, [0, 1, 1, 0, 0, 0], [0] * 5 + [1]]).bool(),
    )
    weights = pooling.weights(x, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    assert weights[~mask].eq(0).all() and weights[mask].gt(0).all()
    assert relative(pooling(x, mask)[1], pooling(x[1:2, 1:3])[0]) < 1e-14


def test_other_poolings():
    x, mask = torch.randn(2, 4, 16, dtype=torch.float64), torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    pooled = {kind: build(Pooling, tiny(pooling=kind))(x, mask) for kind in ("attn", "cls", "mean")}
    assert torch.equal(pooled["cls"], torch.stack([x[0, 1], x[1, 0]]))
    torch.testing.assert_close(pooled["mean"], torch.stack([x[0, 1:3].mean(0), x[1].mean(0)]))
    attn = build(Pooling, tiny(pooling="attn"))
    assert torch.equal(pooled["attn"], attn(x))  # no mask, by definition


def test_masked_lm_predicts_at_labelled_positions():
    model, ids = build(MaBERTForMaskedLM, tiny()), torch.randint(1, 60, (2, 6))
    labels = torch.full((2, 6), -100)
    labels[0, 4], labels[1, 1], labels[1, 5] = 7, 8, 9
    full, output = model(ids), model(ids, labels=labels)
    assert full.loss is None and full.logits.shape == (2, 6, 60)
    torch.testing.assert_close(output.logits, torch.stack([full.logits[0, 4], full.logits[1, 1], full.logits[1, 5]]))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([7, 8, 9])))
    torch.testing.assert_close(model(ids, labels=labels, reduction="sum").loss, 3 * output.loss)
    nothing = model(ids, labels=torch.full((2, 6), -100))
    assert nothing.loss.item() == 0 and nothing.logits.shape == (0, 60)
    nothing.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="reduction"):
        model(ids, labels=labels, reduction="none")
    with pytest.raises(ValueError, match="labels"):
        model(ids, labels=labels[:, 1:])


def test_the_decoder_is_tied():
    model = build(MaBERTForMaskedLM, tiny())
    names = [name for name, p in model.named_parameters() if 60 in p.shape]
    assert names == ["decoder_bias", "encoder.word_embeddings.weight"]


def test_classification_and_regression():
    ids = torch.randint(1, 60, (3, 5))
    model = build(MaBERTForSequenceClassification, tiny(num_labels=4))
    output = model(ids, labels=torch.tensor([0, 3, 1]))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([0, 3, 1])))
    model = build(MaBERTForSequenceClassification, tiny(num_labels=1))
    targets = torch.tensor([0.5, 3, 1])
    output = model(ids, labels=targets)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - targets).square().mean())
    with pytest.raises(ValueError, match="labels has shape"):
        model(ids, labels=targets[:2])


def test_dropout_only_in_training():
    model, ids = build(MaBERT, MaBERTConfig(**vars(tiny("MT")) | dict(dropout=0.5))), torch.randint(1, 60, (2, 6))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_bf16_autocast_stays_close():
    model, ids = build(MaBERTForMaskedLM, tiny("MMT"), torch.float32), torch.randint(1, 60, (2, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    assert relative(output.logits.float(), model(ids, labels=ids).logits) < 2e-2
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_one_graph_serves_all_lengths():
    graphs = []
    model = build(MaBERT, tiny("MT"))
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: (graphs.append(1), graph.forward)[1])
    for length in (10, 16, 17, 25, 30, 32):
        ids, mask = torch.randint(1, 60, (2, length)), torch.ones(2, length)
        assert relative(compiled(ids, mask), model(ids, mask)) < 1e-12
    assert len(graphs) <= 2  # the first length, then any


needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")


@needs_compiler
def test_torch_compile_of_the_encoder():
    model, ids, mask = build(MaBERT, tiny("MT"), torch.float32), torch.randint(1, 60, (2, 10)), torch.ones(2, 10)
    mask[0, :3] = 0
    outputs = [torch.compile(model, fullgraph=True)(ids, mask), model(ids, mask)]
    assert relative(*outputs) < 1e-5
    direction = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((x * direction).sum(), model.parameters()) for x in outputs]
    assert relative(*(torch.cat([g.flatten() for g in gradient]) for gradient in gradients)) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading
# ----------------------------------------------------------------------------------------------------------------------


def test_save_and_load_give_identical_outputs(tmp_path):
    ids = torch.randint(1, 60, (2, 7))
    for model_class in (MaBERT, MaBERTForMaskedLM, MaBERTForSequenceClassification):
        config = tiny("MTM", psm=("scan",), causal_conv=False, pooling="attn", num_labels=3)
        model = build(model_class, config, torch.float32).eval()
        model.save_pretrained(tmp_path)
        loaded = model_class.from_pretrained(tmp_path)
        assert loaded.config == model.config and not loaded.training
        for a, b in zip(
            [model(ids)] if model_class is MaBERT else model(ids),
            [loaded(ids)] if model_class is MaBERT else loaded(ids),
        ):
            assert a is b is None or torch.equal(a, b)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.pt"]


def test_the_encoder_travels_between_heads(tmp_path, caplog):
    mlm = build(MaBERTForMaskedLM, tiny(), torch.float32)
    mlm.save_pretrained(tmp_path / "mlm")
    classifier = MaBERTForSequenceClassification.from_pretrained(
        tmp_path / "mlm", num_labels=5, pooling="mean", psm=("pre", "post"), dropout=0.3
    )
    assert "new and untrained: classifier.bias, classifier.weight" in caplog.text
    assert "not used: decoder_bias, transform.0.bias" in caplog.text
    assert classifier.config.num_labels == 5 and classifier.config.psm == ("pre", "post")
    assert classifier.encoder.layers[0].dropout.p == 0.3
    classifier.save_pretrained(tmp_path / "classifier")
    MaBERT.from_pretrained(tmp_path / "classifier").save_pretrained(tmp_path / "bare")
    for model in (
        *(classifier.encoder, MaBERT.from_pretrained(tmp_path / "mlm")),
        MaBERTForMaskedLM.from_pretrained(tmp_path / "classifier").encoder,
        MaBERTForMaskedLM.from_pretrained(tmp_path / "bare").encoder,
    ):
        for (name, p), q in zip(model.named_parameters(), mlm.encoder.parameters()):
            assert torch.equal(p, q), name
    caplog.clear()
    other = MaBERTForSequenceClassification.from_pretrained(tmp_path / "classifier", num_labels=2)
    assert other.classifier.out_features == 2 and "new and untrained: classifier" in caplog.text
    caplog.clear()
    MaBERTForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert not caplog.text


def test_loading_refuses_what_does_not_fit(tmp_path):
    build(MaBERTForMaskedLM, tiny(), torch.float32).save_pretrained(tmp_path)
    load = MaBERTForMaskedLM.from_pretrained
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load(tmp_path / "elsewhere")
    for override, said in (
        (dict(hidden_size=32), r"\(16,\) in the file"),
        (dict(pattern="MM"), "nothing in the config"),
    ):
        with pytest.raises(ValueError, match=f"does not fit.*{said}"):
            load(tmp_path, **override)
    with pytest.raises(ValueError, match="nothing in the file"):
        load(tmp_path, pattern="MMTM")
    with pytest.raises(ValueError, match="'colour'"):
        load(tmp_path, colour="red")
    with pytest.raises(ValueError, match=r"MaBERTConfig.pooling"):
        load(tmp_path, pooling="max")
    weights, config = tmp_path / "model.pt", tmp_path / "config.json"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.pt is damaged"):
            load(tmp_path)
    for foreign in ([1, 2], {"model": {}, "step": 5}):
        torch.save(foreign, weights)
        with pytest.raises(ValueError, match=r"model.pt is damaged"):
            load(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.pt is missing"):
        load(tmp_path)
    for text in ("{", "[]"):
        config.write_text(text)
        weights.write_bytes(whole)
        with pytest.raises(ValueError, match=r"config.json is damaged"):
            load(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = build(MaBERT, tiny(), torch.float32)
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.pt").read_bytes()

    def full_disk(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == whole and len(list(tmp_path.iterdir())) == 2


def test_loading_executes_nothing(tmp_path):
    build(MaBERT, tiny(), torch.float32).save_pretrained(tmp_path)

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"x": Trap()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="damaged"):
        MaBERT.from_pretrained(tmp_path)
    assert not (tmp_path / "sprung").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining
# ----------------------------------------------------------------------------------------------------------------------

WORDS = "the a cat dog bird sees likes hears red green small big house tree and or not quickly slowly today".split()
SMALL_RUN = """--vocab-size 100 --pattern MT --hidden-size 32 --num-heads 2 --intermediate-size 64 --d-state 4
    --dropout 0 --steps 150 --length-schedule 16:0.75 32:0.25 --batch-size 32 --micro-batch-size 16 --lr 5e-3
    --eval-every 75 --log-every 25 --save-every 50""".split()


def write_corpus(folder: Path, sentences=1500, seed=0) -> Path:
    """Lines in which every word but the first is the one after it in WORDS, so that context tells a masked one."""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(sentences):
        start, length = random.integers(len(WORDS)), random.integers(4, 40)
        lines.append(" ".join(WORDS[(start + i) % len(WORDS)] for i in range(length)))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "corpus.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module", autouse=True)
def private_datasets_cache(tmp_path_factory):
    """Keeps the tests' texts out of the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def arguments(tmp_path, *more) -> list[str]:
    data = tmp_path / "corpus.txt" if (tmp_path / "corpus.txt").exists() else write_corpus(tmp_path)
    paths = [
        "--data",
        str(data),
        "--sample-by",
        "line",
        "--out",
        str(tmp_path / "run"),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    return [*paths, *SMALL_RUN, *more]


def prepared(tmp_path, *more):
    """What main prepares from a corpus: the arguments, the tokens, the vocabulary, training and held-out segments."""
    args = train_mlm.parse_args(arguments(tmp_path, *more))
    corpus = train_mlm.local_corpus(args.data, args.sample_by)
    tokenizer = train_mlm.trained_tokenizer(corpus, args.vocab_size, args.cache_dir)
    tokens = train_mlm.tokenize(corpus, tokenizer, args.cache_dir)
    return args, tokens, train_mlm.vocabulary_of(tokenizer), *train_mlm.split_held_out(tokens)


def test_a_short_run_learns_and_can_be_used(tmp_path, capsys):
    train_mlm.main(arguments(tmp_path))
    printed = capsys.readouterr().out
    run = tmp_path / "run"
    with open(run / "log.csv") as file:
        log = list(csv.DictReader(file))
    assert [int(row["step"]) for row in log] == [0, 25, 50, 75, 100, 125, 150]
    held_out = [float(row["held_out_loss"]) for row in log if row["held_out_loss"]]
    unigram = float(printed.split("word frequencies give ")[1].split(",")[0])
    assert abs(unigram - math.log(len(WORDS))) < 0.1
    assert held_out[-1] < unigram - 1  # context tells; frequencies do not
    assert json.loads((run / "args.json").read_text())["seed"] == 0
    for folder in (run, run / "step-0000050", run / "step-0000150"):
        assert {file.name for file in folder.iterdir()} >= {"config.json", "model.pt", "tokenizer.json"}
        tokenizer = train_mlm.load_tokenizer(str(folder / "tokenizer.json"))
        model = MaBERTForMaskedLM.from_pretrained(folder)
    assert abs(held_out[0] - math.log(model.config.vocab_size)) < 0.5
    assert model.config.max_position == 32 and model.config.vocab_size == tokenizer.get_vocab_size()
    assert "warm-up shortened from 10000 to 15 steps" in printed


def test_runs_repeat_and_micro_batches_change_nothing(tmp_path):
    weights = []
    for micro in (8, 8, 16):
        train_mlm.main(
            arguments(tmp_path, "--overwrite", "--steps", "6", "--dropout", "0", "--micro-batch-size", str(micro))
        )
        state = MaBERTForMaskedLM.from_pretrained(tmp_path / "run").state_dict()
        weights.append(torch.cat([weight.flatten() for weight in state.values()]))
    assert torch.equal(weights[0], weights[1])
    assert relative(weights[0], weights[2]) < 1e-4


@needs_compiler
def test_compiled_training_gives_the_same_weights(tmp_path):
    weights = []
    for flags in (["--compile"], []):
        train_mlm.main(arguments(tmp_path, "--overwrite", "--steps", "3", "--length-schedule", "16:1", *flags))
        state = MaBERTForMaskedLM.from_pretrained(tmp_path / "run").state_dict()
        weights.append(torch.cat([weight.flatten() for weight in state.values()]))
    assert relative(*weights) < 1e-4


def some_batch():
    ids = torch.randint(5, 60, (32, 12), generator=torch.Generator().manual_seed(0))
    labelled = ids % 3 == 0
    parts = ids, torch.ones_like(ids, dtype=torch.bool), ids.where(labelled, train_mlm.IGNORED)
    return train_mlm.Batch([parts], int(labelled.sum()), ids.numel(), ids.numel())


def test_dropout_is_a_function_of_seed_and_step(tmp_path):
    args = train_mlm.parse_args(arguments(tmp_path))
    batch = some_batch()

    def weights(step, noise):
        model = build(MaBERTForMaskedLM, MaBERTConfig(**vars(tiny("MT")) | dict(dropout=0.5)), torch.float32)
        torch.manual_seed(noise)
        train_mlm.train_step(model, train_mlm.make_optimizer(model, 0.01), batch, step, args)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(5, noise=1), weights(5, noise=2))
    assert not torch.equal(weights(5, noise=1), weights(6, noise=1))


def test_batches_are_functions_of_seed_and_step(tmp_path):
    args, tokens, vocabulary, train, _ = prepared(tmp_path, "--micro-batch-size", "32")
    phases = [(0, train_mlm.Rows(tokens, train, 16, vocabulary)), (30, train_mlm.Rows(tokens, train, 32, vocabulary))]
    batches = train_mlm.Batches(phases, args)
    some = {step: batches.whole(step) for step in (29, 30, 5, 6)}
    for step, batch in some.items():
        for part, again in zip(batch, batches.whole(step)):
            assert np.array_equal(part, again)
    assert some[29][0].shape[1] <= 16 < some[30][0].shape[1] <= 32
    assert not np.array_equal(some[5][0], some[6][0])
    for workers in (0, 2):  # in the same order, whoever prepares them
        ahead = train_mlm.load(batches, range(27, 33), workers, pin=False)
        for step, batch in zip(range(27, 33), ahead):
            inputs, real, labels = batches.whole(step)
            assert batch.labelled == (labels != train_mlm.IGNORED).sum() and batch.real == real.sum() < batch.padded
            (own,) = batch.micro_batches
            assert np.array_equal(own[0][:, : inputs.shape[1]], inputs) and not own[1][:, inputs.shape[1] :].any()
    args.seed = 1
    assert not np.array_equal(batches.whole(5)[0], some[5][0])


@pytest.mark.parametrize("n", [1, 2, 5, 64, 65, 3000])
def test_shuffling_is_a_permutation(n):
    order = train_mlm.shuffled(np.arange(n), n, 0, 1)
    assert np.array_equal(np.sort(order), np.arange(n))
    if n == 3000:
        other = train_mlm.shuffled(np.arange(n), n, 0, 2)
        for x, y in ((np.arange(n), order), (order[1:], order[:-1]), (order, other)):
            assert abs(np.corrcoef(x, y)[0, 1]) < 0.08  # four standard deviations
        assert abs((np.diff(order) > 0).mean() - 0.5) < 0.04


def test_shuffling_takes_no_more_memory_for_more_rows():
    few = train_mlm.shuffled(np.arange(1000), 2**44 + 1, 3)
    assert len(np.unique(few)) == 1000 and few.min() >= 0 and few.max() <= 2**44
    assert abs(few.mean() / 2**43 - 1) < 0.08


def test_buckets_have_the_same_rows_and_less_padding(tmp_path):
    args, tokens, vocabulary, train, _ = prepared(tmp_path, "--batch-size", "8", "--micro-batch-size", "4")
    rows = train_mlm.Rows(tokens, train, 128, vocabulary)
    steps, waste = range(100, 100 + 2 * train_mlm.POOL), {}
    seen = {}
    for args.bucket in (False, True):
        numbers = [train_mlm.Batches([], args).numbers(step, 100, rows) for step in steps]
        seen[args.bucket] = np.sort(np.concatenate(numbers))
        waste[args.bucket] = sum((~rows.batch(batch)[1]).sum() for batch in numbers)
        assert len({len(batch) for batch in numbers}) == 1
    assert np.array_equal(seen[False], seen[True])
    assert waste[True] < waste[False] / 2


def test_an_epoch_has_every_training_token_once_and_no_held_out_one(tmp_path):
    args, tokens, vocabulary, train, held = prepared(tmp_path, "--mask-rate", "1e-9")  # leaves the rows as they are
    rows = train_mlm.Rows(tokens, train, 16, vocabulary)
    args.batch_size = 7
    steps = len(rows) // 7
    seen = [train_mlm.Batches([(0, rows)], args).whole(step)[:2] for step in range(steps)]
    rest = train_mlm.Batches([], args).numbers(steps, 0, rows)[: len(rows) - 7 * steps]
    assert len(rest)  # so that the loop above has not seen all
    seen.append(rows.batch(rest))
    for ids, real in seen:
        ends = real.sum(axis=1) - 1
        assert (ids[:, 0] == vocabulary.cls).all() and (ids[np.arange(len(ids)), ends] == vocabulary.sep).all()
        assert (ids[~real] == vocabulary.pad).all()
    words = np.concatenate([ids[real & ~vocabulary.is_special[ids]] for ids, real in seen])
    expected = np.concatenate([tokens.ids[start:end] for start, end in train])
    assert np.array_equal(np.sort(words), np.sort(expected))
    covered = np.concatenate([np.arange(*segment) for segment in np.concatenate([train, held])])
    assert np.array_equal(np.sort(covered), np.arange(len(tokens.ids)))
    assert 0.02 < sum(end - start for start, end in held) / len(tokens.ids) < 0.06
    boundaries = set(tokens.offsets.tolist())
    assert all(not boundaries & set(range(start + 1, end)) for start, end in np.concatenate([train, held]).tolist())


def test_masking_statistics():
    is_special = np.arange(1000) < 5
    vocabulary = train_mlm.Vocabulary(pad=0, cls=2, sep=3, mask=4, is_special=is_special)
    ids = np.random.default_rng(0).integers(0, 1000, (400, 500))
    inputs, labels = train_mlm.mask_tokens(ids, vocabulary, 0.15, np.random.default_rng(1))
    chosen = labels != train_mlm.IGNORED
    assert not chosen[is_special[ids]].any() and np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])
    assert abs(chosen[~is_special[ids]].mean() - 0.15) < 0.005
    masked, kept = inputs[chosen] == 4, inputs[chosen] == ids[chosen]
    assert abs(masked.mean() - 0.8) < 0.01 and abs(kept.mean() - 0.1) < 0.01
    others = inputs[chosen][~masked & ~kept]
    assert not is_special[others].any() and len(np.unique(others)) > 900


def test_tokens_are_cached_by_corpus_and_tokenizer(tmp_path):
    def shards():
        return {shard: (shard / "ids.npy").stat().st_mtime_ns for shard in tmp_path.glob("cache/*/shard-*")}

    _, tokens, *_ = prepared(tmp_path)
    first = shards()
    _, again, *_ = prepared(tmp_path)
    assert shards() == first and np.array_equal(all_of(tokens), all_of(again))  # reused
    os.utime(tmp_path / "corpus.txt", ns=(1, 1))  # the file has changed
    _, rebuilt, *_ = prepared(tmp_path)
    assert np.array_equal(all_of(tokens), all_of(rebuilt)) and len(shards()) == 2
    (new,) = shards().keys() - first.keys()
    with open(new / "ids.npy", "r+b") as file:
        file.truncate(200)
    with pytest.raises(SystemExit, match=r"shard-00000 is damaged .*remove that folder"):
        prepared(tmp_path)
    np.save(new / "ids.npy", np.zeros(100, dtype=np.uint16))
    with pytest.raises(SystemExit, match="damaged"):
        prepared(tmp_path)


def all_of(tokens):
    return np.concatenate(tokens.ids.ids)


def test_preparation_goes_on_after_the_last_whole_shard(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path)
    corpus.write_text(corpus.read_text().replace(".\n", ".\n\n", 20))  # documents without a token
    _, whole, *_ = prepared(tmp_path)
    shutil.rmtree(next(path for path in (tmp_path / "cache").iterdir() if path.is_dir()))
    code = """if True:
        import os, signal, sys, train_mlm
        train_mlm.SHARD, replace, calls = 3000, os.replace, []
        def killed(*paths):
            calls.append(paths)
            replace(*paths) if len(calls) < 3 else os.kill(os.getpid(), signal.SIGKILL)
        os.replace = killed
        train_mlm.main(sys.argv[1:])"""
    process = subprocess.run([sys.executable, "-c", code, *arguments(tmp_path)], cwd=ROOT, env=quiet(tmp_path))
    assert process.returncode == -signal.SIGKILL
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    made = {shard.name: (shard / "ids.npy").stat().st_mtime_ns for shard in folder.glob("shard-0000[0-9]")}
    assert sorted(made) == ["shard-00000", "shard-00001"]
    (partial,) = folder.glob("*.partial")
    os.utime(partial, (0, 0))
    monkeypatch.setattr(train_mlm, "SHARD", 3000)
    _, tokens, *_ = prepared(tmp_path)
    assert not partial.exists() and len(tokens.ids.ids) > 3
    assert all((folder / name / "ids.npy").stat().st_mtime_ns == when for name, when in made.items())
    assert np.array_equal(all_of(tokens), all_of(whole)) and np.array_equal(tokens.counts, whole.counts)
    assert np.array_equal(tokens.offsets, whole.offsets)
    for start, end in zip(whole.offsets[:-1], whole.offsets[1:]):
        assert np.array_equal(tokens.ids[start:end], all_of(whole)[start:end])


def test_text_that_is_not_utf8_is_refused_with_its_place_or_replaced(tmp_path, capsys):
    good, bad = b"the cat sees the dog .\n" * 50, b"the \xff cat .\n"
    (tmp_path / "a.txt").write_bytes(good)
    (tmp_path / "b.txt").write_bytes(good + bad)
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "good"}\n{"text": "not \xc3("}\n')
    for name, byte in (("b.txt", len(good) + 4), ("c.jsonl", 31)):
        paths = [str(tmp_path / "a.txt"), str(tmp_path / name)]
        with pytest.raises(SystemExit, match=rf"{name}, byte {byte}: not UTF-8 .*--replace-invalid-utf8"):
            list(train_mlm.local_corpus(paths, "line").batches(0))
    replaced = list(train_mlm.local_corpus([str(tmp_path)], "line", "replace").batches(0))
    texts = [text for batch in replaced for text in batch]
    assert texts[100] == "the \N{REPLACEMENT CHARACTER} cat ." and texts[-2:] == [
        "good",
        "not \N{REPLACEMENT CHARACTER}(",
    ]
    train_mlm.main(arguments(tmp_path, "--data", str(tmp_path), "--steps", "1", "--replace-invalid-utf8"))
    assert "2 characters of shard-00000 are U+FFFD" in capsys.readouterr().out


def test_the_corpus_of_the_hub_as_local_shards_of_parquet(tmp_path, monkeypatch):
    """The same calls of `datasets`, with folders in place of the hub's names."""
    import datasets

    sources = []
    for name, column in (("wikipedia", "title"), ("books", "isbn")):
        for shard in range(2):
            file = tmp_path / name / "data" / f"train-{shard:05d}-of-00002.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            texts = [f"{name} {shard} {i}" for i in range(150)] + [None, ""]
            datasets.Dataset.from_dict({"text": texts, column: ["x"] * len(texts)}).to_parquet(file)
        sources.append((str(tmp_path / name), "default"))
    monkeypatch.setattr(train_mlm, "HUB_CORPUS", sources)
    corpus = train_mlm.hub_corpus()
    texts = [text for batch in corpus.batches(0) for text in batch]
    assert corpus.num_documents == len(texts) == 4 * 152
    assert texts[0] == "wikipedia 0 0" and texts[-3:] == ["books 1 149", "", ""]
    assert [text for batch in corpus.batches(77) for text in batch] == texts[77:]


@pytest.mark.parametrize("writer", ["write_shard", "save_checkpoint"])
def test_a_full_disk_is_explained_and_leaves_what_was_whole(tmp_path, writer):
    """A limit on the size of files stands in for a full disk."""
    flags = arguments(tmp_path, "--steps", "4", "--save-every", "2", "--resume")
    prepared(tmp_path)
    oldest = tmp_path / "run" / "step-0000002" / "training.pt"
    if writer == "write_shard":
        shutil.rmtree(next(path for path in (tmp_path / "cache").iterdir() if path.is_dir()))
        size = 20_000
    else:
        train_mlm.main(flags)
        shutil.rmtree(tmp_path / "run" / "step-0000004")
        before = oldest.read_bytes()
        size = len(before) - 1000  # the optimizer's file is the largest
    code = f"""if True:
        import resource, sys, train_mlm
        write = train_mlm.{writer}
        def limited(*arguments):
            resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
            write(*arguments)
        train_mlm.{writer} = limited
        train_mlm.main(sys.argv[1:])"""
    command = [sys.executable, "-c", code, *flags]
    process = subprocess.run(command, cwd=ROOT, env=quiet(tmp_path), capture_output=True, text=True)
    assert process.returncode == 1
    if writer == "write_shard":
        assert "is the disk full?" in process.stderr and not list(tmp_path.glob("cache/*/shard*"))
        prepared(tmp_path)
    else:
        assert "cannot write" in process.stderr and "earlier checkpoints are untouched" in process.stderr
        assert list((tmp_path / "run").glob("step-*")) == [oldest.parent] and oldest.read_bytes() == before
        train_mlm.main(flags)


def quiet(tmp_path):
    variables = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets"), "PYTHONPATH": str(ROOT)}
    return os.environ | variables


def test_local_text_in_every_format(tmp_path):
    import datasets

    documents = ["one two", "three", "four five"]
    table = datasets.Dataset.from_dict({"text": documents, "title": ["a", "b", "c"]})
    table.to_json(tmp_path / "b.jsonl")
    table.to_parquet(tmp_path / "c.parquet")
    (tmp_path / "a.txt").write_text("one two\n\nthree\nfour five\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("ignored in a folder")

    def texts(path, sample_by="line"):
        corpus = train_mlm.local_corpus([str(path)], sample_by)
        found = [text for batch in corpus.batches(0) for text in batch]
        assert len(found) == corpus.num_documents
        return [" ".join(text.split()) for text in found if text.strip()]

    for name in ("a.txt", "b.jsonl", "c.parquet"):
        assert texts(tmp_path / name) == documents
    (tmp_path / "a.txt").rename(tmp_path / "A.TXT")
    assert texts(tmp_path / "A.TXT") == documents
    (tmp_path / "A.TXT").rename(tmp_path / "a.txt")
    assert texts(tmp_path / "a.txt", "paragraph") == ["one two", "three four five"]
    assert texts(tmp_path / "a.txt", "document") == ["one two three four five"]
    assert sorted(texts(tmp_path)) == sorted(3 * documents)
    corpus = train_mlm.local_corpus([str(tmp_path), str(tmp_path / "b.jsonl")], "document")
    assert corpus.num_documents == 1 + 3 + 3  # a file that is named twice is read once


def test_a_trained_tokenizer_encodes_pairs_and_decodes():
    tokenizer = train_mlm.train_tokenizer(["the function returns a list of lists"] * 5, 200)
    encoding = tokenizer.encode("The function", "a list")
    assert encoding.tokens == ["[CLS]", "the", "function", "[SEP]", "a", "list", "[SEP]"]
    assert encoding.type_ids == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.decode(encoding.ids) == "the function a list"
    assert [tokenizer.token_to_id(token) for token in train_mlm.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]


def test_long_documents_are_tokenized_in_pieces(tmp_path):
    tokenizer = train_mlm.train_tokenizer(["the cat sees a dog"] * 5, 100)
    texts = ["a cat", "", "the cat sees a dog " * 20_000, "dog " * 5]
    corpus = train_mlm.Corpus("long", len(texts), lambda first: iter([texts[:1], texts[1:]][first:]))
    tokens = train_mlm.tokenize(corpus, tokenizer, tmp_path)
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts if text]
    assert np.array_equal(all_of(tokens), np.concatenate(expected))
    assert np.array_equal(np.diff(tokens.offsets), [len(ids) for ids in expected])
    assert np.array_equal(tokens.counts, np.bincount(np.concatenate(expected), minlength=len(tokens.counts)))


def test_learning_rate():
    lr = [train_mlm.learning_rate(step, 100, 1e-3, 10) for step in range(100)]
    assert lr[0] == pytest.approx(1e-4) and max(lr) == lr[9] == lr[10] == pytest.approx(1e-3)
    assert lr[55] == pytest.approx(5e-4) and lr[99] == pytest.approx(1e-3 / 90)


def test_no_weight_decay_on_biases_norms_and_the_core():
    model = build(MaBERTForMaskedLM, tiny(), torch.float32)
    decayed, others = train_mlm.make_optimizer(model, 0.01).param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    ends = {names[p].rsplit("mixer.")[-1].rsplit(".", 1)[-1] for p in others["params"]}
    assert ends == {"bias", "weight", "A_log", "D", "decoder_bias"}
    assert all("norm" in names[p] or "transform.2" in names[p] for p in others["params"] if names[p].endswith("weight"))


def test_the_demo_text_is_english_and_enough():
    corpus = train_mlm.demo_corpus()
    texts = [text for batch in corpus.batches(0) for text in batch]
    assert len(texts) == corpus.num_documents == len(set(texts)) and sum(map(len, texts)) > 1_000_000
    words = " ".join(texts).lower().split()
    assert words.count("the") > 0.02 * len(words)
    assert corpus.identity == train_mlm.demo_corpus().identity


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--length-schedule 128:0.9 512:0.2", "sum to 1"),
        ("--length-schedule 4:1", "too short"),
        ("--length-schedule 128", "takes TOKENS:SHARE"),
        ("--steps 0", "--steps must be positive"),
        ("--batch-size 10 --micro-batch-size 4", "multiple of --micro-batch-size"),
        ("--mask-rate 1.5", "--mask-rate"),
        ("--vocab-size 65536", r"--vocab-size must be in \[100, 65535\]"),
        ("--vocab-size 500 --tokenizer x.json", "exclude each other"),
        ("--pattern MXT", "MaBERTConfig.pattern"),
        ("--psm pre,post", "joined by"),
        ("--demo --data x.txt", "brings its own text"),
    ],
)
def test_bad_flags_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit) as error:
        train_mlm.parse_args(flags.split())
    assert error.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_defaults_are_the_papers_and_flags_override_the_demo():
    args = train_mlm.parse_args(["--steps", "100000"])
    assert (args.batch_size, args.lr, args.warmup_steps, args.weight_decay) == (256, 1e-4, 10_000, 0.01)
    assert args.length_schedule == [(128, 0.9), (512, 0.1)] and args.mask_rate == 0.15 and args.dropout == 0.1
    assert train_mlm.model_config(args, 30522, 0) == MaBERTConfig()
    variant = train_mlm.parse_args("--psm pre+post --no-causal-conv --pattern TM --d-state 8 --dropout 0.2".split())
    expected = MaBERTConfig(psm=("pre", "post"), causal_conv=False, pattern="TM", d_state=8, dropout=0.2)
    assert train_mlm.model_config(variant, 30522, 0) == expected
    assert train_mlm.parse_args(["--psm", "none"]).psm == ()
    demo = train_mlm.parse_args(["--demo", "--steps", "7"])
    assert demo.steps == 7 and demo.hidden_size == 128
    assert train_mlm.parse_args(["--demo", "--tokenizer", "x.json"]).vocab_size is None


def test_bad_corpora_are_refused_before_training(tmp_path):
    def refused(*more, said):
        with pytest.raises(SystemExit, match=said):
            train_mlm.main(arguments(tmp_path, *more))
        assert not list((tmp_path / "run").glob("*"))

    refused("--batch-size", "2048", said=r"too short: .* 1\d\d\d training rows .* batch is 2048 rows")
    refused("--data", str(tmp_path / "nowhere"), said="nowhere does not exist")
    (tmp_path / "empty.txt").write_text("")
    refused("--data", str(tmp_path / "empty.txt"), said="empty")
    (tmp_path / "folder").mkdir()
    refused("--data", str(tmp_path / "folder"), said="no .txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00" * 100)
    refused("--data", str(tmp_path / "binary.txt"), said="binary.txt, byte 0: not UTF-8")
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileExistsError):  # which the command turns into a message
        train_mlm.main(arguments(tmp_path))
    (tmp_path / "run").unlink()
    (tmp_path / "titles.jsonl").write_text('{"title": "no text"}\n')
    refused("--data", str(tmp_path / "titles.jsonl"), said="no column 'text', only")


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"cannot load the tokenizer .*nowhere\.json"):
        train_mlm.load_tokenizer(str(tmp_path / "nowhere.json"))
    tokenizer = train_mlm.train_tokenizer(["the cat"] * 5, 100)
    whole = json.loads(tokenizer.to_str())
    for change, said in (
        ({f"word{i}": i + 100 for i in range(66_000)}, "65535 is the most"),
        (None, r"has no \[MASK\]"),
    ):
        broken = json.loads(tokenizer.to_str())
        if change:
            broken["model"]["vocab"] |= change
        else:
            broken["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] != "[MASK]"]
            del broken["model"]["vocab"]["[MASK]"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
        with pytest.raises(SystemExit, match=said):
            train_mlm.load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_run_is_overwritten_only_when_asked_and_then_wholly(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "step-by-step-notes").mkdir(parents=True)
    short = "--steps", "2", "--save-every", "1"
    train_mlm.main(arguments(tmp_path, *short))
    log = (run / "log.csv").read_text()
    with pytest.raises(SystemExit, match="holds a run or a model already"):
        train_mlm.main(arguments(tmp_path, *short))
    assert (run / "log.csv").read_text() == log
    build(MaBERT, tiny()).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="holds a run or a model already"):
        train_mlm.main(arguments(tmp_path, "--out", str(tmp_path / "model")))
    MaBERT.from_pretrained(tmp_path / "model")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_mlm, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        train_mlm.main(arguments(tmp_path, *short, "--overwrite"))
    left = {file.name for file in run.iterdir()}
    assert left == {"step-by-step-notes"}  # no old model beside a new run's log


def test_trouble_in_training_is_explained(tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    for owner, name in ((train_mlm, "clip_grad_norm_"), (train_mlm.HeldOut, "loss"), (MaBERTForMaskedLM, "to")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, out_of_memory)
            with pytest.raises(SystemExit, match="lower --micro-batch-size"):
                train_mlm.main(arguments(tmp_path, "--overwrite"))
    with pytest.raises(SystemExit, match=r"not finite in ten steps in a row, up to step 1\d, .* last checkpoint "):
        train_mlm.main(arguments(tmp_path, "--overwrite", "--lr", "1e30"))

    def full_disk(_, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MaBERTForMaskedLM, "save_pretrained", full_disk)
    with pytest.raises(SystemExit, match=r"cannot write .*step-0000050.*No space left"):
        train_mlm.main(arguments(tmp_path, "--overwrite"))
    assert not list((tmp_path / "run").glob("*.partial"))


# What a run leaves behind, and how it goes on


def start(tmp_path, *more, processes=1, script=ROOT / "train_mlm.py"):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(script), *arguments(tmp_path, *more)]
    return subprocess.Popen(
        command, env=quiet(tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def stop_at(process, checkpoint, number):
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate()[0].decode()


def trained(folder):
    """The weights as one vector, and the log without its speeds."""
    weights = MaBERTForMaskedLM.from_pretrained(folder).state_dict().values()
    with open(folder / "log.csv") as file:
        log = [row | {"tokens_per_s": ""} for row in csv.DictReader(file)]
    return torch.cat([weight.flatten() for weight in weights]), log


LONGER = "--steps", "90", "--save-every", "10", "--log-every", "7", "--eval-every", "30", "--micro-batch-size", "8"


KILLED_IN_SAVING = """
import os, signal, sys, train_mlm
replace = os.replace
def killed(old, new):
    os.kill(os.getpid(), signal.SIGKILL) if str(old).endswith("step-0000030.partial") else replace(old, new)
os.replace = killed
train_mlm.main(sys.argv[1:])
"""


def test_a_stopped_run_goes_on_bit_by_bit(tmp_path, capsys):
    train_mlm.main(arguments(tmp_path, *LONGER, "--dropout", "0.1"))
    expected = trained(tmp_path / "run")
    run = tmp_path / "stopped"
    flags = *LONGER, "--dropout", "0.1", "--out", str(run), "--resume"
    script = tmp_path / "killed.py"
    script.write_text(KILLED_IN_SAVING)
    process = start(tmp_path, *flags, script=script)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and (run / "step-0000030.partial").exists()
    assert sorted(folder.name for folder in run.glob("step-???????")) == ["step-0000010", "step-0000020"]
    process = start(tmp_path, *flags)
    stop_at(process, run / "step-0000040", signal.SIGKILL)
    process = start(tmp_path, *flags)
    said = stop_at(process, run / "step-0000050", signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM after step" in said
    assert len(list(run.glob("step-*"))) == 3  # --keep
    process = start(tmp_path, *flags)
    stop_at(process, run / "step-0000070", signal.SIGINT)
    assert process.returncode == 128 + signal.SIGINT
    train_mlm.main(arguments(tmp_path, *flags))
    weights, log = trained(run)
    assert torch.equal(weights, expected[0]) and log == expected[1]
    train_mlm.main(arguments(tmp_path, *flags))  # nothing is left to do
    printed = re.findall(r"held-out loss (\S+) nats", capsys.readouterr().out)
    assert len(printed) == 3 and set(printed) == {f"{float(log[-1]['held_out_loss']):.3f}"}
    kept = train_mlm.Log(run, 50, False)  # what a killed run leaves before it logs again
    assert len((run / "log.csv").read_text().splitlines()) == 1 + sum(int(row["step"]) <= 50 for row in log)
    kept.files.close()


COUNTING = """
import atexit, sys, train_mlm
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
calls = []
class Counting(train_mlm.DistributedDataParallel):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_comm_hook(None, lambda _, bucket: calls.append(1) or allreduce_hook(None, bucket))
train_mlm.DistributedDataParallel = Counting
if train_mlm.RANK == 1:
    train_mlm.save = train_mlm.write_shard = train_mlm.Log = None  # only the first process writes
train_mlm.main(sys.argv[1:])
print(f"gradients exchanged {len(calls)} times")
"""


def test_two_processes_train_the_same_model(tmp_path):
    flags = *LONGER, "--dropout", "0.1", "--resume"
    train_mlm.main(arguments(tmp_path, *flags))
    expected = trained(tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "counting.py").write_text(COUNTING)
    process = start(tmp_path, *flags, "--out", str(tmp_path / "two"), processes=2, script=tmp_path / "counting.py")
    said = process.communicate()[0].decode()
    assert process.returncode == 0 and said.count("shared by 2 processes") == 1, said
    assert "gradients exchanged 90 times" in said  # once a step, of two micro-batches in each process
    changing = tmp_path / "changing"
    for number, step in ((1, 20), (2, 50), (1, 70), (2, None)):  # how many processes, and when they are killed
        process = start(tmp_path, *flags, "--out", str(changing), processes=number)
        if step:
            stop_at(process, changing / f"step-{step:07d}", signal.SIGTERM if number == 2 else signal.SIGKILL)
        else:
            said = process.communicate()[0].decode()
            assert process.returncode == 0, said
    for folder in ("two", "changing"):
        weights, log = trained(tmp_path / folder)
        assert relative(weights, expected[0]) < 1e-5
        losses = ([float(row["loss"] or 0) for row in rows] for rows in (log, expected[1]))
        assert next(losses) == pytest.approx(next(losses), abs=2e-4)
    process = start(tmp_path, *LONGER, "--micro-batch-size", "32", "--overwrite", processes=2)
    said = process.communicate()[0].decode()
    assert process.returncode != 0 and "with --micro-batch-size 16 each has one" in said


def test_a_process_that_dies_ends_all_and_torchrun_starts_them_again(tmp_path):
    train_mlm.main(arguments(tmp_path, *LONGER))
    expected, _ = trained(tmp_path / "run")
    again = tmp_path / "again"
    code = f"""if True:
        import os, pathlib, signal, sys, train_mlm
        step = train_mlm.train_step
        def dies(*arguments):
            if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and arguments[3] == 45:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments)
        train_mlm.train_step = dies
        train_mlm.main({arguments(tmp_path, *LONGER, "--out", str(again), "--resume")})"""
    (tmp_path / "dies.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts"]
    for restarts in (0, 1):
        process = subprocess.run(
            [*command, str(restarts), str(tmp_path / "dies.py")], env=quiet(tmp_path), capture_output=True, text=True
        )
        if restarts == 0:
            assert process.returncode != 0 and "Signal 9 (SIGKILL)" in process.stderr
            shutil.rmtree(again)
    assert process.returncode == 0 and "resuming" in process.stdout, process.stderr
    assert relative(trained(again)[0], expected) < 1e-5


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(tmp_path, capsys):
    flags = "--steps", "6", "--save-every", "2"
    train_mlm.main(arguments(tmp_path, *flags))
    run = tmp_path / "run"
    expected = trained(run)
    newest, middle, oldest = sorted(run.glob("step-*"), reverse=True)
    whole = bytearray((newest / "training.pt").read_bytes())
    for i in range(len(whole) // 2, len(whole) // 2 + 100):  # some bits, not all in the padding between its parts
        whole[i] ^= 1
    (newest / "training.pt").write_bytes(whole)
    with open(middle / "model.pt", "r+b") as file:
        file.truncate(1000)
    for folder, whole in ((newest, False), (middle, False), (oldest, True)):
        with contextlib.nullcontext() if whole else pytest.raises(ValueError):
            train_mlm.read_checkpoint(folder)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    train_mlm.save_checkpoint(other, 3, 1, MaBERTForMaskedLM.from_pretrained(run), train_mlm.load_tokenizer(
        str(run / "tokenizer.json")), {})  # fmt: skip
    assert sorted(folder.name for folder in other.glob("step-*")) == ["step-0000003", middle.name, newest.name]
    train_mlm.main(arguments(tmp_path, *flags, "--resume"))
    printed = capsys.readouterr().out
    assert f"{newest} is damaged" in printed and f"{middle} is damaged" in printed and f"resuming {oldest}" in printed
    weights, log = trained(run)
    assert torch.equal(weights, expected[0]) and log == expected[1]
    train_mlm.main(arguments(tmp_path, *flags, "--resume"))  # now whole, and complete
    assert f"resuming {newest}" in capsys.readouterr().out
    for folder in (newest, middle, oldest):
        (folder / "training.pt").unlink()
    with pytest.raises(SystemExit, match=r"no checkpoint in .* is whole"):
        train_mlm.main(arguments(tmp_path, *flags, "--resume"))


def test_another_run_is_not_resumed(tmp_path):
    flags = "--steps", "4", "--save-every", "2"
    train_mlm.main(arguments(tmp_path, *flags))
    before = (tmp_path / "run" / "log.csv").read_text()
    for change, said in (
        (("--lr", "0.5"), "lr was .* and is now 0.5"),
        (("--steps", "5"), "steps was 4 and is now 5"),
        (("--pattern", "TM"), "pattern was .* and is now TM"),
        (("--length-schedule", "16:1"), "length_schedule was"),
    ):
        with pytest.raises(SystemExit, match=f"belongs to another run: .*{said}"):
            train_mlm.main(arguments(tmp_path, *flags, *change, "--resume"))
    tokenizer = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces["cat"], pieces["dog"] = pieces["dog"], pieces["cat"]
    (tmp_path / "other.json").write_text(json.dumps(tokenizer))
    flags_with_tokenizer = arguments(tmp_path, *flags, "--tokenizer", str(tmp_path / "other.json"), "--resume")
    i = flags_with_tokenizer.index("--vocab-size")
    del flags_with_tokenizer[i : i + 2]
    with pytest.raises(SystemExit, match="tokenizer was"):
        train_mlm.main(flags_with_tokenizer)
    text = (tmp_path / "corpus.txt").read_text()
    turned = "\n".join(" ".join(reversed(line.split())) for line in text.splitlines())
    for other in (text * 2, turned):
        (tmp_path / "corpus.txt").write_text(other)
        with pytest.raises(SystemExit, match="belongs to another run: corpus was"):
            train_mlm.main(arguments(tmp_path, *flags, "--resume"))
    with pytest.raises(SystemExit, match="--vocab-size was 100 and is now 120"):
        train_mlm.main(arguments(tmp_path, *flags, "--vocab-size", "120", "--resume"))
    assert (tmp_path / "run" / "log.csv").read_text() == before
    (tmp_path / "corpus.txt").unlink()
    (tmp_path / "moved.txt").write_text(text)
    shutil.rmtree(tmp_path / "cache")
    train_mlm.main(arguments(tmp_path, *flags, "--data", str(tmp_path / "moved.txt"), "--resume"))  # the same text


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    flags = "--steps", "5", "--dropout", "0.1"
    train_mlm.main(arguments(tmp_path, *flags))
    expected = trained(tmp_path / "run")
    train_mlm.main(arguments(tmp_path, *flags, "--activation-checkpointing", "--overwrite"))
    weights, log = trained(tmp_path / "run")
    assert torch.equal(weights, expected[0]) and log == expected[1]

    def kept(*flag):
        args = train_mlm.parse_args(arguments(tmp_path, *flag))
        model, _, _ = train_mlm.build(args, train_mlm.prepare(args))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model.encoder(torch.ones(8, 32, dtype=torch.long))
        return sum(sizes)

    assert kept("--activation-checkpointing") < kept() / 5


def test_the_profile_covers_the_step(tmp_path, capsys):
    flags = "--profile", "2", "--length-schedule", "16:0.9", "32:0.1"
    train_mlm.main(arguments(tmp_path, *flags))
    assert not (tmp_path / "run").exists()
    sections = capsys.readouterr().out.split("\nrows of ")[1:]
    assert [section.split()[0] for section in sections] == ["16", "32"]
    for section in sections:
        parts = dict(re.findall(r"^  (\S.*?)  .*?([\d.]+)%$", section, re.MULTILINE))
        kinds = [f"{way}, {kind}" for way in ("forward", "backward") for kind in ("M layers", "T layers", "rest")]
        assert parts.keys() == {"waiting for data", "optimizer", *kinds}
        assert sum(map(float, parts.values())) == pytest.approx(100, abs=0.5) and float(parts["forward, M layers"]) > 1


def test_flops_per_token():
    config = MaBERTConfig()
    short, long = (train_mlm.flops_per_token(config, length, 0.15) for length in (128, 512))
    h, mamba = 768, 8 * (768 * 2 * 1536 + 1536 * (48 + 32) + 48 * 1536 + 1536 * 768 + 2 * 768 * 3072)
    transformer = 4 * (4 * h * h + 2 * h * 3072)
    convolution, head = 8 * 1536 * 4, 0.15 * h * (h + 30522)
    assert short == pytest.approx(6 * (mamba + transformer + convolution + head + 4 * 2 * 128 * h), rel=0.01)
    assert long - short == pytest.approx(6 * 4 * 2 * (512 - 128) * h, rel=0.01)


def test_time_left_counts_the_longer_rows(tmp_path):
    args = train_mlm.parse_args(arguments(tmp_path, "--steps", "100", "--length-schedule", "16:0.9", "32:0.1"))
    phases = train_mlm.prepare(args).phases
    assert train_mlm.planned_tokens(args, phases, 0, 100) == 32 * (90 * 16 + 10 * 32)
    assert train_mlm.planned_tokens(args, phases, 88, 93) == 32 * (2 * 16 + 3 * 32)


def test_the_log_as_curve_and_for_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = "--steps", "20", "--log-every", "5", "--save-every", "10", "--tensorboard"
    train_mlm.main(arguments(tmp_path, *flags))
    shutil.rmtree(tmp_path / "run" / "step-0000020")
    train_mlm.main(arguments(tmp_path, *flags, "--resume"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    _, log = trained(tmp_path / "run")
    expected = [(int(row["step"]), pytest.approx(float(row["loss"]))) for row in log if row["loss"]]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
    pytest.importorskip("matplotlib")
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    args = train_mlm.parse_args(arguments(tmp_path))
    batch = some_batch()
    model = build(MaBERTForMaskedLM, tiny("MT"), torch.float32)
    optimizer = train_mlm.make_optimizer(model, 0.01)
    assert train_mlm.train_step(model, optimizer, batch, 0, args)[1] == 0
    before = [p.detach().clone() for p in model.parameters()]
    states = [value.clone() for state in optimizer.state.values() for value in state.values()]
    hook = model.decoder_bias.register_hook(lambda gradient: gradient * math.inf)
    assert train_mlm.train_step(model, optimizer, batch, 1, args)[1] == 1
    assert all(map(torch.equal, before, model.parameters()))
    assert all(map(torch.equal, states, (value for state in optimizer.state.values() for value in state.values())))
    hook.remove()
    assert train_mlm.train_step(model, optimizer, batch, 1, args)[1] == 0

    calls, clip = [], train_mlm.clip_grad_norm_

    def sometimes_nan(*arguments):
        calls.append(clip(*arguments))
        return calls[-1] * (math.nan if len(calls) in (3, 4, 12) else 1)

    monkeypatch.setattr(train_mlm, "clip_grad_norm_", sometimes_nan)
    train_mlm.main(arguments(tmp_path, "--steps", "20", "--log-every", "5"))
    skipped = [int(row["skipped_steps"]) for row in trained(tmp_path / "run")[1]]
    assert skipped == [0, 2, 2, 3, 3]
    sums = train_mlm.Sums(*torch.zeros(4).unbind())
    for step in range(1, 20):
        sums.add(step, some_batch(), torch.tensor(1.0), torch.tensor(float(step in (2, 5) or step > 6)))
        if step == 12:  # as if resumed
            state = sums.state()
            sums = train_mlm.Sums(**{k: torch.tensor(v) if k in list(state)[:4] else v for k, v in state.items()})
    assert sums.state() | dict(real=0, padded=0) == dict(
        losses=4, skipped=15, in_a_row=13, failed_at=16, line=0, real=0, padded=0, skipped_before=0
    )


def test_an_unreachable_hub_and_a_bad_folder_are_explained(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}

    def said(*flags):
        command = [sys.executable, str(ROOT / "train_mlm.py"), "--steps", "1", "--out", str(tmp_path / "run"), *flags]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        return result.stderr

    advice = "without the hub, pass --data PATH, and --tokenizer a tokenizer.json or --vocab-size N"
    assert advice in said() and advice in said("--vocab-size", "1000")
    (tmp_path / "file").write_text("in the way")
    assert said("--out", str(tmp_path / "file")).startswith("cannot go on: ")


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning on GLUE
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_glue_metrics_equal_those_of_scikit_learn_and_scipy(seed):
    import scipy.stats
    import sklearn.metrics

    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(2, size=(2, 50))
    scores, guesses = rng.integers(12, size=(2, 50)) / 2  # with ties
    metrics = finetune_glue.METRICS
    assert metrics["accuracy"](predicted, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert metrics["f1"](predicted, labels) == pytest.approx(sklearn.metrics.f1_score(labels, predicted))
    assert metrics["matthews"](predicted, labels) == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predicted))
    assert metrics["pearson"](guesses, scores) == pytest.approx(scipy.stats.pearsonr(guesses, scores)[0])
    assert metrics["spearman"](guesses, scores) == pytest.approx(scipy.stats.spearmanr(guesses, scores)[0])
    for name in ("matthews", "f1", "pearson", "spearman"):
        assert metrics[name](np.zeros(50), labels) == 0  # a constant guess


def tsv(folder: Path, task: str, file: str, *rows: str, end="\n") -> Path:
    path = folder / finetune_glue.TASKS[task].folder / f"{file}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join(rows) + end).encode())
    return path


def read_glue(folder, task, file="train"):
    return finetune_glue.read(finetune_glue.TASKS[task], task, file, str(folder))


def test_glue_files_of_the_benchmarks_download(tmp_path):
    tsv(tmp_path, "cola", "train", 'gj04\t1\t\tIt "rained.', "gj04\t0\t*\tMe\u2028went\x85 there.")  # no header
    rows = read_glue(tmp_path, "cola")
    assert rows.sentences == [('It "rained.',), ("Me\u2028went\x85 there.",)] and rows.labels.tolist() == [1, 0]
    tsv(tmp_path, "cola", "test", "index\tsentence", "0\tWe go.", "1\tThey go.", end="\r\n")
    rows = read_glue(tmp_path, "cola", "test")
    assert rows.sentences == [("We go.",), ("They go.",)] and rows.labels is None and rows.index == [0, 1]

    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"  # a byte-order mark
    tsv(tmp_path, "mrpc", "train", header, '1\t7\t8\t" He said so .\tHe did .', '0\t9\t10\tThat "\tThis')
    rows = read_glue(tmp_path, "mrpc")
    assert rows.sentences == [('" He said so .', "He did ."), ('That "', "This")] and rows.labels.tolist() == [1, 0]

    tsv(tmp_path, "rte", "dev", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tnot_entailment", "1\tc\td\tentailment")
    assert read_glue(tmp_path, "rte", "dev").labels.tolist() == [1, 0]

    more = "index\tpromptID\tpairID\tgenre\ts1_binary\ts2_binary\ts1_parse\ts2_parse\tsentence1\tsentence2"
    tsv(
        tmp_path,
        "mnli",
        "train",
        more + "\tlabel1\tgold_label",
        "\t".join("0123456") + "\tx\tp\th\tneutral\tcontradiction",
    )
    tsv(
        tmp_path,
        "mnli",
        "dev_matched",
        more + "\tlabel1\tlabel2\tgold_label",
        "\t".join("0123456") + "\tx\tp\th\ta\tb\tneutral",
    )
    assert read_glue(tmp_path, "mnli").labels.tolist() == [2]
    dev = read_glue(tmp_path, "mnli", "dev_matched")
    assert dev.labels.tolist() == [1] and dev.sentences == [("p", "h")]

    columns = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    tsv(tmp_path, "stsb", "train", columns, "0\tg\tf\t1\t2\ta\tb\tp\tq\t3.25")
    assert read_glue(tmp_path, "stsb").labels.tolist() == [3.25]


def test_malformed_rows_of_qqp_are_skipped_and_counted_and_refused_elsewhere(tmp_path, capsys):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    tsv(
        tmp_path,
        "qqp",
        "train",
        header,
        "1\t2\t3\tWho?\tWhat?\t0",
        "4\t5\t6\tWhy?",
        "7\t8\t9\tHow?\tHow so?\t1",
        "1\t2\t3\ta\tb\t",
    )
    rows = read_glue(tmp_path, "qqp")
    assert rows.sentences == [("Who?", "What?"), ("How?", "How so?")] and rows.labels.tolist() == [0, 1]
    assert "2 malformed rows skipped" in capsys.readouterr().out
    tsv(tmp_path, "qqp", "test", "id\tquestion1\tquestion2", "0\tWho?\t", "1\tWhy?\tHow?")  # a test set is kept whole
    assert read_glue(tmp_path, "qqp", "test").sentences == [("Who?", ""), ("Why?", "How?")]

    def refused(task, said, *rows):
        file = tsv(tmp_path, task, "train", *rows)
        with pytest.raises(SystemExit, match=f"{re.escape(str(file))}.*{said}"):
            read_glue(tmp_path, task)

    refused("cola", "line 2: 3 columns instead of 4", "a\t1\t\tb", "a\t1\tb")
    refused("cola", "line 1: label '2'; expected 0, 1 ", "a\t2\t\tb")
    refused("rte", "line 3: label 'yes'; expected entailment, not_entailment", "index\tsentence1\tsentence2\tlabel",
            "0\ta\tb\tentailment", "1\ta\tb\tyes")  # fmt: skip
    refused(
        "rte", "line 1: no column label, only index, sentence1, sentence2", "index\tsentence1\tsentence2", "0\ta\tb"
    )
    for score in ("x", "9", "nan"):
        refused("stsb", f"line 2: label '{score}'; expected a number from 0 to 5", "sentence1\tsentence2\tscore",
                f"a\tb\t{score}")  # fmt: skip
    refused("sst2", "has no rows", "sentence\tlabel")
    (tmp_path / "SST-2" / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(SystemExit, match=r"cannot read .*train.tsv"):
        read_glue(tmp_path, "sst2")
    with pytest.raises(SystemExit, match=r"neither .*WNLI/train.tsv nor .*wnli/train-\*.parquet exists"):
        read_glue(tmp_path, "wnli")


def test_glue_files_of_the_hub(tmp_path, monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict(dict(premise=["p", "q"], hypothesis=["h", "i"], label=[2, 0], idx=[5, 6]))
    (tmp_path / "mnli").mkdir()
    table.to_parquet(tmp_path / "mnli" / "validation_matched-00000-of-00001.parquet")
    rows = read_glue(tmp_path, "mnli", "dev_matched")
    assert rows.sentences == [("p", "h"), ("q", "i")] and rows.labels.tolist() == [2, 0] and rows.index == [5, 6]
    (tmp_path / "ax").mkdir()
    table.to_parquet(tmp_path / "ax" / "test-00000-of-00001.parquet")
    assert finetune_glue.read(finetune_glue.TASKS["mnli"], "ax", "test", str(tmp_path)).labels is None
    for column, value, said in (("label", 3, "label 3; expected entailment"), ("premise", None, "an empty sentence")):
        bad = datasets.Dataset.from_dict(table.to_dict() | {column: ["p" if column == "premise" else 0, value]})
        bad.to_parquet(tmp_path / "mnli" / "train-00000-of-00001.parquet")
        with pytest.raises(SystemExit, match=f"row 1: {said}"):
            read_glue(tmp_path, "mnli")
    table.remove_columns("hypothesis").to_parquet(tmp_path / "mnli" / "train-00000-of-00001.parquet")
    with pytest.raises(SystemExit, match="has no column hypothesis"):
        read_glue(tmp_path, "mnli")
    (tmp_path / "mnli" / "test_matched-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit, match="cannot read"):
        read_glue(tmp_path, "mnli", "test_matched")

    def from_hub(name, config, split):
        assert (name, config, split) == ("nyu-mll/glue", "mnli", "validation_mismatched")
        return table

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    rows = finetune_glue.read(finetune_glue.TASKS["mnli"], "mnli", "dev_mismatched", None)
    assert rows.labels.tolist() == [2, 0]


WORDLIST = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small random model, with a tokenizer whose every word is a token."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_mlm.train_tokenizer([" ".join(WORDLIST)] * 3, 200)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = MaBERTConfig(**vars(tiny("MT")) | dict(vocab_size=train_mlm.vocab_size(tokenizer), max_position=32))
    build(MaBERTForMaskedLM, config, torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """CoLA and MRPC in the benchmark's layout, where the label depends on one word."""
    folder, rng = tmp_path_factory.mktemp("glue"), np.random.default_rng(0)
    for file, count in (("train", 256), ("dev", 64), ("test", 16)):
        single, pairs = [], []
        for i in range(count):
            words, label = list(rng.choice(WORDLIST[2:], rng.integers(3, 12))), int(rng.integers(2))
            words.insert(rng.integers(len(words)), WORDLIST[label])
            text = " ".join(words)
            single.append(f"{i}\t{text}" if file == "test" else f"x\t{label}\t\t{text}")
            pairs.append(f"{label}\t1\t2\t{text}\t{' '.join(rng.choice(WORDLIST[2:], 3))}")
        tsv(folder, "cola", file, *(["index\tsentence"] if file == "test" else []), *single)
        tsv(folder, "mrpc", file, "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *pairs)
    return folder


def glue_arguments(checkpoint, glue, tmp_path, *more) -> list[str]:
    flags = ["--checkpoint", checkpoint, "--data-dir", glue, "--out", tmp_path / "glue", "--max-length", "32"]
    return [*map(str, flags), "--tasks", "cola", "--seeds", "2", "--lr", "2e-2", "--epochs", "4", *more]


def test_a_learnable_task_is_learned_from_end_to_end(checkpoint, glue, tmp_path, capsys):
    flags = glue_arguments(checkpoint, glue, tmp_path, "--tasks", "cola", "mrpc", "--save", "--predict")
    finetune_glue.main(flags)
    printed, out = capsys.readouterr().out, tmp_path / "glue"
    (found,) = json.loads((out / "results.json").read_text())["variants"]
    rows = {(row["column"], row["metric"]): row for row in found["rows"]}
    assert rows["CoLA", "matthews"]["mean"] > 0.9 and rows["MRPC", "accuracy"]["mean"] > 0.9
    mean, sd = (rows["CoLA", "matthews"][key] for key in ("mean", "sd"))
    assert f"| CoLA | matthews | {mean:.3f} ± {sd:.3f} | – | – |" in printed  # the paper has no such model
    assert found["config"]["pattern"] == "MT" and found["versions"]["torch"] == torch.__version__
    assert found["seconds"] > 0 and [s["task"] for s in found["settings"]] == ["cola", "mrpc"]
    assert "cola train has 256 rows; the hub's copy of the benchmark has 8551" in printed
    assert (out / "results.md").read_text().splitlines()[2] in printed

    lines = (out / "submission" / "CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == list(map(str, range(16)))
    sentences = [row.split() for (row,) in read_glue(glue, "cola", "test").sentences]
    right = [int(line.split("\t")[1]) == ("w1" in words) for line, words in zip(lines[1:], sentences)]
    assert sum(right) >= 15

    (folder,) = (path for path in out.glob("cola-*-seed0") if path.is_dir())
    model = MaBERTForSequenceClassification.from_pretrained(folder)
    tokenizer = train_mlm.load_tokenizer(str(folder / "tokenizer.json"))
    for text, label in (("w7 w1 w9", 1), ("w12 w0", 0)):
        with torch.no_grad():
            assert model(torch.tensor([tokenizer.encode(text).ids])).logits.argmax() == label


def test_regression_is_learned(checkpoint, glue, tmp_path):
    for file in ("train", "dev"):
        pairs = read_glue(glue, "mrpc", file)
        rows = [f"{a}\t{b}\t{4.5 * label}" for (a, b), label in zip(pairs.sentences, pairs.labels)]
        tsv(tmp_path, "stsb", file, "sentence1\tsentence2\tscore", *rows)
    finetune_glue.main(
        glue_arguments(checkpoint, tmp_path, tmp_path, "--tasks", "stsb", "--seeds", "1", "--epochs", "6")
    )
    (found,) = json.loads((tmp_path / "glue" / "results.json").read_text())["variants"]
    assert {row["metric"]: row["mean"] > 0.8 for row in found["rows"]} == {"pearson": True, "spearman": True}


def test_a_run_repeats_by_seed_and_depends_on_variant_and_side(checkpoint, glue, tmp_path):
    def logits(seed=0, side="left", **changes):
        args = finetune_glue.parse_args(
            glue_arguments(checkpoint, glue, tmp_path, "--padding-side", side, "--epochs", "1")
        )
        tokenizer, config, _ = finetune_glue.read_checkpoint(checkpoint, args)
        variant = finetune_glue.variants(args, config)[0]._replace(**changes)
        data = finetune_glue.load("cola", args, tokenizer)
        _, model = finetune_glue.run("cola", seed, variant, data, tokenizer, args)
        return finetune_glue.predict(model, data.dev[0], tokenizer.token_to_id("[PAD]"), args)

    expected = logits()
    assert np.array_equal(expected, logits())
    for changes in (dict(seed=1), dict(psm=()), dict(pooling="cls"), dict(pooling="mean"), dict(pooling="attn")):
        assert np.abs(expected - logits(**changes)).max() > 2e-5, changes
    assert np.abs(expected - logits(side="right")).max() < 2e-6
    assert np.abs(logits(side="right", psm=()) - logits(side="right")).max() < 2e-6  # the same function


def test_a_sweep_goes_on_where_it_stopped(checkpoint, glue, tmp_path, monkeypatch, capsys):
    flags = glue_arguments(checkpoint, glue, tmp_path, "--epochs", "1")
    run, calls = finetune_glue.run, []

    def interrupted(*arguments):
        calls.append(arguments[:2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(finetune_glue, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune_glue.main(flags)
    (first,) = (tmp_path / "glue").glob("cola-*-seed?.json")
    before = first.read_bytes()
    finetune_glue.main(flags)
    assert calls == [("cola", 0), ("cola", 1), ("cola", 1)] and first.read_bytes() == before
    finetune_glue.main(flags)
    assert len(calls) == 3
    finetune_glue.main([*flags, "--lr", "1e-2"])  # other settings are other runs
    assert len(calls) == 5
    finetune_glue.main([*flags, "--predict"])  # needs the model again, for the first seed
    submission = tmp_path / "glue" / "submission" / "CoLA.tsv"
    assert calls[5:] == [("cola", 0)] and first.read_bytes() == before
    mine = submission.read_text()
    submission.write_text("of another setting")
    finetune_glue.main([*flags, "--predict"])
    assert len(calls) == 6 and submission.read_text() == mine

    other = tmp_path / "other"  # other data, another model
    shutil.copytree(glue, other / "glue")
    tsv(other / "glue", "cola", "train", *(["x\t1\t\tw1", "x\t0\t\tw0"] * 20))
    finetune_glue.main([*flags, "--data-dir", str(other / "glue"), "--seeds", "1"])
    shutil.copytree(checkpoint, other / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (other / "checkpoint" / "config.json").write_text(json.dumps(config | dict(dropout=0.2)))
    finetune_glue.main([*flags, "--checkpoint", str(other / "checkpoint"), "--seeds", "1"])
    assert len(calls) == 8

    def diverging(name, seed, *rest):
        if seed == 0:
            raise finetune_glue.Diverged("too fast")
        return interrupted(name, seed, *rest)

    monkeypatch.setattr(finetune_glue, "run", diverging)
    with pytest.raises(SystemExit, match="too fast"):
        finetune_glue.main([*flags, "--lr", "3e-2"])
    assert calls[8:] == [("cola", 1)]  # the others are run all the same


@pytest.mark.skipif(finetune_glue.fcntl is None, reason="no file locks on this system")
def test_a_run_is_made_by_one_process_at_a_time(tmp_path):
    file = tmp_path / "results" / "cola-seed0.json"
    code = f"""if True:
        import pathlib, sys, time, finetune_glue
        with finetune_glue.claimed(pathlib.Path({str(file)!r}), wait=False) as free:
            print(free, flush=True)
            time.sleep(60)"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "True\n"
        with finetune_glue.claimed(file, wait=False) as free:
            assert not free
    finally:
        other.kill()
        other.wait()
    with finetune_glue.claimed(file, wait=True) as free:
        assert free


def test_pairs_are_cut_at_the_longer_and_have_token_types(checkpoint):
    tokenizer = train_mlm.load_tokenizer(str(checkpoint / "tokenizer.json"))
    long, short = " ".join(WORDLIST[:20]), " ".join(WORDLIST[20:24])
    rows = finetune_glue.Rows([(long, short), (short, long), (long,)], None, [0, 1, 2])
    data = finetune_glue.encode(rows, tokenizer, 16)
    pieces = [[tokenizer.id_to_token(i) for i in ids] for ids in data.ids]
    assert pieces[0] == ["[CLS]", *WORDLIST[:9], "[SEP]", *WORDLIST[20:24], "[SEP]"]
    assert pieces[1] == ["[CLS]", *WORDLIST[20:24], "[SEP]", *WORDLIST[:9], "[SEP]"]
    assert pieces[2] == ["[CLS]", *WORDLIST[:14], "[SEP]"]
    assert [types.tolist() for types in data.types[::2]] == [[0] * 11 + [1] * 5, [0] * 16]


@pytest.mark.parametrize("side", ["right", "left"])
def test_smart_batches_equal_plain_ones(checkpoint, glue, side, monkeypatch):
    """Rows padded to the longest of their batch or to the full length: the same logits, loss and gradients."""
    tokenizer = train_mlm.load_tokenizer(str(checkpoint / "tokenizer.json"))
    pad = tokenizer.token_to_id("[PAD]")
    data = finetune_glue.encode(read_glue(glue, "mrpc", "dev"), tokenizer, 32)
    model = MaBERTForSequenceClassification.from_pretrained(checkpoint).double()
    args = argparse.Namespace(batch_size=4, smart_batches=True, max_length=32, padding_side=side)
    smart = finetune_glue.predict(model, data, pad, args)
    args.smart_batches = False
    assert relative(torch.from_numpy(smart), torch.from_numpy(finetune_glue.predict(model, data, pad, args))) < 1e-6
    gradients = []
    for length in (None, 32):
        rows = np.arange(7)
        model.zero_grad()
        model(*finetune_glue.collate(data, rows, pad, side, length), labels=data.labels[rows]).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(*gradients) < 1e-10

    lengths = list(map(len, data.ids))
    waste = {}
    for smart in (False, True):
        found = finetune_glue.batches(lengths, 4, smart, np.random.default_rng(0))
        assert np.array_equal(np.sort(np.concatenate(found)), np.arange(64))
        waste[smart] = sum(max(lengths[i] for i in rows) * len(rows) for rows in found) - sum(lengths)
    assert waste[True] < waste[False] / 2


def test_submissions_are_written_as_the_benchmark_wants_them():
    data = finetune_glue.Encoded([], [], None, [0, 1, 2])
    logits = np.array([[0, 1, 0], [2, 1, 0], [0, 1, 2]])
    text = finetune_glue.submission(finetune_glue.TASKS["mnli"], data, logits)
    assert text == "index\tprediction\n0\tneutral\n1\tentailment\n2\tcontradiction\n"
    text = finetune_glue.submission(finetune_glue.TASKS["stsb"], data, np.array([[-1.0], [2.5], [7.0]]))
    assert text == "index\tprediction\n0\t0.000\n1\t2.500\n2\t5.000\n"


def test_mnli_predicts_the_diagnostic_set_too(checkpoint, tmp_path):
    columns, args = "index\tsentence1\tsentence2", ["--checkpoint", str(checkpoint), "--data-dir", str(tmp_path)]
    for file in ("train", "dev_matched", "dev_mismatched"):
        tsv(tmp_path, "mnli", file, columns + "\tgold_label", "0\tw1\tw2\tneutral", "1\tw3\tw4\tentailment")
    for file in ("test_matched", "test_mismatched"):
        tsv(tmp_path, "mnli", file, columns, "0\tw1\tw2")
    (tmp_path / "diagnostic").mkdir()
    (tmp_path / "diagnostic" / "diagnostic.tsv").write_text(f"{columns}\n0\tw1\tw2\n1\tw3\tw5\n")
    flags = "--tasks", "mnli", "--seeds", "1", "--epochs", "1", "--max-length", "16", "--predict"
    finetune_glue.main([*args, "--out", str(tmp_path / "out"), *flags])
    lines = {file.stem: len(file.read_text().splitlines()) for file in (tmp_path / "out/submission").iterdir()}
    assert lines == {"MNLI-m": 2, "MNLI-mm": 2, "AX": 3}
    rows = json.loads((tmp_path / "out/results.json").read_text())["variants"][0]["rows"]
    assert [row["column"] for row in rows] == ["MNLI-m", "MNLI-mm"]


def test_variants_of_the_papers_tables(checkpoint, glue, tmp_path, capsys):
    flags = glue_arguments(checkpoint, glue, tmp_path, "--seeds", "1", "--epochs", "1")
    finetune_glue.main([*flags, "--ablation"])
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (\w[\w ]*?) \| -?\d\.\d+ \((\d\.\d+)\) \|$", printed, re.MULTILINE))
    assert rows == {"Full": "0.676", "PSM only": "0.641", "MAP only": "0.661", "None": "0.596"}
    assert "PSM or none is the same function" in printed
    finetune_glue.main([*flags, "--poolings", "--padding-side", "left"])
    printed = capsys.readouterr().out
    assert re.findall(r"^\| (\w+) \| -?\d.*\((0.6\d\d)\)", printed, re.MULTILINE) == [
        ("map", "0.676"), ("attn", "0.648"), ("cls", "0.661"), ("mean", "0.651")
    ]  # fmt: skip
    assert "same function" not in printed


@pytest.mark.parametrize(
    "flags, pattern, cola",
    [
        ("", "MMT" * 4, 0.574), ("--budget 25", "MMT" * 4, 0.612), ("--budget 100", "MMT" * 4, 0.676),
        ("--budget 100 --pooling attn", "MMT" * 4, 0.648), ("--budget 100 --psm none --pooling cls", "MMT" * 4, 0.596),
        ("", "T" * 12, 0.428), ("", "TMM" * 4, 0.528), ("--budget 25", "T" * 12, None), ("", "MMT", None),
        ("--pooling cls", "MMT" * 4, None), ("--budget 100 --psm none --pooling attn", "MMT" * 4, None),
    ],
)  # fmt: skip
def test_the_papers_row_is_of_the_same_model(flags, pattern, cola):
    args = finetune_glue.parse_args(["--checkpoint", "x", *flags.split()])
    (variant,) = finetune_glue.variants(args, MaBERTConfig(pattern=pattern))
    assert (variant.paper[0] if variant.paper else None) == cola
    assert len(variant.paper) in (0, len(finetune_glue.PAPER_COLUMNS))


def test_glue_refuses_what_does_not_fit(checkpoint, glue, tmp_path, capsys):
    def refused(*more, said):
        with pytest.raises(SystemExit) as error:
            finetune_glue.main(glue_arguments(checkpoint, glue, tmp_path, *more))
        assert re.search(said, f"{error.value} {capsys.readouterr().err}")

    refused("--tasks", "colla", said="colla unknown; there are all, cola, sst2")
    refused("--seeds", "0", said="--seeds must be positive")
    refused("--psm", "pre+mid", said="not none, or any of")
    refused("--checkpoint", str(tmp_path), said=r"config.json does not exist; train_mlm.py writes")
    refused("--max-length", "64", said="has 32 positions; pass --max-length 32")
    refused("--data-dir", str(tmp_path), said=r"neither .*CoLA/train.tsv nor")
    refused("--lr", "1e30", "--epochs", "1", said=r"the loss is nan by step \d+; a lower --lr helps")
    refused("--tasks", "cola", "rte", said=r"neither .*RTE/train.tsv nor")  # before anything is trained
    assert not list((tmp_path / "glue").glob("*.json"))
    refused("--ablation", "--pooling", "cls", said="--ablation and --poolings choose the pooling")
    (tmp_path / "bad").mkdir()
    for file in checkpoint.iterdir():
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new"] = 5000
    (tmp_path / "bad" / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("--checkpoint", str(tmp_path / "bad"), said="the tokenizer has more tokens than the model's")


# ----------------------------------------------------------------------------------------------------------------------
# Benchmarks
# ----------------------------------------------------------------------------------------------------------------------


def test_bench_drift(tmp_path, checkpoint, capsys):
    pytest.importorskip("matplotlib")
    bench.main(["drift", "--pads", "0", "5", "--count", "8", "--out", str(tmp_path / "drift")])
    printed = capsys.readouterr().out
    tables = [re.findall(r"^\| ([a-z+]+) \| (.*) \|$", part, re.MULTILINE) for part in printed.split("final hidden")]
    drifts = {form: [float(cell.split(" / ")[1]) for cell in cells.split(" | ")] for form, cells in tables[1][:7]}
    assert len(drifts) == 7 and all(len(cells) == 4 for cells in drifts.values())
    assert max(drifts["pre+scan+post"]) < 1e-12 < 1e-6 < min(drifts["none"][1:]) and drifts["none"][0] < 1e-12
    found = json.loads((tmp_path / "drift.json").read_text())["distances"]
    assert len(found) == 7 * 2 * 2 * 2
    measures = [f"{what}_{measure}" for what in ("tokens", "cls", "mean") for measure in ("l2", "cosine")]
    assert max(r[measure] for r in found if r["pads"] == 0 for measure in measures) == 0
    for what in ("tokens", "cls", "mean"):  # small changes at right angles: the cosine distance is half their square
        assert all(0 < r[f"{what}_cosine"] < 2 * r[f"{what}_l2"] ** 2 for r in found if r["tokens_l2"] > 1e-6)
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "dev.tsv").write_text("gj04\t1\t\tw1 w2 w3\ngj04\t0\t*\tw1 w2\n\n")
    for more, words in (([], 2), (["--checkpoint", str(checkpoint)], 2 + 2)):  # [CLS] and [SEP] too
        args = argparse.Namespace(sentences=tmp_path / "dev.tsv", checkpoint=more[1] if more else None, count=5)
        assert [tuple(rows.shape) for rows in bench.sentences(args, 60, 32)] == [(1, words), (1, words + 1)]
        bench.main(["drift", "--pads", "3", "--sentences", str(tmp_path / "dev.tsv"), *more])
        assert "2 sentences of" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_bench_drift_explains_what_it_cannot_read(tmp_path, checkpoint, missing):
    (tmp_path / "sentences.txt").write_text("w1 w2")
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    flags = ["--checkpoint", str(tmp_path / "model"), "--sentences", str(tmp_path / "sentences.txt")]
    with pytest.raises(SystemExit, match="--checkpoint: "):
        bench.main(["drift", "--pads", "1", *flags])
    with pytest.raises(SystemExit, match="--sentences: cannot read"):
        bench.main(["drift", "--pads", "1", "--sentences", str(tmp_path / "nowhere")])


def test_bench_patterns(tmp_path, capsys, monkeypatch):
    write_corpus(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["patterns", "--data", str(tmp_path / "corpus.txt"), *"--patterns T --steps 3 --seeds 1 --jobs 2".split()]
    monkeypatch.setattr(bench, "CENTRED", "MT")
    monkeypatch.setattr(bench, "SMALL", SMALL_RUN)
    bench.main([*flags, "--out", str(tmp_path / "patterns")])
    rows = re.findall(r"^\| (\S.*?) \| (\d\.\d+) \| (\d\.\d+) \| \d+ \|$", capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in rows] == ["T", "MT, centred convolution"]
    log = (tmp_path / "patterns" / "T-seed0" / "log.csv").read_text()
    bench.main([*flags, "--out", str(tmp_path / "patterns")])
    assert re.findall(r"^\| (\S.*?) \| (\d\.\d+) \|", capsys.readouterr().out, re.MULTILINE) == [
        row[:2] for row in rows
    ]
    assert (tmp_path / "patterns" / "T-seed0" / "log.csv").read_text() == log  # a finished run is only read
    with pytest.raises(SystemExit, match="has --steps 3 --data"):
        bench.main([*flags, "--steps", "4", "--out", str(tmp_path / "patterns")])


def test_the_baselines_have_the_parameters_of_the_papers_table():
    pytest.importorskip("transformers")
    known = dict(zip(bench.BASELINES, (109_483_778, 11_685_122, 148_660_994, 128_060_930, 184_423_682)))
    known |= {"ModernBERT": 149_606_402, "MaBERT": 120_163_586, "T12": 108_895_490, "M12": 125_797_634}
    found = {name: sum(p.numel() for p in bench.build(name, 512, "meta").parameters()) for name in bench.MODELS}
    assert found.pop("MaBERT-206M") == pytest.approx(205.322e6, rel=0.005)  # the paper's
    assert found == known


def small_peers(monkeypatch):
    """The models of bench.py efficiency in small."""
    base = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=60)
    base |= dict(max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1)
    own = {"ALBERT": dict(embedding_size=8), "BigBird": dict(block_size=8)}
    own["Longformer"] = dict(max_position_embeddings=34, attention_window=8, pad_token_id=1)
    own["DeBERTa-v3"] = bench.DEBERTA | dict(position_buckets=8, pooler_hidden_size=16, vocab_size=60)
    small = {name: (family, base | own.get(name, {})) for name, (family, _) in bench.TRANSFORMERS.items()}
    monkeypatch.setattr(bench, "TRANSFORMERS", small)
    own = {name: vars(tiny(pattern)) for name, pattern in (("MaBERT", "MMT"), ("T12", "TT"), ("M12", "MM"))}
    monkeypatch.setattr(bench, "OURS", own)
    monkeypatch.setattr(bench, "MODELS", [*small, *bench.OURS])
    monkeypatch.setattr(bench, "release", lambda: None)  # half a second each
    monkeypatch.setattr(bench, "in_a_process", lambda call: str(1.0 + eval(f"bench.{call}")))


def test_positions_of_the_baselines_are_interpolated(monkeypatch):
    pytest.importorskip("transformers")
    small_peers(monkeypatch)
    for name, first in (("BERT", 0), ("ALBERT", 0), ("Longformer", 2)):
        tables = []
        for length in (16, 63):  # 32 positions are there; 63 have one between any two
            torch.manual_seed(0)
            model = bench.build(name, length).eval()
            tables.append(model.base_model.embeddings.position_embeddings.weight.detach())
            model(input_ids=torch.full((1, length), 7))
        old, new = tables
        assert len(old) == first + 32 and len(new) == first + 63
        assert old[:first].equal(new[:first])
        torch.testing.assert_close(new[first::2], old[first:], rtol=0, atol=1e-6)
        torch.testing.assert_close(new[first + 1 :: 2], (old[first:-1] + old[first + 1 :]) / 2, rtol=0, atol=1e-6)
    assert bench.build("DeBERTa-v3", 4096).deberta.encoder.max_relative_positions == 4096
    for name in bench.MODELS:
        bench.build(name, 100).eval()(input_ids=torch.full((1, 100), 7))  # of which BigBird makes 13 blocks of 8


@pytest.mark.parametrize("changes", [{}, dict(d_state=64, expand=1, d_conv=3, hidden_size=96, num_heads=4, dt_rank=7)])
def test_the_cost_model_counts_what_pytorch_counts(changes):
    config = MaBERTConfig(pattern="MT", **changes)
    d = config.expand * config.hidden_size
    for kind in "MT":
        with torch.device("meta"):
            layer = mabert.LAYERS[kind](config).eval()
        for length in (1, 128, 1000):
            with FlopCounterMode(display=False) as counter:
                layer(torch.zeros(1, length, config.hidden_size, device="meta"))
            scan = 7 * length * d * config.d_state if kind == "M" else 0
            assert bench.forward_cost(config, kind, length)[0] == counter.get_total_flops() + scan
        assert bench.forward_cost(config, kind, 0)[1] == 2 * sum(p.numel() for p in layer.parameters())
    at = bench.crossover(config)
    (m, t), (m_before, t_before) = (
        [bench.forward_cost(config, kind, length)[0] for kind in "MT"] for length in (at, at - 1)
    )
    assert t > m and (at == 1 or t_before <= m_before)


class Traffic(TorchDispatchMode):
    """Counts the values that operations read and write. Views and new memory cost nothing."""

    values = 0

    def add(self, *trees):
        self.values += sum(x.numel() for x in tree_leaves(trees) if isinstance(x, torch.Tensor))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not any(x.alias_info for x in op._schema.returns) and not re.search("view|empty|zeros|ones", str(op)):
            self.add(args, kwargs, out)
        return out


def test_the_cost_model_counts_the_bytes_of_every_operation(monkeypatch):
    config, length = MaBERTConfig(pattern="MT"), 500

    def scan(u, delta, A, B, C, D, z, delta_bias, **options):
        traffic.add(u, u)  # comes channel-first from the convolution, and is copied to rows
        traffic.add(u, delta, A, B, C, D, z, delta_bias, y := torch.empty_like(delta))
        return y

    def attention(q, k, v, **options):
        traffic.add(q, k, v, out := torch.empty(1, length, *q.shape[1::2], device="meta").transpose(1, 2))
        return out

    monkeypatch.setattr(mabert, "selective_scan", scan)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for kind in "MT":
        with torch.device("meta"):
            layer = mabert.LAYERS[kind](config).eval()
            x, mask = torch.zeros(1, length, config.hidden_size), torch.ones(1, length, dtype=torch.bool)
        with torch.no_grad(), Traffic() as traffic:
            layer(x, mask)
        assert 2 * traffic.values == pytest.approx(bench.forward_cost(config, kind, length)[1], rel=0.005)


def test_bench_efficiency(tmp_path, monkeypatch, capsys):
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package)
    small_peers(monkeypatch)
    flags = ["--device", "cpu", "--lengths", "16", "128", "--seconds", "0.1", "--models", *bench.MODELS]
    bench.main(["efficiency", *flags, "--out", str(tmp_path / "efficiency")])
    text = capsys.readouterr().out
    assert (tmp_path / "efficiency.md").read_text().strip() == text.strip() and "A measurement on a CPU" in text
    assert all(f"Table {name}" in text for name in ("B5", "B6", "B7")) and "Ratios at 128 tokens" in text
    found = json.loads((tmp_path / "efficiency.json").read_text())
    assert found.keys() == {"command", "device", "versions", "settings", "parameters", "cells", "ratios"}
    assert found["settings"]["lengths"] == [16, 128] and found["settings"]["variants"] == ["plain"]
    assert found["parameters"].keys() == set(bench.MODELS)
    cells = {(cell["model"], cell["length"], cell["measure"]): cell for cell in found["cells"]}
    assert len(cells) == len(bench.MODELS) * 2 * 3
    for (_, _, measure), cell in cells.items():
        assert isinstance(cell["value"], float) and (measure == "memory" or cell["runs"] >= 3)
        assert measure != "training" or cell["micro_batch_size"] == 1
    bert, own = (cells[name, 128, "latency"]["value"] for name in ("BERT", "MaBERT"))
    row = next(
        row for row in found["ratios"] if (row["what"], row["measure"], row["length"]) == ("BERT", "latency", 128)
    )
    assert row["measured"] == pytest.approx(bert / own) and row["paper"] == pytest.approx(5.220 / 9.160)
    assert f"| {bench.number(bert, '5.22')} |" in text
    assert (tmp_path / "efficiency.png").read_bytes().startswith(b"\x89PNG")


def test_headline_ratios_of_the_papers_own_figures():
    found = [
        dict(model=name, length=4096, measure=measure, value=values[measure][-1])
        for name, values in bench.PAPER.items()
        for measure in bench.MEASURES
    ]
    rows = {
        (row["what"], row["measure"]): row for row in bench.efficiency_ratios(found, 4096) if row["over"] == "MaBERT"
    }
    mean, less = "mean of the paper's baselines", "the same without DeBERTa-v3"
    for what, measure, headline in (
        *((mean, "training", 2.36), (mean, "latency", 2.43), (less, "training", 1.73), (less, "latency", 1.55)),
    ):
        assert rows[what, measure]["measured"] == rows[what, measure]["paper"] == pytest.approx(headline, abs=0.005)
    lacking = [cell for cell in found if (cell["model"], cell["measure"]) != ("ALBERT", "training")]
    rows = {(row["what"], row["measure"]): row["measured"] for row in bench.efficiency_ratios(lacking, 4096)[::2]}
    assert rows[mean, "training"] is None


def test_efficiency_accumulates_what_does_not_fit_and_goes_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    small_peers(monkeypatch)
    run = bench.Contender.run

    def scarce(self, rows, **labels):
        most = 0 if "T" not in self.model.config.pattern else 2 if "M" in self.model.config.pattern else 8
        if len(rows) > most:
            raise torch.OutOfMemoryError
        return run(self, rows, **labels)

    monkeypatch.setattr(bench.Contender, "run", scarce)
    flags = ["--device", "cpu", "--lengths", "8", "--batch-size", "8", "--seconds", "0.1"]
    bench.main(["efficiency", *flags, "--models", "MaBERT", "T12", "M12", "--out", str(tmp_path / "efficiency")])
    text = capsys.readouterr().out
    assert re.search(r"\| MaBERT \| \S+ \| [\d.]+ \(4 × 2 rows\) \|", text)
    assert len(re.findall(r"\| T12 \| \S+ \| [\d.]+ \|\n", text)) == 3
    assert len(re.findall(r"\| M12 \| \S+ \| – \(out of memory\) \|\n", text)) == 3

    torch.manual_seed(0)  # accumulation changes nothing but the time
    model, steps = bench.build("MaBERT", 8), []
    for micro in (8, 2):
        steps.append(bench.Contender(model, torch.optim.SGD(model.parameters(), lr=0.0), bench.Setting(), 8, 8))
        steps[-1].rows, steps[-1].micro_batch_size = steps[0].rows, micro
    grads = []
    for contender in steps:
        monkeypatch.setattr(contender.optimizer, "step", lambda: grads.append([p.grad for p in model.parameters()]))
        monkeypatch.setattr(contender, "run", types.MethodType(run, contender))
        assert contender.step()
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_efficiency_takes_the_fastest_setting(monkeypatch, capsys):
    small_peers(monkeypatch)

    def compiled(model, **options):
        assert options["mode"] == "default"
        if model.config.pattern == "TT":
            raise_error = RuntimeError("no such graph\nand more")
            return lambda **inputs: (_ for _ in ()).throw(raise_error)
        return lambda input_ids, **inputs: model(input_ids[:, :1], labels=inputs.get("labels"))

    monkeypatch.setattr(torch, "compile", compiled)
    flags = ["efficiency", "--device", "cpu", "--lengths", "256", "--seconds", "0.1", "--models", "MaBERT", "T12"]
    bench.main([*flags, "--fastest"])
    out, errors = capsys.readouterr()
    assert len(re.findall(r"\| MaBERT \| \S+ \| [\d.]+ \(compile default\) \|\n", out)) == 2 and "B5" not in out
    assert len(re.findall(r"\| T12 \| \S+ \| [\d.]+ \(plain\) \|\n", out)) == 2
    assert "T12, compile default, 256 tokens: no latency: no such graph\n" in errors
    bench.main([*flags[:-1], "--compile"])
    assert "torch.compile on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--flash", "--device", "cpu"], "--flash is for a GPU"),
        (["--fastest", "--compile"], "--fastest tries"),
        (["--models", "GPT"], "invalid choice: 'GPT'"),
        (["--lengths", "0"], "0 is less than 1"),
        (["--out", "results/", "--device", "cpu"], "must be the beginning of file names"),
        (["--out", "nowhere/efficiency", "--device", "cpu"], "in a folder that exists"),
        pytest.param(
            *(["--device", "cuda"], "sees no GPU"), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
    ],
)
def test_efficiency_refuses_what_it_cannot_do(flags, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        bench.main(["efficiency", *flags])
    assert said in str(refused.value) + capsys.readouterr().err


def test_efficiency_compiles_every_model_and_never_falls_back(monkeypatch):
    small_peers(monkeypatch)
    monkeypatch.setattr(bench, "OURS", bench.OURS | {"T24": vars(tiny("TTT")), "M24": vars(tiny("MMM"))})
    compile, graphs = torch.compile, []

    def compiled(model, **options):
        return compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph, dynamic=False)

    monkeypatch.setattr(torch, "compile", compiled)
    args = argparse.Namespace(models=list(bench.OURS), settings=[bench.Setting(compile=mode) for mode in "ab"])
    vars(args).update(device="cpu", batch_size=2, warm_up=1, runs=3, seconds=0.0)
    cells = bench.measure_times(8, args)  # five models of one class, two settings, inference and training: 20 graphs
    assert all(cell["value"] for cell in cells) and len(graphs) >= 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("flag", [None, "--fastest"])
def test_efficiency_on_a_gpu(tmp_path, monkeypatch, flag):
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package)
    small_peers(monkeypatch)
    flags = ["--lengths", "128", "--batch-size", "4", "--seconds", "0.1", "--out", str(tmp_path / "efficiency")]
    bench.main(["efficiency", *flags, *([flag] if flag else []), "--models", *bench.MODELS])
    found = json.loads((tmp_path / "efficiency.json").read_text())
    assert "driver" in found and all(cell["value"] for cell in found["cells"])


def test_reasons_of_failure():
    assert bench.reason(torch.OutOfMemoryError("CUDA out of memory")) == "out of memory"
    assert bench.reason(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")) == "out of memory"
    assert bench.reason(subprocess.CalledProcessError(-signal.SIGKILL, "python")) == "out of memory"
    assert bench.reason(RuntimeError("invalid configuration\nmore")) == "invalid configuration"


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_efficiency_says_what_to_install(package, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(SystemExit, match=rf"{package}: pip install -e \"\.\[bench\]\""):
        bench.main(["efficiency", "--device", "cpu", "--out", str(tmp_path / "efficiency")])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["drift", "--pads", "-1"], "-1 is less than 0"),
        (["scan", "--sizes", "1,2,3"], "1,2,3 is not B,L,D,N"),
        (["patterns", "--data", "nowhere.txt"], "--data: nowhere.txt does not exist"),
        (["patterns", "--patterns", "MT", "mmt"], "pattern is 'mmt'; it must be a string of the letters"),
        (
            ["patterns", "--data", "short.txt", "--patterns", "M", "--steps", "3", "--out", "runs"],
            "runs/M-seed0: train_mlm",
        ),
    ],
)
def test_benchmarks_refuse_bad_input(flags, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("a few words")
    with pytest.raises(SystemExit) as refused:
        bench.main(flags)
    assert said in str(refused.value) + capsys.readouterr().err and str(refused.value).count("\n") == 0


def test_bench_scan(capsys):
    bench.main(["scan", "--sizes", "1,30,8,4", "--runs", "1"])
    printed = capsys.readouterr().out
    assert "| (1, 30, 8, 4) | loop | " in printed and "| (1, 30, 8, 4) | plain | " in printed
