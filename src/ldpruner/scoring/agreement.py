"""Whether scores from few steps of another solver rank edits as the pipeline's own scheduler does."""

from __future__ import annotations

import math
from dataclasses import replace

from scipy.stats import spearmanr

from ldpruner.pipelines import Pipeline
from ldpruner.scoring.base import Asked
from ldpruner.scoring.engine import Run
from ldpruner.scoring.latent import PaperScorer

COUNT, STEPS = 16, 20


def rank_agreement(pipeline: Pipeline, run: Run, *, count: int = COUNT, steps: int = STEPS) -> float | None:
    """Spearman's rank correlation of the run's scores with the paper's by the pipeline's own scheduler in `steps` steps.

    Of `count` edits, spread evenly over the run's ranks; costs `(count + 1) x samples x steps` denoiser passes and few more.
    None where too few were scored, or all alike.
    """
    ranked = sorted(zip(run.scores, run.edits(), strict=True), key=lambda pair: pair[0].score)
    places = sorted({round(number * (len(ranked) - 1) / max(1, count - 1)) for number in range(min(count, len(ranked)))})
    scores, edits = zip(*(ranked[place] for place in places), strict=True)
    probe = replace(run.probe, solver=None, num_inference_steps=steps)
    found = PaperScorer().scores(Asked(pipeline=pipeline, edits=edits, probe=probe, fitted=run.fitted))
    agreement = float(spearmanr([entry.score for entry in scores], [entry.score for entry in found])[0])
    return agreement if math.isfinite(agreement) else None
