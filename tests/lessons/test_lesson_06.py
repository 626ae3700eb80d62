"""Notebook 06: what its figures show is what goes in, and its cell for the network works with one."""

import http.server
import json
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from huggingface_hub import constants
from lessons import lesson_06, plots
from lessons.cost import Memory
from PIL import Image

from minivlm.checkpoint import CheckpointError
from minivlm.data.images import open_image
from minivlm.generate import ask

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "06_scaling_to_26m.ipynb"


def test_the_image_shown_is_the_one_that_goes_in(processor):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(lesson_06.as_image(processor, photo)), np.asarray(photo))  # already of that size


def test_the_frame_is_the_square_that_the_processor_keeps(processor):
    photo = Image.new("RGB", (40, 60), "red")
    photo.paste("blue", (0, 0, 40, 10))
    photo.paste("blue", (0, 50, 40, 60))  # what stands above and below the square is blue
    kept = np.asarray(lesson_06.as_image(processor, photo)).astype(int)
    assert (kept[1:-1, :, 2] < 40).all()
    figure = lesson_06.photo_plate(photo, processor, side=2)
    (frame,) = figure.axes[0].patches
    assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (0, 10, 40, 40)
    assert "2 × 2 = 4 patches" in figure.axes[2].get_title("left")


def test_patches_are_shown_apart_and_whole():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    apart = lesson_06.with_gaps(image, side=2, gap=1)
    assert apart.shape == (5, 5, 3) and (apart[2] == 255).all() and (apart[:, 2] == 255).all()
    assert np.array_equal(np.delete(np.delete(apart, 2, 0), 2, 1), np.asarray(image))


@pytest.mark.parametrize("kind", ["arithmetic", "memory"])
def test_bars_bear_their_parts_and_sums(kind):
    if kind == "arithmetic":
        figure = plots.operations_bars({"one": dict(zip("abcde", (10e9, 20e9, 30e9, 40e9, 0.5e9), strict=True))})
        texts, expected = ["10", "20", "30", "40", "100"], [10, 20, 30, 40, 0.5]
    else:
        figure = lesson_06.memory_bars({"one": Memory(1_000_000_000, 2_000_000_000, 3_000_000_000, 4_000_000_000)})
        texts, expected = ["1.0", "2.0", "3.0", "4.0", "10.0"], [1, 2, 3, 4]
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)
    assert [text.get_text() for text in axes.texts] == texts
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in axes.patches}) == len(expected)


class TestNetwork:
    def test_offline_is_believed_without_asking(self, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: pytest.fail("it asked"))
        assert lesson_06.reachable() is False

    def test_an_address_that_answers_is_reachable_and_one_that_does_not_is_not(self, monkeypatch):
        server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
        server.RequestHandlerClass.log_message = lambda *args: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            assert lesson_06.reachable() is True
        finally:
            server.shutdown()
            server.server_close()
        assert lesson_06.reachable(seconds=1) is False

    @pytest.mark.parametrize("case", ["online", "offline", "gone"])
    def test_the_cell_describes_the_photograph_with_a_network_and_says_so_without(
        self, monkeypatch, capsys, case, model, processor
    ):
        """With one: the model that `build` gives, here a tiny one, sees the photograph and the reader's own."""
        cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]]
        (cell,) = (source for source in cells if source.startswith("WEIGHTS ="))
        photo = f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg"
        sources, calls = [], []

        def build(weights):
            sources.append(weights)
            if case == "gone":
                raise CheckpointError(f"{weights}: neither a file here nor to be fetched")
            return model, processor, ["read"]

        def reply(*args):
            calls.append(args)
            return "一个穿制服的人。"

        monkeypatch.setattr(lesson_06, "reachable", lambda: case != "offline")
        monkeypatch.setattr(lesson_06, "build", build)
        names = {"lesson_06": lesson_06, "ask": ask, "reply": reply, "photo": open_image(photo), "PROMPTS": {"zh": "?"}}
        exec(cell.replace("PHOTOS = []", f"PHOTOS = [{photo!r}]"), names)
        output = capsys.readouterr().out
        if case == "online":
            assert len(calls) == 2 and output.count("一个穿制服的人。") == 2 and output.startswith("read\n")
        else:
            assert calls == [] and "random weights of the true shape" in output
            assert ("no network here" if case == "offline" else "nor to be fetched") in output
        assert sources == ([] if case == "offline" else ["jingyaogong/MiniMind2-V-PyTorch/sft_vlm_512.pth"])
