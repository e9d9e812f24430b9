"""What `from_pretrained` needs besides transformers: a check of the weights, and arguments for the other files."""


def check_loaded(info: dict, name: object, hint: str) -> None:
    """ValueError if `from_pretrained` left tensors without weights, which would be random.

    Args:
        info: the loading info of transformers' `from_pretrained`.
        name: the folder or repository, for the message.
        hint: what to do instead, for the message.
    """
    absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if absent:
        raise ValueError(
            f"{name}: the weights lack {len(absent)} of the tensors that config.json asks for, for example "
            f"{absent[0]}; they would be random ({hint})"
        )


def auto_kwargs(kwargs: dict) -> dict:
    """The arguments of `from_pretrained` that hold for transformers' Auto classes too, which load the other files.

    `trust_remote_code` is always among them, False unless the caller has given it: without it, an Auto class that finds
    code in a folder asks on standard input whether to run it.
    """
    return {**hub_kwargs(kwargs), "trust_remote_code": bool(kwargs.get("trust_remote_code"))}


def hub_kwargs(kwargs: dict) -> dict:
    """The arguments of `from_pretrained` that the tokenizer and the pooling must be fetched with as well."""
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    return {name: kwargs[name] for name in names if name in kwargs}
