"""Settings from a TOML file, with errors that say which field is at fault and never what it holds."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from anamorph.errors import SetupError

T = TypeVar("T", bound=BaseModel)


def read(path: Path, kind: type[T], **changes: Any) -> T:
    """The settings in a file; ``changes`` take precedence.

    Raises:
        SetupError: no such file, no TOML, or not these settings; what the file holds is not repeated.
    """
    try:
        return kind.model_validate({**tomllib.loads(path.read_text()), **changes})
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} is no TOML: {error}") from None
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        said = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'settings'}: {fault['msg']}" for fault in faults
        )
        raise SetupError(f"{path} does not fit: {said}") from None
