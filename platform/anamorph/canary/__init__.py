"""The canary: what encryption costs, measured on the running system.

``measure`` sends independent random ids to an encrypted replica and to the
plaintext baseline in turn and answers an ``OverheadReport``.
"""

from anamorph.canary.measure import measure, random_ids
from anamorph.canary.plot import save_plot, terminal_plot
from anamorph.canary.report import OverheadReport
from anamorph.canary.sample import Sample, Target
from anamorph.canary.statistics import Ratio, paired_ratio

__all__ = [
    "OverheadReport",
    "Ratio",
    "Sample",
    "Target",
    "measure",
    "paired_ratio",
    "random_ids",
    "save_plot",
    "terminal_plot",
]
