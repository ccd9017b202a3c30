"""What a model says of true clips: perplexity of an autoregressive one, loss by timestep of a diffusion one.

The runner asks the models (`shared.protocol.DiagnosticModel`) while they are loaded. A family gives the
values that it has; the two families' values measure different things and are never set against one another.
"""

from __future__ import annotations

from benchmarks.metrics.base import Metric

NAME = "diagnostics"
BINS = tuple((start, start + 199) for start in range(0, 1000, 200))

METRICS = (
    Metric(
        name=f"{NAME}/bits_per_token",
        title="Bits per image token",
        recipe="cross entropy of a true clip's image tokens in bits, mean over first frame (base channel) "
        "and key frames, each token given the true ones before it and the caption",
        unit="bit",
        better="lower",
    ),
    Metric(
        name=f"{NAME}/perplexity",
        title="Token perplexity",
        recipe="2 to the bits per image token of a clip; mean over clips",
        better="lower",
    ),
    Metric(
        name=f"{NAME}/codebook_share",
        title="Codebook use of a clip",
        recipe="share of the codebook's entries that the codes of one true clip use",
        better="neither",
        proportion=True,
    ),
    Metric(
        name=f"{NAME}/code_perplexity",
        title="Effective codes of a clip",
        recipe="2 to the entropy in bits of the codes of one true clip: as if all were used equally often",
        unit="codes",
        better="neither",
    ),
    *(
        Metric(
            name=f"{NAME}/loss_{first:03d}_{last:03d}",
            title=f"Diffusion loss, t {first} to {last}",
            recipe=f"training loss (squared error of v, mean over values) on a true clip and its caption, at "
            f"the middles of four equal parts of timesteps {first} to {last}, noise from a fixed seed",
            better="lower",
            parameters={"timesteps": [first, last], "parts": 4},
        )
        for first, last in BINS
    ),
)
