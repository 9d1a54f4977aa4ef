"""Webhooks: where they may point, how they are signed, how they are delivered."""
