"""Plots and tables that all notebooks show, with alternative text and colours that colour-blind readers tell apart.

`show` shows a figure, `show_flow` the map of the course, `show_answers` answers beside their images.
"""

from lessons.plots.figures import (
    BLUE,
    GREY,
    INK,
    LIGHT_BLUE,
    MAP,
    ORANGE,
    PALE_ORANGE,
    LiveCurve,
    bars,
    border,
    chinese_font,
    data_uri,
    draw_matrix,
    estimate_panels,
    figure_html,
    note,
    operations_bars,
    patches,
    png,
    readable,
    scale_rows,
    show,
    show_shares,
    stacked_bars,
    style,
    trailing_mean,
)
from lessons.plots.flow import BOX_HEIGHT, BOX_WIDTH, BOXES, flow_figure, show_flow
from lessons.plots.source import show_source
from lessons.plots.tables import image_html, show_answers, show_image, show_supervision, show_taught, table_html
