"""Who calls: OIDC tokens and Kubernetes service accounts, beside the API keys of ``credentials``."""
