"""Following KEKs that rotate by themselves: what lies under an older version is rewrapped."""

from __future__ import annotations

from dataclasses import dataclass

from sqlmodel import col, select

from anamorph_keysvc import deadline
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service.shredding import rewrap_old
from anamorph_keysvc.service.work import Service
from anamorph_keysvc.tables import KeyVersion

_TENANTS = 50
_ROUND_S = 30.0


@dataclass
class Rewrapper:
    """Goes through all tenants, some at a time, over and over; ``after`` is the last one seen.

    Two processes may do the same: rows are changed by compare-and-set.
    """

    after: str = ""

    def go_on(self, service: Service) -> int:
        """Rewrap what the next tenants need; answers how many rows.

        Raises:
            Unavailable: the database or the key-management service does not answer.
        """
        with service.database.read(WORKER) as session:
            tenants = session.exec(
                select(KeyVersion.tenant)
                .where(col(KeyVersion.ciphertext).is_not(None), KeyVersion.tenant > self.after)
                .distinct()
                .order_by(KeyVersion.tenant)
                .limit(_TENANTS)
            ).all()
        done = 0
        with deadline.within(_ROUND_S):
            for tenant in tenants:
                done += rewrap_old(service, tenant)
                self.after = tenant
        if len(tenants) < _TENANTS:
            self.after = ""
        return done
