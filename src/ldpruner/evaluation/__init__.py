"""How good generated samples are, by published metrics, each of which says what it was computed with."""

from ldpruner.evaluation import frechet, kernel, coverage, labels, captions, paired  # noqa: F401, I001  (in the order of tables)
from ldpruner.evaluation.base import METRICS
from ldpruner.evaluation.engine import Evaluation, Figure, check, evaluate
from ldpruner.evaluation.features import FEATURE_NETS, FeatureNet

__all__ = ["FEATURE_NETS", "METRICS", "Evaluation", "FeatureNet", "Figure", "check", "evaluate"]
