"""The canary: what encryption costs, measured on the running system.

``measure`` sends independent random ids to an encrypted replica and to the
plaintext baseline in turn and answers an ``OverheadReport``. ``Watch`` does so for
ever, a pair at a time. ``twin`` makes a baseline where the base is private.
"""

from anamorph.canary.drift import Drift
from anamorph.canary.loaded import Baselines, Served, loaded
from anamorph.canary.measure import Size, measure, random_ids, take_pair
from anamorph.canary.plot import save_plot, terminal_plot
from anamorph.canary.report import OverheadReport
from anamorph.canary.sample import Sample, Target
from anamorph.canary.statistics import Ratio, median_test, paired_ratio
from anamorph.canary.twin import twin
from anamorph.canary.watch import Watch, WatchSettings

__all__ = [
    "Baselines",
    "Drift",
    "OverheadReport",
    "Ratio",
    "Sample",
    "Served",
    "Size",
    "Target",
    "Watch",
    "WatchSettings",
    "loaded",
    "measure",
    "median_test",
    "paired_ratio",
    "random_ids",
    "save_plot",
    "take_pair",
    "terminal_plot",
    "twin",
]
