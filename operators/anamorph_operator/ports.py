"""What the reconciler needs of the place that it runs in; each driver has its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from anamorph.serve.cluster.placement import Node
from anamorph.wire.admin import ModelRead
from anamorph_operator.state import Application, Deployed, Job, Ref


class Jobs(Protocol):
    """Materialisation jobs: at most one that runs for each version."""

    async def observe(self) -> Mapping[Ref, Job]:
        """Every job that is known, ended ones too.

        Raises:
            Unavailable: whoever runs them does not answer.
        """
        ...

    async def start(self, ref: Ref, model: ModelRead) -> None:
        """Begin a job; each start is an attempt.

        Raises:
            ServiceError: the key service does not let the version be materialised now.
            Unavailable: whoever runs jobs does not answer.
        """
        ...

    async def stop(self, ref: Ref) -> None:
        """End a job that is no longer wanted; that is no failed attempt."""
        ...

    async def close(self) -> None:
        """End with the reconciler: jobs that need this process end too."""
        ...


class Serve(Protocol):
    """The Serve applications of one Ray cluster: one writer, always all of them."""

    async def read(self) -> dict[str, Deployed]:
        """Every application by name.

        Raises:
            Unavailable: Ray does not answer.
        """
        ...

    async def write(self, applications: tuple[Application, ...]) -> None:
        """Replace the whole list.

        Raises:
            Unavailable: Ray, or whoever hands it the list, does not answer.
            BadRequest: the list is refused.
        """
        ...

    async def nodes(self) -> tuple[Node, ...]:
        """The nodes that are alive.

        Raises:
            Unavailable: Ray does not answer.
        """
        ...
