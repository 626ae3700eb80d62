"""The smaller language model: its shape, and that its checkpoint loads and can be trained."""

from dataclasses import replace

import torch

from minivlm.checkpoint import load_checkpoint, read_meta
from minivlm.pretraining import loop
from minivlm.pretraining.language_model import ROUNDS
from minivlm.pretraining.small_lm import make_small_lm
from minivlm.runtime.paths import BASE, data_folder


def test_it_is_made_by_the_given_rounds_and_trains_upon(tmp_path):
    rounds = [(replace(loop.Recipe(1, 2, 0.02, 3e-3), save_every=1), ROUNDS[0][1])]
    out = make_small_lm(tmp_path / "small", tmp_path / "work", data_folder(), rounds, exam=2)
    model, _, meta = load_checkpoint(out)
    assert meta["stage"] == "base" and set(meta["holds"]) == {"projector", "language_model"}
    assert meta["hashes"]["vision"] == read_meta(data_folder() / BASE)["hashes"]["vision"]
    assert model.projector.weight.shape == (128, 192) and torch.isfinite(model.projector.weight).all()
    assert set(meta["metrics"]["language_model"]) >= {"list en", "mosaic zh"}
    assert (out / "language_model.log.jsonl").read_text("utf-8").count("\n") == 1
