"""MaBERT in one file: a BERT-sized masked-language-model encoder that interleaves Mamba and Transformer layers.

Paper: "MaBERT: A Padding-Safe Interleaved Transformer–Mamba Hybrid Encoder for Efficient Extended-Context Masked
Language Modeling", Kim and Park, 2026, arXiv:2603.03001. Equation numbers below are the paper's.

What is particular about it:
- the layer pattern is a string, MMT four times: M is a Mamba layer (a selective state-space scan, left to right, linear
  in length), T is a Transformer layer (bidirectional attention); not the paper's: W is M from right to left, H half of
  an M and half of a T side by side;
- padding-safe masking (PSM): the number of pads in a batch never changes what the model says about real tokens; the
  paper's two stages, and a third that makes this exact;
- mask-aware attention pooling (MAP) feeds the classifier.

Letters in the shape comments, and their names in the config:
    b  batch                        d  inner width of the Mamba core, expand * h
    l  sequence length              n  state size per channel, d_state (16)
    h  hidden size (768)            r  rank of Δ, dt_rank (⌈h / 16⌉)
    c  chunks of the scan           k  width of the convolution, d_conv (4)
Capitals A, B, C, D are the state-space matrices. `delta` is Δ before bias, softplus and mask; `rho` is what it is
projected from. In the scan u is the input, x = Δ u, and h_t the state at step t. A row is a sequence of the batch.
Masks are True at real tokens and False at pads.

Map of the file:
    Part I, the model     MaBERTConfig · MambaMixer, MambaLayer · SelfAttention, TransformerLayer · HybridLayer ·
                          saving, loading · MaBERT · Pooling · MaBERTForMaskedLM, MaBERTForSequenceClassification ·
                          checks of arguments
    Part II, the scan     reference_scan, the masked selective scan as its formula; the same as a faster loop, and as
                          Triton kernels for a GPU, with a kernel for the short convolution, each with a backward pass;
                          short_convolution and selective_scan, which pick
    The command           python mabert.py FOLDER "text with a [MASK]"
"""

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import math
import sys
import tempfile
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
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=float)  # enough for the definitions below

logger = logging.getLogger("mabert")

# ================================================= Part I: the model ==================================================

PSM_STAGES = ("pre", "scan", "post")  # see MambaLayer
POOLINGS = ("map", "attn", "cls", "mean")
SCAN_BACKENDS = (None, "loop", "triton")


@dataclasses.dataclass
class MaBERTConfig:
    """Sizes and variants of a MaBERT model. The defaults are the paper's where it gives them (psm adds one stage), else
    BERT's and Mamba's. Raises ValueError that names the field, its value and what is allowed."""

    vocab_size: int = 30522
    hidden_size: int = 768
    pattern: str = "MMTMMTMMTMMT"  # a letter for each layer: M, W, H or T (see LAYERS)
    num_heads: int = 12
    intermediate_size: int = 3072
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None  # rank of Δ; None means ⌈hidden_size / 16⌉
    causal_conv: bool = (
        False  # the core's convolution looks back only, as Mamba's does; else to both sides
    )
    max_position: int = (
        512  # the most real tokens that a row may have (`MaBERT.resize_positions` changes it)
    )
    type_vocab_size: int = 2
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    psm: tuple[str, ...] = (
        PSM_STAGES  # padding-safe masking; the paper has "pre" and "post", "scan" makes them exact
    )
    pooling: str = (
        "map"  # what the classifier reads: "map", "attn", "cls" or "mean" (see `Pooling`)
    )
    num_labels: int = 2  # classes of the classifier; 1 means regression
    scan_backend: str | None = None  # passed to `selective_scan` and `short_convolution`

    def __post_init__(self):
        def positive(x):
            return type(x) is int and x > 0

        sizes = "vocab_size hidden_size num_heads intermediate_size d_state d_conv expand max_position type_vocab_size"
        rules = [
            (field, positive, "a positive integer") for field in (*sizes.split(), "num_labels")
        ]
        rules += [
            (
                "hidden_size",
                lambda x: x % self.num_heads == 0,
                f"a multiple of num_heads ({self.num_heads})",
            ),
            (
                "pattern",
                lambda x: isinstance(x, str) and x and {*x} <= {*LAYERS},
                f"letters of {', '.join(LAYERS)}",
            ),
            (
                "num_heads",
                lambda x: x % 2 == 0 or "H" not in self.pattern,
                "even, since a layer H takes half of them",
            ),
            ("dt_rank", lambda x: x is None or positive(x), "a positive integer or None"),
            ("causal_conv", lambda x: isinstance(x, bool), "True or False"),
            ("dropout", lambda x: isinstance(x, (int, float)) and 0 <= x < 1, "in [0, 1)"),
            (
                "layer_norm_eps",
                lambda x: isinstance(x, float) and 0 < x < math.inf,
                "a positive, finite float",
            ),
            (
                "pad_token_id",
                lambda x: type(x) is int and 0 <= x < self.vocab_size,
                "an id below vocab_size",
            ),
            (
                "psm",
                lambda x: isinstance(x, (tuple, list)) and all(y in PSM_STAGES for y in x),
                f"any of {PSM_STAGES}",
            ),
            ("pooling", lambda x: x in POOLINGS, f"one of {POOLINGS}"),
            ("scan_backend", lambda x: x in SCAN_BACKENDS, f"one of {SCAN_BACKENDS}"),
        ]
        for field, fits, allowed in rules:
            if not fits(getattr(self, field)):
                raise ValueError(
                    f"MaBERTConfig.{field} is {getattr(self, field)!r}; it must be {allowed}"
                )
        self.psm = tuple(
            stage for stage in PSM_STAGES if stage in self.psm
        )  # in order, each once; JSON brings a list


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """With BERT's initialisation: weights normal(0, 0.02), biases 0."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class LayerNorm(nn.LayerNorm):
    """PyTorch's, with eps ≥ 1e-7 in float16: on a zero vector (a pad) BERT's 1e-12 gives 1/√eps = 10⁶, an overflow."""

    def forward(self, x: Tensor) -> Tensor:
        eps = max(self.eps, 1e-7) if x.dtype == torch.float16 else self.eps
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, eps)


class MambaMixer(nn.Module):
    """The core of a Mamba layer (Eqs. 4–9): projections, a short convolution and the selective scan. (b, l, h) ->
    (b, l, h); with a mask (b, l), bool, pads pass the scan's state through. With reverse it is mirrored: convolution
    and scan run from right to left."""

    def __init__(self, config: MaBERTConfig, reverse: bool = False):
        super().__init__()
        h, n, k = config.hidden_size, config.d_state, config.d_conv
        d, r = config.expand * h, config.dt_rank or math.ceil(h / 16)
        self.rho_B_C_sizes = (r, n, n)
        left = k - 1 if config.causal_conv else (k - 1) // 2
        self.conv_left = (
            k - 1 - left if reverse else left
        )  # so many tokens on the left the convolution sees
        self.reverse, self.backend = reverse, config.scan_backend
        self.in_proj = linear(h, 2 * d, bias=False)
        self.conv1d = nn.Conv1d(d, d, k, groups=d)
        self.x_proj = linear(d, r + 2 * n, bias=False)
        self.out_proj = linear(d, h, bias=False)
        # Mamba's own initialisation of Δ, A and D
        self.dt_proj = nn.Linear(
            r, d
        )  # PyTorch's weights, uniform ±1/√r, are Mamba's too; never called as a layer
        delta = torch.exp(torch.empty(d).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_proj.bias = nn.Parameter(
            delta + torch.log(-torch.expm1(-delta))
        )  # the inverse of softplus
        self.A_log = nn.Parameter(torch.arange(1, n + 1).log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        # Eqs. 4–9, in their order
        u, z = self.in_proj(x).chunk(2, dim=-1)  # both (b, l, d)
        u = short_convolution(
            u, self.conv1d.weight[:, 0], self.conv1d.bias, self.conv_left, self.backend
        )
        rho, B, C = self.x_proj(u).split(
            self.rho_B_C_sizes, dim=-1
        )  # (b, l, r), (b, l, n), (b, l, n)
        delta = F.linear(
            rho, self.dt_proj.weight
        )  # (b, l, d); its bias and softplus join in the scan
        A = -torch.exp(self.A_log)  # (d, n)
        # the scan, + D u, · SiLU(z)
        how = dict(delta_softplus=True, mask=mask, reverse=self.reverse, backend=self.backend)
        y = selective_scan(u, delta, A, B, C, self.D, z, self.dt_proj.bias, **how)  # (b, l, d)
        return self.out_proj(y)


def feed_forward(config: MaBERTConfig) -> nn.Sequential:
    h, inner = config.hidden_size, config.intermediate_size
    return nn.Sequential(linear(h, inner), nn.GELU(), linear(inner, h))


class MambaLayer(nn.Module):
    """A pre-LN Mamba layer with padding-safe masking (Eqs. 2–3, 10): x (b, l, h), mask (b, l) -> (b, l, h).

    The three stages, any of which config.psm selects:
    - pre:  the core's input is zero at pads, so the convolution sees zeros there, as it does beyond a row's ends;
    - scan: at pads Δ = 0, so exp(Δ A) = 1 and nothing enters the state: it passes through untouched. Without this
            stage, zeroed input is not enough: the convolution's bias makes u, B and Δ non-zero at pads;
    - post: the block's output is zero at pads, residual path and feed-forward included.

    With reverse, the layer is mirrored, so that it sees what is on the right. Pads on the right then come first.
    """

    def __init__(self, config: MaBERTConfig, reverse: bool = False):
        super().__init__()
        self.psm = config.psm
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = MambaMixer(config, reverse)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.mixer(x, mask if "scan" in self.psm else None)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        def masked(stage, x):
            return x if mask is None or stage not in self.psm else x * mask[..., None]

        x = x + self.dropout(self.mix(masked("pre", self.norm1(x)), mask))  # Eq. 2
        return masked("post", x + self.dropout(self.ffn(self.norm2(x))))  # Eq. 3


class SelfAttention(nn.Module):
    """Bidirectional multi-head self-attention; pads get no weight as keys: x (b, l, h), mask (b, l) -> (b, l, h).
    With `heads`, only so many of config.num_heads."""

    def __init__(self, config: MaBERTConfig, heads: int | None = None):
        super().__init__()
        self.heads = heads or config.num_heads
        self.dropout = config.dropout
        inner = config.hidden_size // config.num_heads * self.heads
        self.qkv = linear(config.hidden_size, 3 * inner)
        self.out_proj = linear(inner, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (b, heads, l, width)
        if mask is not None:
            mask = mask | ~mask.any(
                dim=-1, keepdim=True
            )  # a row of pads sees its pads: softmax over nothing is NaN
            mask = mask[:, None, None]  # (b, 1, 1, l)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """A pre-LN Transformer layer (Eq. 1): x (b, l, h), mask (b, l) -> (b, l, h)."""

    def __init__(self, config: MaBERTConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        return x + self.dropout(self.ffn(self.norm2(x)))


class HybridLayer(MambaLayer):
    """Attention and a Mamba mixer side by side, each half of a layer (half of the heads, expand 1): x (b, l, h), mask
    (b, l) -> (b, l, h). Both read the same normalised, pre-masked input; their outputs are normalised and averaged (as
    in Hymba, arXiv 2411.13676, and arXiv 2510.04800), at first with a gain of 0.1, about what attention or a mixer adds
    to x in the other layers. The stages of PSM are those of MambaLayer."""

    def __init__(self, config: MaBERTConfig):
        super().__init__(dataclasses.replace(config, expand=1))
        self.attention = SelfAttention(config, heads=config.num_heads // 2)
        self.norms = nn.ModuleList(
            LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(2)
        )
        for norm in self.norms:
            nn.init.constant_(norm.weight, 0.1)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return (self.norms[0](self.attention(x, mask)) + self.norms[1](super().mix(x, mask))) / 2


LAYERS = {  # the letters of config.pattern
    "M": MambaLayer,
    "W": functools.partial(MambaLayer, reverse=True),
    "H": HybridLayer,
    "T": TransformerLayer,
}


# ---- Saving and loading, which the models below share ----


def torch_load(file: Path) -> dict:
    """A dict that torch.save wrote, on the CPU; nothing in the file is executed. ValueError where it is damaged."""
    try:
        if part := zipfile.ZipFile(file).testzip():  # torch.load does not look at checksums
            raise ValueError(f"the checksum of {part} is wrong")
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # a truncated or foreign file fails in any of a dozen ways
        raise ValueError(
            f"{file} is damaged or not ours: {textwrap.shorten(str(error), 300)}"
        ) from error


class PretrainedModel(nn.Module):
    """A model with a config, saved in a folder as config.json and model.pt, its state dict. The encoder's names begin
    with "encoder." in a model with a head."""

    def save_pretrained(self, folder: str | Path):
        """Writes config.json and model.pt; each file appears whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as partial:
            torch.save(self.state_dict(), Path(partial, "model.pt"))
            Path(partial, "config.json").write_text(
                json.dumps(dataclasses.asdict(self.config), indent=2) + "\n"
            )
            for file in Path(partial).iterdir():
                file.replace(Path(folder, file.name))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides):
        """Reads a folder that save_pretrained wrote, of this class or another, into a model on the CPU in eval mode.
        PretrainedModel.from_pretrained gives the class whose weights these are.

        overrides replace config fields (num_labels, pooling, psm, dropout, ...). The encoder's weights must fit the
        config; a head that the file lacks, or has in another shape, is new, and a warning says what was not loaded.
        Nothing in the file is executed. Raises FileNotFoundError; ValueError where a file is damaged or does not fit.
        """
        config_file, weights_file = Path(folder, "config.json"), Path(folder, "model.pt")
        for file in (config_file, weights_file):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is missing: give a folder that save_pretrained wrote"
                )
        try:
            config = MaBERTConfig(**json.loads(config_file.read_text(encoding="utf-8")) | overrides)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{config_file} with the overrides {overrides} is no valid config: {error}"
            ) from error
        saved = torch_load(weights_file)
        if not all(
            isinstance(weight, Tensor) and weight.is_floating_point() for weight in saved.values()
        ):
            raise ValueError(
                f"{weights_file} is damaged or not written by save_pretrained: not all of it are weights"
            )
        if not any(name.startswith("encoder.") for name in saved):  # a bare encoder's
            saved = {f"encoder.{name}": weight for name, weight in saved.items()}
        if cls is PretrainedModel:
            classes = {
                "classifier.weight": MaBERTForSequenceClassification,
                "decoder_bias": MaBERTForMaskedLM,
            }
            cls = next((classes[name] for name in classes if name in saved), MaBERT)
        model = cls(config)
        whole = nn.ModuleDict({"encoder": model}) if isinstance(model, MaBERT) else model
        head = {
            name: weight
            for name, weight in whole.state_dict().items()
            if not name.startswith("encoder.")
        }
        fits = [name for name in head if name in saved and saved[name].shape == head[name].shape]
        used = {
            name: weight
            for name, weight in saved.items()
            if name.startswith("encoder.") or name in fits
        }
        try:
            whole.load_state_dict(head | used)
        except RuntimeError as error:  # it names all that does not fit
            raise ValueError(
                f"{weights_file} does not fit its config: {textwrap.shorten(str(error), 300)}"
            ) from None
        new, unused = (", ".join(sorted(names.keys() - used.keys())) for names in (head, saved))
        if new or unused:
            said = f"new and untrained: {new or 'nothing'}; in the file but not used: {unused or 'nothing'}"
            logger.warning("%s: encoder loaded; %s", folder, said)
        return model.eval()


class MaBERT(PretrainedModel):
    """The encoder: embeddings, the layers that config.pattern spells, a final LayerNorm.

    forward(input_ids, attention_mask=None, token_type_ids=None) -> hidden states (b, l, h)
    - input_ids, token_type_ids: int64 or int32 (b, l); types default to 0
    - attention_mask: (b, l), bool or 0/1 of any dtype, 1 at real tokens; None means that all are real

    Positions count real tokens only, so padding on either side changes nothing; hidden states at pads mean nothing.
    Raises ValueError for wrong types or shapes, a mask or ids with wrong values (CPU, eager mode), or more than
    max_position real tokens in a row; the padded length may be larger.
    """

    def __init__(self, config: MaBERTConfig):
        super().__init__()
        if not isinstance(config, MaBERTConfig):
            raise ValueError(
                f"config is {textwrap.shorten(repr(config), 100)}; it must be a MaBERTConfig"
            )
        self.config = config = dataclasses.replace(
            config
        )  # our own copy: resize_positions changes it
        h = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, h, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position, h)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, h)
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(table.weight, std=0.02)
        self.word_embeddings.weight.data[config.pad_token_id] = 0
        self.embedding_norm = LayerNorm(h, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LAYERS[letter](config) for letter in config.pattern)
        self.final_norm = LayerNorm(h, eps=config.layer_norm_eps)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None) -> Tensor:
        mask = self.check_inputs(input_ids, attention_mask, token_type_ids)
        if mask is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, l)
        else:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)  # (b, l)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        x = self.dropout(
            self.embedding_norm(x + self.token_type_embeddings(token_type_ids))
        )  # (b, l, h)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x)

    def check_inputs(self, input_ids, attention_mask, token_type_ids) -> Tensor | None:
        """The mask as bool, after looking at all three."""
        check("input_ids", input_ids, "int64 or int32", ("batch", "length"), self.config.vocab_size)
        if token_type_ids is not None:
            check(
                "token_type_ids",
                token_type_ids,
                "int64 or int32",
                input_ids.shape,
                self.config.type_vocab_size,
            )
        mask = check_mask("attention_mask", attention_mask, input_ids.shape)
        if input_ids.numel() == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; there is nothing in it"
            )
        length, limit = input_ids.shape[1], self.config.max_position
        if (
            length > limit and mask is not None
        ):  # to count costs a GPU a synchronisation, and breaks a compiled graph
            length = 0 if torch.compiler.is_compiling() else int(mask.sum(dim=-1).max())
        if length > limit:
            raise ValueError(
                f"a row has {length} real tokens; max_position is {limit} (see MaBERT.resize_positions)"
            )
        return mask

    @torch.no_grad()
    def resize_positions(self, max_position: int):
        """Stretches the position table to max_position rows by 1-D linear interpolation; the two ends stay the same.
        The table is a new parameter: make an optimizer afterwards. ValueError if it is not a positive integer."""
        config = dataclasses.replace(self.config, max_position=max_position)  # checks the value
        table = self.position_embeddings.weight  # (old, h)
        new = F.interpolate(
            table.T[None], size=max_position, mode="linear", align_corners=True
        )  # (1, h, new)
        self.position_embeddings = nn.Embedding.from_pretrained(
            new[0].T.contiguous(), freeze=not table.requires_grad
        )
        self.config.max_position = config.max_position


class Pooling(nn.Module):
    """One vector per row from its hidden states: forward(x, mask=None), x (b, l, h), mask (b, l) -> (b, h).

    - map:  mask-aware attention pooling (Eqs. 11–13): softmax over real tokens of a learned score, weighted sum
    - attn: the same without the mask: pads get weight too (one of the paper's variants for comparison)
    - cls:  the first real token
    - mean: the mean of the real tokens
    A row that is all padding pools to zero, whatever the kind.
    """

    def __init__(self, config: MaBERTConfig):
        super().__init__()
        self.kind = config.pooling
        if self.kind in ("map", "attn"):
            self.score = linear(
                config.hidden_size, 1, bias=False
            )  # Eq. 11's bias would cancel in the softmax

    def weights(self, x: Tensor, mask: Tensor) -> Tensor:
        """The weight of each token, (b, l)."""
        if self.kind == "cls":
            return F.one_hot(mask.int().argmax(dim=-1), mask.shape[1]).to(x.dtype)
        if self.kind == "mean":
            return mask / mask.sum(dim=-1, keepdim=True).clamp(min=1).to(x.dtype)
        scores = self.score(x).squeeze(-1)  # Eq. 11
        if self.kind == "map":
            scores = scores.masked_fill(
                ~mask, torch.finfo(scores.dtype).min
            )  # Eq. 12; −∞ would make a row of pads NaN
        return scores.softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        check("x", x, "floating-point", ("batch", "length", "hidden_size"))
        mask = check_mask("mask", mask, x.shape[:2])
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        weights = self.weights(x, mask) * mask.any(
            dim=-1, keepdim=True
        )  # (b, l), zero in a row of pads
        return (weights[..., None] * x).sum(dim=1)  # Eq. 13


class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor


class MaBERTForMaskedLM(PretrainedModel):
    """The encoder with BERT's masked-language-model head; the decoder's matrix is the word embedding's.

    forward(input_ids, attention_mask=None, token_type_ids=None, labels=None, reduction="mean") -> Output(loss, logits)
    - without labels: loss None, logits (b, l, vocab)
    - with labels, int64 or int32 (b, l), -100 where there is nothing to predict: the vocabulary projection runs on
      the labelled positions alone, and logits are (number labelled, vocab) in row-major order. The loss is the mean
      cross-entropy in nats over them (0 where there are none), or their sum with reduction="sum". Labels may be on
      the CPU while the rest is on a GPU: counting them then does not wait for the GPU.
    """

    def __init__(self, config: MaBERTConfig):
        super().__init__()
        self.encoder = MaBERT(config)
        self.config = self.encoder.config
        h = config.hidden_size
        self.transform = nn.Sequential(
            linear(h, h), nn.GELU(), LayerNorm(h, eps=config.layer_norm_eps)
        )
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self, input_ids, attention_mask=None, token_type_ids=None, labels=None, reduction="mean"
    ) -> Output:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
        x = self.encoder(input_ids, attention_mask, token_type_ids)  # (b, l, h)
        if labels is not None:
            check(
                "labels", labels, "int64 or int32", x.shape[:2], self.config.vocab_size, also=-100
            )
            places = (labels.flatten() != -100).nonzero().squeeze(1)  # (number labelled,)
            labels = labels.flatten()[places].long().to(x.device, non_blocking=True)
            x = x.flatten(0, 1).index_select(
                0, places.to(x.device, non_blocking=True)
            )  # (number labelled, h)
        logits = F.linear(self.transform(x), self.encoder.word_embeddings.weight, self.decoder_bias)
        if labels is None:
            return Output(None, logits)
        loss = F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum"
        )
        return Output(loss / max(1, labels.numel()) if reduction == "mean" else loss, logits)


class MaBERTForSequenceClassification(PretrainedModel):
    """The encoder with pooling and a linear classifier (Eq. 14).

    forward(input_ids, attention_mask=None, token_type_ids=None, labels=None) -> Output(loss, logits (b, num_labels))
    - labels: classes, int64 or int32 (b,), for the mean cross-entropy in nats; rows with -100 do not count
    - with num_labels=1: numbers of any dtype (b,), for the mean squared error
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
        logits = self.classifier(self.dropout(self.pooling(x, attention_mask)))  # (b, num_labels)
        if labels is None:
            return Output(None, logits)
        predicted = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.num_labels == 1:
            check("labels", labels, "not complex", x.shape[:1])
            return Output(F.mse_loss(predicted.squeeze(-1), labels.to(predicted.dtype)), logits)
        check("labels", labels, "int64 or int32", x.shape[:1], self.config.num_labels, also=-100)
        loss = F.cross_entropy(
            predicted, labels.long(), reduction="sum"
        )  # "mean" would be NaN where no row counts
        return Output(loss / (labels != -100).sum().clamp(min=1), logits)


# ---- Checks of arguments ----

KINDS = {  # of tensors
    "floating-point": torch.is_floating_point,
    "int64 or int32": lambda x: x.dtype in (torch.int64, torch.int32),
    "not complex": lambda x: not x.is_complex(),
}


def check(name: str, x, kind: str, shape: tuple, size: int | None = None, also: int = 0):
    """Raises a ValueError of one line unless the argument `name` is a tensor of one of KINDS and of the shape (a word
    there is any length) and, if size is given, of whole numbers in [0, size) or equal to `also`. Values
    are looked at on a CPU in eager mode only: a GPU would have to be waited for, a compiled graph would break."""
    found = None
    fits = isinstance(x, Tensor) and KINDS[kind](x) and x.dim() == len(shape)
    if not fits or any(n != m for n, m in zip(shape, x.shape) if not isinstance(n, str)):
        found = (
            f"is {x.dtype} of shape {tuple(x.shape)}"
            if isinstance(x, Tensor)
            else f"is of type {type(x).__name__}"
        )
    elif size and x.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = x[(x != also) & ((x < 0) | (x >= size) | (x != x.long()))]
        found = f"has the value {wrong[0].item()}" if len(wrong) else None
    if found:
        values = (
            f", of whole numbers from 0 to {size - 1}" + f" or {also}" * (also != 0) if size else ""
        )
        allowed = f"a tensor of shape {tuple(shape)}, {kind}{values}".replace("'", "")
        raise ValueError(f"{name} {found}; it must be {allowed}")


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """A (b, l) padding mask as bool; None, which means that all is real, stays None."""
    if mask is not None:
        check(name, mask, "not complex", shape, size=2)
    return mask if mask is None else mask.bool()


def check_scan(u, delta, A, B, C, D, z, delta_bias, mask) -> Tensor | None:
    """The mask as bool, after looking at all arguments of a scan."""
    check("u", u, "floating-point", ("batch", "length", "d"))
    check("A", A, "floating-point", (u.shape[2], "n"))
    (b, l, d), n = u.shape, A.shape[1]
    shapes = dict(delta=(b, l, d), B=(b, l, n), C=(b, l, n), D=(d,), z=(b, l, d), delta_bias=(d,))
    for (name, shape), tensor in zip(shapes.items(), (delta, B, C, D, z, delta_bias)):
        if tensor is not None or name in ("delta", "B", "C"):
            check(name, tensor, "floating-point", shape)
    if 0 in (l, d, n):
        raise ValueError(
            f"u has shape {(b, l, d)} and A {(d, n)}; length, d and n must be at least 1"
        )
    return check_mask("mask", mask, (b, l))


# ======================================== Part II: the masked selective scan ==========================================
#
# The recurrence and gate in Eqs. 4–9, with the mask inside. Per row, channel and state n; m = 1 at real tokens, else 0:
#
#     Δ_t = m_t · softplus(delta_t + delta_bias)       so that a pad passes the state through: exp(0 · A) = 1
#     h_t = exp(Δ_t A) h_{t−1} + Δ_t u_t B_t
#     y_t = m_t · SiLU(z_t) · (Σ_n C_t h_t + D u_t)
#
# softplus only with delta_softplus; with reverse (W layers), t runs from the right end.
# `reference_scan` is these three lines in PyTorch. The loop and the kernels compute the same faster, the loop on a CPU,
# the kernels on a GPU. `selective_scan`, after them, picks.


def reference_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    mask=None,
    reverse=False,
):
    """The formula, a step at a time, in plain PyTorch: on any device, in any dtype, with autograd. Slow. Arguments,
    result and errors are those of `selective_scan`."""
    mask = check_scan(u, delta, A, B, C, D, z, delta_bias, mask)
    dtype, m = (
        torch.promote_types(u.dtype, torch.float32),
        1 if mask is None else mask[..., None],
    )  # (b, l, 1)
    u_, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    delta = delta if delta_bias is None else delta + delta_bias.to(dtype)
    delta = m * (F.softplus(delta) if delta_softplus else delta)  # (b, l, d)
    x, h, y = delta * u_, 0, [None] * u.shape[1]
    for t in range(u.shape[1])[:: -1 if reverse else 1]:
        h = torch.exp(delta[:, t, :, None] * A) * h + x[:, t, :, None] * B[:, t, None]  # (b, d, n)
        y[t] = (h * C[:, t, None]).sum(dim=-1)  # (b, d)
    y = torch.stack(y, dim=1) + (0 if D is None else D.to(dtype) * u_)
    return (m * (y if z is None else F.silu(z.to(dtype)) * y)).to(u.dtype)


# ---- A loop ----
#
# Two ops, forward and backward, that know the whole formula, as the kernels below do. They take some rows and a chunk
# of steps at a time, and compute all that comes between in buffers that stay in a core's caches; the backward pass
# replays a chunk from the state that was kept at its start.

LOOP_CHUNK = 16  # steps. One state kept per chunk takes l / 16 · n · d numbers a row: with n = 16, as many as u
LOOP_BLOCK = (
    2**19
)  # numbers in a buffer, for each thread: 2 MB, of which the backward pass has three


def _empty_like(tensor):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _row_blocks(u, A, chunk):
    """Rows whose buffers fit the caches; on a GPU all at once, since launches cost there."""
    b, fit = len(u), LOOP_BLOCK * torch.get_num_threads() // (chunk * A.numel())
    size = max(1, b if u.is_cuda else fit)
    return [slice(i, min(i + size, b)) for i in range(0, b, size)]


def _chunks(rows, chunk, reverse, *tensors):
    """The chunks of these rows of each tensor (b, l, ...), numbered in the order of the scan. They are views with time
    first, (steps, rows, ...): with channels last, a step then is one multiply-add over contiguous memory."""
    parts = (
        itertools.repeat(None) if x is None else x[rows].transpose(0, 1).split(chunk)
        for x in tensors
    )
    return list(enumerate(list(zip(*parts))[:: -1 if reverse else 1]))


def _states(buffers, u, delta, A, B, bias, mask, h, softplus, reverse):
    """Of a chunk Δ (steps, b, d); and in two buffers the decays a_t = exp(Δ_t A) and the states before and after each
    step, each (steps, b, n, d). From u, delta (steps, b, d), A / ln 2 (n, d), B (steps, b, n), bias (d,), mask (steps,
    b) and h (b, n, d), the first state. On a CPU PyTorch's exp2 is faster than its exp."""
    delta = delta + bias
    delta = F.softplus(delta) if softplus else delta
    delta = delta if mask is None else delta * mask[..., None]
    states, a = buffers[0, : len(u) + 1], buffers[1, : len(u)]
    before, after = (states[1:], states[:-1]) if reverse else (states[:-1], states[1:])
    torch.mul(delta[:, :, None], A, out=a).exp2_()
    before[-1 if reverse else 0] = h
    torch.mul((delta * u)[:, :, None], B[..., None], out=after)
    for a_t, previous, state in list(zip(a, before, after))[:: -1 if reverse else 1]:
        state.addcmul_(a_t, previous)
    return delta, a, before, after


@torch.library.custom_op("mabert::scan_loop", mutates_args=())
def _scan_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, bias: Tensor,
    mask: Tensor | None, softplus: bool, reverse: bool, chunk: int, keep: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b, l, d) of dtype; and if `keep`, the states at the starts of chunks, (b, chunks, n, d)."""
    (b, l, d), n, kind = (
        u.shape,
        A.shape[1],
        torch.promote_types(u.dtype, torch.float32),
    )  # float64 stays
    A, D, bias = (A.T.to(kind) / math.log(2)).contiguous(), D.to(kind), bias.to(kind)
    y, kept = u.new_empty(b, l, d, dtype=dtype), A.new_empty(b, -(-l // chunk) if keep else 0, n, d)
    tensors = y, *(x if x is None else x.to(kind) for x in (u, delta, B, C, z, mask))
    with torch.autocast(u.device.type, enabled=False):  # else @ would be in half precision
        for rows in _row_blocks(u, A, chunk):
            buffers = A.new_empty(2, chunk + 1, rows.stop - rows.start, n, d)
            h = torch.zeros_like(buffers[0, 0])
            for i, (y_, u_, delta_, B_, C_, z_, m) in _chunks(rows, chunk, reverse, *tensors):
                if keep:
                    kept[rows, i] = h
                _, _, _, states = _states(buffers, u_, delta_, A, B_, bias, m, h, softplus, reverse)
                found = (
                    (C_[:, :, None] @ states).squeeze(2).addcmul_(u_, D)
                )  # (…, 1, n) @ (…, n, d)
                found = found if z is None else found.mul_(F.silu(z_))
                y_.copy_(found if mask is None else found.mul_(m[..., None]))
                h = states[0 if reverse else -1]
    return y, kept


@torch.library.custom_op("mabert::scan_loop_backward", mutates_args=())
def _scan_loop_backward(
    dy: Tensor, kept: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
    bias: Tensor, mask: Tensor | None, softplus: bool, reverse: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of u, delta, A, B, C, D, z and bias; z's is empty where there is no z.

    With s_t the loss's gradient by Σ_n C_t h_t + D u_t, and g_t by h_t:  g_t = s_t C_t + a_{t+1} g_{t+1},
    dx_t = Σ_n g_t B_t,  dB_t = Σ_d g_t x_t,  dC_t = Σ_d s_t h_t,  where x = Δ u;  and with w_t = g_t a_t h_{t−1}
    dΔ_t = Σ_n A w_t + u_t dx_t,  dA = Σ_{b,t} Δ_t w_t.
    """
    (_, _, d), n, kind = u.shape, A.shape[1], torch.promote_types(u.dtype, torch.float32)
    A_, D_, bias_ = A.T.to(kind).contiguous(), D.to(kind), bias.to(kind)  # A_ (n, d)
    A2 = A_ / math.log(2)
    du, ddelta, dB, dC, dz = outputs = [
        None if x is None else _empty_like(x) for x in (u, delta, B, C, z)
    ]
    dA, dD, dbias = map(torch.zeros_like, (A_, D_, bias_))
    tensors = *(x if x is None else x.to(kind) for x in (dy, u, delta, B, C, z, mask)), *outputs
    with torch.autocast(u.device.type, enabled=False):
        for rows in _row_blocks(u, A, chunk):
            buffers = dA.new_empty(3, chunk + 1, rows.stop - rows.start, n, d)
            q = torch.zeros_like(buffers[0, 0])  # a_{t+1} g_{t+1}
            for i, views in _chunks(rows, chunk, reverse, *tensors)[::-1]:
                s, u_, delta_, B_, C_, z_, m, du_, ddelta_, dB_, dC_, dz_ = views
                chunk_states = _states(
                    buffers, u_, delta_, A2, B_, bias_, m, kept[rows, i], softplus, reverse
                )
                delta_, a, before, after = chunk_states
                s = s if mask is None else s * m[..., None]
                if z is not None:
                    y = (C_[:, :, None] @ after).squeeze(2).addcmul_(u_, D_)
                    dz_.copy_(torch.ops.aten.silu_backward(y.mul_(s), z_))
                    s = s * F.silu(z_)
                dC_.copy_((s[:, :, None] @ after.mT).squeeze(2))  # (…, 1, d) @ (…, d, n)
                g = buffers[2, : len(s)]  # (steps, b, n, d)
                for a_t, g_t, C_t, s_t in list(zip(a, g, C_[..., None], s[:, :, None]))[
                    :: 1 if reverse else -1
                ]:
                    torch.addcmul(q, C_t, s_t, out=g_t)
                    q = a_t.mul_(g_t)
                dB_.copy_(((delta_ * u_)[:, :, None] @ g.mT).squeeze(2))
                dx = (B_[:, :, None] @ g).squeeze(2)
                q, w = q.clone(), a.mul_(before)
                dA += torch.mul(w, delta_[:, :, None], out=g).sum(dim=(0, 1))
                grad = w.mul_(A_).sum(dim=2).addcmul_(u_, dx)  # of Δ
                if softplus:
                    grad *= -torch.expm1(-delta_)  # softplus' derivative is 1 − exp(−Δ), 0 at pads
                elif mask is not None:
                    grad *= m[..., None]
                ddelta_.copy_(grad)
                torch.addcmul(dx.mul_(delta_), s, D_, out=du_)
                dD += (s * u_).sum(dim=(0, 1))
                dbias += grad.sum(dim=(0, 1))
    dA, dD, dbias = dA.T.contiguous().to(A.dtype), dD.to(D.dtype), dbias.to(bias.dtype)
    return du, ddelta, dA, dB, dC, dD, u.new_empty(0) if z is None else dz, dbias


# ---- The same in Triton ----
#
# A program of the scan is one warp on one block of 32 channels, one to a lane. It goes through time in tiles of TILE
# steps with all states of its channels in registers; there are enough of these for tiles of 8 steps forward and 4
# backward. Mask, softplus, D and z are part of the kernels. (`bench.py scan --static` checks what is said below of
# machine code.)
#
# Three phases let the segments of a row run in parallel, here three of them. In the figure subscripts number segments;
# a = exp(A Σ Δ) is a segment's decay, and backward q_t = a_t g_t (formulas at _scan_loop_backward) is what a step hands
# to the one on its left.
#
#     forward       segment 0             segment 1             segment 2
#     1.         0 ───────────▶ e₀     0 ───────────▶ e₁                             _segment_ends: each from zero
#     2.         h₀ = 0      ···▶      h₁ = a₀ h₀ + e₀ ···▶  h₂ = a₁ h₁ + e₁         _segment_starts: the ends alone
#     3.         h₀ ─────▶ y           h₁ ─────▶ y           h₂ ─────▶ y             _outputs: each from its start
#
#     backward
#     1.                               e₁ ◀─────────── 0     e₂ ◀─────────── 0       _segment_ends, BACKWARD
#     2.         q₀ = a₁ q₁ + e₁ ◀···  q₁ = a₂ q₂ + e₂ ◀···           q₂ = 0         _segment_starts, BACKWARD
#     3.         gradients ◀── q₀      gradients ◀── q₁      gradients ◀── q₂        _gradients
#
# Where rows × blocks fill the GPU by themselves there is one segment, and only the third phase runs. In it the forward
# pass keeps the state at the start of each chunk; the backward pass takes chunks from the right, replays each from that
# state, and goes back over it. A segment is whole chunks, a chunk whole tiles; only the row's last may be cut off by l.
# Nothing is added atomically: the same call gives the same bits.
#
# In memory u, delta, z, dy have a step's channels side by side and the next step's *_row further, outputs d further;
# both times SIGN, −1 with `reverse`. Between the kernels, all in float32 and with time as the scan goes:
#     A           (n, d)                                          log2(e) A: exp2 is an instruction, exp is not
#     packed      (b, tiles, 2 n + 1, TILE)     _pack, for all    B, C and the mask of a tile, which all channels share
#     ends        (b, segments, n, d)           _segment_ends     e; _segment_starts makes it h, or q, in place
#     delta_sums  (b, segments, d)              _segment_ends     Σ Δ
#     kept        (b, chunks − 1, n, d)         _outputs          the states that all chunks but the first start from
#     scratch     (programs, CHUNK/TILE, n, 32) _gradients        the states before each tile of the chunk in work
#     parts       (b, segments, n + 2, d)       _gradients        gradients of A, D and delta_bias, by segment
#     dBC         (b, blocks, tiles, n, 2, 4)   _gradients        gradients of B and C, by block of channels

INTERPRETED = (
    triton is not None and triton.knobs.runtime.interpret
)  # TRITON_INTERPRET=1: on CPU tensors, for tests
constexpr = tl.constexpr
LOG2E = constexpr(1 / math.log(2))
LN2 = constexpr(math.log(2))


def jit(function):
    """triton.jit, where there is Triton; one compilation serves all lengths."""
    return (
        triton.jit(function, do_not_specialize=["l", "segment", "segments"]) if triton else function
    )


@jit
def _sigmoid(x):
    """1 / (1 + e^−x), as rsqrt squared: exp2 and rsqrt are one instruction each, a division is several."""
    r = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return r * r


@jit
def _softplus(x):
    """max(x, 0) + log(1 + e), e = exp(−|x|); as log(1 + e) = 2 artanh(e / (2 + e)) it is accurate for tiny e too. The
    last coefficient of the series makes up for those left out."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    r = tl.rsqrt(2.0 + e)
    s = e * (r * r)
    q = s * s
    return tl.maximum(x, 0.0) + s * (
        2.0 + q * (2 / 3 + q * (2 / 5 + q * (2 / 7 + q * (2 / 9 + q * 0.215))))
    )


@jit
def _place(l, segment, d: constexpr, SIGN: constexpr):
    """Where a program works: row b of the batch, index in (b, segments), channels and which of them exist, the
    segment's first step and its end, and the row of memory (times SIGN) that is step 0."""
    b, channel = (
        tl.program_id(0) // tl.cdiv(d, 32),
        tl.program_id(0) % tl.cdiv(d, 32) * 32 + tl.arange(0, 32),
    )
    b = b.to(tl.int64)
    exists = channel < d if d % 32 else tl.full((32,), True, tl.int1)
    begin = tl.program_id(1) * segment
    origin = b * l if SIGN > 0 else -(b * l + l - 1)
    return (
        b,
        b * tl.num_programs(1) + tl.program_id(1),
        channel,
        exists,
        begin,
        tl.minimum(begin + segment, l),
        origin,
    )


@jit
def _pointers(ptr, row, STRIDE: constexpr, TILE: constexpr):
    """Pointers to a tile's rows. The promise of one element's alignment, and no more, makes Triton put all rows of a
    channel into one thread; so the recurrence needs no exchange between threads."""
    rows = (ptr + row * STRIDE)[None, :] + tl.arange(0, TILE).to(tl.int64)[:, None] * STRIDE
    return tl.multiple_of(rows, (1, ptr.dtype.element_ty.primitive_bitwidth // 8))


@jit
def _load(ptr, row, valid, STRIDE: constexpr, TILE: constexpr):
    return tl.load(_pointers(ptr, row, STRIDE, TILE), mask=valid, other=0.0)


@jit
def _store(ptr, x, row, valid, STRIDE: constexpr, TILE: constexpr):
    tl.store(_pointers(ptr, row, STRIDE, TILE), x.to(ptr.dtype.element_ty), mask=valid)


@jit
def _load_vectors(ptr, offset, exists, STRIDE: constexpr, n: constexpr):
    """A tuple of n vectors, one for each state; where ptr is None, of zeros, whatever the rest."""
    h = ()
    for i in tl.static_range(n):
        zeros = tl.zeros((32,), tl.float32)
        h += (zeros if ptr is None else tl.load(ptr + offset + i * STRIDE, mask=exists, other=0.0),)
    return h


@jit
def _store_vectors(ptr, h, exists, STRIDE: constexpr, n: constexpr):
    for i in tl.static_range(n):
        tl.store(ptr + i * STRIDE, h[i], mask=exists)


@jit
def _row(x, k, i):
    """Row i of a tile. As the rows are in one thread it costs nothing: the compiler drops every + 0 from a sum of
    integers, which it may not do with floats (−0.0 + 0.0 is 0.0)."""
    return tl.sum(tl.where((k == i)[:, None], x.to(tl.int32, bitcast=True), 0), 0).to(
        tl.float32, bitcast=True
    )


@jit
def _tile_forward(a, x, h, TILE: constexpr):
    """h_t = a_t h_{t−1} + x_t over a tile: the states after and before each step, and the last."""
    k = tl.arange(0, TILE)
    after, before = x, x
    for i in tl.static_range(TILE):
        before = tl.where((k == i)[:, None], h[None, :], before)
        h = _row(a, k, i) * h + _row(x, k, i)
        after = tl.where((k == i)[:, None], h[None, :], after)
    return after, before, h


@jit
def _tile_backward(a, c, q, TILE: constexpr):
    """g_t = c_t + q_{t+1} and q_t = a_t g_t over a tile, from its end: all g, all q, and the first q."""
    k = tl.arange(0, TILE)
    g, all_q = c, c
    for i in tl.static_range(TILE - 1, -1, -1):
        g_i = _row(c, k, i) + q
        q = _row(a, k, i) * g_i
        g = tl.where((k == i)[:, None], g_i[None, :], g)
        all_q = tl.where((k == i)[:, None], q[None, :], all_q)
    return g, all_q, q


@jit
def _fold(x, y, bit: constexpr):
    """(32,): lanes without the bit get x + the x of the lane across it, those with it the same of y."""
    lane = tl.arange(0, 32)
    has = (lane & bit) != 0
    return tl.where(has, y, x) + tl.gather(tl.where(has, x, y), lane ^ bit, 0)


@jit
def _channel_sums(x, y):
    """Sums over channels of two (4, 32) tiles. Lanes 4 r to 4 r + 3 get row r of x, and those from 16 on the rows of y.
    tl.sum would shuffle each of the eight sums five times; here each fold halves the rows that a lane cares for, and
    nine exchanges do."""
    k, rows = tl.arange(0, 4), ()
    for r in tl.static_range(4):
        rows += (_fold(_row(x, k, r), _row(y, k, r), 16),)
    sums = _fold(_fold(rows[0], rows[2], 8), _fold(rows[1], rows[3], 8), 4)
    sums = _fold(sums, sums, 2)
    return _fold(sums, sums, 1)


@jit
def _pack(
    B_ptr, C_ptr, mask_ptr, packed_ptr, l, B_row, B_col, C_row, C_col,
    n: constexpr, N: constexpr, SIGN: constexpr, TILE: constexpr,
):  # fmt: skip
    """A tile of packed, from B, C (b l, n) and the mask (b l,); zeros beyond l. N: the power of 2 from n on."""
    tiles, program = tl.cdiv(l, TILE), tl.program_id(0).to(tl.int64)
    k, i = tl.arange(0, TILE), tl.arange(0, N).to(tl.int64)[:, None]
    t = program % tiles * TILE + k
    row = program // tiles * l + (t if SIGN > 0 else l - 1 - t)
    real = t < l
    B = tl.load(B_ptr + row[None, :] * B_row + i * B_col, mask=real[None, :] & (i < n), other=0.0)
    C = tl.load(C_ptr + row[None, :] * C_row + i * C_col, mask=real[None, :] & (i < n), other=0.0)
    if mask_ptr is not None:
        real = tl.load(mask_ptr + row, mask=real, other=0) != 0
    packed_ptr += program * ((2 * n + 1) * TILE) + k
    tl.store(packed_ptr[None, :] + i * TILE, B.to(tl.float32), mask=i < n)
    tl.store(packed_ptr[None, :] + (n + i) * TILE, C.to(tl.float32), mask=i < n)
    tl.store(packed_ptr + 2 * n * TILE, real.to(tl.float32))


@jit
def _touch(packed_ptr, t, l, n: constexpr, TILE: constexpr):
    """(8 TILE,): of the tile of packed at step t, if there is one, a number in each 32 bytes. So all of it comes into
    the L1 cache while the tile before is in work; without, the loads of B and C took half of the kernel's time."""
    i, size = tl.arange(0, 8 * TILE) * 8, tl.where(t < l, TILE * (2 * n + 1), 0)
    return tl.load(packed_ptr + t // TILE * ((2 * n + 1) * TILE) + i, mask=i < size, other=0.0)


@jit
def _never_store(ptr, touched, l, TILE: constexpr):
    """Which the compiler cannot know; so it drops no load of `_touch`."""
    i = tl.arange(0, 8 * TILE)
    tl.store(ptr + i, touched, mask=i < -l)


@jit
def _segment_ends(
    v_ptr, delta_ptr, z_ptr, packed_ptr, A_ptr, bias_ptr, ends_ptr, delta_sums_ptr, l, segment,
    d: constexpr, n: constexpr, v_row: constexpr, delta_row: constexpr, z_row: constexpr,
    SOFTPLUS: constexpr, SIGN: constexpr, BACKWARD: constexpr, TILE: constexpr,
):  # fmt: skip
    """Phase 1: the ends of segments that start from zero, and their Σ Δ. v is u, and an end is h after the last step;
    or with BACKWARD v is dy, and an end, as time goes from the right, is q of the first step."""
    b, row_segment, channel, exists, begin, end, origin = _place(l, segment, d, SIGN)
    packed_ptr += b * tl.cdiv(l, TILE) * ((2 * n + 1) * TILE)
    carried, delta_sums = (
        _load_vectors(None, 0, exists, 0, n),
        tl.zeros((32,), tl.float32),
    )  # h or q
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)[None, :]
    t = (end - 1) // TILE * TILE if BACKWARD else begin
    valid = exists[None, :] & (tl.arange(0, TILE) < end - t)[:, None]
    next_v = _load(
        v_ptr + channel, origin + t, valid, v_row, TILE
    )  # a tile ahead of its use: memory is far
    next_delta = _load(delta_ptr + channel, origin + t, valid, delta_row, TILE)
    touched = _touch(packed_ptr, t, l, n, TILE)
    for _tile in tl.range(begin, end, TILE, num_stages=1):
        v, delta = next_v.to(tl.float32), next_delta.to(tl.float32) + bias
        if BACKWARD and z_ptr is not None:
            z = _load(z_ptr + channel, origin + t, valid, z_row, TILE).to(tl.float32)
            v *= z * _sigmoid(z)
        packed = packed_ptr + t // TILE * ((2 * n + 1) * TILE) + tl.arange(0, TILE)
        t = tl.maximum(t - TILE, 0) if BACKWARD else t + TILE
        touched = _touch(packed_ptr, t, l, n, TILE)
        valid = exists[None, :] & (tl.arange(0, TILE) < end - t)[:, None]
        next_v = _load(v_ptr + channel, origin + t, valid, v_row, TILE)
        next_delta = _load(delta_ptr + channel, origin + t, valid, delta_row, TILE)
        real = tl.load(packed + 2 * n * TILE)[:, None]
        delta = (_softplus(delta) if SOFTPLUS else delta) * real
        delta_sums += tl.sum(delta, 0)
        v *= real if BACKWARD else delta
        new = ()
        for i in tl.static_range(n):
            if i % 8 == 0:
                tl.debug_barrier()  # or all of B and C would be loaded at once, for which there are no registers
            a = tl.exp2(delta * tl.load(A_ptr + i * d + channel, mask=exists, other=0.0)[None, :])
            c = v * tl.load(packed + (n + i if BACKWARD else i) * TILE)[:, None]
            end_i = (
                _tile_backward(a, c, carried[i], TILE)[2]
                if BACKWARD
                else _tile_forward(a, c, carried[i], TILE)[2]
            )
            new += (end_i,)
        carried = new
    _never_store(delta_sums_ptr, touched, l, TILE)
    _store_vectors(ends_ptr + row_segment * (n * d) + channel, carried, exists, d, n)
    tl.store(delta_sums_ptr + row_segment * d + channel, delta_sums, mask=exists)


@jit
def _segment_starts(
    ends_ptr, delta_sums_ptr, A_ptr, segments, d: constexpr, n: constexpr, BACKWARD: constexpr, TILE: constexpr
):  # fmt: skip
    """Phase 2: what segments start from, in place of their ends: h from the left, or with BACKWARD q from the right."""
    j = tl.program_id(0) % tl.cdiv(n * d, 32) * 32 + tl.arange(0, 32)  # of n d
    exists = j < n * d if n * d % 32 else tl.full((32,), True, tl.int1)
    SIGN: constexpr = -1 if BACKWARD else 1
    row = tl.program_id(0).to(tl.int64) // tl.cdiv(n * d, 32) * segments * SIGN - (
        segments - 1 if BACKWARD else 0
    )
    A = tl.load(A_ptr + j, mask=exists, other=0.0)[None, :]
    carried = tl.zeros((32,), tl.float32)
    for s in tl.range(0, segments, TILE, num_stages=1):
        valid = exists[None, :] & (tl.arange(0, TILE) < segments - s)[:, None]
        a = tl.exp2(A * _load(delta_sums_ptr + j % d, row + s, valid, SIGN * d, TILE))
        ends = _load(ends_ptr + j, row + s, valid, SIGN * n * d, TILE)
        _, starts, carried = _tile_forward(a, ends, carried, TILE)
        _store(ends_ptr + j, starts, row + s, valid, SIGN * n * d, TILE)


@jit
def _outputs(
    u_ptr, delta_ptr, z_ptr, packed_ptr, A_ptr, D_ptr, bias_ptr, h_ptr, kept_ptr, y_ptr, l, segment,
    d: constexpr, n: constexpr, u_row: constexpr, delta_row: constexpr, z_row: constexpr,
    SOFTPLUS: constexpr, SIGN: constexpr, CHUNK: constexpr, TILE: constexpr,
):  # fmt: skip
    """Phase 3, forward: y; and kept, if kept_ptr is given. h_ptr: the segments' first states, or None for zeros."""
    b, row_segment, channel, exists, begin, end, origin = _place(l, segment, d, SIGN)
    packed_ptr += b * tl.cdiv(l, TILE) * ((2 * n + 1) * TILE)
    h = _load_vectors(h_ptr, row_segment * (n * d) + channel, exists, d, n)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)[None, :]
    D = tl.load(D_ptr + channel, mask=exists, other=0.0)[None, :]
    valid = exists[None, :] & (tl.arange(0, TILE) < end - begin)[:, None]
    next_u = _load(u_ptr + channel, origin + begin, valid, u_row, TILE)
    next_delta = _load(delta_ptr + channel, origin + begin, valid, delta_row, TILE)
    touched = _touch(packed_ptr, begin, l, n, TILE)
    for t in tl.range(begin, end, TILE, num_stages=1):
        touched = _touch(packed_ptr, t + TILE, l, n, TILE)
        u, delta = next_u.to(tl.float32), next_delta.to(tl.float32) + bias
        valid = exists[None, :] & (tl.arange(0, TILE) < end - t - TILE)[:, None]
        next_u = _load(u_ptr + channel, origin + t + TILE, valid, u_row, TILE)
        next_delta = _load(delta_ptr + channel, origin + t + TILE, valid, delta_row, TILE)
        valid = exists[None, :] & (tl.arange(0, TILE) < end - t)[:, None]
        if z_ptr is not None:
            z = _load(z_ptr + channel, origin + t, valid, z_row, TILE)
        if kept_ptr is not None:
            if t % CHUNK == 0 and t > 0:
                kept = kept_ptr + (b * ((l - 1) // CHUNK) + t // CHUNK - 1) * (n * d) + channel
                _store_vectors(kept, h, exists, d, n)
        packed = packed_ptr + t // TILE * ((2 * n + 1) * TILE) + tl.arange(0, TILE)
        real = tl.load(packed + 2 * n * TILE)[:, None]
        delta = (_softplus(delta) if SOFTPLUS else delta) * real
        x, y = delta * u, D * u
        new_h = ()
        for i in tl.static_range(n):
            if i % 8 == 0:
                tl.debug_barrier()  # as in _segment_ends
            B, C = tl.load(packed + i * TILE)[:, None], tl.load(packed + (n + i) * TILE)[:, None]
            A = tl.load(A_ptr + i * d + channel, mask=exists, other=0.0)[None, :]
            states, _, h_i = _tile_forward(tl.exp2(delta * A), x * B, h[i], TILE)
            y += states * C
            new_h += (h_i,)
        h = new_h
        if z_ptr is not None:
            z = z.to(tl.float32)
            y *= z * _sigmoid(z)
        _store(y_ptr + channel, y * real, origin + t, valid, SIGN * d, TILE)
    _never_store(packed_ptr, touched, l, TILE)


@jit
def _of_state(
    packed, A_ptr, starts_ptr, exists, i: constexpr, d: constexpr, n: constexpr, TILE: constexpr
):
    """For a tile of `_gradients`: B and C of state i, A, and the state before the tile."""
    B, C = tl.load(packed + i * TILE)[:, None], tl.load(packed + (n + i) * TILE)[:, None]
    return (
        B,
        C,
        tl.load(A_ptr + i * d, mask=exists, other=0.0)[None, :],
        tl.load(starts_ptr + i * 32),
    )


@jit
def _gradients(
    dy_ptr, u_ptr, delta_ptr, z_ptr, packed_ptr, A_ptr, D_ptr, bias_ptr, kept_ptr, q_ptr,
    scratch_ptr, du_ptr, ddelta_ptr, dz_ptr, dBC_ptr, parts_ptr, l, segment,
    d: constexpr, n: constexpr, dy_row: constexpr, u_row: constexpr, delta_row: constexpr, z_row: constexpr,
    SOFTPLUS: constexpr, SIGN: constexpr, CHUNK: constexpr, TILE: constexpr,
):  # fmt: skip
    """Phase 3, backward: the gradients of u, delta and z, and each program's part of the others'. For each chunk from
    the right: replay it from the state kept at its start, writing the state before each tile to scratch; then, tile by
    tile from the right, all its states again, and g and q with them. q_ptr: the segments' first q, or None for 0."""
    b, row_segment, channel, exists, begin, end, origin = _place(l, segment, d, SIGN)
    packed_ptr += b * tl.cdiv(l, TILE) * ((2 * n + 1) * TILE) + tl.arange(0, TILE)
    dBC_ptr += tl.program_id(0).to(tl.int64) * tl.cdiv(l, TILE) * (n * 8) + tl.arange(0, 32) // 4
    kept_ptr += (b * ((l - 1) // CHUNK) - 1) * (n * d) + channel
    own = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    scratch_ptr += own * (CHUNK // TILE * n * 32) + tl.arange(0, 32)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)[None, :]
    D = tl.load(D_ptr + channel, mask=exists, other=0.0)[None, :]
    q = _load_vectors(q_ptr, row_segment * (n * d) + channel, exists, d, n)
    dA, dD, dbias = (
        _load_vectors(None, 0, exists, 0, n),
        tl.zeros((32,), tl.float32),
        tl.zeros((32,), tl.float32),
    )
    for j in tl.range(begin, end, CHUNK, num_stages=1):
        first = begin + (end - 1 - begin) // CHUNK * CHUNK - (j - begin)  # chunks from the right
        last = tl.minimum(first + CHUNK, end)
        # the row's first chunk starts from zero (exists & (first > 0) would be an integer)
        known = exists & (channel < tl.where(first > 0, d, 0))
        h = _load_vectors(kept_ptr, tl.cast(first // CHUNK, tl.int64) * (n * d), known, d, n)
        tl.debug_barrier()  # scratch is written and read across threads
        _store_vectors(scratch_ptr, h, None, 32, n)
        for t in tl.range(
            first, last - TILE, TILE, num_stages=1
        ):  # replay: keep the states before each tile
            valid = exists[None, :] & (tl.arange(0, TILE) < last - t)[:, None]
            delta = (
                _load(delta_ptr + channel, origin + t, valid, delta_row, TILE).to(tl.float32) + bias
            )
            u = _load(u_ptr + channel, origin + t, valid, u_row, TILE).to(tl.float32)
            packed = packed_ptr + t // TILE * ((2 * n + 1) * TILE)
            delta = (_softplus(delta) if SOFTPLUS else delta) * tl.load(packed + 2 * n * TILE)[
                :, None
            ]
            x = delta * u
            new_h = ()
            for i in tl.static_range(n):
                a = tl.exp2(
                    delta * tl.load(A_ptr + i * d + channel, mask=exists, other=0.0)[None, :]
                )
                new_h += (_tile_forward(a, x * tl.load(packed + i * TILE)[:, None], h[i], TILE)[2],)
            h = new_h
            _store_vectors(scratch_ptr + ((t - first) // TILE + 1) * (n * 32), h, None, 32, n)
        tl.debug_barrier()
        for t_left in tl.range(first, last, TILE, num_stages=1):  # and back
            t = first + (last - 1 - first) // TILE * TILE - (t_left - first)
            valid = exists[None, :] & (tl.arange(0, TILE) < last - t)[:, None]
            raw = (
                _load(delta_ptr + channel, origin + t, valid, delta_row, TILE).to(tl.float32) + bias
            )
            u = _load(u_ptr + channel, origin + t, valid, u_row, TILE).to(tl.float32)
            dy = _load(dy_ptr + channel, origin + t, valid, dy_row, TILE).to(tl.float32)
            packed = packed_ptr + t // TILE * ((2 * n + 1) * TILE)
            real = tl.load(packed + 2 * n * TILE)[:, None]
            delta, dy = (_softplus(raw) if SOFTPLUS else raw) * real, dy * real
            dstate = dy  # of Σ C h + D u
            if z_ptr is not None:
                z = _load(z_ptr + channel, origin + t, valid, z_row, TILE).to(tl.float32)
                gate = _sigmoid(z)
                dstate = dy * z * gate
            x, y, dx, ddelta = delta * u, D * u, tl.zeros_like(u), tl.zeros_like(u)
            new_q, new_dA = (), ()
            starts_ptr = scratch_ptr + (t - first) // TILE * (n * 32)
            following = _of_state(packed, A_ptr + channel, starts_ptr, exists, 0, d, n, TILE)
            for i in tl.static_range(n):
                B, C, A, start = following
                if i + 1 < n:  # now, since the compiler moves no load over the store below
                    following = _of_state(
                        packed, A_ptr + channel, starts_ptr, exists, i + 1, d, n, TILE
                    )
                a = tl.exp2(delta * A)
                states, previous, _ = _tile_forward(a, x * B, start, TILE)
                g, all_q, q_i = _tile_backward(a, dstate * C, q[i], TILE)
                y += states * C
                dx += g * B
                w = all_q * previous
                ddelta += w * A
                tl.store(
                    dBC_ptr + t // TILE * (n * 8) + i * 8, _channel_sums(g * x, states * dstate)
                )
                new_q += (q_i,)
                new_dA += (dA[i] + tl.sum(w * delta, 0),)
            q, dA = new_q, new_dA
            ddelta = (ddelta * LN2 + u * dx) * real
            if SOFTPLUS:
                ddelta *= _sigmoid(raw)
            if z_ptr is not None:
                dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                _store(dz_ptr + channel, dz, origin + t, valid, SIGN * d, TILE)
            _store(ddelta_ptr + channel, ddelta, origin + t, valid, SIGN * d, TILE)
            _store(du_ptr + channel, delta * dx + D * dstate, origin + t, valid, SIGN * d, TILE)
            dbias += tl.sum(ddelta, 0)
            dD += tl.sum(dstate * u, 0)
    dA += (dD, dbias)
    _store_vectors(parts_ptr + row_segment * ((n + 2) * d) + channel, dA, exists, d, n + 2)


# The short convolution, by itself: four warps on a tile of steps and 64 channels, as in an ordinary Triton kernel.


@jit
def _convolution(
    x_ptr, x_row, weight_ptr, bias_ptr, dy_ptr, dy_row, y_ptr, parts_ptr, l,
    d: constexpr, k: constexpr, LEFT: constexpr, TILE: constexpr,
):  # fmt: skip
    """Of a tile of steps and 64 channels, y = Σ_j weight_j x[t + j − LEFT], with zeros beyond a row's ends; with a bias
    SiLU(y + bias). With dy, instead, the gradient of y + bias, and the tile's parts of those of weight and bias."""
    tiles, program = tl.cdiv(l, TILE), tl.program_id(0)
    b, t = (program // tiles).to(tl.int64), program % tiles * TILE + tl.arange(0, TILE)
    channel = tl.program_id(1) * 64 + tl.arange(0, 64)
    exists = channel < d
    valid = (t < l)[:, None] & exists
    y, shifted = tl.zeros((TILE, 64), tl.float32), ()
    for j in tl.static_range(k):
        at = (t + j - LEFT)[:, None]
        x = tl.load(
            x_ptr + (b * l + at) * x_row + channel, mask=valid & (at >= 0) & (at < l), other=0.0
        )
        y += x * tl.load(weight_ptr + j * d + channel, mask=exists, other=0.0)
        shifted += (x,)
    rows = (b * l + t)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=exists, other=0.0)
        s = _sigmoid(y)
        if dy_ptr is None:
            y *= s
        else:
            y = (
                tl.load(dy_ptr + rows * dy_row + channel, mask=valid, other=0.0)
                * s
                * (1.0 + y * (1.0 - s))
            )
            parts_ptr += program.to(tl.int64) * (k + 1) * d + channel
            for j in tl.static_range(k):
                tl.store(parts_ptr + j * d, tl.sum(shifted[j] * y, 0), mask=exists)
            tl.store(parts_ptr + k * d, tl.sum(y, 0), mask=exists)
    tl.store(y_ptr + rows * d + channel, y.to(y_ptr.dtype.element_ty), mask=valid)


def _chunk(n: int) -> int:
    """The steps between the states that are kept for the backward pass: 16, or the power of 2 from n on, so that the
    states are no more numbers than u, in float32 no more bytes than u and delta in half precision."""
    return max(16, 1 << (n - 1).bit_length())


def _segment(l: int, programs: int, enough: int, chunk: int, device: torch.device) -> int:
    """The steps in a segment, where one of each row takes so many programs, rows × blocks of channels: all l if these
    are `enough` warps for a multiprocessor of the GPU, and on a CPU; else whole chunks, which give it 6 to 12 warps."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 0
    )
    if programs >= enough * processors:
        return l
    return chunk * math.ceil(l / (chunk * (12 * processors // max(1, programs))))


def _strided(SIGN: int, **tensors: Tensor | None) -> dict:
    """Kernel arguments for (b, l, d) tensors: name_ptr, and name_row, from a step's row of channels to the next's."""
    arguments = {}
    for name, x in tensors.items():
        x = x if x is None else x.reshape(-1, x.shape[-1])  # a view, where there can be one
        x = x if x is None or x.stride(1) == 1 else x.contiguous()
        arguments |= {f"{name}_ptr": x, f"{name}_row": 0 if x is None else SIGN * x.stride(0)}
    return arguments


def _for_kernels(A: Tensor, D: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float32, A as the kernels want it."""
    return (
        (A.float().T / math.log(2)).contiguous(),
        D.float().contiguous(),
        bias.float().contiguous(),
    )


def _prepare(v, delta, z, A, B, C, bias, mask, segment, BACKWARD, **options):
    """packed; and by phases 1 and 2 the segments' starts, h, or with BACKWARD q, (b, segments, n, d); None for one."""
    (b, l, d), n, SIGN, TILE = v.shape, len(A), options["SIGN"], options["TILE"]
    tiles, segments = triton.cdiv(l, TILE), triton.cdiv(l, segment)
    packed = A.new_empty(b, tiles, 2 * n + 1, TILE)
    B, C, mask = (
        B.reshape(b * l, n),
        C.reshape(b * l, n),
        None if mask is None else mask.contiguous(),
    )
    sizes = dict(n=n, N=triton.next_power_of_2(n), SIGN=SIGN, TILE=TILE, num_warps=1)
    _pack[(b * tiles,)](B, C, mask, packed, l, *B.stride(), *C.stride(), **sizes)
    if segments == 1:
        return packed, None
    ends, sums = A.new_empty(b, segments, n, d), A.new_empty(b, segments, d)
    _segment_ends[(b * triton.cdiv(d, 32), segments)](
        **_strided(SIGN, v=v, delta=delta, z=z), packed_ptr=packed, A_ptr=A, bias_ptr=bias, ends_ptr=ends,
        delta_sums_ptr=sums, l=l, segment=segment, BACKWARD=BACKWARD, **options,
    )  # fmt: skip
    sizes = dict(d=d, n=n, BACKWARD=BACKWARD, TILE=8, num_warps=1)
    _segment_starts[(b * triton.cdiv(n * d, 32),)](ends, sums, A, segments, **sizes)
    return packed, ends


@torch.library.custom_op("mabert::scan_triton", mutates_args=())
def _scan_triton(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, bias: Tensor,
    mask: Tensor | None, softplus: bool, reverse: bool, chunk: int, keep: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b, l, d) of dtype; and if `keep`, the states at the start of chunks but the first, (b, chunks − 1, n, d)."""
    (b, l, d), n = u.shape, A.shape[1]
    A, D, bias = _for_kernels(A, D, bias)
    y, states = (
        u.new_empty(b, l, d, dtype=dtype),
        A.new_empty(b, (l - 1) // chunk if keep else 0, n, d),
    )
    blocks = triton.cdiv(d, 32)
    segment = _segment(
        l, b * blocks, 4, chunk, u.device
    )  # segments are nearly twice the work: they must be worth it
    options = dict(
        d=d,
        n=n,
        SOFTPLUS=softplus,
        SIGN=-1 if reverse else 1,
        TILE=8,
        num_warps=1,
        enable_fp_fusion=True,
    )
    with torch.cuda.device_of(u):  # kernels go to the current device
        packed, starts = _prepare(
            u, delta, None, A, B, C, bias, mask, segment, BACKWARD=False, **options
        )
        _outputs[(b * blocks, triton.cdiv(l, segment))](
            **_strided(options["SIGN"], u=u, delta=delta, z=z), packed_ptr=packed, A_ptr=A, D_ptr=D, bias_ptr=bias,
            h_ptr=starts, kept_ptr=states if keep else None, y_ptr=y, l=l, segment=segment, CHUNK=chunk, **options,
        )  # fmt: skip
    return y, states


@torch.library.custom_op("mabert::scan_triton_backward", mutates_args=())
def _scan_triton_backward(
    dy: Tensor, states: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
    bias: Tensor, mask: Tensor | None, softplus: bool, reverse: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of u, delta, A, B, C, D, z and bias; z's is empty where there is no z."""
    (b, l, d), n = u.shape, A.shape[1]
    A_, D_, bias_ = _for_kernels(A, D, bias)
    blocks, tiles = triton.cdiv(d, 32), triton.cdiv(l, 4)
    segment = _segment(l, b * blocks, 6, chunk, u.device)  # and here a fifth more
    segments = triton.cdiv(l, segment)
    du, ddelta, dz = (
        _empty_like(u),
        _empty_like(delta),
        u.new_empty(0) if z is None else _empty_like(z),
    )
    dBC, parts = A_.new_empty(b, blocks, tiles, n, 2, 4), A_.new_empty(b, segments, n + 2, d)
    scratch = A_.new_empty(b * blocks * segments * (chunk // 4) * n * 32)
    options = dict(
        d=d,
        n=n,
        SOFTPLUS=softplus,
        SIGN=-1 if reverse else 1,
        TILE=4,
        num_warps=1,
        enable_fp_fusion=True,
    )
    with torch.cuda.device_of(u):
        packed, starts = _prepare(
            dy, delta, z, A_, B, C, bias_, mask, segment, BACKWARD=True, **options
        )
        _gradients[(b * blocks, segments)](
            **_strided(options["SIGN"], dy=dy, u=u, delta=delta, z=z), packed_ptr=packed,
            A_ptr=A_, D_ptr=D_, bias_ptr=bias_, kept_ptr=states, q_ptr=starts,
            scratch_ptr=scratch, du_ptr=du, ddelta_ptr=ddelta, dz_ptr=dz, dBC_ptr=dBC, parts_ptr=parts,
            l=l, segment=segment, CHUNK=chunk, **options,
        )  # fmt: skip
    dBC = dBC.sum(1).permute(3, 0, 1, 4, 2).reshape(2, b, 4 * tiles, n)[:, :, :l]
    dB, dC = dBC.flip(2) if reverse else dBC
    dA, dD, dbias = parts.sum((0, 1)).split((n, 1, 1))
    copies = (
        _empty_like(x).copy_(dx)
        for x, dx in ((A, dA.T), (B, dB), (C, dC), (D, dD[0]), (bias, dbias[0]))
    )
    dA, dB, dC, dD, dbias = copies
    return du, ddelta, dA, dB, dC, dD, dz, dbias


# ---- Both as ops: for torch.compile, what they return, without computing it; for autograd, what to keep ----


def _fake(chunks, u, delta, A, B, C, D, z, bias, mask, softplus, reverse, chunk, keep, dtype):
    kind = torch.promote_types(u.dtype, torch.float32)
    kept = u.new_empty(
        len(u), chunks(u.shape[1], chunk) if keep else 0, A.shape[1], u.shape[2], dtype=kind
    )
    return u.new_empty(u.shape, dtype=dtype), kept


def _fake_backward(dy, kept, u, *inputs):
    return tuple(u.new_empty(0) if x is None else _empty_like(x) for x in (u, *inputs[:7]))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs[:9])  # the states, u, ..., mask
    ctx.options = inputs[9:12]  # softplus, reverse, chunk
    ctx.set_materialize_grads(False)  # the states need no gradient: do not make one of zeros


def _backward(op, ctx, dy, _):
    saved = ctx.saved_tensors  # read once: activation checkpointing gives them no second time
    gradients = op(dy, *saved, *ctx.options)
    return *(None if x is None else dx for x, dx in zip(saved[1:9], gradients)), *(None,) * 6


for _op, _op_backward, _chunks_kept in (
    (_scan_loop, _scan_loop_backward, lambda l, chunk: -(-l // chunk)),
    (_scan_triton, _scan_triton_backward, lambda l, chunk: (l - 1) // chunk),
):
    _op.register_fake(functools.partial(_fake, _chunks_kept))
    _op_backward.register_fake(_fake_backward)
    _op.register_autograd(functools.partial(_backward, _op_backward), setup_context=_keep)


def _convolve(x, weight, bias, left, dy=None, parts=None):
    """What `_convolution` says, for all of x (b, l, d); weight (d, k)."""
    (b, l, d), k = x.shape, weight.shape[1]
    y, weight = (
        x.new_empty(b, l, d),
        weight.float().T.contiguous(),
    )  # (k, d): 16 bytes of a tap at once
    bias = bias if bias is None else bias.float().contiguous()
    with torch.cuda.device_of(x):
        _convolution[(b * triton.cdiv(l, 32), triton.cdiv(d, 64))](
            **_strided(1, x=x, dy=dy), weight_ptr=weight, bias_ptr=bias, y_ptr=y, parts_ptr=parts, l=l,
            d=d, k=k, LEFT=left, TILE=32,
        )  # fmt: skip
    return y


@torch.library.custom_op("mabert::convolution", mutates_args=())
def _conv_triton(u: Tensor, weight: Tensor, bias: Tensor, left: int) -> Tensor:
    return _convolve(u, weight, bias, left)


@torch.library.custom_op("mabert::convolution_backward", mutates_args=())
def _conv_triton_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, left: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, weight and bias."""
    (b, l, d), k = u.shape, weight.shape[1]
    parts = u.new_empty(b * triton.cdiv(l, 32), k + 1, d, dtype=torch.float32)
    ds = _convolve(u, weight, bias, left, dy, parts)  # of the sum, before SiLU
    dweight, dbias = parts.sum(0).split((k, 1))
    dweight, dbias = _empty_like(weight).copy_(dweight.T), _empty_like(bias).copy_(dbias[0])
    return _convolve(ds, weight.flip(1), None, k - 1 - left), dweight, dbias


def _keep_inputs(ctx, inputs, output):
    *tensors, ctx.left = inputs
    ctx.save_for_backward(*tensors)


_conv_triton.register_fake(lambda u, weight, bias, left: u.new_empty(u.shape))
_conv_triton_backward.register_fake(lambda dy, *inputs: tuple(map(_empty_like, inputs[:3])))
_conv_triton.register_autograd(
    lambda ctx, dy: (*_conv_triton_backward(dy, *ctx.saved_tensors, ctx.left), None),
    setup_context=_keep_inputs,
)


# ---- The pick ----


def use_triton(u: Tensor, backend: str | None) -> bool:
    """Whether the kernels are to run, for u, the scan's input or the convolution's."""
    if backend not in SCAN_BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {SCAN_BACKENDS}")
    can_run = triton and (u.is_cuda or INTERPRETED) and u.dtype != torch.float64
    if backend == "triton" and not can_run:
        why = f"it needs a GPU (or TRITON_INTERPRET=1), and not float64; u is {str(u.dtype)[6:]} on {u.device}"
        why = why if triton else "the package triton is not installed"
        raise RuntimeError(f"backend='triton' cannot run here (backend='loop' or None can): {why}")
    return backend == "triton" or (backend is None and u.is_cuda and can_run)


def short_convolution(
    u: Tensor, weight: Tensor, bias: Tensor, left: int, backend: str | None = None
) -> Tensor:
    """SiLU of a depthwise convolution over time, u (b, l, d), weight (d, k), bias (d,) -> (b, l, d). It sees `left`
    steps before and k − 1 − left after, zeros beyond the ends of a row. On a GPU it is a kernel, since
    PyTorch's goes through memory several times, to pad, transpose and copy. `backend`: as in `selective_scan`."""
    if use_triton(u, backend):
        return _conv_triton(u, weight, bias, left)
    u = F.pad(u, (0, 0, left, weight.shape[1] - 1 - left)).transpose(1, 2)[
        :, :, None
    ]  # (b, d, 1, k - 1 + l)
    return F.silu(F.conv2d(u, weight[:, None, None], bias, groups=len(bias)))[:, :, 0].transpose(
        1, 2
    )


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    mask=None,
    reverse=False,
    backend=None,
) -> Tensor:
    """The masked selective scan (the formula above): u, delta, A, B, C, ... -> y (b, l, d) of u's dtype.

    u, delta, z: (b, l, d); A: (d, n), negative; B, C: (b, l, n); D, delta_bias: (d,). Names as in mamba-ssm, layout
    channel-last. Floating-point of any kind; the arithmetic is in float32, or in float64 where u is float64.
    mask: (b, l), bool or 0/1. At a pad (0) the state passes through, y is 0, and so are the gradients of the inputs.
    reverse: the recurrence runs from the right end.
    backend: "triton" (float32 arithmetic, on a GPU), "loop", or None for Triton where it can run and else the loop.

    Raises ValueError for arguments that do not fit (the mask's values are looked at on a CPU only), RuntimeError for a
    backend that cannot run here. Gradients of gradients are not implemented.
    """
    mask = check_scan(u, delta, A, B, C, D, z, delta_bias, mask)
    zeros, kernels = A.new_zeros(A.shape[0]), use_triton(u, backend)
    D, bias = zeros if D is None else D, zeros if delta_bias is None else delta_bias
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (u, delta, A, B, C, D, z, bias)
    )
    if not kernels:
        return _scan_loop(
            u, delta, A, B, C, D, z, bias, mask, delta_softplus, reverse, LOOP_CHUNK, keep, u.dtype
        )[0]
    # In groups of 16 states, since a thread has no registers for more. SiLU(z) gates a sum, so it may gate each part of
    # it; y is summed in float32, the gradients of u, delta and z in their dtypes.
    y, chunk, dtype = None, _chunk(A.shape[1]), u.dtype if A.shape[1] <= 16 else torch.float32
    for i in range(0, A.shape[1], 16):
        group = A[:, i : i + 16], B[..., i : i + 16], C[..., i : i + 16], zeros if i > 0 else D
        part, _ = _scan_triton(
            u, delta, *group, z, bias, mask, delta_softplus, reverse, chunk, keep, dtype
        )
        y = part if y is None else y + part
    return y.to(u.dtype)


# ---- The command: python mabert.py FOLDER "text with a [MASK]" ----


@torch.no_grad()
def main(argv: list[str] | None = None):
    """Asks a trained model: five guesses for each [MASK] of a text; without one, the text's embedding, the mean of its
    hidden states; from a classifier each class's probability, or the regression's value."""
    parser = argparse.ArgumentParser(description=" ".join(main.__doc__.split()))
    parser.add_argument(
        "folder", type=Path, help="what train_mlm.py, or finetune_glue.py --save, wrote"
    )
    parser.add_argument("text", help="in quotation marks")
    args = parser.parse_args(argv)
    try:
        from tokenizers import Tokenizer

        model, file = PretrainedModel.from_pretrained(args.folder), args.folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"{file} is missing or damaged: {error}") from error
        tokenizer.no_truncation()
        cls, sep, mask = map(tokenizer.token_to_id, ("[CLS]", "[SEP]", "[MASK]"))
        if None in (cls, sep, mask):
            raise ValueError(f"{file} lacks [CLS], [SEP] or [MASK]")
        tokens = tokenizer.encode(
            args.text, add_special_tokens=False
        ).ids  # not every tokenizer.json adds them
        ids = torch.tensor([[cls, *tokens, sep]])
        output = model(ids)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"mabert.py: {error}")
    if isinstance(model, MaBERTForSequenceClassification):
        if model.config.num_labels == 1:
            print(f"value: {output.logits.item():.4f}")
        else:
            print(
                *(
                    f"class {i}: {p:.4f}"
                    for i, p in enumerate(output.logits[0].softmax(dim=0).tolist())
                ),
                sep="\n",
            )
    elif isinstance(model, MaBERTForMaskedLM) and mask in ids:
        for logits in output.logits[ids == mask]:
            best = logits.softmax(dim=0).topk(5)
            guesses = (
                f"{tokenizer.id_to_token(i)} {p:.4f}" for p, i in zip(*map(Tensor.tolist, best))
            )
            print("[MASK]:", ", ".join(guesses))
    else:
        x = getattr(model, "encoder", model)(ids)[0].mean(dim=0)  # (h,)
        first = " ".join(f"{value:.4f}" for value in x[:5].tolist())
        print(f"embedding: norm {x.norm():.4f}, {len(x)} numbers: {first} ...")


if __name__ == "__main__":
    main()
