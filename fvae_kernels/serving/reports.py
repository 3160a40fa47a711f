"""What the exports report."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of an export.

    Attributes:
        name: in the base model.
        rank_before: rank of the adapter.
        rank: rank that is served.
        lost: share of the update's energy that is lost, from 0 to 1: ``sum |u - served|^2 / sum |u|^2`` over tokens.
        bytes_before: of the adapter's tensors.
        bytes: of the exported ones.
        hidden: sizes of the encoder's hidden layers that are served.
    """

    name: str
    rank_before: int
    rank: int
    lost: float
    bytes_before: int
    bytes: int
    hidden: tuple[int, ...] = ()

    def __str__(self) -> str:
        hidden = f", hidden layers {self.hidden}" if self.hidden else ""
        return (
            f"{self.name}: rank {self.rank_before} -> {self.rank}{hidden}, {self.lost:.2e} of the energy lost, "
            f"{self.bytes_before:,} -> {self.bytes:,} bytes"
        )


@dataclass(frozen=True)
class LoraReport:
    """Result of `export_as_lora`.

    Attributes:
        folder: where the files are.
        layers: one `ExportedLayer` each; bytes before padding to one rank.
        metric_before: of the adapter; None if no metric was given.
        metric_after: of the exported LoRA.
    """

    folder: str
    layers: tuple[ExportedLayer, ...]
    metric_before: float | None = None
    metric_after: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.folder}: LoRA for {len(self.layers)} layers", *map(str, self.layers)]
        if self.metric_before is not None:
            lines.append(f"metric: {self.metric_before:.6g} -> {self.metric_after:.6g}")
        return "\n".join(lines)
