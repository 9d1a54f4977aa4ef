"""HashiCorp Vault as the key-management service: custody of KEKs, signing of audit checkpoints.

Only what Vault and OpenBao have in common is used. All of hvac is in ``transport``.
"""
