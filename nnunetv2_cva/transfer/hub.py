"""Where a file of weights lies: a path, a folder as one uploads it, or ``hf://org/repo[/file][@revision]`` on the hub.

The Hugging Face hub is reached through huggingface_hub alone: its cache, its token, its environment variables
(``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_ENDPOINT``). Files are fetched, and no code that lies beside them is ever run.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

SCHEME = "hf://"
WEIGHTS = ("checkpoint_final.pth", "checkpoint.pth", "model.safetensors")  # the first that is there counts
DESCRIPTIONS = ("config.json", "adaptation_plan.json")  # beside model.safetensors, which holds numbers only
_ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>.+))?", re.ASCII)


def located(given: str | Path, trust: bool = False) -> Path:
    """The file itself, fetched where it has to be. ``trust``: whether code in it would be run, which the hub's never is.

    Raises:
        ValueError: no such file, repository or revision, no access to it, or nobody answers; says which.
    """
    if str(given).startswith(SCHEME):
        if trust:
            raise ValueError(f"{given}: files of the hub are never trusted to run code. Download it, look at it, name the path.")
        return _fetched(str(given))
    path = Path(given)
    if not path.is_dir():
        return path
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} is not a file, and a folder without {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}. Name the file.")


def name_of(given: str | Path) -> Path:
    """An absolute path that tells files apart: for the hub's addresses of organisation, repository, file and revision."""
    found = _ADDRESS.fullmatch(str(given))
    if found is None:
        return Path(given).resolve()
    return Path("/", found["repository"] + (f"@{found['revision']}" if found["revision"] else ""), found["file"] or "")


def _fetched(address: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ValueError(f"{address}: expected hf://organisation/repository, and after it /file and @revision if need be.")
    repository, revision = found["repository"], found["revision"]
    names = (found["file"],) if found["file"] else WEIGHTS
    try:
        for name in names:
            try:
                file = Path(hf_hub_download(repository, name, revision=revision))
            except errors.EntryNotFoundError as e:  # there is none, or not in the cache and nobody answers
                missing = e
                continue
            for beside in DESCRIPTIONS if file.suffix == ".safetensors" else ():
                with contextlib.suppress(errors.EntryNotFoundError):
                    hf_hub_download(repository, str(Path(name).with_name(beside)), revision=revision)
            return file
    except errors.HFValidationError as e:
        raise ValueError(f"{address}: {e}") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{address}: {repository} has no revision {revision!r}.") from None
    except errors.GatedRepoError:
        raise ValueError(f"{address}: access has to be asked for on the hub, and a token set (hf auth login).") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{address}: no such repository, or it is private and no token is set (hf auth login).") from None
    except OSError as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{address} cannot be fetched: {reason}") from None
    if isinstance(missing, errors.LocalEntryNotFoundError):
        raise ValueError(
            f"{address} is not in huggingface_hub's cache, and the hub does not answer or is switched off."
        ) from None
    raise ValueError(f"{address}: {repository} has no file {' or '.join(names)}.")
