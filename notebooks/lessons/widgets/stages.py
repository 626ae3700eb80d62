"""What trains: a widget to tick blocks of the model."""

import html

import ipywidgets as widgets

from lessons.lenses.blocks import TITLED_STAGES, blocks, blocks_of, ledger_of, strips
from lessons.plots import figure_html, flow_figure
from minivlm.config import STAGES
from minivlm.model import MiniVLMForConditionalGeneration

OWN = "your own"


class StageExplorer:
    """A stage or a choice of one's own: what it trains, in numbers, to scale, and on the map of the course.

    Tab goes on, the space bar presses a stage's button or ticks a block. Without a kernel there is no widget;
    `show_strips` leaves a figure.

    Attributes:
        widget: to be shown as the last line of a cell.
        stage: the buttons of the stages, and of a choice of one's own.
        boxes: a box to tick for each block; the encoder's cannot be ticked.
        page: what the choice means, as HTML.
    """

    def __init__(self, model: MiniVLMForConditionalGeneration):
        self.model = model
        self.stage = widgets.ToggleButtons(options=[*TITLED_STAGES, OWN], description="stage", value="stage 1")
        self.boxes = {
            name: widgets.Checkbox(description=name, indent=False, layout=widgets.Layout(width="auto"))
            for name in blocks(model)
        }
        self.boxes["encoder"].disabled = True
        self.boxes["encoder"].tooltip = "frozen in every stage"
        self.page = widgets.HTML()
        row = widgets.HBox(list(self.boxes.values()), layout=widgets.Layout(flex_flow="row wrap"))
        self.widget = widgets.VBox([self.stage, row, self.page])
        self._setting = False
        self.stage.observe(self._stage_changed, "value")
        for box in self.boxes.values():
            box.observe(self._box_changed, "value")
        self._stage_changed()

    @property
    def names(self) -> list[str]:
        """The blocks that are ticked."""
        return [name for name, box in self.boxes.items() if box.value]

    def _stage_changed(self, _change: dict | None = None) -> None:
        """A stage ticks its blocks; a choice of one's own begins with those that are ticked."""
        if self.stage.value in TITLED_STAGES:
            trains = blocks_of(self.model, STAGES["scenes"][TITLED_STAGES[self.stage.value]])
            self._setting = True
            for name, box in self.boxes.items():
                box.value = name in trains
            self._setting = False
        self._draw()

    def _box_changed(self, _change: dict) -> None:
        """Ticking a block makes the choice one's own, unless it is now exactly a stage's."""
        if self._setting:
            return
        stages = {title: blocks_of(self.model, STAGES["scenes"][name]) for title, name in TITLED_STAGES.items()}
        now = next((title for title, names in stages.items() if names == self.names), OWN)
        if now == self.stage.value:
            self._draw()
        else:
            self.stage.value = now

    def _draw(self) -> None:
        """Say what the choice means: the ledger, one sentence, the strip, and the map with what trains lit."""
        names, title = self.names, self.stage.value
        account = ledger_of(self.model, names, title)
        share = account.total.trained / account.total.parameters
        sentence = f"{title}: {', '.join(names) or 'nothing'} trains, {share:.1%} of all parameters."
        boxes = {  # the head of the language model is the embedding table
            "encoder": "encoder" in names,
            "W": "W" in names,
            "look-up": "embeddings" in names,
            "language model": any(name.startswith("layer") for name in names),
        }
        lit = [box for box, trains in boxes.items() if trains]
        flow = flow_figure(lit, {box: "trains" if trains else "frozen" for box, trains in boxes.items()})
        diagram = f"Diagram of the data flow. Lit, because they train: {', '.join(lit) or 'nothing'}."
        strip = f"The model as a strip, to scale. {sentence}"
        self.page.value = (
            f"<pre>{html.escape(str(account))}</pre><p role='status'>{html.escape(sentence)}</p>"
            f"{figure_html(strips(self.model, {title: names}), strip, 920)}{figure_html(flow, diagram, 920)}"
        )
