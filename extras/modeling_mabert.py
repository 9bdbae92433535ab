"""MaBERT as transformers wants a model: to_transformers.py copies this file beside mabert.py.

The modules are those of mabert.py, under the same names, so that the weights keep their names too.
Only what surrounds them is here: a config with the same fields, the classes of outputs, and which
weights are new where a folder holds another head.

    model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

import dataclasses

import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .mabert import (
    IGNORED_LABEL,
    MaBERT,
    MaBERTConfig,
    MaBERTForMaskedLM,
    MaBERTForSequenceClassification,
    in_float32,
)


class HFMaBERTConfig(PretrainedConfig):
    """The fields of MaBERTConfig, beside those that every config of transformers has.

    As in transformers, num_labels is the number of names in id2label.
    """

    model_type = "mabert"

    def __init__(self, **fields):
        defaults = dataclasses.asdict(MaBERTConfig())
        del defaults["num_labels"]  # beside an id2label it would be a contradiction
        super().__init__(**defaults | fields)

    def as_ours(self) -> MaBERTConfig:
        """The config that mabert.py takes; ValueError where a field does not fit."""
        names = [field.name for field in dataclasses.fields(MaBERTConfig)]
        return MaBERTConfig(**{name: getattr(self, name) for name in names})


class HFPreTrainedMaBERT(PreTrainedModel):
    """What the three models below have in common: an encoder, and how a new head begins."""

    config_class = HFMaBERTConfig
    accepts_loss_kwargs = False  # the losses are means: Trainer divides them by accumulated steps

    def _init_weights(self, module: nn.Module):
        """Initialises a head that the folder lacks, as mabert.py does.

        The encoder's modules are left alone: mabert.py has initialised them, or they are loaded.
        """
        if module not in set(self.encoder.modules()):
            super()._init_weights(module)  # normal(0, 0.02), biases 0
        if isinstance(module, HFMaBERTForMaskedLM):  # a parameter of its own, in no module below
            nn.init.zeros_(module.decoder_bias)


def refuse(others: dict):
    """Raises ValueError for arguments of other models, such as inputs_embeds, that are set."""
    for name, value in others.items():
        if value is not None and value is not False:
            raise ValueError(f"MaBERT's forward has no argument {name}")


class HFMaBERT(HFPreTrainedMaBERT):
    """The encoder. The output has last_hidden_state (b, l, h), which means nothing at pads."""

    def __init__(self, config: HFMaBERTConfig):
        super().__init__(config)
        self.encoder = MaBERT(config.as_ours())
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **others):
        refuse(others)
        x = self.encoder(input_ids, attention_mask, token_type_ids)
        return BaseModelOutput(last_hidden_state=x)


class HFMaBERTForMaskedLM(HFPreTrainedMaBERT):
    """The encoder with the head for masked language modelling.

    Logits are (b, l, vocab) also where labels are given: Trainer's evaluation expects them. The
    loss is the mean over the positions whose label is not -100.
    """

    def __init__(self, config: HFMaBERTConfig):
        super().__init__(config)
        ours = MaBERTForMaskedLM(config.as_ours())
        self.encoder = ours.encoder
        self.transform = ours.transform
        self.decoder_bias = ours.decoder_bias
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **others
    ) -> MaskedLMOutput:
        refuse(others)
        x = self.encoder(input_ids, attention_mask, token_type_ids)  # (b, l, h)
        # mabert.py's method on this object, which has the same modules
        logits = MaBERTForMaskedLM.predict(self, x)  # (b, l, vocab)
        if labels is None:
            return MaskedLMOutput(logits=logits)

        # the mean over the labelled positions, in float32 at least; 0 where there are none
        predicted = in_float32(logits).flatten(0, 1)  # (b l, vocab)
        loss = F.cross_entropy(predicted, labels.flatten().long(), reduction="sum")
        labelled = (labels != IGNORED_LABEL).sum().clamp(min=1)
        return MaskedLMOutput(loss=loss / labelled, logits=logits)


class HFMaBERTForSequenceClassification(HFPreTrainedMaBERT):
    """The encoder with pooling and a classifier; with one label it is a regression.

    Labels are classes (b,), or with one label real numbers (b,); logits are (b, num_labels).
    """

    def __init__(self, config: HFMaBERTConfig):
        super().__init__(config)
        if config.num_labels == 1:
            config.problem_type = "regression"  # so that a pipeline gives the value as it is
        ours = MaBERTForSequenceClassification(config.as_ours())
        self.encoder = ours.encoder
        self.pooling = ours.pooling
        self.dropout = ours.dropout
        self.classifier = ours.classifier
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **others
    ) -> SequenceClassifierOutput:
        refuse(others)
        # mabert.py's method on this object, which has the same modules
        inputs = (input_ids, attention_mask, token_type_ids, labels)
        loss, logits = MaBERTForSequenceClassification.forward(self, *inputs)
        return SequenceClassifierOutput(loss=loss, logits=logits)
