"""Plots and tables that all notebooks show, with alternative text and colours that colour-blind readers tell apart.

`show` shows a figure, `show_flow` the map of the course, `show_answers` answers beside their images.
"""

from lessons.plots.figures import (
    BLUE,
    GREY,
    INK,
    MAP,
    ORANGE,
    LiveCurve,
    bars,
    border,
    chinese_font,
    data_uri,
    draw_matrix,
    figure_html,
    intervals,
    note,
    patches,
    png,
    readable,
    scale_rows,
    show,
    smoothed,
    style,
)
from lessons.plots.flow import BOXES, HEIGHT, WIDTH, flow_figure, show_flow
from lessons.plots.source import show_source
from lessons.plots.tables import image_html, show_answers, show_picture, show_supervision, show_taught, table_html
