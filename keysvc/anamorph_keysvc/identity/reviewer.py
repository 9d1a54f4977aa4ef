"""TokenReview, asked of the API server with our own service account's token."""

from __future__ import annotations

import logging
import os
from typing import Any

import urllib3
from kubernetes import client

from anamorph import errors
from anamorph_keysvc import deadline
from anamorph_keysvc.identity.settings import KubernetesSettings
from anamorph_keysvc.identity.unverified import refused

_log = logging.getLogger(__name__)

_REMEDY = "bind the ClusterRole system:auth-delegator to the key service's service account"
# What a check reviews: no token of anybody's.
_NOBODY = "nobody"


class Reviewer:
    """Asks whose token it is. All of the Kubernetes client is here.

    Raises:
        SetupError: no API server is configured, or its certificate authority cannot be read.
    """

    def __init__(self, settings: KubernetesSettings) -> None:
        self._settings = settings
        # The client logs whole answers, and a review's answer repeats the token, on level DEBUG.
        logging.getLogger("kubernetes.client.rest").setLevel(logging.INFO)
        self._api = client.ApiClient(_configuration(settings))
        self._reviews = client.AuthenticationV1Api(self._api)

    def user_of(self, token: str) -> str:
        """The name of the user that a token belongs to.

        Raises:
            Unauthenticated: the API server does not accept it, or not for our audience.
            Unavailable: the API server does not answer, or does not let us ask.
        """
        try:
            status = self._ask(token)
        except _Refused as error:
            _log.error("%s", error)  # for whoever runs this; the caller learns only that it does not work
            raise _unavailable() from None
        except (urllib3.exceptions.HTTPError, OSError, _Unanswered) as error:
            _log.warning("the API server did not review a token: %s", type(error).__name__)
            raise _unavailable() from None
        return self._accepted(status)

    def check(self) -> None:
        """Ask once, to see whether we may.

        Raises:
            SetupError: we may not, or nothing answers.
        """
        try:
            self._ask(_NOBODY)
        except _Refused as error:
            raise errors.SetupError(str(error)) from None
        except (urllib3.exceptions.HTTPError, OSError, _Unanswered) as error:
            raise errors.SetupError(
                f"the API server at {self._api.configuration.host} does not answer ({type(error).__name__}): "
                "check 'api_server', 'ca_file' and 'token_file'"
            ) from None

    def close(self) -> None:
        """Close the connections."""
        self._api.close()
        self._api.rest_client.pool_manager.clear()

    def _ask(self, token: str) -> Any:
        """The status of a review."""
        spec = client.V1TokenReviewSpec(token=token, audiences=list(self._settings.audiences))
        try:
            review = self._reviews.create_token_review(
                client.V1TokenReview(spec=spec),
                _request_timeout=deadline.left(self._settings.timeout_s),
                _request_auth=self._own_token(),
            )
        except client.ApiException as error:
            # Never its text: that is the whole answer.
            raise _fault(error.status) from None
        except (AttributeError, TypeError, ValueError):
            # The client stumbles over a failed TLS handshake, and over what is no review.
            raise _Unanswered from None
        return getattr(review, "status", None)

    def _own_token(self) -> dict[str, str]:
        """Our own token, read anew each time, since the kubelet replaces it."""
        token = self._settings.token_file.read_text(encoding="ascii").strip()
        return {"type": "api_key", "in": "header", "key": "authorization", "value": f"Bearer {token}"}

    def _accepted(self, status: Any) -> str:
        # An API server that knows nothing of audiences leaves them out of its answer: that is no yes.
        ours = set(self._settings.audiences) & set(getattr(status, "audiences", None) or ())
        name = getattr(getattr(status, "user", None), "username", None)
        if not getattr(status, "authenticated", None) or not ours or not isinstance(name, str):
            raise refused()
        return name


class _Refused(Exception):
    """The API server does not let us review tokens."""


class _Unanswered(Exception):
    """The API server did not do what it was asked for."""


def _fault(status: int) -> Exception:
    if status == 401:
        return _Refused("the API server refuses the key service's own token: check 'token_file'")
    if status == 403:
        return _Refused(f"the key service may not review tokens: {_REMEDY}")
    return _Unanswered(status)


def _unavailable() -> errors.Unavailable:
    return errors.Unavailable(
        "service-account tokens cannot be reviewed now: try again", code="reviewer_unavailable", retry_after=5
    )


def _configuration(settings: KubernetesSettings) -> client.Configuration:
    configuration = client.Configuration()
    try:
        configuration.host = settings.url()
    except ValueError as error:
        raise errors.SetupError(str(error)) from None
    if configuration.host.startswith("https://") and not os.access(settings.ca_file, os.R_OK):
        raise errors.SetupError(
            f"cannot read {settings.ca_file}: set 'ca_file' to the API server's authority"
        )
    configuration.ssl_ca_cert = str(settings.ca_file)
    configuration.proxy = None  # else taken from the environment
    configuration.retries = False  # which turns redirects off as well: they would carry the tokens along
    return configuration
