"""What a measurement of the host's cost finds, with numbers by hand."""

from typing import Any

FOUND: dict[str, Any] = {
    "machine": {"cpu": "a CPU", "commit": "abc", "versions": dict.fromkeys(("torch", "peft", "triton", "python"), "1")},
    "in_model": {"base": 40.0, "lora": 140.0, "dora": 340.0, "triton": 390.0, "triton_default": 300.0},
    "steps": {"float32": {"base": 80.0, "lora": 200.0, "dora": 440.0, "plain": 1000.0, "triton": 500.0}},
}
