"""Models on the Hugging Face Hub: hf://OWNER/NAME, hf://OWNER/NAME@REVISION, and a file below either.

They are read through huggingface_hub's own cache. Its environment variables hold: HF_TOKEN, HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub import constants

SCHEME = "hf://"
_URL = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/\s]+))?(/(?P<file>\S+))?")
# What a model is read from; anything else, pickles and code above all, is not even downloaded.
_READ = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_DOUBLE = ("*/*", "consolidated*.safetensors")  # the same weights again, as some repositories have them


def is_model(url: str) -> bool:
    """Whether a URL is of a model on the Hub; fsspec reads what else there is, such as hf://datasets/OWNER/NAME."""
    return url.startswith(SCHEME) and url[len(SCHEME) :].split("/")[0] not in ("datasets", "spaces", "buckets")


def local(url: str, suffixes: tuple[str, ...] = ("",)) -> pathlib.Path:
    """The local copy of a model, or of one file of its repository.

    Args:
      url: hf://OWNER/NAME, with @REVISION or not, and a file's path in it or not. GGUF files are only read by name.
      suffixes: of a repository, copy only the files whose names end so; "" is all that a model is read from.

    Raises:
      FileNotFoundError: there is no such repository, revision or file, or it may not be read.
      OSError: the Hub cannot be reached, and the cache does not have it.
      ValueError: `url` is none.
    """
    found = _URL.fullmatch(url.rstrip("/"))
    if found is None or ".." in url.split("/"):
        raise ValueError(f"{url} names no model of the Hub: give hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    wanted = list(_READ) if "" in suffixes else [f"*{suffix}" for suffix in suffixes]
    with _one_line(url, "read"):
        folder = huggingface_hub.snapshot_download(
            found["repo"],
            revision=found["revision"],
            allow_patterns=found["file"] or wanted,
            ignore_patterns=None if found["file"] else list(_DOUBLE),
            endpoint=_endpoint(),
            library_name="allmem-jax",
        )
    path = pathlib.Path(folder, found["file"] or "")
    if not path.exists():
        raise FileNotFoundError(f"{url}: the repository {found['repo']} has no such file")
    return path


def upload(folder: pathlib.Path, repo: str, card: str | None, *, private: bool, message: str) -> str:
    """Puts a folder's files into a repository, which is made where it is missing; returns its address.

    Args:
      folder: of a model.
      repo: OWNER/NAME.
      card: its README.md; None where the folder has one.
      private: whether a repository that is made can be seen by its owner alone.
      message: of the commit.

    Raises:
      OSError: the Hub cannot be reached, or does not let this token write there.
      ValueError: `repo` is no name of a repository, or there is no token.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"repo={repo!r} is no repository of the Hub: give OWNER/NAME")
    if huggingface_hub.get_token() is None:
        raise ValueError("no token for the Hub: set HF_TOKEN to one that may write, or log in with `hf auth login`")
    api = huggingface_hub.HfApi(endpoint=_endpoint(), library_name="allmem-jax")
    with _one_line(SCHEME + repo, "written"):
        address = api.create_repo(repo, private=private, exist_ok=True)
        if card is not None:
            note = f"{message}: its card"
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo, commit_message=note)
        kept = [*_READ, "README.md"]
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, allow_patterns=kept)
    return str(address)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextlib.contextmanager
def _one_line(url: str, done: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into an error of one line that names the URL and what to do."""
    from huggingface_hub import errors  # takes longer to import than all else that a command's help needs

    try:
        yield
    except errors.GatedRepoError as error:
        raise FileNotFoundError(f"{url} is gated: accept its terms on the Hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{url}: the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the name, and HF_TOKEN if it is private"
        raise FileNotFoundError(f"{url}: no such repository, or none that this token may see: {hint}") from error
    except errors.LocalEntryNotFoundError as error:
        why, fix = "the Hub cannot be reached", "check the network and HF_ENDPOINT"
        if constants.HF_HUB_OFFLINE:
            why, fix = "HF_HUB_OFFLINE is set", "unset it to download"
        raise OSError(f"{url}: {why}, and its cache does not have it: {fix}") from error
    except Exception as error:  # of several kinds where there is no network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{url} cannot be {done}: {reason:.300}") from error
