"""File modes of saved weights."""

import os


def share_weights(folder: str | os.PathLike, like: str = "config.json") -> None:
    """Give the weights in a folder the mode of another of its files, which the umask has set.

    safetensors writes files that only their owner can read.
    """
    if not os.path.exists(os.path.join(folder, like)):  # adapters, which are saved without their model
        return
    mode = os.stat(os.path.join(folder, like)).st_mode & 0o777
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            os.chmod(os.path.join(folder, name), mode)
