"""Tiny models that tests of examples share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by kind of data."""
    transformers = pytest.importorskip("transformers")
    from tests.helpers.texts import tokenizer
    from tests.helpers.tiny_models import build

    processors = {
        "text": ("bert", tokenizer),
        "images": ("vit", lambda: transformers.ViTImageProcessor(size={"height": 8, "width": 8})),
        "audio": ("wav2vec2", lambda: transformers.Wav2Vec2FeatureExtractor(sampling_rate=400)),
        "language": ("llama", tokenizer),
    }
    out = {}
    for kind, (name, processor) in processors.items():
        out[kind] = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(out[kind])
        processor().save_pretrained(out[kind])
    return out
