"""MaBERT in one file: a BERT-sized masked-language-model encoder of Mamba and Transformer layers.

Paper: "MaBERT: A Padding-Safe Interleaved Transformer–Mamba Hybrid Encoder for Efficient
Extended-Context Masked Language Modeling", Kim and Park, 2026, arXiv:2603.03001. This is not the
authors' code. Equation numbers are the paper's. Our copy of the paper has its prose but not its
formulas: the formulas below, and which of Eqs. 4–9 belongs to which line of the Mamba core, are
reconstructed from the prose.

What is particular about the model:
- The pattern of layers is a string, "MMT" four times. M is a Mamba layer: a state is carried along
  the sequence from left to right, at a cost linear in its length. T is a Transformer layer: every
  token sees every other. Two letters are ours: W is M from right to left, H is half an M and half a
  T side by side.
- Padding-safe masking (PSM): with all three stages of it, the pads of a batch do not change the
  output at real tokens, up to rounding. The paper has the stages "pre" and "post"; they leave a
  leak, which our stage "scan" closes.
- Mask-aware attention pooling (MAP) feeds the classifier.

    model = MaBERTForMaskedLM(MaBERTConfig())
    loss, logits = model(input_ids, attention_mask, labels=labels)

A row is a sequence of the batch. A mask is True at real tokens and False at pads. Letters in the
comments on shapes, and the fields of the config that set them:
    b  batch                        n  numbers in a channel's state (its "states"), d_state (16)
    l  sequence length              r  rank of Δ, dt_rank (⌈h / 16⌉)
    h  hidden size (768)            k  width of the convolution, d_conv (4)
    d  inner width of the Mamba mixer, also called its channels, expand * h (1536)
A, B, C, D are the parameters of the state-space model, Δ is its step size, u its input, s its state
(the paper's h) and z its gate. `rho` is what Δ is projected from; `delta`, an argument of the scan,
is Δ before bias and softplus, as in mamba-ssm. (q, k and v of attention are its own.)

Map of the file:
    Part I, the model       MaBERTConfig · MambaMixer, MambaLayer · SelfAttention, TransformerLayer
                            · HybridLayer · MaBERT · Pooling · the two models with a head
    Part II, the scan       the formula · reference_scan · selective_scan and short_convolution,
                            which the model calls · how they are made fast: a loop for the CPU,
                            Triton kernels for the GPU
    Part III, the rest      checks of arguments · saving and loading · the command
                            python mabert.py FOLDER "text with a [MASK]"
"""

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import math
import re
import shutil
import sys
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for this machine: the loop does not need it
    triton = None
    tl = SimpleNamespace(constexpr=float)  # enough for the definitions of the kernels below

logger = logging.getLogger("mabert")

# ====================================== Part I: the model ======================================

PSM_STAGES = ("pre", "scan", "post")  # see MambaLayer
POOLINGS = ("map", "attn", "cls", "mean")  # see Pooling
SCAN_BACKENDS = (None, "loop", "triton")  # see selective_scan


@dataclasses.dataclass
class MaBERTConfig:
    """Sizes and variants of a MaBERT model.

    The defaults are the paper's where it gives them (psm adds a stage), else BERT's and Mamba's. A
    wrong value raises a ValueError that names the field, its value and what is allowed.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    pattern: str = "MMTMMTMMTMMT"  # a letter for each layer, see LAYERS
    num_heads: int = 12
    intermediate_size: int = 3072
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None  # rank of Δ; None means ⌈hidden_size / 16⌉
    causal_conv: bool = False  # True: the convolution looks back only, as Mamba's; False: centred
    max_position: int = 512  # the most real tokens in a row; MaBERT.resize_positions changes it
    type_vocab_size: int = 2
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5  # Mamba's; with BERT's 1e-12, 1 / √eps overflows in float16
    pad_token_id: int = 0
    psm: tuple[str, ...] = PSM_STAGES  # stages of padding-safe masking; the paper: "pre" and "post"
    pooling: str = "map"  # what the classifier reads: "map", "attn", "cls" or "mean"
    num_labels: int = 2  # classes of the classifier; 1 means regression
    scan_backend: str | None = None  # passed to selective_scan and short_convolution

    def __post_init__(self):
        check_config(self)
        # JSON gives a list: back to a tuple, in order, each stage once
        self.psm = tuple(stage for stage in PSM_STAGES if stage in self.psm)


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer with BERT's initialisation: weights normal(0, 0.02), biases 0."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def layer_norm(config: MaBERTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def feed_forward(config: MaBERTConfig) -> nn.Sequential:
    """BERT's feed-forward network with its exact GELU: (b, l, h) -> (b, l, h)."""
    return nn.Sequential(
        linear(config.hidden_size, config.intermediate_size),
        nn.GELU(),
        linear(config.intermediate_size, config.hidden_size),
    )


class MambaMixer(nn.Module):
    """The mixer of a Mamba layer (Eqs. 4–9), the block of Mamba 1: x (b, l, h) -> (b, l, h).

    Projections, a short convolution and the selective scan. With a mask (b, l), of dtype bool, the
    state of the scan passes through pads unchanged.
    """

    def __init__(self, config: MaBERTConfig):
        super().__init__()
        h = config.hidden_size
        n = config.d_state
        k = config.d_conv
        d = config.expand * h
        r = config.dt_rank or math.ceil(h / 16)
        self.backend = config.scan_backend

        # projections and the convolution
        self.in_proj = linear(h, 2 * d, bias=False)
        self.conv1d = nn.Conv1d(d, d, k, groups=d)  # a container: short_convolution does the work
        # how many tokens to the left the convolution sees; centred, k = 4 sees one, and two right
        self.conv_left = k - 1 if config.causal_conv else (k - 1) // 2
        self.x_proj = linear(d, r + 2 * n, bias=False)
        self.rho_B_C_sizes = (r, n, n)
        self.out_proj = linear(d, h, bias=False)

        # Δ: at first softplus(bias) is log-uniform in [0.001, 0.1], as in Mamba. nn.Linear is only
        # a container, as the scan adds the bias; PyTorch's initial weights, U(±1/√r), are Mamba's.
        self.dt_proj = nn.Linear(r, d)
        dt = torch.exp(torch.empty(d).uniform_(math.log(0.001), math.log(0.1)))  # Δ
        softplus_inverse = dt + torch.log(-torch.expm1(-dt))
        self.dt_proj.bias = nn.Parameter(softplus_inverse)

        # A and D, as in Mamba: −A is 1, 2, …, n in every channel
        self.A_log = nn.Parameter(torch.arange(1, n + 1).log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # Eq. 4: (b, l, d), (b, l, d)

        taps = self.conv1d.weight[:, 0]  # (d, k)
        # Eq. 5: SiLU(convolution)
        u = short_convolution(u, taps, self.conv1d.bias, self.conv_left, self.backend)

        # Eq. 6: (b, l, r), (b, l, n), (b, l, n)
        rho, B, C = self.x_proj(u).split(self.rho_B_C_sizes, dim=-1)
        delta = F.linear(rho, self.dt_proj.weight)  # Eq. 7: (b, l, d); bias, softplus: in the scan
        A = -torch.exp(self.A_log)  # (d, n)

        # Eq. 8, with D u and the gate SiLU(z), in one fused call
        options = dict(delta_softplus=True, mask=mask, backend=self.backend)
        y = selective_scan(u, delta, A, B, C, self.D, z, self.dt_proj.bias, **options)  # (b, l, d)
        return self.out_proj(y)  # Eq. 9: (b, l, h)


class MambaLayer(nn.Module):
    """A pre-LN Mamba layer with padding-safe masking (Eqs. 2 and 3; Eq. 10 for one token).

    x (b, l, h), mask (b, l) of dtype bool or None -> (b, l, h). config.psm selects any of three
    stages:
    - pre:  the mixer's input is zero at pads, so that the convolution sees there what it sees
            beyond the ends of a row;
    - scan: at pads Δ = 0, so that exp(Δ A) = 1 and nothing is added to the state, which passes
            through unchanged. Zeros as input are not enough: the convolution's bias makes u, B and
            Δ non-zero at pads;
    - post: the layer's output is zero at pads, residual path and feed-forward included.

    A mirrored layer (letter W) reads the row from right to left, by flipping it.
    """

    def __init__(self, config: MaBERTConfig, mirrored: bool = False):
        super().__init__()
        self.psm = config.psm
        self.mirrored = mirrored
        self.norm1 = layer_norm(config)
        self.mixer = MambaMixer(config)
        self.norm2 = layer_norm(config)
        self.ffn = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        # Eq. 2: the mixer and the residual
        mixer_input = self.zero_pads("pre", self.norm1(x), mask)
        x = x + self.dropout(self.mix(mixer_input, mask))

        # Eq. 3: the feed-forward network and the residual
        x = x + self.dropout(self.ffn(self.norm2(x)))
        return self.zero_pads("post", x, mask)

    def zero_pads(self, stage: str, x: Tensor, mask: Tensor | None) -> Tensor:
        """x with zeros at pads, if there is a mask and the config has this stage."""
        if mask is None or stage not in self.psm:
            return x
        return x * mask[..., None]

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mixer, which lets tokens see each other. HybridLayer adds attention to it."""
        if "scan" not in self.psm:
            mask = None
        if not self.mirrored:
            return self.mixer(x, mask)
        if mask is not None:
            mask = mask.flip(1)
        return self.mixer(x.flip(1), mask).flip(1)


class SelfAttention(nn.Module):
    """Bidirectional multi-head self-attention, in which pads get no weight as keys.

    x (b, l, h), mask (b, l) of dtype bool or None -> (b, l, h). `heads`: use this many heads, each
    as wide as usual, instead of config.num_heads.
    """

    def __init__(self, config: MaBERTConfig, heads: int | None = None):
        super().__init__()
        self.heads = heads or config.num_heads
        self.dropout = config.dropout
        inner = config.hidden_size // config.num_heads * self.heads
        self.qkv = linear(config.hidden_size, 3 * inner)
        self.out_proj = linear(inner, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (b, l, 3, heads, width)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (b, heads, l, width)

        if mask is not None:
            # With a real token in the row, any() is True and the mask stays. In a row of pads alone
            # it is False, and all pads attend to each other: a softmax over nothing may be NaN.
            mask = mask == mask.any(dim=-1, keepdim=True)
            mask = mask[:, None, None]  # (b, 1, 1, l)

        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """A pre-LN Transformer layer (Eq. 1): x (b, l, h), mask (b, l) or None -> (b, l, h).

    Its output at pads is not zeroed: attention gives pads no weight as keys, and the next Mamba
    layer zeroes its own input (stage pre).
    """

    def __init__(self, config: MaBERTConfig):
        super().__init__()
        self.norm1 = layer_norm(config)
        self.attention = SelfAttention(config)
        self.norm2 = layer_norm(config)
        self.ffn = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        return x + self.dropout(self.ffn(self.norm2(x)))


class HybridLayer(MambaLayer):
    """Half a Mamba layer and half a Transformer layer side by side, with MambaLayer's masking.

    x (b, l, h), mask (b, l) or None -> (b, l, h). Half of the config's inner width and half of its
    heads read the same input, normalised and masked (stage pre). Their outputs are normalised and
    averaged, as in Hymba (arXiv 2411.13676). The norms' gain begins at 0.1, so that the layer adds
    to x about as much as the others do.
    """

    def __init__(self, config: MaBERTConfig):
        # pattern M, since the check would refuse an H whose half of expand is odd
        half = dataclasses.replace(config, pattern="M", expand=config.expand // 2)
        super().__init__(half)
        self.attention = SelfAttention(config, heads=config.num_heads // 2)
        self.norms = nn.ModuleList([layer_norm(config), layer_norm(config)])
        for norm in self.norms:
            nn.init.constant_(norm.weight, 0.1)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        attended = self.norms[0](self.attention(x, mask))
        scanned = self.norms[1](super().mix(x, mask))
        return (attended + scanned) / 2


LAYERS = {  # the letters of config.pattern
    "M": MambaLayer,
    "W": functools.partial(MambaLayer, mirrored=True),
    "H": HybridLayer,
    "T": TransformerLayer,
}


class PretrainedModel(nn.Module):
    """A model with a config that can be saved in a folder and read from it; Part III says how."""

    def save_pretrained(self, folder: str | Path):
        """Writes config.json and model.pt into a folder, which is made if it is not there."""
        save_model(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides):
        """A model of this class from a folder that save_pretrained wrote: see `load_model`."""
        return load_model(cls, Path(folder), overrides)


class MaBERT(PretrainedModel):
    """The encoder: embeddings, the layers that config.pattern spells, a final LayerNorm.

    forward(input_ids, attention_mask=None, token_type_ids=None) -> hidden states (b, l, h)
    - input_ids, token_type_ids: int64 or int32 (b, l); the types are 0 where they are not given
    - attention_mask: (b, l), bool or 0/1 of any dtype, 1 at real tokens; None means all are real

    Positions count real tokens only, so that padding on either side changes none of them. Hidden
    states at pads mean nothing. The padded length of a row may exceed max_position, the number of
    its real tokens may not. Raises ValueError for wrong types and shapes; for too many real tokens
    (not counted under torch.compile if there is a mask); and for wrong values of ids or masks
    (looked at on a CPU, outside torch.compile).
    """

    def __init__(self, config: MaBERTConfig):
        super().__init__()
        if not isinstance(config, MaBERTConfig):
            value = textwrap.shorten(repr(config), 100)
            raise ValueError(f"config is {value}; it must be a MaBERTConfig")
        self.config = dataclasses.replace(config)  # a copy, since resize_positions changes it

        # embeddings, normal(0, 0.02) as in BERT; the pad's is zero
        h = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, h, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position, h)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, h)
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(table.weight, std=0.02)
        self.word_embeddings.weight.data[config.pad_token_id] = 0
        self.embedding_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.dropout)

        # layers
        self.layers = nn.ModuleList(LAYERS[letter](config) for letter in config.pattern)
        self.final_norm = layer_norm(config)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None) -> Tensor:
        check_ids(self.config, input_ids, token_type_ids)
        mask = as_mask("attention_mask", attention_mask, input_ids.shape)  # bool or None
        check_length(self.config, input_ids, mask)

        # positions of the real tokens: 0, 1, 2, …
        if mask is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, l)
        else:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)  # (b, l)

        # embeddings; without token types all tokens are of type 0
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]  # (h,)
        else:
            types = self.token_type_embeddings(token_type_ids)  # (b, l, h)
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions) + types
        x = self.dropout(self.embedding_norm(x))  # (b, l, h)

        # layers
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x)

    @torch.no_grad()
    def resize_positions(self, max_position: int):
        """Stretches the table of positions to max_position of them by linear interpolation.

        The first and the last keep their vectors (if there are at least two). The table is a new
        parameter: make an optimizer afterwards. Raises ValueError if max_position is not a positive
        integer.
        """
        config = dataclasses.replace(self.config, max_position=max_position)  # checks the value
        table = self.position_embeddings.weight  # (old, h)
        stretched = F.interpolate(
            table.T[None],  # (1, h, old)
            size=max_position,
            mode="linear",
            align_corners=True,
        )
        weight = stretched[0].T.contiguous()  # (max_position, h)
        frozen = not table.requires_grad
        self.position_embeddings = nn.Embedding.from_pretrained(weight, freeze=frozen)
        self.config.max_position = config.max_position


class Pooling(nn.Module):
    """One vector for each row: x (b, l, h), mask (b, l) or None -> (b, h).

    - map:  mask-aware attention pooling (Eqs. 11–13): a learned score for each token, a softmax
            over the real tokens, then the weighted sum
    - attn: the same without the mask, so that pads get weight too (one of the paper's variants)
    - cls:  the first real token
    - mean: the mean of the real tokens
    A row that is all padding pools to zero, whatever the kind.
    """

    def __init__(self, config: MaBERTConfig):
        super().__init__()
        self.kind = config.pooling
        if self.kind in ("map", "attn"):
            # without Eq. 11's bias, which cancels in the softmax
            self.score = linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        check("x", x, "floating-point", ("batch", "length", "hidden_size"))
        mask = as_mask("mask", mask, x.shape[:2])
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        weights = self.weights(x, mask)  # (b, l)
        weights = weights * mask.any(dim=-1, keepdim=True)  # zero in a row that is all padding
        return (weights[..., None] * x).sum(dim=1)  # Eq. 13

    def weights(self, x: Tensor, mask: Tensor) -> Tensor:
        """The weight of each token, (b, l)."""
        if self.kind == "cls":
            first = mask.int().argmax(dim=-1)  # (b,)
            return F.one_hot(first, mask.shape[1]).to(x.dtype)
        if self.kind == "mean":
            count = mask.sum(dim=-1, keepdim=True).clamp(min=1)
            return mask / count.to(x.dtype)

        scores = self.score(x).squeeze(-1)  # Eq. 11
        if self.kind == "map":
            # Eq. 12, with the lowest finite number: −∞ would make a row that is all padding NaN
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1)


class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor


IGNORED_LABEL = -100  # PyTorch's value for a place where there is nothing to predict
# On these devices the product with the vocabulary takes a multiple of so many words: rows of
# 16-byte multiples suit a GPU's tensor cores. nanoGPT rounds its vocabulary for the same reason.
VOCAB_MULTIPLE = {"cuda": 64}


class MaBERTForMaskedLM(PretrainedModel):
    """The encoder with BERT's masked-language-model head, tied to the word embeddings.

    forward(input_ids, attention_mask=None, token_type_ids=None, labels=None, reduction="mean")
    -> Output(loss, logits)
    - without labels: the loss is None, logits are (b, l, vocab)
    - labels: int64 or int32 (b, l), -100 where there is nothing to predict. The projection to the
      vocabulary then runs on the labelled positions alone: logits are (labelled, vocab), in
      row-major order. With a model on a GPU, leave labels on the CPU: they are counted there, so
      that the CPU need not wait for the GPU.
    - loss: the mean cross-entropy over the labelled positions in nats, 0 where there are none; or
      with reduction="sum" their sum.
    """

    def __init__(self, config: MaBERTConfig):
        super().__init__()
        self.encoder = MaBERT(config)
        self.config = self.encoder.config
        h = config.hidden_size
        self.transform = nn.Sequential(linear(h, h), nn.GELU(), layer_norm(config))
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self, input_ids, attention_mask=None, token_type_ids=None, labels=None, reduction="mean"
    ) -> Output:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
        x = self.encoder(input_ids, attention_mask, token_type_ids)  # (b, l, h)
        if labels is None:
            return Output(None, self.predict(x))

        # the labelled positions
        allowed = dict(below=self.config.vocab_size, also=IGNORED_LABEL)
        check("labels", labels, "int64 or int32", x.shape[:2], **allowed)
        labels = labels.flatten()
        places = (labels != IGNORED_LABEL).nonzero().squeeze(1)  # (labelled,)
        labels = labels[places].long().to(x.device, non_blocking=True)
        places = places.to(x.device, non_blocking=True)
        x = x.flatten(0, 1).index_select(0, places)  # (labelled, h)

        loss, logits = self.loss_and_logits(x, labels)
        if reduction == "mean":
            loss = loss / max(1, labels.numel())
        return Output(loss, logits)

    def predict(self, x: Tensor) -> Tensor:
        """Hidden states (..., h) -> logits over the vocabulary (..., vocab)."""
        words = self.encoder.word_embeddings.weight  # (vocab, h)
        bias = self.decoder_bias
        vocab = words.shape[0]

        # up to the next multiple, add words of zeros, and cut off their logits
        extra = -vocab % VOCAB_MULTIPLE.get(x.device.type, 1)
        if extra:
            words = F.pad(words, (0, 0, 0, extra))
            bias = F.pad(bias, (0, extra))
        return F.linear(self.transform(x), words, bias)[..., :vocab]

    def loss_and_logits(self, x: Tensor, labels: Tensor) -> Output:
        """Hidden states and labels (labelled, h), (labelled,) -> the summed loss, and the logits.

        The loss is in float32 at least. Compiled, as in train_mlm.py, this function keeps no
        float32 copy of the logits in memory.
        """
        logits = self.predict(x)  # (labelled, vocab)
        return Output(F.cross_entropy(in_float32(logits), labels, reduction="sum"), logits)


class MaBERTForSequenceClassification(PretrainedModel):
    """The encoder with pooling and a linear classifier (Eq. 14).

    forward(input_ids, attention_mask=None, token_type_ids=None, labels=None)
    -> Output(loss, logits (b, num_labels))
    - labels: classes, int64 or int32 (b,); the loss is the mean cross-entropy in nats, over the
      rows whose label is not -100
    - with num_labels=1: real numbers of any dtype (b,); the loss is the mean squared error
    """

    def __init__(self, config: MaBERTConfig):
        super().__init__()
        self.encoder = MaBERT(config)
        self.config = self.encoder.config
        self.pooling = Pooling(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None) -> Output:
        x = self.encoder(input_ids, attention_mask, token_type_ids)  # (b, l, h)
        pooled = self.pooling(x, attention_mask)  # (b, h)
        logits = self.classifier(self.dropout(pooled))  # Eq. 14: (b, num_labels)
        if labels is None:
            return Output(None, logits)

        # the loss, in float32 at least
        predicted = in_float32(logits)

        # regression
        if self.config.num_labels == 1:
            check("labels", labels, "not complex", x.shape[:1])
            loss = F.mse_loss(predicted.squeeze(-1), labels.to(predicted.dtype))
            return Output(loss, logits)

        # classes; cross_entropy's own mean would be NaN where no row has a label
        allowed = dict(below=self.config.num_labels, also=IGNORED_LABEL)
        check("labels", labels, "int64 or int32", x.shape[:1], **allowed)
        loss = F.cross_entropy(predicted, labels.long(), reduction="sum")
        labelled = (labels != IGNORED_LABEL).sum().clamp(min=1)
        return Output(loss / labelled, logits)


def in_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ============================ Part II: the masked selective scan ===============================
#
# What to read: the formula and `reference_scan`. `selective_scan` and `short_convolution`, the two
# functions that the model calls, come next. Everything after that, a loop and the kernels, computes
# the same numbers faster, and is for those who want to change the fast versions.
#
# The formula, for one row and one channel, whose state s_t is n numbers, as are A, B_t and C_t.
# m_t is the mask, 1 at real tokens and 0 at pads:
#
#     Δ_t = m_t · softplus(delta_t + delta_bias)
#     s_t = exp(Δ_t A) s_{t−1} + Δ_t u_t B_t           s_{−1} = 0
#     v_t = Σ_n C_t s_t + D u_t
#     y_t = m_t · SiLU(z_t) · v_t
#
# At a pad Δ_t = 0, so that s_t = exp(0) s_{t−1} + 0: the state passes through. The softplus is
# applied only if delta_softplus is true.


def reference_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, mask=None
):
    """The formula, one step at a time, in plain PyTorch: on any device, with autograd, and slow.

    Arguments and result are those of `selective_scan`, below, without backend.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    mask = as_mask("mask", mask, u.shape[:2])
    out_dtype = u.dtype
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    mask = 1 if mask is None else mask[..., None]  # (b, l, 1)

    # Δ, which is called dt
    raw = delta if delta_bias is None else delta + delta_bias.to(dtype)
    dt = mask * (F.softplus(raw) if delta_softplus else raw)  # (b, l, d)

    # the recurrence
    dt_u = dt * u
    state = 0
    sums = []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)  # (b, d, n)
        state = decay * state + dt_u[:, t, :, None] * B[:, t, None]  # (b, d, n)
        sums.append((state * C[:, t, None]).sum(dim=-1))  # (b, d)

    # D, the gate and the mask
    v = torch.stack(sums, dim=1)  # (b, l, d)
    if D is not None:
        v = v + D.to(dtype) * u
    gate = 1 if z is None else F.silu(z.to(dtype))
    return (mask * gate * v).to(out_dtype)


def selective_scan(
    u, delta, A, B, C, D=None, z=None,
    delta_bias=None, delta_softplus=False, mask=None, backend=None,
) -> Tensor:  # fmt: skip
    """The masked selective scan, the formula above: u, delta, A, B, C, … -> y (b, l, d).

    The names are those of mamba-ssm's selective_scan_fn, the layout has channels last.
    - u, delta, z: (b, l, d). A: (d, n), negative. B, C: (b, l, n). D, delta_bias: (d,).
      D, z and delta_bias may be None: no term D u, no gate, no bias.
      Floating-point numbers of any kind, and finite, also at pads; y has the dtype of u. The
      arithmetic is in float32, or in float64 where u is float64.
    - mask: (b, l), bool or 0/1. At a pad (0) the state passes through, y is 0, and so are the
      gradients of u, delta, B, C and z. None means that all tokens are real.
    - backend: "triton" (needs a GPU; no float64), "loop", or None: Triton for a u on a GPU
      where it can run, else the loop.

    Raises ValueError for arguments that do not fit (values of the mask are looked at on a CPU
    only), RuntimeError for a backend that cannot run. There are no gradients of gradients.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    mask = as_mask("mask", mask, u.shape[:2])
    d, n = A.shape
    D = A.new_zeros(d) if D is None else D
    bias = A.new_zeros(d) if delta_bias is None else delta_bias

    # states are kept for the backward pass, if there will be one
    keep = needs_gradients(u, delta, A, B, C, D, z, bias)

    if not use_triton(u, backend):
        options = (mask, delta_softplus, LOOP_CHUNK, keep, u.dtype)
        y, _ = _scan_loop(u, delta, A, B, C, D, z, bias, *options)
        return y

    # The kernels take 16 states at most. With more, y is a sum over groups of 16 in float32:
    # SiLU(z) gates each part, and D joins the first.
    out_dtype = u.dtype if n <= MAX_STATES else torch.float32
    options = (mask, delta_softplus, _chunk_length(n), keep, out_dtype)
    # autograd and torch.compile need the custom op; its plain function takes the CPU less time
    scan = _scan_triton if keep or torch.compiler.is_compiling() else _scan_forward
    y = 0
    for i in range(0, n, MAX_STATES):
        group = slice(i, i + MAX_STATES)
        A_B_C = (A[:, group], B[..., group], C[..., group])
        part, _ = scan(u, delta, *A_B_C, D if i == 0 else torch.zeros_like(D), z, bias, *options)
        y = part if i == 0 else y + part
    return y.to(u.dtype)


def short_convolution(
    u: Tensor, weight: Tensor, bias: Tensor, left: int, backend: str | None = None
) -> Tensor:
    """SiLU of a depthwise convolution over time: u (b, l, d) -> (b, l, d).

    weight (d, k), bias (d,). A token sees the `left` tokens before it and the k − 1 − left after
    it, and zeros beyond the ends of a row. backend: as in `selective_scan`; "loop" means PyTorch's
    own convolution, which on a GPU goes through memory several times, to pad, transpose and copy.
    """
    if use_triton(u, backend):
        # the custom op or its plain function, as in `selective_scan`
        if needs_gradients(u, weight, bias) or torch.compiler.is_compiling():
            return _conv_triton(u, weight, bias, left)
        return _convolution_forward(u, weight, bias, left)
    right = weight.shape[1] - 1 - left
    u = F.pad(u, (0, 0, left, right)).transpose(1, 2)  # (b, d, l + k - 1)
    # on a CPU PyTorch's two-dimensional convolution reads this layout as it is
    y = F.conv2d(u[:, :, None], weight[:, None, None], bias, groups=bias.shape[0])  # (b, d, 1, l)
    return F.silu(y)[:, :, 0].transpose(1, 2)


def use_triton(u: Tensor, backend: str | None) -> bool:
    """Whether the kernels run, or the loop, for u, the input of the scan or of the convolution."""
    if backend not in SCAN_BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {SCAN_BACKENDS}")
    on_device = u.is_cuda or INTERPRETED
    can_run = triton is not None and on_device and u.dtype != torch.float64
    if backend == "triton" and not can_run:
        if triton:
            dtype = str(u.dtype).removeprefix("torch.")
            reason = "it needs a GPU (or TRITON_INTERPRET=1), and not float64; "
            reason += f"u is {dtype} on {u.device}"
        else:
            reason = "the package triton is not installed"
        raise RuntimeError(
            f"backend='triton' cannot run here (backend='loop' or None can): {reason}"
        )
    return backend == "triton" or (backend is None and u.is_cuda and can_run)


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of one of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# ---- The gradients ----
#
# dx is the gradient of the loss with respect to x, for any x (but dt, below, is Δ). Time runs
# backwards, and q plays the part that the state plays forward:
#
#     dv_t = m_t SiLU(z_t) dy_t                        dz_t = m_t SiLU'(z_t) v_t dy_t
#     g_t  = C_t dv_t + q_{t+1}                        g is ds, with all later steps in it
#     q_t  = exp(Δ_t A) g_t                            what step t hands to step t − 1
#
#     dC_t = Σ_d dv_t s_t                              dB_t = Σ_d g_t Δ_t u_t
#     d(Δu)_t = Σ_n g_t B_t                            du_t = Δ_t d(Δu)_t + D dv_t
#     w_t  = q_t s_{t−1}                               dA = Σ_{b,t} Δ_t w_t
#     dΔ_t = Σ_n A w_t + u_t d(Δu)_t                   dD = Σ_{b,t} u_t dv_t
#     ddelta_t = m_t softplus'(delta_t + delta_bias) dΔ_t
#     ddelta_bias = Σ_{b,t} ddelta_t
#
# Names in the fast versions, below: `delta` is the argument, `raw` has the bias added, `dt` is Δ,
# after softplus and mask, and A2 is log2(e) A, as exp2 is faster than exp on a CPU and on a GPU.


# ---- A loop, for the CPU ----
#
# Two custom ops, forward and backward, compute the whole formula for a few rows and a chunk of
# steps at a time, so that all intermediate values stay in the caches of a core. Forward, the state
# before each chunk is kept. Backward, chunks are taken from the right; each is replayed from the
# state before it, and then traversed from its end. (What autograd and torch.compile need to know of
# the ops comes after the kernels, for both scans.)

# The namespace of our custom ops, which the whole process shares: this module's name, with _ for
# all that is no letter or digit. So two copies of this file can be imported side by side.
NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)

LOOP_CHUNK = 16  # steps; with n = 16 the kept states are then as many numbers as u
LOOP_BUFFER = 2**19  # numbers in a buffer, for each thread: 2 MB; the backward pass has three


def _row_groups(u, A, chunk):
    """Slices of the batch whose buffers fit the caches; one slice on a GPU, where launches cost."""
    b = u.shape[0]
    if u.is_cuda:
        size = b
    else:
        size = LOOP_BUFFER * torch.get_num_threads() // (chunk * A.numel())
    size = max(1, size)
    return [slice(i, min(i + size, b)) for i in range(0, b, size)]


def _chunks(rows, chunk, *tensors):
    """The chunks of these rows in order: for each, a view of each tensor (b, l, …).

    A view has time first, (steps, rows, …), as the buffers have. None gives None.
    """
    views = []
    for x in tensors:
        if x is None:
            views.append(itertools.repeat(None))
        else:
            views.append(x[rows].transpose(0, 1).split(chunk))
    return list(zip(*views))


def _chunk_states(buffers, u, delta, A2, B, bias, mask, state, softplus):
    """The forward recurrence over a chunk.

    u, delta (steps, rows, d); A2 (n, d); B (steps, rows, n); bias (d,); mask (steps, rows) or None;
    state (rows, n, d), the one before the chunk. The first two of `buffers`, each
    (chunk + 1, rows, n, d), take results.
    Returns Δ (steps, rows, d), the decays exp(Δ A) (steps, rows, n, d), and the states before the
    chunk and after each step (steps + 1, rows, n, d).
    """
    # Δ
    dt = delta + bias
    if softplus:
        dt = F.softplus(dt)
    if mask is not None:
        dt = dt * mask[..., None]

    # views of the buffers; the state may itself be a view of the first, the last state of the chunk
    # before, so it is copied before anything is written
    steps = u.shape[0]
    states = buffers[0, : steps + 1]
    decays = buffers[1, :steps]
    states[0] = state

    # what each step multiplies the state by, and what it adds
    torch.mul(dt[:, :, None], A2, out=decays).exp2_()
    torch.mul((dt * u)[:, :, None], B[..., None], out=states[1:])

    # the recurrence, in place
    for decay, before, after in zip(decays, states[:-1], states[1:]):
        after.addcmul_(decay, before)
    return dt, decays, states


@torch.library.custom_op(f"{NAMESPACE}::scan_loop", mutates_args=())
def _scan_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
    bias: Tensor, mask: Tensor | None, softplus: bool, chunk: int, keep: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b, l, d) in out_dtype; and if `keep`, the state before each chunk, (b, chunks, n, d)."""
    b, l, d = u.shape
    n = A.shape[1]

    # everything in float32, or in float64 if u is float64
    dtype = torch.promote_types(u.dtype, torch.float32)
    A2 = (A.T.to(dtype) / math.log(2)).contiguous()  # (n, d)
    D = D.to(dtype)
    bias = bias.to(dtype)
    inputs = [None if x is None else x.to(dtype) for x in (u, delta, B, C, z, mask)]
    y = u.new_empty(b, l, d, dtype=out_dtype)
    kept = A2.new_empty(b, _ceil_div(l, chunk) if keep else 0, n, d)

    with torch.autocast(u.device.type, enabled=False):  # else @ would be in half precision
        for rows in _row_groups(u, A2, chunk):
            buffers = A2.new_empty(2, chunk + 1, rows.stop - rows.start, n, d)
            state = torch.zeros_like(buffers[0, 0])
            for i, views in enumerate(_chunks(rows, chunk, y, *inputs)):
                # a trailing underscore: this chunk's view
                y_, u_, delta_, B_, C_, z_, mask_ = views

                # the states of the chunk
                if keep:
                    kept[rows, i] = state
                _, _, states = _chunk_states(
                    buffers, u_, delta_, A2, B_, bias, mask_, state, softplus
                )
                state = states[-1]

                # v = C s + D u, then the gate and the mask
                v = (C_[:, :, None] @ states[1:]).squeeze(2)  # (…, 1, n) @ (…, n, d)
                v.addcmul_(u_, D)
                if z_ is not None:
                    v.mul_(F.silu(z_))
                if mask_ is not None:
                    v.mul_(mask_[..., None])
                y_.copy_(v)
    return y, kept


@torch.library.custom_op(f"{NAMESPACE}::scan_loop_backward", mutates_args=())
def _scan_loop_backward(
    dy: Tensor, kept: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    z: Tensor | None, bias: Tensor, mask: Tensor | None, softplus: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of u, delta, A, B, C, D, z and bias; z's is empty where there is no z."""
    d = u.shape[2]
    n = A.shape[1]

    # everything in float32, or in float64 if u is float64
    dtype = torch.promote_types(u.dtype, torch.float32)
    A_T = A.T.to(dtype).contiguous()  # (n, d)
    A2 = A_T / math.log(2)
    D32 = D.to(dtype)
    bias32 = bias.to(dtype)
    inputs = [None if x is None else x.to(dtype) for x in (dy, u, delta, B, C, z, mask)]

    # the gradients, which the loop fills or adds up
    outputs = [None if x is None else _empty_like(x) for x in (u, delta, B, C, z)]
    dA = torch.zeros_like(A_T)
    dD = torch.zeros_like(D32)
    dbias = torch.zeros_like(bias32)

    with torch.autocast(u.device.type, enabled=False):
        for rows in _row_groups(u, A2, chunk):
            buffers = dA.new_empty(3, chunk + 1, rows.stop - rows.start, n, d)
            q = torch.zeros_like(buffers[0, 0])
            chunks = _chunks(rows, chunk, *inputs, *outputs)
            for i, views in reversed(list(enumerate(chunks))):
                # a trailing underscore: this chunk's view
                dy_, u_, delta_, B_, C_, z_, mask_, du_, ddelta_, dB_, dC_, dz_ = views

                # replay the chunk
                dt, decays, states = _chunk_states(
                    buffers, u_, delta_, A2, B_, bias32, mask_, kept[rows, i], softplus
                )
                after = states[1:]

                # dv and dz, through the mask and the gate
                if mask_ is not None:
                    dy_ = dy_ * mask_[..., None]
                dv = dy_
                if z_ is not None:
                    v = (C_[:, :, None] @ after).squeeze(2).addcmul_(u_, D32)
                    dz_.copy_(torch.ops.aten.silu_backward(v.mul_(dy_), z_))
                    dv = dy_ * F.silu(z_)

                # dC
                dC_.copy_((dv[:, :, None] @ after.mT).squeeze(2))  # (…, 1, d) @ (…, d, n)

                # g and q, step by step from the end; q_t takes the place of the decay
                g = buffers[2, : dv.shape[0]]  # (steps, rows, n, d)
                forward = list(zip(decays, g, C_[..., None], dv[:, :, None]))
                for decay, g_t, C_t, dv_t in reversed(forward):
                    torch.addcmul(q, C_t, dv_t, out=g_t)
                    q = decay.mul_(g_t)
                q = q.clone()  # since w is written over it

                # w takes the place of q
                w = decays.mul_(states[:-1])

                # dB, d(Δu)
                dB_.copy_(((dt * u_)[:, :, None] @ g.mT).squeeze(2))
                d_dt_u = (B_[:, :, None] @ g).squeeze(2)  # (steps, rows, d)

                # dA; g is used up, and its buffer takes the products
                dA += torch.mul(w, dt[:, :, None], out=g).sum(dim=(0, 1))

                # dΔ, then ddelta; A w takes the place of w
                grad = w.mul_(A_T).sum(dim=2).addcmul_(u_, d_dt_u)
                if softplus:
                    grad *= -torch.expm1(-dt)  # the slope of softplus is 1 − exp(−Δ): 0 at pads
                elif mask_ is not None:
                    grad *= mask_[..., None]
                ddelta_.copy_(grad)
                dbias += grad.sum(dim=(0, 1))

                # du, dD; Δ d(Δu) takes the place of d(Δu)
                torch.addcmul(d_dt_u.mul_(dt), dv, D32, out=du_)
                dD += (dv * u_).sum(dim=(0, 1))

    du, ddelta, dB, dC, dz = outputs
    if dz is None:
        dz = u.new_empty(0)
    dA = dA.T.contiguous().to(A.dtype)
    return du, ddelta, dA, dB, dC, dD.to(D.dtype), dz, dbias.to(bias.dtype)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """n rounded up to a power of 2."""
    return 1 << (n - 1).bit_length()


# ---- The same in Triton, for the GPU ----
#
# Triton in brief: kernel[grid](arguments) starts one program for each cell of the grid, which finds
# its cell with tl.program_id. Vectors and tiles are values in registers; their sizes are constexpr,
# known when the kernel is compiled. A tensor arrives as a pointer; pointer + tl.arange(…) is a
# vector of addresses for tl.load and tl.store, whose mask says which of them exist; it has nothing
# to do with padding. tl.static_range is unrolled; tl.range is a loop, with num_stages=1 so that
# Triton does not prefetch: we do. A program here is one warp: 32 threads, also called lanes.
#
# What the kernels do, without the tricks. Each lane has a channel:
#
#     for each row, 32 channels and segment of time, in parallel:  one program
#         states = what the segment starts from                    n vectors (32,)
#         for each tile of 8 steps:
#             load u, delta, z (8, 32); B, C (8, n), mask (8,), which all channels share
#             Δ = mask · softplus(delta + delta_bias)              (8, 32)
#             v = D u                                              (8, 32)
#             for i in 0 … n − 1:
#                 for each of the 8 steps t:
#                     states[i] = exp(Δ[t] A[i]) states[i] + Δ[t] u[t] B[t, i]
#                     v[t] += C[t, i] states[i]
#             store y = mask · SiLU(z) · v
#
# Time is cut in three ways, one inside the other:
#
#     row      0 ─────────────────────────────────────────────────────────────────────────────── l
#     segment  0 ────────────────────────────────────── 1 ──────────────────────────────────────
#     chunk    0 ─────────── 1 ─────────── 2 ────────── 3 ─────────── 4 ─────────── 5 ──────────
#     tile     0 ──── 1 ──── 2 ──── 3 ──── 4 ──── 5 ─── …                  (backward: 4 a chunk)
#     step     · · · · · · · …
#
# - A tile (8 steps forward, 4 backward) is what a program holds in registers at once, so that it
#   waits for memory once a tile, not once a step.
# - A chunk (16 steps) is what the backward pass replays: forward keeps the state before it only,
#   since all states together would be n times as large as u.
# - A segment (whole chunks) is what a program does. Where rows × channels fill the GPU, a row is
#   one segment; else several programs share a row.
# A segment is whole chunks and a chunk whole tiles; only the last of a row may be cut off by l.
#
# A segment needs the state at its start, which is the state at the end of the segment before it. So
# there are three phases, of which the first two run only where a row has several segments. In the
# figure subscripts number segments: e is the state with which a segment ends (backward the q at its
# left end) if it starts from zero, a = exp(A Σ Δ) the decay over it.
#
#     forward       segment 0             segment 1             segment 2
#     1.         0 ───────────▶ e₀     0 ───────────▶ e₁                             _state_ends
#     2.         s₀ = 0      ···▶      s₁ = a₀ s₀ + e₀ ···▶  s₂ = a₁ s₁ + e₁         _segment_starts
#     3.         s₀ ─────▶ y           s₁ ─────▶ y           s₂ ─────▶ y             _outputs
#
#     backward
#     1.                               e₁ ◀─────────── 0     e₂ ◀─────────── 0       _gradient_ends
#     2.         q₀ = a₁ q₁ + e₁ ◀···  q₁ = a₂ q₂ + e₂ ◀···           q₂ = 0         _segment_starts
#     3.         gradients ◀── q₀      gradients ◀── q₁      gradients ◀── q₂        _gradients
#
# (Phase 1 also runs for the segments left blank, as one grid is simpler; their ends are not used.)
# Nothing is added atomically: the same call gives the same bits.
#
# u, delta, z, dy (b, l, d) may be slices of larger tensors: a step's channels lie side by side, and
# *_stride is the distance from one step to the next. The arrays that kernels hand on, all float32,
# with the kernel that writes them; a block is 32 channels:
#
#     A2          (n, d)                                          log2(e) A
#     packed      (b, tiles, 2 n + 1, TILE)     _pack             B, C and the mask of each tile
#     ends        (b, segments, n, d)           phases 1, 2       e; then s or q, in its place
#     dt_sums     (b, segments, d)              phase 1           Σ Δ
#     kept        (b, chunks, n, d)             _outputs          the state before each chunk
#     scratch     (programs, CHUNK/TILE, n, 32) _gradients        the states before a chunk's tiles
#     parts       (b, segments, n + 2, d)       _gradients        a segment's part of dA, dD, dbias
#     dBC         (b, blocks, tiles, n, 2, 4)   _gradients        a block's part of dB and dC
#
# Read `_tile_forward` first, then `_outputs`, which is the pseudo-code, then `_gradients`. The
# helpers can be taken on trust, and the kernels of phases 1 and 2 are for small batches only. What
# is said of machine code can be checked with `python bench.py scan --static`.

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on a CPU
FORWARD_TILE = 8
BACKWARD_TILE = 4  # _channel_sums is written for 4
MAX_STATES = 16  # a thread has no registers for more
ONE_WARP = dict(num_warps=1, enable_fp_fusion=True)  # Triton 3.10 does not fuse unless it is told

constexpr = tl.constexpr
LOG2E = constexpr(1 / math.log(2))
LN2 = constexpr(math.log(2))


def jit(function):
    """triton.jit, where there is Triton; one compilation serves rows of all lengths."""
    if not triton:
        return function
    return triton.jit(function, do_not_specialize=["l", "segment_length", "segments"])


# -- functions of numbers --


@jit
def _sigmoid(x):
    """1 / (1 + exp(−x)), as the square of rsqrt: one instruction, where a division is several."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


@jit
def _softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + p), with p = exp(−|x|); accurate for tiny p too.

    log(1 + p) = 2 artanh(p / (2 + p)), as a series whose last coefficient makes up for the rest.
    """
    p = tl.exp2(tl.abs(x) * -LOG2E)
    root = tl.rsqrt(2.0 + p)
    ratio = p * (root * root)
    square = ratio * ratio
    series = 2 / 3 + square * (2 / 5 + square * (2 / 7 + square * (2 / 9 + square * 0.215)))
    return tl.maximum(x, 0.0) + ratio * (2.0 + square * series)


@jit
def _dt(raw, mask, SOFTPLUS: constexpr):
    """Δ, zero at pads; raw is the argument delta with its bias."""
    return (_softplus(raw) if SOFTPLUS else raw) * mask


# -- where a program works --


@jit
def _place(l, segment_length, d: constexpr):
    """Where a program works.

    b: its row. row_segment: its segment, counted through the batch. channel: its 32 channels.
    exists: which of these channels exist. begin, end: its steps, end not included.
    """
    blocks = tl.cdiv(d, 32)
    b = (tl.program_id(0) // blocks).to(tl.int64)  # offsets in memory may exceed 2^31
    channel = tl.program_id(0) % blocks * 32 + tl.arange(0, 32)
    exists = channel < d if d % 32 else tl.full((32,), True, tl.int1)  # all True: costs nothing

    begin = tl.program_id(1) * segment_length
    end = tl.minimum(begin + segment_length, l)
    row_segment = b * tl.num_programs(1) + tl.program_id(1)
    return b, row_segment, channel, exists, begin, end


# -- tiles: TILE steps × 32 channels --


@jit
def _in_range(exists, t, end, TILE: constexpr):
    """Which elements of the tile at step t exist: those of existing channels, before the end."""
    return exists[None, :] & (tl.arange(0, TILE) < end - t)[:, None]


@jit
def _pointers(ptr, step, STRIDE: constexpr, TILE: constexpr):
    """Pointers to a tile, (TILE, 32).

    ptr: a pointer for each channel, (32,). step: the tile's first step, counted through the batch.
    The pointers claim to be aligned to one element only. Triton then gives each thread a whole
    channel, all steps of the tile, and the recurrence needs no exchange between threads.
    """
    steps = tl.arange(0, TILE).to(tl.int64)[:, None]
    pointers = (ptr + step * STRIDE)[None, :] + steps * STRIDE
    return tl.multiple_of(pointers, (1, ptr.dtype.element_ty.primitive_bitwidth // 8))


@jit
def _load(ptr, step, in_range, STRIDE: constexpr, TILE: constexpr):
    return tl.load(_pointers(ptr, step, STRIDE, TILE), mask=in_range, other=0.0)


@jit
def _store(ptr, tile, step, in_range, STRIDE: constexpr, TILE: constexpr):
    pointers = _pointers(ptr, step, STRIDE, TILE)
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=in_range)


@jit
def _step(tile, i):
    """Step i of a tile, (32,).

    Triton cannot index a tile that is in registers. So all other steps are replaced by zeros, and
    the tile is summed over time. As each thread holds all steps of a channel, the compiler drops
    every "+ 0" and nothing is computed; but it does so for integers only, since −0.0 + 0.0 is not
    −0.0. Hence the detour over the bit pattern.
    """
    steps = tl.arange(0, tile.shape[0])
    bits = tile.to(tl.int32, bitcast=True)
    return tl.sum(tl.where((steps == i)[:, None], bits, 0), 0).to(tl.float32, bitcast=True)


@jit
def _tile_forward(a, x, state, TILE: constexpr):
    """s_t = a_t s_{t−1} + x_t over a tile, from the state before it.

    Returns the states after and before each step, two tiles, and the last state (32,).
    """
    steps = tl.arange(0, TILE)
    after = x  # any tiles of this shape: all of their steps are replaced
    before = x
    for i in tl.static_range(TILE):
        here = (steps == i)[:, None]
        before = tl.where(here, state[None, :], before)
        state = _step(a, i) * state + _step(x, i)
        after = tl.where(here, state[None, :], after)
    return after, before, state


@jit
def _tile_backward(a, x, q, TILE: constexpr):
    """g_t = x_t + q_{t+1} and q_t = a_t g_t over a tile, from its end; q is of the step after it.

    Returns all g and all q, two tiles, and the q of the first step (32,).
    """
    steps = tl.arange(0, TILE)
    all_g = x  # any tiles of this shape: all of their steps are replaced
    all_q = x
    for i in tl.static_range(TILE - 1, -1, -1):
        here = (steps == i)[:, None]
        g = _step(x, i) + q
        q = _step(a, i) * g
        all_g = tl.where(here, g[None, :], all_g)
        all_q = tl.where(here, q[None, :], all_q)
    return all_g, all_q, q


# -- states: a tuple of n vectors, one number for each of the 32 channels --


@jit
def _zero_states(n: constexpr):
    states = ()
    for _ in tl.static_range(n):
        states += (tl.zeros((32,), tl.float32),)
    return states


@jit
def _load_states(ptr, offset, exists, STRIDE: constexpr, n: constexpr):
    """n vectors, STRIDE apart; zeros where ptr is None."""
    states = ()
    for i in tl.static_range(n):
        if ptr is None:
            states += (tl.zeros((32,), tl.float32),)
        else:
            states += (tl.load(ptr + offset + i * STRIDE, mask=exists, other=0.0),)
    return states


@jit
def _store_states(ptr, states, exists, STRIDE: constexpr, n: constexpr):
    for i in tl.static_range(n):
        tl.store(ptr + i * STRIDE, states[i], mask=exists)


# -- packed: B, C and the mask, a tile after the other --


@jit
def _pack(
    # inputs: B, C (b l, n) of any strides, the mask (b l,) or None
    B_ptr, C_ptr, mask_ptr, B_stride, B_state_stride, C_stride, C_state_stride,
    # output and sizes; N is n rounded up to a power of 2
    packed_ptr, l, n: constexpr, N: constexpr, TILE: constexpr,
):  # fmt: skip
    """A tile of packed: n lines of B, n lines of C and one of the mask, each of TILE numbers.

    All channels read the same B and C: packed in the order of their use, in float32, they cost a
    load each and no arithmetic. Beyond l all is zero, so that these steps act as pads.
    """
    # -- the tile's steps, counted in the row and through the batch --
    tiles = tl.cdiv(l, TILE)
    program = tl.program_id(0).to(tl.int64)
    t = program % tiles * TILE + tl.arange(0, TILE)
    step = program // tiles * l + t
    in_row = t < l

    # -- load --
    i = tl.arange(0, N).to(tl.int64)[:, None]
    in_range = in_row[None, :] & (i < n)
    B = tl.load(B_ptr + step[None, :] * B_stride + i * B_state_stride, mask=in_range, other=0.0)
    C = tl.load(C_ptr + step[None, :] * C_stride + i * C_state_stride, mask=in_range, other=0.0)
    mask = in_row
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + step, mask=in_row, other=0) != 0

    # -- write --
    packed_ptr += program * ((2 * n + 1) * TILE) + tl.arange(0, TILE)
    tl.store(packed_ptr[None, :] + i * TILE, B.to(tl.float32), mask=i < n)
    tl.store(packed_ptr[None, :] + (n + i) * TILE, C.to(tl.float32), mask=i < n)
    tl.store(packed_ptr + 2 * n * TILE, mask.to(tl.float32))


def _pack_tiles(B: Tensor, C: Tensor, mask: Tensor | None, TILE: int) -> Tensor:
    """B, C (b, l, n) and the mask (b, l) as the kernels read them: see `_pack`."""
    b, l, n = B.shape
    B = B.reshape(b * l, n)
    C = C.reshape(b * l, n)
    if mask is not None:
        mask = mask.contiguous()
    tiles = _ceil_div(l, TILE)
    packed = B.new_empty(b, tiles, 2 * n + 1, TILE, dtype=torch.float32)
    sizes = dict(n=n, N=_power_of_2(n), TILE=TILE)
    _pack[(b * tiles,)](B, C, mask, *B.stride(), *C.stride(), packed, l, **sizes, **ONE_WARP)
    return packed


@jit
def _packed_row(packed_ptr, b, l, n: constexpr, TILE: constexpr):
    """Where the packed tiles of row b begin."""
    return packed_ptr + b * tl.cdiv(l, TILE) * ((2 * n + 1) * TILE)


@jit
def _packed_tile(packed_ptr, t, n: constexpr, TILE: constexpr):
    """Pointers to the first line of the packed tile at step t of a row."""
    return packed_ptr + t // TILE * ((2 * n + 1) * TILE) + tl.arange(0, TILE)


@jit
def _line(packed, i, TILE: constexpr):
    """Line i of a packed tile, (TILE, 1): i for B of state i, n + i for C, 2 n for the mask."""
    return tl.load(packed + i * TILE)[:, None]


@jit
def _prefetch(packed_ptr, t, l, n: constexpr, TILE: constexpr):
    """Loads one number in each 32 bytes of the packed tile at step t, if there is one.

    All of it is then in the L1 cache when it is needed. Without this, waiting for B and C was half
    of the kernel's time on an H100.
    """
    i = tl.arange(0, 8 * TILE) * 8  # of up to 64 TILE numbers; a tile has (2 n + 1) TILE
    size = tl.where(t < l, (2 * n + 1) * TILE, 0)
    return tl.load(packed_ptr + t // TILE * ((2 * n + 1) * TILE) + i, mask=i < size, other=0.0)


@jit
def _keep_alive(ptr, prefetched, l, TILE: constexpr):
    """Keeps the prefetch from being removed: a store whose mask is never true, i < −l, which the
    compiler cannot prove. ptr is any pointer that may be written to."""
    i = tl.arange(0, 8 * TILE)
    tl.store(ptr + i, prefetched, mask=i < -l)


# -- phases 1 and 2: what segments start from --


@jit
def _state_ends(
    # inputs
    u_ptr, delta_ptr, packed_ptr, A2_ptr, bias_ptr, u_stride: constexpr, delta_stride: constexpr,
    # outputs and sizes
    ends_ptr, dt_sums_ptr, l, segment_length, d: constexpr, n: constexpr,
    SOFTPLUS: constexpr, TILE: constexpr,
):  # fmt: skip
    """Phase 1, forward: the last state of each segment, if started from zero; and its Σ Δ."""
    # -- where this program works --
    b, row_segment, channel, exists, begin, end = _place(l, segment_length, d)
    packed_ptr = _packed_row(packed_ptr, b, l, n, TILE)
    u_ptr += channel
    delta_ptr += channel

    # -- in registers for the whole segment --
    states = _zero_states(n)
    dt_sums = tl.zeros((32,), tl.float32)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)[None, :]

    # -- each tile is loaded while the one before it is computed --
    in_range = _in_range(exists, begin, end, TILE)
    next_u = _load(u_ptr, b * l + begin, in_range, u_stride, TILE)
    next_delta = _load(delta_ptr, b * l + begin, in_range, delta_stride, TILE)
    prefetched = _prefetch(packed_ptr, begin, l, n, TILE)

    for t in tl.range(begin, end, TILE, num_stages=1):
        # -- this tile, and loads for the next --
        u = next_u.to(tl.float32)
        raw = next_delta.to(tl.float32) + bias
        packed = _packed_tile(packed_ptr, t, n, TILE)
        prefetched = _prefetch(packed_ptr, t + TILE, l, n, TILE)
        in_range = _in_range(exists, t + TILE, end, TILE)
        next_u = _load(u_ptr, b * l + t + TILE, in_range, u_stride, TILE)
        next_delta = _load(delta_ptr, b * l + t + TILE, in_range, delta_stride, TILE)

        # -- Δ --
        dt = _dt(raw, _line(packed, 2 * n, TILE), SOFTPLUS)
        dt_sums += tl.sum(dt, 0)
        dt_u = dt * u

        # -- the recurrence, one of the n states after another --
        new_states = ()
        for i in tl.static_range(n):
            if i % 8 == 0:
                # the compiler moves no load over this; else all lines are loaded at once, and the
                # registers do not suffice
                tl.debug_barrier()
            A2 = tl.load(A2_ptr + i * d + channel, mask=exists, other=0.0)[None, :]
            x = dt_u * _line(packed, i, TILE)
            new_states += (_tile_forward(tl.exp2(dt * A2), x, states[i], TILE)[2],)
        states = new_states

    # -- write --
    _keep_alive(dt_sums_ptr, prefetched, l, TILE)
    _store_states(ends_ptr + row_segment * (n * d) + channel, states, exists, d, n)
    tl.store(dt_sums_ptr + row_segment * d + channel, dt_sums, mask=exists)


@jit
def _gradient_ends(
    # inputs; z_ptr may be None
    dy_ptr, delta_ptr, z_ptr, packed_ptr, A2_ptr, bias_ptr,
    dy_stride: constexpr, delta_stride: constexpr, z_stride: constexpr,
    # outputs and sizes
    ends_ptr, dt_sums_ptr, l, segment_length, d: constexpr, n: constexpr,
    SOFTPLUS: constexpr, TILE: constexpr,
):  # fmt: skip
    """Phase 1, backward: q of the first step of each segment, from zero at its end; and its Σ Δ."""
    # -- where this program works --
    b, row_segment, channel, exists, begin, end = _place(l, segment_length, d)
    packed_ptr = _packed_row(packed_ptr, b, l, n, TILE)
    dy_ptr += channel
    delta_ptr += channel

    # -- in registers for the whole segment --
    q = _zero_states(n)
    dt_sums = tl.zeros((32,), tl.float32)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)[None, :]

    # -- the last tile of the segment comes first --
    t = (end - 1) // TILE * TILE
    in_range = _in_range(exists, t, end, TILE)
    next_dy = _load(dy_ptr, b * l + t, in_range, dy_stride, TILE)
    next_delta = _load(delta_ptr, b * l + t, in_range, delta_stride, TILE)
    prefetched = _prefetch(packed_ptr, t, l, n, TILE)

    for _ in tl.range(begin, end, TILE, num_stages=1):
        # -- this tile, and loads for the one on its left --
        dv = next_dy.to(tl.float32)
        raw = next_delta.to(tl.float32) + bias
        if z_ptr is not None:
            z = _load(z_ptr + channel, b * l + t, in_range, z_stride, TILE).to(tl.float32)
            dv *= z * _sigmoid(z)
        packed = _packed_tile(packed_ptr, t, n, TILE)
        t = tl.maximum(t - TILE, 0)  # the last time it loads a tile that no one uses
        prefetched = _prefetch(packed_ptr, t, l, n, TILE)
        in_range = _in_range(exists, t, end, TILE)
        next_dy = _load(dy_ptr, b * l + t, in_range, dy_stride, TILE)
        next_delta = _load(delta_ptr, b * l + t, in_range, delta_stride, TILE)

        # -- Δ; dv is zero at pads --
        mask = _line(packed, 2 * n, TILE)
        dt = _dt(raw, mask, SOFTPLUS)
        dt_sums += tl.sum(dt, 0)
        dv *= mask

        # -- the recurrence, one of the n states after another --
        new_q = ()
        for i in tl.static_range(n):
            if i % 8 == 0:
                tl.debug_barrier()  # as in _state_ends
            A2 = tl.load(A2_ptr + i * d + channel, mask=exists, other=0.0)[None, :]
            x = dv * _line(packed, n + i, TILE)
            new_q += (_tile_backward(tl.exp2(dt * A2), x, q[i], TILE)[2],)
        q = new_q

    # -- write --
    _keep_alive(dt_sums_ptr, prefetched, l, TILE)
    _store_states(ends_ptr + row_segment * (n * d) + channel, q, exists, d, n)
    tl.store(dt_sums_ptr + row_segment * d + channel, dt_sums, mask=exists)


@jit
def _segment_starts(
    ends_ptr, dt_sums_ptr, A2_ptr, segments,
    d: constexpr, n: constexpr, BACKWARD: constexpr, TILE: constexpr,
):  # fmt: skip
    """Phase 2: what each segment starts from, written over its end.

    Forward it is s, from the first segment of a row to the last; with BACKWARD q, from the last to
    the first. The tiles are of segments instead of steps.
    """
    # -- 32 of the n × d numbers of a row --
    j = tl.program_id(0) % tl.cdiv(n * d, 32) * 32 + tl.arange(0, 32)
    exists = j < n * d if n * d % 32 else tl.full((32,), True, tl.int1)
    A2 = tl.load(A2_ptr + j, mask=exists, other=0.0)[None, :]

    # -- the segment that comes first, and the direction of the next --
    DIRECTION: constexpr = -1 if BACKWARD else 1
    first = tl.program_id(0).to(tl.int64) // tl.cdiv(n * d, 32) * segments
    if BACKWARD:
        first += segments - 1
    ends_ptr += first * (n * d) + j
    dt_sums_ptr += first * d + j % d

    state = tl.zeros((32,), tl.float32)
    for t in tl.range(0, segments, TILE, num_stages=1):
        in_range = _in_range(exists, t, segments, TILE)
        a = tl.exp2(A2 * _load(dt_sums_ptr, t, in_range, DIRECTION * d, TILE))
        ends = _load(ends_ptr, t, in_range, DIRECTION * n * d, TILE)
        _, starts, state = _tile_forward(a, ends, state, TILE)
        _store(ends_ptr, starts, t, in_range, DIRECTION * n * d, TILE)


# -- phase 3, forward --


@jit
def _outputs(
    # inputs; z_ptr may be None, starts_ptr too: segments then start from zero
    u_ptr, delta_ptr, z_ptr, packed_ptr, A2_ptr, D_ptr, bias_ptr, starts_ptr,
    u_stride: constexpr, delta_stride: constexpr, z_stride: constexpr,
    # outputs and sizes; kept_ptr may be None
    y_ptr, kept_ptr, l, segment_length, d: constexpr, n: constexpr,
    SOFTPLUS: constexpr, CHUNK: constexpr, TILE: constexpr,
):  # fmt: skip
    """Phase 3, forward: y, and if kept_ptr is given the state before each chunk."""
    # -- where this program works --
    b, row_segment, channel, exists, begin, end = _place(l, segment_length, d)
    packed_ptr = _packed_row(packed_ptr, b, l, n, TILE)
    u_ptr += channel
    delta_ptr += channel

    # -- in registers for the whole segment --
    states = _load_states(starts_ptr, row_segment * (n * d) + channel, exists, d, n)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)[None, :]
    D = tl.load(D_ptr + channel, mask=exists, other=0.0)[None, :]

    # -- each tile is loaded while the one before it is computed --
    in_range = _in_range(exists, begin, end, TILE)
    next_u = _load(u_ptr, b * l + begin, in_range, u_stride, TILE)
    next_delta = _load(delta_ptr, b * l + begin, in_range, delta_stride, TILE)
    prefetched = _prefetch(packed_ptr, begin, l, n, TILE)

    for t in tl.range(begin, end, TILE, num_stages=1):
        # -- this tile, and loads for the next; z is needed last, and loaded in time --
        prefetched = _prefetch(packed_ptr, t + TILE, l, n, TILE)
        u = next_u.to(tl.float32)
        raw = next_delta.to(tl.float32) + bias
        next_in_range = _in_range(exists, t + TILE, end, TILE)
        next_u = _load(u_ptr, b * l + t + TILE, next_in_range, u_stride, TILE)
        next_delta = _load(delta_ptr, b * l + t + TILE, next_in_range, delta_stride, TILE)
        in_range = _in_range(exists, t, end, TILE)
        if z_ptr is not None:
            z = _load(z_ptr + channel, b * l + t, in_range, z_stride, TILE)

        # -- keep the state before a chunk --
        if kept_ptr is not None:
            if t % CHUNK == 0:
                chunk_index = b * tl.cdiv(l, CHUNK) + t // CHUNK
                _store_states(kept_ptr + chunk_index * (n * d) + channel, states, exists, d, n)

        # -- Δ --
        packed = _packed_tile(packed_ptr, t, n, TILE)
        mask = _line(packed, 2 * n, TILE)
        dt = _dt(raw, mask, SOFTPLUS)
        dt_u = dt * u

        # -- the recurrence, one of the n states after another; v = C s + D u --
        v = D * u
        new_states = ()
        for i in tl.static_range(n):
            if i % 8 == 0:
                tl.debug_barrier()  # as in _state_ends
            B = _line(packed, i, TILE)
            C = _line(packed, n + i, TILE)
            A2 = tl.load(A2_ptr + i * d + channel, mask=exists, other=0.0)[None, :]
            after, _, state = _tile_forward(tl.exp2(dt * A2), dt_u * B, states[i], TILE)
            v += after * C
            new_states += (state,)
        states = new_states

        # -- the gate and the mask; write y --
        y = v * mask
        if z_ptr is not None:
            z = z.to(tl.float32)
            y *= z * _sigmoid(z)
        _store(y_ptr + channel, y, b * l + t, in_range, d, TILE)

    _keep_alive(packed_ptr, prefetched, l, TILE)


# -- phase 3, backward --


@jit
def _gradients(
    # inputs; z_ptr may be None, q_ptr too: segments then start from zero at their end
    dy_ptr, u_ptr, delta_ptr, z_ptr, packed_ptr, A2_ptr, D_ptr, bias_ptr, kept_ptr, q_ptr,
    dy_stride: constexpr, u_stride: constexpr, delta_stride: constexpr, z_stride: constexpr,
    # scratch, outputs and sizes
    scratch_ptr, du_ptr, ddelta_ptr, dz_ptr, dBC_ptr, parts_ptr, l, segment_length,
    d: constexpr, n: constexpr, SOFTPLUS: constexpr, CHUNK: constexpr, TILE: constexpr,
):  # fmt: skip
    """Phase 3, backward: the gradients of u, delta and z, and this program's part of the others'.

    Takes the chunks of the segment from the right. Each is replayed from the state before it, which
    writes the states before its tiles to scratch. Then the tiles are taken from the right: all
    states of a tile are computed again from the one in scratch, and g and q with them. Nothing is
    loaded a tile ahead: here that brought nothing on an H100.
    """
    # -- where this program works --
    b, row_segment, channel, exists, begin, end = _place(l, segment_length, d)
    packed_ptr = _packed_row(packed_ptr, b, l, n, TILE)
    u_ptr += channel
    delta_ptr += channel
    A2_ptr += channel
    kept_ptr += b * tl.cdiv(l, CHUNK) * (n * d) + channel
    dBC_ptr += tl.program_id(0).to(tl.int64) * tl.cdiv(l, TILE) * (n * 8) + tl.arange(0, 32) // 4
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    scratch_ptr += program * (CHUNK // TILE * n * 32) + tl.arange(0, 32)

    # -- in registers for the whole segment --
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)[None, :]
    D = tl.load(D_ptr + channel, mask=exists, other=0.0)[None, :]
    q = _load_states(q_ptr, row_segment * (n * d) + channel, exists, d, n)
    dA = _zero_states(n)
    dD = tl.zeros((32,), tl.float32)
    dbias = tl.zeros((32,), tl.float32)

    for done in tl.range(0, end - begin, CHUNK, num_stages=1):
        # -- the next chunk from the right --
        chunk_begin = begin + (end - 1 - begin) // CHUNK * CHUNK - done
        chunk_end = tl.minimum(chunk_begin + CHUNK, end)

        # -- replay it --
        kept_offset = tl.cast(chunk_begin // CHUNK, tl.int64) * (n * d)
        states = _load_states(kept_ptr, kept_offset, exists, d, n)
        _replay(
            u_ptr, delta_ptr, packed_ptr, A2_ptr, scratch_ptr, states, bias, exists,
            b * l, chunk_begin, chunk_end, d, n, u_stride, delta_stride, SOFTPLUS, TILE,
        )  # fmt: skip

        for back in tl.range(0, chunk_end - chunk_begin, TILE, num_stages=1):
            # -- the next tile from the right --
            t = chunk_begin + (chunk_end - 1 - chunk_begin) // TILE * TILE - back
            in_range = _in_range(exists, t, chunk_end, TILE)
            raw = _load(delta_ptr, b * l + t, in_range, delta_stride, TILE).to(tl.float32) + bias
            u = _load(u_ptr, b * l + t, in_range, u_stride, TILE).to(tl.float32)
            dy = _load(dy_ptr + channel, b * l + t, in_range, dy_stride, TILE).to(tl.float32)
            packed = _packed_tile(packed_ptr, t, n, TILE)
            mask = _line(packed, 2 * n, TILE)
            dt = _dt(raw, mask, SOFTPLUS)
            dt_u = dt * u

            # -- dv, through the mask and SiLU(z) = z · sigmoid(z) --
            dy *= mask
            dv = dy
            if z_ptr is not None:
                z = _load(z_ptr + channel, b * l + t, in_range, z_stride, TILE).to(tl.float32)
                sigmoid = _sigmoid(z)
                dv = dy * z * sigmoid

            # -- one of the n states after another: its values again, then g, q, all sums over n --
            v = D * u
            A2_w = tl.zeros_like(u)
            d_dt_u = tl.zeros_like(u)
            new_q = ()
            new_dA = ()
            tile_start_ptr = scratch_ptr + (t - chunk_begin) // TILE * (n * 32)
            operands = _operands(packed, A2_ptr, tile_start_ptr, exists, 0, d, n, TILE)
            for i in tl.static_range(n):
                B, C, A2, start = operands
                if i + 1 < n:  # loaded now, as the compiler moves no load over the store below
                    operands = _operands(packed, A2_ptr, tile_start_ptr, exists, i + 1, d, n, TILE)
                decay = tl.exp2(dt * A2)
                after, before, _ = _tile_forward(decay, dt_u * B, start, TILE)
                g, all_q, q_i = _tile_backward(decay, dv * C, q[i], TILE)
                v += after * C
                d_dt_u += g * B
                w = all_q * before
                A2_w += w * A2
                dBC = _channel_sums(g * dt_u, after * dv)
                tl.store(dBC_ptr + t // TILE * (n * 8) + i * 8, dBC)
                new_q += (q_i,)
                new_dA += (dA[i] + tl.sum(w * dt, 0),)
            q = new_q
            dA = new_dA

            # -- dΔ = A w + u d(Δu); then ddelta, through the mask and softplus --
            ddelta = (A2_w * LN2 + u * d_dt_u) * mask
            if SOFTPLUS:
                ddelta *= _sigmoid(raw)

            # -- write; add to the sums over time --
            if z_ptr is not None:
                dz = dy * v * sigmoid * (1.0 + z * (1.0 - sigmoid))
                _store(dz_ptr + channel, dz, b * l + t, in_range, d, TILE)
            _store(ddelta_ptr + channel, ddelta, b * l + t, in_range, d, TILE)
            _store(du_ptr + channel, dt * d_dt_u + D * dv, b * l + t, in_range, d, TILE)
            dbias += tl.sum(ddelta, 0)
            dD += tl.sum(dv * u, 0)

    # -- write the sums over time: dA of each state, dD, dbias --
    parts_ptr += row_segment * ((n + 2) * d) + channel
    _store_states(parts_ptr, dA, exists, d, n)
    tl.store(parts_ptr + n * d, dD, mask=exists)
    tl.store(parts_ptr + (n + 1) * d, dbias, mask=exists)


@jit
def _replay(
    u_ptr, delta_ptr, packed_ptr, A2_ptr, scratch_ptr, states, bias, exists,
    row_begin, begin, end, d: constexpr, n: constexpr,
    u_stride: constexpr, delta_stride: constexpr, SOFTPLUS: constexpr, TILE: constexpr,
):  # fmt: skip
    """For `_gradients`: writes the states before each tile of a chunk to scratch.

    The chunk is the steps from begin to end, end not included; `row_begin` is the first step of the
    row, counted through the batch. Triton may give a channel to one thread in a store and to
    another in a load, so all threads wait for each other before scratch is written and after.
    """
    tl.debug_barrier()
    _store_states(scratch_ptr, states, None, 32, n)

    for t in tl.range(begin, end - TILE, TILE, num_stages=1):
        # -- load --
        in_range = _in_range(exists, t, end, TILE)
        raw = _load(delta_ptr, row_begin + t, in_range, delta_stride, TILE).to(tl.float32) + bias
        u = _load(u_ptr, row_begin + t, in_range, u_stride, TILE).to(tl.float32)
        packed = _packed_tile(packed_ptr, t, n, TILE)
        dt = _dt(raw, _line(packed, 2 * n, TILE), SOFTPLUS)
        dt_u = dt * u

        # -- the recurrence, one of the n states after another --
        new_states = ()
        for i in tl.static_range(n):
            A2 = tl.load(A2_ptr + i * d, mask=exists, other=0.0)[None, :]
            x = dt_u * _line(packed, i, TILE)
            new_states += (_tile_forward(tl.exp2(dt * A2), x, states[i], TILE)[2],)
        states = new_states

        # -- write --
        tile = (t - begin) // TILE + 1
        _store_states(scratch_ptr + tile * (n * 32), states, None, 32, n)

    tl.debug_barrier()


@jit
def _operands(
    packed,
    A2_ptr,
    tile_start_ptr,
    exists,
    i: constexpr,
    d: constexpr,
    n: constexpr,
    TILE: constexpr,
):
    """For a tile of `_gradients`: B and C of state i, log2(e) A, and the state before the tile."""
    A2 = tl.load(A2_ptr + i * d, mask=exists, other=0.0)[None, :]
    return _line(packed, i, TILE), _line(packed, n + i, TILE), A2, tl.load(tile_start_ptr + i * 32)


@jit
def _channel_sums(x, y):
    """Sums over the channels of two tiles (4, 32), as a vector (32,) that repeats each four times.

    Lanes 4 i to 4 i + 3 get the sum of step i of x, and those from 16 on the sums of y. tl.sum
    would exchange each of the eight sums five times between lanes. Here each fold halves the sums
    that a lane is concerned with, and nine exchanges are enough (4 + 2 + 1 + 1 + 1 folds).
    """
    folded = ()
    for i in tl.static_range(4):
        folded += (_fold(_step(x, i), _step(y, i), 16),)
    sums = _fold(_fold(folded[0], folded[2], 8), _fold(folded[1], folded[3], 8), 4)
    sums = _fold(sums, sums, 2)
    return _fold(sums, sums, 1)


@jit
def _fold(x, y, bit: constexpr):
    """Lanes i and i ^ bit are partners. The one without the bit gets the sum of both partners' x,
    the one with it the sum of both partners' y: (32,)."""
    lane = tl.arange(0, 32)
    has_bit = (lane & bit) != 0
    mine = tl.where(has_bit, y, x)
    theirs = tl.where(has_bit, x, y)
    return mine + tl.gather(theirs, lane ^ bit, 0)


# ---- The kernels as PyTorch operations ----


def _chunk_length(n: int) -> int:
    """Steps in a chunk: 16, or n rounded up to a power of 2 if that is more.

    The kept states are then no more numbers than u: in float32 no more bytes than u and delta in
    half precision.
    """
    return max(16, _power_of_2(n))


def _segment_length(l: int, programs: int, enough: int, chunk: int, device: torch.device) -> int:
    """Steps in a segment; `programs` is rows × blocks of 32 channels.

    The whole row on a CPU, and where each multiprocessor has `enough` programs. Else whole chunks,
    so that each multiprocessor gets 6 to 12 programs if the row has enough chunks.
    """
    processors = 0
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    if programs >= enough * processors:
        return l
    segments = 12 * processors // max(1, programs)
    return chunk * _ceil_div(l, chunk * segments)


def _strided(**tensors: Tensor | None) -> dict:
    """Arguments of a kernel for tensors (b, l, d): name_ptr, and name_stride between steps."""
    arguments = {}
    for name, x in tensors.items():
        stride = 0
        if x is not None:
            x = x.reshape(-1, x.shape[-1])  # (b l, d), a view where there can be one
            if x.stride(1) != 1:
                x = x.contiguous()
            stride = x.stride(0)
        arguments[f"{name}_ptr"] = x
        arguments[f"{name}_stride"] = stride
    return arguments


def _kernel_parameters(A: Tensor, D: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float32: log2(e) A (n, d), D and bias (d,)."""
    A2 = A.new_empty(A.shape[::-1], dtype=torch.float32)
    torch.div(A.float().T, math.log(2), out=A2)  # in one launch; no gradient is asked for here
    return A2, D.float().contiguous(), bias.float().contiguous()


def _segment_starts_of(phase_1, inputs: dict, A2: Tensor, grid: tuple, sizes: dict, options: dict):
    """What the segments of each row start from, (b, segments, n, d); None if a row is one segment.

    phase_1: the kernel `_state_ends`, for s, or `_gradient_ends`, for q. grid: rows × blocks, and
    segments.
    """
    n, d = A2.shape
    segments = grid[1]
    if segments == 1:
        return None
    b = grid[0] // _ceil_div(d, 32)
    ends = A2.new_empty(b, segments, n, d)
    dt_sums = A2.new_empty(b, segments, d)
    phase_1[grid](**inputs, A2_ptr=A2, ends_ptr=ends, dt_sums_ptr=dt_sums, **sizes, **options)

    backward = phase_1 is _gradient_ends
    phase_2 = _segment_starts[(b * _ceil_div(n * d, 32),)]
    phase_2(ends, dt_sums, A2, segments, d=d, n=n, BACKWARD=backward, TILE=8, **ONE_WARP)
    return ends


def _scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
    bias: Tensor, mask: Tensor | None, softplus: bool, chunk: int, keep: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b, l, d) in out_dtype; and if `keep`, the state before each chunk, (b, chunks, n, d)."""
    b, l, d = u.shape
    n = A.shape[1]
    A2, D, bias = _kernel_parameters(A, D, bias)
    y = u.new_empty(b, l, d, dtype=out_dtype)
    kept = A2.new_empty(b, _ceil_div(l, chunk) if keep else 0, n, d)

    # segments, which nearly double the work, pay below 4 programs for each multiprocessor
    blocks = _ceil_div(d, 32)
    segment_length = _segment_length(l, b * blocks, 4, chunk, u.device)
    grid = (b * blocks, _ceil_div(l, segment_length))
    sizes = dict(l=l, segment_length=segment_length)
    options = dict(d=d, n=n, SOFTPLUS=softplus, TILE=FORWARD_TILE, **ONE_WARP)

    with torch.cuda.device_of(u):  # kernels go to the current device
        packed = _pack_tiles(B, C, mask, FORWARD_TILE)
        inputs = _strided(u=u, delta=delta) | dict(packed_ptr=packed, bias_ptr=bias)
        starts = _segment_starts_of(_state_ends, inputs, A2, grid, sizes, options)
        inputs |= _strided(z=z) | dict(A2_ptr=A2, D_ptr=D, starts_ptr=starts)
        outputs = dict(y_ptr=y, kept_ptr=kept if keep else None)
        _outputs[grid](**inputs, **outputs, **sizes, CHUNK=chunk, **options)
    return y, kept


_scan_triton = torch.library.custom_op(f"{NAMESPACE}::scan_triton", _scan_forward, mutates_args=())


@torch.library.custom_op(f"{NAMESPACE}::scan_triton_backward", mutates_args=())
def _scan_triton_backward(
    dy: Tensor, kept: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    z: Tensor | None, bias: Tensor, mask: Tensor | None, softplus: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of u, delta, A, B, C, D, z and bias; z's is empty where there is no z."""
    b, l, d = u.shape
    n = A.shape[1]
    A2, D32, bias32 = _kernel_parameters(A, D, bias)

    # backward, segments are a fifth more work, and pay below 6 programs for each multiprocessor
    blocks = _ceil_div(d, 32)
    segment_length = _segment_length(l, b * blocks, 6, chunk, u.device)
    segments = _ceil_div(l, segment_length)
    grid = (b * blocks, segments)
    sizes = dict(l=l, segment_length=segment_length)
    options = dict(d=d, n=n, SOFTPLUS=softplus, TILE=BACKWARD_TILE, **ONE_WARP)

    # what the kernels write
    du = _empty_like(u)
    ddelta = _empty_like(delta)
    dz = u.new_empty(0) if z is None else _empty_like(z)
    tiles = _ceil_div(l, BACKWARD_TILE)
    dBC = A2.new_empty(b, blocks, tiles, n, 2, BACKWARD_TILE)
    parts = A2.new_empty(b, segments, n + 2, d)
    scratch = A2.new_empty(b * blocks * segments, chunk // BACKWARD_TILE, n, 32)
    outputs = dict(du_ptr=du, ddelta_ptr=ddelta, dz_ptr=dz, dBC_ptr=dBC, parts_ptr=parts)
    outputs |= dict(scratch_ptr=scratch)

    with torch.cuda.device_of(u):
        packed = _pack_tiles(B, C, mask, BACKWARD_TILE)
        inputs = _strided(dy=dy, delta=delta, z=z) | dict(packed_ptr=packed, bias_ptr=bias32)
        q = _segment_starts_of(_gradient_ends, inputs, A2, grid, sizes, options)
        inputs |= _strided(u=u) | dict(A2_ptr=A2, D_ptr=D32, kept_ptr=kept, q_ptr=q)
        _gradients[grid](**inputs, **outputs, **sizes, CHUNK=chunk, **options)

    # sums over blocks of channels, and over segments
    dBC = dBC.sum(1).permute(3, 0, 1, 4, 2)  # (2, b, tiles, TILE, n)
    dB, dC = dBC.flatten(2, 3)[:, :, :l]  # (b, l, n) each
    dA, dD, dbias = parts.sum((0, 1)).split((n, 1, 1))
    sums = ((A, dA.T), (B, dB), (C, dC), (D, dD[0]), (bias, dbias[0]))
    dA, dB, dC, dD, dbias = (_empty_like(x).copy_(dx) for x, dx in sums)
    return du, ddelta, dA, dB, dC, dD, dz, dbias


# What torch.compile and autograd need to know of the two scans: the shapes of what they return, and
# what to keep for the backward pass.


def _scan_shapes(u, delta, A, B, C, D, z, bias, mask, softplus, chunk, keep, out_dtype):
    b, l, d = u.shape
    chunks = _ceil_div(l, chunk) if keep else 0
    dtype = torch.promote_types(u.dtype, torch.float32)
    y = u.new_empty(u.shape, dtype=out_dtype)
    return y, u.new_empty(b, chunks, A.shape[1], d, dtype=dtype)


def _scan_backward_shapes(dy, kept, u, delta, A, B, C, D, z, bias, *options):
    inputs = (u, delta, A, B, C, D, z, bias)
    return tuple(u.new_empty(0) if x is None else _empty_like(x) for x in inputs)


def _keep_for_backward(ctx, inputs, output):
    tensors, options = inputs[:9], inputs[9:11]  # u, …, mask; softplus, chunk
    _, kept = output
    ctx.save_for_backward(kept, *tensors)
    ctx.options = options
    ctx.set_materialize_grads(False)  # the kept states get no gradient: make no zeros for them


def _backward(op, ctx, dy, _):
    kept, *tensors = ctx.saved_tensors  # read once: activation checkpointing gives them only once
    gradients = op(dy, kept, *tensors, *ctx.options)
    differentiable = tensors[:8]  # all but the mask
    gradients = [None if x is None else dx for x, dx in zip(differentiable, gradients)]
    return *gradients, None, None, None, None, None  # mask, softplus, chunk, keep, out_dtype


for _op, _op_backward in (
    (_scan_loop, _scan_loop_backward),
    (_scan_triton, _scan_triton_backward),
):
    _op.register_fake(_scan_shapes)
    _op_backward.register_fake(_scan_backward_shapes)
    _op.register_autograd(
        functools.partial(_backward, _op_backward), setup_context=_keep_for_backward
    )


# ---- The short convolution in Triton ----
#
# Two ordinary kernels of four warps, Triton's default, on tiles of 32 steps × 64 channels.

CONV_TILE = 32  # steps


@jit
def _convolution(
    x_ptr, weight_ptr, bias_ptr, y_ptr, x_stride, l,
    d: constexpr, k: constexpr, LEFT: constexpr, TILE: constexpr,
):  # fmt: skip
    """y_t = Σ_j weight_j x_{t + j − LEFT}, zeros beyond a row; with a bias SiLU(y + bias).

    x, y (b, l, d); weight (k, d), bias (d,) or None, both in float32.
    """
    y, _, step, channel, exists, in_range = _sum_of_taps(
        x_ptr, weight_ptr, x_stride, l, d, k, LEFT, TILE
    )
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=exists, other=0.0)
        y *= _sigmoid(y)
    tl.store(y_ptr + step * d + channel, y.to(y_ptr.dtype.element_ty), mask=in_range)


@jit
def _convolution_gradients(
    x_ptr, weight_ptr, bias_ptr, dy_ptr, dtotal_ptr, parts_ptr, x_stride, dy_stride, l,
    d: constexpr, k: constexpr, LEFT: constexpr, TILE: constexpr,
):  # fmt: skip
    """dtotal (b, l, d), the gradient of the total inside SiLU; and parts (b × tiles, k + 1, d),
    this tile's part of the gradients of the k taps and of the bias."""
    # -- the total again --
    total, shifted, step, channel, exists, in_range = _sum_of_taps(
        x_ptr, weight_ptr, x_stride, l, d, k, LEFT, TILE
    )
    total += tl.load(bias_ptr + channel, mask=exists, other=0.0)

    # -- its gradient, through SiLU --
    sigmoid = _sigmoid(total)
    dy = tl.load(dy_ptr + step * dy_stride + channel, mask=in_range, other=0.0)
    dtotal = dy * sigmoid * (1.0 + total * (1.0 - sigmoid))
    tl.store(dtotal_ptr + step * d + channel, dtotal.to(dtotal_ptr.dtype.element_ty), mask=in_range)

    # -- sums over the tile's steps --
    parts_ptr += tl.program_id(0).to(tl.int64) * (k + 1) * d + channel
    for j in tl.static_range(k):
        tl.store(parts_ptr + j * d, tl.sum(shifted[j] * dtotal, 0), mask=exists)
    tl.store(parts_ptr + k * d, tl.sum(dtotal, 0), mask=exists)


@jit
def _sum_of_taps(
    x_ptr, weight_ptr, x_stride, l, d: constexpr, k: constexpr, LEFT: constexpr, TILE: constexpr
):
    """A tile of the sum, and where it is.

    total: the sum over the taps, (TILE, 64). shifted: the k shifted tiles of x in it. step: its
    steps, counted through the batch, (TILE, 1). channel: its channels, (64,). exists: which of the
    channels there are. in_range: which elements of the tile.
    """
    # -- where this program works --
    tiles = tl.cdiv(l, TILE)
    t = (tl.program_id(0) % tiles * TILE + tl.arange(0, TILE))[:, None]
    step = (tl.program_id(0) // tiles).to(tl.int64) * l + t
    channel = tl.program_id(1) * 64 + tl.arange(0, 64)
    exists = channel < d
    in_range = (t < l) & exists

    # -- one tap after the other --
    total = tl.zeros((TILE, 64), tl.float32)
    shifted = ()
    for j in tl.static_range(k):
        there = t + j - LEFT
        in_row = in_range & (there >= 0) & (there < l)
        x = tl.load(x_ptr + (step + j - LEFT) * x_stride + channel, mask=in_row, other=0.0)
        total += x * tl.load(weight_ptr + j * d + channel, mask=exists, other=0.0)
        shifted += (x,)
    return total, shifted, step, channel, exists, in_range


def _run_convolution(kernel, x: Tensor, weight: Tensor, left: int, **pointers):
    """Runs one of the two kernels on x (b, l, d), with the taps weight (d, k)."""
    b, l, d = x.shape
    k = weight.shape[1]
    weight = weight.float().T.contiguous()  # (k, d), so that a tap's channels lie side by side
    grid = (b * _ceil_div(l, CONV_TILE), _ceil_div(d, 64))
    sizes = dict(l=l, d=d, k=k, LEFT=left, TILE=CONV_TILE, enable_fp_fusion=True)
    with torch.cuda.device_of(x):
        kernel[grid](**_strided(x=x), weight_ptr=weight, **pointers, **sizes)


def _convolution_forward(u: Tensor, weight: Tensor, bias: Tensor, left: int) -> Tensor:
    """`short_convolution` by its kernel."""
    y = u.new_empty(u.shape)
    bias = bias.float().contiguous()
    _run_convolution(_convolution, u, weight, left, bias_ptr=bias, y_ptr=y)
    return y


_conv_triton = torch.library.custom_op(
    f"{NAMESPACE}::convolution", _convolution_forward, mutates_args=()
)


@torch.library.custom_op(f"{NAMESPACE}::convolution_backward", mutates_args=())
def _conv_triton_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, left: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, weight and bias."""
    b, l, d = u.shape
    k = weight.shape[1]

    # the gradient of the total inside SiLU, and sums over tiles
    dtotal = u.new_empty(u.shape)
    parts = u.new_empty(b * _ceil_div(l, CONV_TILE), k + 1, d, dtype=torch.float32)
    pointers = _strided(dy=dy) | dict(bias_ptr=bias.float().contiguous())
    outputs = dict(dtotal_ptr=dtotal, parts_ptr=parts)
    _run_convolution(_convolution_gradients, u, weight, left, **pointers, **outputs)
    dweight, dbias = parts.sum(0).split((k, 1))
    dweight = _empty_like(weight).copy_(dweight.T)
    dbias = _empty_like(bias).copy_(dbias[0])

    # the gradient of u is dtotal convolved with the flipped taps
    du = u.new_empty(u.shape)
    flipped = weight.flip(1)
    _run_convolution(_convolution, dtotal, flipped, k - 1 - left, bias_ptr=None, y_ptr=du)
    return du, dweight, dbias


def _keep_convolution(ctx, inputs, output):
    *tensors, ctx.left = inputs
    ctx.save_for_backward(*tensors)


def _convolution_backward(ctx, dy):
    return *_conv_triton_backward(dy, *ctx.saved_tensors, ctx.left), None


_conv_triton.register_fake(lambda u, weight, bias, left: u.new_empty(u.shape))
_conv_triton_backward.register_fake(
    lambda dy, u, weight, bias, left: (_empty_like(u), _empty_like(weight), _empty_like(bias))
)
_conv_triton.register_autograd(_convolution_backward, setup_context=_keep_convolution)


# ================================== Part III: the rest =========================================

# ---- Checks of arguments ----


def check_config(config: MaBERTConfig):
    """Raises a ValueError that names a field, its value and what is allowed."""

    def require(field: str, fits: bool, allowed: str):
        if not fits:
            value = getattr(config, field)
            raise ValueError(f"MaBERTConfig.{field} is {value!r}; it must be {allowed}")

    # sizes
    for field in dataclasses.fields(config):
        if field.type is int and field.name != "pad_token_id":
            require(field.name, is_size(getattr(config, field.name)), "a positive integer")
    rank_fits = config.dt_rank is None or is_size(config.dt_rank)
    require("dt_rank", rank_fits, "a positive integer or None")
    heads_divide = config.hidden_size % config.num_heads == 0
    require("hidden_size", heads_divide, f"a multiple of num_heads ({config.num_heads})")

    # the pattern; a layer H has half of the heads and half of the inner width
    letters = set(config.pattern) if isinstance(config.pattern, str) else set()
    require("pattern", letters and letters <= set(LAYERS), f"letters of {', '.join(LAYERS)}")
    for field in ("num_heads", "expand"):
        fits = "H" not in letters or getattr(config, field) % 2 == 0
        require(field, fits, "even, since a layer H takes half of it")

    # numbers with a range
    dropout = config.dropout
    require("dropout", isinstance(dropout, (int, float)) and 0 <= dropout < 1, "in [0, 1)")
    eps = config.layer_norm_eps
    eps_fits = isinstance(eps, float) and 0 < eps < math.inf
    require("layer_norm_eps", eps_fits, "a positive, finite float")
    pad = config.pad_token_id
    require(
        "pad_token_id", type(pad) is int and 0 <= pad < config.vocab_size, "an id below vocab_size"
    )

    # choices
    require("causal_conv", isinstance(config.causal_conv, bool), "True or False")
    require("pooling", config.pooling in POOLINGS, f"one of {POOLINGS}")
    require("scan_backend", config.scan_backend in SCAN_BACKENDS, f"one of {SCAN_BACKENDS}")
    is_list = isinstance(config.psm, (tuple, list))
    stages_fit = is_list and all(stage in PSM_STAGES for stage in config.psm)
    require("psm", stages_fit, f"any of {PSM_STAGES}")


def is_size(x) -> bool:
    """Whether x is a positive integer, and not True."""
    return type(x) is int and x > 0


KINDS = {  # of tensors
    "floating-point": torch.is_floating_point,
    "int64 or int32": lambda x: x.dtype in (torch.int64, torch.int32),
    "not complex": lambda x: not x.is_complex(),
}


def check(name: str, x, kind: str, shape: tuple, *, below: int | None = None, also: int = 0):
    """Raises a ValueError of one line unless the argument called `name` fits.

    It must be a tensor of one of KINDS and of the shape, in which a word, such as "batch", stands
    for any length. If `below` is given, its values must be whole numbers in [0, below), or equal to
    `also` (0 allows no other).
    Values are looked at on a CPU and outside torch.compile only: elsewhere that would make a GPU
    wait, or break the graph.
    """
    problem = None
    if not isinstance(x, Tensor):
        problem = f"is of type {type(x).__name__}"
    elif not (KINDS[kind](x) and has_shape(x, shape)):
        problem = f"is {x.dtype} of shape {tuple(x.shape)}"
    elif below and x.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = x[(x != also) & ((x < 0) | (x >= below) | (x != x.long()))]
        if len(wrong):
            problem = f"has the value {wrong[0].item()}"
    if not problem:
        return

    allowed = f"a tensor of shape {tuple(shape)}, {kind}".replace("'", "")  # words, not strings
    if below:
        allowed += f", of whole numbers from 0 to {below - 1}"
    if also:
        allowed += f" or {also}"
    raise ValueError(f"{name} {problem}; it must be {allowed}")


def has_shape(x: Tensor, shape: tuple) -> bool:
    if x.dim() != len(shape):
        return False
    return all(isinstance(size, str) or size == length for size, length in zip(shape, x.shape))


def as_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """The mask called `name`, (b, l), as bool; None stays None. Raises what `check` raises."""
    if mask is None:
        return None
    check(name, mask, "not complex", shape, below=2)
    return mask.bool()


def check_ids(config: MaBERTConfig, input_ids, token_type_ids):
    """Raises ValueError for ids or token types, which may be None, that do not fit the config."""
    integers = "int64 or int32"
    check("input_ids", input_ids, integers, ("batch", "length"), below=config.vocab_size)
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it is empty")
    if token_type_ids is not None:
        shape = input_ids.shape
        check("token_type_ids", token_type_ids, integers, shape, below=config.type_vocab_size)


def check_length(config: MaBERTConfig, input_ids: Tensor, mask: Tensor | None):
    """Raises ValueError where a row has more real tokens than there are positions.

    Counting them makes the CPU wait for a GPU and breaks a compiled graph. So nothing is counted
    where the padded length is within max_position, or under torch.compile.
    """
    limit = config.max_position
    count = input_ids.shape[1]
    if count > limit and mask is not None:
        if torch.compiler.is_compiling():
            return
        count = int(mask.sum(dim=-1).max())
    if count > limit:
        advice = "see MaBERT.resize_positions"
        raise ValueError(f"a row has {count} real tokens; max_position is {limit} ({advice})")


def check_scan(u, delta, A, B, C, D, z, delta_bias):
    """Raises ValueError for arguments of a scan that do not fit together."""
    check("u", u, "floating-point", ("batch", "length", "d"))
    check("A", A, "floating-point", (u.shape[2], "n"))
    b, l, d = u.shape
    n = A.shape[1]
    if 0 in (l, d, n):
        sizes = f"u has shape {(b, l, d)} and A {(d, n)}"
        raise ValueError(f"{sizes}; length, d and n must be at least 1")

    required = dict(delta=(delta, (b, l, d)), B=(B, (b, l, n)), C=(C, (b, l, n)))
    optional = dict(D=(D, (d,)), z=(z, (b, l, d)), delta_bias=(delta_bias, (d,)))
    for name, (x, shape) in (required | optional).items():
        if x is not None or name in required:
            check(name, x, "floating-point", shape)


# ---- Saving and loading ----
#
# A model's folder has config.json and model.pt, the state dict. The names of the encoder's weights
# begin with "encoder." in every model, a bare encoder included, so that it moves between heads.


def save_model(model: PretrainedModel, folder: Path):
    """Writes config.json and model.pt; each file appears whole or not at all."""
    prefix = "encoder." if isinstance(model, MaBERT) else ""
    weights = model.state_dict(prefix=prefix)
    config = json.dumps(dataclasses.asdict(model.config), indent=2) + "\n"

    partial = folder / ".partial"  # there may be one, of a save that was killed
    partial.mkdir(parents=True, exist_ok=True)
    try:
        torch_save(weights, partial / "model.pt")
        (partial / "config.json").write_text(config)
        for file in partial.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial)


def load_model(model_class: type, folder: Path, overrides: dict) -> PretrainedModel:
    """A model of the class, on the CPU and in eval mode, from a folder of `save_model`.

    The folder may hold another class: the encoder comes along, and a head that the file lacks, or
    has in another shape, is new; a warning says what was not loaded. Called on PretrainedModel
    itself, it chooses the class by the weights. overrides replace fields of the config (num_labels,
    pooling, psm, dropout, …), which the encoder's weights must fit. Nothing in the files is
    executed. Raises FileNotFoundError, or ValueError where a file is damaged, does not fit, or has
    weights that are not finite.
    """
    # read
    config = read_config(folder / "config.json", overrides)
    weights = read_weights(folder / "model.pt")

    # choose the class by the head
    if model_class is PretrainedModel:
        if "classifier.weight" in weights:
            model_class = MaBERTForSequenceClassification
        elif "decoder_bias" in weights:
            model_class = MaBERTForMaskedLM
        else:
            model_class = MaBERT

    # build
    model = model_class(config)
    encoder = model if model_class is MaBERT else model.encoder
    head = {} if model_class is MaBERT else model.state_dict()
    head = {name: weight for name, weight in head.items() if not name.startswith("encoder.")}

    # load the whole encoder, and what fits of the head
    in_encoder = {name for name in weights if name.startswith("encoder.")}
    in_head = {name for name in head if name in weights and weights[name].shape == head[name].shape}
    try:
        encoder.load_state_dict(
            {name.removeprefix("encoder."): weights[name] for name in in_encoder}
        )
    except RuntimeError as error:  # it names all that does not fit
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"{folder / 'model.pt'} does not fit its config: {reason}") from None
    model.load_state_dict({name: weights[name] for name in in_head}, strict=False)

    # say what is new
    new = ", ".join(sorted(head.keys() - in_head)) or "nothing"
    unused = ", ".join(sorted(weights.keys() - in_encoder - in_head)) or "nothing"
    if (new, unused) != ("nothing", "nothing"):
        message = f"new and untrained: {new}; in the file but not used: {unused}"
        logger.warning("%s: encoder loaded; %s", folder, message)
    return model.eval()


def read_config(file: Path, overrides: dict) -> MaBERTConfig:
    try:
        fields = json.loads(existing(file).read_text(encoding="utf-8"))
        return MaBERTConfig(**fields | overrides)
    except (TypeError, ValueError) as error:
        message = f"{file} with the overrides {overrides} is no valid config: {error}"
        raise ValueError(message) from error


def read_weights(file: Path) -> dict[str, Tensor]:
    weights = torch_load(existing(file))
    for name, weight in weights.items():
        is_weight = isinstance(name, str) and isinstance(weight, Tensor)
        if not (is_weight and weight.is_floating_point()):
            raise ValueError(
                f"{file} is damaged or not written by save_pretrained: not all of it is weights"
            )
        if not weight.isfinite().all():
            raise ValueError(
                f"{file} has weights that are not finite: the training that made it diverged, and "
                "a lower --lr helps there"
            )
    return weights


def existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: give a local folder that save_pretrained wrote"
        )
    return file


def torch_save(values: dict, file: Path):
    """torch.save, but with an OSError where writing fails: its own error does not name the disk."""
    try:
        torch.save(values, file)
    except RuntimeError as error:
        if "CUDA" in str(error):  # of a kernel that ran before
            raise
        raise OSError(f"cannot write {file}: is the disk full? ({error})") from error


def torch_load(file: Path) -> dict:
    """A dict that torch.save wrote, on the CPU; nothing in the file is executed.

    Raises ValueError where the file is damaged, which torch.load, as it ignores checksums, would
    often miss.
    """
    try:
        damaged = zipfile.ZipFile(file).testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # a truncated or foreign file fails in any of a dozen ways
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"{file} is damaged or not ours: {reason}") from error


# ---- The command: python mabert.py FOLDER "text with a [MASK]" ----


@torch.no_grad()
def main(argv: list[str] | None = None):
    """Runs a trained model on a text, or on a pair of them. A masked language model gives five
    guesses for each [MASK], or, where there is none, the text's embedding: the mean of its hidden
    states. A classifier gives the probability of each class, by its name in labels.json, or the
    value of a regression."""
    # read the arguments, the model and its tokenizer
    parser = argparse.ArgumentParser(description=" ".join(main.__doc__.split()))
    parser.add_argument(
        "folder", type=Path, help="written by train_mlm.py, or by finetune_glue.py --save"
    )
    parser.add_argument("text", help="in quotation marks")
    parser.add_argument("second", nargs="?", help="the second text, for a classifier of pairs")
    args = parser.parse_args(argv)
    texts = [args.text] if args.second is None else [args.text, args.second]
    if len(texts) == 2 and Path(args.text).is_dir():  # a shell's * has found several
        parser.error(f"{args.text} is a folder: give one folder, then the text")
    try:
        model = PretrainedModel.from_pretrained(args.folder)
        tokenizer = load_tokenizer(args.folder / "tokenizer.json")
        names = class_names(args.folder / "labels.json", model.config.num_labels)
        cls_id, sep_id, mask_id = map(tokenizer.token_to_id, ("[CLS]", "[SEP]", "[MASK]"))

        # the row: not every tokenizer.json adds special tokens by itself
        ids = [cls_id]
        types = [0]
        for i, text in enumerate(texts):
            text = text.encode(errors="replace").decode()  # bytes that are not UTF-8 become "?"
            tokens = tokenizer.encode(text, add_special_tokens=False).ids
            ids += [*tokens, sep_id]
            types += [i] * (len(tokens) + 1)

        # run the model
        ids = torch.tensor([ids])
        types = torch.tensor([types])
        output = model(ids, token_type_ids=types)

        # print
        if isinstance(model, MaBERTForSequenceClassification):
            print_classes(output.logits[0], names)
        elif isinstance(model, MaBERTForMaskedLM) and mask_id in ids:
            print_guesses(output.logits[ids == mask_id], tokenizer)
        else:
            encoder = getattr(model, "encoder", model)
            print_embedding(encoder(ids, token_type_ids=types)[0].mean(dim=0))

    # RuntimeError: the scan_backend of the config cannot run here
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"mabert.py: {error}")


def load_tokenizer(file: Path):
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{file} is missing or damaged: {error}") from error
    if None in map(tokenizer.token_to_id, ("[CLS]", "[SEP]", "[MASK]")):
        raise ValueError(f"{file} lacks [CLS], [SEP] or [MASK]")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def class_names(file: Path, count: int) -> list[str]:
    """The names of a classifier's classes, from labels.json if there is one."""
    if not file.exists():
        return [f"class {i}" for i in range(count)]
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
        if not (isinstance(names, list) and len(names) == count):
            raise ValueError(f"it must be a list of {count} names")
        return names
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def print_classes(logits: Tensor, names: list[str]):
    if len(logits) == 1:
        print(f"value: {logits.item():.4f}")
        return
    for name, probability in zip(names, logits.softmax(dim=0).tolist()):
        print(f"{name}: {probability:.4f}")


def print_guesses(logits: Tensor, tokenizer):
    for probabilities in logits.softmax(dim=1):  # one row for each [MASK]
        best = probabilities.topk(5)
        guesses = []
        for probability, token in zip(best.values.tolist(), best.indices.tolist()):
            word = tokenizer.id_to_token(token) or f"id {token}"  # the model may have more ids
            guesses.append(f"{word} {probability:.4f}")
        print("[MASK]:", ", ".join(guesses))


def print_embedding(x: Tensor):
    first = " ".join(f"{value:.4f}" for value in x[:5].tolist())
    print(f"embedding: norm {x.norm():.4f}, {len(x)} numbers: {first} ...")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
    main()
