"""Uploads an exported folder to the Hugging Face Hub, as one commit."""

import pathlib

from lmim_jax.utils.errors import UserError

NEED_TOKEN = "log in with `hf auth login`, or set HF_TOKEN to a token with the role `write`"


def check(repo: str) -> None:
    """Check what can be checked without the network.

    Args:
      repo: USER/NAME.

    Raises:
      UserError: huggingface_hub is not installed, the name is malformed, or there is no token.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise UserError(
            f"--push needs huggingface_hub ({error}): pip install 'lmim_jax[hub]'"
        ) from error
    if repo.count("/") != 1:
        raise UserError(f"--push={repo} must be USER/NAME")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push={repo} must be USER/NAME: {error}") from error
    if not huggingface_hub.get_token():
        raise UserError(f"--push={repo}: there is no token for the Hugging Face Hub; {NEED_TOKEN}")


def push(folder: pathlib.Path, repo: str, private: bool, message: str) -> str:
    """Create a repository, unless it exists, and upload all files of a folder to it.

    Args:
      folder: a complete exported folder.
      repo: USER/NAME.
      private: whether only its owner may see it.
      message: of the commit.

    Returns:
      The address of the repository.

    Raises:
      UserError: the Hub refuses it or cannot be reached, or the repository exists and is public,
        although it should be private. Nothing was committed then.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    network_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of the client it uses
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(f"--private: {repo} exists and is public; nothing was uploaded")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except errors.HfHubHTTPError as error:
        raise UserError(f"--push={repo}: {_describe(error)}; {_retry(folder, repo)}") from error
    except (OSError, network_error) as error:
        raise UserError(
            f"--push={repo}: the Hugging Face Hub cannot be reached ({error}); "
            f"{_retry(folder, repo)}"
        ) from error
    return str(url)


def _describe(error: Exception) -> str:
    """What an answer of the Hub means."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = getattr(error, "server_message", None) or str(error).splitlines()[0]
    if status == 401:
        return f"the Hub does not accept the token ({said}): {NEED_TOKEN}"
    if status == 403:
        return f"the token may not write there ({said}): {NEED_TOKEN}"
    return f"the Hub answered {status} ({said})"


def _retry(folder: pathlib.Path, repo: str) -> str:
    return f"the files are complete in {folder}, later: hf upload {repo} {folder}"
