"""A task of your own data and a model of transformers: texts, pictures, recordings by class, or text for perplexity."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fvae_kernels.nn.linear import is_named

from . import Group, Placement, Recipe, Splits, own_data, sound
from .own_data import DataError, Example

ATTENTION = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"))  # names in transformers' models
SECONDS = 10  # of a recording that are used
Batch = tuple[Mapping[str, Tensor], Tensor]


@dataclass(frozen=True)
class OwnTask:
    """Your own data. The training examples do not depend on the seed, which draws the head and their order."""

    name: str
    recipe: Recipe
    placement: Placement
    minority: Sequence[Group]
    classes: int
    labels: Sequence[str]  # by number; () of a language model
    attributes: Sequence[str]  # words of the group column, by number
    examples: Splits
    load: Callable[[], Any]
    encode: Callable[[Sequence[Example]], Batch]

    def splits(self, seed: int) -> Splits:
        """The same for every seed."""
        return self.examples

    def model(self, seed: int) -> nn.Module:
        """The pretrained model; what is new in it is drawn from the seed."""
        torch.manual_seed(seed)
        model: nn.Module = self.load()
        return model

    def batch(self, examples: Sequence[Any]) -> Batch:
        """Keyword arguments of the model, and labels."""
        return self.encode(examples)


def own_task(
    data: str | Path,
    model: str | Path,
    kind: str | None = None,
    *,
    text: str | None = None,
    label: str | None = None,
    group: str | None = None,
    max_tokens: int = 128,
    targets: Sequence[str] | None = None,
    epochs: int = 5,
    lr: float = 1e-3,
    batch_size: int = 16,
    name: str | None = None,
) -> OwnTask:
    """The task that your data and a model of transformers make.

    Args:
        data: for "text" a CSV, TSV or JSONL file; for "images" and "audio" a folder with a folder for each class; for
            "language" a .txt file or a folder of them. Or a folder that has "train", "test" and perhaps "validation" of
            these; otherwise 15 % of the examples are taken for validation and 15 % for test, of each label and group
            alike (of a text for "language": its end).
        model: a folder that ``save_pretrained`` wrote, or a name that ``from_pretrained`` knows.
        kind: "text", "images", "audio" or "language"; None: by the names of the files.
        text: column of the text; None: "text".
        label: column of the label, words or numbers; None: "label".
        group: column of an attribute that may be correlated with the label; None: "group" if there is such a column.
        max_tokens: longest text, or size of a window of "language".
        targets: names of the modules to adapt; None: PEFT's for this architecture, or query and value of attention.
        epochs: of the recipe.
        lr: learning rate of the recipe.
        batch_size: of the recipe.
        name: of the task; None: names of data and model, and a digest of data, model and these options.

    Raises:
        DataError: if the data or the model cannot be used. It says what to do.
    """
    data = Path(data)
    kind = kind or own_data.kind_of(data)
    if kind not in KINDS:
        raise DataError(f"there is no kind {kind!r} of data: give one of {', '.join(KINDS)}")
    columns = {"text": text or "text", "label": label or "label", "group": group}
    found, load, encode = KINDS[kind](data, model, columns, max_tokens)
    probe = load()
    chosen = _targets(probe, targets)
    digest = own_data.digest(data, own_data.version(model), kind, columns, max_tokens, chosen)
    return OwnTask(
        name=name or f"{data.name}, {Path(model).name}, {digest}",
        recipe=Recipe(epochs, lr, batch_size),
        placement=Placement(chosen, _options(kind, probe, chosen)),
        minority=found.minority,
        classes=len(found.labels),
        labels=found.labels,
        attributes=found.attributes,
        examples=found.splits,
        load=load,
        encode=encode,
    )


def _targets(model: nn.Module, targets: Sequence[str] | None) -> Sequence[str]:
    """The targets that were asked for, PEFT's, or query and value."""
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    words = sorted({name.rpartition(".")[2] for name in linear})
    if targets:
        if absent := [target for target in targets if not any(is_named(name, [target]) for name in linear)]:
            raise DataError(f"the model has no linear layers named {absent}: choose targets from {words}")
        return tuple(targets)
    known = PEFT_TARGETS.get(model.config.model_type)
    if known is not None:
        return known if isinstance(known, str) else tuple(known)
    for names in ATTENTION:
        if set(names) <= set(words):
            return names
    raise DataError(
        f"PEFT knows no targets for the architecture {model.config.model_type!r}: choose targets from its linear "
        f"layers {words}"
    )


def _options(kind: str, model: nn.Module, targets: Sequence[str]) -> dict[str, Any]:
    """PEFT's task type, or what is trained whole: the parts of the model in which nothing is adapted."""
    if kind in ("text", "language"):
        return {"task_type": "SEQ_CLS" if kind == "text" else "CAUSAL_LM"}
    parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
    adapted = {name.partition(".")[0] for name, _ in model.named_modules() if name and is_named(name, targets)}
    return {"modules_to_save": [name for name in parts if name not in adapted]}


def _pretrained(auto: Any, model: str | Path, **options: Any) -> Any:
    try:
        return auto.from_pretrained(model, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise DataError(
            f"{auto.__name__} cannot load {str(model)!r} ({said}): give a folder that save_pretrained wrote, with the "
            "tokenizer or preprocessor beside the model, or a name of the hub where that can be reached"
        ) from None


def _classifier(auto: Any, model: str | Path, labels: Sequence[str], **config: Any) -> Callable[[], Any]:
    words = dict(enumerate(labels))
    numbers = {word: i for i, word in words.items()}
    return lambda: _pretrained(
        auto, model, num_labels=len(words), id2label=words, label2id=numbers, ignore_mismatched_sizes=True, **config
    )


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([e.label for e in examples])


def _text(data: Path, model: str | Path, columns: Mapping[str, Any], max_tokens: int) -> Any:
    found = own_data.table(data, **columns)
    tokenizer = _pretrained(transformers.AutoTokenizer, model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(examples: Sequence[Example]) -> Batch:
        texts = [e.content for e in examples]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        return dict(inputs), _labels(examples)

    padding = {"pad_token_id": tokenizer.pad_token_id}
    return found, _classifier(transformers.AutoModelForSequenceClassification, model, found.labels, **padding), encode


def _images(data: Path, model: str | Path, columns: Mapping[str, Any], max_tokens: int) -> Any:
    found = own_data.folder_of_files(data, own_data.PICTURES)
    process = _pretrained(transformers.AutoImageProcessor, model)
    for part in (found.splits.train, found.splits.validation, found.splits.test):
        for example in part:
            _picture(example.content, header=True)

    def encode(examples: Sequence[Example]) -> Batch:
        inputs = process(images=[_picture(e.content) for e in examples], return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"]}, _labels(examples)

    return found, _classifier(transformers.AutoModelForImageClassification, model, found.labels), encode


def _picture(path: Path, header: bool = False) -> Any:
    """The picture; with `header` only a look whether it is one."""
    try:
        with Image.open(path) as image:
            return None if header else image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(f"{path} is no picture that Pillow can read ({error}): replace it, or take it out") from None


def _audio(data: Path, model: str | Path, columns: Mapping[str, Any], max_tokens: int) -> Any:
    found = own_data.folder_of_files(data, own_data.SOUNDS)
    extract = _pretrained(transformers.AutoFeatureExtractor, model)
    rate = extract.sampling_rate
    waves = extract.model_input_names[0] == "input_values"  # padded to the longest; features have a length of their own

    def encode(examples: Sequence[Example]) -> Batch:
        heard = [_recording(e.content, rate) for e in examples]
        inputs = extract(heard, sampling_rate=rate, return_tensors="pt", **({"padding": True} if waves else {}))
        return dict(inputs), _labels(examples)

    return found, _classifier(transformers.AutoModelForAudioClassification, model, found.labels), encode


def _recording(path: Path, rate: int) -> Any:
    """The first seconds of a recording at this rate, as a NumPy array."""
    try:
        samples, own_rate = sound.read(path)
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path} is no recording that can be read ({error}): convert it to .wav, or take it out"
        ) from None
    if not len(samples):
        raise DataError(f"{path} has no samples: replace it, or take it out")
    return sound.resample(samples[: SECONDS * own_rate], own_rate, rate).numpy()


def _language(data: Path, model: str | Path, columns: Mapping[str, Any], max_tokens: int) -> Any:
    tokenizer = _pretrained(transformers.AutoTokenizer, model)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def windows(texts: Sequence[str]) -> list[Example]:
        tokens = [token for text in texts for token in [*tokenizer(text, verbose=False)["input_ids"], *end]]
        return [Example(w) for w in torch.tensor(tokens).split(max_tokens) if len(w) == max_tokens]

    parts = {part: windows(texts) for part, texts in own_data.documents(data).items()}
    found = own_data.Labelled(own_data.in_order(parts, data), (), ())

    def encode(examples: Sequence[Example]) -> Batch:
        tokens = torch.stack([e.content for e in examples])
        return {"input_ids": tokens}, tokens

    return found, lambda: _pretrained(transformers.AutoModelForCausalLM, model), encode


KINDS = {"text": _text, "images": _images, "audio": _audio, "language": _language}
