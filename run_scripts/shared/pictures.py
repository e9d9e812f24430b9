"""Reading images for the scripts, from a folder or a dataset of the Hub."""

import os

import datasets

from trainer.shared.pictures import decode_when_read
from trainer.shared.tables import load_hub_dataset


def read_pictures(
    role: str,
    folder: str | None,
    dataset_name: str | None,
    config: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
) -> datasets.Dataset:
    """
    Args:
        role: `train` or `test`, for messages, which name the argument `ROLE_dir`.
        folder: folder of images, or of one folder of images per class; None for a dataset of the Hub.
        dataset_name, config, split: that dataset.
        image_column: column of the images.
        label_column: column of the classes, if they are needed; with a folder, any name.

    Returns:
        a table with the columns `image`, `index` and, with a `label_column`, `label`.

    Raises:
        ValueError: the folder does not exist or cannot be read, a column is missing, or the image column has no images.
    """
    if folder is None:
        table, source = load_hub_dataset(str(dataset_name), config, split=split), dataset_name
    else:
        table, source = _read_folder(folder, role), folder
        label_column = label_column and "label"
        image_column = "image"
    argument = "dataset_name" if folder is None else f"{role}_dir"
    wanted = [image_column, *([label_column] if label_column else [])]
    for name in wanted:
        if name not in table.column_names:
            raise ValueError(f"{argument}: {source} has no column {name} among {', '.join(table.column_names)}")
    if not isinstance(table.features[image_column], datasets.Image):
        raise ValueError(f"image_column: {image_column} of {source} has no images")
    table = table.select_columns(wanted)
    names = dict(zip(wanted, ("image", "label"), strict=False))
    table = table.rename_columns({old: new for old, new in names.items() if old != new})
    return decode_when_read(table.add_column("index", list(range(len(table)))), argument)


def _read_folder(folder: str, role: str) -> datasets.Dataset:
    if not os.path.isdir(folder):
        raise ValueError(f"{role}_dir: {folder} is not a folder")
    try:
        return datasets.load_dataset("imagefolder", data_files={role: os.path.join(folder, "**")}, split=role)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{role}_dir: {folder} cannot be read as images: {reason}") from error
