"""What the measurement of a deployment found, and what it means in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel

from lora_deploy.verify.texts import TextResult

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["DeploymentResult"]

# Less of the update than this, or more of what it does lost than that on the task's text, and it hardly survives.
_LITTLE, _MUCH = 0.5, 0.25


class DeploymentResult(BaseModel):
    """The deployed weights against the trained ones, both in float32.

    Attributes:
        adapter: The adapter it was measured with; empty for none, or where there is nothing to choose.
        texts: How the two differ on each text.
        bits: Mean bits that a weight of the linear layers takes in the file: codes, scales, and the correction, and
            the floats of layers that are kept. The output head and the embedding are left out.
        survives: Share of the adapter's update that the deployed weights still hold, over all layers: how far they
            moved from the base in the update's direction, 1 for all of it; None where there is no update.
        layers: The same of each layer.
        cache_errors: Relative errors of the keys and values of each decoder layer, the larger of the two, the deployed
            weights against the trained ones; empty where there is no cache.
    """

    adapter: str = ""
    texts: list[TextResult]
    bits: float
    survives: float | None = None
    layers: dict[str, float] = {}
    cache_errors: list[float] = []

    @property
    def largest_kl(self) -> float:
        """Of all texts; NaN where one is."""
        found = [text.kl for text in self.texts]
        return next((kl for kl in found if kl != kl), max(found))

    def summary(self) -> str:
        """Bits, and what survives, in one line."""
        line = f"{self.bits:.2f} bits a weight in the linear layers"
        if self.survives is None:
            return line
        worst = min(self.layers, key=lambda name: self.layers[name])
        return f"{line}; {self.survives:.1%} of the update survives (least in {worst}: {self.layers[worst]:.1%})"

    def warnings(self) -> list[str]:
        """What a user should know before this is deployed, a sentence or two each."""
        found = []
        remedy = "try --precision int8, --keep float:LAYERS, --correction 16, or --branch, which keeps the trained base"
        if self.survives is not None and self.survives < _LITTLE:
            found.append(
                f"only {self.survives:.0%} of the adapter's update survives in the deployed weights: most of what was "
                f"trained was rounded away, and the model will act much like its base; {remedy}"
            )
        found += [
            f"on {text.name}, rounding changes the model {text.kl / text.base_kl:.0%} as much as the whole training "
            f"did (KL {text.kl:.2g} against {text.base_kl:.2g}): answers will differ from those of the trained model; "
            f"{remedy}"
            for text in self.texts
            if text.name != "general" and text.base_kl and text.kl > _MUCH * text.base_kl
        ]
        if any(not text.held_out for text in self.texts):
            found.append("a text has no rows that the rounding was not calibrated on: it looks better than it is")
        return found

    def table(self) -> Table:
        """The texts as a table for the screen."""
        from rich import box
        from rich.table import Table

        title = "Deployed weights against the trained ones" + (f" ({self.adapter})" if self.adapter else "")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("text", no_wrap=True)
        for heading in ("tokens", "KL", "top-1", "loss", "base: KL"):
            table.add_column(heading, justify="right", no_wrap=True)
        for text in self.texts:
            table.add_row(
                text.name,
                str(text.tokens),
                f"{text.kl:.1e}",
                f"{text.top1:.1%}",
                "" if text.loss is None else f"{text.reference_loss:.3f} -> {text.loss:.3f}",
                "" if text.base_kl is None else f"{text.base_kl:.1e}",
            )
        return table
