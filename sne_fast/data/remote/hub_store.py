"""Repositories of the Hugging Face Hub, at one commit each."""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from .failures import StoreError, attempt, status_of
from .http_store import Ranges
from .remembered import Remembered
from .stores import FOLDER, Entry, Listing, Store, etag_of, need, tree_of

__all__ = ["HubStore", "hub_store"]

_PATH = re.compile(
    r"hf://(?:(?P<kind>models|datasets|spaces)/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<path>.*))?",
    re.DOTALL,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Repository(NamedTuple):
    """A repository at a revision: its kind as the Hub's API calls it, and its name."""

    kind: str
    name: str
    revision: str | None

    def url(self, revision: str | None) -> str:
        """Return the URL of the repository at another revision."""
        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        at = "" if revision is None else f"@{quote(revision, safe='')}"
        return f"hf://{prefix}{self.name}{at}"


_commits: Remembered[str] = Remembered(10_000, 60.0)
_stores: Remembered[HubStore] = Remembered(1_000)


def hub_store(url: str) -> tuple[HubStore, str]:
    """Return the repository of a URL at the commit that its revision means, and the path in it.

    Args:
        url: `hf://user/name`, with `datasets/` or `spaces/` before the name for other repositories, with `@revision` (a
            branch, tag, or commit; the main branch without) and a path behind it.

    Raises:
        StoreError: no such URL; no repository or revision of this name; one that may not be read.
        ModuleNotFoundError: huggingface_hub is missing.
    """
    need("huggingface_hub")
    found = _PATH.fullmatch(url)
    if found is None:
        raise StoreError(f"{url}: must be hf://user/name, with @revision and /path behind it where these are wanted")
    revision = None if found["revision"] is None else unquote(found["revision"])
    repository = Repository((found["kind"] or "models").removesuffix("s"), found["repo"], revision)
    pinned = revision is not None and _COMMIT.fullmatch(revision) is not None
    commit = revision if pinned else _commits.get(repository, lambda: _commit_of(repository))
    assert commit is not None
    at_commit = repository._replace(revision=commit)
    store = _stores.get(at_commit, lambda: HubStore(at_commit))
    return store, (found["path"] or "").strip("/")


def forget_repositories() -> None:
    """Ask anew which commits revisions mean, and what is in them."""
    _commits.forget()
    _stores.forget()


def _commit_of(repository: Repository) -> str:
    from huggingface_hub import HfApi

    url = repository.url(repository.revision)

    def find() -> str:
        try:
            info = HfApi().repo_info(repository.name, repo_type=repository.kind, revision=repository.revision)
        except Exception as error:
            raise _told(error, url) from error
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise StoreError(f"{url}: the Hub does not say at which commit it is")
        return info.sha

    return attempt(url, find)


class HubStore(Store):
    """A repository at a commit, which does not change: what is known of it stays true.

    Args:
        repository: with a commit as its revision.
    """

    def __init__(self, repository: Repository) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import build_hf_headers

        super().__init__(repository.url(repository.revision))
        self.repository = repository
        self.api = HfApi()
        self.listings = Remembered(100_000)
        self.ranges = Ranges(build_hf_headers(library_name="sne_fast"))

    def find_listing(self, folder: str) -> Listing:
        """Ask the Hub for one folder."""
        return self._tree(folder, recursive=False).get(folder, {})

    def find_tree(self, folder: str) -> dict[str, Listing]:
        """Ask the Hub for all files at once."""
        return self._tree(folder, recursive=True)

    def _tree(self, folder: str, recursive: bool) -> dict[str, Listing]:
        try:
            items: list[Any] = list(
                self.api.list_repo_tree(
                    self.repository.name, folder or None, recursive=recursive, revision=self.repository.revision,
                    repo_type=self.repository.kind,
                )
            )  # fmt: skip
        except Exception as error:
            if type(error).__name__ in ("RemoteEntryNotFoundError", "EntryNotFoundError"):
                raise FileNotFoundError(self.url(folder)) from error
            raise _told(error, self.url(folder)) from error
        start = len(folder) + 1 if folder else 0
        return tree_of(folder, [(item.path[start:], self._entry(item)) for item in items])

    def _entry(self, item: Any) -> Entry:
        if not hasattr(item, "blob_id"):
            return FOLDER
        size = item.size if isinstance(item.size, int) and item.size >= 0 else -1
        return Entry(size, etag_of(size, item.lfs.sha256 if item.lfs else item.blob_id))

    def find_range(self, path: str, entry: Entry, start: int, count: int) -> bytes:
        """Ask the Hub, which sends large files from where it keeps them."""
        from huggingface_hub import hf_hub_url

        kind = None if self.repository.kind == "model" else self.repository.kind
        repository = self.repository
        url = hf_hub_url(
            repository.name, path, repo_type=kind, revision=repository.revision, endpoint=self.api.endpoint
        )
        try:
            found = self.ranges.get(url, start, count)
        except FileNotFoundError:
            raise FileNotFoundError(self.url(path)) from None
        except Exception as error:
            raise _told(error, self.url(path)) from error
        if found.size is not None and found.size != entry.size:
            raise StoreError(f"{self.url(path)}: holds {found.size} bytes where the Hub's list says {entry.size}")
        return found.body


def _told(error: Exception, url: str) -> Exception:
    """Return an error that says what to do where the Hub refuses, else the error itself."""
    response: Any = getattr(error, "response", None)
    headers: Any = getattr(error, "headers", None) or getattr(response, "headers", None) or {}
    name, code = type(error).__name__, headers.get("X-Error-Code")
    if name == "GatedRepoError" or code == "GatedRepo":
        page = url.partition("@")[0].removeprefix("hf://")
        return StoreError(
            f"{url}: is gated; accept its conditions on the Hub's page of {page}, and log in with `hf auth login` or "
            f"set HF_TOKEN"
        )
    if name == "RevisionNotFoundError" or code == "RevisionNotFound":
        return StoreError(f"{url}: there is no such revision of this repository")
    if name in ("RepositoryNotFoundError", "HFValidationError") or code == "RepoNotFound":
        return StoreError(
            f"{url}: there is no such repository, or it is private; check the name, or log in with `hf auth login`"
        )
    if name in ("OfflineModeIsEnabled", "LocalEntryNotFoundError") and "offline" in str(error).lower():
        return StoreError(f"{url}: cannot be reached, as HF_HUB_OFFLINE is set")
    if status_of(error) == 401:
        return StoreError(f"{url}: may not be read (status 401); log in with `hf auth login` or set HF_TOKEN")
    return error
