"""Where the shipped weights lie: in `data/` of the checkout, from wherever in it a notebook or a command runs."""

import os
from pathlib import Path

VARIABLE = "MINIVLM_DATA"
BASE, PRETRAIN, SFT = "base", "pretrain", "sft"  # the checkpoints in it: before training, after stage 1, after stage 2


def data_folder() -> Path:
    """The folder with the checkpoints `base`, `pretrain` and `sft`.

    The environment variable `MINIVLM_DATA` names it; without one it is `data/` beside the package, as in a checkout
    that was installed with `pip install -e .`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    chosen = os.environ.get(VARIABLE)
    folder = Path(chosen) if chosen else Path(__file__).resolve().parents[2] / "data"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: there is no data folder here; work in a checkout of the project (pip install -e .), "
            f"or name the folder in the environment variable {VARIABLE}"
        )
    return folder
