"""``anamorph down``: end everything that ``anamorph up`` started, and nothing else."""

from __future__ import annotations

from anamorph.cli.machine.home import Home, HomeOption
from anamorph.cli.machine.processes import marked
from anamorph.cli.machine.signals import undisturbed
from anamorph.cli.machine.system import stop


def down(home: HomeOption = None) -> None:
    """Stop what `up` started; keys, replicas and records stay in the home folder."""
    place = Home.at(home)
    state = place.load() if place.root.is_dir() else None
    if state is None:
        print("Nothing runs.")
        return
    with place.locked(), undisturbed():
        stop(place)
    print(f"Stopped; processes left: {len(marked(state.instance))}.")
