"""`elo push`: upload a model folder to the Hugging Face hub or to object storage, after a check of every file."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from elo.checkpoint.folder import CONFIG_FILE
from elo.checkpoint.tensor_files import open_checkpoint
from elo.errors import EloError, error_line
from elo.format import memory
from elo.store.remote import is_remote, upload_files

_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
_SECRET_FILES = re.compile(r"id_(rsa|dsa|ecdsa|ed25519)|credentials(\.json)?|token|.*\.(pem|key|p12|pfx)")
_SECRETS = {
    "a Hugging Face token": rb"hf_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40})",
    "an API key": rb"\b(sk-[A-Za-z0-9_-]{32}|AKIA[0-9A-Z]{16}\b|AIza[A-Za-z0-9_-]{35}|xox[abprs]-[A-Za-z0-9-]{20})",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}


def push(
    model: str | Path,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Upload a model folder; hidden files are left out.

    The hub receives one commit, with the token from HF_TOKEN or from `hf auth login`. Object storage receives
    config.json last, so that an interrupted upload is not a model, and the same call completes it.

    Args:
        model: model folder, for example RUN/model.
        repo: name of the hub repository, owner/name, which is created if it does not exist; or an address such as
            s3://bucket/path.
        private: make the repository private.
        dry_run: check and list the files, without a token and without the network.
        say: function that shows the user a line.

    Returns:
        {"repo", "files" (size in bytes by path), "url" (of the commit, or the address; None for a dry run)}

    Raises:
        EloError: the folder is not a model, or contains a pickle or a secret; the name is invalid; there is no token;
            or the hub or the storage rejects the upload.
    """
    in_storage = is_remote(repo)
    if not in_storage:
        _check_name(repo)
    elif private:
        raise EloError(f"--private: {repo}: is an address in object storage; set access there, and remove --private")
    token = get_token()
    files = _files(Path(model), token)
    for path, size in files.items():
        say(f"{memory(size):>10}  {path}")
    what = f"{len(files)} files, {memory(sum(files.values()))}"
    if "README.md" not in files:
        say("note: there is no README.md, so the repository will have no model card")
    if dry_run:
        access = "" if in_storage else " (private)" if private else " (public if it is new)"
        say(f"dry run: {what} would be uploaded to {repo}{access}")
        return {"repo": repo, "files": files, "url": None}
    if in_storage:
        say(f"uploading {what} to {repo}")
        upload_files(Path(model), sorted(files, key=lambda name: (name == CONFIG_FILE, name)), repo)
        return {"repo": repo, "files": files, "url": repo}
    if token is None:
        raise EloError("token: none found; set HF_TOKEN to a token with write access, or run `hf auth login`")
    say(f"uploading {what} to {repo}")
    return {"repo": repo, "files": files, "url": _upload(Path(model), repo, files, private, token)}


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise EloError(f"--repo {repo!r}: {error_line(error)}; write owner/name") from None
    if repo.count("/") != 1:
        raise EloError(f"--repo {repo!r}: has no owner; write owner/name, for example your-name/{repo}")


def _files(folder: Path, token: str | None) -> dict[str, int]:
    """Return the size of each file to upload, by its path in the folder."""
    if not folder.is_dir():
        raise EloError(f"{folder}: no such folder; give the folder of a model")
    if (folder / "stages").is_dir():
        model = folder / "model"
        remedy = f"give its model, {model}" if model.is_dir() else "give the folder of a model, such as RUN/model"
        raise EloError(f"{folder}: is the folder of a run or a comparison; {remedy}")
    if not (folder / CONFIG_FILE).is_file():
        raise EloError(f"{folder}: has no {CONFIG_FILE}; give the folder of a model")
    weights = open_checkpoint(folder).files
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in Path(name).parts) or not path.is_file():
            continue
        if name not in weights:
            _refuse_pickle(path)
            _refuse_secret(path, token)
        files[name] = path.stat().st_size
    return files


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(2)
    is_pickle = path.suffix in _PICKLES or (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"))
    if not is_pickle and start == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            is_pickle = any(name.endswith(".pkl") for name in archive.namelist())
    if is_pickle:
        raise EloError(f"{path}: is a pickle, which can run code when it is loaded; remove it from the folder")


def _refuse_secret(path: Path, token: str | None) -> None:
    if _SECRET_FILES.fullmatch(path.name):
        raise EloError(f"{path}: has the name of a file with a key or password; remove it from the folder")
    content = path.read_bytes()
    patterns = _SECRETS | ({"your Hugging Face token": re.escape(token.encode())} if token else {})
    for what, pattern in patterns.items():
        if found := re.search(pattern, content):
            line = content.count(b"\n", 0, found.start()) + 1
            raise EloError(f"{path}:{line}: looks like {what}; remove it, and revoke it if it is real")


def _upload(folder: Path, repo: str, files: dict[str, int], private: bool, token: str) -> str:
    """Upload exactly these files and return the commit's address."""
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise EloError(
                f"--repo {repo}: exists and is public, but --private was given; make it private on the hub, or "
                "choose another name"
            )
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
        return str(api.create_commit(repo, operations, commit_message="Upload model").commit_url)
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "the token is not valid; set HF_TOKEN to a token with write access",
            403: "the token may not write there; check the owner, and that the token has write access",
            404: "there is no such owner, or the token may not see it; check the name",
        }.get(status, "try again later")
        raise EloError(f"--repo {repo}: the hub answered {status} ({_without(token, error)}); {remedy}") from None
    except (HTTPError, OfflineModeIsEnabled) as error:  # of httpx, or of httpx2 with huggingface_hub 2
        raise EloError(
            f"{api.endpoint}: cannot be reached ({_without(token, error)}); check the network, and that HF_HUB_OFFLINE "
            "is not set"
        ) from None
    except ValueError as error:  # metadata in README.md that the hub does not accept
        if isinstance(error, EloError):
            raise
        raise EloError(f"--repo {repo}: {_without(token, error)}; correct the file and try again") from None


def _without(token: str, error: Exception) -> str:
    return error_line(error).replace(token, "***")
