"""What trains in which stage: blocks, the strip, the widget's callbacks, and frozen parameters."""

import io

import pytest
import torch
from lessons import lesson_04, plots
from lessons.lenses.blocks import blocks, blocks_of, chosen, ledger_of, only, size, strips
from lessons.widgets.stages import OWN, StageExplorer
from PIL import Image
from training import save_base, some_rows, stage

from minivlm.config import STAGES
from minivlm.model import ledger, set_trainable
from minivlm.train import Trainer

ALL = ["W", "embeddings", "layer 1", "layer 2"]


class TestBlocks:
    def test_every_parameter_is_in_exactly_one(self, model):
        names = [name for prefixes in blocks(model).values() for name in chosen(model, prefixes)]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        assert list(blocks(model)) == ["encoder", *ALL]

    def test_sizes_by_hand(self, model):
        assert size(model, ["projector."]) == 16 * 24
        assert size(model, blocks(model)["embeddings"]) == 320 * 24  # the tied head is not counted again
        attention, mlp, norms = 24 * 24 * 2 + 24 * 12 * 2, 3 * 24 * 40, 2 * 24
        assert size(model, blocks(model)["layer 1"]) == attention + mlp + norms
        assert size(model, blocks(model)["layer 2"]) == attention + mlp + norms + 24

    @pytest.mark.parametrize("name", ["pretrain", "sft"])
    def test_the_ledger_is_that_of_the_package(self, model, name):
        one = STAGES["scenes"][name]
        mine = ledger_of(model, blocks_of(model, one), name)
        set_trainable(model, one)
        assert mine == ledger(model, one)


class TestOnly:
    @pytest.mark.parametrize("frozen_before", [False, True])
    def test_real_steps_move_the_chosen_and_nothing_else(self, tmp_path, model, processor, frozen_before):
        base = save_base(tmp_path / "base", model, processor)
        model.requires_grad_(not frozen_before)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        prefixes = ("projector.", *blocks(model)["layer 1"])
        with only(model, prefixes):
            short = stage("sft", parent="base", steps=2)
            Trainer(model, processor, some_rows(), short, tmp_path / "sft", parent=base, precision="fp32").fit()
        after = model.state_dict()
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])} - {"projector.weight"}
        assert moved == set(chosen(model, prefixes)) - {"projector.weight"}

    def test_afterwards_everything_learns_again(self, model):
        with only(model, ["projector."]):
            pass
        weight = model.language_model.model.norm.weight
        (weight.sum() * 2).backward()
        assert weight.grad.eq(2).all()

    @pytest.mark.parametrize(("prefixes", "message"), [(["W"], "begins with 'W'"), ([], "begins with nothing")])
    def test_nothing_chosen_is_refused(self, model, prefixes, message):
        with pytest.raises(ValueError, match=message), only(model, prefixes):
            pass


class TestFigures:
    def test_strips_name_every_block_and_count(self, model):
        figure = strips(model, {"stage 1": ["W"], "all": ALL})
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert texts.count("encoder") == texts.count("layer 2") == 2
        assert any(text.startswith(f"{16 * 24:,} train\n") for text in texts)
        hatched = [bar for bar in figure.axes[0].patches if bar.get_hatch()]
        assert len(hatched) == 5, "what trains is not said by colour alone"
        assert Image.open(io.BytesIO(plots.png(figure))).width > 500

    def test_an_unknown_block_is_refused(self, model):
        with pytest.raises(ValueError, match=r"no block layer 3; the blocks are encoder, W, "):
            strips(model, {"mine": ["layer 3"]})

    def test_the_static_figure_says_it_in_words(self, model, monkeypatch):
        shown = []
        monkeypatch.setattr(lesson_04, "show", lambda figure, alt, summary: shown.append((alt, summary)))
        lesson_04.show_strips(model)
        share = 16 * 24 / sum(parameter.numel() for parameter in model.parameters())
        alt, summary = shown[0]
        assert f"stage 1 trains W, {share:.1%} of all" in alt and f"Stage 1 trains {share:.1%}" in summary


class TestExplorer:
    def test_a_stage_ticks_its_blocks_and_the_page_follows(self, model):
        explorer = StageExplorer(model)
        assert explorer.names == ["W"] and explorer.boxes["encoder"].disabled
        explorer.stage.value = "stage 2"
        assert explorer.names == ALL
        assert str(ledger_of(model, ALL, "stage 2")) in explorer.page.value
        assert "Lit, because they train: W, look-up, language model." in explorer.page.value

    def test_a_tick_makes_the_choice_ones_own_until_it_is_a_stages_again(self, model):
        explorer = StageExplorer(model)
        explorer.boxes["embeddings"].value = True
        assert explorer.stage.value == OWN and explorer.names == ["W", "embeddings"]
        assert "Lit, because they train: W, look-up." in explorer.page.value
        explorer.boxes["layer 2"].value = True
        assert "W, embeddings, layer 2 trains" in explorer.page.value
        explorer.boxes["layer 1"].value = True
        assert explorer.stage.value == "stage 2"

    def test_ones_own_choice_begins_with_what_is_ticked(self, model):
        explorer = StageExplorer(model)
        explorer.stage.value = OWN
        assert explorer.names == ["W"]
        explorer.boxes["W"].value = False
        assert f"{OWN}: nothing trains, 0.0% of all parameters." in explorer.page.value
