"""Writes a trained model as a folder that Hugging Face's transformers reads.

    python extras/to_transformers.py FOLDER OUT   # such as out/mlm out/mlm_hf

FOLDER was written by train_mlm.py, or by finetune_glue.py --save. OUT will hold config.json,
model.safetensors, the tokenizer, and the code: mabert.py and, around it, modeling_mabert.py. With
trust_remote_code=True, transformers reads the model from there, or from the hub once OUT has been
uploaded:

    AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification .from_pretrained(OUT, ...)
    pipeline("fill-mask", model=OUT, ...)

Whatever the head in FOLDER, each of the three classes reads OUT: the encoder comes along, and a
head that is not there is new. Needs `pip install transformers`.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # train_mlm.py and mabert.py

try:
    from safetensors.torch import save
except ImportError:
    sys.exit("to_transformers.py: safetensors is missing; pip install transformers brings it")

import mabert
import train_mlm

CLASSES = {  # a class of transformers: ours, in modeling_mabert.py
    "AutoConfig": "HFMaBERTConfig",
    "AutoModel": "HFMaBERT",
    "AutoModelForMaskedLM": "HFMaBERTForMaskedLM",
    "AutoModelForSequenceClassification": "HFMaBERTForSequenceClassification",
}
AUTO_CLASSES = {  # which of them reads a model with its head
    mabert.MaBERT: "AutoModel",
    mabert.MaBERTForMaskedLM: "AutoModelForMaskedLM",
    mabert.MaBERTForSequenceClassification: "AutoModelForSequenceClassification",
}


def main(argv: list[str] | None = None):
    """Writes a trained model as a folder that Hugging Face's transformers reads."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "folder", type=Path, help="written by train_mlm.py, or by finetune_glue.py --save"
    )
    parser.add_argument("out", type=Path, help="a new folder")
    args = parser.parse_args(argv)

    # read everything first, so that nothing is written where something is missing
    try:
        model = mabert.PretrainedModel.from_pretrained(args.folder)
        names = mabert.class_names(args.folder / "labels.json", model.config.num_labels)
        tokenizer = train_mlm.load_tokenizer(str(args.folder / "tokenizer.json"))
        args.out.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"{args.out} is there already: give the name of a new folder")
    except (OSError, ValueError) as error:
        sys.exit(str(error))

    # the model; a bare encoder's weights have "encoder." before their names too
    auto_class = AUTO_CLASSES[type(model)]
    weights = model.state_dict(prefix="encoder." if auto_class == "AutoModel" else "")
    safetensors = save(weights, metadata={"format": "pt"})
    (args.out / "model.safetensors").write_bytes(safetensors)
    write_json(args.out / "config.json", config_fields(model.config, auto_class, names))

    # the tokenizer
    tokenizer.save(str(args.out / "tokenizer.json"))
    write_json(args.out / "tokenizer_config.json", tokenizer_fields(model.config))

    # the code
    for file in (Path(mabert.__file__), Path(__file__).with_name("modeling_mabert.py")):
        shutil.copy(file, args.out)
    print(f'{auto_class}.from_pretrained("{args.out}", trust_remote_code=True) reads the model')


def config_fields(config: mabert.MaBERTConfig, auto_class: str, names: list[str]) -> dict:
    """config.json: our fields, and those by which transformers finds the classes."""
    fields = dataclasses.asdict(config) | {
        "model_type": "mabert",
        "architectures": [CLASSES[auto_class]],
        "auto_map": {auto: f"modeling_mabert.{ours}" for auto, ours in CLASSES.items()},
    }
    del fields["num_labels"]  # transformers counts the names of a classifier's classes
    if auto_class == "AutoModelForSequenceClassification":
        fields["id2label"] = dict(enumerate(names))
        fields["label2id"] = {name: i for i, name in enumerate(names)}
    return fields


def tokenizer_fields(config: mabert.MaBERTConfig) -> dict:
    """tokenizer_config.json: which class reads tokenizer.json, and the tokens it must know."""
    special = {f"{token[1:-1].lower()}_token": token for token in train_mlm.SPECIAL_TOKENS}
    return special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "model_max_length": config.max_position,
    }


def write_json(file: Path, fields: dict):
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
