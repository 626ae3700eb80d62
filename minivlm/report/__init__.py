"""The report of a run: one HTML page, the same as Markdown, and two tables for a README.

The code turns a run's plain JSON into tables and texts; the templates only lay them out.
"""

from minivlm.report.answers import COLUMNS, marked, table_as_text
from minivlm.report.build import read_seeds, write_report
from minivlm.report.tables import beats_blind, headline, held
