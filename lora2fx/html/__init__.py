"""Runs as self-contained HTML pages: nothing is loaded from anywhere, nothing is executed."""

from lora2fx.html.heat_map import heat_cells, render_heat_map
from lora2fx.html.history import adapter_charts, series
from lora2fx.html.page import join_page, render_html
from lora2fx.html.tables import render_table

__all__ = [
    "adapter_charts",
    "heat_cells",
    "join_page",
    "render_heat_map",
    "render_html",
    "render_table",
    "series",
]
